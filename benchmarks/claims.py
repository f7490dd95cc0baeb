"""Claims: 200 workers lease from 100,000 chunks in real PostgreSQL, each in a process of its own.

A worker asks for more of the model it has loaded, as `worker/loop.py` does, and ends the chunk it had
before; one in a hundred it gives back instead. Four scenes:

- 2,000 batches of 200 organizations and 20 models, everybody asking all the time;
- `one_batch`: one batch of all the chunks, everybody asking all the time (hot rows);
- `paced`: as the first, with `PACE` claims a second of all workers together, which is what 200 workers
  come to with chunks of 45 s: what a claim takes where nothing is saturated;
- `saving`: everybody saves one result after the other into one batch (its row is hot).

After each scene every chunk's fencing token must be what was claimed and given back of it, so none
was leased twice at once, and every chunk must be done, leased or ready: none is lost.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from portal import embedded

WORKERS, CHUNKS = 200, 100_000
MODELS, ORGANIZATIONS = 20, 200
SECONDS = float(os.environ.get("BENCH_SECONDS", "20"))
"""How long a scene lasts."""
PACE = 4.4
GIVEN_BACK = 0.01
TOKENS = 1_000


@dataclass(frozen=True)
class Scene:
    name: str = ""
    batches: int = 2_000
    pace: float | None = None
    """Claims a second of all workers together; None for as many as can be."""
    saving: bool = False


SCENES = (
    Scene(),
    Scene("one_batch_", batches=1),
    Scene("paced_", pace=PACE),
    Scene("saving_", batches=1, saving=True),
)


@dataclass
class Report:
    """What one worker did: the fencing tokens it got, chunk by chunk, and seconds of each call."""

    claimed: list[tuple[int, int]] = field(default_factory=list)
    given_back: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)


def run() -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, _database(Path(folder)):
        numbers: dict[str, float] = {}
        for scene in SCENES:
            _fill(scene.batches)
            reports = _crowd(scene)
            _check(reports)
            numbers |= _numbers(scene, reports)
        return numbers


@contextmanager
def _database(folder: Path) -> Iterator[None]:
    """A PostgreSQL of our own with our tables, as Django's database."""
    with embedded.running(folder) as services:
        os.environ |= {
            "DATA_DIR": str(folder),
            "DATABASE_URL": services.database_url,
            "REDIS_URL": services.redis_url,
            "DJANGO_SETTINGS_MODULE": "portal.settings",
            "LOG_LEVEL": "ERROR",
        }
        import django
        from django.core.management import call_command

        django.setup()
        call_command("migrate", verbosity=0)
        # What the workers' processes inherit; each importing it anew would be all that is measured.
        import batches.services.leases  # noqa: F401
        import worker.tasks  # noqa: F401

        yield


# --- What waits -------------------------------------------------------------------------------


def _fill(batches: int) -> None:
    """So many batches in progress that have all the chunks between them, and the workers' rows."""
    from django.db import connection
    from django_scopes import scopes_disabled

    from accounts.models import Organization
    from batches.models import Chunk

    with scopes_disabled():
        with connection.cursor() as cursor:
            cursor.execute(
                "TRUNCATE accounts_organization, models_registry_model, worker_worker CASCADE"
            )
        organizations = [Organization(name=f"o{at}", slug=f"o{at}") for at in range(ORGANIZATIONS)]
        Organization.objects.bulk_create(organizations)
        made = _batches(batches, organizations, _models())
        each = CHUNKS // batches
        Chunk.objects.bulk_create(
            (
                Chunk(batch=batch, start=at, end=at + 1, tokens=TOKENS)
                for batch in made
                for at in range(each)
            ),
            batch_size=5_000,
        )
        _workers()
        with connection.cursor() as cursor:
            cursor.execute("VACUUM ANALYZE")


def _models() -> list[Any]:
    from models_registry.models import Measurement, Model

    models = Model.objects.bulk_create(
        Model(name=f"m{at}", source="none", engine="instant", tokens_per_second=1_000.0)
        for at in range(MODELS)
    )
    Measurement.objects.bulk_create(
        Measurement(model=model, gpu="", tokens_per_second=1_000.0, load_seconds=60.0)
        for model in models
    )
    return models


