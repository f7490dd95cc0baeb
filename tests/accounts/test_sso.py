"""Single sign-on against a real OpenID provider: who gets in, as whom, and above all who does not."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from allauth.account.models import EmailAddress
from allauth.mfa.totp.internal.auth import TOTP, generate_totp_secret
from allauth.socialaccount.models import SocialAccount
from django.core import mail
from django.core.management import CommandError, call_command
from django.test import Client
from django_scopes import scope, scopes_disabled
from pytest_httpserver import HTTPServer

from accounts import openid, outbound
from accounts.access import Caller
from accounts.errors import BadRequest, Forbidden
from accounts.models import (
    AuditEvent,
    EmailDomain,
    IdentityProvider,
    Membership,
    Organization,
    Role,
    User,
)
from accounts.services import invitations, members, organizations, sso
from tests.conftest import Person

pytestmark = [pytest.mark.django_db, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@dataclass
class Provider:
    """An OpenID provider that says of anybody whatever it is told to."""

    issuer: str

    def knows(self, sub: str, **claims: Any) -> None:
        requests.put(f"{self.issuer}/users/{sub}", json=claims, timeout=10).raise_for_status()

    def follow(self, client: Client, provider_id: str, sub: str, process: str = "login") -> Any:
        """The whole code flow, as a browser goes it, with this person at the provider."""
        path = f"/accounts/oidc/{provider_id}/login/?process={process}"
        there = client.post(path)["Location"]
        answer = requests.post(there, data={"sub": sub}, allow_redirects=False, timeout=10)
        return client.get(answer.headers["Location"].removeprefix("http://testserver"))


@pytest.fixture(scope="module")
def idp() -> Iterator[Provider]:
    from oidc_provider_mock import run_server_in_thread  # which warns of what it imports

    with run_server_in_thread() as server:
        yield Provider(f"http://localhost:{server.server_port}")


def set_up(caller: Caller, issuer: str, *domains: str, role: str = Role.MEMBER) -> None:
    """The organization's provider, with these domains verified."""
    saved = {"name": "Acme ID", "client_id": "portal", "client_secret": "s3cret", "role": role}
    sso.save_provider(actor=caller, issuer=issuer, **saved)
    for domain in domains:
        sso.vouch_for_domain(actor=None, domain=sso.claim_domain(actor=caller, domain=domain))


Enter = Callable[..., Any]


@pytest.fixture
def enter(idp: Provider, acme: Organization) -> Enter:
    """Come in through acme's provider as somebody with these claims."""

    def come(sub: str = "ann", client: Client | None = None, **claims: Any) -> Any:
        idp.knows(sub, **{"email": f"{sub}@acme.test", "email_verified": True} | claims)
        return idp.follow(client or Client(), acme.pk, sub)

    return come


@pytest.fixture
def ready(owner: Person, idp: Provider) -> Person:
    """The owner of acme, whose provider speaks for acme.test."""
    set_up(owner.caller, idp.issuer, "acme.test")
    return owner


def role_of(email: str, organization: Organization) -> str | None:
    with scope(organization=organization):
        row = Membership.objects.filter(user__email=email).first()
    return row.role if row else None


def signed_in(client: Client) -> str | None:
    id = client.session.get("_auth_user_id")
    return User.objects.get(pk=id).email if id else None


def actions(organization: Organization | None) -> list[str]:
    with scopes_disabled():
        rows = AuditEvent.objects.filter(organization=organization).order_by("number")
        return list(rows.values_list("action", flat=True))


# --- Coming in ------------------------------------------------------------------------------
def test_somebody_of_a_verified_domain_joins_in_the_default_role(
    ready: Person, acme: Organization, enter: Enter
) -> None:
    client = Client()
    answer = enter("ann", client, name="Ann Example")
    assert (answer.status_code, answer["Location"]) == (302, "/")
    assert (signed_in(client), role_of("ann@acme.test", acme)) == ("ann@acme.test", Role.MEMBER)
    ann = User.objects.get(email="ann@acme.test")
    assert (ann.name, ann.has_usable_password()) == ("Ann Example", False)
    addresses = EmailAddress.objects.filter(user=ann).values_list("email", "verified", "primary")
    assert list(addresses) == [("ann@acme.test", True, True)]
    assert actions(acme)[-1] == "member.added"


def test_the_second_time_it_is_the_same_person(ready: Person, enter: Enter) -> None:
    enter("ann")
    client = Client()
    enter("ann", client)
    assert (signed_in(client), User.objects.count()) == ("ann@acme.test", 2)


