"""1 to 16 workers with simulated GPUs: does what all of them share get in their way?

Real worker processes, as on 16 hosts, with the instant engine: 64 requests at a time, a second each,
so that one "GPU" makes 64 requests/s and two cores are enough for all else. What is measured is the
control plane (leases, saves, heartbeats of one PostgreSQL), not a GPU.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.processes import Family
from benchmarks.saves import next_save
from tests import stack as stacks
from tests.machines import machine
from tests.stack import Stack, wait_for

COUNTS = (1, 2, 4, 8, 16)
AT_ONCE, SECONDS = 64, 1.0
SETTLING, WINDOW = 4.0, 20.0  # seconds of full load, before and while it is measured
CHUNK = 100  # requests: about 1.6 s of one worker, so that leases are many
BATCH = 45_000


def run() -> dict[str, float]:
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        stack = ends.enter_context(
            stacks.running(folder / "portal", "--gpu-workers=0", CHUNK_REQUESTS=str(CHUNK))
        )
        database = ends.enter_context(psycopg.connect(stack.services.database_url, autocommit=True))
        model = stack.instant("simulated", delay_ms=int(SECONDS * 1000), concurrency=AT_ONCE)
        workers: dict[str, int] = {}
        numbers: dict[str, float] = {}
        for count in COUNTS:
            while len(workers) < count:
                name = f"simulated{len(workers)}"
                made = ends.enter_context(machine(stack, folder / name, name))
                workers[name] = made.process.pid
            numbers |= _measured(stack, database, model, workers)
    first, last = (numbers[f"requests_per_second_{count}"] for count in (1, 16))
    return {"efficiency_16": last / (16 * first), **numbers}


def _measured(
    stack: Stack, database: psycopg.Connection[Any], model: str, workers: dict[str, int]
) -> dict[str, float]:
    """Requests/s with these workers, all of them full, and how many cores everything took."""
    client, count = stack.client(timeout=300), len(workers)
    batches = [stacks.send(client, stacks.lines(BATCH, model)).id for _ in range(2)]
    wait_for(lambda: _at_work(database) == count, seconds=300)
    time.sleep(SETTLING)
    family = Family(workers | {name: stack.pid(name) for name in ("cpu", "web", "postgres")})
    began, before = next_save(database)
    time.sleep(WINDOW)
    ended, after = next_save(database)
    cores = sum(family.cpu_seconds().values()) / (ended - began)
    for batch in batches:
        client.batches.cancel(batch)
        assert stacks.finished(client, batch, seconds=300).status == "cancelled"
    return {
        f"requests_per_second_{count}": (after - before) / (ended - began),
        f"cores_{count}": cores,
    }


def _at_work(database: psycopg.Connection[Any]) -> int:
    """How many workers have a chunk."""
    query = "SELECT count(DISTINCT lease_owner) FROM batches_chunk WHERE state = 'leased'"
    row = database.execute(query).fetchone()
    assert row is not None
    return int(row[0])
