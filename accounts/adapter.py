"""allauth's choices that are code: who may sign up, from where people come, what is encrypted.

Who may come in through an organization's identity provider is decided in `services/sso.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import orjson
import requests
import structlog
from allauth.account.adapter import DefaultAccountAdapter
from allauth.account.models import EmailAddress
from allauth.core import context
from allauth.core.exceptions import ImmediateHttpResponse
from allauth.mfa.adapter import DefaultMFAAdapter
from allauth.mfa.models import Authenticator
from allauth.socialaccount.adapter import DefaultSocialAccountAdapter
from allauth.socialaccount.models import SocialApp, SocialLogin
from allauth.socialaccount.providers.base import AuthProcess
from allauth.usersessions.adapter import DefaultUserSessionsAdapter
from allauth.usersessions.models import UserSession
from django.conf import settings
from django.contrib import messages
from django.contrib.auth.hashers import make_password
from django.core.exceptions import PermissionDenied, ValidationError
from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django_scopes import scopes_disabled

from accounts import openid, outbound
from accounts.addresses import checked_email
from accounts.errors import ApiError, Forbidden, Unavailable
from accounts.models import IdentityProvider, Invitation, User
from accounts.origin import address_of
from accounts.pages import error_page
from accounts.secrets import decrypt, encrypt
from accounts.services import audit, sso
from accounts.services.invitations import valid_invitation

logger = structlog.get_logger(__name__)


def invited(request: HttpRequest) -> Invitation | None:
    """The invitation whose link this browser came by, while it can still be accepted."""
    if kept := request.session.get("invitation"):
        try:
            return valid_invitation(kept=str(kept))
        except ApiError:
            return None
    return None


class AccountAdapter(DefaultAccountAdapter):
    def is_open_for_signup(self, request: HttpRequest) -> bool:
        if settings.REGISTRATION == "invite":
            return invited(request) is not None
        return bool(settings.REGISTRATION == "open")

    def is_email_verified(self, request: HttpRequest, email: str) -> bool:
        """The invitation's link was mailed to this address, and nobody else was told it."""
        invitation = invited(request)
        return invitation is not None and invitation.email.lower() == email.lower()

    def clean_email(self, email: str) -> str:
        try:
            return checked_email(email)
        except ApiError as error:
            raise ValidationError(error.message) from error

    def get_signup_redirect_url(self, request: HttpRequest) -> str:
        if invited(request):
            return "/invitations/accept"
        return str(super().get_signup_redirect_url(request))

    def get_client_ip(self, request: HttpRequest) -> str:
        try:
            return str(ip_address(address_of(request)))
        except ValueError:
            return "::"  # a unix socket has no address: its people share the limits

    def send_account_already_exists_mail(self, email: str) -> None:
        make_password(email)  # as much work as for an address that is new here
        super().send_account_already_exists_mail(email)

    def is_safe_url(self, url: str) -> bool:
        try:
            return bool(super().is_safe_url(url))
        except ValueError:  # it is no address at all
            return False

    def send_mail(self, template_prefix: str, email: str, context: dict[str, Any]) -> None:
        """Mail that cannot be sent is told, and breaks nothing: what it tells of has happened.

        It names our own address, whatever the request called us.
        """
        host = urlsplit(settings.BASE_URL).netloc
        links = {name: _ours(context[name]) for name in context if name.endswith("_url")}
        own = {"current_site": SimpleNamespace(name=host, domain=host), **links}
        try:
            super().send_mail(template_prefix, email, context | own)
        except (OSError, UnicodeError) as error:  # SMTP's own are OSErrors, too
            logger.error("mail not sent", template=template_prefix, error=str(error))
            said = "Mail cannot be sent just now. If you wait for some, try again later."
            messages.error(self.request, said)


def _ours(url: str) -> str:
    own = urlsplit(settings.BASE_URL)
    return urlsplit(url)._replace(scheme=own.scheme, netloc=own.netloc).geturl()


class MFAAdapter(DefaultMFAAdapter):
    def encrypt(self, text: str) -> str:
        return encrypt(text)

    def decrypt(self, encrypted_text: str) -> str:
        return decrypt(encrypted_text)

    def generate_authenticator_name(self, user: User, type: Authenticator.Type) -> str:
        number = Authenticator.objects.filter(user=user, type=type).count() + 1
        return f"Passkey {number}" if number > 1 else "Passkey"


class UserSessionsAdapter(DefaultUserSessionsAdapter):
    def end_sessions(self, sessions: Iterable[UserSession]) -> None:
        ended = list(sessions)
        with transaction.atomic():
            super().end_sessions(ended)
            for session in ended:
                audit.record("session.ended", actor=session.user, label=str(session.ip))


