"""The index of a batch: its order, its bytes, and how chunks are cut from it."""

from __future__ import annotations

import io
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batches import index
from batches.index import RECORD_BYTES, Entry, cut, execution_order
from batches.lines import prefix_ladder

# Few values, so that groups and groups within groups come about.
LADDERS = st.lists(
    st.lists(st.sampled_from([b"aaaa", b"bbbb", b"cccc"]), min_size=5, max_size=5).map(b"".join),
    max_size=40,
)
ENTRIES = st.lists(
    st.builds(
        Entry,
        st.integers(1, 2**32 - 1),
        st.integers(0, 2**64 - 1),
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**32 - 1),
    ),
    max_size=20,
)


@given(LADDERS)
def test_every_line_is_in_the_order_exactly_once(ladders: list[bytes]) -> None:
    assert sorted(execution_order(ladders)) == list(range(len(ladders)))


@given(LADDERS)
def test_lines_that_share_a_prefix_lie_side_by_side(ladders: list[bytes]) -> None:
    order = execution_order(ladders)
    for size in (4, 8, 12, 16, 20):
        seen: set[bytes] = set()
        previous = None
        for at in order:
            prefix = ladders[at][:size]
            assert prefix == previous or prefix not in seen
            seen.add(prefix)
            previous = prefix


@given(LADDERS)
def test_among_groups_and_within_one_the_input_order_is_kept(ladders: list[bytes]) -> None:
    order = execution_order(ladders)
    for size in (4, 8, 12, 16, 20):
        firsts: dict[bytes, int] = {}
        for at in range(len(ladders)):
            firsts.setdefault(ladders[at][:size], at)
        # Groups inside the same larger group come in the order of their first lines.
        for one, other in pairwise(order):
            if ladders[one][: size - 4] == ladders[other][: size - 4]:
                assert firsts[ladders[one][:size]] <= firsts[ladders[other][:size]]
    for one, other in pairwise(order):
        if ladders[one] == ladders[other]:
            assert one < other


def test_without_shared_prefixes_the_order_is_the_input_order() -> None:
    ladders = [prefix_ladder({"prompt": f"{at} asks"}) for at in range(500)]
    assert execution_order(ladders) == list(range(500))


def test_long_shared_prefixes_are_brought_together() -> None:
    long, other = "a" * 2_000, "b" * 2_000
    prompts = [long + "1", other + "1", long + "2", "short", other + "2", long + "3"]
    ladders = [prefix_ladder({"prompt": prompt}) for prompt in prompts]
    assert execution_order(ladders) == [0, 2, 5, 1, 4, 3]


@given(ENTRIES)
def test_what_is_written_is_read_again(entries: list[Entry]) -> None:
    stream = io.BytesIO()
    index.write(stream, entries)
    assert len(stream.getvalue()) == RECORD_BYTES * len(entries)
    assert index.read(stream) == entries


@given(ENTRIES, st.data())
def test_any_part_is_read_alone(entries: list[Entry], data: st.DataObject) -> None:
    stream = io.BytesIO()
    index.write(stream, entries)
    start = data.draw(st.integers(0, len(entries)))
    end = data.draw(st.integers(start, len(entries)))
    assert index.read(stream, start, end) == entries[start:end]


def test_an_estimate_too_large_for_a_record_is_its_largest() -> None:
    stream = io.BytesIO()
    index.write(stream, [Entry(1, 2, 3, 2**40)])
    assert index.read(stream) == [Entry(1, 2, 3, 2**32 - 1)]


@given(
    st.lists(st.integers(1, 50), max_size=60),
    st.integers(1, 10),
    st.floats(0.5, 200),
)
def test_chunks_hold_every_line_once_and_keep_the_limits(
    tokens: list[int], most: int, budget: float
) -> None:
    pieces = list(cut(tokens, max_requests=most, max_tokens=budget))
    assert [at for start, end, _ in pieces for at in range(start, end)] == list(range(len(tokens)))
    for start, end, total in pieces:
        assert 0 < end - start <= most
        assert total == sum(tokens[start:end])
        assert total <= budget or end - start == 1
    # No chunk could have taken the next one's first line too.
    for (start, end, total), (after, _, _) in pairwise(pieces):
        assert end - start == most or total + tokens[after] > budget


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        ([], []),
        ([5], [(0, 1, 5)]),
        ([5, 5, 5], [(0, 2, 10), (2, 3, 5)]),
        ([50, 1, 1], [(0, 1, 50), (1, 3, 2)]),
        ([1, 1, 1, 1, 1, 1, 1], [(0, 3, 3), (3, 6, 3), (6, 7, 1)]),
    ],
)
def test_chunks_are_cut_as_expected(tokens: list[int], pieces: list[tuple[int, int, int]]) -> None:
    assert list(cut(tokens, max_requests=3, max_tokens=10)) == pieces
