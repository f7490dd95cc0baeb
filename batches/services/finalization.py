"""Finalizing: the journal becomes the output and error files, one line for every request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from datetime import timedelta
from typing import IO

import orjson
import structlog
from django.core.files.uploadedfile import TemporaryUploadedFile
from django.db import transaction
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.ids import new_id
from accounts.services import quotas
from batches import index, places, storage
from batches.error_kinds import Tally
from batches.locks import only_one
from batches.models import Backlog, Batch, Chunk, File, Result
from batches.models.batches import ChunkState, Status
from batches.models.files import Purpose
from batches.queries import batches as queries
from batches.services import events, files, handler_runs, progress
from batches.services.files import Kept

logger = structlog.get_logger(__name__)

LETTING_GO = timedelta(seconds=10)
"""How long a cancelled or expired batch waits for its workers to save what they have finished."""
KINDS = ("output", "errors")
PLACES = "places"
"""Beside the two files: where in them each line's answer lies."""
_RESULTS_A_FETCH = 100
_RELATED = ("organization", "project", "user", "api_key", "model")


class _EndedAlready(Exception):
    """Somebody else has finalized the batch: the first one's lock went with its session."""


def finalize_batch(batch_id: str) -> None:
    """Write a batch's files and end it; safe to call any number of times, at any moment."""
    with scopes_disabled(), only_one(f"finalize {batch_id}") as mine:
        ending = queries.batches_to_finalize().select_related("model", "input_file")
        batch = ending.filter(pk=batch_id).first() if mine else None
        if batch is None or not _close_chunks(batch):
            return
        with ExitStack() as stack:
            names = (*KINDS, PLACES)
            made = {kind: stack.enter_context(storage.temporary(kind)) for kind in names}
            tally = Tally()
            undone = write_files(batch, made, tally) if batch.index_name else 0
            written = {kind: each for kind, each in made.items() if _measured(each)}
            stack.enter_context(suppress(_EndedAlready))
            stored = stack.enter_context(files.kept(batch.organization_id, *written.values()))
            _record(batch, dict(zip(written, stored, strict=True)), undone, tally)


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


def write_files(batch: Batch, made: Mapping[str, IO[bytes]], tally: Tally) -> int:
    """Write every line to one of the two files, in input order; returns how many had no result.

    A line without a result is an error line that says why: the batch expired or was cancelled.
    The third of the files made gets the places of all lines, `tally` what went wrong.
    """
    output, errors = (made[kind] for kind in KINDS)
    code, why = _why_undone(batch)
    undone = 0
    written = places.Writer(made[PLACES])
    with storage.opened(batch.index_name) as stream:
        entries = sorted(index.read(stream), key=lambda entry: entry.line)
    # In a transaction the cursor streams; outside one PostgreSQL would first copy all rows.
    with storage.opened(batch.input_file.storage_name) as source, transaction.atomic():
        results = _results(batch)
        result = next(results, None)
        for entry in entries:
            if result is not None and result[0] == entry.line:
                _, ok, payload = result
                result = next(results, None)
            else:
                undone += 1
                ok, payload = False, unanswered_line(source, entry, code, why)
            if not ok:
                tally.add(entry.line, payload)
            written.add(_write(output if ok else errors, entry, ok, payload))
    written.close()
    return undone


def _write(
    stream: IO[bytes], entry: index.Entry, ok: bool, payload: bytes | memoryview
) -> places.Place:
    offset = stream.tell()
    stream.write(payload)
    return places.Place(entry.line, ok, offset, len(payload), entry.offset, entry.length)


def _results(batch: Batch) -> Iterator[tuple[int, bool, bytes | memoryview]]:
    rows = Result.objects.filter(batch=batch).order_by("line")
    return rows.values_list("line", "ok", "payload").iterator(chunk_size=_RESULTS_A_FETCH)


def _why_undone(batch: Batch) -> tuple[str, str]:
    if batch.status == Status.CANCELLING:
        if batch.errors:  # it was not approved
            return "batch_rejected", batch.errors[0]["message"]
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


def _measured(content: TemporaryUploadedFile) -> int:
    content.size = content.tell()
    return content.size


def _record(batch: Batch, stored: Mapping[str, Kept], undone: int, tally: Tally) -> None:
    """End the batch, with its files and final counts, and forget its journal."""
    rows = Batch.objects.select_related(*_RELATED).select_for_update(of=("self",))
    batch = rows.get(pk=batch.pk)
    if batch.status not in (Status.FINALIZING, Status.CANCELLING):
        raise _EndedAlready
    counts = (batch.completed, batch.failed + undone)
    batch.output_file, batch.error_file = (
        _file(batch, stored, kind, lines) for kind, lines in zip(KINDS, counts, strict=True)
    )
    if PLACES in stored:
        batch.results_name = stored[PLACES].name
    batch.error_kinds = tally.as_json()
    progress.close(batch)
    used = _used(batch)
    batch.failed += undone
    if batch.status == Status.CANCELLING:
        batch.move_to(Status.CANCELLED)
    else:
        batch.move_to(Status.EXPIRED if undone else Status.COMPLETED)
    batch.save()
    Result.objects.filter(batch=batch).delete()
    batch.suspects.all().delete()
    Backlog.objects.filter(batch=batch).delete()
    events.batch_changed(batch)
    handler_runs.batch_ended(batch)
    cost = quotas.settle(batch.pk, used)  # last: it holds up others of the organization
    Batch.objects.filter(pk=batch.pk).update(cost=cost)
    if batch.index_name:
        transaction.on_commit(lambda: storage.discard(batch.index_name))
    logger.info("finalized", batch_id=batch.pk, status=batch.status, undone=undone)


def _file(batch: Batch, stored: Mapping[str, Kept], kind: str, lines: int) -> File | None:
    """The file's row, or None when nothing was written to it."""
    if kind not in stored:
        return None
    return files.record(
        stored[kind],
        organization=batch.organization,
        project=batch.project,
        user=batch.user,
        api_key=batch.api_key,
        filename=f"{batch.pk}_{kind}.jsonl",
        purpose=Purpose.BATCH_OUTPUT,
        expires_after=files.expiry(batch.output_expires_after_seconds),
        lines=lines,
    )


def _used(batch: Batch) -> quotas.Used:
    """What ran, before what did not is counted as failed."""
    return quotas.Used(
        endpoint=batch.endpoint,
        requests=batch.completed + batch.failed,
        input_tokens=batch.input_tokens,
        cached_tokens=batch.cached_tokens,
        output_tokens=batch.output_tokens,
        reasoning_tokens=batch.reasoning_tokens,
        gpu_seconds=batch.gpu_seconds,
    )
