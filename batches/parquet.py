"""A program of its own that reads Parquet from stdin, and writes each row as a line of JSON.

A few bytes of Parquet can say "a gigabyte of zeros", and its reader is a lot of native code. So
nothing of it runs in a server's process: here memory and time have limits that the kernel keeps.
Run by `tables.py` with the wanted columns, as a JSON list, for its argument (null: all).
"""

import json
import os
import resource
import sys
from collections.abc import Iterator
from typing import Any

MEMORY = 1024 * 1024 * 1024
"""Bytes; pyarrow itself takes some 100 MB of them."""
SECONDS = 120
"""Of CPU time."""
MAX_CELL = 8 * 1024 * 1024
ROWS_AT_ONCE = 16


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(asked: list[str] | None) -> None:
    import pyarrow
    from pyarrow import parquet

    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    try:
        file = parquet.ParquetFile(
            pyarrow.PythonFile(os.fdopen(0, "rb")), pre_buffer=False, buffer_size=64 * 1024
        )
        names = file.schema_arrow.names
        say(names)
        for cells in rows(file, names, asked):
            say(cells)
        say(None)
    except MemoryError:
        say("The Parquet file takes too much memory to read.")
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        say(f"The Parquet file cannot be read: {str(error)[:200]}")


def rows(file: Any, names: list[str], asked: list[str] | None) -> Iterator[list[str]]:
    """Every row as text; what was not asked for is left empty."""
    wanted = [at for at, name in enumerate(names) if asked is None or name in asked]
    if not wanted:
        return
    batches = file.iter_batches(
        ROWS_AT_ONCE, columns=[names[at] for at in wanted], use_threads=False
    )
    for batch in batches:
        columns = {at: batch.column(batch.schema.get_field_index(names[at])) for at in wanted}
        for row in range(batch.num_rows):
            cells = [""] * len(names)
            for at, column in columns.items():
                cells[at] = text(column[row].as_py())
            yield cells


def text(value: Any) -> str:
    """A value as it would stand in CSV; lists and structures as JSON."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, bool | list | dict | tuple):
        value = json.dumps(value, ensure_ascii=False, default=str)
    said = value if isinstance(value, str) else str(value)
    if len(said) > MAX_CELL:
        raise ValueError(f"a cell is longer than {MAX_CELL:,} characters")
    return said


def say(what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")


if __name__ == "__main__":
    limit()
    main(json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # what native code would still tidy up is nobody's any more
