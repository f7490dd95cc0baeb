"""The models on a worker's GPU: how one gets there, sleeps, goes, and what was learned from it.

Nothing here knows of chunks or leases; the lease loop says which model it wants.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import structlog
from cryptography.fernet import InvalidToken
from django.conf import settings

from accounts import secrets
from models_registry import services as registry
from models_registry.models import Change, Model
from models_registry.queries import settled_on
from worker import engines, gpus, memory, orphans, sleepers
from worker.canary import Canary
from worker.database import Database, GaveUp
from worker.engines import ladder
from worker.engines.base import (
    DoesNotFit,
    Engine,
    EngineDied,
    LoadCancelled,
    LoadFailed,
    ModelSpec,
)
from worker.engines.ladder import Ladder
from worker.models import WorkerState
from worker.sleepers import Resident, Sleepers
from worker.status import Status

logger = structlog.get_logger(__name__)

REMEMBER_SECONDS = 0.5
"""How often, while a model loads, its engine's processes are written down."""
FIRST_PAUSE, LONGEST_PAUSE = 60.0, 1800.0
"""Seconds for which a model that did not load is left out: twice as many with every failure."""
SLEEP_SECONDS = 180.0
"""How long falling asleep or waking may take; with 2 GB/s that is enough for 360 GB."""
GIVE_BACK_SECONDS = 5.0
"""How long the driver may take to show that memory is free again."""
LEFT_ON_GPU = 0.05
"""Of a GPU's memory, what an engine may keep there asleep: its CUDA context and graphs."""
DONE = {
    Change.LOAD: "loaded",
    Change.WAKE: "woken",
    Change.SLEEP: "asleep",
    Change.UNLOAD: "unloaded",
}
NOBODY = "Nobody waits for it any more."
TOO_LONG = (
    "It was not loaded within {} seconds, so its load was ended. If it only takes longer (a large "
    "download, a slow disk), raise LOAD_SECONDS; else see the worker's log for what it waited for."
)
MOST_LESSENED = 3
"""How often in a worker's life a model that ran out of memory is loaded anew with less at once,
before the requests in flight are suspected as after any other death."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A model as the registry has it."""

    spec: ModelSpec
    seen: datetime
    """When it was changed last, or given another chance."""


@dataclass(slots=True)
class Failure:
    """A model that did not load: when to try again."""

    until: float
    """`time.monotonic()`."""
    pause: float
    seen: datetime | None


