"""The pages of webhooks: who sees and changes them, secrets, tests, dead letters, operators' look."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.messages import get_messages
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_scopes import scopes_disabled
from pytest_httpserver import HTTPServer

from accounts.models import AuditEvent, User
from batches.models import Event, WebhookAttempt, WebhookDelivery, WebhookEndpoint
from batches.models.events import EventType
from batches.queries import webhooks as queries
from batches.services import deliveries, events, webhooks
from tests.conftest import Person

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("wakeups_sent")]
HERE = "/organization/webhooks"
LETTERS = f"{HERE}/deliveries"
URL = "http://127.0.0.1:9/hook"
SECRET = re.compile(r"whsec_[A-Za-z0-9+/=]{32}")


def form(**changed: Any) -> dict[str, Any]:
    fields = {"name": "Nightly", "url": URL, "event_types": ["batch.completed"], "project": ""}
    return fields | {"timeout": "15", "per_minute": "", "headers": ""} | changed


def endpoint(person: Person, **fields: Any) -> WebhookEndpoint:
    given = {"name": "hook", "url": URL, "event_types": ["batch.completed"], "project": None}
    return webhooks.create_webhook(actor=person.caller, **(given | fields))[0]


def fresh(row: WebhookEndpoint) -> WebhookEndpoint:
    with scopes_disabled():
        return WebhookEndpoint.objects.get(pk=row.pk)


def happened(person: Person, count: int = 1, type: str = EventType.BATCH_COMPLETED) -> None:
    for _ in range(count):
        events.record(
            EventType(type),
            organization=person.caller.organization,
            project=person.caller.project,
            data={"id": "batch_1"},
        )


def dead(person: Person, count: int = 1, error: str = "HTTP 500", **which: Any) -> list[str]:
    """Dead letters of what happens now to the person's organization, oldest first."""
    with scopes_disabled():
        before = set(WebhookDelivery.objects.values_list("pk", flat=True))
        happened(person, count, **which)
        new = WebhookDelivery.objects.exclude(pk__in=before)
        ids = list(new.order_by("pk").values_list("pk", flat=True))
        WebhookDelivery.objects.filter(pk__in=ids).update(
            state="dead", next_attempt_at=None, ended_at=timezone.now(), tries=10, error=error
        )
    return ids


def states() -> dict[str, str]:
    with scopes_disabled():
        return dict(WebhookDelivery.objects.values_list("pk", "state"))


def listed(response: Any) -> list[str]:
    """The deliveries on the page, in their order."""
    return re.findall(rf'href="{LETTERS}/(whd_\w+)"', response.content.decode())


def said(response: Any) -> list[str]:
    return [str(each) for each in get_messages(response.wsgi_request)]


# --- Making, changing, the secret ---------------------------------------------------------------


