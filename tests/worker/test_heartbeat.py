"""The heartbeat: leases kept, the worker's row written, whatever the loop and the database do."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import OperationalError

from batches.services import batches, leases
from batches.services.leases import Lease
from models_registry.models import Model
from tests import jobs
from tests.conftest import Person
from tests.jobs import wait_for
from worker import heartbeat as heartbeats
from worker import services
from worker.heartbeat import Heartbeat
from worker.hosting import Host
from worker.identity import Identity
from worker.loop import LeaseLoop
from worker.models import Worker, WorkerState

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.usefixtures("own_storage", "wakeups_sent", "echo"),
]


class Loop(LeaseLoop):
    """A loop that holds what a test says, and remembers what it is told."""

    def __init__(self) -> None:
        super().__init__("gpu0")
        self.holding: list[Lease] = []
        self.told: list[tuple[int, bool]] = []
        self.woken = 0

    def held(self) -> list[Lease]:
        return self.holding

    def let_go(self, lease: Lease, *, lost: bool) -> None:
        self.told.append((lease.chunk_id, lost))

    def wake(self) -> None:
        self.woken += 1


ME = Identity("gpu0", "1", "H200", "host", os.getpid(), "boot:1:2:3", "v1")


@pytest.fixture
def loop(db: None) -> Iterator[Loop]:
    """A loop whose worker has its name."""
    services.claim(ME)
    made = Loop()
    yield made
    made._database.close()


@pytest.fixture
def ended() -> list[int]:
    """The exit codes with which the heartbeat ended the process."""
    return []


def heart(loop: Loop, ended: list[int] | None = None) -> Heartbeat:
    return Heartbeat(loop, ME, (ended if ended is not None else []).append)


def beat(loop: Loop, ended: list[int] | None = None) -> Worker:
    heart(loop, ended)._try_beat()
    return Worker.objects.get()


def test_a_beat_writes_what_the_worker_does(loop: Loop) -> None:
    before = Worker.objects.get().heartbeat_at
    loop.status.state, loop.status.loaded = WorkerState.RUNNING, "echo"
    loop.status.asleep = ["other"]
    loop.status.in_flight, loop.status.loads, loop.status.error = 7, 3, "why"
    row = beat(loop)
    assert (row.name, row.gpu, row.pid) == ("gpu0", "1", os.getpid())
    assert (row.state, row.loaded_model, row.in_flight) == ("running", "echo", 7)
    assert row.asleep == ["other"]
    assert (row.swaps, row.error) == (3, "why")
    assert row.heartbeat_at > before


def test_a_worker_has_one_row_in_all_its_lives(loop: Loop) -> None:
    first = beat(loop)
    loop.status.state = WorkerState.STOPPED
    again = beat(loop)
    assert (again.pk, again.state) == (first.pk, "stopped")


def test_a_beat_keeps_the_leases(owner: Person, loop: Loop) -> None:
    jobs.running(owner.caller, 3)
    loop.holding = [jobs.lease()]
    jobs.expire_lease(loop.holding[0].chunk_id)
    beat(loop)
    assert leases.release_expired() == 0
    assert loop.told == []


def test_the_loop_is_told_of_leases_that_are_lost_and_batches_that_end(
    owner: Person, loop: Loop, settings: Any
) -> None:
    settings.CHUNK_REQUESTS = 2
    batch, other = jobs.running(owner.caller, 4), jobs.running(owner.caller, 2)
    lost, ending, fine = jobs.lease(), jobs.lease(), jobs.lease()
    assert fine.batch_id == other.pk
    loop.holding = [lost, ending, fine]
    batches.cancel_batch(actor=owner.caller, batch=batch)
    jobs.bump_token(lost.chunk_id)
    beat(loop)
    assert loop.told == [(lost.chunk_id, True), (ending.chunk_id, False)]


def test_trap_07_a_beat_goes_on_while_the_loop_is_busy(loop: Loop) -> None:
    """The thread has its own clock and connection: nothing of the loop runs here at all."""
    loop.status.state = WorkerState.LOADING
    assert beat(loop).state == "loading"
    assert beat(loop).state == "loading"


def test_draining_is_read_from_the_row_and_kept_and_the_loop_woken_by_a_change(loop: Loop) -> None:
    beat(loop)
    assert (loop.draining, loop.woken) == (False, 0)
    services.drain(actor=None, name="gpu0")
    assert [beat(loop).draining, beat(loop).draining] == [True, True]
    assert (loop.draining, loop.woken) == (True, 1)
    services.resume(actor=None, name="gpu0")
    beat(loop)
    assert (loop.draining, loop.woken) == (False, 2)


def test_that_it_is_to_unload_is_passed_on_once(loop: Loop) -> None:
    beat(loop)
    assert loop._unload_asked is False
    services.unload(actor=None, name="gpu0")
    beat(loop)
    assert (loop._unload_asked, Worker.objects.get().unload_asked) == (True, False)


def test_a_worker_that_is_to_exit_does_so_once_it_is_drained(loop: Loop, ended: list[int]) -> None:
    services.drain(actor=None, name="gpu0", exit_when_drained=True)
    loop.status.state = WorkerState.RUNNING
    beat(loop, ended)
    assert ended == []
    loop.status.state = WorkerState.DRAINED
    beat(loop, ended)
    assert ended == [0]


def test_a_drained_worker_that_is_to_stay_does(loop: Loop, ended: list[int]) -> None:
    services.drain(actor=None, name="gpu0")
    loop.status.state = WorkerState.DRAINED
    assert beat(loop, ended).state == "drained"
    assert ended == []


def test_a_worker_whose_name_another_has_taken_ends_and_writes_nothing(
    loop: Loop, ended: list[int]
) -> None:
    loop.status.state = WorkerState.RUNNING
    Worker.objects.update(life="another", host="elsewhere")
    row = beat(loop, ended)
    assert (row.life, row.state, ended) == ("another", "starting", [1])


def test_a_worker_that_was_forgotten_while_it_was_silent_is_known_again(
    loop: Loop, ended: list[int]
) -> None:
    Worker.objects.all().delete()
    assert beat(loop, ended).life == ME.life
    assert ended == []


def test_a_worker_takes_its_name_back_from_one_that_has_stopped(
    loop: Loop, ended: list[int]
) -> None:
    Worker.objects.update(life="another", state=WorkerState.STOPPED)
    assert beat(loop, ended).life == ME.life
    assert ended == []


@pytest.mark.parametrize("error", [OperationalError("away"), ValueError("a bug")])
@pytest.mark.django_db(transaction=True)
def test_a_beat_that_fails_is_followed_by_the_next(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(held: Any) -> None:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(leases, "renew", fail)
        before = Worker.objects.get().heartbeat_at
        heart(loop)._try_beat()
    assert Worker.objects.get().heartbeat_at == before
    assert beat(loop).heartbeat_at > before


def test_the_models_speed_is_noted_while_it_runs(
    loop: Loop, echo: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(heartbeats.time, "monotonic", lambda: now)
    beating = heart(loop)
    loop.status.state, loop.status.loaded = WorkerState.RUNNING, "echo"
    loop.status.fullness = 0.5
    speeds = []
    for tokens in [0] * 20 + [48_000] * 11:  # all answers come at once
        now += 2
        loop.status.tokens, loop.status.answers = tokens, bool(tokens)
        beating._beat()
        echo.refresh_from_db()
        speeds.append((Worker.objects.get().tokens_per_second, echo.tokens_per_second))
    assert speeds == [(0, None)] * 20 + [(24_000, None)] + [(0, None)] * 9 + [(0, 800)]


def test_what_the_engine_has_done_of_requests_in_flight_counts(
    loop: Loop, echo: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, engine = 100.0, Engine()
    monkeypatch.setattr(heartbeats.time, "monotonic", lambda: now)
    monkeypatch.setattr(Host, "engine", engine)
    beating = heart(loop)
    loop.status.state, loop.status.loaded = WorkerState.RUNNING, "echo"
    loop.status.fullness = 0.5
    beating._beat()
    for _ in range(20):
        now += 3
        engine.tokens += 2_400
        beating._beat()
        assert Worker.objects.get().tokens_per_second == 800
    echo.refresh_from_db()
    assert echo.tokens_per_second == 800


class Engine:
    """One that tells what it has done of the requests in flight."""

    tokens = 0

    def tokens_under_way(self) -> int:
        return self.tokens


@pytest.mark.parametrize(("state", "fullness"), [("idle", 0), ("running", 0), ("running", 0.4)])
def test_a_worker_that_is_not_busy_measures_nothing(
    loop: Loop, echo: Model, monkeypatch: pytest.MonkeyPatch, state: str, fullness: float
) -> None:
    now = 100.0
    monkeypatch.setattr(heartbeats.time, "monotonic", lambda: now)
    beating = heart(loop)
    loop.status.state, loop.status.loaded = state, "echo"
    loop.status.fullness = fullness
    for _ in range(40):
        now += 3
        loop.status.tokens, loop.status.answers = loop.status.tokens + 5, loop.status.answers + 1
        beating._beat()
    echo.refresh_from_db()
    assert echo.tokens_per_second is None


@pytest.mark.django_db(transaction=True)
def test_the_thread_beats_until_the_loop_has_stopped_and_once_more(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(heartbeats, "LONGEST_SECONDS", 0.01)
    beating = heart(loop)
    beating.start()
    first = Worker.objects.get().heartbeat_at
    wait_for(lambda: Worker.objects.get().heartbeat_at > first)
    loop.status.state = WorkerState.STOPPED
    loop.stopped.set()
    beating.join(60)
    assert Worker.objects.get().state == "stopped"
    assert beating not in threading.enumerate()


def test_it_beats_three_times_a_lease(loop: Loop, settings: Any) -> None:
    settings.LEASE_SECONDS = 6
    assert heart(loop)._every == 2
    settings.LEASE_SECONDS = 600
    assert heart(loop)._every == 3
