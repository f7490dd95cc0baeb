"""From a row of a table to a request: the prompt with its `{{column}}`s filled in, and the line.

Pure functions; what a table is, and how it is read, belongs to `tables.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from django.conf import settings

from batches.lines import BadLine, LineChecker
from batches.models.batches import Endpoint
from batches.tables import BadTable, Table

_PLACE = re.compile(r"\{\{([^{}]+)\}\}")

GENERATING = (Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS, Endpoint.RESPONSES)
INSTRUCTED = (Endpoint.CHAT_COMPLETIONS, Endpoint.RESPONSES)
"""Which take a system prompt."""
OFFERED = (*GENERATING, Endpoint.EMBEDDINGS)
"""Endpoints whose request has one prompt."""
_MOST = {
    Endpoint.CHAT_COMPLETIONS: "max_completion_tokens",
    Endpoint.COMPLETIONS: "max_tokens",
    Endpoint.RESPONSES: "max_output_tokens",
}


class UnknownColumns(Exception):
    """The template names columns that the table has not."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


class Template:
    """Text with `{{column}}` in it, to be replaced by the cell; what a cell holds is only text."""

    def __init__(self, text: str, columns: Sequence[str]) -> None:
        known = {name: at for at, name in enumerate(columns)}
        pieces = _PLACE.split(text)
        names = [" ".join(name.split()) for name in pieces[1::2]]
        if unknown := [name for name in dict.fromkeys(names) if name not in known]:
            raise UnknownColumns(unknown)
        self._texts = pieces[::2]
        self._places = [known[name] for name in names]

    def fill(self, cells: Sequence[str]) -> str:
        filled = [self._texts[0]]
        for place, text in zip(self._places, self._texts[1:], strict=True):
            filled += [cells[place], text]
        return "".join(filled)

    def length(self, cells: Sequence[str]) -> int:
        """Characters that `fill` would make: a long cell may be asked for thousands of times."""
        return sum(map(len, self._texts)) + sum(len(cells[place]) for place in self._places)


def columns_in(*texts: str) -> set[str]:
    """The names between double braces."""
    return {" ".join(name.split()) for text in texts for name in _PLACE.findall(text)}


@dataclass(frozen=True)
class Recipe:
    """How a row becomes a request; `custom_id` names a column, or none for the row's number."""

    endpoint: str
    model: str
    prompt: str
    system: str = ""
    custom_id: str = ""
    max_tokens: int | None = None
    temperature: float | None = None

    @property
    def columns(self) -> set[str]:
        """Those that it reads."""
        return columns_in(self.prompt, self.system) | ({self.custom_id} - {""})


def lines_of(table: Table, recipe: Recipe) -> Iterator[bytes]:
    """The lines of the batch's input, each checked as it will be again.

    Raises `UnknownColumns`, or `BadTable` for a row that makes no good line or is one too many.
    """
    checker, size = LineChecker(recipe.endpoint), 0
    for number, request in enumerate(_requests(table, recipe), 1):
        if number > settings.MAX_BATCH_REQUESTS:
            raise BadTable(
                f"The table has more than {settings.MAX_BATCH_REQUESTS:,} rows: split it."
            )
        line = orjson.dumps(request, option=orjson.OPT_APPEND_NEWLINE)
        size += len(line)
        if size > settings.MAX_BATCH_FILE_BYTES:
            limit = f"{settings.MAX_BATCH_FILE_BYTES:,}"
            raise BadTable(
                f"At row {number:,} the input is longer than {limit} bytes: split the table."
            )
        _check(checker, line, number)
        yield line


def _check(checker: LineChecker, line: bytes, number: int) -> None:
    if len(line) > settings.MAX_LINE_BYTES:
        raise _too_long(number)
    try:
        checker.check(line)
    except BadLine as error:
        raise BadTable(f"Row {number:,}: {error.message}") from None


def _too_long(number: int) -> BadTable:
    limit = f"{settings.MAX_LINE_BYTES:,}"
    return BadTable(f"Row {number:,} makes a request longer than {limit} bytes.")


def _requests(table: Table, recipe: Recipe) -> Iterable[dict[str, Any]]:
    prompt = Template(recipe.prompt, table.columns)
    system = Template(recipe.system, table.columns)
    if recipe.custom_id and recipe.custom_id not in table.columns:
        raise UnknownColumns([recipe.custom_id])
    named = table.columns.index(recipe.custom_id) if recipe.custom_id else None
    for number, cells in enumerate(table.rows, 1):
        if prompt.length(cells) + system.length(cells) > settings.MAX_LINE_BYTES:
            raise _too_long(number)  # before it is in memory
        yield {
            "custom_id": f"row-{number}" if named is None else cells[named],
            "method": "POST",
            "url": recipe.endpoint,
            "body": _body(recipe, prompt.fill(cells), system.fill(cells)),
        }


def _body(recipe: Recipe, prompt: str, system: str) -> dict[str, Any]:
    body: dict[str, Any] = {"model": recipe.model}
    if recipe.endpoint == Endpoint.CHAT_COMPLETIONS:
        said = [{"role": "system", "content": system}] if system else []
        body["messages"] = [*said, {"role": "user", "content": prompt}]
    elif recipe.endpoint == Endpoint.COMPLETIONS:
        body["prompt"] = prompt
    else:
        body["input"] = prompt
        if system:
            body["instructions"] = system
    if recipe.max_tokens is not None:
        body[_MOST[Endpoint(recipe.endpoint)]] = recipe.max_tokens
    if recipe.temperature is not None:
        body["temperature"] = recipe.temperature
    return body
