"""Reads of files and batches that are more than one line."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from math import inf
from typing import Any

from django.db import connection
from django.db.models import Count, Exists, F, Max, Min, OuterRef, Q, QuerySet, Subquery, Sum
from django.db.models.functions import Coalesce
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.access import Caller
from accounts.ids import first_audit_event_id, first_id
from accounts.models import ApiKey, AuditEvent, Organization, User
from batches import policy
from batches.models import (
    Backlog,
    Batch,
    Chunk,
    File,
    HandlerRun,
    Moderation,
    Result,
    ResultHandler,
    Retention,
    Share,
    Upload,
    WebhookDelivery,
    WebhookEndpoint,
)
from batches.models.batches import UNFINISHED, ChunkState, HeldWhy, Status
from batches.models.events import DeliveryState
from batches.models.files import Purpose, UploadStatus
from batches.models.handlers import RunState
from batches.outlook import Running
from batches.policy import Candidate
from models_registry.models import Model


def files_to_purge() -> QuerySet[File]:
    """Deleted files whose bytes no unfinished batch reads any more."""
    reading = Batch.objects.filter(input_file=OuterRef("pk"), status__in=UNFINISHED)
    gone = File.objects.filter(deleted_at__isnull=False, purged_at__isnull=True)
    return gone.filter(~Exists(reading)).order_by("deleted_at")


def bytes_kept(organization: Organization, user: User | None, api_key: ApiKey | None) -> int:
    """Bytes that count against a storage quota: files until they are purged (a deleted one may
    still be read by a batch), uploads under way."""
    whose: dict[str, Any] = {"organization": organization}
    if user is not None:
        whose["user"] = user
    if api_key is not None:
        whose["api_key"] = api_key
    kept = File.objects.filter(purged_at=None, **whose)
    coming = Upload.objects.filter(status=UploadStatus.PENDING, **whose)
    return sum(rows.aggregate(total=Sum("bytes"))["total"] or 0 for rows in (kept, coming))


def deliveries_found(
    *,
    state: str | None = None,
    endpoint: str | None = None,
    event: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    error: str | None = None,
) -> QuerySet[WebhookDelivery]:
    """Deliveries that are like all that is given; times are their events', inclusive."""
    wanted: dict[str, Any] = {
        "state": state,
        "endpoint_id": endpoint,
        "event__type": event,
        "event__created_at__gte": since,
        "event__created_at__lte": until,
        "error__icontains": error,
    }
    return WebhookDelivery.objects.filter(
        **{
            name: value.replace("\0", "") if isinstance(value, str) else value
            for name, value in wanted.items()
            if value is not None
        }
    )


MOST_DELIVERIES = 10_000
"""How many are sent again or forgotten by one call."""


def oldest_of(found: QuerySet[WebhookDelivery]) -> QuerySet[WebhookDelivery]:
    """The first `MOST_DELIVERIES` of what was found."""
    ids = found.order_by("pk").values("pk")[:MOST_DELIVERIES]
    return WebhookDelivery.objects.filter(pk__in=ids)


def dead_letters(caller: Caller) -> int:
    """How many deliveries of the caller's organization are dead; an index look-up."""
    return deliveries_in(caller, DeliveryState.DEAD)


def deliveries_in(caller: Caller, state: str) -> int:
    with caller.scope():
        return WebhookDelivery.objects.filter(state=state).count()


def last_day_of(endpoints: Collection[WebhookEndpoint]) -> dict[str, tuple[int, int]]:
    """How many of the last day's deliveries have arrived, and how many there were, by endpoint."""
    first = first_id("whd_", timezone.now() - timedelta(days=1))
    recent = WebhookDelivery.objects.filter(endpoint__in=endpoints, pk__gte=first)
    rows = recent.values_list("endpoint_id").annotate(
        arrived=Count("pk", filter=Q(state=DeliveryState.DELIVERED)), sent=Count("pk")
    )
    return {endpoint: (arrived, sent) for endpoint, arrived, sent in rows.order_by("endpoint_id")}


def retention_of(organization: Organization) -> Retention:
    """What the organization has set; nothing, where it never did."""
    with scopes_disabled():
        found = Retention.objects.filter(organization=organization).first()
    return found or Retention(organization=organization)


def kept_for(organization: Organization, purpose: str) -> timedelta | None:
    """How long a new file of this purpose stays unless something else is asked for."""
    days = retention_of(organization).days_of(purpose)
    return None if days is None else timedelta(days=days)


def files_like(purpose: str, text: str) -> QuerySet[File]:
    """The caller's files, by purpose and by what their name or id holds; in the caller's scope.

    With how many unfinished batches read each.
    """
    reading = Batch.objects.filter(input_file=OuterRef("pk"), status__in=UNFINISHED).order_by()
    many = reading.values("input_file").annotate(many=Count("pk")).values("many")
    found = File.objects.filter(deleted_at=None).annotate(reading=Subquery(many))
    if purpose:
        found = found.filter(purpose=purpose)
    if text:
        found = found.filter(Q(filename__icontains=text) | Q(pk=text))
    return found.select_related("checked", "user", "api_key")


def recent_inputs(limit: int) -> list[File]:
    """What a batch may be made of, newest first: inputs and tables; in the caller's scope."""
    table = Q(purpose=Purpose.USER_DATA) & Q(filename__iregex=r"\.(csv|tsv|parquet)$")
    mine = File.objects.filter(Q(purpose=Purpose.BATCH) | table, deleted_at=None)
    return list(mine.order_by("-pk")[:limit])