def test_a_webhook_is_made_as_the_form_says_and_its_secret_is_shown_once(owner: Person) -> None:
    browser = owner.browser
    given = form(
        event_types=["batch.failed", "file.expired"],
        project=owner.caller.project.pk,
        timeout="20",
        per_minute="60",
        headers="X-Token: t:1\n\nX-Other:2",
    )
    response = browser.post(f"{HERE}/new", given)
    with scopes_disabled():
        row = WebhookEndpoint.objects.get()
    assert response["Location"] == f"{HERE}/{row.pk}/secret"
    shown = browser.get(response["Location"])
    (secret,) = set(SECRET.findall(shown.content.decode()))
    assert secret == webhooks.secret_of(row)
    assert "no-store" in shown["Cache-Control"]
    assert (row.event_types, row.project_id) == (["batch.failed", "file.expired"], given["project"])
    assert (row.timeout, row.per_minute) == (20, 60)
    assert deliveries.headers_of(row) == {"X-Token": "t:1", "X-Other": "2"}
    again = browser.get(response["Location"], follow=True)
    assert again.redirect_chain == [(f"{HERE}/{row.pk}", 302)]
    for path in (HERE, f"{HERE}/{row.pk}", f"{HERE}/{row.pk}/edit"):
        page = browser.get(path).content.decode()
        assert not [text for text in (secret, "t:1") if text in page]
    with scopes_disabled():
        assert WebhookEndpoint.objects.count() == 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"name": ""}, "This field is required."),
        ({"url": "http://10.0.0.1/"}, "webhooks go to the internet only"),
        ({"url": "ftp://example.com/"}, "The URL must be http:// or https://"),
        ({"event_types": []}, "This field is required."),
        ({"event_types": ["batch.unheard_of"]}, "Select a valid choice."),
        ({"timeout": "4"}, "Ensure this value is greater than or equal to 5."),
        ({"per_minute": "0"}, "Ensure this value is greater than or equal to 1."),
        ({"headers": "nonsense"}, "Each line is a name, a colon and a value."),
        ({"headers": "Host: evil"}, "cannot be sent along"),
        ({"project": "proj_0"}, "Select a valid choice."),
    ],
)
def test_a_form_that_is_wrong_says_so_and_makes_nothing(
    changed: dict[str, Any], words: str, owner: Person
) -> None:
    response = owner.browser.post(f"{HERE}/new", form(**changed))
    assert response.status_code == 400
    page = response.content.decode()
    assert words in page or words in page.replace(
        "10.0.0.1 is not an address of the internet", words
    )
    with scopes_disabled():
        assert not WebhookEndpoint.objects.exists()


def test_a_strangers_project_cannot_be_chosen(owner: Person, stranger: Person) -> None:
    given = form(project=stranger.caller.project.pk)
    assert owner.browser.post(f"{HERE}/new", given).status_code == 400


def test_a_change_keeps_what_is_not_named_and_the_secret(owner: Person) -> None:
    row = endpoint(owner, headers={"X-Token": "t"}, project=owner.caller.project)
    there = f"{HERE}/{row.pk}/edit"
    project = owner.caller.project.pk
    moved = owner.browser.post(there, form(url=f"{URL}moved", project=project))
    now = fresh(row)
    assert moved["Location"] == f"{HERE}/{row.pk}"
    assert (now.name, now.url, now.project_id) == ("Nightly", f"{URL}moved", project)
    assert (now.encrypted_secret, deliveries.headers_of(now)) == (
        row.encrypted_secret,
        {"X-Token": "t"},
    )
    owner.browser.post(there, form(no_headers="on"))
    assert (deliveries.headers_of(fresh(row)), fresh(row).project_id) == ({}, None)


def test_rotating_shows_the_new_secret_once_and_keeps_the_old_one_as_long_as_chosen(
    owner: Person,
) -> None:
    row, browser = endpoint(owner), owner.browser
    response = browser.post(f"{HERE}/{row.pk}/rotate", {"overlap": "24"}, follow=True)
    (secret,) = set(SECRET.findall(response.content.decode()))
    now = fresh(row)
    assert deliveries.secrets_of(now) == [secret, webhooks.secret_of(row)]
    assert now.old_secret_until is not None
    assert timedelta(hours=23) < now.old_secret_until - timezone.now() <= timedelta(hours=24)
    assert not SECRET.search(browser.get(f"{HERE}/{row.pk}/secret", follow=True).content.decode())
    browser.post(f"{HERE}/{row.pk}/rotate", {"overlap": "0"})
    assert len(deliveries.secrets_of(fresh(row))) == 1
    assert browser.post(f"{HERE}/{row.pk}/rotate", {"overlap": "99"}).status_code == 400


