"""The wire of real-time requests between web processes and GPU workers: keys in Redis, and frames.

Workers have no address: a request goes onto its model's list, the worker that pops its id takes it
(and its body, which is gone for everybody else), and answers with frames on the request's own list.
Nothing here is the truth of anything. With Redis flushed, what is under way ends in an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import orjson

WAIT_SECONDS = 15
"""For so long a request waits for a worker that has its model loaded; then it is taken back."""
READY_SECONDS = 10
"""A worker says again that it serves, or loads, before this has passed."""
ALIVE_SECONDS = 2.0
"""An answering worker is never silent for longer."""
SILENCE_SECONDS = 20
"""One that is silent for so long is dead. The same holds for who waits for the answer."""
QUEUE_AT_MOST = 256
"""Requests for one model that no worker has taken yet."""
FRAMES_AT_MOST = 256
"""Frames that the reader has not fetched; a worker waits until there are fewer."""
ANSWER_BYTES = 32 * 1024 * 1024
"""Of one frame."""

ASKED = "lane:asked"
"""A sorted set: models, by when (seconds since 1970) a real-time request last asked for them."""


def queue_of(model: str) -> str:
    """A list of the ids of requests that wait."""
    return f"lane:queue:{model}"


def request_of(id: str) -> str:
    """A request that waits; whoever takes it away has it."""
    return f"lane:request:{id}"


def reply_of(id: str) -> str:
    """A list of the frames of its answer."""
    return f"lane:reply:{id}"


def reader_of(id: str) -> str:
    """There for as long as somebody waits for the answer."""
    return f"lane:reader:{id}"


def ready_of(model: str) -> str:
    """There for as long as a worker takes requests for the model."""
    return f"lane:ready:{model}"


def loading_of(model: str) -> str:
    """A `Loading`, for as long as a worker loads the model."""
    return f"lane:loading:{model}"


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as a worker needs it. Whose it is stays with the portal."""

    id: str
    model: str
    endpoint: str
    body: bytes
    stream: bool
    seconds: float
    """How long it may take, from its being taken on."""

    def encoded(self) -> bytes:
        head = [self.id, self.model, self.endpoint, self.stream, self.seconds]
        return orjson.dumps(head) + b"\n" + self.body

    @classmethod
    def decoded(cls, text: bytes) -> Request:
        head, _, body = text.partition(b"\n")
        id, model, endpoint, stream, seconds = orjson.loads(head)
        return cls(id, model, endpoint, body, stream, seconds)


@dataclass(frozen=True, slots=True)
class Loading:
    """Which worker loads a model, and for how many seconds it has."""

    worker: str
    seconds: float

    def encoded(self) -> bytes:
        return orjson.dumps([self.worker, self.seconds])

    @classmethod
    def decoded(cls, text: bytes) -> Loading:
        return cls(*orjson.loads(text))


class Kind(Enum):
    ALIVE = b"."
    """The worker has it, and works."""
    CHUNK = b"c"
    """An event of a streamed answer: JSON in one line."""
    END = b"e"
    """No more events."""
    ANSWER = b"a"
    """A whole answer, or the error that ends a stream: a status and JSON."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A piece of an answer."""

    kind: Kind
    data: bytes = b""
    status: int = 200

    @property
    def is_last(self) -> bool:
        return self.kind in (Kind.END, Kind.ANSWER)

    def encoded(self) -> bytes:
        return b"%b%03d%b" % (self.kind.value, self.status, self.data)

    @classmethod
    def decoded(cls, text: bytes) -> Frame:
        return cls(Kind(text[:1]), text[4:], int(text[1:4]))


ALIVE, END = Frame(Kind.ALIVE), Frame(Kind.END)


def answer(status: int, body: bytes) -> Frame:
    """A whole answer."""
    return Frame(Kind.ANSWER, body, status)


def error(status: int, message: str, *, code: str | None = None) -> Frame:
    """An error of ours in OpenAI's shape."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    said: dict[str, Any] = {"message": message, "type": kind, "param": None, "code": code}
    return answer(status, orjson.dumps({"error": said}))
