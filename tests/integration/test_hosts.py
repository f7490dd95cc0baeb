"""Workers on other hosts: what they need to know, whose a name is, drained, upgraded, and ended."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from tests import stack as stacks
from tests.machines import Machine, machine
from tests.stack import Stack, answers, finished, lines, send, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("hosts")]

REQUESTS = 400
QUICK = {"CHUNK_REQUESTS": "50", "SWEEP_SECONDS": "1"}


@pytest.fixture(scope="module")
def portal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A portal without any worker of its own, and a model of which a chunk takes a second."""
    folder = tmp_path_factory.mktemp("portal")
    with stacks.running(folder, "--gpu-workers=0", **QUICK) as stack:
        stack.instant("slow", delay_ms=200, concurrency=10)
        yield stack


def asked(stack: Stack, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(stack.services.database_url) as database:
        return database.execute(query).fetchall()


def state_of(stack: Stack, name: str) -> tuple[str, str, bool]:
    """A worker's state, version, and whether it is draining."""
    query = f"SELECT state, version, draining FROM worker_worker WHERE name = '{name}'"
    return next(iter(asked(stack, query)), ("", "", False))  # type: ignore[return-value]


def is_busy(stack: Stack, name: str) -> bool:
    query = f"SELECT 1 FROM batches_chunk WHERE state = 'leased' AND lease_owner = '{name}'"
    return bool(asked(stack, query))


def batch_of(stack: Stack, requests: int = REQUESTS) -> Any:
    return send(stack.client(), lines(requests, "slow"))


def assert_whole(stack: Stack, batch: Any, requests: int = REQUESTS) -> None:
    """Every line was answered once, and no chunk was leased twice."""
    client = stack.client()
    ended = finished(client, batch.id)
    assert (ended.status, ended.request_counts.failed) == ("completed", 0)
    found = [line["custom_id"] for line in answers(client, ended.output_file_id)]
    assert found == [f"request-{at}" for at in range(requests)]
    query = f"SELECT DISTINCT fencing_token FROM batches_chunk WHERE batch_id = '{batch.id}'"
    assert asked(stack, query) == [(1,)]


def test_a_worker_elsewhere_needs_three_urls_and_a_name_of_its_own(
    portal: Stack, tmp_path: Path
) -> None:
    with machine(portal, tmp_path / "one", "far") as first:
        told = {"DATA_DIR", "DATABASE_URL", "REDIS_URL", "STORAGE_URL"}
        assert set(first.environment) == {"PATH", "PYTHONPATH", *told}
        batch = batch_of(portal)
        wait_for(lambda: is_busy(portal, "far"))
        with machine(portal, tmp_path / "two", "far") as second:
            assert second.ended() == 1
            assert second.has_said(f"(pid {first.process.pid}); choose another name.")
        assert_whole(portal, batch)
        first.signal(signal.SIGKILL)
        first.ended()
        with machine(portal, tmp_path / "two", "far") as second:
            wait_for(lambda: state_of(portal, "far")[0] == "idle")
            table = portal.manage("workers").splitlines()
            assert [row.split()[0] for row in table] == ["NAME", "far"]
            second.signal(signal.SIGTERM)
            assert second.ended() == 0
    assert portal.manage("forget_worker", "far") == "far is forgotten"


def test_a_worker_that_is_told_too_little_says_what(portal: Stack, tmp_path: Path) -> None:
    with machine(portal, tmp_path, "far", REDIS_URL="") as lost:
        assert lost.ended() == 1
        assert lost.has_said("DATABASE_URL and REDIS_URL must say where the portal's services are")


def test_a_worker_that_is_stopped_amid_a_chunk_gives_it_back(portal: Stack, tmp_path: Path) -> None:
    """SIGTERM: what is done is saved, nothing has to wait for a lease to end."""
    with machine(portal, tmp_path / "one", "one") as one:
        batch = batch_of(portal)
        wait_for(lambda: is_busy(portal, "one"))
        one.signal(signal.SIGTERM)
        assert one.ended() == 0
        query = "SELECT count(*) FROM batches_chunk WHERE state = 'leased'"
        assert asked(portal, query) == [(0,)]
        with machine(portal, tmp_path / "two", "two"):
            ended = finished(portal.client(), batch.id)
    counts = ended.request_counts
    assert (ended.status, counts.completed, counts.failed) == ("completed", REQUESTS, 0)


def test_everything_is_replaced_while_batches_run_and_no_request_fails(
    portal: Stack, tmp_path: Path
) -> None:
    """Drain → replace → resume of each worker in turn, then the web server, cpu worker and beat."""
    names = ("red", "blue")
    with ExitStack() as machines:
        workers = [
            machines.enter_context(machine(portal, tmp_path / name, name, BUILD_ID="old"))
            for name in names
        ]
        for name in names:
            wait_for(lambda name=name: state_of(portal, name)[0] == "idle")
        sent = [batch_of(portal)]
        for worker in workers:
            sent.append(_replaced(portal, worker))
        sent += [_reloaded(portal), _restarted(portal, "cpu"), _restarted(portal, "beat")]
        for batch in sent:
            assert_whole(portal, batch)
    assert {state_of(portal, name)[1] for name in names} == {"new"}
    said = [worker.log.read_text() for worker in workers]
    assert [text.count("drained, so this process ends") for text in said] == [1, 1]


def _replaced(portal: Stack, worker: Machine) -> Any:
    """Drain it amid its work, start the new version of it, resume it; returns a batch sent then."""
    batch = batch_of(portal)
    wait_for(lambda: is_busy(portal, worker.name))
    said = portal.manage("drain_worker", worker.name, "--exit", "--wait")
    assert said == f"{worker.name} is drained and has ended"
    assert worker.ended() == 0
    worker.again(BUILD_ID="new")
    wait_for(lambda: state_of(portal, worker.name) == ("drained", "new", True))
    assert not is_busy(portal, worker.name)
    portal.manage("resume_worker", worker.name)
    return batch


def _reloaded(portal: Stack) -> Any:
    """Let gunicorn replace its processes; its socket stays open meanwhile."""
    web = psutil.Process(portal.pid("web"))
    old = web.children()
    batch = batch_of(portal)
    web.send_signal(signal.SIGHUP)
    wait_for(lambda: not any(each.is_running() for each in old))
    assert portal.client().batches.retrieve(batch.id).id == batch.id
    return batch


def _restarted(portal: Stack, child: str) -> Any:
    """End a process gently, which the supervisor then starts anew."""
    batch = batch_of(portal)
    pid = portal.pid(child)
    portal.kill(child, signal.SIGTERM)
    wait_for(lambda: portal.restarted(child, pid))
    return batch
