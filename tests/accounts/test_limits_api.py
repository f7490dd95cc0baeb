"""GET and POST /v1/organization/limits."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django_scopes import scopes_disabled

from accounts import ids
from accounts.models import ApiKey, AuditEvent, Quota, Scope
from accounts.services import keys
from accounts.services.limits import set_limits
from tests.conftest import Person
from tests.wire import error_of, post

PATH = "/v1/organization/limits"
FIELDS = [
    "requests_per_minute",
    "batches_per_minute",
    "files_per_minute",
    "tokens_per_month",
    "enqueued_tokens",
    "concurrent_batches",
    "requests_per_batch",
    "storage_bytes",
    "budget_per_month",
]


@pytest.fixture(autouse=True)
def _defaults(settings: Any) -> None:
    settings.RATE_LIMIT_REQUESTS = 600
    settings.RATE_LIMIT_BATCHES, settings.RATE_LIMIT_FILES = 10, 20


def with_scopes(person: Person, *scopes: str) -> Client:
    _, text = keys.create_api_key(
        project=person.caller.project, name="admin", created_by=person.user, scopes=scopes
    )
    return Client(headers={"authorization": f"Bearer {text}"})


@pytest.fixture
def admin(owner: Person) -> Client:
    return with_scopes(owner, Scope.ADMIN_WRITE)


def key_of(person: Person) -> ApiKey:
    with scopes_disabled():
        return ApiKey.objects.filter(created_by=person.user).earliest("pk")


def limits_in(response: Any) -> dict[str, Any]:
    assert response.status_code == 200, response.content
    return {each["name"]: each["limit"] for each in response.json()["data"]}


def test_the_organizations_limits_and_their_use(owner: Person, admin: Client) -> None:
    organization = owner.caller.organization
    set_limits(actor=None, organization=organization, requests_per_minute=90, storage_bytes=2**40)
    admin.get(PATH)
    said = admin.get(PATH).json()
    data = {each.pop("name"): each for each in said.pop("data")}
    assert said == {
        "object": "organization.limits",
        "organization_id": organization.pk,
        "user_id": None,
        "api_key_id": None,
    }
    assert list(data) == FIELDS
    assert data["batches_per_minute"] == {
        "object": "organization.limit",
        "unit": "batches",
        "limit": 10,
        "used": 0,
        "is_default": True,
    }
    assert (data["storage_bytes"]["limit"], data["storage_bytes"]["used"]) == (2**40, 0)
    assert data["requests_per_minute"]["limit"] == 90
    assert data["requests_per_minute"]["is_default"] is False
    assert data["requests_per_minute"]["used"] >= 1  # a minute may have ended meanwhile
    assert data["requests_per_batch"]["used"] is None
    assert data["budget_per_month"]["limit"] is None


def test_an_admin_sets_and_clears_a_persons_limits(
    owner: Person, teammate: Person, admin: Client
) -> None:
    id = ids.user_id(teammate.user.pk)
    body = {"user_id": id, "requests_per_minute": 5, "budget_per_month": 12.5}
    made = post(admin, PATH, body)
    assert made.json()["user_id"] == id
    assert limits_in(made) == dict.fromkeys(FIELDS) | {
        "requests_per_minute": 5,
        "budget_per_month": 12.5,
    }
    cleared = post(admin, PATH, {"user_id": id, "requests_per_minute": None})
    assert limits_in(cleared) == dict.fromkeys(FIELDS) | {"budget_per_month": 12.5}
    assert limits_in(admin.get(f"{PATH}?user_id={id}")) == limits_in(cleared)


def test_an_admin_sets_a_keys_limits(owner: Person, admin: Client) -> None:
    key = key_of(owner)
    made = post(admin, PATH, {"api_key_id": key.pk, "concurrent_batches": 0})
    assert made.json()["api_key_id"] == key.pk
    assert limits_in(made) == dict.fromkeys(FIELDS) | {"concurrent_batches": 0}


def test_a_change_is_audited_with_before_and_after(owner: Person, admin: Client) -> None:
    key = key_of(owner)
    for amount in (5, 5, 7):
        post(admin, PATH, {"api_key_id": key.pk, "requests_per_minute": amount})
    with scopes_disabled():
        events = list(AuditEvent.objects.filter(action="limits.changed").order_by("number"))
    assert [(event.changes, event.target_id) for event in events] == [
        ({"requests_per_minute": [None, 5]}, key.pk),
        ({"requests_per_minute": [5, 7]}, key.pk),
    ]


def test_the_organizations_own_limits_are_for_operators(admin: Client) -> None:
    refused = post(admin, PATH, {"requests_per_minute": 10_000})
    assert (refused.status_code, error_of(refused)["code"]) == (403, "operators_only")


def test_members_and_keys_without_the_scope_may_not(owner: Person, teammate: Person) -> None:
    body = {"user_id": ids.user_id(teammate.user.pk), "requests_per_minute": 5}
    reader = with_scopes(owner, Scope.ADMIN_READ)
    member = with_scopes(teammate, Scope.ADMIN_WRITE)
    assert [reader.get(PATH).status_code, member.get(PATH).status_code] == [200, 200]
    refused = [post(client, PATH, body) for client in (reader, member, owner.api)]
    assert [error_of(answer)["code"] for answer in refused] == [
        "insufficient_scope",
        "insufficient_role",
        "insufficient_scope",
    ]
    assert owner.api.get(PATH).status_code == 403


def test_a_strangers_person_and_key_are_not_found(
    owner: Person, stranger: Person, admin: Client
) -> None:
    theirs = {"user_id": ids.user_id(stranger.user.pk)}, {"api_key_id": key_of(stranger).pk}
    missing = {"user_id": "user_999999"}, {"api_key_id": "key_0"}
    for subject in (*theirs, *missing):
        assert admin.get(PATH, subject).status_code == 404
        assert post(admin, PATH, subject | {"requests_per_minute": 1}).status_code == 404
    with scopes_disabled():
        assert not Quota.objects.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("requests_per_minute", -1),
        ("requests_per_minute", 2**53 + 1),
        ("requests_per_minute", 1.5),
        ("requests_per_minute", "many"),
        ("storage_bytes", 2**60),
        ("budget_per_month", -0.01),
        ("budget_per_month", 10**12),
        ("budget_per_month", 1.001),
        ("budget_per_month", "NaN"),
        ("no_such_limit", 1),
        ("user_id", 7),
        ("api_key_id", "key_0"),
    ],
)
def test_bad_values_are_refused(owner: Person, admin: Client, field: str, value: Any) -> None:
    body = {"user_id": ids.user_id(owner.user.pk), "files_per_minute": 1} | {field: value}
    refused = post(admin, PATH, body)
    error = error_of(refused)
    assert (refused.status_code, error["param"]) == (400, field)
    with scopes_disabled():
        assert not Quota.objects.exists()


@pytest.mark.parametrize("query", ["user_id=", "user_id=%00", "api_key_id=%00x", "user_id=user_0"])
def test_ids_that_cannot_be_are_refused(admin: Client, query: str) -> None:
    assert admin.get(f"{PATH}?{query}").status_code in (400, 404)


def test_other_methods_are_405(admin: Client) -> None:
    assert admin.delete(PATH).status_code == 405


def test_without_redis_the_calls_are_not_known(
    owner: Person, admin: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accounts.throttling._away_until", float("inf"))
    data = {each["name"]: each["used"] for each in admin.get(PATH).json()["data"]}
    assert [data[name] for name in FIELDS[:4]] == [None, None, None, 0]


def test_its_queries_do_not_grow_with_what_is_limited(owner: Person, admin: Client) -> None:
    organization = owner.caller.organization
    set_limits(actor=None, organization=organization, requests_per_minute=50)
    admin.get(PATH)
    with CaptureQueriesContext(connection) as before:
        admin.get(PATH)
    set_limits(actor=None, organization=organization, **dict.fromkeys(FIELDS, 50))
    set_limits(actor=None, organization=organization, user=owner.user, **dict.fromkeys(FIELDS, 50))
    with CaptureQueriesContext(connection) as after:
        admin.get(PATH)
    assert len(after) == len(before)
