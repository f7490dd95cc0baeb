"""Writes of access tokens: the keys that sign them, issuing, revoking.

A token's text is in `accounts/tokens.py`; whom it speaks for is read in `queries.py`.
"""

from __future__ import annotations

import secrets as random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import orjson
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from django.db import connection, transaction
from django.db.models import Q, QuerySet
from django.utils import timezone
from jwt.algorithms import OKPAlgorithm

from accounts import ids, queries, roles, secrets, tokens
from accounts.access import Caller
from accounts.errors import BadRequest, Forbidden
from accounts.models import RevokedToken, Scope, SigningKey
from accounts.services import audit, keys
from accounts.tokens import Claims

SHORTEST, USUAL, LONGEST = 300, 900, 3600
"""Seconds that a token may live."""
PUBLISHED_FOR = timedelta(minutes=10)
"""A new key is published so long before it signs: longer than anybody keeps the key set."""
JWKS_SECONDS = 300
KNOWN_SECONDS = 10
"""A process believes what it knows of a signing key for so long."""


@dataclass(frozen=True)
class Issued:
    """A new token's text, and what it says."""

    text: str
    claims: Claims


# --- Tokens -------------------------------------------------------------------------------------


@transaction.atomic
def issue_token(
    *, actor: Caller, scopes: Sequence[str] = (), expires_in: int = USUAL, subject: str = ""
) -> Issued:
    """A token that may do, at most, what the actor may; `expires_in` in seconds.

    Without `scopes` it has all of the actor's. `subject` is who it speaks for, where that is
    neither a key nor a person.
    """
    if actor.token_id:
        said = "A token cannot make a token; use the API key or sign in."
        raise Forbidden(said, code="token_from_token")
    if not SHORTEST <= expires_in <= LONGEST:
        said = f"A token may live for {SHORTEST} to {LONGEST} seconds."
        raise BadRequest(said, param="expires_in", code="invalid_value")
    now = timezone.now().replace(microsecond=0)
    claims = Claims(
        subject=subject or _subject_of(actor),
        organization_id=actor.organization.pk,
        project_id=actor.project.pk,
        scopes=tuple(_scopes_for(actor, scopes)),
        issued_at=now,
        expires_at=now + timedelta(seconds=expires_in),
        jti=random.token_hex(16),
        stamp=_stamp_for(actor),
    )
    row = _signing_key()
    issued = Issued(tokens.make(claims, key=_private(row), key_id=row.pk), claims)
    changes = {
        "subject": [None, claims.subject],
        "scopes": [None, list(claims.scopes)],
        "expires_at": [None, claims.expires_at],
    }
    # Who is neither person nor key is known by the token alone.
    maker = replace(actor, token_id=claims.jti) if subject else actor
    audit.record("token.created", actor=maker, label=claims.jti, changes=changes)
    return issued


def read_token(text: str) -> Claims | None:
    """What a token of ours says, if it is good; whether it was revoked is another question."""
    key_id = tokens.key_id_of(text)
    key = public_key(key_id) if key_id else None
    return tokens.read(text, key) if key else None


@transaction.atomic
def revoke_token(*, actor: Caller, text: str) -> None:
    """Refuse a token from now on. Nothing happens for one that does not work anyway.

    It may be revoked by itself, by who made it, and by who looks after all keys.
    """
    claims = read_token(text)
    if claims is None:
        return
    _require_own(actor, claims)
    _, fresh = RevokedToken.objects.get_or_create(
        jti=claims.jti, defaults={"expires_at": claims.expires_at}
    )
    if fresh:
        audit.record("token.revoked", actor=actor, label=claims.jti)


def _subject_of(actor: Caller) -> str:
    if actor.api_key is not None:
        return actor.api_key.pk
    if actor.user is None:
        raise Forbidden("A token is made by a key or a person.", code="no_subject")
    return f"user:{actor.user.pk}"


def _stamp_for(actor: Caller) -> str:
    if actor.api_key is not None or actor.user is None:
        return ""
    return queries.stamp_of(actor.user)


