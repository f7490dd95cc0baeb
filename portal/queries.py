"""Reads of the home page: what it brings together of several apps, each bounded however much there is.

All but `hourly` are to be called inside the caller's scope, as pages are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.utils import timezone

from accounts.access import Caller
from accounts.allowances import Allowance, allowances_of
from accounts.models import HourlyUse, Organization
from accounts.queries import hourly_use
from batches import standings
from batches.models import Batch
from batches.models.batches import UNFINISHED, Status
from models_registry.models import Model
from models_registry.queries import offered_to

LOOKED_AT = 100
"""Unfinished batches that are sorted into running and waiting; the oldest, which run first."""
NEWEST = 500
"""Batches among which failures are looked for."""
RECENT = timedelta(days=7)
MOST_FAILURES = 5
_BAD = (Status.FAILED, Status.EXPIRED)
RELATED = ("model", "input_file")


@dataclass(frozen=True)
class Unfinished:
    """What an organization has under way, oldest first."""

    running: Sequence[Batch]
    waiting: Sequence[Batch]
    total: int

    def __bool__(self) -> bool:
        return self.total > 0


def unfinished() -> Unfinished:
    """In two queries. A batch runs once it has answers, or is nobody's next."""
    mine = Batch.objects.filter(status__in=UNFINISHED)
    oldest = list(mine.select_related(*RELATED).order_by("pk")[:LOOKED_AT])
    running = [batch for batch in oldest if _runs(batch)]
    waiting = [batch for batch in oldest if not _runs(batch)]
    total = mine.count() if len(oldest) == LOOKED_AT else len(oldest)
    return Unfinished(running, waiting, total)


def _runs(batch: Batch) -> bool:
    if batch.status != Status.IN_PROGRESS:
        return batch.status != Status.VALIDATING
    standing = standings.of(batch)
    return standing.position == 0 if standing else batch.answered > 0


def failures() -> list[Batch]:
    """The newest that failed, expired, or ended with failed requests, of the last days."""
    # In two queries: in one, PostgreSQL would rather look at all that there ever were.
    newest = Batch.objects.order_by("-pk").values_list("pk", "status", "failed", "created_at")
    since = timezone.now() - RECENT
    bad = [
        pk
        for pk, status, failed, at in newest[:NEWEST]
        if at >= since and (status in _BAD or (status == Status.COMPLETED and failed))
    ]
    found = Batch.objects.filter(pk__in=bad[:MOST_FAILURES])
    return list(found.select_related(*RELATED).order_by("-pk"))


def has_run() -> bool:
    """Whether any batch was ever completed."""
    return Batch.objects.filter(status=Status.COMPLETED).exists()


def failing_models(organization: Organization) -> list[Model]:
    """Those of its models whose last load failed."""
    return list(offered_to(organization).exclude(load_error="")[:5])


def tightest(caller: Caller, many: int) -> list[Allowance]:
    """The organization's limits that are set, those with the least left first."""
    known = [each for each in allowances_of(caller.organization) if each.percent is not None]
    return sorted(known, key=lambda each: (-(each.percent or 0), each.limit.is_rate))[:many]


@dataclass(frozen=True)
class Span:
    """What was used in some time, for people."""

    title: str
    requests: int
    input_tokens: int
    output_tokens: int


def hourly(organization: Organization) -> list[HourlyUse]:
    """The last eight days, from which every zone can take seven days of its own."""
    return hourly_use(organization, this_hour() - timedelta(hours=8 * 24 - 1))


def span(title: str, hours: Sequence[HourlyUse], many: int) -> Span:
    """The last so many hours, the running one included."""
    since = this_hour() - timedelta(hours=many - 1)
    inside = [each for each in hours if each.hour >= since]
    return Span(
        title,
        sum(each.requests for each in inside),
        sum(each.input_tokens for each in inside),
        sum(each.output_tokens for each in inside),
    )


def this_hour() -> datetime:
    return timezone.now().replace(minute=0, second=0, microsecond=0)
