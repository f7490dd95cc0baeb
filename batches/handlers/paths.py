"""Paths into JSON, as `response.choices[0].message.content`: dots, names and numbers, no more."""

from __future__ import annotations

import re
from typing import Any

LONGEST = 500
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d{1,9})\]")


def parsed(path: str) -> tuple[str | int, ...]:
    """The steps of a path, `$.` before it or not; raises `ValueError` for what is none."""
    rest = path.removeprefix("$").removeprefix(".")
    steps: list[str | int] = []
    at = 0
    while at < len(rest):
        step = _STEP.match(rest, at)
        if step is None:
            raise ValueError(f"{path[:100]!r} is not a path such as response.choices[0].text")
        steps.append(step[1] if step[1] is not None else int(step[2]))
        at = step.end()
    if not steps or len(path) > LONGEST:
        raise ValueError(f"{path[:100]!r} names nothing")
    return tuple(steps)


def found(value: Any, steps: tuple[str | int, ...]) -> Any:
    """What lies there; None where the value has no such place."""
    for step in steps:
        if isinstance(step, str):
            value = value.get(step) if isinstance(value, dict) else None
        else:
            value = value[step] if isinstance(value, list) and step < len(value) else None
    return value
