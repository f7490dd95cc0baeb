"""Secrets at rest: encryption of what we must read again, digests of what we must only compare."""

from __future__ import annotations

import base64
import hashlib
import hmac

from cryptography.fernet import Fernet
from django.conf import settings


def _derived(purpose: str) -> bytes:
    """32 bytes for one purpose, so that no two uses share a key."""
    return hmac.digest(settings.SECRET_KEY.encode(), purpose.encode(), hashlib.sha256)


def _fernet() -> Fernet:
    return Fernet(base64.urlsafe_b64encode(_derived("secrets at rest")))


def encrypt(text: str) -> str:
    return _fernet().encrypt(text.encode()).decode() if text else ""


def decrypt(text: str) -> str:
    return _fernet().decrypt(text.encode()).decode() if text else ""


def digest(secret: str) -> str:
    """A peppered digest: useless without this installation's SECRET_KEY."""
    return hmac.new(_derived("api key pepper"), secret.encode(), hashlib.sha256).hexdigest()


def matches(secret: str, known: str) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(digest(secret), known)
