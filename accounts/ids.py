"""Public ids: prefixed, unguessable, and in the order in which they were made."""

from __future__ import annotations

import secrets
import time


def new_id(prefix: str) -> str:
    """`prefix`, then 12 hexadecimal digits of the time in milliseconds, then 80 random bits.

    The time comes first so that a list is paged by its key alone and new rows lie side by side
    in the index (the idea of RFC 9562's UUID version 7).
    """
    return f"{prefix}{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


def organization_id() -> str:
    return new_id("org_")


def project_id() -> str:
    return new_id("proj_")


def key_id() -> str:
    return new_id("key_")
