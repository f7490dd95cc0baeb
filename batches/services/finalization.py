"""Finalizing: the journal becomes the output and error files, one line for every request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import IO

import orjson
import structlog
from django.core.files.uploadedfile import TemporaryUploadedFile
from django.db import transaction
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.ids import new_id
from batches import index, queries, storage
from batches.locks import only_one
from batches.models import Batch, Chunk, File, Result
from batches.models.batches import ChunkState, Status
from batches.models.files import Purpose
from batches.services import files

logger = structlog.get_logger(__name__)

LETTING_GO = timedelta(seconds=10)
"""How long a cancelled or expired batch waits for its workers to save what they have finished."""
_RESULTS_A_FETCH = 100


def finalize_batch(batch_id: str) -> None:
    """Write a batch's files and end it; safe to call any number of times, at any moment."""
    with scopes_disabled(), only_one(f"finalize {batch_id}") as mine:
        batch = queries.batches_to_finalize().filter(pk=batch_id).first() if mine else None
        if batch is None or not _close_chunks(batch):
            return
        with ExitStack() as stack:
            output = stack.enter_context(storage.temporary("output"))
            errors = stack.enter_context(storage.temporary("errors"))
            undone = write_files(batch, output, errors) if batch.index_name else 0
            _record(batch, output, errors, undone)


@transaction.atomic
def _close_chunks(batch: Batch) -> bool:
    """Take every unfinished chunk out of its worker's hands; False while one may still save."""
    chunks = Chunk.objects.select_for_update().filter(batch=batch).exclude(state=ChunkState.DONE)
    undone = list(chunks.order_by("pk"))
    since = batch.cancelling_at or batch.finalizing_at
    waited = since is None or timezone.now() - since > LETTING_GO
    if not waited and any(chunk.state == ChunkState.LEASED for chunk in undone):
        return False
    for chunk in undone:
        chunk.state, chunk.lease_owner, chunk.lease_expires_at = ChunkState.DONE, "", None
        chunk.fencing_token += 1
        chunk.save()
    return True


def write_files(batch: Batch, output: IO[bytes], errors: IO[bytes]) -> int:
    """Write every line to one of the two files, in input order; returns how many had no result.

    A line without a result is an error line that says why: the batch expired or was cancelled.
    """
    code, why = _why_undone(batch)
    undone = 0
    with storage.opened(batch.index_name) as stream:
        entries = sorted(index.read(stream), key=lambda entry: entry.line)
    # In a transaction the cursor streams; outside one PostgreSQL would first copy all rows.
    with storage.opened(batch.input_file.storage_name) as source, transaction.atomic():
        results = _results(batch)
        result = next(results, None)
        for entry in entries:
            if result is not None and result[0] == entry.line:
                (output if result[1] else errors).write(result[2])
                result = next(results, None)
            else:
                undone += 1
                errors.write(unanswered_line(source, entry, code, why))
    return undone


def _results(batch: Batch) -> Iterator[tuple[int, bool, bytes | memoryview]]:
    rows = Result.objects.filter(batch=batch).order_by("line")
    return rows.values_list("line", "ok", "payload").iterator(chunk_size=_RESULTS_A_FETCH)


def _why_undone(batch: Batch) -> tuple[str, str]:
    if batch.status == Status.CANCELLING:
        return "batch_cancelled", "The batch was cancelled before this request was run."
    why = "The batch expired before this request was run."
    if batch.model is not None and batch.model.load_error:
        why = f"{why[:-1]}: its model could not be loaded."  # the details are the operator's
    return "batch_expired", why


def unanswered_line(source: IO[bytes], entry: index.Entry, code: str, why: str) -> bytes:
    """The error line of a request that never got an answer."""
    source.seek(entry.offset)
    custom_id = orjson.loads(source.read(entry.length))["custom_id"]
    return orjson.dumps(
        {
            "id": new_id("batch_req_"),
            "custom_id": custom_id,
            "response": None,
            "error": {"code": code, "message": why},
        },
        option=orjson.OPT_APPEND_NEWLINE,
    )


@transaction.atomic
def _record(
    batch: Batch, output: TemporaryUploadedFile, errors: TemporaryUploadedFile, undone: int
) -> None:
    """End the batch, with its files and final counts, and forget its journal."""
    batch = Batch.objects.select_for_update(of=("self",)).get(pk=batch.pk)
    if batch.status not in (Status.FINALIZING, Status.CANCELLING):
        return
    with ExitStack() as undo:
        batch.output_file = _keep(batch, output, "output", undo)
        batch.error_file = _keep(batch, errors, "errors", undo)
        batch.failed += undone
        if batch.status == Status.CANCELLING:
            batch.move_to(Status.CANCELLED)
        else:
            batch.move_to(Status.EXPIRED if undone else Status.COMPLETED)
        batch.save()
        Result.objects.filter(batch=batch).delete()
        batch.suspects.all().delete()
        undo.pop_all()
    if batch.index_name:
        transaction.on_commit(lambda: storage.remove(batch.index_name))
    logger.info("finalized", batch_id=batch.pk, status=batch.status, undone=undone)


def _keep(batch: Batch, content: TemporaryUploadedFile, kind: str, undo: ExitStack) -> File | None:
    """The file's row, or None when nothing was written to it; `undo` removes the bytes again."""
    if (size := content.tell()) == 0:
        return None
    content.size = size
    file = files.keep(
        organization=batch.organization,
        project=batch.project,
        content=content,
        filename=f"{batch.pk}_{kind}.jsonl",
        purpose=Purpose.BATCH_OUTPUT,
        expires_after=files.expiry(batch.output_expires_after_seconds),
    )
    undo.callback(storage.remove, file.storage_name)
    return file
