"""Secrets at rest."""

from __future__ import annotations

import hmac
from typing import Any

import pytest
from cryptography.fernet import InvalidToken
from hypothesis import given
from hypothesis import strategies as st

from accounts import secrets


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_what_is_encrypted_is_decrypted_again(text: str) -> None:
    sealed = secrets.encrypt(text)
    assert secrets.decrypt(sealed) == text
    assert not text or text not in sealed or len(text) < 8


def test_nothing_stays_nothing() -> None:
    assert (secrets.encrypt(""), secrets.decrypt("")) == ("", "")


def test_the_same_secret_is_never_sealed_alike() -> None:
    assert secrets.encrypt("token") != secrets.encrypt("token")


def test_with_another_secret_key_nothing_can_be_read(settings: Any) -> None:
    sealed = secrets.encrypt("token")
    settings.SECRET_KEY = "another" * 10
    with pytest.raises(InvalidToken):
        secrets.decrypt(sealed)


def test_a_digest_is_this_installations_own(settings: Any) -> None:
    one = secrets.digest("secret")
    settings.SECRET_KEY = "another" * 10
    assert secrets.digest("secret") != one
    assert len(one) == 64


def test_a_digest_matches_its_secret_only() -> None:
    known = secrets.digest("secret")
    assert secrets.matches("secret", known)
    assert not secrets.matches("secret2", known)
    assert not secrets.matches("secret", "0" * 64)


def test_digests_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[str, str]] = []

    def noted(one: str, other: str) -> bool:
        compared.append((one, other))
        return False

    monkeypatch.setattr(hmac, "compare_digest", noted)
    assert secrets.matches("secret", "known") is False
    assert compared == [(secrets.digest("secret"), "known")]


def test_no_two_purposes_share_a_key() -> None:
    assert secrets._derived("one") != secrets._derived("other")
