"""`/v1/webhook_endpoints` as OpenAI's SDKs have it, and `/v1/webhook_deliveries`, which is ours."""

from __future__ import annotations

from datetime import UTC, datetime

from django.db.models import QuerySet
from django.http import HttpRequest
from ninja import Query, Router

from accounts import access
from accounts.access import Caller
from accounts.authentication import caller_of
from accounts.errors import ApiError
from accounts.models import Project
from accounts.paging import ends, page_of
from batches.models import WebhookDelivery, WebhookEndpoint
from batches.models.events import EventType
from batches.queries import webhooks as queries
from batches.services import deliveries, webhooks
from batches.webhook_schemas import (
    Changed,
    DeliveryFilter,
    DeliveryList,
    DeliveryOut,
    DeliveryPage,
    DeliverySelection,
    DeliveryWithAttempts,
    EventTypeList,
    RotateIn,
    TestIn,
    TestOut,
    WebhookChange,
    WebhookDeleted,
    WebhookIn,
    WebhookList,
    WebhookOut,
    WebhookPage,
    WebhookWithSecret,
)

router = Router(tags=["Webhooks"])


class NotReached(ApiError):
    """The receiver gave no answer to a test."""

    status = 400


@router.get("/webhook_event_types", response=EventTypeList, summary="List event types")
def list_event_types(request: HttpRequest) -> EventTypeList:
    caller_of(request, "webhooks.read")
    return EventTypeList(data=list(EventType.values))


@router.get("/webhook_endpoints", response=WebhookList, summary="List webhook endpoints")
def list_webhooks(request: HttpRequest, page: Query[WebhookPage]) -> WebhookList:
    caller = caller_of(request, "webhooks.read")
    with caller.scope():
        mine = WebhookEndpoint.objects.filter(batch=None)
        found, more = page_of(mine, page.after, page.limit, descending=True)
    return WebhookList(data=[WebhookOut.of(row) for row in found], has_more=more, **ends(found))


@router.post("/webhook_endpoints", response=WebhookWithSecret, summary="Create a webhook endpoint")
def create_webhook(request: HttpRequest, given: WebhookIn) -> WebhookWithSecret:
    caller = caller_of(request, "webhooks")
    fields = given.model_dump(exclude={"project_id"})
    project = _project(caller, given.project_id)
    made = webhooks.create_webhook(actor=caller, project=project, **fields)
    return WebhookWithSecret.with_secret(*made)


def _project(caller: Caller, id: str | None) -> Project | None:
    if id == "all":
        return None
    return access.get(caller, Project, id, param="project_id") if id else caller.project


@router.get(
    "/webhook_endpoints/{webhook_endpoint_id}",
    response=WebhookOut,
    summary="Retrieve a webhook endpoint",
)
def retrieve_webhook(request: HttpRequest, webhook_endpoint_id: str) -> WebhookOut:
    return WebhookOut.of(_webhook(caller_of(request, "webhooks.read"), webhook_endpoint_id))


@router.post(
    "/webhook_endpoints/{webhook_endpoint_id}",
    response=WebhookOut,
    summary="Change a webhook endpoint",
)
def update_webhook(
    request: HttpRequest, webhook_endpoint_id: str, given: WebhookChange
) -> WebhookOut:
    caller = caller_of(request, "webhooks")
    fields = given.model_dump(exclude_none=True)
    return WebhookOut.of(
        webhooks.update_webhook(actor=caller, row=_webhook(caller, webhook_endpoint_id), **fields)
    )


@router.delete(
    "/webhook_endpoints/{webhook_endpoint_id}",
    response=WebhookDeleted,
    summary="Delete an endpoint",
)
def delete_webhook(request: HttpRequest, webhook_endpoint_id: str) -> WebhookDeleted:
    caller = caller_of(request, "webhooks")
    webhooks.delete_webhook(actor=caller, row=_webhook(caller, webhook_endpoint_id))
    return WebhookDeleted(id=webhook_endpoint_id)


