"""The API under /v1: its routers, and how every error becomes OpenAI's envelope."""

from __future__ import annotations

from typing import Any

import orjson
import structlog
from django.core.exceptions import RequestDataTooBig, SuspiciousOperation, TooManyFilesSent
from django.db import InterfaceError, OperationalError
from django.http import Http404, HttpRequest, HttpResponse, UnreadablePostError
from django.http.multipartparser import MultiPartParserError
from ninja import NinjaAPI
from ninja.errors import HttpError, Throttled, ValidationError
from ninja.openapi.schema import REF_TEMPLATE, OpenAPISchema
from ninja.parser import Parser
from ninja.renderers import BaseRenderer
from ninja.throttling import BaseThrottle

from accounts import throttling
from accounts.access import Caller
from accounts.api import audit as audit_api
from accounts.api import auth as auth_api
from accounts.api import invites as invites_api
from accounts.api import issuers as issuers_api
from accounts.api import keys as keys_api
from accounts.api import limits as limits_api
from accounts.api import operator as operator_api
from accounts.api import organization as organization_api
from accounts.api import projects as projects_api
from accounts.api import usage as usage_api
from accounts.api import users as users_api
from accounts.authentication import KeyAuthentication
from accounts.errors import ApiError, BadRequest
from batches import multipart
from batches.api import batches_router, files_router, uploads_router
from batches.api_lane import lane_router
from batches.handler_api import router as handlers_router
from batches.schemas import ErrorOut
from batches.webhook_api import router as webhooks_router
from models_registry.api import router as models_router
from portal.errors import envelope, refusal

logger = structlog.get_logger(__name__)


_NO_OBJECT = "The body must be a JSON object."


class JSONParser(Parser):
    """orjson refuses what the standard parser would crash on (depth) or let through (NaN)."""

    def parse_body(self, request: HttpRequest) -> Any:
        try:
            body = orjson.loads(request.body)
        except orjson.JSONDecodeError as error:
            said = f"The body is not valid JSON: {error}"
            raise BadRequest(said, code="invalid_json") from None
        if not isinstance(body, dict):
            raise BadRequest(_NO_OBJECT, code="invalid_json")
        return body


class JSONRenderer(BaseRenderer):
    media_type = "application/json"

    def render(self, request: HttpRequest, data: Any, *, response_status: int) -> bytes:
        return orjson.dumps(data)


class RateThrottle(BaseThrottle):
    """Counts every authenticated call, before anything of its body is read."""

    def allow_request(self, request: HttpRequest) -> bool:
        caller = getattr(request, "auth", None)
        try:
            if isinstance(caller, Caller):
                throttling.count(request, caller)
        except Exception as error:  # Ninja turns what is raised here into no answer of ours
            request.refusal = error  # type: ignore[attr-defined]
            return False
        return True


class PortalAPI(NinjaAPI):
    """Adds to every operation of the OpenAPI document that its errors come in the envelope."""

    def get_openapi_schema(self, **options: Any) -> OpenAPISchema:
        document = super().get_openapi_schema(**options)
        schema = ErrorOut.model_json_schema(ref_template=REF_TEMPLATE)
        document.add_schema_definitions({**schema.pop("$defs"), "Error": schema})
        error = {"schema": {"$ref": REF_TEMPLATE.format(model="Error")}}
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"]["default"] = {
                    "description": "An error; its status says of which kind.",
                    "content": {"application/json": error},
                }
        return document


api = PortalAPI(
    title="vLLM Batch Portal",
    version="1.0.0",
    description="OpenAI's Files, Uploads, Batches, Models and real-time requests, answered on your own GPUs.",
    auth=KeyAuthentication(),
    throttle=RateThrottle(),
    parser=JSONParser(),
    renderer=JSONRenderer(),
    docs_url="/docs",
    openapi_url="/openapi.json",
    servers=[{"url": "/"}],
)
api.add_router("", files_router)
api.add_router("", uploads_router)
api.add_router("", batches_router)
api.add_router("", models_router)
api.add_router("", webhooks_router)
api.add_router("", handlers_router)
api.add_router("", lane_router)
api.add_router("/organization", organization_api.router)
api.add_router("/organization", projects_api.router)
api.add_router("/organization", users_api.router)
api.add_router("/organization", invites_api.router)
api.add_router("/organization", keys_api.router)
api.add_router("/organization", issuers_api.router)
api.add_router("/auth", auth_api.router)
api.add_router("/organization", usage_api.router)
api.add_router("/organization", audit_api.router)
api.add_router("/organization", limits_api.router)
api.add_router("/operator", operator_api.router)


@api.exception_handler(ApiError)
def api_error(request: HttpRequest, error: ApiError) -> HttpResponse:
    return refusal(error)


@api.exception_handler(Throttled)
def throttled(request: HttpRequest, error: Throttled) -> HttpResponse:
    return api.on_exception(request, request.refusal)  # type: ignore[attr-defined]


@api.exception_handler(ValidationError)
def invalid(request: HttpRequest, error: ValidationError) -> HttpResponse:
    """Say the first field that is wrong; its name without the part of the request it is in."""
    first = error.errors[0]
    part, *where = (str(step) for step in first["loc"])
    if part == "body" or (len(where) > 1 and where[0] not in request.GET):
        where = where[1:]  # without the name of our own function's argument
    param = ".".join(where)[:100] or None
    try:  # of a form that was cut off, what is missing is not what is wrong
        multipart.require_whole(request, param=param)
    except ApiError as cut_off:
        return api_error(request, cut_off)
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    said = f"{param}: {first['msg']}" if param else _NO_OBJECT
    return envelope(400, said, param=param, code=code)


@api.exception_handler(HttpError)
def http_error(request: HttpRequest, error: HttpError) -> HttpResponse:
    if isinstance(error.__cause__, ApiError):  # our parser's, which Ninja wraps
        return api_error(request, error.__cause__)
    return envelope(error.status_code, error.message)


@api.exception_handler(Http404)
def missing(request: HttpRequest, error: Http404) -> HttpResponse:
    return envelope(404, "Not found", code="not_found")


@api.exception_handler(Exception)
def unexpected(request: HttpRequest, error: Exception) -> HttpResponse:
    """A broken body is the caller's 400, a database that is away a 503, the rest our 500."""
    if isinstance(error, RequestDataTooBig):
        return envelope(413, "The request body is too large for this path.", code="body_too_large")
    if isinstance(error, MultiPartParserError | UnreadablePostError | TooManyFilesSent):
        multipart.drop_file(request)
        return envelope(400, f"The form could not be read: {error}", code="invalid_multipart")
    if isinstance(error, SuspiciousOperation):
        return envelope(400, "The request could not be read.", code="invalid_request")
    if isinstance(error, OperationalError | InterfaceError):
        logger.warning("database away", error=str(error))
        return envelope(503, "The database cannot be reached; try again soon.", code="unavailable")
    logger.exception("unexpected error", path=request.path)
    return envelope(500, "Something went wrong here; the request id tells us what.")
