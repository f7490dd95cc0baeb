"""Operators' pages of organizations, and that every look at a tenant is audited."""

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

from accounts.models import AuditEvent, Membership, Organization, User
from accounts.services import members, organizations
from accounts.views import operator as views
from tests.conftest import Person
from tests.wire import created

LIST = "/operator/organizations"


@pytest.fixture
def desk(operator: User) -> Client:
    """The operator's browser."""
    client = Client()
    client.force_login(operator, backend="allauth.account.auth_backends.AuthenticationBackend")
    return client


def names(response: Any) -> list[str]:
    return re.findall(r'<a class="fw-semibold" href=".+?">(.+?)</a>', response.content.decode())


def actions(organization: Organization) -> list[tuple[str, str, str]]:
    with scopes_disabled():
        events = AuditEvent.objects.filter(organization=organization, via="operator")
        return list(events.order_by("number").values_list("action", "actor_label", "target_label"))


def test_the_list_finds_by_name_slug_and_state(
    desk: Client, acme: Organization, globex: Organization
) -> None:
    organizations.suspend_organization(actor=None, organization=globex, why="Unpaid.")
    assert names(desk.get(LIST)) == ["Globex", "Acme"]
    assert names(desk.get(f"{LIST}?q=ACM")) == ["Acme"]
    assert names(desk.get(f"{LIST}?state=suspended")) == ["Globex"]
    assert names(desk.get(f"{LIST}?state=active")) == ["Acme"]
    assert names(desk.get(f"{LIST}?state=deleted")) == []
    assert "No organization is like this" in desk.get(f"{LIST}?q=nobody").content.decode()


def test_the_list_pages_by_key_and_keeps_the_filter(
    desk: Client, operator: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "PAGE_SIZE", 2)
    for at in range(5):
        organizations.create_own_organization(actor=operator, name=f"Team {at}")
    found, path = [], f"{LIST}?q=team"
    while path:
        response = desk.get(path)
        found.append(names(response))
        older = re.search(r'href="(\?q=team&amp;after=\w+)"', response.content.decode())
        path = LIST + older[1].replace("&amp;", "&") if older else ""
    assert found == [["Team 4", "Team 3"], ["Team 2", "Team 1"], ["Team 0"]]


@pytest.mark.parametrize("query", ["q=%00", "after=%00", "state=x", "q=%25_%27", "after=\u00e9"])
def test_any_query_is_an_answer(query: str, desk: Client, acme: Organization) -> None:
    assert desk.get(f"{LIST}?{query}").status_code == 200


def test_the_lists_queries_do_not_grow(
    desk: Client, operator: User, owner: Person, teammate: Person
) -> None:
    def count() -> int:
        with CaptureQueriesContext(connection) as queries:
            desk.get(LIST)
        return len(queries)

    count()
    of_one = count()
    for name in ("a", "b"):
        organizations.create_organization(name=name, owner_email=f"{name}@b.test")
    assert count() == of_one
    row = desk.get(f"{LIST}?q=acme").content.decode()
    assert re.findall(r'data-label="(?:Members|Projects|API keys)">(\d+)<', row) == ["2", "1", "2"]


def test_suspending_and_resuming_is_audited(
    desk: Client, owner: Person, acme: Organization
) -> None:
    path = f"{LIST}/{acme.pk}"
    assert desk.post(f"{path}/suspend", {"reason": ""}).status_code == 400
    assert desk.post(f"{path}/suspend", {"reason": "Unpaid."}).status_code == 302
    assert owner.api.get("/v1/files").status_code == 403
    assert "Unpaid." in desk.get(path).content.decode()
    assert desk.post(f"{path}/resume").status_code == 302
    assert owner.api.get("/v1/files").status_code == 200
    assert actions(acme) == [
        ("operator.suspended", "operator@portal.test", "Acme"),
        ("operator.looked", "operator@portal.test", path),
        ("operator.resumed", "operator@portal.test", "Acme"),
    ]


def test_before_suspending_it_says_what_that_stops(
    desk: Client, owner: Person, acme: Organization
) -> None:
    path = f"{LIST}/{acme.pk}"
    assert "None of its batches is unfinished." in desk.get(path).content.decode()
    created(owner.api)
    page = desk.get(path).content.decode()
    assert "Suspend <bdi>Acme</bdi>?" in page
    assert "1 batch of it is unfinished and stops until it is resumed." in page
    created(owner.api)
    page = desk.post(f"{path}/suspend", {"reason": ""}).content.decode()
    assert "2 batches of it are unfinished and stop until it is resumed." in page
    assert "Nothing is suspended. Reason: This field is required." in page


def test_restoring(desk: Client, owner: Person, acme: Organization) -> None:
    organizations.delete_organization(actor=owner.caller)
    path = f"{LIST}/{acme.pk}"
    assert "Restore" in desk.get(path).content.decode()
    assert desk.post(f"{path}/restore").status_code == 302
    assert owner.api.get("/v1/files").status_code == 200
    assert actions(acme) == [
        ("operator.looked", "operator@portal.test", path),
        ("operator.restored", "operator@portal.test", "Acme"),
    ]


def test_restoring_what_is_being_purged_is_refused(desk: Client, acme: Organization) -> None:
    late = timezone.now() - timedelta(days=31)
    Organization.objects.filter(pk=acme.pk).update(deleted_at=late)
    page = desk.post(f"{LIST}/{acme.pk}/restore", follow=True)
    assert "It was deleted too long ago" in page.content.decode()
    acme.refresh_from_db()
    assert acme.deleted_at == late


