"""Files, batches and chunks made through the services, and what became of them.

For tests below the API: nothing here asks over HTTP, and nothing waits for Celery.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import orjson
import pytest
from django.core.files.storage import default_storage
from django.db import DEFAULT_DB_ALIAS, connection, connections
from django.db.models import F
from django_scopes import scopes_disabled

from accounts.access import Caller
from accounts.services import audit
from batches import storage
from batches.models import Batch, Chunk, File, Result
from batches.models.batches import ChunkState
from batches.services import batches, files, leases
from batches.services.leases import Lease, Outcome
from batches.services.validation import validate_batch
from worker import work
from worker.database import Database
from worker.work import Work

T = TypeVar("T")
ENDPOINT = "/v1/chat/completions"


def line(said: str, *, model: str = "echo", custom_id: str | None = None) -> dict[str, Any]:
    """A chat request that says `said`, which is its custom_id too unless another is given."""
    return {
        "custom_id": custom_id or said,
        "method": "POST",
        "url": ENDPOINT,
        "body": {"model": model, "messages": [{"role": "user", "content": said}]},
    }


def lines(count: int, *, model: str = "echo", prefix: str = "say") -> list[dict[str, Any]]:
    return [line(f"{prefix} {at}", model=model) for at in range(1, count + 1)]


def jsonl(requests: Iterable[Any]) -> bytes:
    return b"".join(orjson.dumps(each) + b"\n" for each in requests)


def stored(caller: Caller, content: bytes, *, purpose: str = "batch") -> File:
    with storage.temporary("input.jsonl") as made:
        made.write(content)
        made.size = len(content)
        return files.create_file(
            actor=caller, content=made, filename="input.jsonl", purpose=purpose
        )


def created(caller: Caller, content: bytes, **options: Any) -> Batch:
    """A batch that waits for its validation."""
    given = {"endpoint": ENDPOINT, "completion_window": "24h"} | options
    return batches.create_batch(actor=caller, input_file_id=stored(caller, content).pk, **given)


def running(caller: Caller, requests: int | Sequence[Any], **options: Any) -> Batch:
    """A validated batch: of so many lines to the model `echo`, or of these lines."""
    given = lines(requests) if isinstance(requests, int) else requests
    batch = created(caller, jsonl(given), **options)
    validate_batch(batch.pk)
    return fresh(batch)


def fresh(batch: Batch) -> Batch:
    with scopes_disabled():
        return Batch.objects.select_related("input_file", "output_file", "error_file").get(
            pk=batch.pk
        )


def lease(owner: str = "worker", *, loaded: str = "", **options: Any) -> Lease:
    """The next chunk, which must be there."""
    got = leases.lease_next(owner=owner, loaded=loaded, residency=timedelta(0), **options)
    assert got is not None
    return got


class TheTests(Database):
    """The test's own connection, and so its transaction, in the database's thread: the test waits
    meanwhile."""

    def __init__(self) -> None:
        mine = connections[DEFAULT_DB_ALIAS]
        mine.inc_thread_sharing()
        self._thread = ThreadPoolExecutor(
            1, initializer=lambda: connections.__setitem__(DEFAULT_DB_ALIAS, mine)
        )
        self.give_up_at = None

    def close(self) -> None:
        self._thread.shutdown()
        connections[DEFAULT_DB_ALIAS].dec_thread_sharing()


def read(lease: Lease) -> Work:
    """The chunk, as a worker reads it."""
    taken, database = Work(lease, reading=True), TheTests()
    try:
        asyncio.run(work.read(taken, database))
    finally:
        database.close()
    return taken


def outcome(line: int, *, ok: bool = True, said: str = "", **tokens: int) -> Outcome:
    given = {"custom_id": str(line), "said": said}
    return Outcome(line, ok, orjson.dumps(given, option=orjson.OPT_APPEND_NEWLINE), **tokens)


def finish(lease: Lease, *, ok: bool = True) -> None:
    """Save a result for each of the chunk's lines, and end it; without prefixes to reorder by."""
    numbers = range(lease.start + 1, lease.end + 1)
    leases.save(
        lease=lease, outcomes=[outcome(at, ok=ok, output=at) for at in numbers], finished=True
    )


