"""Members: who may change whom, and that an organization never loses its last owner."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.contrib.messages import get_messages
from django.core.management import CommandError, call_command
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts import access
from accounts.errors import BadRequest, Forbidden
from accounts.ids import user_id
from accounts.models import ApiKey, AuditEvent, Membership, Organization, Role, User
from accounts.queries import caller_of_key
from accounts.services import keys, members
from accounts.views import members as views
from tests import jobs
from tests.conftest import Person
from tests.wire import assert_refused, post

USERS = "/v1/organization/users"


def admin_key(person: Person) -> Any:
    """The person's client, by a key that may administer."""
    with scopes_disabled():
        person.user.api_keys.update(scopes=["admin.read", "admin.write"])
    return person.api


def membership_of(person: Person) -> Membership:
    return access.get_member(person.caller, user_id(person.user.pk))


def role_of(person: Person) -> str | None:
    with scopes_disabled():
        mine = Membership.objects.filter(user=person.user, organization=person.caller.organization)
        return mine.values_list("role", flat=True).first()


def actions() -> list[str]:
    with scopes_disabled():
        events = AuditEvent.objects.exclude(action__startswith="api_key.")
        return list(events.order_by("id").values_list("action", flat=True))


def said(response: Any) -> list[str]:
    return [str(message) for message in get_messages(response.wsgi_request)]


def change(actor: Person, person: Person, role: str) -> None:
    members.change_role(actor=actor.caller, membership=membership_of(person), role=role)


def remove(actor: Person, person: Person) -> None:
    members.remove_member(actor=actor.caller, membership=membership_of(person))


# --- The rules ------------------------------------------------------------------------------


def test_an_owner_changes_a_role(owner: Person, teammate: Person) -> None:
    change(owner, teammate, Role.ADMIN)
    assert role_of(teammate) == "admin"
    with scopes_disabled():
        event = AuditEvent.objects.get(action="member.role_changed")
    assert (event.actor, event.target_label) == (owner.user, "teammate@acme.test")
    assert event.changes == {"role": ["member", "admin"]}


def test_the_same_role_again_is_no_change(owner: Person, teammate: Person) -> None:
    change(owner, teammate, Role.MEMBER)
    assert "member.role_changed" not in actions()


def test_an_unknown_role_is_refused(owner: Person, teammate: Person) -> None:
    with pytest.raises(BadRequest) as caught:
        change(owner, teammate, "king")
    assert (caught.value.param, caught.value.code) == ("role", "invalid_value")


def test_an_admin_makes_no_owners(admin: Person, teammate: Person) -> None:
    with pytest.raises(Forbidden):
        change(admin, teammate, Role.OWNER)
    with pytest.raises(Forbidden):
        change(admin, admin, Role.OWNER)
    assert (role_of(teammate), role_of(admin)) == ("member", "admin")


def test_an_admin_neither_demotes_nor_removes_an_owner(owner: Person, admin: Person) -> None:
    with pytest.raises(Forbidden):
        change(admin, owner, Role.MEMBER)
    with pytest.raises(Forbidden):
        remove(admin, owner)
    assert role_of(owner) == "owner"


def test_an_admin_makes_and_removes_admins(admin: Person, teammate: Person) -> None:
    change(admin, teammate, Role.ADMIN)
    assert role_of(teammate) == "admin"
    remove(admin, teammate)
    assert role_of(teammate) is None


def test_the_last_owner_stays_owner(owner: Person, admin: Person) -> None:
    for attempt in (
        lambda: change(owner, owner, Role.ADMIN),
        lambda: remove(owner, owner),
        lambda: members.leave_organization(actor=owner.caller),
        lambda: members.remove_member(actor=None, membership=membership_of(owner)),
    ):
        with pytest.raises(BadRequest) as caught:
            attempt()
        assert caught.value.code == "last_owner"
    assert role_of(owner) == "owner"


def test_an_owner_who_cannot_sign_in_does_not_count(owner: Person, teammate: Person) -> None:
    change(owner, teammate, Role.OWNER)
    User.objects.filter(pk=teammate.user.pk).update(is_active=False)
    with pytest.raises(BadRequest, match="needs an owner"):
        members.leave_organization(actor=owner.caller)


