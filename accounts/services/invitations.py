"""Writes of invitations: sending, sending again, revoking, accepting.

A link's secret is kept only as a digest, and is shown to nobody but the person it is mailed to:
who has it has shown that mail to that address reaches them.
"""

from __future__ import annotations

import secrets
import smtplib
from datetime import datetime, timedelta

import structlog
from allauth.account.models import EmailAddress
from django.conf import settings
from django.core.mail import send_mail
from django.db import IntegrityError, transaction
from django.template.loader import render_to_string
from django.urls import reverse
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts import ids
from accounts.access import Caller
from accounts.addresses import checked_email
from accounts.errors import BadRequest, Forbidden, Gone, QuotaExceeded, Unavailable
from accounts.models import AuditEvent, Invitation, Membership, Organization, User
from accounts.secrets import digest
from accounts.services import audit
from accounts.services.members import add_member, require_may_give
from accounts.services.organizations import locked

logger = structlog.get_logger(__name__)


def link(secret: str) -> str:
    return settings.BASE_URL + reverse("invitation", args=[secret])


@transaction.atomic
def invite(
    *, actor: Caller | None, organization: Organization, email: str, role: str
) -> tuple[Invitation, str]:
    """Invite a person and mail them the link; returns its secret too.

    Only the installation's shell may show the secret: others would learn how to prove an
    address that is not theirs. One whose invitation has expired gets a new one.
    """
    email = User.objects.normalize_email(checked_email(email))
    require_may_give(actor, role)
    with scopes_disabled():
        _require_not_too_many(actor, organization)
        _require_no_member(organization, email)
        _close_expired(organization, email)
        secret = secrets.token_urlsafe(32)
        invitation = Invitation(
            organization=organization,
            email=email,
            role=role,
            digest=digest(secret),
            invited_by=actor.user if actor else None,
            expires_at=_expiry(),
        )
        _save_only_open(invitation)
    _record("invitation.created", actor, invitation)
    transaction.on_commit(lambda: _send(invitation, secret))
    return invitation, secret


@transaction.atomic
def resend_invitation(*, actor: Caller, invitation: Invitation) -> Invitation:
    """Mail a new link, which lasts as long as the first did; the old one ends, opened or not."""
    with scopes_disabled():
        _require_not_too_many(actor, actor.organization)
    invitation = _locked_open(invitation)
    require_may_give(actor, invitation.role)
    secret = secrets.token_urlsafe(32)
    invitation.digest, invitation.expires_at = digest(secret), _expiry()
    with scopes_disabled():
        invitation.save(update_fields=["digest", "expires_at"])
    _record("invitation.resent", actor, invitation)
    transaction.on_commit(lambda: _send(invitation, secret))
    return invitation


@transaction.atomic
def revoke_invitation(*, actor: Caller, invitation: Invitation) -> None:
    invitation = _locked_open(invitation)
    require_may_give(actor, invitation.role)
    invitation.revoked_at = timezone.now()
    with scopes_disabled():
        invitation.save(update_fields=["revoked_at"])
    _record("invitation.revoked", actor, invitation)


def valid_invitation(*, secret: str = "", kept: str = "") -> Invitation:
    """The invitation of this link, or of the digest that was kept when it was opened.

    Raises `Gone` for whatever no longer holds: expired, used, revoked, replaced by a new link and
    unknown ones are the same error, which names nobody.
    """
    with scopes_disabled():
        rows = Invitation.objects.select_related("organization", "invited_by")
        invitation = rows.filter(digest=digest(secret) if secret else kept).first()
    return _require_valid(invitation)


def may_accept(user: User, invitation: Invitation) -> bool:
    """Whether it was sent to an address that this person has confirmed."""
    theirs = EmailAddress.objects.filter(user=user, verified=True)
    return bool(theirs.filter(email__iexact=invitation.email).exists())


