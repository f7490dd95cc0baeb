"""Webhooks: 10,000 deliveries to 50 endpoints of a local receiver, and the same with one hanging.

The events lie there before the clock starts: it measures sending alone, from the moment at which
the endpoints may be sent to until the last delivery is recorded. BENCH_DELIVERIES: another number.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psycopg

from benchmarks.processes import Family
from tests import stack as stacks
from tests.receiver import Came, receiving
from tests.stack import Stack

ENDPOINTS = 50
DELIVERIES = int(os.environ.get("BENCH_DELIVERIES", "10000"))
CHILDREN = ("webhooks", "postgres", "valkey", "cpu", "beat")
LOCAL = {"WEBHOOK_PRIVATE_HOSTS": "127.0.0.1"}


def run() -> dict[str, float]:
    with (
        receiving(_unless_it_hangs) as receiver,
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        stacks.running(Path(folder) / "data", "--gpu-workers=0", **LOCAL) as stack,
    ):
        _measure(stack, receiver.url("/warm"), hanging=0, events=2)
        each = DELIVERIES // ENDPOINTS
        family = Family({name: stack.pid(name) for name in CHILDREN})
        before = receiver.connections
        alone = _measure(stack, receiver.url("/hook"), hanging=0, events=each)
        connections = receiver.connections - before
        spent = family.cpu_seconds()
        beside = _measure(stack, receiver.url("/hook"), hanging=1, events=each)
        return {
            "deliveries_per_second": alone,
            "with_one_hanging": beside,
            "hanging_ratio": beside / alone,
            "connections": connections,
            **{f"cpu_seconds_{name}": seconds for name, seconds in spent.items()},
            **{f"peak_mb_{name}": peak for name, peak in family.peaks_mb().items()},
        }


def _unless_it_hangs(came: Came) -> int | None:
    return None if came.path == "/hang" else 200


def _measure(stack: Stack, url: str, *, hanging: int, events: int) -> float:
    """Deliveries a second to the endpoints that answer, of so many events told to each."""
    _script(stack, _FILL, url, str(hanging), str(events), str(ENDPOINTS))
    expected = (ENDPOINTS - hanging) * events
    with psycopg.connect(stack.services.database_url, autocommit=True) as database:
        _script(stack, _RELEASE)
        started = time.perf_counter()
        stacks.wait_for(lambda: _delivered(database) == expected, seconds=600, pause=0.05)
        return expected / (time.perf_counter() - started)


def _delivered(database: psycopg.Connection[tuple[int]]) -> int:
    query = "SELECT count(*) FROM batches_webhookdelivery WHERE state = 'delivered'"
    row = database.execute(query).fetchone()
    return row[0] if row else 0


_FILL = """
from datetime import timedelta
from django.utils import timezone
from django_scopes import scopes_disabled
from accounts.models import User
from accounts.queries import caller_of_user
from batches import wakeups
from batches.models import Event, WebhookEndpoint
from batches.models.events import EventType
from batches.services import events, webhooks
wakeups._send = lambda *_: None
url, hanging, count, endpoints = sys.argv[1], *map(int, sys.argv[2:])
actor = caller_of_user(User.objects.get())
with scopes_disabled():
    Event.objects.all().delete()
    WebhookEndpoint.objects.all().delete()
    for at in range(endpoints):
        here = url.rpartition("/")[0] + "/hang" if at < hanging else url
        webhooks.create_webhook(actor=actor, name=str(at), url=here, project=None,
                                event_types=["batch.completed"])
    WebhookEndpoint.objects.update(resume_at=timezone.now() + timedelta(hours=1))
    for at in range(count):
        events.record(EventType.BATCH_COMPLETED, organization=actor.organization,
                      project=actor.project, data={"id": f"batch_{at}"})
"""

_RELEASE = """
from django.utils import timezone
from django_scopes import scopes_disabled
from batches import wakeups
from batches.models import WebhookEndpoint
with scopes_disabled():
    ids = list(WebhookEndpoint.objects.values_list("pk", flat=True))
    WebhookEndpoint.objects.update(resume_at=timezone.now())
    for id in ids:
        wakeups.deliver(id)
"""


def _script(stack: Stack, code: str, *arguments: str) -> None:
    """Run it on the portal's own database and Valkey, in a process that the clock leaves out."""
    variables = stack.variables() | LOCAL | {"DJANGO_SETTINGS_MODULE": "portal.settings"}
    command = [sys.executable, "-c", f"import sys, django; django.setup()\n{code}", *arguments]
    done = subprocess.run(
        command, env=variables, cwd=stacks.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
