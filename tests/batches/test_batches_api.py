"""/v1/batches: what the owner gets, and what everybody else does not."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import IntegrityError, connection, transaction
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django_scopes import scopes_disabled

from batches.models import Batch
from batches.models.batches import Status
from models_registry.models import Model
from tests.batches.conftest import Disk
from tests.batches.test_files_api import client_with, queries_of
from tests.conftest import Person
from tests.wire import (
    CHAT,
    assert_refused,
    batch_body,
    created,
    line,
    post,
    row,
    uploaded,
    validated,
)


def listed(client: Client, query: str = "") -> list[str]:
    return [batch["id"] for batch in client.get(f"/v1/batches{query}").json()["data"]]


def cancel(client: Client, batch_id: str, **headers: str) -> Any:
    return client.post(f"/v1/batches/{batch_id}/cancel", headers=headers or None)


def test_a_new_batch_is_answered_as_openai_does(owner: Person, disk: Disk) -> None:
    file_id = uploaded(owner.api)
    batch = post(owner.api, "/v1/batches", batch_body(file_id)).json()
    created_at = int(row(batch["id"]).created_at.timestamp())
    assert batch == {
        "id": batch["id"],
        "object": "batch",
        "endpoint": CHAT,
        "model": None,
        "errors": None,
        "input_file_id": file_id,
        "completion_window": "24h",
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": created_at,
        "in_progress_at": None,
        "expires_at": created_at + 86_400,
        "finalizing_at": None,
        "completed_at": None,
        "failed_at": None,
        "expired_at": None,
        "cancelling_at": None,
        "cancelled_at": None,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "usage": {
            "input_tokens": 0,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 0,
        },
        "metadata": None,
        "priority": "normal",
        "queue": None,
        "webhook": None,
    }
    assert owner.api.get(f"/v1/batches/{batch['id']}").json() == batch


def test_a_batch_belongs_to_its_keys_organization_project_and_person(
    owner: Person, disk: Disk
) -> None:
    batch = row(created(owner.api)["id"])
    assert (batch.organization_id, batch.project_id, batch.user_id) == (
        owner.caller.organization.pk,
        owner.caller.project.pk,
        owner.user.pk,
    )
    assert batch.api_key_id is not None


def test_all_that_may_be_asked_for_is_kept(owner: Person, disk: Disk) -> None:
    expires = {"anchor": "created_at", "seconds": 3600}
    batch = created(
        owner.api,
        metadata={"run": "7"},
        output_expires_after=expires,
        priority="high",
        completion_window="30m",
        of_tomorrow="ignored",
    )
    assert (batch["metadata"], batch["priority"], batch["completion_window"]) == (
        {"run": "7"},
        "high",
        "30m",
    )
    assert row(batch["id"]).output_expires_after_seconds == 3600


def test_a_validated_batch_is_in_progress_with_its_model(
    owner: Person, echo: Model, disk: Disk
) -> None:
    batch = validated(owner.api, line("a") + b"\n" + line("b"))
    assert (batch["status"], batch["model"], batch["request_counts"]["total"]) == (
        "in_progress",
        "echo",
        2,
    )
    assert batch["in_progress_at"] is not None


def test_retrieving_and_creating_cost_few_queries(owner: Person, echo: Model, disk: Disk) -> None:
    api, batch_id = owner.api, validated(owner.api, line())["id"]
    file_id = uploaded(api)
    with CaptureQueriesContext(connection) as reading:
        api.get(f"/v1/batches/{batch_id}")
    with CaptureQueriesContext(connection) as writing:
        post(api, "/v1/batches", batch_body(file_id))
    # The key, its limits and the batch; the key, its limits, the file, a savepoint, the batch, the organization locked, its
    # quotas, the reservation, the savepoint's end.
    assert (len(reading), len(writing)) == (3, 9)


def test_a_list_of_three_costs_as_many_queries_as_a_list_of_one(
    owner: Person, echo: Model, disk: Disk
) -> None:
    validated(owner.api, line())
    one = queries_of(owner.api, "/v1/batches")
    for _ in range(2):
        validated(owner.api, line())
    assert (one, queries_of(owner.api, "/v1/batches")) == (3, 3)


def test_lists_are_paged_by_key_newest_first(owner: Person, disk: Disk) -> None:
    newest = [created(owner.api)["id"] for _ in range(5)][::-1]
    page = owner.api.get("/v1/batches?limit=2").json()
    assert {key: value for key, value in page.items() if key != "data"} == {
        "object": "list",
        "first_id": newest[0],
        "last_id": newest[1],
        "has_more": True,
    }
    assert listed(owner.api, f"?limit=2&after={newest[1]}") == newest[2:4]
    last = owner.api.get(f"/v1/batches?after={newest[3]}").json()
    assert ([batch["id"] for batch in last["data"]], last["has_more"]) == (newest[4:], False)


def test_cancelling_is_answered_at_once_and_again(owner: Person, disk: Disk) -> None:
    batch = created(owner.api)
    first = cancel(owner.api, batch["id"]).json()
    assert first == batch | {"status": "cancelling", "cancelling_at": first["cancelling_at"]}
    assert first["cancelling_at"] is not None
    assert cancel(owner.api, batch["id"]).json() == first


@pytest.mark.parametrize("status", ["failed", "finalizing", "completed", "expired"])
def test_a_batch_that_has_ended_cannot_be_cancelled_and_need_not_be_retried(
    status: str, owner: Person, disk: Disk
) -> None:
    batch_id = created(owner.api)["id"]
    with scopes_disabled():
        Batch.objects.filter(pk=batch_id).update(status=status)
    assert_refused(cancel(owner.api, batch_id), 400, "batch_id", "batch_not_cancellable")
    assert row(batch_id).status == status


def test_cancelling_one_that_is_cancelled_changes_nothing(owner: Person, disk: Disk) -> None:
    batch_id = created(owner.api)["id"]
    with scopes_disabled():
        Batch.objects.filter(pk=batch_id).update(status=Status.CANCELLED)
    assert cancel(owner.api, batch_id).json()["status"] == "cancelled"


def test_the_same_idempotency_key_and_body_is_the_same_batch(owner: Person, disk: Disk) -> None:
    body, key = batch_body(uploaded(owner.api)), {"Idempotency-Key": "once"}
    first = post(owner.api, "/v1/batches", body, **key).json()
    assert cancel(owner.api, first["id"]).json()["status"] == "cancelling"
    shuffled = dict(reversed(body.items()))
    assert post(owner.api, "/v1/batches", shuffled, **key).json() == first
    other = post(owner.api, "/v1/batches", body | {"priority": "low"}, **key)
    assert_refused(other, 400, None, "idempotency_key_reused")
    elsewhere = cancel(owner.api, first["id"], **key)
    assert_refused(elsewhere, 400, None, "idempotency_key_reused")
    assert listed(owner.api) == [first["id"]]


def test_a_refused_request_leaves_its_idempotency_key_free(owner: Person, disk: Disk) -> None:
    body, key = batch_body(uploaded(owner.api)), {"Idempotency-Key": "once"}
    assert post(owner.api, "/v1/batches", body | {"endpoint": "/"}, **key).status_code == 400
    assert post(owner.api, "/v1/batches", body, **key).status_code == 200


def test_a_stranger_finds_nothing(owner: Person, stranger: Person, disk: Disk) -> None:
    theirs, mine = created(stranger.api), created(owner.api)
    path = f"/v1/batches/{mine['id']}"
    for response in (stranger.api.get(path), cancel(stranger.api, mine["id"])):
        assert_refused(response, 404, "batch_id", "not_found")
    body = batch_body(mine["input_file_id"])
    refused = post(stranger.api, "/v1/batches", body)
    assert_refused(refused, 404, "input_file_id", "not_found")
    assert (listed(stranger.api), listed(owner.api)) == ([theirs["id"]], [mine["id"]])
    assert listed(stranger.api, f"?after={mine['id']}") == [theirs["id"]]
    assert owner.api.get(path).json() == mine


def test_a_key_that_may_only_read_is_refused(owner: Person, disk: Disk) -> None:
    batch = created(owner.api)
    reading = client_with(owner.caller.organization, "batches.read", "files")
    body = batch_body(batch["input_file_id"])
    for response in (post(reading, "/v1/batches", body), cancel(reading, batch["id"])):
        assert_refused(response, 403, None, "insufficient_scope")
    assert reading.get(f"/v1/batches/{batch['id']}").json() == batch
    assert listed(reading) == [batch["id"]]
    other = client_with(owner.caller.organization, "files", "models.read")
    for path in ("/v1/batches", f"/v1/batches/{batch['id']}"):
        assert_refused(other.get(path), 403, None, "insufficient_scope")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/batches", {"GET", "POST"}),
        ("DELETE", "/v1/batches/batch_x", {"GET"}),
        ("POST", "/v1/batches/batch_x", {"GET"}),
        ("GET", "/v1/batches/batch_x/cancel", {"POST"}),
    ],
)
def test_another_method_is_not_allowed(
    method: str, path: str, allowed: set[str], owner: Person
) -> None:
    response = owner.api.generic(method, path)
    assert_refused(response, 405, None, "method_not_allowed")
    assert set(response["Allow"].split(", ")) == allowed


@pytest.mark.parametrize("field", ["input_file", "output_file", "error_file", "project"])
def test_the_database_refuses_a_batch_that_joins_two_tenants(
    field: str, owner: Person, stranger: Person, disk: Disk
) -> None:
    mine, theirs = created(owner.api), created(stranger.api)
    foreign = row(theirs["id"])
    value = foreign.project_id if field == "project" else foreign.input_file_id
    same = pytest.raises(IntegrityError, match=f"{field}_id_same_organization")
    with scopes_disabled(), same, transaction.atomic():
        Batch.objects.filter(pk=mine["id"]).update(**{f"{field}_id": value})
        connection.check_constraints()
    assert owner.api.get(f"/v1/batches/{mine['id']}").json() == mine
