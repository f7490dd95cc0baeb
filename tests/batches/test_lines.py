"""Reading and checking the lines of an input file; no database."""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batches import lines
from batches.lines import BadLine, LineChecker, RawLine, prefix_ladder, read_lines

CHAT = "/v1/chat/completions"


def request(**changes: Any) -> dict[str, Any]:
    body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}
    given = {"custom_id": "1", "method": "POST", "url": CHAT, "body": body} | changes
    return {name: value for name, value in given.items() if value is not ...}


def problem(text: bytes | dict[str, Any], endpoint: str = CHAT) -> tuple[str, str | None]:
    """The code and the field of what is wrong with a line."""
    with pytest.raises(BadLine) as caught:
        LineChecker(endpoint).check(text if isinstance(text, bytes) else orjson.dumps(text))
    orjson.dumps(caught.value.as_wire(1))
    return caught.value.code, caught.value.param


def read(content: bytes, max_line: int = 100) -> list[tuple[int, int, bytes | None]]:
    return [
        (each.number, each.offset, each.text) for each in read_lines(io.BytesIO(content), max_line)
    ]


# --- Reading --------------------------------------------------------------------------------


def test_lines_have_their_physical_number_and_their_place() -> None:
    assert read(b"a\nbc\nd\n") == [(1, 0, b"a"), (2, 2, b"bc"), (3, 5, b"d")]


def test_trap_04_blank_lines_drop_no_trailing_request() -> None:
    content = b"\n\na\n\r\n   \n\t\nb\n\n\nc"
    assert read(content) == [(3, 2, b"a"), (7, 12, b"b"), (10, 16, b"c")]


def test_trap_05_a_last_line_without_a_line_end_is_a_line() -> None:
    assert read(b"a\nb") == [(1, 0, b"a"), (2, 2, b"b")]


def test_windows_line_ends_are_not_part_of_a_line() -> None:
    assert read(b"a\r\nb\r\n") == [(1, 0, b"a"), (2, 3, b"b")]


def test_a_byte_order_mark_is_not_part_of_the_first_line() -> None:
    assert read(b"\xef\xbb\xbfa\n\xef\xbb\xbfb") == [(1, 3, b"a"), (2, 5, b"\xef\xbb\xbfb")]


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n", b" \n\t"])
def test_a_file_of_nothing_has_no_lines(content: bytes) -> None:
    assert read(content) == []


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("size", [9, 10])
def test_a_line_up_to_the_limit_is_read(size: int, end: bytes) -> None:
    assert read(b"x" * size + end, max_line=10) == [(1, 0, b"x" * size)]


@pytest.mark.parametrize("size", [11, 12, 13, 25, 1000])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_the_line_after_one_that_is_too_long_is_found(size: int, end: bytes) -> None:
    found = read(b"x" * size + end + b"next\n", max_line=10)
    assert [each[0] for each in found] == [1, 2]
    assert found[0][2] is None or len(found[0][2]) > 10
    assert found[1] == (2, size + len(end), b"next")


def test_no_more_than_a_line_is_held() -> None:
    class Wide(io.BytesIO):
        largest = 0

        def readline(self, size: int | None = -1, /) -> bytes:
            piece = super().readline(size)
            Wide.largest = max(Wide.largest, len(piece))
            return piece

    found = list(read_lines(Wide(b"x" * 1_000_000 + b"\na"), 10))
    assert found == [RawLine(1, 0, None), RawLine(2, 1_000_001, b"a")]
    assert Wide.largest == 12


@given(st.lists(st.binary(max_size=12).filter(lambda each: b"\n" not in each), max_size=20))
def test_every_line_can_be_read_again_at_its_offset(written: list[bytes]) -> None:
    content = b"\n".join(written)
    for number, offset, text in read(content):
        assert text is not None
        assert content[offset : offset + len(text)] == text
        assert text in written[number - 1]
    blank = [at for at, each in enumerate(written, 1) if not each.strip()]
    numbers = {each[0] for each in read(content)}
    assert numbers.isdisjoint(blank)


# --- Checking -------------------------------------------------------------------------------


