"""Real-time requests below the API: put before workers and read as a web process does.

What the tests share that have a lease loop in a thread of theirs.
"""

from __future__ import annotations

import orjson
import pytest
import redis
from django.conf import settings

from accounts.ids import new_id
from batches import lane
from batches.lane import Frame, Request
from batches.services import realtime
from batches.services.realtime import Call
from models_registry.models import Model
from tests.jobs import wait_for
from worker import lane as workers_lane

CHAT = "/v1/chat/completions"


def valkey() -> redis.Redis:
    return redis.Redis.from_url(settings.CELERY_BROKER_URL)


@pytest.fixture
def empty_lane() -> None:
    clear()


def clear() -> None:
    """Nothing is left of what an earlier test asked, and nobody is inside."""
    with valkey() as server:
        for key in server.scan_iter("lane:*"):
            server.delete(key)
    realtime.GATE = realtime.Gate()


def hasten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_lane, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(workers_lane, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(workers_lane, "BLOCK_SECONDS", 0.2)
    monkeypatch.setattr(realtime, "BLOCK_SECONDS", 0.05)


def wish(*models: str) -> None:
    """Somebody has just asked for these models, the last one last."""
    for model in models:
        realtime._ask(model)


def served(model: str = "echo") -> None:
    """A worker takes requests for the model."""
    wait_for(lambda: realtime._ask(model) is None)


def sent(
    said: str, *, model: str = "echo", stream: bool = False, seconds: float = 60, **more: object
) -> Call:
    """A chat request that waits for a worker; to be read by `read`, or closed."""
    body = {"model": model, "messages": [{"role": "user", "content": said}], **more}
    request = Request(new_id("req_"), model, CHAT, orjson.dumps(body), stream, seconds)
    call = Call(request, "org", is_gone=lambda: False)
    call.send(Model(name=model))
    return call


def read(call: Call) -> list[Frame]:
    """All frames until the last one, but for those that only say that the worker is there."""
    found = []
    try:
        for frame in call.frames():
            if frame.kind is not lane.Kind.ALIVE:
                found.append(frame)
            if frame.is_last:
                return found
    finally:
        call.close()
    raise AssertionError("the frames ended without a last one")


def words(call: Call) -> list[str]:
    """What a scripted engine streamed, which must have ended well."""
    *chunks, last = read(call)
    assert last == lane.END
    return [orjson.loads(chunk.data)["word"] for chunk in chunks]


def content(call: Call) -> str:
    """What a scripted engine answered."""
    [answer] = read(call)
    assert (answer.kind, answer.status) == (lane.Kind.ANSWER, 200)
    return str(orjson.loads(answer.data)["choices"][0]["message"]["content"])


def error(call: Call) -> tuple[int, str | None]:
    """The status and the code of the error that the answer ended with."""
    last = read(call)[-1]
    assert last.kind is lane.Kind.ANSWER
    return last.status, orjson.loads(last.data)["error"]["code"]
