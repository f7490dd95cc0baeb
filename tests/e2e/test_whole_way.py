"""The whole way in a real browser, on real vLLM: from an invitation to a file of answers.

Then the same queue from the other side, as an operator steers it. Every test ends with an empty
console, so the content security policy holds as well. Pictures are kept under var/screenshots/.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal

import orjson
import pytest
from openai import OpenAI
from playwright.sync_api import Download, Page, ViewportSize, expect

from tests import stack as stacks
from tests.e2e.conftest import Visit
from tests.e2e.test_batches_page import DESKTOP, PASSWORD, PHONE, SCHEMES
from tests.e2e.test_new_batch import drop, photograph
from tests.stack import Stack, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vllm")]

MODEL = "tiny-chat-a"
OWNER, OPERATOR = "owner@acme.test", "operator@portal.test"
LOOKS = list(product((DESKTOP, PHONE), SCHEMES))
PICTURES = stacks.ROOT / "var" / "screenshots"
Scheme = Literal["light", "dark"]


@pytest.fixture(scope="module")
def portal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A portal with one worker, a tiny model of random weights, and an operator."""
    folder = tmp_path_factory.mktemp("models")
    maker = stacks.ROOT / "examples" / "make_tiny_models.py"
    subprocess.run([sys.executable, str(maker), str(folder)], check=True)
    with stacks.running(tmp_path_factory.mktemp("portal")) as stack:
        stack.manage("register_model", MODEL, f"--source={folder / MODEL}", "--task=chat")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DJANGO_SUPERUSER_PASSWORD", PASSWORD)
            stack.manage("createsuperuser", f"--email={OPERATOR}", "--noinput")
        yield stack


@pytest.fixture(params=LOOKS, ids=lambda look: f"{look[0]['width']}-{look[1]}")
def looks(request: pytest.FixtureRequest) -> dict[str, Any]:
    size, scheme = request.param
    return {"viewport": size, "color_scheme": scheme}


@pytest.fixture
def picture(looks: dict[str, Any]) -> Any:
    """Keeps a picture of a page, which must fit in its window."""
    size: ViewportSize = looks["viewport"]
    scheme: Scheme = looks["color_scheme"]
    PICTURES.mkdir(parents=True, exist_ok=True)

    def keep(page: Page, name: str) -> None:
        photograph(page, PICTURES / f"way-{name}-{size['width']}-{scheme}")

    return keep


def sign_in(page: Page, email: str, lands_on: str = "Home") -> None:
    page.get_by_label("Email").fill(email)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in", exact=True).click()
    expect(page.get_by_role("heading", name=lands_on, exact=True)).to_be_visible()


def mailed_link(stack: Stack, email: str) -> str:
    """The link of the invitation to this address, of the mail that the portal printed."""

    def look() -> str:
        said = (stack.data_dir / "serve.log").read_text(errors="replace")
        mail = said.partition(f"To: {email}")[2]
        found = re.search(r"http\S+/invitations/\S+", mail)
        return found[0] if found else ""

    return wait_for(look)


def requests(count: int) -> bytes:
    """Lines of chats, of which the third is one that vLLM refuses."""
    said = stacks.lines(count, MODEL, max_tokens=8).splitlines(keepends=True)
    said[2] = said[2].replace(b'"max_tokens":8', b'"max_tokens":8,"temperature":-1')
    return b"".join(said)


def saved(download: Download, path: Path) -> list[dict[str, Any]]:
    download.save_as(path)
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def ended(page: Page) -> None:
    """What is on the page of a batch once it is done; loading the model takes its time."""
    expect(page.locator("#batch .portal-head .status")).to_have_text("Completed", timeout=300_000)


def test_from_an_invitation_to_the_answers(
    portal: Stack,
    looks: dict[str, Any],
    picture: Any,
    visit: Visit,
    complaints: list[str],
    tmp_path: Path,
) -> None:
    email = f"member-{looks['viewport']['width']}-{looks['color_scheme']}@acme.test"
    owner = visit(portal.base_url, **looks)
    sign_in(owner, OWNER)
    owner.goto(f"{portal.base_url}/organization/members")
    owner.get_by_label("Email address").fill(email)
    owner.get_by_label("Role").first.select_option("member")
    owner.get_by_role("button", name="Send the invitation").click()
    expect(owner.get_by_role("button", name=f"Send again to {email}")).to_be_visible()
    picture(owner, "invited")

    page = visit(mailed_link(portal, email), **looks)
    page.get_by_role("link", name="Make an account").click()
    page.get_by_label("Password", exact=True).fill(PASSWORD)
    page.get_by_label("Password (again)").fill(PASSWORD)
    picture(page, "sign-up")
    page.get_by_role("button", name="Make the account").click()
    expect(page.get_by_role("heading", name="Join Acme")).to_be_visible()
    page.get_by_role("button", name="Join").click()
    expect(page.get_by_role("heading", name="Home", exact=True)).to_be_visible()
    picture(page, "home")

    page.goto(f"{portal.base_url}/organization/keys/new")
    page.get_by_label("Name").fill("nightly CI")
    page.get_by_role("button", name="Make the key").click()
    key = page.locator("#key").inner_text()
    assert MODEL in [model.id for model in portal.client(key).models.list()]

    page.goto(f"{portal.base_url}/batches/new")
    drop(page, "nightly.jsonl", requests(60))
    expect(page.get_by_text("Every line is good")).to_be_visible()
    page.get_by_role("button", name="Start the batch").click()
    expect(page.get_by_role("heading", name="nightly.jsonl")).to_be_visible()
    page.evaluate("window.notReloaded = true")
    picture(page, "running")
    ended(page)
    expect(page.get_by_role("region", name="Details").get_by_text(MODEL)).to_be_visible()
    assert page.evaluate("window.notReloaded")
    picture(page, "finished")

    page.get_by_role("link", name="Results").click()
    page.get_by_role("link", name="Line 2", exact=True).click()
    expect(page.get_by_label("Request", exact=True)).to_contain_text("words 1")
    expect(page.get_by_label("Answer")).to_contain_text("assistant")
    picture(page, "result")

    page.get_by_role("link", name="Overview").click()
    with page.expect_download() as output:
        page.get_by_role("link", name="Output").click()
    assert len(saved(output.value, tmp_path / "output.jsonl")) == 59
    page.get_by_role("button", name="Retry the 1 failed").click()
    expect(page.get_by_role("heading", name="nightly-retry.jsonl")).to_be_visible()
    ended(page)
    with page.expect_download() as errors:
        page.get_by_role("link", name="Errors").click()
    [refused] = saved(errors.value, tmp_path / "errors.jsonl")
    assert (refused["custom_id"], refused["response"]["status_code"]) == ("request-2", 400)
    assert complaints == []


