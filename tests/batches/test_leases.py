"""Leases: one worker a chunk, fencing, results counted once; on PostgreSQL, with real threads."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from django.db import connection, transaction
from django.utils import timezone
from django_scopes import scopes_disabled

from batches import policy
from batches.models import Batch, Chunk, Result
from batches.models.batches import ChunkState, Status
from batches.services import batches, halts, leases
from batches.services.finalization import finalize_batch
from batches.services.leases import Lease, LeaseLost
from models_registry.services import register_model
from tests import jobs
from tests.conftest import Person
from tests.jobs import outcome

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.usefixtures("own_storage", "wakeups_sent", "echo"),
]
threaded = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _small_chunks(settings: Any) -> None:
    settings.CHUNK_REQUESTS = 10


def next_lease(owner: str = "worker", **options: Any) -> Lease | None:
    given = {"loaded": "", "residency": timedelta(0)} | options
    return leases.lease_next(owner=owner, **given)


def chunk_of(lease: Lease) -> Chunk:
    with scopes_disabled():
        return Chunk.objects.get(pk=lease.chunk_id)


def payload(batch: Batch, line: int) -> bytes:
    with scopes_disabled():
        return bytes(Result.objects.get(batch=batch, line=line).payload)


# --- Getting a chunk ------------------------------------------------------------------------


def test_what_comes_next_is_another_model_that_has_a_chunk_and_is_not_avoided(
    owner: Person,
) -> None:
    register_model(name="other", source="none", engine="instant")
    jobs.running(owner.caller, 3)
    given: dict[str, Any] = {"owner": "worker", "residency": timedelta(days=1), "asked": {}}
    assert leases.upcoming(loaded="echo", **given) == ""
    assert leases.upcoming(loaded="other", **given) == "echo"
    assert leases.upcoming(loaded="other", **given, asleep=["echo"]) == ""
    assert leases.upcoming(loaded="other", **given, avoid=["echo"]) == ""


def test_nothing_waits_nothing_is_leased() -> None:
    assert next_lease() is None


def test_a_lease_says_all_that_a_worker_needs(owner: Person) -> None:
    batch = jobs.running(owner.caller, 15)
    lease = jobs.lease("gpu0")
    chunk = jobs.chunks(batch)[0]
    assert lease == Lease(
        chunk_id=chunk.pk,
        fencing_token=1,
        attempts=0,
        start=0,
        end=10,
        batch_id=batch.pk,
        endpoint=jobs.ENDPOINT,
        model="echo",
        input_name=batch.input_file.storage_name,
        index_name=batch.index_name,
        charged=pytest.approx(chunk.tokens / policy.DEFAULT_SPEED),
    )
    assert (chunk.state, chunk.lease_owner) == (ChunkState.LEASED, "gpu0")
    assert chunk.lease_expires_at is not None
    assert abs(chunk.lease_expires_at - timezone.now() - timedelta(seconds=30)) < timedelta(hours=1)


def test_chunks_are_leased_in_execution_order_each_once(owner: Person) -> None:
    jobs.running(owner.caller, 25)
    assert [(lease.start, lease.end) for lease in iter(next_lease, None)] == [
        (0, 10),
        (10, 20),
        (20, 25),
    ]


def test_trap_09_a_higher_priority_goes_first(owner: Person) -> None:
    low = jobs.running(owner.caller, 1, priority="low")
    normal = jobs.running(owner.caller, 1)
    high = jobs.running(owner.caller, 1, priority="high")
    order = [lease.batch_id for lease in iter(next_lease, None)]
    assert order == [high.pk, normal.pk, low.pk]


def test_only_the_loaded_models_chunks_are_leased_when_asked(owner: Person) -> None:
    register_model(name="other", source="none", engine="instant")
    jobs.running(owner.caller, [jobs.line("a", model="other")])
    assert next_lease(loaded="echo", only="echo") is None
    assert jobs.lease(loaded="other", only="other").model == "other"


def test_a_model_to_avoid_is_left_out(owner: Person) -> None:
    register_model(name="other", source="none", engine="instant")
    jobs.running(owner.caller, 1)
    jobs.running(owner.caller, [jobs.line("a", model="other")])
    assert jobs.lease(avoid=["echo"]).model == "other"
    assert next_lease(avoid=["echo"]) is None


@pytest.mark.parametrize("status", [each for each in Status.values if each != Status.IN_PROGRESS])
def test_a_batch_that_is_not_in_progress_is_skipped(owner: Person, status: str) -> None:
    batch = jobs.running(owner.caller, 1)
    jobs.change(batch, status=status)
    assert next_lease() is None
    assert leases._claim(batch.pk, "worker") is None
    assert jobs.states(batch) == [("ready", 0)]


def test_when_others_took_a_batchs_last_chunk_the_next_batch_is_served(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = jobs.running(owner.caller, 1), jobs.running(owner.caller, 1)
    with scopes_disabled():
        waiting = leases.queries.waiting_batches()
    jobs.lease("faster")
    monkeypatch.setattr(leases.queries, "waiting_batches", lambda avoid, held: waiting)
    assert [each.batch for each in waiting["echo"]] == [first.pk, second.pk]
    assert jobs.lease("slower").batch_id == second.pk
    assert next_lease() is None


@threaded
def test_trap_06_two_workers_never_get_the_same_chunk(owner: Person) -> None:
    one, other = jobs.running(owner.caller, 60), jobs.running(owner.caller, 60)

    def take_all() -> list[Lease]:
        return [*iter(lambda: next_lease(), None)]

    taken = jobs.together(*[take_all] * 5)
    ids = [lease.chunk_id for leased in taken for lease in leased]  # type: ignore[union-attr]
    assert sorted(ids) == sorted(chunk.pk for chunk in [*jobs.chunks(one), *jobs.chunks(other)])
    assert len(ids) == 12


@threaded
def test_a_chunk_that_another_worker_is_just_taking_is_passed_over(owner: Person) -> None:
    batch = jobs.running(owner.caller, 20)
    with transaction.atomic(), scopes_disabled():
        Chunk.objects.select_for_update().get(pk=jobs.chunks(batch)[0].pk)
        [lease] = jobs.together(next_lease)
    assert isinstance(lease, Lease)
    assert lease.start == 10


# --- Saving ---------------------------------------------------------------------------------


def test_results_and_their_counts_are_saved_together(owner: Person) -> None:
    batch = jobs.running(owner.caller, 10)
    lease = jobs.lease()
    found = [
        outcome(1, input=5, cached=3, output=7, reasoning=2),
        outcome(2, ok=False, input=1),
        outcome(3, output=1),
    ]
    leases.save(lease=lease, outcomes=found, finished=False)
    again = jobs.fresh(batch)
    assert jobs.journal(batch) == [1, 2, 3]
    assert payload(batch, 2) == found[1].payload
    assert (again.total, again.completed, again.failed) == (10, 2, 1)
    tokens = (
        again.input_tokens,
        again.cached_tokens,
        again.output_tokens,
        again.reasoning_tokens,
    )
    assert tokens == (6, 3, 8, 2)


def test_the_first_result_wins_and_is_counted_once(owner: Person) -> None:
    batch = jobs.running(owner.caller, 10)
    lease = jobs.lease()
    first = outcome(1, said="first", output=1)
    leases.save(lease=lease, outcomes=[first], finished=False)
    second = [outcome(1, ok=False, said="second", output=9), outcome(2)]
    leases.save(lease=lease, outcomes=second, finished=False)
    leases.save(lease=lease, outcomes=second, finished=False)
    assert payload(batch, 1) == first.payload
    assert jobs.counters(batch) == (10, 2, 0)
    assert jobs.fresh(batch).output_tokens == 1


def test_a_line_twice_in_one_save_is_counted_once(owner: Person) -> None:
    batch = jobs.running(owner.caller, 10)
    first = outcome(1, said="first", output=1)
    both = [first, outcome(1, ok=False, said="second", output=9)]
    leases.save(lease=jobs.lease(), outcomes=both, finished=False)
    assert payload(batch, 1) == first.payload
    assert jobs.counters(batch) == (10, 1, 0)
    assert jobs.fresh(batch).output_tokens == 1


def test_bytes_are_saved_as_they_are(owner: Person) -> None:
    batch = jobs.running(owner.caller, 1)
    bytes_of_all_kinds = bytes(range(256)) + "%s é 😀 \\x00 '".encode()
    given = leases.Outcome(1, True, bytes_of_all_kinds)
    leases.save(lease=jobs.lease(), outcomes=[given], finished=False)
    assert payload(batch, 1) == bytes_of_all_kinds


def test_a_saved_line_is_not_run_again(owner: Person) -> None:
    jobs.running(owner.caller, 10)
    lease = jobs.lease()
    leases.save(lease=lease, outcomes=[outcome(2), outcome(5)], finished=False)
    assert leases.saved_lines(lease, [1, 2, 3]) == {2}


def test_the_end_of_the_last_chunk_sends_the_batch_to_finalizing(
    owner: Person, wakeups_sent: list[Any], django_capture_on_commit_callbacks: Any
) -> None:
    batch = jobs.running(owner.caller, 20)
    first, last = jobs.lease(), jobs.lease()
    jobs.finish(last)
    assert jobs.fresh(batch).status == Status.IN_PROGRESS
    with django_capture_on_commit_callbacks(execute=True):
        jobs.finish(first)
    assert jobs.fresh(batch).status == Status.FINALIZING
    assert jobs.states(batch) == [("done", 0), ("done", 0)]
    assert wakeups_sent == [("batches.tasks.finalize", batch.pk)]


@threaded
@pytest.mark.parametrize("round", range(3))
def test_the_last_two_chunks_at_the_same_time_make_one_finalizing(
    owner: Person, wakeups_sent: list[Any], round: int
) -> None:
    batch = jobs.running(owner.caller, 40)
    held = [jobs.lease() for _ in range(4)]
    wakeups_sent.clear()
    calls: list[Callable[[], None]] = [lambda lease=lease: jobs.finish(lease) for lease in held]  # type: ignore[misc]
    assert jobs.together(*calls) == [None] * 4
    assert jobs.fresh(batch).status == Status.FINALIZING
    assert jobs.counters(batch) == (40, 40, 0)
    assert wakeups_sent == [("batches.tasks.finalize", batch.pk)]


# --- Fencing --------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [False, True])
def test_an_old_token_saves_nothing(owner: Person, finished: bool) -> None:
    batch = jobs.running(owner.caller, 10)
    lease = jobs.lease("slow")
    jobs.expire_lease(lease.chunk_id)
    assert leases.release_expired() == 1
    successor = jobs.lease("quick")
    with pytest.raises(LeaseLost):
        leases.save(lease=lease, outcomes=[outcome(1, output=5)], finished=finished)
    assert jobs.journal(batch) == []
    assert jobs.counters(batch) == (10, 0, 0)
    assert jobs.fresh(batch).output_tokens == 0
    assert chunk_of(successor).lease_owner == "quick"
    jobs.finish(successor)
    assert jobs.counters(batch) == (10, 10, 0)


def test_a_finished_chunk_takes_no_more_results(owner: Person) -> None:
    """As when a commit arrived but its answer did not, and the save is tried again."""
    batch = jobs.running(owner.caller, 10)
    lease = jobs.lease()
    jobs.finish(lease)
    with pytest.raises(LeaseLost):
        jobs.finish(lease)
    assert jobs.counters(batch) == (10, 10, 0)


def test_a_chunk_that_was_released_but_not_taken_yet_takes_no_results(owner: Person) -> None:
    batch = jobs.running(owner.caller, 10)
    lease = jobs.lease()
    leases.give_back(lease)
    with pytest.raises(LeaseLost):
        jobs.finish(lease)
    assert jobs.states(batch) == [("ready", 0)]


# --- Letting go -----------------------------------------------------------------------------


def test_trap_05_a_dead_workers_chunk_is_leased_again_and_counts_an_attempt(
    owner: Person,
) -> None:
    batch = jobs.running(owner.caller, 20)
    dead, alive = jobs.lease("dead"), jobs.lease("alive")
    jobs.expire_lease(dead.chunk_id)
    assert leases.release_expired() == 1
    assert jobs.states(batch) == [("ready", 1), ("leased", 0)]
    again = jobs.lease("other")
    assert (again.chunk_id, again.attempts) == (dead.chunk_id, 1)
    assert again.fencing_token > dead.fencing_token
    assert chunk_of(alive).fencing_token == alive.fencing_token


def test_a_chunk_given_back_counts_no_attempt(owner: Person) -> None:
    batch = jobs.running(owner.caller, 10)
    lease = jobs.lease()
    leases.give_back(lease)
    assert jobs.states(batch) == [("ready", 0)]
    assert chunk_of(lease).lease_owner == ""
    assert jobs.lease().attempts == 0


@threaded
def test_a_chunk_is_given_back_with_a_wake_up_or_without_one(
    owner: Person, wakeups_sent: list[tuple[str, ...]]
) -> None:
    batch = jobs.running(owner.caller, 10)
    for wake in (True, False):
        lease = jobs.lease()
        wakeups_sent.clear()
        leases.give_back(lease, wake=wake)
        assert jobs.states(batch) == [("ready", 0)]
        assert (("worker.tasks.wake",) in wakeups_sent) is wake


def test_only_its_holder_gives_a_chunk_back(owner: Person) -> None:
    batch = jobs.running(owner.caller, 10)
    old = jobs.lease()
    leases.give_back(old)
    jobs.lease()
    leases.give_back(old)
    assert jobs.states(batch) == [("leased", 0)]


def test_a_chunk_that_is_done_is_not_given_back(owner: Person) -> None:
    batch = jobs.running(owner.caller, 10)
    lease = jobs.lease()
    jobs.finish(lease)
    leases.give_back(lease)
    assert jobs.states(batch) == [("done", 0)]


def test_a_save_shows_life_and_resets_the_attempts(owner: Person) -> None:
    batch = jobs.running(owner.caller, 10)
    for _ in range(3):
        jobs.expire_lease(jobs.lease().chunk_id)
        leases.release_expired()
    lease = jobs.lease()
    assert lease.attempts == 3
    leases.save(lease=lease, outcomes=[outcome(1)], finished=False)
    assert jobs.states(batch) == [("leased", 0)]


def test_a_worker_that_starts_again_holds_nothing(owner: Person) -> None:
    batch = jobs.running(owner.caller, 30)
    jobs.lease("gpu0"), jobs.lease("gpu1"), jobs.lease("gpu0")
    assert leases.release_owned_by("gpu0") == 2
    assert jobs.states(batch) == [("ready", 1), ("leased", 0), ("ready", 1)]


@pytest.mark.parametrize("let_go", ["give_back", "release_expired", "release_owned_by"])
def test_letting_go_wakes_the_gpu_workers(
    owner: Person,
    wakeups_sent: list[Any],
    django_capture_on_commit_callbacks: Any,
    let_go: str,
) -> None:
    batch = jobs.running(owner.caller, 10)
    lease = jobs.lease("gpu0")
    jobs.expire_lease(lease.chunk_id)
    with django_capture_on_commit_callbacks(execute=True):
        if let_go == "give_back":
            leases.give_back(lease)
        elif let_go == "release_expired":
            leases.release_expired()
        else:
            leases.release_owned_by("gpu0")
    assert wakeups_sent[0] == ("worker.tasks.wake",)
    assert jobs.states(batch)[0][0] == "ready"


# --- Keeping --------------------------------------------------------------------------------


def test_renewing_keeps_a_lease_and_tells_its_batchs_status(owner: Person) -> None:
    batch = jobs.running(owner.caller, 30)
    one, other, gone = jobs.lease(), jobs.lease(), jobs.lease()
    jobs.expire_lease(one.chunk_id)
    leases.give_back(gone)
    before = chunk_of(one).lease_expires_at
    assert leases.renew([one, other, gone]) == {
        one.chunk_id: "in_progress",
        other.chunk_id: "in_progress",
    }
    after = chunk_of(one).lease_expires_at
    assert before is not None
    assert after is not None
    assert after > before
    assert leases.release_expired() == 0
    batches.cancel_batch(actor=owner.caller, batch=batch)
    assert leases.renew([one]) == {one.chunk_id: "cancelling"}
    assert leases.renew([]) == {}


def test_renewing_with_an_old_token_keeps_nothing(owner: Person) -> None:
    jobs.running(owner.caller, 10)
    old = jobs.lease("old")
    leases.give_back(old)
    new = jobs.lease("new")
    expires = chunk_of(new).lease_expires_at
    assert leases.renew([old]) == {}
    assert chunk_of(new).lease_expires_at == expires


def test_a_cancelled_batchs_lease_may_still_save_what_is_finished(owner: Person) -> None:
    batch = jobs.running(owner.caller, 10)
    lease = jobs.lease()
    batches.cancel_batch(actor=owner.caller, batch=batch)
    leases.save(lease=lease, outcomes=[outcome(1)], finished=False)
    leases.give_back(lease)
    assert next_lease() is None
    finalize_batch(batch.pk)
    ended = jobs.fresh(batch)
    assert (ended.status, ended.completed, ended.failed) == (Status.CANCELLED, 1, 9)


def test_the_last_chunk_of_a_cancelled_batch_wakes_its_finalizing(
    owner: Person, wakeups_sent: list[Any], django_capture_on_commit_callbacks: Any
) -> None:
    batch = jobs.running(owner.caller, 10)
    lease = jobs.lease()
    batches.cancel_batch(actor=owner.caller, batch=batch)
    with django_capture_on_commit_callbacks(execute=True):
        jobs.finish(lease)
    assert jobs.fresh(batch).status == Status.CANCELLING
    assert wakeups_sent == [("batches.tasks.finalize", batch.pk)]


# --- Suspects -------------------------------------------------------------------------------


def test_engine_deaths_are_counted_for_each_line(owner: Person) -> None:
    batch, other = jobs.running(owner.caller, 10), jobs.running(owner.caller, 10)
    leases.accuse(batch.pk, [3, 1])
    leases.accuse(batch.pk, [3])
    leases.accuse(other.pk, [3])
    assert leases.suspects(batch.pk) == {1: 1, 3: 2}
    assert leases.suspects(other.pk) == {3: 1}


# --- Everything at once ---------------------------------------------------------------------


class Clumsy:
    """A worker that does anything it may do, in any order, also what it no longer may."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.chance = random.Random(seed)
        self.held: list[Lease] = []
        self.lost: list[Lease] = []

    def run(self, batch: Batch, steps: int) -> None:
        for _ in range(steps):
            self.chance.choice([self.lease, self.save, self.save, self.finish, self.let_go])()

    def lease(self) -> None:
        if lease := next_lease(self.name):
            self.held.append(lease)

    def save(self, *, finished: bool = False) -> None:
        if not (known := self.held + self.lost):
            return
        lease = self.chance.choice(known)
        lines = range(lease.start + 1, lease.end + 1)
        some = lines if finished else self.chance.sample(lines, self.chance.randint(0, len(lines)))
        found = [outcome(at, ok=self.chance.random() < 0.8, output=at) for at in some]
        try:
            leases.save(lease=lease, outcomes=found, finished=finished)
        except LeaseLost:
            self.forget(lease)
        else:
            if finished:
                self.forget(lease)

    def finish(self) -> None:
        self.save(finished=True)

    def let_go(self) -> None:
        if not self.held:
            return
        lease = self.chance.choice(self.held)
        if self.chance.random() < 0.5:
            leases.give_back(lease)
        else:
            leases.release_owned_by(self.name)
        self.forget(lease)

    def forget(self, lease: Lease) -> None:
        """Remember it among those that are lost: saves with it go on, and must fail."""
        if lease in self.held:
            self.held.remove(lease)
            self.lost.append(lease)


