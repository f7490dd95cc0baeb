"""What vLLM's scheduler says of itself at each step, made a `Report`: no import of vLLM here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from worker.engines.base import Report


class Gauge:
    """Adds up the schedulers of all data-parallel ranks."""

    def __init__(self, tell: Callable[[Report], None]) -> None:
        self._tell = tell
        self._said: dict[int, tuple[int, int]] = {}
        self._ran = 0
        self._ended = 0

    def ended(self) -> None:
        """A request was answered."""
        self._ended += 1

    def logger(self, config: Any, rank: int) -> StatLogger:
        """What vLLM calls a factory of stat loggers."""
        return StatLogger(self, rank)

    def step(self, rank: int, running: int, waiting: int) -> None:
        """A scheduler's counts after a step, without the requests that the step ended.

        Those are answered only after this, so they are told of a step later.
        """
        self._said[rank] = running, waiting
        running, waiting = map(sum, zip(*self._said.values(), strict=True))
        before = self._ran + self._ended
        self._ran, self._ended = running, 0
        self._tell(Report(max(running, before), waiting))


class StatLogger:
    """As vLLM's `StatLoggerBase`, of which it asks no more than these methods."""

    def __init__(self, gauge: Gauge, rank: int) -> None:
        self._gauge = gauge
        self._rank = rank

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        """After each step; `scheduler_stats` is None where the scheduler counts nothing."""
        if scheduler_stats is not None:
            waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self._gauge.step(self._rank, scheduler_stats.num_running_reqs, waiting)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""

    def log(self) -> None:
        """Nothing to say."""

    def record_sleep_state(self, *_: Any) -> None:
        """Nothing to say."""
