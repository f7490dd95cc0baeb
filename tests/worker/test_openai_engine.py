"""The engine for OpenAI-compatible servers, against a server in this process.

Retries and errors are what matters here; the answers' content is the server's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from typing import Any

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from worker.engines import openai
from worker.engines.base import (
    Answer,
    Chunk,
    EngineAway,
    EngineDied,
    LoadFailed,
    ModelSpec,
    Refused,
    Usage,
)
from worker.engines.openai import OpenAIEngine

CHAT = "/v1/chat/completions"
BODY = {"model": "ours", "messages": [{"role": "user", "content": "A private question"}]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
SECRET = "sk-remote-1234567890"


@pytest.fixture(scope="module")
def server() -> Iterator[HTTPServer]:
    with HTTPServer(threaded=True) as running:
        yield running


@pytest.fixture
def remote(server: HTTPServer) -> Iterator[HTTPServer]:
    server.expect_request("/v1/models").respond_with_json({"object": "list", "data": []})
    yield server
    server.clear()


def spec_of(server: HTTPServer, base: str = "/v1", **changes: Any) -> ModelSpec:
    args = {"backoff_seconds": 0.001, **changes.pop("engine_args", {})}
    fields = {"source": "theirs", "secret": SECRET, **changes}
    return ModelSpec(
        "ours", engine="openai", base_url=server.url_for(base), engine_args=args, **fields
    )


def use(spec: ModelSpec, work: Callable[[OpenAIEngine], Coroutine[Any, Any, Any]]) -> Any:
    async def inside() -> Any:
        engine = OpenAIEngine(spec)
        await engine.load()
        try:
            return await work(engine)
        finally:
            await engine.unload()

    return asyncio.run(inside())


def ask(spec: ModelSpec, body: dict[str, Any] | None = None) -> Answer:
    answer: Answer = use(spec, lambda engine: engine.answer(CHAT, body or BODY))
    return answer


def error_of(answer: Answer) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(answer.body)["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    return error


class Remote:
    """A handler that gives the replies in turn, the last one for ever, and keeps the requests."""

    def __init__(self, server: HTTPServer, *replies: Response) -> None:
        self.replies = list(replies)
        self.requests: list[tuple[dict[str, Any], dict[str, str]]] = []
        server.expect_request(CHAT, method="POST").respond_with_handler(self)

    def __call__(self, request: Request) -> Response:
        self.requests.append((json.loads(request.get_data()), dict(request.headers)))
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


def reply(status: int = 200, body: Any = None, **headers: str) -> Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    raw = body if isinstance(body, str) else json.dumps(body or {"model": "theirs", "usage": USAGE})
    return Response(raw, status=status, headers=named)


@pytest.mark.parametrize("base", ["/v1", "/v1/", "", "/"])
def test_base_url_works_with_and_without_v1(remote: HTTPServer, base: str) -> None:
    seen = Remote(remote, reply())
    answer = ask(spec_of(remote, base))
    assert (answer.status, len(seen.requests)) == (200, 1)


def test_base_url_may_have_a_path(remote: HTTPServer) -> None:
    remote.expect_request("/proxy/v1/models").respond_with_json({"data": []})
    remote.expect_request("/proxy/v1/embeddings").respond_with_json({"data": [1]})
    answer = use(spec_of(remote, "/proxy/v1"), lambda engine: engine.answer("/v1/embeddings", BODY))
    assert json.loads(answer.body) == {"data": [1]}


def test_model_is_translated_both_ways(remote: HTTPServer) -> None:
    seen = Remote(remote, reply())
    answer = ask(spec_of(remote), {**BODY, "strange": [1]})
    assert seen.requests[0][0] == {**BODY, "model": "theirs", "strange": [1]}
    assert json.loads(answer.body) == {"model": "ours", "usage": USAGE}
    assert answer.usage == Usage(input=3, output=5)


@pytest.mark.parametrize("source", ["", "none"])
def test_model_stays_without_a_source(remote: HTTPServer, source: str) -> None:
    seen = Remote(remote, reply())
    ask(spec_of(remote, source=source))
    assert seen.requests[0][0]["model"] == "ours"


def test_callers_body_is_not_changed(remote: HTTPServer) -> None:
    Remote(remote, reply())
    body = dict(BODY)
    ask(spec_of(remote), body)
    assert body == BODY


def test_secret_is_sent_as_bearer(remote: HTTPServer) -> None:
    seen = Remote(remote, reply())
    ask(spec_of(remote))
    assert seen.requests[0][1]["Authorization"] == f"Bearer {SECRET}"


def test_no_secret_means_no_header(remote: HTTPServer) -> None:
    seen = Remote(remote, reply())
    ask(spec_of(remote, secret=""))
    assert "Authorization" not in seen.requests[0][1]


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504])
def test_passing_troubles_are_retried(remote: HTTPServer, status: int) -> None:
    seen = Remote(remote, reply(status, "busy"), reply(status, "busy"), reply())
    answer = ask(spec_of(remote))
    assert (answer.status, len(seen.requests)) == (200, 3)


@pytest.mark.parametrize("status", [400, 404, 413, 422, 501])
def test_refusals_are_not_retried(remote: HTTPServer, status: int) -> None:
    refusal = {"message": "No.", "type": "t", "param": "p", "code": "c"}
    seen = Remote(remote, reply(status, {"error": refusal}))
    answer = ask(spec_of(remote))
    assert (answer.status, len(seen.requests)) == (status, 1)
    assert error_of(answer) == refusal


def test_the_last_error_is_the_answer(remote: HTTPServer) -> None:
    seen = Remote(remote, reply(500, {"error": {"message": "Full."}}))
    answer = ask(spec_of(remote, engine_args={"max_retries": 2}))
    assert (answer.status, len(seen.requests)) == (500, 3)
    assert error_of(answer) == {
        "message": "Full.",
        "type": "server_error",
        "param": None,
        "code": None,
    }


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<html>nginx</html>", "<html>nginx</html>"),
        ('{"error": "plain"}', "plain"),
        ('{"object": "error", "message": "old vLLM"}', "old vLLM"),
        ("", "HTTP 400"),
    ],
)
def test_any_error_gets_openais_shape(remote: HTTPServer, body: str, message: str) -> None:
    Remote(remote, Response(body, status=400))
    assert error_of(ask(spec_of(remote)))["message"] == message


def test_a_refused_secret_shows_nothing_of_it(remote: HTTPServer) -> None:
    Remote(remote, reply(401, {"error": {"message": f"Incorrect API key {SECRET[:10]}***"}}))
    answer = ask(spec_of(remote))
    assert answer.status == 401
    assert error_of(answer)["message"] == "The remote engine refuses this portal's secret"


def test_the_secret_is_cut_out_of_messages(remote: HTTPServer) -> None:
    Remote(remote, reply(400, {"error": {"message": f"header Bearer {SECRET} is odd"}}))
    assert error_of(ask(spec_of(remote)))["message"] == "header Bearer … is odd"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that the engine asks for; none is waited for."""
    asked: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float, *rest: Any) -> None:
        asked.append(seconds)
        await sleep(0)

    monkeypatch.setattr(openai.asyncio, "sleep", note)
    return asked


