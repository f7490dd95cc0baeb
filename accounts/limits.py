"""What can be limited: names, units, and which limits hold where no others are set.

Calls are counted in `throttling.py`; what else is used is added up in `consumption.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from django.conf import settings
from django.template.defaultfilters import filesizeformat

from accounts.models import ApiKey, Organization, Quota, User

Amount = int | Decimal
MOST = 2**53
"""The largest whole number that every client's JSON keeps as it is."""


@dataclass(frozen=True)
class Limit:
    """One field of `Quota`, in words."""

    field: str
    label: str
    unit: str
    is_rate: bool = False

    def said(self, amount: Amount | None, *, unit: bool = True) -> str:
        """The amount for people; with its unit, unless one beside it says that."""
        if amount is None:
            return "no limit"
        if self.unit == "bytes":
            return filesizeformat(int(amount))
        if self.unit == "money":
            return f"{amount:,.2f} {settings.CURRENCY.upper()}" if unit else f"{amount:,.2f}"
        return f"{amount:,} {self.unit}" if unit else f"{amount:,}"


LIMITS: Mapping[str, Limit] = {
    limit.field: limit
    for limit in (
        Limit("requests_per_minute", "API calls a minute", "calls", is_rate=True),
        Limit("batches_per_minute", "New batches a minute", "batches", is_rate=True),
        Limit("files_per_minute", "New files a minute", "files", is_rate=True),
        Limit("tokens_per_month", "Tokens a month", "tokens"),
        Limit("enqueued_tokens", "Enqueued tokens of one model", "tokens"),
        Limit("concurrent_batches", "Unfinished batches", "batches"),
        Limit("requests_per_batch", "Requests in one batch", "requests"),
        Limit("storage_bytes", "Storage", "bytes"),
        Limit("budget_per_month", "Money a month", "money"),
    )
}


def in_words(quota: Quota | None) -> list[str]:
    """The limits that are set in this row, one a line."""
    if quota is None:
        return []
    amounts = [(limit, getattr(quota, field)) for field, limit in LIMITS.items()]
    return [
        f"{limit.label}: {limit.said(amount, unit=limit.unit in ('bytes', 'money'))}"
        for limit, amount in amounts
        if amount is not None
    ]


def default_of(field: str) -> int | None:
    """What holds for an organization that has no limit of its own; None: no limit."""
    defaults: dict[str, int] = {
        "requests_per_minute": settings.RATE_LIMIT_REQUESTS,
        "batches_per_minute": settings.RATE_LIMIT_BATCHES,
        "files_per_minute": settings.RATE_LIMIT_FILES,
    }
    return defaults.get(field)


def in_effect(quota: Quota, field: str) -> Amount | None:
    """The limit that the row's subject has, the default included; None: no limit of its own."""
    own: Amount | None = getattr(quota, field)
    if own is None and quota.user_id is None and quota.api_key_id is None:
        return default_of(field)
    return own


def quota_of(
    organization: Organization, user: User | None = None, api_key: ApiKey | None = None
) -> Quota:
    """The subject's own row; an empty one, not in the database, where it has none."""
    subject = {"organization": organization, "user": user, "api_key": api_key}
    return Quota.objects.filter(**subject).first() or Quota(**subject)
