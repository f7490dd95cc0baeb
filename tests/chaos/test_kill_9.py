"""Kill anything, anywhere, at any moment: every line is answered exactly once, in order."""

from __future__ import annotations

import random
import signal
from contextlib import suppress
from pathlib import Path

import openai
import pytest
import redis

from tests import stack as stacks
from tests.chaos.witness import (
    QUICK,
    assert_whole,
    database,
    ended,
    is_done,
    journal,
    leased_to,
)
from tests.stack import Stack, lines, send, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chaos")]

REQUESTS, KILLS = 3_000, 30


def test_a_batch_survives_thirty_kills_of_everything(tmp_path: Path) -> None:
    """I1, I2, I4. Traps 5 and 6: what a crash left is picked up; two workers never double a line."""
    with stacks.running(tmp_path, "--gpu-workers=3", **QUICK) as stack:
        model = stack.instant("slow", delay_ms=400, concurrency=8)
        client = stack.client(max_retries=8)
        batch = send(client, lines(REQUESTS, model))
        killed = _kill_at_random(stack, batch.id, seed=20)
        assert_whole(client, ended(client, batch.id), REQUESTS)
        assert sum(killed.values()) >= KILLS, killed


def test_a_stopped_worker_saves_nothing_when_it_goes_on(tmp_path: Path) -> None:
    """I2: SIGSTOP for longer than its lease, SIGCONT; its results come too late."""
    with stacks.running(tmp_path, "--gpu-workers=2", **QUICK) as stack:
        model = stack.instant("slow", delay_ms=500, concurrency=20)
        client = stack.client()
        batch = send(client, lines(1_000, model))
        with database(stack) as rows:
            chunk = wait_for(lambda: leased_to(rows, "gpu0"))
            wait_for(lambda: journal(rows, batch.id, chunk))  # so it knows that it has the chunk
            stack.kill("gpu0", signal.SIGSTOP)
            wait_for(lambda: is_done(rows, chunk))
            before = journal(rows, batch.id, chunk)
            stack.kill("gpu0", signal.SIGCONT)
            wait_for(lambda: b"lease lost" in (stack.data_dir / "serve.log").read_bytes())
            assert journal(rows, batch.id, chunk) == before
        assert_whole(client, ended(client, batch.id), 1_000)


def test_everything_killed_at_once_starts_again_with_its_data(tmp_path: Path) -> None:
    """Trap 17 and the embedded services: a dead server's lock or pid stops nothing."""
    with stacks.running(tmp_path, **QUICK) as stack:
        model = stack.instant("slow", delay_ms=300, concurrency=8)
        batch = send(stack.client(), lines(200, model))
        key = stack.key
        for child in ("gpu0", "cpu", "web", "beat", "postgres", "valkey"):
            stack.kill_tree(child)
        stack.process.kill()
        stack.process.wait()
    with stacks.again(tmp_path, **QUICK) as base_url:
        client = openai.OpenAI(base_url=f"{base_url}/v1", api_key=key)
        assert_whole(client, ended(client, batch.id), 200)


def _kill_at_random(stack: Stack, batch_id: str, *, seed: int) -> dict[str, int]:
    """Kill one thing after another, each once it is up again; returns what was killed how often."""
    chance = random.Random(seed)
    victims = ["gpu0", "gpu1", "gpu2"] * 2 + ["cpu", "postgres", "valkey", "flush", "beat", "web"]
    killed: dict[str, int] = {}
    while sum(killed.values()) < KILLS and not _is_over(stack, batch_id):
        victim = chance.choice(victims)
        if victim == "flush":
            _flush(stack)
        elif victim == "cpu":
            stack.kill_tree("cpu")
        else:
            stack.kill(victim)
        killed[victim] = killed.get(victim, 0) + 1
        stacks.pause(chance.uniform(0.2, 1.5))
    return killed


def _is_over(stack: Stack, batch_id: str) -> bool:
    try:
        return stack.client(max_retries=0).batches.retrieve(batch_id).status == "completed"
    except openai.APIError:
        return False


def _flush(stack: Stack) -> None:
    with suppress(redis.RedisError):  # it was killed a moment ago: as good as flushed
        redis.Redis.from_url(stack.services.redis_url, socket_timeout=2).flushall()
