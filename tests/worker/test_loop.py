"""The lease loop with scripted and instant engines, on PostgreSQL, each in its thread."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from django.db import OperationalError, connection
from django_scopes import scopes_disabled

from batches import policy, storage
from batches.models import Batch, Chunk, Suspect
from batches.models.batches import Status
from batches.outlook import explain
from batches.queries import queue as queries
from batches.services import batches, leases, queue
from batches.services.finalization import finalize_batch
from models_registry.models import Measurement, Model
from models_registry.services import register_model, retry_model
from tests import jobs
from tests.conftest import Person
from tests.jobs import wait_for
from tests.worker import scripted
from tests.worker.scripted import Reply, Script, answer, heart_of, hold, only, running
from worker import loop as loops
from worker.engines.base import (
    Answer,
    EngineAway,
    EngineDied,
    LoadFailed,
    ModelSpec,
    Report,
)
from worker.loop import LeaseLoop
from worker.models import WorkerState
from worker.work import GIVEN_UP_AFTER

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("own_storage", "wakeups_sent", "echo", "data_dir"),
]
script = scripted.script
LONG_AGO = "2000-01-01T00:00Z"


@pytest.fixture
def data_dir(tmp_path: Path, settings: Any) -> None:
    """Where the loop remembers its engines' processes."""
    settings.DATA_DIR = tmp_path


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def finalized(batch: Batch) -> Batch:
    """The batch, once all its chunks are done and its files are written."""
    wait_for(lambda: jobs.fresh(batch).status == Status.FINALIZING)
    finalize_batch(batch.pk)
    return jobs.fresh(batch)


def said_by(batch: Batch) -> list[tuple[str, str]]:
    """Of every line of the output file its custom_id and what was answered."""
    return [
        (each["custom_id"], each["response"]["body"]["choices"][0]["message"]["content"])
        for each in jobs.content(batch.output_file)
    ]


def whole(batch: Batch, count: int) -> None:
    """Every line was answered with its own words, once and in order, and nothing failed."""
    ended = finalized(batch)
    assert said_by(ended) == [(f"say {at}", f"say {at}") for at in range(1, count + 1)]
    assert (ended.status, ended.error_file) == (Status.COMPLETED, None)
    assert jobs.counters(batch) == (count, count, 0)


def failed_with(batch: Batch) -> list[tuple[str, str]]:
    return [(each["custom_id"], each["error"]["code"]) for each in jobs.content(batch.error_file)]


def suspects(batch: Batch) -> dict[int, int]:
    with scopes_disabled():
        return dict(Suspect.objects.filter(batch=batch).values_list("line", "deaths"))


class Store:
    """A storage that answers no worker from now on, until its gate is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked, self.gate = threading.Event(), threading.Event()
        self.pieces = storage.pieces
        monkeypatch.setattr(storage, "pieces", self.slowly)

    def slowly(self, name: str, spans: Any) -> Any:
        self.asked.set()
        self.gate.wait(60)
        return self.pieces(name, spans)


# --- Running and saving ---------------------------------------------------------------------


def test_a_batch_of_many_chunks_is_completed(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.hasten(monkeypatch)
    batch = jobs.running(owner.caller, 2_500)
    with running() as it:
        whole(batch, 2_500)
        assert it.loop.status.loads == 1
        assert it.loop.status.tokens == jobs.fresh(batch).input_tokens * 2
    assert len(jobs.chunks(batch)) > 2
    assert {state for state, _ in jobs.states(batch)} == {"done"}


def test_a_hundred_results_are_saved_before_their_second_is_over(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "SAVE_SECONDS", 3_600)
    script.capacity = 1_000
    script.reply = only(*[f"say {at}" for at in range(1, 101)])
    batch = jobs.running(owner.caller, 300)
    with running():
        wait_for(lambda: len(jobs.journal(batch)) == 100)
        assert jobs.journal(batch) == list(range(1, 101))
        script.reply = answer
        whole(batch, 300)


def test_a_lonely_result_is_saved_soon(owner: Person, script: Script) -> None:
    script.reply = only("say 3")
    batch = jobs.running(owner.caller, 4)
    with running():
        wait_for(lambda: jobs.journal(batch) == [3])
        assert jobs.counters(batch) == (4, 1, 0)
        assert jobs.states(batch) == [("leased", 0)]


def test_no_save_is_larger_than_its_bound(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "SAVE_AT_MOST", 7)
    sizes: list[tuple[int, bool]] = []
    save = leases.save

    def noted(*, outcomes: Any, **given: Any) -> None:
        sizes.append((len(outcomes), given["finished"]))
        save(outcomes=outcomes, **given)

    monkeypatch.setattr(leases, "save", noted)
    batch = jobs.running(owner.caller, 50)
    with running():
        whole(batch, 50)
    assert max(size for size, _ in sizes) <= 7
    assert sum(size for size, _ in sizes) == 50
    assert [finished for _, finished in sizes] == [False] * (len(sizes) - 1) + [True]


def test_with_too_much_unsaved_nothing_more_is_fed(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "UNSAVED_AT_MOST", 10)
    save, gate = leases.save, threading.Event()

    def slow(**given: Any) -> None:
        gate.wait(60)
        save(**given)

    monkeypatch.setattr(leases, "save", slow)
    batch = jobs.running(owner.caller, 60)
    with running() as it:
        # One save of what was there has begun, the ten that the bound allows wait behind it.
        wait_for(lambda: it.loop._unsaved() >= 10 and it.loop.status.in_flight == 0)
        assert it.loop._unsaved() <= 10 + script.capacity
        assert len(script.asked) < 60
        gate.set()
        whole(batch, 60)


def test_requests_are_run_in_execution_order(owner: Person, script: Script) -> None:
    script.capacity = 1
    long = {name: name * 3_000 for name in "ab"}
    order = [long["a"] + "1", long["b"] + "1", long["a"] + "2", long["b"] + "2"]
    batch = jobs.running(
        owner.caller, [jobs.line(said, custom_id=str(at)) for at, said in enumerate(order)]
    )
    with running():
        ended = finalized(batch)
    assert [said[0] + said[-1] for said in script.asked] == ["a1", "a2", "b1", "b2"]
    assert jobs.custom_ids(ended.output_file) == ["0", "1", "2", "3"]


def test_the_engine_is_kept_full_across_chunks_batches_and_tenants(
    owner: Person, stranger: Person, script: Script, settings: Any
) -> None:
    """The engine answers one request at a time, and only when it is full or all has been asked."""
    settings.CHUNK_REQUESTS = 5
    script.capacity, total = 8, 12 + 23 + 9

    def when_full(said: str) -> Reply:
        is_full = len(script.flying) == script.capacity
        return answer(said) if is_full or len(script.asked) == total else None

    script.reply = when_full
    one = jobs.running(owner.caller, 12)
    two = jobs.running(stranger.caller, 23)
    three = jobs.running(owner.caller, 9)
    with running():
        whole(one, 12)
        whole(two, 23)
        whole(three, 9)
    assert script.most == script.capacity
    assert len(script.asked) == total


def test_the_engine_is_kept_full_while_a_save_is_stuck(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, gate = leases.save, threading.Event()

    def stuck(**given: Any) -> None:
        gate.wait(60)
        save(**given)

    monkeypatch.setattr(leases, "save", stuck)
    batch = jobs.running(owner.caller, 300)
    with running():
        wait_for(lambda: len(script.asked) == 300)
        gate.set()
        whole(batch, 300)


def test_long_requests_are_fed_by_their_tokens_until_the_engine_says_that_it_can_do_more(
    owner: Person, script: Script
) -> None:
    batch = jobs.running(owner.caller, 40)
    script.capacity, script.cache_tokens, script.reply = 8, _as_two(batch), hold
    with running() as it:
        wait_for(lambda: len(script.flying) == 4)
        assert round(it.loop.status.fullness, 1) == 1
        assert script.engine is not None
        script.engine.report = Report(running=4, waiting=0)
        it.loop._call(script.engine.on_report)
        wait_for(lambda: len(script.flying) == 8)
        assert it.loop.status.fullness == 1
        script.reply = answer
        whole(batch, 40)
    assert (script.most, it.loop.feed.requests, it.loop.feed.tokens) == (8, 0, 0)


def test_of_long_requests_no_more_is_leased_than_the_engine_has_use_for(
    owner: Person, script: Script, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.CHUNK_REQUESTS = 2
    batch = jobs.running(owner.caller, 40)
    script.capacity, script.cache_tokens, script.reply = 1_000, _as_two(batch), hold

    def held() -> tuple[int, int]:
        return len(script.flying), jobs.states(batch).count(("leased", 0))

    with running() as it:
        wait_for(lambda: held() == (4, 4))  # two chunks are in the engine, two wait
        turns = _count_turns(it.loop, monkeypatch)
        wait_for(lambda: turns() > 3)
        assert held() == (4, 4)
        script.reply = answer
        whole(batch, 40)


def _as_two(batch: Batch) -> int:
    """Tokens of a KV cache for two of the batch's requests, and no third."""
    first = jobs.chunks(batch)[0]
    return round(2.1 * first.tokens / (first.end - first.start))