@pytest.mark.parametrize(
    ("headers", "pause"),
    [
        ({"retry_after": "7"}, 7.0),
        ({"retry_after": "1.5"}, 1.5),
        ({"retry_after_ms": "250", "retry_after": "9"}, 0.25),
        ({"retry_after": "9000"}, 60.0),
        ({"retry_after": "Mon, 01 Jan 2024 00:00:00 GMT"}, 0.0),
    ],
)
def test_the_server_says_how_long_to_wait(
    remote: HTTPServer, pauses: list[float], headers: dict[str, str], pause: float
) -> None:
    Remote(remote, reply(429, "slow down", **headers), reply())
    assert ask(spec_of(remote)).status == 200
    assert pauses == [pause]


@pytest.mark.parametrize("header", ["soon", "-3", "nan", "inf"])
def test_nonsense_in_retry_after_is_ignored(
    remote: HTTPServer, pauses: list[float], header: str
) -> None:
    Remote(remote, reply(429, "slow down", retry_after=header), reply())
    assert ask(spec_of(remote, engine_args={"backoff_seconds": 0})).status == 200
    assert pauses == [0]


def test_pauses_double_up_to_a_cap_and_are_random(
    remote: HTTPServer, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai.random, "uniform", lambda low, high: (low, high))
    Remote(remote, reply(500, "down"))
    ask(spec_of(remote, engine_args={"backoff_seconds": 10, "max_retries": 4}))
    assert pauses == [(0, 10.0), (0, 20.0), (0, 40.0), (0, 60.0)]


