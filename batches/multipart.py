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
_UNKNOWN_LENGTH = 2**62
"""Django reads what was announced at most; a chunked body says itself where it ends."""


class MeasuredBody:
    """Wrap `wsgi.input` of every request in a counter, and let Django see chunked forms.

    The Node SDK sends files in chunks whenever it is given a stream; WSGI's rules end a body
    without a Content-Length before its first byte.
    """

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self.application = application

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        body = environ["wsgi.input"] = environ[_ENVIRON_KEY] = _Counter(environ["wsgi.input"])
        if _is_chunked_form(environ):
            body.is_chunked = True
            environ["CONTENT_LENGTH"] = str(_UNKNOWN_LENGTH)
        return self.application(environ, start_response)


def _is_chunked_form(environ: dict[str, Any]) -> bool:
    return (
        environ.get("HTTP_TRANSFER_ENCODING", "").lower() == "chunked"
        and not environ.get("CONTENT_LENGTH")
        and environ.get("CONTENT_TYPE", "").startswith("multipart/form-data")
        and bool(environ.get("wsgi.input_terminated"))
    )


class _Counter:
    """Reads on; past `limit` bytes it says that the body has ended."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.count = 0
        self.tail = b""
        self.is_chunked = False
        self.limit = _UNKNOWN_LENGTH

    def read(self, *size: int) -> bytes:
        return self._seen(self._stream.read(*size))

    def readline(self, *size: int) -> bytes:
        return self._seen(self._stream.readline(*size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _seen(self, data: bytes) -> bytes:
        self.count += len(data)
        self.tail = (self.tail + data[-_TAIL:])[-_TAIL:]
        return b"" if self.is_too_large else data

    @property
    def is_too_large(self) -> bool:
        return self.count > self.limit


class LengthRequired(ApiError):
    status = 411


def require_length(request: HttpRequest, limit: int) -> None:
    """Refuse a body by its headers alone: of unknown length, or of more than `limit` bytes.

    A chunked form is let through, to be refused by `require_whole` when it turns out too large.
    """
    body: _Counter | None = request.META.get(_ENVIRON_KEY)
    if body is not None and body.is_chunked:
        body.limit = limit
        return
    announced = request.META.get("CONTENT_LENGTH") or ""
    if not announced.isdecimal():
        raise LengthRequired("Send the body with a Content-Length.", code="length_required")
    if int(announced) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"At most {limit:,} bytes are taken here.", code="body_too_large")


def drop_file(request: HttpRequest) -> None:
    """Remove the file that Django was writing when the form turned out to be broken."""
    for handler in request.upload_handlers:
        if (file := getattr(handler, "file", None)) is not None:
            file.close()


def require_single(request: HttpRequest) -> None:
    """Refuse a form that gives a field or a file twice: only one of them would be heard."""
    for fields in (request.POST, request.FILES):
        for name, given in fields.lists():
            if len(given) > 1:
                raise BadRequest(
                    f"{name[:64]} is given {len(given)} times.",
                    param=name[:64],
                    code="duplicate_parameter",
                )


def is_whole(request: HttpRequest) -> bool:
    """Whether a parsed form came as long as announced, and with its last boundary.

    Under servers that do not measure (Django's test client) every form passes.
    """
    body: _Counter | None = request.META.get(_ENVIRON_KEY)
    if body is None or request.content_type != "multipart/form-data":
        return True
    boundary = request.content_params.get("boundary", "") if request.content_params else ""
    came = body.is_chunked or body.count == int(request.META.get("CONTENT_LENGTH") or 0)
    return came and body.tail.rstrip().endswith(f"--{boundary}--".encode())


def require_whole(request: HttpRequest, *, param: str | None = "file") -> None:
    """Refuse a form that is not whole, or of which more came than may."""
    body: _Counter | None = request.META.get(_ENVIRON_KEY)
    if body is not None and body.is_too_large:
        raise _too_large(body.limit)
    if not is_whole(request):
        raise BadRequest(
            "The upload broke off: fewer bytes came than were announced, or the last boundary is "
            "missing. Nothing was stored; send it again.",
            param=param,
            code="incomplete_body",
        )
