"""GET /v1/organization/audit_logs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
import time_machine
from django.test import Client
from django_scopes import scopes_disabled

from accounts.access import Caller
from accounts.ids import user_id
from accounts.models import ApiKey, AuditEvent
from accounts.services import audit
from tests.accounts.test_audit_service import callers, coming_from
from tests.batches.test_files_api import client_with, queries_of
from tests.conftest import Person
from tests.wire import assert_refused

PATH = "/v1/organization/audit_logs"


@pytest.fixture
def reader(owner: Person) -> Client:
    """A key that may read what administers the organization."""
    return client_with(owner.caller.organization, "admin.read")


def asked(client: Client, **query: Any) -> dict[str, Any]:
    response = client.get(PATH, query)
    assert response.status_code == 200, response.content
    return dict(response.json())


def ids(client: Client, **query: Any) -> list[str]:
    return [event["id"] for event in asked(client, **query)["data"]]


def happened(person: Person, action: str = "a.b", **fields: Any) -> AuditEvent:
    return audit.record(action, actor=person.caller, **fields)


def test_an_event_is_answered_as_openai_does(owner: Person, reader: Client) -> None:
    with coming_from("192.0.2.7", "req_1"):
        event = happened(
            owner, "project.updated", target=owner.caller.project, changes={"name": ["a", "b"]}
        )
    body = asked(reader, limit=1)
    assert body == {
        "object": "list",
        "data": [
            {
                "object": "organization.audit_log",
                "id": event.pk,
                "type": "project.updated",
                "effective_at": int(event.created_at.timestamp()),
                "actor": {
                    "type": "session",
                    "session": {
                        "user": {"id": user_id(owner.user.pk), "email": "owner@acme.test"},
                        "ip_address": "192.0.2.7",
                    },
                    "api_key": None,
                },
                "via": "session",
                "ip_address": "192.0.2.7",
                "target": {
                    "kind": "project",
                    "id": owner.caller.project.pk,
                    "label": "Default",
                },
                "changes": {"name": ["a", "b"]},
                "request_id": "req_1",
                "number": event.number,
                "hash": event.hash,
                "previous_hash": event.previous_hash,
            }
        ],
        "first_id": event.pk,
        "last_id": event.pk,
        "has_more": True,
    }


def actor_of(caller: Caller, client: Client) -> Any:
    audit.record("a.b", actor=caller)
    return asked(client, limit=1)["data"][0]["actor"]


@pytest.mark.parametrize("kind", ["session", "operator"])
def test_a_signed_in_person_is_a_session(kind: str, owner: Person, reader: Client) -> None:
    user = {"id": user_id(owner.user.pk), "email": "owner@acme.test"}
    assert actor_of(callers(owner)[kind], reader) == {
        "type": "session",
        "session": {"user": user, "ip_address": None},
        "api_key": None,
    }


@pytest.mark.parametrize(
    ("kind", "id", "type", "name"),
    [
        ("key", "", "user", None),
        ("service key", "key_1", "service_account", "nightly"),
        ("token", "jti_1", "user", None),
        ("workload", "j" * 64, "service_account", "j" * 99),
    ],
)
def test_a_key_says_whose_it_is(
    kind: str, id: str, type: str, name: str | None, owner: Person, reader: Client
) -> None:
    with scopes_disabled():
        id = id or ApiKey.objects.get(created_by=owner.user).pk
    user = {"id": user_id(owner.user.pk), "email": "owner@acme.test"}
    assert actor_of(callers(owner)[kind], reader) == {
        "type": "api_key",
        "session": None,
        "api_key": {
            "id": id,
            "type": type,
            "user": user if type == "user" else None,
            "name": name,
        },
    }


def test_the_system_is_nobody(owner: Person, reader: Client) -> None:
    audit.record("a.b", actor=None, organization=owner.caller.organization)
    event = asked(reader, limit=1)["data"][0]
    assert (event["actor"], event["via"], event["target"], event["request_id"]) == (
        None,
        "system",
        None,
        None,
    )


def test_pages_go_back_and_forth(owner: Person, reader: Client) -> None:
    with time_machine.travel("2099-03-15T12:00:00Z", tick=False):  # ids are in no order then
        events = [happened(owner, "page.me").pk for _ in range(7)][::-1]
    only = {"event_types": "page.me", "limit": 3}
    assert ids(reader, **only) == events[:3]
    assert ids(reader, **only, after=events[2]) == events[3:6]
    assert ids(reader, **only, after=events[5]) == events[6:]
    assert ids(reader, **only, before=events[6]) == events[3:6]
    assert ids(reader, **only, before=events[1]) == events[:1]
    assert [asked(reader, **only, after=events[each])["has_more"] for each in (2, 5)] == [
        True,
        False,
    ]
    assert [asked(reader, **only, before=events[each])["has_more"] for each in (6, 1)] == [
        True,
        False,
    ]


@pytest.mark.parametrize("name", ["after", "before"])
def test_a_strangers_event_and_a_missing_one_are_no_place_to_go_on_from(
    name: str, owner: Person, stranger: Person, reader: Client
) -> None:
    foreign = happened(stranger).pk
    assert ids(reader, **{name: foreign}) == ids(reader, **{name: f"audit_{'0' * 32}"}) == []


@pytest.mark.parametrize(
    "query",
    [
        {"event_types[]": ["key.made", "no.such"]},
        {"event_types": "key.made"},
        {"actor_emails[]": "TEAMMATE@acme.test"},
        {"actor_ids[]": "{user}"},
        {"actor_ids": "{user}"},
        {"resource_ids[]": "key_1"},
        {"effective_at[gt]": 1_800_000_000, "effective_at[lt]": 1_800_000_002},
        {"effective_at[gte]": 1_800_000_001, "effective_at[lte]": 1_800_000_001},
    ],
)
def test_filters(query: dict[str, Any], owner: Person, teammate: Person, reader: Client) -> None:
    target = owner.caller.project.__class__(pk="key_1")

    def at(seconds: float, person: Person, action: str, **fields: Any) -> str:
        with time_machine.travel(datetime.fromtimestamp(seconds, UTC), tick=False):
            return happened(person, action, **fields).pk

    at(1_800_000_000.9, owner, "member.invited")
    wanted = at(1_800_000_001.9, teammate, "key.made", target=target)
    at(1_800_000_002, owner, "member.invited")
    user = user_id(teammate.user.pk)
    given = {
        name: value.format(user=user) if isinstance(value, str) else value
        for name, value in query.items()
    }
    assert ids(reader, **given) == [wanted]


def test_events_are_found_by_the_id_of_their_key(owner: Person, reader: Client) -> None:
    event = audit.record("a.b", actor=callers(owner)["service key"])
    assert ids(reader, **{"actor_ids[]": "key_1"}) == [event.pk]


@pytest.mark.parametrize("name", ["event_types", "actor_ids", "actor_emails", "resource_ids"])
@pytest.mark.parametrize("value", ["nobody", "\0", "user_²", f"user_{9**30}"])
def test_what_nobody_is_called_finds_nothing(
    name: str, value: str, owner: Person, reader: Client
) -> None:
    assert ids(reader, **{name: value}) == ids(reader, **{f"{name}[]": value}) == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
        ({"after": "x"}, "after"),
        ({"before": "audit_\0"}, "before"),
        ({"effective_at[gt]": "soon"}, "effective_at[gt]"),
        ({"effective_at[lte]": 10**15}, "effective_at[lte]"),
        ({"actor_ids": ["1"] * 101}, "actor_ids"),
    ],
)
def test_what_makes_no_sense_is_refused(query: dict[str, Any], param: str, reader: Client) -> None:
    assert_refused(reader.get(PATH, query), 400, param, "invalid_value")


def test_after_and_before_are_not_for_one_request(reader: Client) -> None:
    both = {"after": f"audit_{'0' * 32}", "before": f"audit_{'1' * 32}"}
    assert_refused(reader.get(PATH, both), 400, "before")


def test_a_stranger_sees_only_their_own(owner: Person, stranger: Person, reader: Client) -> None:
    mine, theirs = happened(owner).pk, happened(stranger).pk
    other = client_with(stranger.caller.organization, "admin.read")
    assert (mine in ids(reader), theirs in ids(reader)) == (True, False)
    assert (mine in ids(other), theirs in ids(other)) == (False, True)


def test_reading_is_not_audited(owner: Person, reader: Client) -> None:
    before = audit.verify(owner.caller.organization.pk).events
    asked(reader)
    assert audit.verify(owner.caller.organization.pk).events == before


def test_three_events_cost_as_many_queries_as_one(owner: Person, reader: Client) -> None:
    one = queries_of(reader, PATH)
    for _ in range(3):
        happened(owner)
    assert queries_of(reader, PATH) == one


def test_a_key_without_the_scope_is_refused(owner: Person) -> None:
    other = client_with(owner.caller.organization, "usage.read", "files", "batches")
    assert_refused(other.get(PATH), 403, None, "insufficient_scope")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_another_method_is_not_allowed(method: str, reader: Client) -> None:
    assert_refused(reader.generic(method, PATH), 405, None, "method_not_allowed")
