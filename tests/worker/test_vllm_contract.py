"""What the engine `vllm` promises, on real vLLM (its CPU build) with tiny models of random weights.

One engine lives at a time, as on a GPU; tests that need the same model stand together.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import inspect
import json
import os
import signal
import struct
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from models_registry import fit
from tests.worker.conftest import Loop
from worker.canary import Canary
from worker.engines.base import (
    Answer,
    Chunk,
    EngineDied,
    LoadFailed,
    ModelSpec,
    Refused,
    Report,
    Usage,
)
from worker.engines.ladder import Ladder, named
from worker.engines.vllm.engine import VllmEngine
from worker.engines.vllm.options import knows_sleep

pytest.importorskip("vllm", reason="vLLM is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("vllm"),  # one process: two engines at once would share two cores
    pytest.mark.filterwarnings("default"),  # vLLM and torch warn of their own affairs
]

CHAT, COMPLETE, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
TASKS = {"tiny-embed": "embedding", "tiny-rerank": "score"}
ARGS: dict[str, Any] = {
    "kv_cache_memory_bytes": "64M",
    "max_num_seqs": 64,
    "max-model-len": 2048,
}
CHAT_ARGS = ARGS | {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}


def living(pids: list[int]) -> list[int]:
    """Those of the processes that still run; one that ended and was not waited for does not."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def children() -> list[int]:
    """The engines' processes among this one's descendants (the test run has other services)."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(child.cmdline())
            if "multiprocessing.spawn" in command or command.startswith("VLLM::"):
                found.append(child.pid)
    return found


class Host:
    """A host with room for one engine: asking for another model swaps."""

    def __init__(self, loop: Loop, folders: dict[str, Path]) -> None:
        self.loop, self.folders = loop, folders
        self.engine: VllmEngine | None = None

    def spec(self, name: str, **changes: Any) -> ModelSpec:
        task = TASKS.get(name, "chat")
        args = CHAT_ARGS if task == "chat" else ARGS
        fields = {"source": str(self.folders[name]), "task": task, "engine_args": args}
        return ModelSpec(name, **(fields | changes))

    def use(self, name: str) -> VllmEngine:
        if self.engine is None or self.engine.spec.name != name:
            self.clear()
            self.engine = VllmEngine(self.spec(name))
            self.loop.run(self.engine.load())
        return self.engine

    def clear(self) -> None:
        if self.engine is not None:
            self.loop.run(self.engine.unload())
            self.engine = None

    def ask(self, name: str, endpoint: str, **body: Any) -> Answer:
        answer: Answer = self.loop.run(self.use(name).answer(endpoint, {"model": name, **body}))
        return answer

    def chat(self, **body: Any) -> dict[str, Any]:
        return good(self.ask("tiny-chat-a", CHAT, **{"messages": HELLO, "max_tokens": 8} | body))


@pytest.fixture(scope="module")
def host(loop: Loop, tiny_models: dict[str, Path], compiled_modules: None) -> Iterator[Host]:
    running = Host(loop, tiny_models)
    yield running
    running.clear()
    assert children() == []


def good(answer: Answer) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(answer.body)
    assert (answer.status, body.get("error")) == (200, None)
    return body


def error_of(answer: Answer, status: int = 400) -> dict[str, Any]:
    body = json.loads(answer.body)
    assert answer.status == status, body
    assert sorted(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    return error


def text_of(body: dict[str, Any]) -> str:
    text: str = body["choices"][0]["message"]["content"]
    return text


# What is estimated before a load


def test_the_estimated_cache_and_weights_are_those_that_vllm_has(host: Host) -> None:
    from safetensors.torch import load_file

    shape = fit.read(host.folders["tiny-chat-a"])
    cache = host.use("tiny-chat-a")._engine.vllm_config.cache_config
    a_block = shape.kv_bytes(cache.block_size, element=4)  # float32 on the CPU
    assert cache.num_gpu_blocks == cache.kv_cache_memory_bytes // a_block
    for folder in host.folders.values():
        tensors = load_file(folder / "model.safetensors").values()
        assert fit.read(folder).weights == sum(2 * tensor.numel() for tensor in tensors)


# Chat


def test_chat_answers_in_openais_shape(host: Host) -> None:
    answer = host.ask("tiny-chat-a", CHAT, messages=HELLO, max_tokens=8, ignore_eos=True, seed=1)
    body = good(answer)
    del body["id"], body["created"], body["system_fingerprint"]
    message = body["choices"][0]["message"]
    assert len(message.pop("content")) > 0
    prompt = body["usage"]["prompt_tokens"]
    body["usage"]["prompt_tokens_details"].pop("created_cache_tokens", None)  # since 0.32
    assert body == {
        "object": "chat.completion",
        "model": "tiny-chat-a",
        "service_tier": None,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": 8,
            "total_tokens": prompt + 8,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    assert answer.usage == Usage(input=prompt, output=8)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_chat_honours_max_tokens(host: Host, field: str) -> None:
    body = host.chat(**{"max_tokens": None, field: 5}, ignore_eos=True)
    assert body["usage"]["completion_tokens"] == 5
    assert body["choices"][0]["finish_reason"] == "length"


def test_chat_gives_n_choices(host: Host) -> None:
    body = host.chat(n=3, ignore_eos=True)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in body["choices"]}) == 3
    assert body["usage"]["completion_tokens"] == 24


def test_chat_gives_logprobs(host: Host) -> None:
    body = host.chat(logprobs=True, top_logprobs=3, temperature=0, ignore_eos=True)
    tokens = body["choices"][0]["logprobs"]["content"]
    assert len(tokens) == 8
    for token in tokens:
        assert len(token["top_logprobs"]) == 3
        best = max(token["top_logprobs"], key=lambda candidate: candidate["logprob"])
        assert (best["token"], best["logprob"]) == (token["token"], token["logprob"])
        assert bytes(token["bytes"]).decode() == token["token"]


def test_chat_at_temperature_zero_repeats_itself(host: Host) -> None:
    first, second = (text_of(host.chat(temperature=0, max_tokens=32)) for _ in range(2))
    assert first == second
    assert text_of(host.chat(max_tokens=32, seed=1)) != first


def test_seed_gives_the_same_text_alone_in_company_and_on_raw_vllm(host: Host) -> None:
    engine = host.use("tiny-chat-a")
    wanted = {"messages": HELLO, "max_tokens": 24, "temperature": 0.9, "ignore_eos": True}

    def body(seed: int, text: str = "Hello") -> dict[str, Any]:
        messages = [HELLO[0], {"role": "user", "content": text}]
        return {"model": "tiny-chat-a", **wanted, "messages": messages, "seed": seed}

    async def in_company() -> list[Answer]:
        others = [body(seed, f"Question {seed} " * (seed % 7)) for seed in range(100, 150)]
        bodies = [*others[:25], body(7), *others[25:]]
        return list(await asyncio.gather(*(engine.answer(CHAT, each) for each in bodies)))

    async def raw() -> str:
        from transformers import AutoTokenizer
        from vllm import SamplingParams

        tokenizer = AutoTokenizer.from_pretrained(engine.spec.source)
        prompt = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        params = SamplingParams(temperature=0.9, seed=7, max_tokens=24, ignore_eos=True)
        outputs = engine._engine.generate({"prompt_token_ids": ids}, params, "raw")
        text: str = [output async for output in outputs][-1].outputs[0].text
        return text

    alone = text_of(good(host.loop.run(engine.answer(CHAT, body(7)))))
    together = [text_of(good(answer)) for answer in host.loop.run(in_company())]
    assert together[25] == alone
    assert host.loop.run(raw()) == alone
    assert text_of(good(host.loop.run(engine.answer(CHAT, body(8))))) != alone
    assert len(set(together)) == 51


def test_chat_honours_stop(host: Host) -> None:
    whole = text_of(host.chat(temperature=0, max_tokens=32, ignore_eos=True))
    stop = whole[10:14]
    body = host.chat(temperature=0, max_tokens=32, ignore_eos=True, stop=[stop])
    assert text_of(body) == whole.partition(stop)[0]
    choice = body["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_chat_honours_a_json_schema(host: Host) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "size": {"enum": ["small", "large"]}},
        "required": ["ok", "size"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    for seed in range(5):
        body = host.chat(response_format=form, max_tokens=100, seed=seed)
        assert body["choices"][0]["finish_reason"] == "stop"
        made = json.loads(text_of(body))
        assert sorted(made) == ["ok", "size"]
        assert isinstance(made["ok"], bool)
        assert made["size"] in ("small", "large")


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_chat_calls_the_tool_it_must(host: Host, choice: Any) -> None:
    body = host.chat(
        tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, max_tokens=200, seed=3
    )
    (call,) = body["choices"][0]["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "get_weather")
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")


def test_unknown_fields_reach_vllm_and_its_extras_come_back(host: Host) -> None:
    body = host.chat(return_token_ids=True, min_tokens=8, no_such_field={"a": 1})
    assert len(body["choices"][0]["token_ids"]) == 8
    assert len(body["prompt_token_ids"]) == body["usage"]["prompt_tokens"]


def test_cached_tokens_are_counted(host: Host) -> None:
    long = [{"role": "user", "content": "the same words again and again " * 40}]
    first = host.ask("tiny-chat-a", CHAT, messages=long, max_tokens=1)
    second = host.ask("tiny-chat-a", CHAT, messages=long, max_tokens=1)
    assert first.usage.cached == 0
    assert 0 < second.usage.cached <= second.usage.input == first.usage.input


def test_the_callers_body_is_not_changed(host: Host) -> None:
    engine = host.use("tiny-chat-a")
    body = {"model": "tiny-chat-a", "messages": HELLO, "tools": [WEATHER], "max_tokens": 4}
    before = json.dumps(body)
    good(host.loop.run(engine.answer(CHAT, body)))
    assert json.dumps(body) == before


# Completions and responses


def test_completions_of_a_text_and_of_a_list(host: Host) -> None:
    one = good(host.ask("tiny-chat-a", COMPLETE, prompt="One", max_tokens=3, ignore_eos=True))
    assert (one["object"], one["usage"]["completion_tokens"]) == ("text_completion", 3)
    two = good(host.ask("tiny-chat-a", COMPLETE, prompt=["One", "Two"], max_tokens=3, n=2))
    assert [choice["index"] for choice in two["choices"]] == [0, 1, 2, 3]


def test_completions_echo(host: Host) -> None:
    wanted = {"prompt": "Once upon", "max_tokens": 4, "temperature": 0}
    plain = good(host.ask("tiny-chat-a", COMPLETE, **wanted))
    echoed = good(host.ask("tiny-chat-a", COMPLETE, **wanted, echo=True))
    assert echoed["choices"][0]["text"] == "Once upon" + plain["choices"][0]["text"]


def test_responses(host: Host) -> None:
    answer = host.ask("tiny-chat-a", "/v1/responses", input="Hello", max_output_tokens=6)
    body = good(answer)
    assert (body["object"], body["status"]) == ("response", "incomplete")
    assert [(item["type"], item["role"]) for item in body["output"]] == [("message", "assistant")]
    assert answer.usage == Usage(input=body["usage"]["input_tokens"], output=6)


# Refusals


BAD_CHATS: dict[str, dict[str, Any]] = {
    "messages missing": {"messages": None},
    "messages of the wrong kind": {"messages": "Hello"},
    "no messages": {"messages": []},
    "unknown role": {"messages": [{"role": 5, "content": "x"}]},
    "number as content": {"messages": [{"role": "user", "content": 5}]},
    "negative max_tokens": {"max_tokens": -1},
    "huge max_tokens": {"max_tokens": 10**30},
    "huge seed": {"seed": 2**70},
    "temperature below zero": {"temperature": -1},
    "temperature no number": {"temperature": float("nan")},
    "top_p above one": {"top_p": 2},
    "no choice": {"n": 0},
    "too many logprobs": {"logprobs": True, "top_logprobs": 10_000},
    "prompt too long": {"messages": [{"role": "user", "content": "word " * 5000}]},
    "schema that is none": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}
    },
    "tool without a name": {"tools": [{"type": "function", "function": {}}]},
    "own template": {"chat_template": "{{ 1 }}"},
    "image for a text model": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/x.png"}}],
            }
        ]
    },
    "lone surrogate in stop": {"stop": ["\ud800"]},
    "lone surrogate in the text": {"messages": [{"role": "user", "content": "\udfff"}]},
    "token ids beyond any vocabulary": {"stop_token_ids": [2**63]},
    "bias of an unknown token": {"logit_bias": {"999999": 5}},
    "bias beyond any token": {"logit_bias": {str(2**62): 5}},
    "only unknown tokens allowed": {"allowed_token_ids": [2**40]},
    "logprobs of unknown tokens": {"logprobs": True, "logprob_token_ids": [2**40]},
    "regex that is none": {"structured_outputs": {"regex": "((("}},
    "grammar that is none": {"structured_outputs": {"grammar": "root ::= ((("}},
    "streaming": {"stream": True},
    "streaming as text": {"stream": "yes"},
}


@pytest.mark.parametrize("case", BAD_CHATS)
def test_bad_bodies_are_refused(host: Host, case: str) -> None:
    body = {"messages": HELLO, "max_tokens": 4} | BAD_CHATS[case]
    error_of(host.ask("tiny-chat-a", CHAT, **body))


def test_a_schema_too_deep_is_refused(host: Host) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(2000):
        deep = {"type": "object", "properties": {"a": deep}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": deep}}
    error_of(host.ask("tiny-chat-a", CHAT, messages=HELLO, response_format=form))


def test_refusals_leave_nothing_behind_and_the_engine_lives(host: Host) -> None:
    engine = host.use("tiny-chat-a")
    assert engine._engine.get_num_unfinished_requests() == 0
    assert text_of(host.chat())


def test_another_models_name_is_not_found(host: Host) -> None:
    engine = host.use("tiny-chat-a")
    answer = host.loop.run(engine.answer(CHAT, {"model": "other", "messages": HELLO}))
    assert error_of(answer, 404)["param"] == "model"


def test_endpoints_that_the_model_cannot_do_are_refused(host: Host) -> None:
    for endpoint in (EMBED, "/v1/score", "/v1/rerank"):
        error = error_of(host.ask("tiny-chat-a", endpoint, input="x"))
        assert error["message"] == f"The model `tiny-chat-a` does not support {endpoint}"
    assert error_of(host.ask("tiny-chat-a", "/v1/images", prompt="x"), 404)["param"] is None


# Streams


def streamed(host: Host, endpoint: str = CHAT, **body: Any) -> list[Chunk]:
    engine = host.use("tiny-chat-a")

    async def collect() -> list[Chunk]:
        return [chunk async for chunk in engine.stream(endpoint, {"model": "tiny-chat-a", **body})]

    chunks: list[Chunk] = host.loop.run(collect())
    return chunks


SAME = {"messages": HELLO, "max_tokens": 8, "temperature": 0, "ignore_eos": True}


def test_a_stream_says_the_same_in_openais_shape(host: Host) -> None:
    whole = host.chat(**SAME)
    *chunks, last = streamed(host, **SAME)
    events = [json.loads(chunk.data) for chunk in chunks]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == text_of(
        whole
    )
    assert {name for event in events for name in event} <= {
        "id",
        "object",
        "created",
        "model",
        "choices",
        "system_fingerprint",
        "service_tier",
    }
    assert {name for event in events for name in event["choices"][0]} <= {
        "index",
        "delta",
        "logprobs",
        "finish_reason",
    }
    assert {name for event in events for name in event["choices"][0]["delta"]} <= {
        "role",
        "content",
    }
    assert [event["choices"][0]["finish_reason"] for event in events][-1] == "length"
    prompt = whole["usage"]["prompt_tokens"]
    assert [chunk.usage.output for chunk in chunks if chunk.usage][-1] == 8
    assert (last.data, last.usage and (last.usage.input, last.usage.output)) == (b"", (prompt, 8))


def test_usage_comes_in_the_last_event_for_who_asks(host: Host) -> None:
    *chunks, last = streamed(host, **SAME, stream_options={"include_usage": True})
    assert all("usage" not in json.loads(chunk.data) for chunk in chunks)
    event = json.loads(last.data)
    assert (event["choices"], event["usage"]["completion_tokens"]) == ([], 8)


def test_completions_and_several_choices_are_streamed(host: Host) -> None:
    body = {"prompt": "Once", "n": 2, "max_tokens": 4, "ignore_eos": True}
    events = [json.loads(chunk.data) for chunk in streamed(host, COMPLETE, **body) if chunk.data]
    texts: dict[int, str] = {0: "", 1: ""}
    for event in events:
        assert set(event["choices"][0]) <= {"index", "text", "logprobs", "finish_reason"}
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert all(texts.values())


@pytest.mark.parametrize(
    ("endpoint", "body", "status"),
    [
        (CHAT, {"messages": HELLO, "temperature": -1}, 400),
        (CHAT, {"messages": HELLO, "stream_options": "all"}, 400),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 3000}]}, 400),
        (CHAT, {"messages": HELLO, "model": "other"}, 404),
        (EMBED, {"input": "x"}, 400),
    ],
)
def test_a_stream_is_refused_before_it_begins(
    host: Host, endpoint: str, body: dict[str, Any], status: int
) -> None:
    with pytest.raises(Refused) as refused:
        streamed(host, endpoint, **body)
    error_of(refused.value.answer, status)


def test_whoever_stops_reading_a_stream_aborts_it_in_the_engine(host: Host) -> None:
    engine = host.use("tiny-chat-a")
    body = {"model": "tiny-chat-a", "messages": HELLO, "max_tokens": 1900, "ignore_eos": True}

    async def read_one() -> Usage | None:
        async with contextlib.aclosing(engine.stream(CHAT, body)) as chunks:
            await anext(chunks)
            chunk = await anext(chunks)
        while engine._engine.get_num_unfinished_requests():
            await asyncio.sleep(0.01)
        return chunk.usage

    usage = host.loop.run(read_one(), timeout=30)
    assert usage is not None
    assert 1 <= usage.output < 1900
    assert engine._in_flight == set()


def test_what_somebody_waits_for_goes_before_batches_whatever_they_say(host: Host) -> None:
    """The engine runs 64 at once: of 200 that came before, most still wait."""
    engine = host.use("tiny-chat-a")
    body = {"model": "tiny-chat-a", "messages": HELLO, "ignore_eos": True, "priority": -9}

    async def overtake() -> int:
        batch = [
            asyncio.create_task(engine.answer(CHAT, body | {"max_tokens": 100})) for _ in range(200)
        ]
        while engine._engine.get_num_unfinished_requests() < 200:
            await asyncio.sleep(0.01)
        async with contextlib.aclosing(engine.stream(CHAT, body | {"priority": 9})) as chunks:
            await anext(chunks)
        left = sum(not task.done() for task in batch)
        await asyncio.gather(*batch)
        return left

    assert host.loop.run(overtake()) > 64


# The engine's life


def test_capacity_is_more_than_the_engine_runs_at_once(host: Host) -> None:
    engine = host.use("tiny-chat-a")
    assert (engine.capacity, engine.cache_tokens) == (128, 131_072)


def test_many_at_once_are_all_answered_and_the_engine_tells_how_it_gets_on(host: Host) -> None:
    engine = host.use("tiny-chat-a")
    reports: list[Report | None] = []
    engine.on_report = lambda: reports.append(engine.report)

    async def many() -> list[Answer]:
        body = {"model": "tiny-chat-a", "messages": HELLO, "max_tokens": 4, "ignore_eos": True}
        return list(await asyncio.gather(*(engine.answer(CHAT, body) for _ in range(300))))

    assert [answer.usage.output for answer in host.loop.run(many())] == [4] * 300
    told = [report for report in reports if report is not None]
    assert len(told) == len(reports) > 16  # four steps for each of five engine-fulls, and more
    assert max(report.running for report in told) >= 64
    assert max(report.waiting for report in told) > 64
    assert told[-1].waiting == 0
    # What each request and token would cost is not counted.
    assert (engine._engine.log_stats, engine._engine.output_processor.log_stats) == (False, False)


@pytest.mark.parametrize("several", [{}, {"n": 3}])
def test_the_engine_tells_what_it_has_done_of_what_is_under_way(
    host: Host, several: dict[str, int]
) -> None:
    engine = host.use("tiny-chat-a")
    body = {"model": "tiny-chat-a", "messages": HELLO, "max_tokens": 300, "ignore_eos": True}

    async def watched() -> tuple[Answer, list[int | None]]:
        told = [engine.tokens_under_way()]
        task = asyncio.create_task(engine.answer(CHAT, body | several))
        while not task.done():
            told.append(await asyncio.to_thread(engine.tokens_under_way))
            await asyncio.sleep(0.002)
        return task.result(), told

    answer, told = host.loop.run(watched())
    known = [each or 0 for each in told if each is not None]
    assert len(known) == len(told)
    assert (known[0], engine.tokens_under_way()) == (0, 0)
    begun = [each for each in known if each]
    assert answer.usage.input < begun[0] < begun[len(begun) // 2]
    assert answer.usage.output / 2 < max(known) <= answer.usage.input + answer.usage.output


def test_an_unloaded_engine_tells_of_nothing_under_way() -> None:
    assert VllmEngine(ModelSpec("m", "m")).tokens_under_way() is None


def test_cancelling_an_answer_aborts_it_in_the_engine(host: Host) -> None:
    engine = host.use("tiny-chat-a")
    body = {"model": "tiny-chat-a", "messages": HELLO, "max_tokens": 1900, "ignore_eos": True}

    async def cancel() -> int:
        task = asyncio.create_task(engine.answer(CHAT, body))
        while engine._engine.get_num_unfinished_requests() == 0:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        unfinished: int = engine._engine.get_num_unfinished_requests()
        return unfinished

    assert host.loop.run(cancel()) == 0
    assert engine._in_flight == set()


def test_killed_engine_fails_all_in_flight_and_loads_again(host: Host) -> None:
    engine = host.use("tiny-chat-a")
    pids = engine.pids()
    assert pids == children()
    body = {"model": "tiny-chat-a", "messages": HELLO, "max_tokens": 1900, "ignore_eos": True}

    async def read() -> None:
        async for _ in engine.stream(CHAT, body):
            pass

    async def kill() -> list[Any]:
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(engine.answer(CHAT, body)) for _ in range(99)
        ]
        tasks.append(asyncio.create_task(read()))
        while engine._engine.get_num_unfinished_requests() < 100:
            await asyncio.sleep(0.01)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    ends = host.loop.run(kill(), timeout=30)
    assert [type(end) for end in ends] == [EngineDied] * 100
    with pytest.raises(EngineDied):
        host.loop.run(engine.answer(CHAT, body))
    host.loop.run(engine.unload())
    assert living(pids) == []
    host.loop.run(engine.load())
    assert text_of(host.chat())
    assert set(engine.pids()).isdisjoint(pids)


def test_swap_leaves_no_process_of_the_old_model(host: Host) -> None:
    old = host.use("tiny-chat-a")
    pids = old.pids()
    new = host.use("tiny-chat-b")
    assert living(pids) == []
    assert new.pids() == children()
    body = good(host.ask("tiny-chat-b", CHAT, messages=HELLO, max_tokens=4))
    assert body["model"] == "tiny-chat-b"


def test_unload_fails_what_is_in_flight_and_is_idempotent(host: Host) -> None:
    engine = host.use("tiny-chat-b")
    body = {"model": "tiny-chat-b", "messages": HELLO, "max_tokens": 1900, "ignore_eos": True}

    async def unload() -> Any:
        task = asyncio.create_task(engine.answer(CHAT, body))
        while engine._engine.get_num_unfinished_requests() == 0:
            await asyncio.sleep(0.01)
        await engine.unload()
        await engine.unload()
        return (await asyncio.gather(task, return_exceptions=True))[0]

    assert type(host.loop.run(unload())) is EngineDied
    assert (engine.pids(), children()) == ([], [])
    host.engine = None


def failure_of(host: Host, **changes: Any) -> str:
    engine = VllmEngine(host.spec("tiny-chat-a", **changes))
    with pytest.raises(LoadFailed) as failure:
        host.loop.run(engine.load())
    assert (engine.pids(), children()) == ([], [])
    assert "\n" not in str(failure.value)
    return str(failure.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"max_model_lenn": 9},
            "vLLM has no option --max-model-lenn; did you mean --max-model-len?",
        ),
        ({"model": "/x"}, "engine_args cannot set model: the model's entry does"),
        (
            {"dtype": "float3"},
            "vLLM refuses the engine_args: argument --dtype: invalid choice: 'float3' (choose from "
            "'auto', 'bfloat16', 'float', 'float16', 'float32', 'half')",
        ),
    ],
)
def test_bad_options_say_what_is_wrong(host: Host, args: dict[str, Any], message: str) -> None:
    host.clear()
    assert failure_of(host, engine_args=args) == message


def test_a_missing_folder_says_so(host: Host) -> None:
    host.clear()
    assert "/no/such/folder" in failure_of(host, source="/no/such/folder")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "/no/such/folder"}, "There is no /no/such/folder on this host."),
        ({"engine_args": {"model": "/x"}}, "engine_args cannot set model: the model's entry does"),
        (
            {"settled": {"max-num-seqs": "many"}},
            "vLLM refuses the engine_args: argument --max-num-seqs: invalid int value: 'many'",
        ),
        ({}, None),
    ],
)
def test_what_can_be_known_without_loading_is_found_by_the_check(
    host: Host, changes: dict[str, Any], message: str | None
) -> None:
    before = children()
    engine = VllmEngine(host.spec("tiny-chat-a", **changes))
    if message is None:
        host.loop.run(engine.check())
    else:
        with pytest.raises(LoadFailed) as failure:
            host.loop.run(engine.check())
        assert str(failure.value) == message
    assert children() == before


def test_a_model_with_too_long_a_context_is_loaded_beside_one_that_sleeps(host: Host) -> None:
    """The whole way of a swap without its effect on memory: on a CPU, sleep frees none.

    Untested here, for want of a GPU: `enable_sleep_mode`, what is freed, out of memory in CUDA.
    """
    host.clear()
    asleep = host.use("tiny-chat-b")
    canary = Canary(asleep, asleep.spec)
    host.loop.run(canary.learn())
    assert (canary.heard, asleep.can_sleep) == (True, False)
    host.loop.run(asleep.sleep())
    assert host.loop.run(asleep._engine.is_sleeping())

    args = {"kv_cache_memory_bytes": "1600K", "max_num_seqs": 64}  # of 4,096 tokens 2 MiB
    ladder = Ladder(stated=set(map(named, args)))
    spec = host.spec("tiny-chat-a", engine_args=args, may_sleep=True)
    awake = VllmEngine(spec)
    try:
        with pytest.raises(LoadFailed, match="larger than the available KV cache memory") as failed:
            host.loop.run(awake.load())
        assert awake.options["max-num-seqs"] == 64
        assert ladder.step(str(failed.value), awake.options)
        fits = ladder.settled["max-model-len"]
        assert ladder.settled == {"max-model-len": fits}
        awake = VllmEngine(replace(spec, settled=ladder.settled))
        host.loop.run(awake.load())
        assert awake.options["max-model-len"] == fits
        assert 2048 <= fits < 4096
        wanted = {"model": "tiny-chat-a", "messages": HELLO, "max_tokens": fits + 1}
        assert str(fits) in error_of(host.loop.run(awake.answer(CHAT, wanted)))["message"]
        assert good(host.loop.run(awake.answer(CHAT, wanted | {"max_tokens": 4})))
    finally:
        host.loop.run(awake.unload())

    assert (asleep.gone(), asleep.pids()) == (False, children())
    host.loop.run(asleep.wake())
    host.loop.run(canary.check())
    assert not host.loop.run(asleep._engine.is_sleeping())


def test_vllm_takes_what_sleep_and_waking_are_asked_with() -> None:
    from vllm.config import ModelConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    inspect.signature(AsyncLLM.sleep).bind(None, level=1)
    inspect.signature(AsyncLLM.wake_up).bind(None)
    assert "enable_sleep_mode" in {field.name for field in fields(ModelConfig)}


def test_sleep_mode_is_refused_here_and_only_asked_for_where_it_is_to_be_had(host: Host) -> None:
    host.clear()
    said = failure_of(host, engine_args=ARGS | {"enable_sleep_mode": True})
    assert said.endswith("Sleep mode is not supported on current platform.")
    assert not knows_sleep()


def test_a_failure_inside_the_engine_process_says_why(host: Host) -> None:
    host.clear()
    said = failure_of(host, engine_args=ARGS | {"kv_cache_memory_bytes": "64K"})
    assert said.startswith("ValueError: No available memory for the cache blocks.")


def test_a_cancelled_load_leaves_nothing(host: Host) -> None:
    host.clear()
    engine = VllmEngine(host.spec("tiny-chat-a"))

    async def cancel() -> None:
        task = asyncio.create_task(engine.load())
        while not engine.pids():
            await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    host.loop.run(cancel())
    assert (engine.pids(), children()) == ([], [])


# Embeddings


def test_embeddings_as_floats_and_as_base64(host: Host) -> None:
    texts = ["One text", "Another"]
    floats = good(host.ask("tiny-embed", EMBED, input=texts))
    packed = good(host.ask("tiny-embed", EMBED, input=texts, encoding_format="base64"))
    assert [item["index"] for item in floats["data"]] == [0, 1]
    for one, other in zip(floats["data"], packed["data"], strict=True):
        raw = base64.b64decode(other["embedding"])
        assert list(struct.unpack("<64f", raw)) == pytest.approx(one["embedding"], abs=1e-6)
        assert sum(value * value for value in one["embedding"]) == pytest.approx(1, abs=1e-4)


def test_embeddings_count_their_tokens(host: Host) -> None:
    answer = host.ask("tiny-embed", EMBED, input=[[5, 6, 7], [8]])
    assert answer.usage == Usage(input=4)
    assert good(answer)["usage"] == {
        "prompt_tokens": 4,
        "total_tokens": 4,
        "completion_tokens": 0,
    }


@pytest.mark.parametrize(
    "body",
    [
        {"input": "x", "dimensions": 7},
        {"input": []},
        {},
        {"input": "x", "encoding_format": "bytes"},
    ],
)
def test_embeddings_refuse(host: Host, body: dict[str, Any]) -> None:
    error_of(host.ask("tiny-embed", EMBED, **body))


def test_an_embedding_model_does_not_chat(host: Host) -> None:
    for endpoint in (CHAT, COMPLETE, "/v1/responses"):
        error = error_of(host.ask("tiny-embed", endpoint, messages=HELLO))
        assert error["message"] == f"The model `tiny-embed` does not support {endpoint}"


# Score and rerank


def test_score_and_rerank_agree(host: Host) -> None:
    texts = ["apples", "trains and planes", "x"]
    scored = host.ask("tiny-rerank", "/v1/score", text_1="fruit", text_2=texts)
    scores = [item["score"] for item in good(scored)["data"]]
    assert len(set(scores)) == 3
    assert scored.usage.input > 0
    ranked = good(host.ask("tiny-rerank", "/v1/rerank", query="fruit", documents=texts))["results"]
    order = sorted(range(3), key=lambda index: -scores[index])
    assert [result["index"] for result in ranked] == order
    assert [result["relevance_score"] for result in ranked] == pytest.approx(
        [scores[index] for index in order], abs=1e-5
    )


def test_rerank_honours_top_n(host: Host) -> None:
    body = {"query": "fruit", "documents": ["a", "b", "c"], "top_n": 1}
    assert len(good(host.ask("tiny-rerank", "/v1/rerank", **body))["results"]) == 1


def test_score_refuses(host: Host) -> None:
    error_of(host.ask("tiny-rerank", "/v1/score", text_1="x"))
