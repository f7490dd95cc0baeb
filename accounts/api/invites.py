"""`/v1/organization/invites`: links by mail that let a person join.

The link itself is never in an answer: that it was received is what proves the address.
"""

from __future__ import annotations

from typing import Annotated

from django.http import HttpRequest
from ninja import Field, Query, Router, Schema

from accounts import access
from accounts.access import Caller
from accounts.authentication import caller_of
from accounts.models import Invitation
from accounts.paging import ends, page_of
from accounts.schemas.organization import Deleted, InviteIn, InviteList, InviteOut
from accounts.services import invitations

router = Router(tags=["Invites"])


class InvitePage(Schema):
    limit: int = Field(20, ge=1, le=100)
    after: Annotated[str | None, Field(pattern=r"^(invite_[0-9a-f]{32})?$")] = None


@router.get("/invites", response=InviteList, summary="List invites")
def list_invites(request: HttpRequest, page: Query[InvitePage]) -> InviteList:
    caller = caller_of(request, "members.read")
    with caller.scope():
        mine = Invitation.objects.filter(revoked_at=None)
        found, more = page_of(mine, page.after, page.limit, descending=True)
    return InviteList(data=[InviteOut.of(each) for each in found], has_more=more, **ends(found))


@router.post("/invites", response=InviteOut, summary="Invite a person")
def create_invite(request: HttpRequest, given: InviteIn) -> InviteOut:
    caller = caller_of(request, "members")
    invitation, _ = invitations.invite(
        actor=caller,
        organization=caller.organization,
        email=given.email,
        role=given.role.value,
    )
    return InviteOut.of(invitation)


@router.get("/invites/{invite_id}", response=InviteOut, summary="Retrieve an invite")
def retrieve_invite(request: HttpRequest, invite_id: str) -> InviteOut:
    return InviteOut.of(_invitation(caller_of(request, "members.read"), invite_id))


@router.delete("/invites/{invite_id}", response=Deleted, summary="Revoke an invite")
def delete_invite(request: HttpRequest, invite_id: str) -> Deleted:
    caller = caller_of(request, "members")
    invitations.revoke_invitation(actor=caller, invitation=_invitation(caller, invite_id))
    return Deleted(object="organization.invite.deleted", id=invite_id)


def _invitation(caller: Caller, invite_id: str) -> Invitation:
    return access.get(caller, Invitation, invite_id, param="invite_id", revoked_at=None)
