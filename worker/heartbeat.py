"""The heartbeat: a thread that keeps the leases and the `Worker` row fresh, whatever the loop does.

It has its own database connection, so that neither a long load nor a slow save stops it.
"""

from __future__ import annotations

import os
import socket
import threading
import time

import structlog
from django.conf import settings
from django.db import DatabaseError, InterfaceError, connection
from django.utils import timezone

from batches.models.batches import Status
from batches.services import leases
from models_registry import services as registry
from worker.loop import LeaseLoop
from worker.models import Worker, WorkerState

logger = structlog.get_logger(__name__)
LONGEST_SECONDS = 3.0
BUSY_SHARE = 0.5
"""A beat measures the model's speed when this much of the engine was in use at both its ends."""


class Heartbeat(threading.Thread):
    """Beats at least three times a lease, until the loop has stopped."""

    def __init__(self, loop: LeaseLoop) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._lease_loop = loop
        self._every = min(settings.LEASE_SECONDS / 3, LONGEST_SECONDS)
        self._since = timezone.now()
        self._tokens = 0
        self._beat_at = time.monotonic()
        self._was_running = ""

    def run(self) -> None:
        while not self._lease_loop.stopped.wait(self._every):
            self._try_beat()
        self._try_beat()
        connection.close()

    def _try_beat(self) -> None:
        try:
            self._beat()
        except (DatabaseError, InterfaceError) as error:
            logger.warning("heartbeat failed", error=str(error).strip())
            connection.close()
        except Exception:
            logger.exception("heartbeat failed")
            connection.close()

    def _beat(self) -> None:
        self._renew()
        self._write_row(self._speed())

    def _renew(self) -> None:
        held = self._lease_loop.held()
        kept = leases.renew(held)
        for lease in held:
            status = kept.get(lease.chunk_id)
            if status != Status.IN_PROGRESS:
                self._lease_loop.let_go(lease, lost=status is None)

    def _speed(self) -> float:
        """Tokens a second, in and out, since the last beat."""
        status, now = self._lease_loop.status, time.monotonic()
        speed = (status.tokens - self._tokens) / max(now - self._beat_at, 0.001)
        busy = status.in_flight >= max(1, BUSY_SHARE * status.capacity)
        running = status.loaded if status.state == WorkerState.RUNNING and busy else ""
        if speed and running and running == self._was_running:
            registry.note_speed(running, speed)
        self._tokens, self._beat_at, self._was_running = status.tokens, now, running
        return speed

    def _write_row(self, speed: float) -> None:
        status = self._lease_loop.status
        row, _ = Worker.objects.update_or_create(
            name=self._lease_loop.name,
            defaults={
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "gpu": self._lease_loop.gpu,
                "state": status.state,
                "loaded_model": status.loaded,
                "in_flight": status.in_flight,
                "tokens_per_second": speed,
                "swaps": status.loads,
                "error": status.error,
                "started_at": self._since,
                "heartbeat_at": timezone.now(),
            },
        )
        self._lease_loop.draining = row.draining
