"""Audit events on the wire, after OpenAI's administration API, with what our chain adds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ninja import Field, Schema

from accounts import ids
from accounts.models import AuditEvent
from accounts.models.audit import Via

LAST_SECOND = 32_503_680_000
"""The year 3000."""

Seconds = Annotated[int | None, Field(ge=0, le=LAST_SECOND)]
Names = Annotated[list[str], Field(max_length=100)]
Cursor = Annotated[str | None, Field(pattern=r"^(audit_[0-9a-f]{32})?$")]
NONE: list[str] = []


class AuditQuery(Schema):
    """OpenAI's SDKs put brackets after the names of lists; others do not."""

    limit: int = Field(20, ge=1, le=100)
    after: Cursor = None
    before: Cursor = None
    effective_at_gt: Seconds = Field(None, alias="effective_at[gt]")
    effective_at_gte: Seconds = Field(None, alias="effective_at[gte]")
    effective_at_lt: Seconds = Field(None, alias="effective_at[lt]")
    effective_at_lte: Seconds = Field(None, alias="effective_at[lte]")
    event_types: Names = NONE
    more_event_types: Names = Field(NONE, alias="event_types[]")
    actor_ids: Names = NONE
    more_actor_ids: Names = Field(NONE, alias="actor_ids[]")
    actor_emails: Names = NONE
    more_actor_emails: Names = Field(NONE, alias="actor_emails[]")
    resource_ids: Names = NONE
    more_resource_ids: Names = Field(NONE, alias="resource_ids[]")


class Person(Schema):
    id: str
    email: str


class Session(Schema):
    user: Person | None
    ip_address: str | None


class Key(Schema):
    id: str
    type: Literal["user", "service_account"]
    user: Person | None
    name: str | None = Field(description="A service key's name when it acted.")


class Actor(Schema):
    type: Literal["session", "api_key"]
    session: Session | None
    api_key: Key | None = Field(description="Also of a token: its id, and whose it was.")


class Target(Schema):
    kind: str
    id: str
    label: str


class AuditLogOut(Schema):
    object: Literal["organization.audit_log"] = "organization.audit_log"
    id: str
    type: str
    effective_at: int
    actor: Actor | None = Field(description="None for the system itself.")
    via: Via
    ip_address: str | None
    target: Target | None
    changes: dict[str, Any] = Field(description="Field: [before, after]; secrets are masked.")
    request_id: str | None
    number: int
    hash: str
    previous_hash: str

    @classmethod
    def of(cls, event: AuditEvent) -> AuditLogOut:
        target = Target(kind=event.target_kind, id=event.target_id, label=event.target_label)
        return cls(
            id=event.pk,
            type=event.action,
            effective_at=int(event.created_at.timestamp()),
            actor=_actor(event),
            via=Via(event.via),
            ip_address=event.address,
            target=target if event.target_kind or event.target_label else None,
            changes=event.changes,
            request_id=event.request_id or None,
            number=event.number,
            hash=event.hash,
            previous_hash=event.previous_hash,
        )


def _actor(event: AuditEvent) -> Actor | None:
    if event.via == Via.SYSTEM:
        return None
    person = None
    if event.actor_id is not None:
        person = Person(id=ids.user_id(event.actor_id), email=event.actor_label)
    if event.via in (Via.SESSION, Via.OPERATOR):
        session = Session(user=person, ip_address=event.address)
        return Actor(type="session", session=session, api_key=None)
    key = Key(
        id=event.credential,
        type="user" if person else "service_account",
        user=person,
        name=None if person else event.actor_label,
    )
    return Actor(type="api_key", session=None, api_key=key)


class AuditLogList(Schema):
    object: Literal["list"] = "list"
    data: list[AuditLogOut]
    first_id: str | None
    last_id: str | None
    has_more: bool
