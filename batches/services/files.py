"""Writes of files: keeping, deleting, expiring, purging their bytes."""

from __future__ import annotations

from datetime import timedelta
from pathlib import PurePosixPath

import structlog
from django.conf import settings
from django.core.files.uploadedfile import UploadedFile
from django.db import transaction
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.access import Caller
from accounts.errors import BadRequest, TooLarge
from accounts.models import Organization, Project
from batches import queries, storage
from batches.models import File, UploadPart
from batches.models.files import Purpose, file_id

logger = structlog.get_logger(__name__)

SHORTEST, LONGEST = 3600, 2_592_000
"""Seconds after which a file may expire, by OpenAI's document."""


def create_file(
    *,
    actor: Caller,
    content: UploadedFile,
    filename: str,
    purpose: str,
    expires_after_seconds: int | None = None,
) -> File:
    """Keep an uploaded file; raises `BadRequest` or `TooLarge` with nothing stored."""
    check(filename=filename, purpose=purpose, size=content.size or 0)
    expires_at = expiry(expires_after_seconds)
    return keep(
        organization=actor.organization,
        project=actor.project,
        content=content,
        filename=filename,
        purpose=purpose,
        expires_after=expires_at,
    )


def keep(
    *,
    organization: Organization,
    project: Project,
    content: UploadedFile,
    filename: str,
    purpose: str,
    expires_after: timedelta | None = None,
) -> File:
    """Store the bytes, then the row; when the row cannot be made the bytes go again."""
    id = file_id()
    name = storage.keep(f"{organization.pk}/{id}", content)
    try:
        return File.objects.create(
            id=id,
            organization=organization,
            project=project,
            filename=clean_filename(filename),
            purpose=purpose,
            bytes=content.size or 0,
            storage_name=name,
            expires_at=timezone.now() + expires_after if expires_after else None,
        )
    except BaseException:
        storage.remove(name)
        raise


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


def delete_file(*, actor: Caller, file: File) -> None:
    """Hide the file at once; its bytes go with the next sweep that no running batch forbids."""
    with actor.scope():
        File.objects.filter(pk=file.pk).update(deleted_at=timezone.now())


def expire_files() -> None:
    """Delete what has reached its `expires_at`, across tenants."""
    with scopes_disabled():
        now = timezone.now()
        File.objects.filter(expires_at__lte=now, deleted_at__isnull=True).update(deleted_at=now)


def purge_files(limit: int = 100) -> None:
    """Remove the bytes of deleted files that no unfinished batch still reads."""
    with scopes_disabled():
        for file in queries.files_to_purge()[:limit]:
            try:
                storage.remove(file.storage_name)
            except OSError as error:  # the others need not wait for it
                logger.error("file not purged", file_id=file.pk, error=str(error))
                continue
            File.objects.filter(pk=file.pk).update(purged_at=timezone.now())


@transaction.atomic
def remove_parts(upload_id: str) -> None:
    """Forget an upload's parts, rows and bytes."""
    with scopes_disabled():
        parts = UploadPart.objects.filter(upload_id=upload_id)
        names = list(parts.values_list("storage_name", flat=True))
        parts.delete()

    def bytes_too() -> None:
        for name in names:
            storage.remove(name)

    transaction.on_commit(bytes_too)
