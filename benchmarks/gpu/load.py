"""A load with the weights on disk, and one with them in the page cache."""

from __future__ import annotations

import os

from benchmarks.site import Site, moves
from models_registry import fit


def run(site: Site) -> dict[str, float]:
    _forget(site.sources[0])
    return {"load_cold_seconds": _loaded(site), "load_warm_seconds": _loaded(site)}


def _loaded(site: Site) -> float:
    with site.worker() as log:
        site.batch(site.models[0], 1, max_tokens=1)
        return next(each.seconds for each in moves(log) if each.what == "loaded")


def _forget(source: str) -> None:
    """Drop the model's files from the page cache (posix_fadvise(2))."""
    for file in fit.folder_of(source).iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