def _scopes_for(actor: Caller, asked: Sequence[str]) -> list[str]:
    """What the token may be used for; refuses what the actor may not do themselves."""
    if not asked:
        own = keys.scopes_to_give(actor) if actor.scopes is None else actor.scopes
        return [scope for scope in own if actor.scopes is not None or scope != Scope.OPERATOR]
    if actor.scopes is None:
        keys.require_scopes(actor, asked)
    elif not roles.covers(actor.scopes, asked) or set(asked) - set(Scope.values):
        said = "A token may have fewer scopes than what it is made of, not others."
        raise Forbidden(said, code="scope_too_wide")
    return list(dict.fromkeys(asked))


def _require_own(actor: Caller, claims: Claims) -> None:
    if actor.token_id == claims.jti:
        return
    if not actor.token_id and _subject_of(actor) == claims.subject:
        return
    if actor.organization.pk == claims.organization_id and actor.may("keys.all"):
        return
    raise Forbidden("This token is somebody else's.", param="token", code="not_your_token")


# --- The keys that sign -------------------------------------------------------------------------


@transaction.atomic
def rotate_signing_key(*, published_for: timedelta = PUBLISHED_FOR) -> SigningKey:
    """Make the key that signs next; those before it retire when the last token of theirs has expired.

    With `published_for` of 0 the old ones are refused at once, as after a leak: every token that
    they signed ends.
    """
    _lock()
    now = timezone.now()
    others = SigningKey.objects.filter(Q(retires_at=None) | Q(retires_at__gt=now))
    first = not others.exists()
    signs_from = now if first else now + published_for
    lasting = timedelta(seconds=LONGEST + 2 * tokens.LEEWAY)
    retires_at = signs_from + lasting if published_for else now
    others.filter(Q(retires_at=None) | Q(retires_at__gt=retires_at)).update(retires_at=retires_at)
    made = _make(signs_from)
    _known.clear()
    audit.record("signing_key.rotated", actor=None, target=made)
    return made


def public_key(key_id: str) -> Ed25519PublicKey | None:
    """The key of this id, unless it is unknown or retired; remembered for `KNOWN_SECONDS`."""
    found = _known.get(key_id)
    if found is None or found[1] <= time.monotonic():
        row = _accepted().filter(pk=key_id).first()
        if row is None:
            _known.pop(key_id, None)
            return None
        key = OKPAlgorithm.from_jwk(row.public_jwk)
        assert isinstance(key, Ed25519PublicKey)
        found = _known[key_id] = (key, time.monotonic() + KNOWN_SECONDS, row.retires_at)
    retires_at = found[2]
    return found[0] if retires_at is None or retires_at > timezone.now() else None


def jwks() -> dict[str, Any]:
    """The public halves of all keys that are not retired (RFC 7517)."""
    found = [row.public_jwk for row in _accepted().order_by("-signs_from", "pk")]
    return {"keys": found or [_signing_key().public_jwk]}


_known: dict[str, tuple[Ed25519PublicKey, float, datetime | None]] = {}


def _accepted() -> QuerySet[SigningKey]:
    now = timezone.now()
    return SigningKey.objects.filter(Q(retires_at=None) | Q(retires_at__gt=now))


def _current() -> SigningKey | None:
    return _accepted().filter(signs_from__lte=timezone.now()).order_by("-signs_from").first()


@transaction.atomic
def _signing_key() -> SigningKey:
    """The newest key that signs already; the first one is made here, by one process alone."""
    if found := _current():
        return found
    _lock()
    return _current() or _make(timezone.now())


def _lock() -> None:
    """Until the transaction ends nobody else makes a signing key."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended('signing keys', 0))")


def _make(signs_from: datetime) -> SigningKey:
    private, id = Ed25519PrivateKey.generate(), ids.new_id("sig_")
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    public = orjson.loads(OKPAlgorithm.to_jwk(private.public_key()))
    return SigningKey.objects.create(
        id=id,
        encrypted_private=secrets.encrypt(pem),
        public_jwk=public | {"kid": id, "alg": tokens.ALGORITHM, "use": "sig"},
        signs_from=signs_from,
    )


def _private(row: SigningKey) -> Ed25519PrivateKey:
    key = load_pem_private_key(secrets.decrypt(row.encrypted_private).encode(), None)
    assert isinstance(key, Ed25519PrivateKey)
    return key