def test_a_good_line_is_good() -> None:
    assert LineChecker(CHAT).check(orjson.dumps(request())).tokens > lines.DEFAULT_OUTPUT_TOKENS


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"custom_id": ...}, ("missing_required_parameter", "custom_id")),
        ({"custom_id": None}, ("missing_required_parameter", "custom_id")),
        ({"custom_id": 7}, ("invalid_type", "custom_id")),
        ({"custom_id": ""}, ("invalid_type", "custom_id")),
        ({"custom_id": "x" * 513}, ("invalid_type", "custom_id")),
        ({"method": ...}, ("missing_required_parameter", "method")),
        ({"method": "GET"}, ("invalid_method", "method")),
        ({"method": ["POST"]}, ("invalid_method", "method")),
        ({"url": ...}, ("missing_required_parameter", "url")),
        ({"url": "/v1/embeddings"}, ("url_mismatch", "url")),
        ({"url": {"a": 1}}, ("url_mismatch", "url")),
        ({"body": ...}, ("missing_required_parameter", "body")),
        ({"body": "text"}, ("invalid_type", "body")),
        ({"body": []}, ("invalid_type", "body")),
        ({"body": {}}, ("missing_required_parameter", "body.model")),
        ({"body": {"model": None}}, ("missing_required_parameter", "body.model")),
        ({"body": {"model": 3}}, ("invalid_type", "body.model")),
        ({"body": {"model": "echo", "stream": True}}, ("invalid_value", "body.stream")),
    ],
)
def test_what_makes_it_no_request_is_named(
    changes: dict[str, Any], expected: tuple[str, str | None]
) -> None:
    assert problem(request(**changes)) == expected


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"17",
        b'{"custom_id": NaN}',
        b"\xff\xfe{\x00}\x00",
        b'{"custom_id": "\xe9"}',
        b'{"custom_id": "\\ud800"}',
        b"{} {}",
        b"[" * 5_000,
        b'{"a":' * 300 + b"1" + b"}" * 300,
        b'{"a":' * 900 + b"1" + b"}" * 900,
        b'{"a":1,"a":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"custom_id": "1", "custom_id": "2"}',
        b'{"body": {"model": "a", "model": "b"}}',
    ],
)
def test_what_is_no_json_object_is_refused_and_nothing_breaks(text: bytes) -> None:
    assert problem(text) == ("invalid_json_line", None)


@pytest.mark.parametrize("depth", [240, 250, 251, 253, 254, 255, 256, 500, 1000, 1020])
def test_a_body_is_taken_or_refused_however_deep_it_is(depth: int) -> None:
    """orjson writes 254 levels; four of them are the line's own."""
    deep = b"[" * depth + b"]" * depth
    text = orjson.dumps(request()).replace(b'"hi"', deep)
    if depth <= 250:
        assert LineChecker(CHAT).check(text).tokens > 0
    else:
        assert problem(text) == ("invalid_json_line", None)


def test_a_colon_after_a_quote_inside_a_text_is_no_key() -> None:
    said = [{"role": "user", "content": 'He said: "x": "x": and ": "\\": {"a": 1, "a": 2}'}]
    text = orjson.dumps(request(body={"model": "echo", "messages": said}))
    assert LineChecker(CHAT).check(text).tokens > 0


@given(st.binary(max_size=60))
def test_garbage_is_a_bad_line_and_nothing_else(garbage: bytes) -> None:
    assert problem(garbage)[0] in ("invalid_json_line", "missing_required_parameter")


TEXTS = st.text('a1 ":\\{}[]\0\n\u2028é😀', max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["custom_id", "method", "url", "body"])
BODY_FIELDS = st.sampled_from(
    ["model", "messages", "prompt", "input", "max_tokens", "n", "tools", "instructions", "stream"]
)


@given(st.dictionaries(FIELDS, VALUES), st.dictionaries(BODY_FIELDS, VALUES))
def test_strange_values_are_taken_or_refused_and_nothing_else(
    fields: dict[str, Any], body: dict[str, Any]
) -> None:
    line = request() | fields
    if isinstance(line["body"], dict):
        line["body"] = line["body"] | body
    for endpoint in (CHAT, "/v1/embeddings"):
        with suppress(BadLine):
            checked = LineChecker(endpoint).check(orjson.dumps(line | {"url": endpoint}))
            assert checked.tokens >= 1
            assert len(checked.prefix) == 20


