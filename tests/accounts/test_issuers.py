"""Trusted issuers: whose tokens are exchanged for ours, what is refused of them, and their page."""

from __future__ import annotations

import base64
import hmac
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jwt
import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_scopes import scope
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from pytest_httpserver import HTTPServer
from werkzeug import Response

from accounts import federation, network
from accounts.errors import NotFound
from accounts.federation import Unreachable, checked_url, matches
from accounts.models import AuditEvent, TrustedIssuer
from accounts.network import is_public
from accounts.services import issuers, keys, projects, tokens
from tests.conftest import Person
from tests.wire import assert_refused, post

pytestmark = pytest.mark.django_db
EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
JWT = "urn:ietf:params:oauth:token-type:jwt"
HERE, TOKEN = "/v1/organization/trusted_issuers", "/v1/auth/token"
SUBJECT = "repo:acme/app:ref:refs/heads/main"
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def jwk(private: Any, kid: str, **more: Any) -> dict[str, Any]:
    kind: Any = RSAAlgorithm
    if isinstance(private, Ed25519PrivateKey):
        kind = OKPAlgorithm
    elif isinstance(private, ec.EllipticCurvePrivateKey):
        kind = ECAlgorithm
    return orjson.loads(kind.to_jwk(private.public_key())) | {"kid": kid} | more


class Issuer:
    """An OpenID provider of the test's own."""

    def __init__(self, server: HTTPServer) -> None:
        self.server = server
        self.url = server.url_for("").rstrip("/")
        self.asked = 0
        self.keys = [jwk(RSA, "one", alg="RS256", use="sig")]
        discovery = {"issuer": self.url, "jwks_uri": f"{self.url}/keys"}
        server.expect_request("/.well-known/openid-configuration").respond_with_json(discovery)
        server.expect_request("/keys").respond_with_handler(self._keys)

    def _keys(self, request: Any) -> Any:
        self.asked += 1
        return Response(orjson.dumps({"keys": self.keys}), content_type="application/json")

    def claims(self, **changed: Any) -> dict[str, Any]:
        now = int(time.time())
        said = {"iss": self.url, "aud": "batches", "sub": SUBJECT, "iat": now, "exp": now + 300}
        return {name: it for name, it in (said | changed).items() if it is not None}

    def token(
        self, key: Any = RSA, algorithm: str = "RS256", header: Any = None, **changed: Any
    ) -> str:
        headers = {"kid": "one"} if header is None else header
        payload = orjson.dumps(self.claims(**changed))
        return jwt.api_jws.encode(payload, key, algorithm, headers=headers)

    def escaped(self, **changed: Any) -> str:
        """The same as ASCII, which can hold what is no text."""
        payload = json.dumps(self.claims(**changed)).encode()
        return jwt.api_jws.encode(payload, RSA, "RS256", headers={"kid": "one"})


@pytest.fixture
def issuer(httpserver: HTTPServer) -> Issuer:
    federation._sets.clear()
    tokens._known.clear()
    return Issuer(httpserver)


def trusted(person: Person, issuer: Issuer, **changed: Any) -> TrustedIssuer:
    fields = {
        "project": person.caller.project,
        "name": "CI",
        "issuer": issuer.url,
        "audience": "batches",
        "subject_pattern": "repo:acme/*:ref:refs/heads/main",
        "scopes": ["files", "models.read"],
    }
    return issuers.create_trusted_issuer(actor=person.caller, **fields | changed)


def exchanged(person: Person, text: str, client: Client | None = None, **more: Any) -> Any:
    body = {
        "grant_type": EXCHANGE,
        "subject_token_type": JWT,
        "subject_token": text,
        "organization": person.caller.organization.pk,
    }
    return post(client or Client(), TOKEN, body | more)


def bearer(text: str) -> Client:
    return Client(headers={"authorization": f"Bearer {text}"})


def token_of(person: Person, text: str, **more: Any) -> str:
    response = exchanged(person, text, **more)
    assert response.status_code == 200, response.content
    return str(response.json()["access_token"])


def works(text: str, path: str = "/v1/files") -> int:
    return int(bearer(text).get(path).status_code)


# --- The exchange ---------------------------------------------------------------------------


