"""Locks across processes: one at a time, and free again however the holder ends."""

from __future__ import annotations

import threading

import pytest
from django.db import connection, transaction

from batches.locks import only_one
from tests import jobs

pytestmark = pytest.mark.django_db(transaction=True)


def taken(name: str = "name") -> bool:
    """Whether somebody else cannot have the lock now."""

    def try_it() -> bool:
        with only_one(name) as mine:
            return mine

    [got] = jobs.together(try_it)
    assert isinstance(got, bool)
    return not got


def test_only_one_has_the_lock_and_then_nobody() -> None:
    with only_one("name") as mine:
        assert mine
        assert taken()
        assert not taken("another name")
    assert not taken()


def test_of_many_at_once_one_gets_it() -> None:
    release = threading.Event()
    looked = threading.Semaphore(0)

    def hold() -> bool:
        with only_one("name") as mine:
            looked.release()
            return release.wait(60) and mine

    def let_go() -> bool:
        for _ in range(5):
            looked.acquire()
        release.set()
        return False

    assert sorted(map(bool, jobs.together(let_go, *[hold] * 5))) == [False] * 5 + [True]


def test_an_error_frees_the_lock() -> None:
    with pytest.raises(ZeroDivisionError), only_one("name"):
        raise ZeroDivisionError
    assert not taken()


def test_a_broken_transaction_frees_the_lock() -> None:
    with pytest.raises(ZeroDivisionError), only_one("name"), transaction.atomic():
        raise ZeroDivisionError
    assert not taken()


def test_a_session_that_dies_frees_the_lock() -> None:
    def die() -> bool:
        with only_one("name") as mine:
            pid = connection.connection.info.backend_pid  # type: ignore[union-attr]
            [_] = jobs.together(lambda: _terminate(pid))
            return mine

    assert jobs.together(die) == [True]
    jobs.wait_for(lambda: not taken())


def _terminate(pid: int) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s)", [pid])
