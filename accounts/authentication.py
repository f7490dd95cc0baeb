"""How an API request says who it is: a bearer key, and optionally organization and project."""

from __future__ import annotations

from django.http import HttpRequest
from ninja.security import HttpBearer

from accounts import queries, services
from accounts.access import Caller
from accounts.errors import Unauthorized


class KeyAuthentication(HttpBearer):
    """`Authorization: Bearer sk-…`; sets `request.auth` to the `Caller`."""

    def __call__(self, request: HttpRequest) -> Caller:
        kind, _, text = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or not text.strip():
            raise Unauthorized(
                "No API key: send it as 'Authorization: Bearer sk-…'.", code="missing_api_key"
            )
        return self.authenticate(request, text.strip())

    def authenticate(self, request: HttpRequest, token: str) -> Caller:
        caller = queries.caller_of_key(token)
        if caller is None or caller.api_key is None:
            raise Unauthorized(
                "This API key is not valid: it is unknown, expired or revoked.",
                code="invalid_api_key",
            )
        _check_header(request, "OpenAI-Organization", caller.organization.pk)
        _check_header(request, "OpenAI-Project", caller.project.pk)
        services.note_use(caller.api_key)
        return caller


def _check_header(request: HttpRequest, name: str, own: str) -> None:
    sent = request.headers.get(name)
    if sent and sent != own:
        raise Unauthorized(f"{name} names one that this key does not belong to.", param=name)


def caller_of(request: HttpRequest, needed: str) -> Caller:
    """The authenticated caller, who must have the scope `needed`."""
    caller: Caller = request.auth  # type: ignore[attr-defined]
    caller.require(needed)
    return caller
