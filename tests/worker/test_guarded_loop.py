"""What the lease loop does about a GPU that is too hot or sick: scripted engines, a fake driver."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pynvml
import pytest
from django_scopes import scopes_disabled

from batches.models import Suspect
from batches.models.batches import Status
from batches.services.finalization import finalize_batch
from tests import jobs
from tests.conftest import Person
from tests.jobs import wait_for
from tests.worker import scripted
from tests.worker.nvml import Card, FakeDriver, install
from tests.worker.scripted import EngineDied, Running, Script, answer, heart_of, hold, only, running
from worker import guard, queries
from worker.loop import LeaseLoop
from worker.models import Health, Worker, WorkerState

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("own_storage", "wakeups_sent", "echo"),
]
script = scripted.script
HOT, COOL = 96, 40


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    wait_for(lambda: set(threading.enumerate()) <= before)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: Any) -> Card:
    """The GPU of the loops, read as fast as can be."""
    settings.DATA_DIR = tmp_path
    monkeypatch.setattr(guard, "READ_SECONDS", 0.01)
    monkeypatch.setattr(guard, "CALM_SECONDS", 0.05)
    return install(monkeypatch, FakeDriver(Card())).cards[0]


def guarded(name: str = "gpu0") -> Any:
    """A running loop with the GPU 0."""
    return running(name, partial(LeaseLoop, gpu="0"))


def completed(batch: Any, count: int) -> None:
    wait_for(lambda: jobs.fresh(batch).status == Status.FINALIZING)
    finalize_batch(batch.pk)
    assert jobs.fresh(batch).status == Status.COMPLETED
    assert jobs.counters(batch) == (count, count, 0)


def until(it: Running, health: Health) -> None:
    wait_for(lambda: it.loop.guard.verdict.health == health)


def turns(it: Running, many: int = 3) -> None:
    """Wait until the loop has looked at everything so many times more."""
    look, seen = it.loop.guard.look, []

    def noted() -> Any:
        if threading.current_thread() is it.thread:
            seen.append(None)
        return look()

    it.loop.guard.look = noted
    wait_for(lambda: len(seen) >= many)


def test_a_hot_gpu_is_fed_nothing_and_loses_nothing(
    owner: Person, script: Script, card: Card
) -> None:
    script.reply = hold
    batch = jobs.running(owner.caller, 10)
    with guarded() as it:
        wait_for(lambda: len(script.flying) == 4)
        card.temperature = HOT
        until(it, Health.PAUSED)
        script.reply = answer  # what is in flight goes on, and is saved
        wait_for(lambda: jobs.journal(batch) == [1, 2, 3, 4])
        turns(it)
        assert (len(script.asked), len(it.loop.held())) == (4, 1)
        assert jobs.states(batch) == [("leased", 0)]
        card.temperature = COOL
        completed(batch, 10)
    assert len(script.asked) == 10


def test_a_hot_gpu_leases_nothing(owner: Person, script: Script, card: Card) -> None:
    card.temperature = HOT
    with guarded() as it:
        until(it, Health.PAUSED)
        batch = jobs.running(owner.caller, 3)
        turns(it)
        assert it.loop.status.state == WorkerState.IDLE
        assert jobs.states(batch) == [("ready", 0)]
        card.temperature = COOL
        completed(batch, 3)


def test_a_suspect_is_not_tried_on_a_hot_gpu(owner: Person, script: Script, card: Card) -> None:
    deaths = iter([EngineDied("a"), EngineDied("b"), EngineDied("c")])

    def reply(said: str) -> Any:
        death = next(deaths, None)
        if death is None:
            return answer(said)
        if str(death) == "c":
            card.temperature = HOT
        return death

    script.reply = reply
    batch = jobs.running(owner.caller, 1)
    with guarded() as it:
        until(it, Health.PAUSED)
        wait_for(lambda: len(script.loads) == 4)
        turns(it)
        assert len(script.asked) == 3
        card.temperature = COOL
        completed(batch, 1)


def test_a_pause_that_lasts_gives_the_chunks_to_another_worker(
    owner: Person, script: Script, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "REST_SECONDS", 0.1)
    script.reply = only("say 1")
    batch = jobs.running(owner.caller, 6)
    with guarded() as it:
        wait_for(lambda: jobs.journal(batch) == [1])
        card.temperature = HOT
        wait_for(lambda: jobs.states(batch) == [("ready", 0)])
        wait_for(lambda: not it.loop.held())
        assert it.loop.guard.verdict.health == Health.RESTING
        assert it.loop.status.loaded == "echo"
        script.reply = answer
        with running("gpu1"):
            completed(batch, 6)
        assert sorted(set(script.cancelled)) == ["say 2", "say 3", "say 4", "say 5"]
        card.temperature = COOL
        until(it, Health.OK)
        completed(jobs.running(owner.caller, 2), 2)


def test_a_sick_gpu_drains_its_worker_until_an_operator_resumes_it(
    owner: Person, script: Script, card: Card
) -> None:
    script.reply = only("say 1", "say 2")
    batch = jobs.running(owner.caller, 5)
    with guarded() as it:
        heart = heart_of(it.loop)
        wait_for(lambda: jobs.journal(batch) == [1, 2])
        card.uncorrected = 0
        wait_for(lambda: it.loop.guard.columns()["temperature"])
        card.remapped = (0, 1, 1, 0)
        wait_for(lambda: jobs.states(batch) == [("ready", 0)])
        wait_for(lambda: script.unloads == 1)
        heart._beat()
        row = Worker.objects.get()
        assert (row.health, row.draining) == (Health.SICK, True)
        assert row.health_why == "GPU 0: a repair of its memory waits for a reset"
        assert [each.draining for each in queries.alive()] == [True]

        script.reply = answer
        with running("gpu1"):
            completed(batch, 5)
        again = jobs.running(owner.caller, 3)
        heart._beat()
        turns(it)
        assert (it.loop.held(), jobs.states(again)) == ([], [("ready", 0)])

        Worker.objects.update(draining=False)  # what the operator's command does
        heart._beat()
        completed(again, 3)
        heart._beat()
        row.refresh_from_db()
        assert (row.health, row.draining) == (Health.OK, False)


def test_a_worker_that_was_sick_comes_back_drained(
    owner: Person, script: Script, card: Card
) -> None:
    card.remapped = (0, 1, 1, 0)
    with guarded() as it:
        until(it, Health.SICK)
        heart_of(it.loop)._beat()
    card.remapped = (0, 0, 0, 0)  # its host was restarted, say
    batch = jobs.running(owner.caller, 2)
    with guarded() as it:
        until(it, Health.SICK)
        heart_of(it.loop)._beat()
        row = Worker.objects.get()
        assert (row.health, row.health_why, row.draining) == (
            Health.SICK,
            "GPU 0: a repair of its memory waits for a reset",
            True,
        )
        turns(it)
        assert jobs.states(batch) == [("ready", 0)]
    Worker.objects.update(draining=False)
    with guarded():
        completed(batch, 2)


def test_a_gpu_that_is_lost_is_not_the_requests_fault(
    owner: Person, script: Script, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "READ_SECONDS", 3_600)  # so that only the death makes it look

    def fall(said: str) -> EngineDied:
        card.errors[""] = pynvml.NVML_ERROR_GPU_IS_LOST
        return EngineDied("CUDA error: device not available")

    script.reply = hold
    batch = jobs.running(owner.caller, 4)
    with guarded() as it:
        wait_for(lambda: len(script.flying) == 4)
        wait_for(lambda: it.loop.guard.columns()["temperature"])
        script.reply = fall
        wait_for(lambda: jobs.states(batch) == [("ready", 0)])
        assert it.loop.guard.verdict.health == Health.SICK
        wait_for(lambda: it.loop.status.loaded == "")
        assert script.loads == ["echo"]
    with scopes_disabled():
        assert not Suspect.objects.exists()
    script.reply = answer
    with running("gpu1"):
        completed(batch, 4)


def test_a_chunk_does_not_wait_for_a_model_to_load_on_a_sick_gpu(
    owner: Person, script: Script, card: Card
) -> None:
    script.hangs = "load"
    batch = jobs.running(owner.caller, 2)
    with guarded() as it:
        wait_for(lambda: script.loading)
        assert len(it.loop.held()) == 1
        card.errors[""] = pynvml.NVML_ERROR_GPU_IS_LOST
        wait_for(lambda: it.loop.held() == [])
        wait_for(lambda: not script.loading)
        wait_for(lambda: jobs.states(batch) == [("ready", 0)])


def dies_and_hangs(script: Script) -> None:
    """From now on the engine is dead, and does not come back."""
    script.hangs = "load"
    script.reply = lambda said: EngineDied("")


def test_chunks_do_not_wait_for_an_engine_to_come_back_on_a_sick_gpu(
    owner: Person, script: Script, card: Card
) -> None:
    script.reply = only("say 1")
    batch = jobs.running(owner.caller, 5)
    with guarded() as it:
        wait_for(lambda: jobs.journal(batch) == [1])
        dies_and_hangs(script)
        wait_for(lambda: script.loading)
        assert len(it.loop.held()) == 1
        card.errors[""] = pynvml.NVML_ERROR_GPU_IS_LOST
        wait_for(lambda: it.loop.held() == [])
        wait_for(lambda: not script.loading)
        wait_for(lambda: jobs.states(batch) == [("ready", 0)])
        script.hangs, script.reply = "", answer
        with running("gpu1"):
            completed(batch, 5)


def test_chunks_do_not_wait_for_an_engine_to_come_back_on_a_gpu_that_is_hot_for_long(
    owner: Person, script: Script, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load itself goes on: the next chunk will be glad of it."""
    monkeypatch.setattr(guard, "REST_SECONDS", 0.1)
    script.reply = only("say 1")
    batch = jobs.running(owner.caller, 5)
    with guarded() as it:
        wait_for(lambda: jobs.journal(batch) == [1])
        dies_and_hangs(script)
        wait_for(lambda: script.loading)
        card.temperature = HOT
        wait_for(lambda: jobs.states(batch) == [("ready", 0)])
        wait_for(lambda: it.loop.held() == [])
        assert script.loading
        script.hangs, script.reply = "", answer
        card.temperature = COOL
        completed(batch, 5)
    assert script.loads == ["echo", "echo"]