def test_with_a_second_owner_the_first_may_go(owner: Person, teammate: Person) -> None:
    change(owner, teammate, Role.OWNER)
    members.leave_organization(actor=owner.caller)
    assert (role_of(owner), role_of(teammate)) == (None, "owner")
    assert actions()[-1] == "member.left"


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("attempt", ["demote", "leave", "remove"])
def test_of_two_owners_who_go_at_once_one_stays(
    attempt: str, owner: Person, teammate: Person
) -> None:
    change(owner, teammate, Role.OWNER)
    callers = [owner.caller, access_again(teammate)]
    rows = [membership_of(owner), membership_of(teammate)]
    does = {
        "demote": lambda at: members.change_role(
            actor=callers[at], membership=rows[1 - at], role=Role.MEMBER
        ),
        "leave": lambda at: members.leave_organization(actor=callers[at]),
        "remove": lambda at: members.remove_member(actor=callers[at], membership=rows[1 - at]),
    }[attempt]
    found = jobs.together(lambda: does(0), lambda: does(1))
    failed = [each for each in found if isinstance(each, Exception)]
    assert [type(each) for each in failed] == [BadRequest]
    assert [role_of(owner), role_of(teammate)].count("owner") == 1


def access_again(person: Person) -> access.Caller:
    """The caller with the role that the person has now."""
    return access.Caller(
        person.caller.organization, person.caller.project, person.user, role_of(person) or ""
    )


def test_a_removed_members_keys_stop(owner: Person, teammate: Person, stranger: Person) -> None:
    assert teammate.api.get("/v1/files").status_code == 200
    remove(owner, teammate)
    assert teammate.api.get("/v1/files").status_code == 401
    assert teammate.browser.get("/").status_code == 403
    assert stranger.api.get("/v1/files").status_code == 200


def test_the_keys_of_who_was_removed_stay_revoked_when_they_come_back(
    owner: Person, teammate: Person, stranger: Person, acme: Organization, globex: Organization
) -> None:
    members.add_member(actor=None, organization=globex, user=teammate.user, role="member")
    elsewhere = keys.create_api_key(
        project=stranger.caller.project, name="theirs", created_by=teammate.user
    )[1]
    _, expired = keys.create_api_key(
        project=owner.caller.project, name="old", created_by=teammate.user
    )
    with scopes_disabled():
        ApiKey.objects.filter(name="old").update(expires_at=timezone.now())
    remove(owner, teammate)
    with scopes_disabled():
        event = AuditEvent.objects.get(action="member.removed")
    assert event.changes == {"role": ["member", None], "api_keys": [1, 0]}
    members.add_member(actor=None, organization=acme, user=teammate.user, role="viewer")
    texts = (teammate.key, expired, elsewhere)
    assert [caller_of_key(text) is not None for text in texts] == [False, False, True]
    with scopes_disabled():
        states = ApiKey.objects.filter(created_by=teammate.user).order_by("name")
        assert [(key.name, key.state) for key in states] == [
            ("old", "expired"),
            ("teammate@acme.test", "revoked"),
            ("theirs", "active"),
        ]


def test_the_keys_of_who_left_stay_revoked_too(teammate: Person, acme: Organization) -> None:
    members.leave_organization(actor=teammate.caller)
    members.add_member(actor=None, organization=acme, user=teammate.user, role="member")
    assert teammate.api.get("/v1/files").status_code == 401


# --- By API ---------------------------------------------------------------------------------


def test_the_list_pages_by_user(owner: Person, teammate: Person, viewer: Person) -> None:
    api = admin_key(owner)
    first = api.get(f"{USERS}?limit=2").json()
    assert [row["email"] for row in first["data"]] == ["owner@acme.test", "teammate@acme.test"]
    assert first["data"][1] == {
        "object": "organization.user",
        "id": user_id(teammate.user.pk),
        "name": "",
        "email": "teammate@acme.test",
        "role": "member",
        "added_at": int(membership_of(teammate).created_at.timestamp()),
    }
    assert (first["object"], first["has_more"]) == ("list", True)
    assert first["last_id"] == user_id(teammate.user.pk)
    rest = api.get(f"{USERS}?after={first['last_id']}").json()
    assert [row["role"] for row in rest["data"]] == ["viewer"]
    assert rest["has_more"] is False


