"""What a worker's threads tell each other: the loop writes, the heartbeat reads and reports."""

from __future__ import annotations

from dataclasses import dataclass, field

from worker.models import WorkerState


@dataclass
class Status:
    state: str = WorkerState.STARTING
    loaded: str = ""
    in_flight: int = 0
    fullness: float = 0.0
    """How much of the engine is in use, from 0 to 1."""
    answers: int = 0
    tokens: int = 0
    """In and out, of all answers."""
    loads: int = 0
    error: str = ""
    asleep: list[str] = field(default_factory=list)
    """Models that sleep in the host's memory."""
