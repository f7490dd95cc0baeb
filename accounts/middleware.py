"""Says of every request where it comes from, and opens the signed-in person's organization.

API requests bring a key instead (see `authentication.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django_scopes import scopes_disabled

from accounts import second_factor
from accounts.access import Caller
from accounts.models import Organization, User
from accounts.origin import Origin, address_of, current
from accounts.queries import caller_of_user, default_project
from accounts.services import audit

LIVE_PARTS = 3
"""So many addresses of a page may be asked for again and again: itself, and parts of it."""

GetResponse = Callable[[HttpRequest], HttpResponseBase]


def origin(get_response: GetResponse) -> GetResponse:
    """Keep the address and the request's id for what is audited meanwhile."""

    def middleware(request: HttpRequest) -> HttpResponseBase:
        request_id: str = request.id  # type: ignore[attr-defined]
        token = current.set(Origin(address_of(request), request_id))
        try:
            return get_response(request)
        finally:
            current.reset(token)

    return middleware


def current_organization(get_response: GetResponse) -> GetResponse:
    """Set `request.caller` (None for strangers) and run the page inside its scope."""

    def middleware(request: HttpRequest) -> HttpResponseBase:
        request.caller = None  # type: ignore[attr-defined]
        if request.path_info.startswith(("/v1/", "/static/")) or not isinstance(request.user, User):
            return get_response(request)
        caller = _looking(request, request.user) or caller_of_user(
            request.user, request.session.get("organization")
        )
        if caller is None:
            return get_response(request)
        request.caller = caller  # type: ignore[attr-defined]
        with caller.scope():
            return get_response(request)

    return middleware


def _looking(request: HttpRequest, user: User) -> Caller | None:
    """An operator's caller in the organization they look at; each page they see is audited.

    A page that asks for itself again, or for parts of it, to stay live, is the same look.
    """
    id = request.session.get("looking_at")
    if not id or not user.is_staff or request.path_info.startswith(("/operator/", "/accounts/")):
        return None
    organization = Organization.objects.filter(pk=id).first()
    if organization is None or second_factor.is_lacking(user):
        return None
    caller = Caller(organization, default_project(organization), user, operator=True)
    page, known = request.get_full_path(), request.session.get("looked_at")
    seen = known if isinstance(known, list) else []
    if page not in seen or not getattr(request, "htmx", False):
        with scopes_disabled():
            audit.record("operator.looked", actor=caller, label=page)
        others = [each for each in seen if each != page]
        request.session["looked_at"] = [page, *others][:LIVE_PARTS]
    return caller
