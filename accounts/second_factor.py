"""Whether an operator still has to set up two-factor authentication.

Asked by all doors that open the platform's own operations: pages, keys and tokens.
"""

from __future__ import annotations

from django.apps import apps
from django.conf import settings

from accounts.errors import Forbidden
from accounts.models import User


def is_lacking(operator: User) -> bool:
    """Whether a second factor is required of operators, and this person has none."""
    return settings.OPERATOR_MFA_REQUIRED and not _has_one(operator)


def require(operator: User) -> None:
    """Raise `Forbidden`, saying what to do, where `is_lacking`."""
    if is_lacking(operator):
        said = "Operators need two-factor authentication: set it up first."
        raise Forbidden(said, code="second_factor_missing")


def _has_one(person: User) -> bool:
    if not apps.is_installed("allauth.mfa"):  # not on a GPU host, where nobody can look
        return False
    from allauth.mfa.models import Authenticator
    from allauth.mfa.utils import is_mfa_enabled

    types = [Authenticator.Type.TOTP, Authenticator.Type.WEBAUTHN]
    return bool(is_mfa_enabled(person, types))
