"""`workers`, `drain_worker`, `resume_worker`, `forget_worker`: what they print, and what they refuse."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db.models import F
from django.test.utils import CaptureQueriesContext

from worker import services
from worker.identity import Identity
from worker.management.commands import drain_worker
from worker.models import Worker, WorkerState

pytestmark = pytest.mark.django_db

ME = Identity("gpu0", "0,1", "2 x H200", "host", 7, "boot:1:7:1", "v1")


def run(*arguments: str) -> str:
    out = io.StringIO()
    call_command(*arguments, stdout=out)
    return out.getvalue()


@pytest.fixture
def gpu0() -> Worker:
    return services.claim(ME)


def meanwhile(monkeypatch: pytest.MonkeyPatch, *happens: Callable[[], Any]) -> None:
    """Let these happen, one after the other, each time the command waits."""
    left = list(happens)
    monkeypatch.setattr(drain_worker.time, "sleep", lambda seconds: left.pop(0)())


def says(**said: Any) -> Callable[[], Any]:
    return lambda: services.beat(ME, **said)


def test_a_drain_is_told_and_not_waited_for(gpu0: Worker) -> None:
    assert run("drain_worker", "gpu0") == "gpu0 is draining\n"
    assert Worker.objects.get().draining is True
    assert run("resume_worker", "gpu0") == "gpu0 may lease\n"
    assert Worker.objects.get().draining is False


def test_a_drain_waits_until_nothing_is_left(gpu0: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    meanwhile(monkeypatch, says(state=WorkerState.RUNNING), says(state=WorkerState.DRAINED))
    assert run("drain_worker", "gpu0", "--wait") == "gpu0 is drained\n"


@pytest.mark.parametrize(
    "end", [says(state=WorkerState.STOPPED), lambda: Worker.objects.update(life="the next")]
)
def test_a_drain_with_exit_waits_for_the_end_of_the_process(
    gpu0: Worker, monkeypatch: pytest.MonkeyPatch, end: Callable[[], Any]
) -> None:
    meanwhile(monkeypatch, says(state=WorkerState.DRAINED), end)
    said = run("drain_worker", "gpu0", "--exit", "--wait")
    assert said == "gpu0 is drained and has ended\n"
    assert Worker.objects.get().exit_when_drained is True


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (
            lambda: Worker.objects.update(heartbeat_at=F("heartbeat_at") - timedelta(seconds=90)),
            r"^gpu0 has not been heard of for \d+ seconds\.$",
        ),
        (lambda: services.resume(actor=None, name="gpu0"), r"^gpu0 was resumed meanwhile\.$"),
        (lambda: Worker.objects.all().delete(), r"^gpu0 was forgotten meanwhile\.$"),
    ],
)
def test_a_wait_that_is_in_vain_ends(
    gpu0: Worker, monkeypatch: pytest.MonkeyPatch, event: Callable[[], Any], why: str
) -> None:
    meanwhile(monkeypatch, event)
    with pytest.raises(CommandError, match=why):
        run("drain_worker", "gpu0", "--wait")


def test_a_worker_that_has_stopped_is_drained(gpu0: Worker) -> None:
    services.beat(ME, state=WorkerState.STOPPED)
    assert run("drain_worker", "gpu0", "--wait") == "gpu0 is drained\n"


def test_a_worker_is_forgotten_once_it_is_gone(gpu0: Worker) -> None:
    with pytest.raises(CommandError, match="gpu0 is alive on host: stop it first"):
        run("forget_worker", "gpu0")
    services.beat(ME, state=WorkerState.STOPPED)
    assert run("forget_worker", "gpu0") == "gpu0 is forgotten\n"
    assert run("workers").splitlines()[1:] == []


@pytest.mark.parametrize("command", ["drain_worker", "resume_worker", "forget_worker"])
def test_a_worker_that_there_is_not_is_told(command: str) -> None:
    with pytest.raises(CommandError, match=r"^There is no worker 'gpu0'\.$"):
        run(command, "gpu0")


def test_the_table_says_what_each_worker_does(
    gpu0: Worker, django_assert_num_queries: Callable[[int], CaptureQueriesContext]
) -> None:
    services.beat(
        ME,
        state=WorkerState.RUNNING,
        loaded_model="qwen3",
        asleep=["llama", "phi"],
        in_flight=12,
        tokens_per_second=3456.7,
        error="other: does\nnot fit",
    )
    services.claim(Identity("gpu1", None, "", "host", 8, "boot:1:8:1", ""))
    services.claim(Identity("gpu2", "2", "", "far", 9, "boot:2:9:1", "v2"))
    services.drain(actor=None, name="gpu1")
    Worker.objects.filter(name="gpu1").update(health="sick", health_why="GPU 0: lost: why")
    Worker.objects.filter(name="gpu2").update(heartbeat_at=F("heartbeat_at") - timedelta(hours=1))
    with django_assert_num_queries(1):
        table = run("workers")
    table = re.sub(r"\d+ s ago", "lately", table)
    head, *rows = [[cell.strip() for cell in row.split("  ") if cell] for row in table.splitlines()]
    assert head == [
        "NAME", "HOST", "GPU", "VERSION", "STATE", "MODEL", "IN FLIGHT", "TOKENS/S", "HEARD OF",
        "ERROR",
    ]  # fmt: skip
    assert rows == [
        ["gpu0", "host:7", "0,1 2 x H200", "v1", "running", "qwen3 (asleep: llama, phi)", "12", "3457", "lately", "other: does not fit"],
        ["gpu1", "host:8", "-", "-", "starting, draining, sick", "-", "0", "0", "lately", "GPU 0: lost: why"],
        ["gpu2", "far:9", "2", "v2", "silent", "-", "0", "0", "lately", "-"],
    ]  # fmt: skip
