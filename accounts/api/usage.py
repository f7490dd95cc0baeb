"""`/v1/organization/usage/…` and `/costs`: what was used, day by day."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, time, timedelta
from itertools import groupby
from typing import Any

from django.http import HttpRequest
from django.utils import timezone
from ninja import Query, Router, Schema

from accounts import ids, queries
from accounts.access import Caller
from accounts.authentication import caller_of
from accounts.errors import BadRequest
from accounts.queries import Used
from accounts.schemas.usage import (
    AllResult,
    CompletionsResult,
    CostsQuery,
    CostsResult,
    EmbeddingsResult,
    RangeQuery,
    UsagePage,
    UsageQuery,
)

router = Router(tags=["Usage"])

_EMBEDDINGS = {"endpoint": "/v1/embeddings"}
_COMPLETIONS = {"endpoint__in": ["/v1/chat/completions", "/v1/completions", "/v1/responses", ""]}
_GROUPS = {
    "project_id": "project",
    "user_id": "user",
    "api_key_id": "key",
    "model": "model",
    "line_item": "model",
}


@router.get("/usage/completions", response=UsagePage[CompletionsResult], summary="Completions")
def usage_of_completions(request: HttpRequest, asked: Query[UsageQuery]) -> dict[str, Any]:
    caller = caller_of(request, "usage.read")
    return _page(caller, asked, _usage_lookup(asked) | _COMPLETIONS, CompletionsResult.of)


@router.get("/usage/embeddings", response=UsagePage[EmbeddingsResult], summary="Embeddings")
def usage_of_embeddings(request: HttpRequest, asked: Query[UsageQuery]) -> dict[str, Any]:
    caller = caller_of(request, "usage.read")
    return _page(caller, asked, _usage_lookup(asked) | _EMBEDDINGS, EmbeddingsResult.of)


@router.get("/usage/all", response=UsagePage[AllResult], summary="All endpoints together")
def usage_of_all(request: HttpRequest, asked: Query[UsageQuery]) -> dict[str, Any]:
    caller = caller_of(request, "usage.read")
    return _page(caller, asked, _usage_lookup(asked), AllResult.of)


@router.get("/costs", response=UsagePage[CostsResult], summary="Costs")
def costs(request: HttpRequest, asked: Query[CostsQuery]) -> dict[str, Any]:
    caller = caller_of(request, "usage.read")
    return _page(caller, asked, _lookup(asked), CostsResult.of)


def _page(
    caller: Caller, asked: Any, lookup: dict[str, Any], result: Callable[[Used], Schema]
) -> dict[str, Any]:
    """A bucket for each day of the range, also for those on which nothing was used."""
    first, last = _days(asked)
    until = min(last, first + timedelta(days=asked.limit - 1))
    groups = {_GROUPS[name] for name in asked.group_by + asked.more_group_by if name in _GROUPS}
    rows = queries.usage(caller.organization, first, until, by=["day", *sorted(groups)], **lookup)
    following = until + timedelta(days=1)
    return {
        "data": [
            {
                "start_time": _seconds(day),
                "end_time": _seconds(day + timedelta(days=1)),
                "results": [result(row) for row in found],
            }
            for day, found in _daily(rows, first, until)
        ],
        "has_more": until < last,
        "next_page": f"page_{following:%Y%m%d}" if until < last else None,
    }


def _daily(rows: Iterator[Used], first: date, until: date) -> Iterator[tuple[date, list[Used]]]:
    found = {day: list(used) for day, used in groupby(rows, key=lambda row: row.day)}
    for number in range((until - first).days + 1):
        day = first + timedelta(days=number)
        yield day, found.get(day, [])


def _days(asked: RangeQuery) -> tuple[date, date]:
    """The first and the last day that are still to be answered."""
    if asked.bucket_width != "1d":
        raise BadRequest(
            "Usage is kept by day: bucket_width can only be '1d'.", param="bucket_width"
        )
    end = timezone.now().timestamp() if asked.end_time is None else asked.end_time
    if asked.end_time is not None and end <= asked.start_time:
        raise BadRequest("end_time must be after start_time.", param="end_time")
    first = _day(asked.start_time)
    last = max(first, _day(max(end - 1, 0)))
    return (_day_of_page(asked.page, first, last) if asked.page else first), last


def _seconds(day: date) -> int:
    return int(datetime.combine(day, time(), UTC).timestamp())


def _day(seconds: float) -> date:
    return datetime.fromtimestamp(seconds, UTC).date()


def _day_of_page(page: str, first: date, last: date) -> date:
    try:
        day = datetime.strptime(page, "page_%Y%m%d").date()
    except ValueError:
        day = date.min
    if not first <= day <= last:
        raise BadRequest("This page is not of this range of time.", param="page")
    return day


def _lookup(asked: RangeQuery) -> dict[str, Any]:
    """The filters that were named, for the query; what can be nobody's id matches nothing."""
    user_ids = asked.user_ids + asked.more_user_ids
    named = {
        "project_id__in": asked.project_ids + asked.more_project_ids,
        "api_key_id__in": asked.api_key_ids + asked.more_api_key_ids,
        "user_id__in": user_ids,
    }
    lookup: dict[str, Any] = {
        name: [value for value in values if "\0" not in value]
        for name, values in named.items()
        if values
    }
    if user_ids:
        lookup["user_id__in"] = [pk for id in user_ids if (pk := ids.parse_user_id(id))]
    return lookup


def _usage_lookup(asked: UsageQuery) -> dict[str, Any]:
    lookup = _lookup(asked)
    models = asked.models + asked.more_models
    if models or asked.batch is False:  # everything here ran in a batch
        wanted = [] if asked.batch is False else models
        lookup["model__in"] = [model for model in wanted if "\0" not in model]
    return lookup
