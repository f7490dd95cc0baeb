"""The pages that make a batch: a file, or a table and how its rows become requests; what the check
found in it; how to run it.

What is checked and made is in services; the API makes batches in `api.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import orjson
from django.conf import settings
from django.contrib import messages
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_http_methods, require_POST
from django_htmx.http import HttpResponseClientRefresh

from accounts import access, throttling
from accounts.access import Caller
from accounts.errors import ApiError, BadRequest
from accounts.pages import PageRequest, page, sent
from batches import projects, standings, tables
from batches.forms.create import BatchForm, RecipeForm, recipe_to_begin_with
from batches.forms.files import UploadForm
from batches.models import File, FileCheck
from batches.models.batches import Priority
from batches.models.files import Purpose
from batches.queries import files as queries
from batches.services import batches, checks, conversions
from batches.standings import Standing
from batches.views.uploading import by_script, kept, refused, sent_on, takes_a_file
from models_registry.queries import offered_to, prices_of

RECENT = 20
TABLES_STAY = 7 * 24 * 3600
"""Seconds that a table stays which was sent here: what counts is what is made of it."""
ACCEPTED = ".jsonl,.csv,.tsv,.parquet"
_FIELDS = {"output_expires_after.seconds": "output_days"}
"""The form's names of what the service calls otherwise."""


# --- A file ---------------------------------------------------------------------------------


@require_http_methods(["GET", "HEAD", "POST"])
@takes_a_file
def batch_new(request: PageRequest, caller: Caller) -> HttpResponseBase:
    caller.require("batches")
    options: Any = {
        "accept": ACCEPTED,
        "purposes": False,
        "projects": projects.open_projects(caller),
    }
    if request.method != "POST":
        return _start(request, caller, UploadForm(**options))
    form = UploadForm(request.POST, request.FILES, **options)
    try:
        return sent_on(request, _next(caller, _file(request, caller)))
    except ApiError as error:
        if by_script(request):
            return refused(error)
        form.full_clean()
        form.errors.clear()  # the service says it in its own words
        form.add_error(error.param if error.param in form.fields else "file", error.message)
        return _start(request, caller, form, error.status)


def _start(
    request: PageRequest, caller: Caller, form: UploadForm, status: int = 200
) -> HttpResponseBase:
    ctx = {
        "form": form,
        "recent": queries.recent_inputs(RECENT),
        "limit": settings.MAX_FILE_BYTES,
        "batch_limit": settings.MAX_BATCH_FILE_BYTES,
        "requests_limit": settings.MAX_BATCH_REQUESTS,
    }
    return render(request, "batches/batch_new.html", ctx, status=status)


def _file(request: PageRequest, caller: Caller) -> File:
    """The file that was chosen, or the one that was sent."""
    if id := request.POST.get("file_id"):
        return access.get(caller, File, id, param="file_id", deleted_at=None)
    sent = request.FILES.get("file")
    name = (sent.name if sent is not None and not isinstance(sent, list) else "") or ""
    if tables.is_table(name):
        return kept(request, caller, Purpose.USER_DATA, expires_after_seconds=TABLES_STAY)
    if name and not name.endswith(".jsonl"):
        raise BadRequest(
            "A batch is made of a .jsonl file, or of a table: .csv, .tsv or .parquet.",
            param="file",
            code="invalid_file_format",
        )
    return kept(request, caller, Purpose.BATCH)


def _next(caller: Caller, file: File) -> str:
    """A table needs a prompt first; an input is checked."""
    if file.purpose != Purpose.BATCH and tables.is_table(file.filename):
        return reverse("batch_table", args=[file.pk])
    checks.begin_check(actor=caller, file=file)
    return reverse("batch_create", args=[file.pk])


# --- A table --------------------------------------------------------------------------------


@require_http_methods(["GET", "HEAD", "POST"])
@page
def batch_table(request: PageRequest, caller: Caller, file_id: str) -> HttpResponseBase:
    caller.require("batches")
    related = ("project",)
    file = access.get(caller, File, file_id, param="file_id", related=related, deleted_at=None)
    if not tables.is_table(file.filename):
        return redirect("batch_create", file.pk)
    models = list(offered_to(caller.organization))
    ctx: dict[str, Any] = {"file": file, "models": models}
    try:
        columns = conversions.columns_of(file)
    except BadRequest as error:
        ctx["error"] = error.message
        return render(request, "batches/batch_table.html", ctx, status=400)
    form = RecipeForm(
        sent(request),
        models=models,
        columns=columns,
        initial=recipe_to_begin_with(columns, models),
    )
    ctx |= {"form": form, "columns": columns}
    if form.is_valid():
        try:
            if "make" in request.POST:
                caller.require("files")
                throttling.count(request, caller, "files")
                actor = projects.within(caller, file.project)
                made = conversions.convert(actor=actor, file=file, recipe=form.recipe)
                return redirect(_next(caller, made))
            ctx["lines"] = [_pretty(line) for line in conversions.first_lines(file, form.recipe)]
        except ApiError as error:
            form.add_error(error.param if error.param in form.fields else None, error.message)
    status = 400 if form.errors else 200
    return render(request, "batches/batch_table.html", ctx, status=status)


