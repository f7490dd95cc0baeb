"""Public ids: prefixed, unguessable, and in the order in which they were made."""

from __future__ import annotations

import re
import secrets
import time
from datetime import datetime


def new_id(prefix: str) -> str:
    """`prefix`, then 15 hexadecimal digits of the time, then 68 random bits.

    The time comes first so that a list is paged by its key alone and new rows lie side by side
    in the index. Twelve digits are milliseconds and three are 4096ths of one (RFC 9562's UUID
    version 7, section 6.2, method 3), so that rows made within a millisecond keep their order.
    """
    return f"{prefix}{(time.time_ns() << 12) // 1_000_000:015x}{secrets.token_hex(9)[:17]}"


def organization_id() -> str:
    return new_id("org_")


def project_id() -> str:
    return new_id("proj_")


def key_id() -> str:
    return new_id("key_")


def invitation_id() -> str:
    return new_id("invite_")


def issuer_id() -> str:
    return new_id("iss_")


def domain_id() -> str:
    return new_id("domain_")


def audit_event_id() -> str:
    return new_id("audit_")


def first_id(prefix: str, since: datetime) -> str:
    """The lowest id that something made at this moment can have."""
    return f"{prefix}{int(since.timestamp() * 1000):012x}"


def first_audit_event_id(since: datetime) -> str:
    """The lowest id that an event of this moment can have."""
    return first_id("audit_", since)


def user_id(pk: int) -> str:
    """A person as the wire names them; their row's key is a plain number."""
    return f"user_{pk}"


def parse_user_id(id: str) -> int | None:
    """The key in `user_…`, or None for anything that was never one of ours."""
    found = re.fullmatch(r"user_([1-9][0-9]{0,17})", id, re.ASCII)
    return int(found[1]) if found else None
