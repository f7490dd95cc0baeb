"""Runs of result handlers: written when a batch ends, run in order, tried again, never lost.

At least once. Of one batch they begin in the order of their positions; one that failed is tried
again when it is due, and holds up nobody. What the handlers do is in `batches/handlers/`.
"""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic
from typing import Any

import structlog
from celery.exceptions import SoftTimeLimitExceeded
from django.db import InterfaceError, OperationalError, transaction
from django.utils import timezone
from django_scopes import scope, scopes_disabled

from accounts.access import Caller
from accounts.errors import BadRequest, NotFound
from accounts.services import audit
from batches import wakeups
from batches.handlers.results import HandlerFailed, Results
from batches.locks import in_turn
from batches.models import Batch, HandlerRun
from batches.models.batches import Status
from batches.models.handlers import RunState
from batches.queries import handlers as queries
from batches.storage import StorageAway

logger = structlog.get_logger(__name__)

SCHEDULE = (0.0, 10.0, 60.0, 600.0, 3600.0, 6 * 3600.0)
"""Seconds before each attempt; after the last the run has failed, until somebody retries it."""
JITTER = 0.2
LONGEST = 3300
"""Seconds that an attempt may take, or nearly; less than Redis waits for its message's answer."""
TURN_SECONDS = 60.0
"""After so long another message brings the batch's next run, with a time of its own."""
HOLD = timedelta(minutes=5)
"""How long after its last sign of life a run counts as left by a process that died."""
BEAT_SECONDS = 20.0
SILENT_SECONDS = HOLD.total_seconds() - BEAT_SECONDS
"""After so long without a sign of life an attempt is ended, before another takes its run over: it
would go on in its process, and those after it hang in all the others."""
AGAIN_SECONDS = 5.0
"""Who catches even that is interrupted again."""
AT_ONCE = 2
"""Runs of one organization at a time, or nearly: a slow receiver of one's own is nobody else's."""
HANGS = "It took no result for five minutes, and said nothing else: something did not answer."
DIED = "The process ended before the handler did; too much memory, perhaps, or too much time."


class Lost(Exception):
    """The run is not ours any more: somebody took it over, or its handler has been deleted."""


class Silent(BaseException):
    """The handler hangs. No `Exception`, which handlers and what they use catch, and try again."""


# --- Written with the end of the batch ----------------------------------------------------------


def batch_ended(batch: Batch) -> None:
    """Write a run for each handler that is to have the results, in the transaction in which the
    batch ends; without results there is nothing to handle."""
    cancelled = batch.status == Status.CANCELLED
    if batch.output_file is None and (cancelled or batch.error_file is None):
        return
    hold_handlers(batch.organization_id)
    with scopes_disabled():
        runs = [
            HandlerRun(
                organization=batch.organization,
                batch=batch,
                handler=handler,
                position=handler.position,
            )
            for handler in queries.handlers_for(batch, chosen(batch.metadata))
        ]
        HandlerRun.objects.bulk_create(runs)
    if runs:
        wakeups.handle_results(batch.pk)


def hold_handlers(organization_id: str) -> None:
    """Keep the organization's handlers as they are until the transaction ends: that one is deleted
    is found by the commit alone, which a batch that ends could not bear."""
    in_turn(f"handlers of {organization_id}")


def chosen(metadata: Mapping[str, Any] | None) -> frozenset[str] | None:
    """The names in the batch's metadata `handlers` (with commas; `none`: nobody); None without."""
    text = (metadata or {}).get("handlers")
    if not isinstance(text, str):
        return None
    return frozenset(name.strip() for name in text.split(",")) - {"none", ""}


# --- Running ------------------------------------------------------------------------------------


def run_due(batch_id: str) -> None:
    """Run what is due of a batch, in order; safe to call at any moment, by any number."""
    ends = monotonic() + TURN_SECONDS
    with scopes_disabled():
        while (run := _taken(batch_id)) is not None:
            _run(run)
            if monotonic() > ends:
                wakeups.handle_results(batch_id)
                return


def repeat_wakeups() -> None:
    """Wake for every batch with a run that is due, should its message have got lost."""
    for batch_id in queries.batches_to_handle(timezone.now(), AT_ONCE)[:100]:
        wakeups.handle_results(batch_id)


@transaction.atomic
def _taken(batch_id: str) -> HandlerRun | None:
    """The next run of the batch, held for one attempt; None if it is nobody's turn."""
    now = timezone.now()
    runs = queries.runs_to_take().filter(batch=batch_id).select_for_update(of=("self",))
    for run in runs.order_by("position", "pk"):
        if not run.is_due(now):
            if run.is_first_attempt:
                return None
            continue
        if run.attempts >= len(SCHEDULE):
            _end(run, RunState.FAILED, error=DIED)
            continue
        if queries.runs_at_once(run.organization_id, now) >= AT_ONCE:
            return None
        run.state, run.next_attempt_at, run.busy_until = RunState.RUNNING, None, now + HOLD
        run.attempts, run.started_at = run.attempts + 1, now
        run.save()
        return run
    return None


