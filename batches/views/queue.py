"""The queue as platform operators see it, across tenants, and what they do to batches in it.

Each action asks first on a page of its own that lists what it will touch; what can be undone is kept
in the operator's session for a while.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import Any
from urllib.parse import quote

from django import forms
from django.contrib import messages
from django.http import Http404, HttpResponseRedirect, QueryDict
from django.http.response import HttpResponseBase
from django.shortcuts import render
from django.urls import reverse
from django.views.decorators.http import require_http_methods, require_POST, require_safe
from django_scopes import scopes_disabled

from accounts.models import Organization, User
from accounts.pages import PageRequest, operator_page, sent
from accounts.services import audit
from batches import standings
from batches.forms.queue import (
    DeadlineForm,
    NoFieldsForm,
    NoteForm,
    PriorityForm,
    QueueForm,
    RejectForm,
)
from batches.models.batches import Status
from batches.queries import operators as queries
from batches.services import queue
from batches.standings import Standing
from models_registry.models import Model

PAGE_SIZE = 20
UNDO_SECONDS = 600


@dataclass(frozen=True)
class Action:
    """What can be done to batches of the queue, in words and as the service that does it."""

    label: str
    icon: str
    effect: str
    """What it will do, for whoever confirms it."""
    done: str
    """What it did, after how many batches."""
    do: Callable[..., queue.Done]
    form: type[forms.Form] = NoFieldsForm
    final: bool = False
    """Whether it cannot be undone."""


ACTIONS: Mapping[str, Action] = {
    "hold": Action(
        "Hold",
        "player-pause",
        "None of it is begun until it is released. What runs is given back within a few seconds; "
        "what has been answered is kept. The deadline runs on: a batch that is still held then ends "
        "as expired.",
        "held",
        queue.hold,
        NoteForm,
    ),
    "release": Action(
        "Release", "player-play", "It may run again, in its turn.", "released", queue.release
    ),
    "front": Action(
        "Move to front",
        "player-skip-forward",
        "It runs before all other batches of its model, whatever their priority and deadline, but "
        "for those that have waited too long already. A worker is brought to its model soon.",
        "moved to the front",
        queue.move_to_front,
    ),
    "priority": Action(
        "Change priority",
        "arrows-sort",
        "Its turn comes sooner or later than before. What runs already goes on.",
        "given another priority",
        queue.set_priority,
        PriorityForm,
    ),
    "deadline": Action(
        "Change deadline",
        "clock",
        "Its window ends at another time. What is not answered by then ends as expired.",
        "given another deadline",
        queue.set_deadline,
        DeadlineForm,
    ),
    "approve": Action("Approve", "check", "It may run, in its turn.", "approved", queue.approve),
    "reject": Action(
        "Reject",
        "x",
        "It is cancelled for good, with none of its requests run. Its organization reads why.",
        "rejected",
        queue.reject,
        RejectForm,
        final=True,
    ),
    "cancel": Action(
        "Cancel",
        "ban",
        "It stops for good. What has been answered so far is kept in its output file.",
        "cancelled",
        queue.cancel,
        final=True,
    ),
}


@dataclass(frozen=True)
class Row:
    """A batch as a line of the queue."""

    batch: Any
    """With what `queries.queue_rows` adds."""
    standing: Standing | None

    @property
    def reason(self) -> str:
        if self.batch.is_held:
            return str(self.batch.held_reason)
        return self.standing.reason if self.standing else "not looked at yet"

    @property
    def state(self) -> tuple[str, str]:
        """A colour and a word."""
        if self.batch.is_held:
            waits = self.batch.held_why == "moderation"
            return ("purple", "Waits for approval") if waits else ("orange", "Held")
        if self.batch.status == Status.VALIDATING:
            return "azure", "Validating"
        return ("blue", "Running") if self.batch.chunks_running else ("secondary", "Waiting")

    @property
    def actions(self) -> list[tuple[str, Action]]:
        """What makes sense for it, the likeliest first."""
        if self.batch.held_why == "moderation":
            first = ["approve", "reject"]
        else:
            first = ["release" if self.batch.is_held else "hold", "cancel"]
        return [(name, ACTIONS[name]) for name in (*first, "front", "priority", "deadline")]


@require_safe
@operator_page
def operator_queue(request: PageRequest, user: User) -> HttpResponseBase:
    form = QueueForm(request.GET)
    form.is_valid()
    wanted = form.wanted
    with scopes_disabled():
        rows, total, number = _rows(wanted, _page_number(request))
        models = list(Model.objects.order_by("name").values_list("name", flat=True))
    if wanted.get("organization") and not request.htmx:
        _record_look(request, user, wanted["organization"])
    query = QueryDict(mutable=True)
    query.update(wanted)
    ctx = {
        "rows": rows,
        "total": total,
        "form": form,
        "filtered": bool(wanted),
        "models": models,
        "page": number,
        "previous": number - 1 if number > 1 else None,
        "next": number + 1 if number * PAGE_SIZE < total else None,
        "query": query.urlencode(),
        "back": quote(query.urlencode(), safe=""),
        "actions": ACTIONS.items(),
        "undo": _undo_of(request),
    }
    template = "batches/queue_operator.html"
    return render(request, f"{template}#rows" if request.htmx else template, ctx)


def _page_number(request: PageRequest) -> int:
    given = request.GET.get("page", "")
    return int(given) if given.isascii() and given.isdigit() and len(given) < 10 else 1


def _rows(wanted: Mapping[str, str], number: int) -> tuple[list[Row], int, int]:
    """One page in the order in which batches will run, how many there are of all, and which page it
    is: the last one where the queue has become shorter than was asked for."""
    known = standings.everywhere()
    found = queries.queued(**wanted).order_by("pk").values_list("pk", flat=True)
    ids = sorted(found[: queries.QUEUED_MOST], key=lambda id: _turn(id, known.get(id)))
    number = max(1, min(number, ceil(len(ids) / PAGE_SIZE)))
    shown = ids[(number - 1) * PAGE_SIZE : number * PAGE_SIZE]
    rows = [Row(batch, known.get(batch.pk)) for batch in queries.queue_rows(shown)]
    return rows, len(ids), number


def _turn(id: str, standing: Standing | None) -> tuple[bool, float, float, str]:
    """What runs, then by when it will, then those of which that cannot be said, by place and age."""
    if standing is None:
        return True, inf, inf, id
    start = standing.estimated_start_at
    return standing.position != 0, inf if start is None else start, standing.position, id


def _record_look(request: PageRequest, user: User, named: str) -> None:
    """A queue that is filtered down to one organization is a look at it."""
    found = Organization.objects.filter(slug=named).first()
    if found is not None:
        label = request.get_full_path()
        audit.record("operator.looked", actor=user, organization=found, label=label)


# --- Doing something --------------------------------------------------------------------------


@require_http_methods(["GET", "HEAD", "POST"])
@operator_page
def operator_queue_change(request: PageRequest, user: User) -> HttpResponseBase:
    """Ask whether, saying what will be touched; then do it."""
    given = request.POST if request.method == "POST" else request.GET
    action = ACTIONS.get(given.get("action", ""))
    if action is None:
        raise Http404
    ids = [id for id in given.getlist("batch") if "\0" not in id][: queue.MOST]
    back = QueryDict(given.get("back", ""))
    form = action.form(sent(request))
    with scopes_disabled():
        batches = queries.queue_rows(list(dict.fromkeys(ids)))
    if not batches:
        messages.warning(request, "No batch was chosen: tick some of them first.")
        return _to_queue(back)
    if form.is_valid():
        return _do(request, user, action, [batch.pk for batch in batches], form.cleaned_data, back)
    ctx = {
        "action": action,
        "name": given["action"],
        "rows": [Row(batch, None) for batch in batches],
        "organizations": len({batch.organization_id for batch in batches}),
        "tokens": sum(batch.tokens_left or 0 for batch in batches),
        "chunks": sum(batch.chunks_running for batch in batches),
        "form": form,
        "back": back.urlencode(),
    }
    status = 400 if form.errors else 200
    return render(request, "batches/queue_change.html", ctx, status=status)


def _do(
    request: PageRequest,
    user: User,
    action: Action,
    ids: Sequence[str],
    fields: Mapping[str, Any],
    back: QueryDict,
) -> HttpResponseRedirect:
    done = action.do(actor=user, ids=ids, **fields)
    _tell(request, done, action.done, undoable=not action.final)
    return _to_queue(back)


@require_POST
@operator_page
def operator_queue_undo(request: PageRequest, user: User) -> HttpResponseBase:
    kept = _undo_of(request)
    if kept is None or kept["id"] != request.POST.get("id"):
        messages.warning(request, "There is nothing to undo any more.")
        return _to_queue(QueryDict())
    del request.session["queue_undo"]
    done = queue.undo(actor=user, before=[queue.from_kept(each) for each in kept["before"]])
    _tell(request, done, "as before", undoable=False)
    return _to_queue(QueryDict())


def _tell(request: PageRequest, done: queue.Done, verb: str, *, undoable: bool) -> None:
    request.session.pop("queue_undo", None)
    many = len(done.changed)
    said = f"{many} batch is {verb}." if many == 1 else f"{many} batches are {verb}."
    if many and undoable:
        request.session["queue_undo"] = {
            "id": secrets.token_hex(8),
            "said": said,
            "until": time.time() + UNDO_SECONDS,
            "before": [queue.as_kept(each) for each in done.changed],
        }
    elif many or not done.skipped:
        messages.success(request, said if many else "Nothing had to be changed.")
    for why in done.skipped[:5]:
        messages.warning(request, f"Left as it is: {why}.")
    if len(done.skipped) > 5:
        messages.warning(request, f"And {len(done.skipped) - 5} more were left as they are.")


def _undo_of(request: PageRequest) -> dict[str, Any] | None:
    kept: dict[str, Any] | None = request.session.get("queue_undo")
    return kept if kept and kept["until"] > time.time() else None


def _to_queue(back: QueryDict) -> HttpResponseRedirect:
    query = back.urlencode()
    return HttpResponseRedirect(reverse("operator_queue") + (f"?{query}" if query else ""))
