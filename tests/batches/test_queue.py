"""The queue on PostgreSQL: what the policy is shown, what a lease writes, and swaps in turn."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.models import Organization
from accounts.services import organizations
from batches import policy
from batches.models import Backlog, Share
from batches.queries import queue as queries
from batches.services import batches, leases
from batches.services.leases import Lease
from models_registry.models import Change, Measurement, Model
from models_registry.services import note_load, note_speed, register_model
from tests import jobs
from tests.conftest import Person
from worker.models import Worker, WorkerState

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.usefixtures("own_storage", "wakeups_sent", "echo"),
]


@pytest.fixture(autouse=True)
def _small_chunks(settings: Any) -> None:
    settings.CHUNK_REQUESTS = 10


def view(asking: str = "worker", kind: str = "") -> policy.View:
    with scopes_disabled():
        return queries.queue_view(policy.Worker(asking, kind))


def share(organization: Organization, **fields: Any) -> Share:
    with scopes_disabled():
        return Share.objects.update_or_create(organization=organization, defaults=fields)[0]


def worker(name: str, loaded: str = "", **fields: Any) -> Worker:
    now = timezone.now()
    given = {"state": WorkerState.RUNNING, "started_at": now, "heartbeat_at": now} | fields
    return Worker.objects.create(name=name, host="h", pid=1, loaded_model=loaded, **given)


def test_what_waits_is_seen_with_its_ready_chunks(owner: Person) -> None:
    batch = jobs.running(owner.caller, 25, priority="high")
    jobs.lease()
    [seen] = view().waiting["echo"]
    ready = jobs.chunks(batch)[1:]
    with scopes_disabled():
        served_at = Backlog.objects.get(batch=batch).served_at
    assert served_at is not None
    times = (batch.created_at, served_at, batch.expires_at)
    assert seen[:3] == (batch.pk, batch.organization_id, policy.HIGH)
    assert seen[3:6] == pytest.approx([each.timestamp() for each in times], abs=1e-5)
    assert seen[6:8] == (sum(chunk.tokens for chunk in ready), 2)


def test_a_lease_charges_its_organization_and_the_charge_fades(owner: Person) -> None:
    batch = jobs.running(owner.caller, 20)
    note_speed("echo", 50.0)
    first, second = jobs.chunks(batch)
    jobs.lease()
    assert view().tenants[batch.organization_id].served == pytest.approx(first.tokens / 50, 0.01)
    earlier = timezone.now() - timedelta(seconds=policy.HALF_LIFE)
    share(owner.caller.organization, served_at=earlier)
    assert view().tenants[batch.organization_id].served == pytest.approx(first.tokens / 100, 0.01)
    jobs.lease()
    with scopes_disabled():
        charged = Share.objects.get().served
    assert charged == pytest.approx(first.tokens / 100 + second.tokens / 50, 0.01)


def test_weights_and_limits_are_kept_by_leases(owner: Person) -> None:
    jobs.running(owner.caller, 30)
    share(owner.caller.organization, weight=3.0, chunks_at_once=2)
    jobs.lease(), jobs.lease()
    assert leases.lease_next(owner="x", loaded="", residency=timedelta(0)) is None
    tenant = view().tenants[owner.caller.organization.pk]
    assert (tenant.weight, tenant.running, tenant.limit) == (3.0, 2, 2)


def test_the_organization_that_had_less_is_served_first(owner: Person, stranger: Person) -> None:
    jobs.running(owner.caller, 1)
    theirs = jobs.running(stranger.caller, 1)
    share(owner.caller.organization, served=100.0)
    assert jobs.lease().batch_id == theirs.pk


def test_a_kind_of_gpu_that_a_model_does_not_fit_gets_none_of_it(owner: Person) -> None:
    jobs.running(owner.caller, 1)
    model = Model.objects.get(name="echo")
    Measurement.objects.create(model=model, gpu="small", unfit_why="no room")
    given = {"owner": "x", "loaded": "", "residency": timedelta(0)}
    assert leases.lease_next(kind="small", **given) is None  # type: ignore[arg-type]
    assert leases.lease_next(kind="large", **given) is not None  # type: ignore[arg-type]


def test_measurements_are_seen_by_kind() -> None:
    for change, seconds in ((Change.LOAD, 40.0), (Change.LOAD, 60.0), (Change.WAKE, 3.0)):
        note_load("echo", change, worker="gpu0", gpu="small", seconds=seconds)
    note_speed("echo", 1_000.0, "small")
    assert view().models["echo"] == policy.Model(
        {"": 1_000.0, "small": 1_000.0}, {"small": 50.0}, frozenset(), {"small": 3.0}
    )


def test_other_workers_are_seen_while_they_are_alive(owner: Person) -> None:
    jobs.running(owner.caller, 20)
    worker("quiet", heartbeat_at=timezone.now() - timedelta(hours=1))
    worker("stopped", state=WorkerState.STOPPED)
    worker("loaded", "echo", gpu_kind="large", draining=True, asleep=["other"])
    worker("loading")
    worker("worker", "old row of the one that asks")
    jobs.lease("loading")
    assert view().workers == [
        policy.Worker("loaded", "large", "echo", draining=True, asleep=frozenset({"other"})),
        policy.Worker("loading", "", "echo"),
        policy.Worker("worker"),
    ]


def test_the_view_takes_as_many_queries_for_many_batches_as_for_one(
    owner: Person, stranger: Person
) -> None:
    def count() -> int:
        with CaptureQueriesContext(connection) as queries:
            view()
        return len(queries)

    jobs.running(owner.caller, 1)
    before = count()
    for person in (owner, stranger, owner):
        jobs.running(person.caller, 15)
    worker("another")
    assert (before, count()) == (5, 5)


@pytest.mark.django_db(transaction=True)
def test_two_workers_that_look_at_once_do_not_both_load_what_one_can_do(owner: Person) -> None:
    register_model(name="other", source="none", engine="instant")
    jobs.running(owner.caller, [jobs.line(f"{at}", model="other") for at in range(30)])
    names = ["one", "two", "three"]
    for name in names:
        worker(name, "echo")
    calls: list[Callable[[], Lease | None]] = [
        lambda name=name: leases.lease_next(  # type: ignore[misc]
            owner=name, loaded="echo", residency=timedelta(hours=9)
        )
        for name in names
    ]
    taken = jobs.together(*calls)
    assert [type(each) for each in taken].count(Lease) == 1
    assert [each is None for each in taken].count(True) == 2


def test_a_chunk_given_back_is_not_charged_for(owner: Person, stranger: Person) -> None:
    jobs.running(owner.caller, 20)
    jobs.running(stranger.caller, 10)
    kept, back = jobs.lease(), jobs.lease()
    assert kept.batch_id != back.batch_id
    leases.give_back(back)
    with scopes_disabled():
        served = dict(Share.objects.values_list("organization_id", "served"))
    paid, free = sorted(served.values(), reverse=True)
    assert (paid, free) == (pytest.approx(kept.charged), 0.0)
    leases.give_back(back)  # and not twice
    with scopes_disabled():
        assert dict(Share.objects.values_list("organization_id", "served")) == served


@pytest.mark.django_db(transaction=True)
def test_workers_that_look_at_once_keep_an_organizations_limit(owner: Person) -> None:
    jobs.running(owner.caller, 80)
    share(owner.caller.organization, chunks_at_once=2)
    calls: list[Callable[[], Lease | None]] = [
        lambda name=name: feed(name)  # type: ignore[misc]
        for name in ("one", "two", "three", "four")
    ]
    taken = jobs.together(*calls)
    assert [type(each) for each in taken].count(Lease) == 2
    assert taken.count(None) == 2


# --- Looking only now and then ------------------------------------------------------------------


def feed(name: str = "worker", loaded: str = "echo", **options: Any) -> Lease | None:
    """The next chunk of the model that the worker has loaded for long, as while it is fed."""
    return leases.lease_next(
        owner=name, loaded=loaded, residency=timedelta(hours=9), only=loaded, **options
    )


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who looked at the queue; what was seen is good for an hour."""
    seen: list[str] = []
    look = queries.queue_view

    def counted(asking: policy.Worker, *args: Any) -> policy.View:
        seen.append(asking.name)
        return look(asking, *args)

    monkeypatch.setattr(leases.queries, "queue_view", counted)
    monkeypatch.setattr(leases, "LOOK_AGAIN_AFTER", 1e9)
    monkeypatch.setattr(leases, "LOOK_AT_MOST", 3600.0)
    return seen