def assert_counters_are_the_journal(batch: Batch) -> None:
    with scopes_disabled():
        rows = list(Result.objects.filter(batch=batch).values_list("line", "ok"))
    again = jobs.fresh(batch)
    assert again.completed == sum(ok for _, ok in rows)
    assert again.failed == sum(not ok for _, ok in rows)
    assert again.output_tokens == sum(line for line, _ in rows)
    assert len({line for line, _ in rows}) == len(rows)


def done_lines(batch: Batch) -> set[int]:
    done = [chunk for chunk in jobs.chunks(batch) if chunk.state == ChunkState.DONE]
    return {at + 1 for chunk in done for at in range(chunk.start, chunk.end)}


@pytest.mark.parametrize("seed", range(4))
def test_the_counters_are_the_journal_after_any_order_of_steps(owner: Person, seed: int) -> None:
    batch = jobs.running(owner.caller, 45)
    workers = [Clumsy(name, seed * 10 + at) for at, name in enumerate("abc")]
    chance = random.Random(seed)
    for _ in range(80):
        chance.choice(workers).run(batch, 1)
        assert done_lines(batch) <= set(jobs.journal(batch))
    assert_counters_are_the_journal(batch)


@threaded
@pytest.mark.parametrize("seed", range(2))
def test_the_counters_are_the_journal_after_workers_ran_against_each_other(
    owner: Person, seed: int
) -> None:
    batch = jobs.running(owner.caller, 95)
    workers = [Clumsy(name, seed * 10 + at) for at, name in enumerate("abcd")]
    calls = [lambda worker=worker: worker.run(batch, 60) for worker in workers]  # type: ignore[misc]
    assert jobs.together(*calls) == [None] * 4
    assert_counters_are_the_journal(batch)
    assert done_lines(batch) <= set(jobs.journal(batch))
    leases.release_owned_by("a"), leases.release_owned_by("b")
    leases.release_owned_by("c"), leases.release_owned_by("d")
    for lease in iter(next_lease, None):
        jobs.finish(lease)
    assert jobs.fresh(batch).status == Status.FINALIZING
    assert jobs.journal(batch) == list(range(1, 96))
    assert_counters_are_the_journal(batch)
    finalize_batch(batch.pk)
    ended = jobs.fresh(batch)
    written = [*jobs.content(ended.output_file), *jobs.content(ended.error_file)]
    assert sorted(int(each["custom_id"]) for each in written) == list(range(1, 96))


