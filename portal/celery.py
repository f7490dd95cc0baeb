"""The Celery app and its queues: `cpu`, `webhooks` and `handlers`, one worker a message, and `gpu`, every worker.

Tasks live in each app's `tasks.py`; a message is a wake-up, the database row is the truth.
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from celery.signals import setup_logging, task_failure, task_prerun
from kombu import Queue
from kombu.common import Broadcast

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "portal.settings")

app = Celery("portal")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.conf.task_queues = (
    Queue("cpu"),
    Queue("webhooks"),
    Queue("handlers"),
    # A fanout: a chunk that becomes ready wakes every idle GPU worker, not just one.
    Broadcast("gpu", routing_key="gpu"),
)
app.autodiscover_tasks()


@setup_logging.connect
def keep_django_logging(**_: object) -> None:
    """Celery would otherwise replace the format that settings chose."""


@task_prerun.connect
def drop_broken_connections(**_: object) -> None:
    """Celery keeps a connection for thousands of tasks, even one whose server has died."""
    from django.db import close_old_connections

    close_old_connections()


@task_failure.connect
def note_failure(
    sender: Any, task_id: str, exception: BaseException, args: Any, traceback: Any, **_: object
) -> None:
    """Operators see on a page which tasks failed; a GPU host has none of its tables at hand."""
    from django.apps import apps

    if apps.is_installed("portal"):
        from portal import failures

        failures.note(sender, task_id, exception, args, traceback)
