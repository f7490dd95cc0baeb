"""Writes about callers: organizations, their owners, their keys."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from django.db import transaction
from django.db.models import Q
from django.utils import timezone
from django.utils.text import slugify
from django_scopes import scope, scopes_disabled

from accounts import keys, secrets
from accounts.errors import BadRequest
from accounts.models import ApiKey, Membership, Organization, Project, Role, Scope, User

FULL_SCOPES = [Scope.FILES, Scope.BATCHES, Scope.MODELS_READ, Scope.INFERENCE]
LAST_USED_EVERY = timedelta(minutes=1)


@transaction.atomic
def create_organization(
    *, name: str, owner_email: str, password: str | None = None
) -> tuple[Organization, User]:
    """Make an organization with its default project; its owner is made too if not yet known.

    An existing person's password is left as it is. Raises `BadRequest` for a name that is taken
    or has no letters or digits.
    """
    slug = slugify(name)
    if not slug:
        raise BadRequest("The name needs at least one letter or digit.", param="name")
    if Organization.objects.filter(slug=slug).exists():
        raise BadRequest(f"There is already an organization {slug!r}.", param="name")
    owner = User.objects.filter(email__iexact=owner_email).first()
    owner = owner or User.objects.create_user(owner_email, password)
    organization = Organization.objects.create(name=name, slug=slug)
    with scope(organization=organization):
        Project.objects.create(organization=organization, name="Default")
        Membership.objects.create(organization=organization, user=owner, role=Role.OWNER)
    return organization, owner


def create_api_key(
    *, project: Project, name: str, created_by: User | None = None, scopes: Sequence[str] = ()
) -> tuple[ApiKey, str]:
    """Make a key; the text it returns is shown once and cannot be had again."""
    unknown = set(scopes) - set(Scope.values)
    if unknown:
        known = ", ".join(Scope.values)
        raise BadRequest(f"Unknown scope {sorted(unknown)[0]!r}; there are: {known}", param="scope")
    text = keys.make()
    with scope(organization=project.organization_id):
        key = ApiKey.objects.create(
            organization_id=project.organization_id,
            project=project,
            created_by=created_by,
            name=name,
            prefix=text.prefix,
            digest=secrets.digest(text.secret),
            scopes=list(scopes) or FULL_SCOPES,
        )
    return key, str(text)


def note_use(key: ApiKey) -> None:
    """Remember when the key was last used, to the minute: not a write for every request."""
    now = timezone.now()
    if key.last_used_at and now - key.last_used_at < LAST_USED_EVERY:
        return
    stale = Q(last_used_at__isnull=True) | Q(last_used_at__lt=now - LAST_USED_EVERY)
    with scopes_disabled():
        ApiKey.objects.filter(stale, pk=key.pk).update(last_used_at=now)
