"""The batches page in a real browser: live progress, cancelling, and what works without scripts.

Every test ends with an empty console, so the content security policy holds as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
from openai import OpenAI
from playwright.sync_api import Page, ViewportSize, expect

from tests import stack as stacks
from tests.e2e.conftest import Visit
from tests.stack import Stack

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("stack")]

PASSWORD = "correct horse 9 battery"
SLOW = "pages-slow"
DESKTOP = ViewportSize(width=1280, height=800)
PHONE = ViewportSize(width=360, height=740)
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
NUMBERS = itertools.count(1)
"""Of organizations: other modules' tests make theirs by the same fixture, in the same portal."""
SHOWN = "code.portal-id[title='{}']"


@pytest.fixture(scope="module")
def slow(stack: Stack) -> str:
    """A model that answers ten requests a second."""
    return stack.instant(SLOW, delay_ms=500, concurrency=5)


@pytest.fixture(scope="module")
def organizations(stack: Stack) -> Callable[[], tuple[str, OpenAI]]:
    """Makes organizations without batches; each comes with its owner's email and a client."""

    def make() -> tuple[str, OpenAI]:
        number = next(NUMBERS)
        email = f"owner{number}@pages.test"
        slug = stack.manage("create_org", f"Pages {number}", "--owner", email, stdin=PASSWORD)
        return email, stack.client(stack.manage("create_api_key", "--org", slug, "--name", "e2e"))

    return make


def sign_in(page: Page, email: str) -> None:
    page.get_by_label("Email").fill(email)
    page.get_by_label("Password").fill(PASSWORD)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Home", exact=True)).to_be_visible()
    page.goto(page.evaluate("location.origin") + "/batches")
    expect(page.get_by_role("heading", name="Batches", exact=True)).to_be_visible()


def send(client: OpenAI, count: int, model: str) -> str:
    return str(stacks.send(client, stacks.lines(count, model)).id)


def come_back(page: Page) -> None:
    """What the browser says when its window gets the focus again."""
    page.evaluate("window.dispatchEvent(new Event('focus'))")


def polls(page: Page) -> list[str]:
    """A list that grows with each request of HTMX."""
    seen: list[str] = []
    page.on("request", lambda it: seen.append(it.url) if "hx-request" in it.headers else None)
    return seen


def test_a_first_batch_reaches_its_end_before_ones_eyes(
    stack: Stack, organizations: Any, slow: str, visit: Visit, complaints: list[str], tmp_path: Path
) -> None:
    email, client = organizations()
    page = visit(stack.base_url, viewport=DESKTOP)
    sign_in(page, email)
    expect(page.get_by_role("heading", name="Send your first batch")).to_be_visible()
    expect(page.locator("#first-batch")).to_contain_text(f'base_url="{stack.base_url}/v1"')
    page.evaluate("window.notReloaded = true")

    batch_id = send(client, 100, slow)
    come_back(page)
    expect(page.locator(SHOWN.format(batch_id))).to_be_visible()
    bar = page.get_by_role("progressbar")
    seen: set[float] = set()
    while 100 not in seen:
        seen.add(float(bar.get_attribute("value") or 0))
        page.wait_for_timeout(200)
    expect(page.locator("#batches").get_by_text("Completed", exact=True)).to_be_visible(
        timeout=30_000
    )
    assert len(seen) > 2, f"no progress was shown between start and end: {seen}"
    assert page.evaluate("window.notReloaded")

    with page.expect_download() as download:
        page.get_by_role("link", name="Output").click()
    download.value.save_as(tmp_path / "output.jsonl")
    assert len((tmp_path / "output.jsonl").read_bytes().splitlines()) == 100
    assert complaints == []


def test_polling_stops_when_all_is_done_and_while_the_tab_is_hidden(
    stack: Stack, organizations: Any, slow: str, visit: Visit, complaints: list[str]
) -> None:
    email, client = organizations()
    batch_id = send(client, 2_000, slow)
    page = visit(stack.base_url)
    sign_in(page, email)
    seen = polls(page)
    page.wait_for_timeout(7000)
    assert 1 <= len(seen) <= 3

    page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    seen.clear()
    page.wait_for_timeout(7000)
    assert seen == []

    page.evaluate("delete document.hidden")
    client.batches.cancel(batch_id)
    expect(page.locator("#batches").get_by_text("Cancelled", exact=True)).to_be_visible(
        timeout=60_000
    )
    seen.clear()
    page.wait_for_timeout(4000)
    assert seen == []
    assert complaints == []