def _batches(many: int, organizations: list[Any], models: list[Any]) -> list[Any]:
    from django.utils import timezone

    from accounts.models import Project
    from batches.models import Batch, File

    now = timezone.now()
    projects = Project.objects.bulk_create(Project(organization=o, name="p") for o in organizations)
    files = File.objects.bulk_create(
        File(organization=p.organization, project=p, filename="f", purpose="batch", bytes=1)
        for p in projects
    )
    return Batch.objects.bulk_create(
        Batch(
            organization=organizations[at % ORGANIZATIONS],
            project=projects[at % ORGANIZATIONS],
            input_file=files[at % ORGANIZATIONS],
            endpoint="/v1/chat/completions",
            completion_window="24h",
            # Another model for another of an organization's batches.
            model=models[(at + at // ORGANIZATIONS) % MODELS],
            index_name="index",
            status="in_progress",
            in_progress_at=now,
            expires_at=now + timedelta(days=1, seconds=at),
            total=CHUNKS // many,
        )
        for at in range(many)
    )


def _workers() -> None:
    from django.utils import timezone

    from batches.models import Batch
    from worker.models import Worker, WorkerState

    now = timezone.now()
    names = sorted(set(Batch.objects.values_list("model__name", flat=True)))
    Worker.objects.bulk_create(
        Worker(
            name=f"w{at}",
            host="here",
            pid=at,
            state=WorkerState.RUNNING,
            loaded_model=names[at % len(names)],
            started_at=now,
            heartbeat_at=now + timedelta(hours=1),  # none of them beats here
        )
        for at in range(WORKERS)
    )


def _leave_no_connection() -> None:
    """For the workers' processes to inherit; nor garbage."""
    from django.db import connections

    connections.close_all()
    gc.collect()
    gc.freeze()


# --- The crowd --------------------------------------------------------------------------------


def _crowd(scene: Scene) -> list[Report]:
    """All workers at once, for `SECONDS`."""
    from worker.models import Worker

    loaded = dict(Worker.objects.values_list("name", "loaded_model"))
    _leave_no_connection()
    context = multiprocessing.get_context("fork")
    barrier, reports = context.Barrier(WORKERS), context.SimpleQueue()
    processes = [
        context.Process(target=_work, args=(name, model, scene, barrier, reports), daemon=True)
        for name, model in loaded.items()
    ]
    for process in processes:
        process.start()
    found = [reports.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def _work(name: str, model: str, scene: Scene, barrier: Any, reports: Any) -> None:
    from django.db import connection

    report, chance = Report(), random.Random(name)
    connection.ensure_connection()
    held = _claim(name, model, report) if scene.saving else None
    report.calls.clear()
    barrier.wait()
    until = time.perf_counter() + SECONDS
    every = WORKERS / scene.pace if scene.pace else 0.0
    time.sleep(chance.random() * every)
    while (began := time.perf_counter()) < until:
        if scene.saving:
            _save(name, held, report)
        else:
            after = _claim(name, model, report)
            _let_go(held, report, chance)
            held = after
        time.sleep(max(0.0, began + every - time.perf_counter()))
    reports.put(report)
    connection.close()


def _claim(name: str, model: str, report: Report) -> Any:
    from batches.services import leases

    began = time.perf_counter()
    lease = leases.lease_next(owner=name, loaded=model, residency=timedelta(hours=1), only=model)
    report.calls.append(time.perf_counter() - began)
    if lease is not None:
        report.claimed.append((lease.chunk_id, lease.fencing_token))
    return lease


def _let_go(held: Any, report: Report, chance: random.Random) -> None:
    """End the chunk, by a statement of its own (saving is another scene), or give it back."""
    from django.db import connection

    from batches.services import leases

    if held is None:
        return
    if chance.random() < GIVEN_BACK:
        leases.give_back(held)
        report.given_back.append(held.chunk_id)
        return
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE batches_chunk SET state = 'done', lease_owner = '', lease_expires_at = NULL"
            " WHERE id = %s AND fencing_token = %s AND state = 'leased'",
            [held.chunk_id, held.fencing_token],
        )
        assert cursor.rowcount == 1
    report.ended.append(held.chunk_id)


def _save(name: str, held: Any, report: Report) -> None:
    from batches.services import leases

    line = 1_000_000 * int(name[1:]) + len(report.calls)
    began = time.perf_counter()
    result = leases.Outcome(line, True, b"{}\n", input=500, output=500)
    leases.save(lease=held, outcomes=[result], finished=False)
    report.calls.append(time.perf_counter() - began)


# --- What came of it --------------------------------------------------------------------------


def _check(reports: list[Report]) -> None:
    """Nothing was leased twice, and nothing lost."""
    from django_scopes import scopes_disabled

    from batches.models import Chunk

    claimed = Counter(chunk for report in reports for chunk, _ in report.claimed)
    back = Counter(chunk for report in reports for chunk in report.given_back)
    handed_out = [each for report in reports for each in report.claimed]
    assert len(set(handed_out)) == len(handed_out), "two workers had the same fencing token"
    with scopes_disabled():
        rows = list(Chunk.objects.values_list("pk", "state", "fencing_token"))
    for id, state, token in rows:
        assert token == claimed[id] + back[id], (id, state, token)
        assert (state == "ready") == (claimed[id] == back[id]), (id, state, token)
    assert len(rows) == CHUNKS
    done = sum(state == "done" for _, state, _ in rows)
    assert done == sum(len(report.ended) for report in reports)


def _numbers(scene: Scene, reports: list[Report]) -> dict[str, float]:
    calls = sorted(taken for report in reports for taken in report.calls)
    what = "saves" if scene.saving else "claims"
    many = len(calls) if scene.saving else sum(len(report.claimed) for report in reports)
    return {
        f"{scene.name}{what}_per_second": many / SECONDS,
        f"{scene.name}p50_ms": 1_000 * calls[len(calls) // 2],
        f"{scene.name}p99_ms": 1_000 * calls[int(0.99 * len(calls))],
    }
