"""A batch's own webhook: an extra field of create, whose secret is said once and to nobody else."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django_scopes import scopes_disabled
from openai import OpenAI
from pytest_httpserver import HTTPServer
from standardwebhooks import Webhook

from batches.models import Batch, IdempotencyKey, WebhookDelivery, WebhookEndpoint
from batches.models.events import EventType
from batches.services import deliveries, webhooks
from batches.services.validation import validate_batch
from tests.batches.conftest import Disk
from tests.conftest import Person
from tests.wire import batch_body, created, error_of, post, uploaded

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("wakeups_sent", "disk")]
URL = "http://127.0.0.1:9/hook"
SECRET = "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
ENDS = ["batch.completed", "batch.failed", "batch.expired", "batch.cancelled"]


def the_endpoint() -> WebhookEndpoint:
    with scopes_disabled():
        return WebhookEndpoint.objects.get()


def test_a_secret_is_made_and_said_in_the_answer_that_made_the_batch_alone(owner: Person) -> None:
    batch = created(owner.api, webhook={"url": URL})
    secret = batch["webhook"].pop("secret")
    assert batch["webhook"] == {"url": URL, "events": ENDS}
    assert webhooks.secret_of(the_endpoint()) == secret
    shown = owner.api.get(f"/v1/batches/{batch['id']}").json()
    listed = owner.api.get("/v1/batches").json()["data"][0]
    cancelled = owner.api.post(f"/v1/batches/{batch['id']}/cancel").json()
    for each in (shown, listed, cancelled):
        assert each["webhook"] == {"url": URL, "events": ENDS, "secret": None}


def test_a_secret_that_was_brought_is_not_said_at_all(owner: Person) -> None:
    given = {"url": URL, "secret": SECRET, "events": ["batch.progress", "batch.completed"]}
    batch = created(owner.api, webhook=given)
    assert batch["webhook"] == {
        "url": URL,
        "events": ["batch.completed", "batch.progress"],
        "secret": None,
    }
    assert webhooks.secret_of(the_endpoint()) == SECRET


def test_an_idempotency_key_gives_the_secret_to_nobody_else(
    owner: Person, teammate: Person
) -> None:
    body = batch_body(uploaded(owner.api), webhook={"url": URL})
    key = {"Idempotency-Key": "k"}
    first = post(owner.api, "/v1/batches", body, **key).json()
    again = post(teammate.api, "/v1/batches", body, **key).json()
    secret = first["webhook"]["secret"]
    assert secret.startswith("whsec_")
    assert again == first | {"webhook": first["webhook"] | {"secret": None}}
    with scopes_disabled():
        assert secret not in str(IdempotencyKey.objects.get().answer)
        assert (Batch.objects.count(), WebhookEndpoint.objects.count()) == (1, 1)


def test_it_is_told_of_its_batch_and_of_no_other(owner: Person, httpserver: HTTPServer) -> None:
    httpserver.expect_request("/hook").respond_with_data("thanks")
    mine = created(owner.api, b"no json\n", webhook={"url": httpserver.url_for("/hook")})
    other = created(owner.api, b"no json\n")
    for batch in (other, mine):
        validate_batch(batch["id"])
    deliveries.send_due(the_endpoint().pk)
    ((request, _),) = httpserver.log
    client = OpenAI(api_key="none", webhook_secret=mine["webhook"]["secret"])
    event = client.webhooks.unwrap(request.get_data(), dict(request.headers))
    assert (event.type, event.data.id) == ("batch.failed", mine["id"])


def test_unmodified_sdks_send_it_as_extra_body(owner: Person, live_server: Any) -> None:
    # A connection that stays open keeps its thread, and with it one to the database.
    with OpenAI(base_url=f"{live_server.url}/v1", api_key=owner.key) as client:
        batch = client.batches.create(
            input_file_id=uploaded(owner.api),
            endpoint="/v1/chat/completions",
            completion_window="24h",
            extra_body={"webhook": {"url": URL}, "progress_percents": [10]},
        )
    assert Webhook(batch.model_extra["webhook"]["secret"])
    with scopes_disabled():
        assert Batch.objects.get().progress_percents == [10]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"webhook": {"url": "http://10.0.0.1/"}}, "webhook.url"),
        ({"webhook": {"url": "ftp://example.com/"}}, "webhook.url"),
        ({"webhook": {"url": ""}}, "webhook.url"),
        ({"webhook": {}}, "webhook.url"),
        ({"webhook": {"url": URL, "secret": "short"}}, "webhook.secret"),
        ({"webhook": {"url": URL, "secret": ""}}, "webhook.secret"),
        ({"webhook": {"url": URL, "events": []}}, "webhook.events"),
        ({"webhook": {"url": URL, "events": ["file.expired"]}}, "webhook.events"),
        ({"progress_percents": [0]}, "progress_percents"),
        ({"progress_percents": [100]}, "progress_percents"),
        ({"progress_percents": list(range(1, 30))}, "progress_percents"),
    ],
)
def test_what_cannot_be_is_refused_with_nothing_made(
    given: dict[str, Any], param: str, owner: Person
) -> None:
    response = post(owner.api, "/v1/batches", batch_body(uploaded(owner.api), **given))
    assert (response.status_code, error_of(response)["param"]) == (400, param)
    with scopes_disabled():
        assert (Batch.objects.count(), WebhookEndpoint.objects.count()) == (0, 0)


def test_it_is_no_endpoint_of_the_organization(owner: Person) -> None:
    created(owner.api, webhook={"url": URL})
    with owner.caller.scope():
        assert not WebhookEndpoint.objects.filter(batch=None).exists()
    assert b"Webhook of batch_" not in owner.browser.get("/organization/webhooks").content
    page = owner.browser.get(f"/organization/webhooks/{the_endpoint().pk}")
    assert page.status_code == 200


def test_a_list_of_batches_with_webhooks_takes_no_more_queries(owner: Person, disk: Disk) -> None:
    def queries(rows: int) -> int:
        with CaptureQueriesContext(connection) as context:
            assert len(owner.api.get("/v1/batches").json()["data"]) == rows
        return len(context)

    created(owner.api, webhook={"url": URL})
    queries(1)
    one = queries(1)
    created(owner.api, webhook={"url": URL})
    created(owner.api)
    assert queries(3) == one


def test_one_batch_may_tell_two_addresses(owner: Person) -> None:
    webhooks.create_webhook(
        actor=owner.caller, name="all", url=URL, event_types=list(EventType.values), project=None
    )
    batch = created(owner.api, b"no json\n", webhook={"url": URL})
    validate_batch(batch["id"])
    with scopes_disabled():
        assert WebhookDelivery.objects.filter(event__type="batch.failed").count() == 2
