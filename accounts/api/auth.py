"""`/v1/auth/token`: access tokens for keys, for people and for workloads; and their end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import orjson
from django.http import HttpRequest, HttpResponse
from django.utils.cache import add_never_cache_headers
from ninja import Router, Schema
from ninja.errors import ValidationError
from pydantic import ValidationError as Invalid

from accounts import access, throttling
from accounts.access import Caller
from accounts.authentication import NOBODY, MakerAuthentication, bearer_of, maker_of
from accounts.errors import BadRequest
from accounts.models import Project
from accounts.schemas.tokens import EXCHANGE, JWT, Revoked, RevokeIn, TokenIn, TokenOut
from accounts.services import issuers, tokens

S = TypeVar("S", bound=Schema)
router = Router(tags=["Access tokens"], auth=MakerAuthentication())
FORM = "application/x-www-form-urlencoded"


def _body(schema: type[Schema]) -> dict[str, Any]:
    """What OpenAPI is told of a body that may be JSON, a form, or missing."""
    described = {"schema": schema.model_json_schema()}
    content = {"application/json": described, FORM: described}
    return {"requestBody": {"required": False, "content": content}}


@router.post(
    "/token", response=TokenOut, summary="Make an access token", openapi_extra=_body(TokenIn)
)
def create_token(request: HttpRequest, response: HttpResponse) -> TokenOut:
    add_never_cache_headers(response)
    given = _given(request, TokenIn)
    if given.grant_type is not None:
        return _exchanged(request, given)
    caller = maker_of(request)
    if given.project_id:
        caller = replace(caller, project=_project(caller, given.project_id))
    issued = tokens.issue_token(actor=caller, scopes=given.asked, expires_in=given.expires_in)
    return TokenOut.of(issued)


@router.post(
    "/token/revoke",
    response=Revoked,
    summary="Revoke an access token",
    openapi_extra=_body(RevokeIn),
)
def revoke_token(request: HttpRequest) -> Revoked:
    given = _given(request, RevokeIn)
    caller = maker_of(request)
    text = given.token if given.token is not None else bearer_of(request)
    if given.token is None and not caller.token_id:
        raise BadRequest("token is missing.", param="token", code="missing_required_parameter")
    tokens.revoke_token(actor=caller, text=text)
    return Revoked()


def _exchanged(request: HttpRequest, given: TokenIn) -> TokenOut:
    """A token for one of an issuer that the organization trusts (RFC 8693)."""
    if request.auth == NOBODY:  # type: ignore[attr-defined]
        throttling.count_address(request)
    if given.grant_type != EXCHANGE:
        raise BadRequest(f"grant_type must be {EXCHANGE!r}.", param="grant_type")
    if given.subject_token_type not in (None, JWT):
        raise BadRequest(f"subject_token_type must be {JWT!r}.", param="subject_token_type")
    for name in ("subject_token", "organization"):
        if not getattr(given, name):
            said = f"{name} is missing."
            raise BadRequest(said, param=name, code="missing_required_parameter")
    issued = issuers.exchange(
        organization_id=given.organization or "",
        text=given.subject_token or "",
        scopes=given.asked,
        expires_in=given.expires_in,
    )
    return TokenOut.of(issued)


def _project(caller: Caller, project_id: str) -> Project:
    """A person chooses; a key has its own."""
    project = access.get(
        caller, Project, project_id, param="project_id", related=("organization",), archived_at=None
    )
    if caller.api_key is not None and project != caller.project:
        said = "The token of a key is of the key's own project."
        raise BadRequest(said, param="project_id", code="invalid_value")
    return project


def _given(request: HttpRequest, schema: type[S]) -> S:
    try:
        return schema.model_validate(_read(request))
    except Invalid as error:
        found = [
            {**each, "loc": ("body", schema.__name__, *each["loc"])} for each in error.errors()
        ]
        raise ValidationError(found) from None


def _read(request: HttpRequest) -> dict[str, Any]:
    if request.content_type == FORM:
        return {name: value for name, value in request.POST.items() if name != "scopes"} | (
            {"scopes": request.POST.getlist("scopes")} if "scopes" in request.POST else {}
        )
    if request.content_type == "multipart/form-data":  # the check of a session has read it already
        raise BadRequest(f"Send the body as JSON or as {FORM}.", code="invalid_json")
    try:
        body = orjson.loads(request.body or b"{}")
    except orjson.JSONDecodeError as error:
        said = f"The body is not valid JSON: {error}"
        raise BadRequest(said, code="invalid_json") from None
    if not isinstance(body, dict):
        raise BadRequest("The body must be a JSON object.", code="invalid_json")
    return body