def sent(client: OpenAI, count: int) -> Any:
    """A batch that is validated, so that it waits."""
    batch = stacks.send(client, stacks.lines(count, MODEL, max_tokens=8))
    wait_for(lambda: client.batches.retrieve(batch.id).status == "in_progress")
    return batch


def moderate_everything(page: Page, portal: Stack, yes: bool) -> None:
    page.goto(f"{portal.base_url}/operator/moderation")
    page.get_by_label("Every batch").set_checked(yes)
    page.get_by_role("button", name="Save the rules").click()
    expect(page.get_by_text("The rules are saved")).to_be_visible()


def act(page: Page, action: str, batch_id: str) -> None:
    """One action on one batch: its menu, then the page that asks."""
    page.get_by_role("button", name=f"More actions for {batch_id}").click()
    page.locator(f"#actions-{batch_id}").get_by_role("link", name=action, exact=True).click()
    expect(page.get_by_role("heading", name=f"{action}: 1 batch of 1 organization")).to_be_visible()
    if action == "Change priority":
        page.get_by_label("Priority").select_option("High")
    page.get_by_role("button", name=f"{action} 1 batch").click()


def test_an_operator_steers_the_queue(
    portal: Stack, looks: dict[str, Any], picture: Any, visit: Visit, complaints: list[str]
) -> None:
    """What waits for a paused model is held, released, put forward and approved; then it runs."""
    page = visit(portal.base_url, **looks)
    sign_in(page, OPERATOR, lands_on="Organizations")
    page.goto(f"{portal.base_url}/operator/pauses")
    page.get_by_role("button", name=f"Pause or drain {MODEL}").click()
    page.get_by_role("dialog").get_by_role("button", name="Pause", exact=True).click()
    expect(page.get_by_role("button", name=f"Resume {MODEL}")).to_be_visible()
    client = portal.client()
    batch = sent(client, 40)
    page.goto(f"{portal.base_url}/operator/queue")
    act(page, "Hold", batch.id)
    expect(page.get_by_text("1 batch is held.")).to_be_visible()
    act(page, "Release", batch.id)
    expect(page.get_by_text("1 batch is released.")).to_be_visible()
    act(page, "Change priority", batch.id)
    expect(page.get_by_text("high priority")).to_be_visible()

    moderate_everything(page, portal, True)
    second = sent(client, 10)
    page.goto(f"{portal.base_url}/operator/queue?id={second.id}")
    expect(page.get_by_role("cell").get_by_text("Waits for approval")).to_be_visible()
    picture(page, "queue-approval")
    act(page, "Approve", second.id)
    expect(page.get_by_text("1 batch is approved.")).to_be_visible()
    moderate_everything(page, portal, False)
    page.goto(f"{portal.base_url}/operator/queue")
    picture(page, "queue-paused")
    assert client.batches.retrieve(batch.id).request_counts.completed == 0

    page.goto(f"{portal.base_url}/operator/pauses")
    page.get_by_role("button", name=f"Resume {MODEL}").click()
    expect(page.get_by_role("button", name=f"Resume {MODEL}")).to_have_count(0)
    for each, many in ((batch, 40), (second, 10)):
        done = stacks.finished(client, each.id, seconds=300)
        assert (done.status, done.request_counts.completed) == ("completed", many)

    page.goto(f"{portal.base_url}/operator/workers")
    page.get_by_role("button", name="Drain gpu0").click()
    page.get_by_role("dialog", name="Drain gpu0?").get_by_role("button", name="Drain").click()
    expect(page.get_by_role("article", name="gpu0").get_by_text("Drained")).to_be_visible(
        timeout=60_000  # the next heartbeat says so
    )
    picture(page, "worker-draining")
    waits = sent(client, 5)
    page.goto(f"{portal.base_url}/operator/queue")
    expect(page.get_by_role("button", name=f"More actions for {waits.id}")).to_be_visible()
    picture(page, "queue-draining")
    assert client.batches.retrieve(waits.id).request_counts.completed == 0
    page.goto(f"{portal.base_url}/operator/workers")
    page.get_by_role("button", name="Resume gpu0").click()
    expect(page.get_by_role("button", name="Drain gpu0")).to_be_visible()
    assert stacks.finished(client, waits.id, seconds=300).request_counts.completed == 5
    assert complaints == []
