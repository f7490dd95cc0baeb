"""Writes of organizations: making, renaming, suspending, deleting, restoring.

Purging what was deleted is `batches/services/purge.py`'s: files have to go first.
"""

from __future__ import annotations

import secrets
from datetime import timedelta

from django.apps import apps
from django.conf import settings
from django.db import IntegrityError, transaction
from django.utils import timezone
from django.utils.text import slugify
from django_scopes import scope

from accounts import names
from accounts.access import Caller
from accounts.errors import BadRequest, Forbidden
from accounts.models import Membership, Organization, Project, Role, User
from accounts.services import audit

RESTORABLE = timedelta(days=30)
"""How long after its deletion an organization can be had back; then it is purged."""


@transaction.atomic
def create_organization(
    *, name: str, owner_email: str, password: str | None = None
) -> tuple[Organization, User]:
    """Make an organization with its default project; its owner is made too if not yet known.

    An existing person's password is left as it is. Raises `BadRequest` for a name that is taken
    or has no letters or digits.
    """
    name = names.clean(name)
    slug = _slug(name)
    if not slug:
        raise BadRequest("The name needs at least one letter or digit.", param="name")
    if Organization.objects.filter(slug=slug).exists():
        raise BadRequest(f"There is already an organization {slug!r}.", param="name")
    owner = User.objects.filter(email__iexact=owner_email).first()
    owner = owner or User.objects.create_user(owner_email, password)
    return _create(name=name, slug=slug, owner=owner), owner


def may_create(user: User) -> bool:
    """Whether this person may make organizations: everybody where registration is open."""
    return bool(user.is_staff or settings.REGISTRATION == "open")


@transaction.atomic
def create_own_organization(*, actor: User, name: str) -> Organization:
    """Make an organization that the person owns; one of a name that is taken gets another slug."""
    if not may_create(actor):
        raise Forbidden("Only operators of this portal make organizations.")
    name = names.clean(name)
    slug = _slug(name) or "organization"
    if Organization.objects.filter(slug=slug).exists():
        slug = f"{slug}-{secrets.token_hex(3)}"
    return _create(name=name, slug=slug, owner=actor)


def _slug(name: str) -> str:
    """At most 140 characters: one of a name can become many, and more may be added."""
    return slugify(name)[:140].strip("-_")


def _create(*, name: str, slug: str, owner: User) -> Organization:
    try:
        with transaction.atomic():
            organization = Organization.objects.create(name=name, slug=slug)
    except IntegrityError:  # somebody else took it at this moment
        raise BadRequest(f"There is already an organization {slug!r}.", param="name") from None
    with scope(organization=organization):
        Project.objects.create(organization=organization, name="Default")
        Membership.objects.create(organization=organization, user=owner, role=Role.OWNER)
    audit.record(
        "organization.created",
        actor=owner,
        target=organization,
        organization=organization,
        changes={"owner": [None, owner.email]},
    )
    return organization


def locked(organization: Organization) -> Organization:
    """The row as it is now; whoever else asks for it waits for the end of this transaction."""
    return Organization.objects.select_for_update(no_key=True).get(pk=organization.pk)


@transaction.atomic
def rename_organization(*, actor: Caller, name: str) -> Organization:
    """Give it another name; the slug, which scripts know it by, stays."""
    organization = locked(actor.organization)
    before = audit.snapshot(organization, ["name"])
    organization.name = names.clean(name)
    organization.save(update_fields=["name"])
    if changes := audit.difference(organization, before):
        audit.record("organization.renamed", actor=actor, target=organization, changes=changes)
    return organization


@transaction.atomic
def delete_organization(*, actor: Caller) -> Organization:
    """Hide it from its members and stop its keys at once; an operator can restore it for a while."""
    organization = locked(actor.organization)
    organization.deleted_at = timezone.now()
    organization.save(update_fields=["deleted_at"])
    audit.record("organization.deleted", actor=actor, target=organization)
    return organization


@transaction.atomic
def suspend_organization(*, actor: User | None, organization: Organization, why: str) -> None:
    """Stop its keys and its work; members see why. Suspending again changes the reason."""
    organization = locked(organization)
    before = audit.snapshot(organization, ["suspended_at", "suspended_why"])
    organization.suspended_at = organization.suspended_at or timezone.now()
    organization.suspended_why = names.clean(why, param="reason", longest=500)
    _save_as_operator("operator.suspended", actor, organization, before)


@transaction.atomic
def resume_organization(*, actor: User | None, organization: Organization) -> None:
    organization = locked(organization)
    before = audit.snapshot(organization, ["suspended_at", "suspended_why"])
    organization.suspended_at, organization.suspended_why = None, ""
    _save_as_operator("operator.resumed", actor, organization, before)


@transaction.atomic
def restore_organization(*, actor: User | None, organization: Organization) -> None:
    """Undo a deletion; raises `BadRequest` once its files may be gone."""
    organization = locked(organization)
    if organization.deleted_at and organization.deleted_at < timezone.now() - RESTORABLE:
        raise BadRequest("It was deleted too long ago: its files are being removed.")
    before = audit.snapshot(organization, ["deleted_at"])
    organization.deleted_at = None
    _save_as_operator("operator.restored", actor, organization, before)


def forget_sign_ins(organization: Organization) -> None:
    """Forget whom its identity provider knew; allauth knows that by the organization's id only."""
    if apps.is_installed("allauth.socialaccount"):  # not on a GPU host
        known = apps.get_model("socialaccount", "SocialAccount").objects
        known.filter(provider=organization.pk).delete()


def _save_as_operator(
    action: str, actor: User | None, organization: Organization, before: dict[str, object]
) -> None:
    changes = audit.difference(organization, before)
    if not changes:
        return
    organization.save(update_fields=list(before))
    audit.record(
        action, actor=actor, organization=organization, target=organization, changes=changes
    )
