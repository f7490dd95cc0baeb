"""Errors that are meant for the caller, raised by services and turned into answers by doors.

Anything else that is raised is our own fault: a 500.
"""

from __future__ import annotations


class ApiError(Exception):
    """Say `message` to the caller, with an HTTP status and OpenAI's `param` and `code`."""

    status = 400

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.headers: dict[str, str] = {}


class BadRequest(ApiError):
    pass


class Unauthorized(ApiError):
    status = 401


class Forbidden(ApiError):
    status = 403


class NotFound(ApiError):
    """Missing and foreign alike, so that nobody learns what another tenant has."""

    status = 404


class OtherOrganization(ApiError):
    """What was sent comes from a page of another organization than the session is in by now."""

    status = 409


class Gone(ApiError):
    """It was there once, or never was: which of the two is not said."""

    status = 410


class TooLarge(ApiError):
    status = 413


class QuotaExceeded(ApiError):
    """Too much is used or spoken for; trying again at once will not help."""

    status = 429

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param, code=code)
        self.headers["x-should-retry"] = "false"


class Unavailable(ApiError):
    """Something that we need is away for now; the caller may try again."""

    status = 503
