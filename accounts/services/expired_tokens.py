"""Forgetting what is kept about access tokens that have expired, and keys that have retired.

Apart from `tokens.py`, because hosts without the portal's libraries load this one too.
"""

from __future__ import annotations

from datetime import timedelta

from django.utils import timezone

from accounts.models import RevokedToken, SigningKey

GRACE = timedelta(minutes=1)
"""More than the clocks of our hosts may differ by, so that no revoked token comes back to life."""


def forget_expired_tokens() -> None:
    past = timezone.now() - GRACE
    RevokedToken.objects.filter(expires_at__lt=past).delete()
    SigningKey.objects.filter(retires_at__lt=past).delete()
