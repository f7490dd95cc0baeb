"""The operators' page of the system: what it tells, and that it tells no secret."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from celery.signals import task_failure
from django.core.cache import cache
from django.db import DatabaseError, connection
from django.db.migrations.recorder import MigrationRecorder
from django.test import Client

from accounts.models import User
from batches import standings
from batches.services.sweep import sweep
from portal import failures, system
from portal.models import FailedTask
from portal.storage_url import Store
from tests import jobs
from tests.conftest import Person

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.usefixtures("own_storage", "wakeups_sent", "echo"),
]
PAGE = "/operator/system"


class Task:
    name = "batches.tasks.validate"
    throws = (FileNotFoundError,)


TASK = Task()


@pytest.fixture
def desk(operator: User) -> Client:
    client = Client()
    client.force_login(operator, backend="allauth.account.auth_backends.AuthenticationBackend")
    return client


def shown(desk: Client) -> str:
    page = desk.get(PAGE).content.decode().partition("<main")[2]
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def fail(error: BaseException, *arguments: str) -> None:
    """As Celery says it, of an error that was raised here."""
    try:
        raise error
    except BaseException as raised:
        task_failure.send(
            sender=TASK,
            task_id="id",
            exception=raised,
            args=arguments,
            kwargs={},
            traceback=raised.__traceback__,
            einfo=None,
        )


def test_it_tells_of_services_versions_queues_migrations_and_storage(
    desk: Client, owner: Person
) -> None:
    batch = jobs.running(owner.caller, 3)
    sweep()
    said = shown(desk)
    assert "Database Well Storage Well Valkey Well Sweeps Well" in said
    assert re.search(r"Python 3\.\d+\.\d+ Django 5\.2", said)
    assert re.search(r"PostgreSQL \d+", said)
    assert re.search(r"Valkey \d+\.\d+", said)
    assert re.search(
        r"Celery tasks for the CPU \d+ Celery tasks for webhooks \d+"
        r" Celery tasks for result handlers \d+",
        said,
    )
    assert "Chunks ready 1 Chunks leased 0 Batches in progress 1" in said
    assert re.search(r"\d+ applied, none pending", said)
    assert f"Acme 1 {batch.input_file.bytes} bytes" in said.replace("\xa0", " ")


def test_storage_is_that_of_all_also_of_those_that_are_not_listed(
    owner: Person, stranger: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = (jobs.running(owner.caller, 9), jobs.running(stranger.caller, 2))
    monkeypatch.setattr(system, "LARGEST", 1)
    kept = system.kept()
    hers, theirs = large.input_file.bytes, small.input_file.bytes
    assert (kept.files, kept.bytes) == (2, hers + theirs)
    assert kept.by_organization == [(owner.caller.organization.pk, "Acme", 1, hers)]


def test_storage_without_files_is_nothing() -> None:
    kept = system.kept()
    assert (kept.files, kept.bytes, kept.by_organization) == (0, 0, [])


def test_a_migration_that_is_not_applied_is_named() -> None:
    applied, pending = system.migrations()
    assert pending == []
    MigrationRecorder(connection).record_unapplied("batches", "0010_holds")
    assert system.migrations() == (applied - 1, ["batches 0010_holds"])


def test_without_sweeps_and_valkey_it_says_so(desk: Client, settings: Any) -> None:
    cache.delete(standings.KEY)
    assert "Sweeps Does not answer" in shown(desk)
    settings.REDIS_URL = settings.CELERY_BROKER_URL = "redis://127.0.0.1:1/0"
    said = shown(desk)
    assert "Valkey Does not answer" in said
    assert "Celery tasks for the CPU not known" in said


# --- Failed tasks ---------------------------------------------------------------------------


def test_a_failed_task_is_told_without_what_its_error_said(desk: Client) -> None:
    assert "None has failed." in shown(desk)
    fail(ValueError("a tenant's prompt"), "batch_1")
    said = shown(desk)
    assert re.search(
        r"batches\.tasks\.validate batch_1 ValueError "
        r"tests/portal/test_system_page\.py:\d+ in fail",
        said,
    )
    assert "prompt" not in said


def test_what_a_task_is_expected_to_raise_is_no_failure() -> None:
    fail(FileNotFoundError("x"))
    assert not FailedTask.objects.exists()


def test_only_the_newest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "KEPT", 3)
    for at in range(5):
        fail(ValueError(), str(at))
    found = FailedTask.objects.order_by("pk").values_list("arguments", flat=True)
    assert list(found) == ["2", "3", "4"]


def test_a_failure_that_cannot_be_kept_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(**_: Any) -> None:
        raise DatabaseError

    monkeypatch.setattr(FailedTask.objects, "create", away)
    failures.note(TASK, "id", ValueError(), (), None)


# --- Settings -------------------------------------------------------------------------------


def value_of(name: str) -> str:
    return dict(system.settings_in_effect())[name]


def test_settings_are_shown_as_they_are_in_effect(settings: Any) -> None:
    settings.LEASE_SECONDS = 77
    assert value_of("LEASE_SECONDS") == "77"
    assert value_of("LANGUAGE_CODE") == "en"


def test_no_secret_is_shown_by_its_name_in_a_url_or_as_the_same_value(
    desk: Client, settings: Any
) -> None:
    settings.SECRET_KEY = "very-secret-key-of-this-portal"
    settings.METRICS_TOKEN = "token-for-prometheus"
    settings.DATABASE_URL = "postgresql://portal:hunter2-db@127.0.0.1/x?sslpassword=hunter2-other"
    settings.REDIS_URL = "redis://:hunter2-redis@127.0.0.1/0"
    settings.DATABASES["default"]["OPTIONS"]["sslpassword"] = "hunter2-other"
    settings.SOCIALACCOUNT_PROVIDERS = {"x": {"APPS": [{"secret": "hunter2-oidc", "name": "me"}]}}
    settings.BASE_URL = "https://portal.test/?same=token-for-prometheus"
    try:
        page = desk.get(PAGE).content.decode()
    finally:
        del settings.DATABASES["default"]["OPTIONS"]["sslpassword"]
    for secret in ("very-secret-key", "token-for-prometheus", "hunter2"):
        assert secret not in page
    assert value_of("SECRET_KEY") == "•••"
    assert value_of("REDIS_URL") == "redis://•••@127.0.0.1/0"
    assert value_of("SOCIALACCOUNT_PROVIDERS") == (
        "{'x': {'APPS': [{'secret': '•••', 'name': 'me'}]}}"
    )


def test_no_secret_of_a_bucket_is_shown_whatever_it_looks_like(settings: Any) -> None:
    options = {"access_key": "ab", "secret_key": "minio.batch.pw", "bucket_name": "abacus"}
    settings.STORE = Store("portal.Backend", options, Path("/spool"))
    settings.STORAGES = settings.STORAGES | {"default": {"OPTIONS": options}}
    settings.BASE_URL = "https://minio.batch.pw/?user=ab&token=x.y"
    shown = dict(system.settings_in_effect())
    assert not [name for name, said in shown.items() if "minio.batch.pw" in said]
    assert shown["STORE"].startswith(
        "{'backend': 'portal.Backend', 'options':"
        " {'access_key': '•••', 'secret_key': '•••', 'bucket_name': 'abacus'}, 'spool':"
    )
    assert shown["BASE_URL"] == "https://•••/?user=•••&token=•••"


def test_what_is_only_named_like_a_secret_is_shown(settings: Any) -> None:
    settings.WEBHOOK_PRIVATE_HOSTS = settings.HANDLER_PRIVATE_HOSTS = ["10.0.0.7:8080"]
    settings.TRUSTED_ISSUER_PRIVATE_HOSTS = ["kubernetes.internal"]
    assert value_of("WEBHOOK_PRIVATE_HOSTS") == "['10.0.0.7:8080']"
    assert value_of("HANDLER_PRIVATE_HOSTS") == "['10.0.0.7:8080']"
    assert value_of("TRUSTED_ISSUER_PRIVATE_HOSTS") == "['kubernetes.internal']"
    assert "'reset_password': '10/m/ip,5/h/key'" in value_of("ACCOUNT_RATE_LIMITS")
    assert system._masked("SIGNING_PRIVATE_KEY", "-----BEGIN") == "•••"


def test_others_are_not_let_in(owner: Person) -> None:
    assert owner.browser.get(PAGE).status_code == 404
    assert Client().get(PAGE)["Location"].startswith("/accounts/login/")
