"""Reading and checking the lines of a batch's input file: pure functions, no database.

What a line's `body` may hold is the engine's to judge; here only what makes it a request at all.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import orjson

BOM = b"\xef\xbb\xbf"
MAX_CUSTOM_ID = 512
MAX_EMBEDDING_INPUTS, MAX_INPUTS_A_REQUEST = 50_000, 2_048
DEFAULT_OUTPUT_TOKENS = 256
BYTES_A_TOKEN = 4
"""A rule of thumb for English text; only estimates rest on it."""

PREFIX_LENGTHS = (64, 256, 1024, 4096, 16384)
_LADDER = struct.Struct(f">{len(PREFIX_LENGTHS)}I")
_KEY = re.compile(rb'"\s*:')


@dataclass(frozen=True, slots=True)
class RawLine:
    """A line that is not blank: its number from 1, its place, and its text (None: too long)."""

    number: int
    offset: int
    text: bytes | None


class BadLine(Exception):
    """Why a line cannot be run, in the words of the batch object's `errors`."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param

    def as_wire(self, line: int | None) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "param": self.param, "line": line}


@dataclass(frozen=True, slots=True)
class Checked:
    """What the index needs to know of a good line."""

    tokens: int
    prefix: bytes


def read_lines(stream: IO[bytes], max_line: int) -> Iterator[RawLine]:
    """Yield the lines that are not blank, never holding more than one line of `max_line` bytes.

    A byte order mark and the line ends (LF or CRLF) are not part of a line.
    """
    offset = number = 0
    while piece := stream.readline(max_line + 2):
        number += 1
        start, offset = offset, offset + len(piece)
        too_long = not piece.endswith(b"\n") and len(piece) == max_line + 2
        while too_long and not piece.endswith(b"\n") and (piece := stream.readline(max_line)):
            offset += len(piece)
        if too_long:
            yield RawLine(number, start, None)
            continue
        if number == 1 and piece.startswith(BOM):
            piece, start = piece[len(BOM) :], start + len(BOM)
        if (text := piece.rstrip(b"\r\n")) and not text.isspace():
            yield RawLine(number, start, text)


class LineChecker:
    """Checks line after line of one file, remembering what must hold across lines."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.model: str | None = None
        self.inputs = 0
        self._custom_ids: set[str] = set()

    def check(self, text: bytes) -> Checked:
        """Raise `BadLine` for the first thing that is wrong with the line."""
        request = _parse(text)
        custom_id = self._check_custom_id(request)
        body = self._check_request(request)
        self._check_model(body)
        if custom_id in self._custom_ids:
            raise BadLine(
                "duplicate_custom_id",
                f"The custom_id {show(custom_id)} was used before.",
                "custom_id",
            )
        self._custom_ids.add(custom_id)
        self._count_inputs(body)
        return Checked(estimate_tokens(self.endpoint, body, len(text)), prefix_ladder(body))

    def _check_custom_id(self, request: dict[str, Any]) -> str:
        custom_id = _required(request, "custom_id")
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
            raise BadLine(
                "invalid_type",
                f"custom_id must be a string of 1 to {MAX_CUSTOM_ID} characters.",
                "custom_id",
            )
        return custom_id

    def _check_request(self, request: dict[str, Any]) -> dict[str, Any]:
        if (method := _required(request, "method")) != "POST":
            raise BadLine("invalid_method", f"method must be 'POST', not {show(method)}.", "method")
        if (url := _required(request, "url")) != self.endpoint:
            raise BadLine(
                "url_mismatch",
                f"url is {show(url)}, but this batch is for {self.endpoint}.",
                "url",
            )
        body = _required(request, "body")
        if not isinstance(body, dict):
            raise BadLine("invalid_type", "body must be a JSON object.", "body")
        if body.get("stream"):
            raise BadLine(
                "invalid_value", "A batch cannot stream: leave stream out.", "body.stream"
            )
        return body

    def _check_model(self, body: dict[str, Any]) -> None:
        model = _required(body, "model", "body.model")
        if not isinstance(model, str):
            raise BadLine("invalid_type", "model must be a string.", "body.model")
        self.model = self.model if self.model is not None else model
        if model != self.model:
            raise BadLine(
                "model_mismatch",
                f"This line asks for {show(model)}, an earlier one for {show(self.model)}: "
                "one batch, one model.",
                "body.model",
            )

    def _count_inputs(self, body: dict[str, Any]) -> None:
        if not self.endpoint.endswith("/embeddings"):
            return
        count = inputs_of(body.get("input"))
        if count > MAX_INPUTS_A_REQUEST:
            raise BadLine(
                "too_many_inputs",
                f"A request may embed {MAX_INPUTS_A_REQUEST:,} inputs.",
                "body.input",
            )
        self.inputs += count
        if self.inputs > MAX_EMBEDDING_INPUTS:
            raise BadLine(
                "too_many_inputs",
                f"A batch may embed {MAX_EMBEDDING_INPUTS:,} inputs in all.",
                "body.input",
            )


def _parse(text: bytes) -> dict[str, Any]:
    try:
        request = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadLine("invalid_json_line", _why_not_json(text, error)) from None
    if not isinstance(request, dict):
        raise BadLine("invalid_json_line", "The line is JSON, but not a JSON object.")
    try:
        # A key given twice leaves one fewer in what was read; only then is the slow look needed.
        if len(_KEY.findall(text)) != len(_KEY.findall(orjson.dumps(request))):
            _refuse_duplicate_keys(text)
    except (orjson.JSONEncodeError, RecursionError):  # it can be read, but not written again
        raise BadLine("invalid_json_line", "The line is nested too deeply.") from None
    return request


def _why_not_json(text: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        text.decode()
    except UnicodeDecodeError as wrong:
        return f"The line is not UTF-8 (byte {wrong.start + 1})."
    return f"The line is not valid JSON: {error.msg} (character {error.pos + 1})."


def _refuse_duplicate_keys(text: bytes) -> None:
    def pairs(items: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for name, _ in items:
            if name in seen:
                raise BadLine("invalid_json_line", f"The key {show(name)} is given twice.")
            seen.add(name)

    json.loads(text, object_pairs_hook=pairs)


def _required(holder: dict[str, Any], name: str, param: str | None = None) -> Any:
    if holder.get(name) is None:
        raise BadLine("missing_required_parameter", f"{param or name} is missing.", param or name)
    return holder[name]


def show(value: Any) -> str:
    """A hostile value, short and with nothing in it that a database or a page could choke on."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_MOST = {
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
}
"""Which fields of a body say how much an answer may have; the first that is given counts."""