def test_a_role_is_changed_and_a_member_removed(owner: Person, teammate: Person) -> None:
    api, path = admin_key(owner), f"{USERS}/{user_id(teammate.user.pk)}"
    assert api.get(path).json()["role"] == "member"
    assert post(api, path, {"role": "viewer"}).json()["role"] == "viewer"
    assert api.delete(path).json() == {
        "object": "organization.user.deleted",
        "id": user_id(teammate.user.pk),
        "deleted": True,
    }
    assert_refused(api.get(path), 404, "user_id", "not_found")


def test_no_key_makes_owners(owner: Person, teammate: Person) -> None:
    path = f"{USERS}/{user_id(teammate.user.pk)}"
    refused = post(admin_key(owner), path, {"role": "owner"})
    assert_refused(refused, 403, None, "insufficient_scope")
    assert role_of(teammate) == "member"


def test_the_last_owner_is_not_removed_by_api(owner: Person) -> None:
    path = f"{USERS}/{user_id(owner.user.pk)}"
    assert_refused(admin_key(owner).delete(path), 403, None, "insufficient_scope")
    assert role_of(owner) == "owner"


@pytest.mark.parametrize(
    "id",
    ["user_0", "user_-1", "user_", "1", "user_99999999999999999999", "user_1%00", "user_%D9%A1"],
)
def test_hostile_ids_are_not_found(id: str, owner: Person) -> None:
    api = admin_key(owner)
    for response in (
        api.get(f"{USERS}/{id}"),
        api.delete(f"{USERS}/{id}"),
        post(api, f"{USERS}/{id}", {"role": "viewer"}),
    ):
        assert_refused(response, 404, "user_id", "not_found")


def test_the_api_needs_the_scope(owner: Person, teammate: Person) -> None:
    assert_refused(owner.api.get(USERS), 403, None, "insufficient_scope")
    path = f"{USERS}/{user_id(teammate.user.pk)}"
    assert_refused(owner.api.delete(path), 403, None, "insufficient_scope")
    assert_refused(admin_key(teammate).delete(path), 403, None, "insufficient_role")


def queries_of(read: Any) -> int:
    with CaptureQueriesContext(connection) as queries:
        assert read().status_code == 200
    return len(queries)


def test_the_lists_queries_do_not_grow(owner: Person, acme: Organization) -> None:
    admin_key(owner)
    reads = [lambda: owner.api.get(USERS), lambda: owner.browser.get("/organization/members")]
    for read in reads:
        read()  # notes the key's use
    of_one = [queries_of(read) for read in reads]
    for name in ("a", "b"):
        members.enrol(organization=acme, email=f"{name}@acme.test", role="member")
    assert [queries_of(read) for read in reads] == of_one


# --- By page --------------------------------------------------------------------------------


def test_the_page_lists_members_with_what_removing_them_means(
    owner: Person, teammate: Person, stranger: Person
) -> None:
    page = owner.browser.get("/organization/members").content.decode()
    assert "teammate@acme.test" in page
    assert "Their API key here stops working at once." in page
    assert "stranger@globex.test" not in page


def test_a_role_is_changed_and_a_member_removed_by_page(owner: Person, teammate: Person) -> None:
    path = f"/organization/members/{user_id(teammate.user.pk)}"
    response = owner.browser.post(f"{path}/role", {"role": "viewer"})
    assert (response.status_code, response["Location"]) == (302, "/organization/members")
    assert role_of(teammate) == "viewer"
    response = owner.browser.post(f"{path}/remove")
    assert said(response) == ["teammate@acme.test is no longer a member."]
    assert role_of(teammate) is None


