"""Signing in, up and out: passwords, codes by mail, second factors, sessions, and what is counted."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import pytest
from allauth.account.models import EmailAddress
from allauth.mfa.models import Authenticator
from allauth.mfa.totp.internal.auth import (
    TOTP,
    format_hotp_value,
    hotp_value,
    yield_hotp_counters_from_time,
)
from allauth.usersessions.models import UserSession
from django.apps import apps
from django.conf import settings
from django.contrib.auth import hashers
from django.core import mail
from django.core.cache import cache
from django.test import Client
from django_scopes import scopes_disabled

from accounts.models import AuditEvent, Invitation, Organization, Role, User
from accounts.services import invitations
from tests.conftest import PASSWORD, Person

pytestmark = pytest.mark.django_db

NEW = "another horse 7 staple"


@pytest.fixture(autouse=True)
def _fresh_counts() -> None:
    cache.clear()


def sign_in(client: Client, email: str, password: str = PASSWORD, **headers: Any) -> Any:
    return client.post("/accounts/login/", {"login": email, "password": password}, **headers)


def signed_in(client: Client) -> str | None:
    id = client.session.get("_auth_user_id")
    return User.objects.get(pk=id).email if id else None


def sign_up(client: Client, email: str) -> Any:
    form = {"email": email, "password1": NEW, "password2": NEW}
    return client.post("/accounts/signup/", form)


def mailed_code() -> str:
    """The code of the last mail: on a line of its own."""
    found = re.search(r"^([A-Z0-9-]{6,})$", str(mail.outbox[-1].body), re.M)
    assert found, mail.outbox[-1].body
    return found[1]


def personal_events() -> list[tuple[str, str]]:
    with scopes_disabled():
        rows = AuditEvent.objects.filter(organization=None).order_by("number")
        return list(rows.values_list("action", "actor_label"))


def totp_code(secret: str) -> str:
    """What an authenticator app shows now."""
    counter = next(iter(yield_hotp_counters_from_time()))
    return str(format_hotp_value(hotp_value(secret, counter)))


# --- Passwords ------------------------------------------------------------------------------
def test_a_person_made_by_the_shell_signs_in_at_once(owner: Person) -> None:
    client = Client()
    answer = sign_in(client, "OWNER@acme.test")
    assert (answer.status_code, answer["Location"]) == (302, "/")
    assert (signed_in(client), mail.outbox) == ("owner@acme.test", [])


def test_passwords_are_kept_by_argon2() -> None:
    from portal import settings as ours  # the tests themselves hash faster

    assert ours.PASSWORD_HASHERS == ["django.contrib.auth.hashers.Argon2PasswordHasher"]


def test_signing_in_leads_back_to_where_one_was_going_and_nowhere_else(owner: Person) -> None:
    for there, led in (("/batches", "/batches"), ("https://evil.test/", "/"), ("//evil.test", "/")):
        form = {"login": "owner@acme.test", "password": PASSWORD, "next": there}
        assert Client().post("/accounts/login/", form)["Location"] == led


def test_a_password_is_changed_and_the_other_browsers_are_out(owner: Person) -> None:
    client, other = Client(), Client()
    for each in (client, other):
        sign_in(each, "owner@acme.test")
    form = {"oldpassword": PASSWORD, "password1": NEW, "password2": NEW}
    client.post("/accounts/password/change/", form)
    assert client.get("/accounts/password/change/").status_code == 200
    assert other.get("/accounts/password/change/").status_code == 302
    assert personal_events() == [("password.changed", "owner@acme.test")]
    assert mail.outbox[-1].to == ["owner@acme.test"]


def test_a_mailed_link_leads_to_us_whatever_the_request_called_us(
    owner: Person, settings: Any
) -> None:
    settings.BASE_URL, settings.REGISTRATION = "https://portal.test", "open"
    Client().post("/accounts/password/reset/", {"email": "owner@acme.test"}, HTTP_HOST="evil.test")
    form = {"email": "owner@acme.test", "password1": NEW, "password2": NEW}
    Client().post("/accounts/signup/", form, HTTP_HOST="evil.test")
    bodies = [str(sent.body) for sent in mail.outbox]
    said = [("https://portal.test/accounts/" in body, "evil" in body) for body in bodies]
    assert said == [(True, False), (True, False)]


@pytest.mark.parametrize("there", ["http://[", "http://[::1", "https://a]b/", "//[x"])
def test_an_address_that_is_none_leads_nowhere(owner: Person, there: str) -> None:
    assert Client().get("/accounts/login/", {"next": there}).status_code == 200
    form = {"login": "owner@acme.test", "password": PASSWORD, "next": there}
    assert Client().post("/accounts/login/", form)["Location"] == "/"


@pytest.mark.parametrize("page", ["password/reset", "signup", "login"])
@pytest.mark.parametrize("domain", ["\u00fc" * 60 + ".test", "\u0660a\u05d0.test"])
def test_an_address_that_no_mail_can_go_to_is_told(page: str, domain: str, settings: Any) -> None:
    settings.REGISTRATION = "open"
    email = f"a@{domain}"
    form = {"email": email, "login": email, "password": NEW, "password1": NEW, "password2": NEW}
    answer = Client().post(f"/accounts/{page}/", form)
    assert answer.status_code in (200, 400)
    assert [str(each) for each in answer.context["form"].errors.get("email", [])] == (
        [] if page == "login" else ["This is not an email address."]
    )
    assert (User.objects.count(), mail.outbox) == (0, [])


def test_a_forgotten_password_is_reset_by_mail_once(owner: Person) -> None:
    client = Client()
    client.post("/accounts/password/reset/", {"email": "owner@acme.test"})
    there = re.escape(settings.BASE_URL) + r"(/accounts/password/reset/key/\S+)"
    link = re.search(there, str(mail.outbox[-1].body))
    assert link
    there = client.get(link[1])["Location"]
    client.post(there, {"password1": NEW, "password2": NEW})
    assert signed_in(client) is None
    sign_in(client, "owner@acme.test", NEW)
    assert signed_in(client) == "owner@acme.test"
    assert personal_events() == [("password.reset", "owner@acme.test")]
    again = Client().get(link[1])
    assert (again.status_code, b"password1" in again.content) == (200, False)


def test_an_inactive_person_does_not_get_in(owner: Person) -> None:
    User.objects.update(is_active=False)
    client = Client()
    assert sign_in(client, "owner@acme.test")["Location"] == "/accounts/inactive/"
    assert signed_in(client) is None


# --- Nobody learns who has an account -------------------------------------------------------
def shape(answer: Any) -> tuple[int, str, str]:
    """What a stranger sees of an answer, without the address that was typed."""
    text = re.sub(
        r'(csrf\S* content|csrfmiddlewaretoken" value|value)="[^"]*"', "", answer.content.decode()
    )
    text = re.sub(r"hx-headers=\'[^\']*\'", "", text)
    text = re.sub(r"[\w.]+@(acme|home)\.test", "ADDRESS", text)
    return answer.status_code, answer.headers.get("Location", ""), text


def test_a_wrong_password_and_an_unknown_address_look_alike(owner: Person) -> None:
    known, unknown = (
        shape(sign_in(Client(), email, "wrong"))
        for email in ("owner@acme.test", "nobody@home.test")
    )
    assert known == unknown
    assert known[0] == 200


@pytest.mark.parametrize("email", ["owner@acme.test", "sso-only@acme.test", "nobody@home.test"])
def test_a_password_is_hashed_whoever_it_is(
    owner: Person, email: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same work, so the same time: for a person, for one without a password, for nobody."""
    User.objects.create_user("sso-only@acme.test", None)
    hashed: list[str] = []
    hasher = type(hashers.get_hasher())
    encode = hasher.encode

    def counted(self: Any, password: str, *args: Any, **kwargs: Any) -> str:
        hashed.append(password)
        return str(encode(self, password, *args, **kwargs))

    monkeypatch.setattr(hasher, "encode", counted)
    sign_in(Client(), email, "wrong")
    assert len(hashed) == 1


