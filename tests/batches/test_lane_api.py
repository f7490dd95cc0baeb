"""/v1/chat/completions, /v1/completions and /v1/embeddings: who is let in, what is refused, what comes.

With a worker in a thread where one is needed, and Valkey; real engines and SDKs are elsewhere.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.models import AuditEvent, Quota, Reservation, UsageRecord
from accounts.models.quotas import REAL_TIME
from batches import lane
from batches.lane import Loading
from batches.services import realtime
from batches.services.sweep import forget_real_time_requests
from models_registry.models import Measurement, Model
from models_registry.services import register_model
from tests import jobs
from tests import lane as lanes
from tests.batches.test_files_api import client_with
from tests.conftest import Person
from tests.jobs import wait_for
from tests.lane import CHAT, served, valkey, wish
from tests.wire import JSON, assert_refused, error_of, post
from tests.worker import scripted
from tests.worker.scripted import Script, answer, hold, running
from worker.engines.base import Answer
from worker.models import Worker, WorkerState

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("own_storage", "wakeups_sent", "echo", "data_dir", "empty_lane"),
]
script = scripted.script
empty_lane = lanes.empty_lane
COMPLETE, EMBED = "/v1/completions", "/v1/embeddings"
HELLO = {"model": "echo", "messages": [{"role": "user", "content": "hello to you"}]}
STREAM = HELLO | {"stream": True}


@pytest.fixture
def data_dir(tmp_path: Path, settings: Any) -> None:
    """Where a loop remembers its engines' processes."""
    settings.DATA_DIR = tmp_path


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes.hasten(monkeypatch)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Whatever happens, nobody stays inside, and nothing stays reserved."""
    yield
    assert realtime.GATE._inside.total() == 0
    with scopes_disabled():
        assert wait_for(lambda: not Reservation.objects.filter(REAL_TIME).exists(), 20)


@pytest.fixture
def worker(
    echo: Model,
    empty_lane: None,
    data_dir: None,
    own_storage: Path,
    wakeups_sent: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[None]:
    """A worker with the instant model `echo` loaded."""
    scripted.hasten(monkeypatch)
    wish("echo")
    with running():
        served()
        yield


def usage(person: Person) -> list[tuple[str, int, int, int, int]]:
    """Endpoint, batches, requests, tokens in and out, of each record."""
    fields = ("endpoint", "batches", "requests", "input_tokens", "output_tokens")
    with scopes_disabled():
        mine = UsageRecord.objects.filter(organization=person.caller.organization)
        return list(mine.order_by("endpoint").values_list(*fields))


def events_of(response: Any) -> list[Any]:
    """What a stream's events hold, `[DONE]` as it is; and that nothing else was in it."""
    found = []
    for event in response.getvalue().decode().split("\n\n")[:-1]:
        assert "\n" not in event
        if event != ": working":
            text = event.removeprefix("data: ")
            found.append(text if text == "[DONE]" else orjson.loads(text))
    return found


def retry_after(response: Any) -> int:
    seconds = int(response["Retry-After"])
    assert 1 <= seconds <= 120
    return seconds


# --- What comes -----------------------------------------------------------------------------


@pytest.mark.usefixtures("worker")
def test_a_whole_answer_comes_as_the_engine_gave_it(owner: Person) -> None:
    response = post(owner.api, CHAT, HELLO)
    body = response.json()
    assert response.status_code == 200
    assert response["content-type"] == JSON
    assert body == {
        "id": "chat.completion-instant",
        "object": "chat.completion",
        "created": body["created"],
        "model": "echo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello to you"},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8},
    }
    assert response["x-request-id"].startswith("req_")
    assert int(response["x-ratelimit-remaining-requests"]) > 0


