"""Writes of batches that a caller asks for: create and cancel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from django.db import transaction
from django.utils import timezone

from accounts import access
from accounts.access import Caller
from accounts.errors import BadRequest
from accounts.services import audit, quotas
from batches import wakeups, windows
from batches.models import Batch, File
from batches.models.batches import UNFINISHED, Endpoint, Priority, Status, usual_percents
from batches.models.files import Purpose
from batches.services import files, webhooks

MAX_PERCENTS = 20
MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512


@dataclass(frozen=True)
class OwnWebhook:
    """An address that is told of one batch; without a secret one is made."""

    url: str
    secret: str | None = None
    events: Sequence[str] | None = None


def create_batch(
    *,
    actor: Caller,
    input_file_id: str,
    endpoint: str,
    completion_window: str,
    metadata: Mapping[str, str] | None = None,
    priority: str = "normal",
    output_expires_after_seconds: int | None = None,
    progress_percents: Sequence[int] | None = None,
    webhook: OwnWebhook | None = None,
) -> Batch:
    """Accept a batch for validation; raises `BadRequest` or `NotFound` naming the field, or
    `QuotaExceeded`."""
    window = windows.parse(completion_window)
    _check(endpoint=endpoint, metadata=metadata, priority=priority)
    percents = _percents(progress_percents)
    files.expiry(output_expires_after_seconds, param="output_expires_after.seconds")
    file = _input(actor, input_file_id)
    secret = _checked(webhook)
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
            progress_percents=percents,
            created_at=now,
            expires_at=now + window,
        )
        _tell(batch, webhook, secret)
        quotas.open_batch(batch_id=batch.pk, actor=actor)
        wakeups.validate(batch.pk)
    return batch


def _input(actor: Caller, id: str) -> File:
    file = access.get(actor, File, id, param="input_file_id", deleted_at=None)
    if file.purpose != Purpose.BATCH:
        raise BadRequest(
            f"The file's purpose is {file.purpose!r}; a batch's input needs 'batch'.",
            param="input_file_id",
        )
    return file


def _tell(batch: Batch, webhook: OwnWebhook | None, secret: str) -> None:
    if webhook is not None:
        webhooks.of_batch(batch, url=webhook.url, secret=secret, event_types=webhook.events)
    else:  # so that nobody asks the database for it
        relation: Any = Batch._meta.get_field("webhook")
        relation.set_cached_value(batch, None)


def _checked(webhook: OwnWebhook | None) -> str:
    if webhook is None:
        return ""
    return webhooks.checked_of_batch(
        url=webhook.url, secret=webhook.secret, event_types=webhook.events
    )


def _percents(given: Sequence[int] | None) -> list[int]:
    if given is None:
        return usual_percents()
    if len(given) > MAX_PERCENTS or not all(0 < each < 100 for each in given):
        said = f"progress_percents are at most {MAX_PERCENTS} numbers from 1 to 99."
        raise BadRequest(said, param="progress_percents", code="invalid_value")
    return sorted(set(given))


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
            Batch.objects.select_for_update(of=("self",))
            .select_related("model", "webhook")
            .get(pk=batch.pk)
        )
        if batch.status in (Status.CANCELLING, Status.CANCELLED):
            return batch
        if batch.status not in UNFINISHED or batch.status == Status.FINALIZING:
            raise BadRequest(
                f"A batch that is {batch.status} can no longer be cancelled.",
                param="batch_id",
                code="batch_not_cancellable",
            )
        before = audit.snapshot(batch, ["status"])
        begin_cancelling(batch)
        changes = audit.difference(batch, before)
        audit.record("batch.cancelled", actor=actor, target=batch, changes=changes)
    return batch


def begin_cancelling(batch: Batch) -> None:
    """Let a locked batch's workers go; the rest is finalizing's."""
    batch.move_to(Status.CANCELLING)
    batch.save(update_fields=["status", "cancelling_at"])
    wakeups.finalize(batch.pk)


def cancel_batches(*, actor: Caller, batches: Iterable[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Stop several batches; returns those that are being cancelled, and those that it is too late
    for. Each is a transaction of its own, with its event in the audit: none holds a batch while it
    waits for another."""
    cancelled, too_late = [], []
    for batch in batches:
        try:
            cancelled.append(cancel_batch(actor=actor, batch=batch))
        except BadRequest:
            too_late.append(batch)
    return cancelled, too_late