def estimate_tokens(endpoint: str, body: dict[str, Any], size: int) -> int:
    """Tokens in and out that a request of `size` bytes is likely to cost; never below 1.

    A request that names no maximum may cost more than is assumed for it here.
    """
    tokens = size // BYTES_A_TOKEN + 1
    if endpoint not in _MOST:
        return tokens
    given = (_count(body.get(name)) for name in _MOST[endpoint])
    asked = next(filter(None, given), DEFAULT_OUTPUT_TOKENS)
    return tokens + min(asked * answers_of(body), 10_000_000)


def answers_of(body: dict[str, Any]) -> int:
    """How many answers a request has the engine make: for each prompt `n`, or `best_of`."""
    return max(_count(body.get("n")), _count(body.get("best_of")), 1) * _prompts(body)


def _prompts(body: dict[str, Any]) -> int:
    """How many prompts a request holds: a list of numbers is one, as tokens."""
    prompt = body.get("prompt")
    if not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int):
        return 1
    return len(prompt)


def _count(value: Any) -> int:
    """A number, also one in quotes, as engines read it; 0 for anything else."""
    if isinstance(value, str) and len(value) < 10 and value.isascii() and value.isdecimal():
        value = int(value)
    known = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10_000_000
    return value if known else 0


def inputs_of(given: Any) -> int:
    """How many texts a request's `input` holds: a list of numbers is one, as tokens."""
    many = isinstance(given, list) and given and not isinstance(given[0], int)
    return len(given) if many else 1


def prefix_ladder(body: dict[str, Any]) -> bytes:
    """A sort key that puts requests with a long shared prompt prefix side by side.

    The prompt's first 64, 256, … bytes each give four bytes (CRC-32 run on from step to step):
    two requests agree in as many steps as their shared prefix is long. 20 bytes in all.
    """
    prompt = orjson.dumps(
        [
            body.get("tools"),
            body.get("instructions"),
            body.get("messages") or body.get("prompt") or body.get("input"),
        ]
    )
    steps, done, crc = [], 0, 0
    for length in PREFIX_LENGTHS:
        crc = zlib.crc32(prompt[done:length], crc)
        done = length
        steps.append(crc)
    return _LADDER.pack(*steps)