@pytest.mark.usefixtures("worker")
def test_a_stream_comes_as_events(owner: Person) -> None:
    response = post(owner.api, CHAT, STREAM)
    assert response["content-type"] == "text/event-stream; charset=utf-8"
    assert response["x-request-id"].startswith("req_")
    *chunks, done = events_of(response)
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["hello ", "to ", "you"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert {key for chunk in chunks for key in chunk} == {
        "id",
        "object",
        "created",
        "model",
        "choices",
    }
    assert done == "[DONE]"


@pytest.mark.usefixtures("worker")
def test_usage_is_in_a_stream_for_who_asks(owner: Person) -> None:
    sums = {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    asked = events_of(post(owner.api, CHAT, STREAM | {"stream_options": {"include_usage": True}}))
    assert [event["usage"] for event in asked[:-1] if "usage" in event] == [sums]
    assert (asked[-2]["choices"], len(asked)) == ([], 5)
    options = {"include_usage": True, "continuous_usage_stats": True}
    each = events_of(post(owner.api, CHAT, STREAM | {"stream_options": options}))
    assert [event["usage"]["completion_tokens"] for event in each[:-1]] == [1, 2, 3, 3]


@pytest.mark.usefixtures("worker")
def test_completions_and_embeddings_come_too(owner: Person) -> None:
    given = {"model": "echo", "prompt": "once upon"}
    assert post(owner.api, COMPLETE, given).json()["choices"][0]["text"] == "once upon"
    events = events_of(post(owner.api, COMPLETE, given | {"stream": True}))
    assert [event["choices"][0]["text"] for event in events[:-1]] == ["once ", "upon"]
    Model.objects.filter(name="echo").update(task="embedding")
    embedded = post(owner.api, EMBED, {"model": "echo", "input": ["four", "fourteen"]}).json()
    assert embedded["data"][0]["embedding"] == [0.0, 8.0]


def test_what_the_engine_refuses_comes_with_its_status(owner: Person, script: Script) -> None:
    refusal = b'{"error":{"message":"no","type":"invalid_request_error","param":"x","code":null}}'
    wish("echo")
    with running():
        served()
        for status, told in ((400, 400), (429, 429), (500, 500), (401, 502), (403, 502)):
            script.reply = lambda said, status=status: Answer(status, refusal)
            for body in (HELLO, STREAM):
                response = post(owner.api, CHAT, body)
                assert (response.status_code, response.content) == (told, refusal)


def test_an_error_in_mid_stream_is_an_event_and_the_end(owner: Person, script: Script) -> None:
    replies = iter([answer(""), Answer(500, b'{"error":{"message":"broken"}}')])
    script.reply = lambda said: next(replies)
    wish("echo")
    with running():
        served()
        response = post(owner.api, CHAT, STREAM)
        assert response.status_code == 200
        assert events_of(response) == [{"word": "hello"}, {"error": {"message": "broken"}}]


# --- What is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        (CHAT, b"{", None, "invalid_json"),
        (CHAT, b"[]", None, "invalid_json"),
        (
            CHAT,
            b'{"model":"echo","messages":[{"role":"user","content":"\xff"}]}',
            None,
            "invalid_json",
        ),
        (CHAT, {}, "model", "missing_required_parameter"),
        (CHAT, {"model": "echo"}, "messages", "missing_required_parameter"),
        (CHAT, HELLO | {"model": 7}, "model", "invalid_value"),
        (CHAT, HELLO | {"model": ""}, "model", "invalid_value"),
        (CHAT, HELLO | {"messages": []}, "messages", "invalid_value"),
        (CHAT, HELLO | {"messages": "hello"}, "messages", "invalid_value"),
        (CHAT, HELLO | {"messages": ["hello"]}, "messages.0", "invalid_value"),
        (CHAT, HELLO | {"stream": "yes"}, "stream", "invalid_value"),
        (CHAT, HELLO | {"stream": 1}, "stream", "invalid_value"),
        (CHAT, HELLO | {"stream_options": 3}, "stream_options", "invalid_value"),
        (CHAT, HELLO | {"n": 129}, "n", "invalid_value"),
        (CHAT, HELLO | {"n": "many"}, "n", "invalid_value"),
        (CHAT, HELLO | {"n": 2**62}, "n", "invalid_value"),
        (COMPLETE, {"model": "echo"}, "prompt", "missing_required_parameter"),
        (COMPLETE, {"model": "echo", "prompt": "a", "best_of": 200}, "best_of", "invalid_value"),
        (COMPLETE, {"model": "echo", "prompt": ["a"] * 65, "n": 2}, "n", "invalid_value"),
        (EMBED, {"model": "echo"}, "input", "missing_required_parameter"),
        (EMBED, {"model": "echo", "input": "a", "stream": True}, "stream", "invalid_value"),
        (EMBED, {"model": "echo", "input": ["a"] * 2049}, "input", "too_many_inputs"),
        (EMBED, {"model": "echo", "input": []}, "model", "model_not_supported"),
        (EMBED, {"model": "echo", "input": "a"}, "model", "model_not_supported"),
    ],
)
def test_a_bad_body_is_refused(
    owner: Person, path: str, body: Any, param: str | None, code: str
) -> None:
    assert_refused(post(owner.api, path, body), 400, param, code)