def test_trap_02_each_batch_is_answered_by_its_own_model(owner: Person, script: Script) -> None:
    register_model(name="other", source="none", engine="instant")
    one = jobs.running(owner.caller, 6)
    two = jobs.running(owner.caller, jobs.lines(6, model="other", prefix="tell"))
    three = jobs.running(owner.caller, 6)
    with running():
        whole(one, 6)
        whole(three, 6)
        assert len(said_by(finalized(two))) == 6
    assert script.loads == ["echo", "other"]
    assert script.unloads == 2
    assert {said.split()[0]: name for said, name in script.models.items()} == {
        "say": "echo",
        "tell": "other",
    }


def test_a_model_that_was_registered_anew_is_loaded_anew(owner: Person, script: Script) -> None:
    with running():
        whole(jobs.running(owner.caller, 2), 2)
        register_model(name="echo", source="elsewhere", engine="instant")
        whole(jobs.running(owner.caller, 2), 2)
        whole(jobs.running(owner.caller, 2), 2)
    assert script.loads == ["echo", "echo"]


def test_a_model_registered_anew_is_loaded_before_the_next_chunk(
    owner: Person, script: Script, settings: Any
) -> None:
    """What is in hand ends with the model that it began with."""
    settings.CHUNK_REQUESTS = 5
    script.capacity, script.reply = 2, hold
    batch = jobs.running(owner.caller, 30)
    with running() as it:
        wait_for(lambda: len(script.flying) == 2)
        begun = sum(state == "leased" for state, _ in jobs.states(batch))
        register_model(name="echo", source="elsewhere", engine="instant")
        script.reply = answer
        whole(batch, 30)
        assert it.loop.status.loads == 2
    assert [each.spec.source for each in script.made if each.loaded] == ["none", "elsewhere"]
    assert script.made[0].answered == 5 * begun


def test_a_wake_up_ends_the_idleness(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "POLL_SECONDS", 3_600)
    with running() as it:
        wait_for(lambda: it.loop.status.state == WorkerState.IDLE)
        batch = jobs.running(owner.caller, 3)
        it.loop.wake()
        whole(batch, 3)


def test_without_wake_ups_work_is_found_by_looking(owner: Person, script: Script) -> None:
    with running() as it:
        wait_for(lambda: it.loop.status.state == WorkerState.IDLE)
        whole(jobs.running(owner.caller, 3), 3)


