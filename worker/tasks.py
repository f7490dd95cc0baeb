"""The GPU queue's only task: a wake-up, sent to every worker at once."""

from __future__ import annotations

from celery import shared_task

from worker import running


@shared_task
def wake() -> None:
    running.wake()
