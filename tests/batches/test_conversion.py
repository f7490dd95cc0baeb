"""Tables as inputs: whatever is in one, what comes out is good JSON lines, or words that say why not.

The pages around it are tested in `test_new_batch_page.py`.
"""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from batches import tables
from batches.lines import LineChecker, read_lines
from batches.prompts import Recipe, Template, UnknownColumns, lines_of
from batches.tables import BadTable
from tests.wire import CHAT

RECIPE = Recipe(CHAT, "echo", "{{question}}")
ROOT = Path(__file__).resolve().parents[2]


def rows_of(content: bytes, name: str = "table.csv") -> list[list[str]]:
    """The columns and the rows."""
    with tables.opened(io.BytesIO(content), name) as table:
        return [list(table.columns), *(list(row) for row in table.rows)]


def refusal(content: bytes, name: str = "table.csv") -> str:
    with pytest.raises(BadTable) as refused:
        rows_of(content, name)
    return str(refused.value)


def made(content: bytes, recipe: Recipe = RECIPE, name: str = "table.csv") -> list[Any]:
    """The requests that come out, parsed."""
    with tables.opened(io.BytesIO(content), name, recipe.columns) as table:
        return [orjson.loads(line) for line in lines_of(table, recipe)]


def prompts(requests: list[Any]) -> list[str]:
    return [each["body"]["messages"][-1]["content"] for each in requests]


def as_csv(rows: list[list[str]], **options: Any) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, **options).writerows(rows)
    return text.getvalue().encode()


def as_parquet(columns: dict[str, Any], **options: Any) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.table(columns), sink, **options)
    return sink.getvalue()


# --- Templates ------------------------------------------------------------------------------


def test_each_place_gets_its_cell() -> None:
    template = Template("{{a}} and {{ b }}, {{a}}: {not} { {b} }", ["a", "b"])
    assert template.fill(["one", "two"]) == "one and two, one: {not} { {b} }"


def test_what_a_cell_holds_is_not_looked_into() -> None:
    template = Template("{{a}}{{b}}", ["a", "b"])
    assert template.fill(["{{b}}", "{% include 'x' %}\\1"]) == "{{b}}{% include 'x' %}\\1"


def test_columns_that_are_not_there_are_named() -> None:
    with pytest.raises(UnknownColumns) as unknown:
        Template("{{a}} {{c}} {{d}} {{c}}", ["a", "b"])
    assert unknown.value.names == ["c", "d"]


@given(st.text(), st.text(), st.text())
def test_a_template_is_the_text_around_and_the_cells(before: str, cell: str, after: str) -> None:
    before, after = (text.replace("{", "(").replace("}", ")") for text in (before, after))
    assert Template(f"{before}{{{{a}}}}{after}", ["a"]).fill([cell]) == before + cell + after


# --- CSV ------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8))
def test_what_goes_into_a_table_comes_out_as_good_lines(pairs: list[tuple[str, str]]) -> None:
    content = as_csv([["question", "hint"], *map(list, pairs)], quoting=csv.QUOTE_ALL)
    recipe = Recipe(CHAT, "echo", "Q: {{question}}", "{{hint}}", max_tokens=5, temperature=0.5)
    with tables.opened(io.BytesIO(content), "table.csv") as table:
        lines = b"".join(lines_of(table, recipe))
    checker = LineChecker(CHAT)
    for line in read_lines(io.BytesIO(lines), 10**6):
        assert line.text is not None
        checker.check(line.text)
    requests = [orjson.loads(line) for line in lines.splitlines()]
    assert [each["custom_id"] for each in requests] == [f"row-{at + 1}" for at in range(len(pairs))]
    assert prompts(requests) == [f"Q: {question}" for question, _ in pairs]
    systems = [each["body"]["messages"][0]["content"] for each in requests]
    assert systems == [hint or f"Q: {question}" for question, hint in pairs]


