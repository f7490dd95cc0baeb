"""Single sign-on of an organization: its provider, its domains, and who may come in by them.

A tenant runs its provider, so the provider may say anything. It is believed only about addresses
of domains that are verified for its own organization, and never about platform operators.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import requests
from allauth.account.models import EmailAddress
from allauth.socialaccount.models import SocialAccount
from django.core.exceptions import ValidationError
from django.core.validators import DomainNameValidator
from django.db import IntegrityError, transaction
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts import names, openid, outbound
from accounts.access import Caller
from accounts.errors import BadRequest, Forbidden, Unavailable
from accounts.models import EmailDomain, IdentityProvider, Organization, User
from accounts.models.sso import JOINING_ROLES
from accounts.secrets import encrypt
from accounts.services import audit
from accounts.services.members import add_member

MOST_DOMAINS = 100
AUDITED = ("name", "issuer", "client_id", "role")


# --- Setting up -----------------------------------------------------------------------------
def save_provider(
    *, actor: Caller, name: str, issuer: str, client_id: str, client_secret: str, role: str
) -> IdentityProvider:
    """Make or change the organization's provider; no secret leaves the one that is stored.

    Another issuer could say other things about the same people: its domains have to be verified
    anew, with new records, so that whoever controls DNS agrees to it.
    """
    actor.require("organization")
    issuer = _checked_issuer(issuer)
    if role not in dict(JOINING_ROLES):
        raise BadRequest("Nobody joins by themselves in this role.", param="role")
    said = {"name": names.clean(name, longest=40), "issuer": issuer, "client_id": client_id}
    return _save_provider(actor, said | {"role": role}, client_secret)


@transaction.atomic
def _save_provider(actor: Caller, said: Mapping[str, str], secret: str) -> IdentityProvider:
    with scopes_disabled():
        rows = IdentityProvider.objects.select_for_update()
        provider = rows.filter(pk=actor.organization.pk).first()
        new = provider is None
        provider = provider or IdentityProvider(organization=actor.organization)
        before = audit.snapshot(provider, AUDITED)
        for field, value in said.items():
            setattr(provider, field, value)
        if secret:
            provider.encrypted_secret = encrypt(secret)
        provider.save()
        if before["issuer"] not in ("", provider.issuer):
            _distrust(actor.organization)
    changes = audit.difference(provider, before)
    if secret:
        changes["client_secret"] = [None if new else audit.MASK, audit.MASK]
    action = "identity_provider.created" if new else "identity_provider.changed"
    audit.record(action, actor=actor, target=provider, changes=changes)
    return provider


@transaction.atomic
def remove_provider(*, actor: Caller) -> None:
    """End sign-in through the provider; the people it brought stay members."""
    actor.require("organization")
    with scopes_disabled():
        mine = IdentityProvider.objects.filter(pk=actor.organization.pk)
        provider = mine.select_for_update().first()
        if provider is None:
            raise BadRequest("There is no identity provider.")
        mine.delete()
        _distrust(actor.organization)
    audit.record("identity_provider.removed", actor=actor, target=provider)


def _distrust(organization: Organization) -> None:
    """Forget whom the provider knew, and what was verified for it."""
    SocialAccount.objects.filter(provider=organization.pk).delete()
    for domain in EmailDomain.objects.filter(organization=organization):
        domain.token, domain.verified_at, domain.verified_by = _token(), None, ""
        domain.save()


def _checked_issuer(issuer: str) -> str:
    """The issuer as its own discovery document spells it; raises `BadRequest` with what is wrong."""
    issuer = issuer.strip().rstrip("/")
    if not openid.is_web(issuer):
        raise BadRequest("The issuer's address begins with https://.", param="issuer")
    try:
        with outbound.Session() as session:
            said = openid.discovery(session.get(issuer + openid.DISCOVERY))
    except (requests.RequestException, ValueError) as error:
        raise BadRequest(
            f"{issuer + openid.DISCOVERY} cannot be read: is the issuer right, and on the internet?",
            param="issuer",
        ) from error
    if said["issuer"].rstrip("/") != issuer:
        raise BadRequest(f"It calls itself {said['issuer']!r}; enter that.", param="issuer")
    return issuer


# --- Domains --------------------------------------------------------------------------------
@transaction.atomic
def claim_domain(*, actor: Caller, domain: str) -> EmailDomain:
    """Say that a domain is the organization's; that alone gives no right to it."""
    actor.require("organization")
    domain = domain.strip().lower().removeprefix("@").rstrip(".")
    try:
        DomainNameValidator(accept_idna=False)(domain)
    except ValidationError:
        raise BadRequest("This is not a domain, as example.com.", param="domain") from None
    with scopes_disabled():
        if EmailDomain.objects.filter(organization=actor.organization).count() >= MOST_DOMAINS:
            raise BadRequest("There are too many domains already.", param="domain")
        row, new = EmailDomain.objects.get_or_create(
            organization=actor.organization, domain=domain, defaults={"token": _token()}
        )
    if new:
        audit.record("email_domain.claimed", actor=actor, target=row)
    return row


def check_domain(*, actor: Caller, domain: EmailDomain) -> EmailDomain:
    """Verify the domain if its TXT record is there; raises `BadRequest` saying what was found."""
    actor.require("organization")
    _provider_for(domain)
    if domain.token not in txt_records(domain.record_name):
        raise BadRequest(
            f"There is no such TXT record at {domain.record_name} yet."
            " A new one can take an hour to be seen.",
            code="record_not_found",
        )
    return _verify(domain, by="DNS", actor=actor)


