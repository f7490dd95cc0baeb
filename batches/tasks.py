"""Celery's doors to the services; every task is safe to run twice."""

from __future__ import annotations

from celery import shared_task

from batches import wakeups
from batches.services import checks, deliveries, finalization, handler_runs, mails, validation
from batches.services import sweep as sweeping
from batches.storage import StorageAway


# The sweep sends these three again: that the storage is away is no failure to be told at length.
@shared_task(throws=(StorageAway,))
def validate(batch_id: str) -> None:
    validation.validate_batch(batch_id)


@shared_task(throws=(StorageAway,))
def finalize(batch_id: str) -> None:
    finalization.finalize_batch(batch_id)


@shared_task(throws=(StorageAway,))
def check(file_id: str) -> None:
    checks.run_check(file_id)


@shared_task
def sweep() -> None:
    sweeping.sweep()


@shared_task
def deliver(endpoint_id: str) -> None:
    wakeups.delivery_taken(endpoint_id)
    deliveries.send_due(endpoint_id)


@shared_task(soft_time_limit=handler_runs.LONGEST, time_limit=handler_runs.LONGEST + 60)
def handle_results(batch_id: str) -> None:
    handler_runs.run_due(batch_id)


@shared_task
def mail_of_disabled(endpoint_id: str) -> None:
    mails.webhook_disabled(endpoint_id)
