"""Requests and answers as people read them: pure functions over lines of input and output files.

Everything here is data that a tenant or a model made: any part may be missing or of another type.
What comes out is text, which templates escape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

SHOWN_NUMBERS = 4
"""So many of a vector's numbers are shown."""
MOST_PARTS = 200
"""Messages, answers, scores or vectors that are shown of one line; its JSON has the others."""
_INPUTS = ("prompt", "input", "query", "text_1", "text_2")
_SAID = {"messages", "instructions", "tools", "documents", "model", *_INPUTS}
"""What of a request's body is a part; all else is a fact."""
_INDENTED = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS


@dataclass(frozen=True)
class Part:
    """Something that was said: by whom, or what it is, and the text. `code` is shown as it stands."""

    label: str
    text: str
    note: str = ""
    code: bool = False


@dataclass(frozen=True)
class Shown:
    """A line as it is shown: its parts, a few facts, and its JSON.

    `whole` is False where only the beginning was read, which cannot be understood.
    """

    parts: list[Part] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    json: str = ""
    custom_id: str = ""
    whole: bool = True

    @property
    def first(self) -> str:
        """The beginning of the last thing said, for a list."""
        said = next((part.text for part in reversed(self.parts) if part.text.strip()), "")
        return " ".join((said or ("" if self.parts else self.json))[:400].split())[:200]


def request(text: bytes, *, whole: bool) -> Shown:
    """A line of the input."""
    line = _parsed(text) if whole else None
    if not isinstance(line, dict):
        return _unread(text, whole=whole)
    body = _dict(line.get("body"))
    facts = [(name, _short(value)) for name, value in body.items() if name not in _SAID]
    return Shown(_limited(_asked(body)), facts[:MOST_PARTS], _pretty(line), _id(line))


def answer(text: bytes, *, whole: bool) -> Shown:
    """A line of the output or the error file."""
    line = _parsed(text) if whole else None
    if not isinstance(line, dict):
        return _unread(text, whole=whole)
    response = _dict(line.get("response"))
    body = _dict(response.get("body"))
    error = _dict(line.get("error")) or _dict(body.get("error"))
    facts = _facts(response, body)
    parts = [_error(error)] if error else _limited(_answered(body))
    return Shown(parts, facts, _pretty(line), _id(line))


def _asked(body: dict[str, Any]) -> Iterator[Part]:
    if body.get("instructions"):
        yield Part("instructions", _text(body["instructions"]))
    if body.get("tools"):
        yield Part("tools", _json(body["tools"]), code=True)
    yield from map(_message, _list(body.get("messages")))
    for name in _INPUTS:
        if name in body:
            yield from _inputs(name, body[name])
    for number, document in enumerate(_list(body.get("documents")), 1):
        yield Part(f"document {number}", _text(document))


def _inputs(name: str, given: Any) -> Iterator[Part]:
    if not isinstance(given, list) or (given and isinstance(given[0], int)):
        yield Part(name, _text(given))
        return
    for number, each in enumerate(given, 1):
        if isinstance(each, dict) and "role" in each:
            yield _message(each)
        else:
            yield Part(f"{name} {number}" if len(given) > 1 else name, _text(each))


def _message(message: Any) -> Part:
    message = _dict(message)
    text = _text(message.get("content"))
    calls = "\n".join(map(_call, _list(message.get("tool_calls"))))
    return Part(_short(message.get("role")) or "message", "\n".join(filter(None, (text, calls))))


def _answered(body: dict[str, Any]) -> Iterator[Part]:
    yield from (part for choice in _list(body.get("choices")) for part in _choice(_dict(choice)))
    yield from (part for item in _list(body.get("output")) for part in _item(_dict(item)))
    for row in map(_dict, _list(body.get("data"))):
        if "embedding" in row:
            yield Part(f"vector {row.get('index', 0)}", _vector(row["embedding"]))
        elif "score" in row:
            yield Part(f"score {row.get('index', 0)}", _short(row["score"]))
    for row in map(_dict, _list(body.get("results"))):
        text = _text(_dict(row.get("document")).get("text", ""))
        score = _short(row.get("relevance_score"))
        yield Part(f"document {row.get('index', '')}", text, note=f"relevance {score}")


