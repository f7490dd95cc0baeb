"""Reads of the home page: what it brings together of several apps, each bounded however much there is.

All but `hourly` are to be called inside the caller's scope, as pages are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.db.models import Q
from django.utils import timezone

from accounts.access import Caller
from accounts.allowances import Allowance, allowances_of
from accounts.models import Organization
from accounts.queries import Hour, hourly_use
from batches import standings
from batches.models import Batch, Chunk
from batches.models.batches import UNFINISHED, ChunkState, Status
from models_registry.models import Model
from models_registry.queries import offered_to

LOOKED_AT = 10
"""Unfinished batches of each kind that are looked at: those that are under way, and the oldest."""
NEWEST = 500
"""Batches among which those are looked for that ended well but for some requests."""
RECENT = timedelta(days=7)
MOST_FAILURES = 5
_BAD = (Status.FAILED, Status.EXPIRED)


@dataclass(frozen=True)
class Unfinished:
    """What an organization has under way, oldest first; without what is related to it."""

    running: Sequence[Batch]
    waiting: Sequence[Batch]
    total: int

    def __bool__(self) -> bool:
        return self.total > 0


def unfinished() -> Unfinished:
    """In three queries at most. A batch runs once it has answers, or a worker is at it."""
    mine = Batch.objects.filter(status__in=UNFINISHED)
    oldest = mine.order_by("pk")
    found = list(oldest[:LOOKED_AT])
    total = len(found)
    if total == LOOKED_AT:
        leased = Chunk.objects.filter(state=ChunkState.LEASED).values("batch")
        under_way = Q(pk__in=leased) | Q(status__in=(Status.FINALIZING, Status.CANCELLING))
        found += oldest.filter(under_way, pk__gt=found[-1].pk)[:LOOKED_AT]
        total = mine.count()
    running = [batch for batch in found if _runs(batch)]
    waiting = [batch for batch in found if not _runs(batch)]
    return Unfinished(running, waiting, total)


def _runs(batch: Batch) -> bool:
    if batch.status != Status.IN_PROGRESS:
        return batch.status != Status.VALIDATING
    standing = standings.of(batch)
    return standing.position == 0 if standing else batch.answered > 0


def failures() -> list[Batch]:
    """The newest that failed, expired, or ended with failed requests, of the last days; without what
    is related to them.

    Of the last kind, which no index knows, only those among the newest batches.
    """
    newest = Batch.objects.order_by("-pk")
    recent = newest.filter(created_at__gte=timezone.now() - RECENT)
    some = recent.filter(pk__in=newest.values("pk")[:NEWEST])
    partly = some.filter(status=Status.COMPLETED, failed__gt=0)
    # Each by itself: of an OR, PostgreSQL would rather look at all that there ever were.
    kinds = [partly, *(recent.filter(status=status) for status in _BAD)]
    first, *others = (kind.values_list("pk", flat=True)[:MOST_FAILURES] for kind in kinds)
    bad = first.union(*others, all=True)
    return list(newest.filter(pk__in=list(bad))[:MOST_FAILURES])


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


def hourly(organization: Organization) -> list[Hour]:
    """The last eight days, from which every zone can take seven days of its own."""
    return hourly_use(organization, this_hour() - timedelta(hours=8 * 24 - 1))


def span(title: str, hours: Sequence[Hour], many: int) -> Span:
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
