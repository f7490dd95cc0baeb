"""Leases: how a GPU worker gets a chunk, keeps it, saves its results and lets go of it.

Every write shows the chunk's fencing token; one that is out of date changes nothing. The clock
is PostgreSQL's, so that hosts need not agree on the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import psycopg
import structlog
from django.conf import settings
from django.db import connection, transaction
from django.utils import timezone
from django_scopes import scopes_disabled

from batches import policy, queries, wakeups
from batches.models import Batch, Chunk, Suspect
from batches.models.batches import ChunkState, Status

logger = structlog.get_logger(__name__)


class LeaseLost(Exception):
    """The chunk belongs to somebody else by now: drop it, save nothing."""


@dataclass(frozen=True, slots=True)
class Lease:
    """One chunk in one worker's hands."""

    chunk_id: int
    fencing_token: int
    attempts: int
    start: int
    end: int
    batch_id: str
    endpoint: str
    model: str
    input_name: str
    index_name: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """One finished request: its line in the output or error file, and the tokens it used."""

    line: int
    ok: bool
    payload: bytes
    input: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0


def lease_next(
    *,
    owner: str,
    loaded: str,
    residency: timedelta,
    only: str | None = None,
    avoid: Sequence[str] = (),
) -> Lease | None:
    """Lease the chunk that the policy chooses; None when there is none.

    With `only` (feeding the loaded model) there is no lease when the policy would rather have
    another model; `avoid` leaves out models (that just failed to load) and batches (that could
    not be read).
    """
    with scopes_disabled():
        waiting = queries.candidates(avoid)
        while waiting:
            decision = policy.choose(
                waiting, loaded=loaded, residency=residency, now=timezone.now()
            )
            assert decision is not None
            if only not in (None, decision.candidate.model):
                return None
            if lease := _claim(decision.candidate.batch_id, owner):
                logger.info(
                    "leased", batch_id=lease.batch_id, chunk=lease.chunk_id, reason=decision.reason
                )
                return lease
            waiting.remove(decision.candidate)  # others took its last chunk meanwhile
        return None


_CLAIM = """
UPDATE batches_chunk AS chunk
SET state = 'leased', lease_owner = %(owner)s, fencing_token = chunk.fencing_token + 1,
    lease_expires_at = clock_timestamp() + %(seconds)s * interval '1 second'
FROM batches_batch AS batch, models_registry_model AS model, batches_file AS file
WHERE chunk.id = (
    SELECT id FROM batches_chunk
    WHERE batch_id = %(batch)s AND state = 'ready'
    ORDER BY start LIMIT 1 FOR UPDATE SKIP LOCKED
)
AND batch.id = chunk.batch_id AND batch.status = 'in_progress'
AND model.id = batch.model_id AND file.id = batch.input_file_id
RETURNING chunk.id, chunk.fencing_token, chunk.attempts, chunk.start, chunk.end,
    batch.id, batch.endpoint, model.name, file.storage_name, batch.index_name
"""


def _claim(batch_id: str, owner: str) -> Lease | None:
    with connection.cursor() as cursor:
        cursor.execute(
            _CLAIM, {"owner": owner, "seconds": settings.LEASE_SECONDS, "batch": batch_id}
        )
        row = cursor.fetchone()
    return Lease(*row) if row else None


_HOLD = """
UPDATE batches_chunk
SET attempts = 0, lease_expires_at = clock_timestamp() + %s * interval '1 second'
WHERE id = %s AND fencing_token = %s AND state = 'leased'
"""
_INSERT = """
INSERT INTO batches_result (batch_id, line, ok, payload)
SELECT %s, * FROM unnest(%s::int[], %s::bool[], %b::bytea[])
ON CONFLICT DO NOTHING RETURNING line
"""
_COUNT = """
UPDATE batches_batch
SET completed = completed + %s, failed = failed + %s, input_tokens = input_tokens + %s,
    cached_tokens = cached_tokens + %s, output_tokens = output_tokens + %s,
    reasoning_tokens = reasoning_tokens + %s
WHERE id = %s
"""


@transaction.atomic
def save(*, lease: Lease, outcomes: Sequence[Outcome], finished: bool) -> None:
    """Save results and what counts them, renew the lease, and with `finished` end the chunk.

    A line that already has a result keeps it, and is not counted again. Raises `LeaseLost` with
    nothing saved when the fencing token is out of date.
    """
    with connection.cursor() as cursor:
        cursor.execute(_HOLD, [settings.LEASE_SECONDS, lease.chunk_id, lease.fencing_token])
        if cursor.rowcount != 1:
            raise LeaseLost(lease.chunk_id)
        if outcomes:
            _count(cursor, lease.batch_id, _insert(lease.batch_id, outcomes))
    if finished:
        _finish(lease)


