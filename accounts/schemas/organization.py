"""The wire's objects of organizations, projects, members and invitations."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, cast

from ninja import Field, Schema
from pydantic import StrictStr

from accounts import ids
from accounts.models import Invitation, Membership, Organization, Project, Role

InviteStatus = Literal["accepted", "expired", "pending"]
Name = Annotated[StrictStr, Field(min_length=1, max_length=1000)]


def epoch(moment: datetime | None) -> int | None:
    """Seconds since 1970, as the wire has its times."""
    return int(moment.timestamp()) if moment else None


class NameIn(Schema):
    name: Name


class Deleted(Schema):
    object: str
    id: str
    deleted: Literal[True] = True


class OrganizationOut(Schema):
    object: Literal["organization"] = "organization"
    id: str
    name: str
    slug: str
    created_at: int

    @classmethod
    def of(cls, organization: Organization) -> OrganizationOut:
        return cls(
            id=organization.pk,
            name=organization.name,
            slug=organization.slug,
            created_at=int(organization.created_at.timestamp()),
        )


class ProjectOut(Schema):
    id: str
    object: Literal["organization.project"] = "organization.project"
    name: str
    created_at: int
    archived_at: int | None
    status: Literal["active", "archived"]

    @classmethod
    def of(cls, project: Project) -> ProjectOut:
        return cls(
            id=project.pk,
            name=project.name,
            created_at=int(project.created_at.timestamp()),
            archived_at=epoch(project.archived_at),
            status="archived" if project.archived_at else "active",
        )


class ProjectList(Schema):
    object: Literal["list"] = "list"
    data: list[ProjectOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


class RoleIn(Schema):
    role: Role


class MemberOut(Schema):
    object: Literal["organization.user"] = "organization.user"
    id: str
    name: str
    email: str
    role: Role
    added_at: int

    @classmethod
    def of(cls, membership: Membership) -> MemberOut:
        return cls(
            id=ids.user_id(membership.user_id),
            name=membership.user.name,
            email=membership.user.email,
            role=Role(membership.role),
            added_at=int(membership.created_at.timestamp()),
        )


class MemberList(Schema):
    object: Literal["list"] = "list"
    data: list[MemberOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InviteIn(Schema):
    email: Annotated[StrictStr, Field(min_length=3, max_length=254)]
    role: Role


class InviteOut(Schema):
    object: Literal["organization.invite"] = "organization.invite"
    id: str
    email: str
    role: Role
    status: InviteStatus
    created_at: int
    invited_at: int
    expires_at: int
    accepted_at: int | None
    projects: list[str] = Field(description="Always empty: projects have no members here.")

    @classmethod
    def of(cls, invitation: Invitation) -> InviteOut:
        made = int(invitation.created_at.timestamp())
        return cls(
            id=invitation.pk,
            email=invitation.email,
            role=Role(invitation.role),
            status=cast("InviteStatus", invitation.status),  # revoked ones are not shown
            created_at=made,
            invited_at=made,
            expires_at=int(invitation.expires_at.timestamp()),
            accepted_at=epoch(invitation.accepted_at),
            projects=[],
        )


class InviteList(Schema):
    object: Literal["list"] = "list"
    data: list[InviteOut]
    first_id: str | None
    last_id: str | None
    has_more: bool
