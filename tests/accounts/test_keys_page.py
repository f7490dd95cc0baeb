"""The pages of API keys: who sees and changes which, and where the secret is shown."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
import time_machine
from django.contrib.messages import get_messages
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from accounts.models import ApiKey
from accounts.services import keys
from accounts.views import keys as views
from tests.conftest import Person

pytestmark = pytest.mark.django_db
HERE, NEW = "/organization/keys", "/organization/keys/new"
TEXT = re.compile(r"sk-vbp-\w{16}-\w{46}")


def form(person: Person, **changed: Any) -> dict[str, Any]:
    fields = {"name": "CI", "project": person.caller.project.pk, "scopes": ["files"]}
    return fields | {"lifetime": "", "allowed_ips": ""} | changed


def made(person: Person, **changed: Any) -> tuple[ApiKey, str]:
    response = person.browser.post(NEW, form(person, **changed), follow=True)
    assert response.status_code == 200, response.content
    (text,) = TEXT.findall(response.content.decode())
    with person.caller.scope():
        return ApiKey.objects.order_by("-pk")[0], text


def key_of(person: Person) -> ApiKey:
    with person.caller.scope():
        return ApiKey.objects.filter(created_by=person.user).order_by("pk")[0]


def keys_of(person: Person) -> int:
    with person.caller.scope():
        return ApiKey.objects.count()


def works(text: str) -> bool:
    client = Client(headers={"authorization": f"Bearer {text}"})
    return client.get("/v1/files").status_code == 200


def shown(response: Any) -> list[str]:
    """The names of the keys on the page, in their order."""
    return re.findall(r'<div class="fw-semibold">(.*?)</div>', response.content.decode())


# --- The secret -----------------------------------------------------------------------------


def test_the_secret_is_shown_once_in_no_cookie_and_kept_by_no_cache(owner: Person) -> None:
    browser = owner.browser
    sent = browser.post(NEW, form(owner))
    kept = str(dict(browser.session.items()))
    assert browser.head(sent["Location"]).status_code == 302  # which takes nothing
    response = browser.get(sent["Location"])
    (text,) = TEXT.findall(response.content.decode())
    assert works(text)
    assert "no-store" in response["Cache-Control"]
    for each in (sent, response):
        assert not [header for header in each.headers.values() if text in header]
        assert text not in str(each.cookies) + str(list(get_messages(each.wsgi_request)))
    assert text not in kept
    for path in (HERE, f"{HERE}?ended=1", NEW, sent["Location"]):
        assert not TEXT.search(browser.get(path).content.decode())


def test_loading_the_page_with_the_secret_again_makes_no_second_key(owner: Person) -> None:
    browser = owner.browser
    there = browser.post(NEW, form(owner))["Location"]
    before = keys_of(owner)
    browser.get(there)
    again = browser.get(there, follow=True)
    assert keys_of(owner) == before
    assert again.redirect_chain == [(HERE, 302)]


def test_the_secret_is_for_the_session_that_made_it_and_for_ten_minutes(
    owner: Person, admin: Person
) -> None:
    browser = owner.browser
    there = browser.post(NEW, form(owner))["Location"]
    for other in (owner.browser, admin.browser):
        assert not TEXT.search(other.get(there, follow=True).content.decode())
    with time_machine.travel(timezone.now() + timedelta(minutes=11)):
        assert not TEXT.search(browser.get(there, follow=True).content.decode())


def test_a_rotated_keys_secret_is_shown_the_same_way(owner: Person) -> None:
    key, old = made(owner)
    response = owner.browser.post(f"{HERE}/{key.pk}/rotate", {"overlap": "0"}, follow=True)
    (new,) = TEXT.findall(response.content.decode())
    assert "no-store" in response["Cache-Control"]
    assert (works(old), works(new)) == (False, True)
    assert "The old key has stopped working." in response.content.decode()


# --- Making ---------------------------------------------------------------------------------


def test_a_key_is_made_as_the_form_says(owner: Person) -> None:
    key, _ = made(
        owner,
        scopes=["files.read", "admin.read"],
        lifetime="30",
        allowed_ips="10.1.2.3/8\n::1, 127.0.0.1",
    )
    assert (key.name, key.created_by, key.scopes) == (
        "CI",
        owner.user,
        ["files.read", "admin.read"],
    )
    assert key.allowed_ips == ["10.0.0.0/8", "::1/128", "127.0.0.1/32"]
    assert key.expires_at is not None
    assert key.expires_at - timezone.now() > timedelta(days=29, hours=23)
    service, _ = made(owner, service="on")
    assert service.created_by is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": ""}, "This field is required."),
        ({"scopes": []}, "This field is required."),
        ({"scopes": ["root"]}, "Select a valid choice. root is not one of the available choices."),
        ({"project": "proj_0"}, "Select a valid choice. proj_0 is not one of the available"),
        ({"allowed_ips": "10.0.0.0/33"}, "No IP address or network: &#x27;10.0.0.0/33&#x27;"),
        ({"lifetime": "1000"}, "Select a valid choice."),
    ],
)
def test_a_form_that_is_wrong_says_so_and_keeps_what_was_typed(
    owner: Person, changed: dict[str, Any], said: str
) -> None:
    response = owner.browser.post(NEW, form(owner, **{"name": "Typed", **changed}))
    assert response.status_code == 400
    page = response.content.decode()
    assert said in page
    assert ('value="Typed"' in page) is ("name" not in changed)


def offered(person: Person) -> set[str]:
    page = person.browser.get(NEW).content.decode()
    return set(re.findall(r'name="scopes" value="([\w.]+)"', page))


def test_nobody_is_offered_a_scope_above_their_role(owner: Person, teammate: Person) -> None:
    assert offered(owner) - offered(teammate) == {"admin.read", "admin.write"}
    refused = teammate.browser.post(NEW, form(teammate, scopes=["admin.read"]))
    assert refused.status_code == 400
    assert "service" not in teammate.browser.get(NEW).context["form"].fields
    own, _ = made(teammate, service="on")  # what was not offered is not heard
    assert own.created_by == teammate.user


def test_the_scope_of_operators_is_offered_to_them(owner: Person) -> None:
    assert "operator" not in offered(owner)
    owner.user.is_staff = True
    owner.user.save()
    assert "operator" in offered(owner)


def test_a_strangers_project_cannot_be_chosen(owner: Person, stranger: Person) -> None:
    refused = owner.browser.post(NEW, form(stranger))
    assert refused.status_code == 400


# --- The list -------------------------------------------------------------------------------


def test_members_see_all_keys_of_the_organization_and_change_their_own(
    owner: Person, teammate: Person, viewer: Person, stranger: Person
) -> None:
    names = ["viewer@acme.test", "teammate@acme.test", "owner@acme.test"]
    links = []
    for person in (owner, teammate, viewer):
        response = person.browser.get(HERE)
        assert shown(response) == names
        links.append(len(re.findall(r'href="/organization/keys/key_', response.content.decode())))
    assert links == [3, 1, 0]
    assert shown(stranger.browser.get(HERE)) == ["stranger@globex.test"]


def test_revoked_keys_are_shown_when_asked_for(owner: Person) -> None:
    key, _ = made(owner)
    owner.browser.post(f"{HERE}/{key.pk}/revoke", {"typed": "CI"})
    assert shown(owner.browser.get(HERE)) == ["owner@acme.test"]
    assert shown(owner.browser.get(f"{HERE}?ended=1")) == ["CI", "owner@acme.test"]


def test_an_organization_without_keys_is_told_what_to_do(owner: Person, viewer: Person) -> None:
    with owner.caller.scope():
        ApiKey.objects.all().delete()
    assert "New key" in owner.browser.get(HERE).content.decode()
    assert "Your role may only look." in viewer.browser.get(HERE).content.decode()


def test_the_list_pages_by_key(owner: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "PAGE_SIZE", 2)
    for name in ("b", "c"):
        keys.create_api_key(project=owner.caller.project, name=name)
    first = owner.browser.get(HERE)
    assert shown(first) == ["c", "b"]
    assert shown(owner.browser.get(f"{HERE}?after={first.context['last']}")) == ["owner@acme.test"]
    assert owner.browser.get(f"{HERE}?after=%00").status_code == 200


def test_keys_are_found_by_name_owner_and_prefix(
    owner: Person, teammate: Person, stranger: Person
) -> None:
    key, _ = made(owner, name="Nightly")
    for q, found in (
        ("NIGHTLY", ["Nightly"]),
        ("TEAMMATE", ["teammate@acme.test"]),
        (key.prefix, ["Nightly"]),
        (f"sk-vbp-{key.prefix}-•••", ["Nightly"]),
        ("globex", []),
    ):
        assert shown(owner.browser.get(HERE, {"q": q})) == found, q
    page = owner.browser.get(HERE, {"q": "globex"}).content.decode()
    assert "No key is like this" in page
    assert owner.browser.get(f"{HERE}?q=%00").status_code == 200


def test_what_is_looked_for_stays_from_page_to_page(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "PAGE_SIZE", 1)
    for name in ("a & b", "other", "a & c"):
        keys.create_api_key(project=owner.caller.project, name=name)
    first = owner.browser.get(HERE, {"q": "a &", "ended": "1"})
    assert shown(first) == ["a &amp; c"]
    page = first.content.decode()
    assert '<input type="hidden" name="ended" value="1">' in page
    older = re.search(r'href="(\?q=a\+%26&amp;ended=1&amp;after=\w+)" rel="next"', page)
    assert older
    assert shown(owner.browser.get(HERE + older[1].replace("&amp;", "&"))) == ["a &amp; b"]
    assert '<a href="?q=a+%26">Without revoked ones</a>' in page


def test_the_lists_queries_do_not_grow_with_its_rows(owner: Person) -> None:
    browser = owner.browser
    browser.get(HERE)

    def count() -> int:
        with CaptureQueriesContext(connection) as queries:
            browser.get(HERE)
        return len(queries)

    one = count()
    keys.create_api_key(project=owner.caller.project, name="service")
    keys.create_api_key(project=owner.caller.project, name="own", created_by=owner.user)
    assert count() == one


# --- Changing and revoking ------------------------------------------------------------------


def test_a_key_is_changed_and_an_unchanged_day_keeps_its_moment(owner: Person) -> None:
    key, _ = made(owner, lifetime="30")
    there = f"{HERE}/{key.pk}"
    assert key.expires_at is not None
    same = {"name": "New", "allowed_ips": "127.0.0.1", "expires_on": f"{key.expires_at:%Y-%m-%d}"}
    assert owner.browser.post(there, same)["Location"] == HERE
    with owner.caller.scope():
        now = ApiKey.objects.get(pk=key.pk)
    assert (now.name, now.allowed_ips, now.expires_at) == ("New", ["127.0.0.1/32"], key.expires_at)
    owner.browser.post(there, same | {"expires_on": ""})
    with owner.caller.scope():
        assert ApiKey.objects.get(pk=key.pk).expires_at is None


def test_a_day_that_is_past_is_told_beside_its_field(owner: Person) -> None:
    there = f"{HERE}/{key_of(owner).pk}"
    refused = owner.browser.post(there, {"name": "x", "expires_on": "2020-01-01"})
    assert refused.status_code == 400
    assert refused.context["form"].errors == {"expires_on": ["The expiry must be in the future."]}


def test_a_key_that_was_replaced_is_not_changed(owner: Person) -> None:
    key, _ = made(owner)
    owner.browser.post(f"{HERE}/{key.pk}/rotate", {"overlap": "24"})
    refused = owner.browser.post(f"{HERE}/{key.pk}", {"name": "x"})
    assert refused.status_code == 400
    assert "This key is replaced: it cannot be changed any more." in refused.content.decode()


def test_a_revoked_key_stops_at_once(owner: Person) -> None:
    key, text = made(owner)
    assert works(text)
    path = f"{HERE}/{key.pk}/revoke"
    assert owner.browser.post(path, {"typed": "CI"})["Location"] == HERE
    assert not works(text)


@pytest.mark.parametrize("typed", ["", "ci", "owner@acme.test"])
def test_a_key_is_revoked_by_its_name_alone(typed: str, owner: Person) -> None:
    key, text = made(owner)
    for page in (HERE, f"{HERE}/{key.pk}"):
        assert "Revoke the key <bdi>CI</bdi>?" in owner.browser.get(page).content.decode()
    page = owner.browser.post(f"{HERE}/{key.pk}/revoke", {"typed": typed}, follow=True)
    assert "Nothing is revoked: the name that you typed is another." in page.content.decode()
    assert works(text)


@pytest.mark.parametrize(("what", "status"), [("", 302), ("/revoke", 302), ("/rotate", 403)])
def test_others_keys_are_changed_by_admins_alone(
    owner: Person, teammate: Person, viewer: Person, what: str, status: int
) -> None:
    there = f"{HERE}/{key_of(owner).pk}{what}"
    data = {"name": "x", "overlap": "0"}
    for person in (teammate, viewer):
        assert person.browser.post(there, data).status_code == 403
    assert works(owner.key)
    theirs = f"{HERE}/{key_of(teammate).pk}{what}"
    assert owner.browser.post(theirs, data).status_code == status


def test_the_page_of_anothers_key_offers_no_new_secret(owner: Person, teammate: Person) -> None:
    theirs = owner.browser.get(f"{HERE}/{key_of(teammate).pk}").content
    assert (b"/rotate" in theirs, b"is theirs alone to make" in theirs) == (False, True)
    own = owner.browser.get(f"{HERE}/{key_of(owner).pk}").content
    assert b"/rotate" in own


def test_who_has_no_business_here_is_refused(viewer: Person, reviewer: Person) -> None:
    assert viewer.browser.get(NEW).status_code == 403
    assert viewer.browser.post(NEW, form(viewer)).status_code == 403
    assert reviewer.browser.get(HERE).status_code == 403
    for path in (HERE, NEW):
        assert Client().get(path)["Location"] == f"/accounts/login/?next={path}"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("post", HERE, 405), ("put", NEW, 405), ("get", f"{HERE}/x/rotate", 405)],
)
def test_other_methods_are_not_answered(owner: Person, method: str, path: str, status: int) -> None:
    assert getattr(owner.browser, method)(path).status_code == status
