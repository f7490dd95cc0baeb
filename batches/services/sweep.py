"""The sweep: repeats every wake-up that may have been lost, and ends what is past its time."""

from __future__ import annotations

from datetime import timedelta

import structlog
from django.conf import settings
from django.db import InterfaceError, OperationalError, connection, transaction
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.services import expired_tokens, quotas
from batches import standings, storage, wakeups
from batches.lines import BadLine
from batches.models import Batch, IdempotencyKey
from batches.models.batches import ChunkState, Status
from batches.queries import batches as queries
from batches.services import (
    checks,
    deliveries,
    events,
    files,
    handler_runs,
    hours,
    leases,
    progress,
    purge,
    retention,
    uploads,
)
from batches.storage import StorageAway

logger = structlog.get_logger(__name__)

IDEMPOTENCY_LIFETIME = timedelta(hours=24)
LANE_GRACE = timedelta(minutes=10)
"""For what a real-time request used to reach a database that was away."""


def sweep() -> None:
    """One round; every step is safe to repeat, to run beside another sweep, and to fail alone."""
    for step in (
        leases.release_expired,
        expire_batches,
        finish_batches,
        repeat_wakeups,
        checks.repeat_wakeups,
        deliveries.repeat_wakeups,
        deliveries.forget_old,
        handler_runs.repeat_wakeups,
        uploads.expire_uploads,
        retention.apply_to_existing,
        files.expire_files,
        forget_idempotency_keys,
        forget_real_time_requests,
        hours.note_use,
        hours.forget_old,
        expired_tokens.forget_expired_tokens,
        purge.cancel_of_deleted,
        standings.publish,
        progress.sample,
        # Last what asks the storage: where that hangs, these wait for it.
        files.purge_files,
        files.purge_parts,
        purge.purge_organizations,
        storage.remove_abandoned,
    ):
        try:
            with scopes_disabled():
                step()
        except StorageAway:
            logger.warning("sweep step put off", step=step.__name__)
        except Exception as error:
            # One that gave way in a deadlock, say, is no reason to leave out those after it.
            if isinstance(error, OperationalError | InterfaceError) and not connection.is_usable():
                raise  # the database is away: the next step would fare no better
            logger.exception("sweep step failed", step=step.__name__)


def repeat_wakeups() -> None:
    """Send again what may have been lost, oldest first."""
    for id in queries.batches_to_validate().order_by("pk").values_list("pk", flat=True)[:100]:
        wakeups.validate(id)
    for id in queries.batches_to_finalize().order_by("pk").values_list("pk", flat=True)[:100]:
        wakeups.finalize(id)


def forget_real_time_requests() -> None:
    quotas.forget_requests(timedelta(seconds=settings.LANE_SECONDS) + LANE_GRACE)


def forget_idempotency_keys() -> None:
    IdempotencyKey.objects.filter(created_at__lt=timezone.now() - IDEMPOTENCY_LIFETIME).delete()


def expire_batches() -> None:
    """Send batches that are past their window to finalizing, done or not.

    One that could not even be validated in its window fails: it would hold its place in the
    organization's quota for ever.
    """
    late = Batch.objects.filter(expires_at__lte=timezone.now())
    running = late.filter(status=Status.IN_PROGRESS)
    _send_to_finalizing(list(running.values_list("pk", flat=True)[:100]))
    for id in late.filter(status=Status.VALIDATING).values_list("pk", flat=True)[:100]:
        _fail_unvalidated(id)


@transaction.atomic
def _fail_unvalidated(id: str) -> None:
    batch = Batch.objects.select_for_update(of=("self",)).get(pk=id)
    if batch.status == Status.VALIDATING:
        said = "The batch's window ended before its input could be validated."
        batch.errors = [BadLine("batch_expired", said).as_wire(None)]
        batch.move_to(Status.FAILED)
        batch.save(update_fields=["errors", "status", "failed_at"])
        events.batch_changed(batch)
        quotas.settle(batch.pk)


def finish_batches() -> None:
    """Send batches whose chunks are all done to finalizing, should a crash have kept them."""
    running = Batch.objects.filter(status=Status.IN_PROGRESS)
    done = running.exclude(chunks__state__in=(ChunkState.READY, ChunkState.LEASED))
    _send_to_finalizing(list(done.values_list("pk", flat=True)[:100]))


def _send_to_finalizing(ids: list[str]) -> None:
    for id in ids:
        with transaction.atomic():
            batch = Batch.objects.select_for_update(of=("self",)).get(pk=id)
            if batch.status == Status.IN_PROGRESS:
                batch.move_to(Status.FINALIZING)
                batch.save(update_fields=["status", "finalizing_at"])
                wakeups.finalize(id)