@pytest.mark.parametrize("name", ["none", "ec\0ho", "x" * 100_000, "*", "lane:asked", "theirs"])
def test_a_model_that_is_not_offered_is_not_found(
    owner: Person, stranger: Person, name: str
) -> None:
    organization = stranger.caller.organization
    register_model(name="theirs", source="none", engine="instant", organizations=[organization])
    assert_refused(post(owner.api, CHAT, HELLO | {"model": name}), 404, "model", "model_not_found")
    with valkey() as server:
        assert list(server.scan_iter("lane:*")) == []  # nobody learns of the wish


def test_a_large_body_is_refused(owner: Person) -> None:
    body = HELLO | {"padding": "x" * (2 * 1024 * 1024)}
    assert_refused(post(owner.api, CHAT, body), 413, None, "body_too_large")


def test_only_who_may_call_models_directly_may(owner: Person, viewer: Person) -> None:
    assert_refused(post(viewer.api, CHAT, HELLO), 403, None, "insufficient_role")
    narrow = client_with(owner.caller.organization, "batches", "models.read")
    assert_refused(post(narrow, CHAT, HELLO), 403, None, "insufficient_scope")
    wide = client_with(owner.caller.organization, "inference")
    assert post(wide, CHAT, HELLO).status_code == 503  # let in, but there is no worker


def test_a_suspended_organization_is_refused(owner: Person) -> None:
    organization = owner.caller.organization
    organization.suspended_at = timezone.now()
    organization.save()
    assert_refused(post(owner.api, CHAT, HELLO), 403, None, "organization_suspended")


def test_nothing_of_it_is_audited(owner: Person) -> None:
    with scopes_disabled():
        before = AuditEvent.objects.count()
        post(owner.api, CHAT, HELLO)
        assert AuditEvent.objects.count() == before


@pytest.mark.usefixtures("worker")
def test_what_is_said_is_not_logged(owner: Person, capfd: pytest.CaptureFixture[str]) -> None:
    said = {"messages": [{"role": "user", "content": "the secret words"}]}
    assert post(owner.api, CHAT, HELLO | said).status_code == 200
    assert events_of(post(owner.api, CHAT, STREAM | said))[-1] == "[DONE]"
    assert post(owner.api, CHAT, HELLO | said | {"stream": "the secret words"}).status_code == 400
    assert "secret words" not in "".join(capfd.readouterr())


@pytest.mark.usefixtures("worker")
def test_a_request_takes_as_many_queries_whatever_is_in_it(owner: Person) -> None:
    post(owner.api, CHAT, HELLO)
    counts = []
    for messages in (1, 300):
        body = HELLO | {"messages": HELLO["messages"] * messages}  # type: ignore[operator]
        with CaptureQueriesContext(connection) as queries:
            assert post(owner.api, CHAT, body).status_code == 200
        counts.append(len(queries))
    assert counts[0] == counts[1] <= 8


# --- Nobody to answer -----------------------------------------------------------------------


def alive(name: str = "gpu0", **fields: Any) -> Worker:
    """A worker that has just been heard of."""
    now = timezone.now()
    values = {"host": "here", "pid": 1, "state": WorkerState.IDLE, "started_at": now}
    return Worker.objects.create(name=name, heartbeat_at=now, **(values | fields))


def refused(person: Person) -> tuple[str, int]:
    """What is said when the model is loaded nowhere, and when to come again."""
    response = post(person.api, CHAT, HELLO)
    assert response.status_code == 503
    error = error_of(response)
    assert (error["type"], error["code"]) == ("server_error", "model_not_loaded")
    return error["message"], retry_after(response)


def test_without_workers_it_says_so(owner: Person) -> None:
    alive(draining=True)
    assert refused(owner) == ("No worker is running that echo fits.", 120)


def test_a_free_worker_is_told_of_and_woken(
    owner: Person, wakeups_sent: list[tuple[str, ...]]
) -> None:
    alive()
    assert refused(owner)[1] == 90  # nothing was measured yet
    Measurement.objects.create(model=Model.objects.get(name="echo"), gpu="", load_seconds=39.5)
    said = "echo is not loaded; a free worker loads it now, which takes about 40 s."
    assert refused(owner) == (said, 40)
    assert wakeups_sent == [("worker.tasks.wake",)]  # not for each who asks


