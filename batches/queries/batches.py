"""Reads of batches: those that wait for a step of ours, and what their pages show."""

from __future__ import annotations

from datetime import datetime

from django.db.models import Q, QuerySet

from accounts.ids import first_audit_event_id
from accounts.models import AuditEvent
from batches.models import Batch, Result
from batches.models.batches import Status


def batches_to_validate() -> QuerySet[Batch]:
    waiting = Batch.objects.filter(status__in=(Status.VALIDATING, Status.CANCELLING))
    return waiting.filter(index_name="", errors__isnull=True)


def batches_to_finalize() -> QuerySet[Batch]:
    """Batches that are ending and have been validated (or found to be invalid)."""
    ending = Batch.objects.filter(status__in=(Status.FINALIZING, Status.CANCELLING))
    return ending.filter(~Q(index_name="") | Q(errors__isnull=False))


SEARCHED = 5_000
"""Among so many batches at a time a text is looked for: there is no index for parts of names."""


def find_batches(wanted: Q, text: str, after: str, count: int) -> tuple[list[Batch], str | None]:
    """The newest of the organization's batches that are wanted, made before the batch `after`.

    Returns up to `count` of them, and what to give as `after` for older ones (None: there are none).
    With a text, which is part of a file's name or of a batch's id, one call looks at `SEARCHED`
    batches: fewer than `count` may be found of them although there are older ones. A whole id is
    looked up, however old its batch is.
    """
    mine = Batch.objects.filter(wanted).order_by("-pk")
    if after:
        mine = mine.filter(pk__lt=after)
    mine = mine.prefetch_related("model", "input_file", "output_file", "error_file")
    older = None
    if text:
        if named := mine.filter(pk=text).first():
            return [named], None
        end = mine.values_list("pk", flat=True)[SEARCHED : SEARCHED + 1]
        if older := next(iter(end), None):
            mine = mine.filter(pk__gte=older)
        mine = mine.filter(Q(input_file__filename__icontains=text) | Q(pk__icontains=text))
    found = list(mine[: count + 1])
    if len(found) > count:
        return found[:count], found[count - 1].pk
    return found, older


def samples_of(batch: Batch) -> list[tuple[datetime, int, int, int]]:
    """When, and then answered requests, tokens in and tokens out; oldest first."""
    fields = ("at", "answered", "input_tokens", "output_tokens")
    return list(batch.samples.order_by("at").values_list(*fields))


FAILURES_LOOKED_AT = 200


def failures_so_far(batch: Batch) -> list[tuple[int, bytes | memoryview]]:
    """The first lines that failed of a batch that is not finalized, and their errors."""
    rows = Result.objects.filter(batch=batch, ok=False).order_by("line")
    return list(rows.values_list("line", "payload")[:FAILURES_LOOKED_AT])


def audit_of(batch: Batch, count: int) -> list[AuditEvent]:
    """The newest events of the organization's audit that are about the batch.

    By key from when it was made: those before it cannot be about it.
    """
    since = first_audit_event_id(batch.created_at)
    events = AuditEvent.objects.filter(organization=batch.organization_id, pk__gte=since)
    return list(events.filter(target_id=batch.pk).order_by("-pk")[:count])
