"""Reading tables row by row: CSV here, Parquet in a process of its own (`parquet.py`).

Whatever is in a file, no more than one row of it is held; a cell is text. No database here.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

MAX_COLUMNS = 1000
MAX_ROW = 8 * 1024 * 1024
"""Characters that a row of CSV, or a cell of Parquet, may have: no request can be longer."""
SUFFIXES = (".csv", ".tsv", ".parquet")
_SEPARATORS = ",;\t|"
_LOOKED_AT = 64 * 1024
_PROGRAM = Path(__file__).with_name("parquet.py")
_ENVIRONMENT = {
    # Every thread, and every allocator of its own, reserves what the process may not have.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PATH": os.defpath,
}

csv.field_size_limit(MAX_ROW)  # of this process: nothing else in it reads CSV


class BadTable(Exception):
    """What is wrong with a table, in words for whoever sent it."""


@dataclass(frozen=True)
class Table:
    """The columns' names, and the rows; each has as many cells as there are columns."""

    columns: Sequence[str]
    rows: Iterator[Sequence[str]]


def is_table(filename: str) -> bool:
    return filename.lower().endswith(SUFFIXES)


@contextmanager
def opened(
    stream: IO[bytes], filename: str, wanted: Collection[str] | None = None
) -> Iterator[Table]:
    """The table in the stream, by its name's suffix; reading on may raise `BadTable`, too.

    Of Parquet only the `wanted` columns are read (None: all); the others' cells are empty.
    """
    name = filename.lower()
    if name.endswith(".parquet"):
        with _parquet(stream, wanted) as table:
            yield table
    elif name.endswith((".csv", ".tsv")):
        yield _csv(stream, "\t" if name.endswith(".tsv") else None)
    else:
        raise BadTable(f"A table must be one of {', '.join(SUFFIXES)}.")


# --- CSV ------------------------------------------------------------------------------------


def _csv(stream: IO[bytes], separator: str | None) -> Table:
    separator = separator or _separator(stream)
    lines = _Lines(io.TextIOWrapper(stream, "utf-8-sig", newline=""))
    reader = csv.reader(lines, delimiter=separator, strict=True)
    rows = _numbered(reader, lines)
    columns = _columns(next(rows, (0, []))[1])
    return Table(columns, _fitted(rows, len(columns)))


def _separator(stream: IO[bytes]) -> str:
    """The one that the first line has most of."""
    head = stream.read(_LOOKED_AT)
    stream.seek(0)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadTable("The file is UTF-16; save it as CSV in UTF-8.")
    first = head.decode(errors="replace").lstrip("\r\n").splitlines()[:1]
    return max(_SEPARATORS, key=(first or [""])[0].count)


class _Lines:
    """Lines of text; refuses what no row may be long enough for."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self.left = MAX_ROW

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        try:
            line = self._text.readline(self.left + 1)
        except UnicodeDecodeError:
            raise BadTable("The file is not UTF-8 text; save it as CSV in UTF-8.") from None
        self.left -= len(line)
        if self.left < 0:
            raise BadTable(
                f"A row is longer than {MAX_ROW:,} characters. Is a quotation mark not closed?"
            )
        if not line:
            raise StopIteration
        return line


def _numbered(reader: Any, lines: _Lines) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, each with the number of the line on which it ends."""
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise BadTable(f"Line {reader.line_num} is not CSV: {error}.") from None
        if cells is None:
            return
        if cells:  # blank lines count as the beginning of the next row: a file may be full of them
            lines.left = MAX_ROW
            yield reader.line_num, cells


def _fitted(rows: Iterator[tuple[int, list[str]]], width: int) -> Iterator[list[str]]:
    """Empty cells at the end may be left out; a cell without a column is a mistake."""
    for line, cells in rows:
        if any(cells[width:]):
            raise BadTable(
                f"The row on line {line} has {len(cells)} cells, but there are {width} columns. "
                "Is a cell with a separator in it not quoted?"
            )
        yield cells[:width] + [""] * (width - len(cells))


def _columns(cells: Sequence[str]) -> list[str]:
    names = [" ".join(cell.split()) or f"column {at}" for at, cell in enumerate(cells, 1)]
    if not names:
        raise BadTable("The file is empty: its first row must name the columns.")
    if len(names) > MAX_COLUMNS:
        raise BadTable(f"The table has {len(names):,} columns; at most {MAX_COLUMNS:,} are read.")
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None:
        raise BadTable(f"Two columns are called {twice[:80]!r}; give each a name of its own.")
    return names


# --- Parquet --------------------------------------------------------------------------------


@contextmanager
def _parquet(stream: IO[bytes], wanted: Collection[str] | None) -> Iterator[Table]:
    with _as_a_file(stream) as file:
        asked = orjson.dumps(None if wanted is None else sorted(wanted)).decode()
        process = subprocess.Popen(
            [sys.executable, "-I", str(_PROGRAM), asked],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_ENVIRONMENT,
        )
        try:
            said = _said(process)
            yield Table(_columns(next(said, [])), said)
        finally:
            process.kill()
            process.communicate()


@contextmanager
def _as_a_file(stream: IO[bytes]) -> Iterator[Any]:
    """What another process can read: the file itself, or a copy of what lies in a bucket."""
    try:
        stream.fileno()
    except OSError:
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(stream, copy)
            copy.seek(0)
            yield copy
    else:
        yield stream


def _said(process: subprocess.Popen[bytes]) -> Iterator[list[str]]:
    """The lists that the process writes, one a line: the columns, then the rows."""
    assert process.stdout is not None
    while line := process.stdout.readline():
        said = orjson.loads(line)
        if isinstance(said, list):
            yield said
        elif said is None:
            return  # all was read
        else:
            raise BadTable(str(said))
    raise BadTable("The Parquet file takes too much memory or time to read, or is broken.")