def test_a_test_shows_what_the_receiver_said_escaped(owner: Person, httpserver: HTTPServer) -> None:
    answer = "<script>alert(1)</script>"
    httpserver.expect_request("/hook").respond_with_data(answer, status=418)
    row = endpoint(owner, url=httpserver.url_for("/hook"))
    response = owner.browser.post(f"{HERE}/{row.pk}/test", {"event_type": "batch.completed"})
    page = response.content.decode()
    assert ("HTTP 418" in page, "&lt;script&gt;" in page, answer in page) == (True, True, False)
    away = endpoint(owner)
    response = owner.browser.post(f"{HERE}/{away.pk}/test", {"event_type": "batch.completed"})
    assert "It was not reached." in response.content.decode()
    bad = owner.browser.post(f"{HERE}/{row.pk}/test", {"event_type": "no.such"})
    assert bad.status_code == 400


def test_a_webhook_is_switched_off_and_on(owner: Person) -> None:
    row = endpoint(owner)
    owner.browser.post(f"{HERE}/{row.pk}/switch")
    assert not fresh(row).enabled
    assert "Switched off" in owner.browser.get(HERE).content.decode()
    owner.browser.post(f"{HERE}/{row.pk}/switch", {"to": "on"})
    assert fresh(row).enabled


def test_deleting_takes_the_typed_name(owner: Person) -> None:
    row = endpoint(owner)
    owner.browser.post(f"{HERE}/{row.pk}/delete", {"typed": "other"})
    assert fresh(row).pk == row.pk
    gone = owner.browser.post(f"{HERE}/{row.pk}/delete", {"typed": " hook "})
    assert gone["Location"] == HERE
    with scopes_disabled():
        assert not WebhookEndpoint.objects.exists()


def test_the_list_says_how_each_does(owner: Person, stranger: Person) -> None:
    row = endpoint(owner, name="mine")
    endpoint(stranger, name="theirs")
    happened(owner, 3)
    with scopes_disabled():
        some = WebhookDelivery.objects.order_by("pk")[:2].values("pk")
        arrived = WebhookDelivery.objects.filter(pk__in=list(some.values_list("pk", flat=True)))
        arrived.update(state="delivered", next_attempt_at=None)
        old = Event.objects.create(
            organization=owner.caller.organization, type="batch.completed", body="{}"
        )
        WebhookDelivery.objects.create(  # of more than a day ago, by its id
            id="whd_" + "0" * 32, organization=row.organization, event=old, endpoint=row
        )
        WebhookEndpoint.objects.filter(pk=row.pk).update(failing_since=timezone.now())
    page = owner.browser.get(HERE).content.decode()
    assert ("66 % of 3" in page, "Failing" in page, "theirs" in page) == (True, True, False)


def test_viewers_look_and_change_nothing(owner: Person, viewer: Person) -> None:
    row = endpoint(owner)
    (letter,) = dead(owner)
    for path in (HERE, f"{HERE}/{row.pk}", LETTERS, f"{LETTERS}/{letter}"):
        page = viewer.browser.get(path)
        assert page.status_code == 200
        forms = re.findall(
            r'<form[^>]* action="(/organization/webhooks[^"]*)"', page.content.decode()
        )
        assert forms == [], path
    refused = viewer.browser.post(f"{LETTERS}/replay", {"ids": [letter]})
    assert (refused.status_code, states()[letter]) == (403, "dead")


# --- Deliveries and dead letters ------------------------------------------------------------------


def test_deliveries_are_found_by_each_filter(owner: Person, stranger: Person) -> None:
    row = endpoint(owner, event_types=["batch.completed", "batch.failed"])
    endpoint(stranger)
    (one,) = dead(owner, error="HTTP 503")
    (two,) = dead(owner, error="It did not answer in time.", type="batch.failed")
    dead(stranger)
    with scopes_disabled():
        WebhookDelivery.objects.filter(pk=two).update(state="delivered")
        event = WebhookDelivery.objects.get(pk=one).event_id
        Event.objects.filter(pk=event).update(created_at=timezone.now() - timedelta(days=2))
    yesterday = f"{timezone.now() - timedelta(days=1):%Y-%m-%dT%H:%M}"

    def found(**wanted: str) -> list[str]:
        return listed(owner.browser.get(LETTERS, wanted))

    assert found() == [two, one]
    assert found(state="dead") == found(event="batch.completed") == found(error="503") == [one]
    assert found(until=yesterday) == [one]
    assert found(since=yesterday) == found(state="delivered") == [two]
    assert found(endpoint=row.pk) == [two, one]
    for wrong in ({"state": "no"}, {"since": "noon"}, {"endpoint": "we_0"}):
        answer = owner.browser.get(LETTERS, wrong)
        assert (answer.status_code, listed(answer)) == (400, [])


