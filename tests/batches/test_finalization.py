"""Finalizing: every line in exactly one of the two files, in input order, whatever happened."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from django.db import OperationalError, connection
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils import timezone
from django_scopes import scopes_disabled

from batches import storage
from batches.models import Batch, File, Suspect
from batches.models.batches import Status
from batches.services import batches, finalization, leases, sweep
from batches.services.finalization import LETTING_GO, finalize_batch
from batches.services.leases import LeaseLost
from tests import jobs
from tests.conftest import Person

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.usefixtures("own_storage", "wakeups_sent", "echo"),
]
threaded = pytest.mark.django_db(transaction=True)


def answered(batch: Batch, good: list[int], bad: Sequence[int] = (), *, finished: bool) -> None:
    """Lease the next chunk and save results for these lines of it."""
    found = [jobs.outcome(at, ok=at in good) for at in [*good, *bad]]
    random.Random(1).shuffle(found)
    leases.save(lease=jobs.lease(), outcomes=found, finished=finished)


def ended(batch: Batch) -> Batch:
    finalize_batch(batch.pk)
    return jobs.fresh(batch)


def errors(batch: Batch) -> list[tuple[str, str | None]]:
    return [
        (each["custom_id"], each["error"]["code"] if each.get("error") else None)
        for each in jobs.content(batch.error_file)
    ]


def test_a_completed_batch_has_its_answers_in_input_order(owner: Person) -> None:
    batch = jobs.running(owner.caller, 9)
    answered(batch, [1, 3, 4, 6, 7, 8], [2, 5, 9], finished=True)
    end = ended(batch)
    assert (end.status, end.completed, end.failed) == (Status.COMPLETED, 6, 3)
    assert end.completed_at is not None
    assert jobs.custom_ids(end.output_file) == ["1", "3", "4", "6", "7", "8"]
    assert jobs.custom_ids(end.error_file) == ["2", "5", "9"]


def test_the_files_hold_what_was_saved_to_the_byte(owner: Person) -> None:
    batch = jobs.running(owner.caller, 3)
    found = [jobs.outcome(at, said="é\u2028😀\\n") for at in (3, 1, 2)]
    leases.save(lease=jobs.lease(), outcomes=found, finished=True)
    end = ended(batch)
    assert end.output_file is not None
    with storage.opened(end.output_file.storage_name) as stream:
        whole = stream.read()
    assert whole == found[1].payload + found[2].payload + found[0].payload
    assert end.output_file.bytes == len(whole)


def test_the_order_is_the_inputs_not_that_of_execution(owner: Person) -> None:
    long = {name: name * 3_000 for name in "ab"}
    said = [long["a"] + "1", long["b"] + "1", long["a"] + "2", long["b"] + "2"]
    batch = jobs.running(
        owner.caller, [jobs.line(text, custom_id=str(at)) for at, text in enumerate(said)]
    )
    answered(batch, [1, 2, 3, 4], finished=True)
    assert jobs.custom_ids(ended(batch).output_file) == ["1", "2", "3", "4"]


def test_without_a_good_answer_there_is_no_output_file(owner: Person) -> None:
    batch = jobs.running(owner.caller, 3)
    answered(batch, [], [1, 2, 3], finished=True)
    end = ended(batch)
    assert (end.status, end.output_file) == (Status.COMPLETED, None)
    assert jobs.custom_ids(end.error_file) == ["1", "2", "3"]


def test_without_an_error_there_is_no_error_file(owner: Person) -> None:
    batch = jobs.running(owner.caller, 2)
    answered(batch, [1, 2], finished=True)
    assert ended(batch).error_file is None


def test_trap_03_an_expired_batch_keeps_what_was_answered(owner: Person, settings: Any) -> None:
    settings.CHUNK_REQUESTS = 3
    batch = jobs.running(owner.caller, 9)
    answered(batch, [1, 3], [2], finished=True)
    lease = jobs.lease()
    leases.save(lease=lease, outcomes=[jobs.outcome(5)], finished=False)
    leases.give_back(lease)
    _expire(batch)
    end = ended(batch)
    assert (end.status, end.total, end.completed, end.failed) == (Status.EXPIRED, 9, 3, 6)
    assert end.expired_at is not None
    assert jobs.custom_ids(end.output_file) == ["1", "3", "5"]
    assert errors(end) == [("2", None)] + [(f"say {at}", "batch_expired") for at in (4, 6, 7, 8, 9)]


def test_trap_06_a_cancelled_batch_keeps_what_was_answered(owner: Person, settings: Any) -> None:
    settings.CHUNK_REQUESTS = 3
    batch = jobs.running(owner.caller, 6)
    answered(batch, [1, 2, 3], finished=True)
    batches.cancel_batch(actor=owner.caller, batch=batch)
    end = ended(batch)
    assert (end.status, end.completed, end.failed) == (Status.CANCELLED, 3, 3)
    assert end.cancelled_at is not None
    assert jobs.custom_ids(end.output_file) == ["1", "2", "3"]
    assert errors(end) == [(f"say {at}", "batch_cancelled") for at in (4, 5, 6)]


def test_an_unanswered_line_says_why(owner: Person) -> None:
    batch = jobs.running(owner.caller, 1)
    batches.cancel_batch(actor=owner.caller, batch=batch)
    [line] = jobs.content(ended(batch).error_file)
    assert line == {
        "id": line["id"],
        "custom_id": "say 1",
        "response": None,
        "error": {
            "code": "batch_cancelled",
            "message": "The batch was cancelled before this request was run.",
        },
    }
    assert line["id"].startswith("batch_req_")


def test_a_batch_that_expires_with_all_answered_is_completed(owner: Person) -> None:
    batch = jobs.running(owner.caller, 2)
    lease = jobs.lease()
    found = [jobs.outcome(1), jobs.outcome(2)]
    leases.save(lease=lease, outcomes=found, finished=False)
    leases.give_back(lease)
    _expire(batch)
    assert ended(batch).status == Status.COMPLETED


@pytest.mark.parametrize("seed", range(5))
def test_every_line_is_in_one_file_whatever_was_answered(
    owner: Person, settings: Any, seed: int
) -> None:
    """I4"""
    settings.CHUNK_REQUESTS = 7
    chance = random.Random(seed)
    batch = jobs.running(owner.caller, 40)
    verdicts: dict[int, bool] = {}
    for _ in range(chance.randint(0, 5)):
        lease = jobs.lease()
        lines = range(lease.start + 1, lease.end + 1)
        some = chance.sample(lines, chance.randint(0, len(lines)))
        found = [jobs.outcome(at, ok=chance.random() < 0.7) for at in some]
        leases.save(lease=lease, outcomes=found, finished=len(found) == len(lines))
        verdicts = {each.line: each.ok for each in found} | verdicts
        leases.give_back(lease) if chance.random() < 0.5 else None
    if jobs.fresh(batch).status == Status.IN_PROGRESS:
        batches.cancel_batch(actor=owner.caller, batch=batch)
        _run_out(batch)
    end = ended(batch)
    good, bad = jobs.custom_ids(end.output_file), jobs.custom_ids(end.error_file)
    assert [int(each) for each in good] == sorted(at for at in verdicts if verdicts[at])
    lines = [int(each.removeprefix("say ")) for each in bad]
    assert lines == sorted(set(range(1, 41)) - {at for at in verdicts if verdicts[at]})
    assert (end.completed, end.failed) == (len(good), len(bad))


def test_the_journal_the_index_and_the_suspects_are_forgotten(
    owner: Person, django_capture_on_commit_callbacks: Any
) -> None:
    batch = jobs.running(owner.caller, 3)
    leases.accuse(batch.pk, [2])
    answered(batch, [1, 2, 3], finished=True)
    with django_capture_on_commit_callbacks(execute=True):
        end = ended(batch)
    assert end.output_file is not None
    assert jobs.journal(batch) == []
    with scopes_disabled():
        assert Suspect.objects.filter(batch=batch).count() == 0
    names = {batch.input_file.storage_name, end.output_file.storage_name, end.results_name}
    assert jobs.kept() == names


def test_a_file_of_answers_is_the_tenants_and_expires_as_asked(owner: Person) -> None:
    batch = jobs.running(owner.caller, 1, output_expires_after_seconds=7_200)
    answered(batch, [1], finished=True)
    file = ended(batch).output_file
    assert file is not None
    assert file.expires_at is not None
    assert round((file.expires_at - file.created_at).total_seconds()) == 7_200
    assert (file.purpose, file.filename) == ("batch_output", f"{batch.pk}_output.jsonl")
    assert (file.organization, file.project) == (owner.caller.organization, owner.caller.project)


def test_a_repeated_finalizing_changes_nothing(owner: Person) -> None:
    batch = jobs.running(owner.caller, 3)
    answered(batch, [1, 2], [3], finished=True)
    end, kept = ended(batch), jobs.kept()
    again = ended(batch)
    assert again.output_file == end.output_file
    assert again.error_file == end.error_file
    assert (again.completed_at, again.failed, jobs.kept()) == (end.completed_at, 1, kept)


@pytest.mark.parametrize("status", ["validating", "failed", "in_progress", "expired", "completed"])
def test_only_a_batch_that_is_ending_is_finalized(owner: Person, status: str) -> None:
    batch = jobs.running(owner.caller, 3)
    jobs.change(batch, status=status)
    assert ended(batch).status == status
    assert jobs.states(batch) == [("ready", 0)]


@threaded
def test_finalizing_at_the_same_time_makes_the_files_once(owner: Person) -> None:
    batch = jobs.running(owner.caller, 50)
    found = [jobs.outcome(at, ok=bool(at % 3)) for at in range(1, 51)]
    leases.save(lease=jobs.lease(), outcomes=found, finished=True)
    calls = [lambda: finalize_batch(batch.pk)] * 4
    assert jobs.together(*calls) == [None] * 4
    end = jobs.fresh(batch)
    assert end.status == Status.COMPLETED
    assert end.output_file is not None
    assert end.error_file is not None
    with scopes_disabled():
        assert File.objects.filter(purpose="batch_output").count() == 2
    made = (batch.input_file, end.output_file, end.error_file)
    assert jobs.kept() == {file.storage_name for file in made} | {end.results_name}
    assert jobs.journal(batch) == []


@threaded
def test_a_finalizing_that_breaks_off_leaves_no_file_and_can_be_repeated(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = jobs.running(owner.caller, 3)
    answered(batch, [1, 2], [3], finished=True)
    before = jobs.kept()

    def broken(name: str, content: Any) -> str:
        if content.name == "errors":
            raise OSError("the disk is full")
        return keep(name, content)

    keep = storage.keep
    monkeypatch.setattr(storage, "keep", broken)
    with pytest.raises(OSError, match="the disk is full"):
        finalize_batch(batch.pk)
    monkeypatch.undo()
    assert jobs.fresh(batch).status == Status.FINALIZING
    assert jobs.journal(batch) == [1, 2, 3]
    assert jobs.kept() == before
    assert ended(batch).status == Status.COMPLETED


@threaded
def test_bytes_are_put_before_any_row_is_locked(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket may take minutes for them."""
    batch = jobs.running(owner.caller, 3)
    answered(batch, [1, 2], [3], finished=True)
    locking = []

    def looked(name: str, content: Any) -> str:
        locking.append(connection.in_atomic_block)
        return keep(name, content)

    keep = storage.keep
    monkeypatch.setattr(storage, "keep", looked)
    assert (ended(batch).status, locking) == (Status.COMPLETED, [False] * 3)


