"""Writes of files: keeping, deleting, expiring, purging their bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import PurePosixPath

import structlog
from django.conf import settings
from django.core.files.uploadedfile import UploadedFile
from django.db import transaction
from django.db.models import Q
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.access import Caller
from accounts.errors import BadRequest, TooLarge
from accounts.models import ApiKey, Organization, Project, User
from accounts.services import audit, quotas
from batches import storage
from batches.models import Batch, File, UploadPart
from batches.models.files import MOST_DAYS, Purpose, UploadStatus, file_id
from batches.queries import files as queries
from batches.services import events
from batches.storage import StorageAway

logger = structlog.get_logger(__name__)

SHORTEST, LONGEST = 3600, 2_592_000
"""Seconds after which a file may expire, by OpenAI's document."""
EXPIRE_AT_ONCE = 1000
LATEST = timedelta(days=MOST_DAYS)
"""How far off a person may set a file's expiry."""


def create_file(
    *,
    actor: Caller,
    content: UploadedFile,
    filename: str,
    purpose: str,
    expires_after_seconds: int | None = None,
    lines: int | None = None,
) -> File:
    """Keep an uploaded file; raises `BadRequest`, `TooLarge` or `QuotaExceeded` with nothing
    stored."""
    check(filename=filename, purpose=purpose, size=content.size or 0)
    expires_after = expiry(expires_after_seconds)
    with kept(actor.organization.pk, content) as [stored]:
        quotas.require_storage(actor, stored.bytes)
        return record(
            stored,
            organization=actor.organization,
            project=actor.project,
            user=actor.user,
            api_key=actor.api_key,
            filename=filename,
            purpose=purpose,
            expires_after=expires_after,
            lines=lines,
        )


@dataclass(frozen=True)
class Kept:
    """Bytes in the storage, of which a row is to be made."""

    id: str
    name: str
    bytes: int


@contextmanager
def kept(organization_id: str, *contents: UploadedFile) -> Iterator[list[Kept]]:
    """Store the bytes, then begin the transaction in which their rows are to be made.

    In this order: a bucket may take minutes, for which nobody should wait at a lock. When the body
    fails the bytes go again; not when the commit does, which may have been done all the same.
    """
    with ExitStack() as undo:
        stored = []
        for content in contents:
            id = file_id()
            name = storage.keep(f"{organization_id}/{id}", content)
            undo.callback(storage.discard, name)
            stored.append(Kept(id, name, content.size or 0))
        with transaction.atomic():
            yield stored
            undo.pop_all()


def record(
    stored: Kept,
    *,
    organization: Organization,
    project: Project,
    user: User | None,
    api_key: ApiKey | None,
    filename: str,
    purpose: str,
    expires_after: timedelta | None = None,
    lines: int | None = None,
) -> File:
    """Make the row of bytes that are kept; without an expiry of its own the organization's holds."""
    expires_after = expires_after or queries.kept_for(organization, purpose)
    return File.objects.create(
        id=stored.id,
        organization=organization,
        project=project,
        user=user,
        api_key=api_key,
        filename=clean_filename(filename),
        purpose=purpose,
        bytes=stored.bytes,
        lines=lines,
        storage_name=stored.name,
        expires_at=timezone.now() + expires_after if expires_after else None,
    )


def check(
    *,
    filename: str,
    purpose: str,
    size: int,
    name_param: str = "file",
    size_param: str = "file",
) -> None:
    """Refuse what may not be stored, naming the field."""
    if purpose not in set(Purpose.values) - {Purpose.BATCH_OUTPUT}:
        allowed = ", ".join(sorted(set(Purpose.values) - {Purpose.BATCH_OUTPUT}))
        raise BadRequest(f"purpose must be one of: {allowed}", param="purpose")
    if purpose == Purpose.BATCH and not filename.endswith(".jsonl"):
        raise BadRequest(
            "A batch's input must be a .jsonl file (one JSON object a line).",
            param=name_param,
            code="invalid_file_format",
        )
    if size <= 0:
        raise BadRequest("The file is empty.", param=size_param, code="empty_file")
    limit = settings.MAX_BATCH_FILE_BYTES if purpose == Purpose.BATCH else settings.MAX_FILE_BYTES
    if size > limit:
        raise TooLarge(
            f"The file has {size:,} bytes; for purpose {purpose!r} the limit is {limit:,}.",
            param=size_param,
            code="file_too_large",
        )


