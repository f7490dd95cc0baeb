"""The speed that is measured of a model: what it really does, whenever its answers come."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from worker.pace import Look, Measured, Pace

EACH = 100
"""Tokens a second of each request that runs."""


def served(
    lengths: Sequence[int], seconds: int, *, tells: bool, slots: int = 8, beat: int = 3
) -> list[Measured]:
    """What is measured while an engine runs requests of so many tokens, one after the other in each
    slot; as many again wait in it."""
    pace, waiting = Pace(Look()), list(lengths)
    running = [[waiting.pop(0), 0] for _ in range(slots)]
    tokens = answers = 0
    found = []
    for at in range(0, seconds, beat):
        for _ in range(beat):
            for each in running:
                each[1] += EACH
            ended = [each for each in running if each[1] >= each[0]]
            running = [each for each in running if each[1] < each[0]]
            free = min(slots - len(running), len(waiting))
            running += [[waiting.pop(0), 0] for _ in range(free)]
            tokens, answers = tokens + sum(each[0] for each in ended), answers + len(ended)
        busy = len(running) >= slots / 2
        done = tokens + sum(each[1] for each in running) if tells else tokens
        in_flight = len(running) + min(slots, len(waiting))
        found.append(pace.see(Look(at, "m" if busy else "", done, answers, in_flight, tells)))
    return [each for each in found if each is not None]


def per_second(found: Sequence[Measured]) -> float:
    seconds = sum(each.seconds for each in found)
    return sum(each.tokens_per_second * each.seconds for each in found) / seconds


def uneven(count: int) -> list[int]:
    numbers = random.Random(4)
    return [numbers.randrange(100, 40_000, 100) for _ in range(count)]


# --- Long requests ------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[20_000] * 100, uneven(100)])
def test_each_minute_is_measured_of_an_engine_that_tells_what_is_under_way(
    lengths: list[int],
) -> None:
    """Eight requests at once, of minutes each: most of the time nothing is answered."""
    found = served(lengths, 1_200, tells=True)
    assert [each.seconds for each in found] == [60] * 19
    assert {each.tokens_per_second for each in found} == {8 * EACH}


@pytest.mark.parametrize("lengths", [[20_000] * 300, uneven(300)])
def test_the_speed_is_right_too_where_only_answers_are_known(lengths: list[int]) -> None:
    found = served(lengths, 6_000, tells=False)
    assert len(found) >= 4
    assert found[0].tokens_per_second == pytest.approx(8 * EACH, rel=0.25)
    assert per_second(found) == pytest.approx(8 * EACH, rel=0.1)


def test_of_an_engine_that_only_answers_nothing_is_said_of_a_stretch_too_short() -> None:
    """At its end as much is under way as was answered."""
    lengths = [each * 2_000 for each in range(1, 9)]
    assert served(lengths, 300, tells=False) == []
    found = served(lengths, 300, tells=True)
    assert 4 * EACH < per_second(found) < 8 * EACH  # fewer and fewer ran


# --- Short ones ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tells", [False, True])
def test_a_small_batch_is_measured_when_it_ends(tells: bool) -> None:
    [found] = served([200] * 80, 60, tells=tells)
    assert found.tokens_per_second == pytest.approx(8 * EACH, rel=0.1)
    assert 10 <= found.seconds <= 20


def look(at: float, tokens: int, busy: str = "m", *, tells: bool = True) -> Look:
    return Look(at, busy, tokens, answers=tokens, in_flight=0, tells=tells)


def seen(*looks: Look) -> list[Measured]:
    pace = Pace(Look())
    return [found for each in looks if (found := pace.see(each)) is not None]


def test_short_stretches_of_one_model_are_added_up() -> None:
    looks = [
        look(0, 0),
        look(6, 60),
        look(9, 61, ""),
        look(90, 61),
        look(96, 121),
        look(99, 121, ""),
    ]
    assert seen(*looks) == [Measured("m", 10, 12)]
    assert seen(*looks[:3]) == []


def test_nothing_is_measured_where_nothing_was_answered() -> None:
    assert seen(*(look(at, 0, tells=False) for at in range(0, 200, 3))) == []


def test_one_model_is_not_taken_for_the_other() -> None:
    looks = [look(0, 0), look(12, 120), look(24, 900, "other"), look(36, 1_020, "other")]
    assert seen(*looks, look(39, 1_020, "")) == [Measured("m", 10, 12), Measured("other", 10, 12)]


def test_what_was_broken_off_makes_no_model_slower() -> None:
    """Its tokens are in no answer; what else was done in that beat nobody knows."""
    looks = [look(at, 10 * at) for at in range(0, 31, 3)]
    looks += [look(at, 10 * at - 200) for at in range(33, 64, 3)]
    assert seen(*looks, look(66, 460)) == [Measured("m", 10, 60)]