def test_a_reset_looks_alike_for_known_and_unknown(owner: Person) -> None:
    answers = []
    for email in ("owner@acme.test", "nobody@home.test"):
        client = Client()
        answers.append(shape(client.post("/accounts/password/reset/", {"email": email})))
        answers.append(shape(client.get("/accounts/password/reset/done/")))
    assert answers[:2] == answers[2:]
    assert [sent.to for sent in mail.outbox] == [["owner@acme.test"], ["nobody@home.test"]]


def test_signing_up_looks_alike_for_known_and_unknown(owner: Person, settings: Any) -> None:
    settings.REGISTRATION = "open"
    answers = []
    for email in ("owner@acme.test", "nobody@home.test"):
        client = Client()
        answers.append(shape(sign_up(client, email)))
        answers.append(shape(client.get("/accounts/confirm-email/")))
        answers.append(shape(client.post("/accounts/confirm-email/", {"code": "WRONG1"})))
    assert answers[:3] == answers[3:]
    assert [sent.to for sent in mail.outbox] == [["owner@acme.test"], ["nobody@home.test"]]
    assert User.objects.get(email="owner@acme.test").check_password(PASSWORD)


# --- Guessing is slow -----------------------------------------------------------------------
def failures(email: str, count: int, address: str = "192.0.2.1") -> list[bool]:
    """Which of so many wrong passwords were not even looked at."""
    answers = [
        sign_in(Client(), email.format(at), "wrong", REMOTE_ADDR=address) for at in range(count)
    ]
    return [
        answer.status_code == 429 or b"Too many failed login attempts" in answer.content
        for answer in answers
    ]