def test_a_member_with_a_verified_address_is_the_same_person_and_keeps_the_role(
    ready: Person, teammate: Person, acme: Organization, enter: Enter
) -> None:
    client = Client()
    enter("teammate", client)
    assert signed_in(client) == "teammate@acme.test"
    assert role_of("owner@acme.test", acme) == Role.OWNER
    account = SocialAccount.objects.get()
    assert (account.user, account.provider, account.uid) == (teammate.user, acme.pk, "teammate")
    assert actions(None)[-1] == "social_account.added"


def test_who_was_renamed_within_the_domains_is_still_the_same_person(
    ready: Person, enter: Enter
) -> None:
    enter("ann")
    client = Client()
    enter("ann", client, email="ann.married@acme.test")
    assert signed_in(client) == "ann@acme.test"


def test_a_second_factor_is_asked_for_here_as_well(
    ready: Person, teammate: Person, enter: Enter
) -> None:
    TOTP.activate(teammate.user, generate_totp_secret())
    client = Client()
    answer = enter("teammate", client)
    assert (answer["Location"], signed_in(client)) == ("/accounts/2fa/authenticate/", None)


def test_only_what_is_needed_is_kept_of_what_the_provider_says(ready: Person, enter: Enter) -> None:
    enter("ann", name="An\0n\nE.", groups=["staff"], phone_number="1")
    kept = SocialAccount.objects.get().extra_data["userinfo"]
    assert kept == {
        "sub": "ann",
        "email": "ann@acme.test",
        "email_verified": True,
        "name": "An n E.",
    }


# --- Not coming in --------------------------------------------------------------------------
def refused(answer: Any, client: Client) -> bool:
    return (answer.status_code, signed_in(client)) == (403, None)


@pytest.mark.parametrize("verified", [False, None, "false", 0, "yes"])
def test_an_address_that_the_provider_does_not_call_verified_is_nobody(
    ready: Person, teammate: Person, enter: Enter, verified: Any
) -> None:
    for sub in ("teammate", "somebody"):
        client = Client()
        assert refused(enter(sub, client, email_verified=verified), client)
    assert (SocialAccount.objects.count(), User.objects.count()) == (0, 2)


def test_no_address_is_nobody(ready: Person, enter: Enter) -> None:
    client = Client()
    assert refused(enter("ann", client, email=None), client)


@pytest.mark.parametrize(
    "email",
    [
        "stranger@globex.test",  # of another tenant
        "new@globex.test",
        "ann@sub.acme.test",
        "ann@acme.test.globex.test",
        "ann@notacme.test",
        '"ann@acme.test"@globex.test',
        "ann@acme.tеst",  # with a Cyrillic е
    ],
)
def test_a_provider_does_not_speak_for_other_domains(
    ready: Person, stranger: Person, enter: Enter, email: str
) -> None:
    client = Client()
    assert refused(enter("mallory", client, email=email), client)
    assert (SocialAccount.objects.count(), User.objects.count()) == (0, 2)


def test_a_domain_that_is_only_claimed_does_not_count(
    stranger: Person, owner: Person, idp: Provider
) -> None:
    set_up(stranger.caller, idp.issuer)
    sso.claim_domain(actor=stranger.caller, domain="acme.test")
    idp.knows("owner", email="owner@acme.test", email_verified=True)
    client = Client()
    assert refused(idp.follow(client, stranger.caller.organization.pk, "owner"), client)


def test_another_tenants_provider_with_the_same_subject_is_somebody_else(
    ready: Person, stranger: Person, idp: Provider, enter: Enter
) -> None:
    enter("ann")
    set_up(stranger.caller, idp.issuer, "globex.test")
    idp.knows("ann", email="ann@globex.test", email_verified=True)
    client = Client()
    idp.follow(client, stranger.caller.organization.pk, "ann")
    assert signed_in(client) == "ann@globex.test"


def test_an_operator_never_comes_in_by_a_tenants_provider(
    ready: Person, teammate: Person, enter: Enter
) -> None:
    enter("teammate")  # known to the provider before
    boss = User.objects.create_superuser("boss@acme.test", "x" * 20)
    User.objects.filter(pk=teammate.user.pk).update(is_staff=True)
    for sub in ("boss", "teammate"):
        client = Client()
        assert refused(enter(sub, client), client)
    assert not SocialAccount.objects.filter(user=boss).exists()


def test_who_has_moved_to_an_address_outside_is_out_of_the_providers_reach(
    ready: Person, enter: Enter
) -> None:
    enter("ann")
    ann = User.objects.get(email="ann@acme.test")
    EmailAddress.objects.filter(user=ann).update(email="ann@home.test")
    User.objects.filter(pk=ann.pk).update(email="ann@home.test")
    client = Client()
    assert refused(enter("ann", client), client)


