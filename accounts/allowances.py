"""What an organization, a person or a key may use, beside how much of it is used: only reads.

Setting limits is in `services/limits.py`, keeping to them in `throttling.py` and
`services/quotas.py`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from django.db.models import Count, F, Q, Sum
from django.db.models.functions import Coalesce
from django_scopes import scopes_disabled

from accounts import consumption, ids, throttling
from accounts.limits import LIMITS, Amount, Limit, in_effect, quota_of
from accounts.models import ApiKey, Organization, Quota, Reservation, UsageRecord, User
from accounts.models.quotas import REAL_TIME


@dataclass(frozen=True)
class Allowance:
    """One limit of one subject. `most` None: no limit; `used` None: cannot be said."""

    limit: Limit
    most: Amount | None
    used: Amount | None
    is_default: bool = False
    ceiling: Amount | None = None
    """The organization's limit, where the subject is a part of it."""

    @property
    def most_said(self) -> str:
        return self.limit.said(self.most)

    @property
    def used_said(self) -> str:
        return self.limit.said(self.used)

    @property
    def ceiling_said(self) -> str:
        return self.limit.said(self.ceiling)

    @property
    def said(self) -> str:
        """As "12 of 600 calls"."""
        return f"{self.limit.said(self.used, unit=False)} of {self.most_said}"

    @property
    def percent(self) -> int | None:
        """The share that is used, rounded down; 100 and more: nothing is left."""
        if self.used is None or self.most is None:
            return None
        return int(100 * self.used // self.most) if self.most else 100

    @property
    def shown_percent(self) -> int:
        """As long as a bar can be."""
        return min(self.percent or 0, 100)

    @property
    def colour(self) -> str:
        share = self.percent or 0
        return "red" if share >= 100 else "orange" if share >= 80 else "blue"

    @property
    def is_idle(self) -> bool:
        """Whether it changes nothing, as the organization's limit is tighter."""
        return self.most is not None and self.ceiling is not None and self.most > self.ceiling


@dataclass(frozen=True)
class Holder:
    """A person or a key with limits of its own."""

    quota: Quota
    allowances: Sequence[Allowance]

    @property
    def id(self) -> str:
        return subject_id(self.quota)


def subject_id(quota: Quota) -> str:
    """As addresses name whose limits these are: `user_…` or `key_…`."""
    return quota.api_key_id or (ids.user_id(quota.user_id) if quota.user_id else "")


def allowances_of(
    organization: Organization, user: User | None = None, api_key: ApiKey | None = None
) -> list[Allowance]:
    """Every limit of one subject, whether it has one or not."""
    with scopes_disabled():
        quota = quota_of(organization, user, api_key)
        whole = quota_of(organization) if user or api_key else None
        used: dict[str, Amount | None] = {**consumption.used_of(quota)}
    used |= {field: throttling.counted(quota, field) for field in LIMITS if LIMITS[field].is_rate}
    return [_allowance(quota, whole, field, _known(field, used)) for field in LIMITS]


def holders(organization: Organization, quotas: Iterable[Quota]) -> list[Holder]:
    """These rows with those of their limits that are set; in as many queries for many as for one.

    How many calls were just made, and how many bytes are kept, only each one's own page says.
    """
    rows = list(quotas)
    with scopes_disabled():
        whole = quota_of(organization)
        used = _used_by(organization, rows)
    return [
        Holder(
            row,
            [
                _allowance(row, whole, field, used.get((subject_id(row), field), _none_of(field)))
                for field in LIMITS
                if getattr(row, field) is not None
            ],
        )
        for row in rows
    ]


def is_set() -> Q:
    """Rows of people and keys that limit anything."""
    any_field = Q()
    for field in LIMITS:
        any_field |= Q(**{f"{field}__isnull": False})
    return any_field & (Q(user__isnull=False) | Q(api_key__isnull=False))


def _allowance(quota: Quota, whole: Quota | None, field: str, used: Amount | None) -> Allowance:
    most = in_effect(quota, field)
    ceiling = in_effect(whole, field) if whole is not None else None
    is_default = most is not None and getattr(quota, field) is None
    return Allowance(LIMITS[field], most, used, is_default, ceiling)


def _known(field: str, used: Mapping[str, Amount | None]) -> Amount | None:
    return None if field == "requests_per_batch" else used.get(field)


_SUMMED = ("tokens_per_month", "budget_per_month", "concurrent_batches", "enqueued_tokens")


def _none_of(field: str) -> Amount | None:
    return 0 if field in _SUMMED else None


def _used_by(
    organization: Organization, quotas: Sequence[Quota]
) -> Mapping[tuple[str, str], Amount]:
    """How much each of these subjects uses of what is summed, by (subject's id, field)."""
    mine = Q(organization=organization) & (
        Q(user__in=[row.user_id for row in quotas if row.user_id])
        | Q(api_key__in=[row.api_key_id for row in quotas if row.api_key_id])
    )
    found: dict[tuple[str, str], Amount] = defaultdict(int)
    month = UsageRecord.objects.filter(mine, day__gte=consumption.month_start())
    for row in month.values("user", "api_key").annotate(
        tokens=Sum(F("input_tokens") + F("output_tokens")), money=Sum("cost")
    ):
        for id in _subjects(row["user"], row["api_key"]):
            found[id, "tokens_per_month"] += row["tokens"]
            found[id, "budget_per_month"] += row["money"]
    enqueued: Counter[tuple[str, str]] = Counter()
    for row in (
        Reservation.objects.filter(mine)
        .values("user", "api_key", "model")
        .annotate(
            batches=Count("pk", filter=~REAL_TIME),
            all=Sum("tokens"),
            of_batches=Coalesce(Sum("tokens", filter=~REAL_TIME), 0),
            money=Coalesce(Sum("cost"), Decimal(0)),
        )
    ):
        for id in _subjects(row["user"], row["api_key"]):
            found[id, "tokens_per_month"] += row["all"]
            found[id, "budget_per_month"] += row["money"]
            found[id, "concurrent_batches"] += row["batches"]
            enqueued[id, row["model"]] += row["of_batches"]
    for (id, _), tokens in enqueued.items():
        found[id, "enqueued_tokens"] = max(found[id, "enqueued_tokens"], tokens)
    return found


def _subjects(user: int | None, api_key: str | None) -> list[str]:
    return [id for id in (user and ids.user_id(user), api_key) if id]