@pytest.mark.parametrize("email", ["owner@acme.test", "nobody@home.test"])
def test_an_account_is_guessed_at_five_times_known_or_not(owner: Person, email: str) -> None:
    assert failures(email, 7) == [False] * 5 + [True] * 2


def signed_in_from(address: str) -> str | None:
    client = Client()
    sign_in(client, "owner@acme.test", REMOTE_ADDR=address)
    return signed_in(client)


def test_an_address_guesses_ten_times_at_whoever(owner: Person) -> None:
    assert failures("nobody{}@home.test", 12) == [False] * 10 + [True] * 2
    assert signed_in_from("192.0.2.1") is None
    assert signed_in_from("192.0.2.2") == "owner@acme.test"


def test_an_address_is_what_a_trusted_proxy_says(owner: Person, settings: Any) -> None:
    settings.TRUSTED_PROXY_COUNT = settings.ALLAUTH_TRUSTED_PROXY_COUNT = 1
    for at in range(11):  # what is left of the proxy's own entry is anybody's invention
        forwarded = f"203.0.113.{at}, 192.0.2.1"
        answer = sign_in(Client(), f"n{at}@home.test", "wrong", HTTP_X_FORWARDED_FOR=forwarded)
    assert b"Too many failed login attempts" in answer.content
    client = Client()
    sign_in(client, "owner@acme.test", HTTP_X_FORWARDED_FOR="192.0.2.1, 192.0.2.7")
    assert signed_in(client) == "owner@acme.test"
    assert UserSession.objects.get().ip == "192.0.2.7"


def test_what_is_no_address_breaks_nothing(owner: Person) -> None:
    for address in ("", "not an address"):
        client = Client()
        sign_in(client, "owner@acme.test", REMOTE_ADDR=address)
        assert signed_in(client) == "owner@acme.test"


def test_with_redis_away_people_still_sign_in(owner: Person, settings: Any) -> None:
    away = settings.CACHES["default"] | {"LOCATION": "redis://127.0.0.1:9/0"}
    settings.CACHES = settings.CACHES | {"default": away}
    client = Client()
    sign_in(client, "owner@acme.test")
    assert signed_in(client) == "owner@acme.test"
    assert sign_in(Client(), "owner@acme.test", "wrong").status_code == 200


# --- Signing up -----------------------------------------------------------------------------
@pytest.mark.parametrize("registration", ["invite", "closed"])
def test_nobody_signs_up_unasked(db: None, settings: Any, registration: str) -> None:
    settings.REGISTRATION = registration
    assert b"made by invitation" in Client().get("/accounts/signup/").content
    sign_up(Client(), "zoe@home.test")
    assert User.objects.count() == 0
    assert b"Make an account" not in Client().get("/accounts/login/").content


