"""The door of pages: who gets in, and how a page says what a service refused.

The API's doors are in `authentication.py` and in portal's error envelope.
"""

from __future__ import annotations

import time
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
from django.utils.http import url_has_allowed_host_and_scheme
from django_htmx.http import HttpResponseClientRedirect, HttpResponseClientRefresh
from django_htmx.middleware import HtmxDetails

from accounts import second_factor
from accounts.access import Caller
from accounts.errors import ApiError, BadRequest, Forbidden, OtherOrganization
from accounts.models import Organization, User

STOP_POLLING = 286
"""HTMX's own status: put the content in, but do not ask again."""
SAFE = ("GET", "HEAD")
UNDONE_SECONDS = 600
"""How long who was signed out may take to sign in and still be told that nothing was done."""
_UNDONE = "undone"

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
    return _behind(_caller_of_own_page, view)


def file_page(
    view: Callable[Concatenate[PageRequest, Caller, P], HttpResponseBase],
) -> Callable[Concatenate[PageRequest, P], HttpResponseBase]:
    """A page of which nothing is read yet: the view asks `require_own_page` and for permissions."""
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
    if request.htmx and _is_of_another(request.headers.get("X-Organization", ""), request.caller):
        return _anew(request, request.caller)
    return request.caller


def _caller_of_own_page(request: PageRequest) -> Caller | HttpResponseBase:
    caller = _caller(request)
    if isinstance(caller, Caller) and request.method not in SAFE:
        require_own_page(request, caller)
        if caller.operator:
            raise Forbidden("An operator may look, but not change anything.")
    return caller


def require_own_page(request: HttpRequest, caller: Caller) -> None:
    """Raise `OtherOrganization` where the form's page was made for another one than the caller's.

    The organization is the session's, so one tab changes it for all. Programs and other pages than
    ours say nothing of it, and are taken as they are.
    """
    if _is_of_another(request.POST.get("for_organization", ""), caller):
        raise OtherOrganization(f"{_changed_to(caller)} Reload the page, and look where you are.")


def _is_of_another(id: str, caller: Caller) -> bool:
    return id not in ("", caller.organization.pk)


def _changed_to(caller: Caller) -> str:
    return f"You changed to {caller.organization.name} in another tab; nothing was done."


def _anew(request: PageRequest, caller: Caller) -> HttpResponseBase:
    """The page loads itself again, as one of the organization that the session is in."""
    if request.method not in SAFE:
        messages.warning(request, _changed_to(caller))
    return HttpResponseClientRefresh()


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


def is_typed(request: HttpRequest, name: str, *, done: str) -> bool:
    """Whether the person typed the name of what is to be `done` ("deleted"); if not, tell them."""
    same = request.POST.get("typed", "").split() == name.split()
    if not same:
        messages.error(request, f"Nothing is {done}: the name that you typed is another.")
    return same


def require_valid(form: Form) -> None:
    """Raise `BadRequest` with what is wrong, where there is no page that could show the form."""
    if form.errors:
        name, said = next(iter(form.errors.items()))
        raise BadRequest(f"{form.fields[name].label}: {said[0]}", param=name)


def error_page(request: HttpRequest, error: ApiError) -> HttpResponse:
    """What a service refused, in the layout, with the error's own status."""
    template = f"{error.status}.html" if error.status in (403, 404, 409) else "error.html"
    return render(request, template, {"message": error.message}, status=error.status)


def _to_sign_in(request: PageRequest) -> HttpResponseBase:
    """Sign in, then come back; HTMX would put the sign-in page into a part of this one."""
    if request.method not in SAFE:
        request.session[_UNDONE] = time.time() + UNDONE_SECONDS
    answer = redirect_to_login(_page_before(request))
    return HttpResponseClientRedirect(answer["Location"]) if request.htmx else answer


def tell_undone(request: HttpRequest) -> None:
    """Tell who has signed in again that what they sent meanwhile was not done."""
    if request.session.pop(_UNDONE, 0) > time.time():
        said = "You had been signed out: nothing was done. Please do it once more."
        messages.warning(request, said, fail_silently=True)


def _page_before(request: PageRequest) -> str:
    """The page of this site that the person was on: where a form was sent to may be none."""
    if request.htmx:
        there = urlsplit(request.htmx.current_url_abs_path or "/")
    elif request.method in SAFE:
        return request.get_full_path()
    else:
        referer, host = request.headers.get("Referer", ""), request.get_host()
        ours = url_has_allowed_host_and_scheme(referer, host, require_https=request.is_secure())
        there = urlsplit(referer if ours else "/")
    path = f"{there.path}?{there.query}" if there.query else there.path
    return path if url_has_allowed_host_and_scheme(path, None) else "/"


def _without_organization(request: PageRequest) -> HttpResponseBase:
    if request.htmx:
        return HttpResponseClientRefresh()
    if isinstance(request.user, User) and request.user.is_staff and request.path_info == "/":
        return redirect("operator_organizations")
    return render(request, "accounts/no_organization.html", status=403)
