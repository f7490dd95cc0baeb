"""Writes of uploads: files that come in parts.

The parts of an upload that has ended, however it did, are removed by `files.purge_parts`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import timedelta

from django.core.files.uploadedfile import TemporaryUploadedFile, UploadedFile
from django.db import transaction
from django.db.models import Sum
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.access import Caller
from accounts.errors import BadRequest, TooLarge
from accounts.services import quotas
from batches import storage
from batches.models import Upload, UploadPart
from batches.models.files import UPLOAD_LIFETIME, UploadStatus, part_id
from batches.services import files

MAX_PART_BYTES = 64 * 1024 * 1024
MAX_UPLOAD_BYTES = 8 * 1024**3
_BLOCK = 1024 * 1024


def create_upload(
    *,
    actor: Caller,
    filename: str,
    purpose: str,
    size: int,
    mime_type: str,
    expires_after_seconds: int | None = None,
) -> Upload:
    """Announce a file of `size` bytes; raises `BadRequest`, `TooLarge` or `QuotaExceeded`."""
    if size > MAX_UPLOAD_BYTES:
        raise TooLarge(f"An upload may have at most {MAX_UPLOAD_BYTES:,} bytes.", param="bytes")
    # The limit of a plain file does not hold for an upload, that of a batch input does.
    files.check(
        filename=filename,
        purpose=purpose,
        size=size if purpose == "batch" else min(size, 1),
        name_param="filename",
        size_param="bytes",
    )
    if "\0" in mime_type:  # PostgreSQL cannot store it
        raise BadRequest("mime_type must not contain NUL characters.", param="mime_type")
    files.expiry(expires_after_seconds, param="expires_after.seconds")
    with transaction.atomic():
        quotas.require_storage(actor, size)
        return Upload.objects.create(
            organization=actor.organization,
            project=actor.project,
            user=actor.user,
            api_key=actor.api_key,
            filename=files.clean_filename(filename),
            purpose=purpose,
            bytes=size,
            mime_type=mime_type[:255],
            expires_after_seconds=expires_after_seconds,
            expires_at=timezone.now() + UPLOAD_LIFETIME,
        )


def add_part(*, actor: Caller, upload: Upload, content: UploadedFile) -> UploadPart:
    """Keep one part; parts may come in parallel and in any order."""
    _require_pending(upload)
    if not 0 < (content.size or 0) <= MAX_PART_BYTES:
        raise BadRequest(
            f"A part must have 1 to {MAX_PART_BYTES:,} bytes.", param="data", code="invalid_part"
        )
    id = part_id()
    name = storage.keep(f"{actor.organization.pk}/{id}", content)
    try:
        with transaction.atomic(), actor.scope():
            # A shared look at the row keeps it pending until the part is in.
            _require_pending(Upload.objects.select_for_update(no_key=True).get(pk=upload.pk))
            _require_room(upload, content.size or 0)
            return UploadPart.objects.create(
                id=id, upload=upload, bytes=content.size or 0, storage_name=name
            )
    except BaseException:
        storage.discard(name)
        raise


def _require_room(upload: Upload, size: int) -> None:
    """Parts may be sent twice, but not more: what was announced is what counts as stored."""
    before = UploadPart.objects.filter(upload=upload).aggregate(Sum("bytes"))["bytes__sum"] or 0
    room = 2 * upload.bytes
    if before + size > room:
        raise TooLarge(
            f"The parts of this upload may have {room:,} bytes in all: twice what was announced.",
            param="data",
            code="upload_too_large",
        )


def complete_upload(
    *, actor: Caller, upload: Upload, part_ids: Sequence[str], md5: str | None = None
) -> Upload:
    """Put the parts together, in the order given, into a file; only once, only whole."""
    _require_pending(upload)
    parts = _ordered_parts(actor, upload, part_ids)
    with storage.temporary(upload.filename) as whole:
        try:
            digest = _put_together(parts, whole)
        except FileNotFoundError:  # completed or cancelled meanwhile, and its parts with it
            with actor.scope():
                _require_pending(Upload.objects.get(pk=upload.pk))
            raise
        if md5 is not None and md5.lower() != digest:
            raise BadRequest(f"The parts' md5 is {digest}.", param="md5", code="checksum_mismatch")
        with files.kept(actor.organization.pk, whole) as [stored], actor.scope():
            upload = Upload.objects.select_for_update().get(pk=upload.pk)
            _require_pending(upload)
            _complete(upload, stored)
    return upload


def _complete(upload: Upload, stored: files.Kept) -> None:
    lifetime = upload.expires_after_seconds
    upload.file = files.record(
        stored,
        organization=upload.organization,
        project=upload.project,
        user=upload.user,
        api_key=upload.api_key,
        filename=upload.filename,
        purpose=upload.purpose,
        expires_after=timedelta(seconds=lifetime) if lifetime else None,
    )
    upload.status = UploadStatus.COMPLETED
    upload.save(update_fields=["file", "status"])


def _ordered_parts(actor: Caller, upload: Upload, part_ids: Sequence[str]) -> list[UploadPart]:
    with actor.scope():
        known = {part.pk: part for part in UploadPart.objects.filter(upload=upload)}
    for id in part_ids:
        if id not in known:
            raise BadRequest(
                f"Part {str(id)[:64]!r} is not of this upload.",
                param="part_ids",
                code="unknown_part",
            )
    if len(set(part_ids)) != len(part_ids):
        raise BadRequest("A part is named twice.", param="part_ids", code="duplicate_part")
    parts = [known[id] for id in part_ids]
    if (total := sum(part.bytes for part in parts)) != upload.bytes:
        raise BadRequest(
            f"The parts have {total:,} bytes in all, the upload was announced with {upload.bytes:,}.",
            param="part_ids",
            code="size_mismatch",
        )
    return parts


def _put_together(parts: Sequence[UploadPart], whole: TemporaryUploadedFile) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for part in parts:
        with storage.opened(part.storage_name) as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                whole.write(block)
    whole.size = sum(part.bytes for part in parts)
    return digest.hexdigest()


def cancel_upload(*, actor: Caller, upload: Upload) -> Upload:
    with transaction.atomic(), actor.scope():
        upload = Upload.objects.select_for_update().get(pk=upload.pk)
        _require_pending(upload)
        upload.status = UploadStatus.CANCELLED
        upload.save(update_fields=["status"])
    return upload


def expire_uploads() -> None:
    """End uploads that were not completed in time, across tenants."""
    with scopes_disabled():
        late = Upload.objects.filter(status=UploadStatus.PENDING, expires_at__lte=timezone.now())
        late.update(status=UploadStatus.EXPIRED)


def _require_pending(upload: Upload) -> None:
    if upload.status == UploadStatus.PENDING and upload.expires_at <= timezone.now():
        raise BadRequest("The upload has expired.", param="upload_id", code="upload_expired")
    if upload.status != UploadStatus.PENDING:
        raise BadRequest(
            f"The upload is {upload.status}, no longer pending.",
            param="upload_id",
            code="upload_not_pending",
        )
