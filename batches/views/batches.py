"""The list of batches with its filters and its live progress, and cancelling one or several.

What batches are and may do is in models and services; the API has the same in `api.py`. The pages
of a single batch are in `batch.py` and `results.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from urllib.parse import urlencode

from django.conf import settings
from django.contrib import messages
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST, require_safe

from accounts import access
from accounts.access import Caller
from accounts.errors import BadRequest
from accounts.models import ApiKey, Membership, Project
from accounts.pages import STOP_POLLING, PageRequest, page
from batches import standings
from batches.forms.batches import BatchFilterForm
from batches.models import Batch, File
from batches.models.batches import NEXT, Status
from batches.queries import batches as queries
from batches.services import batches
from batches.standings import Standing
from models_registry.queries import example_for, offered_to

PAGE_SIZE = 20
MOST_KEYS = 200
"""The newest keys can be chosen in the filter; an older one's batches by its project."""

LOOKS: Mapping[str, tuple[str, str]] = {
    Status.VALIDATING: ("azure", "clock"),
    Status.IN_PROGRESS: ("blue", "player-play"),
    Status.FINALIZING: ("indigo", "hourglass"),
    Status.COMPLETED: ("green", "circle-check"),
    Status.FAILED: ("red", "circle-x"),
    Status.EXPIRED: ("orange", "clock-x"),
    Status.CANCELLING: ("yellow", "hourglass"),
    Status.CANCELLED: ("secondary", "ban"),
}
"""The colour and the icon of each status."""


@dataclass(frozen=True)
class Row:
    """A batch as a line of the list."""

    batch: Batch
    may_write: bool

    @property
    def colour(self) -> str:
        return LOOKS[self.batch.status][0]

    @property
    def icon(self) -> str:
        return LOOKS[self.batch.status][1]

    @property
    def counts(self) -> str:
        return f"{self.batch.answered:,} of {self.batch.total:,}"

    @property
    def failed(self) -> str:
        return f"{self.batch.failed:,}"

    @property
    def model_failed(self) -> bool:
        """Whether it waits for a model that could not be loaded."""
        model, waits = self.batch.model, self.batch.status == Status.IN_PROGRESS
        return waits and model is not None and bool(model.load_error)

    @cached_property
    def standing(self) -> Standing | None:
        return standings.of(self.batch)

    @property
    def can_cancel(self) -> bool:
        return self.may_write and Status.CANCELLING in NEXT.get(self.batch.status, ())

    @property
    def ended_at(self) -> datetime | None:
        return getattr(self.batch, f"{self.batch.status}_at") if self.batch.is_finished else None

    @property
    def metadata(self) -> list[tuple[str, str]]:
        """The first pairs; templates must not look keys up in what a tenant sent."""
        return list((self.batch.metadata or {}).items())[:3]

    @property
    def files(self) -> list[tuple[str, File]]:
        """What there is to download, with its label."""
        made = [("Output", self.batch.output_file), ("Errors", self.batch.error_file)]
        return [(label, file) for label, file in made if file and file.deleted_at is None]


@require_safe
@page
def batch_list(request: PageRequest, caller: Caller) -> HttpResponseBase:
    caller.require("batches.read")
    form, after = _form(request, caller), _clean(request.GET.get("after", ""))
    found, older = queries.find_batches(form.wanted, form.text, after, PAGE_SIZE)
    rows = [Row(batch, caller.may("batches")) for batch in found]
    live = sum(not row.batch.is_finished for row in rows)
    given = {name: form.data[name] for name in form.fields if form.data.get(name)}
    ctx = {
        "form": form,
        "rows": rows,
        "older": older or "",
        "live": live,
        "after": after,
        "query": urlencode(given),
        "address": urlencode(given | ({"after": after} if after else {})),
        "filtered": bool(given),
        "searched": queries.SEARCHED,
    }
    if not rows and not given:
        ctx |= {"api_url": _api_url(request), "model": example_for(caller.organization)}
    if not request.htmx:
        status = 400 if form.errors else 200
        return render(request, "batches/batch_list.html", ctx, status=status)
    status = 200 if live else STOP_POLLING
    return render(request, "batches/batch_list.html#rows", ctx, status=status)


@require_POST
@page
def cancel_batch(request: PageRequest, caller: Caller, batch_id: str) -> HttpResponseBase:
    caller.require("batches")
    batch = access.get(caller, Batch, batch_id, param="batch_id")
    try:
        batches.cancel_batch(actor=caller, batch=batch)
    except BadRequest as error:  # it ended while the person was deciding
        messages.warning(request, error.message)
    else:
        messages.success(request, f"{batch.pk} is being cancelled; answered requests are kept.")
    if request.POST.get("back") == "batch":
        return redirect("batch_detail", batch.pk)
    return redirect("batch_list")


@require_POST
@page
def cancel_batches(request: PageRequest, caller: Caller) -> HttpResponseBase:
    """Asks first, saying how many and which; with `sure` cancels them."""
    caller.require("batches")
    chosen = _chosen(request)
    if not chosen:
        messages.warning(request, "Choose the batches to cancel first.")
        return redirect("batch_list")
    if "sure" not in request.POST:
        rows = [Row(batch, may_write=True) for batch in chosen]
        ctx = {
            "rows": [row for row in rows if row.can_cancel],
            "too_late": [row for row in rows if not row.can_cancel],
        }
        return render(request, "batches/cancel_batches.html", ctx)
    cancelled, too_late = batches.cancel_batches(actor=caller, batches=chosen)
    if cancelled:
        said = "1 batch is" if len(cancelled) == 1 else f"{len(cancelled)} batches are"
        messages.success(request, f"{said} being cancelled; answered requests are kept.")
    if too_late:
        ids = ", ".join(batch.pk for batch in too_late)
        messages.warning(request, f"It was too late to cancel {ids}.")
    return redirect("batch_list")


def _chosen(request: PageRequest) -> Sequence[Batch]:
    """The organization's batches that were ticked, a page of them at most."""
    ids = [_clean(id) for id in request.POST.getlist("batch")[:PAGE_SIZE]]
    found = Batch.objects.filter(pk__in=ids).select_related("input_file", "model")
    return list(found.order_by("-pk"))


def _form(request: PageRequest, caller: Caller) -> BatchFilterForm:
    """Always bound, so that what was understood of it is there even where some is wrong."""
    # Not as objects: there may be a thousand.
    people = Membership.objects.order_by("user__email").values_list(
        "user_id", "user__name", "user__email"
    )
    keys = ApiKey.objects.order_by("-pk").values_list("pk", "name", "prefix")[:MOST_KEYS]
    projects = Project.objects.order_by("name")
    form = BatchFilterForm(
        {name: _clean(str(value)) for name, value in request.GET.items()},
        models=lambda: [
            (str(id), name)
            for id, name in offered_to(caller.organization).values_list("pk", "name")
        ],
        projects=lambda: [(each.pk, each.name) for each in projects],
        users=lambda: [(str(id), name or email) for id, name, email in people],
        keys=lambda: [(id, f"{name} ({prefix})") for id, name, prefix in keys],
    )
    form.is_valid()
    return form


def _clean(text: str) -> str:
    """Without NULs, which PostgreSQL does not take."""
    return text.replace("\0", "")


def _api_url(request: PageRequest) -> str:
    """Where programs reach the API; in development the port may be any."""
    return f"{settings.BASE_URL}/v1" if settings.PRODUCTION else request.build_absolute_uri("/v1")
