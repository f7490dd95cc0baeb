"""The heartbeat: a thread that keeps the leases and the `Worker` row fresh, whatever the loop does.

It has its own database connection, so that neither a long load nor a slow save stops it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog
from django.conf import settings
from django.db import DatabaseError, InterfaceError, connection

from batches.models.batches import Status
from batches.services import leases
from models_registry import services as registry
from worker import services
from worker.database import at_most, half_a_lease
from worker.identity import Identity
from worker.loop import LeaseLoop
from worker.models import Health, Worker, WorkerState
from worker.pace import Look, Pace
from worker.services import NameTaken

logger = structlog.get_logger(__name__)
LONGEST_SECONDS = 3.0
BUSY_SHARE = 0.5
"""A beat measures the model's speed when this much of the engine was in use at both its ends."""


class Heartbeat(threading.Thread):
    """Beats at least three times a lease, until the loop has stopped.

    `end` is called with an exit code when the whole process should go.
    """

    def __init__(self, loop: LeaseLoop, me: Identity, end: Callable[[int], None]) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._lease_loop = loop
        self._me = me
        self._end = end
        self._every = min(settings.LEASE_SECONDS / 3, LONGEST_SECONDS)
        self._seen = self._look()
        self._pace = Pace(self._seen)

    def run(self) -> None:
        while not self._lease_loop.stopped.wait(self._every):
            self._try_beat()
        self._try_beat()
        connection.close()

    def _try_beat(self) -> None:
        try:
            with at_most(half_a_lease()):
                self._beat()
        except NameTaken as error:
            logger.error("another process has this worker's name", error=str(error))
            self._end(1)
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
        """Tokens a second, in and out, since the last beat; notes what was measured of the model."""
        last, now = self._seen, self._look()
        self._seen = now
        if (found := self._pace.see(now)) is not None:
            registry.note_speed(
                found.model,
                found.tokens_per_second,
                self._lease_loop.host.gpu_kind,
                seconds=found.seconds,
            )
        return max(0.0, (now.tokens - last.tokens) / max(now.at - last.at, 0.001))

    def _look(self) -> Look:
        status, engine = self._lease_loop.status, self._lease_loop.host.engine
        is_busy = status.state == WorkerState.RUNNING and status.fullness >= BUSY_SHARE
        under_way = None if engine is None else engine.tokens_under_way()
        return Look(
            time.monotonic(),
            status.loaded if is_busy else "",
            status.tokens + (under_way or 0),
            status.answers,
            status.in_flight,
            under_way is not None,
        )

    def _write_row(self, speed: float) -> None:
        status, guard = self._lease_loop.status, self._lease_loop.guard
        # Once, so that an operator's word that it is well again stands.
        drains = guard.verdict.health == Health.SICK and not guard.told
        row = services.beat(
            self._me,
            state=status.state,
            loaded_model=status.loaded,
            asleep=status.asleep,
            in_flight=status.in_flight,
            tokens_per_second=speed,
            swaps=status.loads,
            error=status.error,
            **guard.columns(),
            **({"draining": True} if drains else {}),
        )
        if row is None:  # forgotten, or taken by another process, while we were silent
            row = services.claim(self._me)
        self._obey(row)
        if guard.told and not row.draining:
            guard.forgive()
        guard.told = guard.told or drains

    def _obey(self, row: Worker) -> None:
        """Do what operators said of this worker."""
        if row.draining != self._lease_loop.draining:
            self._lease_loop.draining = row.draining
            self._lease_loop.wake()
        if row.unload_asked:
            self._lease_loop.unload()
            services.unload_heard(self._me)
        if row.exit_when_drained and row.state == WorkerState.DRAINED:
            logger.info("drained, so this process ends", worker=row.name)
            self._end(0)