def test_a_worker_that_is_fed_leases_many_chunks_by_one_look(
    owner: Person, stranger: Person, looks: list[str]
) -> None:
    made = [jobs.running(each.caller, 20) for each in (owner, stranger, owner)]
    taken = [feed() for _ in range(6)]
    assert looks == ["worker"]
    assert None not in taken
    # Each organization in turn, and its older batch first, as by six looks.
    assert [each.batch_id for each in taken if each] == [made[at].pk for at in (0, 1, 0, 1, 2, 2)]
    assert feed() is None
    assert looks == ["worker"] * 2


def test_a_look_that_is_out_of_date_leases_nothing_twice(owner: Person, looks: list[str]) -> None:
    jobs.running(owner.caller, 50)
    mine, theirs = feed("a"), [feed("b"), feed("b"), feed("b")]
    rest = [feed("a"), feed("a")]
    ids = [each.chunk_id for each in [mine, *theirs, *rest] if each]
    assert len(set(ids)) == 5
    assert looks == ["a", "b", "a"]


@pytest.mark.parametrize("what", ["suspended", "cancelled"])
def test_what_may_no_longer_run_is_not_leased_by_an_old_look(
    owner: Person, looks: list[str], what: str
) -> None:
    batch = jobs.running(owner.caller, 50)
    assert feed() is not None
    if what == "suspended":
        organizations.suspend_organization(
            actor=None, organization=owner.caller.organization, why="?"
        )
    else:
        batches.cancel_batch(actor=owner.caller, batch=batch)
    assert feed() is None


def test_other_things_to_avoid_need_another_look(owner: Person, looks: list[str]) -> None:
    batch = jobs.running(owner.caller, 50)
    assert feed() is not None
    assert feed(avoid=[batch.pk]) is None
    assert len(looks) == 2


def test_a_look_is_good_for_a_moment_only(
    owner: Person, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.running(owner.caller, 50)
    monkeypatch.setattr(leases, "LOOK_AT_MOST", 0.0)
    assert feed() is not None
    assert feed() is not None
    assert len(looks) == 2
