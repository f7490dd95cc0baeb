"""`/v1/organization/projects/{project_id}/api_keys`: keys over the wire."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from accounts.models import ApiKey, AuditEvent
from accounts.services import keys
from tests.conftest import Person
from tests.wire import assert_refused, post

pytestmark = pytest.mark.django_db
ADMIN = ["admin.read", "admin.write", "files", "batches", "models.read", "inference"]


def api_of(person: Person, *scopes: str) -> Client:
    """A client with a key of the person's that may administer, or of just these scopes."""
    _, text = keys.create_api_key(
        project=person.caller.project,
        name="admin",
        created_by=person.user,
        scopes=scopes or ADMIN,
    )
    return Client(headers={"authorization": f"Bearer {text}"})


def path_of(person: Person, *rest: str) -> str:
    project = person.caller.project.pk
    return "/".join([f"/v1/organization/projects/{project}/api_keys", *rest])


def made(api: Client, person: Person, **fields: Any) -> dict[str, Any]:
    response = post(api, path_of(person), {"name": "CI", "scopes": ["files"]} | fields)
    assert response.status_code == 200, response.content
    return dict(response.json())


def works(text: str) -> bool:
    client = Client(headers={"authorization": f"Bearer {text}"})
    return client.get("/v1/files").status_code == 200


def test_a_key_is_made_shown_once_and_works(owner: Person) -> None:
    api = api_of(owner)
    key = made(api, owner)
    assert works(key["value"])
    again = api.get(path_of(owner, key["id"])).json()
    assert "value" not in again
    assert again == {
        "object": "organization.project.api_key",
        "id": key["id"],
        "name": "CI",
        "redacted_value": "-".join(key["value"].split("-")[:3]) + "-•••",
        "created_at": key["created_at"],
        "last_used_at": again["last_used_at"],
        "expires_at": None,
        "owner": {
            "type": "user",
            "user": {
                "object": "organization.project.user",
                "id": f"user_{owner.user.pk}",
                "name": "",
                "email": "owner@acme.test",
                "added_at": int(owner.user.date_joined.timestamp()),
            },
            "service_account": None,
        },
        "scopes": ["files"],
        "allowed_ips": [],
        "state": "active",
        "replaced_by": None,
    }


def test_an_answer_with_a_secret_is_not_kept_by_caches(owner: Person) -> None:
    api = api_of(owner)
    response = post(api, path_of(owner), {"name": "CI"})
    assert "no-store" in response["Cache-Control"]
    rotated = post(api, path_of(owner, response.json()["id"], "rotate"), {})
    assert "no-store" in rotated["Cache-Control"]


def test_a_key_for_the_project_is_a_service_account(owner: Person) -> None:
    key = made(api_of(owner), owner, service_account=True)
    assert key["owner"] == {
        "type": "service_account",
        "user": None,
        "service_account": {
            "object": "organization.project.service_account",
            "id": key["id"],
            "name": "CI",
            "created_at": key["created_at"],
        },
    }
    assert works(key["value"])


def test_a_key_is_changed_field_by_field(owner: Person) -> None:
    api = api_of(owner)
    key = made(api, owner, allowed_ips=["127.0.0.1"])
    later = int((timezone.now() + timedelta(days=1)).timestamp())
    there = path_of(owner, key["id"])
    said = []
    for body in (
        {"name": "New"},
        {"expires_at": later},
        {"allowed_ips": ["10.1.2.3/8", "::1"]},
        {"expires_at": None},
    ):
        changed = post(api, there, body).json()
        said.append([changed["name"], changed["expires_at"], changed["allowed_ips"]])
    assert said == [
        ["New", None, ["127.0.0.1/32"]],
        ["New", later, ["127.0.0.1/32"]],
        ["New", later, ["10.0.0.0/8", "::1/128"]],
        ["New", None, ["10.0.0.0/8", "::1/128"]],
    ]


