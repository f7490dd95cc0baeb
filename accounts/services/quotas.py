"""Quotas: what a batch may use is reserved before it runs, and settled when it ends.

What an organization has reserved and used is read and written with its row locked, so that
batches that come at the same moment cannot both have the last of it. Each batch's `Reservation`
stands from its making to its end; what it really used then becomes part of a `UsageRecord`.
A real-time request is reserved and settled in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Any

import structlog
from django.conf import settings
from django.db import connection, transaction
from django.dispatch import Signal
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts import consumption
from accounts.access import Caller
from accounts.errors import QuotaExceeded
from accounts.models import ApiKey, Organization, Quota, Reservation, User
from accounts.models.quotas import REAL_TIME

logger = structlog.get_logger(__name__)

month_used = Signal()
"""With `quota`, `limit` (its field), `most` and `used`: how a quota of the month stands after a
change of what is used or reserved, in the transaction of that change."""

PER = Decimal(1_000_000)
"""Prices are for so many tokens."""


@dataclass(frozen=True)
class Prices:
    """Money for a million tokens."""

    input: Decimal = Decimal(0)
    cached: Decimal = Decimal(0)
    output: Decimal = Decimal(0)

    def cost(self, *, input: int, cached: int, output: int) -> Decimal:
        """Of these tokens; `cached` ones are part of the input."""
        fresh = max(input - cached, 0)
        return (fresh * self.input + cached * self.cached + output * self.output) / PER


@dataclass(frozen=True)
class Estimate:
    """What a validated batch, or a real-time request, is likely to use: tokens in and out."""

    model: str
    requests: int
    tokens: int
    prices: Prices

    @property
    def cost(self) -> Decimal:
        """At the dearest price: how the tokens divide is not known yet."""
        dearest = max(self.prices.input, self.prices.cached, self.prices.output)
        return self.tokens * dearest / PER


@dataclass(frozen=True)
class Used:
    """What a batch, or a real-time request, used until it ended."""

    endpoint: str
    requests: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    gpu_seconds: float
    batches: int = 1


@dataclass(frozen=True)
class Excess:
    """A limit that would be passed, in words for the caller."""

    field: str
    message: str


def lock(organization: Organization) -> None:
    """Make whoever else reserves or settles for this organization wait for this transaction."""
    Organization.objects.select_for_update(no_key=True).get(pk=organization.pk)


def open_batch(*, batch_id: str, actor: Caller) -> None:
    """Begin to count a batch; raises `QuotaExceeded` when there is no room for even an empty one.

    In the transaction that makes the batch.
    """
    with scopes_disabled():
        lock(actor.organization)
        for quota in consumption.quotas_of(actor.organization, actor.user, actor.api_key):
            _require_any_left(quota)
        Reservation.objects.create(
            batch_id=batch_id,
            organization=actor.organization,
            project=actor.project,
            user=actor.user,
            api_key=actor.api_key,
        )


_MET_EMPTY = ("concurrent_batches", "tokens_per_month", "budget_per_month")
"""The limits that a new batch meets before it is known what is in it."""


def _require_any_left(quota: Quota) -> None:
    limits = {field: getattr(quota, field) for field in _MET_EMPTY}
    if all(limit is None for limit in limits.values()):
        return
    use = consumption.use_of(quota)
    for field, limit in limits.items():
        if limit is not None and use[field] >= limit:
            raise _exceeded(field, _said(quota, field, limit, use[field]))


def reserve(batch_id: str, estimate: Estimate) -> list[Excess]:
    """Set aside what the batch is expected to use; with any excess nothing is set aside.

    In the transaction that records the validation's outcome.
    """
    with scopes_disabled():
        mine = Reservation.objects.select_related("organization", "user", "api_key")
        reservation = mine.get(pk=batch_id)
        lock(reservation.organization)
        subjects = (reservation.organization, reservation.user, reservation.api_key)
        found = [
            excess
            for quota in consumption.quotas_of(*subjects)
            for excess in _over(quota, estimate, _MET_WHOLE)
        ]
        if not found:
            reservation.model = estimate.model
            reservation.tokens, reservation.cost = estimate.tokens, estimate.cost
            reservation.input_price = estimate.prices.input
            reservation.cached_price = estimate.prices.cached
            reservation.output_price = estimate.prices.output
            reservation.save(force_update=True)
            _tell_of_use(*subjects)
        return found


def _tell_of_use(organization: Organization, user: User | None, api_key: ApiKey | None) -> None:
    """Send `month_used` for each quota of a month; the organization is locked."""
    for quota in consumption.quotas_of(organization, user, api_key):
        limits = {field: getattr(quota, field) for field in _BY_THE_MONTH}
        if all(limit is None for limit in limits.values()):
            continue
        use = consumption.use_of(quota)
        for field, limit in limits.items():
            if limit is not None:
                month_used.send(Quota, quota=quota, limit=field, most=limit, used=use[field])


_BY_THE_MONTH = ("tokens_per_month", "budget_per_month")
_MET_WHOLE = ("requests_per_batch", "enqueued_tokens", *_BY_THE_MONTH)
"""The limits that a real-time request meets, and those of a batch that is validated."""


def _over(quota: Quota, estimate: Estimate, fields: Sequence[str]) -> Iterator[Excess]:
    wanted: dict[str, int | Decimal] = {
        "requests_per_batch": estimate.requests,
        "enqueued_tokens": estimate.tokens,
        "tokens_per_month": estimate.tokens,
        "budget_per_month": estimate.cost,
    }
    limits = {field: getattr(quota, field) for field in fields}
    if all(limit is None for limit in limits.values()):
        return
    use = consumption.use_of(quota, model=estimate.model)
    for field, limit in limits.items():
        if limit is not None and use[field] + wanted[field] > limit:
            yield Excess(field, _said(quota, field, limit, use[field], wanted[field]))


@transaction.atomic
def open_request(*, request_id: str, actor: Caller, estimate: Estimate) -> None:
    """Begin to count a real-time request; raises `QuotaExceeded` when the month has no room for it.

    `settle` ends it, by the same id.
    """
    with scopes_disabled():
        quotas = consumption.quotas_of(actor.organization, actor.user, actor.api_key)
        if any(getattr(quota, field) is not None for quota in quotas for field in _BY_THE_MONTH):
            lock(actor.organization)
        for quota in quotas:
            for excess in _over(quota, estimate, _BY_THE_MONTH):
                raise _exceeded(excess.field, excess.message)
        Reservation.objects.create(
            batch_id=request_id,
            organization=actor.organization,
            project=actor.project,
            user=actor.user,
            api_key=actor.api_key,
            model=estimate.model,
            tokens=estimate.tokens,
            cost=estimate.cost,
            input_price=estimate.prices.input,
            cached_price=estimate.prices.cached,
            output_price=estimate.prices.output,
        )


def forget_requests(older_than: timedelta) -> None:
    """Drop what is still reserved for real-time requests that began so long ago.

    A worker that is killed cannot say what its requests used.
    """
    before = timezone.now() - older_than
    Reservation.objects.filter(REAL_TIME, created_at__lt=before).delete()


_SETTLE = """
INSERT INTO accounts_usagerecord AS kept (
    day, organization_id, project_id, user_id, api_key_id, model, endpoint, batches, requests,
    input_tokens, cached_tokens, output_tokens, reasoning_tokens, gpu_seconds, cost
) VALUES (
    %(day)s, %(organization)s, %(project)s, %(user)s, %(api_key)s, %(model)s, %(endpoint)s,
    %(batches)s, %(requests)s, %(input_tokens)s, %(cached_tokens)s, %(output_tokens)s, %(reasoning_tokens)s,
    %(gpu_seconds)s, %(cost)s
)
ON CONFLICT ON CONSTRAINT one_usage_record_a_day DO UPDATE SET
    batches = kept.batches + EXCLUDED.batches,
    requests = kept.requests + EXCLUDED.requests,
    input_tokens = kept.input_tokens + EXCLUDED.input_tokens,
    cached_tokens = kept.cached_tokens + EXCLUDED.cached_tokens,
    output_tokens = kept.output_tokens + EXCLUDED.output_tokens,
    reasoning_tokens = kept.reasoning_tokens + EXCLUDED.reasoning_tokens,
    gpu_seconds = kept.gpu_seconds + EXCLUDED.gpu_seconds,
    cost = kept.cost + EXCLUDED.cost
