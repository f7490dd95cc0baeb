"""The lease loop: keeps one engine full across chunks, batches and tenants, and saves as it goes.

One asyncio loop in one thread owns the engine and all bookkeeping. What the database does is in
`batches.services.leases`; what keeps the leases alive meanwhile is in `worker/heartbeat.py`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import orjson
import structlog
from cryptography.fernet import InvalidToken

from accounts import secrets
from batches.services import leases
from batches.services.leases import Lease, LeaseLost
from models_registry import services as registry
from models_registry.models import Model
from worker import engines, orphans, work
from worker.database import Database, GaveUp
from worker.engines.base import Engine, EngineDied, LoadFailed, ModelSpec
from worker.models import WorkerState
from worker.work import ALONE_AFTER, Request, Work

logger = structlog.get_logger(__name__)

SAVE_RESULTS, SAVE_SECONDS = 100, 1.0
"""A save follows as soon as this many results wait, or one has waited this long."""
SAVE_AT_MOST = 1000
UNSAVED_AT_MOST, UNSAVED_BYTES = 5000, 256 * 1024 * 1024
"""With more results waiting (the database is away), nothing new is fed."""
POLL_SECONDS = 3.0
"""How soon a lost wake-up is made up for."""
STALL_SECONDS = 3600.0
"""An engine with requests in flight that answers none for this long is taken for dead; the longest
answers (tens of thousands of tokens, with many at once) take less."""
FINISH_SECONDS, STOP_SECONDS = 8.0, 22.0
"""On stop: how long requests in flight may go on, and how long all of it may take."""
REMEMBER_SECONDS = 0.5
"""How often, while a model loads, its engine's processes are written down."""
RETRY_LOAD, RETRY_READ = 60.0, 10.0
"""Seconds for which a model that did not load, or a batch that could not be read, is left out."""


@dataclass
class Status:
    """What the loop tells the heartbeat; written by the loop only."""

    state: str = WorkerState.STARTING
    loaded: str = ""
    capacity: int = 0
    in_flight: int = 0
    tokens: int = 0
    loads: int = 0
    error: str = ""


