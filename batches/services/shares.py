"""Writes of an organization's place in the queue, by platform operators."""

from __future__ import annotations

from math import isfinite

from django.db import transaction
from django_scopes import scopes_disabled

from accounts.errors import BadRequest
from accounts.models import Organization, User
from accounts.services import audit
from batches.models import Share

LIGHTEST, HEAVIEST, MOST_CHUNKS = 0.01, 100.0, 10_000


@transaction.atomic
def set_share(
    *, actor: User | None, organization: Organization, **fields: float | int | None
) -> Share:
    """Set what is named of an organization's place in the queue, and leave the rest as it is.

    `weight` is how much it gets against 1 of the others; `chunks_at_once` how many of its chunks may
    run at the same time (None: as many as there are workers). What runs already goes on. `actor` is
    None for the installation's own shell. Raises `BadRequest` naming the field.
    """
    _check(**fields)
    with scopes_disabled():
        share, _ = Share.objects.select_for_update().get_or_create(organization=organization)
        before = audit.snapshot(share, fields)
        for name, value in fields.items():
            setattr(share, name, value)
        if changes := audit.difference(share, before):
            share.save(update_fields=list(changes))  # leases write what was served
            audit.record(
                "share.changed",
                actor=actor,
                target=organization,
                organization=organization,
                changes=changes,
            )
    return share


def _check(*, weight: float | None = 1.0, chunks_at_once: float | None = None) -> None:
    if weight is None or not (isfinite(weight) and LIGHTEST <= weight <= HEAVIEST):
        raise BadRequest(f"weight must be from {LIGHTEST:g} to {HEAVIEST:g}.", param="weight")
    if chunks_at_once is not None and not 1 <= chunks_at_once <= MOST_CHUNKS:
        raise BadRequest(
            f"chunks_at_once must be from 1 to {MOST_CHUNKS}; to stop all its work, suspend it.",
            param="chunks_at_once",
        )
