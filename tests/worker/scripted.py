"""An engine that does what a test tells it, and the lease loop running in a thread around it."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import pytest
from django.db import connection

from tests import lane
from worker import engines, identity, memory, services
from worker import loop as loops
from worker.engines.base import (
    Answer,
    Chunk,
    Engine,
    EngineDied,
    LoadFailed,
    ModelSpec,
    Refused,
    Usage,
)
from worker.heartbeat import Heartbeat
from worker.loop import LeaseLoop
from worker.memory import Memory

Reply = Answer | BaseException | None
Trouble = Callable[[ModelSpec], Exception | None]


def no_trouble(spec: ModelSpec) -> Exception | None:
    return None


class Script:
    """What the engines answer, and the record of what they were asked.

    `reply(said)` is asked again and again until it is not None: None holds the request; for a
    stream, before each of its words. The record is written in the loop's thread and read in the
    test's. `hangs` names what does not come to its end while it does: "load", "sleep" or "wake".
    """

    def __init__(self, capacity: int = 4) -> None:
        self.capacity = capacity
        self.slots: int | None = None
        self.cache_tokens = 0
        self.engine: ScriptedEngine | None = None
        self.reply: Callable[[str], Reply] = answer
        self.check_error = self.load_error = no_trouble
        self.sleep_error = self.wake_error = no_trouble
        self.options: dict[str, Any] = {}
        self.sleeps = False
        self.canary: Callable[[ScriptedEngine], Answer] = healthy
        self.hangs = ""
        self.pids: dict[str, list[int]] = {}
        self.loading = False
        self.made: list[ScriptedEngine] = []
        self.happened: list[str] = []
        self.loads: list[str] = []
        self.unloads = 0
        self.asked: list[str] = []
        self.urgent: list[str] = []
        self.models: dict[str, str] = {}
        self.flying: list[str] = []
        self.most = 0
        self.cancelled: list[str] = []
        self.at_same_time: Counter[str] = Counter()

    def make(self, spec: ModelSpec, gpu: str | None) -> ScriptedEngine:
        self.made.append(ScriptedEngine(self, spec))
        return self.made[-1]


class ScriptedEngine(Engine):
    """Holds 60 bytes of a GPU while it is awake, and asleep what `held_asleep` says."""

    held_asleep = 1

    def __init__(self, script: Script, spec: ModelSpec) -> None:
        self.script = script
        self.spec = spec
        self.gpus = 1
        self.options = script.options | {
            name: value for name, value in spec.settled.items() if script.options
        }
        self.capacity = min(script.capacity, self.options.get("max-num-seqs", script.capacity))
        self.slots = script.slots or self.capacity
        self.cache_tokens = script.cache_tokens
        self.can_sleep = False
        self.held = self.answered = 0
        self.loaded = False
        self._last_words = "as the script says"
        script.engine = self
        self._dead: asyncio.Event | None = None

    async def check(self) -> None:
        if (error := self.script.check_error(self.spec)) is not None:
            raise error

    async def load(self) -> None:
        await self._do("load", self.script.load_error)
        self.can_sleep = self.script.sleeps and self.spec.may_sleep
        self.held, self.loaded = 60, True
        self._dead = asyncio.Event()
        self.script.loads.append(self.spec.name)

    async def sleep(self) -> None:
        await self._do("sleep", self.script.sleep_error)
        self.held = self.held_asleep

    async def wake(self) -> None:
        await self._do("wake", self.script.wake_error)
        self.held = 60

    async def _do(self, what: str, error: Trouble) -> None:
        self.script.happened.append(f"{what} {self.spec.name}")
        await self._hang(what)
        if (raised := error(self.spec)) is not None:
            raise raised

    async def _hang(self, what: str) -> None:
        try:
            while self.script.hangs == what:
                self.script.loading = True
                await asyncio.sleep(0.002)
        finally:
            self.script.loading = False

    def gone(self) -> bool:
        return self._dead is not None and self._dead.is_set()

    def die(self) -> None:
        """As by a signal, with nothing in flight."""
        assert self._dead is not None
        self._dead.set()

    async def answer(self, endpoint: str, body: dict[str, Any], *, urgent: bool = False) -> Answer:
        if "prompt" in body:
            return self.script.canary(self)
        said = body["messages"][-1]["content"]
        with self._recorded(said, urgent=urgent):
            return await self._answer(said)

    async def stream(self, endpoint: str, body: dict[str, Any]) -> AsyncGenerator[Chunk, None]:
        said = body["messages"][-1]["content"]
        with self._recorded(said, urgent=True):
            for at, word in enumerate(said.split(), 1):
                reply = await self._answer(said)
                if not reply.ok:
                    raise Refused(reply)
                yield Chunk(orjson.dumps({"word": word}), Usage(input=1, output=at))

    @contextmanager
    def _recorded(self, said: str, *, urgent: bool) -> Iterator[None]:
        script = self.script
        script.asked.append(said)
        if urgent:
            script.urgent.append(said)
        script.models[said] = self.spec.name
        script.flying.append(said)
        script.most = max(script.most, len(script.flying))
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            script.cancelled.append(said)
            raise
        finally:
            script.flying.remove(said)

    async def _answer(self, said: str) -> Answer:
        assert self._dead is not None
        while not self._dead.is_set():
            reply = self.script.reply(said)
            if isinstance(reply, EngineDied):
                self._last_words = str(reply)
                self._dead.set()
            elif isinstance(reply, BaseException):
                raise reply
            elif reply is not None:
                self.answered += 1
                return reply
            else:
                await asyncio.sleep(0.002)
        raise EngineDied(self._last_words)

    async def unload(self) -> None:
        self.script.unloads += 1
        self.script.happened.append(f"unload {self.spec.name}")
        self.held = 0
        if self._dead is not None:
            self._dead.set()

    def pids(self) -> list[int]:
        return [] if self.gone() else self.script.pids.get(self.spec.name, [])


def answer(said: str) -> Answer:
    body = {"choices": [{"message": {"content": said}}]}
    return Answer(200, orjson.dumps(body), Usage(input=1, output=2))


def text(said: str) -> Answer:
    """A completion's answer, which the canary reads."""
    return Answer(200, orjson.dumps({"id": object.__repr__(said), "choices": [{"text": said}]}))