def test_a_custom_id_may_come_only_once() -> None:
    checker = LineChecker(CHAT)
    checker.check(orjson.dumps(request()))
    with pytest.raises(BadLine) as caught:
        checker.check(orjson.dumps(request()))
    assert caught.value.as_wire(2) == {
        "code": "duplicate_custom_id",
        "message": "The custom_id '1' was used before.",
        "param": "custom_id",
        "line": 2,
    }


def test_trap_02_a_file_of_mixed_models_is_refused() -> None:
    checker = LineChecker(CHAT)
    checker.check(orjson.dumps(request()))
    with pytest.raises(BadLine) as caught:
        checker.check(orjson.dumps(request(custom_id="2", body={"model": "other"})))
    assert (caught.value.code, caught.value.param) == ("model_mismatch", "body.model")
    assert checker.model == "echo"


def embed(given: Any) -> bytes:
    body = {"model": "echo", "input": given}
    return orjson.dumps(request(url="/v1/embeddings", body=body))


@pytest.mark.parametrize(
    ("given", "inputs"),
    [("text", 1), ([1, 2, 3], 1), (["a", "b"], 2), ([[1, 2], [3]], 2), ([], 1), (None, 1)],
)
def test_the_inputs_of_an_embedding_request_are_counted(given: Any, inputs: int) -> None:
    checker = LineChecker("/v1/embeddings")
    checker.check(embed(given))
    assert checker.inputs == inputs


def test_a_batch_has_a_limit_of_embedding_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_EMBEDDING_INPUTS", 2)
    assert problem(embed(["a", "b", "c"]), "/v1/embeddings") == ("too_many_inputs", "body.input")
    assert LineChecker("/v1/embeddings").check(embed(["a", "b"])).tokens > 0


def test_what_is_shown_of_a_hostile_value_is_short_and_plain() -> None:
    assert lines.show("a\0b\u202e<é>") == r"'a\x00b\u202e<\xe9>'"
    assert len(lines.show("x" * 10_000)) == 80


# --- Estimates ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "body", "tokens"),
    [
        (CHAT, {}, 11 + 256),
        (CHAT, {"max_tokens": 5}, 11 + 5),
        (CHAT, {"max_completion_tokens": 7, "max_tokens": 5}, 11 + 7),
        ("/v1/responses", {"max_output_tokens": 9}, 11 + 9),
        (CHAT, {"max_tokens": 5, "n": 3}, 11 + 15),
        (CHAT, {"max_tokens": 0}, 11 + 256),
        (CHAT, {"max_tokens": -4, "n": "many"}, 11 + 256),
        (CHAT, {"max_tokens": True, "n": True}, 11 + 256),
        (CHAT, {"max_tokens": 9_999_999, "n": 9_999_999}, 11 + 10_000_000),
        ("/v1/embeddings", {"max_tokens": 5}, 11),
        ("/v1/score", {}, 11),
        ("/v1/rerank", {}, 11),
    ],
)
def test_a_request_is_estimated_by_its_size_and_by_what_it_asks_for(
    endpoint: str, body: dict[str, Any], tokens: int
) -> None:
    assert lines.estimate_tokens(endpoint, body, 40) == tokens


def steps(one: bytes, other: bytes) -> int:
    """In how many steps from the first on two ladders agree."""
    same = [one[at : at + 4] == other[at : at + 4] for at in range(0, 20, 4)]
    return same.index(False) if False in same else len(same)


def said(text: str) -> bytes:
    return prefix_ladder({"messages": [{"role": "user", "content": text}]})


@pytest.mark.parametrize(
    ("shared", "agreed"), [(0, 0), (100, 1), (300, 2), (2_000, 3), (5_000, 4), (20_000, 5)]
)
def test_requests_agree_in_as_many_steps_as_their_prefix_is_long(shared: int, agreed: int) -> None:
    prefix = "x" * shared
    assert steps(said(prefix + "a" * 30_000), said(prefix + "b" * 30_000)) == agreed


def test_tools_and_instructions_are_part_of_the_prefix() -> None:
    assert steps(prefix_ladder({"tools": [1], "input": "a"}), prefix_ladder({"input": "a"})) == 0
    assert (
        steps(prefix_ladder({"instructions": "x", "input": "a"}), prefix_ladder({"input": "a"}))
        == 0
    )