class SocialAccountAdapter(DefaultSocialAccountAdapter):
    def list_apps(
        self, request: HttpRequest, provider: str | None = None, client_id: str | None = None
    ) -> list[SocialApp]:
        """The site's provider; an organization's own only to who names it."""
        if "\0" in (provider or ""):  # PostgreSQL cannot store a NUL
            return []
        apps: list[SocialApp] = super().list_apps(request, provider=provider, client_id=client_id)
        if provider and (own := _provider(provider)):
            apps.append(_app(own))
        return apps

    def get_requests_session(self) -> requests.Session:
        return _Session()

    def populate_user(
        self, request: HttpRequest, sociallogin: SocialLogin, data: dict[str, Any]
    ) -> User:
        """Keep little of what the provider says, and none of it if it is about two people."""
        said = sociallogin.account.extra_data
        both = [said[part] for part in ("userinfo", "id_token") if part in said]
        if len({part.get("sub") for part in both}) != 1:
            raise PermissionDenied("userinfo and id_token are about different people")
        kept = both[0]
        sociallogin.account.extra_data = {"userinfo": kept}
        user: User = super().populate_user(request, sociallogin, data)
        user.name = kept.get("name", "")
        return user

    def pre_social_login(self, request: HttpRequest, sociallogin: SocialLogin) -> None:
        provider = _provider(sociallogin.account.provider)
        try:
            if provider is not None:
                _come_in(request, provider, sociallogin)
        except ApiError as error:
            raise ImmediateHttpResponse(error_page(request, error)) from error

    def is_open_for_signup(self, request: HttpRequest, sociallogin: SocialLogin) -> bool:
        """Who belongs to a verified domain is invited by that; others need an invitation.

        An account that was made with somebody else's address would wait for them to come.
        """
        if _provider(sociallogin.account.provider):
            return bool(settings.REGISTRATION != "closed")
        verified = any(address.verified for address in sociallogin.email_addresses)
        if not (verified or invited(request)):
            said = "Your provider does not say that your email address is verified."
            raise ImmediateHttpResponse(error_page(request, Forbidden(said)))
        return bool(super().is_open_for_signup(request, sociallogin))

    @transaction.atomic
    def save_user(self, request: HttpRequest, sociallogin: SocialLogin, form: Any = None) -> User:
        user: User = super().save_user(request, sociallogin, form)
        if provider := _provider(sociallogin.account.provider):
            try:
                sso.join(provider, user)
            except ApiError as error:
                raise ImmediateHttpResponse(error_page(request, error)) from error
        return user

    def is_auto_signup_allowed(self, request: HttpRequest, sociallogin: SocialLogin) -> bool:
        """The form asks for what the provider did not say; an invitation's address is its own."""
        if _provider(sociallogin.account.provider):
            return True
        invitation = invited(request)
        said = [address.email for address in sociallogin.email_addresses]
        return invitation is None or said == [invitation.email.lower()]


def _come_in(request: HttpRequest, provider: IdentityProvider, login: SocialLogin) -> None:
    """Find out as whom, and let them join; raises `Forbidden` for who may not be them."""
    if login.state.get("process") != AuthProcess.LOGIN:
        raise Forbidden("An organization's identity provider is for signing in only.")
    address = login.email_addresses[0] if login.email_addresses else EmailAddress()
    sso.require_may_assert(provider, address.email, address.verified)
    login.email_addresses = [EmailAddress(email=address.email, verified=True, primary=True)]
    if login.is_existing:
        user = login.user
        sso.require_may_be(provider, user)
    else:
        user = sso.person_of(provider, address.email)
    if user is None:
        return
    with transaction.atomic():
        if not login.is_existing:
            login.connect(request, user)
        sso.join(provider, user)


def _provider(id: str) -> IdentityProvider | None:
    if not id.startswith("org_"):
        return None
    with scopes_disabled():
        rows = IdentityProvider.objects.select_related("organization")
        return rows.filter(pk=id).first()


def _app(provider: IdentityProvider) -> SocialApp:
    return SocialApp(
        provider="openid_connect",
        provider_id=provider.pk,
        name=provider.name,
        client_id=provider.client_id,
        secret=decrypt(provider.encrypted_secret),
        settings={"server_url": provider.issuer},
    )


class _Session(outbound.Session):
    """What providers are asked with: whatever they do wrong is a page that says so."""

    def request(self, method: str, url: str, **kwargs: Any) -> requests.Response:  # type: ignore[override]
        try:
            response = super().request(method, url, **kwargs)
            response._content = orjson.dumps(_read(method, url, response))
            response.headers["Content-Type"] = "application/json"
        except (requests.RequestException, ValueError) as error:
            logger.warning("identity provider", url=url, error=str(error))
            raise ImmediateHttpResponse(_unreachable()) from error
        return response


def _read(method: str, url: str, response: requests.Response) -> dict[str, Any]:
    if url.endswith(openid.DISCOVERY):
        return openid.discovery(response)
    return openid.tokens(response) if method == "POST" else openid.person(response)


def _unreachable() -> HttpResponse:
    said = "The identity provider cannot be reached, or says what cannot be understood."
    return error_page(context.request, Unavailable(f"{said} Try again later."))
