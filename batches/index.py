"""The index of a batch: where each good line lies in the input file, in execution order.

Pure functions over bytes; a record is 20 bytes, so any chunk of it is one ranged read.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO

from batches.lines import PREFIX_LENGTHS

_RECORD = struct.Struct("<IQII")
RECORD_BYTES = _RECORD.size
_STEP = 4


@dataclass(frozen=True, slots=True)
class Entry:
    """Line `line` (from 1) is `length` bytes at `offset`; about `tokens` tokens in and out."""

    line: int
    offset: int
    length: int
    tokens: int


def execution_order(ladders: list[bytes]) -> list[int]:
    """Positions of the lines in the order in which to run them.

    Lines that share a prompt prefix (see `lines.prefix_ladder`) lie side by side, the longer the
    prefix the closer; among groups, and within a group, the order of the input is kept.
    """
    order = sorted(range(len(ladders)), key=lambda at: (ladders[at], at))
    firsts = [_first_of_group(ladders, order, steps) for steps in _ladder_steps()]
    return sorted(range(len(ladders)), key=lambda at: (*(first[at] for first in firsts), at))


def _ladder_steps() -> range:
    return range(1, len(PREFIX_LENGTHS) + 1)


def _first_of_group(ladders: list[bytes], order: list[int], steps: int) -> array[int]:
    """For each line the earliest line that shares its first `steps` steps of the ladder."""
    firsts = array("I", bytes(4 * len(order)))
    begin, size = 0, steps * _STEP
    for end in range(1, len(order) + 1):
        if end == len(order) or ladders[order[end]][:size] != ladders[order[begin]][:size]:
            group = order[begin:end]
            first = min(group)
            for at in group:
                firsts[at] = first
            begin = end
    return firsts


def write(stream: IO[bytes], entries: Iterable[Entry]) -> None:
    stream.writelines(
        _RECORD.pack(entry.line, entry.offset, entry.length, min(entry.tokens, 2**32 - 1))
        for entry in entries
    )


def read(stream: IO[bytes], start: int = 0, end: int | None = None) -> list[Entry]:
    """The entries `start` to `end` (exclusive) in execution order; all of them without `end`."""
    stream.seek(start * RECORD_BYTES)
    data = stream.read(-1 if end is None else (end - start) * RECORD_BYTES)
    return [Entry(*fields) for fields in _RECORD.iter_unpack(data)]


def cut(
    tokens: Iterable[int], *, max_requests: int, max_tokens: float
) -> Iterator[tuple[int, int, int]]:
    """Cut lines into chunks: yield (start, end exclusive, tokens); a chunk has at least one line."""
    start, total, at = 0, 0, 0
    for at, cost in enumerate(tokens):
        if at > start and (at - start >= max_requests or total + cost > max_tokens):
            yield start, at, total
            start, total = at, 0
        total += cost
    if total:
        yield start, at + 1, total
