"""The sweep: whatever wake-up was lost is sent again, and what is past its time ends."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import OperationalError, connection
from django.utils import timezone
from django_scopes import scopes_disabled

from batches import wakeups
from batches.models import Batch, File, IdempotencyKey, Upload, UploadPart
from batches.models.batches import Status
from batches.services import batches, files, leases, uploads, validation
from batches.services import sweep as sweeping
from batches.services.finalization import finalize_batch
from batches.services.sweep import sweep
from tests import jobs
from tests.conftest import Person

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.usefixtures("own_storage", "echo"),
]
WAKE = ("worker.tasks.wake",)


@pytest.fixture
def swept(wakeups_sent: list[Any], django_capture_on_commit_callbacks: Any) -> Any:
    """Sweep once; returns the wake-ups that were sent."""

    def once() -> list[tuple[str, ...]]:
        wakeups_sent.clear()
        with django_capture_on_commit_callbacks(execute=True):
            sweep()
        return list(wakeups_sent)

    return once


def past(batch: Batch) -> None:
    jobs.change(batch, expires_at=timezone.now() - timedelta(seconds=1))


def test_with_nothing_to_do_nothing_is_sent(owner: Person, swept: Any) -> None:
    jobs.running(owner.caller, 1)
    assert swept() == []


def test_a_lost_wake_up_to_validate_is_repeated(owner: Person, swept: Any) -> None:
    batch = jobs.created(owner.caller, jobs.jsonl(jobs.lines(1)))
    assert swept() == [("batches.tasks.validate", batch.pk)]
    validation.validate_batch(batch.pk)
    assert swept() == []


def test_a_batch_cancelled_before_its_validation_is_validated(owner: Person, swept: Any) -> None:
    batch = jobs.created(owner.caller, jobs.jsonl(jobs.lines(1)))
    batches.cancel_batch(actor=owner.caller, batch=batch)
    assert swept() == [("batches.tasks.validate", batch.pk)]
    validation.validate_batch(batch.pk)
    assert swept() == [("batches.tasks.finalize", batch.pk)]
    finalize_batch(batch.pk)
    assert swept() == []
    assert jobs.fresh(batch).status == Status.CANCELLED


def test_a_lost_wake_up_to_finalize_is_repeated(owner: Person, swept: Any) -> None:
    batch = jobs.running(owner.caller, 1)
    jobs.finish(jobs.lease())
    assert swept() == [("batches.tasks.finalize", batch.pk)]
    finalize_batch(batch.pk)
    assert swept() == []


def test_a_batch_whose_chunks_are_all_done_is_finalized(owner: Person, swept: Any) -> None:
    batch = jobs.running(owner.caller, 1)
    jobs.finish(jobs.lease())
    jobs.change(batch, status=Status.IN_PROGRESS)
    assert ("batches.tasks.finalize", batch.pk) in swept()
    assert jobs.fresh(batch).status == Status.FINALIZING


def test_a_dead_workers_chunks_wake_the_others(owner: Person, swept: Any) -> None:
    batch = jobs.running(owner.caller, 1)
    lease = jobs.lease()
    assert swept() == []
    jobs.expire_lease(lease.chunk_id)
    assert swept() == [WAKE]
    assert jobs.states(batch) == [("ready", 1)]


@pytest.mark.parametrize("leased", [False, True])
def test_a_batch_past_its_window_is_finalized(owner: Person, swept: Any, leased: bool) -> None:
    batch, other = jobs.running(owner.caller, 2), jobs.running(owner.caller, 2)
    if leased:
        assert jobs.lease().batch_id == batch.pk
    past(batch)
    assert set(swept()) == {("batches.tasks.finalize", batch.pk)}
    assert jobs.fresh(batch).status == Status.FINALIZING
    assert jobs.fresh(other).status == Status.IN_PROGRESS


@pytest.mark.parametrize("status", sorted(set(Status) - {Status.IN_PROGRESS, Status.VALIDATING}))
def test_only_a_running_batch_expires(owner: Person, swept: Any, status: str) -> None:
    batch = jobs.running(owner.caller, 2)
    jobs.change(batch, status=status)
    past(batch)
    swept()
    assert jobs.fresh(batch).status == status


def test_trap_06_expiry_happens_and_answers_every_line(owner: Person, swept: Any) -> None:
    batch = jobs.running(owner.caller, 3)
    past(batch)
    for task, id in swept():
        assert task == "batches.tasks.finalize"
        finalize_batch(id)
    ended = jobs.fresh(batch)
    assert (ended.status, ended.failed) == (Status.EXPIRED, 3)
    assert jobs.custom_ids(ended.error_file) == ["say 1", "say 2", "say 3"]


def test_a_batch_that_ended_meanwhile_is_left_alone(owner: Person, swept: Any) -> None:
    batch = jobs.running(owner.caller, 1)
    batches.cancel_batch(actor=owner.caller, batch=batch)
    with scopes_disabled():
        sweeping._send_to_finalizing([batch.pk])
    assert jobs.fresh(batch).status == Status.CANCELLING


@pytest.mark.django_db(transaction=True)
def test_with_every_wake_up_lost_a_batch_still_ends(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I1: only what sweeps send arrives, as if Redis were flushed after everything else."""
    sent: list[tuple[str, ...]] = []
    monkeypatch.setattr(wakeups, "_send", lambda *said: sent.append(said))
    batch = jobs.created(owner.caller, jobs.jsonl(jobs.lines(3)))
    for _ in range(3):
        sent.clear()
        sweep()
        for task, *arguments in list(sent):
            if task == "batches.tasks.validate":
                validation.validate_batch(*arguments)
            elif task == "batches.tasks.finalize":
                finalize_batch(*arguments)
        if lease := leases.lease_next(owner="x", loaded="", residency=timedelta(0)):
            jobs.finish(lease)
    assert jobs.fresh(batch).status == Status.COMPLETED


