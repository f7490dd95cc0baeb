"""The lease loop: keeps one engine full across chunks, batches and tenants, and saves as it goes.

One asyncio loop in one thread owns the engine and all bookkeeping. What the database does is in
`batches.services.leases`; what keeps the leases alive meanwhile is in `worker/heartbeat.py`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import orjson
import structlog

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
UNSAVED_AT_MOST = 5000
"""With more results waiting (the database is away), nothing new is fed."""
POLL_SECONDS = 3.0
"""How soon a lost wake-up is made up for."""
STALL_SECONDS = 900.0
"""An engine with requests in flight that answers none for this long is taken for dead."""
FINISH_SECONDS, STOP_SECONDS = 8.0, 22.0
"""On stop: how long requests in flight may go on, and how long all of it may take."""
RETRY_LOAD = timedelta(minutes=1)


@dataclass
class Status:
    """What the loop tells the heartbeat; written by the loop only."""

    state: str = WorkerState.STARTING
    loaded: str = ""
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
        self._works: list[Work] = []
        self._loading_for: Lease | None = None
        self._casualties: list[tuple[str, int]] = []
        """Batch and line of what was in flight when the engine died, not yet counted."""
        self._avoid: dict[str, float] = {}
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

    def let_go(self, chunk_id: int, *, lost: bool) -> None:
        """The chunk is no longer ours (`lost`), or its batch no longer wants it."""
        self._call(lambda: self._drop(chunk_id, lost=lost))

    def _call(self, call: Callable[[], None]) -> None:
        if self._ready.is_set() and not self.stopped.is_set() and self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(call)
            except RuntimeError:
                pass  # the loop ended between the look and the call

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
        try:
            await asyncio.wait_for(self._changed.wait(), timeout)
        except TimeoutError:
            self._look_for_stall()

    # --- Leasing and loading ----------------------------------------------------------------

    async def _begin(self) -> None:
        """With nothing in hand: lease what the policy likes best, and load its model if need be."""
        if self.draining:
            return self._idle()
        lease = await self._lease(only=None)
        if lease is None:
            return self._idle()
        self._loading_for = lease
        loaded = await self._have(lease.model)
        wanted, self._loading_for = self._loading_for is not None, None
        if loaded and wanted and not self._stopping:
            await self._take(lease)
        else:
            await self._database.run(leases.give_back, lease)

    def _idle(self) -> None:
        self.status.state = WorkerState.IDLE

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
            await self._database.run(leases.give_back, lease)
            await asyncio.sleep(1)  # its storage may be back by then
            return
        self._works.append(taken)
        self._changed.set()

    async def _have(self, name: str) -> bool:
        """Make sure that this model is loaded as the registry has it now."""
        spec = await self._database.run(_spec_named, name)
        if spec == self._spec and self._engine is not None:
            return True
        await self._unload()
        self.status.state, self.status.loaded = WorkerState.LOADING, ""
        started = time.monotonic()
        try:
            engine = engines.make(spec, self.gpu)
            self._engine = engine
            await engine.load()
        except LoadFailed as error:
            await self._load_failed(spec, str(error))
            return False
        await asyncio.to_thread(orphans.remember, self.name, engine.pids())
        self._spec, self._engine_dead = spec, False
        self._loaded_at = self._answered_at = time.monotonic()
        self.status.state, self.status.loaded = WorkerState.RUNNING, spec.name
        self.status.loads, self.status.error = self.status.loads + 1, ""
        self._avoid.pop(name, None)
        await self._database.run(registry.note_load, name, error="")
        logger.info("model loaded", model=name, seconds=round(self._loaded_at - started, 2))
        return True

    async def _load_failed(self, spec: ModelSpec, why: str) -> None:
        logger.error("model not loaded", model=spec.name, error=why)
        self.status.error = f"{spec.name}: {why}"
        self._avoid[spec.name] = time.monotonic() + RETRY_LOAD.total_seconds()
        await self._unload()
        await self._database.run(registry.note_load, spec.name, error=why)

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
        task = asyncio.create_task(self._answer(engine, of, request))
        of.flying[request.line] = task
        self.status.in_flight += 1

    async def _answer(self, engine: Engine, of: Work, request: Request) -> None:
        """Run one request to its outcome; an engine that dies leaves it to `_revive`."""
        try:
            line = orjson.loads(request.text)
            answer = await engine.answer(of.lease.endpoint, line["body"])
            of.record(work.answered(request, line["custom_id"], answer))
            self.status.tokens += answer.usage.input + answer.usage.output
            self._answered_at = time.monotonic()
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
            of.flying.pop(request.line, None)
            self.status.in_flight -= 1
            self._after_answer(of)

    def _after_answer(self, of: Work) -> None:
        """Go on at once where that is cheap; leave the rest to the loop's next turn."""
        if of.all_run or len(of.finished) >= SAVE_RESULTS or self._engine_dead:
            self._changed.set()
        elif self.status.in_flight <= 1 or not of.todo:
            self._changed.set()
        else:
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
        of.alone.popleft()
        request.deaths, request.tried_alone = request.deaths + 1, True
        self._start(self._engine, of, request)
        await asyncio.wait(list(of.flying.values()))

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
        if request.tried_alone and request.deaths > ALONE_AFTER:
            of.record(work.crashed(request))
            return
        if not request.tried_alone:
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
        if not await self._have(name):
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
            logger.warning("lease lost", batch_id=of.lease.batch_id, chunk=of.lease.chunk_id)
            of.drop(lost=True)
        except GaveUp:
            of.finished = outcomes + of.finished
            raise
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

    def _drop(self, chunk_id: int, *, lost: bool) -> None:
        if self._loading_for is not None and self._loading_for.chunk_id == chunk_id:
            self._loading_for = None
        for each in self._works:
            if each.lease.chunk_id == chunk_id:
                each.drop(lost=lost)
        self._changed.set()

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
    model = Model.objects.get(name=name)
    return ModelSpec(**model.spec_fields, secret=secrets.decrypt(model.encrypted_secret))
