"""Batches on real vLLM: models swap, requests keep their own parameters, kills lose nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import psutil
import psycopg
import pytest
from openai import OpenAI

from tests import stack as stacks
from tests.machines import machine
from tests.stack import Stack, answers, finished, send, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vllm")]

CHAT, OTHER, EMBED = "tiny-chat-a", "tiny-chat-b", "tiny-embed"
SEEDED = {
    "model": CHAT,
    "messages": [{"role": "user", "content": "Say something of your own."}],
    "seed": 7,
    "temperature": 1.0,
    "max_tokens": 12,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    maker = stacks.ROOT / "examples" / "make_tiny_models.py"
    subprocess.run([sys.executable, str(maker), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def portal(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Stack]:
    with stacks.running(tmp_path_factory.mktemp("portal"), LEASE_SECONDS="10") as stack:
        _register(stack, models)
        yield stack


def _register(stack: Stack, models: Path) -> None:
    for name, task in ((CHAT, "chat"), (OTHER, "chat"), (EMBED, "embedding")):
        tools = ["--engine-arg=tool_call_parser=hermes"] if task == "chat" else []
        source = f"--source={models / name}"
        stack.manage("register_model", name, source, f"--task={task}", *tools)


def _lines(*bodies: dict[str, Any], endpoint: str = "/v1/chat/completions") -> bytes:
    return b"".join(
        orjson.dumps(
            {"custom_id": f"request-{at}", "method": "POST", "url": endpoint, "body": body},
            option=orjson.OPT_APPEND_NEWLINE,
        )
        for at, body in enumerate(bodies)
    )


def _chat(model: str, words: str, **more: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": words}]
    return {"model": model, "messages": said, "max_tokens": 8} | more


def _bodies(stack: Stack, batch: Any) -> list[dict[str, Any]]:
    return [line["response"]["body"] for line in answers(stack.client(), batch.output_file_id)]


def test_three_models_in_three_batches_are_swapped_and_all_answered(portal: Stack) -> None:
    """Traps 1 and 2: every batch runs on its own model, through its own chat template."""
    client = portal.client()
    before = _loads(portal)
    sent = [
        send(client, _lines(*(_chat(model, f"words {at}") for at in range(20))))
        for model in (CHAT, OTHER)
    ]
    texts = [{"model": EMBED, "input": f"words {at}"} for at in range(20)]
    content = _lines(*texts, endpoint="/v1/embeddings")
    sent.append(send(client, content, endpoint="/v1/embeddings"))
    ended = [finished(client, batch.id, seconds=400) for batch in sent]
    assert [(batch.status, batch.request_counts.completed) for batch in ended] == [
        ("completed", 20)
    ] * 3
    assert [{body["model"] for body in _bodies(portal, batch)} for batch in ended] == [
        {CHAT},
        {OTHER},
        {EMBED},
    ]
    sizes = {len(body["data"][0]["embedding"]) for body in _bodies(portal, ended[2])}
    assert len(sizes) == 1
    assert _loads(portal) - before >= 2


def test_four_batches_of_two_models_from_three_tenants_share_two_workers(
    portal: Stack, tmp_path: Path
) -> None:
    """Each line is answered once, by its own model; each swap was decided, and the log says why."""
    clients = [portal.client(), _tenant(portal, "Globex"), _tenant(portal, "Initech")]
    wanted = [(0, CHAT), (1, OTHER), (2, CHAT), (0, OTHER)]
    at_gpu0 = (portal.data_dir / "serve.log").stat().st_size
    before = _loads(portal)
    with machine(portal, tmp_path, "far", LEASE_SECONDS="10") as far:
        wait_for(lambda: far.has_said("ready."), seconds=300)
        sent = [
            (clients[whose], model, send(clients[whose], _lines(*_forty(model))))
            for whose, model in wanted
        ]
        for client, model, batch in sent:
            ended = finished(client, batch.id, seconds=400)
            assert (ended.status, ended.request_counts.completed) == ("completed", 40)
            found = answers(client, ended.output_file_id)
            assert [line["custom_id"] for line in found] == [f"request-{at}" for at in range(40)]
            assert {line["response"]["body"]["model"] for line in found} == {model}
        model_of = {batch.id: model for _, model, batch in sent}
        stories = [_story(portal.data_dir / "serve.log", at_gpu0), _story(far.log)]
        swaps = [len(_swaps(story, model_of)) for story in stories]
        # Workers tell of their loads with their next heartbeat.
        wait_for(lambda: [_loads(portal) - before, _loads(portal, "far")] == swaps)
    assert {model for story in stories for model in _swaps(story, model_of)} == {CHAT, OTHER}
    leased = [event["batch_id"] for story in stories for event in story if "batch_id" in event]
    assert sorted(leased) == sorted(model_of)
    assert all(any("batch_id" in event for event in story) for story in stories)


def _tenant(portal: Stack, name: str) -> OpenAI:
    slug, owner = name.lower(), f"owner@{name.lower()}.test"
    portal.manage("create_org", name, "--owner", owner, stdin="correct horse 9 battery")
    return portal.client(portal.manage("create_api_key", "--org", slug, "--name", "tests"))


def _forty(model: str) -> list[dict[str, Any]]:
    return [_chat(model, f"words {at}") for at in range(40)]


def _story(log: Path, since: int = 0) -> list[dict[str, Any]]:
    """What a worker's log says of leases and loads, from this byte on."""
    lines = log.read_bytes()[since:].splitlines()
    events = [orjson.loads(line) for line in lines if line.startswith(b"{")]
    return [event for event in events if event["event"] in ("leased", "model loaded")]


