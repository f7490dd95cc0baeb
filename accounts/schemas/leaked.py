"""The leaked-key check on the wire: texts come in, and are never said again."""

from __future__ import annotations

from typing import Annotated, Literal

from ninja import Field, Schema
from pydantic import StrictBool, StrictStr


class LeakedKeysIn(Schema):
    keys: Annotated[
        list[Annotated[StrictStr, Field(max_length=500)]], Field(min_length=1, max_length=1000)
    ]
    revoke: StrictBool = False


class LeakedKeyOut(Schema):
    """About the text at this place of the request; `known` when it is a key of ours."""

    index: int
    known: bool
    live: bool = False
    state: Literal["active", "replaced", "expired", "revoked"] | None = None
    id: str | None = None
    name: str | None = None
    redacted_value: str | None = None
    organization_id: str | None = None
    organization_name: str | None = None
    project_id: str | None = None
    project_name: str | None = None


class LeakedKeysOut(Schema):
    object: Literal["list"] = "list"
    data: list[LeakedKeyOut]