def test_a_delivery_shows_payload_headers_and_every_attempt(owner: Person) -> None:
    row = endpoint(owner, headers={"X-Token": "very-secret"})
    (letter,) = dead(owner)
    with scopes_disabled():
        for status, answer in ((500, "first <b>"), (None, "")):
            WebhookAttempt.objects.create(
                delivery_id=letter,
                milliseconds=12,
                status=status,
                answer=answer,
                error="" if status else "It did not answer in time.",
            )
    page = owner.browser.get(f"{LETTERS}/{letter}").content.decode()
    assert "very-secret" not in page
    assert webhooks.secret_of(row) not in page
    for words in ("X-Token", "first &lt;b&gt;", "HTTP 500", "12 ms", "It did not answer in time."):
        assert words in page, words
    assert "&quot;id&quot;: &quot;batch_1&quot;" in page
    assert page.index("No answer") < page.index("first &lt;b&gt;")  # the newest first


def test_one_is_sent_again_from_its_page(owner: Person) -> None:
    endpoint(owner)
    first, second = dead(owner, 2)
    response = owner.browser.post(f"{LETTERS}/replay", {"ids": [first], "one": first})
    assert response["Location"] == f"{LETTERS}/{first}"
    assert said(response) == ["1 is sent again."]
    assert states() == {first: "retrying", second: "dead"}


def test_the_ticked_are_sent_again_or_forgotten(owner: Person, stranger: Person) -> None:
    endpoint(owner)
    endpoint(stranger)
    one, two, three = dead(owner, 3)
    (foreign,) = dead(stranger)
    chosen = {"ids": [one, two, foreign, "whd_\0"], "which": "chosen", "state": "dead"}
    response = owner.browser.post(f"{LETTERS}/replay", chosen)
    assert response["Location"] == f"{LETTERS}?state=dead"
    assert states() == {one: "retrying", two: "retrying", three: "dead", foreign: "dead"}
    response = owner.browser.post(f"{LETTERS}/purge", {"ids": [one, three], "which": "chosen"})
    assert said(response) == ["1 dead letter forgotten."]
    assert states() == {one: "retrying", two: "retrying", foreign: "dead"}
    nothing = owner.browser.post(f"{LETTERS}/purge", {"which": "chosen"})
    assert said(nothing) == ["None of it was dead: nothing is forgotten."]


def test_everything_since_a_time_is_sent_again(owner: Person, stranger: Person) -> None:
    endpoint(owner)
    endpoint(stranger)
    old, new = dead(owner, 2)
    (foreign,) = dead(stranger)
    with scopes_disabled():
        event = WebhookDelivery.objects.get(pk=old).event_id
        Event.objects.filter(pk=event).update(created_at=timezone.now() - timedelta(days=2))
    since = f"{timezone.now() - timedelta(days=1):%Y-%m-%dT%H:%M}"
    owner.browser.post(f"{LETTERS}/replay", {"which": "all", "since": since})
    assert states() == {old: "dead", new: "retrying", foreign: "dead"}


def test_a_filter_that_is_not_understood_forgets_nothing(owner: Person) -> None:
    endpoint(owner)
    (letter,) = dead(owner)
    refused = owner.browser.post(f"{LETTERS}/purge", {"which": "all", "since": "noon"})
    assert (refused.status_code, states()) == (400, {letter: "dead"})


