"""How long an organization's files stay, where nothing else was asked for."""

from __future__ import annotations

from datetime import datetime, timedelta

from django.db import transaction
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.access import Caller
from accounts.errors import BadRequest
from accounts.services import audit
from batches.models import File, Retention
from batches.models.files import MOST_DAYS
from batches.queries.files import sooner

SLICE = 500
"""So many files are given their expiry at once."""
AT_ONCE = 10
"""In so many organizations in one sweep."""
GRACE = timedelta(days=1)
"""Files that were here before stay so long at least: there is time to notice a mistake."""


@transaction.atomic
def set_retention(
    *,
    actor: Caller,
    input_days: int | None,
    output_days: int | None,
    to_existing: bool = False,
) -> Retention:
    """Set after how many days files expire from now on (None: never).

    With `to_existing` the files that are here get it, too, counted from when they were made; one
    that expires earlier keeps its time. Raises `BadRequest` naming the field.
    """
    for name, days in (("input_days", input_days), ("output_days", output_days)):
        if days is not None and not 1 <= days <= MOST_DAYS:
            raise BadRequest(f"{name} must be from 1 to {MOST_DAYS:,}.", param=name)
    with actor.scope():
        mine = Retention.objects.select_for_update()
        row, _ = mine.get_or_create(organization=actor.organization)
        before = audit.snapshot(row, ["input_days", "output_days"])
        row.input_days, row.output_days = input_days, output_days
        changes = audit.difference(row, before)
        row.applying_at = timezone.now() if to_existing else None
        row.cursor = ""
        row.save()
        if to_existing:
            changes["existing_files"] = [False, True]
        if changes:
            audit.record(
                "retention.changed", actor=actor, target=actor.organization, changes=changes
            )
    return row


def apply_to_existing() -> None:
    """Give a slice of each organization's files the expiry that was asked for; across tenants."""
    with scopes_disabled():
        due = Retention.objects.filter(applying_at__isnull=False).order_by("applying_at")
        for id in list(due.values_list("pk", flat=True)[:AT_ONCE]):
            _apply(id)


@transaction.atomic
def _apply(id: str) -> None:
    row = Retention.objects.select_for_update(skip_locked=True).filter(pk=id).first()
    if row is None or row.applying_at is None:
        return
    before = File.objects.filter(organization=id, created_at__lt=row.applying_at)
    left = before.filter(pk__gt=row.cursor, deleted_at=None).order_by("pk")
    some = list(left.values_list("pk", flat=True)[:SLICE])
    if some:
        _expire(some, row, row.applying_at)
        row.cursor = some[-1]
    else:
        row.applying_at, row.cursor = None, ""
    row.save()


def _expire(ids: list[str], row: Retention, since: datetime) -> None:
    """Shortens only."""
    for files, end in sooner(File.objects.filter(pk__in=ids), row, since + GRACE):
        files.update(expires_at=end)
