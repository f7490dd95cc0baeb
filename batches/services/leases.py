"""Leases: how a GPU worker gets a chunk, keeps it, saves its results and lets go of it.

Every write shows the chunk's fencing token; one that is out of date changes nothing. The clock
is PostgreSQL's, so that hosts need not agree on the time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import psycopg
import structlog
from django.conf import settings
from django.db import connection, transaction
from django.utils import timezone
from django_scopes import scopes_disabled

from batches import policy, wakeups
from batches.locks import in_turn
from batches.models import Backlog, Batch, Suspect
from batches.models.batches import ChunkState, Status
from batches.queries import queue as queries
from batches.services import events

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
    charged: float = 0.0
    """GPU seconds that its organization was charged for it."""


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
    gpu_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Look:
    """What a worker saw: for a moment, it leases more of its model by that."""

    view: policy.View
    avoid: tuple[str, ...]
    until: float
    """By `time.monotonic()`."""


LOOK_AGAIN_AFTER, LOOK_AT_MOST = 20.0, 1.0
"""A look serves for so many times the seconds that it took, so that looking costs a twentieth of the
time however much waits; and for so many seconds at most."""
_last_looks: dict[str, _Look] = {}
"""By worker, of which there is one in a process."""


def lease_next(
    *,
    owner: str,
    loaded: str,
    residency: timedelta,
    only: str | None = None,
    avoid: Sequence[str] = (),
    kind: str = "",
    asleep: Sequence[str] = (),
    asked: Mapping[str, float] | None = None,
) -> Lease | None:
    """Lease the chunk that the policy chooses for a worker with this `kind` of GPU; None for none.

    `asleep` names the models that it would only have to wake.

    `loaded` is its model and `residency` for how long it has been. With `only` (feeding the loaded
    model) there is no lease when the policy would rather have another model; `avoid` leaves out
    models (that just failed to load) and batches (that could not be read). `asked` are the models
    that real-time requests asked for, and when.
    """
    since = timezone.now() - residency
    worker = policy.Worker(owner, kind, loaded, since.timestamp(), asleep=frozenset(asleep))
    with scopes_disabled():
        if only == loaded and (lease := _lease_by_last_look(worker, tuple(avoid))):
            return lease
        look = _look(worker, avoid, asked)
        lease, decision = _lease_at_once(look, worker)
        if lease or decision.candidate is None or only not in (None, decision.model):
            return lease
        # Swaps, and chunks of organizations that may have only so many, are leased one after the
        # other, so that each worker sees what the last one took.
        with transaction.atomic():
            in_turn("swap")
            return _lease_in_turn(_look(worker, avoid, asked).view, worker, only)


def model_to_load(
    *,
    owner: str,
    loaded: str,
    avoid: Sequence[str] = (),
    kind: str = "",
    asleep: Sequence[str] = (),
    asked: Mapping[str, float],
) -> str:
    """The model that a worker without a chunk should load for real-time requests; '' for none."""
    worker = policy.Worker(owner, kind, loaded, asleep=frozenset(asleep))
    with scopes_disabled():
        decision = policy.choose(queries.queue_view(worker, avoid, asked), worker)
    return decision.model if decision.candidate is None else ""


def upcoming(
    *,
    owner: str,
    loaded: str,
    residency: timedelta,
    avoid: Sequence[str] = (),
    kind: str = "",
    asleep: Sequence[str] = (),
    asked: Mapping[str, float],
) -> str:
    """The model that this worker will most likely load next, and soon; '' for none."""
    since = timezone.now() - residency
    worker = policy.Worker(owner, kind, loaded, since.timestamp(), asleep=frozenset(asleep))
    with scopes_disabled():
        return policy.upcoming(queries.queue_view(worker, avoid, asked), worker)


def _look(
    worker: policy.Worker, avoid: Sequence[str], asked: Mapping[str, float] | None = None
) -> _Look:
    began = time.monotonic()
    view = queries.queue_view(worker, avoid, asked)
    now = time.monotonic()
    lasts = min(LOOK_AGAIN_AFTER * (now - began), LOOK_AT_MOST)
    return _Look(view, tuple(avoid), now + lasts)


def _lease_by_last_look(worker: policy.Worker, avoid: tuple[str, ...]) -> Lease | None:
    """More of the loaded model, by what was seen a moment ago; None: look anew."""
    look = _last_looks.pop(worker.name, None)
    if look is None or look.avoid != avoid or time.monotonic() > look.until:
        return None
    decision = policy.choose_more(look.view, worker)
    if not _needs_no_turn(look.view, decision, worker):
        return None
    return _claim_more(look, decision, worker)


def _lease_at_once(look: _Look, worker: policy.Worker) -> tuple[Lease | None, policy.Decision]:
    """What may be leased without waiting for others, if that is chosen; else what is."""
    while True:
        decision = policy.choose(look.view, worker)
        if not _needs_no_turn(look.view, decision, worker):
            return None, decision
        if lease := _claim_more(look, decision, worker):
            return lease, decision
        look = replace(look, view=policy.without(look.view, decision))


def _needs_no_turn(view: policy.View, decision: policy.Decision, worker: policy.Worker) -> bool:
    """Whether it is more of the loaded model, of an organization without a limit."""
    chosen = decision.candidate
    if chosen is None or decision.model != worker.model:
        return False
    return view.tenants[chosen.organization].limit is None


def _lease_in_turn(view: policy.View, worker: policy.Worker, only: str | None) -> Lease | None:
    while True:
        decision = policy.choose(view, worker)
        if decision.candidate is None or only not in (None, decision.model):
            return None
        if lease := _claim_decided(view, decision, worker):
            return lease
        view = policy.without(view, decision)  # others took its last chunk meanwhile


def _claim_more(look: _Look, decision: policy.Decision, worker: policy.Worker) -> Lease | None:
    """Claim what was chosen, and keep the look, with that in it, for the next one."""
    if lease := _claim_decided(look.view, decision, worker):
        _last_looks[worker.name] = replace(look, view=policy.after_lease(look.view, decision))
        return lease
    return None


def _claim_decided(
    view: policy.View, decision: policy.Decision, worker: policy.Worker
) -> Lease | None:
    assert decision.candidate is not None
    per_token = view.models[decision.model].cost(1)
    if lease := _claim(decision.candidate.batch, worker.name, per_token):
        logger.info(
            "leased",
            batch_id=lease.batch_id,
            chunk=lease.chunk_id,
            reason=decision.reason.code,
            why=str(decision.reason),
        )
    return lease


_CLAIM = """
WITH claimed AS (
    UPDATE batches_chunk AS chunk
    SET state = 'leased', lease_owner = %(owner)s, fencing_token = chunk.fencing_token + 1,
        worker = %(owner)s, leases = chunk.leases + 1, leased_at = clock_timestamp(),
        lease_expires_at = clock_timestamp() + %(seconds)s * interval '1 second'
    FROM batches_batch AS batch, models_registry_model AS model, batches_file AS file,
        accounts_organization AS organization
    WHERE chunk.id = (
        SELECT id FROM batches_chunk
        WHERE batch_id = %(batch)s AND state = 'ready'
        ORDER BY start LIMIT 1 FOR UPDATE SKIP LOCKED
    )
    AND batch.id = chunk.batch_id AND batch.status = 'in_progress'
    AND model.id = batch.model_id AND file.id = batch.input_file_id
    AND organization.id = batch.organization_id
    AND organization.suspended_at IS NULL AND organization.deleted_at IS NULL
    AND batch.held_at IS NULL AND model.halt = ''
    AND NOT EXISTS (
        SELECT FROM batches_share AS halted
        WHERE halted.organization_id = batch.organization_id AND halted.halt <> ''
    )
    RETURNING chunk.id, chunk.fencing_token, chunk.attempts, chunk.start, chunk.end, chunk.tokens,
        batch.id AS batch_id, batch.endpoint, model.name, file.storage_name, batch.index_name,
        batch.organization_id
), charged AS (
    INSERT INTO batches_share AS share (organization_id, weight, served, served_at)
    SELECT organization_id, 1, tokens * %(per_token)s, clock_timestamp() FROM claimed
    ON CONFLICT (organization_id) DO UPDATE SET
        served = excluded.served + share.served * 0.5 ^ (
            greatest(0, extract(epoch FROM excluded.served_at - share.served_at)) / %(half_life)s
        ),
        served_at = excluded.served_at
)
SELECT id, fencing_token, attempts, start, "end", batch_id, endpoint, name, storage_name, index_name,
    (tokens * %(per_token)s)::float8
