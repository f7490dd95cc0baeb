"""The instant engine: its answers, its delay, its deaths, and where it is refused."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import orjson
import pytest

from worker.engines import make
from worker.engines.base import Answer, Chunk, EngineDied, LoadFailed, ModelSpec, Usage
from worker.engines.instant import InstantEngine

CHAT = "/v1/chat/completions"


def engine(**engine_args: Any) -> InstantEngine:
    return InstantEngine(ModelSpec("echo", "none", engine="instant", engine_args=engine_args))


def ask(*bodies: dict[str, Any], endpoint: str = CHAT, **engine_args: Any) -> list[Any]:
    """What each request got: an answer or an error."""

    async def run() -> list[Any]:
        made = engine(**engine_args)
        await made.load()
        calls = [made.answer(endpoint, body) for body in bodies]
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(run())


def chat(said: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": said}]}


@pytest.mark.parametrize(
    ("endpoint", "body", "path"),
    [
        (CHAT, chat("hi"), ["choices", 0, "message", "content"]),
        ("/v1/completions", {"prompt": "hi"}, ["choices", 0, "text"]),
        ("/v1/responses", {"input": "hi"}, ["output", 0, "content", 0, "text"]),
        (
            "/v1/rerank",
            {"query": "hi", "documents": ["a"]},
            ["results", 0, "document", "text"],
        ),
    ],
)
def test_it_repeats_what_it_was_told(endpoint: str, body: dict[str, Any], path: list[Any]) -> None:
    [answer] = ask(body, endpoint=endpoint)
    found = orjson.loads(answer.body)
    assert (answer.status, found["model"]) == (200, "echo")
    for step in path:
        found = found[step]
    assert found == "hi"


@pytest.mark.parametrize("endpoint", ["/v1/embeddings", "/v1/score"])
def test_it_answers_every_endpoint(endpoint: str) -> None:
    [answer] = ask({"input": "hi"}, endpoint=endpoint)
    assert len(orjson.loads(answer.body)["data"]) == 1


@pytest.mark.parametrize(
    "body", [{}, {"messages": []}, {"messages": [3]}, chat(None), chat([{"type": "text"}])]
)
def test_a_strange_body_is_answered_too(body: dict[str, Any]) -> None:
    [answer] = ask(body)
    assert answer.status == 200


def test_tokens_are_counted_by_the_length() -> None:
    [answer] = ask(chat("x" * 40))
    assert (answer.usage.input, answer.usage.output) == (11, 11)
    assert orjson.loads(answer.body)["usage"]["total_tokens"] == 22


def test_a_delay_is_kept() -> None:
    before = time.monotonic()
    ask(chat("hi"), delay_ms=50)
    assert time.monotonic() - before >= 0.05


def test_no_more_run_at_a_time_than_it_was_told() -> None:
    before = time.monotonic()
    ask(*[chat("hi")] * 6, delay_ms=20, concurrency=2)
    assert time.monotonic() - before >= 0.06
    assert engine(concurrency=2).capacity == 2


def test_it_dies_of_its_poison_with_all_that_is_in_flight() -> None:
    found = ask(chat("a"), chat("the poison"), chat("b"), delay_ms=10_000, die_on="poison")
    assert [type(each) for each in found] == [EngineDied] * 3


def test_once_dead_it_is_dead_until_it_is_loaded_again() -> None:
    async def run() -> list[Any]:
        made = engine(die_on="poison")
        await made.load()
        found = []
        for said in ("poison", "hi"):
            found += await asyncio.gather(made.answer(CHAT, chat(said)), return_exceptions=True)
        await made.load()
        return [*found, await made.answer(CHAT, chat("hi"))]

    assert [type(each) for each in asyncio.run(run())] == [EngineDied, EngineDied, Answer]


def test_an_unload_ends_what_is_in_flight() -> None:
    async def run() -> Any:
        made = engine(delay_ms=60_000)
        await made.load()
        task = asyncio.create_task(made.answer(CHAT, chat("hi")))
        await asyncio.sleep(0)
        await made.unload()
        await made.unload()
        return await asyncio.gather(task, return_exceptions=True)

    assert [type(each) for each in asyncio.run(run())] == [EngineDied]


def test_it_is_refused_in_production(settings: Any) -> None:
    settings.PRODUCTION = True
    with pytest.raises(LoadFailed, match="not in production"):
        asyncio.run(engine().load())


def test_it_is_made_by_its_name_and_has_no_processes() -> None:
    made = make(ModelSpec("echo", "none", engine="instant"), None)
    assert isinstance(made, InstantEngine)
    assert made.pids() == []


def test_there_is_no_engine_of_an_unknown_name() -> None:
    with pytest.raises(LoadFailed, match="There is no engine 'other'"):
        make(ModelSpec("echo", "none", engine="other"), None)


def streamed(body: dict[str, Any], endpoint: str = CHAT, **engine_args: Any) -> list[Chunk]:
    async def run() -> list[Chunk]:
        made = engine(**engine_args)
        await made.load()
        return [chunk async for chunk in made.stream(endpoint, body)]

    return asyncio.run(run())


@pytest.mark.parametrize("said", ["one two\n three", "", "   "])
def test_a_stream_repeats_it_word_by_word(said: str) -> None:
    *words, last = streamed(chat(said))
    choices = [orjson.loads(chunk.data)["choices"][0] for chunk in words]
    assert "".join(choice["delta"]["content"] for choice in choices) == said
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(words) - 1) + ["stop"]
    assert last == Chunk(b"", Usage(input=len(said) // 4 + 1, output=len(words)))


def test_a_completion_is_streamed_too() -> None:
    chunks = streamed({"prompt": "one two"}, "/v1/completions")
    assert [orjson.loads(chunk.data)["choices"][0]["text"] for chunk in chunks[:-1]] == [
        "one ",
        "two",
    ]


def test_a_stream_takes_the_stated_time() -> None:
    started = time.monotonic()
    streamed(chat("one two three"), delay_ms=20, token_ms=20)
    assert time.monotonic() - started > 0.02 + 3 * 0.02


def test_a_stream_ends_with_the_engine() -> None:
    async def run() -> None:
        made = engine(token_ms=60_000)
        await made.load()
        chunks = made.stream(CHAT, chat("one two"))
        await anext(chunks)
        waiting = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(0)
        await made.unload()
        with pytest.raises(EngineDied):
            await waiting

    asyncio.run(run())
