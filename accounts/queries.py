"""Reads about callers that are more than one line."""

from __future__ import annotations

from django_scopes import scopes_disabled

from accounts import keys, secrets
from accounts.access import Caller
from accounts.models import ApiKey, Membership, Project, User


def caller_of_key(text: str) -> Caller | None:
    """The caller that a key speaks for; None for unknown, forged, expired and revoked keys alike."""
    parsed = keys.parse(text)
    if parsed is None:
        return None
    with scopes_disabled():
        key = (
            ApiKey.objects.select_related("organization", "project", "created_by")
            .filter(prefix=parsed.prefix)
            .first()
        )
    # Compared even when there is no such key, so that both cases take the same time.
    known = secrets.matches(parsed.secret, key.digest if key else "0" * 64)
    if key is None or not known or not key.is_usable:
        return None
    return Caller(key.organization, key.project, key.created_by, None, key)


def caller_of_user(user: User, slug: str | None = None) -> Caller | None:
    """A signed-in person in one of their organizations: the named one, else the oldest."""
    with scopes_disabled():
        mine = Membership.objects.filter(user=user).select_related("organization").order_by("id")
        membership = (
            mine.filter(organization__slug=slug).first() if slug else None
        ) or mine.first()
        if membership is None:
            return None
        project = Project.objects.filter(organization=membership.organization).order_by("id")[0]
    return Caller(membership.organization, project, user, membership)
