"""The worker's way to the database: patient when the server is away, never hung on one that is mute.

The loop has one thread and one connection; the heartbeat has its own.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec, TypeVar

import psycopg
import structlog
from django.conf import settings
from django.db import (
    DEFAULT_DB_ALIAS,
    Error,
    InterfaceError,
    OperationalError,
    connection,
    connections,
)

P = ParamSpec("P")
T = TypeVar("T")
logger = structlog.get_logger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 3.0
LEAST_SECONDS = 5.0
"""However short leases are: what takes milliseconds may take so long on a host that is overloaded."""


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
        return await loop.run_in_executor(
            self._thread, lambda: patiently(lambda: call(*args, **kwargs), lambda: self.give_up_at)
        )

    def close(self) -> None:
        self.give_up_at = time.monotonic()
        # Not `connection.close`: that would be this thread's connection, not the other's.
        self._thread.submit(lambda: connection.close())
        self._thread.shutdown()


def patiently(call: Callable[[], T], give_up_at: Callable[[], float | None] = lambda: None) -> T:
    """What the call answers, tried again while the database is away; raises `GaveUp`."""
    pause = FIRST_PAUSE
    while True:
        try:
            # Who has waited for two leases has lost its own.
            with at_most(2 * settings.LEASE_SECONDS):
                return call()
        except Error as error:
            if not _is_away(error):
                raise
            connection.close()
            limit = give_up_at()
            if limit is not None and time.monotonic() + pause > limit:
                raise GaveUp(str(error)) from error
            logger.warning("database away", pause=pause, error=str(error).strip())
            time.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)


def _is_away(error: Error) -> bool:
    """Whether it is the connection's fault; the server, too, may have ended it, in its own words."""
    if isinstance(error, OperationalError | InterfaceError):
        return True
    return connection.connection is None or bool(connection.connection.closed)


def half_a_lease() -> float:
    """Seconds after which a silent side is given up, while there is time to begin anew."""
    return max(settings.LEASE_SECONDS / 2, LEAST_SECONDS)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Cut this thread's connection when the block takes longer: what waits in it fails then.

    A server behind a proxy can be gone while the proxy still takes what is sent; neither keepalives
    nor timeouts of the server's own would ever end such a wait.
    """
    timer = threading.Timer(seconds, _cut, [connections[DEFAULT_DB_ALIAS]])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # at once: no thread outlives what it watched


def _cut(wrapper: Any) -> None:
    """Shut the connection's socket down, under whoever waits for it."""
    try:
        handle = os.dup(wrapper.connection.pgconn.socket)
    except (AttributeError, OSError, psycopg.Error):
        return  # not connected: connecting has a timeout of its own
    logger.warning("database mute: connection cut")
    with socket.socket(fileno=handle) as link, suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)


def end_idle_transactions(connection: Any, **_: object) -> None:
    """Let the server end a transaction in which it hears nothing from us for half a lease.

    Of a worker that is cut off amid a save it does not know, and the rows that it has locked are
    its batch's: no other worker could lease or save there. For Django's `connection_created`; only
    in workers, whose transactions are short.
    """
    milliseconds = int(half_a_lease() * 1000)
    with connection.cursor() as cursor:
        cursor.execute(f"SET idle_in_transaction_session_timeout = {milliseconds}")
