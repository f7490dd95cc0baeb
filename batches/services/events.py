"""The outbox: an event is written with the change it tells of, and with it who is to be told.

Sending is `services/deliveries.py`'s; nothing here leaves the database.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import orjson
from django.db import connection
from django.db.models import Q
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.consumption import month_start
from accounts.models import Organization, Project, Quota
from batches import wakeups
from batches.models import Batch, Event, File, QuotaNotice, WebhookDelivery, WebhookEndpoint
from batches.models.batches import Status
from batches.models.events import EventType, event_id
from models_registry.models import Model
from models_registry.queries import may_be_offered_to

OF_BATCHES: Mapping[str, EventType] = {
    Status.IN_PROGRESS: EventType.BATCH_IN_PROGRESS,
    Status.COMPLETED: EventType.BATCH_COMPLETED,
    Status.FAILED: EventType.BATCH_FAILED,
    Status.EXPIRED: EventType.BATCH_EXPIRED,
    Status.CANCELLED: EventType.BATCH_CANCELLED,
}
"""The statuses that are told of; `finalizing` and `cancelling` only lead to one of them."""
THRESHOLDS = (80, 100)
"""Percent of a month's quota that are told of."""
_AT_ONCE = 1000
"""Rows that one statement writes."""


@dataclass(frozen=True, slots=True)
class News:
    """What is to be told to one organization; about no single project: to all its projects'."""

    organization_id: str
    project_id: str | None
    data: Mapping[str, Any]


# --- What is told of --------------------------------------------------------------------------


def batch_changed(batch: Batch) -> None:
    """Write the event of the batch's new status, in the transaction that changes it."""
    if type := OF_BATCHES.get(batch.status):
        _record_of_batch(type, batch, {"id": batch.pk})


def batch_progressed(batch_id: str, percents: Sequence[int]) -> None:
    """Write that these shares of the requests are answered, in the transaction that counts them."""
    with scopes_disabled():
        batch = Batch.objects.select_related("organization", "project").get(pk=batch_id)
    counts = {"total": batch.total, "completed": batch.completed, "failed": batch.failed}
    for percent in percents:
        data = {"id": batch.pk, "percent": percent, "request_counts": counts}
        _record_of_batch(EventType.BATCH_PROGRESS, batch, data)


def _record_of_batch(type: EventType, batch: Batch, data: Mapping[str, Any]) -> None:
    record(type, organization=batch.organization, project=batch.project, data=data, batch=batch)


def files_expired(files: Iterable[File]) -> None:
    """Write that these files are gone, in the transaction that hides them."""
    record_all(
        EventType.FILE_EXPIRED,
        [News(file.organization_id, file.project_id, {"id": file.pk}) for file in files],
    )


def model_changed(model: Model, *, is_ready: bool) -> None:
    """Write for every organization that may use the model that it loads now, or does not any more.

    Why it does not is the operators' to know: it names folders and hosts.
    """
    type = EventType.MODEL_READY if is_ready else EventType.MODEL_FAILED
    told = may_be_offered_to(model).filter(deleted_at=None).order_by("pk")
    record_all(
        type, [News(id, None, {"id": model.name}) for id in told.values_list("pk", flat=True)]
    )


def quota_used(quota: Quota, limit: str, most: int | Decimal, used: int | Decimal) -> None:
    """Write that a threshold of the month's quota is reached, each once a month.

    In the transaction that counts what is used, with the organization's row locked.
    """
    for percent in THRESHOLDS:
        if most and used * 100 >= most * percent and _is_first(quota, limit, percent):
            data: dict[str, Any] = {"id": quota.subject_id, "limit": limit}
            data |= {"percent": percent, "most": _number(most), "used": _number(used)}
            key = quota.api_key
            record_all(
                EventType.QUOTA_THRESHOLD,
                [News(quota.organization_id, key.project_id if key else None, data)],
            )


