"""What holds for every live part and every form: home polls only while something is unfinished and
seen, a request that fails says so and keeps what was typed, an expired session leads to sign-in; and
a poll takes nothing from under anybody's hands."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client
from django.utils import timezone
from playwright.sync_api import Page, expect

from accounts.models import User
from batches.models.batches import Status
from models_registry.models import Change, Model
from models_registry.services import note_load
from tests import jobs
from tests.batches.conftest import Disk, disk  # noqa: F401 a fixture
from tests.batches.test_batch_pages import batch_of
from tests.conftest import Person
from tests.e2e.test_batches_page import polls
from tests.e2e.test_keyboard import at  # noqa: F401 a fixture
from worker.models import Worker, WorkerState

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
    page.get_by_role("textbox", name="Name").fill("Nightly")
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


def test_a_form_whose_sending_was_stopped_can_be_sent_again(
    owner: Person,
    at: Any,  # noqa: F811
    complaints: list[str],
) -> None:
    page = at(owner.browser, "/organization/projects")
    sent: list[Any] = []
    page.route(
        "**/organization/projects*",
        lambda route: sent.append(route) if route.request.method == "POST" else route.continue_(),
    )
    page.get_by_role("textbox", name="Name").fill("Nightly")
    press = "document.querySelector('main form[method=post] button').click()"
    page.evaluate(f"{press}; window.stop()")  # as Esc does
    page.wait_for_timeout(1000)
    page.evaluate(f"{press}; window.stop()")
    said = "document.querySelector('main form[method=post] button').className"
    assert "btn-loading" in page.evaluate(said)
    page.wait_for_timeout(10_000)
    assert "btn-loading" not in page.evaluate(said)
    already = len(sent)
    page.unroute("**/organization/projects*")
    page.evaluate(press)
    expect(page.get_by_role("cell", name="Nightly proj_")).to_be_visible()
    assert already <= 1
    assert complaints == []


# --- What a poll leaves alone ---------------------------------------------------------------


def polled(page: Page) -> None:
    """Wait until an answer that is asked for from now on has been put in."""
    with page.expect_response(lambda it: "hx-request" in it.request.headers, timeout=15_000):
        pass
    page.wait_for_timeout(300)


def test_focus_and_ticks_outlive_polls_that_change_the_rows(
    owner: Person,
    at: Any,  # noqa: F811
    echo: Model,
    complaints: list[str],
) -> None:
    batch = batch_of(owner, model=echo, status=Status.IN_PROGRESS, total=10, completed=1)
    page = at(owner.browser, "/batches")
    page.get_by_label(f"Choose {batch.pk}").check()
    page.get_by_role("link", name="in.jsonl").focus()
    batch_of(owner, name="newer.jsonl", model=echo, status=Status.IN_PROGRESS, total=3)
    jobs.change(batch, completed=7)
    expect(page.get_by_text("7 of 10")).to_be_visible(timeout=15_000)
    expect(page.get_by_role("link", name="newer.jsonl")).to_be_visible()
    expect(page.get_by_role("link", name="in.jsonl")).to_be_focused()
    expect(page.get_by_label(f"Choose {batch.pk}")).to_be_checked()
    assert page.locator("[name=batch]:checked").count() == 1
    assert complaints == []


def test_what_is_folded_out_stays_open(
    operator: User,
    at: Any,  # noqa: F811
    echo: Model,
    complaints: list[str],
) -> None:
    now = timezone.now()
    state = {"state": WorkerState.IDLE, "started_at": now, "heartbeat_at": now}
    Worker.objects.create(name="gpu0", host="here", pid=7, **state)
    note_load("echo", Change.LOAD, worker="gpu0", gpu="H200", seconds=1.0)
    client = Client()
    client.force_login(operator, backend="allauth.account.auth_backends.AuthenticationBackend")
    page = at(client, "/operator/workers")
    page.get_by_text("Last models that came or went").click()
    Worker.objects.update(tokens_per_second=321)
    expect(page.get_by_text("321 tokens/s")).to_be_visible(timeout=15_000)
    expect(page.get_by_text("load of echo")).to_be_visible()
    expect(page.locator("summary")).to_be_focused()
    assert complaints == []


def test_an_answer_that_was_on_its_way_leaves_a_dialog_open(
    owner: Person,
    at: Any,  # noqa: F811
    echo: Model,
    complaints: list[str],
) -> None:
    batch = batch_of(owner, model=echo, status=Status.IN_PROGRESS, total=10, completed=1)
    page = at(owner.browser, "/batches")
    held: list[Any] = []
    page.route("**/batches", lambda route: held.append(route))
    page.wait_for_timeout(4000)
    assert len(held) == 1
    jobs.change(batch, completed=7)
    page.get_by_role("button", name="Cancel batch_").click()
    question = page.get_by_role("dialog", name="Cancel this batch?")
    expect(question).to_be_visible()
    held[0].continue_()
    page.unroute("**/batches")
    page.wait_for_timeout(1500)
    expect(question).to_be_visible()
    expect(question.get_by_role("button", name="Keep it running")).to_be_focused()
    expect(page.get_by_text("1 of 10")).to_be_visible()

    page.keyboard.press("Escape")
    expect(page.get_by_text("7 of 10")).to_be_visible(timeout=15_000)
    assert complaints == []


def test_nothing_is_swapped_under_a_pressed_pointer_or_a_selection(
    owner: Person,
    at: Any,  # noqa: F811
    echo: Model,
    complaints: list[str],
) -> None:
    batch = batch_of(owner, model=echo, status=Status.IN_PROGRESS, total=10, completed=1)
    page = at(owner.browser, "/batches")
    page.get_by_text("1 of 10").evaluate("it => getSelection().selectAllChildren(it)")
    assert page.evaluate("getSelection().toString().trim()") != ""
    jobs.change(batch, completed=2)
    page.wait_for_timeout(4500)
    assert page.evaluate("getSelection().toString().trim()") != ""
    expect(page.get_by_text("1 of 10")).to_be_visible()
    page.evaluate("getSelection().removeAllRanges()")
    expect(page.get_by_text("2 of 10")).to_be_visible(timeout=15_000)

    page.get_by_role("link", name="in.jsonl").hover()
    page.mouse.down()
    jobs.change(batch, completed=3)
    page.wait_for_timeout(4500)
    expect(page.get_by_text("2 of 10")).to_be_visible()
    page.mouse.up()
    expect(page.get_by_role("heading", name="in.jsonl")).to_be_visible()
    assert complaints == []


def test_a_poll_that_brings_nothing_new_changes_nothing(
    owner: Person,
    at: Any,  # noqa: F811
    echo: Model,
    complaints: list[str],
) -> None:
    batch_of(owner, model=echo, status=Status.IN_PROGRESS, total=10, completed=1)
    page = at(owner.browser, "/batches")
    polled(page)
    page.evaluate(
        """() => {
            window.changed = [];
            const said = (each) => `${each.type} ${each.attributeName} ${each.target.nodeName}`;
            new MutationObserver((all) => window.changed.push(...all.map(said))).observe(
                document.getElementById("batches"),
                { subtree: true, childList: true, characterData: true },
            );
        }"""
    )
    polled(page)
    assert page.evaluate("window.changed") == []
    assert complaints == []
