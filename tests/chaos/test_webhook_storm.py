"""Kill senders, web and Valkey while events go to a bad receiver: each arrives, and none is lost."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests import stack as stacks
from tests.chaos.witness import QUICK, database, ended
from tests.receiver import Came, Receiver, receiving
from tests.stack import ROOT, Stack, lines, send, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chaos")]

EVENTS, DOOMED, BATCHES, KILLS = 2_000, 25, 10, 14
TRIES = 8
STORM = QUICK | {
    "WEBHOOK_PRIVATE_HOSTS": "127.0.0.1",
    "WEBHOOK_RETRY_SECONDS": ",".join(["0", *["1"] * (TRIES - 1)]),
    "WEBHOOK_PAUSE_SECONDS": "0",
    "WEBHOOK_GRACE_SECONDS": "2",
}
Rows = psycopg.Connection[tuple[Any, ...]]


class _Bad:
    """Fails 30 % of what comes and hangs at 5 %, but never at one event more than four times."""

    def __init__(self) -> None:
        self.visits: Counter[str] = Counter()
        self.taken: set[tuple[str, str]] = set()

    def __call__(self, came: Came) -> int | None:
        if came.path == "/dead":
            return 500
        self.visits[came.id] += 1
        visit = self.visits[came.id]
        chance = int(hashlib.sha256(f"{came.id} {visit}".encode()).hexdigest(), 16) % 100
        if visit <= 4 and chance < 35:
            return None if chance < 5 else 500
        self.taken.add((came.path, came.id))
        return 200


def test_every_event_arrives_and_exactly_the_hopeless_die(tmp_path: Path) -> None:
    """Traps 11 and 14: no event without its change, and no delivery lost with a process."""
    bad = _Bad()
    with (
        receiving(bad) as receiver,
        stacks.running(tmp_path, **STORM) as stack,
        database(stack) as rows,
    ):
        stack.instant("echo")
        with _telling(stack, receiver) as told:
            wait_for(lambda: (tmp_path / "told.txt").stat().st_size)  # so all endpoints are there
            killed: list[str] = []
            killer = threading.Thread(target=_kill_at_random, args=(stack, killed))
            killer.start()
            batches = _batches(stack)
            wait_for(lambda: told.poll() is not None, seconds=300)
            killer.join()
            assert len(killed) == KILLS
            written = (tmp_path / "told.txt").read_text().split()
        wait_for(lambda: not _count(rows, "state = 'retrying'"), seconds=300, pause=0.5)
        _assert_all_written(rows, written, batches)
        _assert_all_taken(rows, bad, receiver)
        _assert_only_the_hopeless_died(rows)


def _batches(stack: Stack) -> list[str]:
    """Some real batches beside the events that are written for the test."""
    client, made = stack.client(max_retries=10), []
    for at in range(BATCHES):
        once = {"Idempotency-Key": f"batch {at}"}
        made.append(ended(client, send(client, lines(2), extra_headers=once).id).id)
    return made


def _kill_at_random(stack: Stack, killed: list[str]) -> None:
    """Kill one thing after another, each once everything is up again; notes what was killed."""
    chance = random.Random(11)
    victims = ["webhooks"] * 5 + ["cpu"] * 2 + ["valkey"] * 3 + ["web"] * 2 + ["beat", "gpu0"]
    chance.shuffle(victims)
    for victim in victims:
        before = wait_for(partial(_alive, stack, victim))
        stack.kill_tree(victim)
        wait_for(partial(stack.restarted, victim, before))
        killed.append(victim)
        stacks.pause(chance.uniform(1.0, 4.0))


def _alive(stack: Stack, child: str) -> int:
    with suppress(KeyError):
        return stack.pid(child)
    return 0


# --- What happens -----------------------------------------------------------------------------


@contextmanager
def _telling(stack: Stack, receiver: Receiver) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes the events, each in a transaction of its own, and prints their ids."""
    variables = stack.variables() | STORM | {"DJANGO_SETTINGS_MODULE": "portal.settings"}
    variables["LOG_STREAM"] = "stderr"
    arguments = [receiver.url(""), str(EVENTS - DOOMED), str(DOOMED)]
    command = [sys.executable, "-c", _TELL, *arguments]
    said, log = stack.data_dir / "told.txt", stack.data_dir / "telling.log"
    with said.open("wb") as out, log.open("wb") as errors:
        process = subprocess.Popen(command, env=variables, cwd=ROOT, stdout=out, stderr=errors)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


