"""Reads of deliveries, and of what is dead among them."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any

from django.db.models import Count, Q, QuerySet
from django.utils import timezone

from accounts.access import Caller
from accounts.ids import first_id
from batches.models import WebhookDelivery, WebhookEndpoint
from batches.models.events import DeliveryState


def deliveries_found(
    *,
    state: str | None = None,
    endpoint: str | None = None,
    event: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    error: str | None = None,
) -> QuerySet[WebhookDelivery]:
    """Deliveries that are like all that is given; times are their events', inclusive."""
    wanted: dict[str, Any] = {
        "state": state,
        "endpoint_id": endpoint,
        "event__type": event,
        "event__created_at__gte": since,
        "event__created_at__lte": until,
        "error__icontains": error,
    }
    return WebhookDelivery.objects.filter(
        **{
            name: value.replace("\0", "") if isinstance(value, str) else value
            for name, value in wanted.items()
            if value is not None
        }
    )


MOST_DELIVERIES = 10_000
"""How many are sent again or forgotten by one call."""


def oldest_of(found: QuerySet[WebhookDelivery]) -> QuerySet[WebhookDelivery]:
    """The first `MOST_DELIVERIES` of what was found."""
    ids = found.order_by("pk").values("pk")[:MOST_DELIVERIES]
    return WebhookDelivery.objects.filter(pk__in=ids)


def dead_letters(caller: Caller) -> int:
    """How many deliveries of the caller's organization are dead; an index look-up."""
    return deliveries_in(caller, DeliveryState.DEAD)


def deliveries_in(caller: Caller, state: str) -> int:
    with caller.scope():
        return WebhookDelivery.objects.filter(state=state).count()


def last_day_of(endpoints: Collection[WebhookEndpoint]) -> dict[str, tuple[int, int]]:
    """How many of the last day's deliveries have arrived, and how many there were, by endpoint."""
    first = first_id("whd_", timezone.now() - timedelta(days=1))
    recent = WebhookDelivery.objects.filter(endpoint__in=endpoints, pk__gte=first)
    rows = recent.values_list("endpoint_id").annotate(
        arrived=Count("pk", filter=Q(state=DeliveryState.DELIVERED)), sent=Count("pk")
    )
    return {endpoint: (arrived, sent) for endpoint, arrived, sent in rows.order_by("endpoint_id")}
