"""Operators' pages in a real browser: a batch is held, released, put forward and approved, a worker
drained; at both widths, light and dark, with screenshots under var/screenshots.
"""

from __future__ import annotations

from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
from django.test import Client
from django.utils import timezone
from playwright.sync_api import Page, ViewportSize, expect

from accounts.models import User
from batches.models import Batch
from batches.services.moderation import set_moderation
from tests import jobs
from tests.conftest import Person
from tests.e2e.conftest import Visit
from worker.models import Worker, WorkerState

pytestmark = [
    pytest.mark.slow,
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("own_storage", "wakeups_sent", "echo"),
]
SCREENSHOTS = Path(__file__).resolve().parent.parent.parent / "var" / "screenshots"
SIZES = (ViewportSize(width=1280, height=800), ViewportSize(width=360, height=740))
PAGES = (
    "queue",
    "pauses",
    "moderation",
    "workers",
    "organizations",
    "people",
    "usage",
    "system",
)
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")

SETTLED = "!document.getAnimations().some((each) => each instanceof CSSTransition)"


@pytest.fixture
def batches(owner: Person, stranger: Person) -> list[Batch]:
    """Two that wait, of two organizations, and one that waits for approval."""
    found = [jobs.running(person.caller, 3) for person in (owner, stranger)]
    set_moderation(actor=None, organization=None, everything=True)
    return [*found, jobs.running(owner.caller, 2)]


@pytest.fixture
def gpu0(db: None) -> Worker:
    now = timezone.now()
    return Worker.objects.create(
        name="gpu0",
        host="node1",
        pid=7,
        gpu="0",
        gpu_kind="NVIDIA H200",
        state=WorkerState.RUNNING,
        loaded_model="echo",
        asleep=["llama"],
        tokens_per_second=1234,
        memory_used=70_000,
        memory_total=143_000,
        temperature=61,
        utilization=93,
        health="ok",
        started_at=now,
        heartbeat_at=now + timedelta(hours=1),  # the test may take a while
    )


def desk(visit: Visit, live_server: Any, operator: User, **options: Any) -> Page:
    """A page of an operator who is signed in."""
    client = Client()
    client.force_login(operator, backend="allauth.account.auth_backends.AuthenticationBackend")
    page = visit("about:blank", **options)
    value = client.cookies["sessionid"].value
    page.context.add_cookies([{"name": "sessionid", "value": value, "url": live_server.url}])
    return page


def confirm(page: Page, batch: Batch, action: str) -> None:
    """One action on one batch, by its menu and the page that asks."""
    page.get_by_role("button", name=f"More actions for {batch.pk}").click()
    page.locator(f"#actions-{batch.pk}").get_by_role("link", name=action).click()
    expect(page.get_by_role("heading", name=f"{action}: 1 batch of 1 organization")).to_be_visible()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size["width"]))