def test_a_second_address_inside_does_not_open_an_account_outside(
    ready: Person, stranger: Person, enter: Enter
) -> None:
    EmailAddress.objects.create(user=stranger.user, email="side@acme.test", verified=True)
    client = Client()
    assert refused(enter("side", client), client)


def test_an_account_whose_own_address_is_not_confirmed_is_not_taken_over(
    ready: Person, enter: Enter
) -> None:
    squatter = User.objects.create_user("ann@acme.test", "x" * 20)
    EmailAddress.objects.filter(user=squatter).update(verified=False)
    client = Client()
    answer = enter("ann", client)
    assert refused(answer, client)
    assert "Reset its" in answer.content.decode()


@pytest.mark.parametrize("process", ["connect", "redirect"])
def test_it_is_not_connected_to_somebody_who_is_signed_in(
    ready: Person, stranger: Person, acme: Organization, idp: Provider, process: str
) -> None:
    idp.knows("ann", email="ann@acme.test", email_verified=True)
    answer = idp.follow(stranger.browser, acme.pk, "ann", process)
    assert (answer.status_code, SocialAccount.objects.count()) == (403, 0)


def test_a_callback_that_this_browser_did_not_ask_for_is_refused(
    ready: Person, acme: Organization, idp: Provider
) -> None:
    idp.knows("ann", email="ann@acme.test", email_verified=True)
    there = Client().post(f"/accounts/oidc/{acme.pk}/login/")["Location"]
    answer = requests.post(there, data={"sub": "ann"}, allow_redirects=False, timeout=10)
    client = Client()
    got = client.get(answer.headers["Location"].removeprefix("http://testserver"))
    assert (got.status_code, signed_in(client)) == (401, None)


def test_where_registration_is_closed_nobody_new_comes_in(
    ready: Person, teammate: Person, enter: Enter, settings: Any
) -> None:
    settings.REGISTRATION = "closed"
    client = Client()
    assert b"made by invitation" in enter("ann", client).content
    assert (signed_in(client), User.objects.filter(email="ann@acme.test").count()) == (None, 0)
    enter("teammate", client)
    assert signed_in(client) == "teammate@acme.test"


def test_removing_the_domain_the_provider_or_the_organization_ends_it(
    ready: Person, acme: Organization, enter: Enter
) -> None:
    enter("ann")
    with scopes_disabled():
        domain = EmailDomain.objects.get()
    sso.remove_domain(actor=ready.caller, domain=domain)
    client = Client()
    assert refused(enter("ann", client), client)
    sso.vouch_for_domain(
        actor=None, domain=sso.claim_domain(actor=ready.caller, domain="acme.test")
    )
    organizations.delete_organization(actor=ready.caller)
    assert refused(enter("ann", client), client)
    sso.remove_provider(actor=ready.caller)
    assert Client().post(f"/accounts/oidc/{acme.pk}/login/").status_code == 404
    assert SocialAccount.objects.count() == 0


def test_a_provider_that_is_away_is_told(ready: Person, acme: Organization) -> None:
    with scopes_disabled():
        IdentityProvider.objects.update(issuer="http://127.0.0.1:9")
    answer = Client().post(f"/accounts/oidc/{acme.pk}/login/")
    assert (answer.status_code, b"cannot be reached" in answer.content) == (503, True)


# --- A provider that says anything ------------------------------------------------------------
ZOE = {"sub": "zoe", "email": "zoe@acme.test", "email_verified": True}
TOKENS = {"access_token": "x", "token_type": "Bearer"}


def id_token(**claims: Any) -> str:
    parts = ({"alg": "RS256", "kid": "x"}, {"aud": "portal", "exp": 2**31, "sub": "zoe"} | claims)
    coded = [base64.urlsafe_b64encode(json.dumps(each).encode()) for each in parts]
    return b".".join([*(each.rstrip(b"=") for each in coded), b"c2ln"]).decode()


