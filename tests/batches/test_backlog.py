"""What waits of each batch is added up by PostgreSQL: it is always what its chunks say."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.models import Count, F, Q, Sum
from django_scopes import scopes_disabled
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from batches import policy
from batches.models import Backlog, Batch, Chunk
from batches.models.batches import ChunkState, Status
from batches.queries import queue as queries
from batches.services import leases
from batches.services.finalization import finalize_batch
from batches.services.leases import Lease, LeaseLost
from tests import jobs
from tests.conftest import Person

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.usefixtures("own_storage", "wakeups_sent", "echo"),
]


@pytest.fixture(autouse=True)
def _small_chunks(settings: Any) -> None:
    settings.CHUNK_REQUESTS = 10


def kept() -> dict[str, tuple[int, int, int]]:
    """Chunks, requests and tokens that wait, by batch, as the rows have them."""
    with scopes_disabled():
        rows = Backlog.objects.filter(chunks__gt=0)
        return {
            row[0]: row[1:] for row in rows.values_list("batch_id", "chunks", "requests", "tokens")
        }


def added_up() -> dict[str, tuple[int, int, int]]:
    """The same, of the chunks."""
    ready = Q(chunks__state=ChunkState.READY)
    with scopes_disabled():
        rows = Batch.objects.annotate(
            many=Count("chunks", ready),
            requests=Sum(F("chunks__end") - F("chunks__start"), filter=ready),
            tokens=Sum("chunks__tokens", filter=ready),
        ).filter(many__gt=0)
        return {row[0]: row[1:] for row in rows.values_list("pk", "many", "requests", "tokens")}


def backlog(batch: Batch) -> Backlog:
    with scopes_disabled():
        return Backlog.objects.get(batch=batch)


def test_it_begins_with_all_chunks_and_remembers_when_they_were_leased(owner: Person) -> None:
    batch = jobs.running(owner.caller, 25)
    tokens = [chunk.tokens for chunk in jobs.chunks(batch)]
    new = backlog(batch)
    assert (new.chunks, new.requests, new.tokens) == (3, 25, sum(tokens))
    assert (new.started_at, new.served_at) == (None, None)
    jobs.lease()
    once = backlog(batch)
    assert (once.chunks, once.requests, once.tokens) == (2, 15, sum(tokens[1:]))
    assert once.started_at is not None
    assert once.served_at == once.started_at
    jobs.lease()
    twice = backlog(batch)
    assert twice.started_at == once.started_at
    assert twice.served_at is not None
    assert twice.served_at > once.started_at


def test_it_is_forgotten_with_the_batchs_end(owner: Person) -> None:
    batch = jobs.running(owner.caller, 5)
    jobs.finish(jobs.lease())
    assert backlog(batch).chunks == 0
    finalize_batch(batch.pk)
    with scopes_disabled():
        assert list(Backlog.objects.all()) == []


class Queue(RuleBasedStateMachine):
    """Whatever services, and hands in the database, do to chunks, in any order."""

    person: Person

    def __init__(self) -> None:
        super().__init__()
        self.before = transaction.savepoint()
        self.batches: list[Batch] = []
        self.leases: list[Lease] = []

    def teardown(self) -> None:
        transaction.savepoint_rollback(self.before)

    @rule(requests=st.integers(1, 35))
    def send(self, requests: int) -> None:
        self.batches.append(jobs.running(self.person.caller, requests))

    @rule(owner=st.sampled_from("ab"))
    def lease(self, owner: str) -> None:
        if lease := leases.lease_next(owner=owner, loaded="", residency=timedelta(0)):
            self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), finished=st.booleans())
    def save(self, data: st.DataObject, finished: bool) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        lines = range(lease.start + 1, lease.end + 1)
        try:
            with transaction.atomic():
                leases.save(
                    lease=lease, outcomes=[jobs.outcome(at) for at in lines], finished=finished
                )
        except LeaseLost:
            self.leases.remove(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        leases.give_back(data.draw(st.sampled_from(self.leases)))

    @rule(owner=st.sampled_from("ab"))
    def start_again(self, owner: str) -> None:
        leases.release_owned_by(owner)

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), status=st.sampled_from([Status.CANCELLING, Status.FINALIZING]))
    def end(self, data: st.DataObject, status: str) -> None:
        batch = jobs.fresh(data.draw(st.sampled_from(self.batches)))
        if batch.status == Status.IN_PROGRESS:
            jobs.change(batch, status=status)
            finalize_batch(batch.pk)

    @rule(state=st.sampled_from([ChunkState.READY, ChunkState.DONE]), more=st.integers(0, 3))
    def change_by_hand(self, state: str, more: int) -> None:
        with scopes_disabled():
            some = Chunk.objects.filter(state=ChunkState.READY)
            some.update(state=state, tokens=F("tokens") + more)

    @rule()
    def delete_by_hand(self) -> None:
        with scopes_disabled():
            Chunk.objects.filter(start=10).delete()

    @invariant()
    def is_what_the_chunks_say(self) -> None:
        assert kept() == added_up()


def test_it_is_what_the_chunks_say_after_any_order_of_steps(owner: Person) -> None:
    Queue.person = owner
    run_state_machine_as_test(
        Queue, settings=hypothesis_settings(max_examples=10, stateful_step_count=25)
    )


@pytest.mark.django_db(transaction=True)
def test_it_is_what_the_chunks_say_after_workers_ran_against_each_other(
    owner: Person, stranger: Person
) -> None:
    made = [jobs.running(each.caller, 60) for each in (owner, stranger, owner)]

    def work(name: str) -> Callable[[], None]:
        def run() -> None:
            for at in range(12):
                lease = jobs.lease(name)
                if at % 4 == 0:
                    leases.give_back(lease)
                elif at % 4 == 1:
                    jobs.finish(lease)
                elif at % 4 == 3:
                    leases.release_owned_by(name)

        return run

    found = jobs.together(*[work(name) for name in "abcd"])
    assert found == [None] * 4
    assert kept() == added_up()
    assert {batch.pk for batch in made} >= set(kept())


def plan_of(sql: str, **parameters: Any) -> str:
    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN {sql}", parameters)
        return "\n".join(row[0] for row in cursor.fetchall())


def test_a_claim_reads_no_more_of_many_chunks_than_the_one_it_takes(owner: Person) -> None:
    first, *_ = [jobs.running(owner.caller, 1) for _ in range(3)]
    with connection.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO batches_chunk
                (batch_id, start, "end", tokens, state, lease_owner, fencing_token, attempts)
            SELECT batch.id, at, at + 1, 9, 'ready', '', 0, 0
            FROM batches_batch AS batch, generate_series(1, 10000) AS at
            """
        )
        cursor.execute("ANALYZE batches_chunk")
    assert kept() == added_up()
    claim = plan_of(
        leases._CLAIM, owner="x", seconds=30, batch=first.pk, per_token=1.0, half_life=1.0
    )
    # While all chunks are ready, the index of all is as good as that of those that are.
    assert re.search("Index Scan using (chunk_ready|chunk_start_in_batch)", claim)
    assert "Seq Scan on batches_chunk" not in claim
    assert "batches_chunk" not in plan_of(queries._WAITING, avoid=[], held=[], all=False)
    with scopes_disabled():
        [seen] = [each for each in queries.waiting_batches()["echo"] if each.batch == first.pk]
    assert (seen.chunks, seen.priority) == (10_001, policy.NORMAL)
