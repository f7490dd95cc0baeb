"""The form of our access tokens (JWT, RFC 9068): making and checking their text; no database here.

Only Ed25519 signs them, whatever a token's header says. Others' tokens are in `federation.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from django.conf import settings

ALGORITHM = "EdDSA"
TYPE = "at+jwt"
LEEWAY = 10
"""Seconds that the clocks of our own hosts may differ by."""
MAX_CHARACTERS = 4096
KEY_ID = re.compile(r"sig_[0-9a-f]{32}", re.ASCII)
_HEADER = {"alg", "kid", "typ"}
_TEXTS = ("sub", "org", "project", "scope", "jti")
_REQUIRED = ["iss", "aud", "iat", "nbf", "exp", *_TEXTS]

# What hostile text raises beside PyJWT's own errors: depth, numbers without end, odd types.
UNREADABLE = (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Claims:
    """What a token says; `subject` is a key's id, `user:<id>` or `issuer:<id>`.

    A person's has a `stamp`, which is another once their password is.
    """

    subject: str
    organization_id: str
    project_id: str
    scopes: tuple[str, ...]
    issued_at: datetime
    expires_at: datetime
    jti: str
    stamp: str = ""


def is_token(text: str) -> bool:
    """Whether a bearer's text has the form of a token, so that no key is looked for."""
    return text.count(".") == 2


def make(claims: Claims, *, key: Ed25519PrivateKey, key_id: str) -> str:
    issued = int(claims.issued_at.timestamp())
    payload = {
        "iss": settings.BASE_URL,
        "aud": _audience(),
        "sub": claims.subject,
        "org": claims.organization_id,
        "project": claims.project_id,
        "scope": " ".join(claims.scopes),
        "iat": issued,
        "nbf": issued,
        "exp": int(claims.expires_at.timestamp()),
        "jti": claims.jti,
    }
    if claims.stamp:
        payload["stamp"] = claims.stamp
    headers = {"kid": key_id, "typ": TYPE}
    return jwt.encode(payload, key, algorithm=ALGORITHM, headers=headers)


def key_id_of(text: str) -> str | None:
    """The `kid` of a token whose header is exactly as we write it; None for all others."""
    if len(text) > MAX_CHARACTERS or not text.isascii():
        return None
    try:
        header = jwt.get_unverified_header(text)
    except UNREADABLE:
        return None
    if set(header) != _HEADER or (header["alg"], header["typ"]) != (ALGORITHM, TYPE):
        return None
    return header["kid"] if KEY_ID.fullmatch(header["kid"]) else None


def read(text: str, key: Ed25519PublicKey) -> Claims | None:
    """What the token says, if this key signed it, for us, and it is valid now."""
    try:
        said = jwt.decode(
            text,
            key,
            algorithms=[ALGORITHM],
            issuer=settings.BASE_URL,
            audience=_audience(),
            leeway=LEEWAY,
            options={"require": _REQUIRED, "strict_aud": True},
        )
        return _claims(said) if all(isinstance(said[name], str) for name in _TEXTS) else None
    except UNREADABLE:
        return None


def _claims(said: dict[str, Any]) -> Claims:
    return Claims(
        subject=said["sub"],
        organization_id=said["org"],
        project_id=said["project"],
        scopes=tuple(said["scope"].split()),
        issued_at=datetime.fromtimestamp(said["iat"], UTC),
        expires_at=datetime.fromtimestamp(said["exp"], UTC),
        jti=said["jti"],
        stamp=str(said.get("stamp", "")),
    )


def _audience() -> str:
    return f"{settings.BASE_URL}/v1"