def test_where_it_is_open_anybody_signs_up_and_confirms_the_address(
    db: None, settings: Any
) -> None:
    settings.REGISTRATION = "open"
    client = Client()
    assert b"Make an account" in client.get("/accounts/login/").content
    assert sign_up(client, "Zoe@home.test")["Location"] == "/accounts/confirm-email/"
    assert signed_in(client) is None
    sign_in(other := Client(), "zoe@home.test", NEW)
    assert signed_in(other) is None  # not by the password alone, either
    client.post("/accounts/confirm-email/", {"code": first_code()})
    assert signed_in(client) == "zoe@home.test"
    assert EmailAddress.objects.get().verified


def first_code() -> str:
    found = re.search(r"^([A-Z0-9-]{6,})$", str(mail.outbox[0].body), re.M)
    assert found
    return found[1]


@pytest.mark.parametrize("password", ["short", "password123"])
def test_a_weak_password_is_refused_and_the_address_is_kept(
    db: None, settings: Any, password: str
) -> None:
    settings.REGISTRATION = "open"
    form = {"email": "zoe@home.test", "password1": password, "password2": password}
    answer = Client().post("/accounts/signup/", form)
    assert (answer.status_code, User.objects.count()) == (200, 0)
    assert b'value="zoe@home.test"' in answer.content


@pytest.fixture
def invited(owner: Person, acme: Organization) -> Client:
    """A browser that came by the link of an invitation."""
    _, secret = invitations.invite(
        actor=owner.caller, organization=acme, email="Zoe@home.test", role=Role.VIEWER
    )
    client = Client()
    client.get(f"/invitations/{secret}")
    return client


def test_who_is_invited_signs_up_with_the_invited_address_and_no_other(invited: Client) -> None:
    assert b"Zoe@home.test" in invited.get("/accounts/signup/").content
    answer = sign_up(invited, "mallory@home.test")
    assert (answer.status_code, answer["Location"]) == (302, "/invitations/accept")
    assert signed_in(invited) == "zoe@home.test"
    addresses = EmailAddress.objects.filter(user__email="zoe@home.test")
    assert list(addresses.values_list("email", "verified")) == [("zoe@home.test", True)]


def test_an_invitation_that_is_revoked_meanwhile_lets_nobody_sign_up(
    owner: Person, invited: Client
) -> None:
    with scopes_disabled():
        invitation = Invitation.objects.get()
    invitations.revoke_invitation(actor=owner.caller, invitation=invitation)
    sign_up(invited, "zoe@home.test")
    assert not User.objects.filter(email="zoe@home.test").exists()


def test_an_invitation_says_nothing_where_registration_is_closed(
    invited: Client, settings: Any
) -> None:
    settings.REGISTRATION = "closed"
    sign_up(invited, "zoe@home.test")
    assert not User.objects.filter(email="zoe@home.test").exists()


def test_mail_that_cannot_be_sent_is_told(owner: Person, settings: Any) -> None:
    settings.EMAIL_BACKEND = "django.core.mail.backends.smtp.EmailBackend"
    settings.EMAIL_HOST, settings.EMAIL_PORT = "127.0.0.1", 9
    client = Client()
    client.post("/accounts/password/reset/", {"email": "owner@acme.test"})
    assert b"Mail cannot be sent just now" in client.get("/accounts/password/reset/done/").content


# --- What people change about their account -------------------------------------------------
def reauthenticated(person: Person) -> Client:
    client = Client()
    sign_in(client, person.user.email)
    client.post("/accounts/reauthenticate/", {"password": PASSWORD})
    return client


def test_a_new_address_counts_once_its_code_is_entered(owner: Person) -> None:
    client = reauthenticated(owner)
    client.post("/accounts/email/", {"action_add": "1", "email": "new@acme.test"})
    assert User.objects.get(pk=owner.user.pk).email == "owner@acme.test"
    assert mail.outbox[-1].to == ["new@acme.test"]
    client.post("/accounts/confirm-email/", {"code": mailed_code()})
    assert User.objects.get(pk=owner.user.pk).email == "new@acme.test"
    assert personal_events() == [("email.changed", "new@acme.test")]
    assert list(EmailAddress.objects.values_list("email", flat=True)) == ["new@acme.test"]


def test_changing_the_address_asks_for_the_password_again(owner: Person) -> None:
    client = Client()
    sign_in(client, "owner@acme.test")
    answer = client.post("/accounts/email/", {"action_add": "1", "email": "new@acme.test"})
    assert (answer.status_code, mail.outbox) == (302, [])


