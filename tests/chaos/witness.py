"""What the chaos tests look at: who has which chunk, what was saved, and whether all is whole."""

from __future__ import annotations

from typing import Any

import openai
import psycopg

from tests.stack import Stack, answers, wait_for

QUICK = {"LEASE_SECONDS": "4", "SWEEP_SECONDS": "1", "CHUNK_REQUESTS": "200"}
"""Settings with which what takes minutes takes seconds."""


def ended(client: openai.OpenAI, batch_id: str) -> Any:
    def look() -> Any:
        try:
            batch = client.batches.retrieve(batch_id)
        except openai.APIError:
            return None
        return batch if batch.status in ("completed", "failed", "expired", "cancelled") else None

    return wait_for(look, seconds=300, pause=0.5)


def assert_whole(client: openai.OpenAI, batch: Any, requests: int) -> None:
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


def database(stack: Stack) -> psycopg.Connection[tuple[Any, ...]]:
    return psycopg.connect(stack.services.database_url, autocommit=True)


def leased_to(database: psycopg.Connection[tuple[Any, ...]], owner: str) -> int | None:
    """A chunk of the worker's that has results already, so that it is in the midst of it."""
    row = database.execute(
        "SELECT c.id FROM batches_chunk c WHERE state = 'leased' AND lease_owner = %s "
        "AND EXISTS (SELECT 1 FROM batches_result r WHERE r.batch_id = c.batch_id)",
        [owner],
    ).fetchone()
    return row[0] if row else None


def is_done(database: psycopg.Connection[tuple[Any, ...]], chunk: int) -> bool:
    query = "SELECT state FROM batches_chunk WHERE id = %s"
    row = database.execute(query, [chunk]).fetchone()
    return row is not None and row[0] == "done"


def journal(
    database: psycopg.Connection[tuple[Any, ...]], batch_id: str, chunk: int
) -> list[tuple[Any, ...]]:
    """The chunk's saved lines; instant models are run in input order, so lines are positions."""
    return database.execute(
        "SELECT r.line, md5(r.payload), r.xmin::text FROM batches_result r "
        "JOIN batches_chunk c ON c.id = %s "
        "WHERE r.batch_id = %s AND r.line > c.start AND r.line <= c.end ORDER BY r.line",
        [chunk, batch_id],
    ).fetchall()
