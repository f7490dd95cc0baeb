"""Celery's doors to the services; every task is safe to run twice."""

from __future__ import annotations

from celery import shared_task

from batches.services import finalization, validation
from batches.services import sweep as sweeping


@shared_task
def validate(batch_id: str) -> None:
    validation.validate_batch(batch_id)


@shared_task
def finalize(batch_id: str) -> None:
    finalization.finalize_batch(batch_id)


@shared_task
def sweep() -> None:
    sweeping.sweep()
