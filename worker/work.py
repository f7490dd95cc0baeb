"""A leased chunk in a worker's hands: its requests, and what became of each.

Only bookkeeping lives here; the loop feeds, the database is behind `batches.services.leases`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import orjson

from accounts.ids import new_id
from batches import index, storage
from batches.services import leases
from batches.services.leases import Lease, Outcome
from worker.database import Database
from worker.engines.base import Answer

SAVE_BYTES = 64 * 1024 * 1024
ALONE_AFTER = 3
"""Engine deaths after which a request is tried with nothing else in flight."""
CAREFUL_REQUESTS = 32
"""How many requests of a chunk that seems to kill workers are tried alone in one lease."""
GIVEN_UP_AFTER = ALONE_AFTER + 1
"""Deaths, the trial alone included, after which it is an error line when found again."""


@dataclass(slots=True, eq=False)
class Request:
    line: int
    text: bytes
    deaths: int = 0
    tokens: int = 1
    """In and out, by the index's estimate."""
    tried_alone: bool = False
    begun: float = 0.0
    """What the engine's shared clock showed when the request entered."""


@dataclass(slots=True, eq=False)
class Work:
    """The requests of one lease: `todo` and `alone` wait, `flying` are in the engine."""

    lease: Lease
    todo: deque[Request] = field(default_factory=deque)
    alone: deque[Request] = field(default_factory=deque)
    reading: bool = False
    """Its lines are not here yet, so that it is not known whether any are to be run."""
    unreadable: bool = False
    """Its lines could not be had; as far as can be told, by no other worker either."""
    waiting_tokens: int = field(init=False)
    """Of all in `todo`, by estimate."""
    finished: list[Outcome] = field(default_factory=list)
    flying: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    saving: bool = False
    unsaved_since: float = 0.0
    unsaved_bytes: int = 0
    wasted: float = 0.0
    """GPU seconds of requests that were begun and not finished, not yet saved."""
    dropped: bool = False
    """Cancelled, expired or stopping: what is finished is saved, the rest is not run."""
    lost: bool = False
    """Somebody else holds the chunk: nothing of it is ours any more."""

    def __post_init__(self) -> None:
        self.waiting_tokens = sum(request.tokens for request in self.todo)

    @property
    def waiting(self) -> int:
        return 0 if self.dropped else len(self.todo)

    @property
    def all_run(self) -> bool:
        return not self.flying and (self.dropped or not (self.reading or self.todo or self.alone))

    def record(self, outcome: Outcome) -> None:
        if not self.finished:
            self.unsaved_since = time.monotonic()
        self.finished.append(outcome)
        self.unsaved_bytes += len(outcome.payload)

    def take_finished(self, most: int) -> list[Outcome]:
        """The next outcomes to save: at most so many, and few enough for one statement."""
        size = count = 0
        for outcome in self.finished[:most]:
            size += len(outcome.payload)
            if count and size > SAVE_BYTES:
                break
            count += 1
        taken, self.finished = self.finished[:count], self.finished[count:]
        self.unsaved_bytes -= sum(len(outcome.payload) for outcome in taken)
        return taken

    def drop(self, *, lost: bool = False) -> None:
        """Run no more of it, and stop what is running."""
        self.dropped = True
        self.lost = self.lost or lost
        for task in self.flying.values():
            task.cancel()

    def add(self, request: Request) -> None:
        """Queue a request: it is the last."""
        self.todo.append(request)
        self.waiting_tokens += request.tokens

    def take(self) -> Request:
        """The next request, to be run now."""
        request = self.todo.popleft()
        self.waiting_tokens -= request.tokens
        return request

    def again(self, request: Request) -> None:
        """Queue a request that was not run: it is the next."""
        self.todo.appendleft(request)
        self.waiting_tokens += request.tokens

    def put_back(self, request: Request) -> None:
        """Queue a request again that was in flight when the engine died."""
        if request.deaths >= ALONE_AFTER:
            self.alone.appendleft(request)
        else:
            self.again(request)


