"""Lists by key: a page is what follows an id, so a list may change while it is walked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from django.db.models import Model, QuerySet
from django.http import HttpRequest

M = TypeVar("M", bound=Model)


def searched(request: HttpRequest) -> str:
    """What is looked for by the list's search box; '' for nothing."""
    return request.GET.get("q", "").replace("\0", "").strip()[:150]


def page_of(
    mine: QuerySet[M], after: str | None, limit: int, *, descending: bool
) -> tuple[list[M], bool]:
    """One page by key, and whether there are more; ids sort by time, so `after` need not exist."""
    if after:
        mine = mine.filter(**{"pk__lt" if descending else "pk__gt": after})
    found = list(mine.order_by("-pk" if descending else "pk")[: limit + 1])
    return found[:limit], len(found) > limit


def ends(found: Sequence[Model]) -> dict[str, Any]:
    """The two fields of OpenAI's list envelope that say where a page begins and ends."""
    return {
        "first_id": str(found[0].pk) if found else None,
        "last_id": str(found[-1].pk) if found else None,
    }