def _swaps(story: list[dict[str, Any]], model_of: dict[str, str]) -> list[str]:
    """The models that were loaded, each right after a lease for it that says why it is swapped."""
    found = []
    for lease, load in pairwise(story):
        if load["event"] == "model loaded":
            assert model_of[lease["batch_id"]] == load["model"]
            assert (lease["reason"], load["model"] in lease["why"]) == ("dry", True), lease
            found.append(load["model"])
    return found


def test_trap_01_a_requests_own_parameters_are_honoured(portal: Stack) -> None:
    client = portal.client()
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "boolean"}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    tool = {
        "type": "function",
        "function": {"name": "look", "parameters": schema, "strict": True},
    }
    bodies = [
        _chat(CHAT, "short", max_tokens=3, ignore_eos=True),
        _chat(CHAT, "two", n=2),
        _chat(CHAT, "probable", logprobs=True, top_logprobs=2),
        _chat(
            CHAT,
            "json",
            max_tokens=256,
            seed=3,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "reply", "schema": schema, "strict": True},
            },
        ),
        _chat(
            CHAT,
            "tool",
            max_tokens=256,  # a random model may spell what the grammar forces byte by byte
            seed=3,
            tools=[tool],
            parallel_tool_calls=False,
            tool_choice={"type": "function", "function": {"name": "look"}},
        ),
        _chat(CHAT, "refused", temperature=-1),
    ]
    batch = finished(client, send(client, _lines(*bodies)).id, seconds=400)
    assert batch.status == "completed"
    errors = answers(client, batch.error_file_id)
    assert [line["custom_id"] for line in errors] == ["request-5"], [
        line["response"]["body"] for line in errors
    ]
    short, two, probable, parsed, tooled = _bodies(portal, batch)
    assert short["usage"]["completion_tokens"] == 3
    assert len(two["choices"]) == 2
    assert len(probable["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2
    assert set(orjson.loads(parsed["choices"][0]["message"]["content"])) == {"answer"}
    call = tooled["choices"][0]["message"]["tool_calls"][0]["function"]
    assert (call["name"], set(orjson.loads(call["arguments"]))) == ("look", {"answer"})
    (refused,) = errors
    assert refused["error"] is None
    assert refused["response"]["status_code"] == 400
    assert set(refused["response"]["body"]["error"]) == {"message", "type", "param", "code"}


def test_a_seeded_request_says_the_same_alone_in_a_batch_and_in_raw_vllm(
    portal: Stack, models: Path
) -> None:
    client = portal.client()
    company = [_chat(CHAT, f"company {at}", max_tokens=12) for at in range(30)]
    alone = finished(client, send(client, _lines(SEEDED)).id, seconds=400)
    among = finished(client, send(client, _lines(*company, SEEDED)).id, seconds=400)
    said = [
        _bodies(portal, batch)[-1]["choices"][0]["message"]["content"] for batch in (alone, among)
    ]
    assert said == [_raw(models / CHAT)] * 2


_RAW = """
import sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, enable_chunked_prefill=False,
          kv_cache_memory_bytes=64 * 2**20, max_model_len=512)
params = SamplingParams(seed=7, temperature=1.0, max_tokens=12)
message = [{"role": "user", "content": "Say something of your own."}]
print("SAID", llm.chat([message], params, use_tqdm=False)[0].outputs[0].text.encode().hex())
"""


def _raw(model: Path) -> str:
    """What vLLM itself answers to the seeded request, in a process of its own."""
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-c", _RAW, str(model)],
        env=os.environ | quiet,
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = [line for line in done.stdout.splitlines() if line.startswith("SAID ")]
    assert said, done.stderr[-2000:]
    return bytes.fromhex(said[0].removeprefix("SAID ")).decode()


def test_five_kills_of_the_worker_lose_and_double_nothing(portal: Stack) -> None:
    """I2, I4, and the engine that a killed worker leaves behind is ended by its next life."""
    client = portal.client()
    bodies = [_chat(CHAT, f"words {at}", max_tokens=16, ignore_eos=True) for at in range(1_500)]
    batch = send(client, _lines(*bodies))
    for _ in range(5):
        done = client.batches.retrieve(batch.id).request_counts.completed
        wait_for(lambda done=done: _advanced(client, batch.id, done), seconds=200)
        engine = _engine_pids(portal)
        pid = portal.pid("gpu0")
        portal.kill("gpu0")
        wait_for(lambda pid=pid: portal.restarted("gpu0", pid), seconds=60)
        wait_for(lambda engine=engine: not any(map(psutil.pid_exists, engine)), seconds=120)
    ended = finished(client, batch.id, seconds=400)
    assert ended.status == "completed"
    found = answers(client, ended.output_file_id)
    assert [line["custom_id"] for line in found] == [f"request-{at}" for at in range(1_500)]
    assert ended.request_counts.completed == 1_500
    assert ended.usage.output_tokens == 16 * 1_500


def _advanced(client: Any, batch_id: str, than: int) -> bool:
    """More has been saved than before, or it is all over."""
    batch = client.batches.retrieve(batch_id)
    return batch.request_counts.completed > than or batch.status == "completed"


def _engine_pids(stack: Stack) -> list[int]:
    ledger = stack.data_dir / "workers" / "gpu0.json"
    return [each["pid"] for each in orjson.loads(ledger.read_bytes())]


def _loads(stack: Stack, worker: str = "gpu0") -> int:
    """How many models the worker has loaded in this life."""
    query = "SELECT swaps FROM worker_worker WHERE name = %s"
    with psycopg.connect(stack.services.database_url) as database:
        row = database.execute(query, [worker]).fetchone()
    return int(row[0]) if row else 0