def _insert(batch_id: str, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Write the journal; returns what was new. Binds on the server: bytes travel as they are."""
    connection.ensure_connection()
    with psycopg.Cursor(connection.connection) as cursor:
        cursor.execute(
            _INSERT,
            [
                batch_id,
                [outcome.line for outcome in outcomes],
                [outcome.ok for outcome in outcomes],
                [outcome.payload for outcome in outcomes],
            ],
        )
        new = cursor.fetchall()
    first = {outcome.line: outcome for outcome in reversed(outcomes)}
    return [first[line] for (line,) in new]


def _count(cursor: object, batch_id: str, new: Sequence[Outcome]) -> None:
    good = sum(outcome.ok for outcome in new)
    sums = [
        sum(getattr(outcome, name) for outcome in new)
        for name in ("input", "cached", "output", "reasoning")
    ]
    cursor.execute(_COUNT, [good, len(new) - good, *sums, batch_id])  # type: ignore[attr-defined]


def _finish(lease: Lease) -> None:
    with scopes_disabled():
        Chunk.objects.filter(pk=lease.chunk_id).update(
            state=ChunkState.DONE, lease_owner="", lease_expires_at=None
        )
        # The lock on the batch makes the last two workers look one after the other.
        batch = Batch.objects.select_for_update(of=("self",)).get(pk=lease.batch_id)
        _finalize_if_done(batch)


def _finalize_if_done(batch: Batch) -> None:
    if batch.chunks.exclude(state=ChunkState.DONE).exists():
        return
    if batch.status == Status.IN_PROGRESS:
        batch.move_to(Status.FINALIZING)
        batch.save(update_fields=["status", "finalizing_at"])
    wakeups.finalize(batch.pk)


_RENEW = """
UPDATE batches_chunk AS chunk
SET lease_expires_at = clock_timestamp() + %s * interval '1 second'
FROM (
    SELECT held.id FROM batches_chunk AS held
    JOIN unnest(%s::bigint[], %s::int[]) AS mine (id, token)
        ON held.id = mine.id AND held.fencing_token = mine.token
    WHERE held.state = 'leased' ORDER BY held.id FOR NO KEY UPDATE OF held
) AS held, batches_batch AS batch
WHERE chunk.id = held.id AND batch.id = chunk.batch_id
RETURNING chunk.id, batch.status
"""


def renew(leases: Sequence[Lease]) -> dict[int, str]:
    """Keep the leases; returns those still held, by chunk, with their batch's status."""
    if not leases:
        return {}
    ids = [lease.chunk_id for lease in leases]
    tokens = [lease.fencing_token for lease in leases]
    with connection.cursor() as cursor:
        cursor.execute(_RENEW, [settings.LEASE_SECONDS, ids, tokens])
        return dict(cursor.fetchall())


_LET_GO = """
UPDATE batches_chunk
SET state = 'ready', lease_owner = '', lease_expires_at = NULL,
    fencing_token = fencing_token + 1, attempts = attempts + %s
WHERE id IN (
    SELECT id FROM batches_chunk WHERE state = 'leased' AND {} ORDER BY id FOR NO KEY UPDATE
)
"""


def give_back(lease: Lease) -> None:
    """Let go of a chunk that is not finished, so that another worker may have it at once."""
    _let_go("id = %s AND fencing_token = %s", [lease.chunk_id, lease.fencing_token], attempts=0)
    wakeups.finalize(lease.batch_id)  # does nothing unless the batch was cancelled meanwhile


def release_expired() -> int:
    """Free the chunks whose owner has not been heard of for a whole lease."""
    return _let_go("lease_expires_at < clock_timestamp()", [], attempts=1)


def release_owned_by(owner: str) -> int:
    """Free what an earlier life of this worker held: it has just started, so it holds nothing."""
    return _let_go("lease_owner = %s", [owner], attempts=1)


def _let_go(which: str, params: list[int | str], *, attempts: int) -> int:
    with connection.cursor() as cursor:
        cursor.execute(_LET_GO.format(which), [attempts, *params])
        count = int(cursor.rowcount)
    if count:
        wakeups.gpu_workers()
    return count


def saved_lines(lease: Lease, lines: Sequence[int]) -> set[int]:
    """Which of these lines have a result already, from an earlier lease of the chunk."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT line FROM batches_result WHERE batch_id = %s AND line = ANY(%s)",
            [lease.batch_id, list(lines)],
        )
        return {line for (line,) in cursor.fetchall()}


def suspects(batch_id: str) -> dict[int, int]:
    """Lines of the batch that were in flight when an engine died, with how often."""
    with scopes_disabled():
        return dict(Suspect.objects.filter(batch_id=batch_id).values_list("line", "deaths"))


_ACCUSE = """
INSERT INTO batches_suspect (batch_id, line, deaths) SELECT %s, unnest(%s::int[]), 1
ON CONFLICT (batch_id, line) DO UPDATE SET deaths = batches_suspect.deaths + 1
"""


def accuse(batch_id: str, lines: Sequence[int]) -> None:
    """Count one engine death against each of these lines."""
    with connection.cursor() as cursor:
        cursor.execute(_ACCUSE, [batch_id, sorted(lines)])
