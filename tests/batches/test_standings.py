"""What people are told about the queue, on the API and on pages: of their own batches, and no more."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from django.core.cache import cache
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.services import organizations
from batches import standings
from batches.models import Backlog, Batch
from batches.models.batches import Status
from batches.queries import queue as queries
from batches.services import batches, leases
from batches.services.sweep import sweep
from models_registry.models import Change
from models_registry.services import note_failure, note_load, note_speed, register_model
from portal.cache import Cache
from tests import jobs
from tests.conftest import Person
from worker.models import Worker, WorkerState

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.usefixtures("own_storage", "wakeups_sent", "echo"),
]
NOBODY = "waiting: no worker is running; whoever runs the portal starts one with ./run worker"


@pytest.fixture(autouse=True)
def _nothing_told_yet(settings: Any) -> None:
    settings.CHUNK_REQUESTS = 10
    cache.delete(standings.KEY)
    standings._ask_again_at = 0.0


def worker(name: str, loaded: str = "", **fields: Any) -> Worker:
    now = timezone.now()
    given = {"state": WorkerState.RUNNING, "started_at": now, "heartbeat_at": now} | fields
    return Worker.objects.create(name=name, host="h", pid=1, loaded_model=loaded, **given)


def told(person: Person, batch: Batch) -> Any:
    return person.api.get(f"/v1/batches/{batch.pk}").json()["queue"]


def shown(person: Person) -> str:
    """What the page says of all batches, without its markup."""
    page = person.browser.get("/batches").content.decode()
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_a_batch_that_waits_is_told_its_place_and_time(owner: Person) -> None:
    first, second = jobs.running(owner.caller, 20), jobs.running(owner.caller, 10)
    note_speed("echo", 10.0)
    worker("w", "echo")
    now = timezone.now().timestamp()
    sweep()
    seconds = [sum(chunk.tokens for chunk in jobs.chunks(each)) / 10 for each in (first, second)]
    assert told(owner, first) == {
        "position": 1,
        "reason": "waiting: 0 chunks ahead, echo is loaded",
        "estimated_start_at": pytest.approx(now, abs=30),
        "estimated_completion_at": pytest.approx(now + seconds[0], abs=30),
    }
    assert told(owner, second) == {
        "position": 2,
        "reason": "waiting: 2 chunks ahead, echo is loaded",
        "estimated_start_at": pytest.approx(now + seconds[0], abs=30),
        "estimated_completion_at": pytest.approx(now + sum(seconds), abs=30),
    }
    listed = owner.api.get("/v1/batches").json()["data"]
    assert [each["queue"] for each in listed] == [told(owner, second), told(owner, first)]
    page = shown(owner)
    assert "Waiting: 0 chunks ahead, echo is loaded done about" in page
    assert "Waiting: 2 chunks ahead, echo is loaded starts about" in page


def test_a_batch_that_runs_is_told_since_and_until_when(owner: Person) -> None:
    batch = jobs.running(owner.caller, 10)
    note_speed("echo", 10.0)
    worker("w", "echo")
    lease = jobs.lease("w")
    lines = [jobs.outcome(at) for at in range(1, 6)]
    leases.save(lease=lease, outcomes=lines, finished=False)
    sweep()
    [running] = queries.running_batches()
    tokens = jobs.chunks(batch)[0].tokens
    assert running == (batch.pk, batch.organization_id, "echo", 1, tokens / 2)
    with scopes_disabled():
        started_at = Backlog.objects.get().started_at
    assert started_at is not None
    assert told(owner, batch) == {
        "position": 0,
        "reason": "running on 1 worker",
        "estimated_start_at": int(started_at.timestamp()),
        "estimated_completion_at": pytest.approx(timezone.now().timestamp() + tokens / 20, abs=30),
    }
    assert "Running on 1 worker done about" in shown(owner)


def test_before_the_first_sweep_and_after_the_end_there_is_nothing_to_tell(owner: Person) -> None:
    batch = jobs.running(owner.caller, 10)
    assert told(owner, batch) is None
    sweep()
    assert told(owner, batch)["reason"] == NOBODY
    cancelled = owner.api.post(f"/v1/batches/{batch.pk}/cancel").json()
    assert (cancelled["status"], cancelled["queue"]) == ("cancelling", None)
    for status in set(Status.values) - {Status.IN_PROGRESS}:
        jobs.change(batch, status=status)
        assert told(owner, batch) is None


def test_what_the_sweeps_told_is_forgotten_when_they_stop(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = jobs.running(owner.caller, 10)
    monkeypatch.setattr(standings, "KEPT_SECONDS", 0)
    sweep()
    assert told(owner, batch) is None


def test_with_the_cache_away_nothing_is_told_and_it_is_asked_once(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Away(Cache):
        def get(self, key: str, *args: Any, **options: Any) -> Any:
            asked.append(key)
            return super().get(key, *args, **options)

    away = Away("redis://127.0.0.1:1/0", {"OPTIONS": {"IGNORE_EXCEPTIONS": True}})
    monkeypatch.setattr(standings, "cache", away)
    batch = jobs.running(owner.caller, 10)
    sweep()
    assert [told(owner, batch) for _ in range(3)] == [None] * 3
    assert asked == [standings.KEY]
    assert shown(owner).count("In progress") == 2  # in the filter, and the batch's own


def test_it_costs_no_queries(owner: Person, stranger: Person) -> None:
    def queries_of(path: str) -> int:
        with CaptureQueriesContext(connection) as found:
            owner.api.get(path)
        return len(found)

    batch = jobs.running(owner.caller, 1)
    queries_of("/v1/batches")  # the key's first use is written down
    before = [queries_of("/v1/batches"), queries_of(f"/v1/batches/{batch.pk}")]
    for person in (owner, stranger, owner):
        jobs.running(person.caller, 1)
    sweep()
    assert told(owner, batch) is not None
    assert [queries_of("/v1/batches"), queries_of(f"/v1/batches/{batch.pk}")] == before


def test_working_it_out_takes_as_many_queries_for_many_batches_as_for_one(
    owner: Person, stranger: Person
) -> None:
    def count() -> int:
        with CaptureQueriesContext(connection) as found:
            standings.publish()
        return len(found)

    jobs.running(owner.caller, 1)
    before = count()
    for person in (owner, stranger, owner):
        jobs.running(person.caller, 15)
    jobs.lease("w")
    worker("w", "echo")
    assert (before, count()) == (10, 10)


# --- Who is told what -----------------------------------------------------------------------


def test_the_name_of_a_model_that_one_may_not_use_is_not_told(
    owner: Person, stranger: Person
) -> None:
    mine, theirs = owner.caller.organization, stranger.caller.organization
    private = {"source": "none", "engine": "instant"}
    register_model(name="secret-plan", organizations=[theirs], **private)  # type: ignore[arg-type]
    jobs.running(stranger.caller, [jobs.line("a", model="secret-plan")])
    ours, other = jobs.running(owner.caller, 1), jobs.running(stranger.caller, 1)
    worker("w", "secret-plan")
    sweep()
    assert "another model is loaded, swap planned at" in told(owner, ours)["reason"]
    assert "secret-plan is loaded, swap planned at" in told(stranger, other)["reason"]
    register_model(name="secret-plan", organizations=[mine, theirs], **private)  # type: ignore[arg-type]
    sweep()
    assert "secret-plan is loaded" in told(owner, ours)["reason"]


def test_a_restricted_model_whose_organizations_are_gone_is_nobodys(owner: Person) -> None:
    gone, _ = organizations.create_organization(name="Gone", owner_email="a@gone.test")
    register_model(name="orphan", source="none", engine="instant", organizations=[gone])
    with scopes_disabled():
        gone.delete()
    batch = jobs.running(owner.caller, 1)
    worker("w", "orphan")
    sweep()
    assert "another model is loaded" in told(owner, batch)["reason"]


def test_a_suspended_organization_sees_that_its_work_is_held(owner: Person) -> None:
    jobs.running(owner.caller, 1)
    worker("w", "echo")
    organizations.suspend_organization(
        actor=None, organization=owner.caller.organization, why="Unpaid."
    )
    sweep()
    assert "Held: the organization is suspended or its work is on hold" in shown(owner)
    assert leases.lease_next(owner="w", loaded="echo", residency=timedelta(0)) is None


def test_a_model_that_does_not_load_is_told_without_its_error(owner: Person) -> None:
    batch = jobs.running(owner.caller, 1)
    worker("w")
    note_failure("echo", why="no room at /a/secret/path")
    sweep()
    reason = "waiting: echo could not be loaded; it is tried again from time to time"
    assert told(owner, batch) == {
        "position": 1,
        "reason": reason,
        "estimated_start_at": None,
        "estimated_completion_at": None,
    }
    assert "could not be loaded" in shown(owner)


def test_a_model_that_is_being_loaded_is_said_to_be(owner: Person) -> None:
    note_load("echo", Change.LOAD, worker="gpu0", gpu="", seconds=40.0)
    batch = jobs.running(owner.caller, 20)
    worker("w", state=WorkerState.LOADING)
    jobs.lease("w")
    waiting = jobs.running(owner.caller, 1)
    sweep()
    assert told(owner, batch)["reason"] == "running on 1 worker"
    assert told(owner, waiting)["reason"] == "waiting: 1 chunk ahead, echo is being loaded"
    soon = timezone.now().timestamp() + 40
    assert told(owner, waiting)["estimated_start_at"] == pytest.approx(soon, abs=30)


def test_the_reason_is_shown_as_text(owner: Person) -> None:
    batch = jobs.running(owner.caller, 1)
    standings.publish()
    standings._held = {batch.pk: [1, "<b>&", None, None]}
    standings._ask_again_at = float("inf")
    assert "&lt;b&gt;&amp;" in owner.browser.get("/batches").content.decode()


def test_cancelling_is_answered_without_a_place(owner: Person) -> None:
    batch = jobs.running(owner.caller, 1)
    sweep()
    batches.cancel_batch(actor=owner.caller, batch=batch)
    assert told(owner, batch) is None
