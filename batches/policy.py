"""Which batch a worker should serve next: a pure function of what waits and what is loaded.

Nothing here reads a clock, a database or a GPU, so the same code runs in a simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

STARVING = timedelta(minutes=10)
"""A batch of another model that has waited this long ends the loaded model's turn."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A batch with at least one chunk to lease."""

    batch_id: str
    organization_id: str
    model: str
    priority: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Decision:
    candidate: Candidate
    reason: str


def choose(
    candidates: Sequence[Candidate],
    *,
    loaded: str,
    residency: timedelta,
    now: datetime,
) -> Decision | None:
    """The batch to lease a chunk from, or None when nothing waits.

    A higher priority goes first. Within a priority the loaded model's batches go first, because
    a swap costs minutes of GPU time, unless a batch of another model is starving and the loaded
    one has had at least as long a turn (`residency`). Among equals the oldest batch goes first.
    """
    if not candidates:
        return None
    top = max(candidate.priority for candidate in candidates)
    first = [candidate for candidate in candidates if candidate.priority == top]
    oldest = min(first, key=lambda candidate: (candidate.created_at, candidate.batch_id))
    same = [candidate for candidate in first if candidate.model == loaded]
    if not same or oldest.model == loaded:
        return Decision(oldest, "oldest")
    if now - oldest.created_at > STARVING and residency > STARVING:
        return Decision(oldest, "starving")
    kept = min(same, key=lambda candidate: (candidate.created_at, candidate.batch_id))
    return Decision(kept, "model is loaded")