def test_a_token_of_a_trusted_issuer_becomes_one_of_ours(owner: Person, issuer: Issuer) -> None:
    row = trusted(owner, issuer)
    response = exchanged(owner, issuer.token())
    answer = response.json()
    text = answer.pop("access_token")
    assert answer == {
        "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
        "token_type": "Bearer",
        "expires_in": 900,
        "scope": "files models.read",
    }
    claims = tokens.read_token(text)
    assert claims is not None
    assert (claims.subject, claims.project_id) == (f"issuer:{row.pk}", owner.caller.project.pk)
    assert [works(text, path) for path in ("/v1/files", "/v1/models", "/v1/batches")] == [
        200,
        200,
        403,
    ]


def test_the_form_of_rfc_8693_does_as_well(owner: Person, issuer: Issuer) -> None:
    trusted(owner, issuer)
    form = {
        "grant_type": EXCHANGE,
        "subject_token_type": JWT,
        "subject_token": issuer.token(),
        "organization": owner.caller.organization.pk,
        "scope": "files.read",
    }
    response = Client().post(
        TOKEN,
        "&".join(f"{name}={it}" for name, it in form.items()),
        content_type="application/x-www-form-urlencoded",
    )
    assert response.json()["scope"] == "files.read"


def test_no_scope_is_given_that_the_issuer_has_not(owner: Person, issuer: Issuer) -> None:
    trusted(owner, issuer)
    assert_refused(
        exchanged(owner, issuer.token(), scopes=["batches"]), 403, None, "scope_too_wide"
    )


def test_what_a_workload_makes_is_the_organizations(owner: Person, issuer: Issuer) -> None:
    trusted(owner, issuer, scopes=["files", "admin.write"])
    api = bearer(token_of(owner, issuer.token()))
    there = f"/v1/organization/projects/{owner.caller.project.pk}/api_keys"
    refused = post(api, there, {"name": "CI", "scopes": ["files"], "service_account": True})
    assert_refused(refused, 403, None, "key_from_token")
    made = post(api, "/v1/organization/projects", {"name": "CI"})
    assert made.status_code == 200
    with scope(organization=owner.caller.organization):
        events = list(AuditEvent.objects.order_by("number"))[-2:]
    said = [(each.action, each.via, each.actor, bool(each.credential)) for each in events]
    assert said == [
        ("token.created", "token", None, True),
        ("project.created", "token", None, True),
    ]
    assert events[0].credential == events[1].credential == events[1].actor_label


@pytest.mark.parametrize(
    ("private", "algorithm"),
    [
        (RSA, "RS512"),
        (RSA, "PS256"),
        (ec.generate_private_key(ec.SECP256R1()), "ES256"),
        (ec.generate_private_key(ec.SECP384R1()), "ES384"),
        (Ed25519PrivateKey.generate(), "EdDSA"),
    ],
)
def test_the_usual_algorithms_are_taken(
    owner: Person, issuer: Issuer, private: Any, algorithm: str
) -> None:
    trusted(owner, issuer)
    issuer.keys = [jwk(private, "one")]
    assert exchanged(owner, issuer.token(private, algorithm)).status_code == 200


def test_a_key_set_without_discovery(owner: Person, issuer: Issuer) -> None:
    trusted(owner, issuer, jwks_url=f"{issuer.url}/keys")
    assert exchanged(owner, issuer.token(header={})).status_code == 200


# --- What is refused ------------------------------------------------------------------------


def with_public_key_as_secret(issuer: Issuer) -> str:
    """HS256 by hand: PyJWT itself refuses to sign with a public key's text."""
    pem = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    head = {"alg": "HS256", "kid": "one", "typ": "JWT"}
    signed = b".".join(
        base64.urlsafe_b64encode(orjson.dumps(part)).rstrip(b"=")
        for part in (head, issuer.claims())
    )
    signature = base64.urlsafe_b64encode(hmac.digest(pem, signed, "sha256")).rstrip(b"=")
    return b".".join([signed, signature]).decode()


def tampered(issuer: Issuer) -> str:
    head, _, signature = issuer.token().split(".")
    forged = orjson.dumps(issuer.claims(sub="repo:acme/app:ref:refs/heads/main", extra="x"))
    return ".".join([head, base64.urlsafe_b64encode(forged).decode().rstrip("="), signature])


