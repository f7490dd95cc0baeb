"""Quotas and usage on a batch's way: what is refused, what is reserved, what is booked."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.db.models import Sum
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.errors import QuotaExceeded
from accounts.models import Organization, Quota, Reservation, UsageRecord
from batches.models import Batch, File, Upload
from batches.models.batches import Status
from batches.services import batches, leases, sweep
from batches.services.files import purge_files
from batches.services.finalization import finalize_batch
from batches.services.validation import validate_batch
from models_registry.models import Model
from tests import jobs
from tests.batches.conftest import Disk
from tests.batches.test_uploads_api import begun
from tests.conftest import Person
from tests.wire import batch_body, created, error_of, line, post, upload, uploaded, validated

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("wakeups_sent", "echo")]


def limit(person: Person, **fields: Any) -> None:
    with scopes_disabled():
        Quota.objects.update_or_create(organization=person.caller.organization, defaults=fields)


def booked(field: str) -> Any:
    with scopes_disabled():
        return UsageRecord.objects.aggregate(total=Sum(field))["total"] or 0


def reservations() -> list[str]:
    with scopes_disabled():
        return sorted(Reservation.objects.values_list("batch_id", flat=True))


# --- Refused --------------------------------------------------------------------------------


def test_a_batch_too_many_is_429_with_nothing_stored(owner: Person, disk: Disk) -> None:
    file_id = uploaded(owner.api)
    limit(owner, concurrent_batches=0)
    response = post(owner.api, "/v1/batches", batch_body(file_id))
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (
        429,
        "insufficient_quota",
        "concurrent_batches",
    )
    assert response["x-should-retry"] == "false"
    assert error["message"].endswith("/organization/limits")
    with scopes_disabled():
        assert Batch.objects.count() == 0
    assert reservations() == []


@pytest.mark.parametrize(
    ("field", "amount", "code"),
    [
        ("enqueued_tokens", 10, "token_limit_exceeded"),
        ("tokens_per_month", 10, "token_limit_exceeded"),
        ("requests_per_batch", 1, "too_many_tasks"),
        ("budget_per_month", Decimal("0.01"), "insufficient_quota"),
    ],
)
def test_a_batch_that_needs_more_fails_at_validation_and_reserves_nothing(
    owner: Person, echo: Model, disk: Disk, field: str, amount: Any, code: str
) -> None:
    Model.objects.update(output_price=1_000_000)
    limit(owner, **{field: amount})
    batch = validated(owner.api, line("a") + b"\n" + line("b"))
    (error,) = batch["errors"]["data"]
    assert (batch["status"], error["code"], error["line"]) == ("failed", code, None)
    assert "Your organization's limit is" in error["message"]
    assert "A platform operator can raise it" in error["message"]
    assert reservations() == []
    assert jobs.chunks(Batch(pk=batch["id"])) == []


def test_a_file_too_many_is_429_with_nothing_stored(owner: Person, disk: Disk) -> None:
    limit(owner, storage_bytes=len(line()))
    first = uploaded(owner.api)
    stored = disk.files
    refused = upload(owner.api)
    assert (refused.status_code, error_of(refused)["code"], error_of(refused)["param"]) == (
        429,
        "insufficient_quota",
        "storage_bytes",
    )
    assert disk.files == stored
    with scopes_disabled():
        assert File.objects.count() == 1
    owner.api.delete(f"/v1/files/{first}")
    assert upload(owner.api).status_code == 429  # a batch might still read it
    purge_files()
    assert upload(owner.api).status_code == 200


def test_an_upload_counts_from_its_announcement(owner: Person, disk: Disk) -> None:
    limit(owner, storage_bytes=1000)
    announced = begun(owner.api)
    limit(owner, storage_bytes=announced["bytes"])
    assert upload(owner.api).status_code == 429
    owner.api.post(f"/v1/uploads/{announced['id']}/cancel")
    with scopes_disabled():
        assert Upload.objects.get().status == "cancelled"
    limit(owner, storage_bytes=len(line()))
    assert upload(owner.api).status_code == 200


# --- Reserved -------------------------------------------------------------------------------


def test_a_batch_holds_its_reservation_until_it_ends(owner: Person, disk: Disk) -> None:
    id = created(owner.api)["id"]
    assert reservations() == [id]
    validate_batch(id)
    with scopes_disabled():
        reservation = Reservation.objects.get()
        chunk = jobs.chunks(Batch(pk=id))[0]
    assert (reservation.model, reservation.tokens) == ("echo", chunk.tokens)
    jobs.finish(jobs.lease())
    finalize_batch(id)
    assert reservations() == []


def test_a_batch_that_fails_lets_its_reservation_go(owner: Person, disk: Disk) -> None:
    assert validated(owner.api, b"{}")["status"] == "failed"
    assert reservations() == []


@pytest.mark.usefixtures("own_storage")
def test_a_batch_that_uses_more_than_was_reserved_counts_while_it_runs(owner: Person) -> None:
    Model.objects.update(input_price=1, output_price=2_000_000)
    limit(owner, tokens_per_month=5_000, budget_per_month=Decimal(5_000))
    batch = jobs.running(owner.caller, 3)
    lease = jobs.lease()
    leases.save(lease=lease, outcomes=[jobs.outcome(1, input=4_000, output=2_000)], finished=False)
    with scopes_disabled():
        reservation = Reservation.objects.get()
    assert (reservation.tokens, reservation.cost) == (6_000, Decimal("4000.004"))
    with pytest.raises(QuotaExceeded):
        jobs.created(owner.caller, jobs.jsonl(jobs.lines(1)))
    leases.save(lease=lease, outcomes=[jobs.outcome(2)], finished=False, wasted=0.5)
    assert jobs.fresh(batch).gpu_seconds == 0.5


@pytest.mark.usefixtures("own_storage")
def test_a_batch_that_could_not_be_validated_in_its_window_fails_and_lets_go(
    owner: Person,
) -> None:
    batch = jobs.created(owner.caller, jobs.jsonl(jobs.lines(1)))
    jobs.change(batch, expires_at=timezone.now() - timedelta(seconds=1))
    with scopes_disabled():
        sweep.expire_batches()
    after = jobs.fresh(batch)
    assert (after.status, [error["code"] for error in after.errors or []]) == (
        "failed",
        ["batch_expired"],
    )
    assert reservations() == []


# --- Booked ---------------------------------------------------------------------------------


def completed(batch: Batch, owner: Person) -> None:
    jobs.finish(jobs.lease())


def cancelled(batch: Batch, owner: Person) -> None:
    half(batch)
    batches.cancel_batch(actor=owner.caller, batch=batch)


def expired(batch: Batch, owner: Person) -> None:
    half(batch)
    jobs.change(batch, expires_at=timezone.now() - timedelta(seconds=1))
    sweep.expire_batches()


def half(batch: Batch) -> None:
    lease = jobs.lease()
    some = [
        leases.Outcome(at, at != 2, b"{}\n", 10 * at, at, 3 * at, at, 0.5) for at in range(1, 6)
    ]
    leases.save(lease=lease, outcomes=some, finished=False)
    leases.give_back(lease)


@pytest.mark.usefixtures("own_storage")
@pytest.mark.parametrize("end", [completed, cancelled, expired])
def test_what_ran_is_booked_however_a_batch_ends(
    owner: Person, end: Callable[[Batch, Person], None]
) -> None:
    batch = jobs.running(owner.caller, 9)
    with scopes_disabled():
        end(batch, owner)
        finalize_batch(batch.pk)
    after = jobs.fresh(batch)
    assert after.is_finished
    for field in ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens"):
        assert booked(field) == getattr(after, field)
    assert booked("gpu_seconds") == after.gpu_seconds
    assert booked("requests") == (9 if end is completed else 5)
    finalize_batch(batch.pk)
    assert booked("batches") == 1


@pytest.mark.usefixtures("own_storage")
def test_the_sum_of_all_usage_is_that_of_the_batches(
    owner: Person, teammate: Person, stranger: Person
) -> None:
    ends = [completed, cancelled, expired]
    for at, person in enumerate([owner, teammate, stranger, owner, teammate, stranger]):
        batch = jobs.running(person.caller, 9)
        with scopes_disabled():
            ends[at % 3](batch, person)
            finalize_batch(batch.pk)
    fields = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "gpu_seconds")
    with scopes_disabled():
        said = Batch.objects.aggregate(**{field: Sum(field) for field in fields})
        for organization in Organization.objects.all():
            mine = UsageRecord.objects.filter(organization=organization)
            theirs = Batch.objects.filter(organization=organization)
            for field in fields:
                assert (
                    mine.aggregate(total=Sum(field))["total"]
                    == theirs.aggregate(total=Sum(field))["total"]
                )
    assert {field: booked(field) for field in fields} == said
    assert said["output_tokens"] > 0


@pytest.mark.usefixtures("own_storage")
def test_usage_is_the_callers_whose_batch_it_was(owner: Person) -> None:
    batch = jobs.running(owner.caller, 3)
    jobs.finish(jobs.lease())
    finalize_batch(batch.pk)
    with scopes_disabled():
        record = UsageRecord.objects.get()
    assert (record.user, record.project, record.model, record.endpoint) == (
        owner.user,
        owner.caller.project,
        "echo",
        jobs.ENDPOINT,
    )


# --- A suspended organization ---------------------------------------------------------------


@pytest.mark.usefixtures("own_storage")
def test_a_suspended_organizations_chunks_stop_and_wait(owner: Person, stranger: Person) -> None:
    batch = jobs.running(owner.caller, 30)
    held = jobs.lease()
    assert held.batch_id == batch.pk
    Organization.objects.filter(pk=batch.organization_id).update(suspended_at=timezone.now())
    assert leases.renew([held]) == {held.chunk_id: "suspended"}
    leases.give_back(held)
    other = jobs.running(stranger.caller, 3)
    assert jobs.lease().batch_id == other.pk
    options: dict[str, Any] = {"owner": "w", "loaded": "", "residency": timedelta(0)}
    assert leases.lease_next(**options) is None
    Organization.objects.filter(pk=batch.organization_id).update(suspended_at=None)
    assert jobs.lease().batch_id == batch.pk
    assert jobs.fresh(batch).status == Status.IN_PROGRESS
