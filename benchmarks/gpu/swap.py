"""Two models in turn on one GPU: each unloaded for the other, and put to sleep for it."""

from __future__ import annotations

from itertools import pairwise
from statistics import median

from benchmarks.site import Move, Site, moves


def run(site: Site, *, rounds: int) -> dict[str, float]:
    restarts = _swaps(_taking_turns(site, rounds, SLEEPING_MODELS_GB="0"))
    said = _taking_turns(site, rounds + 1)  # one to load both
    woken = _swaps(said, came="woken")
    return {
        "swap_restart_seconds": median(restarts),
        **({"swap_sleep_seconds": median(woken)} if woken else {}),
        "wakings": len(woken),
        "sleeps_given_up": sum(each.what == "loaded" for each in said) - 2,
    }


def _taking_turns(site: Site, rounds: int, **variables: str) -> list[Move]:
    with site.worker(**variables) as log:
        for _ in range(rounds):
            for model in site.models[:2]:
                site.batch(model, 1, max_tokens=1)
        return moves(log)


def _swaps(said: list[Move], came: str = "loaded") -> list[float]:
    """Seconds of each swap: from the one's going to the other's being ready."""
    return [
        before.seconds + after.seconds
        for before, after in pairwise(said)
        if before.what in ("unloaded", "asleep") and after.what == came
    ]