def _is_first(quota: Quota, limit: str, percent: int) -> bool:
    with scopes_disabled():
        _, first = QuotaNotice.objects.get_or_create(
            quota=quota,
            limit=limit,
            percent=percent,
            month=month_start(),
        )
    return bool(first)


def _number(amount: int | Decimal) -> int | str:
    """Tokens as a number, money as text: JSON's numbers lose cents."""
    return f"{amount:.2f}" if isinstance(amount, Decimal) else amount


# --- Writing it down --------------------------------------------------------------------------


def record(
    type: EventType,
    *,
    organization: Organization,
    project: Project | None,
    data: Mapping[str, Any],
    batch: Batch | None = None,
) -> Event:
    """Write an event, and a delivery for every endpoint that is told of such; call in a transaction.

    The body is frozen here: OpenAI's `event` object as every delivery of it will carry it.
    """
    news = News(organization.pk, project.pk if project else None, data)
    (event,) = record_all(type, [news], batch=batch)
    return event


def record_all(type: EventType, news: Sequence[News], *, batch: Batch | None = None) -> list[Event]:
    """As `record`, for many organizations in three statements a thousand."""
    made: list[Event] = []
    with scopes_disabled():
        for start in range(0, len(news), _AT_ONCE):
            made += _write([_event(type, each) for each in news[start : start + _AT_ONCE]], batch)
    return made


def _event(type: EventType, news: News) -> Event:
    id, now = event_id(), timezone.now()
    body = {
        "id": id,
        "object": "event",
        "created_at": int(now.timestamp()),
        "type": type.value,
        "data": dict(news.data),
    }
    return Event(
        id=id,
        organization_id=news.organization_id,
        project_id=news.project_id,
        type=type,
        created_at=now,
        body=orjson.dumps(body).decode(),
    )


def _write(events: Sequence[Event], batch: Batch | None) -> list[Event]:
    """Of one type, with their deliveries."""
    found = defaultdict(list)
    for endpoint in _held(_told_of(events, batch)):
        found[endpoint.organization_id].append(endpoint)
    written = Event.objects.bulk_create(events)
    deliveries = [
        WebhookDelivery(organization_id=event.organization_id, event=event, endpoint=endpoint)
        for event in events
        for endpoint in found[event.organization_id]
        if _is_about(event, endpoint)
    ]
    WebhookDelivery.objects.bulk_create(deliveries, batch_size=_AT_ONCE)
    for endpoint_id in dict.fromkeys(each.endpoint_id for each in deliveries):
        wakeups.deliver(endpoint_id)
    return written


def _told_of(events: Sequence[Event], batch: Batch | None) -> Iterable[WebhookEndpoint]:
    """The endpoints of these organizations that are told of such events, whatever the project."""
    which = Q(batch=None)
    if batch is not None:
        which |= Q(batch=batch)
    ids = sorted({event.organization_id for event in events})
    endpoints = WebhookEndpoint.objects.filter(which, organization__in=ids, disabled_at=None)
    wanted = endpoints.filter(event_types__contains=events[0].type).order_by("pk")
    return wanted.only("organization_id", "project_id")


def _held(endpoints: Iterable[WebhookEndpoint]) -> list[WebhookEndpoint]:
    """Those that are still there, and stay so until the transaction ends.

    That one is deleted meanwhile would be found by the commit alone, and undo the change that is
    told of: results that are saved, a model that is loaded.
    """
    if not (some := {each.pk: each for each in endpoints}):
        return []
    with connection.cursor() as cursor:
        cursor.execute(_HOLD, [list(some)])
        return [some[pk] for (pk,) in cursor.fetchall()]


_HOLD = "SELECT id FROM batches_webhookendpoint WHERE id = ANY(%s) ORDER BY id FOR KEY SHARE"


def _is_about(event: Event, endpoint: WebhookEndpoint) -> bool:
    return (
        None in (event.project_id, endpoint.project_id) or event.project_id == endpoint.project_id
    )