def test_a_rotated_key_works_until_the_overlap_ends(owner: Person) -> None:
    api = api_of(owner)
    key = made(api, owner)
    new = post(api, path_of(owner, key["id"], "rotate"), {"overlap_seconds": 3600}).json()
    assert (works(key["value"]), works(new["value"])) == (True, True)
    old = api.get(path_of(owner, key["id"])).json()
    assert (old["state"], old["replaced_by"]) == ("replaced", new["id"])
    at_once = post(api, path_of(owner, new["id"], "rotate"), {"overlap_seconds": 0}).json()
    assert (works(new["value"]), works(at_once["value"])) == (False, True)


def test_a_deleted_key_is_gone(owner: Person) -> None:
    api = api_of(owner)
    key = made(api, owner)
    assert works(key["value"])
    assert api.delete(path_of(owner, key["id"])).json() == {
        "object": "organization.project.api_key.deleted",
        "id": key["id"],
        "deleted": True,
    }
    assert not works(key["value"])
    assert_refused(api.get(path_of(owner, key["id"])), 404, "key_id", "not_found")
    assert_refused(api.delete(path_of(owner, key["id"])), 404, "key_id", "not_found")


def test_the_list_is_the_projects_newest_first_and_pages(owner: Person, stranger: Person) -> None:
    api = api_of(owner)
    ids = [made(api, owner)["id"] for _ in range(3)][::-1]
    first = api.get(path_of(owner) + "?limit=2").json()
    assert ([key["id"] for key in first["data"]], first["has_more"]) == (ids[:2], True)
    rest = api.get(path_of(owner) + f"?limit=2&after={first['last_id']}").json()
    assert [key["name"] for key in rest["data"]] == ["CI", "admin"]
    assert (rest["first_id"], rest["has_more"]) == (ids[2], True)


def test_the_lists_queries_do_not_grow_with_its_rows(owner: Person) -> None:
    api = api_of(owner)
    api.get(path_of(owner))

    def count() -> int:
        with CaptureQueriesContext(connection) as queries:
            api.get(path_of(owner))
        return len(queries)

    made(api, owner)
    one = count()
    made(api, owner)
    made(api, owner, service_account=True)
    assert count() == one


# --- Who may --------------------------------------------------------------------------------


def test_keys_without_the_scope_are_told_which(owner: Person) -> None:
    refused = owner.api.get(path_of(owner))
    assert_refused(refused, 403, None, "insufficient_scope")
    assert "'admin.read'" in refused.json()["error"]["message"]
    assert_refused(post(owner.api, path_of(owner), {"name": "x"}), 403, None, "insufficient_scope")


def test_who_may_look_may_not_make(owner: Person) -> None:
    api = api_of(owner, "admin.read")
    assert api.get(path_of(owner)).status_code == 200
    refused = post(api, path_of(owner), {"name": "x"})
    assert_refused(refused, 403, None, "insufficient_scope")


def test_a_strangers_project_and_keys_are_not_found(owner: Person, stranger: Person) -> None:
    api, theirs = api_of(owner), made(api_of(stranger), stranger)
    assert_refused(api.get(path_of(stranger)), 404, "project_id", "not_found")
    assert_refused(post(api, path_of(stranger), {"name": "x"}), 404, "project_id", "not_found")
    foreign = path_of(owner, theirs["id"])
    assert_refused(api.get(foreign), 404, "key_id", "not_found")
    assert_refused(post(api, foreign, {"name": "x"}), 404, "key_id", "not_found")
    assert_refused(post(api, foreign + "/rotate", {}), 404, "key_id", "not_found")
    assert_refused(api.delete(foreign), 404, "key_id", "not_found")
    assert works(theirs["value"])


