"""One batch on a model that is loaded: requests and tokens a second."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.site import Site

TOKENS = 128


def run(site: Site, *, requests: int) -> dict[str, float]:
    model = site.models[0]
    with site.worker():
        site.batch(model, 1, max_tokens=1)
        began = time.monotonic()
        batch = site.batch(model, requests, max_tokens=TOKENS, ignore_eos=True)
        seconds = time.monotonic() - began
    return {
        "feed_requests_per_second": requests / seconds,
        "feed_tokens_per_second": _tokens(batch) / seconds,
    }


def _tokens(batch: Any) -> int:
    return int(batch.usage.input_tokens + batch.usage.output_tokens)
