"""One question to a model from its page, by the same lane and the same limits as the API's."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import orjson

from accounts.access import Caller
from accounts.errors import ApiError
from accounts.ids import new_id
from batches import lane
from batches.lane import Frame, Request
from batches.lines import estimate_tokens
from batches.services import realtime
from models_registry.models import Model

ENDPOINT = "/v1/chat/completions"
SECONDS = 120.0
"""A person waits no longer for a short answer."""


@dataclass(frozen=True)
class Tried:
    """What came of it; tokens are None where the engine does not say."""

    answer: str
    seconds: float
    input_tokens: int | None
    output_tokens: int | None
    is_cut: bool
    """Whether it ends where `most_tokens` did."""


class Refused(ApiError):
    """What the engine answered instead, with its own status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def try_model(*, actor: Caller, model: Model, prompt: str, most_tokens: int) -> Tried:
    """Ask, and wait for the whole answer.

    Raises `QuotaExceeded`; `Unavailable` when nobody has the model loaded, with the seconds after
    which to try again in its `Retry-After`; `Refused`.
    """
    asked: dict[str, Any] = {
        "model": model.name,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": most_tokens,
    }
    body, began = orjson.dumps(asked), time.monotonic()
    call = realtime.begin(
        actor=actor,
        request=Request(new_id("req_"), model.name, ENDPOINT, body, False, SECONDS),
        model=model,
        tokens=estimate_tokens(ENDPOINT, asked, len(body)),
        is_gone=lambda: False,
    )
    try:
        frame = next(each for each in call.frames() if each.kind is lane.Kind.ANSWER)
    finally:
        call.close()
    return _tried(frame, time.monotonic() - began)


def _tried(frame: Frame, seconds: float) -> Tried:
    said = orjson.loads(frame.data)
    if frame.status != 200:
        message = said.get("error", {}).get("message") if isinstance(said, dict) else None
        raise Refused(message or f"The engine answered {frame.status}.", frame.status)
    choice, usage = said["choices"][0], said.get("usage") or {}
    return Tried(
        choice["message"].get("content") or "",
        seconds,
        usage.get("prompt_tokens"),
        usage.get("completion_tokens"),
        choice.get("finish_reason") == "length",
    )
