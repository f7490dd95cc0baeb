"""Whose GPU time it was: the engine's busy time, split evenly over what is in flight."""

from __future__ import annotations

import time


class SharedClock:
    """Runs at 1/n of real time while n requests are in flight, and stands while none is.

    What it gained between a request's begin and end, in seconds, is that request's share; the
    shares of all that left, finished or not, are together the time in which the engine was busy.
    (The virtual time of generalized processor sharing, Parekh and Gallager 1993, with equal
    weights.)
    """

    def __init__(self) -> None:
        self._in_flight = 0
        self._shared = 0.0
        self._looked_at = time.monotonic()

    def begin(self) -> float:
        """A request enters; returns the clock, to be handed to `share` and `end`."""
        self._advance()
        self._in_flight += 1
        return self._shared

    def share(self, begun: float) -> float:
        """Seconds of the engine that are this request's so far."""
        self._advance()
        return self._shared - begun

    def end(self) -> None:
        """A request leaves."""
        self._advance()
        self._in_flight -= 1

    def _advance(self) -> None:
        now = time.monotonic()
        if self._in_flight:
            self._shared += (now - self._looked_at) / self._in_flight
        self._looked_at = now
