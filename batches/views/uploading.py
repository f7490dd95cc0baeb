"""The door of pages that take a file: its body is read only once it is known whose it is, and that
it is not too large.

Django looks for a form's token in its body before any view runs, so here the order is our own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Concatenate, ParamSpec

from django.conf import settings
from django.http import HttpResponse, JsonResponse
from django.http.response import HttpResponseBase
from django.shortcuts import redirect
from django.views.decorators.csrf import csrf_exempt, csrf_protect

from accounts import throttling
from accounts.access import Caller
from accounts.errors import ApiError, BadRequest
from accounts.pages import PageRequest, file_page, require_own_page
from batches import multipart, projects
from batches.models import File
from batches.services import files

P = ParamSpec("P")
View = Callable[Concatenate[PageRequest, Caller, P], HttpResponseBase]
FORM_BYTES = 64 * 1024
"""What a form's boundaries and other fields may take beside the file."""


def takes_a_file(view: View[P]) -> Callable[Concatenate[PageRequest, P], HttpResponseBase]:
    """A page like others, to which a file may be sent by who may keep files."""

    @csrf_protect
    def reading(
        request: PageRequest, caller: Caller, /, *args: P.args, **kwargs: P.kwargs
    ) -> HttpResponseBase:
        if request.method == "POST":
            require_own_page(request, caller)
        return view(request, caller, *args, **kwargs)

    def guarded(
        request: PageRequest, caller: Caller, /, *args: P.args, **kwargs: P.kwargs
    ) -> HttpResponseBase:
        if request.method != "POST":
            return reading(request, caller, *args, **kwargs)
        try:
            caller.require("files")
            if request.content_type == "multipart/form-data":
                throttling.count(request, caller, "files")
            if request.META.get("CONTENT_LENGTH"):  # else Django reads nothing
                multipart.require_length(request, settings.MAX_FILE_BYTES + FORM_BYTES)
            return reading(request, caller, *args, **kwargs)
        except ApiError as error:
            if not by_script(request):
                raise
            return refused(error)

    update_wrapper(guarded, view)
    return csrf_exempt(file_page(guarded))


def by_script(request: PageRequest) -> bool:
    """Whether `upload.js` asks, to which a refusal is told in JSON."""
    return request.headers.get("Accept") == "application/json"


def kept(request: PageRequest, caller: Caller, purpose: str, **options: int | None) -> File:
    """Keep the form's file, in the chosen project; raises what the API would answer."""
    multipart.require_whole(request)
    multipart.require_single(request)
    actor = projects.chosen(caller, request.POST.get("project", ""))
    content = request.FILES.get("file")
    if content is None or isinstance(content, list):
        raise BadRequest("Choose a file.", param="file", code="missing_required_parameter")
    name = content.name or ""
    return files.create_file(
        actor=actor, content=content, filename=name, purpose=str(purpose), **options
    )


def sent_on(request: PageRequest, url: str) -> HttpResponse:
    """Where the person goes next, in the way that they came."""
    return JsonResponse({"url": url}) if by_script(request) else redirect(url)


def refused(error: ApiError) -> HttpResponse:
    return JsonResponse({"error": error.message}, status=error.status)
