"""The page of one batch: its live state, its chunks, its log, and what can be made of it.

Its results are in `results.py`, the list of batches in `batches.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from itertools import pairwise
from math import ceil
from typing import Any

import orjson
from django.conf import settings
from django.contrib import messages
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.utils import timezone
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from accounts import access, throttling
from accounts.access import Caller
from accounts.errors import ApiError
from accounts.models import AuditEvent, Reservation
from accounts.pages import STOP_POLLING, PageRequest, page, sent
from accounts.services.quotas import Prices
from accounts.views.usage import money
from batches import error_kinds
from batches.error_kinds import Kind, Tally
from batches.forms.batches import CloneForm
from batches.models import Batch, Chunk
from batches.models.batches import Priority, Status
from batches.queries import batches as queries
from batches.queries.handlers import result_handlers
from batches.services import reruns
from batches.views.batches import LOOKS, Row
from batches.views.handlers import runs_of

RELATED = ("model", "input_file", "output_file", "error_file")
"""Fetched along with a batch. Whose it is is fetched when it is shown: to plan a join of nine tables
takes PostgreSQL many times as long as to look each row up."""
RERUN = ("input_file", "project")
BAD_LINES = 100
"""Errors of the validation that are listed; the API has the others."""
CHUNKS, LOG = 50, 100
"""Lines of a page of chunks; and leases and audit events that the log goes back."""
POINTS = 80
"""At most so many points has a chart."""
LATELY = timedelta(seconds=30)
"""The rate that is shown is that of at least so long."""

Point = tuple[datetime, int, int, int]


@dataclass(frozen=True)
class Step:
    """One state of the batch: since when, and for how long it was in it."""

    label: str
    icon: str
    colour: str
    at: datetime
    lasted: str
    is_now: bool


@dataclass(frozen=True)
class Rate:
    requests: float
    tokens: float


@dataclass(frozen=True)
class Detail(Row):
    """The batch as its page shows it."""

    @cached_property
    def points(self) -> list[Point]:
        """What was sampled, and how far it is now."""
        found, batch = queries.samples_of(self.batch), self.batch
        if found and batch.status == Status.IN_PROGRESS:
            now = timezone.now()
            found.append((now, batch.answered, batch.input_tokens, batch.output_tokens))
        return found

    @property
    def rate(self) -> Rate | None:
        """Of the last half minute while it runs, else of all of it; None where that is unknown."""
        if len(self.points) < 2:
            return None
        last = self.points[-1]
        before = [point for point in self.points if point[0] <= last[0] - LATELY]
        running = self.batch.status == Status.IN_PROGRESS
        first = before[-1] if running and before else self.points[0]
        seconds = (last[0] - first[0]).total_seconds()
        if seconds <= 0:
            return None
        tokens = last[2] + last[3] - first[2] - first[3]
        return Rate((last[1] - first[1]) / seconds, tokens / seconds)

    @property
    def chart(self) -> str:
        """Seconds since the first sample with the rates until then, as JSON; '' of a single one."""
        if len(self.points) < 3:
            return ""
        step = ceil((len(self.points) - 1) / POINTS)
        kept = [*self.points[:-1:step], self.points[-1]]
        rates = [_rates(kept[0][0], *pair) for pair in pairwise(kept)]
        return orjson.dumps([each for each in rates if each]).decode()

    @property
    def steps(self) -> list[Step]:
        moments = [("Created", "plus", "secondary", self.batch.created_at)]
        for status in Status:
            if at := getattr(self.batch, f"{status}_at", None):
                colour, icon = LOOKS[status]
                moments.append((str(status.label), icon, colour, at))
        moments.sort(key=lambda moment: moment[3])
        ends = [moment[3] for moment in moments[1:]]
        ends += [] if self.batch.is_finished else [timezone.now()]
        return [
            Step(*moment, lasting(end - moment[3]) if end else "", moment is moments[-1])
            for moment, end in zip(moments, [*ends, None], strict=False)
        ]

    @property
    def cost(self) -> str:
        """What it was settled at, or what it has cost so far; '' where it has no price."""
        cost = self.batch.cost
        if not self.batch.is_finished:
            reserved = Reservation.objects.filter(pk=self.batch.pk).first()
            cost = _cost_so_far(self.batch, reserved) if reserved else None
        return f"{money(cost)} {settings.CURRENCY.upper()}" if cost is not None else ""

    @cached_property
    def kinds(self) -> list[Kind]:
        """What failed, by kind: of a finished batch all of it, of others the first failures.

        It quotes the error file, so nothing is shown of one that was deleted.
        """
        if self.batch.error_file and self.batch.error_file.deleted_at:
            return []
        if self.batch.error_kinds is not None or not self.batch.failed:
            return error_kinds.kinds_of(self.batch.error_kinds)
        tally = Tally()
        for line, payload in queries.failures_so_far(self.batch):
            tally.add(line, payload)
        return error_kinds.kinds_of(tally.as_json())

    @property
    def grouped(self) -> int:
        return sum(kind.count for kind in self.kinds)

    @property
    def bad_lines(self) -> Sequence[dict[str, Any]]:
        return (self.batch.errors or [])[:BAD_LINES]

    @property
    def more_bad_lines(self) -> int:
        return max(len(self.batch.errors or []) - BAD_LINES, 0)

    @property
    def can_retry(self) -> bool:
        try:
            reruns.require_retryable(self.batch)
        except ApiError:
            return False
        return self.may_write

    @property
    def can_clone(self) -> bool:
        return self.may_write and self.batch.input_file.deleted_at is None

    @property
    def has_results(self) -> bool:
        return bool(self.batch.results_name or (not self.batch.is_finished and self.batch.answered))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return list((self.batch.metadata or {}).items())

    @property
    def sender(self) -> str:
        """Who sent it: the person, and the key if it was by one."""
        names = [str(each) for each in (self.batch.user, self.batch.api_key) if each]
        return ", ".join(names) or "somebody who has left"

    @property
    def total(self) -> str:
        return f"{self.batch.total:,}"

    @property
    def tokens_in(self) -> str:
        return f"{self.batch.input_tokens:,}"

    @property
    def tokens_cached(self) -> str:
        return f"{self.batch.cached_tokens:,}"

    @property
    def tokens_out(self) -> str:
        return f"{self.batch.output_tokens:,}"

    @property
    def gpu_minutes(self) -> str:
        return f"{self.batch.gpu_seconds / 60:,.1f}"


def _rates(begin: datetime, before: Point, after: Point) -> dict[str, float] | None:
    seconds = (after[0] - before[0]).total_seconds()
    if seconds <= 0:
        return None
    return {
        "x": round((after[0] - begin).total_seconds(), 1),
        "requests": round((after[1] - before[1]) / seconds, 3),
        "in": round((after[2] - before[2]) / seconds, 1),
        "out": round((after[3] - before[3]) / seconds, 1),
    }


def _cost_so_far(batch: Batch, reserved: Reservation) -> Any:
    prices = Prices(reserved.input_price, reserved.cached_price, reserved.output_price)
    return prices.cost(
        input=batch.input_tokens, cached=batch.cached_tokens, output=batch.output_tokens
    )


def lasting(time: timedelta) -> str:
    """A length of time in its two largest units."""
    seconds = max(round(time.total_seconds()), 0)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


@require_safe
@page
def batch_detail(request: PageRequest, caller: Caller, batch_id: str) -> HttpResponseBase:
    caller.require("batches.read")
    detail = of(caller, batch_id)
    ctx = {"row": detail, "batch": detail.batch, "tab": "overview"}
    if not request.htmx:
        if caller.may("webhooks.read") and result_handlers():
            ctx |= {"handlers": True, **runs_of(detail.batch)}
        return render(request, "batches/batch.html", ctx)
    status = STOP_POLLING if detail.batch.is_finished else 200
    return render(request, "batches/batch.html#live", ctx, status=status)


def of(caller: Caller, batch_id: str) -> Detail:
    batch = access.get(caller, Batch, batch_id, param="batch_id", related=RELATED)
    return Detail(batch, caller.may("batches"))


# --- Chunks ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChunkRow:
    chunk: Chunk

    @property
    def requests(self) -> str:
        return f"{self.chunk.end - self.chunk.start:,}"

    @property
    def tokens(self) -> str:
        return f"{self.chunk.tokens:,}"

    @property
    def took(self) -> str:
        begun, done = self.chunk.leased_at, self.chunk.done_at
        return lasting(done - begun) if begun and done else ""

    @property
    def colour(self) -> str:
        return {"ready": "secondary", "leased": "blue", "done": "green"}[self.chunk.state]


@require_safe
@page
def batch_chunks(request: PageRequest, caller: Caller, batch_id: str) -> HttpResponseBase:
    caller.require("batches.read")
    detail = of(caller, batch_id)
    after = number(request.GET.get("after"))
    rows = Chunk.objects.filter(batch=detail.batch, start__gte=after).order_by("start")
    found = list(rows[: CHUNKS + 1])
    ctx = {
        "row": detail,
        "batch": detail.batch,
        "tab": "chunks",
        "chunks": [ChunkRow(chunk) for chunk in found[:CHUNKS]],
        "after": after,
        "next": found[CHUNKS].start if len(found) > CHUNKS else 0,
    }
    return render(request, "batches/batch_chunks.html", ctx)


def number(text: str | None) -> int:
    """A number of a line, of what anybody may have written into the address; 0 for nonsense."""
    text = text or ""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0


# --- Its log --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """Something that happened: when, what, and by whom."""

    at: datetime
    icon: str
    text: str
    who: str = ""


@require_safe
@page
def batch_log(request: PageRequest, caller: Caller, batch_id: str) -> HttpResponseBase:
    caller.require("batches.read")
    detail = of(caller, batch_id)
    events = queries.audit_of(detail.batch, LOG) if caller.may("audit.read") else []
    entries = [*_states(detail), *_leases(detail.batch), *map(_audited, events)]
    ctx = {
        "row": detail,
        "batch": detail.batch,
        "tab": "log",
        "entries": sorted(entries, key=lambda entry: entry.at, reverse=True),
        "suspects": list(detail.batch.suspects.order_by("-deaths", "line")[:LOG]),
        "most": LOG,
    }
    return render(request, "batches/batch_log.html", ctx)


def _states(detail: Detail) -> list[Entry]:
    return [
        Entry(step.at, step.icon, step.label, detail.sender if step.label == "Created" else "")
        for step in detail.steps
    ]


def _leases(batch: Batch) -> list[Entry]:
    """The newest leases: of each chunk the last one."""
    leased = Chunk.objects.filter(batch=batch, leased_at__isnull=False).order_by("-leased_at")
    found = []
    for chunk in leased[:LOG]:
        name = f"requests {chunk.start + 1:,} to {chunk.end:,}"
        again = f", for the {chunk.leases}. time" if chunk.leases > 1 else ""
        assert chunk.leased_at is not None
        found.append(Entry(chunk.leased_at, "cpu", f"Began {name}{again}", chunk.worker))
        if chunk.done_at:
            found.append(Entry(chunk.done_at, "check", f"Finished {name}", chunk.worker))
    return found


def _audited(event: AuditEvent) -> Entry:
    return Entry(event.created_at, "history", event.action, event.actor_label)


# --- What can be made of it -----------------------------------------------------------------


@require_POST
@page
def retry_batch(request: PageRequest, caller: Caller, batch_id: str) -> HttpResponseBase:
    caller.require("batches")
    batch = access.get(caller, Batch, batch_id, param="batch_id", related=RERUN)
    try:
        throttling.count(request, caller, "batches")
        made = reruns.retry_failed(actor=caller, batch=batch)
    except ApiError as error:
        messages.warning(request, error.message)
        return redirect("batch_detail", batch.pk)
    messages.success(request, f"This new batch retries what failed of {batch.pk}.")
    return redirect("batch_detail", made.pk)


@require_http_methods(["GET", "HEAD", "POST"])
@page
def clone_batch(request: PageRequest, caller: Caller, batch_id: str) -> HttpResponseBase:
    caller.require("batches")
    batch = access.get(caller, Batch, batch_id, param="batch_id", related=RERUN)
    initial = {
        "completion_window": batch.completion_window,
        "priority": Priority(batch.priority).name.lower(),
        "metadata": batch.metadata or {},
    }
    form = CloneForm(sent(request), initial=initial)
    if form.is_valid() and (made := _cloned(request, caller, batch, form)):
        messages.success(request, "This new batch runs the same input file again.")
        return redirect("batch_detail", made.pk)
    ctx = {"batch": batch, "form": form}
    return render(request, "batches/batch_clone.html", ctx, status=400 if form.errors else 200)


def _cloned(request: PageRequest, caller: Caller, batch: Batch, form: CloneForm) -> Batch | None:
    try:
        throttling.count(request, caller, "batches")
        return reruns.clone(actor=caller, batch=batch, **form.cleaned_data)
    except ApiError as error:
        form.add_error(None, error.message)
    return None
