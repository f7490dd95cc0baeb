"""Where the work in hand comes from (IP address, request id, kind of credential), for the audit.

Set by middleware for every request; empty in commands and tasks, whose events are the system's.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from django.conf import settings
from django.http import HttpRequest


@dataclass(frozen=True, slots=True)
class Origin:
    address: str | None = None
    request_id: str = ""


NOWHERE = Origin()
current: ContextVar[Origin] = ContextVar("origin", default=NOWHERE)


def address_of(request: HttpRequest) -> str:
    """The client's IP address: the connection's, or what the nearest trusted proxy says.

    With N trusted proxies, the N-th entry of X-Forwarded-For from the right was written by the
    outermost of them; what is left of it may be anybody's invention.
    """
    direct: str = request.META.get("REMOTE_ADDR", "")
    proxies: int = settings.TRUSTED_PROXY_COUNT
    if not proxies:
        return direct
    hops = [hop.strip() for hop in request.headers.get("X-Forwarded-For", "").split(",")]
    return hops[-proxies] if len(hops) >= proxies and hops[-proxies] else direct