FROM claimed
"""
"""Take the batch's next chunk, and charge the organization for it. (Triggers keep the `Backlog`.)"""


def _claim(batch_id: str, owner: str, per_token: float = 0.0) -> Lease | None:
    with connection.cursor() as cursor:
        cursor.execute(
            _CLAIM,
            {
                "owner": owner,
                "seconds": settings.LEASE_SECONDS,
                "batch": batch_id,
                "per_token": per_token,
                "half_life": policy.HALF_LIFE,
            },
        )
        row = cursor.fetchone()
    return Lease(*row) if row else None


_HOLD = """
UPDATE batches_chunk
SET attempts = 0, lease_expires_at = clock_timestamp() + %s * interval '1 second'
WHERE id = %s AND fencing_token = %s AND state = 'leased'
"""
_END = """
UPDATE batches_chunk SET attempts = 0, state = 'done', lease_owner = '', lease_expires_at = NULL,
    done_at = clock_timestamp()
WHERE id = %s AND fencing_token = %s AND state = 'leased'
"""
_INSERT = """
INSERT INTO batches_result (batch_id, line, ok, payload)
SELECT %s, * FROM unnest(%s::int[], %s::bool[], %b::bytea[])
ON CONFLICT DO NOTHING RETURNING line
"""
# A batch that uses more than was reserved for it counts for what it uses while it still runs.
_COUNT = """
WITH batch AS (
    UPDATE batches_batch
    SET completed = completed + %s, failed = failed + %s, input_tokens = input_tokens + %s,
        cached_tokens = cached_tokens + %s, output_tokens = output_tokens + %s,
        reasoning_tokens = reasoning_tokens + %s, gpu_seconds = gpu_seconds + %s
    WHERE id = %s
    RETURNING id, input_tokens, cached_tokens, output_tokens, completed, failed, total,
        progress_percents
), reserved AS (
    UPDATE accounts_reservation AS reserved
    SET tokens = batch.input_tokens + batch.output_tokens,
        cost = greatest(
            reserved.cost,
            (greatest(batch.input_tokens - batch.cached_tokens, 0) * reserved.input_price
                + batch.cached_tokens * reserved.cached_price
                + batch.output_tokens * reserved.output_price) / 1000000
        )
    FROM batch
    WHERE reserved.batch_id = batch.id
        AND reserved.tokens < batch.input_tokens + batch.output_tokens
)
SELECT completed + failed, total, progress_percents FROM batch
"""