@threaded
@pytest.mark.parametrize("done", [False, True])
def test_bytes_stay_when_a_commit_fails_for_it_may_have_been_done(
    owner: Person, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    batch = jobs.running(owner.caller, 2)
    answered(batch, [1], [2], finished=True)
    record, commit = finalization._record, BaseDatabaseWrapper.commit

    def broken(self: BaseDatabaseWrapper) -> None:
        if done:
            commit(self)
        raise OperationalError("the server closed the connection unexpectedly")

    def last(*args: Any) -> None:
        record(*args)
        patch.setattr(BaseDatabaseWrapper, "commit", broken)

    before = jobs.kept()
    with monkeypatch.context() as patch:
        patch.setattr(finalization, "_record", last)
        with pytest.raises(OperationalError):
            finalize_batch(batch.pk)
    assert len(jobs.kept() - before) == 3  # the two files, and where what lies in them
    assert jobs.fresh(batch).status == (Status.COMPLETED if done else Status.FINALIZING)
    end = ended(batch)
    assert (jobs.custom_ids(end.output_file), jobs.custom_ids(end.error_file)) == (["1"], ["2"])


@threaded
def test_bytes_go_when_another_has_ended_the_batch(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two may be at it where the first one's session, and with it its lock, was lost."""
    batch = jobs.running(owner.caller, 2)
    answered(batch, [1], [2], finished=True)
    record = finalization._record

    def overtaken(*args: Any) -> None:
        jobs.change(batch, status=Status.COMPLETED)
        record(*args)

    before = jobs.kept()
    monkeypatch.setattr(finalization, "_record", overtaken)
    finalize_batch(batch.pk)
    assert jobs.kept() == before


def test_a_leased_chunk_is_waited_for(owner: Person) -> None:
    batch = jobs.running(owner.caller, 4)
    lease = jobs.lease()
    batches.cancel_batch(actor=owner.caller, batch=batch)
    assert ended(batch).status == Status.CANCELLING
    leases.save(lease=lease, outcomes=[jobs.outcome(2)], finished=False)
    leases.give_back(lease)
    end = ended(batch)
    assert (end.status, end.completed, end.failed) == (Status.CANCELLED, 1, 3)


def test_a_worker_that_does_not_let_go_is_fenced_off(owner: Person) -> None:
    batch = jobs.running(owner.caller, 4)
    lease = jobs.lease()
    leases.save(lease=lease, outcomes=[jobs.outcome(2)], finished=False)
    batches.cancel_batch(actor=owner.caller, batch=batch)
    _run_out(batch)
    end = ended(batch)
    assert (end.status, end.completed, end.failed) == (Status.CANCELLED, 1, 3)
    with pytest.raises(LeaseLost):
        leases.save(lease=lease, outcomes=[jobs.outcome(1)], finished=False)
    assert leases.renew([lease]) == {}
    leases.give_back(lease)
    assert (jobs.journal(batch), jobs.states(batch)) == ([], [("done", 0)])


def test_an_expired_batch_waits_for_its_workers_just_as_long(owner: Person) -> None:
    batch = jobs.running(owner.caller, 4)
    jobs.lease()
    _expire(batch)
    assert ended(batch).status == Status.FINALIZING
    _run_out(batch)
    assert ended(batch).status == Status.EXPIRED


def test_chunks_of_an_ended_batch_are_never_leased_again(owner: Person) -> None:
    batch = jobs.running(owner.caller, 4)
    jobs.lease("dead")
    batches.cancel_batch(actor=owner.caller, batch=batch)
    _run_out(batch)
    ended(batch)
    assert leases.release_owned_by("dead") == 0
    assert leases.release_expired() == 0
    assert leases.lease_next(owner="x", loaded="", residency=timedelta(0)) is None


def _expire(batch: Batch) -> None:
    jobs.change(batch, expires_at=timezone.now() - timedelta(seconds=1))
    with scopes_disabled():
        sweep.expire_batches()


def _run_out(batch: Batch) -> None:
    """Let the time pass for which workers are waited for."""
    name = "cancelling_at" if jobs.fresh(batch).cancelling_at else "finalizing_at"
    jobs.change(batch, **{name: timezone.now() - LETTING_GO - timedelta(seconds=1)})
