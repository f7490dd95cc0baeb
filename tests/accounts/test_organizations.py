"""Organizations: making, renaming, switching, suspending, deleting, restoring."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.messages import get_messages
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.errors import BadRequest, Forbidden
from accounts.models import AuditEvent, Membership, Organization, User
from accounts.services import members, organizations
from tests.accounts.test_members import admin_key
from tests.conftest import PASSWORD, Person
from tests.wire import assert_refused, post

BACKEND = "allauth.account.auth_backends.AuthenticationBackend"


def said(response: Any) -> list[str]:
    return [str(message) for message in get_messages(response.wsgi_request)]


def shown_organization(client: Client) -> str:
    """The organization whose pages the client sees."""
    found = re.search(r'aria-label="Organization: (.+?); switch"', client.get("/").content.decode())
    assert found
    return found[1]


def events(action: str) -> list[dict[str, Any]]:
    with scopes_disabled():
        mine = AuditEvent.objects.filter(action=action).order_by("created_at")
        return list(mine.values_list("changes", flat=True))


def suspend(organization: Organization, why: str = "Unpaid.") -> None:
    organizations.suspend_organization(actor=None, organization=organization, why=why)


@pytest.fixture
def alone(db: None) -> Client:
    """The browser of somebody of no organization."""
    client = Client()
    client.force_login(User.objects.create_user("alone@nowhere.test", PASSWORD), backend=BACKEND)
    return client


# --- Renaming -------------------------------------------------------------------------------


def test_the_slug_stays(owner: Person, acme: Organization) -> None:
    renamed = organizations.rename_organization(actor=owner.caller, name="  Acme\n Two ")
    assert (renamed.name, renamed.slug) == ("Acme Two", "acme")
    assert events("organization.renamed") == [{"name": ["Acme", "Acme Two"]}]


def test_renaming_by_api(owner: Person, acme: Organization) -> None:
    api = admin_key(owner)
    before = api.get("/v1/organization").json()
    assert before == {
        "object": "organization",
        "id": acme.pk,
        "name": "Acme",
        "slug": "acme",
        "created_at": int(acme.created_at.timestamp()),
    }
    assert post(api, "/v1/organization", {"name": "Two"}).json() == before | {"name": "Two"}
    assert post(api, "/v1/organization", {"name": " "}).status_code == 400


def test_renaming_by_page(owner: Person, teammate: Person, acme: Organization) -> None:
    assert owner.browser.post("/organization", {"name": "Two"}).status_code == 302
    acme.refresh_from_db()
    assert acme.name == "Two"
    page = owner.browser.post("/organization", {"name": "x" * 151})
    assert page.status_code == 400
    assert b"x" * 151 in page.content
    assert teammate.browser.post("/organization", {"name": "Mine"}).status_code == 403


def test_members_rename_nothing_by_api(teammate: Person) -> None:
    refused = post(admin_key(teammate), "/v1/organization", {"name": "x"})
    assert_refused(refused, 403, None, "insufficient_role")


def test_everybody_sees_the_settings(reviewer: Person) -> None:
    page = reviewer.browser.get("/organization")
    assert page.status_code == 200
    assert b"Delete the organization" not in page.content


# --- Making ---------------------------------------------------------------------------------


def test_where_registration_is_open_everybody_makes_organizations(
    alone: Client, settings: Any
) -> None:
    settings.REGISTRATION = "open"
    assert b"/organization/new" in alone.get("/").content
    assert alone.post("/organization/new", {"name": ""}).status_code == 400
    response = alone.post("/organization/new", {"name": "My team"})
    assert (response.status_code, response["Location"]) == (302, "/")
    assert shown_organization(alone) == "My team"
    with scopes_disabled():
        made = Membership.objects.get(organization__slug="my-team")
    assert (made.user.email, made.role) == ("alone@nowhere.test", "owner")


@pytest.mark.parametrize("mode", ["invite", "closed"])
def test_otherwise_only_operators_do(
    mode: str, alone: Client, operator: User, settings: Any
) -> None:
    settings.REGISTRATION = mode
    assert b"/organization/new" not in alone.get("/").content
    assert alone.get("/organization/new").status_code == 403
    assert alone.post("/organization/new", {"name": "Mine"}).status_code == 403
    client = Client()
    client.force_login(operator, backend=BACKEND)
    assert client.post("/organization/new", {"name": "Theirs"}).status_code == 302
    assert Organization.objects.get().slug == "theirs"


def test_a_taken_name_gets_another_slug(acme: Organization, operator: User) -> None:
    made = organizations.create_own_organization(actor=operator, name="Acme")
    assert re.fullmatch(r"acme-[0-9a-f]{6}", made.slug)
    assert organizations.create_own_organization(actor=operator, name="東京").slug == "organization"


def test_a_name_of_characters_that_become_many_is_kept(operator: User) -> None:
    name = "\u32cf" * 100  # as a slug LTDLTD...
    made = [organizations.create_own_organization(actor=operator, name=name) for _ in range(2)]
    assert [each.name for each in made] == [name, name]
    assert [len(each.slug) for each in made] == [140, 147]
    with pytest.raises(BadRequest, match="There is already an organization"):
        organizations.create_organization(name=name, owner_email="a@acme.test")


def test_a_name_that_is_too_long_is_refused_by_the_shell_too(db: None) -> None:
    with pytest.raises(CommandError, match="The name may have at most 150 characters"):
        call_command("create_org", "x" * 151, "--owner", "a@acme.test")


def test_a_long_name_is_taken_by_renaming(owner: Person) -> None:
    name = "\u32cf" * 150
    answer = owner.browser.post("/organization", {"name": name})
    assert (answer.status_code, Organization.objects.get().name) == (302, name)


def test_making_needs_somebody_signed_in(db: None) -> None:
    response = Client().get("/organization/new")
    assert response["Location"] == "/accounts/login/?next=/organization/new"


# --- Switching ------------------------------------------------------------------------------


@pytest.fixture
def of_both(owner: Person, globex: Organization) -> Person:
    members.add_member(actor=None, organization=globex, user=owner.user, role="viewer")
    return owner


def test_switching(of_both: Person) -> None:
    client = of_both.browser
    assert shown_organization(client) == "Acme"
    assert client.post("/organization/switch", {"slug": "globex"}).status_code == 302
    assert shown_organization(client) == "Globex"
    assert b'name="slug" value="acme"' in client.get("/").content


@pytest.mark.parametrize("slug", ["globex", "nowhere", "", "\0"])
def test_nobody_switches_to_where_they_are_not_a_member(
    slug: str, owner: Person, stranger: Person
) -> None:
    client = owner.browser
    assert client.post("/organization/switch", {"slug": slug}).status_code == 404
    assert shown_organization(client) == "Acme"
    assert b"Globex" not in client.get("/").content


def test_switching_is_a_post(owner: Person) -> None:
    assert owner.browser.get("/organization/switch").status_code == 405


def test_the_menu_is_one_query_however_many_there_are(owner: Person) -> None:
    def count() -> int:
        client = owner.browser
        with CaptureQueriesContext(connection) as queries:
            client.get("/organization")
        return len(queries)

    before = count()
    for name in ("a", "b", "c"):
        organizations.create_organization(name=name, owner_email=owner.user.email)
    assert count() == before


# --- Suspending -----------------------------------------------------------------------------


def test_a_suspended_organizations_keys_are_refused(owner: Person, acme: Organization) -> None:
    suspend(acme)
    refused = owner.api.get("/v1/files")
    assert_refused(refused, 403, None, "organization_suspended")
    assert "Unpaid." in refused.json()["error"]["message"]
    organizations.resume_organization(actor=None, organization=acme)
    assert owner.api.get("/v1/files").status_code == 200


def test_a_suspended_organizations_pages_are_read_only(owner: Person, acme: Organization) -> None:
    suspend(acme, "Unpaid <b>since</b> May.")
    page = owner.browser.get("/").content.decode()
    assert "Acme is suspended: Unpaid &lt;b&gt;since&lt;/b&gt; May." in page
    for path in ("/organization", "/organization/members", "/organization/projects"):
        assert owner.browser.get(path).status_code == 200
        response = owner.browser.post(path, {"name": "x", "email": "a@b.test", "role": "viewer"})
        assert response.status_code == 403
        assert "This organization is suspended" in response.content.decode()
    assert owner.browser.post("/organization/delete", {"typed": "Acme"}).status_code == 403


def test_a_suspended_callers_permissions_only_read(owner: Person, acme: Organization) -> None:
    suspend(acme)
    acme.refresh_from_db()
    caller = owner.caller.__class__(acme, owner.caller.project, owner.user, "owner")
    assert all(name.endswith(".read") for name in caller.permissions)
    with pytest.raises(Forbidden) as caught:
        caller.require("files")
    assert caught.value.code == "organization_suspended"
    caller.require("audit.read")


def test_suspending_again_changes_the_reason(acme: Organization) -> None:
    suspend(acme, "One.")
    since = Organization.objects.get(pk=acme.pk).suspended_at
    suspend(acme, "Two.")
    again = Organization.objects.get(pk=acme.pk)
    assert (again.suspended_at, again.suspended_why) == (since, "Two.")
    assert events("operator.suspended")[1] == {"suspended_why": ["One.", "Two."]}


@pytest.mark.parametrize("why", ["", "  ", "\0", "x" * 501])
def test_a_reason_is_needed(why: str, acme: Organization) -> None:
    with pytest.raises(BadRequest) as caught:
        suspend(acme, why)
    assert caught.value.param == "reason"


def test_suspending_by_command(acme: Organization, capsys: Any) -> None:
    call_command("suspend_org", "acme", "--reason", "Unpaid.")
    assert Organization.objects.get().suspended_why == "Unpaid."
    call_command("resume_org", "acme")
    assert Organization.objects.get().suspended_at is None
    assert capsys.readouterr().out == "acme is suspended\nacme works again\n"
    with pytest.raises(CommandError, match="There is no organization 'x'"):
        call_command("resume_org", "x")


# --- Deleting and restoring -----------------------------------------------------------------


def test_a_deleted_organization_is_gone_for_its_members(
    owner: Person, teammate: Person, acme: Organization
) -> None:
    client = owner.browser
    response = client.post("/organization/delete", {"typed": "Acme"})
    assert said(response) == ["Acme is deleted."]
    assert client.get("/").status_code == 403
    for person in (owner, teammate):
        assert person.api.get("/v1/files").status_code == 401
        assert person.browser.post("/organization/switch", {"slug": "acme"}).status_code == 404
    acme.refresh_from_db()
    assert acme.deleted_at is not None
    assert len(events("organization.deleted")) == 1


def test_deleting_needs_the_name(owner: Person, acme: Organization) -> None:
    for given in ({"typed": "acme"}, {}):
        page = owner.browser.post("/organization/delete", given, follow=True)
        assert page.redirect_chain == [("/organization", 302)]
        assert "Nothing is deleted: the name that you typed is another." in page.content.decode()
    acme.refresh_from_db()
    assert acme.deleted_at is None


def test_only_owners_delete(admin: Person, teammate: Person, acme: Organization) -> None:
    for person in (admin, teammate):
        response = person.browser.post("/organization/delete", {"typed": "Acme"})
        assert response.status_code == 403
    assert admin.browser.get("/organization/delete").status_code == 405


def test_a_restored_organization_is_as_before(owner: Person, acme: Organization) -> None:
    organizations.delete_organization(actor=owner.caller)
    organizations.restore_organization(actor=None, organization=acme)
    assert owner.api.get("/v1/files").status_code == 200
    assert shown_organization(owner.browser) == "Acme"


def test_after_thirty_days_nothing_is_restored(owner: Person, acme: Organization) -> None:
    late = timezone.now() - timedelta(days=30, seconds=1)
    Organization.objects.filter(pk=acme.pk).update(deleted_at=late)
    with pytest.raises(BadRequest, match="too long ago"):
        organizations.restore_organization(actor=None, organization=acme)
