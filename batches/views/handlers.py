"""The pages of result handlers, and of how they went with a batch."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.db.models import Q
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from accounts import access
from accounts.access import Caller
from accounts.errors import ApiError, BadRequest
from accounts.models import Project
from accounts.pages import STOP_POLLING, PageRequest, page, sent
from batches.handler_forms import BEFORE, HandlerForm
from batches.handlers import registry
from batches.models import Batch, HandlerRun, ResultHandler
from batches.queries import handlers as queries
from batches.services import handler_runs, handlers


@require_safe
@page
def result_handlers(request: PageRequest, caller: Caller) -> HttpResponseBase:
    caller.require("webhooks.read")
    ctx = {"rows": queries.result_handlers(), "kinds": registry.kinds()}
    return render(request, "batches/handlers.html", ctx)


@require_http_methods(["GET", "HEAD", "POST"])
@page
def handler_create(request: PageRequest, caller: Caller, kind: str) -> HttpResponseBase:
    caller.require("webhooks")
    initial = {"name": kind, "by_default": True, "enabled": True}
    form = _form(request, kind, initial | {"project": caller.project.pk})
    if form.is_valid() and _created(caller, form, kind):
        messages.success(request, f"{form.cleaned_data['name']} has the results from now on.")
        return redirect("result_handlers")
    return _shown(request, form, kind)


@require_http_methods(["GET", "HEAD", "POST"])
@page
def handler_change(request: PageRequest, caller: Caller, handler_id: str) -> HttpResponseBase:
    caller.require("webhooks")
    row = _handler(caller, handler_id)
    fields = ("name", "by_default", "enabled")
    initial = {name: getattr(row, name) for name in fields} | {"project": row.project_id}
    initial |= {BEFORE + name: value for name, value in row.settings.items()}
    form = _form(request, row.kind, initial, handlers.secrets_set(row))
    if form.is_valid() and _changed(caller, form, row):
        messages.success(request, f"{form.cleaned_data['name']} is saved.")
        return redirect("result_handlers")
    return _shown(request, form, row.kind, row)


@require_POST
@page
def handler_delete(request: PageRequest, caller: Caller, handler_id: str) -> HttpResponseBase:
    row = _handler(caller, handler_id)
    handlers.delete_handler(actor=caller, row=row)
    messages.success(request, f"{row.name} is deleted, and gets no more results.")
    return redirect("result_handlers")


@require_POST
@page
def handler_move(request: PageRequest, caller: Caller, handler_id: str) -> HttpResponseBase:
    """One place up; that is enough for any order."""
    row = _handler(caller, handler_id)
    handlers.update_handler(actor=caller, row=row, position=row.position - 1)
    return redirect("result_handlers")


@require_safe
@page
def batch_handler_runs(request: PageRequest, caller: Caller, batch_id: str) -> HttpResponseBase:
    caller.require("webhooks.read")
    batch = access.get(caller, Batch, batch_id, param="batch_id")
    ctx = {"batch": batch, **runs_of(batch)}
    if not request.htmx:
        return render(request, "batches/handler_runs.html", ctx)
    status = 200 if ctx["live"] else STOP_POLLING
    return render(request, "batches/_handler_runs.html", ctx, status=status)


def runs_of(batch: Batch) -> dict[str, Any]:
    """What `_handler_runs.html` needs: the runs, and whether they may change by themselves."""
    runs = queries.handler_runs(batch)
    return {"runs": runs, "live": not batch.is_finished or any(not run.is_over for run in runs)}


@require_POST
@page
def handler_run_retry(
    request: PageRequest, caller: Caller, batch_id: str, run_id: str
) -> HttpResponseBase:
    caller.require("webhooks")
    batch = access.get(caller, Batch, batch_id, param="batch_id")
    run = access.get(caller, HandlerRun, run_id, param="run_id", batch=batch)
    try:
        run = handler_runs.retry_run(actor=caller, run=run)
    except BadRequest as error:  # it began while the person was deciding
        messages.warning(request, error.message)
    else:
        messages.success(request, f"{run.handler.name} is run again.")
    return redirect("batch_handler_runs", batch_id)


def _handler(caller: Caller, handler_id: str) -> ResultHandler:
    return access.get(caller, ResultHandler, handler_id, param="handler_id", related=("project",))


def _form(request: PageRequest, kind: str, initial: Any, kept: Any = ()) -> HandlerForm:
    # Also an archived one, where the handler is its: else saving would give it all projects.
    choices = Q(archived_at=None) | Q(pk=initial["project"])
    projects = Project.objects.filter(choices).order_by("pk")
    schema = handlers.kind_of(kind).settings_schema
    return HandlerForm(sent(request), schema=schema, projects=projects, kept=kept, initial=initial)


def _created(caller: Caller, form: HandlerForm, kind: str) -> bool:
    try:
        handlers.create_handler(actor=caller, kind=kind, **_fields(caller, form))
    except ApiError as error:
        _tell(form, error)
        return False
    return True


def _changed(caller: Caller, form: HandlerForm, row: ResultHandler) -> bool:
    try:
        handlers.update_handler(actor=caller, row=row, **_fields(caller, form))
    except ApiError as error:
        _tell(form, error)
        return False
    return True


def _fields(caller: Caller, form: HandlerForm) -> dict[str, Any]:
    chosen = form.cleaned_data["project"]
    project = access.get(caller, Project, chosen, param="project") if chosen else None
    own = {name: form.cleaned_data[name] for name in ("name", "by_default", "enabled")}
    return own | {"project": project, "settings": form.given}


def _tell(form: HandlerForm, error: ApiError) -> None:
    """Say what a service refused beside the field that it is about."""
    param = (error.param or "").split(".")
    name = BEFORE + param[1] if param[0] == "settings" and len(param) > 1 else param[0]
    form.add_error(name if name in form.fields else None, error.message)


def _shown(
    request: PageRequest, form: HandlerForm, kind: str, row: ResultHandler | None = None
) -> HttpResponseBase:
    ctx = {"form": form, "kind": handlers.kind_of(kind), "row": row}
    status = 400 if form.errors else 200
    return render(request, "batches/handler.html", ctx, status=status)
