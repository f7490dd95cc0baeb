"""Real vLLM on a GPU host: loads, swaps by restart and by sleep, a batch at full speed, the lane.

BENCH_MODELS names two models or more (folders or Hugging Face names that are on this host, with
commas between), BENCH_GPU the GPU (default 0). Without BENCH_MODELS it is two tiny models on
whatever vLLM runs on: that shows only that all of it works.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from benchmarks.engine import tiny_model
from benchmarks.gpu import feed, lane, load, swap
from benchmarks.site import Site
from tests import stack as stacks


def run() -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        sources = os.environ.get("BENCH_MODELS", "").split(",")
        tiny = sources == [""]
        if tiny:
            models = tiny_model(folder / "models").parent
            sources = [str(models / each) for each in ("tiny-chat-a", "tiny-chat-b")]
        gpu = None if tiny else os.environ.get("BENCH_GPU", "0")
        with stacks.running(folder / "data", "--gpu-workers=0") as stack:
            site = Site(stack, gpu, sources)
            return {
                **load.run(site),
                **swap.run(site, rounds=1 if tiny else 4),
                **feed.run(site, requests=200 if tiny else 5_000),
                **lane.run(site, requests=15_000 if tiny else 50_000, tokens=32 if tiny else 256),
            }