def test_redirects_are_not_followed(remote: HTTPServer) -> None:
    remote.expect_request("/elsewhere").respond_with_json({"model": "wrong"})
    Remote(remote, reply(307, "", Location=remote.url_for("/elsewhere")))
    assert ask(spec_of(remote)).status == 502
    assert [request.path for request, _ in remote.log] == ["/v1/models", CHAT]


def test_an_answer_without_json_is_an_error(remote: HTTPServer) -> None:
    Remote(remote, reply(200, "hello"))
    answer = ask(spec_of(remote))
    assert answer.status == 502
    assert error_of(answer)["message"] == "The remote engine gave no JSON answer (HTTP 200)"


def test_an_answer_is_bounded(remote: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "BODY_LIMIT", 1000)
    seen = Remote(remote, reply(200, {"text": "x" * 1000}))
    answer = ask(spec_of(remote))
    assert (answer.status, len(seen.requests)) == (502, 1)
    assert error_of(answer)["message"] == "The remote answer exceeds 1000 bytes"


def test_a_slow_request_fails_alone_and_is_not_generated_again(remote: HTTPServer) -> None:
    asked = []

    def slow(request: Request) -> Response:
        asked.append(1)
        time.sleep(0.3)
        return reply()

    remote.expect_request(CHAT).respond_with_handler(slow)
    args = {"timeout_seconds": 0.1, "max_retries": 5}
    answer = ask(spec_of(remote, engine_args=args))
    assert (answer.status, len(asked)) == (504, 1)
    assert error_of(answer)["message"] == "The remote engine did not answer in 0.1 seconds"


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_server_that_cannot_be_had_is_away(remote: HTTPServer, status: int) -> None:
    seen = Remote(remote, reply(status, "busy"))
    with pytest.raises(EngineAway, match=f"is away: HTTP {status}"):
        ask(spec_of(remote, engine_args={"max_retries": 2}))
    assert len(seen.requests) == 3


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_who_waits_is_told_of_it_at_once_or_after_the_retries(
    remote: HTTPServer, status: int
) -> None:
    Remote(remote, reply(status, {"error": {"message": "Gone."}}))
    spec = spec_of(remote, engine_args={"max_retries": 1})
    answer = use(spec, lambda engine: engine.answer(CHAT, BODY, urgent=True))
    assert (answer.status, error_of(answer)["code"]) == (503, "engine_away")
    refused = refusal(spec)
    assert (refused.status, error_of(refused)["message"]) == (503, "Gone.")


