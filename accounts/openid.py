"""What an OpenID provider says, reduced to what we use of it, in the shape that it has to have.

A tenant runs it, so it may say anything: what does not fit raises `ValueError` here, not later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import jwt
import orjson
import requests
from django.conf import settings

from accounts import names
from accounts.addresses import checked_email
from accounts.errors import BadRequest
from accounts.tokens import UNREADABLE

DISCOVERY = "/.well-known/openid-configuration"
ENDPOINTS = ("authorization_endpoint", "token_endpoint", "userinfo_endpoint", "jwks_uri")
LONGEST_SUBJECT = 191
LONGEST_TOKEN = 16_384
LONGEST_LIFE = 2**32
"""Seconds; beyond it no moment can be computed."""


def discovery(response: requests.Response) -> dict[str, Any]:
    """A discovery document with all that signing in needs."""
    response.raise_for_status()
    said = _object(response)
    for name in ENDPOINTS:
        if not is_web(said.get(name)):
            raise ValueError(f"no {name}")
    kept = {name: said[name] for name in ENDPOINTS}
    kept["issuer"] = _text(said, "issuer", 500)
    methods = said.get("token_endpoint_auth_methods_supported")
    if isinstance(methods, list):
        kept["token_endpoint_auth_methods_supported"] = methods
    return kept


def tokens(response: requests.Response) -> dict[str, Any]:
    """What the token endpoint gives; nothing where it refuses."""
    if not response.ok:
        return {}
    said = _object(response)
    kept: dict[str, Any] = {"access_token": _text(said, "access_token", LONGEST_TOKEN)}
    if not kept["access_token"].isascii():
        raise ValueError("access_token is no header's text")
    if said.get("id_token") is not None:
        kept["id_token"] = _text(said, "id_token", LONGEST_TOKEN)
        _require_shape(kept["id_token"])
    return kept


def person(response: requests.Response) -> dict[str, Any]:
    """Who has come, as userinfo says; an address or name that cannot be is none."""
    response.raise_for_status()
    said = _object(response)
    kept: dict[str, Any] = {"sub": _text(said, "sub", LONGEST_SUBJECT)}
    for name, clean in _CLAIMS.items():
        try:
            if isinstance(said.get(name), str):
                kept[name] = clean(said[name])
        except BadRequest:
            continue
    if "email_verified" in said:
        kept["email_verified"] = said["email_verified"] in (True, "true")
    return kept


def is_web(address: object) -> bool:
    """Whether it is an address of the web; in production, with TLS."""
    if not isinstance(address, str) or not address.isascii() or not address.isprintable():
        return False
    try:
        parts = urlsplit(address)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    schemes = ("https",) if settings.PRODUCTION else ("https", "http")
    return named and parts.scheme in schemes and " " not in address


_CLAIMS: Mapping[str, Callable[[str], str]] = {
    "email": checked_email,
    "name": names.clean,
    "preferred_username": names.clean,
}


def _object(response: requests.Response) -> dict[str, Any]:
    said = orjson.loads(response.content)
    if not isinstance(said, dict):
        raise ValueError("not an object")
    return said


def _text(said: dict[str, Any], name: str, longest: int) -> str:
    value = said.get(name)
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= longest:
        raise ValueError(f"{name} is not 1 to {longest} printable characters")
    return value


def _require_shape(id_token: str) -> None:
    """Of the claims that are computed with; the rest is checked where the token is."""
    try:
        said = jwt.decode(id_token, options={"verify_signature": False})
    except UNREADABLE as error:
        raise ValueError(f"id_token: {error}") from None
    _text(said, "sub", LONGEST_SUBJECT)
    if not isinstance(said.get("exp"), int | float) or not 0 < said["exp"] < LONGEST_LIFE:
        raise ValueError("id_token has no exp")
    if said.get("jti") is not None:
        _text(said, "jti", 500)
