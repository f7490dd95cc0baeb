"""The home page: what runs, what waits, what went wrong, what was used and what is left."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.models import HourlyUse, Quota
from accounts.services import quotas
from batches import standings
from batches.models.batches import Status
from batches.services import hours, leases
from batches.services.finalization import finalize_batch
from batches.standings import Standing
from models_registry.models import Model
from models_registry.services import note_failure, register_model
from portal import queries
from tests import jobs
from tests.batches.conftest import Disk, disk  # noqa: F401 a fixture
from tests.batches.test_batch_pages import HTMX, batch_of
from tests.conftest import Person

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("wakeups_sent")]


def section(response: Any, title: str) -> str:
    """The part of the page under this heading, up to the next one."""
    found = re.search(rf">{title}</h2>(.*?)(?:<h2|</main>|$)", response.content.decode(), re.S)
    assert found, title
    return found[1]


def ids(text: str) -> list[str]:
    return re.findall(r'title="(batch_\w+)"', text)


def has(response: Any, title: str) -> bool:
    return f">{title}</h2>" in response.content.decode()


def stand(monkeypatch: pytest.MonkeyPatch, **position: int) -> None:
    """Say of each batch where it stands."""
    found = {name: Standing(at, "its turn comes", None, None) for name, at in position.items()}
    monkeypatch.setattr(standings, "of", lambda batch: found.get(batch.pk))


def used_in_hours(person: Person) -> list[tuple[int, int, int]]:
    with scopes_disabled():
        rows = HourlyUse.objects.filter(organization=person.caller.organization).order_by("hour")
        return list(rows.values_list("requests", "input_tokens", "output_tokens"))


# --- First steps ----------------------------------------------------------------------------


def test_until_a_batch_has_run_the_first_steps_are_shown(owner: Person, echo: Model) -> None:
    response = owner.browser.get("/")
    assert has(response, "Send your first batch")
    content = response.content.decode()
    assert 'base_url="http://testserver/v1"' in content
    assert '"model": "echo"' in content
    batch_of(owner, status=Status.COMPLETED, completed_at=timezone.now(), total=1, completed=1)
    assert not has(owner.browser.get("/"), "Send your first batch")


def test_a_first_batch_that_failed_is_shown_with_the_first_steps(owner: Person) -> None:
    batch = batch_of(owner, status=Status.FAILED, failed_at=timezone.now())
    response = owner.browser.get("/")
    assert has(response, "Send your first batch")
    assert ids(section(response, "Needs a look")) == [batch.pk]


def test_who_may_see_no_batches_is_sent_on(reviewer: Person) -> None:
    response = reviewer.browser.get("/")
    assert (response.status_code, response["Location"]) == (302, "/organization")


# --- What runs and waits --------------------------------------------------------------------


def test_what_runs_and_what_waits_are_told_apart_and_nobody_elses_is_shown(
    owner: Person, stranger: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = batch_of(owner, status=Status.IN_PROGRESS, total=10, completed=4)
    waits = batch_of(owner, status=Status.IN_PROGRESS, total=10)
    validating = batch_of(owner)
    batch_of(owner, status=Status.COMPLETED, completed_at=timezone.now())
    batch_of(stranger, status=Status.IN_PROGRESS, total=10)
    stand(monkeypatch, **{runs.pk: 0, waits.pk: 3})
    response = owner.browser.get("/")
    assert ids(section(response, "Running now")) == [runs.pk]
    assert ids(section(response, "Waiting")) == [waits.pk, validating.pk]
    assert "Its turn comes" in section(response, "Waiting")


def test_without_a_sweep_a_batch_runs_once_it_has_answers(owner: Person) -> None:
    runs = batch_of(owner, status=Status.IN_PROGRESS, total=10, completed=1)
    waits = batch_of(owner, status=Status.IN_PROGRESS, total=10)
    response = owner.browser.get("/")
    assert ids(section(response, "Running now")) == [runs.pk]
    assert ids(section(response, "Waiting")) == [waits.pk]


def test_the_rest_is_counted(owner: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "LOOKED_AT", 6)
    for _ in range(8):
        batch_of(owner, status=Status.IN_PROGRESS, total=10, completed=1)
    response = owner.browser.get("/")
    assert len(ids(section(response, "Running now"))) == 5
    assert "3 more are not finished." in response.content.decode()


def test_what_runs_is_shown_however_many_older_ones_wait(
    owner: Person, echo: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "LOOKED_AT", 3)
    for _ in range(4):
        batch_of(owner, status=Status.IN_PROGRESS, total=10)
    runs = jobs.running(owner.caller, 5)
    jobs.lease("gpu0", only="echo")
    stand(monkeypatch, **{runs.pk: 0})
    response = owner.browser.get("/")
    assert ids(section(response, "Running now")) == [runs.pk]
    assert len(ids(section(response, "Waiting"))) == 3
    assert "1 more is not finished." in response.content.decode()


def test_what_failed_is_shown_however_many_newer_ones_ended_well(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "NEWEST", 2)
    now = timezone.now()
    failed = batch_of(owner, status=Status.FAILED, failed_at=now)
    expired = batch_of(owner, status=Status.EXPIRED, expired_at=now, total=1, failed=1)
    old = batch_of(owner, status=Status.FAILED, failed_at=now)
    jobs.change(old, created_at=now - timedelta(days=8))
    for _ in range(2):
        batch_of(owner, status=Status.COMPLETED, completed_at=now, total=1, completed=1)
    some = batch_of(
        owner, status=Status.COMPLETED, completed_at=now, total=2, completed=1, failed=1
    )
    response = owner.browser.get("/")
    assert ids(section(response, "Needs a look")) == [some.pk, expired.pk, failed.pk]


def test_the_page_asks_again_while_something_is_unfinished(owner: Person) -> None:
    batch = batch_of(owner, status=Status.IN_PROGRESS, total=10)
    client = owner.browser
    assert 'hx-trigger="every 3s, portal:seen from:body"' in client.get("/").content.decode()
    part = client.get("/", headers=HTMX)
    assert part.status_code == 200
    assert part.content.decode().strip().startswith('<div class="portal-stack" id="now"')
    jobs.change(batch, status=Status.COMPLETED)
    assert client.get("/", headers=HTMX).status_code == 286


def test_the_pages_queries_do_not_grow_with_its_rows(owner: Person, echo: Model) -> None:
    def count() -> int:
        client = owner.browser
        with CaptureQueriesContext(connection) as seen:
            assert client.get("/").status_code == 200
        return len(seen)

    def more() -> None:
        batch_of(owner, model=echo, status=Status.IN_PROGRESS, total=10, completed=1)
        batch_of(owner, model=echo)
        batch_of(owner, model=echo, status=Status.FAILED, failed_at=timezone.now())

    more()
    one = count()
    more()
    more()
    assert count() == one


# --- What needs a look ----------------------------------------------------------------------


def test_what_failed_lately_needs_a_look(owner: Person, stranger: Person) -> None:
    now = timezone.now()
    batch_of(stranger, status=Status.FAILED, failed_at=now)
    batch_of(owner, status=Status.COMPLETED, completed_at=now, total=2, completed=2)
    batch_of(owner, status=Status.CANCELLED, cancelled_at=now, failed=3)
    batch_of(owner, status=Status.FAILED, failed_at=now, created_at=now - timedelta(days=8))
    bad = [
        batch_of(owner, status=Status.FAILED, failed_at=now),
        batch_of(owner, status=Status.EXPIRED, expired_at=now),
        batch_of(owner, status=Status.COMPLETED, completed_at=now, total=2, failed=1, completed=1),
    ]
    found = ids(section(owner.browser.get("/"), "Needs a look"))
    assert found == [batch.pk for batch in reversed(bad)]


def test_a_model_that_does_not_load_needs_a_look_of_those_who_may_use_it(
    owner: Person, stranger: Person, echo: Model
) -> None:
    register_model(
        name="private", source="none", engine="instant", organizations=[owner.caller.organization]
    )
    note_failure("private", why="a path of the server's")
    said = section(owner.browser.get("/"), "Needs a look")
    assert "private" in said
    assert "a path" not in said
    assert not has(stranger.browser.get("/"), "Needs a look")


# --- What was used and what is left ---------------------------------------------------------


def test_hours_are_noted_while_a_batch_runs_and_the_rest_when_it_ends(
    owner: Person,
    stranger: Person,
    echo: Model,
    disk: Disk,  # noqa: F811
) -> None:
    batch = jobs.running(owner.caller, 3)
    lease = jobs.lease()
    first = jobs.outcome(1, input=10, output=20)
    leases.save(lease=lease, outcomes=[first], finished=False)
    assert used_in_hours(owner) == []
    hours.note_use()
    hours.note_use()
    assert used_in_hours(owner) == [(1, 10, 20)]
    rest = [jobs.outcome(at, input=1, output=2) for at in (2, 3)]
    leases.save(lease=lease, outcomes=rest, finished=True)
    finalize_batch(batch.pk)
    hours.note_use()
    assert used_in_hours(owner) == [(3, 12, 24)]
    assert used_in_hours(stranger) == []


def test_a_real_time_request_is_noted_when_it_is_settled(owner: Person) -> None:
    estimate = quotas.Estimate(model="echo", requests=1, tokens=9, prices=quotas.Prices())
    quotas.open_request(request_id="req_1", actor=owner.caller, estimate=estimate)
    quotas.settle("req_1", quotas.Used("/v1/chat/completions", 1, 5, 0, 4, 0, 0.1, batches=0))
    assert used_in_hours(owner) == [(1, 5, 4)]


def test_old_hours_are_forgotten(owner: Person) -> None:
    hour = queries.this_hour()
    with scopes_disabled():
        for age in (timedelta(0), hours.KEPT + timedelta(hours=2)):
            HourlyUse.objects.create(
                organization=owner.caller.organization, hour=hour - age, requests=1
            )
        hours.forget_old()
    assert used_in_hours(owner) == [(1, 0, 0)]


def test_a_day_and_a_week_are_summed(owner: Person) -> None:
    hour = queries.this_hour()
    with scopes_disabled():
        for age, requests in ((0, 1), (23, 20), (24, 300), (167, 4000), (168, 50_000)):
            HourlyUse.objects.create(
                organization=owner.caller.organization,
                hour=hour - timedelta(hours=age),
                requests=requests,
            )
    response = owner.browser.get("/")
    assert "<dd>21</dd>" in section(response, "Last 24 hours")
    assert "<dd>4,321</dd>" in section(response, "Last 7 days")


def test_the_limits_with_the_least_left_come_first(owner: Person) -> None:
    batch_of(owner)
    with scopes_disabled():
        Quota.objects.create(
            organization=owner.caller.organization,
            tokens_per_month=1000,
            concurrent_batches=2,
        )
    said = section(owner.browser.get("/"), "Limits")
    labels = re.findall(r'<div class="fw-medium">(.*?)</div>', said)
    assert labels[0] == "Unfinished batches"
    assert "1 of 2 batches" in said
