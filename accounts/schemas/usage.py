"""Usage and costs on the wire, after OpenAI's administration API; ours add GPU seconds."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from django.conf import settings
from ninja import Field, Schema

from accounts import ids
from accounts.queries import Used

LAST_SECOND = 32_503_680_000
"""The year 3000, so that there is room to count on from it."""

Seconds = Annotated[int, Field(ge=0, le=LAST_SECOND)]
Names = Annotated[list[str], Field(max_length=100)]
Groups = Annotated[
    list[Literal["project_id", "user_id", "api_key_id", "model", "batch"]], Field(max_length=10)
]
CostGroups = Annotated[
    list[Literal["project_id", "user_id", "api_key_id", "line_item"]], Field(max_length=10)
]
NONE: list[str] = []


class RangeQuery(Schema):
    """A range of days; OpenAI's SDKs put brackets after the names of lists, others do not."""

    start_time: Seconds
    end_time: Seconds | None = None
    bucket_width: Literal["1m", "1h", "1d"] = "1d"
    limit: int = Field(7, ge=1, le=180)
    page: Annotated[str | None, Field(pattern=r"^(page_[0-9]{8})?$")] = None
    project_ids: Names = NONE
    more_project_ids: Names = Field(NONE, alias="project_ids[]")
    user_ids: Names = NONE
    more_user_ids: Names = Field(NONE, alias="user_ids[]")
    api_key_ids: Names = NONE
    more_api_key_ids: Names = Field(NONE, alias="api_key_ids[]")


class UsageQuery(RangeQuery):
    models: Names = NONE
    more_models: Names = Field(NONE, alias="models[]")
    batch: bool | None = None
    group_by: Groups = []
    more_group_by: Groups = Field([], alias="group_by[]")


class CostsQuery(RangeQuery):
    group_by: CostGroups = []
    more_group_by: CostGroups = Field([], alias="group_by[]")


class _Result(Schema):
    """What was not grouped by is null."""

    project_id: str | None
    user_id: str | None
    api_key_id: str | None


class EmbeddingsResult(_Result):
    object: Literal["organization.usage.embeddings.result"] = "organization.usage.embeddings.result"
    input_tokens: int
    num_model_requests: int
    model: str | None
    batch: bool = True
    gpu_seconds: float

    @classmethod
    def of(cls, used: Used) -> EmbeddingsResult:
        return cls(**_of_embeddings(used))


class _GeneratedResult(_Result):
    input_tokens: int
    input_cached_tokens: int
    output_tokens: int
    num_model_requests: int
    model: str | None
    batch: bool = True
    gpu_seconds: float


class CompletionsResult(_GeneratedResult):
    object: Literal["organization.usage.completions.result"] = (
        "organization.usage.completions.result"
    )

    @classmethod
    def of(cls, used: Used) -> CompletionsResult:
        return cls(**_of_completions(used))


class AllResult(_GeneratedResult):
    object: Literal["organization.usage.all.result"] = "organization.usage.all.result"

    @classmethod
    def of(cls, used: Used) -> AllResult:
        return cls(**_of_completions(used))


def _groups(used: Used) -> dict[str, Any]:
    user_id = None if used.user_id is None else ids.user_id(used.user_id)
    return {"project_id": used.project_id, "user_id": user_id, "api_key_id": used.api_key_id}


def _of_embeddings(used: Used) -> dict[str, Any]:
    return _groups(used) | {
        "input_tokens": used.input_tokens,
        "num_model_requests": used.requests,
        "model": used.model,
        "gpu_seconds": used.gpu_seconds,
    }


def _of_completions(used: Used) -> dict[str, Any]:
    return _of_embeddings(used) | {
        "input_cached_tokens": used.cached_tokens,
        "output_tokens": used.output_tokens,
    }


class Amount(Schema):
    value: float
    currency: str


class CostsResult(_Result):
    """`line_item` is the model."""

    object: Literal["organization.costs.result"] = "organization.costs.result"
    amount: Amount
    line_item: str | None

    @classmethod
    def of(cls, used: Used) -> CostsResult:
        amount = Amount(value=float(used.cost), currency=settings.CURRENCY)
        return cls(**_groups(used), amount=amount, line_item=used.model)


R = TypeVar("R", bound=Schema)


class Bucket(Schema, Generic[R]):
    """One day (UTC), whole even where the range begins or ends within it."""

    object: Literal["bucket"] = "bucket"
    start_time: int
    end_time: int
    results: list[R]


class UsagePage(Schema, Generic[R]):
    object: Literal["page"] = "page"
    data: list[Bucket[R]]
    has_more: bool
    next_page: str | None