def _run(run: HandlerRun) -> None:
    """One attempt; whatever goes wrong in it is this run's alone."""
    from batches.services import handlers  # it needs pydantic, which workers' hosts may lack

    log = logger.bind(run_id=run.pk, batch_id=run.batch_id, kind=run.handler.kind)
    results = Results(run.batch)
    try:
        handler = handlers.made(run.handler)
        results = Results(run.batch, requests=handler.wants_requests, beat=_beat(run))
        with scope(organization=run.organization), _interrupting():
            said = handler.handle(run.batch, results)
    except Lost:
        log.warning("handler run lost")
    except Silent:
        log.warning("handler hangs")
        _failed(run, HandlerFailed(HANGS), results.taken)
    except (OperationalError, InterfaceError):
        raise  # our own database: the run is left, and found again
    except Exception as error:  # of whatever kind: handlers are others' code
        log.warning("handler failed", error=type(error).__name__)  # its words may be a tenant's
        _failed(run, error, results.taken)
    else:
        _settle(run, RunState.DONE, rows=results.taken, result=(said or "")[:500], error="")
        log.info("handled", rows=results.taken)


class _beat:
    """Says now and then that the run goes on; raises `Lost` once it is not ours."""

    def __init__(self, run: HandlerRun) -> None:
        self._run, self._next = run, monotonic() + BEAT_SECONDS

    def __call__(self) -> None:
        if monotonic() < self._next:
            return
        self._next = monotonic() + BEAT_SECONDS
        until = timezone.now() + HOLD
        with scopes_disabled():
            if not _mine(self._run).update(busy_until=until):
                raise Lost
        self._run.busy_until = until
        _wait_for_silence()


@contextmanager
def _interrupting() -> Iterator[None]:
    """Raise `Silent` in what hangs; in a process's main thread, where Celery's prefork has us."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler, (left, again) = signal.signal(signal.SIGALRM, _interrupt), _wait_for_silence()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, again)
        signal.signal(signal.SIGALRM, handler)


def _interrupt(*_: Any) -> None:
    raise Silent


def _wait_for_silence() -> tuple[float, float]:
    """Begin anew to wait for it; returns what was waited for before."""
    if signal.getsignal(signal.SIGALRM) is not _interrupt:
        return 0.0, 0.0
    return signal.setitimer(signal.ITIMER_REAL, SILENT_SECONDS, AGAIN_SECONDS)


def _mine(run: HandlerRun) -> Any:
    """The run's row while nobody else has taken it."""
    return HandlerRun.objects.filter(
        pk=run.pk, state=RunState.RUNNING, busy_until=run.busy_until, attempts=run.attempts
    )


def _failed(run: HandlerRun, error: Exception, rows: int) -> None:
    """Try again by the schedule, or not at all."""
    final = isinstance(error, HandlerFailed) and error.final
    said = _in_words(error)
    if final or run.attempts >= len(SCHEDULE):
        _settle(run, RunState.FAILED, rows=rows, error=said)
        return
    wait = SCHEDULE[run.attempts] * (1 + random.uniform(0, JITTER))  # noqa: S311
    if isinstance(error, HandlerFailed):
        wait = max(wait, error.retry_after)
    _settle(run, RunState.WAITING, rows=rows, error=said, wait=timedelta(seconds=wait))


def _in_words(error: Exception) -> str:
    if isinstance(error, StorageAway):
        return error.message
    if isinstance(error, SoftTimeLimitExceeded):
        return f"It took longer than {LONGEST // 60} minutes."
    if isinstance(error, HandlerFailed):
        said = str(error)
    else:
        said = f"{type(error).__name__}: {error}".removesuffix(": ")
    return said.replace("\0", "\ufffd")[:1000]


@transaction.atomic
def _settle(
    run: HandlerRun, state: RunState, *, wait: timedelta | None = None, **fields: Any
) -> None:
    """What became of the attempt; nothing if another took the run over meanwhile."""
    row = _mine(run).select_for_update(of=("self",)).first()
    if row is not None:
        _end(row, state, wait=wait, **fields)


def _end(row: HandlerRun, state: RunState, *, wait: timedelta | None = None, **fields: Any) -> None:
    now = timezone.now()
    row.state, row.busy_until = state, None
    row.next_attempt_at = None if wait is None else now + wait
    row.ended_at = now if row.is_over else None
    for name, value in fields.items():
        setattr(row, name, value)
    row.save()


# --- Retrying -----------------------------------------------------------------------------------


@transaction.atomic
def retry_run(*, actor: Caller, run: HandlerRun) -> HandlerRun:
    """Run it again at once, from the schedule's start; also one that is done.

    Raises `BadRequest` while it is running.
    """
    actor.require("webhooks")
    with scopes_disabled():
        rows = HandlerRun.objects.select_for_update(of=("self",)).select_related("handler")
        row = rows.filter(pk=run.pk).first()
    if row is None:
        raise NotFound(f"No such handler run: {run.pk!r}", param="run_id", code="not_found")
    if row.state == RunState.RUNNING:
        raise BadRequest("It is running; wait for its end.", param="run_id", code="already_running")
    row.state, row.attempts, row.next_attempt_at = RunState.WAITING, 0, timezone.now()
    row.ended_at = None
    row.save()
    wakeups.handle_results(row.batch_id)
    audit.record(
        "result_handler.retried",
        actor=actor,
        target=row.handler,
        changes={"batch": [None, row.batch_id]},
    )
    return row
