"""A batch made in a real browser: dropped, checked, started, finished; and without scripts.

Every test ends with an empty console, so the content security policy holds as well.
"""

from __future__ import annotations

import base64
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Page, ViewportSize, expect

from tests import stack as stacks
from tests.e2e.conftest import Visit
from tests.e2e.test_batches_page import DESKTOP, PASSWORD, PHONE, SCHEMES, sign_in
from tests.stack import Stack

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("stack")]

EMAIL = "owner@dropped.test"
LOOKS = list(product((DESKTOP, PHONE), SCHEMES))
DROP = """([name, text]) => {
    const data = new DataTransfer();
    data.items.add(new File([Uint8Array.from(atob(text), (char) => char.charCodeAt(0))], name));
    const main = document.querySelector("main");
    for (const type of ["dragenter", "dragover", "drop"])
        main.dispatchEvent(new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true }));
}"""


@pytest.fixture(scope="module")
def email(stack: Stack) -> str:
    """The owner of an organization of this module's own."""
    stack.manage("create_org", "Dropped", "--owner", EMAIL, stdin=PASSWORD)
    return EMAIL


def entered(visit: Visit, stack: Stack, email: str, path: str, **options: Any) -> Page:
    """The page at this path, as somebody who has signed in."""
    page = visit(stack.base_url, **options)
    sign_in(page, email)
    page.goto(stack.base_url + path)
    return page


def drop(page: Page, name: str, content: bytes) -> None:
    page.evaluate(DROP, [name, base64.b64encode(content).decode()])


def slow_down(page: Page, bytes_a_second: int) -> None:
    session = page.context.new_cdp_session(page)
    session.send(
        "Network.emulateNetworkConditions",
        {
            "offline": False,
            "latency": 0,
            "downloadThroughput": -1,
            "uploadThroughput": bytes_a_second,
        },
    )


def photograph(page: Page, path: Path) -> None:
    """The page, which must be no wider than its window."""
    page.screenshot(path=f"{path}.png", full_page=True)
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) == 0


@pytest.mark.parametrize(("size", "scheme"), LOOKS)
def test_what_is_dropped_is_checked_and_runs(
    size: ViewportSize,
    scheme: Literal["light", "dark"],
    stack: Stack,
    email: str,
    visit: Visit,
    complaints: list[str],
    tmp_path: Path,
) -> None:
    looks = {"viewport": size, "color_scheme": scheme}
    page = entered(visit, stack, email, "/batches", **looks)
    page.get_by_role("link", name="New batch").first.click()
    page.wait_for_url(f"{stack.base_url}/batches/new")
    photograph(page, tmp_path / "new")

    drop(page, "bad.jsonl", stacks.lines(2) + b'{"custom_id": 1}\n' + stacks.lines(1))
    expect(page.get_by_text("cannot be run yet: 2 problems in 4 requests")).to_be_visible()
    expect(page.get_by_role("cell", name="custom_id must be a string")).to_be_visible()
    photograph(page, tmp_path / "bad")

    page.get_by_role("link", name="Send the mended file").click()
    page.wait_for_url(f"{stack.base_url}/batches/new")  # with its script
    drop(page, "good.jsonl", stacks.lines(20))
    expect(page.get_by_text("Every line is good")).to_be_visible()
    page.get_by_label("Priority").select_option("high")
    page.get_by_label("Key 1", exact=True).fill("made")
    page.get_by_label("Value 1", exact=True).fill(f"{size['width']}-{scheme}")
    photograph(page, tmp_path / "good")
    page.get_by_role("button", name="Start the batch").click()
    expect(page.get_by_text("it begins as soon as its turn comes")).to_be_visible()
    expect(
        page.get_by_role("definition").filter(has_text=f"{size['width']}-{scheme}")
    ).to_be_visible()
    state = page.locator("#batch .portal-head .status")
    expect(state).to_have_text("Completed", timeout=60_000)

    page.goto(f"{stack.base_url}/files")
    photograph(page, tmp_path / "files")
    page.get_by_role("link", name="good.jsonl").first.click()
    expect(page.get_by_text("words 0")).to_be_visible()
    photograph(page, tmp_path / "file")
    page.goto(f"{stack.base_url}/organization/retention")
    photograph(page, tmp_path / "retention")
    assert complaints == []