def healthy(engine: ScriptedEngine) -> Answer:
    """The same to the canary each time."""
    return text(engine.spec.name)


def deadly(engine: ScriptedEngine) -> Answer:
    """The engine dies of its canary."""
    engine.die()
    raise EngineDied("as the script says")


class Gpu:
    """A GPU of 100 bytes that the scripted engines share; `others` is held by other processes."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.others = 0

    def memory(self, gpu: int | None) -> Memory | None:
        held = sum(each.held for each in self.script.made)
        return Memory(100 - held - self.others, 100)


@pytest.fixture
def gpu(script: Script, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A GPU under the scripted engines, and models of ten bytes each on a host with room for all.

    In the place of NVML, which is not to be had here.
    """
    made = Gpu(script)
    monkeypatch.setattr(memory, "of_gpu", made.memory)
    monkeypatch.setattr(memory, "of_weights", lambda source, revision="": 10)
    monkeypatch.setattr("worker.hosting.GIVE_BACK_SECONDS", 0.0)
    return made


def hold(said: str) -> None:
    """A reply that never comes."""


def only(*allowed: str) -> Callable[[str], Reply]:
    """Answer these, hold the rest."""
    return lambda said: answer(said) if said in allowed else None


class Running:
    """A lease loop in its thread."""

    def __init__(self, loop: LeaseLoop) -> None:
        self.loop = loop
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name=f"lease-loop {loop.name}")
        self.thread.start()

    def _run(self) -> None:
        try:
            self.loop.run()
        except BaseException as error:
            self.error = error
        finally:
            connection.close()

    def stop(self) -> None:
        """Stop the loop, which must have been alive and must end."""
        assert self.error is None, self.error
        self.loop.stop()
        self.thread.join(60)
        assert not self.thread.is_alive()
        assert self.error is None, self.error


def heart_of(loop: LeaseLoop) -> Heartbeat:
    """The loop's heartbeat, not started; what would end the process fails the test."""

    def end(code: int) -> None:
        raise AssertionError(f"the process would have ended with {code}")

    gpu, kind = loop.host.gpu, loop.host.gpu_kind
    me = identity.of_this_process(loop.name, gpu=gpu, gpu_kind=kind)
    services.claim(me)  # as every worker does first
    return Heartbeat(loop, me, end)


@contextmanager
def running(name: str = "gpu0", kind: type[LeaseLoop] = LeaseLoop) -> Iterator[Running]:
    """Run a loop; at the end it is stopped and has not crashed."""
    it = Running(kind(name))
    try:
        yield it
    finally:
        it.loop.stop()
        it.thread.join(60)
    assert it.error is None, it.error
    assert not it.thread.is_alive()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Scripted engines in the place of all others, and a loop that waits for nothing long."""
    made = Script()
    lane.clear()  # a model that somebody asked for is loaded, and kept, by policy
    monkeypatch.setattr(engines, "make", made.make)
    monkeypatch.setattr("worker.hosting.REMEMBER_SECONDS", 0.02)
    hasten(monkeypatch)
    return made


def hasten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(loops, "APART_SECONDS", 0.01)
    monkeypatch.setattr(loops, "SAVE_SECONDS", 0.05)
    monkeypatch.setattr(loops, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr("worker.database.FIRST_PAUSE", 0.02)
    monkeypatch.setattr("worker.database.LONGEST_PAUSE", 0.05)


__all__ = [
    "EngineDied",
    "LoadFailed",
    "Running",
    "Script",
    "answer",
    "heart_of",
    "hold",
    "only",
    "running",
]
