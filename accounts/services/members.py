"""Writes of memberships: joining, changing a role, removing, leaving.

An organization never loses its last owner, and nobody gives a role above their own.
"""

from __future__ import annotations

from typing import Any

from django.db import transaction
from django.db.models import Q
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts import roles
from accounts.access import Caller
from accounts.addresses import checked_email
from accounts.errors import BadRequest, Forbidden
from accounts.models import ApiKey, Invitation, Membership, Organization, Role, User
from accounts.services import audit
from accounts.services.organizations import locked


def require_may_give(actor: Caller | None, role: str, *, param: str = "role") -> None:
    """Raise unless the caller may hand out this role; the installation's shell may any."""
    if role not in Role.values:
        known = ", ".join(Role.values)
        raise BadRequest(f"role must be one of: {known}", param=param, code="invalid_value")
    if actor is None:
        return
    if role == Role.OWNER:
        actor.require("owners")
    if role not in roles_to_give(actor):
        raise Forbidden("You cannot give a role above your own.", code="insufficient_role")


def roles_to_give(actor: Caller) -> list[Role]:
    """What the caller may make somebody; a service key, which has no role, anything but owner."""
    below = [role for role in Role if not actor.role or not roles.is_above(role, actor.role)]
    return [role for role in below if role != Role.OWNER or actor.may("owners")]


@transaction.atomic
def add_member(
    *, actor: Caller | User | None, organization: Organization, user: User, role: str
) -> Membership:
    """Let a person in; who already is a member keeps the role they have.

    The right to do so is the caller's business: an invitation, a verified domain, the shell.
    """
    with scopes_disabled():
        membership, new = Membership.objects.get_or_create(
            organization=organization, user=user, defaults={"role": role}
        )
    if new:
        _record("member.added", actor, membership, {"role": [None, role]})
    return membership


@transaction.atomic
def enrol(*, organization: Organization, email: str, role: str) -> Membership:
    """Let a person in from the installation's shell; one who is not known is made.

    Raises `BadRequest` for who already is a member.
    """
    user = User.objects.filter(email__iexact=email).first()
    user = user or User.objects.create_user(checked_email(email))
    with scopes_disabled():
        if Membership.objects.filter(organization=organization, user=user).exists():
            raise BadRequest(f"{user.email} already is a member.", param="email")
    return add_member(actor=None, organization=organization, user=user, role=role)


@transaction.atomic
def change_role(*, actor: Caller | None, membership: Membership, role: str) -> Membership:
    """Raises `BadRequest` for the last owner's demotion, `Forbidden` for what is above the caller."""
    membership = _locked(membership)
    before = membership.role
    if role == before:
        return membership
    require_may_give(actor, role)
    if before == Role.OWNER:
        _require_may_lose(actor, membership)
    membership.role = role
    with scopes_disabled():
        membership.save(update_fields=["role"])
        revoked = _revoked_invitations(membership, role)
    _record("member.role_changed", actor, membership, {"role": [before, role]})
    _record_revoked(actor, revoked)
    return membership


@transaction.atomic
def remove_member(*, actor: Caller | None, membership: Membership) -> None:
    """End a membership, and with it the person's keys and open invitations in the organization.

    They have ended for good: who is let in again makes new ones.
    """
    membership = _locked(membership)
    if membership.role == Role.OWNER:
        _require_may_lose(actor, membership)
    _end("member.removed", actor, membership)


@transaction.atomic
def leave_organization(*, actor: Caller) -> None:
    """End one's own membership; the last owner has to stay or delete the organization."""
    with actor.scope():
        mine = Membership.objects.filter(user=actor.user).first() if actor.user else None
    if mine is None:
        raise BadRequest("You are not a member of this organization.", code="not_a_member")
    mine = _locked(mine)
    if mine.role == Role.OWNER:
        _require_another_owner(mine)
    _end("member.left", actor, mine)


def _locked(membership: Membership) -> Membership:
    """The membership as it is now; until the end of the transaction nobody else changes any.

    The lock is the organization's: with one for each row two owners could demote each other.
    """
    locked(membership.organization)
    with scopes_disabled():
        rows = Membership.objects.select_related("user", "organization")
        now = rows.filter(pk=membership.pk).first()
    if now is None:
        raise BadRequest("This person is no longer a member.", code="not_a_member")
    return now


def _require_may_lose(actor: Caller | None, membership: Membership) -> None:
    if actor is not None:
        actor.require("owners")
    _require_another_owner(membership)


def _require_another_owner(membership: Membership) -> None:
    """People who cannot sign in any more do not count: they could not act as owners."""
    with scopes_disabled():
        others = Membership.objects.filter(
            organization=membership.organization_id, role=Role.OWNER, user__is_active=True
        ).exclude(pk=membership.pk)
        if others.exists():
            return
    raise BadRequest(
        "An organization needs an owner: make somebody else one first.", code="last_owner"
    )


def _end(action: str, actor: Caller | None, membership: Membership) -> None:
    changes: dict[str, list[Any]] = {"role": [membership.role, None]}
    with scopes_disabled():
        if keys := _revoke_keys(membership):
            changes["api_keys"] = [keys, 0]
        revoked = _revoked_invitations(membership, None)
        membership.delete()
    _record(action, actor, membership, changes)
    _record_revoked(actor, revoked)


def _revoke_keys(membership: Membership) -> int:
    """End the person's own keys here that still work; returns how many there were."""
    now = timezone.now()
    alive = Q(expires_at=None) | Q(expires_at__gt=now)
    return ApiKey.objects.filter(
        alive,
        organization=membership.organization,
        created_by=membership.user,
        revoked_at=None,
    ).update(revoked_at=now)


def _revoked_invitations(membership: Membership, role: str | None) -> list[Invitation]:
    """Revoke what the person has offered and, in this role or none, could not offer now."""
    rows = Invitation.objects.select_for_update(of=("self",)).filter(
        organization=membership.organization,
        invited_by=membership.user,
        accepted_at=None,
        revoked_at=None,
    )
    revoked = [row for row in rows.order_by("pk") if role is None or not _gives(role, row.role)]
    for row in revoked:
        row.revoked_at = timezone.now()
        row.save(update_fields=["revoked_at"])
    return revoked


def _gives(role: str, other: str) -> bool:
    """Whether who has the one role may hand out the other."""
    needed = "owners" if other == Role.OWNER else "members"
    return needed in roles.ROLES[role] and not roles.is_above(other, role)


def _record_revoked(actor: Caller | None, invitations: list[Invitation]) -> None:
    for each in invitations:
        audit.record("invitation.revoked", actor=actor, target=each, organization=each.organization)


def _record(
    action: str,
    actor: Caller | User | None,
    membership: Membership,
    changes: dict[str, list[Any]],
) -> None:
    audit.record(
        action,
        actor=actor,
        target=membership.user,
        organization=membership.organization,
        label=membership.user.email,
        changes=changes,
    )