def change(batch: Batch, **fields: Any) -> None:
    """Write fields behind the services' back, to bring about what takes long."""
    with scopes_disabled():
        Batch.objects.filter(pk=batch.pk).update(**fields)


def bump_token(chunk_id: int) -> None:
    """Let somebody else take the chunk over."""
    with scopes_disabled():
        Chunk.objects.filter(pk=chunk_id).update(
            fencing_token=F("fencing_token") + 1, lease_owner="somebody else"
        )


def expire_lease(chunk_id: int) -> None:
    with scopes_disabled():
        leased = Chunk.objects.filter(pk=chunk_id, state=ChunkState.LEASED)
        assert leased.update(lease_expires_at=F("lease_expires_at") - timedelta(hours=1)) == 1


def chunks(batch: Batch) -> list[Chunk]:
    with scopes_disabled():
        return list(Chunk.objects.filter(batch=batch).order_by("start"))


def states(batch: Batch) -> list[tuple[str, int]]:
    """Of each chunk its state and its attempts."""
    return [(chunk.state, chunk.attempts) for chunk in chunks(batch)]


def journal(batch: Batch) -> list[int]:
    """The lines that have a result."""
    with scopes_disabled():
        return list(
            Result.objects.filter(batch=batch).order_by("line").values_list("line", flat=True)
        )


def counters(batch: Batch) -> tuple[int, int, int]:
    again = fresh(batch)
    return again.total, again.completed, again.failed


def content(file: File | None) -> list[Any]:
    """The lines of an output or error file; none when there is no file."""
    if file is None:
        return []
    with storage.opened(file.storage_name) as stream:
        return [orjson.loads(text) for text in stream.read().splitlines()]


def custom_ids(file: File | None) -> list[str]:
    return [each["custom_id"] for each in content(file)]


def kept() -> set[str]:
    """The names of everything in the storage, but for what is on its way in."""
    return {name for name in _below("") if not name.startswith("incoming/")}


def _below(folder: str) -> Iterator[str]:
    folders, names = default_storage.listdir(folder)
    yield from (f"{folder}{name}" for name in names)
    for each in folders:
        yield from _below(f"{folder}{each}/")


def together(*calls: Callable[[], T]) -> list[T | Exception]:
    """Run the calls at the same time, each in a thread with a connection of its own."""
    start, found = threading.Barrier(len(calls)), [None] * len(calls)

    def run(at: int) -> None:
        start.wait(30)
        try:
            found[at] = calls[at]()  # type: ignore[call-overload]
        except Exception as error:
            found[at] = error  # type: ignore[call-overload]
        finally:
            connection.close()

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return found  # type: ignore[return-value]


def crossing(
    monkeypatch: pytest.MonkeyPatch, first: Callable[[], T], second: Callable[[], T]
) -> list[T | Exception]:
    """Run two services at once, the second up to its audit while the first has written its own.

    Whoever still needs a row then that the other has locked waits for ever, but for the database.
    """
    real, meeting, running = audit.record, threading.Barrier(2), threading.local()

    def meet() -> None:
        with suppress(threading.BrokenBarrierError):  # the other waits for a lock, as it should
            meeting.wait(1)

    def record(*args: Any, **options: Any) -> Any:
        if running.is_first:
            event = real(*args, **options)
            meet()
            return event
        meet()
        return real(*args, **options)

    def run(call: Callable[[], T], is_first: bool) -> T:
        running.is_first = is_first
        return call()

    monkeypatch.setattr(audit, "record", record)
    return together(lambda: run(first, True), lambda: run(second, False))


def wait_for(condition: Callable[[], T], seconds: float = 60) -> T:
    """Wait until the condition holds; returns what it answered."""
    limit = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.01)
    return found
