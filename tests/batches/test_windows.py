"""Completion windows."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounts.errors import BadRequest
from batches.windows import LONGEST, SHORTEST, parse


@pytest.mark.parametrize(
    ("text", "window"),
    [
        ("24h", timedelta(hours=24)),
        ("1h", timedelta(hours=1)),
        ("1m", timedelta(minutes=1)),
        ("90m", timedelta(minutes=90)),
        ("336h", timedelta(days=14)),
        ("20160m", timedelta(days=14)),
    ],
)
def test_hours_and_minutes_are_windows(text: str, window: timedelta) -> None:
    assert parse(text) == window


@pytest.mark.parametrize(
    "text",
    [
        *("", "h", "24", "0h", "0m", "024h", "-1h", "+1h", "1.5h", "1d", "1s", "24H", "24h "),
        *(" 24h", "24h\n", "337h", "20161m", "99999h", "100000m", "٢٤h", "1e2m", "24 h", "24hm"),
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(text)
    assert (caught.value.status, caught.value.param) == (400, "completion_window")
    assert caught.value.code == "invalid_value"


@given(st.text(alphabet="0123456789hm -.", max_size=8) | st.text(max_size=8))
def test_a_window_is_within_its_bounds_or_refused(text: str) -> None:
    with suppress(BadRequest):
        assert SHORTEST <= parse(text) <= LONGEST
