"""Reads of files and batches that are more than one line."""

from __future__ import annotations

from collections.abc import Sequence

from django.db.models import Exists, OuterRef, Q, QuerySet

from batches.models import Batch, Chunk, File
from batches.models.batches import UNFINISHED, ChunkState, Status
from batches.policy import Candidate


def files_to_purge() -> QuerySet[File]:
    """Deleted files whose bytes no unfinished batch reads any more."""
    reading = Batch.objects.filter(input_file=OuterRef("pk"), status__in=UNFINISHED)
    gone = File.objects.filter(deleted_at__isnull=False, purged_at__isnull=True)
    return gone.filter(~Exists(reading)).order_by("deleted_at")


def candidates(avoid: Sequence[str] = ()) -> list[Candidate]:
    """One entry for each batch that has a chunk to lease, across tenants.

    `avoid` names models and batches to leave out.
    """
    ready = Chunk.objects.filter(batch=OuterRef("pk"), state=ChunkState.READY)
    rows = Batch.objects.filter(Exists(ready), status=Status.IN_PROGRESS, model__isnull=False)
    rows = rows.exclude(Q(model__name__in=avoid) | Q(pk__in=avoid))
    fields = rows.values_list("pk", "organization_id", "model__name", "priority", "created_at")
    return [Candidate(*row) for row in fields.order_by("-priority", "created_at")[:1000]]


def batches_to_validate() -> QuerySet[Batch]:
    waiting = Batch.objects.filter(status__in=(Status.VALIDATING, Status.CANCELLING))
    return waiting.filter(index_name="", errors__isnull=True)


def batches_to_finalize() -> QuerySet[Batch]:
    """Batches that are ending and have been validated (or found to be invalid)."""
    ending = Batch.objects.filter(status__in=(Status.FINALIZING, Status.CANCELLING))
    return ending.filter(~Q(index_name="") | Q(errors__isnull=False))
