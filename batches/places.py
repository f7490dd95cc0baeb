"""Where each request of a finished batch lies, and where its answer does, for random access.

Pure functions over bytes: a record of 29 bytes for each request, in input order, and after them
four bytes for each one that failed, which say which record that is. What the bytes that they point
to mean is `results.py`'s.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

_RECORD = struct.Struct("<I?QIQI")
_NUMBER = struct.Struct("<I")
RECORD_BYTES = _RECORD.size


@dataclass(frozen=True, slots=True)
class Place:
    """Line `line` of the input: its answer is in the output file if `ok`, else in the error file."""

    line: int
    ok: bool
    answer_offset: int
    answer_length: int
    request_offset: int
    request_length: int


class Writer:
    """Writes record after record to a stream; `close` ends it with the list of what failed."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._failed = array("I")
        self._count = 0

    def add(self, place: Place) -> None:
        if not place.ok:
            self._failed.append(self._count)
        self._count += 1
        fields = (getattr(place, name) for name in Place.__slots__)
        self._stream.write(_RECORD.pack(*fields))

    def close(self) -> None:
        self._stream.writelines(_NUMBER.pack(number) for number in self._failed)


class Reader:
    """Reads records by their number, from 0, or by the line of the input that they are of."""

    def __init__(self, stream: IO[bytes], *, total: int, failed: int) -> None:
        self._stream = stream
        self.total, self.failed = total, failed

    def read(self, start: int, count: int) -> list[Place]:
        """Records `start` and following; fewer than `count` at the end."""
        start = max(start, 0)
        count = max(min(count, self.total - start), 0)
        data = self._read(start * RECORD_BYTES, count * RECORD_BYTES)
        return [Place(*fields) for fields in _RECORD.iter_unpack(data)]

    def read_failed(self, start: int, count: int) -> list[Place]:
        """The same of those that failed, counted among themselves."""
        start = max(start, 0)
        count = max(min(count, self.failed - start), 0)
        return self._each(self._failed_numbers(start, count))

    def first_from(self, line: int) -> int:
        """The number of the first record of this line or a later one; `total` if there is none."""
        guess = line - 1  # right unless there are blank lines before it
        if 0 <= guess < self.total and self._line(guess) == line:
            return guess
        end = min(max(line, 0), self.total)
        return bisect_left(range(end), line, key=self._line)

    def first_failed_from(self, number: int) -> int:
        """Where in the list of what failed the first record is that is not before `number`."""
        return bisect_left(
            range(self.failed), number, key=lambda at: self._failed_numbers(at, 1)[0]
        )

    def _each(self, numbers: Sequence[int]) -> list[Place]:
        """Records that lie side by side are one read."""
        found: list[Place] = []
        at = 0
        while at < len(numbers):
            run = 1
            while at + run < len(numbers) and numbers[at + run] == numbers[at] + run:
                run += 1
            found += self.read(numbers[at], run)
            at += run
        return found

    def _failed_numbers(self, start: int, count: int) -> list[int]:
        data = self._read(self.total * RECORD_BYTES + start * _NUMBER.size, count * _NUMBER.size)
        return [number for (number,) in _NUMBER.iter_unpack(data)]

    def _line(self, number: int) -> int:
        (line,) = _NUMBER.unpack(self._read(number * RECORD_BYTES, _NUMBER.size))
        return int(line)

    def _read(self, offset: int, size: int) -> bytes:
        if not size:
            return b""
        self._stream.seek(offset)
        return self._stream.read(size)
