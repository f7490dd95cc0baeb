"""How an API request says who it is: a bearer key or token, and optionally organization and project.

For the making of tokens a signed-in session does too.
"""

from __future__ import annotations

from django.http import HttpRequest
from ninja.security import HttpBearer
from ninja.utils import check_csrf

from accounts import queries, second_factor, tokens
from accounts.access import Caller
from accounts.errors import Forbidden, Unauthorized
from accounts.models import User
from accounts.origin import address_of
from accounts.services import keys
from accounts.services.tokens import read_token

NOBODY = "nobody"
"""Who makes a token of somebody else's, and brings nothing of ours."""


class KeyAuthentication(HttpBearer):
    """`Authorization: Bearer` with a key (`sk-…`) or an access token; gives the `Caller`."""

    def __call__(self, request: HttpRequest) -> Caller:
        text = bearer_of(request)
        if not text:
            raise Unauthorized(
                "No API key: send it as 'Authorization: Bearer sk-…'.", code="missing_api_key"
            )
        return self.authenticate(request, text)

    def authenticate(self, request: HttpRequest, token: str) -> Caller:
        caller = _caller_of_token(token) if tokens.is_token(token) else _caller_of_key(token)
        _check_header(request, "OpenAI-Organization", caller.organization.pk)
        _check_header(request, "OpenAI-Project", caller.project.pk)
        if caller.api_key is not None and not caller.api_key.allows_address(address_of(request)):
            raise Forbidden(
                "This API key may not be used from your network.", code="ip_not_allowed"
            )
        require_active(caller)
        if caller.api_key is not None:
            keys.note_use(caller.api_key)
        return caller


class MakerAuthentication(KeyAuthentication):
    """The same, or a signed-in person's session with the CSRF token of one of our pages.

    Without either it is `NOBODY`, and the operation decides what they may do.
    """

    def __call__(self, request: HttpRequest) -> Caller | str:  # type: ignore[override]
        if "Authorization" in request.headers:
            return super().__call__(request)
        if not isinstance(request.user, User):
            return NOBODY
        if check_csrf(request):
            raise Forbidden(
                "A cookie alone does not do: send the page's CSRF token as X-CSRFToken.",
                code="csrf_failed",
            )
        caller = queries.caller_of_user(request.user, request.session.get("organization"))
        if caller is None:
            raise Forbidden("You are not a member of an organization.", code="not_a_member")
        require_active(caller)
        return caller


def bearer_of(request: HttpRequest) -> str:
    """The key or token that a request brings; '' without one."""
    kind, _, text = request.headers.get("Authorization", "").partition(" ")
    return text.strip() if kind.lower() == "bearer" else ""


def _caller_of_key(text: str) -> Caller:
    caller = queries.caller_of_key(text)
    if caller is None:
        raise Unauthorized(
            "This API key is not valid: it is unknown, expired or revoked.",
            code="invalid_api_key",
        )
    return caller


def _caller_of_token(text: str) -> Caller:
    claims = read_token(text)
    caller = queries.caller_of_token(claims) if claims else None
    if caller is None:
        raise Unauthorized(
            "This access token is not valid: it is not ours, or it or what it was made of has"
            " expired or was revoked.",
            code="invalid_token",
        )
    return caller


def require_active(caller: Caller) -> None:
    """Refuse every caller of an organization that is suspended."""
    if caller.organization.suspended_at:
        why = caller.organization.suspended_why
        said = f"This organization is suspended{': ' + why if why else '.'}"
        raise Forbidden(said, code="organization_suspended")


def _check_header(request: HttpRequest, name: str, own: str) -> None:
    sent = request.headers.get(name)
    if sent and sent != own:
        raise Unauthorized(f"{name} names one that this key does not belong to.", param=name)


def caller_of(request: HttpRequest, needed: str) -> Caller:
    """The authenticated caller, who must have the scope `needed`."""
    caller: Caller = request.auth  # type: ignore[attr-defined]
    caller.require(needed)
    return caller


def maker_of(request: HttpRequest) -> Caller:
    """The caller that `MakerAuthentication` found, who must be somebody."""
    found: Caller | str = request.auth  # type: ignore[attr-defined]
    if not isinstance(found, Caller):
        raise Unauthorized(
            "No API key: send it as 'Authorization: Bearer sk-…'.", code="missing_api_key"
        )
    return found


def operator_of(request: HttpRequest) -> Caller:
    """The authenticated caller, who must be a platform operator (by a key of scope `operator`)."""
    caller: Caller = request.auth  # type: ignore[attr-defined]
    if caller.user is None or not caller.is_platform_operator:
        raise Forbidden(
            "This is for platform operators: it needs an operator's key with the scope 'operator'.",
            code="insufficient_scope",
        )
    second_factor.require(caller.user)
    return caller
