"""A suspended organization: its keys are refused at once, its running chunks stop, nothing is lost."""

from __future__ import annotations

import psycopg
import pytest
from openai import PermissionDeniedError

from tests.stack import Stack, finished, lines, send, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("stack")]


def chunks(stack: Stack, batch_id: str) -> set[str]:
    """The states that the batch's chunks are in."""
    with psycopg.connect(stack.services.database_url) as connection:
        found = connection.execute(
            "SELECT DISTINCT state FROM batches_chunk WHERE batch_id = %s", [batch_id]
        )
        return {state for (state,) in found}


def answered(stack: Stack, batch_id: str) -> int:
    with psycopg.connect(stack.services.database_url) as connection:
        row = connection.execute(
            "SELECT completed + failed FROM batches_batch WHERE id = %s", [batch_id]
        ).fetchone()
        assert row is not None
        return int(row[0])


def test_suspending_stops_keys_and_running_chunks_and_resuming_goes_on(stack: Stack) -> None:
    stack.instant("slow", delay_ms=500, concurrency=4)
    stack.manage("create_org", "Initech", "--owner", "owner@initech.test", stdin="correct horse 9")
    key = stack.manage("create_api_key", "--org", "initech", "--name", "tests")
    client = stack.client(key, max_retries=0)
    batch = send(client, lines(300, "slow"))
    wait_for(lambda: answered(stack, batch.id) > 0)

    stack.manage("suspend_org", "initech", "--reason", "the invoice is open")
    with pytest.raises(PermissionDeniedError) as refused:
        client.batches.retrieve(batch.id)
    assert refused.value.code == "organization_suspended"
    assert "the invoice is open" in refused.value.message
    wait_for(lambda: "leased" not in chunks(stack, batch.id))
    kept = answered(stack, batch.id)
    assert 0 < kept < 300

    other = send(stack.client(), lines(5))
    assert finished(stack.client(), other.id).status == "completed"
    assert answered(stack, batch.id) == kept  # others ran meanwhile, its own did not

    stack.manage("resume_org", "initech")
    done = finished(client, batch.id)
    assert (done.status, done.request_counts.completed) == ("completed", 300)
