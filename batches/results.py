"""Reading a batch's results a page at a time: requests and their answers, by line of the input.

Of a finished batch by the list of places that finalizing left; of a running one from the journal.
Nothing here reads a file from its beginning, but for `search`, which says where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Protocol

import orjson
from django.db.models import F, Func, IntegerField
from django.db.models.fields import BinaryField

from batches import index, places, storage
from batches.models import Batch, File, Result
from batches.places import Place

AT_ONCE = 1024 * 1024
"""Bytes that a search holds at a time, unless a single line has more."""
MOST_SEARCHED = 64 * 1024 * 1024
"""Bytes of requests and answers that one search looks through."""
LINE_SEARCHED = 1024 * 1024
"""Of each request and each answer a search looks at so many bytes, from the beginning."""


@dataclass(frozen=True, slots=True)
class Line:
    """A request beside its answer; of each, the first bytes, and how many it has in all.

    None stands for what was deleted.
    """

    number: int
    ok: bool
    request: bytes | None
    request_bytes: int
    answer: bytes | None
    answer_bytes: int


class Results(Protocol):
    """Where the answered lines of a batch are, and what is there."""

    def after(self, line: int, count: int, *, failed: bool) -> list[Place]:
        """Up to `count` places that follow the line, in order; with `failed` only those."""

    def before(self, line: int, count: int, *, failed: bool) -> list[Place]:
        """Up to `count` places just before the line, in order."""

    def read(self, found: Sequence[Place], most: int) -> list[Line]:
        """What lies there, up to `most` bytes of each request and of each answer."""


@contextmanager
def opened(batch: Batch) -> Iterator[Results | None]:
    """The batch's results; None where there are none, or none that can be found by line.

    The batch must have been fetched with its files. Raises `FileNotFoundError` for bytes that are
    purged at this moment.
    """
    if batch.results_name:
        with storage.opened(batch.results_name) as stream:
            yield _Finished(batch, stream)
    elif not batch.is_finished and batch.index_name:
        yield _Journal(batch)
    else:
        yield None


class _Finished:
    def __init__(self, batch: Batch, stream: IO[bytes]) -> None:
        self._batch = batch
        self._places = places.Reader(stream, total=batch.total, failed=batch.failed)

    def after(self, line: int, count: int, *, failed: bool) -> list[Place]:
        number = self._places.first_from(line + 1)
        if not failed:
            return self._places.read(number, count)
        return self._places.read_failed(self._places.first_failed_from(number), count)

    def before(self, line: int, count: int, *, failed: bool) -> list[Place]:
        number = self._places.first_from(line)
        if not failed:
            return self._places.read(number - count, min(count, number))
        end = self._places.first_failed_from(number)
        return self._places.read_failed(end - count, min(count, end))

    def read(self, found: Sequence[Place], most: int) -> list[Line]:
        requests = _requests(self._batch.input_file, found, most)
        answers: dict[int, bytes] = {}
        for ok, file in ((True, self._batch.output_file), (False, self._batch.error_file)):
            its = [place for place in found if place.ok == ok]
            if its and file and _is_there(file):
                spans = [(each.answer_offset, min(each.answer_length, most)) for each in its]
                texts = storage.pieces(file.storage_name, spans)
                answers |= {place.line: text for place, text in zip(its, texts, strict=True)}
        return [_line(place, requests, answers) for place in found]


class _Journal:
    """The places of requests are in the index, which is not by line: it is read once, for all."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._index: dict[int, index.Entry] = {}

    def after(self, line: int, count: int, *, failed: bool) -> list[Place]:
        return self._places({"line__gt": line}, "line", count, failed=failed)

    def before(self, line: int, count: int, *, failed: bool) -> list[Place]:
        return self._places({"line__lt": line}, "-line", count, failed=failed)[::-1]

    def read(self, found: Sequence[Place], most: int) -> list[Line]:
        start = Func(F("payload"), 1, most, function="substr", output_field=BinaryField())
        rows = Result.objects.filter(batch=self._batch, line__in=[each.line for each in found])
        answers = {
            line: bytes(text) for line, text in rows.annotate(s=start).values_list("line", "s")
        }
        requests = _requests(self._batch.input_file, found, most)
        return [_line(place, requests, answers) for place in found]

    def _places(
        self, which: dict[str, int], order: str, count: int, *, failed: bool
    ) -> list[Place]:
        rows = Result.objects.filter(batch=self._batch, **which)
        if failed:
            rows = rows.filter(ok=False)
        size = Func(F("payload"), function="octet_length", output_field=IntegerField())
        found = rows.order_by(order).annotate(size=size).values_list("line", "ok", "size")[:count]
        return [self._place(*row) for row in found]

    def _place(self, line: int, ok: bool, size: int) -> Place:
        if not self._index:
            with storage.opened(self._batch.index_name) as stream:
                self._index = {entry.line: entry for entry in index.read(stream)}
        entry = self._index[line]
        return Place(line, ok, 0, size, entry.offset, entry.length)


def _is_there(file: File) -> bool:
    """What a tenant deleted is not shown, though its bytes may still be there for a while."""
    return file.deleted_at is None


def _requests(file: File, found: Sequence[Place], most: int) -> dict[int, bytes]:
    if not found or not _is_there(file):
        return {}
    spans = [(place.request_offset, min(place.request_length, most)) for place in found]
    texts = storage.pieces(file.storage_name, spans)
    return {place.line: text for place, text in zip(found, texts, strict=True)}


def _line(place: Place, requests: dict[int, bytes], answers: dict[int, bytes]) -> Line:
    return Line(
        number=place.line,
        ok=place.ok,
        request=requests.get(place.line),
        request_bytes=place.request_length,
        answer=answers.get(place.line),
        answer_bytes=place.answer_length,
    )


# --- Searching ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The lines that hold the text, and after which line to go on; 0: all were looked at."""

    places: list[Place]
    go_on_after: int


def search(results: Results, text: str, *, after: int, count: int, failed: bool) -> Found:
    """Look for the text (in any case of ASCII letters) in requests and answers, line by line.

    Ends with `count` lines that have it, or after `MOST_SEARCHED` bytes.
    """
    wanted, matches, looked = _forms_of(text), list[Place](), 0
    while some := results.after(after, 200, failed=failed):
        for group in _groups(some):
            for place, line in zip(group, results.read(group, LINE_SEARCHED), strict=True):
                after = place.line
                if _holds(line, wanted):
                    matches.append(place)
                    if len(matches) == count:
                        return Found(matches, after)
            looked += sum(map(_size, group))
            if looked >= MOST_SEARCHED:
                return Found(matches, after)
    return Found(matches, 0)


def _forms_of(text: str) -> set[bytes]:
    """As it may stand in JSON: plain, or with what is not ASCII escaped."""
    written: tuple[Any, ...] = (orjson.dumps(text), json.dumps(text).encode())
    return {each[1:-1].lower() for each in written}


def _holds(line: Line, wanted: set[bytes]) -> bool:
    texts = [text.lower() for text in (line.request, line.answer) if text]
    return any(form in text for text in texts for form in wanted)


def _groups(some: Sequence[Place]) -> Iterator[list[Place]]:
    """Places that are read together: as many as have `AT_ONCE` bytes."""
    group: list[Place] = []
    for place in some:
        if group and sum(map(_size, group)) + _size(place) > AT_ONCE:
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def _size(place: Place) -> int:
    return min(place.request_length, LINE_SEARCHED) + min(place.answer_length, LINE_SEARCHED)