@given(st.binary(max_size=400))
def test_any_bytes_are_a_table_or_are_refused_in_words(content: bytes) -> None:
    try:
        found = rows_of(content)
    except BadTable:
        return  # anything else that is raised fails the test
    assert {len(row) for row in found} == {len(found[0])}


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_found(separator: str) -> None:
    content = as_csv([["a", "b"], ["x, y", "z"]], delimiter=separator)
    assert rows_of(content) == [["a", "b"], ["x, y", "z"]]


def test_a_mark_at_the_beginning_and_windows_line_ends_are_no_part_of_it() -> None:
    assert rows_of(b"\xef\xbb\xbfa,b\r\n1,2\r\n\r\n3,4") == [["a", "b"], ["1", "2"], ["3", "4"]]


def test_a_nul_is_kept() -> None:
    assert prompts(made(b"question\nx\0y\n")) == ["x\0y"]


def test_short_rows_are_filled_up_and_long_ones_refused() -> None:
    assert rows_of(b"a,b\n1\n1,2,,\n") == [["a", "b"], ["1", ""], ["1", "2"]]
    assert "line 3 has 3 cells, but there are 2 columns" in refusal(b"a,b\n1,2\n1,2,3\n")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"a,a\n1,2\n", "Two columns are called 'a'"),
        ("ä,b\n1,2\n".encode("latin-1"), "not UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), "UTF-16"),
        (b'a,b\n"1,2\n', "not CSV"),
        (b'a\n"1"2\n', "Line 2 is not CSV"),
        (b",".join(b"c%d" % at for at in range(1001)) + b"\n", "1,001 columns"),
    ],
)
def test_what_is_no_table_is_refused(content: bytes, said: str) -> None:
    assert said in refusal(content)


