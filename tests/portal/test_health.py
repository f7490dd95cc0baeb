"""Liveness and readiness."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import InterfaceError, OperationalError
from django.test import Client

from portal import health

pytestmark = pytest.mark.django_db


def ready() -> tuple[int, dict[str, Any]]:
    response = Client().get("/readyz")
    return response.status_code, response.json()


def test_a_process_that_answers_is_alive() -> None:
    response = Client().get("/healthz")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_with_everything_there_it_is_ready(own_storage: object) -> None:
    everything = {"status": "ready", "database": True, "storage": True, "redis": True}
    assert ready() == (200, everything)


@pytest.mark.parametrize("error", [OperationalError, InterfaceError])
def test_without_the_database_it_is_not_ready(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def away() -> None:
        raise error("the server closed the connection")

    monkeypatch.setattr(health.connection, "cursor", away)
    status, said = ready()
    assert (status, said["status"], said["database"]) == (503, "not ready", False)


def test_without_the_storage_it_is_not_ready(settings: Any) -> None:
    settings.FILE_UPLOAD_TEMP_DIR = "/nowhere"
    status, said = ready()
    assert (status, said["database"], said["storage"]) == (503, True, False)


def test_without_redis_it_is_ready_all_the_same(settings: Any) -> None:
    settings.REDIS_URL = "redis://127.0.0.1:1/0"
    status, said = ready()
    assert (status, said["status"], said["redis"]) == (200, "ready", False)


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_nobody_needs_to_sign_in_for_it(path: str) -> None:
    assert Client().get(path).status_code == 200
