"""The lease loop: keeps one engine full across chunks, batches and tenants, and saves as it goes.

One asyncio loop in one thread does all bookkeeping. What the database does is in
`batches.services.leases`; which model is on the GPU is `worker/hosting.py`'s; what keeps the leases
alive meanwhile is in `worker/heartbeat.py`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial

import orjson
import structlog

from batches import lane
from batches.lane import Frame
from batches.services import leases
from batches.services.leases import Lease, LeaseLost
from worker import gpus, queries, work
from worker.database import Database, GaveUp
from worker.engines.base import Engine, EngineAway, EngineDied
from worker.engines.ladder import trouble_of
from worker.feeding import Feed
from worker.guard import Guard
from worker.hosting import Host
from worker.lane import CRASHED, Lane
from worker.metering import SharedClock
from worker.models import Health, WorkerState
from worker.prefetch import Prefetch
from worker.status import Status
from worker.work import ALONE_AFTER, Request, Work

logger = structlog.get_logger(__name__)

SAVE_RESULTS, SAVE_SECONDS = 100, 1.0
"""A save follows as soon as this many results wait, or one has waited this long."""
SAVE_AT_MOST = 1000
UNSAVED_AT_MOST, UNSAVED_BYTES = 5000, 256 * 1024 * 1024
"""With more results waiting (the database is away), nothing new is fed."""
POLL_SECONDS = 3.0
"""How soon a lost wake-up is made up for."""
APART_SECONDS = 0.3
"""With nothing to be had, wake-ups make a worker look at the queue no more often."""
STALL_SECONDS = 3600.0
"""An engine with requests in flight that answers none for this long is taken for dead; the longest
answers (tens of thousands of tokens, with many at once) take less."""
FINISH_SECONDS, STOP_SECONDS = 8.0, 22.0
"""On stop: how long requests in flight may go on, and how long all of it may take."""
LOOK_SECONDS = 2.0
"""How long a look at the GPU may take after its engine has died: whose fault was it?"""
RETRY_READ = 10.0
"""Seconds for which a batch that could not be read is left out."""
AWAY = lane.error(503, "The remote engine is away; try again soon.", code="engine_away")


class LeaseLoop:
    """`run` in a thread of its own; `wake`, `stop` and `let_go` may be called from any thread."""

    def __init__(self, name: str, gpu: str | None = None) -> None:
        self.name = name
        self.status = Status()
        self.draining = False
        self.stopped = threading.Event()
        self._stopping = self._unload_asked = False
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed: asyncio.Event
        self._database = Database()
        self.host = Host(name, gpu, self._database, self.status)
        self.guard = Guard(gpus.indexes(gpu))
        self.feed = Feed()
        self._answered_at = 0.0
        self._engine_dead = False
        self._engine_away = ""
        """Why the engine cannot be had for now; '': it can."""
        self._died_with = 0
        """Requests in flight when the engine died for want of memory, and fewer at once may help;
        0: it died otherwise."""
        self._guilt_shown = False
        self._alone_in_flight = False
        self._clock = SharedClock()
        self.lane = Lane(
            name,
            self.host,
            self.status,
            self._database,
            self._clock,
            may_take=self._may_take,
            died=self._engine_died,
        )
        self.prefetch = Prefetch(self.host, self._upcoming)
        self._works: list[Work] = []
        self._loading_for: Lease | None = None
        self._reconsidering: asyncio.Task[None] | None = None
        self._casualties: list[tuple[str, int]] = []
        """Batch and line of what was in flight when the engine died, not yet counted."""
        self._unreadable: dict[str, float] = {}
        """Batches to leave out, and until when (`time.monotonic()`)."""
        self._savers: set[asyncio.Task[None]] = set()
        self._readers: set[asyncio.Task[None]] = set()
        self._giving_back: asyncio.Task[None] | None = None
        self._ask_again_at = 0.0
        self._vain_at = float("-inf")
        """When a look at the whole queue last brought nothing."""

    # --- From other threads -----------------------------------------------------------------

    def run(self) -> None:
        """Work until `stop`; whatever happens, no engine is left running."""
        try:
            asyncio.run(self._main())
        finally:
            self.guard.stop()
            self.status.state = WorkerState.STOPPED
            self._database.close()
            self.stopped.set()

    def wake(self) -> None:
        """There may be a chunk to lease."""
        self._call(self._look_soon)

    def stop(self) -> None:
        """Feed nothing more, save what is done, give the rest back, end the engine."""
        self._stopping = self.host.stopping = True
        self._database.give_up_at = time.monotonic() + STOP_SECONDS
        self._call(lambda: self._changed.set())

    def unload(self) -> None:
        """Let no model be here, awake or asleep, as soon as nothing is in hand."""
        self._unload_asked = True
        self._call(lambda: self._changed.set())

    def held(self) -> list[Lease]:
        """The leases to keep alive."""
        # While a model loads nobody else looks, and a driver that hangs tells nothing of itself.
        self.guard.look()
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
            await self._database.run(leases.release_owned_by, self.name)
            self.guard.remember(await self._database.run(queries.sick_before, self.name))
            self.guard.start(self._health_changed)
            self.status.state = WorkerState.IDLE
            self.lane.start()
            self.prefetch.start()
            while not self._stopping:
                await self._turn()
            await self._wind_up()
        except GaveUp as error:
            logger.warning("stopped without the database; the leases will expire", error=str(error))
        except Exception:
            # What is on its way to a database that is away must not keep a crashed loop alive.
            self._database.give_up_at = self._database.give_up_at or time.monotonic()
            raise
        finally:
            await self.prefetch.close()
            await self.lane.close(0)
            await self.host.close()

    async def _turn(self) -> None:
        """One look at everything: mend the engine, lease, feed, save, wait for a change."""
        self._changed.clear()
        if self.guard.look().gives_back:
            await self._give_up_gpu()
        self._look_for_stall()
        await self._look_for_death()
        if self._engine_away:
            await self._leave_model(self._engine_away, AWAY)
        if self._engine_dead:
            await self._revive()
        await self.host.tend()
        if self._unload_asked and not self._works and not self.lane.in_flight:
            self._unload_asked = False
            await self.host.close()
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

    def _look_soon(self) -> None:
        """Look at the queue; where that was in vain a moment ago, a little later.

        What nobody can run comes back again and again, and may wake all workers each time.
        """
        early = min(self._ask_again_at - time.monotonic(), APART_SECONDS)
        if early > 0:
            self._ask_again_at = time.monotonic() + early
            self._turn_in(early)
        self._changed.set()

    def _turn_in(self, seconds: float) -> None:
        asyncio.get_running_loop().call_later(seconds, self._changed.set)

    async def _begin(self) -> None:
        """With nothing in hand: lease what the policy likes best, and load its model if need be."""
        early = self._vain_at + APART_SECONDS - time.monotonic()
        if early > 0:
            self._turn_in(early)
            return
        lease = None if self._holds_back else await self._lease(only=None)
        if lease is None:
            self._vain_at = time.monotonic()
            await self._load_asked()
            self.status.state = self._state_without_work()
            return
        self._loading_for = lease
        loaded = await self._ensure_loaded(lease.model, lease)
        wanted, self._loading_for = self._loading_for is not None, None
        if loaded and wanted and not self._stopping:
            self._take(lease)
        else:
            await self._database.run(leases.give_back, lease)

    def _state_without_work(self) -> str:
        if self.lane.in_flight:
            return WorkerState.RUNNING
        return WorkerState.DRAINED if self.draining else WorkerState.IDLE

    async def _load_asked(self) -> None:
        """With no chunk to be had: load what real-time requests ask for, if nobody else does."""
        if not self.lane.asked or self._holds_back:
            return
        name = await self._database.run(
            leases.model_to_load,
            owner=self.name,
            loaded=self.status.loaded,
            avoid=await self.host.avoided(),
            kind=self.host.gpu_kind,
            asleep=self.host.near,
            asked=self.lane.asked,
        )
        if name and await self.lane.claim(name):
            logger.info("loaded for real-time requests", model=name)
            await self._ensure_loaded(name)

    def _wants_more(self) -> bool:
        """Whether the next chunk is due: less waits here than the engine could take at once."""
        engine = self.host.engine
        if engine is None or self._holds_back or time.monotonic() < self._ask_again_at:
            return False
        if any(each.alone or each.reading for each in self._works):
            return False  # what is being read will be waiting, too
        able = [each for each in self._works if not each.dropped]
        requests = sum(len(each.todo) for each in able)
        return self.feed.wants(engine, requests, sum(each.waiting_tokens for each in able))

    @property
    def _holds_back(self) -> bool:
        """Whether no chunk may be leased: by an operator's wish, or for the GPU's sake."""
        return self.draining or not self.guard.verdict.feeds

    async def _lease_more(self) -> None:
        """Go on with the model that is loaded, unless the registry has another by that name: then
        what is in hand ends with this one, and the next chunk has the new one loaded."""
        lease = None
        if await self.host.has(self.status.loaded):
            lease = await self._lease(only=self.status.loaded)
        if lease is None:
            self._ask_again_at = time.monotonic() + 1.0
        else:
            self._take(lease)

    async def _lease(self, *, only: str | None) -> Lease | None:
        return await self._database.run(
            leases.lease_next,
            owner=self.name,
            loaded=self.status.loaded,
            residency=self._residency,
            only=only,
            avoid=await self._avoided(),
            kind=self.host.gpu_kind,
            asleep=self.host.near,
            asked=self.lane.asked,
        )

    async def _upcoming(self) -> str:
        """The model that will be wanted here after the one that serves now; '' for none."""
        if self.host.engine is None or self.host.coming or self._engine_dead or self._holds_back:
            return ""
        return await self._database.run(
            leases.upcoming,
            owner=self.name,
            loaded=self.status.loaded,
            residency=self._residency,
            avoid=await self._avoided(),
            kind=self.host.gpu_kind,
            asleep=self.host.near,
            asked=self.lane.asked,
        )

    @property
    def _residency(self) -> timedelta:
        return timedelta(seconds=time.monotonic() - self.host.loaded_at)

    async def _avoided(self) -> list[str]:
        """Models that failed to load lately, and batches that could not be read."""
        now = time.monotonic()
        unreadable = (batch for batch, until in self._unreadable.items() if until > now)
        return [*await self.host.avoided(), *unreadable]

    def _take(self, lease: Lease) -> None:
        """Hold the chunk from now on, and have it read."""
        of = Work(lease, reading=True)
        self._works.append(of)
        reader = asyncio.create_task(self._read(of))
        self._readers.add(reader)
        reader.add_done_callback(self._readers.discard)

    async def _read(self, of: Work) -> None:
        """Read the chunk, to be fed; one that cannot be read is given back, and left out a while."""
        try:
            await work.read(of, self._database)
        except GaveUp:
            of.drop(lost=True)
        except Exception as error:
            if isinstance(error, OSError):
                logger.error("chunk cannot be read", batch_id=of.lease.batch_id, error=str(error))
            else:
                logger.exception("chunk cannot be read", batch_id=of.lease.batch_id)
            self._unreadable[of.lease.batch_id] = time.monotonic() + RETRY_READ
            of.unreadable = True
            of.drop()
        finally:
            self._changed.set()

    async def _ensure_loaded(self, name: str, lease: Lease | None = None) -> bool:
        async with self.lane.loading(name):
            if lease != self._loading_for:  # let go while real-time requests came to their end
                return False
            # A load may never end on a GPU that was found sick meanwhile, and is not begun there.
            loaded = not self.guard.verdict.gives_back and await self.host.ensure(name)
        if loaded and self.host.engine is not None:
            self.host.engine.on_report = self._feed
            self._engine_dead, self._answered_at = False, time.monotonic()
        return loaded

    # --- Feeding ----------------------------------------------------------------------------

    def _feed(self) -> None:
        """Fill the engine from the oldest chunk on, in execution order."""
        engine = self.host.engine
        if engine is None:
            return
        # Beside what real-time requests take, so much is kept free for more of them.
        self.feed.headroom = self.lane.headroom + self.lane.in_flight
        if self._may_feed() and not engine.gone():
            self._fill(engine)
        self.status.fullness = self.feed.fullness(engine)

    def _may_feed(self) -> bool:
        if self._is_lost or self._stopping or self._alone_in_flight:
            return False
        unsaved = sum(each.unsaved_bytes for each in self._works)
        return self.guard.verdict.feeds and unsaved <= UNSAVED_BYTES

    @property
    def _is_lost(self) -> bool:
        """Whether the engine is dead, or cannot be had for now."""
        return self._engine_dead or bool(self._engine_away)

    def _fill(self, engine: Engine) -> None:
        room = UNSAVED_AT_MOST - self._unsaved()
        while room > 0 and (of := self._next()) and self.feed.takes(engine, of.todo[0].tokens):
            self._start(engine, of, of.take())
            room -= 1
        if self.status.in_flight:
            self.status.state = WorkerState.RUNNING

    def _next(self) -> Work | None:
        """What the next request is of."""
        return next((each for each in self._works if each.waiting), None)

    def _is_flying(self) -> bool:
        return any(each.flying for each in self._works)

    def _unsaved(self) -> int:
        return sum(len(each.finished) for each in self._works)

    def _start(self, engine: Engine, of: Work, request: Request) -> None:
        if not self._is_flying():
            self._answered_at = time.monotonic()  # the engine was idle, not stalled
        task = asyncio.create_task(self._answer(engine, of, request))
        task.add_done_callback(partial(self._never_ran, of, request))
        of.flying[request.line] = task
        self.status.in_flight += 1
        self.feed.begin(request.tokens)
        request.begun = self._clock.begin()

    async def _answer(self, engine: Engine, of: Work, request: Request) -> None:
        """Run one request to its outcome; an engine that is lost leaves it to the next turn."""
        try:
            line = orjson.loads(request.text)
            answer = await engine.answer(of.lease.endpoint, line["body"])
            self._answered_at = time.monotonic()
            self.host.answered()
            self.status.answers += 1
            self.status.tokens += answer.usage.input + answer.usage.output
            gpu_seconds = self._clock.share(request.begun) * engine.gpus
            of.record(work.answered(request, line["custom_id"], answer, gpu_seconds))
        except EngineDied as error:
            of.wasted += self._clock.share(request.begun) * engine.gpus
            self._engine_died(str(error))
            self._survive(of, request)
        except EngineAway as error:
            self._engine_away = self._engine_away or str(error)
            of.again(request)
        except asyncio.CancelledError:
            of.wasted += self._clock.share(request.begun) * engine.gpus
            if self._engine_dead:  # it was stopped because the engine no longer answers
                self._survive(of, request)
            else:
                of.again(request)
        except Exception:
            logger.exception("engine error", batch_id=of.lease.batch_id, line=request.line)
            of.record(work.failed(request))
        finally:
            self._landed(of, request)

    def _never_ran(self, of: Work, request: Request, task: asyncio.Task[None]) -> None:
        """Do what `_answer` could not: cancelled before its first step, it was never entered."""
        if task.cancelled():
            of.again(request)
            self._landed(of, request)

    def _landed(self, of: Work, request: Request) -> None:
        del of.flying[request.line]
        self.status.in_flight -= 1
        self.feed.end(request.tokens)
        self._clock.end()
        self._alone_in_flight = False
        self._after_answer(of)

    def _after_answer(self, of: Work) -> None:
        """Go on at once where that is cheap; leave the rest to the loop's next turn."""
        if (
            of.all_run
            or len(of.finished) >= SAVE_RESULTS
            or self._is_lost
            or self.status.in_flight <= 1
            or self._wants_more()
        ):
            self._changed.set()
        self._feed()

    def _may_take(self) -> bool:
        """Whether real-time requests may join what is in the engine: but for suspects, which are
        tried alone once all else is done."""
        is_away = self._is_lost or self.host.is_gone or self._stopping or self._holds_back
        only_suspects = any(each.alone for each in self._works) and not any(
            each.waiting for each in self._works
        )
        return not (is_away or self._alone_in_flight or only_suspects)

    async def _run_alone(self) -> None:
        """Try a suspect by itself, once nothing else is in flight."""
        waiting = [each for each in self._works if each.alone and not each.dropped]
        if not waiting or self.host.engine is None or self._is_lost or self._stopping:
            return
        if self.status.in_flight or any(each.waiting for each in self._works):
            return
        if not self.guard.verdict.feeds:
            return
        of, request = waiting[0], waiting[0].alone[0]
        # Counted before it is tried: should the worker die with the engine, the count stays.
        await self._database.run(leases.accuse, of.lease.batch_id, [request.line])
        request.deaths += 1
        if of.dropped:
            return
        of.alone.popleft()
        request.tried_alone = self._alone_in_flight = True
        self._start(self.host.engine, of, request)

    # --- When the engine dies ---------------------------------------------------------------

    def _engine_died(self, why: str) -> None:
        if not self._engine_dead:
            self._engine_dead = True
            at_once = self.status.in_flight
            is_spared = trouble_of(why) is not None and self.host.can_lessen(at_once)
            self._died_with = at_once if is_spared else 0
            logger.error("engine died", model=self.status.loaded, error=why)

    def _look_for_stall(self) -> None:
        if self._is_flying() and time.monotonic() - self._answered_at > STALL_SECONDS:
            self._engine_died(f"no answer for {STALL_SECONDS:.0f} seconds")

    async def _look_for_death(self) -> None:
        """An engine may die with nothing in flight: what would come next is not to be blamed."""
        if self._engine_dead or self.status.in_flight or not self.host.is_gone:
            return
        self._engine_died("it died with nothing in flight")
        if not self._works:  # so that whatever comes next may be of another model
            await self.host.unload()
            self._engine_dead = False

    def _survive(self, of: Work, request: Request) -> None:
        """Queue a request again that was in flight at a death, unless it has now shown its guilt.

        When there was too little memory for all of them, none is suspected. An engine that has
        answered nothing at all proves nobody's guilt.
        """
        alone, request.tried_alone = request.tried_alone, False
        if alone and request.deaths > ALONE_AFTER and self.host.has_answered:
            self._guilt_shown = True
            of.record(work.crashed(request))
            return
        if not alone and not self._died_with:
            request.deaths += 1
            self._casualties.append((of.lease.batch_id, request.line))
        of.put_back(request)

    async def _revive(self) -> None:
        """Count the death against what was in flight, and load the model anew, with less at once
        where it died for want of memory.

        An engine that had answered nothing may itself be to blame: others get the chunks.
        """
        await self._stop_flying(wait=2.0)
        await self.lane.clear(2.0, CRASHED)
        await asyncio.to_thread(self.guard.look_now, LOOK_SECONDS)
        if self.guard.verdict.gives_back:
            return
        is_spared = self._died_with > 0
        await self._learn_of_memory()
        await self._accuse()
        if not (self.host.has_answered or is_spared):
            await self._leave_model("It died before it had answered anything.", CRASHED)
            return
        name = self.status.loaded
        await self.host.unload()
        self._engine_dead = False
        if not await self._ensure_loaded(name):
            await self._give_all_back()

    async def _accuse(self) -> None:
        casualties, self._casualties = self._casualties, []
        for batch_id in {batch_id for batch_id, _ in casualties}:
            lines = [line for batch, line in casualties if batch == batch_id]
            await self._database.run(leases.accuse, batch_id, lines)

    async def _leave_model(self, why: str, said: Frame) -> None:
        """Let others have the chunks, and try the model again later; nobody waits here meanwhile."""
        await self._stop_flying(wait=FINISH_SECONDS)
        await self.lane.clear(FINISH_SECONDS, said)
        await self._give_all_back()
        logger.error("model left out", model=self.status.loaded, error=why)
        await self.host.leave_out(why)
        self._engine_dead, self._engine_away = False, ""

    async def _learn_of_memory(self) -> None:
        if self._died_with:
            await self.host.lessen(self._died_with)
        elif self._guilt_shown:
            await self.host.absolve()
        self._died_with, self._guilt_shown = 0, False

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
            self._log_drop(of.lease, "lease lost")
            of.drop(lost=True)
        except GaveUp:
            self._log_drop(of.lease, "not saved: the lease will expire")
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
        wasted, of.wasted = of.wasted, 0.0
        if outcomes or finished or wasted:
            await self._database.run(
                leases.save, lease=of.lease, outcomes=outcomes, finished=finished, wasted=wasted
            )
        if last and of.dropped:
            await self._database.run(leases.give_back, of.lease, wake=not of.unreadable)

    def _drop(self, lease: Lease, *, lost: bool) -> None:
        why = "lease lost" if lost else "batch no longer wants it"
        if self._loading_for == lease:
            self._log_drop(lease, why)
            self._loading_for = None
            self._reconsidering = asyncio.create_task(self._reconsider(lease.model))
        for each in self._works:
            if each.lease == lease:  # not a later lease of the same chunk
                self._log_drop(lease, why)
                each.drop(lost=lost)
        self._changed.set()

    async def _reconsider(self, model: str) -> None:
        """A load that nobody waits for any more need not come to its end."""
        while self.host.is_coming(model):
            with suppress(GaveUp):
                asked = model in self.lane.asked
                if not asked and not await self._database.run(leases.is_wanted, model):
                    self.host.cancel(model)
            await asyncio.sleep(POLL_SECONDS)

    def _log_drop(self, lease: Lease, why: str) -> None:
        logger.warning(why, batch_id=lease.batch_id, chunk=lease.chunk_id)

    # --- When the GPU is too hot for long, or sick ---------------------------------------------

    def _health_changed(self) -> None:
        if self.guard.verdict.gives_back:
            self._call(self._forget_loading)
        self.wake()

    def _forget_loading(self) -> None:
        """The chunks that wait for a model to load here are not kept for it, and on a sick GPU the
        load, which may never come to an end, is not either."""
        self._loading_for = None
        if not self.host.coming:
            return
        if self.guard.verdict.health == Health.SICK:
            self.host.cancel(self.host.coming)
        if self._works:  # of an engine that died: their model is loaded anew
            self._giving_back = asyncio.create_task(self._give_all_back())

    async def _give_up_gpu(self) -> None:
        """Let others have the chunks; a sick GPU's engine goes, and no request is to blame."""
        if self._works:
            await self._stop_flying(wait=FINISH_SECONDS)
            await self._give_all_back()
        if self._engine_dead or self.guard.verdict.health == Health.SICK:
            self._casualties.clear()
            self._engine_dead = False
            await self.host.close()

    # --- Ending -----------------------------------------------------------------------------

    async def _wind_up(self) -> None:
        """Let requests in flight finish if they are quick, then save and give everything back."""
        await asyncio.gather(
            self._stop_flying(wait=FINISH_SECONDS), self.lane.close(FINISH_SECONDS)
        )
        await self._give_all_back()

    async def _give_all_back(self) -> None:
        ending = list(self._works)
        for each in ending:
            each.drop()
        await self._stop_flying(wait=0)
        while any(each in self._works for each in ending) and not self._gave_up():
            self._save_due()
            await asyncio.wait([*self._savers, asyncio.create_task(asyncio.sleep(0.05))])
        self._works = [each for each in self._works if each not in ending]

    def _gave_up(self) -> bool:
        limit = self._database.give_up_at
        return limit is not None and time.monotonic() > limit
