"""How an organization's people sign in: its identity provider, and the email domains it owns.

Who may come in through it is decided in `services/sso.py`.
"""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django_scopes import ScopedManager

from accounts import ids
from accounts.models.people import Organization, Role

JOINING_ROLES = [(role.value, role.label) for role in (Role.MEMBER, Role.REVIEWER, Role.VIEWER)]
"""What somebody may become without anybody's decision: nothing that rules over others."""


class IdentityProvider(models.Model):
    """An OpenID Connect provider that speaks for the organization's verified domains, no others.

    To allauth it is known by the organization's id, so its people's subjects are its own.
    """

    organization = models.OneToOneField(
        Organization, models.CASCADE, primary_key=True, related_name="identity_provider"
    )
    name = models.CharField(max_length=40, help_text="As people call it.")
    issuer = models.URLField(max_length=500)
    client_id = models.CharField(max_length=191)
    encrypted_secret = models.TextField()
    role = models.CharField(max_length=16, choices=JOINING_ROLES, default=Role.MEMBER)
    created_at = models.DateTimeField(auto_now_add=True)

    objects: ClassVar[models.Manager[IdentityProvider]] = ScopedManager(organization="organization")

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=models.Q(role__in=[role for role, _ in JOINING_ROLES]),
                name="identity_provider_joining_role",
            )
        ]

    def __str__(self) -> str:
        return self.name


class EmailDomain(models.Model):
    """An email domain that an organization claims; it counts once it is verified."""

    id = models.CharField(primary_key=True, max_length=48, default=ids.domain_id)
    organization = models.ForeignKey(Organization, models.CASCADE, related_name="email_domains")
    domain = models.CharField(max_length=253, help_text="Lower case, as in DNS.")
    token = models.CharField(max_length=64, help_text="What the TXT record has to say.")
    created_at = models.DateTimeField(auto_now_add=True)
    verified_at = models.DateTimeField(null=True)
    verified_by = models.CharField(max_length=320, blank=True, help_text="DNS, or an operator.")

    objects: ClassVar[models.Manager[EmailDomain]] = ScopedManager(organization="organization")

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["organization", "domain"], name="one_claim_of_a_domain_in_organization"
            ),
            models.UniqueConstraint(
                fields=["domain"],
                condition=models.Q(verified_at__isnull=False),
                name="one_organization_a_verified_domain",
            ),
        ]

    def __str__(self) -> str:
        return self.domain

    @property
    def record_name(self) -> str:
        """Where in DNS the TXT record belongs."""
        return f"_vllm-batch-portal.{self.domain}"