class Host:
    """One model awake at most, others asleep. All methods run on the lease loop's thread."""

    def __init__(self, name: str, gpu: str | None, database: Database, status: Status) -> None:
        self.name = name
        self.gpu = gpu
        self.gpu_kind = gpus.kind_of(gpu)
        self.loaded_at = 0.0
        """`time.monotonic()` of the last load's or waking's end."""
        self.stopping = False
        self._database = database
        self._status = status
        self._awake: Resident | None = None
        self._sleepers = Sleepers()
        self._waking: Resident | None = None
        """No longer among the sleepers, and not awake yet."""
        self._coming = ""
        self._unwanted = False
        self._remembered: list[int] = []
        self._failures: dict[str, Failure] = {}
        self._lessened: dict[str, list[dict[str, Any]]] = {}
        """By model, what it had settled on before each time that it ran out of memory here."""

    # --- What is here -----------------------------------------------------------------------

    @property
    def engine(self) -> Engine | None:
        return self._awake.engine if self._awake else None

    @property
    def has_answered(self) -> bool:
        """Whether the engine that is awake has answered anything since it was loaded."""
        return self._awake is not None and self._awake.has_answered

    def answered(self) -> None:
        """The engine that is awake has answered something, so it is one that works."""
        if self._awake is not None:
            self._awake.has_answered = True
            self._failures.pop(self._awake.spec.name, None)

    @property
    def is_gone(self) -> bool:
        """Whether the engine that should be awake has died."""
        return self._awake is not None and self._awake.engine.gone()

    @property
    def near(self) -> list[str]:
        """Models that it costs a waking, not a load, to have here: those asleep, and the one that
        was woken."""
        woken = self._awake is not None and self._awake.was_woken
        return [*self._sleepers.names, *([self._status.loaded] if woken else [])]

    async def avoided(self) -> list[str]:
        """Models that failed to load lately, and were not registered anew since."""
        now = time.monotonic()
        waiting = {name: each for name, each in self._failures.items() if each.until > now}
        seen = await self._database.run(_seen, list(waiting)) if waiting else {}
        for name, each in waiting.items():
            if seen.get(name) != each.seen:
                del self._failures[name]
        return [name for name in waiting if name in self._failures]

    async def has(self, name: str) -> bool:
        """Whether this model is awake, and still as the registry has it under its name."""
        if self._awake is None or self._awake.spec.name != name or self.is_gone:
            return False
        try:
            return await self.spec_of(name) == self._awake.spec
        except LoadFailed:
            return False

    async def spec_of(self, name: str) -> ModelSpec:
        """The model as the registry has it now; raises LoadFailed where it has none."""
        return (await self._database.run(_entry, name)).spec

    async def tend(self) -> None:
        """Look after the models that sleep."""
        if self._sleepers.names:
            await self._sleepers.tend()
            self._status.asleep = self._sleepers.names

    # --- Coming and going -------------------------------------------------------------------

    async def ensure(self, name: str) -> bool:
        """Make sure that this model is awake as the registry has it now; False if it cannot be."""
        entry, self._coming, self._unwanted = None, name, False
        try:
            entry = await self._database.run(_entry, name)
            if self._awake is None or entry.spec != self._awake.spec or self.is_gone:
                await self._swap_to(entry)
        except LoadCancelled:
            return False
        except LoadFailed as error:
            await self._failed(name, entry, error)
            return False
        except Exception as error:  # our own fault, but no reason to serve nobody
            logger.exception("engine not made", model=name)
            await self._failed(name, entry, LoadFailed(f"{type(error).__name__}: {error}"))
            return False
        finally:
            self._coming = ""
        return True

    @property
    def coming(self) -> str:
        """The model that is on its way; '' for none."""
        return self._coming

    def is_coming(self, name: str) -> bool:
        """Whether the model is on its way."""
        return name == self._coming and not self._unwanted

    def cancel(self, name: str) -> None:
        """Nobody waits for this model any more: if it is on its way, end that."""
        self._unwanted = self._unwanted or name == self._coming

    async def unload(self) -> None:
        """End the engine that is awake."""
        was, self._awake, self._status.loaded = self._awake, None, ""
        if was is not None:
            await self._end(was)

    async def leave_out(self, why: str) -> None:
        """Unload the model that is awake, and try it again later, as one that did not load."""
        name = self._status.loaded
        await self.unload()
        await self._failed(name, None, LoadFailed(why))

    async def close(self) -> None:
        """No model is here, awake or asleep, and no process of an engine is left."""
        await asyncio.gather(self.unload(), self._sleepers.end_all())
        self._status.asleep = []
        await self._remember([])

    async def _swap_to(self, entry: Entry) -> None:
        self._status.state = WorkerState.LOADING
        found = self._waking = await self._sleepers.take(entry.spec)
        try:
            if found is None and self._awake is not None:
                # What is wrong with the other can mostly be told before this one has to go.
                await engines.make(entry.spec, self.gpu).check()
            await self._set_aside()
            if found is None or not await self._wake(found):
                found = await self._load(entry)
        finally:
            self._waking = None
        self._awake, self.loaded_at = found, time.monotonic()
        if found.canary.heard:
            self.answered()
        self._status.state, self._status.loaded = WorkerState.RUNNING, entry.spec.name
        self._status.loads, self._status.error = self._status.loads + 1, ""
        self._status.asleep = self._sleepers.names

    async def _set_aside(self) -> None:
        """Make room on the GPU: the model awake falls asleep, or is unloaded."""
        was, self._awake, self._status.loaded = self._awake, None, ""
        if was is None:
            return
        try:
            if await self._put_to_sleep(was):
                return
        except LoadCancelled:
            pass  # whoever comes next notices
        await self._end(was)

    async def _end(self, was: Resident) -> None:
        started = time.monotonic()
        await was.engine.unload()
        await self._is_free(was)
        with suppress(GaveUp):
            await self._note(Change.UNLOAD, was.spec.name, started)
        await self._remember([])

    # --- Sleeping and waking ----------------------------------------------------------------

    async def _put_to_sleep(self, was: Resident) -> bool:
        if not was.may_sleep or not await self._sleepers.make_room(was.copy):
            return False
        try:
            await self._timed(Change.SLEEP, was, self._sleep)
        except LoadCancelled:
            raise
        except Exception as error:
            logger.warning("did not fall asleep", model=was.spec.name, error=repr(error))
            return False
        self._sleepers.add(was)
        return True

    async def _sleep(self, was: Resident) -> None:
        async with asyncio.timeout(SLEEP_SECONDS):
            await was.engine.sleep()
        if not await self._is_free(was):
            raise LoadFailed("Asleep, it still held the GPU's memory.")

    async def _is_free(self, was: Resident) -> bool:
        """Whether the GPU's memory is (nearly) as free as before the model came, or soon is."""
        limit = time.monotonic() + GIVE_BACK_SECONDS
        while before := was.gpu_before:
            now = await asyncio.to_thread(memory.of_gpu, self.gpu)
            if now is None:
                break
            if now.free >= before.free - LEFT_ON_GPU * before.total:
                return True
            if time.monotonic() > limit:
                break
            await asyncio.sleep(0.1)
        return False

    async def _wake(self, found: Resident) -> bool:
        """Wake it and ask it something; where that goes wrong in any way it is ended."""
        try:
            await self._timed(Change.WAKE, found, _rouse)
        except LoadCancelled:
            await self._end(found)
            raise
        except Exception as error:
            logger.warning("not woken, so loaded anew", model=found.spec.name, error=repr(error))
            await self._end(found)
            return False
        found.was_woken = True
        return True

    # --- Loading ----------------------------------------------------------------------------

    async def _load(self, entry: Entry) -> Resident:
        """Load the model, with less and less where it lacks memory; raises LoadFailed."""
        name = entry.spec.name
        known = await self._database.run(settled_on, name, self.gpu_kind)
        way = Ladder(
            stated={ladder.named(each) for each in entry.spec.engine_args},
            settled=dict(known),
            can_quantize=await asyncio.to_thread(gpus.keeps_fp8, self.gpu),
        )
        while True:
            resident = await self._fresh(entry, way.settled)
            try:
                await self._timed(Change.LOAD, resident, _bring, way.settled)
            except Exception as error:
                await resident.engine.unload()
                await self._ease(way, name, error, resident.engine)
                continue
            if way.lasting and way.settled != known:
                await self._settle(resident, way.settled)
            return resident

    async def _fresh(self, entry: Entry, settled: dict[str, Any]) -> Resident:
        size = await asyncio.to_thread(memory.of_weights, entry.spec.source, entry.spec.revision)
        before = await asyncio.to_thread(memory.of_gpu, self.gpu)
        may_sleep = before is not None and sleepers.would_hold(size)
        spec = replace(entry.spec, settled=settled, may_sleep=may_sleep)
        engine = engines.make(spec, self.gpu)
        return Resident(engine, entry.spec, entry.seen, before, Canary(engine, spec), size)

    async def _ease(self, way: Ladder, name: str, error: Exception, engine: Engine) -> None:
        """Change what may help a load that failed; raises the error where nothing does."""
        said = str(error)
        if not isinstance(error, LoadFailed) or isinstance(error, LoadCancelled):
            raise error
        if ladder.trouble_of(said) in ladder.HELD_BY_OTHERS and await self._sleepers.end_oldest():
            return
        if way.step(said, engine.options):
            logger.warning("too little memory", model=name, error=said, next_try=way.settled)
            self._status.error = f"{name}: {said}; next try with {way.settled}"
            return
        if way.fits_not:
            raise DoesNotFit(f"It does not fit this GPU: {way.said}") from error
        raise error

    async def _settle(self, resident: Resident, settled: dict[str, Any]) -> None:
        await self._database.run(
            registry.note_settled,
            resident.spec.name,
            self.gpu_kind,
            settled=settled,
            seen=resident.seen,
        )

    # --- Running out of memory --------------------------------------------------------------

    def can_lessen(self, in_flight: int) -> bool:
        """Whether the model, out of memory with so many in flight, could do with less at once."""
        return self._less(in_flight) is not None

    async def lessen(self, in_flight: int) -> None:
        """From now on load the model with less at once than these, which were too many."""
        it, less = self._awake, self._less(in_flight)
        if it is not None and less is not None:
            known = await self._database.run(settled_on, it.spec.name, self.gpu_kind)
            self._lessened.setdefault(it.spec.name, []).append(known)
            await self._settle(it, known | less)

    def _less(self, in_flight: int) -> dict[str, Any] | None:
        it = self._awake
        if it is None or not it.engine.options:
            return None
        if len(self._lessened.get(it.spec.name, ())) >= MOST_LESSENED:
            return None
        at_once = min(it.engine.options.get(ladder.SEQUENCES, in_flight), in_flight)
        return ladder.less({**it.engine.options, ladder.SEQUENCES: at_once})

    async def absolve(self) -> None:
        """It was one request that ran out of memory by itself: what was taken from the others is
        theirs again with the next load."""
        it = self._awake
        if it is not None and (before := self._lessened.get(it.spec.name)):
            await self._settle(it, before[0])

    # --- Shared -----------------------------------------------------------------------------

    async def _timed(
        self,
        change: Change,
        resident: Resident,
        do: Callable[[Resident], Coroutine[Any, Any, None]],
        settled: dict[str, Any] | None = None,
    ) -> None:
        """Do what changes a model's state, and write down how long it took or why it failed."""
        name, started = resident.spec.name, time.monotonic()
        if self._is_given_up:
            raise LoadCancelled(NOBODY)
        try:
            await self._supervised(resident.engine, do(resident))
        except LoadCancelled:
            raise
        except Exception as error:
            await self._note(change, name, started, settled, error=str(error) or repr(error))
            raise
        await self._note(change, name, started, settled)

    async def _note(
        self,
        change: Change,
        name: str,
        started: float,
        settled: dict[str, Any] | None = None,
        error: str = "",
    ) -> None:
        took = time.monotonic() - started
        if not error:  # what failed is told by whoever has to decide what now
            logger.info(f"model {DONE[change]}", model=name, seconds=round(took, 2))
        await self._database.run(
            registry.note_load,
            name,
            change,
            worker=self.name,
            gpu=self.gpu_kind,
            seconds=took,
            settled=settled,
            error=error,
        )

    async def _supervised(self, engine: Engine, work: Coroutine[Any, Any, None]) -> None:
        """Do it, and write down all the while which processes there are: a kill may come then.

        Neither a stop nor a change of mind waits for it, nor does anybody for ever: it is cancelled,
        its processes are ended.
        """
        task = asyncio.create_task(work)
        limit, is_late = time.monotonic() + settings.LOAD_SECONDS, False
        while not task.done():
            await asyncio.wait([task], timeout=REMEMBER_SECONDS)
            await self._remember(engine.pids())
            is_late = is_late or (time.monotonic() > limit and not task.done())
            if (is_late or self._is_given_up) and not task.done():
                if not task.cancelling():  # once: a second one would break into its clean-up
                    task.cancel()
                await asyncio.to_thread(orphans.end, engine.pids())
        if is_late and not self._is_given_up:
            raise LoadFailed(TOO_LONG.format(settings.LOAD_SECONDS)) from (
                None if task.cancelled() else task.exception()
            )
        if task.cancelled():
            raise LoadCancelled(NOBODY)
        await task

    @property
    def _is_given_up(self) -> bool:
        return self.stopping or self._unwanted

    async def _remember(self, pids: Sequence[int]) -> None:
        """Write down these processes, and those of the engines asleep or about to be woken."""
        waking = self._waking.engine.pids() if self._waking is not None else []
        now = sorted({*pids, *waking, *self._sleepers.pids()})
        if now != self._remembered:
            await asyncio.to_thread(orphans.remember, self.name, now)
            self._remembered = now

    async def _failed(self, name: str, entry: Entry | None, error: LoadFailed) -> None:
        if self.stopping:  # so the fault is not the model's
            return
        why = str(error)
        logger.error("model not loaded", model=name, error=why)
        self._status.error = f"{name}: {why}"
        await self._database.run(registry.note_failure, name, why=why)
        if isinstance(error, DoesNotFit) and entry is not None:
            await self._database.run(
                registry.note_unfit, name, self.gpu_kind, why=why, seen=entry.seen
            )
            return
        before = self._failures.get(name)
        pause = min(2 * before.pause, LONGEST_PAUSE) if before else FIRST_PAUSE
        seen = entry.seen if entry else (await self._database.run(_seen, [name])).get(name)
        self._failures[name] = Failure(time.monotonic() + pause, pause, seen)


