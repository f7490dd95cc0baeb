"""The real-time lane on a GPU: what `./run bench lane` measures, with a batch that fills it."""

from __future__ import annotations

from benchmarks import lane
from benchmarks.site import Site


def run(site: Site, *, requests: int, tokens: int) -> dict[str, float]:
    found = lane.measured(site, requests=requests, tokens=tokens)
    return {f"lane_{name}": value for name, value in found.items()}
