"""Real vLLM: this pipeline against vLLM's own run_batch, same file, model and options.

Both start from nothing: run_batch as a command, ours as a batch sent to a portal whose worker has
no model loaded. `run_ratio` compares requests a second once the model is loaded, `total_ratio` the
whole time; above 1 ours is faster. The two take turns, and the ratio is the median of the pairs.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import orjson

from tests import stack as stacks
from tests.stack import Stack

REQUESTS, OUTPUT_TOKENS, WORDS = 2_000, 32, 45
PAIRS = int(os.environ.get("BENCH_PAIRS", "2"))
MODEL = "tiny-chat-a"
# What our engine gives vLLM on a CPU, given to run_batch as well; see worker/engines/vllm/options.py.
OPTIONS = [
    "--dtype=float32",
    "--enforce-eager",
    "--no-enable-chunked-prefill",
    "--kv-cache-memory-bytes=1G",
    "--max-num-seqs=256",
]


def run() -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        model = tiny_model(folder / "models")
        ours, theirs = [], []
        for at in range(PAIRS):
            theirs.append(_run_batch(folder, model))
            ours.append(_portal(folder / f"data-{at}", model))
        pairs = list(zip(ours, theirs, strict=True))
        return {
            "run_ratio": statistics.median(b[0] / a[0] for a, b in pairs),
            "total_ratio": statistics.median(b[1] / a[1] for a, b in pairs),
            "ours_requests_per_second": REQUESTS / statistics.median(a[0] for a, _ in pairs),
            "theirs_requests_per_second": REQUESTS / statistics.median(b[0] for _, b in pairs),
            "ours_total_seconds": statistics.median(a[1] for a, _ in pairs),
            "theirs_total_seconds": statistics.median(b[1] for _, b in pairs),
        }


def tiny_model(folder: Path) -> Path:
    maker = stacks.ROOT / "examples" / "make_tiny_models.py"
    subprocess.run([sys.executable, str(maker), str(folder)], check=True, stdout=subprocess.DEVNULL)
    return folder / MODEL


def _input() -> bytes:
    """Distinct prompts of about `WORDS` words each."""
    out = []
    for at in range(REQUESTS):
        words = " ".join(f"w{(at * 7 + k * 13) % 997}" for k in range(WORDS))
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"{at} {words}"}],
            "max_tokens": OUTPUT_TOKENS,
            "ignore_eos": True,
        }
        line = {
            "custom_id": f"request-{at}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": body,
        }
        out.append(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
    return b"".join(out)


def _portal(data_dir: Path, model: Path) -> tuple[float, float]:
    """Seconds of the run phase and in all, with a worker that has nothing loaded."""
    with stacks.running(data_dir) as stack:
        arguments = [MODEL, f"--source={model}", "--engine-arg=max_num_seqs=256"]
        stack.manage("register_model", *arguments)
        client = stack.client()
        started = time.time()
        batch = stacks.send(client, _input())
        batch = stacks.finished(client, batch.id, seconds=600, pause=1)
        total = time.time() - started
        assert batch.request_counts.completed == REQUESTS, batch
        return _moment(stack, "finalized") - _moment(stack, "model loaded"), total


def _moment(stack: Stack, event: str) -> float:
    """When the portal's log said so first, in seconds since 1970."""
    for line in (stack.data_dir / "serve.log").read_bytes().splitlines():
        if line.startswith(b"{") and (said := orjson.loads(line)).get("event") == event:
            return datetime.fromisoformat(said["timestamp"]).timestamp()
    raise AssertionError(f"the log has no {event!r}")


def _run_batch(folder: Path, model: Path) -> tuple[float, float]:
    """Seconds from when it has the model loaded until its file is written, and in all."""
    out = folder / "out.jsonl"
    out.unlink(missing_ok=True)
    (folder / "in.jsonl").write_bytes(_input())
    command = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch"]
    command += ["-i", str(folder / "in.jsonl"), "-o", str(out)]
    command += [f"--model={model}", f"--served-model-name={MODEL}", *OPTIONS]
    variables = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    started, loaded = time.time(), 0.0
    process = subprocess.Popen(
        command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    for line in process.stdout:
        if not loaded and b"Reading batch from" in line:
            loaded = time.time()
    assert process.wait() == 0
    ended = time.time()
    assert len(out.read_bytes().splitlines()) == REQUESTS
    return out.stat().st_mtime - loaded, ended - started
