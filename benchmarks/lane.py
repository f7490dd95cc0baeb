"""The real-time lane: time to first token alone, and beside a batch that fills the engine.

Streamed chats come at a fixed rate, however long the earlier ones take, through the whole portal.
With protection is as delivered: vLLM's priority scheduling, and slots of the engine that batches
leave free while the lane is in use (LANE_SLOTS). Without, both are switched off: requests are
taken in the order in which they came, and batches are fed all that the engine takes.
`batch_share` is the batch's requests a second beside the lane by those with no lane in use.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
from openai import InternalServerError, OpenAI

from benchmarks.engine import tiny_model
from benchmarks.saves import next_save
from benchmarks.site import Site
from tests import stack as stacks

RATE, SECONDS = 4.0, 20.0
"""Chats a second, and for how long: 80 of them in each case."""
SETTLING = 5.0
WORDS, TOKENS = 45, 16
BATCH, BATCH_TOKENS = 15_000, 32
AT_ONCE = "--engine-arg=max_num_seqs=256"
IN_TURN = "--engine-arg=scheduling_policy=fcfs"
THREADS = {"LANE_THREADS": "64", "LANE_THREADS_OF_ONE": "64"}
"""Enough of them that no chat waits for a thread of a web process."""


def run() -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        model = tiny_model(folder / "models")
        with stacks.running(folder / "data", "--gpu-workers=0", **THREADS) as stack:
            return measured(Site(stack, None, [str(model)]), AT_ONCE)


def measured(
    site: Site, *options: str, requests: int = BATCH, tokens: int = BATCH_TOKENS
) -> dict[str, float]:
    """The site's first model, with these options of `register_model`, beside a batch of so many
    requests with answers of so many tokens: more than it runs in a minute."""
    model = site.models[0]
    site.register(model, site.sources[0], *options)
    with site.worker():
        site.batch(model, 1, max_tokens=1)
        alone = _chats(site)
        # By now the lane is in use; in the next worker it is not, until its first chat.
    with _filled(site, requests, tokens) as saved:
        usual = _speed(saved, SECONDS)
        protected, beside = _chats_beside(site, saved)
    site.register(model, site.sources[0], *options, IN_TURN)
    with _filled(site, requests, tokens, LANE_SLOTS="0") as saved:
        bare, beside_bare = _chats_beside(site, saved)
    return {
        **_told("alone", alone),
        **_told("protected", protected),
        **_told("unprotected", bare),
        "batch_share": beside / usual,
        "batch_share_unprotected": beside_bare / usual,
        "batch_requests_per_second": usual,
    }


def _told(case: str, seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        f"ttft_{case}_p50_ms": 1000 * ordered[len(ordered) // 2],
        f"ttft_{case}_p99_ms": 1000 * ordered[int(len(ordered) * 0.99)],
    }


# --- The batch ------------------------------------------------------------------------------------


@contextmanager
def _filled(
    site: Site, requests: int, tokens: int, **variables: str
) -> Iterator[psycopg.Connection[Any]]:
    """A worker that is full of one batch, which is cancelled in the end; yields where it saves."""
    sent = stacks.send(
        site.client,
        site.lines(site.models[0], requests, WORDS, max_tokens=tokens, ignore_eos=True),
    )
    url = site.stack.services.database_url
    with psycopg.connect(url, autocommit=True) as database, site.worker(**variables):
        stacks.wait_for(partial(_has_begun, site.client, sent.id), seconds=600)
        time.sleep(SETTLING)
        yield database
        batch = site.client.batches.cancel(sent.id)
        assert batch.status == "cancelling", f"it was too small: {batch.status}"
        stacks.finished(site.client, sent.id, seconds=300)


def _has_begun(client: OpenAI, batch_id: str) -> bool:
    return client.batches.retrieve(batch_id).request_counts.completed > 0


def _speed(saved: psycopg.Connection[Any], seconds: float) -> float:
    """Requests a second that are saved in so many seconds from now."""
    began, before = next_save(saved)
    time.sleep(seconds)
    ended, after = next_save(saved)
    return (after - before) / (ended - began)


# --- The chats ------------------------------------------------------------------------------------


def _chats_beside(site: Site, saved: psycopg.Connection[Any]) -> tuple[list[float], float]:
    """Their times to first token, and the batch's requests a second meanwhile.

    Those of the first seconds, in which what the engine was fed before the first chat still waits
    in it, are left out: that is what the lane meets when it was not in use for a minute.
    """
    with ThreadPoolExecutor(1) as beside:
        chats = beside.submit(_chats, site, SETTLING)
        time.sleep(SETTLING)
        speed = _speed(saved, SECONDS)
        return chats.result(), speed


def _chats(site: Site, before: float = 0.0) -> list[float]:
    """Seconds to the first token of each chat, those of the first `before` seconds left out."""
    client = site.stack.client(timeout=120, max_retries=0)
    stacks.wait_for(partial(_is_served, client, site.models[0]))
    count, skipped = int(RATE * (before + SECONDS)), int(RATE * before)
    began = time.monotonic()
    with ThreadPoolExecutor(64) as callers:
        asked = []
        for at in range(count):
            time.sleep(max(0.0, began + at / RATE - time.monotonic()))
            asked.append(callers.submit(_first_token, client, site.models[0], at))
        return [each.result() for each in asked][skipped:]


def _is_served(client: OpenAI, model: str) -> bool:
    """Whether a worker has said that it takes the model's requests; a moment after its load."""
    try:
        _first_token(client, model, 0)
    except InternalServerError:
        return False
    return True


def _first_token(client: OpenAI, model: str, number: int) -> float:
    """Seconds to the first event, which vLLM sends with the first token; reads all of them."""
    said = f"{number} " + " ".join(f"w{(number * 11 + k * 13) % 997}" for k in range(WORDS))
    began = time.monotonic()
    events = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": said}],
        max_tokens=TOKENS,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(events))
    seconds = time.monotonic() - began
    for _ in events:
        pass
    return seconds
