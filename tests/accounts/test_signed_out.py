"""What happens to a form that is sent after the session has ended: nothing, and that is told."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from django.contrib.messages import get_messages
from django.core.cache import cache
from django.test import Client

from accounts import pages
from accounts.models import Organization
from tests.conftest import PASSWORD, Person

pytestmark = pytest.mark.django_db

SAID = "You had been signed out: nothing was done. Please do it once more."
FORM = "/organization/leave"


@pytest.fixture(autouse=True)
def _fresh_counts() -> None:
    cache.clear()


def sent(client: Client, referer: str = "", **headers: str) -> str:
    """Where the sign-in of a form that was sent without a session leads to."""
    if referer:
        headers["referer"] = referer
    response = client.post(FORM, headers=headers)
    there = response.headers.get("HX-Redirect") or response["Location"]
    (found,) = parse_qs(urlsplit(there).query)["next"]
    return found


def sign_in(client: Client, there: str) -> Any:
    given = {"login": "owner@acme.test", "password": PASSWORD, "next": there}
    return client.post("/accounts/login/", given)


def test_one_comes_back_to_the_page_and_reads_that_nothing_was_done(
    owner: Person, acme: Organization
) -> None:
    client = Client()
    there = sent(client, "http://testserver/organization?tab=1")
    assert there == "/organization?tab=1"
    assert SAID not in client.get(f"/accounts/login/?next={there}").content.decode()
    assert sign_in(client, there)["Location"] == there
    assert SAID in client.get(there).content.decode()
    assert SAID not in client.get(there).content.decode(), "once"


def test_of_a_part_that_htmx_sent_one_comes_back_to_its_page(owner: Person) -> None:
    client = Client()
    headers = {"hx-request": "true", "hx-current-url": "http://testserver/organization"}
    assert sent(client, **headers) == "/organization"
    sign_in(client, "/organization")
    assert SAID in client.get("/organization").content.decode()


def test_who_only_looked_reads_nothing_of_it(owner: Person) -> None:
    client = Client()
    client.get("/organization")
    assert list(get_messages(sign_in(client, "/organization").wsgi_request)) == []


def test_another_browser_reads_nothing_of_it(owner: Person) -> None:
    sent(Client())
    client = Client()
    sign_in(client, "/organization")
    assert SAID not in client.get("/organization").content.decode()


def test_who_comes_much_later_reads_nothing_of_it(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "UNDONE_SECONDS", -1)
    client = Client()
    sent(client)
    sign_in(client, "/organization")
    assert SAID not in client.get("/organization").content.decode()


@pytest.mark.parametrize(
    "referer",
    [
        "",
        "https://evil.test/organization",
        "http://testserver.evil.test/x",
        "http://testserver@evil.test/x",
        "http://testserver//evil.test",
        "http://testserver",
        "javascript:alert(1)",
        "//evil.test/x",
    ],
)
def test_no_other_site_is_led_to(referer: str) -> None:
    assert sent(Client(), referer) == "/"
