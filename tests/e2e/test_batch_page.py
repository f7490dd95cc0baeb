"""The pages of one batch in a real browser, from its first answer to the retry of what failed.

Every test ends with an empty console, so the content security policy holds as well. Pictures are
kept under var/screenshots/.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import orjson
import pytest
from playwright.sync_api import Page, expect

from tests import stack as stacks
from tests.e2e.conftest import Visit
from tests.e2e.test_batches_page import DESKTOP, PHONE, SCHEMES, organizations, sign_in
from tests.stack import Stack

__all__ = ["organizations"]  # a fixture
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("stack")]

SLOW = "page-slow"
PICTURES = stacks.ROOT / "var" / "screenshots"


@pytest.fixture(scope="module")
def slow(stack: Stack) -> str:
    """A model that answers ten requests a second, but for what kills it."""
    return stack.instant(SLOW, delay_ms=500, concurrency=5, die_on="DIE")


def requests(count: int, model: str) -> bytes:
    """Lines to a model, of which the second one kills its engine."""
    text = stacks.lines(count, model).splitlines(keepends=True)
    text[1] = text[1].replace(b"words 1", b"words DIE")
    return b"".join(text)


def photograph(page: Page, name: str) -> None:
    """In every size and scheme; the page must be no wider than the window."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for size, scheme in product((DESKTOP, PHONE), SCHEMES):
        page.set_viewport_size(size)
        page.emulate_media(color_scheme=scheme)
        expect(page.locator("html")).to_have_attribute("data-bs-theme", scheme)
        path = PICTURES / f"{name}-{size['width']}-{scheme}.png"
        page.screenshot(path=path, full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") == size["width"], name
    page.set_viewport_size(DESKTOP)


def is_drawn(page: Page, id: str) -> bool:
    drawn = """id => {
        const canvas = document.getElementById(id);
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        return pixels.some((value, index) => index % 4 === 3 && value > 0);
    }"""
    return bool(page.evaluate(drawn, id))


def test_a_batch_is_watched_to_its_end_read_retried_and_downloaded(
    stack: Stack,
    organizations: Any,
    slow: str,
    visit: Visit,
    complaints: list[str],
    tmp_path: Path,
) -> None:
    email, client = organizations()
    page = visit(stack.base_url, viewport=DESKTOP)
    sign_in(page, email)
    batch_id = stacks.send(client, requests(200, slow), metadata={"run": "nightly"}).id
    page.goto(f"{stack.base_url}/batches")
    page.get_by_role("link", name="input.jsonl").click()
    expect(page.get_by_role("heading", name="input.jsonl")).to_be_visible()
    page.evaluate("window.notReloaded = true")
    expect(page.locator("#charts")).to_be_visible(timeout=60_000)
    photograph(page, "batch-running")
    expect(page.get_by_text("Completed").first).to_be_visible(timeout=180_000)
    expect(page.get_by_text("engine_crashed")).to_be_visible()
    assert page.evaluate("window.notReloaded")
    assert (is_drawn(page, "chart-requests"), is_drawn(page, "chart-tokens")) == (True, True)
    photograph(page, "batch-finished")

    page.get_by_role("link", name="Results").click()
    page.get_by_label("Search").fill("words 117")
    page.get_by_role("button", name="Show").click()
    page.get_by_role("link", name="Line 118").click()
    expect(page.get_by_label("Answer")).to_contain_text("words 117")
    photograph(page, "batch-result")
    page.go_back()
    page.go_back()
    photograph(page, "batch-results")
    for tab in ("Chunks", "Log"):
        page.get_by_role("link", name=tab, exact=True).click()
        photograph(page, f"batch-{tab.lower()}")

    page.get_by_role("link", name="Overview").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Errors").click()
    download.value.save_as(tmp_path / "errors.jsonl")
    [error] = map(orjson.loads, (tmp_path / "errors.jsonl").read_bytes().splitlines())
    assert error["custom_id"] == "request-1"

    page.get_by_role("button", name="Retry the 1 failed").click()
    expect(page.get_by_text(f"retries what failed of {batch_id}")).to_be_visible()
    expect(page.get_by_role("heading", name="input-retry.jsonl")).to_be_visible()
    expect(page.locator("#batch .portal-status")).to_have_text("Completed", timeout=60_000)
    assert complaints == []


def test_what_is_chosen_stays_chosen_while_the_list_renews_itself(
    stack: Stack,
    organizations: Any,
    slow: str,
    visit: Visit,
    complaints: list[str],
) -> None:
    email, client = organizations()
    ids = [stacks.send(client, stacks.lines(500, slow)).id for _ in range(3)]
    page = visit(stack.base_url, viewport=DESKTOP)
    sign_in(page, email)
    button = page.get_by_role("button", name="Cancel the chosen ones")
    expect(button).to_be_hidden()
    for id in ids[:2]:
        page.get_by_label(f"Choose {id}").check()
    with page.expect_response(lambda answer: "hx-request" in answer.request.headers):
        pass
    expect(page.get_by_label(f"Choose {ids[0]}")).to_be_checked()
    expect(page.get_by_label(f"Choose {ids[2]}")).not_to_be_checked()
    page.get_by_text("Filter", exact=True).click()
    photograph(page, "batches-chosen")
    button.click()
    expect(page.get_by_role("heading", name="Cancel 2 batches?")).to_be_visible()
    photograph(page, "batches-cancel")
    page.get_by_role("button", name="Cancel 2 batches").click()
    expect(page.get_by_text("2 batches are being cancelled")).to_be_visible()
    client.batches.cancel(ids[2])
    assert complaints == []


def test_everything_works_without_scripts(
    stack: Stack,
    organizations: Any,
    visit: Visit,
) -> None:
    email, client = organizations()
    bad = stacks.send(client, stacks.lines(2).replace(b"/v1/chat", b"/v1/chat/x"))
    stacks.finished(client, bad.id)
    done = stacks.finished(client, stacks.send(client, stacks.lines(30, "echo")).id)
    page = visit(stack.base_url, viewport=PHONE, java_script_enabled=False)
    sign_in_plain(page, email)
    page.goto(f"{stack.base_url}/batches/{bad.id}")
    expect(page.get_by_role("heading", name="What is wrong with the input")).to_be_visible()
    page.goto(f"{stack.base_url}/batches/{done.id}/results")
    page.get_by_role("link", name="Next").click()
    page.get_by_label("Go to line").fill("7")
    page.get_by_role("button", name="Show").click()
    page.get_by_role("link", name="Line 7", exact=True).click()
    expect(page.get_by_label("Request", exact=True)).to_contain_text("words 6")
    page.goto(f"{stack.base_url}/batches/{done.id}/clone")
    page.get_by_label("Window").fill("2h")
    page.get_by_role("button", name="Send the batch").click()
    expect(page.get_by_text("runs the same input file again")).to_be_visible()


def sign_in_plain(page: Page, email: str) -> None:
    page.get_by_label("Email").fill(email)
    page.get_by_label("Password").fill("correct horse 9 battery")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Home", exact=True)).to_be_visible()