async def _bring(resident: Resident) -> None:
    await resident.engine.load()
    if resident.engine.gpus:  # elsewhere, somebody pays for what is asked
        # A GPU may be such that every model loads on it and dies of the first forward pass: no
        # request of a tenant's shall find that out, and be suspected.
        try:
            await resident.canary.learn()
        except EngineDied as error:
            raise LoadFailed(f"It was loaded, and died of its first request: {error}") from error
    if resident.engine.can_sleep:
        # Only now all of its files are here for certain: they may have been downloaded meanwhile.
        given = resident.spec.source, resident.spec.revision
        resident.copy = await asyncio.to_thread(memory.of_weights, *given)


async def _rouse(found: Resident) -> None:
    async with asyncio.timeout(SLEEP_SECONDS):
        await found.engine.wake()
        await found.canary.check()


def _seen(names: Sequence[str]) -> dict[str, datetime]:
    return dict(Model.objects.filter(name__in=names).values_list("name", "updated_at"))


def _entry(name: str) -> Entry:
    model = Model.objects.filter(name=name).first()
    if model is None:
        raise LoadFailed("It is no longer in the registry.")
    try:
        secret = secrets.decrypt(model.encrypted_secret)
    except InvalidToken as error:
        raise LoadFailed("Its secret was encrypted with another SECRET_KEY.") from error
    return Entry(ModelSpec(**model.spec_fields, secret=secret), model.updated_at)
