"""Who has a worker's name, and what operators may say of a worker."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from datetime import timedelta

import pytest
from django.db import connection
from django.db.models import F
from django_scopes import scopes_disabled

from accounts.errors import BadRequest, NotFound
from accounts.models import AuditEvent, User
from tests.jobs import together
from worker import identity, queries, services
from worker.identity import Identity
from worker.models import Worker, WorkerState
from worker.services import NameTaken

pytestmark = pytest.mark.django_db

FIRST = Identity("gpu0", "0", "H200", "here", 1, "boot:1:1:1", "v1")
SECOND = replace(FIRST, host="there", pid=2, life="boot:2:2:2", version="v2")


def fall_silent(seconds: int = 3600) -> None:
    Worker.objects.update(heartbeat_at=F("heartbeat_at") - timedelta(seconds=seconds))


def events() -> list[tuple[str, str, str, object]]:
    with scopes_disabled():
        rows = AuditEvent.objects.order_by("number")
        return list(rows.values_list("action", "actor_label", "target_label", "changes"))


# --- Names ------------------------------------------------------------------------------------


def test_a_name_that_is_free_is_given() -> None:
    row = services.claim(FIRST)
    assert (row.name, row.gpu, row.gpu_kind, row.host, row.pid, row.life, row.version) == (
        "gpu0",
        "0",
        "H200",
        "here",
        1,
        "boot:1:1:1",
        "v1",
    )
    assert row.state == "starting"


def test_the_same_process_may_ask_again() -> None:
    assert services.claim(FIRST).pk == services.claim(FIRST).pk


def test_the_name_of_one_that_is_alive_elsewhere_is_refused() -> None:
    services.claim(FIRST)
    with pytest.raises(NameTaken, match=r"^gpu0 runs on here \(pid 1\); choose another name\.$"):
        services.claim(SECOND)
    assert Worker.objects.get().life == FIRST.life


def test_the_name_of_one_that_is_silent_is_taken_over() -> None:
    services.claim(FIRST)
    fall_silent()
    row = services.claim(SECOND)
    assert (row.host, row.pid, row.life, row.version) == ("there", 2, SECOND.life, "v2")
    assert services.beat(FIRST, state=WorkerState.RUNNING) is None
    assert Worker.objects.get().state == "starting"


def test_silence_of_less_than_a_lease_is_not_enough() -> None:
    services.claim(FIRST)
    fall_silent(20)
    with pytest.raises(NameTaken):
        services.claim(SECOND)


def test_the_name_of_one_that_has_stopped_is_free_at_once() -> None:
    services.claim(FIRST)
    services.beat(FIRST, state=WorkerState.STOPPED)
    assert services.claim(SECOND).life == SECOND.life


def test_the_name_of_one_that_was_killed_on_this_host_is_free_at_once() -> None:
    killed = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    services.claim(replace(FIRST, life=identity.life_of(killed.pid)))
    with pytest.raises(NameTaken):
        services.claim(SECOND)
    killed.kill()
    killed.wait()
    assert services.claim(SECOND).life == SECOND.life


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("known", [False, True])
def test_of_two_that_come_at_once_one_gets_the_name(known: bool) -> None:
    if known:
        services.claim(replace(FIRST, life="an earlier one"))
        fall_silent()
    got = together(lambda: services.claim(FIRST), lambda: services.claim(SECOND))
    (winner,) = [row for row in got if isinstance(row, Worker)]
    (loser,) = [row for row in got if isinstance(row, Exception)]
    assert type(loser) is NameTaken
    assert Worker.objects.get().life == winner.life


@pytest.mark.django_db(transaction=True)
def test_a_silent_one_that_comes_back_and_one_that_takes_over_do_not_both_have_it() -> None:
    services.claim(FIRST)
    for _ in range(5):
        fall_silent()
        back, taker = together(
            lambda: services.beat(FIRST, state=WorkerState.RUNNING), lambda: claimed(SECOND)
        )
        assert (back is None) == isinstance(taker, Worker)
        Worker.objects.update(life=FIRST.life)


def claimed(me: Identity) -> Worker | None:
    try:
        return services.claim(me)
    except NameTaken:
        return None


def test_the_next_life_is_as_drained_as_the_last_but_is_not_told_to_exit() -> None:
    services.claim(FIRST)
    services.drain(actor=None, name="gpu0", exit_when_drained=True)
    services.beat(FIRST, state=WorkerState.STOPPED, error="of the last life")
    row = services.claim(SECOND)
    assert (row.draining, row.exit_when_drained, row.error) == (True, False, "")


def test_a_worker_of_the_version_before_can_write_its_row() -> None:
    """It knows nothing of the columns that came since, and says its GPU as a number."""
    with connection.cursor() as cursor:
        for name, gpu in (("old", 3), ("older", None)):
            cursor.execute(
                "INSERT INTO worker_worker (name, host, pid, gpu, gpu_kind, state, loaded_model, "
                "in_flight, tokens_per_second, swaps, draining, error, started_at, heartbeat_at) "
                "VALUES (%s, 'h', 1, %s, '', 'idle', '', 0, 0, 0, false, '', now(), now())",
                [name, gpu],
            )
    rows = Worker.objects.order_by("name").values_list("name", "gpu", "life", "version")
    assert list(rows) == [("old", "3", "", ""), ("older", None, "", "")]
    with pytest.raises(NameTaken):
        services.claim(replace(FIRST, name="old"))


# --- What the queue and operators see ---------------------------------------------------------


def test_who_is_silent_or_stopped_is_not_alive() -> None:
    for name in ("fine", "silent", "stopped"):
        services.claim(replace(FIRST, name=name))
    long_ago = F("heartbeat_at") - timedelta(seconds=31)
    Worker.objects.filter(name="silent").update(heartbeat_at=long_ago)
    Worker.objects.filter(name="stopped").update(state=WorkerState.STOPPED)
    assert [each.name for each in queries.alive()] == ["fine"]
    assert [(row.name, row.is_alive) for row in queries.workers()] == [
        ("fine", True),
        ("silent", False),
        ("stopped", False),
    ]
    assert queries.workers().get(name="silent").silent >= timedelta(seconds=31)


# --- Drain, resume, forget ----------------------------------------------------------------------


def test_a_drain_and_a_resume_are_kept_and_audited_once(operator: User) -> None:
    services.claim(FIRST)
    services.drain(actor=operator, name="gpu0")
    services.drain(actor=operator, name="gpu0")
    assert Worker.objects.get().draining is True
    services.resume(actor=None, name="gpu0")
    services.resume(actor=None, name="gpu0")
    assert Worker.objects.get().draining is False
    assert events() == [
        ("worker.drained", operator.email, "gpu0", {"draining": [False, True]}),
        ("worker.resumed", "system", "gpu0", {"draining": [True, False]}),
    ]


def test_a_drained_worker_may_be_told_to_exit_later() -> None:
    services.claim(FIRST)
    services.drain(actor=None, name="gpu0")
    assert services.drain(actor=None, name="gpu0", exit_when_drained=True).exit_when_drained
    assert events()[1][3] == {"exit_when_drained": [False, True]}


def test_a_new_drain_does_not_take_the_last_ones_end_for_its_own() -> None:
    services.claim(FIRST)
    services.beat(FIRST, state=WorkerState.DRAINED)
    assert services.drain(actor=None, name="gpu0").state == "idle"
    services.beat(FIRST, state=WorkerState.DRAINED)
    assert services.drain(actor=None, name="gpu0").state == "drained"


def test_a_worker_that_is_alive_is_not_forgotten_one_that_is_not_is() -> None:
    services.claim(FIRST)
    with pytest.raises(BadRequest, match=r"^gpu0 is alive on here: stop it first\.$"):
        services.forget(actor=None, name="gpu0")
    fall_silent()
    services.forget(actor=None, name="gpu0")
    assert Worker.objects.count() == 0
    assert [event[:3] for event in events()] == [("worker.forgotten", "system", "gpu0")]


@pytest.mark.parametrize("service", [services.drain, services.resume, services.forget])
def test_a_worker_that_there_is_not_is_told(service: object) -> None:
    with pytest.raises(NotFound, match=r"^There is no worker 'gpu7'\.$"):
        service(actor=None, name="gpu7")  # type: ignore[operator]
    assert events() == []
