"""What happens to what a deleted organization has: its work stops, and in the end all of it goes.

Deleting and restoring the organization itself is `accounts/services/organizations.py`'s.
"""

from __future__ import annotations

from itertools import chain

import structlog
from django.db import IntegrityError, transaction
from django.db.models import Exists, OuterRef, QuerySet
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.models import Organization, Reservation, UsageRecord
from accounts.services import audit
from accounts.services.organizations import RESTORABLE, forget_sign_ins, locked
from batches import storage, wakeups
from batches.locks import only_one
from batches.models import (
    Batch,
    Chunk,
    File,
    IdempotencyKey,
    Result,
    Sample,
    Suspect,
    Upload,
    UploadPart,
)
from batches.models.batches import NEXT, ChunkState, Status
from batches.storage import StorageAway

logger = structlog.get_logger(__name__)

SLICE = 200
"""So many files or batches are removed at once; the next sweep goes on where this one ended."""
AT_ONCE = 10
"""So many organizations have a slice removed in one sweep."""
_CANCELLABLE = [status for status, allowed in NEXT.items() if Status.CANCELLING in allowed]


def cancel_of_deleted() -> None:
    """Cancel the unfinished batches of deleted organizations."""
    with scopes_disabled():
        left = Batch.objects.filter(organization__deleted_at__isnull=False, status__in=_CANCELLABLE)
        for id in list(left.values_list("pk", flat=True)[:SLICE]):
            with transaction.atomic():
                batch = Batch.objects.select_for_update(of=("self",)).get(pk=id)
                if batch.status in _CANCELLABLE:
                    batch.move_to(Status.CANCELLING)
                    batch.save(update_fields=["status", "cancelling_at"])
                    wakeups.finalize(batch.pk)


def purge_organizations() -> None:
    """Remove a slice of what is left of each organization that nobody can restore any more."""
    with scopes_disabled():
        for organization in _due()[:AT_ONCE]:
            with only_one(f"purge {organization.pk}") as mine:
                if mine and _is_still_deleted(organization):
                    _purge_carefully(organization)


def _due() -> QuerySet[Organization]:
    """In any order: some that cannot be purged must not keep the others waiting for ever."""
    gone = Organization.objects.filter(deleted_at__lt=timezone.now() - RESTORABLE)
    # Nobody holds a lease after so long, unless the clock was set.
    working = Chunk.objects.filter(batch__organization=OuterRef("pk"), state=ChunkState.LEASED)
    return gone.filter(~Exists(working)).order_by("?")


@transaction.atomic
def _is_still_deleted(organization: Organization) -> bool:
    """After whoever restores it at this moment; later ones are refused."""
    return locked(organization).deleted_at is not None


def _purge_carefully(organization: Organization) -> None:
    try:
        _purge(organization)
    except StorageAway:  # nor would it let go of the others
        raise
    except (OSError, IntegrityError) as error:  # the others need not wait for it
        logger.error("organization not purged", organization=organization.pk, error=str(error))


def _purge(organization: Organization) -> None:
    """Bytes before the rows that know their names, so that whatever is killed can be repeated."""
    for remove_some in (_remove_batches, _remove_uploads, _remove_files):
        if remove_some(organization):
            return  # there may be more of it
    storage.remove_folder(organization.pk)  # what was stored, but never got a row
    _remove_organization(organization)


def _remove_batches(organization: Organization) -> int:
    mine = Batch.objects.filter(organization=organization)
    some = list(mine.values_list("pk", "index_name", "results_name")[:SLICE])
    for name in filter(None, chain.from_iterable(names for _, *names in some)):
        storage.remove(name)
    ids = [id for id, *_ in some]
    with transaction.atomic():
        for model in (Result, Suspect, Chunk, Sample):
            model._default_manager.filter(batch_id__in=ids).delete()
        Batch.objects.filter(pk__in=ids).delete()
    return len(some)


def _remove_uploads(organization: Organization) -> int:
    parts = UploadPart.objects.filter(upload__organization=organization)
    some = dict(parts.values_list("pk", "storage_name")[:SLICE])
    for name in some.values():
        storage.remove(name)
    UploadPart.objects.filter(pk__in=list(some)).delete()
    if some:
        return len(some)
    uploads = Upload.objects.filter(organization=organization)
    ids = list(uploads.values_list("pk", flat=True)[:SLICE])
    Upload.objects.filter(pk__in=ids).delete()
    return len(ids)


def _remove_files(organization: Organization) -> int:
    some = dict(
        File.objects.filter(organization=organization).values_list("pk", "storage_name")[:SLICE]
    )
    for name in some.values():
        storage.remove(name)
    File.objects.filter(pk__in=list(some)).delete()
    return len(some)


@transaction.atomic
def _remove_organization(organization: Organization) -> None:
    """The rows that are left, and the organization; its audit stays."""
    locked(organization)
    for model in (IdempotencyKey, Reservation, UsageRecord):
        model._default_manager.filter(organization=organization).delete()
    forget_sign_ins(organization)
    id = organization.pk
    organization.delete()
    organization.pk = id  # which deleting has taken away
    audit.record("organization.purged", actor=None, target=organization, organization=organization)
    logger.info("organization purged", organization=organization.pk)
