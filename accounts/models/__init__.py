"""The rows of accounts; each file is one noun's."""

from accounts.models.audit import AuditEvent
from accounts.models.keys import ApiKey, Scope
from accounts.models.people import (
    Invitation,
    Membership,
    Organization,
    Project,
    Role,
    User,
)
from accounts.models.quotas import Quota, Reservation
from accounts.models.sso import EmailDomain, IdentityProvider
from accounts.models.tokens import RevokedToken, SigningKey, TrustedIssuer
from accounts.models.usage import HourlyUse, UsageRecord

__all__ = [
    "ApiKey",
    "AuditEvent",
    "EmailDomain",
    "HourlyUse",
    "IdentityProvider",
    "Invitation",
    "Membership",
    "Organization",
    "Project",
    "Quota",
    "Reservation",
    "RevokedToken",
    "Role",
    "Scope",
    "SigningKey",
    "TrustedIssuer",
    "UsageRecord",
    "User",
]
