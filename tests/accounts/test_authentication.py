"""Who an API request is from: keys that work, keys that do not, and what the answer says."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone

from accounts import keys, queries, secrets
from accounts.keys import KeyText
from accounts.models import ApiKey, Membership, Role
from accounts.queries import caller_of_key, caller_of_user
from accounts.services.keys import FULL_SCOPES
from tests.conftest import Person

pytestmark = pytest.mark.django_db


def key_of(person: Person) -> ApiKey:
    with person.caller.scope():
        return ApiKey.objects.get(name=person.user.email)


def change(person: Person, **fields: Any) -> None:
    with person.caller.scope():
        ApiKey.objects.filter(pk=key_of(person).pk).update(**fields)


def asked(**headers: str) -> tuple[int, str | None]:
    """The status and the error's code."""
    response = Client(headers={name.replace("_", "-"): it for name, it in headers.items()}).get(
        "/v1/files"
    )
    code = None if response.status_code == 200 else response.json()["error"]["code"]
    return response.status_code, code


def test_a_key_speaks_for_its_project(owner: Person) -> None:
    caller = caller_of_key(owner.key)
    assert caller is not None
    assert (caller.organization, caller.project) == (
        owner.caller.organization,
        owner.caller.project,
    )
    assert (caller.user, caller.role, caller.api_key) == (owner.user, "owner", key_of(owner))


def test_each_key_is_its_own_organizations(owner: Person, stranger: Person) -> None:
    found = [caller_of_key(person.key) for person in (owner, stranger)]
    names = [caller.organization.name for caller in found if caller is not None]
    assert names == ["Acme", "Globex"]


def revoked(owner: Person) -> str:
    change(owner, revoked_at=timezone.now())
    return owner.key


def expired(owner: Person) -> str:
    change(owner, expires_at=timezone.now() - timedelta(seconds=1))
    return owner.key


def of_another_secret(owner: Person) -> str:
    return str(KeyText(key_of(owner).prefix, keys.make().secret))


def unknown(owner: Person) -> str:
    return str(keys.make())


def broken(owner: Person) -> str:
    return owner.key[:-1] + ("0" if owner.key[-1] != "0" else "1")


def hostile(owner: Person) -> str:
    return str(KeyText("0123456789abcde\0", "s" * 40))


@pytest.mark.parametrize("bad", [revoked, expired, of_another_secret, unknown, broken, hostile])
def test_keys_that_do_not_work_are_told_nothing(
    owner: Person, bad: Callable[[Person], str]
) -> None:
    text = bad(owner)
    assert caller_of_key(text) is None
    assert asked(authorization=f"Bearer {text}") == (401, "invalid_api_key")


def test_a_key_works_until_it_expires(owner: Person) -> None:
    change(owner, expires_at=timezone.now() + timedelta(hours=1))
    assert asked(authorization=f"Bearer {owner.key}") == (200, None)


def test_an_unknown_keys_secret_is_compared_too(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []
    monkeypatch.setattr(
        queries.secrets, "matches", lambda secret, known: compared.append(secret) or False
    )
    made = keys.make()
    assert caller_of_key(str(made)) is None
    assert compared == [made.secret]


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic abc", "Bearer\t", "bearer", "sk-vbp-x"]
)
def test_without_a_key_the_answer_says_how_to_send_one(header: str) -> None:
    headers = {"authorization": header} if header else {}
    assert asked(**headers) == (401, "missing_api_key")


def test_the_scheme_is_read_in_any_case_and_with_spaces(owner: Person) -> None:
    assert asked(authorization=f"bEaReR   {owner.key} ") == (200, None)


def test_the_organization_and_project_that_are_named_must_be_the_keys(
    owner: Person, stranger: Person
) -> None:
    bearer = f"Bearer {owner.key}"
    own = {
        "openai_organization": owner.caller.organization.pk,
        "openai_project": owner.caller.project.pk,
    }
    assert asked(authorization=bearer, **own) == (200, None)
    for name in own:
        theirs = {
            "openai_organization": stranger.caller.organization.pk,
            "openai_project": stranger.caller.project.pk,
        }[name]
        assert asked(authorization=bearer, **{name: theirs})[0] == 401


def test_the_use_of_a_key_is_noted_to_the_minute(owner: Person) -> None:
    assert key_of(owner).last_used_at is None
    asked(authorization=f"Bearer {owner.key}")
    first = key_of(owner).last_used_at
    assert first is not None
    asked(authorization=f"Bearer {owner.key}")
    assert key_of(owner).last_used_at == first
    change(owner, last_used_at=first - timedelta(minutes=2))
    asked(authorization=f"Bearer {owner.key}")
    again = key_of(owner).last_used_at
    assert again is not None
    assert again > first


def test_a_bad_key_is_not_noted_as_used(owner: Person) -> None:
    asked(authorization=f"Bearer {of_another_secret(owner)}")
    assert key_of(owner).last_used_at is None


# --- People ---------------------------------------------------------------------------------


def test_a_person_acts_in_the_organization_that_they_chose(owner: Person, stranger: Person) -> None:
    with stranger.caller.scope():
        Membership.objects.create(
            organization=stranger.caller.organization, user=owner.user, role=Role.VIEWER
        )
    found = [caller_of_user(owner.user, slug) for slug in (None, "acme", "globex", "nowhere")]
    said = [(each.organization.slug, each.role) for each in found if each]
    assert said == [
        ("acme", "owner"),
        ("acme", "owner"),
        ("globex", "viewer"),
        ("acme", "owner"),
    ]


def test_an_organization_that_is_not_theirs_cannot_be_chosen(
    owner: Person, stranger: Person
) -> None:
    caller = caller_of_user(owner.user, stranger.caller.organization.slug)
    assert caller is not None
    assert caller.organization == owner.caller.organization


def test_who_belongs_nowhere_is_nobody(operator: Any) -> None:
    assert caller_of_user(operator) is None


def test_only_a_digest_of_the_secret_is_kept(owner: Person) -> None:
    parsed = keys.parse(owner.key)
    assert parsed is not None
    row = key_of(owner)
    assert row.digest == secrets.digest(parsed.secret)
    assert parsed.secret not in {str(value) for value in vars(row).values()}
    assert row.scopes == FULL_SCOPES
