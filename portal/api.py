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
from ninja.errors import HttpError, ValidationError
from ninja.parser import Parser
from ninja.renderers import BaseRenderer

from accounts.authentication import KeyAuthentication
from accounts.errors import ApiError
from batches.api import batches_router, files_router, uploads_router
from models_registry.api import router as models_router
from portal.errors import envelope

logger = structlog.get_logger(__name__)


class JSONParser(Parser):
    """orjson refuses what the standard parser would crash on (depth) or let through (NaN)."""

    def parse_body(self, request: HttpRequest) -> Any:
        try:
            return orjson.loads(request.body)
        except orjson.JSONDecodeError as error:
            raise HttpError(400, f"The body is not valid JSON: {error}") from None


class JSONRenderer(BaseRenderer):
    media_type = "application/json"

    def render(self, request: HttpRequest, data: Any, *, response_status: int) -> bytes:
        return orjson.dumps(data)


api = NinjaAPI(
    title="vLLM Batch Portal",
    version="1.0.0",
    description="OpenAI's Files, Uploads, Batches and Models, answered on your own GPUs.",
    auth=KeyAuthentication(),
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


@api.exception_handler(ApiError)
def api_error(request: HttpRequest, error: ApiError) -> HttpResponse:
    return envelope(error.status, error.message, param=error.param, code=error.code)


@api.exception_handler(ValidationError)
def invalid(request: HttpRequest, error: ValidationError) -> HttpResponse:
    """Say the first field that is wrong; its name without the part of the request it is in."""
    first = error.errors[0]
    where = [str(part) for part in first["loc"]]
    param = ".".join(where[2:] if len(where) > 2 else where[1:]) or where[0]
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return envelope(400, f"{param}: {first['msg']}", param=param, code=code)


@api.exception_handler(HttpError)
def http_error(request: HttpRequest, error: HttpError) -> HttpResponse:
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
        return envelope(400, f"The form could not be read: {error}", code="invalid_multipart")
    if isinstance(error, SuspiciousOperation):
        return envelope(400, "The request could not be read.", code="invalid_request")
    if isinstance(error, OperationalError | InterfaceError):
        logger.warning("database away", error=str(error))
        return envelope(503, "The database cannot be reached; try again soon.", code="unavailable")
    logger.exception("unexpected error", path=request.path)
    return envelope(500, "Something went wrong here; the request id tells us what.")