@pytest.mark.parametrize(("status", "is_its_own"), [(502, True), (504, True), (503, False)])
def test_what_fails_while_others_are_answered_is_no_sign_of_a_server_that_is_away(
    remote: HTTPServer, status: int, is_its_own: bool
) -> None:
    failed, answered = threading.Event(), threading.Event()

    def handle(request: Request) -> Response:
        if b"too much" not in request.get_data():
            return reply()
        if failed.is_set():
            answered.wait(30)
        failed.set()
        return reply(status, "no")

    remote.expect_request(CHAT).respond_with_handler(handle)

    async def work(engine: OpenAIEngine) -> Any:
        hard = asyncio.create_task(engine.answer(CHAT, BODY | {"user": "too much"}))
        await asyncio.to_thread(failed.wait, 30)
        await asyncio.sleep(0.1)  # until the failure is here
        assert (await engine.answer(CHAT, BODY)).ok
        answered.set()
        return (await asyncio.gather(hard, return_exceptions=True))[0]

    found = use(spec_of(remote, engine_args={"max_retries": 1}), work)
    if is_its_own:
        assert found.status == status
    else:
        assert isinstance(found, EngineAway)


def test_what_was_begun_before_shows_nothing_of_a_server_that_is_away(remote: HTTPServer) -> None:
    """A server that ends takes nothing more, and finishes what it has."""
    failed = threading.Event()

    def handle(request: Request) -> Response:
        if b"early" in request.get_data():
            failed.wait(30)
            return reply()
        failed.set()
        return reply(502, "ending")

    remote.expect_request(CHAT).respond_with_handler(handle)

    async def work(engine: OpenAIEngine) -> list[Any]:
        early = asyncio.create_task(engine.answer(CHAT, BODY | {"user": "early"}))
        await asyncio.sleep(0.1)
        late = asyncio.create_task(engine.answer(CHAT, BODY))
        return await asyncio.gather(early, late, return_exceptions=True)

    args = {"max_retries": 3, "backoff_seconds": 0.2}
    first, last = use(spec_of(remote, engine_args=args), work)
    assert first.ok
    assert isinstance(last, EngineAway)


def test_a_lost_server_is_away() -> None:
    mortal = HTTPServer()
    mortal.start()
    mortal.expect_request("/v1/models").respond_with_json({"data": []})

    async def lose(engine: OpenAIEngine) -> None:
        await asyncio.to_thread(mortal.stop)
        with pytest.raises(EngineAway, match="is away: "):
            await engine.answer(CHAT, BODY)

    use(spec_of(mortal, engine_args={"max_retries": 1}), lose)


def test_a_connection_that_breaks_is_retried(remote: HTTPServer) -> None:
    """A proxy that drops the first two connections, then lets them through."""
    Remote(remote, reply())
    dropped = []

    async def work() -> Answer:
        async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if len(dropped) < 2:
                dropped.append(await reader.readline())
                writer.close()
                return
            head = await reader.readuntil(b"\r\n\r\n")
            there, back = await asyncio.open_connection(remote.host, remote.port)
            back.write(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
            back.write(await reader.readexactly(length))
            writer.write(await there.read())
            await writer.drain()
            writer.close()
            back.close()

        server = await asyncio.start_server(proxy, "127.0.0.1", 0)
        engine = OpenAIEngine(spec_of(remote))
        await engine.load()
        engine._root = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            return await engine.answer(CHAT, BODY)
        finally:
            await engine.unload()
            server.close()
            await server.wait_closed()

    assert asyncio.run(work()).status == 200
    assert dropped == [f"POST {CHAT} HTTP/1.1\r\n".encode()] * 2


def test_no_more_connections_than_asked_for(remote: HTTPServer) -> None:
    running, most = [], []

    def count(request: Request) -> Response:
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return reply()

    remote.expect_request(CHAT).respond_with_handler(count)

    async def many(engine: OpenAIEngine) -> int:
        await asyncio.gather(*(engine.answer(CHAT, BODY) for _ in range(20)))
        return engine.capacity

    assert use(spec_of(remote, engine_args={"concurrency": 3}), many) == 3
    assert max(most) == 3


def test_streaming_is_refused_without_asking(remote: HTTPServer) -> None:
    seen = Remote(remote, reply())
    answer = ask(spec_of(remote), {**BODY, "stream": True})
    assert (answer.status, error_of(answer)["param"], seen.requests) == (400, "stream", [])


def test_numbers_and_text_that_fast_json_refuses_pass(remote: HTTPServer) -> None:
    seen = Remote(remote, reply())
    odd = {**BODY, "seed": 2**70, "user": "\ud800"}
    assert ask(spec_of(remote), odd).status == 200
    assert seen.requests[0][0] == {**odd, "model": "theirs"}


def test_a_body_too_deep_to_write_is_refused(remote: HTTPServer) -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    assert ask(spec_of(remote), {**BODY, "deep": deep}).status == 400


def failure_of(spec: ModelSpec) -> str:
    with pytest.raises(LoadFailed) as failure:
        asyncio.run(OpenAIEngine(spec).load())
    return str(failure.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://host/v1",
        "host:8000",
        "http://",
        "http://h:99999",
        "http://me:pw@host",
        "http://h?x",
    ],
)
def test_load_refuses_what_is_no_web_address(url: str) -> None:
    assert failure_of(ModelSpec("ours", "", base_url=url)).startswith("base_url must ")


