"""`/v1/webhook_endpoints` by OpenAI's SDK, and dead letters over the API."""

from __future__ import annotations

import threading
from typing import Any

import orjson
import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django_scopes import scopes_disabled
from pytest_httpserver import HTTPServer

from accounts.models import AuditEvent
from batches.models import WebhookDelivery, WebhookEndpoint
from batches.models.events import EventType
from batches.services import deliveries, events, webhooks
from tests.conftest import Person
from tests.test_tenancy import HOOK, may_everything
from tests.wire import JSON, error_of

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("own_storage")]
HERE, LETTERS = "/v1/webhook_endpoints", "/v1/webhook_deliveries"


@pytest.fixture(autouse=True)
def _every_scope(owner: Person, stranger: Person) -> None:
    may_everything(owner)
    may_everything(stranger)


def post(person: Person, path: str, body: Any) -> Any:
    return person.api.post(path, orjson.dumps(body), content_type=JSON)


def made(person: Person, **fields: Any) -> dict[str, Any]:
    response = post(person, HERE, HOOK | fields)
    assert response.status_code == 200, response.content
    found: dict[str, Any] = response.json()
    return found


def dead(person: Person, count: int = 1, **fields: Any) -> list[str]:
    """Dead letters of the person's endpoints."""
    for _ in range(count):
        events.record(
            EventType.BATCH_COMPLETED,
            organization=person.caller.organization,
            project=person.caller.project,
            data={"id": "batch_1"},
        )
    with scopes_disabled():
        mine = WebhookDelivery.objects.filter(organization=person.caller.organization)
        mine.update(state="dead", next_attempt_at=None, tries=10, error="HTTP 500", **fields)
        return list(mine.order_by("pk").values_list("pk", flat=True))


def test_the_secret_is_in_the_answer_that_made_it_and_in_no_other(owner: Person) -> None:
    webhook = made(owner)
    secret = webhook.pop("signing_secret")
    assert secret.startswith("whsec_")
    assert webhook["signing_secret_hint"] == f"whsec_…{secret[-4:]}"
    again = owner.api.get(f"{HERE}/{webhook['id']}").json()
    assert again == webhook
    rows = str(owner.api.get(HERE).json())
    with scopes_disabled():
        kept = "".join(str(vars(row)) for row in WebhookEndpoint.objects.all())
        told = "".join(str(row.changes) for row in AuditEvent.objects.all())
    assert not [text for text in (rows, kept, told) if secret in text]


def test_rotating_gives_a_new_secret(owner: Person) -> None:
    webhook = made(owner)
    new = post(owner, f"{HERE}/{webhook['id']}/rotate_secret", {}).json()["signing_secret"]
    assert new != webhook["signing_secret"]


def test_what_is_left_out_of_a_change_stays(owner: Person) -> None:
    webhook = made(owner, headers={"X-Token": "t"}, timeout=20)
    changed = post(owner, f"{HERE}/{webhook['id']}", {"name": "Other", "enabled": False}).json()
    del webhook["signing_secret"]
    moved = {"name", "enabled", "disabled_reason", "updated_at"}
    assert {k: v for k, v in changed.items() if k not in moved} == {
        k: v for k, v in webhook.items() if k not in moved
    }
    assert (changed["name"], changed["enabled"]) == ("Other", False)
    with scopes_disabled():
        assert deliveries.headers_of(WebhookEndpoint.objects.get()) == {"X-Token": "t"}