def test_a_worker_that_it_does_not_fit_counts_for_nothing(owner: Person) -> None:
    alive(gpu_kind="small")
    Measurement.objects.create(
        model=Model.objects.get(name="echo"), gpu="small", unfit_why="too large"
    )
    assert refused(owner) == ("No worker is running that echo fits.", 120)


def test_busy_workers_are_told_of(owner: Person) -> None:
    alive("gpu7")
    register_model(name="other", source="none", engine="instant")
    jobs.running(owner.caller, jobs.lines(3, model="other"))
    jobs.lease("gpu7")
    said, seconds = refused(owner)
    assert seconds == 120
    assert said.startswith("echo is not loaded, and no worker is free: ")


def test_a_load_that_failed_is_told_of_without_its_reason(owner: Person) -> None:
    alive()
    Model.objects.filter(name="echo").update(load_error="/srv/secret is missing")
    said = "echo could not be loaded the last time. It is tried again from time to time."
    assert refused(owner) == (said, 60)


def test_a_load_under_way_is_told_of(owner: Person) -> None:
    Measurement.objects.create(model=Model.objects.get(name="echo"), gpu="", load_seconds=200)
    with valkey() as server:
        server.set(lane.loading_of("echo"), Loading("gpu0", 30).encoded(), ex=60)
        assert refused(owner) == ("echo is being loaded on gpu0, for about 170 s more.", 120)
        server.set(lane.loading_of("echo"), Loading("gpu0", 250).encoded(), ex=60)
        assert refused(owner) == ("echo is being loaded on gpu0, for about 2 s more.", 2)


def test_a_queue_that_is_full_is_not_made_longer(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "QUEUE_AT_MOST", 2)
    with valkey() as server:
        server.set(lane.ready_of("echo"), "gpu0", ex=60)
        server.rpush(lane.queue_of("echo"), "req_1", "req_2")
        response = post(owner.api, CHAT, HELLO)
        assert (response.status_code, error_of(response)["code"]) == (503, "queue_full")
        assert server.llen(lane.queue_of("echo")) == 2


def test_a_request_that_no_worker_takes_is_taken_back(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "WAIT_SECONDS", 1)
    with valkey() as server:
        server.set(lane.ready_of("echo"), "gpu0", ex=60)  # who died a moment ago
        response = post(owner.api, CHAT, STREAM)
        assert (response.status_code, error_of(response)["code"]) == (503, "workers_busy")
        assert retry_after(response) == 2
        assert list(server.scan_iter("lane:re[pq]*")) == []


@pytest.mark.parametrize("first", [[], [b'{"word":1}']])
def test_a_worker_that_falls_silent_is_noticed(
    owner: Person, monkeypatch: pytest.MonkeyPatch, first: list[bytes]
) -> None:
    """It took the request, and perhaps answered a little, and was killed."""
    monkeypatch.setattr(lane, "SILENCE_SECONDS", 1)
    monkeypatch.setattr(lane, "WAIT_SECONDS", 1)
    with valkey() as server:
        server.set(lane.ready_of("echo"), "gpu0", ex=60)
        taker = threading.Thread(target=_take_and_die, args=(first,))
        taker.start()
        response = post(owner.api, CHAT, STREAM)
        if first:
            word, last = events_of(response)
            assert (response.status_code, word) == (200, {"word": 1})
            assert last["error"]["code"] == "worker_lost"
        else:
            assert (response.status_code, error_of(response)["code"]) == (503, "worker_lost")
        taker.join()
    with scopes_disabled():
        Reservation.objects.update(created_at=timezone.now() - timedelta(hours=1))
        forget_real_time_requests()


def _take_and_die(first: list[bytes]) -> None:
    with valkey() as server:
        popped: Any = server.blpop([lane.queue_of("echo")], timeout=60)
        id = popped[1].decode()
        server.getdel(lane.request_of(id))
        for data in first:
            server.rpush(lane.reply_of(id), lane.Frame(lane.Kind.CHUNK, data).encoded())


def test_without_redis_it_says_so(owner: Person, settings: Any) -> None:
    settings.CELERY_BROKER_URL = "redis://127.0.0.1:1/0"
    realtime._redis.cache_clear()
    response = post(owner.api, CHAT, HELLO)
    realtime._redis.cache_clear()
    assert (response.status_code, error_of(response)["code"]) == (503, "redis_unavailable")
    assert retry_after(response) == 3


# --- How many ------------------------------------------------------------------------------------


