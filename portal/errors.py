"""The one shape of every error under /v1: OpenAI's `{"error": {message, type, param, code}}`.

Services raise `accounts.errors.ApiError`; this module only turns errors into responses.
"""

from __future__ import annotations

import orjson
from django.http import HttpResponse

from accounts.errors import ApiError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def envelope(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> HttpResponse:
    """An error response; all four keys are always there."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    content = orjson.dumps(body)
    response = HttpResponse(content, status=status, content_type="application/json")
    # Some errors are made outside of the middleware that would set it.
    response["Content-Length"] = str(len(content))
    if status == 503:
        response["Retry-After"] = "2"
    return response


def refusal(error: ApiError) -> HttpResponse:
    """The error response that says what a service, or a limit, has refused."""
    answer = envelope(error.status, error.message, param=error.param, code=error.code)
    for name, value in error.headers.items():
        answer[name] = value
    return answer


def is_envelope(response: HttpResponse) -> bool:
    return response.content.startswith(b'{"error":{"message"')
