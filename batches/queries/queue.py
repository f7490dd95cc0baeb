"""What waits and what runs, across tenants, as the policy looks at it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from math import inf
from typing import Any

from django.db import connection
from django.db.models import Count, Max
from django.utils import timezone

from accounts.models import Organization
from batches import policy
from batches.models import Backlog, Chunk, Share
from batches.models.batches import ChunkState, Status
from batches.outlook import Running
from batches.policy import Candidate
from models_registry.models import Model

SeeWorkers = Callable[[], list[policy.Worker]]
_see_workers: list[SeeWorkers] = []


def see_workers_with(see: SeeWorkers) -> None:
    """Workers are rows of an app above this one, which says here who is alive."""
    _see_workers[:] = [see]


def queue_view(
    asking: policy.Worker | None = None,
    avoid: Sequence[str] = (),
    asked: Mapping[str, float] | None = None,
) -> policy.View:
    """What the policy looks at, across tenants, in five queries however much waits.

    `avoid` names models and batches to leave out; `asked` is what real-time requests asked for.
    Without a worker that asks it is what people are told by, so that what is held and those who are
    suspended are in it, too (one more query).
    """
    now = timezone.now()
    held = None if asking else _suspended()
    waiting = waiting_batches(avoid, held)
    running, models = _running(), _models()
    others = _others(asking, running, models, now)
    return policy.View(
        now=now.timestamp(),
        waiting=waiting,
        work=policy.work_of(waiting),
        tenants=_tenants(waiting, running, now, held or ()),
        models=models,
        workers=[*others, asking] if asking else others,
        asked={name: at for name, at in (asked or {}).items() if name not in avoid},
    )


def _suspended() -> set[str]:
    rows = Organization.objects.filter(suspended_at__isnull=False, deleted_at=None)
    return set(rows.values_list("pk", flat=True))


_WAITING = """
SELECT model.name, batch.id, batch.organization_id, batch.priority,
    date_part('epoch', batch.created_at),
    date_part('epoch', coalesce(backlog.served_at, batch.in_progress_at, batch.created_at)),
    date_part('epoch', batch.expires_at),
    backlog.tokens::float8, backlog.chunks,
    coalesce(date_part('epoch', batch.front_at), 0),
    CASE WHEN batch.held_why = 'moderation' THEN 'moderation' WHEN batch.held_at IS NOT NULL THEN 'hold'
        WHEN share.halt <> '' THEN 'tenant_paused' WHEN model.halt <> '' THEN 'model_paused' ELSE '' END
FROM batches_backlog AS backlog
JOIN batches_batch AS batch ON batch.id = backlog.batch_id
JOIN models_registry_model AS model ON model.id = batch.model_id
JOIN accounts_organization AS organization ON organization.id = batch.organization_id
LEFT JOIN batches_share AS share ON share.organization_id = batch.organization_id
WHERE backlog.chunks > 0 AND batch.status = 'in_progress'
    AND organization.deleted_at IS NULL
    AND (organization.suspended_at IS NULL OR organization.id = ANY(%(held)s))
    AND (%(all)s OR (batch.held_at IS NULL AND model.halt = '' AND coalesce(share.halt, '') = ''))
    AND NOT (model.name = ANY(%(avoid)s) OR batch.id = ANY(%(avoid)s))