NOW = int(time.time())
REFUSED: dict[str, Callable[[Issuer], str]] = {
    "no signature": lambda issuer: issuer.token(None, "none"),
    "the public key as a secret": with_public_key_as_secret,
    "another key": lambda issuer: issuer.token(OTHER),
    "an unknown kid": lambda issuer: issuer.token(header={"kid": "two"}),
    "an algorithm that is not the key's": lambda issuer: issuer.token(RSA, "RS384"),
    "a crit header": lambda issuer: issuer.token(header={"kid": "one", "crit": ["exp"]}),
    "a tampered payload": tampered,
    "expired": lambda issuer: issuer.token(exp=NOW - 60),
    "not yet": lambda issuer: issuer.token(nbf=int(time.time()) + 60),
    "made in the future": lambda issuer: issuer.token(iat=int(time.time()) + 60),
    "made long ago": lambda issuer: issuer.token(iat=int(time.time()) - 3700),
    "another audience": lambda issuer: issuer.token(aud="elsewhere"),
    "an audience that begins alike": lambda issuer: issuer.token(aud="batches2"),
    "another issuer": lambda issuer: issuer.token(iss="https://elsewhere.test"),
    "an issuer with a slash": lambda issuer: issuer.token(iss=f"{issuer.url}/"),
    "another repository": lambda issuer: issuer.token(sub="repo:evil/app:ref:refs/heads/main"),
    "another branch": lambda issuer: issuer.token(sub="repo:acme/app:ref:refs/heads/other"),
    "more after the subject": lambda issuer: issuer.token(sub=SUBJECT + ":x"),
    "a line after the subject": lambda issuer: issuer.token(sub=SUBJECT + "\n"),
    "a subject with a NUL": lambda issuer: issuer.token(sub="\0"),
    "an issuer with a NUL": lambda issuer: issuer.token(iss="\0"),
    "half a character as subject": lambda issuer: issuer.escaped(sub="\ud800"),
    "half a character as issuer": lambda issuer: issuer.escaped(iss="\ud800"),
    "a number as subject": lambda issuer: issuer.token(sub=7),
    "without an expiry": lambda issuer: issuer.token(exp=None),
    "without a beginning": lambda issuer: issuer.token(iat=None),
    "without an audience": lambda issuer: issuer.token(aud=None),
    "without a subject": lambda issuer: issuer.token(sub=None),
    "without an issuer": lambda issuer: issuer.token(iss=None),
    "an expiry that is none": lambda issuer: issuer.token(exp="soon"),
    "too long": lambda issuer: issuer.token(more="x" * 16_000)[:16_384],
    "no token": lambda issuer: "x",
    "no token, with dots": lambda issuer: "a.b.c",
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_token_is_refused_with(owner: Person, issuer: Issuer, case: str) -> None:
    trusted(owner, issuer)
    refused = exchanged(owner, REFUSED[case](issuer))
    assert_refused(refused, 401, "subject_token", "untrusted_token")
    assert exchanged(owner, issuer.token()).status_code == 200


def test_an_organization_that_does_not_trust_it_answers_as_one_that_is_not_there(
    owner: Person, stranger: Person, issuer: Issuer
) -> None:
    trusted(owner, issuer)
    said = []
    for organization in (stranger.caller.organization.pk, "org_0", "\0", "acme"):
        refused = exchanged(owner, issuer.token(), organization=organization)
        assert refused.status_code == 401
        said.append(refused.content)
    assert len(set(said)) == 1


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"grant_type": "password"}, "grant_type"),
        ({"subject_token_type": "urn:x"}, "subject_token_type"),
        ({"subject_token": None}, "subject_token"),
        ({"organization": None}, "organization"),
        ({"subject_token": "x" * 16_385}, "subject_token"),
        ({"organization": 7}, "organization"),
        ({"expires_in": 7}, "expires_in"),
    ],
)
def test_a_request_that_is_wrong_says_so(
    owner: Person, issuer: Issuer, changed: dict[str, Any], param: str
) -> None:
    refused = exchanged(owner, issuer.token(), **changed)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_a_secret_in_the_key_set_signs_nothing(owner: Person, issuer: Issuer) -> None:
    """A key set is public: who finds a secret in one could sign with it."""
    trusted(owner, issuer)
    secret = base64.urlsafe_b64encode(b"s" * 32).decode().rstrip("=")
    issuer.keys = [{"kty": "oct", "k": secret, "kid": "one", "alg": "HS256"}, {}, 7, None]
    issuer.keys += [{"kty": "RSA", "alg": "none", "kid": "one", "n": "AQAB", "e": "AQAB"}]
    assert exchanged(owner, issuer.token(b"s" * 32, "HS256")).status_code == 401
    assert exchanged(owner, issuer.token()).status_code == 401


