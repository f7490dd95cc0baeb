"""What streamed answers have in common, whichever engine they come from: who is told of usage.

Engines are always asked for it, since what is not counted is not paid for; the caller gets it only
as `stream_options` say.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

from worker.engines.base import Chunk, Usage


class Asked:
    """What one request wants of its stream."""

    def __init__(self, body: dict[str, Any]) -> None:
        options = body.get("stream_options")
        options = options if isinstance(options, dict) else {}
        self._at_end = bool(options.get("include_usage"))
        self._in_each = self._at_end and bool(options.get("continuous_usage_stats"))

    def chunk(self, event: dict[str, Any]) -> Chunk:
        """The event as the caller asked for it, and the usage that it told."""
        usage = event.get("usage")
        known = Usage.of(usage) if isinstance(usage, dict) else None
        is_last = known is not None and not event.get("choices")
        if is_last and not self._at_end:
            return Chunk(b"", known)
        if not (is_last or self._in_each):
            event.pop("usage", None)
        return Chunk(encoded(event), known)


def with_usage(body: dict[str, Any], **more: bool) -> dict[str, Any]:
    """The body of a streamed request that asks for usage, and for `more` of `stream_options`."""
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        return {**body, "stream": True}  # for the engine to refuse
    return {
        **body,
        "stream": True,
        "stream_options": {**(options or {}), "include_usage": True, **more},
    }


def encoded(body: Any) -> bytes:
    """JSON in one line."""
    try:
        return orjson.dumps(body)
    except TypeError:  # integers beyond 64 bits, and lone surrogates, which only \\u can write
        return json.dumps(body).encode()
