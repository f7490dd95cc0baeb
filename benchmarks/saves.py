"""How many requests a portal has saved, and when: what a window of full load is measured by."""

from __future__ import annotations

import time
from typing import Any

import psycopg


def next_save(database: psycopg.Connection[Any]) -> tuple[float, int]:
    """The moment of the next save (`time.perf_counter()`), and how many requests are saved then.

    Saves come in groups, once a second from each worker: between two of them the count says less.
    """
    first = now = _saved(database)
    while now == first:
        time.sleep(0.005)
        now = _saved(database)
    return time.perf_counter(), now


def _saved(database: psycopg.Connection[Any]) -> int:
    row = database.execute("SELECT sum(completed) FROM batches_batch").fetchone()
    assert row is not None
    return int(row[0])