def test_wake_ups_in_a_row_make_a_few_looks(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while something is in hand. The last of them is not lost."""
    monkeypatch.setattr(loops, "POLL_SECONDS", 3_600)
    monkeypatch.setattr(loops, "APART_SECONDS", 0.5)
    lease_next, looks = leases.lease_next, list[float]()

    def counted(**given: Any) -> Any:
        looks.append(time.monotonic())
        return lease_next(**given)

    def pester(loop: LeaseLoop) -> None:
        looks.clear()
        for _ in range(100):
            loop.wake()
            time.sleep(0.01)
        assert all(after - before > 0.4 for before, after in pairwise(looks))

    monkeypatch.setattr(leases, "lease_next", counted)
    with running() as it:
        wait_for(lambda: it.loop.status.state == WorkerState.IDLE)
        pester(it.loop)
        batch = jobs.running(owner.caller, 3)
        it.loop.wake()
        whole(batch, 3)
        script.reply = hold
        batch = jobs.running(owner.caller, 3)
        it.loop.wake()
        wait_for(lambda: len(script.flying) == 3)
        pester(it.loop)
        more = jobs.running(owner.caller, 3)
        it.loop.wake()
        wait_for(lambda: len(script.flying) == 4)
        script.reply = answer
        whole(batch, 3)
        whole(more, 3)


def test_a_worker_that_drains_takes_nothing_more(
    owner: Person, script: Script, settings: Any
) -> None:
    settings.CHUNK_REQUESTS = 5
    script.reply = hold
    batch = jobs.running(owner.caller, 30)
    with running() as it:
        wait_for(lambda: len(script.flying) == 4)
        it.loop.draining = True
        script.reply = answer
        wait_for(lambda: it.loop.status.state == WorkerState.DRAINED)
        # The first chunk, and one that may just have been on its way.
        assert [state for state, _ in jobs.states(batch)][2:] == ["ready"] * 4
        it.loop.draining = False
        whole(batch, 30)


def test_a_batch_that_is_held_is_let_go_and_goes_on_once_it_is_released(
    owner: Person, script: Script
) -> None:
    script.reply = only("say 1", "say 2")
    batch = jobs.running(owner.caller, 20)
    with running() as it:
        wait_for(lambda: len(script.flying) == 4 and jobs.journal(batch) == [1, 2])
        queue.hold(actor=None, ids=[batch.pk])
        heart_of(it.loop)._try_beat()
        wait_for(lambda: jobs.states(batch) == [("ready", 0)])
        wait_for(lambda: it.loop.status.state == WorkerState.IDLE)
        script.reply = answer
        assert jobs.journal(batch) == [1, 2]
        queue.release(actor=None, ids=[batch.pk])
        it.loop.wake()
        whole(batch, 20)


def test_a_worker_that_is_to_unload_does_so_once_nothing_is_in_hand(
    owner: Person, script: Script
) -> None:
    script.reply = only("say 1")
    batch = jobs.running(owner.caller, 2)
    with running() as it:
        wait_for(lambda: jobs.journal(batch) == [1])
        it.loop.unload()
        wait_for(lambda: jobs.journal(batch) == [1])
        assert (it.loop.status.loaded, script.unloads) == ("echo", 0)
        script.reply = answer
        whole(batch, 2)
        wait_for(lambda: (it.loop.status.loaded, script.unloads) == ("", 1))
        whole(jobs.running(owner.caller, 2), 2)


def test_a_worker_that_starts_frees_what_its_last_life_held(owner: Person, script: Script) -> None:
    batch = jobs.running(owner.caller, 3)
    jobs.lease("gpu0")
    with running("gpu0"):
        whole(batch, 3)


def test_trap_05_lines_that_an_earlier_lease_saved_are_not_run_again(
    owner: Person, script: Script
) -> None:
    batch = jobs.running(owner.caller, 6)
    lease = jobs.lease("dead")
    leases.save(lease=lease, outcomes=[jobs.outcome(2), jobs.outcome(5)], finished=False)
    jobs.expire_lease(lease.chunk_id)
    leases.release_expired()
    with running():
        ended = finalized(batch)
    assert sorted(script.asked) == ["say 1", "say 3", "say 4", "say 6"]
    assert jobs.custom_ids(ended.output_file) == ["say 1", "2", "say 3", "say 4", "5", "say 6"]


def test_a_chunk_whose_lines_were_all_saved_is_just_ended(owner: Person, script: Script) -> None:
    batch = jobs.running(owner.caller, 3)
    lease = jobs.lease("dead")
    found = [jobs.outcome(at) for at in (1, 2, 3)]
    leases.save(lease=lease, outcomes=found, finished=False)
    leases.give_back(lease)
    with running():
        wait_for(lambda: jobs.fresh(batch).status == Status.FINALIZING)
    assert script.asked == []
    assert jobs.counters(batch) == (3, 3, 0)


# --- What engines say -----------------------------------------------------------------------


def test_an_answer_with_an_error_is_that_lines_error(owner: Person, script: Script) -> None:
    refusal = Answer(400, b'{"error":{"message":"no"}}')
    script.reply = lambda said: refusal if said == "say 2" else answer(said)
    batch = jobs.running(owner.caller, 3)
    with running():
        ended = finalized(batch)
    assert [said for _, said in said_by(ended)] == ["say 1", "say 3"]
    [line] = jobs.content(ended.error_file)
    assert (line["custom_id"], line["error"]) == ("say 2", None)
    assert line["response"]["status_code"] == 400
    assert line["response"]["body"] == {"error": {"message": "no"}}
    assert (ended.status, ended.completed, ended.failed) == (Status.COMPLETED, 2, 1)


def test_an_engines_bug_is_that_lines_error(owner: Person, script: Script) -> None:
    script.reply = lambda said: KeyError("a bug") if said == "say 2" else answer(said)
    batch = jobs.running(owner.caller, 3)
    with running():
        ended = finalized(batch)
    assert failed_with(ended) == [("say 2", "engine_error")]
    assert [said for _, said in said_by(ended)] == ["say 1", "say 3"]


def test_an_answer_that_cannot_be_counted_is_one_error_line(owner: Person, script: Script) -> None:
    strange = Answer(200, b"{}", usage=None)  # type: ignore[arg-type]
    script.reply = lambda said: strange if said == "say 2" else answer(said)
    batch = jobs.running(owner.caller, 3)
    with running():
        ended = finalized(batch)
    assert failed_with(ended) == [("say 2", "engine_error")]
    assert (ended.completed, ended.failed) == (2, 1)


def test_a_model_that_cannot_be_loaded_holds_up_no_other(owner: Person, script: Script) -> None:
    register_model(name="broken", source="none", engine="instant")
    script.load_error = lambda spec: LoadFailed("no room") if spec.name == "broken" else None
    first = jobs.running(owner.caller, jobs.lines(3, model="broken"))
    second = jobs.running(owner.caller, 3)
    with running() as it:
        whole(second, 3)
        assert (jobs.states(first), jobs.journal(first)) == ([("ready", 0)], [])
        broken = Model.objects.get(name="broken")
        assert (broken.load_error, broken.load_failed_at is not None) == ("no room", True)
        assert it.loop.status.state in (WorkerState.IDLE, WorkerState.RUNNING)
        script.load_error = lambda spec: None
        it.loop.host._failures.clear()  # as after a minute
        whole(first, 3)
    assert Model.objects.get(name="broken").load_error == ""


@pytest.mark.parametrize("error", [RuntimeError("a bug"), EngineDied("at once")])
def test_a_load_that_fails_unexpectedly_holds_up_no_other(
    owner: Person, script: Script, error: Exception
) -> None:
    register_model(name="broken", source="none", engine="instant")
    script.load_error = lambda spec: error if spec.name == "broken" else None
    first = jobs.running(owner.caller, jobs.lines(3, model="broken"))
    second = jobs.running(owner.caller, 3)
    with running():
        whole(second, 3)
    assert jobs.states(first) == [("ready", 0)]
    said = f"{type(error).__name__}: {error}"
    assert Model.objects.get(name="broken").load_error == said


def test_a_secret_of_another_secret_key_holds_up_no_other(owner: Person, script: Script) -> None:
    register_model(name="sealed", source="none", engine="instant")
    Model.objects.filter(name="sealed").update(encrypted_secret="of another key")
    first = jobs.running(owner.caller, jobs.lines(3, model="sealed"))
    second = jobs.running(owner.caller, 3)
    with running():
        whole(second, 3)
    assert jobs.states(first) == [("ready", 0)]
    assert Model.objects.get(name="sealed").load_error == (
        "Its secret was encrypted with another SECRET_KEY."
    )


def test_a_model_that_does_not_fit_is_left_to_other_kinds_of_gpu(
    owner: Person, script: Script
) -> None:
    """Not tried in a loop; its batches wait, with the reason, until it is given another chance."""
    register_model(name="huge", source="none", engine="instant")
    no_room = "Failed to load model - not enough GPU memory. (original error: CUDA out of memory.)"
    script.load_error = lambda spec: LoadFailed(no_room) if spec.name == "huge" else None
    first = jobs.running(owner.caller, jobs.lines(3, model="huge"))
    with running() as it:
        wait_for(lambda: Measurement.objects.filter(model__name="huge").exists())
        whole(jobs.running(owner.caller, 3), 3)
        with scopes_disabled():
            places = explain(queries.queue_view(policy.Worker("gpu0")))
        assert places[first.pk].reason.code == "unfit"
        assert script.happened.count("load huge") == 1
        assert jobs.fresh(first).status == Status.IN_PROGRESS
        assert jobs.states(first) == [("ready", 0)]
        script.load_error = lambda spec: None
        retry_model(name="huge")
        it.loop.wake()
        whole(first, 3)


# --- Engines that are away ------------------------------------------------------------------


def test_an_engine_that_is_away_costs_no_line(owner: Person, script: Script) -> None:
    """What it was asked goes back, unaccused, and the model is left out for a while."""
    script.reply = lambda said: EngineAway("it is away") if said == "say 3" else None
    batch = jobs.running(owner.caller, 6)
    with running() as it:
        wait_for(lambda: "echo" in it.loop.host._failures)
        assert jobs.states(batch) == [("ready", 0)]
        assert (jobs.journal(batch), suspects(batch)) == ([], {})
        assert Model.objects.get(name="echo").load_error == "it is away"
        assert (it.loop.held(), it.loop.status.loaded) == ([], "")
        script.reply = answer
        it.loop.host._failures.clear()  # as after a minute
        whole(batch, 6)
    assert script.loads == ["echo", "echo"]


def test_an_engine_that_is_away_holds_up_no_other(owner: Person, script: Script) -> None:
    register_model(name="other", source="none", engine="instant")
    script.reply = lambda said: answer(said) if said.startswith("tell") else EngineAway("away")
    first = jobs.running(owner.caller, 3)
    second = jobs.running(owner.caller, jobs.lines(3, model="other", prefix="tell"))
    with running():
        assert len(said_by(finalized(second))) == 3
        wait_for(lambda: jobs.states(first) == [("ready", 0)])


# --- Engine deaths --------------------------------------------------------------------------


def dies_once(script: Script, on: str) -> Callable[[str], Reply]:
    """Die on this request in the first life only."""
    return lambda said: EngineDied("") if said == on and len(script.loads) == 1 else answer(said)


def test_what_was_in_flight_when_the_engine_died_is_run_again(
    owner: Person, script: Script
) -> None:
    script.reply = dies_once(script, "say 9")
    batch = jobs.running(owner.caller, 30)
    with running() as it:
        whole(batch, 30)
        assert it.loop.status.loads == 2
    assert script.loads == ["echo", "echo"]


def test_a_death_is_counted_against_what_was_in_flight(owner: Person, script: Script) -> None:
    def die_when_full(said: str) -> Reply:
        if len(script.loads) > 1:
            return None
        return EngineDied("") if len(script.flying) == 4 else None

    script.reply = die_when_full
    batch = jobs.running(owner.caller, 10)
    with running():
        wait_for(lambda: len(script.loads) == 2)
        assert suspects(batch) == {1: 1, 2: 1, 3: 1, 4: 1}
        script.reply = answer
        whole(batch, 10)


POISONS = [{10}, {1, 2}, {1, 12, 13, 14, 30}, set(range(1, 6))]


@pytest.mark.parametrize("poisons", POISONS)
def test_poison_is_an_error_line_and_its_neighbours_are_answered(
    owner: Person, script: Script, poisons: set[int]
) -> None:
    bad = {f"say {at}" for at in poisons}
    script.reply = lambda said: EngineDied("") if said in bad else answer(said)
    batch = jobs.running(owner.caller, 30)
    with running():
        ended = finalized(batch)
    assert failed_with(ended) == [(f"say {at}", "engine_crashed") for at in sorted(poisons)]
    good = [f"say {at}" for at in range(1, 31) if at not in poisons]
    assert said_by(ended) == [(said, said) for said in good]
    assert (ended.status, ended.failed) == (Status.COMPLETED, len(poisons))


def test_poison_for_the_instant_engine_is_one_error_line(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.hasten(monkeypatch)
    args = {"die_on": "poison", "delay_ms": 2, "concurrency": 5}
    register_model(name="echo", source="none", engine="instant", engine_args=args)
    lines = [*jobs.lines(20), jobs.line("poison"), *jobs.lines(20, prefix="tell")]
    batch = jobs.running(owner.caller, lines)
    with running():
        ended = finalized(batch)
    assert failed_with(ended) == [("poison", "engine_crashed")]
    assert len(said_by(ended)) == 40


def test_a_request_that_kills_each_engine_at_once_is_an_error_line(
    owner: Person, script: Script
) -> None:
    """Nothing else is there to be answered: the host itself asks whether the engine works."""
    script.reply = lambda said: EngineDied("")
    batch = jobs.running(owner.caller, 1)
    with running():
        ended = finalized(batch)
    assert failed_with(ended) == [("say 1", "engine_crashed")]
    assert len(script.asked) == 4


def test_an_engine_that_dies_of_everything_condemns_nobody(owner: Person, script: Script) -> None:
    script.reply, script.canary = only("say 1", "say 2"), scripted.deadly
    batch = jobs.running(owner.caller, 9)
    with running() as it:
        wait_for(lambda: "echo" in it.loop.host._failures)
        wait_for(lambda: jobs.states(batch) == [("ready", 0)])
        assert (script.asked, suspects(batch)) == ([], {})

        script.canary = scripted.healthy  # as another GPU
        it.loop.host._failures.clear()
        wait_for(lambda: jobs.journal(batch) == [1, 2])
        script.reply, script.canary = (lambda said: EngineDied("")), scripted.deadly
        wait_for(lambda: "echo" in it.loop.host._failures)
        wait_for(lambda: jobs.states(batch) == [("ready", 0)])
        assert set(suspects(batch).values()) == {1}  # of the life that had worked until then

        script.reply, script.canary = answer, scripted.healthy
        it.loop.host._failures.clear()
        whole(batch, 9)


def test_an_engine_that_answered_nothing_is_left_and_others_get_its_chunks(
    owner: Person, script: Script
) -> None:
    script.canary = lambda engine: Answer(400, b"{}")
    script.reply = lambda said: EngineDied("")
    batch = jobs.running(owner.caller, 9)
    with running() as it:
        wait_for(lambda: "echo" in it.loop.host._failures)
        wait_for(lambda: jobs.states(batch) == [("ready", 0)])
        assert (script.loads, it.loop.held(), jobs.journal(batch)) == (["echo"], [], [])
        said = "It died before it had answered anything."
        assert Model.objects.get(name="echo").load_error == said
        script.reply = answer
        it.loop.host._failures.clear()
        whole(batch, 9)


def test_where_nothing_else_can_be_asked_poison_is_condemned_as_well_if_later(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.hosting.FIRST_PAUSE", 0.05)
    monkeypatch.setattr("worker.hosting.LONGEST_PAUSE", 0.05)
    script.canary = lambda engine: Answer(400, b"{}")
    script.reply = lambda said: EngineDied("")
    batch = jobs.running(owner.caller, 1)
    with running():
        ended = finalized(batch)
    assert failed_with(ended) == [("say 1", "engine_crashed")]
    assert len(script.asked) == GIVEN_UP_AFTER + 1


def test_an_engine_that_died_idle_is_not_held_against_what_comes_next(
    owner: Person, script: Script
) -> None:
    with running() as it:
        whole(jobs.running(owner.caller, 3), 3)
        assert script.engine is not None
        script.engine.die()
        wait_for(lambda: it.loop.status.loaded == "")
        batch = jobs.running(owner.caller, 3)
        whole(batch, 3)
        assert suspects(batch) == {}
    assert script.loads == ["echo", "echo"]


def test_an_engine_that_died_with_a_chunk_in_hand_and_nothing_in_flight_is_loaded_again(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running() as it:
        whole(jobs.running(owner.caller, 3), 3)
        store = Store(monkeypatch)
        batch = jobs.running(owner.caller, 3)
        assert store.asked.wait(60)
        assert script.engine is not None
        script.engine.die()
        it.loop.wake()
        wait_for(lambda: script.loads == ["echo", "echo"])
        store.gate.set()
        whole(batch, 3)
        assert suspects(batch) == {}


def test_a_suspect_is_tried_with_nothing_else_in_flight(owner: Person, script: Script) -> None:
    company: list[int] = []

    def watched(said: str) -> Reply:
        if said != "say 5":
            return answer(said)
        company.append(len(script.flying))
        return EngineDied("")

    script.reply = watched
    batch = jobs.running(owner.caller, 20)
    with running():
        ended = finalized(batch)
    assert failed_with(ended) == [("say 5", "engine_crashed")]
    assert (len(company), company[-1]) == (4, 1)


def test_a_chunk_that_killed_its_owners_is_run_request_by_request(
    owner: Person, script: Script
) -> None:
    batch = jobs.running(owner.caller, 6)
    with scopes_disabled():
        Chunk.objects.filter(batch=batch).update(attempts=3, fencing_token=7)
    with running():
        whole(batch, 6)
    assert script.most == 1


def test_poison_in_a_chunk_that_killed_its_owners_ends_too(owner: Person, script: Script) -> None:
    script.reply = lambda said: EngineDied("") if said == "say 2" else answer(said)
    batch = jobs.running(owner.caller, 6)
    with scopes_disabled():
        Chunk.objects.filter(batch=batch).update(attempts=3, fencing_token=7)
    with running():
        ended = finalized(batch)
    assert failed_with(ended) == [("say 2", "engine_crashed")]
    assert len(said_by(ended)) == 5


def test_what_killed_too_often_is_not_run_again(owner: Person, script: Script) -> None:
    batch = jobs.running(owner.caller, 6)
    leases.give_back(jobs.lease())
    for _ in range(5):
        leases.accuse(batch.pk, [3])
    with running():
        ended = finalized(batch)
    assert failed_with(ended) == [("say 3", "engine_crashed")]
    assert sorted(script.asked) == [f"say {at}" for at in (1, 2, 4, 5, 6)]


def test_an_engine_that_cannot_be_loaded_again_gives_its_chunks_back(
    owner: Person, script: Script
) -> None:
    def gone(spec: ModelSpec) -> Exception | None:
        return LoadFailed("the GPU is gone") if script.loads else None

    script.load_error = gone
    script.reply = lambda said: {"say 1": answer(said), "say 2": EngineDied("")}.get(said)
    batch = jobs.running(owner.caller, 9)
    with running() as it:
        wait_for(lambda: Model.objects.get(name="echo").load_error == "the GPU is gone")
        wait_for(lambda: jobs.states(batch) == [("ready", 0)])
        assert jobs.journal(batch) in ([], [1])
        assert it.loop.held() == []


def test_an_idle_engine_is_not_taken_for_a_stalled_one(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running() as it:
        whole(jobs.running(owner.caller, 2), 2)
        it.loop._answered_at = time.monotonic() - 10 * loops.STALL_SECONDS
        script.reply = hold
        batch = jobs.running(owner.caller, 6)
        wait_for(lambda: len(script.flying) == 4)
        turns = _count_turns(it.loop, monkeypatch)
        wait_for(lambda: turns() > 5)
        script.reply = answer
        whole(batch, 6)
    assert script.loads == ["echo"]


def _count_turns(loop: LeaseLoop, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    count, wait = [0], loop._wait

    async def counted() -> None:
        count[0] += 1
        await wait()

    monkeypatch.setattr(loop, "_wait", counted)
    return lambda: count[0]


def test_an_engine_that_answers_nothing_any_more_is_loaded_again(
    owner: Person, script: Script
) -> None:
    script.reply = lambda said: None if len(script.loads) == 1 else answer(said)
    batch = jobs.running(owner.caller, 6)
    with running() as it:
        wait_for(lambda: len(script.flying) == 4)
        it.loop._answered_at = time.monotonic() - 10 * loops.STALL_SECONDS
        whole(batch, 6)
    assert script.loads == ["echo", "echo"]
    assert len(script.cancelled) == 4


# --- Out of memory --------------------------------------------------------------------------

OUT_OF_MEMORY = "the engine of echo died: torch.OutOfMemoryError: CUDA out of memory."


def settled() -> list[dict[str, Any]]:
    return list(Measurement.objects.values_list("settled", flat=True))


def test_out_of_memory_while_running_the_engine_restarts_with_less_in_flight(
    owner: Person, script: Script
) -> None:
    script.capacity = 64
    script.options = {"max-num-seqs": 64, "gpu-memory-utilization": 0.92}

    def too_many(said: str) -> Reply:
        is_full = len(script.loads) == 1 and len(script.flying) == 64
        return EngineDied(OUT_OF_MEMORY) if is_full else None

    script.reply = too_many
    batch = jobs.running(owner.caller, 100)
    with running():
        wait_for(lambda: len(script.loads) == 2 and len(script.flying) == 32)
        assert suspects(batch) == {}
        script.reply = answer
        whole(batch, 100)
        assert script.made[-1].capacity == 32
        assert settled() == [{"max-num-seqs": 32, "gpu-memory-utilization": 0.87}]
    assert script.loads == ["echo", "echo"]
    assert script.made[-1].spec.settled == settled()[0]


def test_a_request_that_runs_out_of_memory_by_itself_takes_nothing_from_the_others(
    owner: Person, script: Script
) -> None:
    script.capacity, script.options = 64, {"max-num-seqs": 64}
    script.reply = lambda said: EngineDied(OUT_OF_MEMORY) if said == "say 10" else answer(said)
    batch = jobs.running(owner.caller, 30)
    with running():
        ended = finalized(batch)
        assert failed_with(ended) == [("say 10", "engine_crashed")]
        assert len(said_by(ended)) == 29
        wait_for(lambda: settled() == [{}])


def test_after_some_restarts_those_in_flight_are_suspected_of_the_memory_too(
    owner: Person, script: Script
) -> None:
    script.capacity, script.options = 128, {"max-num-seqs": 128}
    script.reply = lambda said: EngineDied(OUT_OF_MEMORY) if len(script.loads) < 5 else None
    batch = jobs.running(owner.caller, 200)
    with running():
        wait_for(lambda: len(script.loads) == 5)
        assert list(suspects(batch).values()) == [1] * 16
        assert settled()[0]["max-num-seqs"] == 16
        script.reply = answer
        whole(batch, 200)


# --- Cancelled and lost ---------------------------------------------------------------------


def test_a_cancel_does_not_wait_for_a_load_that_nobody_else_wants(
    owner: Person, script: Script
) -> None:
    register_model(name="large", source="none", engine="instant")
    batch = jobs.running(owner.caller, jobs.lines(3, model="large"))
    script.hangs = "load"
    with running() as it:
        wait_for(lambda: script.loading)
        batches.cancel_batch(actor=owner.caller, batch=batch)
        heart_of(it.loop)._try_beat()
        wait_for(lambda: not script.loading)
        wait_for(lambda: jobs.states(batch) == [("ready", 0)])
        script.hangs = ""
        whole(jobs.running(owner.caller, 3), 3)
    assert script.loads == ["echo"]
    assert Model.objects.get(name="large").load_error == ""
    assert it.loop.host._failures == {}


def test_a_load_that_another_batch_waits_for_goes_on(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, wanted = [0], leases.is_wanted

    def counted(model: str) -> bool:
        looks[0] += 1
        return wanted(model)

    monkeypatch.setattr(leases, "is_wanted", counted)
    batch, other = jobs.running(owner.caller, 3), jobs.running(owner.caller, 4)
    script.hangs = "load"
    with running() as it:
        wait_for(lambda: script.loading)
        assert jobs.states(batch) == [("leased", 0)]
        batches.cancel_batch(actor=owner.caller, batch=batch)
        heart_of(it.loop)._try_beat()
        wait_for(lambda: looks[0] > 2)
        assert (script.loading, it.loop.held()) == (True, [])
        script.hangs = ""
        whole(other, 4)
    assert script.loads == ["echo"]


def test_trap_06_a_running_batchs_cancel_stops_it_and_ends_cancelled(
    owner: Person, script: Script
) -> None:
    script.reply = only("say 1", "say 2")
    batch = jobs.running(owner.caller, 20)
    with running() as it:
        wait_for(lambda: len(script.flying) == 4 and jobs.journal(batch) == [1, 2])
        batches.cancel_batch(actor=owner.caller, batch=batch)
        heart_of(it.loop)._try_beat()
        wait_for(lambda: jobs.states(batch) == [("ready", 0)])
        finalize_batch(batch.pk)
        assert it.loop.held() == []
    ended = jobs.fresh(batch)
    assert ended.status == Status.CANCELLED
    assert jobs.custom_ids(ended.output_file) == ["say 1", "say 2"]
    assert [code for _, code in failed_with(ended)] == ["batch_cancelled"] * 18
    assert len(script.cancelled) == 4


def test_after_a_cancel_other_work_goes_on_with_the_same_engine(
    owner: Person, script: Script
) -> None:
    script.reply = hold
    batch = jobs.running(owner.caller, 20)
    with running() as it:
        wait_for(lambda: len(script.flying) == 4)
        batches.cancel_batch(actor=owner.caller, batch=batch)
        other = jobs.running(owner.caller, 9)
        heart_of(it.loop)._try_beat()
        wait_for(lambda: jobs.states(batch)[0][0] == "ready")
        script.reply = answer
        whole(other, 9)
    assert script.loads == ["echo"]


def test_a_worker_whose_lease_was_taken_over_saves_nothing_more(
    owner: Person, script: Script
) -> None:
    script.reply = only("say 1")
    batch = jobs.running(owner.caller, 20)
    with running() as it:
        wait_for(lambda: jobs.journal(batch) == [1])
        [lease] = it.loop.held()
        jobs.bump_token(lease.chunk_id)
        other = jobs.running(owner.caller, 9)
        script.reply = answer
        whole(other, 9)
        assert jobs.journal(batch) == [1]
        assert jobs.states(batch) == [("leased", 0)]
        assert it.loop.held() == []


def test_the_heartbeat_tells_of_a_lost_lease(owner: Person, script: Script) -> None:
    script.reply = hold
    batch = jobs.running(owner.caller, 20)
    with running() as it:
        wait_for(lambda: len(script.flying) == 4)
        [lease] = it.loop.held()
        jobs.bump_token(lease.chunk_id)
        heart_of(it.loop)._try_beat()
        wait_for(lambda: script.flying == [])
        wait_for(lambda: it.loop.held() == [])
        assert jobs.journal(batch) == []
        script.reply = answer
        whole(jobs.running(owner.caller, 5), 5)


def test_news_of_an_earlier_lease_of_the_chunk_is_ignored(owner: Person, script: Script) -> None:
    batch = jobs.running(owner.caller, 8)
    old = jobs.lease("gpu0")
    leases.give_back(old)
    script.reply = hold
    with running() as it:
        wait_for(lambda: len(script.flying) == 4)
        it.loop.let_go(old, lost=True)
        script.reply = answer
        whole(batch, 8)
    assert script.cancelled == []


class LetsGoAtOnce(LeaseLoop):
    """Is told to drop its first chunk before the requests that it has fed take their first step."""

    lost = False
    _told = False

    def _feed(self) -> None:
        super()._feed()
        if self._works and self._works[0].flying and not self._told:
            self._told = True
            self._drop(self._works[0].lease, lost=self.lost)


class LosesAtOnce(LetsGoAtOnce):
    lost = True


def test_a_chunk_dropped_before_its_first_step_is_given_back(owner: Person, script: Script) -> None:
    batch = jobs.running(owner.caller, 20)
    with running(kind=LetsGoAtOnce) as it:
        whole(batch, 20)
        assert it.loop.status.in_flight == 0
    assert len(script.asked) == 20


def test_a_chunk_lost_before_its_first_step_leaves_the_engine_empty(
    owner: Person, script: Script
) -> None:
    batch = jobs.running(owner.caller, 20)
    with running(kind=LosesAtOnce) as it:
        wait_for(lambda: it.loop._told and it.loop.held() == [])  # type: ignore[attr-defined]
        whole(jobs.running(owner.caller, 9), 9)
        assert it.loop.status.in_flight == 0
        assert jobs.journal(batch) == []
        [chunk] = jobs.chunks(batch)
        jobs.expire_lease(chunk.pk)
        leases.release_expired()
        whole(batch, 20)


def test_a_chunk_that_cannot_be_read_is_given_back(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = jobs.running(owner.caller, 5)
    opened, away = storage.opened, [3]

    def flaky(name: str) -> Any:
        if away[0]:
            away[0] -= 1
            raise OSError("the storage is away")
        return opened(name)

    monkeypatch.setattr("worker.work.storage.opened", flaky)
    monkeypatch.setattr(loops.asyncio, "sleep", _short_sleep(asyncio.sleep))
    with running():
        wait_for(lambda: jobs.fresh(batch).status == Status.FINALIZING)
    monkeypatch.undo()
    assert (away, jobs.journal(batch)) == ([0], [1, 2, 3, 4, 5])


def test_a_chunk_that_cannot_be_read_wakes_nobody(
    owner: Person,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    wakeups_sent: list[tuple[str, ...]],
) -> None:
    def away(name: str) -> Any:
        raise OSError("the storage is away")

    batch = jobs.running(owner.caller, 5)
    wakeups_sent.clear()
    monkeypatch.setattr("worker.work.storage.opened", away)
    with running() as it:
        wait_for(lambda: batch.pk in it.loop._unreadable)
        wait_for(lambda: jobs.states(batch) == [("ready", 0)])
        assert ("worker.tasks.wake",) not in wakeups_sent


def test_a_slow_store_holds_up_no_save_and_costs_no_lease(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.reply = hold
    first = jobs.running(owner.caller, 3)
    with running() as it:
        wait_for(lambda: len(script.flying) == 3)
        store = Store(monkeypatch)
        second = jobs.running(owner.caller, 4)
        assert store.asked.wait(60)
        [mine] = [lease for lease in it.loop.held() if lease.batch_id == second.pk]
        jobs.expire_lease(mine.chunk_id)
        heart_of(it.loop)._renew()
        assert leases.release_expired() == 0
        script.reply = answer
        whole(first, 3)
        store.gate.set()
        whole(second, 4)
        assert [attempts for _, attempts in jobs.states(second)] == [0]


@pytest.mark.parametrize("lost", [False, True])
def test_a_chunk_that_is_dropped_while_it_is_read_is_let_go_at_once(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    store = Store(monkeypatch)
    batch = jobs.running(owner.caller, 3)
    with running() as it:
        assert store.asked.wait(60)
        [lease] = it.loop.held()
        it.loop.draining = True
        it.loop.let_go(lease, lost=lost)
        wait_for(lambda: it.loop.held() == [])
        assert jobs.states(batch) == [("leased" if lost else "ready", 0)]
        store.gate.set()
        wait_for(lambda: not it.loop._readers)
        assert (it.loop.held(), script.asked) == ([], [])


def test_a_chunk_that_a_bug_keeps_from_being_read_is_not_taken_for_one_without_lines(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(name: str) -> Any:
        raise ZeroDivisionError

    batch = jobs.running(owner.caller, 3)
    with monkeypatch.context() as patch:
        patch.setattr("worker.work.storage.opened", bug)
        with running() as it:
            wait_for(lambda: batch.pk in it.loop._unreadable)
            wait_for(lambda: jobs.states(batch) == [("ready", 0)])
    with running("gpu1"):
        whole(batch, 3)


def _short_sleep(sleep: Any) -> Any:
    return lambda seconds: sleep(min(seconds, 0.01))


# --- The database away ----------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True])
def test_a_database_that_is_away_for_a_while_loses_nothing(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """Both kinds: the save did not arrive, and it did but its answer was lost."""
    save, calls = leases.save, Counter[str]()

    def flaky(**given: Any) -> None:
        calls["all"] += 1
        if after:
            save(**given)
        if calls["all"] % 3:
            raise OperationalError("the server closed the connection unexpectedly")
        if not after:
            save(**given)

    monkeypatch.setattr(leases, "save", flaky)
    batch = jobs.running(owner.caller, 150)
    with running():
        whole(batch, 150)
    assert calls["all"] >= 3
    assert len(script.asked) == 150


@pytest.mark.parametrize("name", ["lease_next", "give_back", "release_owned_by", "accuse"])
def test_no_step_is_lost_when_the_database_is_away(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    service, left = getattr(leases, name), [4]

    def flaky(*args: Any, **given: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OperationalError("away")
        return service(*args, **given)

    monkeypatch.setattr(leases, name, flaky)
    script.reply = dies_once(script, "say 9")
    batch = jobs.running(owner.caller, 30)
    with running():
        whole(batch, 30)


def test_broken_connections_are_replaced(owner: Person, script: Script) -> None:
    script.reply = hold
    batch = jobs.running(owner.caller, 30)
    with running():
        wait_for(lambda: len(script.flying) == 4)
        _break_other_connections()
        script.reply = only("say 1", "say 2", "say 3")
        wait_for(lambda: jobs.journal(batch) == [1, 2, 3])
        _break_other_connections()
        script.reply = answer
        whole(batch, 30)


def _break_other_connections() -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


def test_a_save_that_fails_for_good_lets_the_lease_expire(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = leases.save
    batch = jobs.running(owner.caller, 5)

    def broken(**given: Any) -> None:
        if given["lease"].batch_id == batch.pk and given["lease"].fencing_token == 1:
            raise ValueError("a bug")
        save(**given)

    monkeypatch.setattr(leases, "save", broken)
    with running() as it:
        whole(jobs.running(owner.caller, 5), 5)
        wait_for(lambda: it.loop.held() == [])
        jobs.expire_lease(jobs.chunks(batch)[0].pk)
        leases.release_expired()
        whole(batch, 5)


# --- Stopping -------------------------------------------------------------------------------


def test_a_stop_saves_what_is_done_and_gives_the_rest_back(owner: Person, script: Script) -> None:
    script.reply = only("say 1", "say 3")
    batch = jobs.running(owner.caller, 20)
    with running() as it:
        wait_for(lambda: {"say 1", "say 3"}.isdisjoint(script.flying) and len(script.flying) == 4)
        it.stop()
        assert it.loop.status.state == WorkerState.STOPPED
        assert it.loop.stopped.is_set()
    assert jobs.journal(batch) == [1, 3]
    assert jobs.states(batch) == [("ready", 0)]
    assert script.unloads == 1
    with running("gpu1"):
        script.reply = answer
        whole(batch, 20)


def test_a_stop_lets_quick_requests_finish(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "FINISH_SECONDS", 60.0)
    script.reply = hold
    batch = jobs.running(owner.caller, 20)
    with running() as it:
        wait_for(lambda: len(script.flying) == 4)
        it.loop.stop()
        script.reply = answer
        it.thread.join(60)
    assert jobs.journal(batch) == [1, 2, 3, 4]
    assert jobs.states(batch) == [("ready", 0)]
    assert script.cancelled == []


def test_a_stop_while_nothing_is_to_do(script: Script) -> None:
    with running() as it:
        wait_for(lambda: it.loop.status.state == WorkerState.IDLE)
        it.stop()
    assert script.loads == []


def test_a_stop_before_the_start(owner: Person, script: Script) -> None:
    batch = jobs.running(owner.caller, 3)
    loop = LeaseLoop("gpu0")
    loop.stop()
    loop.run()
    assert loop.stopped.is_set()
    assert jobs.states(batch) == [("ready", 0)]


def test_a_stop_during_a_load_gives_the_chunk_back(owner: Person, script: Script) -> None:
    batch = jobs.running(owner.caller, 3)
    with running() as it:
        # From inside the load: the loop must not begin to feed afterwards.
        script.load_error = lambda spec: it.loop.stop()  # type: ignore[func-returns-value]
        it.thread.join(60)
        assert not it.thread.is_alive()
    assert (jobs.states(batch), script.asked) == ([("ready", 0)], [])


def test_a_stop_does_not_wait_for_a_load_that_hangs(owner: Person, script: Script) -> None:
    batch = jobs.running(owner.caller, 3)
    script.hangs = "load"
    with running() as it:
        wait_for(lambda: script.loading)
        it.stop()
        it.thread.join(60)
        assert not it.thread.is_alive()
    assert (jobs.states(batch), script.loading) == ([("ready", 0)], False)
    batch.model.refresh_from_db()  # type: ignore[union-attr]
    assert batch.model.load_error == ""  # type: ignore[union-attr]


def test_a_stop_does_not_wait_for_a_suspect_that_runs_alone(owner: Person, script: Script) -> None:
    batch = jobs.running(owner.caller, 6)
    leases.give_back(jobs.lease())
    for _ in range(3):
        leases.accuse(batch.pk, [3])
    script.reply = lambda said: None if said == "say 3" else answer(said)
    with running() as it:
        wait_for(lambda: script.flying == ["say 3"])
        wait_for(lambda: jobs.journal(batch) == [1, 2, 4, 5, 6])
        it.stop()
    assert jobs.states(batch) == [("ready", 0)]
    assert jobs.journal(batch) == [1, 2, 4, 5, 6]


def test_nothing_joins_a_suspect_that_runs_alone(
    owner: Person, script: Script, settings: Any
) -> None:
    settings.CHUNK_REQUESTS = 6
    batch = jobs.running(owner.caller, 18)
    leases.give_back(jobs.lease())
    for _ in range(3):
        leases.accuse(batch.pk, [3])
    script.reply = lambda said: None if said == "say 3" else answer(said)
    with running() as it:
        wait_for(lambda: script.flying == ["say 3"])
        other = jobs.running(owner.caller, 4)
        wait_for(lambda: any(each.waiting for each in it.loop._works) or not _ready(other))
        assert script.flying == ["say 3"]
        script.reply = answer
        whole(batch, 18)
        whole(other, 4)


def _ready(batch: Batch) -> bool:
    return any(state == "ready" for state, _ in jobs.states(batch))


def test_a_stop_without_the_database_ends_all_the_same(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "STOP_SECONDS", 0.3)
    away = threading.Event()
    for name in ("save", "lease_next", "give_back"):
        monkeypatch.setattr(leases, name, _away(getattr(leases, name), away))
    script.reply = only("say 1")
    batch = jobs.running(owner.caller, 8)
    with running() as it:
        wait_for(lambda: jobs.journal(batch) == [1])
        away.set()
        script.reply = only("say 1", "say 2", "say 3")
        wait_for(lambda: {"say 2", "say 3"}.isdisjoint(script.flying))
        it.stop()
    assert script.unloads == 1
    assert jobs.journal(batch) == [1]
    assert jobs.states(batch) == [("leased", 0)]


def _away(service: Callable[..., Any], away: threading.Event) -> Callable[..., Any]:
    def flaky(*args: Any, **given: Any) -> Any:
        if away.is_set():
            raise OperationalError("away")
        return service(*args, **given)

    return flaky


def test_a_crash_of_the_loop_ends_its_thread_though_the_database_is_away(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(self: LeaseLoop) -> None:
        raise ZeroDivisionError

    tried = threading.Event()

    def save(*args: Any, **given: Any) -> None:
        tried.set()
        raise OperationalError("away")

    monkeypatch.setattr(leases, "save", save)
    batch = jobs.running(owner.caller, 8)
    loop = LeaseLoop("gpu0")
    it = scripted.Running(loop)
    wait_for(tried.is_set)  # it is being tried again and again from now on
    monkeypatch.setattr(LeaseLoop, "_save_due", crash)
    it.thread.join(60)
    assert not it.thread.is_alive()
    assert isinstance(it.error, ZeroDivisionError)
    assert (loop.stopped.is_set(), script.unloads) == (True, 1)
    assert jobs.states(batch) == [("leased", 0)]


# --- Everything at once ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_every_line_is_answered_once(
    owner: Person,
    stranger: Person,
    script: Script,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """Two workers against random deaths, lost leases, false alarms and failing saves."""
    settings.CHUNK_REQUESTS = 7
    register_model(name="other", source="none", engine="instant")
    chance = random.Random(seed)
    trouble = threading.Event()
    trouble.set()

    def moody(said: str) -> Reply:
        dice = chance.random() if trouble.is_set() else 1
        if dice < 0.004:
            return EngineDied("")
        return None if dice < 0.5 else answer(said)

    service = leases.save

    def flaky(**given: Any) -> None:
        dice = chance.random() if trouble.is_set() else 1
        if dice < 0.1:
            raise OperationalError("away")
        service(**given)
        if dice < 0.2:
            raise OperationalError("the answer was lost")

    script.reply = moody
    monkeypatch.setattr(leases, "save", flaky)
    batches = [
        jobs.running(owner.caller, 40),
        jobs.running(stranger.caller, jobs.lines(30, model="other")),
        jobs.running(owner.caller, 25),
    ]
    with running("gpu0") as one, running("gpu1") as other:
        for _ in range(40):
            _disturb(chance, [one.loop, other.loop])
        trouble.clear()
        for batch in batches:
            _repair_until(batch, [one.loop, other.loop])
    for batch, count in zip(batches, (40, 30, 25), strict=True):
        finalize_batch(batch.pk)
        ended = jobs.fresh(batch)
        expected = [f"say {at}" for at in range(1, count + 1)]
        crashed = {said for said, _ in failed_with(ended)}
        assert said_by(ended) == [(said, said) for said in expected if said not in crashed]
        assert {code for _, code in failed_with(ended)} <= {"engine_crashed"}
        assert jobs.counters(batch) == (count, count - len(crashed), len(crashed))


def _disturb(chance: random.Random, workers: list[LeaseLoop]) -> None:
    loop = chance.choice(workers)
    held = loop.held()
    what = chance.choice(["expire", "alarm", "wake", "beat", "nothing"])
    if what == "wake":
        loop.wake()
    elif what == "beat":
        heart_of(loop)._renew()
    elif held and what == "alarm":
        loop.let_go(chance.choice(held), lost=chance.random() < 0.5)
    elif held and what == "expire":
        with scopes_disabled():
            mine = Chunk.objects.filter(pk=chance.choice(held).chunk_id, state="leased")
            mine.update(lease_expires_at=LONG_AGO)
    leases.release_expired()
    time.sleep(chance.random() * 0.02)


def _repair_until(batch: Batch, workers: list[LeaseLoop]) -> None:
    """Until the batch is done, let the leases expire that no worker keeps, as time would."""
    before: set[tuple[int, int]] = set()

    def done() -> bool:
        nonlocal before
        kept = {lease.chunk_id for loop in workers for lease in loop.held()}
        with scopes_disabled():
            leased = Chunk.objects.filter(batch=batch, state="leased").exclude(pk__in=kept)
            forgotten = set(leased.values_list("pk", "fencing_token"))
            for pk, token in forgotten & before:
                mine = Chunk.objects.filter(pk=pk, fencing_token=token, state="leased")
                mine.update(lease_expires_at=LONG_AGO)
        leases.release_expired()
        before = forgotten
        time.sleep(0.1)
        return jobs.fresh(batch).status == Status.FINALIZING

    wait_for(done)
