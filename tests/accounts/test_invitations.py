"""Invitations: one link, one person, one time, and nothing said to anybody else."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
import time_machine
from allauth.account.models import EmailAddress
from django.contrib.messages import get_messages
from django.core import mail
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.errors import BadRequest, Forbidden, Gone
from accounts.models import AuditEvent, Invitation, Membership, Organization, Role, User
from accounts.secrets import digest
from accounts.services import invitations, members, organizations
from tests import jobs
from tests.accounts.test_members import access_again, actions, admin_key, membership_of
from tests.conftest import PASSWORD, Person
from tests.wire import assert_refused, post

INVITES = "/v1/organization/invites"
BACKEND = "allauth.account.auth_backends.AuthenticationBackend"
GUEST = "guest@elsewhere.test"


def invited(person: Person, email: str = GUEST, role: str = Role.MEMBER) -> tuple[Invitation, str]:
    return invitations.invite(
        actor=person.caller, organization=person.caller.organization, email=email, role=role
    )


def confirmed(email: str, *, verified: bool = True) -> User:
    user = User.objects.create_user(email, PASSWORD)
    EmailAddress.objects.filter(user=user).update(verified=verified)
    return user


def browser_of(user: User) -> Client:
    client = Client()
    client.force_login(user, backend=BACKEND)
    return client


def fresh(invitation: Invitation) -> Invitation:
    with scopes_disabled():
        return Invitation.objects.get(pk=invitation.pk)


def change(invitation: Invitation, **fields: Any) -> None:
    with scopes_disabled():
        Invitation.objects.filter(pk=invitation.pk).update(**fields)


def roles_of(user: User) -> list[tuple[str, str]]:
    with scopes_disabled():
        return list(Membership.objects.filter(user=user).values_list("organization__slug", "role"))


def sent_link(message: Any) -> str:
    found = re.search(r"^https?://\S+?(/invitations/\S+)$", message.body, re.M)
    assert found
    return found[1]


def said(response: Any) -> list[str]:
    return [str(message) for message in get_messages(response.wsgi_request)]


# --- Inviting -------------------------------------------------------------------------------


def test_the_link_is_mailed_and_only_its_digest_is_kept(
    owner: Person, django_capture_on_commit_callbacks: Any, settings: Any
) -> None:
    settings.BASE_URL = "https://batches.example"
    with django_capture_on_commit_callbacks(execute=True):
        invitation, secret = invited(owner)
    (message,) = mail.outbox
    assert (message.to, message.subject) == ([GUEST], "Acme invites you")
    assert sent_link(message) == f"/invitations/{secret}"
    assert "https://batches.example/invitations/" in message.body
    assert len(secret) >= 43
    assert invitation.digest == digest(secret)
    with scopes_disabled():
        kept = [str(vars(row)) for row in (*Invitation.objects.all(), *AuditEvent.objects.all())]
    assert not any(secret in row for row in kept)


def test_nothing_is_mailed_of_what_was_not_kept(
    owner: Person, django_capture_on_commit_callbacks: Any
) -> None:
    with django_capture_on_commit_callbacks(execute=True), pytest.raises(BadRequest):
        invited(owner, "no address")
    assert mail.outbox == []


def test_a_name_cannot_add_headers_to_the_mail(
    owner: Person, acme: Organization, django_capture_on_commit_callbacks: Any
) -> None:
    organizations.rename_organization(actor=owner.caller, name="A\r\nBcc: x@evil.test <b>")
    acme.refresh_from_db()
    with django_capture_on_commit_callbacks(execute=True):
        invitations.invite(actor=None, organization=acme, email=GUEST, role="viewer")
    assert mail.outbox[0].subject == "A Bcc: x@evil.test <b> invites you"
    assert mail.outbox[0].recipients() == [GUEST]


def test_an_invitation_lasts_as_long_as_set(owner: Person, settings: Any) -> None:
    settings.INVITATION_DAYS = 3
    invitation, _ = invited(owner)
    lasts = invitation.expires_at - timezone.now()
    assert timedelta(days=2, hours=23) < lasts <= timedelta(days=3)


def test_one_open_invitation_a_person(owner: Person) -> None:
    invited(owner)
    with pytest.raises(BadRequest) as caught:
        invited(owner, GUEST.upper())
    assert (caught.value.param, caught.value.code) == ("email", "already_invited")


def test_after_one_has_expired_or_been_revoked_there_may_be_another(owner: Person) -> None:
    first, _ = invited(owner)
    change(first, expires_at=timezone.now() - timedelta(seconds=1))
    second, _ = invited(owner)
    invitations.revoke_invitation(actor=owner.caller, invitation=second)
    third, secret = invited(owner)
    assert invitations.valid_invitation(secret=secret).pk == third.pk
    assert [fresh(each).status for each in (first, second, third)] == [
        "revoked",
        "revoked",
        "pending",
    ]


def test_members_are_not_invited_again(owner: Person, teammate: Person) -> None:
    with pytest.raises(BadRequest) as caught:
        invited(owner, "Teammate@ACME.test")
    assert (caught.value.param, caught.value.code) == ("email", "already_a_member")


def test_an_admin_invites_no_owner(admin: Person) -> None:
    with pytest.raises(Forbidden):
        invited(admin, role=Role.OWNER)
    assert invited(admin, role=Role.ADMIN)[0].role == "admin"


def test_an_admin_neither_resends_nor_revokes_an_owners_invitation(
    owner: Person, admin: Person
) -> None:
    invitation, _ = invited(owner, role=Role.OWNER)
    for does in (invitations.resend_invitation, invitations.revoke_invitation):
        with pytest.raises(Forbidden):
            does(actor=admin.caller, invitation=invitation)
    assert fresh(invitation).status == "pending"


def test_resending_ends_the_old_link(
    owner: Person, django_capture_on_commit_callbacks: Any
) -> None:
    invitation, old = invited(owner)
    change(invitation, expires_at=timezone.now())
    with django_capture_on_commit_callbacks(execute=True):
        invitations.resend_invitation(actor=owner.caller, invitation=invitation)
    new = sent_link(mail.outbox[-1]).removeprefix("/invitations/")
    with pytest.raises(Gone):
        invitations.valid_invitation(secret=old)
    assert invitations.valid_invitation(secret=new).pk == invitation.pk


def test_resending_ends_the_old_link_for_who_has_already_opened_it(
    owner: Person, settings: Any
) -> None:
    settings.REGISTRATION = "invite"
    invitation, old = invited(owner)
    nobody, guest = Client(), browser_of(confirmed(GUEST))
    for client in (nobody, guest):
        assert client.get(f"/invitations/{old}").status_code == 302
    invitations.resend_invitation(actor=owner.caller, invitation=invitation)
    assert guest.post("/invitations/accept").status_code == 410
    User.objects.all().exclude(pk=owner.user.pk).delete()
    password = "unlikely 7 giraffes"
    form = {"email": GUEST, "password1": password, "password2": password}
    nobody.post("/accounts/signup/", form)
    assert not User.objects.filter(email=GUEST).exists()


def test_an_invitation_that_was_sent_again_meanwhile_is_not_accepted(owner: Person) -> None:
    opened, _ = invited(owner)
    invitations.resend_invitation(actor=owner.caller, invitation=opened)
    with pytest.raises(Gone):
        invitations.accept_invitation(actor=confirmed(GUEST), invitation=opened)


def test_so_many_are_mailed_a_day(owner: Person, stranger: Person, settings: Any) -> None:
    settings.INVITATIONS_PER_DAY = 3
    with time_machine.travel("2026-03-01T12:00:00Z", tick=False):
        invitation, _ = invited(owner)
        invitations.resend_invitation(actor=owner.caller, invitation=invitation)
        invitations.revoke_invitation(actor=owner.caller, invitation=invitation)
        invited(owner)
    api, body = admin_key(owner), {"email": "b@elsewhere.test", "role": "viewer"}
    with time_machine.travel("2026-03-02T11:59:59Z", tick=False):
        assert_refused(post(api, INVITES, body), 429, None, "too_many_invitations")
        page = owner.browser.post("/organization/members", body)
        assert "at most 3 invitations in 24 hours" in page.content.decode()
        assert (page.status_code, b'value="b@elsewhere.test"' in page.content) == (400, True)
        refused = owner.browser.post(f"/organization/invitations/{open_invitation()}/resend")
        assert said(refused)[0].startswith("An organization sends at most 3 invitations")
        invited(stranger)
        call_command("invite", "--org", "acme", "--email", "c@elsewhere.test")
    with time_machine.travel("2026-03-02T12:00:01Z", tick=False):
        assert post(api, INVITES, body).status_code == 200


def open_invitation() -> str:
    with scopes_disabled():
        return Invitation.objects.get(email=GUEST, revoked_at=None).pk


def test_what_a_removed_member_has_offered_ends_with_them(
    owner: Person, admin: Person, stranger: Person
) -> None:
    theirs = [invited(admin, f"{role}@elsewhere.test", role)[0] for role in ("viewer", "admin")]
    others = [invited(owner)[0], invited(stranger)[0]]
    members.remove_member(actor=owner.caller, membership=membership_of(admin))
    assert [fresh(each).status for each in theirs] == ["revoked", "revoked"]
    assert [fresh(each).status for each in others] == ["pending", "pending"]
    assert actions()[-3:] == ["member.removed", "invitation.revoked", "invitation.revoked"]


@pytest.mark.parametrize(
    ("role", "left"),
    [("admin", ["admin", "viewer"]), ("member", []), ("viewer", [])],
)
def test_what_a_demoted_member_could_not_offer_now_ends(
    role: str, left: list[str], owner: Person, teammate: Person
) -> None:
    members.change_role(actor=owner.caller, membership=membership_of(teammate), role=Role.OWNER)
    boss = access_again(teammate)
    theirs = [
        invitations.invite(
            actor=boss, organization=boss.organization, email=f"{each}@b.test", role=each
        )[0]
        for each in ("owner", "admin", "viewer")
    ]
    members.change_role(actor=owner.caller, membership=membership_of(teammate), role=role)
    assert [row.role for row in map(fresh, theirs) if row.status == "pending"] == left
    assert actions().count("invitation.revoked") == 3 - len(left)


def test_mail_that_cannot_be_sent_is_said(
    owner: Person, monkeypatch: pytest.MonkeyPatch, django_capture_on_commit_callbacks: Any
) -> None:
    def away(*args: Any, **kwargs: Any) -> None:
        raise ConnectionRefusedError

    monkeypatch.setattr(invitations, "send_mail", away)
    api = admin_key(owner)
    body = {"email": GUEST, "role": "member"}
    client = owner.browser
    with django_capture_on_commit_callbacks() as callbacks:
        assert post(api, INVITES, body).status_code == 200
        assert client.post("/organization/members", body | {"email": "b@c.test"}).status_code == 302
    for send in callbacks:
        with pytest.raises(Exception, match="mail cannot be sent") as caught:
            send()
        assert caught.value.status == 503


# --- Accepting ------------------------------------------------------------------------------


def test_the_whole_way(owner: Person, django_capture_on_commit_callbacks: Any) -> None:
    with django_capture_on_commit_callbacks(execute=True):
        owner.browser.post("/organization/members", {"email": GUEST, "role": "viewer"})
    link = sent_link(mail.outbox[0])
    client = Client()
    response = client.get(link)
    assert (response.status_code, response["Location"]) == (302, "/invitations/accept")
    page = client.get("/invitations/accept").content.decode()
    assert "/accounts/login/?next=%2Finvitations%2Faccept" in page
    assert "/accounts/signup/?next=%2Finvitations%2Faccept" in page
    assert "Acme" not in page
    guest = confirmed(GUEST)
    client.post("/accounts/login/?next=/invitations/accept", {"login": GUEST, "password": PASSWORD})
    page = client.get("/invitations/accept").content.decode()
    assert "Join Acme" in page
    assert roles_of(guest) == []
    response = client.post("/invitations/accept")
    assert (response.status_code, response["Location"]) == (302, "/")
    assert roles_of(guest) == [("acme", "viewer")]
    assert client.get("/").status_code == 200
    again = client.get(link)
    assert (again.status_code, b"Acme" in again.content) == (410, False)


def test_accepting_goes_to_the_new_organization(owner: Person, stranger: Person) -> None:
    _, secret = invited(owner, "Stranger@GLOBEX.test")
    client = stranger.browser
    client.get(f"/invitations/{secret}")
    client.post("/invitations/accept")
    assert client.session["organization"] == "acme"
    assert "invitation" not in client.session
    assert b"Member of Acme" in client.get("/").content


def test_who_is_a_member_by_then_keeps_their_role(owner: Person, acme: Organization) -> None:
    invitation, _ = invited(owner, role=Role.VIEWER)
    guest = confirmed(GUEST)
    members.add_member(actor=None, organization=acme, user=guest, role=Role.ADMIN)
    invitations.accept_invitation(actor=guest, invitation=invitation)
    assert roles_of(guest) == [("acme", "admin")]
    assert fresh(invitation).status == "accepted"


@pytest.mark.django_db(transaction=True)
def test_a_link_is_used_once_however_many_try(owner: Person) -> None:
    invitation, _ = invited(owner)
    guest = confirmed(GUEST)

    def accept() -> Membership:
        return invitations.accept_invitation(actor=guest, invitation=invitation)

    found = jobs.together(*[accept] * 4)
    assert sorted(type(each).__name__ for each in found) == ["Gone"] * 3 + ["Membership"]
    assert roles_of(guest) == [("acme", "member")]
    with scopes_disabled():
        assert AuditEvent.objects.filter(action="invitation.accepted").count() == 1


@pytest.mark.django_db(transaction=True)
def test_of_two_invitations_at_once_one_is_made(owner: Person) -> None:
    found = jobs.together(*[lambda: invited(owner)] * 2)
    assert sorted(type(each).__name__ for each in found) == ["BadRequest", "tuple"]


@pytest.mark.django_db(transaction=True)
def test_who_accepts_while_they_are_let_in_otherwise_joins_once(
    owner: Person, stranger: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation, _ = invited(owner, stranger.user.email, Role.VIEWER)
    acme = owner.caller.organization
    found = jobs.crossing(
        monkeypatch,
        lambda: invitations.accept_invitation(actor=stranger.user, invitation=invitation),
        lambda: members.add_member(
            actor=None, organization=acme, user=stranger.user, role="member"
        ),
    )
    assert [type(each) for each in found] == [Membership, Membership]
    assert len(roles_of(stranger.user)) == 2


@pytest.mark.parametrize("verified", [True, False])
def test_another_address_is_told_neither_which_nor_where(owner: Person, verified: bool) -> None:
    _, secret = invited(owner)
    other = confirmed("other@elsewhere.test" if verified else GUEST, verified=verified)
    client = browser_of(other)
    client.get(f"/invitations/{secret}")
    for response in (client.get("/invitations/accept"), client.post("/invitations/accept")):
        page = response.content.decode()
        assert response.status_code == 403
        assert "Not for this account" in page
        assert "Acme" not in page
        assert GUEST not in page or not verified
    assert roles_of(other) == []


def test_an_address_of_somebody_elses_is_not_proof(owner: Person) -> None:
    invitation, _ = invited(owner)
    confirmed(GUEST)
    other = confirmed("other@elsewhere.test")
    with pytest.raises(Forbidden):
        invitations.accept_invitation(actor=other, invitation=invitation)


def test_all_that_no_longer_holds_is_one_and_the_same_page(
    owner: Person, acme: Organization
) -> None:
    guest = confirmed(GUEST)

    def ended(how: str) -> str:
        invitation, secret = invited(owner)
        if how == "expired":
            change(invitation, expires_at=timezone.now())
        elif how == "used":
            invitations.accept_invitation(actor=guest, invitation=invitation)
            with scopes_disabled():
                Membership.objects.filter(user=guest).delete()
        else:
            invitations.revoke_invitation(actor=owner.caller, invitation=invitation)
        return secret

    secrets = [ended("expired"), ended("revoked"), ended("used"), "x" * 43, "\U0001f600"]
    for client in (Client(), browser_of(guest)):
        answers = [client.get(f"/invitations/{secret}") for secret in secrets]
        assert {answer.status_code for answer in answers} == {410}
        pages = {re.sub(r'value=".*?"|csrftoken": ".*?"', "", a.content.decode()) for a in answers}
        assert len(pages) == 1
        assert "Acme" not in pages.pop()


@pytest.mark.parametrize("field", ["suspended_at", "deleted_at"])
def test_nobody_joins_a_suspended_or_deleted_organization(
    field: str, owner: Person, acme: Organization
) -> None:
    invitation, secret = invited(owner)
    Organization.objects.filter(pk=acme.pk).update(**{field: timezone.now()})
    assert Client().get(f"/invitations/{secret}").status_code == 410
    with pytest.raises(Gone):
        invitations.accept_invitation(actor=confirmed(GUEST), invitation=invitation)


def test_without_a_link_there_is_nothing_to_accept(owner: Person) -> None:
    for client in (Client(), owner.browser):
        assert client.get("/invitations/accept").status_code == 410
        assert client.post("/invitations/accept").status_code == 410


def test_opening_the_link_uses_nothing_up(owner: Person) -> None:
    invitation, secret = invited(owner)
    for _ in range(2):
        response = Client().get(f"/invitations/{secret}")
        assert response["Cache-Control"].startswith("max-age=0")
    assert fresh(invitation).status == "pending"
    assert Client().post(f"/invitations/{secret}").status_code == 405


def test_an_invited_person_signs_up_with_the_link(owner: Person) -> None:
    _, secret = invited(owner)
    client = Client()
    assert client.get("/accounts/signup/").status_code in (200, 302)
    client.get(f"/invitations/{secret}")
    password = "unlikely 7 giraffes"
    form = {"email": GUEST, "password1": password, "password2": password}
    response = client.post("/accounts/signup/?next=/invitations/accept", form, follow=True)
    assert "Join Acme" in response.content.decode()
    client.post("/invitations/accept")
    assert roles_of(User.objects.get(email=GUEST)) == [("acme", "member")]


# --- By API ---------------------------------------------------------------------------------


def test_an_invite_is_made_listed_and_deleted(owner: Person, stranger: Person) -> None:
    invited(stranger)
    api = admin_key(owner)
    made = post(api, INVITES, {"email": GUEST, "role": "reviewer"}).json()
    assert made == {
        "object": "organization.invite",
        "id": made["id"],
        "email": GUEST,
        "role": "reviewer",
        "status": "pending",
        "created_at": made["created_at"],
        "invited_at": made["created_at"],
        "expires_at": made["created_at"] + 7 * 24 * 3600,
        "accepted_at": None,
        "projects": [],
    }
    path = f"{INVITES}/{made['id']}"
    assert api.get(path).json() == made
    assert api.get(INVITES).json()["data"] == [made]
    assert api.delete(path).json() == {
        "object": "organization.invite.deleted",
        "id": made["id"],
        "deleted": True,
    }
    assert_refused(api.get(path), 404, "invite_id", "not_found")
    assert_refused(api.delete(path), 404, "invite_id", "not_found")
    assert api.get(INVITES).json()["data"] == []


def test_an_accepted_invite_cannot_be_deleted(owner: Person) -> None:
    invitation, _ = invited(owner)
    invitations.accept_invitation(actor=confirmed(GUEST), invitation=invitation)
    refused = admin_key(owner).delete(f"{INVITES}/{invitation.pk}")
    assert_refused(refused, 400, "invite_id", "not_pending")


def test_no_key_invites_owners(owner: Person) -> None:
    refused = post(admin_key(owner), INVITES, {"email": GUEST, "role": "owner"})
    assert_refused(refused, 403, None, "insufficient_scope")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "email"),
        ({"email": GUEST}, "role"),
        ({"email": GUEST, "role": "king"}, "role"),
        ({"email": "x" * 300 + "@a.test", "role": "member"}, "email"),
        ({"email": "nobody", "role": "member"}, "email"),
        ({"email": "a\0@b.test", "role": "member"}, "email"),
        ({"email": 1, "role": "member"}, "email"),
    ],
)
def test_bad_invites_are_named(body: dict[str, Any], param: str, owner: Person) -> None:
    response = post(admin_key(owner), INVITES, body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("domain", ["\u00fc" * 60 + ".test", "\u0660a\u05d0.test"])
def test_an_address_that_no_mail_can_go_to_is_refused(
    domain: str, owner: Person, django_capture_on_commit_callbacks: Any
) -> None:
    body = {"email": f"a@{domain}", "role": "viewer"}
    with django_capture_on_commit_callbacks(execute=True):
        by_api = post(admin_key(owner), INVITES, body)
        by_page = owner.browser.post("/organization/members", body)
    assert_refused(by_api, 400, "email", None)
    assert by_page.status_code == 400
    assert "This is not an email address." in by_page.content.decode()
    assert mail.outbox == []


def test_members_may_not_invite(teammate: Person) -> None:
    refused = post(admin_key(teammate), INVITES, {"email": GUEST, "role": "member"})
    assert_refused(refused, 403, None, "insufficient_role")


def test_the_api_never_shows_the_link(
    owner: Person, django_capture_on_commit_callbacks: Any
) -> None:
    api = admin_key(owner)
    with django_capture_on_commit_callbacks(execute=True):
        made = post(api, INVITES, {"email": GUEST, "role": "member"})
    secret = sent_link(mail.outbox[0]).rpartition("/")[2]
    for response in (made, api.get(INVITES), owner.browser.get("/organization/members")):
        assert secret not in response.content.decode()


def queries_of(read: Any) -> int:
    with CaptureQueriesContext(connection) as queries:
        assert read().status_code == 200
    return len(queries)


def test_the_lists_queries_do_not_grow(owner: Person) -> None:
    admin_key(owner)
    reads = [lambda: owner.api.get(INVITES), lambda: owner.browser.get("/organization/members")]
    invited(owner)
    for read in reads:
        read()
    of_one = [queries_of(read) for read in reads]
    invited(owner, "b@elsewhere.test")
    invited(owner, "c@elsewhere.test")
    assert [queries_of(read) for read in reads] == of_one


# --- By page --------------------------------------------------------------------------------


def test_the_form_keeps_its_input_and_says_what_is_wrong(owner: Person, teammate: Person) -> None:
    body = {"email": "teammate@acme.test", "role": "viewer"}
    page = owner.browser.post("/organization/members", body)
    assert page.status_code == 400
    assert "This person already is a member." in page.content.decode()
    assert b'value="teammate@acme.test"' in page.content


def test_an_admins_form_offers_no_owner(admin: Person) -> None:
    body = {"email": GUEST, "role": "owner"}
    assert admin.browser.post("/organization/members", body).status_code == 400
    with scopes_disabled():
        assert Invitation.objects.count() == 0


def test_resending_and_revoking_by_page(owner: Person) -> None:
    invitation, _ = invited(owner)
    path = f"/organization/invitations/{invitation.pk}"
    assert said(owner.browser.post(f"{path}/resend")) == [
        f"{GUEST} gets a new link; the old one has ended."
    ]
    assert said(owner.browser.post(f"{path}/revoke")) == [f"The invitation of {GUEST} has ended."]
    assert said(owner.browser.post(f"{path}/revoke")) == ["This invitation is revoked by now."]
    assert fresh(invitation).status == "revoked"


@pytest.mark.parametrize("action", ["resend", "revoke"])
def test_others_may_not(action: str, owner: Person, teammate: Person, stranger: Person) -> None:
    invitation, _ = invited(owner)
    path = f"/organization/invitations/{invitation.pk}/{action}"
    assert owner.browser.get(path).status_code == 405
    assert teammate.browser.post(path).status_code == 403
    assert stranger.browser.post(path).status_code == 404
    assert fresh(invitation).digest == invitation.digest


# --- By command -----------------------------------------------------------------------------


def test_the_shell_prints_the_link(
    acme: Organization, capsys: Any, django_capture_on_commit_callbacks: Any
) -> None:
    with django_capture_on_commit_callbacks(execute=True):
        call_command("invite", "--org", "acme", "--email", GUEST, "--role", "owner")
    printed = capsys.readouterr().out.strip()
    assert printed.endswith(sent_link(mail.outbox[0]))
    found = invitations.valid_invitation(secret=printed.rpartition("/")[2])
    assert (found.email, found.role, found.organization) == (GUEST, "owner", acme)
    with pytest.raises(CommandError, match="has been invited already"):
        call_command("invite", "--org", "acme", "--email", GUEST)
