"""Writes of batches that a caller asks for: create and cancel."""

from __future__ import annotations

from collections.abc import Mapping

from django.db import transaction
from django.utils import timezone

from accounts import access
from accounts.access import Caller
from accounts.errors import BadRequest
from batches import wakeups, windows
from batches.models import Batch, File
from batches.models.batches import UNFINISHED, Endpoint, Priority, Status
from batches.models.files import Purpose
from batches.services import files

MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512


def create_batch(
    *,
    actor: Caller,
    input_file_id: str,
    endpoint: str,
    completion_window: str,
    metadata: Mapping[str, str] | None = None,
    priority: str = "normal",
    output_expires_after_seconds: int | None = None,
) -> Batch:
    """Accept a batch for validation; raises `BadRequest` or `NotFound` naming the field."""
    window = windows.parse(completion_window)
    _check(endpoint=endpoint, metadata=metadata, priority=priority)
    files.expiry(output_expires_after_seconds, param="output_expires_after.seconds")
    file = access.get(actor, File, input_file_id, param="input_file_id", deleted_at=None)
    if file.purpose != Purpose.BATCH:
        raise BadRequest(
            f"The file's purpose is {file.purpose!r}; a batch's input needs 'batch'.",
            param="input_file_id",
        )
    now = timezone.now()
    with transaction.atomic():
        batch = Batch.objects.create(
            organization=actor.organization,
            project=actor.project,
            api_key=actor.api_key,
            user=actor.user,
            input_file=file,
            endpoint=endpoint,
            completion_window=completion_window,
            priority=Priority[priority.upper()],
            metadata=metadata,
            output_expires_after_seconds=output_expires_after_seconds,
            created_at=now,
            expires_at=now + window,
        )
        wakeups.validate(batch.pk)
    return batch


def _check(*, endpoint: str, metadata: Mapping[str, str] | None, priority: str) -> None:
    if endpoint not in Endpoint.values:
        raise BadRequest(
            f"endpoint must be one of: {', '.join(Endpoint.values)}",
            param="endpoint",
            code="invalid_value",
        )
    if priority.upper() not in Priority.names:
        raise BadRequest("priority must be low, normal or high.", param="priority")
    _check_metadata(metadata or {})


def _check_metadata(metadata: Mapping[str, str]) -> None:
    if len(metadata) > MAX_PAIRS:
        raise BadRequest(f"metadata may have at most {MAX_PAIRS} pairs.", param="metadata")
    for key, value in metadata.items():
        if len(key) > MAX_KEY or len(value) > MAX_VALUE:
            raise BadRequest(
                f"metadata's keys may have {MAX_KEY} characters, its values {MAX_VALUE}.",
                param=f"metadata.{key[:64]}",
            )
        if "\0" in key + value:
            raise BadRequest("metadata must not contain NUL characters.", param="metadata")


def cancel_batch(*, actor: Caller, batch: Batch) -> Batch:
    """Stop a batch: `cancelling` at once, `cancelled` when its workers have let go.

    Cancelling one that is already on that way changes nothing; a finished one is a `BadRequest`.
    """
    with transaction.atomic(), actor.scope():
        batch = (
            Batch.objects.select_for_update(of=("self",)).select_related("model").get(pk=batch.pk)
        )
        if batch.status in (Status.CANCELLING, Status.CANCELLED):
            return batch
        if batch.status not in UNFINISHED or batch.status == Status.FINALIZING:
            raise BadRequest(
                f"A batch that is {batch.status} can no longer be cancelled.",
                param="batch_id",
                code="batch_not_cancellable",
            )
        batch.move_to(Status.CANCELLING)
        batch.save(update_fields=["status", "cancelling_at"])
        wakeups.finalize(batch.pk)
    return batch
