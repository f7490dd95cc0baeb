"""Who did what: append-only rows, each of which carries the hash of the one before."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django_scopes import ScopedManager

from accounts import ids
from accounts.models.people import Organization, User


class Via(models.TextChoices):
    """By what the actor was known."""

    SESSION = "session"
    API_KEY = "api_key"
    TOKEN = "token"
    OPERATOR = "operator"
    SYSTEM = "system"


class AuditEvent(models.Model):
    """One change, or one look of an operator at a tenant.

    A trigger in the database refuses UPDATE and DELETE. Events outlive their organization, so
    nothing here is a foreign key that the database enforces. `number` counts from 1 within the
    organization (or the platform, where `organization` is empty); see `services.audit` for the
    hash.
    """

    id = models.CharField(primary_key=True, max_length=48, default=ids.audit_event_id)
    organization = models.ForeignKey(
        Organization, models.DO_NOTHING, null=True, db_constraint=False, related_name="+"
    )
    number = models.BigIntegerField()
    created_at = models.DateTimeField()
    action = models.CharField(max_length=64, help_text="As `member.role_changed`.")
    via = models.CharField(max_length=16, choices=Via)
    actor = models.ForeignKey(
        User, models.DO_NOTHING, null=True, db_constraint=False, related_name="+"
    )
    actor_label = models.CharField(max_length=320, help_text="Email, or the key's name.")
    credential = models.CharField(max_length=64, blank=True, help_text="Id of the key or token.")
    address = models.GenericIPAddressField(null=True)
    request_id = models.CharField(max_length=64, blank=True)
    target_kind = models.CharField(max_length=32, blank=True)
    target_id = models.CharField(max_length=200, blank=True)
    target_label = models.CharField(max_length=320, blank=True)
    changes = models.JSONField(default=dict, help_text="Field: [before, after]; secrets masked.")
    previous_hash = models.CharField(max_length=64, blank=True)
    hash = models.CharField(max_length=64)

    objects: ClassVar[models.Manager[AuditEvent]] = ScopedManager(organization="organization")

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["organization", "number"], nulls_distinct=False, name="audit_event_number"
            )
        ]
        indexes = [models.Index(fields=["organization", "-id"], name="audit_by_organization")]

    def __str__(self) -> str:
        return f"{self.number} {self.action}"
