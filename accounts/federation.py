"""Others' tokens (workload identity): fetching their issuers' keys, and checking them by those.

Which issuers an organization trusts, and for what, is in `services/issuers.py`.
"""

from __future__ import annotations

import http.client
import ipaddress
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

import jwt
import orjson
from django.conf import settings

from accounts import network
from accounts.network import Deadline
from accounts.tokens import UNREADABLE

ALGORITHMS = [
    "RS256",
    "RS384",
    "RS512",
    "PS256",
    "PS384",
    "PS512",
    "ES256",
    "ES384",
    "ES512",
    "EdDSA",
]
"""Those with a public key; never `none`, never one with a shared secret."""
MAX_CHARACTERS = 16_384
MAX_AGE = 3600
"""Seconds after its making (`iat`) that a token is taken."""
LEEWAY = 30
TIMEOUT = 5.0
LONGEST_FETCH = 10.0
MAX_BYTES = 256 * 1024
KEPT_SECONDS = 600
"""A key set is asked for again after so long, and while that fails the old one does for an hour."""
STALE_SECONDS = 3600
AGAIN_SECONDS = 60
"""An unknown `kid` makes us ask again, but not more often than this."""
_REQUIRED = ["exp", "iat", "iss", "aud", "sub"]


class Untrusted(Exception):
    """The token is not taken; the message is for our log, not for who brought it."""


class Unreachable(Untrusted):
    """The issuer's keys cannot be had, or must not be asked for."""


# --- Tokens -------------------------------------------------------------------------------------


def unverified(text: str) -> Mapping[str, Any]:
    """What a token says, believed by nobody yet: to find out whose key to check it with."""
    if len(text) > MAX_CHARACTERS or not text.isascii():
        raise Untrusted("too long, or no token")
    try:
        said = jwt.decode(text, options={"verify_signature": False})
    except UNREADABLE as error:
        raise Untrusted(str(error)) from None
    for name in ("iss", "sub"):
        value = said.get(name)
        if not isinstance(value, str) or not value.isprintable():
            raise Untrusted(f"{name} is missing or no printable text")
    return dict(said)


def verified(text: str, *, issuer: str, audience: str, jwks_url: str = "") -> Mapping[str, Any]:
    """What a token says that this issuer signed for this audience, now; raises `Untrusted`."""
    try:
        header = jwt.get_unverified_header(text)
        if "crit" in header or header.get("alg") not in ALGORITHMS:
            raise Untrusted(f"header {sorted(header)} with alg {header.get('alg')!r}")
        key = _key_set(issuer, jwks_url).key(header.get("kid"), header["alg"])
        said = jwt.decode(
            text,
            key.key,
            algorithms=[header["alg"]],
            issuer=issuer,
            audience=audience,
            leeway=LEEWAY,
            options={"require": _REQUIRED, "enforce_minimum_key_length": True},
        )
        if int(said["iat"]) < time.time() - MAX_AGE:
            raise Untrusted("it was made more than an hour ago")
    except UNREADABLE as error:
        raise Untrusted(str(error)) from None
    return dict(said)


def matches(pattern: str, subject: str) -> bool:
    """Whether the pattern is the whole subject, with `*` for anything but a colon.

    Without regular expressions, whose time a hostile subject could make endless.
    """
    wanted, given = pattern.split(":"), subject.split(":")
    return len(wanted) == len(given) and all(map(_part_matches, wanted, given))


def _part_matches(pattern: str, part: str) -> bool:
    first, *rest = pattern.split("*")
    if not rest:
        return pattern == part
    *middle, last = rest
    at = len(first)
    for each in middle:
        found = part.find(each, at)
        if found < 0:
            return False
        at = found + len(each)
    return part.startswith(first) and part.endswith(last) and len(part) - len(last) >= at


# --- Key sets -----------------------------------------------------------------------------------


@dataclass
class KeySet:
    """An issuer's keys, as this process has them."""

    fetch: Callable[[], list[jwt.PyJWK]]
    keys: list[jwt.PyJWK] = field(default_factory=list)
    asked_at: float = -1e9
    fetched_at: float = -1e9
    lock: threading.Lock = field(default_factory=threading.Lock)

    def key(self, key_id: Any, algorithm: str) -> jwt.PyJWK:
        """The key of this id; without an id the only key that fits."""
        with self.lock:
            found = self._find(key_id, algorithm)
            due = time.monotonic() - self.fetched_at > KEPT_SECONDS
            if (due or not found) and time.monotonic() - self.asked_at > AGAIN_SECONDS:
                self._refresh()
                found = self._find(key_id, algorithm)
        if len(found) != 1:
            raise Untrusted(f"{len(found)} keys of the issuer have the kid {str(key_id)[:64]!r}")
        return found[0]

    def _find(self, key_id: Any, algorithm: str) -> list[jwt.PyJWK]:
        fitting = [key for key in self.keys if _fits(key, algorithm)]
        return [key for key in fitting if key_id is None or key.key_id == key_id]

    def _refresh(self) -> None:
        self.asked_at = time.monotonic()
        try:
            self.keys = self.fetch()
        except Untrusted:
            if time.monotonic() - self.fetched_at > STALE_SECONDS:
                self.keys = []
                raise
        else:
            self.fetched_at = time.monotonic()


