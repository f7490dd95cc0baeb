"""Invented answers, at once or after a stated delay: for measuring all but the GPU.

`engine_args`: `delay_ms` a request, `concurrency` requests at a time, and `die_on`, a text at
which the engine dies as a crashing GPU would. Refused where ENVIRONMENT=production.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import orjson
from django.conf import settings

from worker.engines.base import Answer, EngineDied, LoadFailed, ModelSpec, Usage

DEFAULT_CONCURRENCY = 256


class InstantEngine:
    """Repeats what it was told, so that a test can see whose answer it is."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.capacity = int(spec.engine_args.get("concurrency", DEFAULT_CONCURRENCY))
        self._delay = float(spec.engine_args.get("delay_ms", 0)) / 1000
        self._die_on = str(spec.engine_args.get("die_on", ""))
        self._free = asyncio.Semaphore(self.capacity)
        self._death: asyncio.Future[None] | None = None

    async def load(self) -> None:
        if settings.PRODUCTION:
            raise LoadFailed("The instant engine invents its answers: not in production.")
        await asyncio.sleep(float(self.spec.engine_args.get("load_ms", 0)) / 1000)
        self._death = asyncio.get_running_loop().create_future()

    async def answer(self, endpoint: str, body: dict[str, Any]) -> Answer:
        said = _said(body)
        if self._delay or self._die_on:
            await self._take_time(said)
        return _ANSWERS[endpoint](self.spec.name, said)

    async def unload(self) -> None:
        self._die()

    def pids(self) -> list[int]:
        return []

    async def _take_time(self, said: str) -> None:
        assert self._death is not None
        async with self._free:
            if self._die_on and self._die_on in said:
                self._die()
            if self._delay and not self._death.done():
                await asyncio.wait([self._death], timeout=self._delay)
            if self._death.done():
                raise EngineDied("the instant engine was told to die")

    def _die(self) -> None:
        if self._death is not None and not self._death.done():
            self._death.set_result(None)


def _said(body: dict[str, Any]) -> str:
    """The last words of the request, as text."""
    given = body.get("messages") or body.get("prompt") or body.get("input") or body.get("query")
    last = given[-1] if isinstance(given, list) and given else given
    if isinstance(last, dict):
        last = last.get("content")
    return last if isinstance(last, str) else orjson.dumps(last).decode()


def _answer(body: dict[str, Any], said: str) -> Answer:
    """With about a token for every four characters, in and out."""
    tokens = len(said) // 4 + 1
    body["usage"] = {
        "prompt_tokens": tokens,
        "completion_tokens": tokens,
        "total_tokens": 2 * tokens,
    }
    return Answer(200, orjson.dumps(body), Usage(input=tokens, output=tokens))


def _chat(model: str, said: str) -> Answer:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": said},
        "finish_reason": "stop",
    }
    return _answer(_head("chat.completion", model) | {"choices": [choice]}, said)


def _completion(model: str, said: str) -> Answer:
    choice = {"index": 0, "text": said, "finish_reason": "stop", "logprobs": None}
    return _answer(_head("text_completion", model) | {"choices": [choice]}, said)


def _embedding(model: str, said: str) -> Answer:
    data = [{"object": "embedding", "index": 0, "embedding": [0.0, float(len(said))]}]
    return _answer({"object": "list", "model": model, "data": data}, said)


def _response(model: str, said: str) -> Answer:
    part = {"type": "output_text", "text": said, "annotations": []}
    message = {"type": "message", "role": "assistant", "status": "completed", "content": [part]}
    return _answer(_head("response", model) | {"output": [message]}, said)


def _score(model: str, said: str) -> Answer:
    data = [{"object": "score", "index": 0, "score": 0.0}]
    return _answer(_head("list", model) | {"data": data}, said)


def _rerank(model: str, said: str) -> Answer:
    results = [{"index": 0, "document": {"text": said}, "relevance_score": 0.0}]
    return _answer({"id": "rerank-instant", "model": model, "results": results}, said)


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{kind}-instant", "object": kind, "created": int(time.time()), "model": model}


_ANSWERS = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/embeddings": _embedding,
    "/v1/responses": _response,
    "/v1/score": _score,
    "/v1/rerank": _rerank,
}
