"""How much of each limit is used: reads only; `services/quotas.py` reserves and settles.

Nothing is kept as a running total that could drift: a month is the sum of its usage records and
of what unfinished batches, and real-time requests under way, have reserved.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from decimal import Decimal

from django.db.models import Count, F, Q, Sum
from django.db.models.functions import Coalesce
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.models import ApiKey, Organization, Quota, Reservation, UsageRecord, User
from accounts.models.quotas import REAL_TIME

Amount = int | Decimal
QUOTAS = (
    "tokens_per_month",
    "budget_per_month",
    "enqueued_tokens",
    "concurrent_batches",
    "requests_per_batch",
    "storage_bytes",
)

StorageMeter = Callable[[Organization, User | None, ApiKey | None], int]
_storage_meter: StorageMeter | None = None


def measure_storage_with(meter: StorageMeter) -> None:
    """Files are rows of an app above this one, which says here how to add up their bytes."""
    global _storage_meter
    _storage_meter = meter


def quotas_of(organization: Organization, user: User | None, api_key: ApiKey | None) -> list[Quota]:
    """The rows that limit a caller: the organization's, the person's, the key's; 0 to 3.

    To be called with scopes disabled.
    """
    subject = Q(user=None, api_key=None)
    if user is not None:
        subject |= Q(user=user, api_key=None)
    if api_key is not None:
        subject |= Q(user=None, api_key=api_key)
    return list(Quota.objects.filter(subject, organization=organization))


def use_of(quota: Quota, *, model: str | None = None) -> dict[str, Amount]:
    """How much of each limit its subject uses now, but for storage, in two queries.

    Enqueued tokens are those of `model`; without one, of the model that has most of them.
    `requests_per_batch` limits each batch by itself: 0. To be called with scopes disabled, as the
    rest of this module.
    """
    mine = _subject(quota)
    by_model = (
        Reservation.objects.filter(mine)
        .values("model")
        .annotate(
            batches=Count("pk", filter=~REAL_TIME),
            held=Sum("tokens"),
            money=Sum("cost"),
            enqueued=Coalesce(Sum("tokens", filter=~REAL_TIME), 0),
        )
    )
    enqueued = {row["model"]: row["enqueued"] for row in by_model}
    month = UsageRecord.objects.filter(mine, day__gte=month_start()).aggregate(
        tokens=Coalesce(Sum(F("input_tokens") + F("output_tokens")), 0),
        money=Coalesce(Sum("cost"), Decimal(0)),
    )
    return {
        "tokens_per_month": month["tokens"] + sum(row["held"] for row in by_model),
        "budget_per_month": month["money"] + sum(row["money"] for row in by_model),
        "enqueued_tokens": max(enqueued.values(), default=0)
        if model is None
        else enqueued.get(model, 0),
        "concurrent_batches": sum(row["batches"] for row in by_model),
        "requests_per_batch": 0,
    }


def unfinished_batches(organization: Organization) -> int:
    """How many of its batches have not ended, whatever holds them up."""
    with scopes_disabled():
        mine = Reservation.objects.filter(organization=organization)
        return mine.exclude(REAL_TIME).count()


def bytes_of(quota: Quota) -> int:
    """Bytes that its subject keeps."""
    if _storage_meter is None:
        return 0
    return _storage_meter(quota.organization, quota.user, quota.api_key)


def used_of(quota: Quota) -> dict[str, Amount]:
    """How much of each of `QUOTAS` its subject uses now, storage included."""
    with scopes_disabled():
        return use_of(quota) | {"storage_bytes": bytes_of(quota)}


def month_start() -> date:
    """The first day of this month, by UTC."""
    return timezone.now().date().replace(day=1)


def _subject(quota: Quota) -> Q:
    if quota.api_key_id:
        return Q(organization=quota.organization_id, api_key=quota.api_key_id)
    if quota.user_id:
        return Q(organization=quota.organization_id, user=quota.user_id)
    return Q(organization=quota.organization_id)
