"""The interactive lane of a lease loop in its thread, with scripted engines, through real Valkey."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from accounts.ids import new_id
from accounts.services import quotas
from batches import lane, policy
from batches.lane import Frame, Kind, Loading, Request
from batches.services import batches, leases
from models_registry.models import Measurement, Model
from models_registry.services import register_model
from tests import jobs
from tests import lane as lanes
from tests.conftest import Person
from tests.jobs import wait_for
from tests.lane import content, error, read, sent, served, valkey, wish, words
from tests.worker import scripted
from tests.worker.scripted import Reply, Script, answer, heart_of, hold, running
from tests.worker.test_loop import suspects, whole
from worker import lane as workers_lane
from worker.engines.base import Answer, EngineAway, EngineDied, LoadFailed
from worker.models import WorkerState

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("own_storage", "wakeups_sent", "echo", "data_dir", "empty_lane"),
]
script = scripted.script
empty_lane = lanes.empty_lane


@pytest.fixture
def data_dir(tmp_path: Path, settings: Any) -> None:
    """Where the loop remembers its engines' processes."""
    settings.DATA_DIR = tmp_path


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes.hasten(monkeypatch)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def except_for(*held: str) -> Any:
    """Hold these, answer the rest."""
    return lambda said: None if said in held else answer(said)


# --- The wire -------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"{}", b"", b'{\n"a":\n1}', b"\x00\n[]\n"])
def test_a_request_comes_as_it_went(body: bytes) -> None:
    request = Request(new_id("req_"), "org/model:1", "/v1/embeddings", body, True, 12.5)
    assert Request.decoded(request.encoded()) == request


@pytest.mark.parametrize(
    "frame", [lane.ALIVE, lane.END, Frame(Kind.CHUNK, b'{"a":"\\n"}'), lane.answer(503, b"\n\xff")]
)
def test_a_frame_comes_as_it_went(frame: Frame) -> None:
    assert Frame.decoded(frame.encoded()) == frame


def test_what_is_loaded_comes_as_it_went() -> None:
    assert Loading.decoded(Loading("gpu0", 1.5).encoded()) == Loading("gpu0", 1.5)


# --- Answering ------------------------------------------------------------------------------


def test_an_idle_worker_loads_what_is_asked_for_and_answers(script: Script) -> None:
    wish("echo")
    with running() as it:
        served()
        assert content(sent("hello")) == "hello"
        assert words(sent("one two three", stream=True)) == ["one", "two", "three"]
        wait_for(lambda: it.loop.lane.in_flight == 0)
        assert (it.loop.status.in_flight, it.loop.status.tokens) == (0, 3 + 4)
    assert (script.loads, script.urgent) == (["echo"], ["hello", "one two three"])


def test_what_an_engine_refuses_is_the_answer(script: Script) -> None:
    script.reply = lambda said: Answer(422, b'{"error":{"code":"no"}}')
    wish("echo")
    with running():
        served()
        for stream in (False, True):
            assert read(sent("hello", stream=stream)) == [
                lane.answer(422, b'{"error":{"code":"no"}}')
            ]


