"""`/v1/organization/limits`: what may be used, how much of it is, and narrower limits."""

from __future__ import annotations

from decimal import Decimal

from django.http import HttpRequest
from ninja import Query, Router

from accounts import access, ids
from accounts.access import Caller
from accounts.allowances import Allowance, allowances_of
from accounts.authentication import caller_of
from accounts.errors import BadRequest
from accounts.limits import Amount
from accounts.models import ApiKey, User
from accounts.schemas.limits import LimitOut, LimitsIn, LimitsOut, LimitsQuery
from accounts.services.limits import set_limits

router = Router(tags=["Limits"])


@router.get("/limits", response=LimitsOut, summary="Retrieve limits and their use")
def retrieve_limits(request: HttpRequest, of: Query[LimitsQuery]) -> LimitsOut:
    caller = caller_of(request, "quotas.read")
    user, key = _subject(caller, of)
    return _said(caller, user, key)


@router.post("/limits", response=LimitsOut, summary="Set a person's or a key's limits")
def update_limits(request: HttpRequest, given: LimitsIn) -> LimitsOut:
    caller = caller_of(request, "quotas")
    user, key = _subject(caller, given)
    subject = {"user_id", "api_key_id"}
    fields = given.model_dump(include=given.model_fields_set - subject)
    set_limits(actor=caller, organization=caller.organization, user=user, api_key=key, **fields)
    return _said(caller, user, key)


def _subject(caller: Caller, of: LimitsQuery) -> tuple[User | None, ApiKey | None]:
    """Whose limits are meant: a member's, a key's, or neither."""
    if of.user_id and of.api_key_id:
        raise BadRequest("Name a person or a key, not both.", param="api_key_id")
    if of.user_id:
        return access.get_member(caller, of.user_id).user, None
    if of.api_key_id:
        return None, access.get(caller, ApiKey, of.api_key_id, param="api_key_id")
    return None, None


def _said(caller: Caller, user: User | None, key: ApiKey | None) -> LimitsOut:
    found = allowances_of(caller.organization, user, key)
    return LimitsOut(
        organization_id=caller.organization.pk,
        user_id=ids.user_id(user.pk) if user else None,
        api_key_id=key.pk if key else None,
        data=[_limit(each) for each in found],
    )


def _limit(found: Allowance) -> LimitOut:
    return LimitOut(
        name=found.limit.field,
        unit=found.limit.unit,
        limit=_plain(found.most),
        used=_plain(found.used),
        is_default=found.is_default,
    )


def _plain(amount: Amount | None) -> int | float | None:
    """Money as the number that JSON has for it."""
    return float(amount) if isinstance(amount, Decimal) else amount
