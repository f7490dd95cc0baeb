"""The loop's way to the database: one thread, one connection, patient when the server is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import structlog
from django.db import InterfaceError, OperationalError, connection

P = ParamSpec("P")
T = TypeVar("T")
logger = structlog.get_logger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 3.0


class GaveUp(Exception):
    """The database stayed away for longer than the caller could wait."""


class Database:
    """Runs services in their own thread and tries again while the database is away.

    What is run must be safe to run twice: a commit may have arrived although its answer did not.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        self.give_up_at: float | None = None
        """`time.monotonic()` after which nothing is retried any more; None: for ever."""

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: self._retried(call, args, kwargs))

    def _retried(
        self, call: Callable[..., T], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> T:
        pause = FIRST_PAUSE
        while True:
            try:
                return call(*args, **kwargs)
            except (OperationalError, InterfaceError) as error:
                connection.close()
                if self.give_up_at is not None and time.monotonic() + pause > self.give_up_at:
                    raise GaveUp(str(error)) from error
                logger.warning("database away", pause=pause, error=str(error).strip())
                time.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)

    def close(self) -> None:
        self.give_up_at = time.monotonic()
        # Not `connection.close`: that would be this thread's connection, not the other's.
        self._thread.submit(lambda: connection.close())
        self._thread.shutdown()
