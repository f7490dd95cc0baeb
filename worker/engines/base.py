"""What every engine can do, and the words the lease loop and the engines share.

No engine lives here, and nothing here knows of Django, Celery or the database.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One entry of the model registry, as an engine needs it."""

    name: str
    """The alias that requests carry in `model`; answers carry it too."""
    source: str
    """A folder, a Hugging Face name, or (engine `openai`) the remote model's name."""
    revision: str = ""
    task: str = "chat"
    """`chat`, `embedding` or `score`."""
    engine: str = "vllm"
    engine_args: dict[str, Any] = field(default_factory=dict)
    base_url: str = ""
    secret: str = ""
    """Bearer token for `base_url`, decrypted; never logged."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that one answer used; `cached` is part of `input`, `reasoning` of `output`."""

    input: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0

    @classmethod
    def of(cls, usage: dict[str, Any] | None) -> Usage:
        """Read the `usage` object of a chat, completion, embedding, score or responses answer."""
        if not usage:
            return cls()
        given = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        made = usage.get("completion_tokens_details") or usage.get("output_tokens_details") or {}
        return cls(
            input=_count(usage, "prompt_tokens") or _count(usage, "input_tokens"),
            cached=_count(given, "cached_tokens"),
            output=_count(usage, "completion_tokens") or _count(usage, "output_tokens"),
            reasoning=_count(made, "reasoning_tokens"),
        )


def _count(values: Any, name: str) -> int:
    """A number of tokens; 0 for anything that a remote engine says instead of one."""
    value = values.get(name) if isinstance(values, dict) else None
    return value if type(value) is int and 0 <= value < 2**31 else 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What the engine said to one request: an HTTP status and a JSON body, as a server would."""

    status: int
    body: bytes
    usage: Usage = Usage()

    @property
    def ok(self) -> bool:
        return self.status < 400


class EngineDied(Exception):
    """The engine is gone and took its in-flight requests with it; load it again to go on."""


class LoadFailed(Exception):
    """The model cannot be loaded here; the message says why, for people."""


class Engine(Protocol):
    """One model on one GPU (or behind one URL), answering requests concurrently.

    All methods run on one asyncio loop. `answer` returns an error answer for a request that the
    engine refuses and raises `EngineDied` when the engine itself is gone.
    """

    capacity: int
    """How many requests in flight keep the engine full."""

    async def load(self) -> None: ...

    async def answer(self, endpoint: str, body: dict[str, Any]) -> Answer: ...

    async def unload(self) -> None: ...

    def pids(self) -> list[int]:
        """Processes that this engine started and that must not outlive the worker."""
        ...
