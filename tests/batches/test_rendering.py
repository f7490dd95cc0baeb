"""How requests and answers are shown, and failures are grouped: whatever a model or a tenant says."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batches import error_kinds, rendering
from batches.rendering import Part


def asked(**body: Any) -> list[Part]:
    return rendering.request(orjson.dumps({"custom_id": "a", "body": body}), whole=True).parts


def answered(**body: Any) -> list[Part]:
    line = {"custom_id": "a", "response": {"status_code": 200, "body": body}, "error": None}
    return rendering.answer(orjson.dumps(line), whole=True).parts


def choice(reason: str = "stop", **message: Any) -> list[Part]:
    said = {"role": "assistant", "content": None} | message
    return answered(choices=[{"message": said, "finish_reason": reason}])


def test_messages_are_shown_by_role_with_the_text_of_their_parts() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:x"}}
    content = [{"type": "text", "text": "What is\nthis?"}, image]
    assert asked(messages=[{"role": "system", "content": "Be brief."},
                           {"role": "user", "content": content}]) == [
        Part("system", "Be brief."),
        Part("user", "What is\nthis?\n[image_url]"),
    ]  # fmt: skip


def test_prompts_and_inputs_are_shown_as_text() -> None:
    assert asked(prompt="Once") == [Part("prompt", "Once")]
    assert asked(input=["a", "b"]) == [Part("input 1", "a"), Part("input 2", "b")]
    assert asked(input=[1, 2]) == [Part("input", "1\n2")]
    assert asked(query="q", documents=["d"]) == [Part("query", "q"), Part("document 1", "d")]


def test_what_else_was_asked_for_is_a_fact() -> None:
    line = {"custom_id": "a", "body": {"model": "m", "prompt": "x", "temperature": 0.5}}
    assert rendering.request(orjson.dumps(line), whole=True).facts == [("temperature", "0.5")]


def test_an_answers_text_keeps_its_lines_and_says_how_it_ended() -> None:
    assert choice(content="a\nb") == [Part("assistant", "a\nb")]
    assert choice("length", content="a") == [Part("assistant", "a", note="ended by length")]
    assert answered(choices=[{"text": "a", "finish_reason": "stop"}]) == [Part("answer", "a")]


def test_reasoning_and_tool_calls_are_parts_of_their_own() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": '{"at":1}'}}
    assert choice(reasoning_content="Hm.", tool_calls=[call]) == [
        Part("reasoning", "Hm."),
        Part("tool call", 'look({\n  "at": 1\n})', code=True),
    ]


def test_a_vector_is_shown_by_its_length_and_first_numbers() -> None:
    data = [{"index": 0, "embedding": [0.5] * 1_024}, {"index": 1, "embedding": "AAAA"}]
    assert answered(data=data) == [
        Part("vector 0", "1,024 numbers: 0.5, 0.5, 0.5, 0.5, …"),
        Part("vector 1", "A vector, packed as text"),
    ]


def test_scores_and_ranks_are_shown() -> None:
    assert answered(data=[{"index": 0, "score": 0.25}]) == [Part("score 0", "0.25")]
    ranked = [{"index": 1, "document": {"text": "d"}, "relevance_score": 0.5}]
    assert answered(results=ranked) == [Part("document 1", "d", note="relevance 0.5")]


def test_what_responses_puts_out_is_shown() -> None:
    message = {"type": "message", "role": "assistant", "content": [{"text": "Hi"}]}
    call = {"type": "function_call", "name": "look", "arguments": "{"}
    assert answered(output=[message, call]) == [
        Part("assistant", "Hi"),
        Part("tool call", "look({)", code=True),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            {"response": None, "error": {"code": "batch_expired", "message": "Too late."}},
            Part("error", "Too late.", note="batch_expired"),
        ),
        (
            {
                "response": {
                    "status_code": 400,
                    "body": {"error": {"type": "bad", "message": "No."}},
                }
            },
            Part("error", "No.", note="bad"),
        ),
    ],
)
def test_an_error_says_its_code_and_its_words(line: Any, said: Part) -> None:
    assert rendering.answer(orjson.dumps(line), whole=True).parts == [said]


def test_what_was_cut_off_is_shown_as_it_stands() -> None:
    shown = rendering.answer(b'{"custom_id": "\xff', whole=False)
    assert (shown.parts, shown.json, shown.whole) == ([], '{"custom_id": "\ufffd', False)


def test_there_is_an_end_to_the_parts() -> None:
    assert len(asked(input=["a"] * 2_048)) == rendering.MOST_PARTS


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(0, 1) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["body", "response", "error", "choices", "message", "messages", "content", "data",
                 "embedding", "score", "tool_calls", "function", "arguments", "output", "results",
                 "document", "input", "prompt", "role", "code", "status_code", "usage", "type"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=25,
)  # fmt: skip


@given(line=st.dictionaries(st.sampled_from(["body", "response", "error"]), JSON))
def test_whatever_a_line_holds_it_can_be_shown_and_grouped(line: Any) -> None:
    text = orjson.dumps(line)
    for shown in (rendering.request(text, whole=True), rendering.answer(text, whole=True)):
        assert orjson.loads(shown.json) == line
        assert all(isinstance(part.text, str) for part in shown.parts)
        assert len(shown.first) <= 200
    code, _, message = error_kinds.said(text)
    assert (len(code) <= 64, bool(message)) == (True, True)


def test_there_is_an_end_to_the_kinds_of_errors() -> None:
    tally = error_kinds.Tally()
    for line in range(1, 101):
        error = {"code": f"code {line % 50}", "message": "\0x"}
        tally.add(line, orjson.dumps({"response": None, "error": error}))
    kinds = error_kinds.kinds_of(tally.as_json())
    assert len(kinds) == error_kinds.MOST_KINDS + 1
    assert (kinds[0].code, kinds[0].count) == (error_kinds.OTHERS, 60)
    assert sum(kind.count for kind in kinds) == 100
    assert kinds[1].lines == [1, 51]
    assert kinds[1].message == "\ufffdx"


def test_what_is_no_json_is_of_an_unknown_kind() -> None:
    assert error_kinds.said(b"\xff")[:2] == ("unknown", None)
