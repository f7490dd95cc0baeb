"""A webhook on the wire: how a delivery is signed, where it may be sent, and what came back.

Standard Webhooks (github.com/standard-webhooks, version 1): HMAC-SHA256 over
`{id}.{timestamp}.{body}`, and the very bytes that were signed are sent. No database here.
"""

from __future__ import annotations

import re
import secrets as random
from base64 import b64encode
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from time import monotonic
from typing import Any, Self
from urllib.parse import SplitResult, urlsplit

import requests
import structlog
from django.conf import settings
from django.utils import timezone
from standardwebhooks import Webhook
from urllib3.exceptions import ProtocolError

from accounts import network, outbound
from accounts.errors import BadRequest

logger = structlog.get_logger(__name__)

PREFIX = "whsec_"
ANSWER_BYTES = 4096
_PORTS = {"http": 80, "https": 443}
LONGEST_URL = 2000
_HOST = re.compile(r"[a-z0-9._-]{1,254}|[0-9a-f:.]{2,45}")
"""A name (of another alphabet as its punycode) or an address; no percent signs and no zones."""
LATEST_RETRY = 24 * 3600
"""Seconds to which a receiver's Retry-After is cut."""
STALE_SECONDS = 1.0
"""How soon a request fails whose connection the receiver had closed before it came."""


def new_secret() -> str:
    """24 random bytes, which is what the specification suggests at least."""
    return PREFIX + b64encode(random.token_bytes(24)).decode()