@pytest.mark.django_db(transaction=True)
def test_sweeps_at_the_same_time_do_no_harm(owner: Person, wakeups_sent: list[Any]) -> None:
    late = [jobs.running(owner.caller, 1) for _ in range(4)]
    for batch in late:
        past(batch)
    dead = jobs.running(owner.caller, 1)
    lease = jobs.lease()
    while lease.batch_id != dead.pk:
        lease = jobs.lease()
    jobs.expire_lease(lease.chunk_id)
    assert jobs.together(*[sweep] * 4) == [None] * 4
    assert {jobs.fresh(batch).status for batch in late} == {Status.FINALIZING}
    assert jobs.states(dead) == [("ready", 1)]


def test_a_step_that_gives_way_leaves_none_out_after_it(
    owner: Person, swept: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def release_expired() -> None:
        raise OperationalError("deadlock detected")

    monkeypatch.setattr(leases, "release_expired", release_expired)
    batch = jobs.running(owner.caller, 1)
    past(batch)
    assert set(swept()) == {("batches.tasks.finalize", batch.pk)}
    monkeypatch.setattr(connection, "is_usable", lambda: False)
    with pytest.raises(OperationalError, match="deadlock"):
        swept()


# --- Files, uploads and keys ----------------------------------------------------------------


def file_of(owner: Person, **fields: Any) -> File:
    file = jobs.stored(owner.caller, b"x", purpose="user_data")
    with scopes_disabled():
        File.objects.filter(pk=file.pk).update(**fields)
    return file


def row(file: File) -> File:
    with scopes_disabled():
        return File.objects.get(pk=file.pk)


def test_a_file_past_its_time_is_deleted_and_purged(owner: Person, swept: Any) -> None:
    old = file_of(owner, expires_at=timezone.now() - timedelta(seconds=1))
    young = file_of(owner, expires_at=timezone.now() + timedelta(hours=1))
    swept()
    assert row(old).deleted_at is not None
    assert row(old).purged_at is not None
    assert row(young).deleted_at is None
    assert jobs.kept() == {young.storage_name}


def test_a_deleted_files_bytes_wait_for_the_batches_that_read_it(owner: Person, swept: Any) -> None:
    batch = jobs.running(owner.caller, 2)
    files.delete_file(actor=owner.caller, file=batch.input_file)
    swept()
    assert batch.input_file.storage_name in jobs.kept()
    assert row(batch.input_file).purged_at is None
    batches.cancel_batch(actor=owner.caller, batch=batch)
    swept()
    assert batch.input_file.storage_name in jobs.kept()
    finalize_batch(batch.pk)
    assert jobs.fresh(batch).status == Status.CANCELLED
    swept()
    assert batch.input_file.storage_name not in jobs.kept()
    assert row(batch.input_file).purged_at is not None


def test_a_purge_that_broke_off_is_finished(owner: Person, swept: Any) -> None:
    file = file_of(owner, deleted_at=timezone.now())
    files.storage.remove(file.storage_name)  # and then the process was killed
    swept()
    assert row(file).purged_at is not None


def test_an_upload_past_its_time_expires_with_its_parts(owner: Person, swept: Any) -> None:
    def upload(expires_in: int) -> Upload:
        made = uploads.create_upload(
            actor=owner.caller, filename="a.jsonl", purpose="batch", size=4, mime_type="text/plain"
        )
        uploads.add_part(
            actor=owner.caller, upload=made, content=SimpleUploadedFile("part", b"abcd")
        )
        with scopes_disabled():
            expires_at = timezone.now() + timedelta(seconds=expires_in)
            Upload.objects.filter(pk=made.pk).update(expires_at=expires_at)
        return made

    old, young = upload(-1), upload(60)
    swept()
    with scopes_disabled():
        assert Upload.objects.get(pk=old.pk).status == "expired"
        assert Upload.objects.get(pk=young.pk).status == "pending"
        [part] = UploadPart.objects.all()
    assert part.upload_id == young.pk
    assert jobs.kept() == {part.storage_name}


def test_idempotency_keys_are_kept_for_a_day(owner: Person, swept: Any) -> None:
    with owner.caller.scope():
        for hours in (23, 25):
            IdempotencyKey.objects.create(
                organization=owner.caller.organization,
                key=f"{hours} hours",
                fingerprint="x",
                created_at=timezone.now() - timedelta(hours=hours),
            )
        swept()
        assert [each.key for each in IdempotencyKey.objects.all()] == ["23 hours"]


def test_what_a_killed_process_was_writing_is_removed_after_a_day(
    settings: Any, swept: Any
) -> None:
    incoming = Path(settings.FILE_UPLOAD_TEMP_DIR)
    old, fresh = incoming / "old.upload", incoming / "fresh.upload"
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    swept()
    assert [old.exists(), fresh.exists()] == [False, True]
