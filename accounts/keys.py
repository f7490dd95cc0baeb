"""The form of an API key: `sk-` id, secret and a checksum; no database here.

The checksum lets a scanner tell a leaked key from a random string without asking us.
"""

from __future__ import annotations

import secrets
import string
import zlib
from dataclasses import dataclass

_ALPHABET = string.digits + string.ascii_letters
_PREFIX, _SECRET, _CHECKSUM = 16, 40, 6


@dataclass(frozen=True)
class KeyText:
    prefix: str
    secret: str

    def __str__(self) -> str:
        head = f"sk-vbp-{self.prefix}-{self.secret}"
        return head + _checksum(head)


def make() -> KeyText:
    return KeyText(_random(_PREFIX), _random(_SECRET))


def parse(text: str) -> KeyText | None:
    """The parts of a key, or None for anything that was never one of ours."""
    head, checksum = text[:-_CHECKSUM], text[-_CHECKSUM:]
    parts = head.split("-")
    if len(parts) != 4 or parts[:2] != ["sk", "vbp"] or not text.isascii():
        return None
    if not (parts[2] + parts[3]).isalnum():
        return None
    if len(parts[2]) != _PREFIX or len(parts[3]) != _SECRET or checksum != _checksum(head):
        return None
    return KeyText(parts[2], parts[3])


def redacted(prefix: str) -> str:
    """What may be shown of a key: enough to tell it from others, nothing to use it by."""
    return f"sk-vbp-{prefix}-•••"


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def _checksum(head: str) -> str:
    number, digits = zlib.crc32(head.encode()), ""
    for _ in range(_CHECKSUM):
        number, digit = divmod(number, len(_ALPHABET))
        digits = _ALPHABET[digit] + digits
    return digits
