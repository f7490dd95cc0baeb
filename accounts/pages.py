"""The door of pages: who gets in, and how a page says what a service refused.

The API's doors are in `authentication.py` and in portal's error envelope.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec
from urllib.parse import urlsplit

from django.contrib.auth.views import redirect_to_login
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.shortcuts import render
from django.utils.cache import add_never_cache_headers
from django_htmx.http import HttpResponseClientRedirect, HttpResponseClientRefresh
from django_htmx.middleware import HtmxDetails

from accounts.access import Caller
from accounts.errors import ApiError
from accounts.models import User

P = ParamSpec("P")


class PageRequest(HttpRequest):
    """A request as the middleware leaves it for a view; only for annotations."""

    caller: Caller | None
    htmx: HtmxDetails


def page(
    view: Callable[Concatenate[PageRequest, Caller, P], HttpResponseBase],
) -> Callable[Concatenate[PageRequest, P], HttpResponseBase]:
    """Let members of an organization in, hand the view its caller, turn `ApiError` into a page.

    Nothing behind this door is kept by a cache: not after signing out, and not a fragment that
    HTMX fetched from the same address as the page.
    """

    @wraps(view)
    def door(request: PageRequest, /, *args: P.args, **kwargs: P.kwargs) -> HttpResponseBase:
        response = _answer(view, request, *args, **kwargs)
        add_never_cache_headers(response)
        return response

    return door


def _answer(
    view: Callable[Concatenate[PageRequest, Caller, P], HttpResponseBase],
    request: PageRequest,
    *args: P.args,
    **kwargs: P.kwargs,
) -> HttpResponseBase:
    if not isinstance(request.user, User):
        return _to_sign_in(request)
    if request.caller is None:
        return _without_organization(request)
    try:
        return view(request, request.caller, *args, **kwargs)
    except ApiError as error:
        return error_page(request, error)


def error_page(request: HttpRequest, error: ApiError) -> HttpResponse:
    """What a service refused, in the layout, with the error's own status."""
    template = f"{error.status}.html" if error.status in (403, 404) else "error.html"
    return render(request, template, {"message": error.message}, status=error.status)


def _to_sign_in(request: PageRequest) -> HttpResponseBase:
    """Sign in, then come back; HTMX would put the sign-in page into a part of this one."""
    if not request.htmx:
        return redirect_to_login(request.get_full_path())
    there = urlsplit(request.htmx.current_url_abs_path or "/")
    back = f"{there.path}?{there.query}" if there.query else there.path
    return HttpResponseClientRedirect(redirect_to_login(back)["Location"])


def _without_organization(request: PageRequest) -> HttpResponse:
    if request.htmx:
        return HttpResponseClientRefresh()
    return render(request, "accounts/no_organization.html", status=403)