@pytest.mark.parametrize("status", [401, 403])
def test_load_refuses_a_wrong_secret(status: int) -> None:
    with HTTPServer() as server:
        server.expect_request("/v1/models").respond_with_data("no", status=status)
        said = failure_of(spec_of(server))
        assert said == f"{server.url_for('')[:-1]} refuses the secret (HTTP {status})"


def test_load_tolerates_a_server_without_a_model_list() -> None:
    with HTTPServer() as server:
        server.expect_request("/v1/models").respond_with_data("none", status=404)
        Remote(server, reply())
        assert ask(spec_of(server)).status == 200


@pytest.mark.parametrize("status", [301, 500, 503])
def test_load_refuses_a_server_in_trouble(status: int) -> None:
    with HTTPServer() as server:
        server.expect_request("/v1/models").respond_with_data("", status=status)
        assert failure_of(spec_of(server)) == f"{server.url_for('')[:-1]} answers HTTP {status}"


def test_load_needs_a_connection() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        said = failure_of(ModelSpec("ours", "", base_url=url))
    assert said.startswith(f"cannot reach {url}: ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"max_retry": 3}, "engine openai has no option max_retry"),
        ({"concurrency": 0}, "engine_args: concurrency must be a number of at least 1"),
        ({"concurrency": "9"}, "engine_args: concurrency must be a number of at least 1"),
        ({"max_retries": True}, "engine_args: max_retries must be a number of at least 0"),
    ],
)
def test_load_refuses_bad_options(args: dict[str, Any], message: str) -> None:
    assert failure_of(ModelSpec("ours", "", base_url="http://h", engine_args=args)) == message


def test_unloaded_engines_are_dead_and_unload_is_idempotent(remote: HTTPServer) -> None:
    async def work() -> None:
        engine = OpenAIEngine(spec_of(remote))
        with pytest.raises(EngineDied):
            await engine.answer(CHAT, BODY)
        await engine.load()
        assert engine.pids() == []
        await engine.unload()
        await engine.unload()
        with pytest.raises(EngineDied):
            await engine.answer(CHAT, BODY)

    asyncio.run(work())


def test_neither_secret_nor_body_is_logged(
    remote: HTTPServer, caplog: pytest.LogCaptureFixture
) -> None:
    Remote(remote, reply(500, "down"), reply(400, "no"))
    with caplog.at_level(logging.DEBUG):
        ask(spec_of(remote))
    assert [word for word in (SECRET, "private question") if word in caplog.text] == []


# --- Streams --------------------------------------------------------------------------------


def sse(*events: Any) -> Response:
    """A stream of these events; those that are text as they are."""
    lines = [each if isinstance(each, str) else f"data: {json.dumps(each)}\n\n" for each in events]
    return Response("".join(lines), content_type="text/event-stream")


def stream(spec: ModelSpec, body: dict[str, Any] | None = None) -> list[Chunk]:
    async def work(engine: OpenAIEngine) -> list[Chunk]:
        return [chunk async for chunk in engine.stream(CHAT, body or BODY)]

    chunks: list[Chunk] = use(spec, work)
    return chunks


