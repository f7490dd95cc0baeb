"""A page of one organization does nothing to another: the session's may be changed in another tab."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from django_scopes import scopes_disabled

from accounts.models import Membership, Organization, User
from accounts.services import members
from batches.models import File
from tests.conftest import Person

pytestmark = pytest.mark.django_db

HTMX = {"hx-request": "true"}


@pytest.fixture
def tab(owner: Person, globex: Organization) -> Client:
    """Acme's owner, who is in Globex now."""
    members.add_member(actor=None, organization=globex, user=owner.user, role="owner")
    client = owner.browser
    client.post("/organization/switch", {"slug": "globex"})
    return client


def names() -> list[str]:
    return list(Organization.objects.order_by("slug").values_list("name", flat=True))


def polled(client: Client, organization: Organization, method: str = "get") -> Any:
    headers = HTMX | {"x-organization": organization.pk}
    return getattr(client, method)("/organization", {"name": "Mine"}, headers=headers)


def test_every_form_and_what_htmx_asks_tell_the_organization_of_their_page(
    owner: Person, acme: Organization
) -> None:
    page = owner.browser.get("/organization/members").content.decode()
    field = f'<input type="hidden" name="for_organization" value="{acme.pk}">'
    assert page.count(field) == page.count('name="csrfmiddlewaretoken"') > 2
    assert f'"x-organization": "{acme.pk}"' in page
    assert "for_organization" not in Client().get("/accounts/login/").content.decode()


def test_a_form_of_another_organization_does_nothing(tab: Client, acme: Organization) -> None:
    response = tab.post("/organization", {"name": "Mine", "for_organization": acme.pk})
    assert response.status_code == 409
    assert names() == ["Acme", "Globex"]
    page = re.sub(r"<[^>]+>", "", response.content.decode())
    assert "You are in Globex now" in page
    assert "Nothing was done." in page
    assert "Go on in Globex" in page


def test_its_page_leads_back(tab: Client, acme: Organization) -> None:
    page = tab.post("/organization", {"for_organization": acme.pk}).content.decode()
    back = re.search(r'name="slug" value="(\w+)">Back to <bdi>Acme</bdi>', page)
    assert back
    given = {"slug": back[1], "for_organization": acme.pk}  # as an old page's own switch sends it
    assert tab.post("/organization/switch", given).status_code == 302
    tab.post("/organization", {"name": "Mine", "for_organization": acme.pk})
    assert names() == ["Mine", "Globex"]


def test_who_is_no_longer_a_member_is_not_led_back(
    tab: Client, owner: Person, acme: Organization
) -> None:
    with scopes_disabled():
        Membership.objects.filter(user=owner.user, organization=acme).delete()
    response = tab.post("/organization", {"name": "Mine", "for_organization": acme.pk})
    assert response.status_code == 409
    assert "Back to" not in response.content.decode()


def test_who_says_no_organization_means_the_sessions(tab: Client) -> None:
    assert tab.post("/organization", {"name": "Mine"}).status_code == 302
    assert names() == ["Acme", "Mine"]


def test_a_live_part_of_another_organization_loads_its_page_anew(
    tab: Client, acme: Organization, globex: Organization
) -> None:
    response = polled(tab, acme)
    assert (response["HX-Refresh"], response.content) == ("true", b"")
    assert "HX-Refresh" not in polled(tab, globex)


def test_what_htmx_sends_for_another_organization_is_not_done_and_that_is_told(
    tab: Client, acme: Organization
) -> None:
    assert polled(tab, acme, "post")["HX-Refresh"] == "true"
    assert names() == ["Acme", "Globex"]
    said = "You changed to Globex in another tab; nothing was done."
    assert said in tab.get("/organization").content.decode()


def test_a_look_of_an_operator_is_a_change_too(
    operator: User, acme: Organization, globex: Organization
) -> None:
    members.add_member(actor=None, organization=acme, user=operator, role="owner")
    client = Client()
    client.force_login(operator, backend="allauth.account.auth_backends.AuthenticationBackend")
    client.post(f"/operator/organizations/{globex.pk}/look", {"for_organization": acme.pk})
    response = client.post("/organization", {"name": "Mine", "for_organization": acme.pk})
    assert response.status_code == 409
    assert "End the look" in response.content.decode()
    assert polled(client, acme)["HX-Refresh"] == "true"
    assert client.post("/operator/look/end", {"for_organization": globex.pk}).status_code == 302
    assert client.post("/organization", {"for_organization": globex.pk}).status_code == 409


@pytest.mark.usefixtures("own_storage")
@pytest.mark.parametrize("path", ["/files", "/batches/new"])
def test_a_file_for_another_organization_is_not_kept(
    path: str, tab: Client, acme: Organization, globex: Organization
) -> None:
    def sent(organization: Organization, **headers: str) -> Any:
        file = SimpleUploadedFile("in.jsonl", b"{}\n")
        given = {"file": file, "purpose": "batch", "for_organization": organization.pk}
        return tab.post(path, given, headers=headers)

    refused = sent(acme, accept="application/json")
    assert refused.status_code == 409
    assert refused.json() == {
        "error": "You changed to Globex in another tab; nothing was done."
        " Reload the page, and look where you are."
    }
    assert sent(acme).status_code == 409
    with scopes_disabled():
        assert not File.objects.exists()
    assert sent(globex).status_code == 302
