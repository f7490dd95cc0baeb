"""Rate limits: counts each API call, and what pages make, by organization, person and key, and
refuses too many.

django-ratelimit counts, in Redis, for all web processes together: fixed windows of a minute.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import structlog
from django.conf import settings
from django.http import HttpRequest
from django_ratelimit.core import get_usage  # type: ignore[import-untyped]
from django_scopes import scopes_disabled
from prometheus_client import Counter
from redis.exceptions import RedisError

from accounts import consumption, limits
from accounts.access import Caller
from accounts.errors import ApiError
from accounts.models import Quota
from accounts.origin import address_of

logger = structlog.get_logger(__name__)

GROUPS: Mapping[tuple[str, str], str] = {
    ("POST", "/v1/batches"): "batches",
    ("POST", "/v1/files"): "files",
    ("POST", "/v1/uploads"): "files",
}
"""What is limited by itself; every call counts as a request besides."""

SAFE = ("GET", "HEAD", "OPTIONS")
AWAY_SECONDS = 3.0
"""For so long a Redis that did not answer is not asked again, by this process."""

# The limit is no part of a counter's name, so that a changed one finds what was counted before.
_RATE = (1, 60)

REFUSED = Counter(
    "portal_rate_limited_calls", "API calls that a rate limit refused.", ["group", "subject"]
)
FAILURES = Counter(
    "portal_rate_limiter_failures",
    "API calls that could not be counted because Redis was away, by what became of them.",
    ["outcome"],
)


class RateLimited(ApiError):
    status = 429


class LimiterAway(ApiError):
    status = 503


class RedisAway(Exception):
    """The counters cannot be had."""


@dataclass(frozen=True)
class Usage:
    """One counter after a call; `reset` is the seconds until it starts again from 0."""

    group: str
    subject: str
    limit: int
    count: int
    reset: int

    @property
    def remaining(self) -> int:
        return max(self.limit - self.count, 0)

    @property
    def headers(self) -> dict[str, str]:
        """As OpenAI names them, the time as Go writes durations."""
        minutes, seconds = divmod(self.reset, 60)
        return {
            "x-ratelimit-limit-requests": str(self.limit),
            "x-ratelimit-remaining-requests": str(self.remaining),
            "x-ratelimit-reset-requests": f"{minutes}m{seconds}s" if minutes else f"{seconds}s",
        }


def count(request: HttpRequest, caller: Caller, made: str = "") -> None:
    """Count a call for everybody whose it is, and leave the tightest `Usage` on the request.

    `made` is what a page makes, whose address is none of `GROUPS`: "batches" or "files".
    Raises `RateLimited`; and with Redis away `LimiterAway`, unless the setting lets it pass.
    """
    try:
        for group, subject, id, limit in _limits_of(request, caller, made):
            counted, reset = _count(group, f"{subject}:{id}")
            usage = Usage(group, subject, limit, counted, reset)
            _keep_tightest(request, usage)
            if counted > limit:
                REFUSED.labels(group, subject).inc()
                raise _refusal(usage)
    except RedisAway:
        _without_counters(request)


def count_address(request: HttpRequest) -> None:
    """The same for a call of nobody known, by the network address that it comes from."""
    limit: int = settings.RATE_LIMIT_ANONYMOUS
    try:
        counted, reset = _count("anonymous", f"address:{_network_of(request)}")
    except RedisAway:
        return
    usage = Usage("anonymous", "address", limit, counted, reset)
    _keep_tightest(request, usage)
    if counted > limit:
        REFUSED.labels("anonymous", "address").inc()
        raise _refusal(usage)


def usage_of(request: HttpRequest) -> Usage | None:
    """The tightest of the counters that this call was counted by."""
    return getattr(request, "rate_usage", None)


def counted(quota: Quota, field: str) -> int | None:
    """How many calls the quota's subject has made in this minute.

    None when that is not counted, as there is no limit, and when Redis is away.
    """
    if limits.in_effect(quota, field) is None:
        return None
    if quota.api_key_id:
        who = f"api_key:{quota.api_key_id}"
    elif quota.user_id:
        who = f"user:{quota.user_id}"
    else:
        who = f"organization:{quota.organization_id}"
    try:
        return _count(field.removesuffix("_per_minute"), who, increment=False)[0]
    except RedisAway:
        return None


def _limits_of(
    request: HttpRequest, caller: Caller, made: str
) -> Iterator[tuple[str, str, str, int]]:
    """Each counter that holds for the call: its group, whose it is, and its limit.

    The key's comes first: what it refuses does not count against the whole organization.
    """
    own = made or GROUPS.get((request.method or "", request.path_info), "")
    with scopes_disabled():
        rows = consumption.quotas_of(caller.organization, caller.user, caller.api_key)
    quotas = {_subject(row): row for row in rows}
    quotas.setdefault("organization", Quota(organization=caller.organization))
    ids = {
        "api_key": caller.api_key and caller.api_key.pk,
        "user": caller.user and caller.user.pk,
        "organization": caller.organization.pk,
    }
    for group in ("requests", own) if own else ("requests",):
        for subject, id in ids.items():
            limit = _limit(quotas.get(subject), f"{group}_per_minute")
            if limit is not None:
                yield group, subject, str(id), limit


def _subject(quota: Quota) -> str:
    return "api_key" if quota.api_key_id else "user" if quota.user_id else "organization"


def _limit(quota: Quota | None, field: str) -> int | None:
    found = limits.in_effect(quota, field) if quota else None
    return None if found is None else int(found)


def _keep_tightest(request: HttpRequest, usage: Usage) -> None:
    known = usage_of(request)
    if known is None or (usage.remaining, usage.limit) < (known.remaining, known.limit):
        request.rate_usage = usage  # type: ignore[attr-defined]


def _network_of(request: HttpRequest) -> str:
    """The address; of IPv6 the first half, as one customer usually has all of the other."""
    try:
        address = ipaddress.ip_address(address_of(request))
        if isinstance(address, ipaddress.IPv6Address):  # a server of both kinds sees IPv4 so
            address = address.ipv4_mapped or address
        prefix = 64 if address.version == 6 else 32
        return str(ipaddress.ip_network(f"{address}/{prefix}", strict=False))
    except ValueError:  # a socket without addresses, or what a proxy made of one
        return "unknown"


_away_until = 0.0


def _count(group: str, who: str, *, increment: bool = True) -> tuple[int, int]:
    """The counter's value and the seconds until it starts again; raises `RedisAway`."""
    global _away_until
    if time.monotonic() < _away_until:
        raise RedisAway
    try:
        usage = get_usage(None, group, key=lambda *_: who, rate=_RATE, increment=increment)
    except (RedisError, OSError) as error:
        _away_until = time.monotonic() + AWAY_SECONDS
        logger.warning("rate limiter away", error=str(error), asked_again_after=AWAY_SECONDS)
        raise RedisAway from error
    # A counter that was lost between two of its commands says 0 at -1 seconds; and the window's
    # last second is still part of it.
    return max(usage["count"], int(increment)), max(usage["time_left"], 0) + 1


