"""Opens the signed-in person's organization for page requests; API requests bring a key instead."""

from __future__ import annotations

from collections.abc import Callable

from django.http import HttpRequest
from django.http.response import HttpResponseBase

from accounts.models import User
from accounts.queries import caller_of_user

GetResponse = Callable[[HttpRequest], HttpResponseBase]


def current_organization(get_response: GetResponse) -> GetResponse:
    """Set `request.caller` (None for strangers) and run the page inside its scope."""

    def middleware(request: HttpRequest) -> HttpResponseBase:
        request.caller = None  # type: ignore[attr-defined]
        if request.path.startswith(("/v1/", "/static/")) or not isinstance(request.user, User):
            return get_response(request)
        caller = caller_of_user(request.user, request.session.get("organization"))
        if caller is None:
            return get_response(request)
        request.caller = caller  # type: ignore[attr-defined]
        with caller.scope():
            return get_response(request)

    return middleware