def test_a_driver_that_hangs_is_noticed_while_a_model_loads(
    owner: Person, script: Script, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(guard, "JUDGE_SECONDS", 0.0)
    monkeypatch.setattr(guard, "REST_SECONDS", 0.1)
    script.hangs = "load"
    jobs.running(owner.caller, 2)
    with guarded() as it:
        wait_for(lambda: script.loading)
        monkeypatch.setattr(guard, "READ_SECONDS", 3_600)  # as good as hanging
        wait_for(lambda: it.loop.held() == [])  # which the heartbeat asks
        it.loop.stop()


def test_what_a_worker_says_of_its_gpu_is_in_its_row(
    owner: Person, script: Script, card: Card
) -> None:
    card.memory_used, card.utilization = 20_000, 97
    with guarded() as it:
        wait_for(lambda: it.loop.guard.columns()["temperature"])
        heart_of(it.loop)._beat()
    row = Worker.objects.get()
    assert (row.gpu_kind, row.health, row.health_why) == ("NVIDIA GeForce RTX 3090", "ok", "")
    assert (row.memory_used, row.memory_total) == (20_000, 24_576)
    assert (row.temperature, row.power, row.utilization) == (41, 25.0, 97.0)


def test_a_worker_without_a_gpu_says_nothing_of_one(script: Script, card: Card) -> None:
    with running() as it:
        heart_of(it.loop)._beat()
    row = Worker.objects.get()
    assert (row.gpu_kind, row.health, row.memory_total, row.temperature) == ("", "", None, None)


@pytest.mark.parametrize(
    ("health", "draining", "counts"),
    [
        (Health.OK, False, True),
        (Health.PAUSED, False, True),
        ("", False, True),
        (Health.RESTING, False, False),
        (Health.SICK, True, False),
        (Health.OK, True, False),
    ],
)
def test_the_queue_does_not_count_on_a_gpu_that_cannot_be_used(
    health: str, draining: bool, counts: bool, script: Script, card: Card
) -> None:
    with running() as it:
        heart_of(it.loop)._beat()
        Worker.objects.update(health=health, draining=draining)
        assert [not each.draining for each in queries.alive()] == [counts]
