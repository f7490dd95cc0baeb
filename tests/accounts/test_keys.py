"""The form of an API key; no database."""

from __future__ import annotations

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from accounts import keys
from accounts.keys import KeyText, parse

KEY = KeyText("0123456789abcdef", "s" * 40)
ALPHABET = string.digits + string.ascii_letters


def forged(prefix: str, secret: str) -> str:
    """Whoever reads this code can make a checksum that is right."""
    return str(KeyText(prefix, secret))


def test_a_key_has_a_known_form() -> None:
    text = str(keys.make())
    assert text.startswith("sk-vbp-")
    assert [len(part) for part in text.split("-")] == [2, 3, 16, 46]
    assert set(text) <= set(ALPHABET + "-")


def test_a_key_is_parsed_into_what_it_was_made_of() -> None:
    made = keys.make()
    assert parse(str(made)) == made
    assert parse(str(KEY)) == KEY


def test_no_two_keys_are_the_same() -> None:
    made = [keys.make() for _ in range(100)]
    assert len({key.prefix for key in made} | {key.secret for key in made}) == 200


@given(st.integers(0, len(str(KEY)) - 1), st.sampled_from(ALPHABET + "-_ é"))
def test_a_key_with_a_changed_character_is_none(at: int, char: str) -> None:
    text = str(KEY)
    changed = text[:at] + char + text[at + 1 :]
    assert parse(changed) == (KEY if changed == text else None)


@given(st.text(max_size=80) | st.text(ALPHABET + "-", max_size=80).map("sk-vbp-".__add__))
@example("")
@example("sk-vbp-")
@example("\ud800")
@example("sk-vbp-\ud800")
def test_garbage_is_none(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize(
    "text",
    [
        str(KEY)[:-1],
        str(KEY) + "0",
        " " + str(KEY),
        str(KEY).upper(),
        str(KEY).replace("vbp", "xyz"),
        forged("short", "s" * 40),
        forged("0123456789abcdef", "s" * 39),
        forged("0123456789abcde\0", "s" * 40),
        forged("0123456789abcde'", "s" * 40),
        forged("0123456789abcde\n", "s" * 40),
        forged("0123456789abcdeé", "s" * 40),
        forged("0123456789abcdef", "s" * 39 + "\0"),
        forged("0123456789abcdef", "-" * 40),
    ],
)
def test_what_was_never_a_key_of_ours_is_none(text: str) -> None:
    assert parse(text) is None


def test_the_checksum_is_what_it_always_was() -> None:
    """Keys that people hold must stay keys."""
    assert str(KEY) == f"sk-vbp-0123456789abcdef-{'s' * 40}" + keys._checksum(str(KEY)[:-6])
    assert keys._checksum("") == "000000"
    assert keys._checksum("sk-vbp-") == "28aXzj"
