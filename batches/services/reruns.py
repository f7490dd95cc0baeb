"""Batches made of other batches: once more as it was, or only what failed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO

from accounts.access import Caller
from accounts.errors import BadRequest
from batches import places, projects, storage
from batches.models import Batch, File
from batches.models.batches import Priority
from batches.models.files import Purpose
from batches.services import batches, files
from batches.services.batches import MAX_PAIRS

RETRY_OF = "retry_of"
"""The metadata of a retry that names the batch whose requests it repeats."""
_PLACES_A_READ = 200
_BYTES_A_READ = 4 * 1024 * 1024


def retry_failed(*, actor: Caller, batch: Batch) -> Batch:
    """Make a batch of those requests that failed or were never run, in a new input file.

    The batch must have been fetched with its input file and project. The new one has its settings
    and metadata, with `retry_of` in it unless there are 16 pairs already; a person's is of the same
    project. Raises `BadRequest` when there is
    nothing to retry, or nothing left to make it of; and `QuotaExceeded`.
    """
    require_retryable(batch)
    actor = projects.within(actor, batch.project)
    file = _file_of_failed(actor, batch)
    try:
        return batches.create_batch(
            actor=actor,
            input_file_id=file.pk,
            endpoint=batch.endpoint,
            completion_window=batch.completion_window,
            metadata=_metadata(batch),
            priority=Priority(batch.priority).name.lower(),
            output_expires_after_seconds=batch.output_expires_after_seconds,
            progress_percents=batch.progress_percents,
        )
    except Exception:
        files.hide(actor=actor, file=file)
        raise


def require_retryable(batch: Batch) -> None:
    """Raise `BadRequest`, in words for people, unless there are requests to retry."""
    if not batch.is_finished:
        said = "The batch is not finished: what fails can be retried when it is."
    elif not batch.failed:
        said = "No request of this batch failed."
    elif not batch.results_name:
        said = "Which requests failed is not known any more: the batch's files were deleted."
    elif batch.input_file.deleted_at is not None:
        said = "The batch's input file was deleted: there is nothing left to retry."
    else:
        return
    raise BadRequest(said, param="batch_id", code="batch_not_retryable")


def clone(
    *, actor: Caller, batch: Batch, completion_window: str, priority: str, metadata: dict[str, str]
) -> Batch:
    """Run the same input file again, a person's in the same project. Raises `BadRequest`,
    `NotFound` or `QuotaExceeded`."""
    return batches.create_batch(
        actor=projects.within(actor, batch.project),
        input_file_id=batch.input_file_id,
        endpoint=batch.endpoint,
        completion_window=completion_window,
        metadata=metadata or None,
        priority=priority,
        output_expires_after_seconds=batch.output_expires_after_seconds,
        progress_percents=batch.progress_percents,
    )


def _metadata(batch: Batch) -> dict[str, str]:
    metadata = dict(batch.metadata or {})
    if RETRY_OF in metadata or len(metadata) < MAX_PAIRS:
        metadata[RETRY_OF] = batch.pk
    return metadata


def _file_of_failed(actor: Caller, batch: Batch) -> File:
    stem = PurePosixPath(batch.input_file.filename).stem[:200]
    with storage.temporary("retry") as made:
        _copy_failed(batch, made)
        made.size = made.tell()
        return files.create_file(
            actor=actor, content=made, filename=f"{stem}-retry.jsonl", purpose=Purpose.BATCH
        )


def _copy_failed(batch: Batch, target: IO[bytes]) -> None:
    """Copy the requests line by line, never holding more than `_BYTES_A_READ` or one of them."""
    with storage.opened(batch.results_name) as stream:
        reader = places.Reader(stream, total=batch.total, failed=batch.failed)
        for spans in _reads(reader):
            for text in storage.pieces(batch.input_file.storage_name, spans):
                target.write(text + b"\n")


def _reads(reader: places.Reader) -> Iterator[list[tuple[int, int]]]:
    spans: list[tuple[int, int]] = []
    size = 0
    for start in range(0, reader.failed, _PLACES_A_READ):
        for place in reader.read_failed(start, _PLACES_A_READ):
            if spans and size + place.request_length > _BYTES_A_READ:
                yield spans
                spans, size = [], 0
            spans.append((place.request_offset, place.request_length))
            size += place.request_length
    if spans:
        yield spans
