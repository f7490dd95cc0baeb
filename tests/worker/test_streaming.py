"""Who is told of usage in a stream, and what an engine is asked for."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from worker.engines.base import Chunk, Usage
from worker.engines.streaming import Asked, encoded, with_usage

USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
KNOWN = Usage(input=3, output=5)
CHOICE: dict[str, Any] = {"index": 0, "delta": {"content": "a"}}


def chunk(options: Any, **event: Any) -> Chunk:
    body = {} if options == "none" else {"stream_options": options}
    return Asked(body).chunk(dict(event))


NOBODY = ["none", None, {}, {"include_usage": False}, {"continuous_usage_stats": True}, [1], "yes"]


@pytest.mark.parametrize("options", NOBODY, ids=str)
def test_who_did_not_ask_sees_no_usage(options: Any) -> None:
    assert chunk(options, choices=[CHOICE], usage=USAGE) == Chunk(
        orjson.dumps({"choices": [CHOICE]}), KNOWN
    )
    assert chunk(options, choices=[], usage=USAGE) == Chunk(b"", KNOWN)


def test_who_asked_sees_it_at_the_end() -> None:
    options = {"include_usage": True}
    seen = chunk(options, choices=[CHOICE], usage=USAGE)
    assert seen == Chunk(orjson.dumps({"choices": [CHOICE]}), KNOWN)
    last = {"choices": [], "usage": USAGE}
    assert chunk(options, **last) == Chunk(orjson.dumps(last), KNOWN)


def test_who_asked_for_it_all_the_time_sees_it_all_the_time() -> None:
    event = {"choices": [CHOICE], "usage": USAGE}
    options = {"include_usage": True, "continuous_usage_stats": True}
    assert chunk(options, **event) == Chunk(orjson.dumps(event), KNOWN)


@pytest.mark.parametrize("event", [{"choices": []}, {"choices": [], "usage": None}, {"x": 1}])
def test_an_event_without_usage_says_nothing_of_it(event: dict[str, Any]) -> None:
    event_without = {name: value for name, value in event.items() if name != "usage"}
    assert chunk(None, **event) == Chunk(orjson.dumps(event_without), None)


def test_nonsense_instead_of_usage_counts_for_nothing() -> None:
    assert chunk(None, choices=[CHOICE], usage={"prompt_tokens": "many"}).usage == Usage()
    assert chunk(None, choices=[CHOICE], usage=[1]).usage is None


@pytest.mark.parametrize("options", ["none", None, {}, {"include_usage": False}], ids=str)
def test_the_engine_is_always_asked_for_usage(options: Any) -> None:
    body = {"model": "a"} if options == "none" else {"model": "a", "stream_options": options}
    before = dict(body)
    assert with_usage(body, continuous_usage_stats=True) == {
        "model": "a",
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    assert body == before


def test_other_options_stay_and_nonsense_is_the_engines_to_refuse() -> None:
    kept = with_usage({"stream_options": {"include_obfuscation": True}})["stream_options"]
    assert kept == {"include_obfuscation": True, "include_usage": True}
    assert with_usage({"stream_options": "all"}) == {"stream": True, "stream_options": "all"}


@pytest.mark.parametrize("value", ["line\nbreak\r\n\n", 2**70, "\ud800", {"a": [None]}])
def test_json_is_in_one_line(value: Any) -> None:
    assert b"\n" not in encoded({"a": value})
