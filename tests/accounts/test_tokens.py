"""Access tokens: what is refused of them, and how the keys that sign them change."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import jwt
import orjson
import pytest
import time_machine
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from django.conf import settings
from django.core.management import call_command
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from accounts import tokens as form
from accounts.access import Caller
from accounts.errors import Forbidden
from accounts.models import ApiKey, RevokedToken, SigningKey
from accounts.queries import caller_of_key, caller_of_token
from accounts.services import tokens
from accounts.services.expired_tokens import forget_expired_tokens
from tests.conftest import Person

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def forgotten() -> None:
    """No signing key of another test is remembered."""
    tokens._known.clear()


def caller_with_key(person: Person) -> Caller:
    caller = caller_of_key(person.key)
    assert caller is not None
    return caller


def issued(person: Person, **given: Any) -> str:
    return tokens.issue_token(actor=caller_with_key(person), **given).text


def asked(text: str, **headers: str) -> tuple[int, str | None]:
    """The status and the error's code of a list of files."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    client = Client(headers={"authorization": f"Bearer {text}"} | named)
    response = client.get("/v1/files")
    code = None if response.status_code == 200 else response.json()["error"]["code"]
    return response.status_code, code


GOOD, BAD = (200, None), (401, "invalid_token")


# --- What a token is ------------------------------------------------------------------------


def test_a_token_says_who_for_what_and_how_long(owner: Person) -> None:
    text = issued(owner, scopes=["files.read"], expires_in=600)
    said = jwt.decode(text, options={"verify_signature": False})
    header = jwt.get_unverified_header(text)
    now = said["iat"]
    caller = caller_with_key(owner)
    assert caller.api_key is not None
    assert {name: said[name] for name in said if name != "jti"} == {
        "iss": settings.BASE_URL,
        "aud": f"{settings.BASE_URL}/v1",
        "sub": caller.api_key.pk,
        "org": caller.organization.pk,
        "project": caller.project.pk,
        "scope": "files.read",
        "iat": now,
        "nbf": now,
        "exp": now + 600,
    }
    assert header == {"alg": "EdDSA", "kid": SigningKey.objects.get().pk, "typ": "at+jwt"}


def test_a_token_works_as_its_key_with_its_own_scopes(owner: Person) -> None:
    text = issued(owner, scopes=["files.read"])
    assert asked(text) == GOOD
    client = Client(headers={"authorization": f"Bearer {text}"})
    refused = client.get("/v1/batches")
    assert (refused.status_code, refused.json()["error"]["message"]) == (
        403,
        "This access token lacks the scope 'batches.read'.",
    )


def test_the_caller_of_a_token_has_the_keys_person_and_the_tokens_id(owner: Person) -> None:
    made = tokens.issue_token(actor=caller_with_key(owner), scopes=["files.read"])
    claims = tokens.read_token(made.text)
    assert claims == made.claims
    caller = caller_of_token(claims)
    assert caller is not None
    assert (caller.user, caller.role, caller.scopes, caller.token_id, caller.api_key) == (
        owner.user,
        "owner",
        ("files.read",),
        claims.jti,
        caller_with_key(owner).api_key,
    )


# --- What is refused of a token -------------------------------------------------------------


def claims_of(text: str) -> dict[str, Any]:
    return dict(jwt.decode(text, options={"verify_signature": False}))


def signed(claims: dict[str, Any], **changed: Any) -> str:
    """These claims, changed, with our own signature: a thing that only we can make."""
    row = SigningKey.objects.get()
    headers = {"kid": row.pk, "typ": "at+jwt"}
    said = {name: value for name, value in (claims | changed).items() if value is not None}
    payload = orjson.dumps(said)
    return jwt.api_jws.encode(payload, tokens._private(row), algorithm="EdDSA", headers=headers)


def unsigned(text: str) -> str:
    kid = jwt.get_unverified_header(text)["kid"]
    return jwt.encode(claims_of(text), None, "none", headers={"kid": kid, "typ": "at+jwt"})


def unsigned_but_with_a_signature(text: str) -> str:
    return unsigned(text) + text.rpartition(".")[2]


def public_key_as_secret(text: str) -> str:
    """HS256 with what everybody can read at /.well-known/jwks.json."""
    key = tokens._private(SigningKey.objects.get()).public_key()
    secret = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
    kid = jwt.get_unverified_header(text)["kid"]
    return jwt.encode(claims_of(text), secret, "HS256", headers={"kid": kid, "typ": "at+jwt"})


def another_algorithm(text: str) -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    kid = jwt.get_unverified_header(text)["kid"]
    return jwt.encode(claims_of(text), key, "RS256", headers={"kid": kid, "typ": "at+jwt"})


