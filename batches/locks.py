"""Cross-process locks that die with their holder: PostgreSQL's session advisory locks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from django.db import Error, connection


@contextmanager
def only_one(name: str) -> Iterator[bool]:
    """Yield True in one process at a time, False in the others, which should leave.

    The lock belongs to the database session: however its holder dies, it is free again.
    """
    key = _key(name)
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_lock(%s)", [key])
        got = bool(cursor.fetchone()[0])
    try:
        yield got
    finally:
        if got:
            _unlock(key)


def in_turn(name: str) -> None:
    """Wait for the others that are here; the turn ends with the caller's transaction."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_key(name)])


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), signed=True)


def _unlock(key: int) -> None:
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_unlock(%s)", [key])
    except Error:
        connection.close()  # the session is broken, and its locks end with it
