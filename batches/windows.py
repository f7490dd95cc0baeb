"""Completion windows: `24h`, and any other number of hours or minutes within bounds."""

from __future__ import annotations

import re
from datetime import timedelta

from accounts.errors import BadRequest

SHORTEST, LONGEST = timedelta(minutes=1), timedelta(days=14)
_WINDOW = re.compile(r"([1-9][0-9]{0,4})([hm])")


def parse(text: str) -> timedelta:
    """How long a batch may take; `BadRequest` for anything but 1m … 14 days in h or m."""
    found = _WINDOW.fullmatch(text)
    if found:
        window = timedelta(**{"hours" if found[2] == "h" else "minutes": int(found[1])})
        if SHORTEST <= window <= LONGEST:
            return window
    raise BadRequest(
        "completion_window must be a number of hours or minutes, such as '24h' or '30m', "
        "from 1m to 336h.",
        param="completion_window",
        code="invalid_value",
    )
