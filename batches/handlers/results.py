"""A batch's results as a handler gets them: streamed from its files, one line in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any

import orjson
from django.conf import settings

from batches import storage
from batches.lines import read_lines
from batches.models import Batch, File


class HandlerFailed(Exception):
    """Why an attempt came to nothing, in words for the organization whose handler it is.

    It is tried again by the schedule, after `retry_after` seconds at the earliest; not when it is
    `final`, because trying again could not help.
    """

    def __init__(self, message: str, *, retry_after: float = 0.0, final: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.final = final


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's result.

    `response` is the body that the model answered with, also where that is an error's; `error`
    says why there is none. `line` is the whole line of the output or error file, without its end.
    `request` is the request's own body, for handlers that ask for it and while the input file is
    there.
    """

    custom_id: str
    ok: bool
    status_code: int | None
    response: dict[str, Any] | None
    error: dict[str, Any] | None
    line: bytes
    request: dict[str, Any] | None = None


class Results:
    """Iterate it for `Answer`s: those of the output file, then those of the error file.

    With `requests` they come in the order of the input instead. It can be iterated again, and
    then begins anew. `beat` says that the run goes on; a handler that is busy for minutes without
    taking an answer calls it now and then.
    """

    def __init__(
        self, batch: Batch, *, requests: bool = False, beat: Callable[[], None] = lambda: None
    ) -> None:
        self._batch, self._requests, self.beat = batch, requests, beat
        self.taken = 0
        """Answers handed out since it was last begun."""

    @property
    def files(self) -> dict[str, File]:
        """The files themselves, as `output` and `errors`: those that there are."""
        both = {"output": self._batch.output_file, "errors": self._batch.error_file}
        return {kind: file for kind, file in both.items() if file is not None}

    @contextmanager
    def opened(self, kind: str) -> Iterator[IO[bytes]]:
        """The bytes of a file of `files`."""
        file = self.files[kind]
        if file.deleted_at is not None:
            raise HandlerFailed("The batch's files have been deleted.", final=True)
        try:
            stream = storage.opened(file.storage_name)
        except FileNotFoundError:
            raise HandlerFailed("The batch's files are gone.", final=True) from None
        with stream:
            yield stream

    def __iter__(self) -> Iterator[Answer]:
        self.taken = 0
        for answer in self._in_order_of_input() if self._requests else self._file_by_file():
            self.beat()
            self.taken += 1
            yield answer

    def _file_by_file(self) -> Iterator[Answer]:
        for kind in self.files:
            with self.opened(kind) as stream:
                yield from _answers(stream, ok=kind == "output")

    def _in_order_of_input(self) -> Iterator[Answer]:
        """Both files are in that order, so that each line's answer is the next of one of them."""
        with ExitStack() as stack:
            rest = [
                _answers(stack.enter_context(self.opened(kind)), ok=kind == "output")
                for kind in self.files
            ]
            heads = [next(each, None) for each in rest]
            for custom_id, body in self._asked():
                for at, head in enumerate(heads):
                    if head is not None and head.custom_id == custom_id:
                        yield replace(head, request=body)
                        heads[at] = next(rest[at], None)
                        break
            for head, each in zip(heads, rest, strict=True):  # the input is gone
                yield from [] if head is None else [head]
                yield from each

    def _asked(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The input's custom ids and bodies; none when it has been deleted since."""
        try:
            source = storage.opened(self._batch.input_file.storage_name)
        except FileNotFoundError:
            return
        with source:
            for line in read_lines(source, settings.MAX_LINE_BYTES):
                request = orjson.loads(line.text or b"{}")
                yield request["custom_id"], request["body"]


def _answers(stream: IO[bytes], *, ok: bool) -> Iterator[Answer]:
    for line in stream:
        if text := line.rstrip(b"\n"):
            yield _answer(text, ok=ok)


def _answer(text: bytes, *, ok: bool) -> Answer:
    said = orjson.loads(text)
    response = said.get("response") or {}
    return Answer(
        custom_id=said["custom_id"],
        ok=ok,
        status_code=response.get("status_code"),
        response=response.get("body"),
        error=said.get("error"),
        line=text,
    )
