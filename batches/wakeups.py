"""Telling workers that there is something to do. A wake-up may be lost: sweeps repeat it."""

from __future__ import annotations

from functools import partial

import structlog
from celery import current_app
from django.db import transaction
from kombu import Exchange
from kombu.exceptions import OperationalError

logger = structlog.get_logger(__name__)
_GPU = Exchange("gpu", type="fanout")
EXPIRES = 30
"""Seconds after which a wake-up that nobody took is dropped: sweeps have sent others since."""


def validate(batch_id: str) -> None:
    transaction.on_commit(partial(_send, "batches.tasks.validate", batch_id))


def finalize(batch_id: str) -> None:
    transaction.on_commit(partial(_send, "batches.tasks.finalize", batch_id))


def gpu_workers() -> None:
    """Wake every GPU worker: a chunk may be ready."""
    transaction.on_commit(partial(_send, "worker.tasks.wake"))


def _send(task: str, *args: str) -> None:
    try:
        if task == "worker.tasks.wake":
            current_app.send_task(
                task, exchange=_GPU, routing_key="gpu", declare=[_GPU], expires=EXPIRES, retry=False
            )
        else:
            current_app.send_task(task, args=args, queue="cpu", expires=EXPIRES, retry=False)
    except (OperationalError, OSError) as error:
        # The row is committed and the next sweep finds it: the caller has lost nothing.
        logger.warning("wake-up not sent", task=task, error=str(error))
