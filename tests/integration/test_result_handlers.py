"""Result handlers in a running portal, whose process is killed in the midst of one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from batches import webhooks
from tests import stack as stacks
from tests.chaos.witness import database
from tests.stack import Stack, finished, lines, send, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chaos")]


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """One of its own, as its parts are killed."""
    with stacks.running(tmp_path) as running:
        running.instant("echo")
        yield running


def test_a_killed_run_is_run_again_and_each_is_done_once(
    stack: Stack, httpserver: HTTPServer
) -> None:
    came, released = threading.Event(), threading.Event()

    def hang_once(request: Request) -> Response:
        if not came.is_set():
            came.set()
            released.wait(60)
        return Response()

    httpserver.expect_request("/results").respond_with_handler(hang_once)
    key = stack.manage(
        "create_api_key", "--org", "acme", "--name", "handlers", *[f"--scope={s}" for s in SCOPES]
    )
    client = stack.client(key)
    settings = {"url": httpserver.url_for("/results"), "secret": webhooks.new_secret()}
    make(client, name="hook", kind="webhook", settings={**settings, "timeout": 30})
    make(client, name="table", kind="parquet")
    batch = send(client, lines(5))
    finished(client, batch.id)
    assert came.wait(60)
    before = stack.pid("handlers")
    stack.kill_tree("handlers")
    wait_for(lambda: stack.restarted("handlers", before))
    released.set()
    with database(stack) as rows:  # as five minutes later
        expire = "UPDATE batches_handlerrun SET busy_until = now() WHERE state = 'running'"
        rows.execute(expire)
    runs = wait_for(lambda: over(client, batch.id))
    assert [(run["handler_name"], run["state"], run["attempts"]) for run in runs] == [
        ("hook", "done", 2),
        ("table", "done", 1),
    ]
    made = [file.filename for file in client.files.list() if file.filename.endswith(".parquet")]
    assert made == [f"{batch.id}.parquet"]
    ids = [request.headers["webhook-id"] for request, _ in httpserver.log]
    assert set(ids) == {f"{batch.id}.1"}


SCOPES = ("files", "batches", "webhooks")


def make(client: Any, **fields: Any) -> None:
    client.post("/result_handlers", body=fields, cast_to=object)


def over(client: Any, batch_id: str) -> list[dict[str, Any]] | None:
    """The runs, once each is over."""
    found = client.get(f"/batches/{batch_id}/handler_runs", cast_to=object)["data"]
    return found if all(run["state"] in ("done", "failed") for run in found) else None