def test_others_keep_their_threads(owner: Person, settings: Any) -> None:
    settings.LANE_THREADS = 0
    response = post(owner.api, CHAT, HELLO)
    assert response.status_code == 503
    assert error_of(response)["code"] == "too_many_requests_under_way"
    assert retry_after(response) == 1


def test_one_organization_does_not_take_all_threads(
    owner: Person, stranger: Person, script: Script, settings: Any
) -> None:
    settings.LANE_THREADS, settings.LANE_THREADS_OF_ONE = 2, 1
    script.reply = hold
    wish("echo")
    with running():
        served()
        first = _Asking(owner, HELLO)
        wait_for(lambda: len(script.flying) == 1)
        assert error_of(post(owner.api, CHAT, HELLO))["message"].startswith("Your organization has")
        second = _Asking(stranger, HELLO)
        wait_for(lambda: len(script.flying) == 2)
        assert error_of(post(stranger.api, CHAT, HELLO))["code"] == "too_many_requests_under_way"
        script.reply = answer
        assert [first.status, second.status] == [200, 200]
        assert post(owner.api, CHAT, HELLO).status_code == 200


class _Asking(threading.Thread):
    """Asks in a thread of its own, perhaps over a connection that the test can close."""

    def __init__(self, person: Person, body: Any, connection: socket.socket | None = None) -> None:
        super().__init__()
        self._person, self._body = person, body
        self._extra = {"gunicorn.socket": connection} if connection else {}
        self.start()

    def run(self) -> None:
        try:
            self.response = self._person.api.post(
                CHAT, orjson.dumps(self._body), content_type=JSON, **self._extra
            )
        finally:
            connection.close()

    @property
    def status(self) -> int:
        self.join(60)
        return int(self.response.status_code)


# --- The client goes away ---------------------------------------------------------------------


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["whole", "streamed"])
def test_who_hangs_up_before_the_answer_ends_the_request(
    owner: Person, script: Script, body: Any
) -> None:
    script.reply = hold
    wish("echo")
    ours, theirs = socket.socketpair()
    with running() as it, ours, theirs:
        served()
        asking = _Asking(owner, body, ours)
        wait_for(lambda: len(script.flying) == 1)
        theirs.close()
        assert asking.status == 499
        wait_for(lambda: it.loop.status.in_flight == 0)
    assert len(script.cancelled) == 1
    wait_for(lambda: usage(owner))
    [(endpoint, batches, requests, tokens, _)] = usage(owner)
    assert (endpoint, batches, requests) == (CHAT, 0, 1)
    assert tokens == len(orjson.dumps(body)) // 4 + 1  # by estimate: nobody told


def test_who_hangs_up_in_mid_stream_ends_the_request(owner: Person, script: Script) -> None:
    left = [2]

    def two(said: str) -> Answer | None:
        left[0] -= 1
        return answer(said) if left[0] >= 0 else None

    script.reply = two
    wish("echo")
    ours, theirs = socket.socketpair()
    with running() as it, ours, theirs:
        served()
        asking = _Asking(owner, STREAM, ours)
        assert asking.status == 200
        events = iter(asking.response)
        assert [next(events), next(events)] == [
            b'data: {"word":"hello"}\n\n',
            b'data: {"word":"to"}\n\n',
        ]
        theirs.close()
        assert list(events) == []
        asking.response.close()
        wait_for(lambda: it.loop.status.in_flight == 0)
    assert script.cancelled == ["hello to you"]
    wait_for(lambda: usage(owner) == [(CHAT, 0, 1, 1, 2)])  # what the engine said until then


def test_a_stream_that_is_closed_unread_ends_the_request(owner: Person, script: Script) -> None:
    """As gunicorn does when it cannot write."""
    left = [1]

    def one(said: str) -> Answer | None:
        left[0] -= 1
        return answer(said) if left[0] >= 0 else None

    script.reply = one
    wish("echo")
    with running() as it:
        served()
        response = post(owner.api, CHAT, STREAM)
        response.close()
        wait_for(lambda: it.loop.status.in_flight == 0)
    assert script.cancelled == ["hello to you"]


def test_a_client_that_only_sends_more_is_still_there(owner: Person, script: Script) -> None:
    script.reply = hold
    wish("echo")
    ours, theirs = socket.socketpair()
    with running(), ours, theirs:
        served()
        theirs.send(b"GET / HTTP/1.1\r\n")  # the next request, already
        asking = _Asking(owner, HELLO, ours)
        wait_for(lambda: len(script.flying) == 1)
        script.reply = answer
        assert asking.status == 200


