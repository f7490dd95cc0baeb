"""Where each batch stands in the queue: worked out by the sweep, for all, and kept in the cache.

Looking at the whole queue for every page would be slow, so everybody is told what the last sweep
saw. Without a sweep or a cache nobody is told anything; nothing else depends on this.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from math import ceil
from typing import NamedTuple

import orjson
from django.conf import settings
from django.core.cache import cache
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.models import Organization
from batches.models import Batch
from batches.models.batches import Priority, Status
from batches.outlook import explain
from batches.policy import Candidate, Reason, work_of
from batches.queries import queue as queries
from models_registry.models import Model
from models_registry.queries import private_models, unloadable_models

KEY = "standings"
KEPT_SECONDS = 15
"""For so long they are told on, should the sweeps stop."""
HELD_SECONDS = 2.0
"""For so long a process does not ask the cache again, be it there or not."""


class Standing(NamedTuple):
    """A batch's place among those of its model, from 1, or 0 while it runs; times in seconds
    since 1970."""

    position: int
    reason: str
    estimated_start_at: int | None
    estimated_completion_at: int | None

    @property
    def starts_at(self) -> datetime | None:
        """When it is expected to begin, if it has not yet."""
        moment = _moment(self.estimated_start_at)
        return moment if moment and moment > timezone.now() else None

    @property
    def done_at(self) -> datetime | None:
        return _moment(self.estimated_completion_at)


def _moment(seconds: int | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


Entry = Sequence[int | str | None]
"""A standing's fields."""
_held: Mapping[str, Entry] = {}
_ask_again_at = 0.0


def of(batch: Batch) -> Standing | None:
    """Where it stands; None for one that neither waits nor runs, and while that is not known."""
    if batch.status != Status.IN_PROGRESS:
        return None
    found = _all().get(batch.pk)
    standing = Standing(*found) if found else None  # type: ignore[arg-type]
    if standing is None or not batch.is_held:
        return standing
    # The row is newer than what the last sweep saw, and has the operator's words.
    return standing._replace(
        reason=batch.held_reason, estimated_start_at=None, estimated_completion_at=None
    )


def everywhere() -> Mapping[str, Standing]:
    """What is known of every batch, across tenants: for operators."""
    return {id: Standing(*entry) for id, entry in _all().items()}  # type: ignore[arg-type]


def _all() -> Mapping[str, Entry]:
    global _held, _ask_again_at
    if time.monotonic() >= _ask_again_at:
        _ask_again_at = (
            time.monotonic() + HELD_SECONDS
        )  # before it: nobody else waits for a slow cache
        packed = cache.get(KEY)
        _held = orjson.loads(zlib.decompress(packed)) if packed else {}
    return _held


def publish() -> None:
    """Look at the queue, and keep what to tell about each batch; across tenants."""
    global _ask_again_at
    with scopes_disabled():
        found = _work_out()
    cache.set(KEY, zlib.compress(orjson.dumps(found), 1), KEPT_SECONDS)
    _ask_again_at = 0.0


def _work_out() -> dict[str, Entry]:
    view = queries.queue_view()
    running, started = queries.running_batches(), queries.started_batches()
    owners = {each.batch: each.organization for its in view.waiting.values() for each in its}
    owners |= {each.batch: each.organization for each in running}
    private, found = private_models(), dict[str, Entry]()
    for batch, place in explain(view, running, unloadable_models()).items():
        reason = _discreet(place.reason, owners[batch], private)
        begun = started.get(batch)
        start = begun.timestamp() if begun else place.start
        found[batch] = (place.position, str(reason), _second(start), _second(place.completion))
    return found


def forecasts(
    organization: Organization, model: Model, *, requests: int, tokens: int, window: timedelta
) -> dict[int, Standing]:
    """Where a batch would stand if it came now, by its priority.

    Empty where the model's speed has not been measured: then nobody can say. As everything here it
    is an estimate, as if no more work came.
    """
    with scopes_disabled():
        view = queries.queue_view()
        speeds = view.models[model.name].speed if model.name in view.models else {}
        if not speeds:
            return {}
        running, failing = queries.running_batches(), unloadable_models()
        private, tenant = private_models(), queries.tenant_of(organization)
    chunk = max(speeds.values()) * settings.CHUNK_SECONDS
    chunks = max(1, ceil(requests / settings.CHUNK_REQUESTS), ceil(tokens / chunk))
    found: dict[int, Standing] = {}
    for priority in Priority:
        new = Candidate(
            batch="",
            organization=organization.pk,
            priority=priority,
            created=view.now,
            served=view.now,
            due=view.now + window.total_seconds(),
            tokens=float(tokens),
            chunks=chunks,
        )
        waiting = {**view.waiting, model.name: [*view.waiting.get(model.name, ()), new]}
        tenants = {organization.pk: tenant, **view.tenants}
        there = replace(view, waiting=waiting, work=work_of(waiting), tenants=tenants)
        place = explain(there, running, failing)[""]
        reason = _discreet(place.reason, organization.pk, private)
        found[priority] = Standing(
            place.position, str(reason), _second(place.start), _second(place.completion)
        )
    return found


def _second(moment: float | None) -> int | None:
    return None if moment is None else int(moment)


def _discreet(reason: Reason, organization: str, private: Mapping[str, set[str]]) -> Reason:
    """The reason without the name of a model that this organization may not know."""
    if organization in private.get(reason.loaded, {organization}):
        return reason
    return replace(reason, loaded="another model")