@threaded
def test_saves_renewals_and_the_end_of_a_batch_never_deadlock(owner: Person) -> None:
    batch = jobs.running(owner.caller, 100)
    held = [jobs.lease() for _ in range(10)]
    jobs.change(batch, status=Status.CANCELLING, cancelling_at=timezone.now() - timedelta(hours=1))

    def save(some: list[Lease]) -> None:
        for lease in some:
            for line in range(lease.start + 1, lease.end + 1):
                try:
                    leases.save(lease=lease, outcomes=[outcome(line)], finished=False)
                except LeaseLost:
                    return

    def renew() -> None:
        for _ in range(30):
            leases.renew([*reversed(held)])

    found = jobs.together(
        lambda: save(held[:5]),
        lambda: save([*reversed(held[5:])]),
        renew,
        lambda: finalize_batch(batch.pk),
        lambda: [leases.release_expired() for _ in range(20)],
    )
    assert [each for each in found if isinstance(each, Exception)] == []
    finalize_batch(batch.pk)
    ended = jobs.fresh(batch)
    assert (ended.status, ended.completed + ended.failed) == (Status.CANCELLED, 100)
    assert len(jobs.content(ended.output_file)) == ended.completed
    assert len(jobs.content(ended.error_file)) == ended.failed


@threaded
def test_a_chunk_that_a_worker_was_cut_off_from_amid_a_save_holds_nobody_up(owner: Person) -> None:
    """Its transaction keeps the row locked until the server ends it: sweeps do not wait for that."""
    jobs.running(owner.caller, 20)
    stuck, other = jobs.lease(), jobs.lease()
    for lease in (stuck, other):
        jobs.expire_lease(lease.chunk_id)
    with transaction.atomic(), scopes_disabled():
        Chunk.objects.select_for_update().get(pk=stuck.chunk_id)
        assert jobs.together(leases.release_expired) == [1]
    assert leases.release_expired() == 1


