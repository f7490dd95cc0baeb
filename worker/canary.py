"""A tiny request: whether a model that was loaded answers at all, and whether it says after its
sleep what it said before."""

from __future__ import annotations

from typing import Any

import orjson

from worker.engines.base import Engine, LoadFailed, ModelSpec

# Shorter than a block of any KV cache, so that no answer comes out of the prefix cache.
_TEXT = "1 2 3 4 5"
_REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/completions", {"prompt": _TEXT, "max_tokens": 16, "temperature": 0}),
    "embedding": ("/v1/embeddings", {"input": _TEXT}),
    "score": ("/v1/score", {"text_1": _TEXT, "text_2": _TEXT}),
}


class Canary:
    """What one engine answered when it was fresh; `heard` says whether it did at all."""

    def __init__(self, engine: Engine, spec: ModelSpec) -> None:
        self._engine = engine
        self._endpoint, body = _REQUESTS[spec.task]
        self._body = {"model": spec.name, **body}
        self._first: bytes | None = None
        self._is_exact = False

    @property
    def heard(self) -> bool:
        return self._first is not None

    async def learn(self) -> None:
        """Ask twice: some models do not repeat themselves to the last digit."""
        self._first = await self._ask()
        self._is_exact = self._first is not None and await self._ask() == self._first

    async def check(self) -> None:
        """Ask again; raises LoadFailed unless the answer is the same, or one at all where answers
        differ anyway."""
        said = await self._ask()
        if said is None or (self._is_exact and said != self._first):
            raise LoadFailed("After its sleep the model did not say what it had said before.")

    async def _ask(self) -> bytes | None:
        """The part of the answer that is the model's; None for a refusal."""
        answer = await self._engine.answer(self._endpoint, dict(self._body))
        if not answer.ok:
            return None
        body = orjson.loads(answer.body)
        return orjson.dumps(body.get("choices") or body.get("data"))