# --- It ends --------------------------------------------------------------------------------


def delete(person: Person, row: TrustedIssuer) -> int:
    issuers.delete_trusted_issuer(actor=person.caller, row=row)
    return 401


def narrow(person: Person, row: TrustedIssuer) -> int:
    with person.caller.scope():
        TrustedIssuer.objects.update(scopes=["models.read"])
    return 403


def archive(person: Person, row: TrustedIssuer) -> int:
    person.caller.project.archived_at = timezone.now()
    person.caller.project.save()
    return 401


def suspend(person: Person, row: TrustedIssuer) -> int:
    person.caller.organization.suspended_at = timezone.now()
    person.caller.organization.save()
    return 403


@pytest.mark.parametrize("end", [delete, narrow, archive, suspend])
def test_a_workloads_token_stops_at_once(
    owner: Person, issuer: Issuer, end: Callable[[Person, TrustedIssuer], int]
) -> None:
    row = trusted(owner, issuer)
    text = token_of(owner, issuer.token())
    assert works(text) == 200
    assert end(owner, row) == works(text)


def test_a_suspended_organization_exchanges_nothing(owner: Person, issuer: Issuer) -> None:
    suspend(owner, trusted(owner, issuer))
    assert_refused(exchanged(owner, issuer.token()), 403, None, "organization_suspended")


def test_a_workloads_token_makes_no_token_and_ends_itself(owner: Person, issuer: Issuer) -> None:
    trusted(owner, issuer)
    text = token_of(owner, issuer.token())
    assert_refused(post(bearer(text), TOKEN, {}), 403, None, "token_from_token")
    assert post(bearer(text), f"{TOKEN}/revoke", {}).status_code == 200
    assert works(text) == 401


# --- Fetching keys --------------------------------------------------------------------------


def test_keys_are_fetched_once_and_again_for_an_unknown_kid_once_a_minute(
    owner: Person, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1e6]
    monkeypatch.setattr(federation.time, "monotonic", lambda: clock[0])
    trusted(owner, issuer)
    for _ in range(3):
        token_of(owner, issuer.token())
    assert issuer.asked == 1
    issuer.keys = [jwk(OTHER, "two")]
    new = issuer.token(OTHER, header={"kid": "two"})
    for _ in range(3):
        assert exchanged(owner, new).status_code == 401
    assert issuer.asked == 1
    clock[0] += federation.AGAIN_SECONDS + 1
    token_of(owner, new)
    assert issuer.asked == 2
    assert exchanged(owner, issuer.token()).status_code == 401  # its key is not published any more


def test_keys_outlive_a_short_absence_of_their_issuer(
    owner: Person, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1e6]
    monkeypatch.setattr(federation.time, "monotonic", lambda: clock[0])
    trusted(owner, issuer)
    token_of(owner, issuer.token())
    issuer.server.clear()  # answers 500 from now on
    clock[0] += federation.KEPT_SECONDS + 1
    token_of(owner, issuer.token())
    clock[0] += federation.STALE_SECONDS
    assert exchanged(owner, issuer.token()).status_code == 401


@pytest.fixture
def server(httpserver: HTTPServer) -> Iterator[HTTPServer]:
    federation._sets.clear()
    yield httpserver
    httpserver.clear()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"status": 302, "headers": {"Location": "/ok"}}, "answered 302"),
        ({"status": 404}, "answered 404"),
        ({"response_data": b"[" * 300_000}, "answered too much"),
        ({"response_data": b"[]"}, "no JSON object"),
        ({"response_data": b"[" * 5000}, "^localhost: "),
        ({"response_data": b"\xff"}, "^localhost: "),
        ({"response_data": b""}, "^localhost: "),
    ],
)
def test_an_answer_that_is_none_is_refused(
    server: HTTPServer, answer: dict[str, Any], said: str
) -> None:
    server.expect_request("/ok").respond_with_json({})
    server.expect_request("/x").respond_with_data(**answer)
    assert federation.get_json(server.url_for("/ok")) == {}
    with pytest.raises(Unreachable, match=said):
        federation.get_json(server.url_for("/x"))


def test_discovery_must_name_the_very_issuer(owner: Person, issuer: Issuer) -> None:
    trusted(owner, issuer)
    issuer.server.clear()
    other = {"issuer": "https://elsewhere.test", "jwks_uri": f"{issuer.url}/keys"}
    issuer.server.expect_request("/.well-known/openid-configuration").respond_with_json(other)
    assert exchanged(owner, issuer.token()).status_code == 401


