"""Events: each goes with its change, to those whom it concerns, and no change goes without."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
import time_machine
from django.core import mail
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.models import Quota, UsageRecord
from accounts.services import quotas
from batches import tasks
from batches.models import Event, File, QuotaNotice, WebhookDelivery, WebhookEndpoint
from batches.models.events import EventType
from batches.services import deliveries, events, files, leases, webhooks
from batches.services.events import News
from models_registry import services as registry
from models_registry.models import Change
from models_registry.services import register_model
from tests import jobs
from tests.conftest import Person

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("own_storage", "wakeups_sent")]
URL = "http://127.0.0.1:9/hook"


def endpoint(person: Person, **fields: Any) -> WebhookEndpoint:
    given = {"name": "hook", "event_types": list(EventType.values), "project": None, "url": URL}
    made, _ = webhooks.create_webhook(actor=person.caller, **(given | fields))
    return made


def told(type: str, person: Person | None = None) -> list[dict[str, Any]]:
    """The data of the events of this type, oldest first; of one organization or of all."""
    with scopes_disabled():
        found = Event.objects.filter(type=type).order_by("pk")
        if person is not None:
            found = found.filter(organization=person.caller.organization)
        return [orjson.loads(event.body)["data"] for event in found]


# --- Progress ---------------------------------------------------------------------------------


def answered(batch: Any, *numbers: int, lease: leases.Lease | None = None) -> leases.Lease:
    lease = lease or jobs.lease()
    leases.save(lease=lease, outcomes=[jobs.outcome(number) for number in numbers], finished=False)
    return lease


@pytest.mark.usefixtures("echo")
def test_a_batch_tells_of_each_percentage_once_as_it_is_reached(owner: Person) -> None:
    batch = jobs.running(owner.caller, 8)
    lease = answered(batch, 1)
    assert told("batch.progress") == []
    answered(batch, 2, lease=lease)
    answered(batch, 1, 2, lease=lease)  # nothing new
    answered(batch, 3, 4, 5, 6, lease=lease)
    answered(batch, 7, 8, lease=lease)
    assert [
        (each["percent"], each["request_counts"]["completed"]) for each in told("batch.progress")
    ] == [
        (25, 2),
        (50, 6),
        (75, 6),
    ]
    assert {each["id"] for each in told("batch.progress")} == {batch.pk}


@pytest.mark.usefixtures("echo")
def test_a_batch_may_choose_its_percentages(owner: Person) -> None:
    batch = jobs.running(owner.caller, 4, progress_percents=[99, 10, 10])
    lease = answered(batch, 1, 2, 3)
    assert [each["percent"] for each in told("batch.progress")] == [10]
    answered(batch, 4, lease=lease)
    assert [each["percent"] for each in told("batch.progress")] == [10, 99]
    none = jobs.running(owner.caller, 4, progress_percents=[])
    leases.save(lease=jobs.lease(), outcomes=[jobs.outcome(1)], finished=False)
    assert none.pk not in {each["id"] for each in told("batch.progress")}


@pytest.mark.usefixtures("echo")
def test_progress_and_what_it_counts_commit_together(owner: Person) -> None:
    batch = jobs.running(owner.caller, 4)
    with transaction.atomic():
        answered(batch, 1, 2)
        transaction.set_rollback(True)
    assert (told("batch.progress"), jobs.fresh(batch).completed) == ([], 0)


@pytest.mark.usefixtures("echo")
def test_a_save_that_reaches_no_percentage_asks_nothing_more(owner: Person) -> None:
    batch = jobs.running(owner.caller, 100)
    lease = answered(batch, 1)
    with CaptureQueriesContext(connection) as queries:
        answered(batch, 2, lease=lease)
    asked = [each["sql"].split()[0] for each in queries if "SAVEPOINT" not in each["sql"]]
    assert len(asked) == 2  # hold the lease, count; the journal goes past Django


# --- Files ------------------------------------------------------------------------------------


def expired_file(person: Person) -> File:
    file = jobs.stored(person.caller, b"x")
    with scopes_disabled():
        File.objects.filter(pk=file.pk).update(expires_at=timezone.now() - timedelta(seconds=1))
    return file


def test_a_file_that_expires_is_told_of_once_to_its_project(
    owner: Person, stranger: Person
) -> None:
    mine, theirs = endpoint(owner, project=owner.caller.project), endpoint(stranger)
    file, foreign = expired_file(owner), expired_file(stranger)
    kept = jobs.stored(owner.caller, b"x")
    files.expire_files()
    files.expire_files()
    assert told("file.expired", owner) == [{"id": file.pk}]
    assert told("file.expired", stranger) == [{"id": foreign.pk}]
    with scopes_disabled():
        assert {each.endpoint_id for each in WebhookDelivery.objects.all()} == {mine.pk, theirs.pk}
        assert File.objects.get(pk=kept.pk).deleted_at is None


def test_many_files_expire_in_slices(owner: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "EXPIRE_AT_ONCE", 2)
    expected = {expired_file(owner).pk for _ in range(5)}
    files.expire_files()
    assert {each["id"] for each in told("file.expired")} == expected


def test_a_file_that_could_not_be_told_of_does_not_expire(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = expired_file(owner)

    def broken(*_: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(events, "files_expired", broken)
    with pytest.raises(RuntimeError), transaction.atomic():
        files.expire_files()
    with scopes_disabled():
        assert File.objects.get(pk=file.pk).deleted_at is None


# --- Models -----------------------------------------------------------------------------------


def loaded(change: Change = Change.LOAD, **given: Any) -> None:
    registry.note_load("m", change, **({"worker": "gpu0", "gpu": "", "seconds": 1.0} | given))


def about_models(person: Person) -> list[str]:
    with scopes_disabled():
        found = Event.objects.filter(organization=person.caller.organization)
        return list(found.order_by("pk").values_list("type", flat=True))


def test_a_model_is_told_of_when_it_loads_and_when_it_does_not_any_more(owner: Person) -> None:
    register_model(name="m", source="none", engine="instant")
    loaded(error="no room")
    registry.note_failure("m", why="no room at /a/secret/path")
    registry.note_failure("m", why="still none")
    loaded()
    loaded(Change.SLEEP)
    loaded(Change.WAKE)
    loaded()
    assert about_models(owner) == ["model.failed", "model.ready"]
    assert told("model.failed") == told("model.ready") == [{"id": "m"}]
    register_model(name="m", source="none", engine="instant")
    loaded()
    assert about_models(owner) == ["model.failed", "model.ready", "model.ready"]


def test_a_model_is_told_of_to_those_who_may_use_it(owner: Person, stranger: Person) -> None:
    mine = endpoint(owner, project=owner.caller.project)
    endpoint(stranger)
    register_model(
        name="m", source="none", engine="instant", organizations=[owner.caller.organization]
    )
    loaded()
    assert (about_models(owner), about_models(stranger)) == (["model.ready"], [])
    with scopes_disabled():
        assert WebhookDelivery.objects.get().endpoint_id == mine.pk


def test_a_models_event_and_its_load_commit_together(owner: Person) -> None:
    register_model(name="m", source="none", engine="instant")
    with transaction.atomic():
        loaded()
        transaction.set_rollback(True)
    assert told("model.ready") == []
    loaded()
    assert told("model.ready") == [{"id": "m"}]


def test_telling_many_takes_as_many_queries_as_telling_one(owner: Person, stranger: Person) -> None:
    def queries(*people: Person) -> int:
        news = [News(person.caller.organization.pk, None, {}) for person in people]
        with CaptureQueriesContext(connection) as found:
            events.record_all(EventType.MODEL_READY, news)
        return len(found)

    endpoint(owner)
    endpoint(stranger)
    assert queries(owner) == queries(owner, stranger)


# --- Quotas -----------------------------------------------------------------------------------


def limited(person: Person, **limits: Any) -> Quota:
    with scopes_disabled():
        return Quota.objects.create(organization=person.caller.organization, **limits)


def used(person: Person, tokens: int) -> None:
    """A batch of so many tokens, from its reservation to its end."""
    id = f"batch_{tokens}_{timezone.now().timestamp()}"
    with transaction.atomic():
        quotas.open_batch(batch_id=id, actor=person.caller)
    quotas.settle(
        id,
        quotas.Used(
            endpoint="/v1/chat/completions",
            requests=1,
            input_tokens=tokens,
            cached_tokens=0,
            output_tokens=0,
            reasoning_tokens=0,
            gpu_seconds=0.0,
        ),
    )


def test_a_quotas_thresholds_are_told_of_once_a_month(owner: Person) -> None:
    limited(owner, tokens_per_month=100)
    organization = owner.caller.organization.pk

    def percents() -> list[int]:
        return [each["percent"] for each in told("quota.threshold")]

    with time_machine.travel(datetime(2027, 1, 1, tzinfo=UTC)):
        used(owner, 79)
        assert percents() == []
        used(owner, 1)
        used(owner, 1)
        assert percents() == [80]
        used(owner, 19)
        assert percents() == [80, 100]
    assert told("quota.threshold")[0] == {
        "id": organization,
        "limit": "tokens_per_month",
        "percent": 80,
        "most": 100,
        "used": 80,
    }
    with time_machine.travel(datetime(2027, 1, 31, 12, tzinfo=UTC)):
        with scopes_disabled():
            deliveries.forget_old()  # the event may be forgotten, that it was told of is not
        quotas.month_used.send(
            Quota, quota=_the_quota(), limit="tokens_per_month", most=100, used=100
        )
        assert percents() == []
    with time_machine.travel(datetime(2027, 2, 1, tzinfo=UTC)):
        used(owner, 85)
        assert percents() == [80]


def _the_quota() -> Quota:
    with scopes_disabled():
        return Quota.objects.select_related("organization", "api_key").get()


def test_what_is_reserved_counts_and_a_key_is_told_of_by_its_id(owner: Person) -> None:
    with scopes_disabled():
        key = owner.caller.project.api_keys.get()
        limited(owner, tokens_per_month=10, budget_per_month=1, api_key=key)
    caller = owner.caller
    with transaction.atomic():
        quotas.open_batch(batch_id="batch_1", actor=replace(caller, api_key=key))
        estimate = quotas.Estimate("echo", 1, 9, quotas.Prices(input=100_000))  # type: ignore[arg-type]
        assert quotas.reserve("batch_1", estimate) == []
    assert [
        (each["id"], each["limit"], each["percent"], each["used"])
        for each in told("quota.threshold")
    ] == [
        (key.pk, "tokens_per_month", 80, 9),
        (key.pk, "budget_per_month", 80, "0.90"),
    ]


def test_a_threshold_and_the_use_that_reaches_it_commit_together(owner: Person) -> None:
    limited(owner, tokens_per_month=10)
    with transaction.atomic():
        used(owner, 10)
        transaction.set_rollback(True)
    with scopes_disabled():
        assert not QuotaNotice.objects.exists()
        assert not UsageRecord.objects.exists()
    assert told("quota.threshold") == []
    used(owner, 10)
    assert [each["percent"] for each in told("quota.threshold")] == [80, 100]


# --- Endpoints that are given up ----------------------------------------------------------------


def test_an_endpoint_that_is_given_up_is_told_of_by_event_and_by_mail(
    owner: Person, admin: Person, teammate: Person, stranger: Person, wakeups_sent: list[Any]
) -> None:
    dead = endpoint(owner, event_types=["batch.completed"])
    endpoint(stranger)
    with scopes_disabled(), transaction.atomic():
        deliveries.disable(WebhookEndpoint.objects.get(pk=dead.pk), "Nothing arrived for 5 days.")
    assert told("webhook.disabled") == [{"id": dead.pk, "reason": "Nothing arrived for 5 days."}]
    tasks.mail_of_disabled(dead.pk)
    assert [each.to for each in mail.outbox] == [["owner@acme.test"], ["admin@acme.test"]]
    said = mail.outbox[0]
    assert said.subject == "Webhook switched off: hook"
    for words in (URL, "Nothing arrived for 5 days.", f"/organization/webhooks/{dead.pk}"):
        assert words in said.body


@pytest.mark.django_db(transaction=True)
def test_the_mail_waits_for_the_commit(owner: Person, wakeups_sent: list[Any]) -> None:
    dead = endpoint(owner)
    asked = ("batches.tasks.mail_of_disabled", dead.pk)
    with scopes_disabled(), transaction.atomic():
        deliveries.disable(WebhookEndpoint.objects.get(pk=dead.pk), "Gone.")
        assert asked not in wakeups_sent
    assert wakeups_sent.count(asked) == 1


def test_nobody_is_mailed_about_what_works_again(owner: Person) -> None:
    row = endpoint(owner)
    tasks.mail_of_disabled(row.pk)
    tasks.mail_of_disabled("we_0")
    assert mail.outbox == []


def test_a_mail_server_that_is_away_is_nobodys_failure(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = endpoint(owner)
    webhooks.update_webhook(actor=owner.caller, row=row, enabled=False)

    tried: list[str] = []

    def away(_: str, __: str, ___: None, to: list[str]) -> None:
        tried.extend(to)
        raise ConnectionRefusedError

    monkeypatch.setattr("batches.services.mails.send_mail", away)
    tasks.mail_of_disabled(row.pk)
    assert tried == ["owner@acme.test"]
