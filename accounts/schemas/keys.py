"""API keys on the wire, after OpenAI's administration API, with what ours have beyond it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from ninja import Field, Schema
from pydantic import StrictBool, StrictInt, StrictStr

from accounts.ids import user_id
from accounts.keys import redacted
from accounts.models import ApiKey, User

LAST_SECOND = 253_402_300_799
"""The end of the year 9999."""

Name = Annotated[StrictStr, Field(min_length=1, max_length=150)]
Scopes = Annotated[list[StrictStr], Field(max_length=50)]
Networks = Annotated[list[StrictStr], Field(max_length=50)]
Moment = Annotated[StrictInt, Field(ge=0, le=LAST_SECOND)]


def epoch(moment: datetime | None) -> int | None:
    """Seconds since 1970, as the wire has its times."""
    return int(moment.timestamp()) if moment else None


def moment(seconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if seconds is not None else None


class KeyUser(Schema):
    object: Literal["organization.project.user"] = "organization.project.user"
    id: str
    name: str
    email: str
    added_at: int


class KeyServiceAccount(Schema):
    object: Literal["organization.project.service_account"] = "organization.project.service_account"
    id: str
    name: str
    created_at: int


class KeyOwner(Schema):
    type: Literal["user", "service_account"]
    user: KeyUser | None = None
    service_account: KeyServiceAccount | None = None

    @classmethod
    def of(cls, key: ApiKey) -> KeyOwner:
        if key.created_by is None:
            created = int(key.created_at.timestamp())
            account = KeyServiceAccount(id=key.pk, name=key.name, created_at=created)
            return cls(type="service_account", service_account=account)
        return cls(type="user", user=_user(key.created_by))


def _user(user: User) -> KeyUser:
    added = int(user.date_joined.timestamp())
    return KeyUser(id=user_id(user.pk), name=user.name, email=user.email, added_at=added)


class KeyOut(Schema):
    object: Literal["organization.project.api_key"] = "organization.project.api_key"
    id: str
    name: str
    redacted_value: str
    created_at: int
    last_used_at: int | None
    expires_at: int | None
    owner: KeyOwner
    scopes: list[str]
    allowed_ips: list[str]
    state: Literal["active", "replaced", "expired", "revoked"]
    replaced_by: str | None

    @classmethod
    def of(cls, key: ApiKey) -> KeyOut:
        return cls(**_fields(key))


class KeyWithValue(KeyOut):
    """Only what makes a key answers with its text, and only then."""

    value: str

    @classmethod
    def made(cls, key: ApiKey, text: str) -> KeyWithValue:
        return cls(**_fields(key), value=text)


def _fields(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.pk,
        "name": key.name,
        "redacted_value": redacted(key.prefix),
        "created_at": int(key.created_at.timestamp()),
        "last_used_at": epoch(key.last_used_at),
        "expires_at": epoch(key.expires_at),
        "owner": KeyOwner.of(key),
        "scopes": key.scopes,
        "allowed_ips": key.allowed_ips,
        "state": key.state,
        "replaced_by": key.replaced_by_id,
    }


class KeyList(Schema):
    object: Literal["list"] = "list"
    data: list[KeyOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


class KeyDeleted(Schema):
    object: Literal["organization.project.api_key.deleted"] = "organization.project.api_key.deleted"
    id: str
    deleted: Literal[True] = True


class KeyIn(Schema):
    name: Name
    scopes: Scopes = []
    allowed_ips: Networks = []
    expires_at: Moment | None = None
    service_account: StrictBool = Field(False, description="The project's, not one's own.")


class KeyChange(Schema):
    """What is left out stays; `expires_at: null` takes the end away."""

    name: Name | None = None
    allowed_ips: Networks | None = None
    expires_at: Moment | None = None


class RotateIn(Schema):
    overlap_seconds: Annotated[StrictInt, Field(ge=0, le=30 * 86_400)] = Field(
        86_400, description="How long the old key goes on working."
    )


class KeyPage(Schema):
    limit: int = Field(20, ge=1, le=100)
    after: Annotated[str | None, Field(pattern=r"^(key_[0-9a-f]{32})?$")] = None