def test_a_replay_after_the_address_was_mended_arrives(
    owner: Person, httpserver: HTTPServer
) -> None:
    httpserver.expect_request("/hook").respond_with_data("thanks")
    row = endpoint(owner)
    (letter,) = dead(owner)
    owner.browser.post(f"{HERE}/{row.pk}/edit", form(url=httpserver.url_for("/hook")))
    owner.browser.post(f"{LETTERS}/replay", {"ids": [letter], "one": letter})
    deliveries.send_due(row.pk)
    assert states() == {letter: "delivered"}


def test_dead_letters_are_counted_for_the_home_page(owner: Person, stranger: Person) -> None:
    endpoint(owner)
    endpoint(stranger)
    dead(owner, 2)
    dead(stranger)
    happened(owner)
    assert (queries.dead_letters(owner.caller), queries.dead_letters(stranger.caller)) == (2, 1)
    with CaptureQueriesContext(connection) as asked:
        queries.dead_letters(owner.caller)
    assert len(asked) == 1


@pytest.mark.parametrize("path", [HERE, LETTERS])
def test_a_list_takes_the_same_queries_for_one_row_and_three(path: str, owner: Person) -> None:
    browser = owner.browser

    def queries_for(rows: int) -> int:
        with CaptureQueriesContext(connection) as asked:
            page = browser.get(path).content.decode()
        assert page.count("<tr>") - 1 == rows
        return len(asked)

    endpoint(owner)
    dead(owner)
    browser.get(path)
    one = queries_for(1)
    endpoint(owner, name="b", event_types=["batch.failed"])
    endpoint(owner, name="c", event_types=["batch.failed"], project=owner.caller.project)
    dead(owner, 2)
    assert queries_for(3) == one


def test_lists_are_paged_by_key(owner: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batches.views.webhooks.PAGE_SIZE", 2)
    endpoint(owner)
    one, two, three = dead(owner, 3)
    first = owner.browser.get(LETTERS)
    assert listed(first) == [three, two]
    assert f"after={two}" in first.content.decode()
    assert listed(owner.browser.get(LETTERS, {"after": two})) == [one]


@pytest.mark.parametrize("path", [f"{HERE}/we_0/rotate", f"{LETTERS}/replay", f"{LETTERS}/purge"])
def test_what_changes_something_takes_a_post(path: str, owner: Person) -> None:
    assert owner.browser.get(path).status_code == 405


# --- Operators ------------------------------------------------------------------------------------


@pytest.fixture
def desk(operator: User) -> Client:
    client = Client()
    client.force_login(operator, backend="allauth.account.auth_backends.AuthenticationBackend")
    return client


def shown(response: Any) -> list[str]:
    """The errors on the operators' page, in their order."""
    return re.findall(r'data-label="Error">(.+?)<', response.content.decode())


def test_operators_see_all_tenants_dead_letters_and_each_look_is_audited(
    owner: Person, stranger: Person, desk: Client
) -> None:
    endpoint(owner)
    endpoint(stranger)
    happened(owner)
    dead(owner, error="mine")
    dead(stranger, error="theirs")
    everything = desk.get("/operator/webhooks")
    assert shown(everything) == ["theirs", "mine"]
    page = everything.content.decode()
    assert ("batch_1" in page, "/hook" in page, "127.0.0.1:9" in page) == (False, False, True)
    slug = owner.caller.organization.slug
    assert shown(desk.get("/operator/webhooks", {"organization": slug})) == ["mine"]
    assert shown(desk.get("/operator/webhooks", {"error": "THEIR"})) == ["theirs"]
    assert desk.get("/operator/webhooks", {"organization": "nobody"}).status_code == 404
    with scopes_disabled():
        looks = AuditEvent.objects.filter(action="operator.looked").order_by("created_at")
        found = [(each.organization_id, each.target_label) for each in looks]
    acme = owner.caller.organization.pk
    assert sorted(found, key=str) == sorted(
        [(None, "/operator/webhooks")] * 2 + [(acme, "/operator/webhooks")], key=str
    )


def test_to_others_there_is_no_such_page(owner: Person) -> None:
    assert owner.browser.get("/operator/webhooks").status_code == 404
