"""The pages of batches: the list with its live progress, cancelling, and downloads.

What batches are and may do is in models and services; the API has the same in `api.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from django.conf import settings
from django.contrib import messages
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST, require_safe

from accounts import access
from accounts.access import Caller
from accounts.errors import BadRequest, Forbidden
from accounts.pages import PageRequest, page
from batches import downloads
from batches.models import Batch, File
from batches.models.batches import NEXT, Status
from batches.services import batches
from models_registry.queries import offered_to

PAGE_SIZE = 25
STOP_POLLING = 286
"""HTMX's own status: put the content in, but do not ask again."""

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
        model = self.batch.model
        return not self.batch.is_finished and model is not None and bool(model.load_error)

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
    rows, more = _rows(request.GET.get("after", ""), may_write=_may_write(caller))
    live = sum(not row.batch.is_finished for row in rows)
    ctx = {"rows": rows, "more": more, "live": live, "after": request.GET.get("after", "")}
    if not rows:
        ctx |= {"api_url": _api_url(request), "model": offered_to(caller.organization).first()}
    if not request.htmx:
        return render(request, "batches/batch_list.html", ctx)
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
    return redirect("home")


@require_safe
@page
def file_content(request: PageRequest, caller: Caller, file_id: str) -> HttpResponseBase:
    caller.require("files.read")
    file = access.get(caller, File, file_id, param="file_id", deleted_at=None)
    return downloads.serve_file(request, file)


def _rows(after: str, *, may_write: bool) -> tuple[list[Row], bool]:
    """One page, newest first, and whether there are older ones; ids sort by time."""
    mine = Batch.objects.select_related("model", "input_file", "output_file", "error_file")
    if after:
        mine = mine.filter(pk__lt=after.replace("\0", ""))
    found = list(mine.order_by("-pk")[: PAGE_SIZE + 1])
    return [Row(batch, may_write) for batch in found[:PAGE_SIZE]], len(found) > PAGE_SIZE


def _may_write(caller: Caller) -> bool:
    try:
        caller.require("batches")
    except Forbidden:
        return False
    return True


def _api_url(request: PageRequest) -> str:
    """Where programs reach the API; in development the port may be any."""
    return f"{settings.BASE_URL}/v1" if settings.PRODUCTION else request.build_absolute_uri("/v1")
