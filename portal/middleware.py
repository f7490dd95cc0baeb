"""What every request gets: an id, a content security policy, and under /v1 the error envelope.

Who the caller is belongs to accounts; what went wrong is worded where it happened.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

import structlog
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase

from portal.errors import envelope, is_envelope

GetResponse = Callable[[HttpRequest], HttpResponseBase]

POLICY = "; ".join(
    [
        "default-src 'self'",
        "img-src 'self' data:",
        "style-src 'self'",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    ]
)
# Swagger UI sets style attributes from its script.
DOCS_POLICY = POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")


def request_id(get_response: GetResponse) -> GetResponse:
    """Give each request an unguessable id, in its logs and in `x-request-id`."""

    def middleware(request: HttpRequest) -> HttpResponseBase:
        request.id = f"req_{secrets.token_hex(16)}"  # type: ignore[attr-defined]
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request.id)  # type: ignore[attr-defined]
        response = get_response(request)
        response["x-request-id"] = request.id  # type: ignore[attr-defined]
        return response

    return middleware


def content_security_policy(get_response: GetResponse) -> GetResponse:
    def middleware(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        policy = DOCS_POLICY if request.path == "/v1/docs" else POLICY
        response.setdefault("Content-Security-Policy", policy)
        return response

    return middleware


def api_errors(get_response: GetResponse) -> GetResponse:
    """Put any error under /v1 that did not come from an operation (404, 405 …) into the envelope."""

    def middleware(request: HttpRequest) -> HttpResponseBase:
        if _is_unmeasured(request):
            said = "Send the body with a Content-Length: chunks of unknown number are not read."
            return envelope(411, said, code="length_required")
        if request.path.startswith("/v1"):
            request.encoding = "utf-8"  # whatever charset was named: nothing else is spoken here
        response = get_response(request)
        if not request.path.startswith("/v1") or response.status_code < 400:
            return response
        if isinstance(response, HttpResponse) and is_envelope(response):
            return response
        return _enveloped(request, response)

    return middleware


def _is_unmeasured(request: HttpRequest) -> bool:
    """Whether it is an API request with a body that Django, by WSGI's rules, would not see."""
    chunked = "Transfer-Encoding" in request.headers and not request.META.get("CONTENT_LENGTH")
    return chunked and request.path.startswith("/v1")


def _enveloped(request: HttpRequest, response: HttpResponseBase) -> HttpResponse:
    said = {
        404: f"Invalid URL ({request.method} {request.path})",
        405: f"Not allowed to {request.method} on {request.path}",
        413: "The request body is too large for this path",
    }
    answer = envelope(
        response.status_code,
        said.get(response.status_code, response.reason_phrase),
        code={404: "unknown_url", 405: "method_not_allowed"}.get(response.status_code),
    )
    if "Allow" in response:
        answer["Allow"] = response["Allow"]
    return answer
