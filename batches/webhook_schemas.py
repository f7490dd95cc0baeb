"""Webhook endpoints, their deliveries and attempts on the wire; the first as OpenAI has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ninja import Field, Schema
from pydantic import StrictBool, StrictInt, StrictStr

from batches.models import WebhookAttempt, WebhookDelivery, WebhookEndpoint
from batches.models.events import DeliveryState
from batches.schemas import epoch

Name = Annotated[StrictStr, Field(min_length=1, max_length=150)]
Url = Annotated[StrictStr, Field(min_length=1, max_length=2000)]
EventTypes = Annotated[list[StrictStr], Field(min_length=1, max_length=50)]
Headers = Annotated[dict[StrictStr, StrictStr], Field(max_length=20)]


class WebhookOut(Schema):
    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    updated_at: int | None
    event_types: list[str]
    name: str
    url: str
    signing_secret_hint: str | None
    project_id: str | None = Field(description="Null: told of all projects.")
    enabled: bool
    disabled_reason: str | None
    timeout: int = Field(description="Seconds.")
    per_minute: int | None

    @classmethod
    def of(cls, row: WebhookEndpoint) -> WebhookOut:
        return cls(**cls.fields_of(row))

    @staticmethod
    def fields_of(row: WebhookEndpoint) -> dict[str, Any]:
        return {
            "id": row.pk,
            "created_at": int(row.created_at.timestamp()),
            "updated_at": epoch(row.updated_at),
            "event_types": row.event_types,
            "name": row.name,
            "url": row.url,
            "signing_secret_hint": row.secret_hint,
            "project_id": row.project_id,
            "enabled": row.enabled,
            "disabled_reason": row.disabled_why or None,
            "timeout": row.timeout,
            "per_minute": row.per_minute,
        }


class WebhookWithSecret(WebhookOut):
    signing_secret: str = Field(description="Shown this once.")

    @classmethod
    def with_secret(cls, row: WebhookEndpoint, secret: str) -> WebhookWithSecret:
        return cls(**cls.fields_of(row), signing_secret=secret)


class WebhookList(Schema):
    object: Literal["list"] = "list"
    data: list[WebhookOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


class WebhookDeleted(Schema):
    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: Literal[True] = True


class EventTypeList(Schema):
    object: Literal["list"] = "list"
    data: list[str]


class WebhookIn(Schema):
    name: Name
    url: Url
    event_types: EventTypes
    project_id: StrictStr | None = Field(
        None, description="Left out: the key's project; `all`: every project of the organization."
    )
    timeout: StrictInt = 15
    per_minute: StrictInt | None = None
    headers: Headers = Field(default_factory=dict, description="Sent along; never shown again.")


class WebhookChange(Schema):
    """What is left out stays."""

    name: Name | None = None
    url: Url | None = None
    event_types: EventTypes | None = None
    timeout: StrictInt | None = None
    per_minute: StrictInt | None = None
    headers: Headers | None = None
    enabled: StrictBool | None = None


class RotateIn(Schema):
    keep_old_secret_active_for_24_hours: StrictBool = False


class TestIn(Schema):
    event_type: StrictStr


class TestOut(Schema):
    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True] = True


class AttemptOut(Schema):
    created_at: int
    milliseconds: int
    status_code: int | None
    answer: str
    error: str | None

    @classmethod
    def of(cls, row: WebhookAttempt) -> AttemptOut:
        return cls(
            created_at=int(row.at.timestamp()),
            milliseconds=row.milliseconds,
            status_code=row.status,
            answer=row.answer,
            error=row.error or None,
        )


class DeliveryOut(Schema):
    id: str
    object: Literal["webhook_delivery"] = "webhook_delivery"
    created_at: int
    event_id: str
    event_type: str
    webhook_endpoint_id: str
    state: DeliveryState
    tries: int
    next_attempt_at: int | None
    ended_at: int | None
    error: str | None

    @classmethod
    def of(cls, row: WebhookDelivery) -> DeliveryOut:
        return cls(**cls.fields_of(row))

    @staticmethod
    def fields_of(row: WebhookDelivery) -> dict[str, Any]:
        return {
            "id": row.pk,
            "created_at": int(row.event.created_at.timestamp()),
            "event_id": row.event_id,
            "event_type": row.event.type,
            "webhook_endpoint_id": row.endpoint_id,
            "state": row.state,
            "tries": row.tries,
            "next_attempt_at": epoch(row.next_attempt_at),
            "ended_at": epoch(row.ended_at),
            "error": row.error or None,
        }


class DeliveryWithAttempts(DeliveryOut):
    body: str = Field(description="The exact JSON of the event.")
    attempts: list[AttemptOut]

    @classmethod
    def of(cls, row: WebhookDelivery) -> DeliveryWithAttempts:
        attempts = [AttemptOut.of(each) for each in row.attempts.order_by("pk")]
        return cls(**cls.fields_of(row), body=row.event.body, attempts=attempts)


class DeliveryList(Schema):
    object: Literal["list"] = "list"
    data: list[DeliveryOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeliveryFilter(Schema):
    """Which deliveries; of all these at once."""

    state: DeliveryState | None = None
    webhook_endpoint_id: StrictStr | None = None
    event_type: StrictStr | None = None
    since: Annotated[int, Field(ge=0, lt=2**33)] | None = Field(
        None, description="Of events from this moment on, in seconds since 1970."
    )
    error: Annotated[StrictStr, Field(max_length=200)] | None = Field(
        None, description="Whose last error contains this."
    )


class DeliveryPage(DeliveryFilter):
    limit: int = Field(20, ge=1, le=100)
    after: Annotated[str | None, Field(pattern=r"^(whd_[0-9a-f]{32})?$")] = None


class DeliverySelection(DeliveryFilter):
    """These deliveries, or all that the filter finds; at most 10,000 at once."""

    ids: Annotated[list[StrictStr], Field(min_length=1, max_length=1000)] | None = None


class Changed(Schema):
    object: Literal["webhook_delivery.batch"] = "webhook_delivery.batch"
    count: int


class WebhookPage(Schema):
    limit: int = Field(20, ge=1, le=100)
    after: Annotated[str | None, Field(pattern=r"^(we_[0-9a-f]{32})?$")] = None
