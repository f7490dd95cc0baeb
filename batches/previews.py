"""The beginning of a stored file, to be looked at: a few lines, whatever is in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import IO

import orjson

from batches import storage
from batches.models import File

READ = 64 * 1024
"""Bytes that a preview reads."""
LINES, LINE = 5, 4000
"""How many lines are shown, and how many characters of each."""
COUNTED = 8 * 1024 * 1024
"""Bytes in which lines are counted while somebody waits; more are counted by whoever checks it."""
_BLOCK = 256 * 1024
_PRETTY = 16 * 1024
"""Bytes of a line that is set out as JSON: deep nesting makes it a thousand times as long."""


@dataclass(frozen=True)
class Line:
    number: int
    text: str
    is_cut: bool = False


@dataclass(frozen=True)
class Preview:
    """`why` tells why there are no lines; `count` are the file's lines as far as they are known."""

    lines: list[Line]
    why: str = ""
    count: int | None = None
    is_least: bool = False


def of(file: File) -> Preview:
    """Reads `READ` bytes, and `COUNTED` more where nobody has counted the lines yet."""
    try:
        with storage.opened(file.storage_name) as stream:
            head = stream.read(min(READ, file.bytes))
            if b"\0" in head or not _is_text(head):
                return Preview([], "This is not text, so there is nothing to show.")
            lines = list(_lines(head, whole=len(head) == file.bytes))
            if file.lines is not None:
                return Preview(lines, count=file.lines)
            count = _count(chain([head], _blocks(stream, COUNTED)))
    except FileNotFoundError:
        return Preview([], "The file's content is gone.")
    return Preview(lines, count=count, is_least=file.bytes > READ + COUNTED)


def _is_text(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError as error:  # the last character may be cut in two
        return error.start >= len(head) - 3
    return True


def _lines(head: bytes, *, whole: bool) -> Iterator[Line]:
    pieces = head.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if pieces[-1] == b"":
        pieces.pop()
    for number, piece in enumerate(pieces[:LINES], 1):
        broken = number == len(pieces) and not whole and not head.endswith(b"\n")
        text = piece.decode(errors="ignore") if broken else _pretty(piece)
        yield Line(number, text[:LINE], broken or len(text) > LINE)


def _pretty(piece: bytes) -> str:
    try:
        value = orjson.loads(piece) if len(piece) <= _PRETTY else None
        if isinstance(value, dict | list):
            return orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()
    except (orjson.JSONDecodeError, orjson.JSONEncodeError, RecursionError):
        pass
    return piece.decode(errors="replace").rstrip("\r")


def _blocks(stream: IO[bytes], left: int) -> Iterator[bytes]:
    while left > 0 and (block := stream.read(min(_BLOCK, left))):
        left -= len(block)
        yield block


def _count(blocks: Iterable[bytes]) -> int:
    """Lines, the last one also without a line end."""
    count, last = 0, b"\n"
    for block in blocks:
        count, last = count + block.count(b"\n"), block[-1:] or last
    return count + (last != b"\n")
