"""Invented answers, at once or after a stated delay: for measuring all but the GPU.

`engine_args`: `delay_ms` a request, `token_ms` more for each word of a streamed answer,
`concurrency` requests at a time, and `die_on`, a text at which the engine dies as a crashing GPU
would. Refused where ENVIRONMENT=production.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import orjson
from django.conf import settings

from worker.engines import streaming
from worker.engines.base import Answer, Chunk, Engine, EngineDied, LoadFailed, ModelSpec, Usage

DEFAULT_CONCURRENCY = 256


class InstantEngine(Engine):
    """Repeats what it was told, so that a test can see whose answer it is."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.gpus = 1
        self.capacity = self.slots = int(spec.engine_args.get("concurrency", DEFAULT_CONCURRENCY))
        self._delay = float(spec.engine_args.get("delay_ms", 0)) / 1000
        self._token_delay = float(spec.engine_args.get("token_ms", 0)) / 1000
        self._die_on = str(spec.engine_args.get("die_on", ""))
        self._free = asyncio.Semaphore(self.capacity)
        self._death: asyncio.Future[None] | None = None

    async def check(self) -> None:
        if settings.PRODUCTION:
            raise LoadFailed("The instant engine invents its answers: not in production.")

    async def load(self) -> None:
        await self.check()
        await asyncio.sleep(float(self.spec.engine_args.get("load_ms", 0)) / 1000)
        self._death = asyncio.get_running_loop().create_future()

    async def answer(self, endpoint: str, body: dict[str, Any], *, urgent: bool = False) -> Answer:
        said = _said(body)
        if self._delay or self._die_on:
            await self._take_time(said)
        return _ANSWERS[endpoint](self.spec.name, said)

    async def stream(self, endpoint: str, body: dict[str, Any]) -> AsyncGenerator[Chunk, None]:
        """The words that it was told, one by one."""
        said, asked = _said(body), streaming.Asked(body)
        await self._take_time(said)
        for event in _events(endpoint, self.spec.name, said):
            yield asked.chunk(event)
            await self._wait(self._token_delay)

    async def unload(self) -> None:
        self._die()

    def pids(self) -> list[int]:
        return []

    async def _take_time(self, said: str) -> None:
        assert self._death is not None
        async with self._free:
            if self._die_on and self._die_on in said:
                self._die()
            await self._wait(self._delay)

    async def _wait(self, seconds: float) -> None:
        assert self._death is not None
        if seconds and not self._death.done():
            await asyncio.wait([self._death], timeout=seconds)
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
    body["usage"] = _usage(tokens, tokens)
    return Answer(200, orjson.dumps(body), Usage(input=tokens, output=tokens))


def _chat(model: str, said: str) -> Answer:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": said},
        "finish_reason": "stop",
    }
    return _answer(_head("chat.completion", model) | {"choices": [choice]}, said)


def _events(endpoint: str, model: str, said: str) -> Iterator[dict[str, Any]]:
    """An event for each word, with what was used so far as vLLM says it, and one for all of it."""
    is_chat = endpoint == "/v1/chat/completions"
    head = _head("chat.completion.chunk" if is_chat else "text_completion", model)
    words = re.findall(r"\S+\s*|\s+", said) or [""]
    for at, word in enumerate(words):
        text = {"delta": {"role": "assistant", "content": word}} if is_chat else {"text": word}
        choice = {"index": 0, **text, "finish_reason": "stop" if at + 1 == len(words) else None}
        yield head | {"choices": [choice], "usage": _usage(len(said) // 4 + 1, at + 1)}
    yield head | {"choices": [], "usage": _usage(len(said) // 4 + 1, len(words))}


def _usage(given: int, made: int) -> dict[str, int]:
    return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}


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
