"""People, the organizations they belong to, and how they come to belong to one.

What a role may do is in `accounts/roles.py`; who may reach what is decided in `access.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from django.apps import apps
from django.contrib.auth.base_user import AbstractBaseUser, BaseUserManager
from django.contrib.auth.models import PermissionsMixin
from django.db import models, transaction
from django.db.models.functions import Lower
from django.utils import timezone
from django_scopes import ScopedManager

from accounts import ids


class UserManager(BaseUserManager["User"]):
    @transaction.atomic
    def create_user(self, email: str, password: str | None = None, **fields: Any) -> User:
        user = self.model(email=self.normalize_email(email), **fields)
        user.set_password(password)
        user.save(using=self._db)
        if apps.is_installed("allauth.account"):  # not on a GPU host
            # Whoever makes people by this vouches for their address; who signs up confirms it.
            emails = apps.get_model("account", "EmailAddress").objects
            emails.create(user=user, email=email.lower(), verified=True, primary=True)
        return user

    def create_superuser(self, email: str, password: str | None = None, **fields: Any) -> User:
        return self.create_user(email, password, is_staff=True, is_superuser=True, **fields)

    def get_by_natural_key(self, username: str | None) -> User:
        return self.get(email__iexact=username)


class User(AbstractBaseUser, PermissionsMixin):
    """A person, known by email; may belong to many organizations."""

    email = models.EmailField(unique=True)
    name = models.CharField(max_length=150, blank=True)
    is_staff = models.BooleanField(default=False, help_text="Platform operator.")
    is_active = models.BooleanField(default=True)
    date_joined = models.DateTimeField(default=timezone.now)

    objects: ClassVar[UserManager] = UserManager()

    USERNAME_FIELD = "email"
    EMAIL_FIELD = "email"
    REQUIRED_FIELDS: ClassVar[list[str]] = []

    class Meta:
        constraints = [models.UniqueConstraint(Lower("email"), name="user_email_ignoring_case")]

    def __str__(self) -> str:
        return self.name or self.email


class Organization(models.Model):
    """A tenant: every row that a customer makes belongs to exactly one."""

    id = models.CharField(primary_key=True, max_length=48, default=ids.organization_id)
    name = models.CharField(max_length=150)
    slug = models.SlugField(max_length=150, unique=True)
    created_at = models.DateTimeField(auto_now_add=True)
    suspended_at = models.DateTimeField(null=True, blank=True)
    suspended_why = models.CharField(max_length=500, blank=True, help_text="Shown to its members.")
    deleted_at = models.DateTimeField(null=True, blank=True, help_text="Purged 30 days later.")

    def __str__(self) -> str:
        return self.name

    @property
    def is_active(self) -> bool:
        """Whether its work runs: neither suspended nor deleted."""
        return self.suspended_at is None and self.deleted_at is None


class Project(models.Model):
    """A key's home inside an organization."""

    id = models.CharField(primary_key=True, max_length=48, default=ids.project_id)
    organization = models.ForeignKey(Organization, models.CASCADE, related_name="projects")
    name = models.CharField(max_length=150)
    created_at = models.DateTimeField(auto_now_add=True)
    archived_at = models.DateTimeField(null=True, blank=True)

    objects: ClassVar[models.Manager[Project]] = ScopedManager(organization="organization")

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["organization", "name"], name="project_name_in_organization"
            )
        ]

    def __str__(self) -> str:
        return self.name


class Role(models.TextChoices):
    """What each may do is the table in `accounts/roles.py`."""

    OWNER = "owner"
    ADMIN = "admin"
    MEMBER = "member"
    REVIEWER = "reviewer"
    VIEWER = "viewer"


class Membership(models.Model):
    """A person's role in an organization."""

    organization = models.ForeignKey(Organization, models.CASCADE, related_name="memberships")
    user = models.ForeignKey(User, models.CASCADE, related_name="memberships")
    role = models.CharField(max_length=16, choices=Role, default=Role.MEMBER)
    created_at = models.DateTimeField(auto_now_add=True)

    objects: ClassVar[models.Manager[Membership]] = ScopedManager(organization="organization")

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["organization", "user"], name="one_membership_a_person")
        ]

    def __str__(self) -> str:
        return f"{self.user}: {self.role}"


class Invitation(models.Model):
    """A link, sent by email, that lets one person join once in a role that was chosen for them."""

    id = models.CharField(primary_key=True, max_length=48, default=ids.invitation_id)
    organization = models.ForeignKey(Organization, models.CASCADE, related_name="invitations")
    email = models.EmailField()
    role = models.CharField(max_length=16, choices=Role, default=Role.MEMBER)
    digest = models.CharField(max_length=64, unique=True, help_text="Of the link's secret.")
    invited_by = models.ForeignKey(User, models.SET_NULL, null=True, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField()
    accepted_at = models.DateTimeField(null=True)
    accepted_by = models.ForeignKey(User, models.SET_NULL, null=True, related_name="+")
    revoked_at = models.DateTimeField(null=True)

    objects: ClassVar[models.Manager[Invitation]] = ScopedManager(organization="organization")

    class Meta:
        constraints = [
            models.UniqueConstraint(
                "organization",
                Lower("email"),
                condition=models.Q(accepted_at__isnull=True, revoked_at__isnull=True),
                name="one_open_invitation_a_person",
            )
        ]

    def __str__(self) -> str:
        return self.email

    @property
    def status(self) -> str:
        """`pending`, `accepted`, `revoked` or `expired`."""
        if self.accepted_at:
            return "accepted"
        if self.revoked_at:
            return "revoked"
        return "pending" if self.expires_at > timezone.now() else "expired"
