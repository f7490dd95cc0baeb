"""What every request gets: an id, a content security policy, under /v1 the envelope and limits.

Who the caller is belongs to accounts; what went wrong is worded where it happened.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

import structlog
from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.shortcuts import render

from accounts import throttling
from accounts.throttling import RateLimited
from portal.errors import envelope, is_envelope, refusal

PERMISSIONS = (
    "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), serial=(), usb=()"
)
"""What no page of ours asks a browser for; passkeys need none of it."""

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
# A provider's own page follows our form, wherever that is; nothing secret is typed into it.
PROVIDER_POLICY = POLICY.replace("form-action 'self'", "form-action https: http:")
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
        response.setdefault("Content-Security-Policy", _policy(request.path_info))
        response.setdefault("Permissions-Policy", PERMISSIONS)
        return response

    return middleware


def _policy(path: str) -> str:
    if path.startswith("/accounts/oidc/"):
        return PROVIDER_POLICY
    return DOCS_POLICY if path == "/v1/docs" else POLICY


def rate_limits(get_response: GetResponse) -> GetResponse:
    """Tell every answer under /v1 its tightest limit, and count by address who is nobody known."""

    def middleware(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        if not request.path_info.startswith("/v1"):
            return response
        if throttling.usage_of(request) is None:
            try:
                throttling.count_address(request)
            except RateLimited as error:
                response = refusal(error)
        if usage := throttling.usage_of(request):
            for name, value in usage.headers.items():
                response[name] = value
        return response

    return middleware


TAKES_FILES = ("/v1/files", "/v1/uploads")
PAGES_TAKING_FILES = ("/files", "/batches/new")
"""They look at the length themselves (`batches/views/uploading.py`)."""


def small_bodies(get_response: GetResponse) -> GetResponse:
    """Refuse a large body wherever no file is taken, before anything of it is read or spooled."""

    def middleware(request: HttpRequest) -> HttpResponseBase:
        announced: str = request.META.get("CONTENT_LENGTH") or "0"
        small = announced.isdecimal() and int(announced) <= settings.DATA_UPLOAD_MAX_MEMORY_SIZE
        path = request.path_info
        if small or path.startswith(TAKES_FILES) or path in PAGES_TAKING_FILES:
            return get_response(request)
        if request.path_info.startswith("/v1"):
            said = "The request body is too large for this path."
            return envelope(413, said, code="body_too_large")
        return HttpResponse("What was sent is too large.", status=413, content_type="text/plain")

    return middleware


def method_not_allowed(get_response: GetResponse) -> GetResponse:
    """Say to browsers in the portal's look what Django answers with an empty page."""

    def middleware(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        by_person = "text/html" in request.headers.get("Accept", "")
        if response.status_code != 405 or not by_person or request.path_info.startswith("/v1"):
            return response
        page = render(request, "405.html", status=405)
        page["Allow"] = response["Allow"]
        return page

    return middleware


def api_errors(get_response: GetResponse) -> GetResponse:
    """Put any error under /v1 that did not come from an operation (404, 405 …) into the envelope."""

    def middleware(request: HttpRequest) -> HttpResponseBase:
        if _is_unmeasured(request):
            said = "Send the body with a Content-Length: chunks of unknown number are not read."
            return envelope(411, said, code="length_required")
        if request.path_info.startswith("/v1"):
            request.encoding = "utf-8"  # whatever charset was named: nothing else is spoken here
        response = get_response(request)
        if not request.path_info.startswith("/v1") or response.status_code < 400:
            return response
        if isinstance(response, HttpResponse) and is_envelope(response):
            return response
        return _enveloped(request, response)

    return middleware


def _is_unmeasured(request: HttpRequest) -> bool:
    """Whether it is an API request with a body that Django, by WSGI's rules, would not see."""
    chunked = "Transfer-Encoding" in request.headers and not request.META.get("CONTENT_LENGTH")
    return chunked and request.path_info.startswith("/v1")


def _enveloped(request: HttpRequest, response: HttpResponseBase) -> HttpResponse:
    said = {
        404: f"Invalid URL ({request.method} {request.path_info})",
        405: f"Not allowed to {request.method} on {request.path_info}",
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
