"""Whether a multipart body is the one that its headers announced, and not too large to read.

Django takes a connection that broke half-way for the end of the body, so that half a file would
be stored as a whole one. A WSGI wrapper counts what came; nothing here reads a body itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from django.http import HttpRequest

from accounts.errors import ApiError, BadRequest, TooLarge

_TAIL = 256
_ENVIRON_KEY = "portal.measured_body"


class MeasuredBody:
    """Wrap `wsgi.input` of every request in a counter."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self.application = application

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        environ["wsgi.input"] = environ[_ENVIRON_KEY] = _Counter(environ["wsgi.input"])
        return self.application(environ, start_response)


class _Counter:
    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.count = 0
        self.tail = b""

    def read(self, *size: int) -> bytes:
        return self._seen(self._stream.read(*size))

    def readline(self, *size: int) -> bytes:
        return self._seen(self._stream.readline(*size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _seen(self, data: bytes) -> bytes:
        self.count += len(data)
        self.tail = (self.tail + data[-_TAIL:])[-_TAIL:]
        return data


class LengthRequired(ApiError):
    status = 411


def require_length(request: HttpRequest, limit: int) -> None:
    """Refuse a body by its headers alone: of unknown length, or of more than `limit` bytes."""
    announced = request.META.get("CONTENT_LENGTH") or ""
    if not announced.isdecimal():
        raise LengthRequired("Send the body with a Content-Length.", code="length_required")
    if int(announced) > limit:
        raise TooLarge(
            f"The body has {int(announced):,} bytes; at most {limit:,} are taken here.",
            code="body_too_large",
        )


def require_whole(request: HttpRequest) -> None:
    """Refuse a parsed form that came shorter than announced, or without its last boundary.

    Passes under servers that do not measure (Django's test client).
    """
    body: _Counter | None = request.META.get(_ENVIRON_KEY)
    if body is None:
        return
    boundary = request.content_params.get("boundary", "") if request.content_params else ""
    whole = body.count == int(request.META.get("CONTENT_LENGTH") or 0)
    if not whole or not body.tail.rstrip().endswith(f"--{boundary}--".encode()):
        raise BadRequest(
            "The upload broke off: fewer bytes came than were announced, or the last boundary is "
            "missing. Nothing was stored; send it again.",
            param="file",
            code="incomplete_body",
        )
