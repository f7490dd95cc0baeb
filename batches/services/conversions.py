"""Making a batch's input out of a table that was uploaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import PurePath

from accounts.access import Caller
from accounts.errors import BadRequest, NotFound
from batches import storage, tables
from batches.models import File
from batches.models.files import Purpose
from batches.prompts import Recipe, UnknownColumns, lines_of
from batches.services import files
from batches.tables import BadTable, Table

SHOWN = 3


def columns_of(file: File) -> list[str]:
    """The table's columns; raises `BadRequest` for what is no table."""
    with _table(file, ()) as table:
        return list(table.columns)


def first_lines(file: File, recipe: Recipe) -> list[bytes]:
    """The first lines that `convert` would make; raises `BadRequest` for what it would refuse."""
    with _table(file, recipe.columns or None) as table:
        return list(islice(lines_of(table, recipe), SHOWN))


def convert(*, actor: Caller, file: File, recipe: Recipe) -> File:
    """Keep the input that the recipe makes of the table, as a file of its own.

    Raises `BadRequest` naming what is wrong, or `QuotaExceeded`, with nothing stored.
    """
    with storage.temporary("input") as made:
        count = 0
        with _table(file, recipe.columns or None) as table:
            for line in lines_of(table, recipe):
                made.write(line)
                count += 1
        if not count:
            raise BadRequest("The table has no rows under its header.", code="empty_file")
        made.size = made.tell()
        name = f"{PurePath(file.filename).stem[:240]}.jsonl"
        return files.create_file(
            actor=actor, content=made, filename=name, purpose=Purpose.BATCH, lines=count
        )


@contextmanager
def _table(file: File, wanted: Collection[str] | None) -> Iterator[Table]:
    """The stored table; what is wrong with it, or with how it is read, is a `BadRequest`."""
    try:
        with (
            storage.opened(file.storage_name) as stream,
            tables.opened(stream, file.filename, wanted) as table,
        ):
            yield table
    except FileNotFoundError:
        raise NotFound("The file's content is gone.", param="file_id", code="not_found") from None
    except BadTable as error:
        raise BadRequest(str(error), param="file", code="invalid_table") from None
    except UnknownColumns as error:
        names = ", ".join(name[:80] for name in error.names[:5])
        raise BadRequest(f"The table has no column called {names}.", param="prompt") from None
