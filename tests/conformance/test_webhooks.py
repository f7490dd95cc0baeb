"""What the running portal really delivers, read by the official SDKs and by another's verifier."""

from __future__ import annotations

import json
import os
import re
import subprocess
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import svix.webhooks
import time_machine
from openai import AsyncOpenAI, InvalidWebhookSignatureError, OpenAI

from tests.conformance.conftest import NEEDS_NODE, Tenant
from tests.receiver import Came, receiving
from tests.stack import finished, lines, send, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("stack")]

TOLD = ["batch.in_progress", "batch.completed"]


@dataclass
class Told:
    """A batch, and what its receiver was told of it."""

    batch_id: str
    secret: str
    came: list[Came]


@pytest.fixture(scope="module")
def told(tenant: Tenant) -> Iterator[Told]:
    client = tenant.narrow("files", "batches", "webhooks")
    with receiving() as receiver:
        wanted = {"name": "conformance", "url": receiver.url(), "event_types": TOLD}
        made = client.post("/webhook_endpoints", body=wanted, cast_to=dict[str, Any])
        batch = send(client, lines(2))
        finished(client, batch.id)
        wait_for(lambda: len(receiver.came) == 2)
        # The two may be on their way side by side; which arrives first is not promised.
        came = sorted(receiver.came, key=lambda each: each.id)
        yield Told(batch.id, made["signing_secret"], came)
        path = f"/webhook_endpoints/{made['id']}"
        client.delete(path, cast_to=dict[str, Any])


Unwrap = Callable[[str, bytes, dict[str, str]], Any]
"""Of a secret, a body and its headers: the event."""


def _openai(secret: str, body: bytes, headers: dict[str, str]) -> Any:
    return OpenAI(api_key="none", webhook_secret=secret).webhooks.unwrap(body, headers).to_dict()


def _openai_async(secret: str, body: bytes, headers: dict[str, str]) -> Any:
    client = AsyncOpenAI(api_key="none", webhook_secret=secret)
    return client.webhooks.unwrap(body, headers).to_dict()


def _svix(secret: str, body: bytes, headers: dict[str, str]) -> Any:
    svix.webhooks.Webhook(secret).verify(body, headers)
    return json.loads(body)


EACH = pytest.mark.parametrize("unwrap", [_openai, _openai_async, _svix])
REFUSED = (InvalidWebhookSignatureError, svix.webhooks.WebhookVerificationError)


@EACH
def test_real_deliveries_are_accepted(unwrap: Unwrap, told: Told) -> None:
    events = [unwrap(told.secret, came.body, came.headers) for came in told.came]
    said = [(event["type"], event["data"]["id"], event["object"]) for event in events]
    assert said == [(type, told.batch_id, "event") for type in TOLD]
    assert [event["id"] for event in events] == [came.id for came in told.came]


@EACH
@pytest.mark.parametrize(
    "changed",
    [
        {"body": b'{"id":"evt_1","object":"event","type":"batch.completed","data":{}}'},
        {"webhook-id": "evt_other"},
        {"webhook-timestamp": "1"},
        {"webhook-signature": "v1,AAAA"},
        {"webhook-signature": "v2,AAAA"},
        {"secret": "whsec_" + b64encode(b"somebody else's secret, this").decode()},
    ],
    ids=str,
)
def test_tampered_ones_are_refused(changed: dict[str, Any], unwrap: Unwrap, told: Told) -> None:
    came, headers = told.came[0], told.came[0].headers | changed
    with pytest.raises(REFUSED):
        unwrap(changed.get("secret", told.secret), changed.get("body", came.body), headers)


@EACH
@pytest.mark.parametrize("minutes", [6, -6])
def test_stale_ones_are_refused(minutes: int, unwrap: Unwrap, told: Told) -> None:
    came = told.came[0]
    sent = int(came.headers["webhook-timestamp"])
    with (
        time_machine.travel(sent + minutes * 60),
        pytest.raises(REFUSED),
    ):
        unwrap(told.secret, came.body, came.headers)


@NEEDS_NODE
def test_the_node_sdk_does_likewise(node: Path, told: Told) -> None:
    deliveries = [{"body": each.body.decode(), "headers": each.headers} for each in told.came]
    (node / "deliveries.json").write_text(json.dumps(deliveries))
    variables = {"WEBHOOK_SECRET": told.secret, "BATCH_ID": told.batch_id}
    done = subprocess.run(
        ["node", "--test", "--test-reporter=tap", "webhooks.test.mjs"],
        cwd=node,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"^# (pass|fail|skipped) (\d+)$", done.stdout, re.MULTILINE)
    assert dict(counts) == {"pass": "3", "fail": "0", "skipped": "0"}