async def read(work: Work, database: Database) -> None:
    """Fetch the chunk's lines, but for those that an earlier lease has saved.

    Files are read beside the database's one thread: a slow store holds up no save. Lines that have
    killed engines too often become error lines here. Raises `OSError` when files cannot be read.
    """
    lease, deaths = work.lease, dict[int, int]()
    try:
        entries = await asyncio.to_thread(_entries, lease)
        if lease.fencing_token > 1:  # not the first lease of this chunk
            saved, deaths = await database.run(_known, lease, [each.line for each in entries])
            entries = [each for each in entries if each.line not in saved]
        requests = await asyncio.to_thread(_read_lines, lease, entries, deaths)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; is STORAGE_URL the same place on all hosts?") from error
    _sort(work, requests)
    work.reading = False


def _entries(lease: Lease) -> list[index.Entry]:
    with storage.opened(lease.index_name) as stream:
        entries = index.read(stream, lease.start, lease.end)
    if len(entries) != lease.end - lease.start:
        raise OSError("the index is shorter than its chunks")
    return entries


def _known(lease: Lease, lines: Sequence[int]) -> tuple[set[int], dict[int, int]]:
    """Which of these lines are saved, and how often each suspect of the batch was at a death."""
    return leases.saved_lines(lease, lines), leases.suspects(lease.batch_id)


def _read_lines(
    lease: Lease, entries: Sequence[index.Entry], deaths: dict[int, int]
) -> list[Request]:
    spans = [(entry.offset, entry.length) for entry in entries]
    texts = storage.pieces(lease.input_name, spans)
    if any(len(text) != entry.length for text, entry in zip(texts, entries, strict=True)):
        raise OSError("the input file is shorter than its index")
    return [
        Request(entry.line, text, deaths.get(entry.line, 0), entry.tokens)
        for entry, text in zip(entries, texts, strict=True)
    ]


def _sort(work: Work, requests: Sequence[Request]) -> None:
    # A chunk whose owners died again and again without saving anything holds a killer, and as the
    # lines are fed in order it is likely among the first. Not all alone: others wait for the GPU.
    attempts = work.lease.attempts
    careful = CAREFUL_REQUESTS if attempts >= ALONE_AFTER else 0
    for at, request in enumerate(requests):
        accused = request.deaths >= ALONE_AFTER or (request.deaths and attempts)
        if request.deaths > GIVEN_UP_AFTER:
            work.record(crashed(request))
        elif accused or at < careful:
            work.alone.append(request)
        else:
            work.add(request)


def answered(request: Request, custom_id: str, answer: Answer, gpu_seconds: float) -> Outcome:
    """The outcome of a request that the engine answered, be it with an error."""
    payload = orjson.dumps(
        {
            "id": new_id("batch_req_"),
            "custom_id": custom_id,
            "response": {
                "status_code": answer.status,
                "request_id": new_id("req_"),
                "body": orjson.Fragment(answer.body),
            },
            "error": None,
        },
        option=orjson.OPT_APPEND_NEWLINE,
    )
    usage = answer.usage
    return Outcome(
        request.line,
        answer.ok,
        payload,
        usage.input,
        usage.cached,
        usage.output,
        usage.reasoning,
        gpu_seconds,
    )


def failed(request: Request) -> Outcome:
    """The outcome of a request on which our own code failed: told, not retried for ever."""
    return _unanswered(request, "engine_error", "The engine failed on this request.")


def crashed(request: Request) -> Outcome:
    """The outcome of a request that kills engines."""
    return _unanswered(
        request,
        "engine_crashed",
        "The engine crashed whenever it ran this request, the last time alone.",
    )


def _unanswered(request: Request, code: str, message: str) -> Outcome:
    line = {
        "id": new_id("batch_req_"),
        "custom_id": orjson.loads(request.text)["custom_id"],
        "response": None,
        "error": {"code": code, "message": message},
    }
    return Outcome(request.line, False, orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
