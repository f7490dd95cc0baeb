"""Which batch a worker serves next: a pure function, so its tests are a table and properties."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batches.policy import STARVING, Candidate, Decision, choose

NOW = datetime(2025, 1, 1, tzinfo=UTC)


def candidate(id: str, model: str = "a", *, waited: int = 0, priority: int = 0) -> Candidate:
    """A batch that has waited so many minutes."""
    return Candidate(id, "org", model, priority, NOW - timedelta(minutes=waited))


def chosen(*candidates: Candidate, loaded: str = "a", turn: int = 0) -> tuple[str, str]:
    decision = choose(candidates, loaded=loaded, residency=timedelta(minutes=turn), now=NOW)
    assert decision is not None
    return decision.candidate.batch_id, decision.reason


def test_nothing_waits() -> None:
    assert choose([], loaded="a", residency=timedelta(0), now=NOW) is None


def test_the_oldest_goes_first() -> None:
    assert chosen(candidate("new"), candidate("old", waited=5)) == ("old", "oldest")


def test_the_loaded_models_batch_goes_first() -> None:
    old = candidate("old", "b", waited=9)
    assert chosen(old, candidate("new")) == ("new", "model is loaded")


def test_among_the_loaded_models_batches_the_oldest_goes_first() -> None:
    found = chosen(candidate("b", "b", waited=9), candidate("2"), candidate("1", waited=3))
    assert found == ("1", "model is loaded")


def test_a_higher_priority_goes_before_the_loaded_model() -> None:
    urgent = candidate("urgent", "b", priority=1)
    assert chosen(urgent, candidate("plain", waited=99)) == ("urgent", "oldest")


def test_a_lower_priority_waits() -> None:
    low = candidate("low", waited=9, priority=-1)
    assert chosen(low, candidate("plain", "b")) == ("plain", "oldest")


def test_with_nothing_loaded_the_oldest_goes_first() -> None:
    found = chosen(candidate("new", "b"), candidate("old", "c", waited=1), loaded="")
    assert found == ("old", "oldest")


@pytest.mark.parametrize(
    ("waited", "turn", "expected"),
    [
        (11, 11, ("old", "starving")),
        (10, 11, ("new", "model is loaded")),
        (11, 10, ("new", "model is loaded")),
        (99, 0, ("new", "model is loaded")),
    ],
)
def test_a_starving_batch_ends_a_turn_that_was_as_long(
    waited: int, turn: int, expected: tuple[str, str]
) -> None:
    found = chosen(candidate("old", "b", waited=waited), candidate("new"), turn=turn)
    assert found == expected


def test_batches_of_the_same_moment_have_an_order_too() -> None:
    same = [candidate("2"), candidate("1"), candidate("3")]
    assert {chosen(*same), chosen(*reversed(same))} == {("1", "oldest")}


CANDIDATES = st.lists(
    st.builds(
        candidate,
        st.uuids().map(str),
        st.sampled_from("abc"),
        waited=st.integers(0, 30),
        priority=st.integers(-1, 1),
    ),
    min_size=1,
    max_size=12,
)


@given(CANDIDATES, st.sampled_from(["", "a", "b", "x"]), st.integers(0, 30))
def test_what_is_chosen_has_the_top_priority_and_no_older_equal(
    candidates: list[Candidate], loaded: str, turn: int
) -> None:
    decision = choose(candidates, loaded=loaded, residency=timedelta(minutes=turn), now=NOW)
    assert isinstance(decision, Decision)
    best = decision.candidate
    first = [each for each in candidates if each.priority == max(c.priority for c in candidates)]
    assert best in first
    equals = [each for each in first if each.model == best.model]
    assert all(best.created_at <= each.created_at for each in equals)


@given(CANDIDATES)
def test_nothing_starves_for_ever(candidates: list[Candidate]) -> None:
    """Of one priority, a batch past the bound is served once the loaded model has had its turn."""
    level = [Candidate(c.batch_id, c.organization_id, c.model, 0, c.created_at) for c in candidates]
    oldest = min(level, key=lambda each: (each.created_at, each.batch_id))
    decision = choose(level, loaded="a", residency=STARVING + timedelta(seconds=1), now=NOW)
    assert decision is not None
    if NOW - oldest.created_at > STARVING:
        assert decision.candidate == oldest
