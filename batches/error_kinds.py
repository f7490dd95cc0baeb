"""What went wrong in a batch, grouped: pure functions over the lines of its error file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

MOST_KINDS = 20
EXAMPLES = 5
"""So many lines of each kind are named."""
MESSAGE_CHARACTERS = 300
OTHERS = "other"
"""The kind of whatever comes when there are `MOST_KINDS` others already."""
_TEXT = 64


@dataclass
class Kind:
    """Errors of one code (and HTTP status, where the engine answered): how many, and the first."""

    code: str
    status: int | None
    message: str
    count: int = 0
    lines: list[int] = field(default_factory=list)


class Tally:
    """Counts error lines by kind, keeping no more of them than a few numbers."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, int | None], Kind] = {}

    def add(self, line: int, payload: bytes | memoryview) -> None:
        code, status, message = said(payload)
        if (code, status) not in self._kinds and len(self._kinds) >= MOST_KINDS:
            code, status, message = OTHERS, None, "Errors of other kinds."
        kind = self._kinds.setdefault((code, status), Kind(code, status, message))
        kind.count += 1
        if len(kind.lines) < EXAMPLES:
            kind.lines.append(line)

    def as_json(self) -> list[dict[str, Any]]:
        """The most frequent first; what `kinds_of` reads."""
        kinds = sorted(self._kinds.values(), key=lambda kind: (-kind.count, kind.code))
        return [vars(kind) for kind in kinds]


def kinds_of(saved: Iterable[Mapping[str, Any]] | None) -> list[Kind]:
    return [Kind(**each) for each in saved or ()]


def said(payload: bytes | memoryview) -> tuple[str, int | None, str]:
    """Code, HTTP status (None: the request was never answered) and message of an error line.

    An engine may have answered anything: what cannot be understood has the code `unknown`.
    """
    try:
        line = orjson.loads(payload)
    except orjson.JSONDecodeError:
        line = None
    response = _part(line, "response")
    error = _part(line, "error") or _part(_part(response, "body"), "error")
    status = response.get("status_code")
    code = next((str(error[name]) for name in ("code", "type") if error.get(name)), "unknown")
    message = str(error.get("message") or "The error does not say what was wrong.")
    return (
        _plain(code, _TEXT),
        status if isinstance(status, int) and 0 <= status < 1000 else None,
        _plain(message, MESSAGE_CHARACTERS),
    )


def _part(holder: Any, name: str) -> dict[str, Any]:
    """The object of this name, or an empty one."""
    part = holder.get(name) if isinstance(holder, dict) else None
    return part if isinstance(part, dict) else {}


def _plain(text: str, most: int) -> str:
    """What PostgreSQL can keep of it."""
    return text.replace("\0", "�").encode(errors="replace").decode()[:most]
