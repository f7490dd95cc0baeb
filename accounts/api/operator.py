"""`/v1/operator/leaked_keys`: which of these texts are keys of ours; nothing of them is logged."""

from __future__ import annotations

from django.http import HttpRequest
from ninja import Router

from accounts import queries
from accounts.authentication import operator_of
from accounts.keys import redacted
from accounts.models import ApiKey
from accounts.schemas.leaked import LeakedKeyOut, LeakedKeysIn, LeakedKeysOut
from accounts.services import keys

router = Router(tags=["Operators"])


@router.post("/leaked_keys", response=LeakedKeysOut, summary="Check for leaked keys")
def check_leaked_keys(request: HttpRequest, given: LeakedKeysIn) -> LeakedKeysOut:
    operator = operator_of(request)
    found = queries.keys_of_texts(given.keys)
    if given.revoke:
        found = [
            key and (keys.revoke_leaked_key(actor=operator, key=key) if key.is_usable else key)
            for key in found
        ]
    return LeakedKeysOut(data=[_out(index, key) for index, key in enumerate(found)])


def _out(index: int, key: ApiKey | None) -> LeakedKeyOut:
    if key is None:
        return LeakedKeyOut(index=index, known=False)
    return LeakedKeyOut(
        index=index,
        known=True,
        live=key.is_usable,
        state=key.state,  # type: ignore[arg-type]
        id=key.pk,
        name=key.name,
        redacted_value=redacted(key.prefix),
        organization_id=key.organization.pk,
        organization_name=key.organization.name,
        project_id=key.project.pk,
        project_name=key.project.name,
    )