def test_an_issuer_that_never_ends_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, the answer never does."""
    monkeypatch.setattr(federation, "LONGEST_FETCH", 0.5)
    listening = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        there, _ = listening.accept()
        try:
            there.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            while True:
                there.sendall(b"x")
                time.sleep(0.05)
        except OSError:
            there.close()

    threading.Thread(target=drip, daemon=True).start()
    with pytest.raises(Unreachable):
        federation.get_json(f"http://127.0.0.1:{listening.getsockname()[1]}/")
    listening.close()


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fd00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "fec0::1",
        "64:ff9b:1::7f00:1",
        "::127.0.0.1",
        "5f00::1",
        "3fff::1",
        "192.88.99.1",
        "::ffff:192.88.99.1",
    ],
)
def test_an_address_is_not_the_internets(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1", "::ffff:8.8.8.8"])
def test_an_address_is_the_internets(address: str) -> None:
    assert is_public(address)


def unconnected(*_: Any, **__: Any) -> Any:
    raise OSError("not connected")


def test_production_asks_no_private_address_unless_it_is_listed(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [[(2, 1, 6, "", ("8.8.8.8", 443)), (2, 1, 6, "", ("10.0.0.1", 443))]]
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *_, **__: answers[0])
    with pytest.raises(OSError, match="private address"):
        network.addresses_of("k8s.test", 443, public=True)
    assert network.addresses_of("k8s.test", 443, public=False) == ["8.8.8.8", "10.0.0.1"]
    monkeypatch.setattr(network.socket, "create_connection", unconnected)
    settings.PRODUCTION = True
    with pytest.raises(Unreachable, match="private address"):
        federation.get_json("https://k8s.test/")
    settings.TRUSTED_ISSUER_PRIVATE_HOSTS = ["k8s.test"]
    with pytest.raises(Unreachable, match="not connected"):
        federation.get_json("https://k8s.test/")
    for host in ("127.0.0.1", "localhost"):
        with pytest.raises(Unreachable, match="https"):
            checked_url(f"http://{host}/")


def test_a_host_that_is_not_known_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror

    monkeypatch.setattr(network.socket, "getaddrinfo", unknown)
    with pytest.raises(Unreachable, match="is not known"):
        federation.get_json("https://nowhere.test/")


# --- Patterns -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "subject", "fits"),
    [
        ("a:b", "a:b", True),
        ("a:b", "a:bc", False),
        ("a:*", "a:", True),
        ("a:*", "a:b/c", True),
        ("a:*", "a:b:c", False),
        ("a:b*c", "a:bc", True),
        ("a:b*b", "a:b", False),
        ("a:*x*y", "a:1x2y", True),
        ("a:*x*y", "a:1y2x", False),
        ("a.c", "abc", False),
        ("a[b]", "ab", False),
        ("a?", "ab", False),
        ("system:serviceaccount:ml:*", "system:serviceaccount:ml:runner", True),
        ("system:serviceaccount:ml:*", "system:serviceaccount:prod:runner", False),
    ],
)
def test_a_star_is_anything_but_a_colon(pattern: str, subject: str, fits: bool) -> None:
    assert matches(pattern, subject) is fits


@given(st.text("ab*:", max_size=12), st.text("ab:", max_size=12))
def test_patterns_are_what_their_regular_expression_would_be(pattern: str, subject: str) -> None:
    expression = "[^:]*".join(re.escape(part) for part in pattern.split("*"))
    assert matches(pattern, subject) is (re.fullmatch(expression, subject) is not None)


def test_a_hostile_subject_costs_no_time() -> None:
    assert not matches("*a" * 200 + "b", "a" * 16_000)


# --- The rows, by API -----------------------------------------------------------------------


def admin_of(person: Person, *scopes: str) -> Client:
    _, text = keys.create_api_key(
        project=person.caller.project,
        name="admin",
        created_by=person.user,
        scopes=scopes or ["admin.write", "files", "batches"],
    )
    return bearer(text)


def body(person: Person, **changed: Any) -> dict[str, Any]:
    return {
        "name": "GitHub",
        "project_id": person.caller.project.pk,
        "issuer": "https://token.actions.githubusercontent.com",
        "audience": "https://batch.acme.test",
        "subject_pattern": SUBJECT,
        "scopes": ["files", "batches"],
    } | changed


def test_an_issuer_is_made_read_changed_and_deleted(owner: Person) -> None:
    api = admin_of(owner)
    made = post(api, HERE, body(owner)).json()
    assert made == body(owner) | {
        "object": "organization.trusted_issuer",
        "id": made["id"],
        "jwks_url": "",
        "created_at": made["created_at"],
    }
    there = f"{HERE}/{made['id']}"
    changed = post(api, there, {"name": "New", "scopes": ["files"]}).json()
    assert changed == made | {"name": "New", "scopes": ["files"]}
    assert api.get(there).json() == changed
    assert [row["id"] for row in api.get(HERE).json()["data"]] == [made["id"]]
    assert api.delete(there).json() == {
        "object": "organization.trusted_issuer.deleted",
        "id": made["id"],
        "deleted": True,
    }
    assert api.get(there).status_code == 404
    with scope(organization=owner.caller.organization):
        events = AuditEvent.objects.filter(target_id=made["id"]).order_by("number")
        said = [event.action.partition(".")[2] for event in events]
    assert said == ["created", "updated", "deleted"]


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"name": " "}, "name"),
        ({"issuer": "http://elsewhere.test"}, "issuer"),
        ({"issuer": "https://"}, "issuer"),
        ({"issuer": "https://user:secret@elsewhere.test"}, "issuer"),
        ({"issuer": "https://elsewhere.test/?x"}, "issuer"),
        ({"issuer": "https://[x"}, "issuer"),
        ({"issuer": "https://é.test"}, "issuer"),
        ({"issuer": "https://elsewhere.test:0"}, "issuer"),
        ({"issuer": "https://elsewhere.test:99999"}, "issuer"),
        ({"issuer": "file:///etc/passwd"}, "issuer"),
        ({"issuer": "https://a\0b.test"}, "issuer"),
        ({"jwks_url": "ftp://elsewhere.test"}, "jwks_url"),
        ({"audience": "\0"}, "audience"),
        ({"subject_pattern": "*"}, "subject_pattern"),
        ({"subject_pattern": "repo:*:ref:refs/heads/main"}, "subject_pattern"),
        ({"subject_pattern": "repo:acme*:ref:refs/heads/main"}, "subject_pattern"),
        ({"subject_pattern": "repo:acme*/app:ref:refs/heads/main"}, "subject_pattern"),
        ({"subject_pattern": "re*:acme/app"}, "subject_pattern"),
        ({"subject_pattern": "x" * 501}, "subject_pattern"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["operator"]}, "scopes"),
        ({"scopes": ["root"]}, "scope"),
    ],
)
def test_an_issuer_that_cannot_be_is_refused(
    owner: Person, changed: dict[str, Any], param: str
) -> None:
    refused = post(admin_of(owner), HERE, body(owner, **changed))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_an_issuer_that_was_deleted_meanwhile_does_not_come_back(
    owner: Person, issuer: Issuer
) -> None:
    row = trusted(owner, issuer)
    with owner.caller.scope():
        stale = TrustedIssuer.objects.select_related("project").get(pk=row.pk)
    issuers.delete_trusted_issuer(actor=owner.caller, row=row)
    fields = {name: getattr(stale, name) for name in ("issuer", "audience", "subject_pattern")}
    fields |= {"project": stale.project, "scopes": stale.scopes, "name": "New"}
    with pytest.raises(NotFound):
        issuers.update_trusted_issuer(actor=owner.caller, row=stale, **fields)
    with pytest.raises(NotFound):
        issuers.delete_trusted_issuer(actor=owner.caller, row=stale)
    with owner.caller.scope():
        assert TrustedIssuer.objects.count() == 0


def test_an_organization_trusts_so_many_issuers_and_no_more(
    owner: Person, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(issuers, "MOST", 2)
    trusted(owner, issuer)
    trusted(owner, issuer)
    refused = post(admin_of(owner), HERE, body(owner))
    assert_refused(refused, 400, None, "too_many_issuers")


def test_nobody_trusts_for_more_than_they_may_do(owner: Person) -> None:
    refused = post(admin_of(owner, "admin.write"), HERE, body(owner))
    assert_refused(refused, 403, None, "scope_too_wide")


def test_issuers_are_for_who_looks_after_all_keys(
    owner: Person, teammate: Person, stranger: Person
) -> None:
    made = post(admin_of(owner), HERE, body(owner)).json()
    member = admin_of(teammate)
    assert member.get(HERE).status_code == 200
    assert post(member, HERE, body(owner)).status_code == 403
    assert post(member, f"{HERE}/{made['id']}", {"name": "x"}).status_code == 403
    assert member.delete(f"{HERE}/{made['id']}").status_code == 403
    foreign = admin_of(stranger)
    assert_refused(foreign.get(f"{HERE}/{made['id']}"), 404, "issuer_id", "not_found")
    assert_refused(post(foreign, HERE, body(owner)), 404, "project_id", "not_found")


def test_the_lists_queries_do_not_grow_with_its_rows(owner: Person) -> None:
    api, browser = admin_of(owner), owner.browser

    def count(client: Client, path: str) -> int:
        client.get(path)
        with CaptureQueriesContext(connection) as queries:
            assert client.get(path).status_code == 200
        return len(queries)

    def both() -> tuple[int, int]:
        return count(api, HERE), count(browser, PAGE)

    post(api, HERE, body(owner))
    one = both()
    post(api, HERE, body(owner))
    post(api, HERE, body(owner))
    assert both() == one


# --- The page -------------------------------------------------------------------------------

PAGE = "/organization/trusted-issuers"


def form(person: Person, **changed: Any) -> dict[str, Any]:
    fields = body(person, **changed)
    return fields | {"project": fields.pop("project_id"), "jwks_url": ""}


def rows_of(person: Person) -> list[tuple[str, str]]:
    with scope(organization=person.caller.organization):
        return [(row.name, row.audience) for row in TrustedIssuer.objects.order_by("pk")]


def test_an_issuer_is_trusted_changed_and_removed_by_page(owner: Person) -> None:
    browser = owner.browser
    assert "No issuer is trusted yet" in browser.get(PAGE).content.decode()
    assert browser.post(PAGE, form(owner))["Location"] == PAGE
    with scope(organization=owner.caller.organization):
        there = f"{PAGE}/{TrustedIssuer.objects.get().pk}"
    assert browser.get(there).status_code == 200
    assert browser.post(there, form(owner, audience="new"))["Location"] == PAGE
    assert rows_of(owner) == [("GitHub", "new")]
    assert browser.post(f"{there}/delete")["Location"] == PAGE
    assert rows_of(owner) == []


def test_saving_does_not_move_an_archived_projects_issuer_to_another(owner: Person) -> None:
    evals = projects.create_project(actor=owner.caller, name="Evals")
    assert owner.browser.post(PAGE, form(owner, project_id=evals.pk))["Location"] == PAGE
    projects.archive_project(actor=owner.caller, project=evals)
    with scope(organization=owner.caller.organization):
        row = TrustedIssuer.objects.get()
    there = f"{PAGE}/{row.pk}"
    page = owner.browser.get(there).content.decode()
    assert f'<option value="{evals.pk}" selected>Evals</option>' in page
    refused = owner.browser.post(there, form(owner, project_id=evals.pk, audience="new"))
    assert refused.status_code == 400
    assert "This project is archived." in refused.content.decode()
    row.refresh_from_db()
    assert (row.project_id, row.audience) == (evals.pk, body(owner)["audience"])


def test_a_form_that_is_wrong_says_so_beside_its_field(owner: Person) -> None:
    refused = owner.browser.post(PAGE, form(owner, issuer="http://elsewhere.test", name="Typed"))
    assert refused.status_code == 400
    assert refused.context["form"].errors == {"issuer": ["issuer: it must begin with https://."]}
    assert 'value="Typed"' in refused.content.decode()
    assert rows_of(owner) == []


def test_members_look_and_do_not_touch(owner: Person, teammate: Person, reviewer: Person) -> None:
    row = issuers.create_trusted_issuer(
        actor=owner.caller,
        project=owner.caller.project,
        **{name: it for name, it in body(owner).items() if name != "project_id"},
    )
    page = teammate.browser.get(PAGE)
    assert (page.status_code, "Trust it" in page.content.decode()) == (200, False)
    assert teammate.browser.post(PAGE, form(owner)).status_code == 403
    assert teammate.browser.get(f"{PAGE}/{row.pk}").status_code == 403
    assert teammate.browser.post(f"{PAGE}/{row.pk}/delete").status_code == 403
    assert reviewer.browser.get(PAGE).status_code == 403
    assert len(rows_of(owner)) == 1