def test_a_look_shows_the_tenants_pages_read_only_and_audits_each(
    desk: Client, owner: Person, acme: Organization
) -> None:
    batch = created(owner.api)
    assert desk.get("/")["Location"] == LIST
    assert desk.post(f"{LIST}/{acme.pk}/look")["Location"] == "/"
    page = desk.get("/batches").content.decode()
    assert batch["id"] in page
    assert "You look at <strong>Acme</strong> as an operator" in page
    for path in ("/organization", "/organization/members", "/organization/projects"):
        assert desk.get(path).status_code == 200
    assert desk.post(f"/batches/{batch['id']}/cancel").status_code == 403
    assert desk.post("/organization", {"name": "Mine"}).status_code == 403
    assert desk.post("/organization/leave").status_code == 403
    assert desk.post("/operator/look/end")["Location"] == LIST
    assert desk.get("/")["Location"] == LIST
    assert [(action, label) for action, _, label in actions(acme)] == [
        ("operator.look_began", "Acme"),
        ("operator.looked", "/batches"),
        ("operator.looked", "/organization"),
        ("operator.looked", "/organization/members"),
        ("operator.looked", "/organization/projects"),
        ("operator.looked", f"/batches/{batch['id']}/cancel"),
        ("operator.looked", "/organization"),
        ("operator.looked", "/organization/leave"),
        ("operator.look_ended", "Acme"),
    ]


def test_a_look_needs_no_membership_and_ends_with_the_right_to_it(
    desk: Client, operator: User, acme: Organization
) -> None:
    desk.post(f"{LIST}/{acme.pk}/look")
    assert desk.get("/").status_code == 200
    User.objects.filter(pk=operator.pk).update(is_staff=False)
    assert desk.get("/").status_code == 403


@pytest.mark.parametrize("id", ["org_0", "%00", "x" * 300])
def test_unknown_organizations_are_not_found(id: str, desk: Client) -> None:
    assert desk.get(f"{LIST}/{id}").status_code == 404
    for action in ("suspend", "resume", "restore", "look"):
        assert desk.post(f"{LIST}/{id}/{action}", {"reason": "x"}).status_code == 404


def test_ending_without_a_look_does_nothing(desk: Client) -> None:
    assert desk.post("/operator/look/end").status_code == 302


def test_a_page_that_polls_itself_is_one_look_and_a_new_look_is_another(
    desk: Client, acme: Organization
) -> None:
    polls = {"HX-Request": "true"}
    for _ in range(2):
        desk.post(f"{LIST}/{acme.pk}/look")
        desk.get("/", headers=polls)
        desk.get("/", headers=polls)
        desk.get("/?after=batch_1", headers=polls)
    looks = [label for action, _, label in actions(acme) if action == "operator.looked"]
    assert looks == ["/", "/?after=batch_1"] * 2


def test_a_page_of_which_several_parts_poll_is_one_look_at_each(
    desk: Client, acme: Organization
) -> None:
    desk.post(f"{LIST}/{acme.pk}/look")
    desk.get("/batches")
    for _ in range(3):
        desk.get("/batches", headers={"HX-Request": "true"})
        desk.get("/", headers={"HX-Request": "true"})
    looks = [label for action, _, label in actions(acme) if action == "operator.looked"]
    assert sorted(looks) == ["/", "/batches"]
    desk.get("/")
    looks = [label for action, _, label in actions(acme) if action == "operator.looked"]
    assert sorted(looks) == ["/", "/", "/batches"]


def test_what_operators_pages_tell_of_one_organization_is_audited(
    desk: Client, acme: Organization
) -> None:
    for path in (f"{LIST}/{acme.pk}", f"{LIST}/{acme.pk}/limits"):
        assert desk.get(path).status_code == 200
    looks = [label for action, _, label in actions(acme) if action == "operator.looked"]
    assert looks == [f"{LIST}/{acme.pk}", f"{LIST}/{acme.pk}/limits"]


def test_while_looking_an_operator_who_is_a_member_changes_nothing(
    desk: Client, operator: User, acme: Organization
) -> None:
    members.add_member(actor=None, organization=acme, user=operator, role="member")
    desk.post(f"{LIST}/{acme.pk}/look")
    assert desk.post("/organization/leave", {"typed": "Acme"}).status_code == 403
    with scopes_disabled():
        assert Membership.objects.filter(user=operator).exists()


def test_a_look_ends_where_the_second_factor_does(
    desk: Client, acme: Organization, settings: Any
) -> None:
    desk.post(f"{LIST}/{acme.pk}/look")
    settings.OPERATOR_MFA_REQUIRED = True
    assert desk.get("/organization").status_code == 403


@pytest.mark.parametrize("action", ["suspend", "resume", "restore", "look"])
def test_owners_are_no_operators(action: str, owner: Person, acme: Organization) -> None:
    assert owner.browser.get(f"{LIST}/{acme.pk}").status_code == 404
    path = f"{LIST}/{acme.pk}/{action}"
    assert owner.browser.post(path, {"reason": "x"}).status_code == 404
    assert owner.browser.get(path).status_code == 405
    assert Client().post(path)["Location"].startswith("/accounts/login/")
    acme.refresh_from_db()
    assert (acme.suspended_at, actions(acme)) == (None, [])