@transaction.atomic
def accept_invitation(*, actor: User, invitation: Invitation) -> Membership:
    """Join, once: of two people who accept at the same moment the second finds it used."""
    with scopes_disabled():
        rows = Invitation.objects.select_for_update(of=("self",)).select_related("organization")
        same = rows.filter(pk=invitation.pk, digest=invitation.digest)
        invitation = _require_valid(same.first())
        if not may_accept(actor, invitation):
            raise Forbidden("This invitation was sent to another address.")
        invitation.accepted_at, invitation.accepted_by = timezone.now(), actor
        invitation.save(update_fields=["accepted_at", "accepted_by"])
    membership = add_member(
        actor=actor, organization=invitation.organization, user=actor, role=invitation.role
    )
    _record("invitation.accepted", actor, invitation)
    return membership


def _require_valid(invitation: Invitation | None) -> Invitation:
    if (
        invitation is None
        or invitation.status != "pending"
        or not invitation.organization.is_active
    ):
        raise Gone("This invitation is no longer valid; ask who invited you for a new one.")
    return invitation


def _require_not_too_many(actor: Caller | None, organization: Organization) -> None:
    """Mail goes to whom nobody asked: so much of it a day, but for the installation's shell."""
    if actor is None:
        return
    locked(organization)  # of two at once the second counts the first
    sent = AuditEvent.objects.filter(
        organization=organization,
        action__in=("invitation.created", "invitation.resent"),
        pk__gte=ids.first_audit_event_id(timezone.now() - timedelta(days=1)),
    )
    if sent.count() >= settings.INVITATIONS_PER_DAY:
        raise QuotaExceeded(
            f"An organization sends at most {settings.INVITATIONS_PER_DAY:,} invitations in 24"
            " hours, those that are sent again among them: try again tomorrow.",
            code="too_many_invitations",
        )


def _require_no_member(organization: Organization, email: str) -> None:
    members = Membership.objects.filter(organization=organization, user__email__iexact=email)
    if members.exists():
        raise BadRequest("This person already is a member.", param="email", code="already_a_member")


def _close_expired(organization: Organization, email: str) -> None:
    now = timezone.now()
    Invitation.objects.filter(
        organization=organization,
        email__iexact=email,
        expires_at__lte=now,
        accepted_at=None,
        revoked_at=None,
    ).update(revoked_at=now)


def _save_only_open(invitation: Invitation) -> None:
    try:
        with transaction.atomic():
            invitation.save(force_insert=True)
    except IntegrityError:
        raise BadRequest(
            "This person has been invited already: send that invitation again, or revoke it.",
            param="email",
            code="already_invited",
        ) from None


def _locked_open(invitation: Invitation) -> Invitation:
    with scopes_disabled():
        rows = Invitation.objects.select_for_update(of=("self",)).select_related("organization")
        now = rows.get(pk=invitation.pk)
    if now.status not in ("pending", "expired"):
        raise BadRequest(
            f"This invitation is {now.status} by now.", param="invite_id", code="not_pending"
        )
    return now


def _expiry() -> datetime:
    return timezone.now() + timedelta(days=settings.INVITATION_DAYS)


def _send(invitation: Invitation, secret: str) -> None:
    said = {"invitation": invitation, "link": link(secret), "base_url": settings.BASE_URL}
    subject = render_to_string("accounts/mail/invitation_subject.txt", said).strip()
    text = render_to_string("accounts/mail/invitation.txt", said)
    try:
        send_mail(subject, text, None, [invitation.email])
    except (OSError, UnicodeError, smtplib.SMTPException) as error:
        logger.error("invitation not sent", invitation=invitation.pk, error=str(error))
        raise Unavailable(
            "The invitation is made, but mail cannot be sent at the moment: send it again later.",
            code="mail_not_sent",
        ) from None


def _record(action: str, actor: Caller | User | None, invitation: Invitation) -> None:
    audit.record(
        action,
        actor=actor,
        target=invitation,
        organization=invitation.organization,
        changes={"role": [None, invitation.role]} if action == "invitation.created" else None,
    )