ORDER BY batch.expires_at, batch.id
"""


def waiting_batches(
    avoid: Sequence[str] = (), held: Iterable[str] | None = None
) -> dict[str, list[Candidate]]:
    """Every batch with a chunk to lease, by model, in order of deadlines.

    With `held`, for people: those that operators hold as well, and those of the suspended
    organizations that it names.
    """
    params: dict[str, Any] = {
        "avoid": list(avoid),
        "held": list(held or ()),
        "all": held is not None,
    }
    with connection.cursor() as cursor:
        cursor.execute(_WAITING, params)
        rows = cursor.fetchall()
    found: dict[str, list[Candidate]] = {}
    for row in rows:
        found.setdefault(row[0], []).append(Candidate._make(row[1:]))
    return found


def _running() -> list[tuple[str, str, str, int]]:
    """Worker, model, organization, and how many chunks of it are leased there."""
    leased = Chunk.objects.filter(state=ChunkState.LEASED)
    fields = ("lease_owner", "batch__model__name", "batch__organization_id")
    return list(leased.values_list(*fields).annotate(many=Count("pk")).order_by("lease_owner"))


def _tenants(
    waiting: Mapping[str, Sequence[Candidate]],
    running: Sequence[tuple[str, str, str, int]],
    now: datetime,
    held: Collection[str],
) -> dict[str, policy.Tenant]:
    busy: Counter[str] = Counter()
    for _, _, organization, many in running:
        busy[organization] += many
    names = {each.organization for those in waiting.values() for each in those}
    fields = ("organization_id", "weight", "served", "served_at", "chunks_at_once")
    known = {name: share for name, *share in Share.objects.values_list(*fields)}
    return {
        name: replace(_tenant(known.get(name), now), running=busy[name], held=name in held)
        for name in names
    }


def tenant_of(organization: Organization) -> policy.Tenant:
    """An organization that has nothing waiting yet, as the policy would see it; across tenants."""
    fields = ("weight", "served", "served_at", "chunks_at_once")
    share = Share.objects.filter(organization=organization).values_list(*fields).first()
    return replace(_tenant(share, timezone.now()), held=organization.suspended_at is not None)


def _tenant(share: Sequence[Any] | None, now: datetime) -> policy.Tenant:
    if share is None:
        return policy.Tenant()
    weight, served, served_at, chunks_at_once = share
    age = max(0.0, (now - served_at).total_seconds())
    return policy.Tenant(weight, served * 0.5 ** (age / policy.HALF_LIFE), limit=chunks_at_once)


def _models() -> dict[str, policy.Model]:
    speed: dict[str, dict[str, float]] = {}
    load: dict[str, dict[str, float]] = {}
    wake: dict[str, dict[str, float]] = {}
    unfit: dict[str, set[str]] = {}
    rows = Model.objects.order_by("pk").values_list(
        "name",
        "tokens_per_second",
        "measurements__gpu",
        "measurements__tokens_per_second",
        "measurements__load_seconds",
        "measurements__wake_seconds",
        "measurements__unfit_why",
    )
    for name, lately, gpu, measured, seconds, waking, why in rows:
        speeds, loads = speed.setdefault(name, {}), load.setdefault(name, {})
        if lately and not speeds:
            speeds[""] = lately
        if measured:
            speeds[gpu] = measured
        if seconds is not None:
            loads[gpu] = seconds
        if waking is not None:
            wake.setdefault(name, {})[gpu] = waking
        if why:
            unfit.setdefault(name, set()).add(gpu)
    return {
        name: policy.Model(
            speed[name], load[name], frozenset(unfit.get(name, ())), wake.get(name, {})
        )
        for name in speed
    }


def _others(
    asking: policy.Worker | None,
    running: Sequence[tuple[str, str, str, int]],
    models: Mapping[str, policy.Model],
    now: datetime,
) -> list[policy.Worker]:
    """The other workers; one that has leased a chunk is as good as loaded with its model."""
    leased = {owner: model for owner, model, _, _ in running}
    found = []
    for each in (each for see in _see_workers for each in see()):
        model = leased.get(each.name, each.model)
        since = each.since
        if since == inf:  # it loads: how far it is nobody knows
            since = now.timestamp() + each.swap_to(model, models.get(model, policy.Model()))
        if asking is None or each.name != asking.name:
            found.append(replace(each, model=model, since=since))
    return found


_LEASED = """
SELECT batch.id, batch.organization_id, model.name, count(DISTINCT chunk.lease_owner),
    sum(chunk.tokens)::float8 * least(1, greatest(0,
        batch.total - batch.completed - batch.failed - backlog.requests
    )::float8 / sum(chunk.end - chunk.start))
FROM batches_chunk AS chunk
JOIN batches_batch AS batch ON batch.id = chunk.batch_id
JOIN batches_backlog AS backlog ON backlog.batch_id = batch.id
JOIN models_registry_model AS model ON model.id = batch.model_id
WHERE chunk.state = 'leased' AND batch.status = 'in_progress'
GROUP BY batch.id, model.name, backlog.requests
"""
"""Of the tokens that are leased as many are left as of the requests."""


def running_batches() -> list[Running]:
    """What is leased of each batch, and how much of that is left to do."""
    with connection.cursor() as cursor:
        cursor.execute(_LEASED)
        return [Running(*row) for row in cursor.fetchall()]


def started_batches() -> dict[str, datetime]:
    """When the batches in progress began to run; those that did not yet are not in it."""
    rows = Backlog.objects.filter(batch__status=Status.IN_PROGRESS)
    return {name: at for name, at in rows.values_list("batch_id", "started_at") if at}


def load_seconds(model: Model) -> float:
    """How long a worker takes to load the model, on the slowest kind of GPU that was measured."""
    slowest = model.measurements.aggregate(most=Max("load_seconds"))["most"]
    return float(policy.DEFAULT_LOAD if slowest is None else slowest)


def workers_for(model: Model) -> tuple[int, int]:
    """How many workers are running that the model fits, and how many of those have no chunk."""
    unfit = set(model.measurements.exclude(unfit_why="").values_list("gpu", flat=True))
    alive = [each for see in _see_workers for each in see() if not each.draining]
    fit = {each.name for each in alive if each.kind not in unfit}
    busy = Chunk.objects.filter(state=ChunkState.LEASED, lease_owner__in=fit)
    return len(fit), len(fit - set(busy.values_list("lease_owner", flat=True)))


@dataclass
class Whereabouts:
    """On how many workers that are alive a model is."""

    loaded: int = 0
    loading: int = 0
    asleep: int = 0


def whereabouts() -> Mapping[str, Whereabouts]:
    """Of each model; of one that is nowhere, too."""
    found: dict[str, Whereabouts] = defaultdict(Whereabouts)
    for each in (each for see in _see_workers for each in see()):
        if each.since == inf:
            found[each.model].loading += 1
        else:
            found[each.model].loaded += 1
        for name in each.asleep - {each.model}:
            found[name].asleep += 1
    return found