_TELL = """
import sys, time, django
django.setup()
from django.db import transaction
from django_scopes import scopes_disabled
from accounts.models import Project, User
from accounts.queries import caller_of_user
from batches.models.events import EventType
from batches.services import events, webhooks
url, count, doomed = sys.argv[1], *map(int, sys.argv[2:])
actor = caller_of_user(User.objects.get())
TYPES = ["batch.completed", "batch.failed", "batch.expired", "batch.in_progress"]

def endpoint(path, types, project):
    webhooks.create_webhook(actor=actor, name=path, url=url + path, event_types=types,
                            project=project, timeout=5)

def tell(type, project, at):
    with transaction.atomic():
        made = events.record(EventType(type), organization=actor.organization, project=project,
                             data={"id": f"batch_{at}"})
    print(made.pk, flush=True)

with scopes_disabled():
    others = [Project.objects.create(organization=actor.organization, name=f"Project {at}")
              for at in range(4)]
    projects = [actor.project, *others]
    for number, project in enumerate(projects):
        for type in TYPES:
            endpoint(f"/{number}/{type}", [type], project)
    endpoint("/dead", ["batch.cancelled"], actor.project)
    for at in range(count):
        tell(TYPES[at % 4], projects[at // 4 % 5], at)
        if at * doomed // count != (at + 1) * doomed // count:
            tell("batch.cancelled", actor.project, at)
        time.sleep(0.01)
"""


# --- What has become of it --------------------------------------------------------------------


def _count(rows: Rows, condition: str) -> int:
    row = rows.execute(f"SELECT count(*) FROM batches_webhookdelivery WHERE {condition}").fetchone()
    assert row is not None
    return int(row[0])


def _assert_all_written(rows: Rows, written: list[str], batches: list[str]) -> None:
    """The events that were told of are there, and those of each batch; of batches nothing else."""
    assert len(set(written)) == len(written) == EVENTS
    found = rows.execute("SELECT id, type, body::json -> 'data' ->> 'id' FROM batches_event")
    everything = {id: (type, about) for id, type, about in found}
    assert set(written) <= everything.keys()
    others = Counter(everything[id] for id in everything.keys() - set(written))
    of_batches = {key: count for key, count in others.items() if key[0].startswith("batch.")}
    # 25, 50 and 75 percent: each once, however often the worker died.
    each = {"batch.in_progress": 1, "batch.progress": 3, "batch.completed": 1}
    assert of_batches == {(type, id): count for id in batches for type, count in each.items()}


def _assert_all_taken(rows: Rows, bad: _Bad, receiver: Receiver) -> None:
    """Every delivery but the hopeless was taken at least once, always with its event's own body."""
    found = rows.execute(
        "SELECT w.url, e.id, e.body FROM batches_webhookdelivery d "
        "JOIN batches_event e ON e.id = d.event_id "
        "JOIN batches_webhookendpoint w ON w.id = d.endpoint_id"
    ).fetchall()
    expected = {(url.removeprefix(receiver.url("")), id): body.encode() for url, id, body in found}
    assert len(expected) == len(found) == EVENTS + 2 * BATCHES
    assert bad.taken == {key for key in expected if key[0] != "/dead"}
    for came in receiver.came:
        assert came.body == expected[came.path, came.id]


def _assert_only_the_hopeless_died(rows: Rows) -> None:
    """After every try that they had, each of them an attempt that is recorded; and no other."""
    dead = rows.execute(
        "SELECT w.name, d.tries, d.error, count(a.id) >= d.tries FROM batches_webhookdelivery d "
        "JOIN batches_webhookendpoint w ON w.id = d.endpoint_id "
        "LEFT JOIN batches_webhookattempt a ON a.delivery_id = d.id "
        "WHERE d.state = 'dead' GROUP BY d.id, w.name"
    ).fetchall()
    assert Counter(dead) == {("/dead", TRIES, "HTTP 500", True): DOOMED}
    assert _count(rows, "state = 'delivered'") == EVENTS - DOOMED + 2 * BATCHES
