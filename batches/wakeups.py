"""Telling workers that there is something to do. A wake-up may be lost: sweeps repeat it."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import cache, partial

import structlog
from celery import current_app
from django.conf import settings
from django.db import transaction
from kombu import Exchange
from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import RedisError

logger = structlog.get_logger(__name__)
_GPU = Exchange("gpu", type="fanout")
_DELIVER = "batches.tasks.deliver"
EXPIRES = 30
"""Seconds after which a wake-up that nobody took is dropped: sweeps have sent others since."""
_MAIL = "batches.tasks.mail_of_disabled"
"""No sweep repeats it, so it is not dropped."""
PAUSE = 5.0
"""Seconds for which none is sent once Redis was found away: each costs its sender a few."""
ONCE = 5
"""Seconds for which a delivery's wake-up that still waits to be taken is not sent again."""
_silent_until = 0.0


def validate(batch_id: str) -> None:
    transaction.on_commit(partial(_send, "batches.tasks.validate", batch_id))


def finalize(batch_id: str) -> None:
    transaction.on_commit(partial(_send, "batches.tasks.finalize", batch_id))


def check(file_id: str) -> None:
    """Check a file that may become a batch's input."""
    transaction.on_commit(partial(_send, "batches.tasks.check", file_id))


def deliver(endpoint_id: str) -> None:
    """Send what is due to this webhook endpoint; a thousand events at once need no thousand calls."""
    transaction.on_commit(partial(_send, _DELIVER, endpoint_id))


def delivery_taken(endpoint_id: str) -> None:
    """The wake-up is taken: what is committed from now on needs another. Call before looking."""
    with suppress(RedisError):
        _redis().delete(f"{_DELIVER}:{endpoint_id}")


def handle_results(batch_id: str) -> None:
    """Run the result handlers that are due for this batch."""
    transaction.on_commit(partial(_send, "batches.tasks.handle_results", batch_id))


def mail_of_disabled(endpoint_id: str) -> None:
    """Mail that this webhook endpoint is sent nothing more."""
    transaction.on_commit(partial(_send, _MAIL, endpoint_id))


def gpu_workers() -> None:
    """Wake every GPU worker: a chunk may be ready."""
    transaction.on_commit(partial(_send, "worker.tasks.wake"))


def _send(task: str, *args: str) -> None:
    global _silent_until
    if time.monotonic() < _silent_until:
        return
    try:
        if task == "worker.tasks.wake":
            current_app.send_task(
                task, exchange=_GPU, routing_key="gpu", declare=[_GPU], expires=EXPIRES, retry=False
            )
        elif task != _DELIVER or _redis().set(f"{task}:{args[0]}", 1, nx=True, ex=ONCE):
            expires = None if task == _MAIL else EXPIRES
            current_app.send_task(task, args=args, expires=expires, retry=False)
    except (OperationalError, RedisError, OSError) as error:
        # The row is committed and the next sweep finds it: the caller has lost nothing but the time.
        _silent_until = time.monotonic() + PAUSE
        logger.warning("wake-up not sent", task=task, error=str(error))


@cache
def _redis() -> Redis:
    """A client of our own: workers have no cache, whose package is the portal's."""
    return Redis.from_url(settings.CELERY_BROKER_URL, socket_timeout=2, socket_connect_timeout=2)