@pytest.mark.parametrize(
    "cell", [b"x" * 2000, b'"' + b"x\n" * 1000 + b'"', b'"x\n",' * 500 + b"x", b"\n" * 2000]
)
def test_no_row_is_longer_than_a_request_may_be(
    cell: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MAX_ROW", 1000)
    assert "longer than 1,000 characters" in refusal(b"a\n" + cell + b"\n")


def test_other_names_are_no_tables() -> None:
    assert "must be one of" in refusal(b"a\n1\n", "table.xlsx")


# --- Requests ---------------------------------------------------------------------------------


def test_each_endpoint_has_its_own_body() -> None:
    def body(endpoint: str, **options: Any) -> Any:
        recipe = Recipe(endpoint, "m", "{{a}}", **options)
        return made(b"a,b\n1,2\n", recipe)[0]["body"]

    assert body(CHAT, system="S {{b}}", max_tokens=7, temperature=0.0) == {
        "model": "m",
        "messages": [{"role": "system", "content": "S 2"}, {"role": "user", "content": "1"}],
        "max_completion_tokens": 7,
        "temperature": 0.0,
    }
    assert body("/v1/completions", max_tokens=7) == {"model": "m", "prompt": "1", "max_tokens": 7}
    assert body("/v1/responses", system="S", max_tokens=7) == {
        "model": "m",
        "input": "1",
        "instructions": "S",
        "max_output_tokens": 7,
    }
    assert body("/v1/embeddings") == {"model": "m", "input": "1"}


def test_a_column_can_name_the_requests() -> None:
    recipe = Recipe(CHAT, "echo", "{{question}}", custom_id="id")
    assert [each["custom_id"] for each in made(b"id,question\nx,1\ny,2\n", recipe)] == ["x", "y"]
    for content, said in (
        (b"id,question\nx,1\nx,2\n", "Row 2: The custom_id 'x' was used before."),
        (b"id,question\nx,1\n,2\n", "Row 2: custom_id must be a string of 1 to 512 characters."),
    ):
        with pytest.raises(BadTable) as refused:
            made(content, recipe)
        assert str(refused.value) == said


def test_the_limits_of_a_batch_hold(settings: Any) -> None:
    settings.MAX_BATCH_REQUESTS = 2
    assert len(made(b"question\n1\n2\n")) == 2
    with pytest.raises(BadTable, match="more than 2 rows"):
        made(b"question\n1\n2\n3\n")
    settings.MAX_BATCH_FILE_BYTES = 200
    with pytest.raises(BadTable, match="At row 2 the input is longer than 200 bytes"):
        made(b"question\n1\n2\n")
    settings.MAX_LINE_BYTES = 100
    with pytest.raises(BadTable, match="Row 1 makes a request longer than 100 bytes"):
        made(b"question\n1\n")


def test_a_prompt_that_repeats_a_long_cell_is_refused_before_it_is_in_memory(settings: Any) -> None:
    content = as_csv([["question"], ["x" * 500_000]])
    settings.MAX_LINE_BYTES = 1_000_000
    tracemalloc.start()
    try:
        with pytest.raises(BadTable, match="Row 1 makes a request longer than 1,000,000 bytes"):
            made(content, Recipe(CHAT, "echo", "{{question}}" * 200))
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


# --- Parquet ----------------------------------------------------------------------------------


def test_values_of_every_kind_become_text() -> None:
    content = as_parquet(
        {
            "text": ["ä{{b}}", None],
            "number": [1, -2],
            "real": [0.5, None],
            "yes": [True, False],
            "list": [["a", "b"], None],
            "bytes": [b"raw", b""],
        }
    )
    assert rows_of(content, "t.parquet") == [
        ["text", "number", "real", "yes", "list", "bytes"],
        ["ä{{b}}", "1", "0.5", "true", '["a", "b"]', "raw"],
        ["", "-2", "", "false", "", ""],
    ]


def test_only_the_columns_that_are_needed_are_read() -> None:
    content = as_parquet({"a": ["1"], "question": ["2"]}, row_group_size=1)
    with tables.opened(io.BytesIO(content), "t.parquet", {"question"}) as table:
        assert [list(row) for row in table.rows] == [["", "2"]]
    assert prompts(made(content, name="t.parquet")) == ["2"]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\xff" * 500 + b"PAR1"])
def test_what_is_no_parquet_is_refused(content: bytes) -> None:
    assert refusal(content, "t.parquet").startswith("The Parquet file")


def test_a_parquet_bomb_is_refused_before_it_takes_much_memory() -> None:
    """Some kilobytes that say: four hundred million bytes, a hundred times in every row group."""
    huge = pa.array(["x" * 400_000_000])
    dictionary = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), huge)
    content = as_parquet({"question": dictionary}, compression="zstd")
    assert len(content) < 1_000_000
    said = refusal(content, "t.parquet")
    assert said.startswith("The Parquet file")


# --- Memory -----------------------------------------------------------------------------------

MEASURED = """
import re, sys
from pathlib import Path
import django
django.setup()
from batches import tables
from batches.prompts import Recipe, lines_of
with open(sys.argv[1], "rb") as stream, tables.opened(stream, "t.csv") as table:
    size = sum(map(len, lines_of(table, Recipe("/v1/chat/completions", "m", "{{question}}"))))
# Not getrusage: its peak is that of the process which started this one, too.
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())
print(size, int(peak[1]) // 1024)
"""


@pytest.mark.slow
def test_a_table_of_50_mb_takes_no_memory(tmp_path: Path) -> None:
    def measured(rows: int) -> tuple[int, int]:
        path = tmp_path / f"{rows}.csv"
        path.write_bytes(b"question\n" + (b"x" * 1023 + b"\n") * rows)
        command = [sys.executable, "-c", MEASURED, str(path)]
        variables = os.environ | {"DJANGO_SETTINGS_MODULE": "portal.settings"}
        done = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, check=True, timeout=300
        )
        size, peak = done.stdout.split()
        return int(size), int(peak)

    _, idle = measured(10)
    size, peak = measured(49_500)
    assert size > 50_000_000
    assert peak - idle < 24, "megabytes; mostly the custom_ids that were seen"