# --- Limits and usage -------------------------------------------------------------------------


def limit(person: Person, **fields: Any) -> Quota:
    with scopes_disabled():
        return Quota.objects.create(organization=person.caller.organization, **fields)


@pytest.mark.usefixtures("worker")
def test_what_is_used_adds_up_in_one_row_a_day(owner: Person, stranger: Person) -> None:
    Model.objects.filter(name="echo").update(input_price=2, output_price=10)
    for _ in range(3):
        assert post(owner.api, CHAT, HELLO).status_code == 200
    assert len(events_of(post(owner.api, CHAT, STREAM))) == 4
    wait_for(lambda: usage(owner) and usage(owner)[0][2] == 4)
    assert usage(owner) == [(CHAT, 0, 4, 16, 15)]
    assert usage(stranger) == []
    with scopes_disabled():
        [record] = UsageRecord.objects.all()
        assert record.cost * 1_000_000 == 16 * 2 + 15 * 10
        assert record.gpu_seconds > 0
        assert (record.user, record.api_key.created_by) == (owner.user, owner.user)  # type: ignore[union-attr]
    reader = client_with(owner.caller.organization, "usage.read")
    page = reader.get(f"/v1/organization/usage/all?start_time={int(time.time()) - 86_400}")
    assert page.json()["data"][-1]["results"][0]["num_model_requests"] == 4


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("field", ["tokens_per_month", "budget_per_month"])
def test_who_has_used_up_the_month_is_refused(owner: Person, field: str) -> None:
    Model.objects.filter(name="echo").update(input_price=1_000_000, output_price=1_000_000)
    quota = limit(owner, **{field: 300})
    assert post(owner.api, CHAT, HELLO).status_code == 200
    wait_for(lambda: usage(owner))
    with scopes_disabled():
        Quota.objects.filter(pk=quota.pk).update(**{field: 8})
    response = post(owner.api, CHAT, HELLO)
    assert_refused(response, 429, field, "insufficient_quota")
    assert response["x-should-retry"] == "false"


@pytest.mark.usefixtures("worker")
def test_an_estimate_over_the_limit_is_refused_before_it_runs(owner: Person) -> None:
    limit(owner, tokens_per_month=1000)
    large = HELLO | {"max_tokens": 5_000}
    assert_refused(post(owner.api, CHAT, large), 429, "tokens_per_month", "insufficient_quota")
    assert post(owner.api, CHAT, HELLO | {"max_tokens": 50}).status_code == 200


def test_of_two_at_once_only_one_has_the_last_of_a_quota(owner: Person, script: Script) -> None:
    limit(owner, tokens_per_month=400)
    script.reply = hold
    wish("echo")
    with running():
        served()
        asking = [_Asking(owner, HELLO), _Asking(owner, HELLO)]
        wait_for(lambda: len(script.flying) == 1 and any(not each.is_alive() for each in asking))
        script.reply = answer
        assert sorted(each.status for each in asking) == [200, 429]


def test_other_limits_of_batches_are_not_met(owner: Person, script: Script) -> None:
    limit(owner, concurrent_batches=0, enqueued_tokens=0, requests_per_batch=0)
    script.reply = hold
    wish("echo")
    with running():
        served()
        asking = _Asking(owner, HELLO)
        wait_for(lambda: len(script.flying) == 1)
        used = {each["name"]: each for each in _limits(owner)}
        assert (used["concurrent_batches"]["used"], used["enqueued_tokens"]["used"]) == (0, 0)
        script.reply = answer
        assert asking.status == 200


def _limits(person: Person) -> list[dict[str, Any]]:
    reader = client_with(person.caller.organization, "admin.read")
    return list(reader.get("/v1/organization/limits").json()["data"])


def test_what_a_killed_worker_left_reserved_is_forgotten(owner: Person) -> None:
    with scopes_disabled():
        for id, hours in (("req_old", 1), ("req_new", 0), ("batch_old", 1)):
            Reservation.objects.create(
                batch_id=id,
                organization=owner.caller.organization,
                project=owner.caller.project,
                created_at=timezone.now() - timedelta(hours=hours),
            )
        forget_real_time_requests()
        left = set(Reservation.objects.values_list("pk", flat=True))
        Reservation.objects.all().delete()
    assert left == {"req_new", "batch_old"}
