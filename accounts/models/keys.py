"""API keys: how programs come in. Their text's form is in `accounts/keys.py`."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address, ip_network
from typing import ClassVar

from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.utils import timezone
from django_scopes import ScopedManager

from accounts import ids
from accounts.models.people import Organization, Project, User


class Scope(models.TextChoices):
    """What a key may be used for; what each scope permits is in `accounts/roles.py`."""

    FILES = "files"
    FILES_READ = "files.read"
    BATCHES = "batches"
    BATCHES_READ = "batches.read"
    MODELS_READ = "models.read"
    INFERENCE = "inference"
    LABELS = "labels"
    LABELS_READ = "labels.read"
    WEBHOOKS = "webhooks"
    WEBHOOKS_READ = "webhooks.read"
    USAGE_READ = "usage.read"
    ADMIN_READ = "admin.read"
    ADMIN_WRITE = "admin.write"
    OPERATOR = "operator"


class ApiKey(models.Model):
    """A program's way in. The secret half is shown once and kept only as a peppered digest.

    A person's key may never do more than the person may, and ends with their membership; a
    service key (`created_by` empty) belongs to the project.
    """

    id = models.CharField(primary_key=True, max_length=48, default=ids.key_id)
    organization = models.ForeignKey(Organization, models.CASCADE, related_name="api_keys")
    project = models.ForeignKey(Project, models.CASCADE, related_name="api_keys")
    created_by = models.ForeignKey(User, models.RESTRICT, null=True, related_name="api_keys")
    name = models.CharField(max_length=150)
    prefix = models.CharField(max_length=32, unique=True)
    digest = models.CharField(max_length=64)
    scopes = ArrayField(models.CharField(max_length=32, choices=Scope))
    allowed_ips = ArrayField(
        models.CharField(max_length=43), default=list, help_text="Networks; none: from anywhere."
    )
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(null=True)
    revoked_at = models.DateTimeField(null=True)
    last_used_at = models.DateTimeField(null=True)
    replaced_by = models.ForeignKey("self", models.SET_NULL, null=True, related_name="replaces")

    objects: ClassVar[models.Manager[ApiKey]] = ScopedManager(organization="organization")

    class Meta:
        verbose_name = "API key"

    def __str__(self) -> str:
        return f"{self.name} ({self.prefix})"

    @property
    def is_usable(self) -> bool:
        expired = self.expires_at is not None and self.expires_at <= timezone.now()
        return self.revoked_at is None and not expired

    @property
    def state(self) -> str:
        """`active`, `replaced` (works until it expires), `expired` or `revoked`."""
        if self.revoked_at is not None:
            return "revoked"
        if not self.is_usable:
            return "expired"
        return "replaced" if self.replaced_by_id else "active"

    def allows_address(self, address: str) -> bool:
        """Whether the key may be used from this IP address."""
        if not self.allowed_ips:
            return True
        try:
            own = ip_address(address)
        except ValueError:
            return False
        if isinstance(own, IPv6Address):  # a server of both kinds sees IPv4 in this dress
            own = own.ipv4_mapped or own
        return any(own in ip_network(network) for network in self.allowed_ips)