def _pretty(line: bytes) -> str:
    text = orjson.dumps(orjson.loads(line), option=orjson.OPT_INDENT_2).decode()
    return text if len(text) <= 4000 else f"{text[:4000]}…"


# --- The check, and the batch ------------------------------------------------------------------


@dataclass(frozen=True)
class Outlook:
    """When a batch of one priority would be done."""

    label: str
    standing: Standing


@require_http_methods(["GET", "HEAD", "POST"])
@page
def batch_create(request: PageRequest, caller: Caller, file_id: str) -> HttpResponseBase:
    caller.require("batches")
    related = ("checked", "checked__model")
    file = access.get(
        caller, File, file_id, param="file_id", related=related, deleted_at=None, purpose="batch"
    )
    check: FileCheck | None = getattr(file, "checked", None)
    if request.htmx and request.method != "POST":
        return _progress(request, file, check)
    usual = queries.retention_of(caller.organization).output_days
    form = BatchForm(
        sent(request),
        usual_days=usual,
        projects=projects.open_projects(caller),
        project=file.project_id,
    )
    status = 400 if form.errors else 200
    if form.is_valid():
        try:
            return _made(request, caller, check, form)
        except ApiError as error:
            tell(form, error)
            status = error.status
    ctx = {"file": file, "check": check, "form": form, **_found(caller, check)}
    return render(request, "batches/batch_create.html", ctx, status=status)


@require_POST
@page
def batch_check(request: PageRequest, caller: Caller, file_id: str) -> HttpResponseBase:
    """Check it again, as after a model was offered."""
    caller.require("batches")
    file = access.get(caller, File, file_id, param="file_id", deleted_at=None)
    checks.begin_check(actor=caller, file=file)
    return redirect("batch_create", file.pk)


def _progress(request: PageRequest, file: File, check: FileCheck | None) -> HttpResponseBase:
    if check is None or check.is_done:
        return HttpResponseClientRefresh()
    return render(request, "batches/batch_create.html#progress", {"file": file, "check": check})


def _made(
    request: PageRequest, caller: Caller, check: FileCheck | None, form: BatchForm
) -> HttpResponseBase:
    if check is None or not check.is_good:
        raise BadRequest("The file has to pass its check first.")
    given = form.cleaned_data
    days = given["output_days"]
    throttling.count(request, caller, "batches")
    batch = batches.create_batch(
        actor=projects.chosen(caller, request.POST.get("project", "")),
        input_file_id=check.pk,
        endpoint=check.endpoint,
        completion_window=given["completion_window"],
        metadata=given["metadata"],
        priority=given["priority"],
        output_expires_after_seconds=days and days * 86_400,
    )
    messages.success(request, f"{batch.pk} is made: it begins as soon as its turn comes.")
    return redirect("batch_detail", batch.pk)


def tell(form: BatchForm, error: ApiError) -> None:
    """Say what the service refused beside the field that it is about."""
    name = _FIELDS.get(error.param or "", error.param or "")
    form.add_error(name if name in form.fields else None, error.message)


def _found(caller: Caller, check: FileCheck | None) -> Mapping[str, Any]:
    """What the check says about the batch: what it would cost, and when it would be done."""
    if check is None or not check.is_done:
        return {}
    rest = check.bad_lines - len(check.errors)
    found: dict[str, Any] = {"rest": f"{rest:,}" if rest > 0 else ""}
    if not check.is_good or check.model is None:
        return found
    tokens = check.input_tokens + check.output_tokens
    prices = prices_of(check.model)
    cost = prices.cost(input=check.input_tokens, cached=0, output=check.output_tokens)
    outlook = standings.forecasts(
        caller.organization,
        check.model,
        requests=check.requests,
        tokens=tokens,
        window=timedelta(hours=24),
    )
    found["outlooks"] = [
        Outlook(each.label, outlook[each])
        for each in (Priority.HIGH, Priority.NORMAL, Priority.LOW)
        if each in outlook
    ]
    found["cost"] = f"{cost:,.4f} {settings.CURRENCY.upper()}" if cost else ""
    return found
