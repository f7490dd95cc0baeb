"""Moderation: which batches an operator has to approve before they run, and who says so.

Approving and rejecting are the queue's (`services/queue.py`): a batch that waits is a held one.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from django.db import transaction
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.errors import BadRequest
from accounts.models import Organization, User
from accounts.services import audit
from batches.models import Batch, Moderation
from batches.models.batches import HeldWhy
from batches.queries.operators import moderation_of
from models_registry.models import Model

MOST_TOKENS, MOST_DAYS = 10**15, 36_500
_FIELDS = ("everything", "over_tokens", "newer_than_days")


def hold_if_due(batch: Batch, *, tokens: int) -> None:
    """Hold a batch that has just been validated, where a rule is for it; saving is the caller's.

    One that an operator holds already waits for approval from now on: releasing it would not be one.
    """
    if _is_for(moderation_of(batch.organization), batch, tokens):
        batch.held_at, batch.held_why = batch.held_at or timezone.now(), HeldWhy.MODERATION


def _is_for(rules: Moderation | None, batch: Batch, tokens: int) -> bool:
    if rules is None:
        return False
    age = timezone.now() - batch.organization.created_at
    return (
        rules.everything
        or (rules.over_tokens is not None and tokens > rules.over_tokens)
        or (rules.newer_than_days is not None and age < timedelta(days=rules.newer_than_days))
        or rules.chosen_models.filter(name=batch.model.name if batch.model else "").exists()
    )


@transaction.atomic
def set_moderation(
    *,
    actor: User | None,
    organization: Organization | None,
    everything: bool = False,
    over_tokens: int | None = None,
    newer_than_days: int | None = None,
    chosen_models: Sequence[Model] = (),
) -> Moderation:
    """Set the rules of an organization, or with None those of all that have none of their own.

    They are for batches that are validated from now on. Rules that are all empty hold nothing: an
    organization of such is exempt. Raises `BadRequest` naming the field.
    """
    _check("over_tokens", over_tokens, MOST_TOKENS)
    _check("newer_than_days", newer_than_days, MOST_DAYS)
    with scopes_disabled():
        rules = Moderation.objects.select_for_update(of=("self",))
        row, made = rules.get_or_create(organization=organization)
        before = dict.fromkeys([*_FIELDS, "models"]) if made else _as_audited(row)
        row.everything = everything
        row.over_tokens, row.newer_than_days = over_tokens, newer_than_days
        row.save()
        row.chosen_models.set(chosen_models)
        _record(actor, organization, before, _as_audited(row))
    return row


@transaction.atomic
def follow_platform(*, actor: User | None, organization: Organization) -> None:
    """Forget the organization's own rules: the platform's hold for it again."""
    with scopes_disabled():
        row = Moderation.objects.filter(organization=organization).first()
        if row is not None:
            before = _as_audited(row)
            row.delete()
            _record(actor, organization, before, dict.fromkeys(before))


def _check(field: str, value: int | None, most: int) -> None:
    if value is not None and not 0 <= value <= most:
        raise BadRequest(f"{field} must be from 0 to {most}.", param=field)


def _as_audited(row: Moderation) -> dict[str, object]:
    names = list(row.chosen_models.order_by("name").values_list("name", flat=True))
    return audit.snapshot(row, _FIELDS) | {"models": names}


def _record(
    actor: User | None,
    organization: Organization | None,
    before: dict[str, object],
    now: dict[str, object],
) -> None:
    changes = {name: [before[name], now[name]] for name in now if before[name] != now[name]}
    if changes:
        audit.record(
            "moderation.changed",
            actor=actor,
            target=organization,
            organization=organization,
            label="" if organization else "every organization",
            changes=changes,
        )
