"""The door of pages: who gets in, and how a page says what a service refused.

The API's doors are in `authentication.py` and in portal's error envelope.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar
from urllib.parse import urlsplit

from django.contrib import messages
from django.contrib.auth.views import redirect_to_login
from django.forms import Form
from django.http import Http404, HttpRequest, HttpResponse, QueryDict
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.utils.cache import add_never_cache_headers
from django_htmx.http import HttpResponseClientRedirect, HttpResponseClientRefresh
from django_htmx.middleware import HtmxDetails

from accounts import second_factor
from accounts.access import Caller
from accounts.errors import ApiError, BadRequest, Forbidden
from accounts.models import Organization, User

STOP_POLLING = 286
"""HTMX's own status: put the content in, but do not ask again."""

P = ParamSpec("P")
W = TypeVar("W")


class PageRequest(HttpRequest):
    """A request as the middleware leaves it for a view; only for annotations."""

    caller: Caller | None
    htmx: HtmxDetails


def page(
    view: Callable[Concatenate[PageRequest, Caller, P], HttpResponseBase],
) -> Callable[Concatenate[PageRequest, P], HttpResponseBase]:
    """Let members of an organization in, and hand the view its caller."""
    return _behind(_caller, view)


def person_page(
    view: Callable[Concatenate[PageRequest, User, P], HttpResponseBase],
) -> Callable[Concatenate[PageRequest, P], HttpResponseBase]:
    """Let in whoever is signed in, of whatever organization or none, and hand the view them."""
    return _behind(_person, view)


def operator_page(
    view: Callable[Concatenate[PageRequest, User, P], HttpResponseBase],
) -> Callable[Concatenate[PageRequest, P], HttpResponseBase]:
    """Let platform operators in, and hand the view the person; to others there is no such page."""
    return _behind(_operator, view)


def _behind(
    door: Callable[[PageRequest], W | HttpResponseBase],
    view: Callable[Concatenate[PageRequest, W, P], HttpResponseBase],
) -> Callable[Concatenate[PageRequest, P], HttpResponseBase]:
    """The view for whom the door lets in, else the door's own answer; `ApiError` becomes a page.

    Nothing behind a door is kept by a cache: not after signing out, and not a fragment that HTMX
    fetched from the same address as the page.
    """

    @wraps(view)
    def guarded(request: PageRequest, /, *args: P.args, **kwargs: P.kwargs) -> HttpResponseBase:
        try:
            who = door(request)
            response = (
                who if isinstance(who, HttpResponseBase) else view(request, who, *args, **kwargs)
            )
        except ApiError as error:
            response = error_page(request, error)
        add_never_cache_headers(response)
        return response

    return guarded


def _caller(request: PageRequest) -> Caller | HttpResponseBase:
    if not isinstance(request.user, User):
        return _to_sign_in(request)
    if request.caller is None:
        return _without_organization(request)
    if request.caller.operator and request.method not in ("GET", "HEAD"):
        raise Forbidden("An operator may look, but not change anything.")
    return request.caller


def _person(request: PageRequest) -> User | HttpResponseBase:
    return request.user if isinstance(request.user, User) else _to_sign_in(request)


def _operator(request: PageRequest) -> User | HttpResponseBase:
    person = _person(request)
    if isinstance(person, User) and not person.is_staff:
        raise Http404
    if isinstance(person, User) and second_factor.is_lacking(person):
        messages.warning(request, "Operators need two-factor authentication: set it up first.")
        return redirect("mfa_index")
    return person


def organization_or_404(id: str) -> Organization:
    """Whichever organization has this id, for operators' pages."""
    found = None if "\0" in id else Organization.objects.filter(pk=id).first()
    if found is None:
        raise Http404
    return found


def sent(request: HttpRequest) -> QueryDict | None:
    """What a form is bound to: the fields of a POST, also when there are none."""
    return request.POST if request.method == "POST" else None


def require_valid(form: Form) -> None:
    """Raise `BadRequest` with what is wrong, where there is no page that could show the form."""
    if form.errors:
        name, said = next(iter(form.errors.items()))
        raise BadRequest(f"{form.fields[name].label}: {said[0]}", param=name)


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


def _without_organization(request: PageRequest) -> HttpResponseBase:
    if request.htmx:
        return HttpResponseClientRefresh()
    if isinstance(request.user, User) and request.user.is_staff and request.path_info == "/":
        return redirect("operator_organizations")
    return render(request, "accounts/no_organization.html", status=403)
