"""GET /metrics: who may read it, what it counts, and that all web processes are in it."""

from __future__ import annotations

import os
import re
import signal
import urllib.request
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from django.db import OperationalError
from django.test import Client
from django.utils import timezone
from prometheus_client.parser import text_string_to_metric_families

from portal import supervisor
from tests.conftest import Person
from tests.stack import Stack, wait_for
from worker import queries
from worker.models import Worker

REMOTE = {"REMOTE_ADDR": "203.0.113.5"}


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Each sample's value by its name and its labels' values, in the order of their names."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def read() -> dict[tuple[str, ...], float]:
    return samples(Client().get("/metrics").content.decode())


# --- Who may read it ------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1"])
def test_this_host_may_read_them(db: None, address: str) -> None:
    response = Client().get("/metrics", REMOTE_ADDR=address)
    assert response.status_code == 200
    assert response["Content-Type"].partition(";")[0] == "text/plain"


@pytest.mark.parametrize("address", ["203.0.113.5", "10.0.0.7", "2001:db8::1", ""])
def test_others_may_not(db: None, address: str) -> None:
    assert Client().get("/metrics", REMOTE_ADDR=address).status_code == 403


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded"])
def test_what_a_proxy_on_this_host_passes_on_is_not_from_this_host(db: None, header: str) -> None:
    response = Client().get("/metrics", REMOTE_ADDR="127.0.0.1", headers={header: "127.0.0.1"})
    assert response.status_code == 403


@pytest.mark.parametrize(
    ("token", "sent", "status"),
    [
        ("secret", "Bearer secret", 200),
        ("secret", "Bearer other", 403),
        ("secret", "Bearer ", 403),
        ("", "Bearer ", 403),
        ("", "Bearer secret", 403),
        ("secret", "Bearer \xe9", 403),
    ],
)
def test_a_token_opens_them_from_elsewhere(
    db: None, settings: Any, token: str, sent: str, status: int
) -> None:
    settings.METRICS_TOKEN = token
    response = Client().get("/metrics", headers={"authorization": sent}, **REMOTE)
    assert response.status_code == status


def test_other_methods_are_405(db: None) -> None:
    assert Client().post("/metrics").status_code == 405


# --- What they say --------------------------------------------------------------------------


def test_requests_are_counted_and_timed_by_the_beginning_of_their_route(owner: Person) -> None:
    before = read()
    owner.api.get("/v1/batches/batch_0")
    owner.api.get("/v1/batches")
    owner.browser.get("/")
    Client().get("/no/such/page")
    Client().generic("BREW", "/healthz")
    after = read()
    counted = {
        labels[1:]: after[labels] - before.get(labels, 0)
        for labels in after
        if labels[0] == "portal_requests_total" and after[labels] != before.get(labels, 0)
    }
    assert counted == {
        ("GET", "v1/batches", "404"): 1,
        ("GET", "v1/batches", "200"): 1,
        ("GET", "home", "200"): 1,
        ("GET", "none", "404"): 1,
        ("other", "healthz", "200"): 1,
        ("GET", "metrics", "200"): 1,
    }
    timed = ("portal_request_seconds_count", "GET", "v1/batches")
    assert after[timed] - before.get(timed, 0) == 2


def test_no_label_holds_anything_of_a_tenants(owner: Person) -> None:
    organization = owner.caller.organization
    owner.api.get(f"/v1/batches/{organization.pk}")
    owner.browser.get(f"/files/{owner.caller.project.pk}/content")
    text = Client().get("/metrics").content.decode()
    assert (
        re.findall(f"{organization.pk}|{owner.caller.project.pk}|{organization.slug}", text) == []
    )


# --- GPUs, from the workers' rows ------------------------------------------------------------


def worker(name: str, **fields: Any) -> Worker:
    given = {"host": "h", "pid": 1, "started_at": timezone.now(), "heartbeat_at": timezone.now()}
    return Worker.objects.create(name=name, **given | fields)


def gpu_samples() -> dict[tuple[str, ...], float]:
    return {name: value for name, value in read().items() if name[0].startswith("worker_gpu_")}


def test_gpus_are_told_from_the_workers_rows(db: None) -> None:
    worker(
        "gpu0",
        gpu_kind="NVIDIA L4",
        health="paused",
        temperature=71,
        power=68.5,
        utilization=40,
        memory_used=1,
        memory_total=23_034,
    )
    mib = 1024 * 1024
    assert gpu_samples() == {
        ("worker_gpu_temperature_celsius", "NVIDIA L4", "gpu0"): 71,
        ("worker_gpu_power_watts", "NVIDIA L4", "gpu0"): 68.5,
        ("worker_gpu_utilization_ratio", "NVIDIA L4", "gpu0"): 0.4,
        ("worker_gpu_memory_used_bytes", "NVIDIA L4", "gpu0"): mib,
        ("worker_gpu_memory_total_bytes", "NVIDIA L4", "gpu0"): 23_034 * mib,
        ("worker_gpu_health", "NVIDIA L4", "ok", "gpu0"): 0,
        ("worker_gpu_health", "NVIDIA L4", "paused", "gpu0"): 1,
        ("worker_gpu_health", "NVIDIA L4", "resting", "gpu0"): 0,
        ("worker_gpu_health", "NVIDIA L4", "sick", "gpu0"): 0,
    }


def test_what_a_gpu_does_not_tell_is_left_out(db: None) -> None:
    worker("gpu0", health="ok")
    assert {name[0] for name in gpu_samples()} == {"worker_gpu_health"}


def test_workers_without_a_gpu_and_those_that_are_gone_are_left_out(db: None) -> None:
    worker("none", temperature=None)
    worker("stopped", health="ok", temperature=50, state="stopped")
    worker("silent", health="ok", temperature=50)
    long_ago = timezone.now() - timedelta(days=1)
    Worker.objects.filter(name="silent").update(heartbeat_at=long_ago)
    assert gpu_samples() == {}


def test_the_number_of_workers_is_bounded_and_that_of_queries_constant(
    db: None, monkeypatch: pytest.MonkeyPatch, django_assert_num_queries: Any
) -> None:
    monkeypatch.setattr(queries, "MOST", 2)
    for name in "abc":
        worker(name, health="ok", temperature=50)
    with django_assert_num_queries(1):
        found = gpu_samples()
    assert {name[-1] for name in found} == {"a", "b"}


def test_without_the_database_the_rest_is_told(db: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> None:
        raise OperationalError("away")

    monkeypatch.setattr(queries, "with_gpus", away)
    assert gpu_samples() == {}
    assert any(name[0] == "portal_requests_total" for name in read())


# --- Several processes ----------------------------------------------------------------------


def test_what_an_earlier_life_counted_is_gone_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "counter_1.db").write_bytes(b"old")
    options = supervisor._parser().parse_args(["serve"])
    supervisor.children(options, {}, tmp_path)
    assert list((tmp_path / "metrics").iterdir()) == []


@pytest.mark.slow
def test_a_running_portal_adds_up_all_of_its_web_processes(stack: Stack) -> None:
    def served() -> float:
        with urllib.request.urlopen(f"{stack.base_url}/metrics") as response:
            found = samples(response.read().decode())
        return found.get(("portal_requests_total", "GET", "healthz", "200"), 0.0)

    before = served()
    for _ in range(40):
        urllib.request.urlopen(f"{stack.base_url}/healthz").close()
    assert served() - before == 40
    workers = psutil.Process(stack.pid("web")).children(recursive=True)
    os.kill(workers[-1].pid, signal.SIGTERM)
    wait_for(lambda: not psutil.pid_exists(workers[-1].pid))
    assert served() - before == 40