@router.post(
    "/webhook_endpoints/{webhook_endpoint_id}/rotate_secret",
    response=WebhookWithSecret,
    summary="Rotate the secret",
)
def rotate_secret(
    request: HttpRequest, webhook_endpoint_id: str, given: RotateIn
) -> WebhookWithSecret:
    caller = caller_of(request, "webhooks")
    overlap = webhooks.OVERLAP if given.keep_old_secret_active_for_24_hours else webhooks.NONE
    row = _webhook(caller, webhook_endpoint_id)
    made = webhooks.rotate_secret(actor=caller, row=row, overlap=overlap)
    return WebhookWithSecret.with_secret(*made)


@router.post(
    "/webhook_endpoints/{webhook_endpoint_id}/test", response=TestOut, summary="Send a sample event"
)
def test_webhook(request: HttpRequest, webhook_endpoint_id: str, given: TestIn) -> TestOut:
    caller = caller_of(request, "webhooks")
    row = _webhook(caller, webhook_endpoint_id)
    receipt = webhooks.test_webhook(actor=caller, row=row, event_type=given.event_type)
    if receipt.status is None:
        raise NotReached(f"The endpoint was not reached: {receipt.error}", param="url")
    return TestOut(
        webhook_endpoint_id=webhook_endpoint_id,
        event_type=given.event_type,
        status_code=receipt.status,
    )


@router.get("/webhook_deliveries", response=DeliveryList, summary="List deliveries")
def list_deliveries(request: HttpRequest, page: Query[DeliveryPage]) -> DeliveryList:
    caller = caller_of(request, "webhooks.read")
    with caller.scope():
        mine = _found(page).select_related("event")
        found, more = page_of(mine, page.after, page.limit, descending=True)
    return DeliveryList(data=[DeliveryOut.of(row) for row in found], has_more=more, **ends(found))


@router.post("/webhook_deliveries/replay", response=Changed, summary="Send again")
def replay(request: HttpRequest, given: DeliverySelection) -> Changed:
    caller = caller_of(request, "webhooks")
    with caller.scope():
        chosen = _chosen(given)
    return Changed(count=deliveries.replay(actor=caller, deliveries=chosen))


@router.post("/webhook_deliveries/purge", response=Changed, summary="Forget dead letters")
def purge(request: HttpRequest, given: DeliverySelection) -> Changed:
    caller = caller_of(request, "webhooks")
    with caller.scope():
        chosen = _chosen(given)
    return Changed(count=deliveries.purge(actor=caller, deliveries=chosen))


@router.get(
    "/webhook_deliveries/{delivery_id}",
    response=DeliveryWithAttempts,
    summary="Retrieve a delivery",
)
def retrieve_delivery(request: HttpRequest, delivery_id: str) -> DeliveryWithAttempts:
    caller = caller_of(request, "webhooks.read")
    row = access.get(caller, WebhookDelivery, delivery_id, param="delivery_id", related=("event",))
    with caller.scope():
        return DeliveryWithAttempts.of(row)


def _webhook(caller: Caller, id: str) -> WebhookEndpoint:
    return access.get(
        caller,
        WebhookEndpoint,
        id,
        param="webhook_endpoint_id",
        related=("organization", "project"),
        batch=None,
    )


def _found(given: DeliveryFilter) -> QuerySet[WebhookDelivery]:
    return queries.deliveries_found(
        state=given.state,
        endpoint=given.webhook_endpoint_id,
        event=given.event_type,
        since=datetime.fromtimestamp(given.since, UTC) if given.since else None,
        error=given.error,
    )


def _chosen(given: DeliverySelection) -> QuerySet[WebhookDelivery]:
    found = _found(given)
    if given.ids is not None:
        found = found.filter(pk__in=[id.replace("\0", "") for id in given.ids])
    return queries.oldest_of(found)