def another_key(text: str) -> str:
    headers = {"kid": jwt.get_unverified_header(text)["kid"], "typ": "at+jwt"}
    return jwt.encode(claims_of(text), Ed25519PrivateKey.generate(), "EdDSA", headers=headers)


def unknown_kid(text: str) -> str:
    headers = {"kid": "sig_" + "0" * 32, "typ": "at+jwt"}
    key = tokens._private(SigningKey.objects.get())
    return jwt.encode(claims_of(text), key, "EdDSA", headers=headers)


def with_header(**changed: Any) -> Callable[[str], str]:
    def make(text: str) -> str:
        row = SigningKey.objects.get()
        headers = {"kid": row.pk, "typ": "at+jwt"} | changed
        return jwt.encode(claims_of(text), tokens._private(row), "EdDSA", headers=headers)

    return make


def without_kid(text: str) -> str:
    key = tokens._private(SigningKey.objects.get())
    return jwt.encode(claims_of(text), key, "EdDSA", headers={"typ": "at+jwt"})


def detached(text: str) -> str:
    key = tokens._private(SigningKey.objects.get())
    headers = {"kid": SigningKey.objects.get().pk, "typ": "at+jwt", "b64": False, "crit": ["b64"]}
    payload = orjson.dumps(claims_of(text))
    return jwt.api_jws.encode(payload, key, "EdDSA", headers=headers, is_payload_detached=True)


def tampered(text: str) -> str:
    head, payload, signature = text.split(".")
    said = orjson.loads(base64.urlsafe_b64decode(payload + "=="))
    forged = orjson.dumps(said | {"scope": "files batches admin.write"})
    return ".".join([head, base64.urlsafe_b64encode(forged).decode().rstrip("="), signature])


def cut(text: str) -> str:
    return text.rpartition(".")[0] + "."


def garbage(text: str) -> str:
    return "é.\x00.💥".encode().decode("latin-1")


def huge(text: str) -> str:
    return signed(claims_of(text), more="x" * 100_000)


def deep(text: str) -> str:
    nested = b'{"alg":' + b"[" * 2500
    return base64.urlsafe_b64encode(nested).decode().rstrip("=") + ".e30.AA"


FORGED = [
    unsigned,
    unsigned_but_with_a_signature,
    public_key_as_secret,
    another_algorithm,
    another_key,
    unknown_kid,
    without_kid,
    detached,
    tampered,
    cut,
    garbage,
    huge,
    deep,
    with_header(crit=["exp"]),
    with_header(typ="JWT"),
    with_header(jku="https://evil.test/jwks.json"),
    with_header(kid="sig_\0" + "0" * 31),
]


@pytest.mark.parametrize("forge", FORGED)
def test_a_forged_token_is_refused(owner: Person, forge: Callable[[str], str]) -> None:
    text = issued(owner)
    assert asked(text) == GOOD
    assert asked(forge(text)) == BAD


CHANGED: dict[str, dict[str, Any]] = {
    "expired": {"exp": -60},
    "expires at no number": {"exp": "soon"},
    "expires at infinity": {"exp": "1e400"},
    "begins later": {"nbf": 31},
    "made later": {"iat": 31},
    "another audience": {"aud": "https://elsewhere.test/v1"},
    "many audiences": {"aud": [f"{settings.BASE_URL}/v1", "https://elsewhere.test"]},
    "another issuer": {"iss": "https://elsewhere.test"},
    "a number as subject": {"sub": 7},
    "a list as scope": {"scope": ["files"]},
    "a number as id": {"jti": 7},
    "nobody": {"sub": "key_0"},
    "no person": {"sub": "user:0"},
    "no issuer": {"sub": "issuer:iss_0"},
}
MOMENTS = ("exp", "nbf", "iat")


@pytest.mark.parametrize("case", CHANGED)
def test_a_token_is_refused_that_is(owner: Person, case: str) -> None:
    claims = claims_of(issued(owner))
    now = int(timezone.now().timestamp())
    changed = {
        name: now + value if name in MOMENTS and isinstance(value, int) else value
        for name, value in CHANGED[case].items()
    }
    assert asked(signed(claims)) == GOOD
    assert asked(signed(claims, **changed)) == BAD


@pytest.mark.parametrize(
    "missing", ["iss", "aud", "sub", "org", "project", "scope", "iat", "nbf", "exp", "jti"]
)
def test_a_token_is_refused_without(owner: Person, missing: str) -> None:
    assert asked(signed(claims_of(issued(owner)), **{missing: None})) == BAD


