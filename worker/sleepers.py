"""The models that sleep in this host's memory: how many may, and which of them has to go.

How a model falls asleep and wakes is `worker/hosting.py`'s.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import datetime

import structlog
from django.conf import settings

from worker import memory
from worker.canary import Canary
from worker.engines.base import Engine, ModelSpec
from worker.memory import Memory

logger = structlog.get_logger(__name__)
GB = 10**9
KEPT_FREE = 0.2
"""The part of the host's memory that sleeping models leave to everything else."""


@dataclass(slots=True, eq=False)
class Resident:
    """An engine that has its model, awake or asleep."""

    engine: Engine
    spec: ModelSpec
    """As the registry had it when it was loaded."""
    seen: datetime
    """Which state of the registry's entry that was (its `updated_at`)."""
    gpu_before: Memory | None
    """The GPU's memory just before it was loaded; None: not to be known."""
    canary: Canary
    copy: int = 0
    """Bytes of the host's memory that it takes asleep; 0: not known."""
    was_woken: bool = False
    has_answered: bool = False
    """Since it was loaded."""

    @property
    def may_sleep(self) -> bool:
        """Only what can be verified: that the GPU is free, and that it still says the same."""
        return (
            self.engine.can_sleep
            and self.copy > 0
            and self.gpu_before is not None
            and self.canary.heard
            and not self.engine.gone()
        )


def would_hold(size: int) -> bool:
    """Whether a model of so many bytes (0: not known) could sleep here if no other did."""
    return _most() > 0 and size <= min(_most(), (1 - KEPT_FREE) * memory.of_host().total)


def _most() -> float:
    given: float | None = settings.SLEEPING_MODELS_GB
    return float("inf") if given is None else given * GB


class Sleepers:
    """By name, in the order in which they fell asleep."""

    def __init__(self) -> None:
        self._asleep: dict[str, Resident] = {}

    @property
    def names(self) -> list[str]:
        return list(self._asleep)

    def pids(self) -> list[int]:
        return [pid for each in self._asleep.values() for pid in each.engine.pids()]

    def add(self, resident: Resident) -> None:
        self._asleep[resident.spec.name] = resident

    async def take(self, spec: ModelSpec) -> Resident | None:
        """The sleeping engine of this very entry; one of an earlier state of it is ended."""
        found = self._asleep.pop(spec.name, None)
        if found is None or (found.spec == spec and not found.engine.gone()):
            return found
        await found.engine.unload()
        return None

    async def make_room(self, size: int) -> bool:
        """End the oldest until so many bytes more may be taken; where they never may, end none and
        say False."""
        while not self._holds(size):
            if not self._holds(size - self._taken):
                return False
            await self.end_oldest()
        return True

    @property
    def _taken(self) -> int:
        return sum(each.copy for each in self._asleep.values())

    def _holds(self, more: int) -> bool:
        host = memory.of_host()
        return self._taken + more <= _most() and host.free - more >= KEPT_FREE * host.total

    async def end_oldest(self) -> bool:
        """End the one that has slept longest; False if none sleeps."""
        if not self._asleep:
            return False
        await self._end(next(iter(self._asleep)), "another needs its memory")
        return True

    async def tend(self) -> None:
        """End those whose engine has died in its sleep, and the oldest where the host runs short."""
        for name in [name for name, each in self._asleep.items() if each.engine.gone()]:
            await self._end(name, "its engine died")
        host = memory.of_host()
        if host.free < KEPT_FREE / 2 * host.total:
            await self.end_oldest()

    async def _end(self, name: str, why: str) -> None:
        logger.info("sleeping model unloaded", model=name, why=why)
        await self._asleep.pop(name).engine.unload()

    async def end_all(self) -> None:
        ended, self._asleep = list(self._asleep.values()), {}
        await asyncio.gather(*(each.engine.unload() for each in ended))