def test_hold_release_reprioritise_approve_and_drain(
    size: ViewportSize,
    live_server: Any,
    visit: Visit,
    complaints: list[str],
    operator: User,
    batches: list[Batch],
    gpu0: Worker,
) -> None:
    mine, theirs, moderated = batches
    page = desk(visit, live_server, operator, viewport=size)
    page.goto(f"{live_server.url}/operator/queue")

    for batch in (mine, theirs):
        page.get_by_label(f"Choose {batch.pk}").check()
    page.evaluate("htmx.trigger(document.body, 'portal:seen')")  # the ticks outlive a poll
    expect(page.get_by_role("button", name="Go on with the chosen (2)")).to_be_enabled()
    page.get_by_role("button", name="Go on with the chosen (2)").click()
    page.get_by_label("Note").fill("Wait for tonight.")
    page.get_by_role("button", name="Hold 2 batches").click()
    expect(page.get_by_text("2 batches are held.")).to_be_visible()
    expect(page.get_by_text("Held by an operator: Wait for tonight.")).to_have_count(2)
    assert jobs.fresh(mine).is_held
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_text("2 batches are as before.")).to_be_visible()
    assert not jobs.fresh(theirs).is_held

    confirm(page, mine, "Hold")
    page.get_by_role("button", name="Hold 1 batch").click()
    confirm(page, mine, "Release")
    page.get_by_role("button", name="Release 1 batch").click()
    expect(page.get_by_text("1 batch is released.")).to_be_visible()
    confirm(page, theirs, "Change priority")
    page.get_by_label("Priority").select_option("High")
    page.get_by_role("button", name="Change priority 1 batch").click()
    expect(page.get_by_text("high priority")).to_be_visible()
    confirm(page, moderated, "Approve")
    page.get_by_role("button", name="Approve 1 batch").click()
    expect(page.get_by_text("1 batch is approved.")).to_be_visible()
    assert (jobs.fresh(theirs).priority, jobs.fresh(moderated).held_why) == (1, "")

    page.goto(f"{live_server.url}/operator/workers")
    page.get_by_role("button", name="Drain gpu0").click()
    page.get_by_role("dialog", name="Drain gpu0?").get_by_role("button", name="Drain").click()
    expect(page.get_by_text("Running, draining")).to_be_visible()
    assert complaints == []


def test_every_page_fits_in_both_widths_and_schemes(
    live_server: Any,
    visit: Visit,
    complaints: list[str],
    operator: User,
    batches: list[Batch],
    gpu0: Worker,
) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page = desk(visit, live_server, operator)
    change = f"queue/change?action=hold&batch={batches[0].pk}&batch={batches[1].pk}"
    for name in (*PAGES, change):
        page.goto(f"{live_server.url}/operator/{name}")
        for size, scheme in product(SIZES, SCHEMES):
            page.set_viewport_size(size)
            page.emulate_media(color_scheme=scheme)
            expect(page.locator("html")).to_have_attribute("data-bs-theme", scheme)
            shot = f"operator-{name.partition('?')[0].replace('/', '-')}-{size['width']}-{scheme}"
            page.screenshot(path=SCREENSHOTS / f"{shot}.png", full_page=True, animations="disabled")
            assert page.evaluate("document.documentElement.scrollWidth") == size["width"], shot
    assert complaints == []


def test_limits_are_edited_within_the_list(
    live_server: Any, visit: Visit, complaints: list[str], operator: User, owner: Person
) -> None:
    page = desk(visit, live_server, operator, viewport=SIZES[0])
    page.goto(f"{live_server.url}/operator/organizations")
    page.get_by_role("link", name="Limits of Acme").click()
    expect(page.get_by_label("Unfinished batches")).to_be_visible()
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_label("Unfinished batches")).to_have_count(0)
    expect(page.get_by_role("link", name="Limits of Acme")).to_be_focused()
    page.get_by_role("link", name="Limits of Acme").click()
    page.get_by_label("Unfinished batches").fill("-1")
    page.get_by_role("button", name="Save the limits of Acme").click()
    expect(page.get_by_text("Ensure this value is greater than or equal to 0.")).to_be_visible()
    page.get_by_label("Unfinished batches").fill("7")
    page.get_by_role("button", name="Save the limits of Acme").click()
    expect(page.get_by_text("The limits of Acme are saved.")).to_be_visible()
    expect(page.get_by_role("cell", name="Unfinished batches: 7")).to_be_visible()
    assert complaints == []


def test_it_works_without_scripts(
    live_server: Any, visit: Visit, operator: User, batches: list[Batch]
) -> None:
    page = desk(visit, live_server, operator, viewport=SIZES[1], java_script_enabled=False)
    page.goto(f"{live_server.url}/operator/queue")
    page.get_by_label(f"Choose {batches[0].pk}").check()
    page.get_by_role("button", name="Go on with the chosen").click()
    page.get_by_role("button", name="Hold 1 batch").click()
    expect(page.get_by_text("1 batch is held.")).to_be_visible()
    assert jobs.fresh(batches[0]).is_held