def _without_counters(request: HttpRequest) -> None:
    """Let the call pass or not, as RATE_LIMIT_WHEN_REDIS_IS_DOWN says."""
    chosen = settings.RATE_LIMIT_WHEN_REDIS_IS_DOWN
    if chosen == "open" or (chosen == "open-for-reads" and request.method in SAFE):
        FAILURES.labels("passed").inc()
        return
    FAILURES.labels("refused").inc()
    refusal = LimiterAway(
        "Calls cannot be counted just now, and uncounted ones are not taken; try again soon.",
        code="rate_limiter_unavailable",
    )
    refusal.headers["Retry-After"] = str(int(AWAY_SECONDS))
    raise refusal


_WHAT = {
    "requests": "calls of the API",
    "batches": "new batches",
    "files": "new files and uploads",
    "anonymous": "calls without a valid API key",
}
_ADMINS = "An owner or admin of your organization can raise this limit"
_WHOSE = {
    "organization": ("Your organization", "A platform operator can raise this limit"),
    "user": ("You", _ADMINS),
    "api_key": ("This API key", _ADMINS),
}


def _refusal(usage: Usage) -> RateLimited:
    may = f"may make {usage.limit or 'no'} {_WHAT[usage.group]}"
    if usage.limit:
        may += f" a minute; try again in {usage.reset} s"
    if usage.subject == "address":
        said = f"Your network address {may}."
    else:
        whose, who = _WHOSE[usage.subject]
        said = f"{whose} {may}. {who}: {settings.BASE_URL}/organization/limits"
    refusal = RateLimited(said, code="rate_limit_exceeded")
    refusal.headers["Retry-After"] = str(usage.reset)
    refusal.headers["retry-after-ms"] = str(usage.reset * 1000)
    return refusal
