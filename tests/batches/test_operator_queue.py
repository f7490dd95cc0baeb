"""The operators' queue: its order, its filters, and everything that can be done to batches in it."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from django.core.cache import cache
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.models import AuditEvent, Organization, User
from batches import standings
from batches.models import Batch
from batches.services import halts, leases, queue
from batches.services.sweep import sweep
from batches.services.validation import validate_batch
from batches.views import queue as views
from models_registry.models import Model
from models_registry.services import register_model
from tests import jobs
from tests.conftest import Person

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.usefixtures("own_storage", "wakeups_sent", "echo"),
]
QUEUE, CHANGE, UNDO = "/operator/queue", "/operator/queue/change", "/operator/queue/undo"


@pytest.fixture(autouse=True)
def _nothing_told_yet(settings: Any) -> None:
    settings.CHUNK_REQUESTS = 10
    cache.delete(standings.KEY)
    standings._ask_again_at = 0.0


@pytest.fixture
def desk(operator: User) -> Client:
    client = Client()
    client.force_login(operator, backend="allauth.account.auth_backends.AuthenticationBackend")
    return client


def shown(desk: Client, query: str = "") -> list[str]:
    """The ids of the batches on the page, in its order."""
    page = desk.get(f"{QUEUE}{query}").content.decode()
    return re.findall(r'name="batch" value="(batch_\w+)"', page)


def actions(organization: Organization) -> list[tuple[str, str]]:
    with scopes_disabled():
        found = AuditEvent.objects.filter(organization=organization, via="operator")
        return list(found.order_by("number").values_list("action", "target_id"))


def do(desk: Client, action: str, *batches: Batch, **fields: Any) -> str:
    """Confirm an action; returns the page that follows, without its markup."""
    ids = [batch.pk for batch in batches]
    page = desk.post(CHANGE, {"action": action, "batch": ids} | fields, follow=True)
    assert page.status_code == 200, page.content
    return " ".join(re.sub(r"<[^>]+>", " ", page.content.decode()).split())


def undo(desk: Client) -> str:
    kept = desk.session["queue_undo"]
    page = desk.post(UNDO, {"id": kept["id"]}, follow=True)
    return " ".join(re.sub(r"<[^>]+>", " ", page.content.decode()).split())


# --- The list -------------------------------------------------------------------------------


def test_it_shows_what_runs_then_what_waits_in_the_order_in_which_it_will_run(
    desk: Client, owner: Person, stranger: Person
) -> None:
    first = jobs.running(owner.caller, 10)
    jobs.lease()
    low = jobs.running(owner.caller, 10, priority="low")
    high = jobs.running(stranger.caller, 10, priority="high")
    held = jobs.running(owner.caller, 10)
    queue.hold(actor=None, ids=[held.pk], note="Wait for us.")
    validating = jobs.created(owner.caller, jobs.jsonl(jobs.lines(1)))
    ended = jobs.running(owner.caller, 1)
    jobs.change(ended, status="completed")
    sweep()
    assert shown(desk) == [first.pk, high.pk, low.pk, held.pk, validating.pk]
    page = desk.get(QUEUE).content.decode()
    assert "Held by an operator: Wait for us." in page
    assert "Running on 1 worker" in page


def test_it_can_be_filtered(desk: Client, owner: Person, stranger: Person) -> None:
    register_model(name="other", source="none", engine="instant")
    mine = jobs.running(owner.caller, 20, priority="high")
    theirs = jobs.running(stranger.caller, [jobs.line("a", model="other")])
    queue.hold(actor=None, ids=[theirs.pk])
    jobs.lease()
    assert shown(desk, "?organization=acm") == [mine.pk]
    assert shown(desk, "?model=other") == [theirs.pk]
    assert shown(desk, "?priority=1") == [mine.pk]
    assert shown(desk, "?state=held") == [theirs.pk]
    assert shown(desk, "?state=running") == [mine.pk]
    assert shown(desk, "?state=waiting") == []
    assert shown(desk, f"?id={theirs.pk}") == [theirs.pk]
    assert "No batch in the queue is like this" in desk.get(f"{QUEUE}?id=x").content.decode()


@pytest.mark.parametrize(
    "query", ["page=x", "page=-1", "page=99999999999999999999", "id=%00", "priority=7", "state=x"]
)
def test_any_query_is_an_answer(query: str, desk: Client, owner: Person) -> None:
    assert desk.get(f"{QUEUE}?{query}").status_code == 200


def test_it_pages(desk: Client, owner: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "PAGE_SIZE", 2)
    mine = [jobs.running(owner.caller, 1).pk for _ in range(5)]
    assert [shown(desk, f"?page={at}") for at in (1, 2, 3, 4)] == [
        mine[:2],
        mine[2:4],
        mine[4:],
        mine[4:],  # it was the fourth before the queue became shorter
    ]
    said = desk.get(f"{QUEUE}?page=4").content.decode()
    assert ("page=2" in said, 'hx-get="?page=3"' in said) == (True, True)


def test_it_asks_again_also_when_nothing_waits(desk: Client) -> None:
    said = desk.get(QUEUE).content.decode()
    assert "Nothing waits and nothing runs" in said
    assert 'hx-trigger="every 3s, portal:seen from:body"' in said


def test_its_queries_do_not_grow(desk: Client, owner: Person, stranger: Person) -> None:
    def count() -> int:
        with CaptureQueriesContext(connection) as found:
            desk.get(QUEUE)
        return len(found)

    jobs.running(owner.caller, 1)
    count()
    of_one = count()
    for person in (owner, stranger):
        jobs.running(person.caller, 15)
    jobs.lease()
    assert count() == of_one


def test_a_queue_of_one_organization_is_a_look_at_it_and_polls_are_none(
    desk: Client, acme: Organization
) -> None:
    for headers in ({}, {"HX-Request": "true"}):
        desk.get(f"{QUEUE}?organization=acme", headers=headers)
    desk.get(QUEUE)
    assert actions(acme) == [("operator.looked", "")]


# --- What can be done -----------------------------------------------------------------------


def test_each_action_asks_first_and_says_what_it_touches(desk: Client, owner: Person) -> None:
    one, other = jobs.running(owner.caller, 20), jobs.running(owner.caller, 10)
    jobs.lease()
    for action in views.ACTIONS:
        page = desk.get(CHANGE, {"action": action, "batch": [one.pk, other.pk]})
        text = " ".join(re.sub(r"<[^>]+>", " ", page.content.decode()).split())
        assert "2 batches of 1 organization" in text
        assert "Batches 2 Tokens left, about" in text
        assert "Chunks running now 1" in text
        assert one.pk in text
        assert other.pk in text
        assert ("This cannot be undone." in text) == (action in ("reject", "cancel"))
    assert jobs.fresh(one).status == jobs.fresh(other).status == "in_progress"
    assert actions(owner.caller.organization) == []


def test_holding_and_releasing_is_audited_and_can_be_undone(
    desk: Client, owner: Person, acme: Organization
) -> None:
    batch = jobs.running(owner.caller, 10)
    assert "1 batch is held. Undo" in do(desk, "hold", batch, note="Wait.")
    row = jobs.fresh(batch)
    assert (row.is_held, row.held_note, row.status) == (True, "Wait.", "in_progress")
    assert "1 batch is as before." in undo(desk)
    assert not jobs.fresh(batch).is_held
    do(desk, "hold", batch)
    assert "1 batch is released." in do(desk, "release", batch)
    assert jobs.lease().batch_id == batch.pk
    assert actions(acme) == [
        ("batch.held", batch.pk),
        ("batch.change_undone", batch.pk),
        ("batch.held", batch.pk),
        ("batch.released", batch.pk),
    ]


def test_many_at_once_are_audited_each_in_its_organizations_chain(
    desk: Client, owner: Person, stranger: Person
) -> None:
    mine, theirs = jobs.running(owner.caller, 1), jobs.running(stranger.caller, 1)
    assert "2 batches are given another priority." in do(desk, "priority", mine, theirs, priority=1)
    assert [jobs.fresh(each).priority for each in (mine, theirs)] == [1, 1]
    assert actions(owner.caller.organization) == [("batch.reprioritised", mine.pk)]
    assert actions(stranger.caller.organization) == [("batch.reprioritised", theirs.pk)]
    assert "2 batches are as before." in undo(desk)
    assert [jobs.fresh(each).priority for each in (mine, theirs)] == [0, 0]


def test_what_is_moved_to_the_front_is_leased_first_in_the_order_of_the_page(
    desk: Client, owner: Person
) -> None:
    plain, one, two = (jobs.running(owner.caller, 1) for _ in range(3))
    do(desk, "front", one, two)
    found = [jobs.lease(loaded="echo").batch_id for _ in range(3)]
    assert found == [one.pk, two.pk, plain.pk]
    assert shown(desk, "?state=front") == [one.pk, two.pk]


def test_a_deadline_can_be_changed_and_had_back(desk: Client, owner: Person) -> None:
    batch = jobs.running(owner.caller, 1)
    for bad in ("", "0", "337", "x", "nan"):
        given = {"action": "deadline", "batch": batch.pk, "hours": bad}
        assert desk.post(CHANGE, given).status_code == 400
    before = timezone.now()
    do(desk, "deadline", batch, hours="2")
    assert before < jobs.fresh(batch).expires_at - timedelta(hours=2) < timezone.now()
    undo(desk)
    assert jobs.fresh(batch).expires_at == batch.expires_at


def test_cancelling_cannot_be_undone(desk: Client, owner: Person, acme: Organization) -> None:
    batch = jobs.running(owner.caller, 1)
    assert "Undo" not in do(desk, "cancel", batch)
    assert jobs.fresh(batch).status == "cancelling"
    assert actions(acme) == [("batch.cancelled", batch.pk)]
    assert "it is cancelling" in do(desk, "hold", batch)
    assert not jobs.fresh(batch).is_held


def test_what_somebody_changed_since_is_not_undone(desk: Client, owner: Person) -> None:
    batch = jobs.running(owner.caller, 1)
    do(desk, "priority", batch, priority=1)
    queue.set_priority(actor=None, ids=[batch.pk], priority=-1)
    assert "it was changed again since" in undo(desk)
    assert jobs.fresh(batch).priority == -1


def test_an_undo_that_is_not_the_last_ones_changes_nothing(desk: Client, owner: Person) -> None:
    batch = jobs.running(owner.caller, 1)
    do(desk, "priority", batch, priority=1)
    page = desk.post(UNDO, {"id": "another"}, follow=True)
    assert "There is nothing to undo any more" in page.content.decode()
    assert jobs.fresh(batch).priority == 1


def test_a_batch_that_is_held_while_it_is_validated_does_not_begin(
    desk: Client, owner: Person
) -> None:
    batch = jobs.created(owner.caller, jobs.jsonl(jobs.lines(1)))
    do(desk, "hold", batch)
    validate_batch(batch.pk)
    row = jobs.fresh(batch)
    assert (row.status, row.held_why) == ("in_progress", "operator")
    assert leases.lease_next(owner="w", loaded="", residency=timedelta(0)) is None


def test_nothing_chosen_and_unknown_actions_change_nothing(desk: Client, owner: Person) -> None:
    page = desk.get(f"{CHANGE}?action=hold", follow=True)
    assert "No batch was chosen" in page.content.decode()
    assert desk.get(f"{CHANGE}?action=hold&batch=%00x", follow=True).status_code == 200
    assert desk.get(f"{CHANGE}?action=drop&batch=x").status_code == 404


def test_the_way_back_keeps_the_filter_and_leads_nowhere_else(desk: Client, owner: Person) -> None:
    batch = jobs.running(owner.caller, 1)
    given = {"action": "hold", "batch": batch.pk, "back": "state=held"}
    assert desk.post(CHANGE, given)["Location"] == f"{QUEUE}?state=held"
    given = {"action": "release", "batch": batch.pk, "back": "//evil.test/?x"}
    assert desk.post(CHANGE, given)["Location"].startswith(f"{QUEUE}?")


def test_a_note_is_shown_as_text(desk: Client, owner: Person) -> None:
    batch = jobs.running(owner.caller, 1)
    do(desk, "hold", batch, note="<b>&")
    assert "&lt;b&gt;&amp;" in desk.get(QUEUE).content.decode()


def test_others_are_not_let_in(owner: Person) -> None:
    batch = jobs.running(owner.caller, 1)
    given = {"action": "cancel", "batch": batch.pk}
    assert owner.browser.post(CHANGE, given).status_code == 404
    assert Client().post(CHANGE, given)["Location"].startswith("/accounts/login/")
    assert jobs.fresh(batch).status == "in_progress"


# --- Pauses ---------------------------------------------------------------------------------


def test_a_model_and_an_organization_are_paused_drained_and_resumed(
    desk: Client, owner: Person, acme: Organization, echo: Model
) -> None:
    jobs.running(owner.caller, 1)
    for path, action in (
        (f"/operator/models/{echo.pk}/halt", "queue.model"),
        (f"/operator/organizations/{acme.pk}/halt", "queue.organization"),
    ):
        for halt, verb in (("paused", "paused"), ("draining", "draining"), ("", "resumed")):
            page = desk.post(path, {"halt": halt}, follow=True)
            assert page.status_code == 200
            with scopes_disabled():
                assert AuditEvent.objects.filter(action=f"{action}_{verb}").count() == 1
        assert desk.post(path, {"halt": "x"}).status_code == 400
    assert jobs.lease().model == "echo"
    assert desk.post("/operator/models/999/halt", {"halt": "paused"}).status_code == 404
    assert desk.post("/operator/organizations/org_0/halt", {"halt": ""}).status_code == 404


def test_before_pausing_an_organization_it_says_what_that_touches(
    desk: Client, owner: Person, stranger: Person, acme: Organization
) -> None:
    for person in (owner, stranger):
        jobs.running(person.caller, 1)
    with scopes_disabled():
        leased = Batch.objects.get(organization=acme)
    assert jobs.lease().batch_id == leased.pk
    said = "1 batch of it is in progress, with 1 chunk running now."
    share = f"/operator/organizations/{acme.pk}/share"
    assert said in desk.get(share).content.decode()
    desk.post(f"/operator/organizations/{acme.pk}/halt", {"halt": "draining"})
    assert said in desk.get("/operator/pauses").content.decode()


def test_what_is_paused_says_so_to_its_tenant(owner: Person, acme: Organization) -> None:
    batch = jobs.running(owner.caller, 1)

    def reason() -> str:
        sweep()
        return str(owner.api.get(f"/v1/batches/{batch.pk}").json()["queue"]["reason"])

    halts.halt_model(actor=None, name="echo", halt="draining")
    assert reason() == "held: echo is paused by an operator"
    halts.halt_organization(actor=None, organization=acme, halt="paused")
    assert reason() == "held: an operator has paused the organization's work"


def test_pausing_a_model_is_no_new_entry_of_it(echo: Model) -> None:
    before = echo.updated_at
    halts.halt_model(actor=None, name="echo", halt="paused")
    echo.refresh_from_db()
    assert (echo.updated_at, echo.halt) == (before, "paused")


def test_the_pages_queries_do_not_grow(desk: Client, owner: Person) -> None:
    def count() -> int:
        with CaptureQueriesContext(connection) as found:
            desk.get("/operator/pauses")
        return len(found)

    count()
    of_one = count()
    for name in ("a", "b"):
        register_model(name=name, source="none", engine="instant")
        jobs.running(owner.caller, [jobs.line("a", model=name)])
    assert count() == of_one


# --- From the shell -------------------------------------------------------------------------


def test_batches_are_held_and_released_from_the_shell(
    owner: Person, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = jobs.running(owner.caller, 1)
    call_command("hold_batch", batch.pk, "--note", "Wait.")
    assert (jobs.fresh(batch).is_held, jobs.fresh(batch).held_note) == (True, "Wait.")
    call_command("release_batch", batch.pk)
    assert not jobs.fresh(batch).is_held
    assert capsys.readouterr().out.splitlines()[-1] == f"{batch.pk} may run"
    with pytest.raises(CommandError, match="it does not wait for approval"):
        call_command("release_batch", batch.pk, "--approve")
    with pytest.raises(CommandError, match="there is no such batch"):
        call_command("hold_batch", "batch_0")