def test_a_key_of_another_project_is_not_found_in_this_one(owner: Person) -> None:
    api, key = api_of(owner), made(api_of(owner), owner)
    with owner.caller.scope():
        other = owner.caller.organization.projects.create(name="Other")
    there = f"/v1/organization/projects/{other.pk}/api_keys/{key['id']}"
    assert_refused(api.get(there), 404, "key_id", "not_found")


def test_a_member_changes_their_own_keys_only(owner: Person, teammate: Person) -> None:
    mine = made(api_of(owner), owner)
    with teammate.caller.scope():
        own = ApiKey.objects.get(created_by=teammate.user)
    # The scope admin.write does not lift a member above their role.
    api = api_of(teammate, "admin.write")
    for there, status in ((mine["id"], 403), (own.pk, 200)):
        assert post(api, path_of(owner, there), {"name": "x"}).status_code == status
    assert api.delete(path_of(owner, mine["id"])).status_code == 403
    assert post(api, path_of(owner, mine["id"], "rotate"), {}).status_code == 403
    assert api.delete(path_of(owner, own.pk)).status_code == 200
    assert works(mine["value"])


def test_no_key_makes_one_that_may_more(owner: Person) -> None:
    api = api_of(owner, "admin.write")
    refused = post(api, path_of(owner), {"name": "x", "scopes": ["files"]})
    assert_refused(refused, 403, None, "scope_too_wide")
    assert post(api, path_of(owner), {"name": "x", "scopes": ["admin.read"]}).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "\0 \n"}, "name"),
        ({"name": "x" * 151}, "name"),
        ({"name": 7}, "name"),
        ({"name": "x", "scopes": ["root"]}, "scope"),
        ({"name": "x", "scopes": ["\0"]}, "scope"),
        ({"name": "x", "scopes": "files"}, "scopes"),
        ({"name": "x", "allowed_ips": ["10.0.0.0/33"]}, "allowed_ips"),
        ({"name": "x", "allowed_ips": ["fe80::1%eth0"]}, "allowed_ips"),
        ({"name": "x", "allowed_ips": ["\0"]}, "allowed_ips"),
        ({"name": "x", "allowed_ips": ["1.1.1.1"] * 51}, "allowed_ips"),
        ({"name": "x", "expires_at": 1}, "expires_at"),
        ({"name": "x", "expires_at": -1}, "expires_at"),
        ({"name": "x", "expires_at": 2**62}, "expires_at"),
        ({"name": "x", "expires_at": "soon"}, "expires_at"),
        ({"name": "x", "service_account": "yes"}, "service_account"),
    ],
)
def test_bad_input_is_named(owner: Person, body: dict[str, Any], param: str) -> None:
    response = post(api_of(owner), path_of(owner), body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("seconds", [-1, 30 * 86_400 + 1, "1", 1.5])
def test_an_overlap_is_0_seconds_to_30_days(owner: Person, seconds: Any) -> None:
    api = api_of(owner)
    there = path_of(owner, made(api, owner)["id"], "rotate")
    refused = post(api, there, {"overlap_seconds": seconds})
    assert_refused(refused, 400, "overlap_seconds", "invalid_value")


def test_every_change_is_in_the_audit_without_the_secret(owner: Person) -> None:
    api = api_of(owner)
    with owner.caller.scope():
        before = AuditEvent.objects.count()
    key = made(api, owner)
    post(api, path_of(owner, key["id"]), {"name": "New"})
    new = post(api, path_of(owner, key["id"], "rotate"), {}).json()
    api.delete(path_of(owner, new["id"]))
    with owner.caller.scope():
        events = list(AuditEvent.objects.order_by("number"))[before:]
    said = [(event.action, event.target_id) for event in events]
    assert said == [
        ("api_key.created", key["id"]),
        ("api_key.updated", key["id"]),
        ("api_key.rotated", key["id"]),
        ("api_key.revoked", new["id"]),
    ]
    everything = str([vars(event) for event in events])
    assert not [each["value"] for each in (key, new) if each["value"][-20:] in everything]
