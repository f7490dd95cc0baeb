"""Reads of files: which are kept, for how long, and by what."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from django.db.models import Count, Exists, F, OuterRef, Q, QuerySet, Subquery, Sum
from django.db.models.functions import Greatest
from django_scopes import scopes_disabled

from accounts.models import ApiKey, Organization, User
from batches.models import Batch, File, Retention, Upload
from batches.models.batches import UNFINISHED
from batches.models.files import Purpose, UploadStatus


def files_to_purge() -> QuerySet[File]:
    """Deleted files whose bytes no unfinished batch reads any more."""
    reading = Batch.objects.filter(input_file=OuterRef("pk"), status__in=UNFINISHED)
    gone = File.objects.filter(deleted_at__isnull=False, purged_at__isnull=True)
    return gone.filter(~Exists(reading)).order_by("deleted_at")


def bytes_kept(organization: Organization, user: User | None, api_key: ApiKey | None) -> int:
    """Bytes that count against a storage quota: files until they are purged (a deleted one may
    still be read by a batch), uploads under way."""
    whose: dict[str, Any] = {"organization": organization}
    if user is not None:
        whose["user"] = user
    if api_key is not None:
        whose["api_key"] = api_key
    kept = File.objects.filter(purged_at=None, **whose)
    coming = Upload.objects.filter(status=UploadStatus.PENDING, **whose)
    return sum(rows.aggregate(total=Sum("bytes"))["total"] or 0 for rows in (kept, coming))


def retention_of(organization: Organization) -> Retention:
    """What the organization has set; nothing, where it never did."""
    with scopes_disabled():
        found = Retention.objects.filter(organization=organization).first()
    return found or Retention(organization=organization)


def kept_for(organization: Organization, purpose: str) -> timedelta | None:
    """How long a new file of this purpose stays unless something else is asked for."""
    days = retention_of(organization).days_of(purpose)
    return None if days is None else timedelta(days=days)


def sooner(
    files: QuerySet[File], row: Retention, earliest: datetime
) -> Iterator[tuple[QuerySet[File], Greatest]]:
    """Of these files, by kind, those that the row's days let go sooner than now, and when."""
    outputs = Q(purpose=Purpose.BATCH_OUTPUT)
    for which, days in ((~outputs, row.input_days), (outputs, row.output_days)):
        if days is None:
            continue
        end = Greatest(F("created_at") + timedelta(days=days), earliest)
        later = Q(expires_at=None) | Q(expires_at__gt=end)
        yield files.filter(which, later), end


def count_sooner(input_days: int | None, output_days: int | None, earliest: datetime) -> int:
    """How many of the caller's files these days would let go sooner; in the caller's scope."""
    row = Retention(input_days=input_days, output_days=output_days)
    found = sooner(File.objects.filter(deleted_at=None), row, earliest)
    return sum(files.count() for files, _ in found)


def files_like(purpose: str, text: str) -> QuerySet[File]:
    """The caller's files, by purpose and by what their name or id holds; in the caller's scope.

    With how many unfinished batches read each.
    """
    reading = Batch.objects.filter(input_file=OuterRef("pk"), status__in=UNFINISHED).order_by()
    many = reading.values("input_file").annotate(many=Count("pk")).values("many")
    found = File.objects.filter(deleted_at=None).annotate(reading=Subquery(many))
    if purpose:
        found = found.filter(purpose=purpose)
    if text:
        found = found.filter(Q(filename__icontains=text) | Q(pk=text))
    return found.select_related("checked", "user", "api_key")


def recent_inputs(limit: int) -> list[File]:
    """What a batch may be made of, newest first: inputs and tables; in the caller's scope."""
    table = Q(purpose=Purpose.USER_DATA) & Q(filename__iregex=r"\.(csv|tsv|parquet)$")
    mine = File.objects.filter(Q(purpose=Purpose.BATCH) | table, deleted_at=None)
    return list(mine.order_by("-pk")[:limit])


def batches_using(file: File) -> QuerySet[Batch]:
    """Batches that read the file or wrote it, newest first; in the caller's scope."""
    mine = Q(input_file=file) | Q(output_file=file) | Q(error_file=file)
    return Batch.objects.filter(mine).order_by("-pk")