def _choice(choice: dict[str, Any]) -> Iterator[Part]:
    message = _dict(choice.get("message"))
    reason = _short(choice.get("finish_reason"))
    note = "" if reason in ("", "stop") else f"ended by {reason}"
    for name in ("reasoning_content", "reasoning"):
        if isinstance(message.get(name), str) and message[name]:
            yield Part("reasoning", message[name])
    if message.get("refusal"):
        yield Part("refusal", _text(message["refusal"]))
    for call in _list(message.get("tool_calls")):
        yield Part("tool call", _call(call), code=True)
    text = _text(message.get("content")) if message else _text(choice.get("text"))
    if text:
        yield Part(_short(message.get("role")) or "answer", text, note=note)


def _item(item: dict[str, Any]) -> Iterator[Part]:
    """One of the things that /v1/responses puts out."""
    if item.get("type") == "function_call":
        yield Part("tool call", _call({"function": item}), code=True)
    elif text := _text(item.get("content")) or _text(item.get("summary")):
        yield Part(_short(item.get("role")) or _short(item.get("type")) or "answer", text)


def _call(call: Any) -> str:
    """A tool call as its name and its arguments, which are JSON in a string."""
    function = _dict(_dict(call).get("function"))
    arguments = function.get("arguments", "")
    given = _parsed(arguments.encode(errors="replace")) if isinstance(arguments, str) else arguments
    return f"{_short(function.get('name'))}({_json(given) if given is not None else arguments})"


def _vector(vector: Any) -> str:
    if not isinstance(vector, list):
        return "A vector, packed as text"
    first = ", ".join(map(_short, vector[:SHOWN_NUMBERS]))
    return f"{len(vector):,} numbers: {first}{', …' if len(vector) > SHOWN_NUMBERS else ''}"


def _facts(response: dict[str, Any], body: dict[str, Any]) -> list[tuple[str, str]]:
    usage = _dict(body.get("usage"))
    given = {
        "HTTP status": response.get("status_code"),
        "Tokens in": usage.get("prompt_tokens", usage.get("input_tokens")),
        "Tokens out": usage.get("completion_tokens", usage.get("output_tokens")),
        "Request": response.get("request_id"),
    }
    return [(name, _short(value)) for name, value in given.items() if value is not None]


def _error(error: dict[str, Any]) -> Part:
    code = _short(error.get("code") or error.get("type"))
    return Part(
        "error", _text(error.get("message")) or "It does not say what was wrong.", note=code
    )


def _text(value: Any) -> str:
    """Plain text as it is; of a list of parts, what is text in them, and what kind the others are."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list):
        return "\n".join(filter(None, map(_piece, value[:MOST_PARTS])))
    return _piece(value) if isinstance(value, dict) else _json(value)


def _piece(piece: Any) -> str:
    if isinstance(piece, str):
        return piece
    if not isinstance(piece, dict):
        return _json(piece)
    if isinstance(piece.get("text"), str):
        return str(piece["text"])
    return f"[{_short(piece.get('type')) or 'object'}]"


def _unread(text: bytes, *, whole: bool) -> Shown:
    """As it stands: what is cut off is no JSON."""
    return Shown(json=text.decode(errors="replace"), whole=whole)


def _parsed(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None


def _pretty(value: Any) -> str:
    try:
        return orjson.dumps(value, option=_INDENTED).decode()
    except (orjson.JSONEncodeError, RecursionError):
        return "It is nested too deeply to be shown."


_json = _pretty


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else "" if value is None else _pretty(value)
    return text if len(text) <= 200 else f"{text[:199]}…"


def _limited(parts: Iterator[Part]) -> list[Part]:
    return [part for part, _ in zip(parts, range(MOST_PARTS), strict=False)]


def _id(line: dict[str, Any]) -> str:
    return _short(line.get("custom_id"))


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