def test_members_and_invitations_are_found_by_name_and_address(
    owner: Person, teammate: Person, stranger: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "/organization/members"
    User.objects.filter(pk=teammate.user.pk).update(name="Zoë Ng")
    for email in ("guest@acme.test", "other@elsewhere.test"):
        owner.browser.post(path, {"email": email, "role": "member"})

    def found(q: str) -> list[str]:
        shown = owner.browser.get(path, {"q": q}).context
        people = [row.membership.user.email for row in shown["rows"]]
        return people + [each.email for each in shown["invitations"]]

    assert found("zoë") == ["teammate@acme.test"]
    assert found("ACME") == ["teammate@acme.test", "owner@acme.test", "guest@acme.test"]
    assert found("globex") == []
    assert "No member is like this" in owner.browser.get(path, {"q": "none"}).content.decode()
    monkeypatch.setattr(views, "PAGE_SIZE", 1)
    page = owner.browser.get(path, {"q": "acme"}).content.decode()
    assert re.search(r'href="\?q=acme&amp;after=\d+" rel="next"', page)


def test_the_page_says_why_the_last_owner_stays(owner: Person) -> None:
    path = f"/organization/members/{user_id(owner.user.pk)}"
    response = owner.browser.post(f"{path}/role", {"role": "member"})
    assert said(response) == ["An organization needs an owner: make somebody else one first."]
    assert role_of(owner) == "owner"


def test_members_look_but_do_not_touch(owner: Person, teammate: Person) -> None:
    page = teammate.browser.get("/organization/members")
    assert page.status_code == 200
    assert b"Invite somebody" not in page.content
    path = f"/organization/members/{user_id(owner.user.pk)}"
    for action in ("role", "remove"):
        assert teammate.browser.post(f"{path}/{action}", {"role": "viewer"}).status_code == 403


def test_reviewers_do_not_see_members(reviewer: Person) -> None:
    assert reviewer.browser.get("/organization/members").status_code == 403


def test_a_strangers_member_is_not_found(owner: Person, stranger: Person) -> None:
    path = f"/organization/members/{user_id(stranger.user.pk)}"
    for action in ("role", "remove"):
        assert owner.browser.post(f"{path}/{action}", {"role": "viewer"}).status_code == 404
    assert role_of(stranger) == "owner"


@pytest.mark.parametrize("action", ["role", "remove"])
def test_changes_are_posts(action: str, owner: Person) -> None:
    path = f"/organization/members/{user_id(owner.user.pk)}/{action}"
    assert owner.browser.get(path).status_code == 405


@pytest.mark.parametrize("after", ["%00", "9" * 40, "x", "%D9%A1", "-1"])
def test_any_after_is_an_answer(after: str, owner: Person) -> None:
    assert owner.browser.get(f"/organization/members?after={after}").status_code == 200


def test_leaving_by_page(owner: Person, viewer: Person) -> None:
    client = viewer.browser
    assert client.post("/organization/leave").status_code == 302
    assert role_of(viewer) is None
    assert client.get("/").status_code == 403


# --- By command -----------------------------------------------------------------------------


def test_the_shell_adds_and_removes(acme: Organization, capsys: Any) -> None:
    given = ["--org", "acme", "--email", "new@acme.test"]
    call_command("add_member", *given, "--role", "viewer")
    assert capsys.readouterr().out == "new@acme.test is viewer of acme\n"
    new = User.objects.get(email="new@acme.test")
    assert not new.has_usable_password()
    with pytest.raises(CommandError, match="already is a member"):
        call_command("add_member", *given)
    call_command("remove_member", *given)
    with pytest.raises(CommandError, match="is not a member of Acme"):
        call_command("remove_member", *given)


def test_the_shell_knows_people_whatever_the_case(acme: Organization, globex: Any) -> None:
    call_command("add_member", "--org", "acme", "--email", "STRANGER@globex.test")
    assert User.objects.count() == 2


@pytest.mark.parametrize("email", ["", "x", "a b@c.test", "a@b\n.test"])
def test_the_shell_refuses_what_is_no_address(email: str, acme: Organization) -> None:
    with pytest.raises(CommandError, match="not an email address"):
        call_command("add_member", "--org", "acme", "--email", email)


def test_the_shell_refuses_unknown_organizations(db: None) -> None:
    with pytest.raises(CommandError, match="There is no organization"):
        call_command("add_member", "--org", "nowhere", "--email", "a@acme.test")


def test_nobody_joins_twice(owner: Person, teammate: Person, acme: Organization) -> None:
    members.add_member(actor=None, organization=acme, user=teammate.user, role="viewer")
    assert role_of(teammate) == "member"