@pytest.mark.django_db(transaction=True)
def test_an_authenticator_app_is_set_up_and_then_asked_for(owner: Person) -> None:
    client = reauthenticated(owner)
    page = client.get("/accounts/2fa/totp/activate/")
    secret = page.context["form"].secret
    client.post("/accounts/2fa/totp/activate/", {"code": totp_code(secret)})
    stored = Authenticator.objects.get(type="totp").data["secret"]
    assert secret not in stored  # encrypted at rest
    assert personal_events() == [("mfa.added", "owner@acme.test")] * 2  # with recovery codes

    other = Client()
    assert sign_in(other, "owner@acme.test")["Location"] == "/accounts/2fa/authenticate/"
    assert signed_in(other) is None
    other.post("/accounts/2fa/authenticate/", {"code": "000000"})
    assert signed_in(other) is None
    cache.clear()  # each code counts once
    other.post("/accounts/2fa/authenticate/", {"code": totp_code(secret)})
    assert signed_in(other) == "owner@acme.test"


def test_turning_the_second_factor_off_is_recorded(owner: Person) -> None:
    client = reauthenticated(owner)
    TOTP.activate(owner.user, "JBSWY3DPEHPK3PXP")
    client.post("/accounts/2fa/totp/deactivate/")
    assert not Authenticator.objects.exists()
    assert personal_events()[-1] == ("mfa.removed", "owner@acme.test")


# --- Sessions -------------------------------------------------------------------------------
def test_sessions_are_listed_and_ended_from_another(owner: Person, teammate: Person) -> None:
    here, there, theirs = Client(), Client(), Client()
    sign_in(here, "owner@acme.test", HTTP_USER_AGENT="Here/1")
    sign_in(there, "owner@acme.test", HTTP_USER_AGENT="There/1")
    sign_in(theirs, "teammate@acme.test", HTTP_USER_AGENT="Theirs/1")
    page = here.get("/accounts/sessions/").content.decode()
    assert [name in page for name in ("Here/1", "There/1", "Theirs/1")] == [True, True, False]

    foreign = UserSession.objects.get(user_agent="Theirs/1")
    assert here.post(f"/accounts/sessions/{foreign.pk}/end").status_code == 404
    assert here.get(f"/accounts/sessions/{foreign.pk}/end").status_code == 405
    other = UserSession.objects.get(user_agent="There/1")
    assert here.post(f"/accounts/sessions/{other.pk}/end").status_code == 302
    states = [c.get("/accounts/email/").status_code for c in (here, there, theirs)]
    assert states == [200, 302, 200]
    assert personal_events() == [("session.ended", "owner@acme.test")]


def test_all_other_sessions_are_ended_at_once(owner: Person) -> None:
    clients = [Client() for _ in range(3)]
    for client in clients:
        sign_in(client, "owner@acme.test")
    clients[0].post("/accounts/sessions/")
    states = [client.get("/accounts/email/").status_code for client in clients]
    assert states == [200, 302, 302]
    assert personal_events() == [("session.ended", "owner@acme.test")] * 2


def test_signing_out_takes_a_post(owner: Person) -> None:
    client = owner.browser
    client.get("/accounts/logout/")
    assert signed_in(client) == "owner@acme.test"
    client.post("/accounts/logout/")
    assert signed_in(client) is None


# --- Operators ------------------------------------------------------------------------------
def test_an_operator_needs_a_second_factor_where_it_is_required(
    operator: User, settings: Any
) -> None:
    client = Client()
    client.force_login(operator, backend="allauth.account.auth_backends.AuthenticationBackend")
    assert client.get("/operator/domains").status_code == 200
    settings.OPERATOR_MFA_REQUIRED = True
    answer = client.get("/operator/domains", follow=True)
    assert answer.redirect_chain == [("/accounts/2fa/", 302)]
    assert b"Operators need two-factor authentication" in answer.content
    TOTP.activate(operator, "JBSWY3DPEHPK3PXP")
    assert client.get("/operator/domains").status_code == 200


def test_people_made_before_addresses_were_confirmed_keep_signing_in(owner: Person) -> None:
    EmailAddress.objects.all().delete()
    import_module("accounts.migrations.0005_verified_emails").verify(apps, None)
    client = Client()
    sign_in(client, "owner@acme.test")
    assert signed_in(client) == "owner@acme.test"
