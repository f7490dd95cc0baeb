"""An engine that does what a test tells it, and the lease loop running in a thread around it."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import pytest
from django.db import connection

from worker import engines
from worker import loop as loops
from worker.engines.base import Answer, EngineDied, LoadFailed, ModelSpec, Usage
from worker.loop import LeaseLoop

Reply = Answer | BaseException | None


class Script:
    """What the engines answer, and the record of what they were asked.

    `reply(said)` is asked again and again until it is not None: None holds the request. The record
    is written in the loop's thread and read in the test's.
    """

    def __init__(self, capacity: int = 4) -> None:
        self.capacity = capacity
        self.reply: Callable[[str], Reply] = answer
        self.load_error: Callable[[ModelSpec], Exception | None] = lambda spec: None
        self.hangs = self.loading = False
        self.loads: list[str] = []
        self.unloads = 0
        self.asked: list[str] = []
        self.models: dict[str, str] = {}
        self.flying: list[str] = []
        self.most = 0
        self.cancelled: list[str] = []
        self.at_same_time: Counter[str] = Counter()

    def make(self, spec: ModelSpec, gpu: int | None) -> ScriptedEngine:
        return ScriptedEngine(self, spec)


class ScriptedEngine:
    def __init__(self, script: Script, spec: ModelSpec) -> None:
        self.script = script
        self.spec = spec
        self.capacity = script.capacity
        self._dead: asyncio.Event | None = None

    async def load(self) -> None:
        if (error := self.script.load_error(self.spec)) is not None:
            raise error
        if self.script.hangs:
            await self._hang()
        self._dead = asyncio.Event()
        self.script.loads.append(self.spec.name)

    async def _hang(self) -> None:
        self.script.loading = True
        try:
            await asyncio.Event().wait()
        finally:
            self.script.loading = False

    async def answer(self, endpoint: str, body: dict[str, Any]) -> Answer:
        script, said = self.script, body["messages"][-1]["content"]
        script.asked.append(said)
        script.models[said] = self.spec.name
        script.flying.append(said)
        script.most = max(script.most, len(script.flying))
        try:
            return await self._answer(said)
        except asyncio.CancelledError:
            script.cancelled.append(said)
            raise
        finally:
            script.flying.remove(said)

    async def _answer(self, said: str) -> Answer:
        assert self._dead is not None
        while not self._dead.is_set():
            reply = self.script.reply(said)
            if isinstance(reply, EngineDied):
                self._dead.set()
            elif isinstance(reply, BaseException):
                raise reply
            elif reply is not None:
                return reply
            else:
                await asyncio.sleep(0.002)
        raise EngineDied("as the script says")

    async def unload(self) -> None:
        self.script.unloads += 1
        if self._dead is not None:
            self._dead.set()

    def pids(self) -> list[int]:
        return []


def answer(said: str) -> Answer:
    body = {"choices": [{"message": {"content": said}}]}
    return Answer(200, orjson.dumps(body), Usage(input=1, output=2))


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
    monkeypatch.setattr(engines, "make", made.make)
    hasten(monkeypatch)
    return made


def hasten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(loops, "SAVE_SECONDS", 0.05)
    monkeypatch.setattr(loops, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr("worker.database.FIRST_PAUSE", 0.02)
    monkeypatch.setattr("worker.database.LONGEST_PAUSE", 0.05)


__all__ = ["EngineDied", "LoadFailed", "Running", "Script", "answer", "hold", "only", "running"]