_FAMILIES = {"RSA": ("RS", "PS"), "EC": ("ES",), "OKP": ("Ed",)}
_sets: dict[tuple[str, str], KeySet] = {}


def _key_set(issuer: str, jwks_url: str) -> KeySet:
    if len(_sets) > 1000:  # more than anybody has; who changes theirs all day costs no memory
        _sets.clear()
    return _sets.setdefault((issuer, jwks_url), KeySet(lambda: _fetch_keys(issuer, jwks_url)))


def _fits(key: jwt.PyJWK, algorithm: str) -> bool:
    """Whether the key is of the algorithm's kind, and not meant for another."""
    named = key._jwk_data.get("alg")
    family = algorithm.startswith(_FAMILIES[key.key_type or ""])
    return family and named in (None, algorithm)


def _fetch_keys(issuer: str, jwks_url: str) -> list[jwt.PyJWK]:
    found = get_json(jwks_url or _discovered(issuer)).get("keys")
    if not isinstance(found, list):
        raise Unreachable("the key set has no keys")
    return [key for each in found[:100] if (key := _public_key(each))]


def _discovered(issuer: str) -> str:
    """The address of the issuer's keys (OpenID Connect Discovery 1.0)."""
    said = get_json(issuer.rstrip("/") + "/.well-known/openid-configuration")
    if said.get("issuer") != issuer or not isinstance(said.get("jwks_uri"), str):
        raise Unreachable("discovery names another issuer, or no keys")
    return str(said["jwks_uri"])


def _public_key(each: Any) -> jwt.PyJWK | None:
    """A key that checks signatures; None for secrets, for encryption, and for what we cannot use."""
    if not isinstance(each, dict) or each.get("kty") not in _FAMILIES or "d" in each:
        return None
    if each.get("use") not in (None, "sig"):
        return None
    try:
        return jwt.PyJWK(each)
    except (*UNREADABLE, KeyError, AttributeError, NotImplementedError):
        return None


# --- The network --------------------------------------------------------------------------------


def checked_url(url: str) -> SplitResult:
    """The parts of an address that we may ask; raises `Unreachable` saying what is wrong with it."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise Unreachable("it is no address") from None
    if not url.isascii() or not url.isprintable() or " " in url or not host or port == 0:
        raise Unreachable("it is no address")
    if parts.username is not None or parts.password is not None or parts.fragment or parts.query:
        raise Unreachable("it has a user, a query or a fragment")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_own_machine(host)):
        raise Unreachable("it must begin with https://")
    return parts


def get_json(url: str) -> dict[str, Any]:
    """The JSON object at an address: no redirects, no proxies, limited in time and size."""
    parts = checked_url(url)
    try:
        body = _get(parts)
        said = orjson.loads(body)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unreachable(f"{parts.hostname}: {error or type(error).__name__}") from None
    if not isinstance(said, dict):
        raise Unreachable("it is no JSON object")
    return said


def _get(parts: SplitResult) -> bytes:
    host = parts.hostname or ""
    with Deadline(LONGEST_FETCH) as deadline, closing(_connection(parts, deadline)) as connection:
        headers = {"Accept": "application/json", "User-Agent": "vllm-batch-portal"}
        connection.request("GET", parts.path or "/", headers=headers)
        response = connection.getresponse()
        if response.status != 200:
            raise Unreachable(f"{host} answered {response.status}")
        body = response.read(MAX_BYTES + 1)
        deadline.require_left()
    if len(body) > MAX_BYTES:
        raise Unreachable(f"{host} answered too much")
    return body


def _connection(parts: SplitResult, deadline: Deadline) -> http.client.HTTPConnection:
    secure, host = parts.scheme == "https", parts.hostname or ""
    port = parts.port or (443 if secure else 80)
    public = settings.PRODUCTION and host not in settings.TRUSTED_ISSUER_PRIVATE_HOSTS
    there = network.connect(host, port, deadline, timeout=TIMEOUT, public=public)
    connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(host, port)
    try:
        context = ssl.create_default_context()
        connection.sock = context.wrap_socket(there, server_hostname=host) if secure else there
    except BaseException:
        there.close()
        raise
    return connection


def _is_own_machine(host: str) -> bool:
    """Whether, in development, plain http may be spoken with it."""
    if settings.PRODUCTION:
        return False
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
