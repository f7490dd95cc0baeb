"""The lease loop of this process, if it is a GPU worker: how a wake-up finds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.loop import LeaseLoop

_loop: LeaseLoop | None = None


def set_loop(loop: LeaseLoop) -> None:
    global _loop
    _loop = loop


def wake() -> None:
    if _loop is not None:
        _loop.wake()
