"""`workers`: a table of all GPU workers, as they last said themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.core.management.base import BaseCommand

from worker import queries
from worker.models import Health, WorkerState

HEADINGS = (
    "NAME",
    "HOST",
    "GPU",
    "VERSION",
    "STATE",
    "MODEL",
    "IN FLIGHT",
    "TOKENS/S",
    "HEARD OF",
    "ERROR",
)


class Command(BaseCommand):
    help = "Show all GPU workers: where they are, what they do, and when they were last heard of."

    def handle(self, *args: Any, **options: Any) -> None:
        rows = [HEADINGS, *(_columns(row) for row in queries.workers())]
        widths = [max(len(row[at]) for row in rows) for at in range(len(HEADINGS))]
        for row in rows:
            self.stdout.write(_line(row, widths))


def _columns(row: Any) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.host}:{row.pid}",
        " ".join(filter(None, (row.gpu, row.gpu_kind))) or "-",
        row.version or "-",
        _state(row),
        _models(row),
        str(row.in_flight),
        f"{row.tokens_per_second:.0f}",
        f"{row.silent.total_seconds():.0f} s ago",
        " ".join(f"{row.health_why} {row.error}".split()) or "-",
    )


def _state(row: Any) -> str:
    """What it does, and what keeps it from doing more."""
    if not row.is_alive and row.state != WorkerState.STOPPED:
        return "silent"
    said = [str(row.state)]
    if row.draining and row.state != WorkerState.DRAINED:
        said.append("draining")
    if row.health not in ("", Health.OK):
        said.append(row.health)
    return ", ".join(said)


def _models(row: Any) -> str:
    asleep = f" (asleep: {', '.join(row.asleep)})" if row.asleep else ""
    return (row.loaded_model or "-") + asleep


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
