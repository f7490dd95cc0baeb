"""Traps 11 and 14: what was broken in the webhooks of the system before this one."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import time_machine
from django.utils import timezone
from django_scopes import scopes_disabled
from pytest_httpserver import HTTPServer
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError

from accounts.errors import BadRequest
from batches import webhooks as wire
from batches.models import WebhookDelivery, WebhookEndpoint
from batches.models.events import EventType
from batches.services import deliveries, events, webhooks
from models_registry.models import Model
from models_registry.services import register_model
from tests import jobs
from tests.conftest import Person

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("own_storage")]
PRIVATE = [
    "http://10.0.0.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://[::ffff:10.0.0.1]/",
    "http://2130706433/",
]


def endpoint(person: Person, url: str) -> tuple[WebhookEndpoint, str]:
    types = [EventType.BATCH_COMPLETED.value]
    return webhooks.create_webhook(
        actor=person.caller, name="hook", url=url, event_types=types, project=None
    )


def completed(person: Person) -> None:
    events.record(
        EventType.BATCH_COMPLETED,
        organization=person.caller.organization,
        project=person.caller.project,
        data={"id": "batch_1"},
    )


def test_trap_11_what_is_signed_is_what_is_sent_its_time_too_and_a_retry_sends_the_same(
    owner: Person, httpserver: HTTPServer
) -> None:
    httpserver.expect_ordered_request("/hook").respond_with_data("no", status=500)
    httpserver.expect_ordered_request("/hook").respond_with_data("yes")
    row, secret = endpoint(owner, httpserver.url_for("/hook"))
    completed(owner)
    deliveries.send_due(row.pk)
    with time_machine.travel(timezone.now() + timedelta(minutes=2)):
        deliveries.send_due(row.pk)
        requests = [request for request, _ in httpserver.log]
        bodies = [request.get_data(as_text=True) for request in requests]
        heads = [{k.lower(): v for k, v in request.headers.items()} for request in requests]
        for body, head in zip(bodies, heads, strict=True):
            assert Webhook(secret).verify(body, head)
            for tampered in (
                (body + " ", head),
                (body, head | {"webhook-timestamp": str(int(head["webhook-timestamp"]) + 1)}),
                (body, head | {"webhook-id": "evt_other"}),
            ):
                with pytest.raises(WebhookVerificationError):
                    Webhook(secret).verify(*tampered)
    assert bodies[0] == bodies[1]
    assert heads[0]["webhook-id"] == heads[1]["webhook-id"]


def test_trap_11_a_delivery_outlives_the_process_and_the_message_that_were_to_send_it(
    owner: Person, httpserver: HTTPServer, wakeups_sent: list[tuple[str, ...]]
) -> None:
    httpserver.expect_request("/hook").respond_with_data("yes")
    row, _ = endpoint(owner, httpserver.url_for("/hook"))
    completed(owner)
    wakeups_sent.clear()  # as if Valkey had been flushed
    with scopes_disabled():
        deliveries.repeat_wakeups()
    assert wakeups_sent == [("batches.tasks.deliver", row.pk)]
    deliveries.send_due(row.pk)
    with scopes_disabled():
        assert WebhookDelivery.objects.get().state == "delivered"


@pytest.mark.parametrize("url", PRIVATE)
def test_trap_14_no_webhook_reaches_a_private_address_however_it_is_named(
    url: str, owner: Person, httpserver: HTTPServer, settings: Any
) -> None:
    row, _ = endpoint(owner, httpserver.url_for("/hook"))
    with pytest.raises(BadRequest):
        endpoint(owner, url)
    with pytest.raises(BadRequest):
        webhooks.update_webhook(actor=owner.caller, row=row, url=url)
    with pytest.raises(BadRequest):
        webhooks.checked_of_batch(url=url, secret=None, event_types=None)
    with scopes_disabled():  # as if it had been saved before it was private
        WebhookEndpoint.objects.filter(pk=row.pk).update(url=url)
    completed(owner)
    deliveries.send_due(row.pk)
    with scopes_disabled():
        assert WebhookDelivery.objects.get().state == "retrying"
        assert WebhookDelivery.objects.get().attempts.get().status is None
    assert wire.send(url, b"{}", {}, timeout=5).status is None


@pytest.mark.parametrize(
    "name",
    ["__import__('os').system('id')", "a'); import os; ('", "$(id)", "a\nb", "../../etc", ""],
)
def test_trap_14_a_models_name_is_a_name(name: str, owner: Person) -> None:
    with pytest.raises(BadRequest):
        register_model(name=name, source="none", engine="instant")
    assert not Model.objects.exists()
    batch = jobs.running(owner.caller, [jobs.line("a", model=name)])
    assert (batch.status, batch.model) == ("failed", None)
