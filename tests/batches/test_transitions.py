"""A batch's statuses: every pair of them, against the table of what is allowed."""

from __future__ import annotations

from itertools import product

import pytest

from batches.models import Batch
from batches.models.batches import NEXT, UNFINISHED, Status

ALLOWED = {
    ("validating", "failed"),
    ("validating", "in_progress"),
    ("validating", "cancelling"),
    ("in_progress", "finalizing"),
    ("in_progress", "cancelling"),
    ("finalizing", "completed"),
    ("finalizing", "expired"),
    ("cancelling", "cancelled"),
}


def test_the_table_says_what_these_tests_say() -> None:
    assert {(str(before), str(after)) for before in NEXT for after in NEXT[before]} == ALLOWED


@pytest.mark.parametrize(("before", "after"), [*product(Status.values, Status.values)])
def test_a_batch_moves_only_as_the_table_allows(before: str, after: str) -> None:
    batch = Batch(status=before)
    if (before, after) in ALLOWED:
        batch.move_to(after)
        assert batch.status == after
        assert getattr(batch, f"{after}_at") is not None
    else:
        with pytest.raises(ValueError, match=f"cannot go from {before} to {after}"):
            batch.move_to(after)
        assert batch.status == before


def test_every_status_but_the_first_has_its_time() -> None:
    names = {field.name for field in Batch._meta.get_fields()}
    assert {status for status in Status.values if f"{status}_at" not in names} == {"validating"}


def test_failed_completed_expired_and_cancelled_are_ends() -> None:
    ends = {status for status in Status.values if Batch(status=status).is_finished}
    assert ends == {"failed", "completed", "expired", "cancelled"}
    assert ends == set(Status.values) - UNFINISHED


def test_every_status_leads_to_an_end() -> None:
    for status in UNFINISHED:
        reached, frontier = set[str](), {str(status)}
        while frontier:
            reached |= frontier
            frontier = {str(to) for at in frontier for to in NEXT.get(at, ())} - reached
        assert reached - UNFINISHED