def hostile(owner: Person, server: HTTPServer, **said: Any) -> tuple[int, str | None, Any]:
    """What becomes of the code flow where the provider says this: status, person, browser."""
    issuer = server.url_for("").rstrip("/")
    discovery = {"issuer": issuer} | {name: f"{issuer}/{name}" for name in openid.ENDPOINTS}
    answers: dict[str, Any] = {openid.DISCOVERY: discovery}
    for path, name in ((openid.DISCOVERY, "discovery"), ("/token_endpoint", "tokens")):
        answers[path] = {**answers.get(path, TOKENS), **said.get(name, {})}
    answers["/userinfo_endpoint"] = said.get("userinfo", ZOE)
    with scopes_disabled():
        IdentityProvider.objects.update(issuer=issuer)
    for path, answer in answers.items():
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        server.expect_request(path).respond_with_data(content, content_type="application/json")
    client = Client()
    answer = client.post(f"/accounts/oidc/{owner.caller.organization.pk}/login/")
    if answer.status_code == 302:
        state = parse_qs(urlsplit(answer["Location"]).query)["state"][0]
        callback = f"/accounts/oidc/{owner.caller.organization.pk}/login/callback/"
        answer = client.get(callback, {"code": "x", "state": state})
    return answer.status_code, signed_in(client), client


@pytest.mark.parametrize(
    "said",
    [
        {"userinfo": ZOE | {"sub": None}},
        {"userinfo": ZOE | {"sub": []}},
        {"userinfo": ZOE | {"sub": 7}},
        {"userinfo": ZOE | {"sub": ""}},
        {"userinfo": ZOE | {"sub": "a\0"}},
        {"userinfo": ZOE | {"sub": "\ud800"}},
        {"userinfo": ZOE | {"sub": "a" * 192}},
        {"userinfo": ZOE | {"name": "\ud800"}},
        {"userinfo": {"email": "zoe@acme.test", "email_verified": True}},
        {"userinfo": []},
        {"userinfo": b"[" * 100_000},
        {"userinfo": b'{"a":' * 100_000},
        {"userinfo": b'{"sub": ' + b"1" * 10_000 + b"}"},
        {"tokens": {"access_token": None}},
        {"tokens": {"access_token": ["x"]}},
        {"tokens": {"access_token": "x\r\ny: z"}},
        {"tokens": {"access_token": "\u1234"}},
        {"tokens": {"id_token": 5}},
        {"tokens": {"id_token": "a.b.c"}},
        {"tokens": {"id_token": id_token(exp="soon")}},
        {"tokens": {"id_token": id_token(exp=1e300, jti="x")}},
        {"tokens": {"id_token": id_token(jti=["x"])}},
        {"tokens": {"id_token": id_token(sub=None)}},
        {"discovery": {"issuer": None}},
        {"discovery": {"authorization_endpoint": "http://[::1"}},
        {"discovery": {"authorization_endpoint": "http://x\r\nSet-Cookie: a=b"}},
        {"discovery": {"authorization_endpoint": ["http://x.test"]}},
        {"discovery": {"userinfo_endpoint": "http://"}},
        {"discovery": {"userinfo_endpoint": "http://a..b/"}},
        {"discovery": {"userinfo_endpoint": f"http://{'a' * 80}/"}},
        {"discovery": {"token_endpoint": "http://x.test:99999/"}},
    ],
)
def test_what_a_provider_cannot_mean_is_told_and_signs_nobody_in(
    ready: Person, httpserver: HTTPServer, said: Any
) -> None:
    assert hostile(ready, httpserver, **said)[:2] == (503, None)


@pytest.mark.parametrize(
    "email",
    [
        "x\0@acme.test",
        ["x@acme.test"],
        {"a": 1},
        5,
        "a" * 5000 + "@acme.test",
        "victim@other.test\nBcc: a@b.c\n@acme.test",
        "victim@other.test, y@acme.test",
        "@acme.test",
    ],
)
def test_what_is_no_address_is_nobodys(ready: Person, httpserver: HTTPServer, email: Any) -> None:
    assert hostile(ready, httpserver, userinfo=ZOE | {"email": email})[:2] == (403, None)


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"tokens": {"expires_in": "soon", "refresh_token": {"a": 1}}},
        {"tokens": {"expires_in": 10**30}},
        {"discovery": {"token_endpoint_auth_methods_supported": None}},
        {"discovery": {"token_endpoint_auth_methods_supported": 5}},
        {"userinfo": ZOE | {"name": {"a": 1}, "given_name": ["x"], "preferred_username": 5}},
    ],
)
def test_what_is_not_needed_may_be_anything(
    ready: Person, httpserver: HTTPServer, said: Any
) -> None:
    assert hostile(ready, httpserver, **said)[:2] == (302, "zoe@acme.test")


def test_a_name_is_one_line_of_what_can_be_seen(ready: Person, httpserver: HTTPServer) -> None:
    hostile(ready, httpserver, userinfo=ZOE | {"name": "Locked.\n\nSign in at\x1b x.test"})
    assert User.objects.get(email="zoe@acme.test").name == "Locked. Sign in at x.test"


