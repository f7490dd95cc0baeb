"""The pages of files: the list with its upload, one file with its first lines, downloads.

What files are and may do is in models and services; the API has the same in `api.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlencode

from django.conf import settings
from django.contrib import messages
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils import timezone
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from accounts import access
from accounts.access import Caller
from accounts.errors import ApiError, BadRequest
from accounts.forms.last_day import end_of
from accounts.pages import PageRequest, is_typed, page, sent
from accounts.paging import page_of
from batches import downloads, previews
from batches.forms.files import ExpiryForm, FilterForm, UploadForm
from batches.models import Batch, File, FileCheck
from batches.models.batches import UNFINISHED
from batches.models.files import Purpose
from batches.projects import open_projects
from batches.queries import files as queries
from batches.services import files
from batches.tables import is_table
from batches.views.uploading import by_script, kept, refused, sent_on, takes_a_file

PAGE_SIZE = 25
USES_SHOWN = 10
SOON = timedelta(days=1)


@dataclass(frozen=True)
class Row:
    """A file as a line of the list."""

    file: File

    @property
    def checked(self) -> FileCheck | None:
        return getattr(self.file, "checked", None)

    @property
    def lines(self) -> str:
        return "–" if self.file.lines is None else f"{self.file.lines:,}"

    @property
    def reading(self) -> int:
        """How many unfinished batches read it."""
        return getattr(self.file, "reading", None) or 0

    @property
    def status(self) -> tuple[str, str]:
        """A colour and a word."""
        if self.reading:
            return "blue", f"In use by {self.reading:,}"
        if self.file.expires_at and self.file.expires_at < timezone.now() + SOON:
            return "orange", "Expires soon"
        check = self.checked
        if check is not None and check.is_done and check.bad_lines:
            return "red", "Bad lines"
        return "green", "Ready"

    @property
    def may_be_input(self) -> bool:
        return self.file.purpose == Purpose.BATCH or is_table(self.file.filename)


@require_http_methods(["GET", "HEAD", "POST"])
@takes_a_file
def file_list(request: PageRequest, caller: Caller) -> HttpResponseBase:
    if request.method != "POST":
        return _list(request, caller, UploadForm(projects=open_projects(caller)))
    form = UploadForm(request.POST, request.FILES, projects=open_projects(caller))
    try:
        file = kept(request, caller, request.POST.get("purpose", Purpose.BATCH))
    except ApiError as error:
        if by_script(request):
            return refused(error)
        form.full_clean()
        form.errors.pop("project", None)  # the service says so in its own words
        form.add_error(error.param if error.param in form.fields else "file", error.message)
        return _list(request, caller, form, status=error.status)
    messages.success(request, f"{file.filename} is here.")
    return sent_on(request, reverse("file", args=[file.pk]))


def _list(
    request: PageRequest, caller: Caller, form: UploadForm, status: int = 200
) -> HttpResponseBase:
    caller.require("files.read")
    filters = FilterForm(request.GET)
    asked = (
        {name: value for name, value in filters.cleaned_data.items() if value}
        if (filters.is_valid())
        else {}
    )
    after = request.GET.get("after", "").replace("\0", "")
    mine = queries.files_like(asked.get("purpose", ""), asked.get("q", ""))
    found, more = page_of(mine, after, PAGE_SIZE, descending=True)
    ctx = {
        "rows": [Row(file) for file in found],
        "filters": filters,
        "filtered": bool(asked),
        "query": urlencode(asked),
        "after": after,
        "last": found[-1].pk if more else "",
        "form": form,
        "limit": settings.MAX_FILE_BYTES,
        "batch_limit": settings.MAX_BATCH_FILE_BYTES,
    }
    return render(request, "batches/file_list.html", ctx, status=status)


@require_safe
@page
def file_page(request: PageRequest, caller: Caller, file_id: str) -> HttpResponseBase:
    caller.require("files.read")
    return _shown(request, caller, _own(caller, file_id))


@require_POST
@page
def file_expiry(request: PageRequest, caller: Caller, file_id: str) -> HttpResponseBase:
    caller.require("files")
    file = _own(caller, file_id)
    form = ExpiryForm(sent(request))
    if form.is_valid():
        try:
            file = files.set_expiry(
                actor=caller,
                file=file,
                expires_at=end_of(form.cleaned_data["expires_on"], file.expires_at),
            )
        except BadRequest as error:
            form.add_error("expires_on", error.message)
        else:
            said = "has its last day" if file.expires_at else "stays until somebody deletes it"
            messages.success(request, f"{file.filename} {said}.")
            return redirect("file", file.pk)
    return _shown(request, caller, file, form)


@require_POST
@page
def file_delete(request: PageRequest, caller: Caller, file_id: str) -> HttpResponseBase:
    caller.require("files")
    file = _own(caller, file_id)
    if not is_typed(request, file.filename, done="deleted"):
        return redirect("file", file.pk)
    files.delete_file(actor=caller, file=file)
    messages.success(request, f"{file.filename} is deleted.")
    return redirect("file_list")


@require_safe
@page
def file_content(request: PageRequest, caller: Caller, file_id: str) -> HttpResponseBase:
    caller.require("files.read")
    file = access.get(caller, File, file_id, param="file_id", deleted_at=None)
    return downloads.serve_file(request, file)


def _own(caller: Caller, file_id: str) -> File:
    related = ("checked", "user", "api_key", "project")
    return access.get(caller, File, file_id, param="file_id", related=related, deleted_at=None)


def _shown(
    request: PageRequest, caller: Caller, file: File, form: ExpiryForm | None = None
) -> HttpResponseBase:
    day = file.expires_at and file.expires_at.date()
    using = queries.batches_using(file) if caller.may("batches.read") else None
    uses = list(using[: USES_SHOWN + 1]) if using is not None else []
    ctx = {
        "row": Row(file),
        "file": file,
        "form": form or ExpiryForm(initial={"expires_on": day}),
        "preview": previews.of(file),
        "uses": uses[:USES_SHOWN],
        "more_uses": len(uses) > USES_SHOWN,
        "delete_text": _what_deleting_does(file, uses),
    }
    status = 400 if form is not None and form.errors else 200
    return render(request, "batches/file.html", ctx, status=status)


def _what_deleting_does(file: File, uses: list[Batch]) -> str:
    """Which batches use it, in words; at most so many are looked at."""
    said = "It cannot be had back."
    if not uses:
        return f"No batch uses it. {said}"
    many = f"More than {USES_SHOWN}" if len(uses) > USES_SHOWN else str(len(uses))
    noun = "batch uses it" if len(uses) == 1 else "batches use it"
    running = [each for each in uses if each.status in UNFINISHED and each.input_file_id == file.pk]
    ending = " Those that still run read it to their end." if running else ""
    return f"{many} {noun}: {', '.join(each.pk for each in uses[:3])}.{ending} {said}"
