"""Reads of the workers: which are alive, as the queue sees them, and as operators do.

Whether one is alive is judged by PostgreSQL's clock, which writes the heartbeats, too: hosts need
not agree on the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce
from math import inf
from operator import or_
from typing import Any, NamedTuple

from django.conf import settings
from django.db.models import (
    Count,
    DurationField,
    ExpressionWrapper,
    F,
    Q,
    QuerySet,
    Sum,
    Window,
)
from django.db.models.functions import Coalesce, Now, RowNumber
from django_scopes import scopes_disabled

from batches import policy
from batches.models import Chunk
from batches.models.batches import ChunkState
from models_registry.models import Change, ModelLoad
from models_registry.profiles import GpuProfile, profile_of
from worker.models import Health, Worker, WorkerState

MOST = 1000


def heard_of() -> Q:
    """Within a lease's length: a worker that is silent for longer loses its leases."""
    since = Now() - timedelta(seconds=settings.LEASE_SECONDS)
    return Q(heartbeat_at__gt=since) & ~Q(state=WorkerState.STOPPED)


def alive() -> list[policy.Worker]:
    """As the policy sees them; one whose GPU cannot be used is like one that is drained.

    Since when one has its model is not told, but for one that loads it just now: not yet.
    """
    rows = Worker.objects.filter(heard_of()).order_by("name")
    fields = ("name", "gpu_kind", "loaded_model", "state", "draining", "health", "asleep")
    return [
        policy.Worker(
            name,
            kind,
            loaded,
            since=inf if state == WorkerState.LOADING else 0.0,
            draining=draining or health in (Health.RESTING, Health.SICK),
            asleep=frozenset(asleep),
        )
        for name, kind, loaded, state, draining, health, asleep in rows.values_list(*fields)
    ]


def workers() -> QuerySet[Any]:
    """All that are known, by name, with `is_alive` and for how long each has been `silent`."""
    silent = ExpressionWrapper(Now() - F("heartbeat_at"), output_field=DurationField())
    return Worker.objects.annotate(is_alive=heard_of(), silent=silent).order_by("name")


SHOWN: Mapping[str, tuple[str, Q]] = {
    "": ("Running and silent", ~Q(state=WorkerState.STOPPED)),
    "silent": ("Silent", ~Q(state=WorkerState.STOPPED) & ~Q(is_alive=True)),
    "stopped": ("Stopped", Q(state=WorkerState.STOPPED)),
}
"""What the operators' page can show of the workers: the words, and which."""


def find_workers(show: str, text: str) -> QuerySet[Any]:
    """Those of one of the kinds of `SHOWN` that have the text in their name, host, GPU or model."""
    _, which = SHOWN.get(show, SHOWN[""])
    found = workers().filter(which)
    if text:
        parts = ("name", "host", "gpu_kind", "loaded_model")
        found = found.filter(reduce(or_, (Q(**{f"{part}__icontains": text}) for part in parts)))
    return found


class Fleet(NamedTuple):
    """How many workers there are of each kind, and what all of them do."""

    running: int
    silent: int
    stopped: int
    tokens_per_second: float


def fleet() -> Fleet:
    """Of all workers, in one query."""
    alive, stopped = Q(is_alive=True), Q(state=WorkerState.STOPPED)
    counts = workers().aggregate(
        running=Count("pk", filter=alive),
        silent=Count("pk", filter=~alive & ~stopped),
        stopped=Count("pk", filter=stopped),
        tokens_per_second=Coalesce(Sum("tokens_per_second", filter=alive), 0.0),
    )
    return Fleet(**counts)


class Running(NamedTuple):
    """What a worker has leased of one batch."""

    batch: str
    organization: str
    model: str
    chunks: int
    requests: int


@dataclass(frozen=True)
class Swaps:
    """Models that came to a worker within a day: how often, how long that took, and what failed."""

    loads: int = 0
    load_seconds: float = 0.0
    wakes: int = 0
    wake_seconds: float = 0.0
    failures: int = 0


def running_on(names: Sequence[str]) -> dict[str, list[Running]]:
    """By worker, what each has leased now, across tenants."""
    with scopes_disabled():
        leased = Chunk.objects.filter(state=ChunkState.LEASED, lease_owner__in=names)
        batch = ("batch_id", "batch__organization__name", "batch__model__name")
        rows = leased.order_by("lease_owner", "batch_id").values_list("lease_owner", *batch)
        counted = rows.annotate(chunks=Count("pk"), requests=Sum(F("end") - F("start")))
        found: dict[str, list[Running]] = {}
        for owner, *its in counted:
            found.setdefault(owner, []).append(Running(*its))
    return found


def swaps_of(names: Sequence[str]) -> dict[str, Swaps]:
    """By worker, its loads and wakings of the last day."""
    good = {"error": ""}
    lately = ModelLoad.objects.filter(worker__in=names, at__gt=Now() - timedelta(days=1))
    load, wake = Q(change=Change.LOAD, **good), Q(change=Change.WAKE, **good)
    rows = lately.order_by("worker").values_list("worker")
    sums = rows.annotate(
        loads=Count("pk", filter=load),
        load_seconds=Coalesce(Sum("seconds", filter=load), 0.0),
        wakes=Count("pk", filter=wake),
        wake_seconds=Coalesce(Sum("seconds", filter=wake), 0.0),
        failures=Count("pk", filter=~Q(error="")),
    )
    return {worker: Swaps(*numbers) for worker, *numbers in sums}


def last_loads(names: Sequence[str], each: int = 5) -> dict[str, list[ModelLoad]]:
    """By worker, the last models that came or went, newest first."""
    place = Window(RowNumber(), partition_by="worker", order_by=[F("at").desc(), F("pk").desc()])
    rows = ModelLoad.objects.filter(worker__in=names).annotate(place=place)
    found: dict[str, list[ModelLoad]] = {}
    for row in rows.filter(place__lte=each).select_related("model").order_by("worker", "place"):
        found.setdefault(row.worker, []).append(row)
    return found


def with_gpus() -> QuerySet[Worker]:
    """Those that look after GPUs; of so many that nobody can read them all, the first by name."""
    return Worker.objects.filter(heard_of()).exclude(health="").order_by("name")[:MOST]


def gpu_kinds() -> list[GpuProfile]:
    """Each kind of GPU that a worker has, or had when it was last heard of."""
    rows = Worker.objects.exclude(gpu_kind="").order_by("gpu_kind", "memory_total")
    kinds = rows.values_list("gpu_kind", "memory_total").distinct()
    return list(dict.fromkeys(profile_of(kind, memory) for kind, memory in kinds if memory))


def sick_before(name: str) -> str:
    """Why an earlier life of the worker was sick; empty if it was not, or has been resumed."""
    row = Worker.objects.filter(name=name, draining=True, health=Health.SICK).first()
    return row.health_why or "sick" if row else ""
