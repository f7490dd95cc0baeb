"""The worker's way to the database: it comes back from whatever the network does, and hangs on none."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import OperationalError, ProgrammingError, connection
from django.db.backends.signals import connection_created

from tests.jobs import wait_for
from tests.network import Proxy, proxied
from worker import database
from worker.database import Database, GaveUp, at_most, patiently

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def network(settings: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """This thread's connection goes through a network that can be cut."""
    monkeypatch.setattr(database, "FIRST_PAUSE", 0.01)
    given = connection.settings_dict
    connection.close()
    with proxied(f"postgresql://{given['HOST']}:{given['PORT']}/") as proxy:
        monkeypatch.setitem(given, "HOST", "127.0.0.1")
        monkeypatch.setitem(given, "PORT", proxy.port)
        monkeypatch.setitem(given["OPTIONS"], "connect_timeout", 1)
        connection.ensure_connection()
        yield proxy
        proxy.mend()
        connection.close()


def ask() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 42")
        return int(cursor.fetchone()[0])


def test_a_call_in_time_is_left_alone(network: Proxy) -> None:
    with at_most(600):
        assert ask() == 42
    assert ask() == 42


@pytest.mark.parametrize("cut", ["stall", "swallow"])
def test_who_waits_for_a_mute_server_is_cut_off(network: Proxy, cut: str) -> None:
    """Nothing else would end it: the proxy's kernel acknowledges all that is sent."""
    getattr(network, cut)()
    with pytest.raises(OperationalError), at_most(0.2):
        ask()


@pytest.mark.parametrize("cut", ["stall", "swallow", "reset"])
def test_a_call_is_tried_again_until_the_network_is_mended(
    network: Proxy, settings: Any, cut: str
) -> None:
    settings.LEASE_SECONDS = 0.1
    tries: list[float] = []

    def call() -> int:
        tries.append(time.monotonic())
        if len(tries) == 3:
            network.mend()
        return ask()

    getattr(network, cut)()
    assert patiently(call) == 42
    assert len(tries) >= 3


def test_a_call_that_the_server_ended_in_a_transaction_is_tried_again(network: Proxy) -> None:
    """Somebody else may be waiting for what a silent worker has locked."""
    tries: list[int] = []

    def call() -> int:
        tries.append(1)
        with connection.cursor() as cursor:
            cursor.execute("SET idle_in_transaction_session_timeout = '50ms'")
            cursor.execute("BEGIN")
            cursor.execute("SELECT pg_backend_pid()")
            pid = cursor.fetchone()[0]
            if len(tries) == 1:
                wait_for(lambda: not _lives(pid))
            cursor.execute("SELECT 42")
            found = int(cursor.fetchone()[0])
            cursor.execute("ROLLBACK")
        return found

    assert patiently(call) == 42
    assert len(tries) == 2


def _lives(pid: int) -> bool:
    """Asked by a connection of another thread's."""
    found: list[bool] = []

    def look() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", [pid])
            found.append(cursor.fetchone() is not None)
        connection.close()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join(60)
    return found[0]


def test_a_programming_error_is_not_tried_again(network: Proxy) -> None:
    tries: list[int] = []

    def call() -> None:
        tries.append(1)
        with connection.cursor() as cursor:
            cursor.execute("SELECT nothing_of_this_name")

    with pytest.raises(ProgrammingError):
        patiently(call)
    assert tries == [1]


def test_who_is_to_stop_gives_up(network: Proxy) -> None:
    network.reset()
    with pytest.raises(GaveUp):
        patiently(ask, lambda: time.monotonic())


def test_the_loops_thread_comes_back_by_itself(network: Proxy, settings: Any) -> None:
    settings.LEASE_SECONDS = 0.2
    own = Database()
    assert asyncio.run(own.run(ask)) == 42
    network.swallow()
    threading.Timer(0.5, network.mend).start()
    assert asyncio.run(own.run(ask)) == 42
    own.close()


def test_a_workers_transactions_are_ended_when_they_wait_for_it_too_long() -> None:
    connection.close()
    connection_created.connect(database.end_idle_transactions)
    try:
        with connection.cursor() as cursor:
            cursor.execute("SHOW idle_in_transaction_session_timeout")
            assert cursor.fetchone() == ("15s",)
    finally:
        connection_created.disconnect(database.end_idle_transactions)
        connection.close()
