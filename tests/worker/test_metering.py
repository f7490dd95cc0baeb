"""The shared clock: whose GPU time it was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker import metering
from worker.metering import SharedClock


class Time:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    fake = Time()
    monkeypatch.setattr(metering, "time", fake)
    return fake


def test_alone_a_request_has_all_of_the_time(time: Time) -> None:
    clock = SharedClock()
    time.now += 7  # idle: nobody's
    begun = clock.begin()
    time.now += 3
    assert clock.share(begun) == 3


def test_two_at_once_have_half_each(time: Time) -> None:
    clock = SharedClock()
    first = clock.begin()
    time.now += 2
    second = clock.begin()
    time.now += 4
    assert (clock.share(first), clock.share(second)) == (4, 2)
    clock.end()
    time.now += 1
    assert clock.share(second) == 3


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 1000)), max_size=60))
def test_all_shares_together_are_the_time_in_which_the_engine_was_busy(
    steps: list[tuple[bool, int]],
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        time = Time()
        patched.setattr(metering, "time", time)
        clock, running, shares, busy = SharedClock(), [], 0.0, 0.0
        for enters, wait in [*steps, *[(False, 5)] * len(steps)]:
            busy += wait if running else 0
            time.now += wait
            if enters:
                running.append(clock.begin())
            elif running:
                shares += clock.share(running.pop(0))
                clock.end()
        assert shares == pytest.approx(busy)
