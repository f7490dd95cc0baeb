"""Kill anything, anywhere, at any moment: every line is answered exactly once, in order."""

from __future__ import annotations

import random
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import psycopg
import pytest
import redis

from tests import stack as stacks
from tests.stack import Stack, answers, lines, send, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chaos")]

REQUESTS, KILLS = 3_000, 30
QUICK = {"LEASE_SECONDS": "4", "SWEEP_SECONDS": "1", "CHUNK_REQUESTS": "200"}


def test_a_batch_survives_thirty_kills_of_everything(tmp_path: Path) -> None:
    """I1, I2, I4. Traps 5 and 6: what a crash left is picked up; two workers never double a line."""
    with stacks.running(tmp_path, "--gpu-workers=3", **QUICK) as stack:
        model = stack.instant("slow", delay_ms=400, concurrency=8)
        client = stack.client(max_retries=8)
        batch = send(client, lines(REQUESTS, model))
        killed = _kill_at_random(stack, batch.id, seed=20)
        ended = _ended(client, batch.id)
        _assert_whole(client, ended, REQUESTS)
        assert sum(killed.values()) >= KILLS, killed


def test_a_stopped_worker_saves_nothing_when_it_goes_on(tmp_path: Path) -> None:
    """I2: SIGSTOP for longer than its lease, SIGCONT; its results come too late."""
    with stacks.running(tmp_path, "--gpu-workers=2", **QUICK) as stack:
        model = stack.instant("slow", delay_ms=500, concurrency=20)
        client = stack.client()
        batch = send(client, lines(1_000, model))
        with _database(stack) as database:
            chunk = wait_for(lambda: _leased_to(database, "gpu0"))
            stack.kill("gpu0", signal.SIGSTOP)
            wait_for(lambda: _is_done(database, chunk))
            before = _journal(database, batch.id, chunk)
            stack.kill("gpu0", signal.SIGCONT)
            wait_for(lambda: b"lease lost" in (stack.data_dir / "serve.log").read_bytes())
            assert _journal(database, batch.id, chunk) == before
        _assert_whole(client, _ended(client, batch.id), 1_000)


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
        _assert_whole(client, _ended(client, batch.id), 200)


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


def _ended(client: openai.OpenAI, batch_id: str) -> Any:
    def look() -> Any:
        try:
            batch = client.batches.retrieve(batch_id)
        except openai.APIError:
            return None
        return batch if batch.status in ("completed", "failed", "expired", "cancelled") else None

    return wait_for(look, seconds=300, pause=0.5)


def _assert_whole(client: openai.OpenAI, batch: Any, requests: int) -> None:
    """Every line once, in order, with its own answer; the counts say the same."""
    assert batch.status == "completed"
    assert batch.request_counts.model_dump() == {
        "total": requests,
        "completed": requests,
        "failed": 0,
    }
    assert batch.error_file_id is None
    found = answers(client, batch.output_file_id)
    said = [line["response"]["body"]["choices"][0]["message"]["content"] for line in found]
    assert [line["custom_id"] for line in found] == [f"request-{at}" for at in range(requests)]
    assert said == [f"words {at}" for at in range(requests)]
    tokens = sum(line["response"]["body"]["usage"]["total_tokens"] for line in found)
    assert batch.usage.total_tokens == tokens


def _database(stack: Stack) -> psycopg.Connection[tuple[Any, ...]]:
    return psycopg.connect(stack.services.database_url, autocommit=True)


def _leased_to(database: psycopg.Connection[tuple[Any, ...]], owner: str) -> int | None:
    """A chunk of the worker's that has results already, so that it is in the midst of it."""
    row = database.execute(
        "SELECT c.id FROM batches_chunk c WHERE state = 'leased' AND lease_owner = %s "
        "AND EXISTS (SELECT 1 FROM batches_result r WHERE r.batch_id = c.batch_id)",
        [owner],
    ).fetchone()
    return row[0] if row else None


def _is_done(database: psycopg.Connection[tuple[Any, ...]], chunk: int) -> bool:
    query = "SELECT state FROM batches_chunk WHERE id = %s"
    row = database.execute(query, [chunk]).fetchone()
    return row is not None and row[0] == "done"


def _journal(
    database: psycopg.Connection[tuple[Any, ...]], batch_id: str, chunk: int
) -> list[tuple[Any, ...]]:
    """The chunk's saved lines; instant models are run in input order, so lines are positions."""
    return database.execute(
        "SELECT r.line, md5(r.payload), r.xmin::text FROM batches_result r "
        "JOIN batches_chunk c ON c.id = %s "
        "WHERE r.batch_id = %s AND r.line > c.start AND r.line <= c.end ORDER BY r.line",
        [chunk, batch_id],
    ).fetchall()