class LeaseLoop:
    """`run` in a thread of its own; `wake`, `stop` and `let_go` may be called from any thread."""

    def __init__(self, name: str, gpu: int | None = None) -> None:
        self.name = name
        self.gpu = gpu
        self.status = Status()
        self.draining = False
        self.stopped = threading.Event()
        self._stopping = False
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed: asyncio.Event
        self._database = Database()
        self._engine: Engine | None = None
        self._spec: ModelSpec | None = None
        self._loaded_at = 0.0
        self._answered_at = 0.0
        self._engine_dead = False
        self._alone_in_flight = False
        self._works: list[Work] = []
        self._loading_for: Lease | None = None
        self._casualties: list[tuple[str, int]] = []
        """Batch and line of what was in flight when the engine died, not yet counted."""
        self._avoid: dict[str, float] = {}
        """Models and batches to leave out, and until when (`time.monotonic()`)."""
        self._savers: set[asyncio.Task[None]] = set()
        self._ask_again_at = 0.0

    # --- From other threads -----------------------------------------------------------------

    def run(self) -> None:
        """Work until `stop`; whatever happens, no engine is left running."""
        try:
            asyncio.run(self._main())
        finally:
            self.status.state = WorkerState.STOPPED
            self._database.close()
            self.stopped.set()

    def wake(self) -> None:
        """There may be a chunk to lease."""
        self._ask_again_at = 0.0
        self._call(lambda: self._changed.set())

    def stop(self) -> None:
        """Feed nothing more, save what is done, give the rest back, end the engine."""
        self._stopping = True
        self._database.give_up_at = time.monotonic() + STOP_SECONDS
        self._call(lambda: self._changed.set())

    def held(self) -> list[Lease]:
        """The leases to keep alive."""
        loading = self._loading_for
        leased = [each.lease for each in list(self._works) if not each.lost]
        return [*leased, loading] if loading is not None else leased

    def let_go(self, lease: Lease, *, lost: bool) -> None:
        """The chunk is no longer ours (`lost`), or its batch no longer wants it."""
        self._call(lambda: self._drop(lease, lost=lost))

    def _call(self, call: Callable[[], None]) -> None:
        if self._ready.is_set() and not self.stopped.is_set() and self._loop is not None:
            # The loop may end between the look and the call.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(call)

    # --- The loop ---------------------------------------------------------------------------

    async def _main(self) -> None:
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        try:
            await asyncio.to_thread(orphans.end_left_over, self.name)
            await self._database.run(leases.release_owned_by, self.name)
            self.status.state = WorkerState.IDLE
            while not self._stopping:
                await self._turn()
            await self._wind_up()
        except GaveUp as error:
            logger.warning("stopped without the database; the leases will expire", error=str(error))
        finally:
            await self._unload()

    async def _turn(self) -> None:
        """One look at everything: mend the engine, lease, feed, save, wait for a change."""
        self._changed.clear()
        self._look_for_stall()
        if self._engine_dead:
            await self._revive()
        if not self._works:
            await self._begin()
        elif self._wants_more():
            await self._lease_more()
        await self._run_alone()
        self._feed()
        self._save_due()
        await self._wait()

    async def _wait(self) -> None:
        if self._changed.is_set():
            return
        unsaved = any(each.finished for each in self._works)
        timeout = SAVE_SECONDS / 4 if unsaved else POLL_SECONDS
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout)

    # --- Leasing and loading ----------------------------------------------------------------

    async def _begin(self) -> None:
        """With nothing in hand: lease what the policy likes best, and load its model if need be."""
        lease = None if self.draining else await self._lease(only=None)
        if lease is None:
            self.status.state = WorkerState.IDLE
            return
        self._loading_for = lease
        loaded = await self._ensure_loaded(lease.model)
        wanted, self._loading_for = self._loading_for is not None, None
        if loaded and wanted and not self._stopping:
            await self._take(lease)
        else:
            await self._database.run(leases.give_back, lease)

    def _wants_more(self) -> bool:
        """Whether the next chunk is due: less waits than the engine has room for."""
        if self._engine is None or self.draining or time.monotonic() < self._ask_again_at:
            return False
        if any(each.alone for each in self._works):
            return False
        return sum(each.waiting for each in self._works) < self._engine.capacity

    async def _lease_more(self) -> None:
        assert self._spec is not None
        lease = await self._lease(only=self._spec.name)
        if lease is None:
            self._ask_again_at = time.monotonic() + 1.0
        else:
            await self._take(lease)

    async def _lease(self, *, only: str | None) -> Lease | None:
        now = time.monotonic()
        return await self._database.run(
            leases.lease_next,
            owner=self.name,
            loaded=self.status.loaded,
            residency=timedelta(seconds=now - self._loaded_at),
            only=only,
            avoid=[name for name, until in self._avoid.items() if until > now],
        )

    async def _take(self, lease: Lease) -> None:
        """Read the chunk and begin to feed it."""
        try:
            taken = await self._database.run(work.read, lease)
        except OSError as error:
            logger.error("chunk cannot be read", batch_id=lease.batch_id, error=str(error))
            self._avoid[lease.batch_id] = time.monotonic() + RETRY_READ
            await self._database.run(leases.give_back, lease)
            return
        self._works.append(taken)
        self._changed.set()

    async def _ensure_loaded(self, name: str) -> bool:
        """Make sure that this model is loaded as the registry has it now."""
        try:
            spec = await self._database.run(_spec_named, name)
        except LoadFailed as error:
            await self._load_failed(name, str(error))
            return False
        if spec == self._spec and self._engine is not None:
            return True
        await self._unload()
        self.status.state, self.status.loaded = WorkerState.LOADING, ""
        started = time.monotonic()
        try:
            self._engine = engine = engines.make(spec, self.gpu)
            await self._load(engine)
        except LoadFailed as error:
            await self._load_failed(name, str(error))
            return False
        except Exception as error:  # our own fault, but no reason to serve nobody
            logger.exception("engine not made", model=name)
            await self._load_failed(name, f"{type(error).__name__}: {error}")
            return False
        self._spec, self._engine_dead = spec, False
        self._loaded_at = self._answered_at = time.monotonic()
        self.status.state, self.status.loaded = WorkerState.RUNNING, spec.name
        self.status.capacity = engine.capacity
        self.status.loads, self.status.error = self.status.loads + 1, ""
        self._avoid.pop(name, None)
        await self._database.run(registry.note_load, name, error="")
        logger.info("model loaded", model=name, seconds=round(self._loaded_at - started, 2))
        return True

    async def _load(self, engine: Engine) -> None:
        """Load, and write down all the while which processes that starts: a kill may come then.

        A stop does not wait for the load: it is cancelled, and its processes are ended.
        """
        loading, known = asyncio.create_task(engine.load()), list[int]()
        while not loading.done():
            await asyncio.wait([loading], timeout=REMEMBER_SECONDS)
            if (pids := engine.pids()) != known:
                await asyncio.to_thread(orphans.remember, self.name, pids)
                known = pids
            if self._stopping and not loading.done():
                if not loading.cancelling():  # once: a second one would break into its clean-up
                    loading.cancel()
                await asyncio.to_thread(orphans.end_left_over, self.name)
                known = []
        if loading.cancelled():
            raise LoadFailed("The worker was stopped.")
        await loading

    async def _load_failed(self, name: str, why: str) -> None:
        if self._stopping:  # so the fault is not the model's
            await self._unload()
            return
        logger.error("model not loaded", model=name, error=why)
        self.status.error = f"{name}: {why}"
        self._avoid[name] = time.monotonic() + RETRY_LOAD
        await self._unload()
        await self._database.run(registry.note_load, name, error=why)

    async def _unload(self) -> None:
        engine, self._engine, self._spec = self._engine, None, None
        self.status.loaded = ""
        if engine is not None:
            await engine.unload()
            await asyncio.to_thread(orphans.remember, self.name, [])

    # --- Feeding ----------------------------------------------------------------------------

    def _feed(self) -> None:
        """Fill the engine from the oldest chunk on, in execution order."""
        engine = self._engine
        if engine is None or self._engine_dead or self._stopping or not self._works:
            return
        if self._alone_in_flight:
            return
        if sum(each.unsaved_bytes for each in self._works) > UNSAVED_BYTES:
            return
        room = min(engine.capacity - self.status.in_flight, UNSAVED_AT_MOST - self._unsaved())
        for each in self._works:
            while room > 0 and each.todo and not each.dropped:
                self._start(engine, each, each.todo.popleft())
                room -= 1
        if self.status.in_flight:
            self.status.state = WorkerState.RUNNING

    def _unsaved(self) -> int:
        return sum(len(each.finished) for each in self._works)

    def _start(self, engine: Engine, of: Work, request: Request) -> None:
        if not self.status.in_flight:
            self._answered_at = time.monotonic()  # the engine was idle, not stalled
        task = asyncio.create_task(self._answer(engine, of, request))
        task.add_done_callback(partial(self._never_ran, of, request))
        of.flying[request.line] = task
        self.status.in_flight += 1

    async def _answer(self, engine: Engine, of: Work, request: Request) -> None:
        """Run one request to its outcome; an engine that dies leaves it to `_revive`."""
        try:
            line = orjson.loads(request.text)
            answer = await engine.answer(of.lease.endpoint, line["body"])
            self._answered_at = time.monotonic()
            self.status.tokens += answer.usage.input + answer.usage.output
            of.record(work.answered(request, line["custom_id"], answer))
        except EngineDied as error:
            self._engine_died(str(error))
            self._survive(of, request)
        except asyncio.CancelledError:
            if self._engine_dead:  # it was stopped because the engine no longer answers
                self._survive(of, request)
            else:
                of.todo.appendleft(request)
        except Exception:
            logger.exception("engine error", batch_id=of.lease.batch_id, line=request.line)
            of.record(work.failed(request))
        finally:
            self._landed(of, request)

    def _never_ran(self, of: Work, request: Request, task: asyncio.Task[None]) -> None:
        """Do what `_answer` could not: cancelled before its first step, it was never entered."""
        if task.cancelled():
            of.todo.appendleft(request)
            self._landed(of, request)

    def _landed(self, of: Work, request: Request) -> None:
        del of.flying[request.line]
        self.status.in_flight -= 1
        self._alone_in_flight = False
        self._after_answer(of)

    def _after_answer(self, of: Work) -> None:
        """Go on at once where that is cheap; leave the rest to the loop's next turn."""
        if (
            of.all_run
            or len(of.finished) >= SAVE_RESULTS
            or self._engine_dead
            or self.status.in_flight <= 1
            or self._wants_more()
        ):
            self._changed.set()
        self._feed()

    async def _run_alone(self) -> None:
        """Try a suspect by itself, once nothing else is in flight."""
        waiting = [each for each in self._works if each.alone and not each.dropped]
        if not waiting or self._engine is None or self._engine_dead or self._stopping:
            return
        if self.status.in_flight or any(each.waiting for each in self._works):
            return
        of, request = waiting[0], waiting[0].alone[0]
        # Counted before it is tried: should the worker die with the engine, the count stays.
        await self._database.run(leases.accuse, of.lease.batch_id, [request.line])
        request.deaths += 1
        if of.dropped:
            return
        of.alone.popleft()
        request.tried_alone = self._alone_in_flight = True
        self._start(self._engine, of, request)

    # --- When the engine dies ---------------------------------------------------------------

    def _engine_died(self, why: str) -> None:
        if not self._engine_dead:
            self._engine_dead = True
            logger.error("engine died", model=self.status.loaded, error=why)

    def _look_for_stall(self) -> None:
        if self.status.in_flight and time.monotonic() - self._answered_at > STALL_SECONDS:
            self._engine_died(f"no answer for {STALL_SECONDS:.0f} seconds")

    def _survive(self, of: Work, request: Request) -> None:
        """Queue a request again that was in flight at a death, unless it has now shown its guilt."""
        alone, request.tried_alone = request.tried_alone, False
        if alone and request.deaths > ALONE_AFTER:
            of.record(work.crashed(request))
            return
        if not alone:
            request.deaths += 1
            self._casualties.append((of.lease.batch_id, request.line))
        of.put_back(request)

    async def _revive(self) -> None:
        """Count the death against what was in flight, and load the model anew."""
        await self._stop_flying(wait=2.0)
        casualties, self._casualties = self._casualties, []
        for batch_id in {batch_id for batch_id, _ in casualties}:
            lines = [line for batch, line in casualties if batch == batch_id]
            await self._database.run(leases.accuse, batch_id, lines)
        name = self.status.loaded
        await self._unload()
        self._engine_dead = False
        if not await self._ensure_loaded(name):
            await self._give_all_back()

    async def _stop_flying(self, wait: float) -> None:
        flying = [task for each in self._works for task in each.flying.values()]
        if flying:
            await asyncio.wait(flying, timeout=wait)
        late = [task for task in flying if not task.done()]
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)

    # --- Saving -----------------------------------------------------------------------------

    def _save_due(self) -> None:
        """Start a save for every chunk that has one due; at most one a chunk at a time."""
        now = time.monotonic()
        for each in list(self._works):
            due = len(each.finished) >= SAVE_RESULTS or now - each.unsaved_since >= SAVE_SECONDS
            if each.saving or not (each.all_run or (each.finished and due)):
                continue
            each.saving = True
            saver = asyncio.create_task(self._save(each))
            self._savers.add(saver)
            saver.add_done_callback(self._savers.discard)

    async def _save(self, of: Work) -> None:
        """Save what is finished; with the last of it the chunk ends, or is given back if dropped."""
        outcomes = of.take_finished(SAVE_AT_MOST)
        last = of.all_run and not of.finished
        try:
            await self._save_some(of, outcomes, last=last)
        except LeaseLost:
            self._log_drop(of, "lease lost")
            of.drop(lost=True)
        except GaveUp:
            self._log_drop(of, "not saved: the lease will expire")
            of.drop(lost=True)
        except Exception:
            logger.exception("chunk cannot be saved", batch_id=of.lease.batch_id)
            of.drop(lost=True)
        finally:
            of.saving = False
            if (last or of.lost) and of.all_run and of in self._works:
                self._works.remove(of)
            self._changed.set()

    async def _save_some(self, of: Work, outcomes: list[leases.Outcome], *, last: bool) -> None:
        finished = last and not of.dropped
        if of.lost:
            return
        if outcomes or finished:
            await self._database.run(
                leases.save, lease=of.lease, outcomes=outcomes, finished=finished
            )
        if last and of.dropped:
            await self._database.run(leases.give_back, of.lease)

    def _drop(self, lease: Lease, *, lost: bool) -> None:
        if self._loading_for == lease:
            self._loading_for = None
        for each in self._works:
            if each.lease == lease:  # not a later lease of the same chunk
                self._log_drop(each, "lease lost" if lost else "batch no longer wants it")
                each.drop(lost=lost)
        self._changed.set()

    def _log_drop(self, of: Work, why: str) -> None:
        logger.warning(why, batch_id=of.lease.batch_id, chunk=of.lease.chunk_id)

    # --- Ending -----------------------------------------------------------------------------

    async def _wind_up(self) -> None:
        """Let requests in flight finish if they are quick, then save and give everything back."""
        await self._stop_flying(wait=FINISH_SECONDS)
        await self._give_all_back()

    async def _give_all_back(self) -> None:
        for each in self._works:
            each.drop()
        await self._stop_flying(wait=0)
        while self._works and not self._gave_up():
            self._save_due()
            await asyncio.wait([*self._savers, asyncio.create_task(asyncio.sleep(0.05))])
        self._works.clear()

    def _gave_up(self) -> bool:
        limit = self._database.give_up_at
        return limit is not None and time.monotonic() > limit


def _spec_named(name: str) -> ModelSpec:
    model = Model.objects.filter(name=name).first()
    if model is None:
        raise LoadFailed("It is no longer in the registry.")
    try:
        secret = secrets.decrypt(model.encrypted_secret)
    except InvalidToken as error:
        raise LoadFailed("Its secret was encrypted with another SECRET_KEY.") from error
    return ModelSpec(**model.spec_fields, secret=secret)