def test_cancelling_asks_first_and_the_question_stays_open_while_rows_change(
    stack: Stack, organizations: Any, slow: str, visit: Visit, complaints: list[str]
) -> None:
    email, client = organizations()
    send(client, 500, slow)
    page = visit(stack.base_url)
    sign_in(page, email)
    page.get_by_role("button", name="Cancel batch_").click()
    question = page.get_by_role("dialog", name="Cancel this batch?")
    expect(question).to_be_visible()
    expect(question.get_by_role("button", name="Keep it running")).to_be_focused()
    page.wait_for_timeout(4000)
    expect(question).to_be_visible()
    question.get_by_role("button", name="Cancel the batch").click()
    expect(page.get_by_text("is being cancelled")).to_be_visible()
    expect(page.locator("#batches").get_by_text("Cancelled", exact=True)).to_be_visible(
        timeout=60_000
    )
    assert complaints == []


def test_a_failed_refresh_says_so_and_an_expired_session_leads_to_sign_in(
    stack: Stack, organizations: Any, visit: Visit, complaints: list[str]
) -> None:
    email, _ = organizations()
    page = visit(stack.base_url)
    sign_in(page, email)
    page.route("**/*", lambda route: route.abort())
    come_back(page)
    toast = page.locator("#toasts")
    expect(toast).to_contain_text("The portal cannot be reached")

    page.unroute("**/*")
    come_back(page)
    expect(toast).to_be_empty()
    page.wait_for_timeout(500)  # the rows that came listen only once HTMX has settled them
    page.context.clear_cookies()
    come_back(page)
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    # The failed request is complained of; nothing else is.
    assert [said for said in complaints if "htmx:" not in said and "ERR_FAILED" not in said] == []


def test_menus_and_cancelling_work_without_scripts(
    stack: Stack, organizations: Any, slow: str, visit: Visit
) -> None:
    email, client = organizations()
    send(client, 500, slow)
    page = visit(stack.base_url, viewport=PHONE, java_script_enabled=False)
    sign_in(page, email)
    page.get_by_role("button", name="Menu").click()
    expect(page.get_by_role("link", name="API docs")).to_be_visible()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Cancel batch_").click()
    page.get_by_role("button", name="Cancel the batch").click()
    expect(page.get_by_text("is being cancelled")).to_be_visible()
    page.get_by_role("button", name="Your account").click()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


def test_nothing_sticks_out_at_the_side(
    stack: Stack, organizations: Any, visit: Visit, complaints: list[str], tmp_path: Path
) -> None:
    email, client = organizations()
    page = visit(stack.base_url)
    _photograph(page, tmp_path / "sign-in")
    sign_in(page, email)
    _photograph(page, tmp_path / "empty")
    for count in (1, 3):
        stacks.finished(client, send(client, count, "echo"))
    page.reload()
    _photograph(page, tmp_path / "batches")
    assert complaints == []


def _photograph(page: Page, path: Path) -> None:
    """In every size and scheme; the page must be no wider than the window."""
    for size, scheme in product((DESKTOP, PHONE), SCHEMES):
        page.set_viewport_size(size)
        page.emulate_media(color_scheme=scheme)
        expect(page.locator("html")).to_have_attribute("data-bs-theme", scheme)
        page.screenshot(path=f"{path}-{size['width']}-{scheme}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") == size["width"]


def test_the_theme_can_be_chosen_and_is_kept(
    stack: Stack, visit: Visit, organizations: Any, complaints: list[str]
) -> None:
    email, _ = organizations()
    page = visit(stack.base_url, color_scheme="light")
    sign_in(page, email)
    page.get_by_role("button", name="Switch between light and dark").click()
    page.reload()
    assert page.locator("html").get_attribute("data-bs-theme") == "dark"
    assert complaints == []


def test_the_api_docs_work_under_the_policy(
    stack: Stack, visit: Visit, complaints: list[str]
) -> None:
    page = visit(f"{stack.base_url}/v1/docs")
    expect(page.get_by_text("/v1/batches", exact=True).first).to_be_visible()
    assert complaints == []