def expiry(seconds: int | None, *, param: str = "expires_after[seconds]") -> timedelta | None:
    if seconds is None:
        return None
    if not SHORTEST <= seconds <= LONGEST:
        raise BadRequest(f"{param} must be from {SHORTEST} to {LONGEST}.", param=param)
    return timedelta(seconds=seconds)


def clean_filename(name: str) -> str:
    """The last part of any path, printable and short: it is shown, never opened."""
    last = PurePosixPath(name.replace("\\", "/")).name
    return "".join(char for char in last if char.isprintable())[:255] or "file"


@transaction.atomic
def delete_file(*, actor: Caller, file: File) -> None:
    """Hide the file at once; its bytes go with the next sweep that no running batch forbids."""
    if hide(actor=actor, file=file):
        audit.record("file.deleted", actor=actor, target=file)


def hide(*, actor: Caller, file: File) -> bool:
    """The same without an event, for what a step left that then failed; whether it was there."""
    with actor.scope():
        mine = File.objects.filter(pk=file.pk, deleted_at=None)
        return bool(mine.update(deleted_at=timezone.now()))


@transaction.atomic
def set_expiry(*, actor: Caller, file: File, expires_at: datetime | None) -> File:
    """Let the file go at that moment, or (None) stay until somebody deletes it."""
    now = timezone.now()
    if expires_at is not None and not now < expires_at < now + LATEST:
        raise BadRequest(
            f"A file's last day must be in the future, and within {LATEST.days:,} days.",
            param="expires_at",
        )
    with actor.scope():
        file = File.objects.select_for_update().get(pk=file.pk)
        before = audit.snapshot(file, ["expires_at"])
        file.expires_at = expires_at
        if changes := audit.difference(file, before):
            file.save(update_fields=["expires_at"])
            audit.record("file.expiry_changed", actor=actor, target=file, changes=changes)
    return file


def expire_files() -> None:
    """Delete what has reached its `expires_at`, across tenants, so many at once."""
    with scopes_disabled():
        while _expire_some() == EXPIRE_AT_ONCE:
            pass


@transaction.atomic
def _expire_some() -> int:
    """What is locked is being deleted, or another sweep's."""
    now = timezone.now()
    due = File.objects.filter(expires_at__lte=now, deleted_at__isnull=True).order_by("expires_at")
    some = list(due.select_for_update(skip_locked=True, of=("self",))[:EXPIRE_AT_ONCE])
    File.objects.filter(pk__in=[file.pk for file in some]).update(deleted_at=now)
    events.files_expired(some)
    return len(some)


def purge_files(limit: int = 100) -> None:
    """Remove the bytes of deleted files that no unfinished batch still reads."""
    with scopes_disabled():
        for file in queries.files_to_purge()[:limit]:
            try:
                storage.remove(file.storage_name)
                _forget_what_it_held(file)
            except StorageAway:  # nor would it let go of the others
                raise
            except OSError as error:  # the others need not wait for it
                logger.error("file not purged", file_id=file.pk, error=str(error))
                continue
            File.objects.filter(pk=file.pk).update(purged_at=timezone.now())


def _forget_what_it_held(file: File) -> None:
    """What a batch's row quotes of its error file goes with it; the list of where its answers lie,
    with the last file that has any. Before the file counts as purged, which is not done again."""
    Batch.objects.filter(error_file=file).update(error_kinds=None)
    of_it = Batch.objects.filter(Q(output_file=file) | Q(error_file=file)).exclude(results_name="")
    for batch in of_it.select_related("output_file", "error_file"):
        made = (batch.output_file, batch.error_file)
        if all(each is None or each.deleted_at for each in made):
            storage.remove(batch.results_name)
            Batch.objects.filter(pk=batch.pk).update(results_name="")


def purge_parts(limit: int = 100) -> None:
    """Remove the parts of uploads that have ended, bytes before the rows that know their names."""
    with scopes_disabled():
        for part in UploadPart.objects.exclude(upload__status=UploadStatus.PENDING)[:limit]:
            storage.remove(part.storage_name)
            part.delete()
