"""Feeding: many small batches against one big one, and what the order of execution is worth.

The portal is the real one; its worker is started only when all batches have been validated, so that
the time is the run's: from the model being loaded until the last batch's files are written.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import orjson
from openai import OpenAI

from batches.index import RECORD_BYTES
from benchmarks.engine import tiny_model
from tests import stack as stacks
from tests.stack import Stack

SMALL, REQUESTS_A_SMALL = 200, 20
BIG = SMALL * REQUESTS_A_SMALL
INSTANT = {"concurrency": 64, "delay_ms": 250}
"""An engine of 256 requests/s, about what vLLM does with the tiny model on this machine."""
CHAT = "tiny-chat-a"
VLLM = ("--engine-arg=max_num_seqs=256",)
GROUPS, REQUESTS_A_GROUP, PREFIX_WORDS = 60, 20, 500
SMALL_CACHE = "--engine-arg=kv_cache_memory_bytes=8M"
"""KV cache for about a fifth of the prefixes, as a GPU's is small beside a batch's texts."""
PAIRS = int(os.environ.get("BENCH_PAIRS", "3"))


@dataclass(frozen=True, slots=True)
class Ran:
    """Some batches that one worker ran from end to end."""

    seconds: float
    requests: int
    prompt_tokens: int
    cached_tokens: int

    @property
    def speed(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


def run() -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        model = tiny_model(folder / "models")
        with stacks.running(folder / "data", "--gpu-workers=0") as stack:
            stack.instant("echo", **INSTANT)
            numbers = _small_and_big(stack, "instant", _instant)
            stack.manage("register_model", CHAT, f"--source={model}", *VLLM)
            numbers |= _small_and_big(stack, "vllm", _chats)
            numbers["small_vs_big"] = numbers["small_vs_big_vllm"]
            stack.manage("register_model", CHAT, f"--source={model}", *VLLM, SMALL_CACHE)
            return numbers | _ordered_and_not(stack)


# --- Many small batches against one big one -------------------------------------------------------


def _small_and_big(stack: Stack, name: str, content: Callable[[range], bytes]) -> dict[str, float]:
    small = [content(range(at, at + REQUESTS_A_SMALL)) for at in range(0, BIG, REQUESTS_A_SMALL)]
    pairs = [(_run(stack, small), _run(stack, [content(range(BIG))])) for _ in range(PAIRS)]
    ratio = statistics.median(a.speed / b.speed for a, b in pairs)
    print(f"  small_vs_big_{name}: {ratio:.3f}", flush=True)  # the rest takes minutes more
    return {
        f"small_vs_big_{name}": ratio,
        f"small_requests_per_second_{name}": statistics.median(a.speed for a, _ in pairs),
        f"big_requests_per_second_{name}": statistics.median(b.speed for _, b in pairs),
    }


def _instant(numbers: range) -> bytes:
    return _lines("echo", (f"words {at}" for at in numbers))


def _chats(numbers: range) -> bytes:
    """Distinct prompts of about 45 words each, answered with 32 tokens."""
    said = (f"{at} " + " ".join(f"w{(at * 7 + k * 13) % 997}" for k in range(45)) for at in numbers)
    return _lines(CHAT, said, max_tokens=32, ignore_eos=True)


def _lines(model: str, said: Iterator[str], **body: Any) -> bytes:
    return b"".join(
        orjson.dumps(
            {
                "custom_id": f"request-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": model, "messages": [{"role": "user", "content": text}], **body},
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )
        for number, text in enumerate(said)
    )


# --- The order of execution -----------------------------------------------------------------------


def _ordered_and_not(stack: Stack) -> dict[str, float]:
    """The same shuffled batch in our order of execution, and in the order in which it came."""
    content = _groups()
    pairs = [
        (_run(stack, [content]), _run(stack, [content], spoil=_in_order_of_input))
        for _ in range(PAIRS)
    ]
    prompts = pairs[0][0].prompt_tokens
    return {
        "ordered_vs_not": statistics.median(a.speed / b.speed for a, b in pairs),
        "ordered_requests_per_second": statistics.median(a.speed for a, _ in pairs),
        "unordered_requests_per_second": statistics.median(b.speed for _, b in pairs),
        "prompt_tokens": prompts,
        "ordered_cached_tokens": statistics.median(a.cached_tokens for a, _ in pairs),
        "unordered_cached_tokens": statistics.median(b.cached_tokens for _, b in pairs),
    }


def _groups() -> bytes:
    """Questions about a few long texts, each text's questions far apart."""
    words = [
        " ".join(f"w{(g * 31 + k * 17) % 997}" for k in range(PREFIX_WORDS)) for g in range(GROUPS)
    ]
    said = [
        f"text {g} {words[g]} question {q}" for g in range(GROUPS) for q in range(REQUESTS_A_GROUP)
    ]
    random.Random(1).shuffle(said)
    return _lines(CHAT, iter(said), max_tokens=8, ignore_eos=True)


def _in_order_of_input(stack: Stack, batch_id: str) -> None:
    """Undo validation's order: sort the records of the stored index by their line."""
    (path,) = stack.data_dir.glob(f"files/*/index-{batch_id}*")
    data = path.read_bytes()
    records = [data[at : at + RECORD_BYTES] for at in range(0, len(data), RECORD_BYTES)]
    records.sort(key=lambda record: int.from_bytes(record[:4], "little"))
    path.write_bytes(b"".join(records))


# --- Running --------------------------------------------------------------------------------------


def _run(
    stack: Stack,
    contents: Sequence[bytes],
    *,
    spoil: Callable[[Stack, str], None] = lambda stack, batch_id: None,
) -> Ran:
    """Have batches of these contents validated, then start a worker and wait for their files."""
    client = stack.client()
    ids = [stacks.send(client, content).id for content in contents]
    for batch_id in ids:
        stacks.wait_for(partial(_is_ready, client, batch_id))
        spoil(stack, batch_id)
    with _worker(stack) as log:
        batches = [stacks.finished(client, batch_id, seconds=900, pause=0.5) for batch_id in ids]
        begun = _moments(log, "model loaded")[-1]
    ended = max(_moments(stack.data_dir / "serve.log", "finalized"))
    requests = sum(batch.request_counts.completed for batch in batches)
    assert requests == sum(batch.request_counts.total for batch in batches), batches
    usages = [batch.usage for batch in batches]
    return Ran(
        ended - begun,
        requests,
        sum(usage.input_tokens for usage in usages),
        sum(usage.input_tokens_details.cached_tokens for usage in usages),
    )


def _is_ready(client: OpenAI, batch_id: str) -> bool:
    return client.batches.retrieve(batch_id).status == "in_progress"


@contextmanager
def _worker(stack: Stack) -> Iterator[Path]:
    """A GPU worker that has nothing loaded; yields its log."""
    log = stack.data_dir / "worker.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker", "--name=bench"],
            cwd=stacks.ROOT,
            env=stack.variables(),
            stdout=out,
            stderr=out,
        )
    try:
        yield log
    finally:
        process.terminate()
        process.wait(60)


def _moments(log: Path, event: str) -> list[float]:
    """When the log said so, in seconds since 1970."""
    said = (orjson.loads(line) for line in log.read_bytes().splitlines() if line.startswith(b"{"))
    return [
        datetime.fromisoformat(each["timestamp"]).timestamp()
        for each in said
        if each.get("event") == event
    ]