def test_headers_are_not_sent_to_where_somebody_else_says(owner: Person) -> None:
    """They may be a password, which the one who changes the address never saw."""
    webhook = made(owner, headers={"Authorization": "Bearer theirs"})
    here, elsewhere = f"{HERE}/{webhook['id']}", "http://localhost:9/hook"
    response = post(owner, here, {"url": elsewhere})
    assert (response.status_code, error_of(response)["param"]) == (400, "headers")
    for body in ({"url": f"{webhook['url']}/moved"}, {"url": elsewhere, "headers": {"X": "mine"}}):
        assert post(owner, here, body).json()["url"] == body["url"]
    with scopes_disabled():
        assert deliveries.headers_of(WebhookEndpoint.objects.get()) == {"X": "mine"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("url", "http://10.0.0.1/"),
        ("url", "ftp://example.com/"),
        ("event_types", ["batch.unheard_of"]),
        ("timeout", 4),
        ("timeout", 31),
        ("per_minute", 0),
        ("name", " "),
        ("headers", {"Webhook-Id": "mine"}),
        ("headers", {"X": "a\r\nY: b"}),
        ("headers", {"Content-Length": "5"}),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_stored(
    field: str, value: Any, owner: Person
) -> None:
    response = post(owner, HERE, HOOK | {field: value})
    assert (response.status_code, error_of(response)["param"]) == (400, field)
    with scopes_disabled():
        assert not WebhookEndpoint.objects.exists()


def test_a_test_says_what_the_receiver_said_and_is_audited(
    owner: Person, httpserver: HTTPServer
) -> None:
    httpserver.expect_request("/hook").respond_with_data("teapot", status=418)
    webhook = made(owner, url=httpserver.url_for("/hook"))
    response = post(owner, f"{HERE}/{webhook['id']}/test", {"event_type": "batch.completed"})
    assert response.json()["status_code"] == 418
    with scopes_disabled():
        assert AuditEvent.objects.filter(action="webhook.tested").count() == 1
        assert not WebhookDelivery.objects.exists()


def test_a_test_that_reaches_nobody_says_so(owner: Person) -> None:
    webhook = made(owner)
    response = post(owner, f"{HERE}/{webhook['id']}/test", {"event_type": "batch.completed"})
    assert response.status_code == 400
    assert error_of(response)["message"].startswith("The endpoint was not reached: ")


def test_tests_do_not_take_all_threads_of_a_process(
    owner: Person, httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "_tests", threading.BoundedSemaphore(1))
    httpserver.expect_request("/hook").respond_with_data("fine")
    webhook = made(owner, url=httpserver.url_for("/hook"))
    there, body = f"{HERE}/{webhook['id']}/test", {"event_type": "batch.completed"}
    with webhooks._tests:  # another that still waits for its receiver
        response = post(owner, there, body)
        assert (response.status_code, len(httpserver.log)) == (429, 0)
    assert post(owner, there, body).status_code == 200
    assert post(owner, there, body).status_code == 200


def test_dead_letters_are_found_by_endpoint_event_time_and_error(owner: Person) -> None:
    webhook = made(owner)
    (letter,) = dead(owner)

    def found(**wanted: Any) -> list[str]:
        return [each["id"] for each in owner.api.get(LETTERS, wanted).json()["data"]]

    for wanted in (
        {"state": "dead"},
        {"webhook_endpoint_id": webhook["id"]},
        {"event_type": "batch.completed"},
        {"since": 1},
        {"error": "http 5"},
    ):
        assert found(**wanted) == [letter], wanted
    for wanted in (
        {"state": "delivered"},
        {"webhook_endpoint_id": "we_0"},
        {"event_type": "batch.failed"},
        {"since": 2**32},
        {"error": "timeout\0"},
    ):
        assert found(**wanted) == [], wanted


def test_a_letter_says_what_was_sent_and_every_attempt(owner: Person) -> None:
    made(owner)
    (letter,) = dead(owner)
    said = owner.api.get(f"{LETTERS}/{letter}").json()
    assert orjson.loads(said["body"])["data"] == {"id": "batch_1"}
    assert (said["state"], said["attempts"], said["error"]) == ("dead", [], "HTTP 500")


@pytest.mark.parametrize(("action", "left"), [("replay", "retrying"), ("purge", None)])
def test_letters_are_replayed_and_purged_by_ids_or_by_filter(
    action: str, left: str | None, owner: Person, stranger: Person
) -> None:
    made(owner)
    made(stranger)
    first, *others = dead(owner, 3)
    (foreign,) = dead(stranger)
    one = post(owner, f"{LETTERS}/{action}", {"ids": [first, foreign, "whd_0"]}).json()
    rest = post(owner, f"{LETTERS}/{action}", {"state": "dead"}).json()
    assert (one["count"], rest["count"]) == (1, 2)
    with scopes_disabled():
        states = dict(WebhookDelivery.objects.values_list("pk", "state"))
    kept = dict.fromkeys([first, *others], left) if left else {}
    assert states == {**kept, foreign: "dead"}


@pytest.mark.parametrize("path", [HERE, LETTERS])
def test_a_list_takes_the_same_queries_for_one_row_and_three(path: str, owner: Person) -> None:
    def queries(rows: int) -> int:
        with CaptureQueriesContext(connection) as context:
            assert len(owner.api.get(path).json()["data"]) == rows
        return len(context)

    made(owner, event_types=["batch.completed"])
    dead(owner)
    queries(1)  # the first call notes that the key was used
    one = queries(1)
    made(owner, name="b", event_types=["batch.failed"])
    made(owner, name="c", event_types=["batch.failed"])
    dead(owner, 2)
    assert queries(3) == one