def test_a_token_is_good_until_it_expires(owner: Person) -> None:
    with time_machine.travel(timezone.now(), tick=False) as clock:
        text = issued(owner, expires_in=300)
        clock.shift(299)
        assert asked(text) == GOOD
        clock.shift(1 + form.LEEWAY)
        assert asked(text) == BAD


# --- Tenants --------------------------------------------------------------------------------


def test_a_token_with_another_organization_in_it_is_refused(
    owner: Person, stranger: Person
) -> None:
    claims = claims_of(issued(owner))
    theirs = {"org": stranger.caller.organization.pk, "project": stranger.caller.project.pk}
    # Even with our own signature: what it was made of is not of that organization.
    assert asked(signed(claims, **theirs)) == BAD
    assert asked(signed(claims, org=theirs["org"])) == BAD
    assert asked(signed(claims, project=theirs["project"])) == BAD
    assert asked(signed(claims, sub=f"user:{owner.user.pk}", **theirs)) == BAD


def test_a_token_with_the_header_of_another_organization_is_refused(
    owner: Person, stranger: Person
) -> None:
    text = issued(owner)
    assert asked(text, openai_organization=owner.caller.organization.pk) == GOOD
    refused = asked(text, openai_organization=stranger.caller.organization.pk)
    assert refused == (401, None)


# --- What a token was made of ---------------------------------------------------------------


def change_key(person: Person, **fields: Any) -> None:
    with person.caller.scope():
        ApiKey.objects.filter(created_by=person.user).update(**fields)


def revoked(person: Person) -> tuple[int, str | None]:
    change_key(person, revoked_at=timezone.now())
    return BAD


def expired(person: Person) -> tuple[int, str | None]:
    change_key(person, expires_at=timezone.now() - timedelta(seconds=1))
    return BAD


def of_another_network(person: Person) -> tuple[int, str | None]:
    change_key(person, allowed_ips=["10.0.0.0/8"])
    return 403, "ip_not_allowed"


def narrowed(person: Person) -> tuple[int, str | None]:
    change_key(person, scopes=["batches"])
    return 403, "insufficient_scope"


def left(person: Person) -> tuple[int, str | None]:
    with person.caller.scope():
        person.user.memberships.all().delete()
    return BAD


def deactivated(person: Person) -> tuple[int, str | None]:
    person.user.is_active = False
    person.user.save()
    return BAD


def archived(person: Person) -> tuple[int, str | None]:
    person.caller.project.archived_at = timezone.now()
    person.caller.project.save()
    return BAD


def suspended(person: Person) -> tuple[int, str | None]:
    person.caller.organization.suspended_at = timezone.now()
    person.caller.organization.save()
    return 403, "organization_suspended"


def deleted(person: Person) -> tuple[int, str | None]:
    person.caller.organization.deleted_at = timezone.now()
    person.caller.organization.save()
    return BAD


def demoted(person: Person) -> tuple[int, str | None]:
    with person.caller.scope():
        person.user.memberships.update(role="reviewer")
    return 403, "insufficient_role"


ENDS = [left, deactivated, archived, suspended, deleted, demoted]


@pytest.mark.parametrize("end", [revoked, expired, of_another_network, narrowed, *ENDS])
def test_a_keys_token_stops_at_once_when_it_is(
    teammate: Person, end: Callable[[Person], tuple[int, str | None]]
) -> None:
    text = issued(teammate)
    assert asked(text) == GOOD
    assert end(teammate) == asked(text)


@pytest.mark.parametrize("end", ENDS)
def test_a_persons_token_stops_at_once_when_they_are(
    teammate: Person, end: Callable[[Person], tuple[int, str | None]]
) -> None:
    text = tokens.issue_token(actor=teammate.caller).text
    assert asked(text) == GOOD
    assert end(teammate) == asked(text)


def test_a_request_with_a_token_takes_few_queries(owner: Person) -> None:
    def count(text: str) -> int:
        asked(text)  # the key is known, its use noted
        with CaptureQueriesContext(connection) as queries:
            assert asked(text) == GOOD
        return len(queries)

    by_key = count(owner.key)
    # That the token is not revoked; a person's comes with their membership and project.
    assert count(issued(owner)) == by_key + 1
    assert count(tokens.issue_token(actor=owner.caller).text) == by_key + 2


# --- Revoking -------------------------------------------------------------------------------


def test_a_revoked_token_is_refused_and_its_sister_is_not(owner: Person) -> None:
    caller = caller_with_key(owner)
    one, other = tokens.issue_token(actor=caller), tokens.issue_token(actor=caller)
    tokens.revoke_token(actor=caller, text=one.text)
    tokens.revoke_token(actor=caller, text=one.text)
    assert (asked(one.text), asked(other.text)) == (BAD, GOOD)