def vouch_for_domain(*, actor: User | None, domain: EmailDomain) -> EmailDomain:
    """An operator says that the domain is the organization's; None is the installation's shell."""
    return _verify(domain, by=actor.email if actor else "operator", actor=actor)


@transaction.atomic
def remove_domain(*, actor: Caller, domain: EmailDomain) -> None:
    actor.require("organization")
    with scopes_disabled():
        gone, _ = EmailDomain.objects.filter(pk=domain.pk).delete()
    if gone:
        audit.record("email_domain.removed", actor=actor, target=domain)


@transaction.atomic
def _verify(domain: EmailDomain, *, by: str, actor: Caller | User | None) -> EmailDomain:
    """For the issuer that is set up now: a record that was seen for another has another token."""
    with scopes_disabled():
        _provider_for(domain)
        rows = EmailDomain.objects.select_related("organization").select_for_update(of=("self",))
        found = rows.filter(pk=domain.pk, token=domain.token).first()
    if found is None:
        raise BadRequest("This claim has changed meanwhile: look at it again.")
    if found.verified_at:
        return found
    domain = found
    domain.verified_at, domain.verified_by = timezone.now(), by
    try:
        with transaction.atomic(), scopes_disabled():
            domain.save(update_fields=["verified_at", "verified_by"])
    except IntegrityError:
        raise BadRequest(
            "This domain cannot be verified here; an operator of the portal can say why.",
            code="domain_taken",
        ) from None
    audit.record(
        "email_domain.verified",
        actor=actor,
        target=domain,
        organization=domain.organization,
        changes={"verified_by": ["", by]},
    )
    return domain


def _provider_for(domain: EmailDomain) -> IdentityProvider:
    """The provider that the domain is verified for; nobody changes it in this transaction."""
    with transaction.atomic(), scopes_disabled():
        rows = IdentityProvider.objects.select_for_update()
        provider = rows.filter(pk=domain.organization_id).first()
    if provider is None:
        raise BadRequest("Set up the identity provider first: the domain is verified for it.")
    return provider


def _token() -> str:
    return f"vllm-batch-portal={secrets.token_hex(16)}"


def txt_records(name: str) -> set[str]:
    """What DNS says under this name now; nothing when it cannot be asked."""
    try:
        import dns.exception
        import dns.resolver
    except ImportError:  # not everywhere installed
        said = "This portal cannot ask DNS: ask an operator to verify the domain."
        raise Unavailable(said, code="no_dns") from None
    try:
        answer = dns.resolver.resolve(name, "TXT", lifetime=5)
    except (dns.exception.DNSException, OSError):
        return set()
    return {b"".join(row.strings).decode(errors="replace") for row in answer}


# --- Signing in -----------------------------------------------------------------------------
def provider_of_email(email: str) -> IdentityProvider | None:
    """The provider that speaks for this address's domain."""
    with scopes_disabled():
        return IdentityProvider.objects.filter(
            organization__deleted_at=None,
            organization__suspended_at=None,
            organization__email_domains__domain=_domain(email),
            organization__email_domains__verified_at__isnull=False,
        ).first()


def require_may_assert(provider: IdentityProvider, email: str, verified: bool) -> None:
    """Raise `Forbidden` unless the provider may say that somebody has this address."""
    _require_active(provider)
    if not email or not verified:
        raise Forbidden(
            f"{provider} does not say that your email address is verified; its administrator"
            " can change that."
        )
    if not _speaks_for(provider, email):
        raise Forbidden(f"{provider} may not sign in {email}: its domain is not verified here.")


def require_may_be(provider: IdentityProvider, user: User) -> None:
    """Raise `Forbidden` unless the provider may sign in as this person, whoever it says they are."""
    if user.is_staff or user.is_superuser:
        raise Forbidden("Operators of the portal sign in with their own password or passkey.")
    if not _speaks_for(provider, user.email):
        raise Forbidden(
            f"Your account's address is outside what {provider} may speak for;"
            " sign in with your password or passkey."
        )


def person_of(provider: IdentityProvider, email: str) -> User | None:
    """The person with this address, None if there is none; both sides must have verified it."""
    address = EmailAddress.objects.filter(email=email.lower(), verified=True).first()
    if address is not None:
        require_may_be(provider, address.user)
        return address.user  # type: ignore[no-any-return]
    if User.objects.filter(email__iexact=email).exists():
        raise Forbidden(
            "There is an account with your address which nobody has confirmed yet. Reset its"
            " password to confirm it, then sign in through your organization again."
        )
    return None


def join(provider: IdentityProvider, user: User) -> None:
    """Make them a member, as the provider's setting says, if they are none yet."""
    _require_active(provider)
    add_member(actor=user, organization=provider.organization, user=user, role=provider.role)


def _require_active(provider: IdentityProvider) -> None:
    rows = Organization.objects.filter(pk=provider.pk, suspended_at=None, deleted_at=None)
    if not rows.exists():
        raise Forbidden("This organization is suspended, or no longer exists.")


def _speaks_for(provider: IdentityProvider, email: str) -> bool:
    with scopes_disabled():
        return EmailDomain.objects.filter(
            organization=provider.pk, domain=_domain(email), verified_at__isnull=False
        ).exists()


def _domain(email: str) -> str:
    return email.rpartition("@")[2].lower()
