"""The page of members and open invitations, and what is done there.

How an invited person comes in is in `invitations.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlencode

from django.contrib import messages
from django.db.models import Q
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_POST

from accounts import access, ids
from accounts.access import Caller
from accounts.errors import BadRequest, QuotaExceeded, Unavailable
from accounts.forms.organizations import InviteForm
from accounts.models import Invitation, Membership, Role
from accounts.pages import PageRequest, page, sent
from accounts.paging import page_of, searched
from accounts.queries import with_keys
from accounts.services import invitations, members

PAGE_SIZE = 25
INVITATIONS_SHOWN = 200


@dataclass(frozen=True)
class Row:
    """A member as a line of the list."""

    membership: Membership
    keys: int
    is_self: bool
    may_change: bool
    roles: list[Role]

    @property
    def user_id(self) -> str:
        return ids.user_id(self.membership.user_id)

    @property
    def removing(self) -> str:
        """What removing this person means, before it is done."""
        keys = {0: "", 1: " Their API key here stops working at once."}.get(
            self.keys, f" Their {self.keys} API keys here stop working at once."
        )
        return f"{self.membership.user.email} no longer gets in.{keys} What they made stays."


@require_http_methods(["GET", "HEAD", "POST"])
@page
def organization_members(request: PageRequest, caller: Caller) -> HttpResponseBase:
    caller.require("members.read")
    form = InviteForm(sent(request), roles=members.roles_to_give(caller))
    if request.method == "POST":
        caller.require("members")
        if form.is_valid() and _invited(request, caller, form):
            return redirect("organization_members")
    ctx = _members(caller, request.GET.get("after", ""), searched(request)) | {"form": form}
    status = 400 if form.errors else 200
    return render(request, "accounts/members.html", ctx, status=status)


@require_POST
@page
def member_role(request: PageRequest, caller: Caller, user_id: str) -> HttpResponseBase:
    caller.require("members")
    membership = access.get_member(caller, user_id)
    try:
        changed = members.change_role(
            actor=caller, membership=membership, role=request.POST.get("role", "")
        )
    except BadRequest as error:
        messages.error(request, error.message)
    else:
        messages.success(request, f"{membership.user} is {Role(changed.role).label} now.")
    return redirect("organization_members")


@require_POST
@page
def member_remove(request: PageRequest, caller: Caller, user_id: str) -> HttpResponseBase:
    caller.require("members")
    membership = access.get_member(caller, user_id)
    try:
        members.remove_member(actor=caller, membership=membership)
    except BadRequest as error:
        messages.error(request, error.message)
    else:
        messages.success(request, f"{membership.user} is no longer a member.")
    return redirect("organization_members")


@require_POST
@page
def invitation_resend(request: PageRequest, caller: Caller, invite_id: str) -> HttpResponseBase:
    caller.require("members")
    invitation = access.get(caller, Invitation, invite_id, param="invite_id")
    try:
        invitations.resend_invitation(actor=caller, invitation=invitation)
    except (BadRequest, QuotaExceeded, Unavailable) as error:
        messages.error(request, error.message)
    else:
        messages.success(request, f"{invitation.email} gets a new link; the old one has ended.")
    return redirect("organization_members")


@require_POST
@page
def invitation_revoke(request: PageRequest, caller: Caller, invite_id: str) -> HttpResponseBase:
    caller.require("members")
    invitation = access.get(caller, Invitation, invite_id, param="invite_id")
    try:
        invitations.revoke_invitation(actor=caller, invitation=invitation)
    except BadRequest as error:
        messages.error(request, error.message)
    else:
        messages.success(request, f"The invitation of {invitation.email} has ended.")
    return redirect("organization_members")


def _invited(request: PageRequest, caller: Caller, form: InviteForm) -> bool:
    """Whether it is made; that its mail could not be sent is said, but it is made all the same."""
    email, role = form.cleaned_data["email"], form.cleaned_data["role"]
    try:
        invitations.invite(actor=caller, organization=caller.organization, email=email, role=role)
    except (BadRequest, QuotaExceeded) as error:
        form.add_error(error.param if error.param in form.fields else None, error.message)
        return False
    except Unavailable as error:
        messages.warning(request, error.message)
    else:
        messages.success(request, f"{email} gets a link by mail.")
    return True


def _members(caller: Caller, after: str, q: str) -> dict[str, object]:
    after = after if after.isascii() and after.isdigit() and len(after) < 19 else ""
    named = Q(user__name__icontains=q) | Q(user__email__icontains=q) if q else Q()
    mine = with_keys(Membership.objects.filter(named))
    found, more = page_of(mine, after, PAGE_SIZE, descending=True)
    giveable = members.roles_to_give(caller)
    waiting = Invitation.objects.filter(accepted_at=None, revoked_at=None, email__icontains=q)
    return {
        "rows": [_row(caller, each, giveable) for each in found],
        "invitations": list(
            waiting.select_related("invited_by").order_by("-pk")[:INVITATIONS_SHOWN]
        ),
        "after": after,
        "last": found[-1].pk if more else "",
        "q": q,
        "query": urlencode({"q": q}) if q else "",
    }


def _row(caller: Caller, membership: Membership, giveable: list[Role]) -> Row:
    needed = "owners" if membership.role == Role.OWNER else "members"
    keys: int = membership.keys  # type: ignore[attr-defined]
    return Row(membership, keys, membership.user == caller.user, caller.may(needed), giveable)
