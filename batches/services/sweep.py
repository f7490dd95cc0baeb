"""The sweep: repeats every wake-up that may have been lost, and ends what is past its time."""

from __future__ import annotations

from datetime import timedelta

import structlog
from django.db import DatabaseError, transaction
from django.utils import timezone
from django_scopes import scopes_disabled

from batches import queries, storage, wakeups
from batches.models import Batch, IdempotencyKey
from batches.models.batches import ChunkState, Status
from batches.services import files, leases, uploads

logger = structlog.get_logger(__name__)

IDEMPOTENCY_LIFETIME = timedelta(hours=24)


def sweep() -> None:
    """One round; every step is safe to repeat, to run beside another sweep, and to fail alone."""
    for step in (
        leases.release_expired,
        expire_batches,
        finish_batches,
        repeat_wakeups,
        uploads.expire_uploads,
        files.expire_files,
        files.purge_files,
        forget_idempotency_keys,
        storage.remove_abandoned,
    ):
        try:
            with scopes_disabled():
                step()
        except DatabaseError:
            raise  # the next step would fare no better
        except Exception:
            logger.exception("sweep step failed", step=step.__name__)


def repeat_wakeups() -> None:
    """Send again what may have been lost, oldest first."""
    for id in queries.batches_to_validate().order_by("pk").values_list("pk", flat=True)[:100]:
        wakeups.validate(id)
    for id in queries.batches_to_finalize().order_by("pk").values_list("pk", flat=True)[:100]:
        wakeups.finalize(id)


def forget_idempotency_keys() -> None:
    IdempotencyKey.objects.filter(created_at__lt=timezone.now() - IDEMPOTENCY_LIFETIME).delete()


def expire_batches() -> None:
    """Send batches that are past their window to finalizing, done or not."""
    late = Batch.objects.filter(status=Status.IN_PROGRESS, expires_at__lte=timezone.now())
    _send_to_finalizing(list(late.values_list("pk", flat=True)[:100]))


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
