"""Audit of what people change about how they sign in, and what they are told once they are in;
signals of allauth and of Django are the door to it."""

from __future__ import annotations

from typing import Any

from allauth.account import signals as account
from allauth.account.models import EmailAddress
from allauth.mfa import signals as mfa
from allauth.mfa.models import Authenticator
from allauth.socialaccount import signals as social
from allauth.socialaccount.models import SocialAccount, SocialLogin
from django.contrib.auth.signals import user_logged_in
from django.db.models.signals import post_delete
from django.dispatch import receiver
from django.http import HttpRequest

from accounts.models import IdentityProvider, User
from accounts.pages import tell_undone
from accounts.services import audit


@receiver([account.password_changed, account.password_set])
def password_changed(user: User, **_: Any) -> None:
    audit.record("password.changed", actor=user, target=user)


@receiver(account.password_reset)
def password_reset(user: User, **_: Any) -> None:
    audit.record("password.reset", actor=user, target=user)


@receiver(account.email_changed)
def email_changed(
    user: User,
    to_email_address: EmailAddress,
    from_email_address: EmailAddress | None = None,
    **_: Any,
) -> None:
    before = from_email_address.email if from_email_address else None
    if before != to_email_address.email:
        changes = {"email": [before, to_email_address.email]}
        audit.record("email.changed", actor=user, target=user, changes=changes)


@receiver(mfa.authenticator_added)
def authenticator_added(user: User, authenticator: Authenticator, **_: Any) -> None:
    audit.record("mfa.added", actor=user, target=user, changes={"type": [None, authenticator.type]})


@receiver(mfa.authenticator_removed)
def authenticator_removed(user: User, authenticator: Authenticator, **_: Any) -> None:
    changes = {"type": [authenticator.type, None]}
    audit.record("mfa.removed", actor=user, target=user, changes=changes)


@receiver(mfa.authenticator_reset)
def authenticator_reset(user: User, authenticator: Authenticator, **_: Any) -> None:
    changes = {"type": [authenticator.type, authenticator.type]}
    audit.record("mfa.renewed", actor=user, target=user, changes=changes)


@receiver(social.social_account_added)
def social_account_added(sociallogin: SocialLogin, **_: Any) -> None:
    user, changes = sociallogin.user, {"provider": [None, sociallogin.account.provider]}
    audit.record("social_account.added", actor=user, target=user, changes=changes)


@receiver(social.social_account_removed)
def social_account_removed(socialaccount: SocialAccount, **_: Any) -> None:
    user, changes = socialaccount.user, {"provider": [socialaccount.provider, None]}
    audit.record("social_account.removed", actor=user, target=user, changes=changes)


@receiver(user_logged_in)
def signed_in(request: HttpRequest, **_: Any) -> None:
    tell_undone(request)


@receiver(post_delete, sender=IdentityProvider)
def provider_deleted(instance: IdentityProvider, **_: Any) -> None:
    """An organization may be purged, and nobody may be left with an account of its provider's."""
    SocialAccount.objects.filter(provider=instance.organization_id).delete()