def test_what_is_kept_of_expired_tokens_goes_but_not_before(owner: Person) -> None:
    caller = caller_with_key(owner)
    with time_machine.travel(timezone.now(), tick=False) as clock:
        text = issued(owner, expires_in=300)
        tokens.revoke_token(actor=caller, text=text)
        clock.shift(300 + form.LEEWAY - 1)  # its signature is still taken
        forget_expired_tokens()
        assert (RevokedToken.objects.count(), asked(text)) == (1, BAD)
        clock.shift(60)
        forget_expired_tokens()
        assert (RevokedToken.objects.count(), asked(text)) == (0, BAD)


# --- The keys that sign ---------------------------------------------------------------------


def kid_of(text: str) -> str:
    return str(jwt.get_unverified_header(text)["kid"])


def published() -> list[str]:
    response = Client().get("/.well-known/jwks.json")
    assert response.status_code == 200
    return [key["kid"] for key in response.json()["keys"]]


def test_the_key_set_is_public_cacheable_and_enough_to_check_a_token(owner: Person) -> None:
    text = issued(owner)
    response = Client().get("/.well-known/jwks.json")
    assert response["Cache-Control"] == "public, max-age=300"
    (key,) = response.json()["keys"]
    assert {name: key[name] for name in key if name != "x"} == {
        "kty": "OKP",
        "crv": "Ed25519",
        "kid": kid_of(text),
        "alg": "EdDSA",
        "use": "sig",
    }
    audience = f"{settings.BASE_URL}/v1"
    said = jwt.decode(text, jwt.PyJWK(key), algorithms=["EdDSA"], audience=audience)
    assert said == claims_of(text)


def test_the_key_set_has_a_key_before_there_is_a_token(owner: Person) -> None:
    first = published()
    assert len(first) == 1
    assert kid_of(issued(owner)) == first[0]


def test_the_key_set_is_only_read() -> None:
    assert Client().post("/.well-known/jwks.json").status_code == 405


def test_the_private_key_is_encrypted_at_rest(owner: Person) -> None:
    issued(owner)
    row = SigningKey.objects.get()
    assert "PRIVATE" not in row.encrypted_private
    assert "d" not in row.public_jwk


def test_keys_change_without_a_token_being_refused(owner: Person, capsys: Any) -> None:
    with time_machine.travel(timezone.now(), tick=False) as clock:
        old = issued(owner, expires_in=3600)
        call_command("rotate_signing_key")
        new_kid = capsys.readouterr().out.strip()
        assert set(published()) == {kid_of(old), new_kid}
        clock.shift(9 * 60)
        last = issued(owner, expires_in=3600)
        assert kid_of(last) == kid_of(old)
        clock.shift(61)
        assert kid_of(issued(owner)) == new_kid
        clock.shift(58 * 60)
        assert (asked(last), set(published())) == (GOOD, {kid_of(old), new_kid})
        clock.shift(3 * 60)
        assert (asked(last), published()) == (BAD, [new_kid])
        clock.shift(60)
        forget_expired_tokens()
        assert [row.pk for row in SigningKey.objects.all()] == [new_kid]


def test_after_a_leak_all_that_was_signed_before_is_refused(owner: Person) -> None:
    old = issued(owner)
    assert asked(old) == GOOD
    call_command("rotate_signing_key", "--now")
    assert asked(old) == BAD
    new = issued(owner)
    assert (asked(new), published()) == (GOOD, [kid_of(new)])


def test_the_token_of_a_retired_key_is_refused_though_the_key_is_remembered(owner: Person) -> None:
    text = issued(owner)
    row = SigningKey.objects.get()
    row.retires_at = timezone.now() + timedelta(seconds=5)
    row.save()
    assert asked(text) == GOOD
    with time_machine.travel(timezone.now() + timedelta(seconds=6), tick=False):
        assert asked(text) == BAD


def test_a_key_that_signed_is_asked_of_the_database_only_now_and_then(owner: Person) -> None:
    text = issued(owner)
    asked(text)
    with CaptureQueriesContext(connection) as queries:
        asked(text)
    assert not [each for each in queries if "accounts_signingkey" in each["sql"]]


@pytest.mark.django_db(transaction=True)
def test_the_first_key_is_made_once_by_many_at_the_same_time() -> None:
    found: list[str] = []
    start = threading.Barrier(6)

    def make() -> None:
        start.wait()
        found.append(tokens._signing_key().pk)
        connection.close()

    threads = [threading.Thread(target=make) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert SigningKey.objects.count() == 1


def test_a_token_cannot_make_a_token(owner: Person) -> None:
    caller = replace(caller_with_key(owner), token_id="x")
    with pytest.raises(Forbidden, match="A token cannot make a token"):
        tokens.issue_token(actor=caller)