@transaction.atomic
def save(*, lease: Lease, outcomes: Sequence[Outcome], finished: bool, wasted: float = 0.0) -> None:
    """Save results and what counts them, renew the lease, and with `finished` end the chunk.

    `wasted` are the GPU seconds of requests that were begun and not finished.

    A line that already has a result keeps it, and is not counted again. Raises `LeaseLost` with
    nothing saved when the fencing token is out of date.
    """
    with connection.cursor() as cursor:
        mine = [lease.chunk_id, lease.fencing_token]
        if finished:
            cursor.execute(_END, mine)
        else:
            cursor.execute(_HOLD, [settings.LEASE_SECONDS, *mine])
        if cursor.rowcount != 1:
            raise LeaseLost(lease.chunk_id)
        if outcomes or wasted:
            _count(cursor, lease.batch_id, _insert(lease.batch_id, outcomes), wasted)
    if finished:
        _finalize_if_done(lease.batch_id)


def _insert(batch_id: str, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Write the journal; returns what was new. Binds on the server: bytes travel as they are."""
    if not outcomes:
        return []
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


def _count(cursor: Any, batch_id: str, new: Sequence[Outcome], wasted: float) -> None:
    good = sum(outcome.ok for outcome in new)
    tokens = [
        sum(getattr(outcome, name) for outcome in new)
        for name in ("input", "cached", "output", "reasoning")
    ]
    gpu_seconds = wasted + sum(outcome.gpu_seconds for outcome in new)
    cursor.execute(_COUNT, [good, len(new) - good, *tokens, gpu_seconds, batch_id])
    answered, total, percents = cursor.fetchone()
    if reached := _reached(answered - len(new), answered, total, percents):
        events.batch_progressed(batch_id, reached)


def _reached(before: int, now: int, total: int, percents: Sequence[int]) -> list[int]:
    """The percentages that the batch had not reached before, and has now."""
    return [each for each in percents if before * 100 < each * total <= now * 100]


def _finalize_if_done(batch_id: str) -> None:
    """Send the batch to finalizing with the end of its last chunk.

    The lock on the batch makes the last two workers look one after the other. Nobody needs to look
    while a chunk is ready: whoever ends that one will.
    """
    with scopes_disabled():
        if Backlog.objects.filter(batch=batch_id, chunks__gt=0).exists():
            return
        batch = Batch.objects.select_for_update(of=("self",)).get(pk=batch_id)
        if batch.chunks.exclude(state=ChunkState.DONE).exists():
            return
        if batch.status == Status.IN_PROGRESS:
            batch.move_to(Status.FINALIZING)
            batch.save(update_fields=["status", "finalizing_at"])
        wakeups.finalize(batch.pk)


def is_wanted(model: str) -> bool:
    """Whether a chunk waits for the model."""
    with scopes_disabled():
        return (
            Backlog.objects.filter(
                chunks__gt=0,
                batch__model__name=model,
                batch__status=Status.IN_PROGRESS,
                batch__organization__suspended_at=None,
                batch__organization__deleted_at=None,
                batch__held_at=None,
                batch__model__halt="",
            )
            .exclude(batch__organization__share__halt__gt="")
            .exists()
        )


_RENEW = """
UPDATE batches_chunk AS chunk
SET lease_expires_at = clock_timestamp() + %s * interval '1 second'
FROM (
    SELECT held.id FROM batches_chunk AS held
    JOIN unnest(%s::bigint[], %s::int[]) AS mine (id, token)
        ON held.id = mine.id AND held.fencing_token = mine.token
    WHERE held.state = 'leased' ORDER BY held.id FOR NO KEY UPDATE OF held
) AS held, batches_batch AS batch, accounts_organization AS organization,
    models_registry_model AS model
WHERE chunk.id = held.id AND batch.id = chunk.batch_id
    AND organization.id = batch.organization_id AND model.id = batch.model_id
RETURNING chunk.id,
    CASE WHEN organization.suspended_at IS NOT NULL OR organization.deleted_at IS NOT NULL
        THEN 'suspended'
    WHEN batch.held_at IS NOT NULL OR model.halt = 'paused' OR EXISTS (
        SELECT FROM batches_share AS halted
        WHERE halted.organization_id = batch.organization_id AND halted.halt = 'paused'
    ) THEN 'held'
    ELSE batch.status END
"""


def renew(leases: Sequence[Lease]) -> dict[int, str]:
    """Keep the leases; returns those still held, by chunk, with their batch's status.

    `suspended` stands for the status of a batch whose organization is, or was deleted; `held` for
    that of one that operators hold, or whose organization or model they have paused.
    """
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
    fencing_token = fencing_token + 1, attempts = attempts + 1
WHERE id IN (
    SELECT id FROM batches_chunk WHERE state = 'leased' AND {} ORDER BY id FOR NO KEY UPDATE {}
)
"""
_GIVE_BACK = """
WITH freed AS (
    UPDATE batches_chunk
    SET state = 'ready', lease_owner = '', lease_expires_at = NULL, fencing_token = fencing_token + 1
    WHERE id = %s AND fencing_token = %s AND state = 'leased'
    RETURNING batch_id
), refunded AS (
    UPDATE batches_share AS share SET served = greatest(0, share.served - %s)
    FROM freed JOIN batches_batch AS batch ON batch.id = freed.batch_id
    WHERE share.organization_id = batch.organization_id
)
SELECT FROM freed
"""
"""Refunds the charge: the chunk is charged for anew when it is leased again."""


def give_back(lease: Lease, *, wake: bool = True) -> None:
    """Let go of a chunk that is not finished, so that another worker may have it at once.

    Without `wake` it is left to be found: what no worker could do anything with need wake none.
    """
    with connection.cursor() as cursor:
        cursor.execute(_GIVE_BACK, [lease.chunk_id, lease.fencing_token, lease.charged])
        if cursor.rowcount and wake:
            wakeups.gpu_workers()
    wakeups.finalize(lease.batch_id)  # does nothing unless the batch was cancelled meanwhile


def release_expired() -> int:
    """Free the chunks whose owner has not been heard of for a whole lease.

    A chunk that is locked is left for the next time: a save is at it, or a worker was cut off amid
    one, whose transaction the server ends soon.
    """
    return _let_go("lease_expires_at < clock_timestamp()", [], wait=False)


def release_owned_by(owner: str) -> int:
    """Free what an earlier life of this worker held: it has just started, so it holds nothing."""
    return _let_go("lease_owner = %s", [owner])


def _let_go(which: str, params: Sequence[str], *, wait: bool = True) -> int:
    """Free chunks of workers that died; each counts an attempt, and stays charged."""
    with connection.cursor() as cursor:
        cursor.execute(_LET_GO.format(which, "" if wait else "SKIP LOCKED"), params)
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
