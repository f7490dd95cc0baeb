"""What operators see of the queue, across tenants, and the rules that they set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.db.models import Count, Exists, F, OuterRef, Q, QuerySet, Subquery, Sum
from django.db.models.functions import Coalesce

from accounts.models import Organization
from batches.models import Batch, Chunk, Moderation, Share
from batches.models.batches import ChunkState, HeldWhy, Status
from models_registry.models import Model


def moderation_of(organization: Organization) -> Moderation | None:
    """The rules that hold for it: its own, else the platform's; None where there are neither."""
    rules = Moderation.objects.filter(Q(organization=organization) | Q(organization=None))
    return rules.order_by(F("organization").asc(nulls_last=True)).first()


QUEUED_MOST = 20_000
"""So many batches operators see of the queue at most, the oldest first."""


def queued(
    *, organization: str = "", model: str = "", priority: str = "", state: str = "", id: str = ""
) -> QuerySet[Batch]:
    """The batches of all tenants that wait or run, as operators filter them; '' is any."""
    rows = Batch.objects.filter(status__in=(Status.VALIDATING, Status.IN_PROGRESS))
    if organization:
        named = Q(organization__slug__icontains=organization)
        rows = rows.filter(named | Q(organization__name__icontains=organization))
    if model:
        rows = rows.filter(model__name=model)
    if priority:
        rows = rows.filter(priority=priority)
    if id:
        rows = rows.filter(pk__startswith=id)
    leased = Chunk.objects.filter(batch=OuterRef("pk"), state=ChunkState.LEASED)
    states = {
        "approval": Q(held_why=HeldWhy.MODERATION),
        "held": Q(held_at__isnull=False),
        "running": Exists(leased),
        "waiting": Q(held_at=None) & ~Exists(leased),
        "front": Q(front_at__isnull=False),
    }
    return rows.filter(states.get(state, Q()))


def queue_rows(ids: Sequence[str]) -> list[Any]:
    """These batches in this order, with `tokens_left` (by estimate) and `chunks_running`."""
    undone = Chunk.objects.filter(batch=OuterRef("pk")).exclude(state=ChunkState.DONE).order_by()
    tokens = undone.values("batch").annotate(total=Sum("tokens")).values("total")
    leased = undone.filter(state=ChunkState.LEASED).values("batch")
    rows = (
        Batch.objects.filter(pk__in=ids)
        .select_related("organization", "model")
        .annotate(
            tokens_left=Subquery(tokens),
            chunks_running=Coalesce(Subquery(leased.annotate(n=Count("pk")).values("n")), 0),
        )
    )
    found = {row.pk: row for row in rows}
    return [found[id] for id in ids if id in found]


def models_with_work() -> QuerySet[Model]:
    """All models by name, with `batches_waiting` and `chunks_running` of each."""
    going = Batch.objects.filter(model=OuterRef("pk"), status=Status.IN_PROGRESS).order_by()
    leased = Chunk.objects.filter(batch__model=OuterRef("pk"), state=ChunkState.LEASED).order_by()
    return Model.objects.order_by("name").annotate(
        batches_waiting=Coalesce(
            Subquery(going.values("model").annotate(n=Count("pk")).values("n")), 0
        ),
        chunks_running=Coalesce(
            Subquery(leased.values("batch__model").annotate(n=Count("pk")).values("n")), 0
        ),
    )


def halted_organizations() -> QuerySet[Share]:
    """Their shares, with `batches_waiting` and `chunks_running` of each."""
    its = {"organization": OuterRef("pk")}
    going = Batch.objects.filter(status=Status.IN_PROGRESS, **its).order_by()
    leased = Chunk.objects.filter(
        batch__organization=OuterRef("pk"), state=ChunkState.LEASED
    ).order_by()
    halted = Share.objects.exclude(halt="").select_related("organization").order_by("organization")
    return halted.annotate(
        batches_waiting=Coalesce(
            Subquery(going.values("organization").annotate(n=Count("pk")).values("n")), 0
        ),
        chunks_running=Coalesce(
            Subquery(leased.values("batch__organization").annotate(n=Count("pk")).values("n")), 0
        ),
    )


def work_of(organization: Organization) -> tuple[int, int]:
    """How many of its batches are in progress, and how many of their chunks run now."""
    going = Batch.objects.filter(organization=organization, status=Status.IN_PROGRESS)
    leased = Chunk.objects.filter(batch__organization=organization, state=ChunkState.LEASED)
    return going.count(), leased.count()
