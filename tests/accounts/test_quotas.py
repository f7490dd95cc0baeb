"""Quotas: reserved before, settled after, never passed, whatever comes at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import time_machine
from django.db import connection, transaction
from django_scopes import scopes_disabled
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.django import TestCase as HypothesisTestCase

from accounts.access import Caller
from accounts.consumption import used_of
from accounts.errors import QuotaExceeded
from accounts.limits import quota_of
from accounts.models import Quota, Reservation, UsageRecord
from accounts.queries import caller_of_key, caller_of_user
from accounts.services import organizations, quotas
from accounts.services.quotas import Estimate, Prices, Used
from tests import jobs
from tests.conftest import Person

pytestmark = pytest.mark.django_db

FREE = Prices()
PRICED = Prices(Decimal(2), Decimal("0.5"), Decimal(10))


def limited(caller: Caller, **fields: Any) -> Quota:
    with scopes_disabled():
        return Quota.objects.create(organization=caller.organization, **fields)


def estimate(tokens: int = 0, model: str = "echo", prices: Prices = FREE) -> Estimate:
    return Estimate(model=model, requests=1, tokens=tokens, prices=prices)


def used(input: int = 0, output: int = 0, cached: int = 0, requests: int = 1) -> Used:
    return Used("/v1/chat/completions", requests, input, cached, output, 0, 1.5)


def opened(caller: Caller, batch_id: str) -> str:
    with transaction.atomic():
        quotas.open_batch(batch_id=batch_id, actor=caller)
    return batch_id


def reserved(batch_id: str, of: Estimate) -> list[str]:
    """The limits that would be passed."""
    with transaction.atomic():
        return [excess.field for excess in quotas.reserve(batch_id, of)]


def status(quota: Quota) -> dict[str, Any]:
    with scopes_disabled():
        own = quota_of(quota.organization, quota.user, quota.api_key)
    return dict(used_of(own))


# --- Opening --------------------------------------------------------------------------------


def test_without_limits_everything_is_let_through(owner: Person) -> None:
    opened(owner.caller, "batch_1")
    assert reserved("batch_1", estimate(10**15)) == []


def test_no_more_batches_at_once_than_the_limit(owner: Person) -> None:
    limited(owner.caller, concurrent_batches=2)
    opened(owner.caller, "batch_1")
    opened(owner.caller, "batch_2")
    with pytest.raises(QuotaExceeded) as refused:
        opened(owner.caller, "batch_3")
    error = refused.value
    assert (error.status, error.code, error.param) == (
        429,
        "insufficient_quota",
        "concurrent_batches",
    )
    assert error.headers == {"x-should-retry": "false"}
    assert error.message == (
        "Your organization's limit is 2 unfinished batches; 2 are in use. A platform operator can"
        " raise it: http://127.0.0.1:8000/organization/limits"
    )
    quotas.settle("batch_1", used())
    opened(owner.caller, "batch_3")


@pytest.mark.parametrize(
    ("field", "limit"), [("tokens_per_month", 100), ("budget_per_month", Decimal("0.01"))]
)
def test_a_month_that_is_used_up_takes_no_new_batch(owner: Person, field: str, limit: Any) -> None:
    limited(owner.caller, **{field: limit})
    opened(owner.caller, "batch_1")
    assert reserved("batch_1", estimate(100, prices=PRICED)) == []
    quotas.settle("batch_1", used(output=1000))
    with pytest.raises(QuotaExceeded) as refused:
        opened(owner.caller, "batch_2")
    assert refused.value.param == field


def test_a_new_month_begins_with_nothing_used(owner: Person) -> None:
    quota = limited(owner.caller, tokens_per_month=100)
    with time_machine.travel(datetime(2026, 1, 31, 23, 59, tzinfo=UTC), tick=False):
        opened(owner.caller, "batch_1")
        quotas.settle("batch_1", used(input=100))
        assert status(quota)["tokens_per_month"] == 100
    with time_machine.travel(datetime(2026, 2, 1, 0, 0, tzinfo=UTC), tick=False):
        assert status(quota)["tokens_per_month"] == 0
        opened(owner.caller, "batch_2")


# --- Whose limit ----------------------------------------------------------------------------


def by_person(owner: Person, teammate: Person) -> dict[str, Any]:
    return {"user": teammate.user}


def by_key(owner: Person, teammate: Person) -> dict[str, Any]:
    caller = caller_of_key(teammate.key)
    assert caller is not None
    return {"api_key": caller.api_key}


@pytest.mark.parametrize(
    ("subject", "whose"), [(by_person, "Your own"), (by_key, "This API key's")]
)
def test_a_persons_and_a_keys_own_limit_bind_only_them(
    owner: Person, teammate: Person, subject: Callable[..., dict[str, Any]], whose: str
) -> None:
    limited(owner.caller, concurrent_batches=0, **subject(owner, teammate))
    teammates, owners = caller_of_key(teammate.key), caller_of_key(owner.key)
    assert teammates is not None
    assert owners is not None
    opened(owners, "batch_1")
    with pytest.raises(QuotaExceeded) as refused:
        opened(teammates, "batch_2")
    said = refused.value.message
    assert said.startswith(
        f"{whose} limit is 0 unfinished batches; 0 are in use. An owner or admin"
    )


def test_the_tightest_limit_wins(owner: Person) -> None:
    limited(owner.caller, enqueued_tokens=1000)
    limited(owner.caller, enqueued_tokens=10, user=owner.user)
    opened(owner.caller, "batch_1")
    assert reserved("batch_1", estimate(11)) == ["enqueued_tokens"]
    assert reserved("batch_1", estimate(10)) == []


def test_another_organizations_use_counts_for_nothing(owner: Person, stranger: Person) -> None:
    limited(owner.caller, tokens_per_month=100)
    opened(stranger.caller, "batch_1")
    reserved("batch_1", estimate(1000))
    opened(owner.caller, "batch_2")
    assert reserved("batch_2", estimate(100)) == []


# --- Reserving ------------------------------------------------------------------------------


def test_enqueued_tokens_are_limited_for_each_model(owner: Person) -> None:
    limited(owner.caller, enqueued_tokens=100)
    for id in ("batch_1", "batch_2", "batch_3"):
        opened(owner.caller, id)
    assert reserved("batch_1", estimate(80, "a")) == []
    assert reserved("batch_2", estimate(80, "b")) == []
    assert reserved("batch_3", estimate(21, "a")) == ["enqueued_tokens"]
    assert reserved("batch_3", estimate(20, "a")) == []


def test_every_limit_that_would_be_passed_is_named(owner: Person) -> None:
    limited(
        owner.caller,
        requests_per_batch=0,
        enqueued_tokens=1,
        tokens_per_month=1,
        budget_per_month=Decimal("0.00"),
    )
    opened_anyway(owner.caller, "batch_1")
    found = reserved("batch_1", estimate(2, prices=PRICED))
    assert sorted(found) == [
        "budget_per_month",
        "enqueued_tokens",
        "requests_per_batch",
        "tokens_per_month",
    ]
    with scopes_disabled():
        assert Reservation.objects.get().tokens == 0


def opened_anyway(caller: Caller, batch_id: str) -> None:
    with scopes_disabled():
        Reservation.objects.create(
            batch_id=batch_id, organization=caller.organization, project=caller.project
        )


def test_the_estimate_is_paid_at_the_dearer_price() -> None:
    assert estimate(500_000, prices=PRICED).cost == Decimal(5)


# --- Settling -------------------------------------------------------------------------------


def test_what_ran_is_paid_at_the_prices_of_the_reservation(owner: Person) -> None:
    opened(owner.caller, "batch_1")
    reserved("batch_1", estimate(10, prices=PRICED))
    quotas.settle("batch_1", used(input=1000, cached=400, output=100, requests=7))
    with scopes_disabled():
        record = UsageRecord.objects.get()
        assert not Reservation.objects.exists()
    # 600 × 2 + 400 × 0.5 + 100 × 10, for a million
    assert record.cost == Decimal("0.0024")
    assert (record.requests, record.input_tokens, record.output_tokens) == (7, 1000, 100)
    assert (record.model, record.endpoint, record.batches) == ("echo", "/v1/chat/completions", 1)
    assert (record.gpu_seconds, record.user, record.project) == (
        1.5,
        owner.user,
        owner.caller.project,
    )


def test_settling_twice_counts_once(owner: Person) -> None:
    opened(owner.caller, "batch_1")
    for _ in range(2):
        quotas.settle("batch_1", used(input=5))
    with scopes_disabled():
        assert [row.input_tokens for row in UsageRecord.objects.all()] == [5]


def test_a_day_is_one_row_for_each_project_person_key_model_and_endpoint(owner: Person) -> None:
    by_key = caller_of_key(owner.key)
    assert by_key is not None
    for at, caller in enumerate([owner.caller, owner.caller, by_key, by_key]):
        opened(caller, f"batch_{at}")
        reserved(f"batch_{at}", estimate(1))
        quotas.settle(f"batch_{at}", used(input=10, requests=2))
    with scopes_disabled():
        rows = UsageRecord.objects.order_by("id")
        found = [(row.api_key, row.batches, row.requests, row.input_tokens) for row in rows]
    assert found == [(None, 2, 4, 20), (by_key.api_key, 2, 4, 20)]


def test_a_batch_of_which_nothing_ran_leaves_no_record(owner: Person) -> None:
    opened(owner.caller, "batch_1")
    quotas.settle("batch_1", used(requests=0))
    with scopes_disabled():
        assert (UsageRecord.objects.count(), Reservation.objects.count()) == (0, 0)


def test_what_is_used_is_told(owner: Person) -> None:
    quota = limited(owner.caller, tokens_per_month=5)
    for at, model in enumerate(["a", "a", "b"]):
        opened_anyway(owner.caller, f"batch_{at}")
        with scopes_disabled():
            Reservation.objects.filter(pk=f"batch_{at}").update(model=model, tokens=10 + at)
    quotas.settle("batch_2", used(input=3, output=4))
    assert status(quota) == {
        "tokens_per_month": 10 + 11 + 7,
        "budget_per_month": Decimal(0),
        "enqueued_tokens": 21,
        "concurrent_batches": 2,
        "requests_per_batch": 0,
        "storage_bytes": 0,
    }


# --- At once --------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_fifty_that_come_at_once_do_not_pass_the_limit() -> None:
    """Each wants 10 of 95 tokens, and 20 may be unfinished: 20 are opened, 9 have their tokens."""
    caller = alone()
    quota = limited(caller, tokens_per_month=95, concurrent_batches=20)

    def submit(at: int) -> str:
        try:
            opened(caller, f"batch_{at}")
            return "over" if reserved(f"batch_{at}", estimate(10)) else "reserved"
        except QuotaExceeded:
            return "refused"
        finally:
            connection.close()

    with ThreadPoolExecutor(50) as pool:
        said = list(pool.map(submit, range(50)))
    assert {each: said.count(each) for each in sorted(set(said))} == {
        "over": 11,
        "refused": 30,
        "reserved": 9,
    }
    assert (status(quota)["tokens_per_month"], status(quota)["concurrent_batches"]) == (90, 20)


@pytest.mark.django_db(transaction=True)
def test_reservations_of_open_batches_that_come_at_once_do_not_pass_the_limit() -> None:
    caller = alone()
    quota = limited(caller, tokens_per_month=95)
    ids = [opened(caller, f"batch_{at}") for at in range(20)]
    said = jobs.together(*(partial(reserved, id, estimate(10)) for id in ids))
    assert (said.count([]), said.count(["tokens_per_month"])) == (9, 11)
    assert status(quota)["tokens_per_month"] == 90


@pytest.mark.django_db(transaction=True)
def test_files_that_come_at_once_do_not_pass_the_limit(own_storage: Path) -> None:
    caller = alone()
    limited(caller, storage_bytes=25)
    said = jobs.together(*(partial(jobs.stored, caller, b"ten bytes\n") for _ in range(8)))
    refused = [each for each in said if isinstance(each, QuotaExceeded)]
    assert (len(said) - len(refused), len(refused), len(jobs.kept())) == (2, 6, 2)


def alone() -> Caller:
    """The owner of an organization that exists in committed rows."""
    _, person = organizations.create_organization(name="Acme", owner_email="owner@acme.test")
    caller = caller_of_user(person)
    assert caller is not None
    return caller


class AnyOrder(HypothesisTestCase):
    """Whatever is opened, reserved and settled in whatever order."""

    @settings(max_examples=60)
    @given(
        limit=st.integers(0, 60),
        steps=st.lists(
            st.tuples(
                st.sampled_from(["open", "reserve", "settle", "release"]),
                st.integers(0, 4),
                st.integers(0, 30),
            ),
            max_size=25,
        ),
    )
    def test_reserved_and_used_never_pass_the_limit_by_more_than_was_underestimated(
        self, limit: int, steps: list[tuple[str, int, int]]
    ) -> None:
        organizations_, person = organizations.create_organization(
            name=f"Acme {datetime.now(UTC).timestamp()}", owner_email="owner@acme.test"
        )
        caller = caller_of_user(person, organizations_.slug)
        assert caller is not None
        quota = limited(caller, tokens_per_month=limit)
        reservations: dict[str, int] = {}
        ran = underestimated = 0
        for step, at, tokens in steps:
            id = f"batch_{organizations_.pk}_{at}"
            if step == "open" and id not in reservations:
                if ran + sum(reservations.values()) >= limit:
                    with pytest.raises(QuotaExceeded):
                        opened(caller, id)
                else:
                    opened(caller, id)
                    reservations[id] = 0
            elif step == "reserve" and reservations.get(id) == 0:
                over = ran + sum(reservations.values()) + tokens > limit
                assert bool(reserved(id, estimate(tokens))) is over
                reservations[id] = 0 if over else tokens
            elif step == "settle" and id in reservations:
                quotas.settle(id, used(input=tokens))
                underestimated += max(0, tokens - reservations.pop(id))
                ran += tokens
            elif step == "release" and id in reservations:
                quotas.settle(id)
                del reservations[id]
            counted = status(quota)["tokens_per_month"]
            assert counted == ran + sum(reservations.values())
            assert 0 <= counted <= limit + underestimated
