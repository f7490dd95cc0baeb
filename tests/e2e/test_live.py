"""What holds for every live part and every form: home polls only while something is unfinished and
seen, a request that fails says so and keeps what was typed, an expired session leads to sign-in."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Page, expect

from batches.models.batches import Status
from models_registry.models import Model
from tests import jobs
from tests.batches.conftest import Disk, disk  # noqa: F401 a fixture
from tests.batches.test_batch_pages import batch_of
from tests.conftest import Person
from tests.e2e.test_batches_page import polls
from tests.e2e.test_keyboard import at  # noqa: F401 a fixture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("wakeups_sent", "disk"),
]
QUESTION = "Why is the sky blue?"


def hide(page: Page) -> None:
    page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")


def test_home_follows_what_runs_and_stops_when_it_is_done(
    owner: Person,
    at: Any,  # noqa: F811
    echo: Model,
    complaints: list[str],
) -> None:
    batch = batch_of(owner, model=echo, status=Status.IN_PROGRESS, total=10, completed=1)
    page = at(owner.browser, "/")
    expect(page.get_by_text("1 of 10")).to_be_visible()
    jobs.change(batch, completed=7)
    expect(page.get_by_text("7 of 10")).to_be_visible(timeout=15_000)

    hide(page)
    page.wait_for_timeout(1000)  # for what was on its way
    seen = polls(page)
    page.wait_for_timeout(7000)
    assert seen == []

    page.evaluate("delete document.hidden")
    jobs.change(batch, status=Status.COMPLETED, completed=10)
    expect(page.get_by_text("Nothing is running.")).to_be_visible(timeout=15_000)
    page.wait_for_timeout(1000)
    seen.clear()
    page.wait_for_timeout(4000)
    assert seen == []
    assert complaints == []


def test_a_question_that_could_not_be_sent_is_still_there(
    owner: Person,
    at: Any,  # noqa: F811
    echo: Model,
    complaints: list[str],
) -> None:
    page = at(owner.browser, "/models/echo")
    page.get_by_label("Your question").fill(QUESTION)
    page.route("**/models/echo", lambda route: route.abort())
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#toasts")).to_contain_text("what you typed is still here")
    expect(page.get_by_label("Your question")).to_have_value(QUESTION)

    page.unroute("**/models/echo")
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("alert")).to_contain_text("No worker is running that echo fits.")
    expect(page.get_by_label("Your question")).to_have_value(QUESTION)

    page.context.clear_cookies(name="sessionid")
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    assert page.url.endswith("?next=/models/echo")
    # The failed request is complained of; nothing else is.
    assert [said for said in complaints if "htmx:" not in said and "ERR_FAILED" not in said] == []


def test_a_form_that_takes_long_says_so_and_is_sent_once(
    owner: Person,
    at: Any,  # noqa: F811
    complaints: list[str],
) -> None:
    page = at(owner.browser, "/organization/projects")
    sent: list[Any] = []

    def hold(route: Any) -> None:
        if route.request.method == "POST":
            sent.append(route)
        else:
            route.continue_()

    page.route("**/organization/projects*", hold)
    page.get_by_label("Name").fill("Nightly")
    said = page.evaluate(  # Playwright's own clicks wait for where they lead
        """async () => {
            const button = document.querySelector("main form[method=post] button");
            button.click();
            button.click();
            await new Promise((resolve) => setTimeout(resolve, 1000));
            return button.className;
        }"""
    )
    assert "btn-loading" in said
    assert len(sent) == 1

    sent[0].continue_()
    expect(page.get_by_role("cell", name="Nightly proj_")).to_be_visible()
    expect(page.locator(".btn-loading")).to_have_count(0)
    assert complaints == []