def batches_using(file: File) -> QuerySet[Batch]:
    """Batches that read the file or wrote it, newest first; in the caller's scope."""
    mine = Q(input_file=file) | Q(output_file=file) | Q(error_file=file)
    return Batch.objects.filter(mine).order_by("-pk")


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
    return Share.objects.exclude(halt="").select_related("organization").order_by("organization")


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


def batches_to_validate() -> QuerySet[Batch]:
    waiting = Batch.objects.filter(status__in=(Status.VALIDATING, Status.CANCELLING))
    return waiting.filter(index_name="", errors__isnull=True)


def batches_to_finalize() -> QuerySet[Batch]:
    """Batches that are ending and have been validated (or found to be invalid)."""
    ending = Batch.objects.filter(status__in=(Status.FINALIZING, Status.CANCELLING))
    return ending.filter(~Q(index_name="") | Q(errors__isnull=False))


def result_handlers() -> list[ResultHandler]:
    """The organization's handlers, in order; inside its scope."""
    return list(ResultHandler.objects.select_related("project").order_by("position", "pk"))


def handlers_for(batch: Batch, chosen: frozenset[str] | None) -> QuerySet[ResultHandler]:
    """The handlers that have the batch's results, in order: those named, else those by default."""
    mine = ResultHandler.objects.filter(
        Q(project=None) | Q(project=batch.project_id), organization=batch.organization_id
    ).filter(enabled=True)
    named = Q(by_default=True) if chosen is None else Q(name__in=chosen)
    return mine.filter(named).order_by("position", "pk")


def handler_runs(batch: Batch) -> list[HandlerRun]:
    """The batch's runs, in order, with their handlers; inside the organization's scope."""
    runs = HandlerRun.objects.filter(batch=batch).select_related("handler")
    return list(runs.order_by("position", "pk"))


def runs_to_take() -> QuerySet[HandlerRun]:
    """Runs that are not over, of organizations and by handlers that may work."""
    return HandlerRun.objects.filter(
        state__in=(RunState.WAITING, RunState.RUNNING),
        handler__enabled=True,
        organization__suspended_at=None,
        organization__deleted_at=None,
    ).select_related(
        "organization",
        "handler",
        "batch__project",
        "batch__user",
        "batch__api_key",
        "batch__model",
        "batch__input_file",
        "batch__output_file",
        "batch__error_file",
    )


def batches_to_handle(now: datetime, at_once: int) -> QuerySet[HandlerRun, str]:
    """The ids of batches with a run that is due, those that wait longest first; none of
    organizations that have so many runs already, behind which the others' would be too far down."""
    due = Q(next_attempt_at__lte=now) | Q(busy_until__lt=now)
    full = _runs_held(now).values("organization").annotate(held=Count("pk"))
    full = full.filter(held__gte=at_once).values("organization")
    runs = runs_to_take().select_related(None).filter(due).exclude(organization__in=full)
    found = runs.values_list("batch", flat=True)
    return found.annotate(since=Min("created_at")).order_by("since")


def runs_at_once(organization_id: str, now: datetime) -> int:
    """How many runs of the organization are being worked on."""
    return _runs_held(now).filter(organization=organization_id).count()


def _runs_held(now: datetime) -> QuerySet[HandlerRun]:
    return HandlerRun.objects.filter(state=RunState.RUNNING, busy_until__gte=now)


SEARCHED = 10_000
"""Among so many batches at a time a text is looked for: there is no index for parts of names."""


def find_batches(wanted: Q, text: str, after: str, count: int) -> tuple[list[Batch], str | None]:
    """The newest of the organization's batches that are wanted, made before the batch `after`.

    Returns up to `count` of them, and what to give as `after` for older ones (None: there are none).
    With a text, which is part of a file's name or of a batch's id, one call looks at `SEARCHED`
    batches: fewer than `count` may be found of them although there are older ones.
    """
    mine = Batch.objects.filter(wanted).order_by("-pk")
    if after:
        mine = mine.filter(pk__lt=after)
    older = None
    if text:
        end = mine.values_list("pk", flat=True)[SEARCHED : SEARCHED + 1]
        if older := next(iter(end), None):
            mine = mine.filter(pk__gte=older)
        mine = mine.filter(Q(input_file__filename__icontains=text) | Q(pk__icontains=text))
    related = ("model", "input_file", "output_file", "error_file")
    found = list(mine.select_related(*related)[: count + 1])
    if len(found) > count:
        return found[:count], found[count - 1].pk
    return found, older


def samples_of(batch: Batch) -> list[tuple[datetime, int, int, int]]:
    """When, and then answered requests, tokens in and tokens out; oldest first."""
    fields = ("at", "answered", "input_tokens", "output_tokens")
    return list(batch.samples.order_by("at").values_list(*fields))


FAILURES_LOOKED_AT = 200


def failures_so_far(batch: Batch) -> list[tuple[int, bytes | memoryview]]:
    """The first lines that failed of a batch that is not finalized, and their errors."""
    rows = Result.objects.filter(batch=batch, ok=False).order_by("line")
    return list(rows.values_list("line", "payload")[:FAILURES_LOOKED_AT])


def audit_of(batch: Batch, count: int) -> list[AuditEvent]:
    """The newest events of the organization's audit that are about the batch.

    By key from when it was made: those before it cannot be about it.
    """
    since = first_audit_event_id(batch.created_at)
    events = AuditEvent.objects.filter(organization=batch.organization_id, pk__gte=since)
    return list(events.filter(target_id=batch.pk).order_by("-pk")[:count])
