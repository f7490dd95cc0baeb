"""The keyboard's shortcuts in a real browser, and that they stay away while somebody types."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from django.test import Client
from playwright.sync_api import Page, expect

from accounts.models import User
from tests.batches.test_batch_pages import batch_of
from tests.conftest import Person
from tests.e2e.conftest import Visit

pytestmark = [pytest.mark.slow, pytest.mark.django_db(transaction=True)]


@pytest.fixture
def at(visit: Visit, live_server: Any) -> Callable[[Client, str], Page]:
    """A page of the portal, signed in as the client is."""

    def go(client: Client, path: str) -> Page:
        page = visit(live_server.url + "/accounts/login/")
        session = client.cookies["sessionid"].value
        page.context.add_cookies([{"name": "sessionid", "value": session, "url": live_server.url}])
        page.goto(live_server.url + path)
        return page

    return go


def test_g_and_a_letter_go_to_pages(owner: Person, at: Any, complaints: list[str]) -> None:
    page = at(owner.browser, "/organization")
    for keys, title in (("gb", "Batches"), ("gm", "Models"), ("gh", "Home")):
        for key in keys:
            page.keyboard.press(key)
        expect(page.get_by_role("heading", name=title, exact=True)).to_be_visible()
    assert complaints == []


def test_question_mark_lists_them_and_escape_closes_the_list(
    owner: Person, at: Any, complaints: list[str]
) -> None:
    page = at(owner.browser, "/")
    listed = page.get_by_role("dialog", name="Keyboard shortcuts")
    expect(listed).to_be_hidden()
    page.keyboard.press("?")
    expect(listed).to_be_visible()
    expect(listed).to_contain_text("Batches")
    expect(listed.get_by_role("button", name="Close")).to_be_focused()
    page.keyboard.press("Escape")
    expect(listed).to_be_hidden()
    assert complaints == []


def test_the_slash_focuses_search_and_nothing_goes_anywhere_while_typing(
    operator: User, at: Any, complaints: list[str]
) -> None:
    client = Client()
    client.force_login(operator, backend="allauth.account.auth_backends.AuthenticationBackend")
    page = at(client, "/operator/organizations")
    page.keyboard.press("/")
    search = page.locator("input[type=search]")
    expect(search).to_be_focused()
    page.keyboard.type("g?gb/")
    expect(search).to_have_value("g?gb/")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_hidden()
    assert page.url.endswith("/operator/organizations")
    assert complaints == []


def test_the_slash_folds_a_search_out_that_is_folded_away(
    owner: Person, at: Any, complaints: list[str], wakeups_sent: Any, own_storage: Any
) -> None:
    batch_of(owner)
    page = at(owner.browser, "/batches")
    search = page.get_by_label("Search")
    expect(search).to_be_hidden()
    page.keyboard.press("/")
    expect(search).to_be_focused()
    page.keyboard.type("in.jsonl")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"\?q=in\.jsonl&"))
    assert complaints == []


def test_with_a_modifier_they_are_the_browsers(
    owner: Person, at: Any, complaints: list[str]
) -> None:
    page = at(owner.browser, "/organization")
    page.keyboard.press("Control+g")
    page.keyboard.press("b")
    page.keyboard.press("g")
    page.keyboard.press("x")
    page.keyboard.press("b")
    page.keyboard.press("?")  # by then the others have been heard, too
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    assert page.url.endswith("/organization")
    assert complaints == []