def refusal(spec: ModelSpec, body: dict[str, Any] | None = None) -> Answer:
    with pytest.raises(Refused) as refused:
        stream(spec, body)
    return refused.value.answer


HI = {"model": "theirs", "choices": [{"index": 0, "delta": {"content": "hi"}}]}


def test_a_stream_is_passed_on(remote: HTTPServer) -> None:
    last = {"model": "theirs", "choices": [], "usage": USAGE}
    seen = Remote(
        remote, sse(HI, ": a comment\n\n", "event: x\nid: 3\n", HI, last, "data: [DONE]\n\n")
    )
    assert stream(spec_of(remote)) == [
        Chunk(json.dumps(HI | {"model": "ours"}, separators=(",", ":")).encode()),
        Chunk(json.dumps(HI | {"model": "ours"}, separators=(",", ":")).encode()),
        Chunk(b"", Usage(input=3, output=5)),
    ]
    assert seen.requests[0][0] == {
        **BODY,
        "model": "theirs",
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_nobody_jumps_the_remotes_queue(remote: HTTPServer) -> None:
    seen = Remote(remote, sse(HI), reply())
    stream(spec_of(remote), BODY | {"priority": -9})
    ask(spec_of(remote), BODY | {"priority": -9})
    assert [sorted(body) for body, _ in seen.requests] == [
        ["messages", "model", "stream", "stream_options"],
        ["messages", "model"],
    ]


def test_a_refusal_before_a_stream_is_not_retried(remote: HTTPServer) -> None:
    seen = Remote(remote, reply(503, {"error": {"message": "Full."}}))
    answer = refusal(spec_of(remote))
    assert (answer.status, len(seen.requests)) == (503, 1)
    assert error_of(answer)["message"] == "Full."


def test_an_error_in_a_stream_ends_it(remote: HTTPServer) -> None:
    Remote(remote, sse(HI, {"error": {"message": f"Broken {SECRET}.", "code": 500}}, HI))
    answer = refusal(spec_of(remote))
    assert (answer.status, error_of(answer)["message"]) == (502, "Broken ….")


@pytest.mark.parametrize("rest", ["data: {broken\n\n", "data: 3\n\n", "\n\n\r\n", "data:\n\n"])
def test_what_is_no_event_is_passed_over(remote: HTTPServer, rest: str) -> None:
    Remote(remote, sse(rest, HI))
    assert len(stream(spec_of(remote))) == 1


def test_an_endless_event_is_cut_off(remote: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "EVENT_LIMIT", 1000)
    Remote(remote, sse(HI, "data: " + "x" * 5000))
    answer = refusal(spec_of(remote))
    assert error_of(answer)["message"] == "The connection to the remote engine was lost"


def test_a_stream_from_nowhere_is_a_refusal(remote: HTTPServer) -> None:
    spec = spec_of(remote)

    async def work(engine: OpenAIEngine) -> Answer:
        engine._root = "http://127.0.0.1:1"
        with pytest.raises(Refused) as refused:
            await anext(engine.stream(CHAT, BODY))
        return refused.value.answer

    assert use(spec, work).status == 503


def test_whoever_stops_reading_ends_the_request(remote: HTTPServer) -> None:
    ended = threading.Event()

    def endless(request: Request) -> Response:
        def events() -> Iterator[str]:
            try:
                while True:
                    yield f"data: {json.dumps(HI)}\n\n"
                    time.sleep(0.01)
            finally:
                ended.set()

        return Response(events(), content_type="text/event-stream")

    remote.expect_request(CHAT, method="POST").respond_with_handler(endless)

    async def work(engine: OpenAIEngine) -> None:
        async with aclosing(engine.stream(CHAT, BODY)) as chunks:
            await anext(chunks)

    use(spec_of(remote), work)
    assert ended.wait(30)
