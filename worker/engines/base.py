"""What every engine can do, and the words the lease loop and the engines share.

No engine lives here, and nothing here knows of Django, Celery or the database.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

FULLS = 2
"""Engine-fulls in flight: one runs, one waits in the engine, where the next must be, not in Python."""


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
    settled: dict[str, Any] = field(default_factory=dict)
    """Options that it needs on this GPU for want of memory; they go before `engine_args`."""
    may_sleep: bool = False
    """Whether the host would keep it in its memory, asleep, where the engine can."""


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


@dataclass(frozen=True, slots=True)
class Chunk:
    """One event of a streamed answer: JSON in one line; empty if the caller did not ask for it."""

    data: bytes
    usage: Usage | None = None
    """All tokens until now, where the engine says so."""


class Refused(Exception):
    """A streamed answer begins or ends with this error answer."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"status {answer.status}")
        self.answer = answer


@dataclass(frozen=True, slots=True)
class Report:
    """What an engine last said of itself, in its own requests: `n` answers may be n of them."""

    running: int = 0
    """In work in its last step, those that it ended included."""
    waiting: int = 0
    """Taken in, and not in work yet."""


class EngineDied(Exception):
    """The engine is gone and took its in-flight requests with it; load it again to go on."""


class EngineAway(Exception):
    """The engine cannot be had for now, whatever it is asked; nothing that it was asked is to
    blame, and all of it may be asked again."""


class LoadFailed(Exception):
    """The model cannot be loaded here; the message says why, for people."""


class DoesNotFit(LoadFailed):
    """Whatever is tried, this kind of GPU has not the memory for the model."""


class LoadCancelled(LoadFailed):
    """Nobody waits for the model any more, or the worker stops."""


class Engine(Protocol):
    """One model on one GPU (or behind one URL), answering requests concurrently.

    All methods run on one asyncio loop. `answer` returns an error answer for a request that the
    engine refuses, `stream` raises it as `Refused`; both raise `EngineDied` when the engine itself
    is gone. Whoever stops waiting (by cancelling, by closing the generator) ends the request.
    Engines inherit from this; what has a value here is right for those that tell nothing, what has
    a body for those without memory of their own.
    """

    capacity: int
    """How many requests in flight keep the engine full: those that run at once, as many again wait."""
    slots: int
    """How many of those it runs at once; the others wait inside it."""
    cache_tokens: int = 0
    """Tokens that its KV cache holds; 0 where it has none, or does not tell."""
    report: Report | None = None
    """None for an engine that says nothing of itself."""
    on_report: Callable[[], None] | None = None
    """Called, on the engine's loop, after each new `report`."""
    gpus: int
    """How many GPUs of this installation it keeps busy; 0 for somebody else's."""
    options: Mapping[str, Any] = {}
    """The options of its last load that decide over memory, defaults too, as far as it came."""
    can_sleep: bool = False
    """Whether the model that is loaded can be put to sleep."""

    async def check(self) -> None:
        """Find what would make a load fail without loading; raises LoadFailed."""
        return

    async def load(self) -> None: ...

    async def answer(self, endpoint: str, body: dict[str, Any], *, urgent: bool = False) -> Answer:
        """Answer one request; `urgent` ones go before all others that wait."""
        ...

    def stream(self, endpoint: str, body: dict[str, Any]) -> AsyncGenerator[Chunk, None]:
        """Answer one chat or completion, urgently and piece by piece."""
        ...

    async def sleep(self) -> None:
        """Leave the GPU's memory, keep the weights in the host's; nothing is in flight."""
        assert not self.can_sleep

    async def wake(self) -> None:
        """Come back from `sleep`."""
        assert not self.can_sleep

    async def unload(self) -> None: ...

    def tokens_under_way(self) -> int | None:
        """Tokens, in and out, that it has done of what is in flight; None if it does not tell.

        From any thread.
        """
        return None

    def gone(self) -> bool:
        """Whether an engine that was loaded has died since."""
        return False

    def pids(self) -> list[int]:
        """Processes that this engine started and that must not outlive the worker."""
        ...