def test_an_upload_shows_its_progress_and_can_be_stopped(
    stack: Stack, email: str, visit: Visit, complaints: list[str], tmp_path: Path
) -> None:
    page = entered(visit, stack, email, "/batches/new", viewport=PHONE)
    slow_down(page, 300_000)
    content = stacks.lines(4_000)
    drop(page, "large.jsonl", content)
    bar = page.get_by_role("progressbar", name="Progress of the upload")
    expect(bar).to_be_visible()
    # Not `wait_for_function`, whose string the page's own policy refuses to run.
    stacks.wait_for(lambda: page.evaluate("document.querySelector('[data-upload-bar]').value") > 0)
    expect(page.locator("[data-upload-said]")).to_contain_text(" MB of ")
    photograph(page, tmp_path / "progress")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("Stopped; nothing was stored.")).to_be_visible()
    expect(bar).to_be_hidden()

    slow_down(page, -1)
    drop(page, "large.jsonl", content)
    expect(page.get_by_text("Every line is good")).to_be_visible(timeout=60_000)
    expect(page.get_by_text("4,000", exact=True)).to_be_visible()
    assert complaints == []


def test_what_is_refused_is_said_beside_the_file(
    stack: Stack, email: str, visit: Visit, complaints: list[str]
) -> None:
    page = entered(visit, stack, email, "/files")
    page.evaluate("document.querySelector('main details').open = false")
    wrong = page.locator("[data-upload-wrong]")
    drop(page, "notes.txt", b"hello")
    expect(wrong).to_be_visible()  # what is dropped opens what was folded away
    expect(wrong).to_have_text("A batch's input must be a .jsonl file (one JSON object a line).")
    page.evaluate("document.querySelector('[data-upload]').dataset.limit = '10'")
    drop(page, "large.jsonl", b"x" * 11)
    expect(wrong).to_contain_text("are taken here")
    # The refused request is complained of by the browser itself; nothing else is.
    assert [said for said in complaints if "400 (Bad Request)" not in said] == []


def test_a_large_file_is_checked_behind_the_page_which_goes_on_by_itself(
    stack: Stack, email: str, visit: Visit, complaints: list[str]
) -> None:
    page = entered(visit, stack, email, "/batches/new")
    content = stacks.lines(30_000, padding="x" * 200)
    assert len(content) > 8 * 2**20
    drop(page, "larger.jsonl", content)
    expect(page.get_by_text("Every line is good")).to_be_visible(timeout=120_000)
    expect(page.get_by_text("30,000", exact=True)).to_be_visible()
    assert complaints == []


def test_a_table_becomes_a_batch_without_scripts(
    stack: Stack, email: str, visit: Visit, tmp_path: Path
) -> None:
    page = entered(visit, stack, email, "/batches/new", viewport=PHONE, java_script_enabled=False)
    table = {
        "name": "asked.csv",
        "mimeType": "text/csv",
        "buffer": b"question,topic\nWhy is it blue?,sky\nWhy is it salty?,sea\n",
    }
    page.get_by_label("Requests as JSON lines, or a table").set_input_files(table)  # type: ignore[arg-type]
    page.get_by_role("button", name="Upload").click()
    page.get_by_label("Prompt", exact=True).fill("About the {{topic}}: {{question}}")
    page.get_by_label("Model").select_option("echo")
    page.get_by_label("Id of each request").select_option("topic")
    page.get_by_role("button", name="Show the first requests").click()
    expect(page.get_by_text("About the sky: Why is it blue?")).to_be_visible()
    page.screenshot(path=tmp_path / "table.png", full_page=True)
    page.get_by_role("button", name="Make the input, and check it").click()
    expect(page.get_by_text("Every line is good")).to_be_visible()
    page.get_by_role("button", name="Start the batch").click()
    expect(page.get_by_text("it begins as soon as its turn comes")).to_be_visible()
    state = page.locator("#batch .portal-head .status")

    def completed() -> bool:
        page.reload()
        return state.inner_text().strip() == "Completed"

    stacks.wait_for(completed, pause=0.5)