def signed(body: bytes, *, id: str, at: datetime, secrets: Sequence[str]) -> dict[str, str]:
    """The three headers; a signature for each secret, so that a rotation needs no moment."""
    signatures = [Webhook(secret).sign(id, at, body.decode()) for secret in secrets]
    return {
        "webhook-id": id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of one request."""

    milliseconds: int
    status: int | None = None
    answer: str = ""
    error: str = ""
    retry_after: float = 0.0
    """Seconds that the receiver asks to be left alone for."""

    @property
    def ok(self) -> bool:
        return self.status is not None and 200 <= self.status < 300

    @property
    def why(self) -> str:
        """What went wrong, in a few words; empty if nothing did."""
        return "" if self.ok else self.error or f"HTTP {self.status}"


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be sent."""

    url: str
    body: bytes
    headers: Mapping[str, str]
    timeout: int
    """Seconds for all of it, from the name's lookup to the answer's end."""


def send(url: str, body: bytes, headers: Mapping[str, str], *, timeout: int) -> Receipt:
    """POST it; whatever happens becomes a receipt. Redirects are answers, and not followed."""
    with _session(timeout) as session:
        return _sent(session, Request(url, body, headers, timeout))


class Sender:
    """Sends to one receiver, several requests side by side, over connections that stay open.

    They are closed with it; an address was looked at when its connection was made.
    """

    def __init__(self, url: str, timeout: int, *, side_by_side: int) -> None:
        self.url, self.timeout = url, timeout
        self._threads = ThreadPoolExecutor(side_by_side, "webhook")
        self._idle: list[outbound.Session] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        for session in self._idle:
            session.close()

    def send_all(self, bodies: Sequence[tuple[bytes, Mapping[str, str]]]) -> list[Receipt]:
        """Send these at once; their receipts in the same order, when the last has come."""
        wanted = [Request(self.url, *each, self.timeout) for each in bodies]
        if len(wanted) == 1:
            return [self._send(wanted[0])]
        return list(self._threads.map(self._send, wanted))

    def _send(self, request: Request) -> Receipt:
        try:
            session = self._idle.pop()  # not asked for before: another thread might take the last
        except IndexError:
            session = _session(self.timeout, keep=True)
        try:
            return _sent(session, request)
        finally:
            self._idle.append(session)


def _session(timeout: int, *, keep: bool = False) -> outbound.Session:
    return outbound.Session(
        seconds=timeout, largest=ANSWER_BYTES, cut=True, keep=keep, may_be_private=may_be_private
    )


def _sent(session: outbound.Session, request: Request) -> Receipt:
    began = monotonic()
    try:
        require_allowed(request.url)
        response = _posted(session, request)
    except (requests.RequestException, BadRequest) as error:
        return Receipt(_since(began), error=_in_words(error))
    except Exception as error:  # what a receiver sends must not keep the next from its delivery
        logger.exception("webhook not sent")
        return Receipt(_since(began), error=type(error).__name__)
    return Receipt(
        _since(began),
        response.status_code,
        _storable(response.content.decode(errors="replace")),
        retry_after=_seconds(response.headers.get("Retry-After", "")),
    )


def _posted(session: outbound.Session, request: Request) -> requests.Response:
    """The answer; once more where a connection that was kept turns out to be closed."""
    again, began = session.is_connected, monotonic()
    options: dict[str, Any] = {"allow_redirects": False, "timeout": request.timeout}
    # An answer as it is: nothing of ours has to be unpacked, and no bomb.
    headers = {**request.headers, "accept-encoding": "identity"}
    try:
        return session.post(request.url, data=request.body, headers=headers, **options)
    except requests.ConnectionError as error:
        late = isinstance(error, requests.Timeout) or monotonic() - began > STALE_SECONDS
        if late or not again:
            raise
    return session.post(request.url, data=request.body, headers=headers, **options)


def _storable(text: str) -> str:
    """Without the one character that PostgreSQL keeps in no text."""
    return text.replace("\0", "\ufffd")


def _since(began: float) -> int:
    return round((monotonic() - began) * 1000)


def _in_words(error: Exception) -> str:
    if isinstance(error, requests.Timeout) or "too long" in str(error):
        return "It did not answer in time."
    cause = getattr(error, "args", [error])[0]
    cause = getattr(cause, "reason", cause)
    if isinstance(cause, ProtocolError):  # "Connection aborted.", and what made it so
        cause = cause.args[-1]
    return _storable(str(cause).rpartition(": ")[2][:300]) or type(error).__name__


def _seconds(text: str) -> float:
    """Retry-After (RFC 9110, section 10.2.3): seconds, or a date; 0 for anything else."""
    try:
        seconds = int(text) if text.isascii() and text.isdigit() else _until(text)
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return float(min(max(seconds, 0), LATEST_RETRY))


def _until(text: str) -> float:
    moment = parsedate_to_datetime(text)
    return (moment - timezone.now()).total_seconds() if moment.tzinfo else 0.0


# --- Where it may go ------------------------------------------------------------------------------


def require_allowed(url: str) -> None:
    """Raise `BadRequest` for an address that no webhook may have, whatever it resolves to."""
    parts = _parts(url)
    host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
    if may_be_private(parts.scheme, host, port):
        return
    if port not in settings.WEBHOOK_PORTS:
        allowed = ", ".join(map(str, sorted(settings.WEBHOOK_PORTS)))
        raise BadRequest(f"Webhooks may go to these ports: {allowed}.", param="url")
    if not _may_be_public(host):
        raise BadRequest(f"{host} is not an address of the internet.", param="url")


def require_reachable(url: str) -> None:
    """Also resolve it, as at the time of saving; it is looked at again with every delivery."""
    require_allowed(url)
    parts = _parts(url)
    host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
    public = not may_be_private(parts.scheme, host, port)
    try:
        network.addresses_of(host, port, public=public)
    except OSError as error:
        raise BadRequest(f"{error}: webhooks go to the internet only.", param="url") from None


def may_be_private(scheme: str, host: str, port: int) -> bool:
    """Whether the operator lists this receiver of the own networks, as `host` or `host:port`."""
    listed = settings.WEBHOOK_PRIVATE_HOSTS
    return host in listed or f"{host}:{port}" in listed


def _parts(url: str) -> SplitResult:
    """The parts of a plain http(s) address; raises `BadRequest` for anything else."""
    if len(url) > LONGEST_URL or not url.isascii() or not url.isprintable() or " " in url:
        raise BadRequest("The URL has characters that no URL has, or too many.", param="url")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise BadRequest("This is not a URL.", param="url") from None
    if parts.scheme not in _PORTS or not parts.hostname or port == 0 or "\\" in url:
        raise BadRequest("The URL must be http:// or https:// and name a host.", param="url")
    if not _HOST.fullmatch(parts.hostname):
        raise BadRequest("The URL's host is no name and no address.", param="url")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise BadRequest("The URL may have no user, password or fragment.", param="url")
    return parts


def _may_be_public(host: str) -> bool:
    """False for what is private by its look; also numbers in dresses that resolvers understand."""
    try:
        return network.is_public(host)
    except ValueError:
        pass
    last = host.rstrip(".").rpartition(".")[2]
    # A name ends in letters: 127.1, 0x7f.1 and 2130706433 are addresses to some resolvers.
    return bool(last) and not last[0].isdigit() and "." in host.rstrip(".")
