"""`/v1/organization/users`: who is in the organization, and as what."""

from __future__ import annotations

from typing import Annotated

from django.http import HttpRequest
from ninja import Field, Query, Router, Schema

from accounts import access, ids
from accounts.authentication import caller_of
from accounts.models import Membership
from accounts.schemas.organization import Deleted, MemberList, MemberOut, RoleIn
from accounts.services import members

router = Router(tags=["Users"])


class MemberPage(Schema):
    limit: int = Field(20, ge=1, le=100)
    after: Annotated[str | None, Field(pattern=r"^(user_[1-9][0-9]{0,17})?$")] = None


@router.get("/users", response=MemberList, summary="List members")
def list_users(request: HttpRequest, page: Query[MemberPage]) -> MemberList:
    caller = caller_of(request, "members.read")
    after = ids.parse_user_id(page.after or "") or 0
    with caller.scope():
        mine = Membership.objects.filter(user_id__gt=after).select_related("user")
        found = list(mine.order_by("user_id")[: page.limit + 1])
    data = [MemberOut.of(each) for each in found[: page.limit]]
    return MemberList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(found) > page.limit,
    )


@router.get("/users/{user_id}", response=MemberOut, summary="Retrieve a member")
def retrieve_user(request: HttpRequest, user_id: str) -> MemberOut:
    return MemberOut.of(access.get_member(caller_of(request, "members.read"), user_id))


@router.post("/users/{user_id}", response=MemberOut, summary="Change a member's role")
def change_role(request: HttpRequest, user_id: str, given: RoleIn) -> MemberOut:
    caller = caller_of(request, "members")
    membership = access.get_member(caller, user_id)
    return MemberOut.of(
        members.change_role(actor=caller, membership=membership, role=given.role.value)
    )


@router.delete("/users/{user_id}", response=Deleted, summary="Remove a member")
def remove_user(request: HttpRequest, user_id: str) -> Deleted:
    caller = caller_of(request, "members")
    members.remove_member(actor=caller, membership=access.get_member(caller, user_id))
    return Deleted(object="organization.user.deleted", id=user_id)