@pytest.mark.parametrize("id", ["%00", "org_%00", "%FF", "org_x"])
def test_a_provider_that_cannot_be_is_not_found(db: None, id: str) -> None:
    for path in (f"/accounts/oidc/{id}/login/", f"/accounts/oidc/{id}/login/callback/"):
        assert Client().get(path).status_code == 404


def test_a_suspended_organizations_provider_signs_nobody_in_and_joins_nobody(
    ready: Person, stranger: Person, acme: Organization, enter: Enter
) -> None:
    enter("ann")
    with scopes_disabled():
        provider = IdentityProvider.objects.select_related("organization").get()
    organizations.suspend_organization(actor=None, organization=acme, why="unpaid")
    for sub in ("ann", "ben"):
        client = Client()
        assert refused(enter(sub, client), client)
    with pytest.raises(Forbidden, match="is suspended"):
        sso.join(provider, stranger.user)
    assert sso.provider_of_email("ann@acme.test") is None
    assert not User.objects.filter(email="ben@acme.test").exists()


# --- Setting up -----------------------------------------------------------------------------
FIELDS = {"name": "Acme ID", "client_id": "portal", "client_secret": "s3cret", "role": "viewer"}


def test_an_owner_sets_it_up_on_the_page(owner: Person, acme: Organization, idp: Provider) -> None:
    answer = owner.browser.post("/organization/sign-in", {**FIELDS, "issuer": idp.issuer + "/"})
    assert (answer.status_code, answer["Location"]) == (302, "/organization/sign-in")
    with scope(organization=acme):
        provider = IdentityProvider.objects.get()
        event = AuditEvent.objects.get(action="identity_provider.created")
    assert (provider.issuer, provider.role) == (idp.issuer, Role.VIEWER)
    assert "s3cret" not in provider.encrypted_secret
    assert event.changes["client_secret"] == [None, "•••"]
    page = owner.browser.get("/organization/sign-in").content.decode()
    assert f"/accounts/oidc/{acme.pk}/login/callback/" in page
    assert ("s3cret" in page, "Email domains" in page) == (False, True)


def test_an_empty_secret_keeps_the_stored_one(
    ready: Person, acme: Organization, idp: Provider
) -> None:
    with scope(organization=acme):
        before = IdentityProvider.objects.get().encrypted_secret
        ready.browser.post(
            "/organization/sign-in", {**FIELDS, "issuer": idp.issuer, "client_secret": ""}
        )
        assert IdentityProvider.objects.get().encrypted_secret == before
        assert EmailDomain.objects.get().verified_at is not None


@pytest.mark.parametrize(
    ("changed", "field", "said"),
    [
        ({"issuer": "ftp://idp.test"}, "issuer", "begins with https://"),
        ({"issuer": "http://127.0.0.1:9"}, "issuer", "cannot be read"),
        ({"issuer": "https://[broken"}, "issuer", "begins with https://"),
        ({"role": "owner"}, "role", "Select a valid choice"),
        ({"role": "admin"}, "role", "Select a valid choice"),
        ({"name": "\0"}, "name", "Null characters"),
    ],
)
def test_what_makes_no_sense_is_told_and_what_was_typed_is_kept(
    owner: Person, acme: Organization, idp: Provider, changed: Any, field: str, said: str
) -> None:
    answer = owner.browser.post(
        "/organization/sign-in", {**FIELDS, "issuer": idp.issuer, **changed}
    )
    assert answer.status_code == 400
    assert said in str(answer.context["form"].errors[field])
    assert answer.context["form"]["client_id"].value() == "portal"
    with scope(organization=acme):
        assert IdentityProvider.objects.count() == 0


def test_a_document_of_another_issuer_is_refused(owner: Person, idp: Provider) -> None:
    address = idp.issuer.replace("localhost", "LOCALHOST")
    with pytest.raises(BadRequest, match="It calls itself"):
        set_up(owner.caller, address)


@pytest.mark.parametrize("role", [Role.OWNER, Role.ADMIN, "", "root"])
def test_nobody_joins_as_somebody_who_rules(owner: Person, idp: Provider, role: str) -> None:
    with pytest.raises(BadRequest, match="role"):
        set_up(owner.caller, idp.issuer, role=role)


def test_in_production_the_portals_own_networks_are_out_of_reach(
    ready: Person, acme: Organization, idp: Provider, settings: Any
) -> None:
    settings.PRODUCTION = True
    with pytest.raises(requests.ConnectionError, match="localhost has a private address"):
        outbound.Session().get(idp.issuer)
    assert Client().post(f"/accounts/oidc/{acme.pk}/login/").status_code == 503
    settings.TRUSTED_ISSUER_PRIVATE_HOSTS = ["localhost"]
    assert outbound.Session().get(idp.issuer).status_code == 200
    with pytest.raises(BadRequest, match="begins with https"):
        set_up(ready.caller, idp.issuer)


