"""Limits on the wire: those of one subject, with how much of each is used."""

from __future__ import annotations

from typing import Annotated, Literal

from ninja import Field, Schema
from pydantic import ConfigDict, StringConstraints

from accounts.limits import MOST

Number = Annotated[int | None, Field(ge=0, le=MOST)]
Id = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class LimitsQuery(Schema):
    """Without either: the organization's."""

    user_id: Id | None = None
    api_key_id: Id | None = None


class LimitOut(Schema):
    object: Literal["organization.limit"] = "organization.limit"
    name: str
    unit: str
    limit: int | float | None = Field(description="None: no limit of its own.")
    used: int | float | None = Field(
        description="In this minute, in this month, or now; None: cannot be said."
    )
    is_default: bool = Field(description="The installation's, as no other was set.")


class LimitsOut(Schema):
    object: Literal["organization.limits"] = "organization.limits"
    organization_id: str
    user_id: str | None
    api_key_id: str | None
    data: list[LimitOut]


class LimitsIn(LimitsQuery):
    """What is left out stays as it is; null clears a limit."""

    model_config = ConfigDict(extra="forbid")

    requests_per_minute: Number = None
    batches_per_minute: Number = None
    files_per_minute: Number = None
    tokens_per_month: Number = None
    enqueued_tokens: Number = None
    concurrent_batches: Number = None
    requests_per_batch: Number = None
    storage_bytes: Number = None
    budget_per_month: Annotated[
        float | None, Field(ge=0, lt=10**12, allow_inf_nan=False, description="Two decimals.")
    ] = None
