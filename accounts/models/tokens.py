"""What access tokens (JWT) need to be kept for: keys that sign, ids that were revoked, issuers
of others' tokens that an organization trusts."""

from __future__ import annotations

from typing import ClassVar

from django.contrib.postgres.fields import ArrayField
from django.db import models
from django_scopes import ScopedManager

from accounts import ids
from accounts.models.keys import Scope
from accounts.models.people import Organization, Project


class SigningKey(models.Model):
    """An Ed25519 key pair of this installation; the newest that is not retired signs."""

    id = models.CharField(primary_key=True, max_length=48, help_text="`kid` in a token's header.")
    encrypted_private = models.TextField(help_text="PEM, encrypted at rest.")
    public_jwk = models.JSONField(help_text="As published at /.well-known/jwks.json.")
    created_at = models.DateTimeField(auto_now_add=True)
    signs_from = models.DateTimeField(
        help_text="Published from its making on, so that every cache knows it when it signs."
    )
    retires_at = models.DateTimeField(null=True, help_text="No longer accepted from then on.")

    def __str__(self) -> str:
        return self.id


class RevokedToken(models.Model):
    """A token's `jti` that is refused though its signature is good; kept until it would expire."""

    jti = models.CharField(primary_key=True, max_length=64)
    expires_at = models.DateTimeField(db_index=True)

    def __str__(self) -> str:
        return self.jti


class TrustedIssuer(models.Model):
    """Whose tokens count as this organization's (workload identity), and for what."""

    id = models.CharField(primary_key=True, max_length=48, default=ids.issuer_id)
    organization = models.ForeignKey(Organization, models.CASCADE, related_name="trusted_issuers")
    project = models.ForeignKey(Project, models.CASCADE, related_name="trusted_issuers")
    name = models.CharField(max_length=150)
    issuer = models.URLField(max_length=500, help_text="Exactly as in the token's `iss`.")
    jwks_url = models.URLField(
        max_length=500, blank=True, help_text="Empty: found by OpenID Connect discovery."
    )
    audience = models.CharField(max_length=500)
    subject_pattern = models.CharField(
        max_length=500, help_text="Of the token's `sub`; * stands for anything but a colon."
    )
    scopes = ArrayField(models.CharField(max_length=32, choices=Scope))
    created_at = models.DateTimeField(auto_now_add=True)

    objects: ClassVar[models.Manager[TrustedIssuer]] = ScopedManager(organization="organization")

    def __str__(self) -> str:
        return self.name