"""

_FORGET = """
DELETE FROM accounts_reservation WHERE batch_id = %s
RETURNING noted_requests, noted_input_tokens, noted_output_tokens
"""
_NOTE_REST = """
INSERT INTO accounts_hourlyuse AS kept (
    organization_id, hour, requests, input_tokens, output_tokens
) VALUES (%s, date_trunc('hour', clock_timestamp(), 'UTC'), %s, %s, %s)
ON CONFLICT (organization_id, hour) DO UPDATE SET
    requests = kept.requests + EXCLUDED.requests,
    input_tokens = kept.input_tokens + EXCLUDED.input_tokens,
    output_tokens = kept.output_tokens + EXCLUDED.output_tokens
"""
"""What the sweep had not noted yet, which for a real-time request is all."""


@transaction.atomic
def settle(batch_id: str, used: Used | None = None) -> Decimal | None:
    """Turn the batch's reservation into what it used (None: nothing); a second time does nothing.
    Returns what that cost, or None where nothing was booked.

    In the transaction that ends the batch, however it ends: what ran is paid for. A real-time
    request's id does as well as a batch's.
    """
    with scopes_disabled():
        mine = Reservation.objects.select_related("organization", "user", "api_key")
        mine = mine.filter(pk=batch_id)
        reservation = mine.first()
        if reservation is None:
            logger.error("nothing reserved, nothing booked", batch_id=batch_id)
            return None
        lock(reservation.organization)
        with connection.cursor() as cursor:
            cursor.execute(_FORGET, [batch_id])
            noted = cursor.fetchone()
            if not noted or used is None or not used.requests:
                return None
            row = _row(reservation, used)
            cursor.execute(_SETTLE, row)
            cursor.execute(_NOTE_REST, [reservation.organization_id, *_rest(used, noted)])
        _tell_of_use(reservation.organization, reservation.user, reservation.api_key)
        return Decimal(row["cost"])


def _rest(used: Used, noted: tuple[int, int, int]) -> list[int]:
    amounts = (used.requests, used.input_tokens, used.output_tokens)
    return [amount - before for amount, before in zip(amounts, noted, strict=True)]


def _row(reservation: Reservation, used: Used) -> dict[str, Any]:
    prices = Prices(reservation.input_price, reservation.cached_price, reservation.output_price)
    cost = prices.cost(
        input=used.input_tokens, cached=used.cached_tokens, output=used.output_tokens
    )
    return {
        **vars(used),
        "day": timezone.now().date(),
        "organization": reservation.organization_id,
        "project": reservation.project_id,
        "user": reservation.user_id,
        "api_key": reservation.api_key_id,
        "model": reservation.model,
        "cost": cost,
    }


def require_storage(actor: Caller, more: int) -> None:
    """Raise `QuotaExceeded` unless so many bytes more may be kept.

    In the transaction that keeps them; the organization stays locked until it ends.
    """
    with scopes_disabled():
        subjects = (actor.organization, actor.user, actor.api_key)
        quotas = consumption.quotas_of(*subjects)
        limits = [(quota, quota.storage_bytes) for quota in quotas]
        if all(limit is None for _, limit in limits):
            return
        lock(actor.organization)
        for quota, limit in limits:
            if limit is not None and (used := consumption.bytes_of(quota)) + more > limit:
                raise _exceeded("storage_bytes", _said(quota, "storage_bytes", limit, used, more))


NAMES = {
    "tokens_per_month": "tokens a month",
    "enqueued_tokens": "enqueued tokens of one model",
    "concurrent_batches": "unfinished batches",
    "requests_per_batch": "requests a batch",
    "storage_bytes": "bytes of files",
    "budget_per_month": "money a month",
}


def _said(quota: Quota, field: str, limit: Any, used: Any, more: Any = 0) -> str:
    """Whose limit it is, how much of it is used, and who can raise it."""
    if quota.api_key_id:
        whose, who = "This API key's", "an owner or admin of your organization"
    elif quota.user_id:
        whose, who = "Your own", "an owner or admin of your organization"
    else:
        whose, who = "Your organization's", "a platform operator"
    wanted = f" and this needs {_number(more)}" if more else ""
    return (
        f"{whose} limit is {_number(limit)} {NAMES[field]}; {_number(used)} are in use{wanted}. "
        f"{who[0].upper()}{who[1:]} can raise it: {settings.BASE_URL}/organization/limits"
    )


def _number(value: int | Decimal) -> str:
    return f"{value:,.2f}" if isinstance(value, Decimal) else f"{value:,}"


def _exceeded(field: str, message: str) -> QuotaExceeded:
    return QuotaExceeded(message, param=field, code="insufficient_quota")
