"""The operators' page of workers: what it tells of each, and what it asks of them."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.models import AuditEvent, User
from models_registry.models import Change, Model
from models_registry.services import note_load
from tests import jobs
from tests.conftest import Person
from worker import views
from worker.models import Worker, WorkerState

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.usefixtures("own_storage", "wakeups_sent", "echo"),
]
PAGE = "/operator/workers"


@pytest.fixture
def desk(operator: User) -> Client:
    client = Client()
    client.force_login(operator, backend="allauth.account.auth_backends.AuthenticationBackend")
    return client


def worker(name: str = "gpu0", **fields: Any) -> Worker:
    now = timezone.now()
    given = {"state": WorkerState.RUNNING, "started_at": now, "heartbeat_at": now, "host": "here"}
    return Worker.objects.create(name=name, pid=7, **given | fields)


def shown(desk: Client, query: str = "") -> str:
    """The page without its markup and its menu."""
    page = desk.get(f"{PAGE}{query}").content.decode().partition("<main")[2]
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def names(desk: Client, query: str = "") -> list[str]:
    page = desk.get(f"{PAGE}{query}").content.decode()
    return re.findall(r'<h2 class="h3 mb-0" id="worker-\d+">(.+?)</h2>', page)


def actions() -> list[tuple[str, str, str]]:
    with scopes_disabled():
        found = AuditEvent.objects.filter(organization=None, via="operator").order_by("number")
        return list(found.values_list("action", "actor_label", "target_label"))


def test_it_tells_all_that_a_worker_says(desk: Client, owner: Person) -> None:
    worker(
        gpu="0",
        gpu_kind="H200",
        loaded_model="echo",
        asleep=["llama"],
        in_flight=12,
        tokens_per_second=1234.4,
        memory_used=70 * 1024,
        memory_total=140 * 1024,
        temperature=61,
        utilization=93.2,
        power=512.0,
        health="paused",
        health_why="too hot",
        error="It hiccuped.",
    )
    for change, seconds in ((Change.LOAD, 40.0), (Change.LOAD, 20.0), (Change.WAKE, 3.0)):
        note_load("echo", change, worker="gpu0", gpu="H200", seconds=seconds)
    note_load("echo", Change.LOAD, worker="gpu0", gpu="H200", seconds=1.0, error="no room")
    batch = jobs.running(owner.caller, 5)
    jobs.lease("gpu0")
    said = shown(desk)
    for text in (
        "1 running; 1,234 tokens a second in all",
        "gpu0 Running",
        "GPU paused: feeds nothing for now too hot",
        "It hiccuped.",
        "H200 (0)",
        "70.0 of 140.0 GiB",
        "93 % busy, 61 °C, 512 W",
        "echo asleep: llama",
        "1,234 tokens/s, 12 requests in flight",
        "2 loads (60 s), 1 waking (3 s), 1 failed",
        f"1 chunk (5 requests) of Acme {batch.pk}",
        "failed: no room",
    ):
        assert text in said, text


def test_a_worker_that_is_silent_is_told_apart_and_can_be_forgotten(desk: Client) -> None:
    gone = worker(heartbeat_at=timezone.now() - timedelta(minutes=5))
    said = shown(desk)
    assert "0 running, 1 silent" in said
    assert re.search(r"gpu0 Silent Not heard of for 3\d\d s", said)
    assert desk.post(f"{PAGE}/{gone.pk}/unload", follow=True).status_code == 200
    assert not Worker.objects.get().unload_asked
    assert (
        "gpu0 is forgotten." in desk.post(f"{PAGE}/{gone.pk}/forget", follow=True).content.decode()
    )
    assert not Worker.objects.exists()
    assert "No worker is running" in shown(desk)


def test_a_worker_is_drained_resumed_and_unloaded(desk: Client) -> None:
    it = worker()
    for action, draining, unload in (
        ("drain", True, False),
        ("resume", False, False),
        ("unload", False, True),
        ("unload", False, True),
    ):
        assert desk.post(f"{PAGE}/{it.pk}/{action}")["Location"] == PAGE
        it.refresh_from_db()
        assert (it.draining, it.unload_asked) == (draining, unload)
    assert "Unloads its models as soon as nothing is in hand." in shown(desk)
    assert actions() == [
        ("worker.drained", "operator@portal.test", "gpu0"),
        ("worker.resumed", "operator@portal.test", "gpu0"),
        ("worker.unload_asked", "operator@portal.test", "gpu0"),
    ]


def test_before_draining_it_says_what_is_finished(desk: Client, owner: Person) -> None:
    worker()
    rest = "and begins nothing more, over restarts too, until it is resumed."
    assert f"It works on nothing now {rest}" in shown(desk)
    jobs.running(owner.caller, 1)
    jobs.lease("gpu0")
    assert f"It finishes the chunk that it works on now {rest}" in shown(desk)
    jobs.running(owner.caller, 1)
    jobs.lease("gpu0")
    assert f"It finishes the 2 chunks that it works on now {rest}" in shown(desk)


def test_one_that_is_alive_is_not_forgotten(desk: Client) -> None:
    it = worker()
    page = desk.post(f"{PAGE}/{it.pk}/forget", follow=True).content.decode()
    assert "gpu0 is alive on here: stop it first." in page
    assert Worker.objects.exists()


def test_it_asks_again_also_when_there_is_none(desk: Client) -> None:
    said = desk.get(PAGE).content.decode()
    assert "No worker is running" in said
    assert 'hx-trigger="every 3s, portal:seen from:body"' in said


def test_it_pages_by_name(desk: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "PAGE_SIZE", 2)
    for name in ("c", "a", "b"):
        worker(name)
    assert [names(desk, query) for query in ("", "?after=b", "?after=c")] == [["a", "b"], ["c"], []]
    assert desk.get(f"{PAGE}?after=%00").status_code == 200


def test_all_are_counted_and_each_kind_can_be_shown(
    desk: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "PAGE_SIZE", 1)
    ago = timezone.now() - timedelta(minutes=5)
    worker("a", tokens_per_second=1_000, loaded_model="echo")
    worker("b", tokens_per_second=2_000, host="there")
    worker("quiet", heartbeat_at=ago, tokens_per_second=4_000)
    worker("was", heartbeat_at=ago, state=WorkerState.STOPPED)
    said = "2 running, 1 silent, 1 stopped; 3,000 tokens a second in all"
    assert said in shown(desk).replace(" ,", ",").replace(" ;", ";")
    asked = (
        "?after=b",
        "?show=silent",
        "?show=stopped",
        "?q=THERE",
        "?q=echo",
        "?q=was",
        "?show=x",
    )
    assert [names(desk, query) for query in asked] == [
        ["quiet"],
        ["quiet"],
        ["was"],
        ["b"],
        ["a"],
        [],
        ["a"],
    ]
    assert "No worker is like this" in shown(desk, "?q=was")
    assert 'href="?after=a" rel="next"' in desk.get(PAGE).content.decode()
    assert 'href="?q=r&amp;after=a"' in desk.get(f"{PAGE}?q=r").content.decode()


def test_who_asked_something_of_a_worker_stays_on_the_page(desk: Client) -> None:
    it = worker("b", host="there")
    page = f"{PAGE}?q=there&after=a"
    assert f"/{it.pk}/drain?q=there&amp;after=a" in desk.get(page).content.decode()
    assert desk.post(f"{PAGE}/{it.pk}/drain?q=there&after=a")["Location"] == page


def test_all_that_are_found_are_drained_and_resumed_on_whatever_page(
    desk: Client, owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "PAGE_SIZE", 1)
    for name, host in (("a", "here"), ("b", "there"), ("c", "there")):
        worker(name, host=host)
    worker("d", host="there", state=WorkerState.STOPPED)
    assert "Drain all 2" in shown(desk, "?q=there")
    page = desk.post(f"{PAGE}/all/drain?q=there", follow=True).content.decode()
    assert "Asked 2 workers to finish what they have" in page
    draining = Worker.objects.filter(draining=True).order_by("name")
    assert list(draining.values_list("name", flat=True)) == ["b", "c"]
    assert actions() == [
        ("worker.drained", "operator@portal.test", "b"),
        ("worker.drained", "operator@portal.test", "c"),
    ]
    desk.post(f"{PAGE}/all/resume")
    assert not draining.exists()
    assert desk.post(f"{PAGE}/all/forget").status_code == 404
    assert desk.get(f"{PAGE}/all/drain").status_code == 405
    assert owner.browser.post(f"{PAGE}/all/drain").status_code == 404


def test_its_queries_do_not_grow(desk: Client, owner: Person, echo: Model) -> None:
    def count() -> int:
        with CaptureQueriesContext(connection) as found:
            desk.get(PAGE)
        return len(found)

    worker("a")
    count()
    of_one = count()
    for name in ("b", "c"):
        worker(name)
        note_load("echo", Change.LOAD, worker=name, gpu="", seconds=1.0)
        jobs.running(owner.caller, 1)
        jobs.lease(name, loaded="echo", only="echo")
    assert count() == of_one


@pytest.mark.parametrize("action", ["drain", "resume", "unload", "forget"])
def test_others_are_not_let_in(action: str, owner: Person, desk: Client) -> None:
    it = worker()
    path = f"{PAGE}/{it.pk}/{action}"
    assert owner.browser.post(path).status_code == 404
    assert owner.browser.get(PAGE).status_code == 404
    assert Client().post(path)["Location"].startswith("/accounts/login/")
    assert desk.get(path).status_code == 405
    assert desk.post(f"{PAGE}/999999/{action}").status_code == 404
    it.refresh_from_db()
    assert (it.draining, it.unload_asked) == (False, False)