def test_an_error_in_mid_stream_ends_it(script: Script) -> None:
    wish("echo")
    with running():
        served()
        replies = iter([answer(""), Answer(500, b'{"error":{"code":"broken"}}')])
        script.reply = lambda said: next(replies)
        chunk, last = read(sent("one two", stream=True))
        assert (chunk.kind, last.status) == (Kind.CHUNK, 500)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engines_bug_is_told_without_its_words(
    script: Script, stream: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    script.reply = lambda said: KeyError(said)
    wish("echo")
    with running():
        served()
        assert error(sent("the secret words", stream=stream)) == (500, "engine_error")
    assert "secret words" not in "".join(capfd.readouterr())


def test_an_answer_that_is_too_large_is_told(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "ANSWER_BYTES", 10)
    wish("echo")
    with running():
        served()
        assert error(sent("hello")) == (500, None)


def test_what_takes_too_long_is_ended(script: Script) -> None:
    script.reply = hold
    wish("echo")
    with running():
        served()
        assert error(sent("hello", seconds=0.2)) == (504, "timeout")
        assert error(sent("one two", stream=True, seconds=0.2)) == (504, "timeout")
        wait_for(lambda: script.flying == [])
    assert script.cancelled == ["hello", "one two"]


def test_every_request_of_many_is_answered_once_by_one_of_two_workers(script: Script) -> None:
    wish("echo")
    with running("gpu0"), running("gpu1"):
        served()
        calls = [sent(f"say {at}") for at in range(40)]
        assert [content(call) for call in calls] == [f"say {at}" for at in range(40)]
    assert Counter(script.asked) == {f"say {at}": 1 for at in range(40)}


def test_what_a_worker_gets_when_it_must_take_no_more_goes_to_another(
    owner: Person, script: Script
) -> None:
    """It waits for requests already when it is told to drain."""
    wish("echo")
    with running("gpu0") as first:
        served()
        first.loop.draining = True
        call = sent("hello")
        whole_batch = jobs.running(owner.caller, 3)
        with running("gpu1"):
            whole(whole_batch, 3)
            assert content(call) == "hello"
    assert script.loads == ["echo", "echo"]


# --- Whoever waits --------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_is_relieved_of_what_nobody_waits_for(script: Script, stream: bool) -> None:
    script.reply = hold
    wish("echo")
    with running() as it:
        served()
        call = sent("hello", stream=stream)
        wait_for(lambda: script.flying == ["hello"])
        call.close()
        wait_for(lambda: script.flying == [] and it.loop.status.in_flight == 0)
        assert script.cancelled == ["hello"]
        script.reply = answer
        assert content(sent("again")) == "again"


def test_a_reader_that_died_is_noticed(script: Script) -> None:
    script.reply = hold
    wish("echo")
    with running():
        served()
        call = sent("hello")
        wait_for(lambda: script.flying == ["hello"])
        with valkey() as server:
            server.delete(lane.reader_of(call.request.id))  # as when its time is over
        wait_for(lambda: script.flying == [])
        call.close()
    assert script.cancelled == ["hello"]


def test_a_request_that_was_taken_back_is_not_run(script: Script) -> None:
    wish("echo")
    with running() as it:
        served()
        it.loop.draining = True
        call = sent("hello")
        call.close()
        it.loop.draining = False
        assert content(sent("other")) == "other"
    assert script.asked == ["other"]


def test_a_worker_waits_for_a_reader_that_is_behind(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "FRAMES_AT_MOST", 3)
    said = " ".join(f"w{at}" for at in range(40))
    wish("echo")
    with running(), valkey() as server:
        served()
        call = sent(said, stream=True)
        reply = lane.reply_of(call.request.id)
        wait_for(lambda: server.llen(reply) > 3)
        assert server.llen(reply) <= 3 + 2  # the one that was too many, and a sign of life
        assert words(call) == said.split()


def test_the_last_frame_waits_for_no_reader(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has stopped reading holds up neither a swap nor a stop."""
    monkeypatch.setattr(lane, "FRAMES_AT_MOST", 3)
    wish("echo")
    with running() as it, valkey() as server:
        served()
        call = sent(" ".join(f"w{at}" for at in range(40)), stream=True)
        wait_for(lambda: server.llen(lane.reply_of(call.request.id)) > 3)
        it.loop.stop()
        it.thread.join(lane.SILENCE_SECONDS / 2)
        assert not it.thread.is_alive()
        assert error(call) == (503, "worker_stopped")


def test_nothing_stays_in_redis(script: Script) -> None:
    wish("echo")
    with running(), valkey() as server:
        served()
        content(sent("hello"))
        words(sent("one two", stream=True))
        of_requests = ("request", "reader", "reply", "queue")
        assert [key for each in of_requests for key in server.scan_iter(f"lane:{each}:*")] == []


# --- What it costs --------------------------------------------------------------------------


@pytest.fixture
def booked(monkeypatch: pytest.MonkeyPatch) -> dict[str, quotas.Used | None]:
    """By request, what was settled as used; None: nothing."""
    found: dict[str, quotas.Used | None] = {}
    monkeypatch.setattr(quotas, "settle", lambda id, used=None: found.update({id: used}))
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [KeyError("a bug"), EngineDied("")])
def test_what_fails_here_before_it_began_to_answer_costs_nothing(
    script: Script, booked: dict[str, Any], fault: Exception, stream: bool
) -> None:
    script.reply = lambda said: fault if len(script.loads) == 1 else answer(said)
    wish("echo")
    with running() as it:
        served()
        call = sent("hello", stream=stream)
        assert error(call)[0] == 500
        wait_for(lambda: booked)
        assert it.loop.status.tokens == 0
    assert booked == {call.request.id: None}


def test_what_a_stop_breaks_off_costs_nothing_unless_some_of_it_was_had(
    script: Script, booked: dict[str, Any]
) -> None:
    streamed: list[str] = []

    def one_word(said: str) -> Reply:
        if said == "slow" or streamed:
            return None
        streamed.append(said)
        return answer(said)

    script.reply = one_word
    wish("echo")
    with running() as it:
        served()
        slow, begun = sent("slow"), sent("one two", stream=True)
        wait_for(lambda: len(script.flying) == 2 and streamed)
        it.loop.stop()
        assert [error(call) for call in (slow, begun)] == [(503, "worker_stopped")] * 2
    assert booked[slow.request.id] is None
    used = booked[begun.request.id]
    assert (used.requests, used.input_tokens, used.output_tokens) == (1, 1, 1)


def test_what_the_caller_ends_is_paid_for(script: Script, booked: dict[str, Any]) -> None:
    script.reply = hold
    wish("echo")
    with running():
        served()
        gone, late = sent("hello"), sent("hello", seconds=0.2)
        wait_for(lambda: script.flying)
        assert error(late) == (504, "timeout")
        gone.close()
        wait_for(lambda: len(booked) == 2)
    assert [used.requests for used in booked.values()] == [1, 1]


# --- Beside batches -------------------------------------------------------------------------


def test_batches_leave_room_while_there_are_real_time_requests(
    owner: Person, script: Script
) -> None:
    """Of what would only wait inside the engine, and of the last slots, batches take nothing."""
    script.capacity, script.slots, script.reply = 16, 8, hold
    batch = jobs.running(owner.caller, 60)
    with running() as it:
        wait_for(lambda: len(script.flying) == 16)
        served()
        call = sent("hello")
        wait_for(lambda: "hello" in script.flying)
        assert it.loop.lane.headroom == 8 + 1
        script.reply = _until(script, 6)
        wait_for(lambda: len(script.flying) == 7)  # of eight slots one stays free
        assert it.loop.status.in_flight == 7
        script.reply = answer
        assert content(call) == "hello"
        whole(batch, 60)


def _until(script: Script, left: int) -> Any:
    """Answer the batch's requests while more than so many of them are in the engine."""

    def reply(said: str) -> Reply:
        batchs = [each for each in script.flying if each != "hello"]
        return answer(said) if said != "hello" and len(batchs) > left else None

    return reply


def test_without_slots_to_leave_batches_keep_everything(
    owner: Person, script: Script, settings: Any
) -> None:
    settings.LANE_SLOTS = 0
    script.capacity, script.slots, script.reply = 8, 4, hold
    jobs.running(owner.caller, 30)
    with running() as it:
        wait_for(lambda: len(script.flying) == 8)
        served()
        call = sent("hello")
        wait_for(lambda: "hello" in script.flying)
        assert it.loop.lane.headroom == 0
        call.close()


def test_an_engine_of_one_slot_still_runs_its_batch(owner: Person, script: Script) -> None:
    script.capacity = script.slots = 1
    wish("echo")
    with running() as it:
        served()
        assert content(sent("hello")) == "hello"
        assert it.loop.lane.headroom == 0
        whole(jobs.running(owner.caller, 3), 3)


def test_half_of_the_slots_stays_for_batches(owner: Person, script: Script) -> None:
    script.capacity = script.slots = 4
    script.reply = except_for("one", "two", "three")
    wish("echo")
    with running() as it:
        served()
        calls = [sent(said) for said in ("one", "two", "three")]
        wait_for(lambda: it.loop.lane.in_flight == 2)
        whole(jobs.running(owner.caller, 9), 9)
        assert it.loop.lane.in_flight == 2
        script.reply = answer
        assert [content(call) for call in calls] == ["one", "two", "three"]


def test_a_suspect_and_real_time_requests_wait_for_each_other(
    owner: Person, script: Script
) -> None:
    batch = jobs.running(owner.caller, 6)
    leases.give_back(jobs.lease())
    for _ in range(3):
        leases.accuse(batch.pk, [3])
    script.reply = hold
    with running():
        wait_for(lambda: len(script.flying) == 4)
        served()
        before = sent("before")
        wait_for(lambda: "before" in script.flying)
        script.reply = except_for("before", "say 3")
        wait_for(lambda: jobs.journal(batch) == [1, 2, 4, 5, 6])
        assert "say 3" not in script.asked
        after = sent("after")
        script.reply = except_for("say 3")
        assert content(before) == "before"
        wait_for(lambda: script.flying == ["say 3"])
        assert "after" not in script.asked
        script.reply = answer
        assert content(after) == "after"
        whole(batch, 6)


def test_an_engine_that_dies_is_loaded_again_and_batches_lose_nothing(
    owner: Person, script: Script
) -> None:
    script.reply = hold
    batch = jobs.running(owner.caller, 9)
    with running() as it:
        wait_for(lambda: len(script.flying) == 4)
        served()
        calls = [sent("dies"), sent("one two", stream=True)]
        wait_for(lambda: {"dies", "one two"} <= set(script.flying))
        script.reply = lambda said: (
            EngineDied("") if said == "dies" and len(script.loads) == 1 else answer(said)
        )
        assert error(calls[0]) == (500, "engine_crashed")
        calls[1].close()
        whole(batch, 9)
        assert it.loop.status.loads == 2
        assert content(sent("next")) == "next"
    assert max(suspects(batch).values(), default=0) <= 1


def test_where_an_engine_is_away_whoever_waits_is_told_to_come_again(
    owner: Person, script: Script
) -> None:
    script.reply = hold
    jobs.running(owner.caller, 3)
    with running() as it:
        wait_for(lambda: len(script.flying) == 3)
        served()
        call = sent("hello")
        wait_for(lambda: "hello" in script.flying)
        script.reply = lambda said: EngineAway("away") if said == "say 1" else None
        assert error(call) == (503, "engine_away")
        wait_for(lambda: it.loop.status.loaded == "")


def test_an_engine_that_dies_with_real_time_requests_alone_is_loaded_again(script: Script) -> None:
    script.reply = lambda said: EngineDied("") if len(script.loads) == 1 else answer(said)
    wish("echo")
    with running():
        served()
        assert error(sent("one two", stream=True)) == (500, "engine_crashed")
        wait_for(lambda: script.loads == ["echo", "echo"])
        served()
        assert content(sent("next")) == "next"


def test_a_stop_lets_quick_answers_finish_and_tells_the_others(script: Script) -> None:
    script.reply = except_for("slow", "one two")
    wish("echo")
    with running() as it:
        served()
        calls = [sent("slow"), sent("one two", stream=True)]
        wait_for(lambda: len(script.flying) == 2)
        it.loop.stop()
        assert [error(call) for call in calls] == [(503, "worker_stopped")] * 2
        it.thread.join(60)
    assert sorted(script.cancelled) == ["one two", "slow"]
    assert script.unloads == 1


def test_a_swap_waits_for_what_is_under_way_then_cuts_it_short(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_lane, "CLEAR_SECONDS", 0.3)
    monkeypatch.setattr(policy, "RESCUE_STAY", 0.0)
    register_model(name="other", source="none", engine="instant")
    whole_one = jobs.running(owner.caller, 3)
    script.reply = except_for("slow")
    with running():
        whole(whole_one, 3)
        served()
        call = sent("slow")
        wait_for(lambda: script.flying == ["slow"])
        batch = jobs.running(owner.caller, jobs.lines(3, model="other"))
        assert error(call) == (503, "model_unloaded")
        whole(batch, 3)
    # Idle again, it may load echo anew for those who asked for it.
    assert (script.loads[:2], script.cancelled) == (["echo", "other"], ["slow"])


@pytest.mark.parametrize("has_gone", [False, True])
def test_what_is_taken_as_the_model_goes_is_told_at_once(
    script: Script, booked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, has_gone: bool
) -> None:
    decoded = Request.decoded
    wish("echo")
    with running() as it:
        served()

        def swap_begins(text: bytes) -> Request:
            """Between the two answers of Redis, on the loop's thread."""
            if has_gone:
                it.loop.host._awake, it.loop.status.loaded = None, ""
            else:
                it.loop.lane._ending = workers_lane.SWAPPED
            return decoded(text)

        with monkeypatch.context() as patch:
            patch.setattr(Request, "decoded", swap_begins)
            call = sent("hello")
            assert error(call) == (503, "model_unloaded")
        it.loop.lane._ending = None
        served()
        assert content(sent("again")) == "again"
    assert booked[call.request.id] is None
    assert script.asked == ["again"]


def test_a_chunk_let_go_while_real_time_requests_end_has_nothing_loaded(
    owner: Person, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "RESCUE_STAY", 0.0)
    register_model(name="other", source="none", engine="instant")
    script.reply = except_for("slow")
    first = jobs.running(owner.caller, 3)
    with running() as it:
        whole(first, 3)
        served()
        call = sent("slow")
        wait_for(lambda: script.flying == ["slow"])
        batch = jobs.running(owner.caller, jobs.lines(3, model="other"))
        wait_for(lambda: it.loop.lane._ending is workers_lane.SWAPPED)
        batches.cancel_batch(actor=owner.caller, batch=batch)
        heart_of(it.loop)._try_beat()
        wait_for(lambda: it.loop.held() == [])
        script.reply = answer
        assert content(call) == "slow"
        wait_for(lambda: jobs.states(batch) == [("ready", 0)])
    assert script.loads == ["echo"]


def test_a_model_in_use_is_not_swapped_away_for_a_batch_that_can_wait(
    owner: Person, script: Script
) -> None:
    register_model(name="other", source="none", engine="instant")
    Measurement.objects.create(model=Model.objects.get(name="echo"), load_seconds=600)
    wish("echo")
    with running() as it:
        served()
        batch = jobs.running(owner.caller, jobs.lines(3, model="other"))
        assert content(sent("hello")) == "hello"
        wait_for(lambda: it.loop.status.state == WorkerState.IDLE)
        assert jobs.states(batch) == [("ready", 0)]
        it.loop.lane.asked.clear()
        with valkey() as server:
            server.delete(lane.ASKED)  # as when that is long ago
        whole(batch, 3)
    assert script.loads == ["echo", "other"]


def test_of_two_idle_workers_one_loads_what_is_asked_for(script: Script) -> None:
    wish("echo")
    with running("gpu0"), running("gpu1") as second:
        served()
        wish("echo")
        wait_for(lambda: second.loop.lane.asked)
        assert content(sent("hello")) == "hello"
    assert script.loads == ["echo"]


def test_a_model_that_does_not_load_is_left_alone_for_a_while(script: Script) -> None:
    script.load_error = lambda spec: LoadFailed("no room") if spec.name == "echo" else None
    register_model(name="other", source="none", engine="instant")
    wish("other", "echo")
    with running() as it:
        wait_for(lambda: list(it.loop.host._failures) == ["echo"])
        served("other")
    assert script.loads == ["other"]


def test_who_loads_a_model_says_so(script: Script) -> None:
    script.hangs = "load"
    wish("echo")
    with running() as it:
        wait_for(lambda: script.loading)
        said = wait_for(lambda: (found := _loading("echo")) and found.seconds > 0 and found)
        assert said.worker == "gpu0"
        it.loop.stop()
        it.thread.join(60)


def _loading(model: str) -> Loading | None:
    with valkey() as server:
        text: Any = server.get(lane.loading_of(model))
    return Loading.decoded(text) if text else None


# --- Redis away -----------------------------------------------------------------------------


def test_without_redis_batches_go_on(owner: Person, script: Script, settings: Any) -> None:
    settings.CELERY_BROKER_URL = "redis://127.0.0.1:1/0"
    with running() as it:
        whole(jobs.running(owner.caller, 9), 9)
        it.stop()