def test_an_answer_without_end_is_cut_off(idp: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "LARGEST", 10)
    with pytest.raises(requests.RequestException, match="too large"):
        outbound.Session().get(idp.issuer + openid.DISCOVERY)


def test_who_may_not_change_the_organization_sees_none_of_it(
    ready: Person, viewer: Person, teammate: Person, acme: Organization
) -> None:
    with scope(organization=acme):
        domain = EmailDomain.objects.get()
    for person in (viewer, teammate):
        assert person.browser.get("/organization/sign-in").status_code == 403
        for path in (
            "/organization/sign-in",
            "/organization/sign-in/remove",
            "/organization/domains",
            f"/organization/domains/{domain.pk}/check",
            f"/organization/domains/{domain.pk}/remove",
        ):
            assert person.browser.post(path, {"domain": "x.test"}).status_code == 403
    assert Client().get("/organization/sign-in").status_code == 302
    assert ready.browser.get("/organization/sign-in/remove").status_code == 405
    with scope(organization=acme):
        assert (EmailDomain.objects.count(), IdentityProvider.objects.count()) == (1, 1)


# --- Domains --------------------------------------------------------------------------------
@pytest.fixture
def dns(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """TXT records, by name."""
    records: dict[str, set[str]] = {}
    monkeypatch.setattr(sso, "txt_records", lambda name: records.get(name, set()))
    return records


def test_a_domain_is_verified_by_its_record(
    owner: Person, acme: Organization, idp: Provider, dns: dict[str, set[str]]
) -> None:
    set_up(owner.caller, idp.issuer)
    owner.browser.post("/organization/domains", {"domain": " @Acme.TEST. "})
    with scope(organization=acme):
        domain = EmailDomain.objects.get()
        check = f"/organization/domains/{domain.pk}/check"
        assert (domain.domain, domain.verified_at) == ("acme.test", None)
        page = owner.browser.get("/organization/sign-in").content.decode()
        assert (domain.token in page, domain.record_name in page) == (True, True)

        dns["_vllm-batch-portal.acme.test"] = {"v=spf1 -all", domain.token + "x"}
        owner.browser.post(check)
        assert EmailDomain.objects.get().verified_at is None

        dns["_vllm-batch-portal.acme.test"].add(domain.token)
        owner.browser.post(check)
        assert EmailDomain.objects.get().verified_by == "DNS"
    assert actions(acme)[-2:] == ["email_domain.claimed", "email_domain.verified"]


def test_another_issuer_has_to_be_agreed_to_by_dns_again(
    ready: Person, acme: Organization, idp: Provider, enter: Enter, dns: dict[str, set[str]]
) -> None:
    enter("ann")
    with scope(organization=acme):
        before = EmailDomain.objects.get()
        dns[before.record_name] = {before.token}
        IdentityProvider.objects.update(issuer="https://before.test")
        set_up(ready.caller, idp.issuer)
        domain = EmailDomain.objects.get()
        assert (domain.verified_at, SocialAccount.objects.count()) == (None, 0)
        for each in (before, domain):  # neither the old claim nor the old record will do
            with pytest.raises((BadRequest, EmailDomain.DoesNotExist)):
                sso.check_domain(actor=ready.caller, domain=each)
    client = Client()
    assert refused(enter("ann", client), client)


def test_a_domain_belongs_to_one_organization(
    ready: Person, stranger: Person, idp: Provider, dns: dict[str, set[str]]
) -> None:
    set_up(stranger.caller, idp.issuer)
    domain = sso.claim_domain(actor=stranger.caller, domain="acme.test")
    dns[domain.record_name] = {domain.token}
    with pytest.raises(BadRequest, match="cannot be verified here"):
        sso.check_domain(actor=stranger.caller, domain=domain)


@pytest.mark.parametrize(
    "domain", ["", "acme", "acme test", "a..b", "*.acme.test", "\0", "x" * 254]
)
def test_what_is_no_domain_is_told(owner: Person, acme: Organization, domain: str) -> None:
    answer = owner.browser.post("/organization/domains", {"domain": domain})
    assert (answer.status_code, len(answer.context["domain_form"].errors)) == (400, 1)
    with scope(organization=acme):
        assert EmailDomain.objects.count() == 0


def test_a_domain_waits_for_a_provider(owner: Person) -> None:
    domain = sso.claim_domain(actor=owner.caller, domain="acme.test")
    with pytest.raises(BadRequest, match="identity provider first"):
        sso.vouch_for_domain(actor=None, domain=domain)


def test_the_shell_verifies_a_domain_that_is_claimed(
    owner: Person, acme: Organization, idp: Provider
) -> None:
    set_up(owner.caller, idp.issuer)
    with pytest.raises(CommandError, match="does not claim"):
        call_command("verify_email_domain", "acme.test", "--org", "acme")
    sso.claim_domain(actor=owner.caller, domain="acme.test")
    call_command("verify_email_domain", "acme.test", "--org", "acme")
    with scope(organization=acme):
        assert EmailDomain.objects.get().verified_by == "operator"


def test_an_operator_verifies_a_domain_on_a_page(
    owner: Person, acme: Organization, operator: User, idp: Provider
) -> None:
    domain = sso.claim_domain(actor=owner.caller, domain="acme.test")
    client = Client()
    client.force_login(operator, backend="allauth.account.auth_backends.AuthenticationBackend")
    page = client.get("/operator/domains").content.decode()
    assert ("none yet" in page, domain.token in page) == (True, False)
    set_up(owner.caller, idp.issuer)
    page = client.get("/operator/domains").content.decode()
    assert ("acme.test" in page, idp.issuer in page, domain.token in page) == (True, True, True)
    there = f"/operator/domains/{domain.pk}/verify"
    assert client.post(there, {"seen": domain.token}).status_code == 302
    with scope(organization=acme):
        assert EmailDomain.objects.get().verified_by == "operator@portal.test"
    assert owner.browser.get("/operator/domains").status_code == 404
    assert owner.browser.post(f"/operator/domains/{domain.pk}/verify").status_code == 404


def test_an_operator_does_not_verify_for_another_issuer_than_was_shown(
    owner: Person, acme: Organization, operator: User, idp: Provider
) -> None:
    with scopes_disabled():
        fields = {"name": "x", "issuer": "https://good.test", "client_id": "c"}
        IdentityProvider.objects.create(organization=acme, **fields)
    seen = sso.claim_domain(actor=owner.caller, domain="acme.test")
    set_up(owner.caller, idp.issuer)  # between the page and the click
    client = Client()
    client.force_login(operator, backend="allauth.account.auth_backends.AuthenticationBackend")
    for data in ({"seen": seen.token}, {"seen": "\0"}, {}):
        answer = client.post(f"/operator/domains/{seen.pk}/verify", data, follow=True)
        assert b"This claim has changed meanwhile" in answer.content
    with scope(organization=acme):
        assert EmailDomain.objects.get().verified_at is None


# --- The way there --------------------------------------------------------------------------
def test_an_address_leads_to_the_provider_that_speaks_for_its_domain(
    ready: Person, acme: Organization
) -> None:
    answer = Client().post("/accounts/organization/", {"email": "anybody@ACME.test"})
    assert answer["Location"] == f"/accounts/oidc/{acme.pk}/login/"
    answer = Client().post("/accounts/organization/", {"email": "anybody@globex.test"})
    assert answer.status_code == 400


def test_the_sign_in_page_names_no_tenant(ready: Person, acme: Organization) -> None:
    page = Client().get("/accounts/login/").content.decode()
    assert ("Acme" in page, acme.pk in page, "with your organization" in page) == (
        False,
        False,
        True,
    )


def test_only_the_page_before_the_provider_may_lead_elsewhere(
    ready: Person, acme: Organization
) -> None:
    page = Client().get(f"/accounts/oidc/{acme.pk}/login/")
    assert "form-action https: http:" in page["Content-Security-Policy"]
    assert "form-action 'self'" in Client().get("/accounts/login/")["Content-Security-Policy"]


# --- For the whole site ---------------------------------------------------------------------
@pytest.fixture
def site(idp: Provider, settings: Any) -> Provider:
    app = {"provider_id": "site", "name": "Site ID", "client_id": "portal", "secret": "s"}
    settings.SOCIALACCOUNT_PROVIDERS = {
        "openid_connect": {
            "OAUTH_PKCE_ENABLED": True,
            "APPS": [app | {"settings": {"server_url": idp.issuer}}],
        }
    }
    return idp


def test_the_sites_provider_is_on_the_sign_in_page(site: Provider) -> None:
    assert b"Sign in with Site ID" in Client().get("/accounts/login/").content


def test_the_sites_provider_signs_up_where_registration_is_open(
    db: None, site: Provider, settings: Any
) -> None:
    settings.REGISTRATION = "open"
    site.knows("zoe", email="zoe@home.test", email_verified=True)
    client = Client()
    site.follow(client, "site", "zoe")
    assert signed_in(client) == "zoe@home.test"


def test_the_sites_provider_does_not_take_over_an_account_by_its_address(
    owner: Person, site: Provider, settings: Any
) -> None:
    settings.REGISTRATION = "open"
    site.knows("owner", email="owner@acme.test", email_verified=True)
    client = Client()
    site.follow(client, "site", "owner")
    assert (signed_in(client), SocialAccount.objects.count()) == (None, 0)
    assert [sent.to for sent in mail.outbox] == [["owner@acme.test"]]


@pytest.mark.parametrize("registration", ["open", "invite", "closed"])
def test_the_sites_provider_makes_no_account_of_an_unverified_address(
    db: None, site: Provider, settings: Any, registration: str
) -> None:
    settings.REGISTRATION = registration
    site.knows("zoe", email="zoe@home.test", email_verified="false")
    client = Client()
    assert refused(site.follow(client, "site", "zoe"), client)
    assert User.objects.count() == 0


def test_without_an_invitation_the_sites_provider_makes_no_account(
    db: None, site: Provider
) -> None:
    site.knows("zoe", email="zoe@home.test", email_verified=True)
    client = Client()
    assert b"made by invitation" in site.follow(client, "site", "zoe").content
    assert User.objects.count() == 0


def test_who_is_invited_may_come_by_the_sites_provider(
    owner: Person, acme: Organization, site: Provider
) -> None:
    _, secret = invitations.invite(
        actor=owner.caller, organization=acme, email="zoe@home.test", role=Role.VIEWER
    )
    client = Client()
    client.get(f"/invitations/{secret}")
    site.knows("zoe", email="zoe@home.test", email_verified=True)
    answer = site.follow(client, "site", "zoe")
    assert (answer["Location"], signed_in(client)) == ("/invitations/accept", "zoe@home.test")


def test_a_signed_in_person_connects_and_then_signs_in_with_it(
    owner: Person, site: Provider
) -> None:
    client = owner.browser
    client.post("/accounts/reauthenticate/", {"password": "correct horse 9 battery"})
    site.knows("o", email="elsewhere@home.test", email_verified=False)
    answer = site.follow(client, "site", "o", "connect")
    assert answer["Location"] == "/accounts/3rdparty/"
    other = Client()
    site.follow(other, "site", "o")
    assert signed_in(other) == "owner@acme.test"
    assert b"Site ID" in client.get("/accounts/3rdparty/").content
    client.post("/accounts/3rdparty/", {"account": SocialAccount.objects.get().pk})
    assert (SocialAccount.objects.count(), actions(None)[-1]) == (0, "social_account.removed")


def test_who_left_is_let_in_again_by_the_domain(
    ready: Person, acme: Organization, enter: Enter
) -> None:
    """Whom the organization's own provider still knows belongs to it; it is the place to end that."""
    enter("ann")
    with scope(organization=acme):
        membership = Membership.objects.get(user__email="ann@acme.test")
    members.remove_member(actor=ready.caller, membership=membership)
    enter("ann")
    assert role_of("ann@acme.test", acme) == Role.MEMBER


def test_a_member_cannot_set_it_up_by_the_service_either(teammate: Person, idp: Provider) -> None:
    with pytest.raises(Forbidden):
        set_up(teammate.caller, idp.issuer)


def test_the_lists_of_domains_cost_the_same_for_one_and_for_three(
    owner: Person, operator: User, idp: Provider, django_assert_max_num_queries: Any
) -> None:
    set_up(owner.caller, idp.issuer)
    boss = Client()
    boss.force_login(operator, backend="allauth.account.auth_backends.AuthenticationBackend")
    counts = []
    for names in (["one.test"], ["two.test", "three.test"]):
        for name in names:
            sso.claim_domain(actor=owner.caller, domain=name)
        for client, path in ((owner.browser, "/organization/sign-in"), (boss, "/operator/domains")):
            with django_assert_max_num_queries(100) as queries:
                assert client.get(path).status_code == 200
            counts.append(len(queries))
    assert counts[:2] == counts[2:]


def test_what_dns_says_is_read_and_what_it_cannot_say_is_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import dns.resolver

    class Row:
        strings = (b"vllm-batch-", b"portal=1")

    def resolve(name: str, kind: str, lifetime: float) -> list[Row]:
        if name != "_vllm-batch-portal.acme.test":
            raise dns.resolver.NXDOMAIN
        return [Row()]

    monkeypatch.setattr(dns.resolver, "resolve", resolve)
    assert sso.txt_records("_vllm-batch-portal.acme.test") == {"vllm-batch-portal=1"}
    assert sso.txt_records("_vllm-batch-portal.other.test") == set()
