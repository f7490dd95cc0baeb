"""How fast a model is on this worker while it is busy, by what the heartbeat sees at each beat.

Sums only; the figure is kept by `models_registry.services.note_speed`.
"""

from __future__ import annotations

from dataclasses import dataclass

NOTE_SECONDS, LEAST_SECONDS = 60.0, 10.0
"""A model that stays busy is measured once in so long; one that was busy and is no longer, if it was for
at least the second."""
ROUNDS = 2
"""Of an engine that tells nothing of what is under way, so many times what is in flight must have been
answered: what it has done on those, which counts for nothing yet, is then a small part of all."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a worker has done until a moment."""

    at: float = 0.0
    """`time.monotonic()`."""
    busy: str = ""
    """The model that keeps the engine busy; '' if none does."""
    tokens: int = 0
    """In and out, of all answers, and of what is under way where the engine tells."""
    answers: int = 0
    in_flight: int = 0
    tells: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    model: str
    tokens_per_second: float
    seconds: float
    """For how long it was busy."""


class Pace:
    """Adds up a model's tokens and busy seconds, those in which nothing was answered too."""

    def __init__(self, first: Look) -> None:
        self._last = first
        self._begin(first.busy)

    def _begin(self, model: str) -> None:
        self._model, self._tokens, self._answers, self._seconds = model, 0, 0, 0.0

    def see(self, look: Look) -> Measured | None:
        """Add what was done since the last look; what was measured by now, if enough."""
        last, self._last = self._last, look
        if look.busy == last.busy == self._model:
            self._add(last, look)
        goes_on = look.busy == self._model
        is_whole = look.tells or self._answers >= max(1, ROUNDS * look.in_flight)
        is_long = self._seconds >= (NOTE_SECONDS if goes_on else LEAST_SECONDS)
        found = self._found() if is_whole and is_long and self._tokens else None
        is_lost = not (goes_on or is_whole)
        if found or is_lost or look.busy not in ("", self._model):
            self._begin(look.busy or self._model)
        return found

    def _add(self, last: Look, look: Look) -> None:
        made = look.tokens - last.tokens
        if self._model and made >= 0:  # else requests were broken off, and their tokens are lost
            self._tokens += made
            self._answers += look.answers - last.answers
            self._seconds += look.at - last.at

    def _found(self) -> Measured:
        return Measured(self._model, self._tokens / self._seconds, self._seconds)