@threaded
def test_a_save_that_breaks_off_leaves_neither_results_nor_counts(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I2: kill the session after the journal is written, before it is counted."""
    batch = jobs.running(owner.caller, 10)
    lease = jobs.lease()

    def broken(*_: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    monkeypatch.setattr(leases, "_count", broken)
    [error] = jobs.together(lambda: jobs.finish(lease))
    assert isinstance(error, Exception)
    monkeypatch.undo()
    assert jobs.journal(batch) == []
    assert jobs.counters(batch) == (10, 0, 0)
    assert jobs.states(batch) == [("leased", 0)]


def test_tokens_only_ever_grow(owner: Person) -> None:
    jobs.running(owner.caller, 10)
    tokens = []
    for _ in range(4):
        lease = jobs.lease()
        tokens.append(lease.fencing_token)
        leases.give_back(lease)
    assert all(one < other for one, other in pairwise(tokens))


def test_what_is_avoided_does_not_crowd_out_the_rest(owner: Person) -> None:
    """A thousand batches of a model that does not load must not hide the one that could run."""
    avoided, other = jobs.running(owner.caller, 1), jobs.running(owner.caller, 1)
    with scopes_disabled():
        found = leases.queries.waiting_batches([avoided.pk])
        assert [each.batch for each in found["echo"]] == [other.pk]
        assert leases.queries.waiting_batches(["echo"]) == {}


# --- What operators hold ----------------------------------------------------------------------


def held(batch: Batch) -> None:
    jobs.change(batch, held_at=timezone.now(), held_why="operator")


def halted_model(batch: Batch) -> None:
    halts.halt_model(actor=None, name="echo", halt="paused")


def halted_organization(batch: Batch) -> None:
    halts.halt_organization(actor=None, organization=batch.organization, halt="paused")


HOLDS = [held, halted_model, halted_organization]


@pytest.mark.parametrize("hold", HOLDS)
def test_what_is_held_is_not_leased_not_wanted_and_let_go(
    owner: Person, hold: Callable[[Batch], None]
) -> None:
    batch = jobs.running(owner.caller, 20)
    lease = jobs.lease()
    assert leases.renew([lease]) == {lease.chunk_id: "in_progress"}
    hold(batch)
    assert next_lease() is None
    assert leases._claim(batch.pk, "worker") is None
    assert not leases.is_wanted("echo")
    assert leases.renew([lease]) == {lease.chunk_id: "held"}
    leases.save(lease=lease, outcomes=[outcome(1)], finished=False)
    leases.give_back(lease)
    assert jobs.states(batch) == [("ready", 0), ("ready", 0)]
    assert jobs.counters(batch) == (20, 1, 0)


@pytest.mark.parametrize("name", ["echo", ""])
def test_what_drains_ends_what_runs_and_begins_nothing(owner: Person, name: str) -> None:
    batch = jobs.running(owner.caller, 20)
    lease = jobs.lease()
    if name:
        halts.halt_model(actor=None, name=name, halt="draining")
    else:
        halts.halt_organization(actor=None, organization=batch.organization, halt="draining")
    assert leases.renew([lease]) == {lease.chunk_id: "in_progress"}
    assert next_lease() is None
    jobs.finish(lease)
    assert jobs.states(batch) == [("done", 0), ("ready", 0)]


def test_held_batches_are_never_leased_whatever_happens_around_them(owner: Person) -> None:
    """Any order of holding, releasing, leasing and giving back."""
    chance, mine = random.Random(7), [jobs.running(owner.caller, 30) for _ in range(3)]
    on_hold, taken = set[str](), list[Lease]()
    for _ in range(120):
        batch = chance.choice(mine)
        what = chance.choice(("hold", "release", "lease", "lease", "give back"))
        if what == "hold":
            held(batch)
            on_hold.add(batch.pk)
        elif what == "release":
            jobs.change(batch, held_at=None, held_why="")
            on_hold.discard(batch.pk)
        elif what == "give back" and taken:
            leases.give_back(taken.pop(chance.randrange(len(taken))))
        elif what == "lease" and (lease := next_lease(loaded="echo", only="echo")):
            assert lease.batch_id not in on_hold
            taken.append(lease)
    assert taken
