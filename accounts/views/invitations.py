"""How an invited person comes in: the link, what it says to whom, and joining.

To nobody but the addressee is it said which organization it is about.
"""

from __future__ import annotations

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_safe

from accounts.errors import Gone
from accounts.models import Invitation, Role, User
from accounts.services import invitations


@require_safe
@never_cache
def invitation(request: HttpRequest, secret: str) -> HttpResponse:
    """Remember which link was opened, and take its secret out of the address bar."""
    try:
        found = invitations.valid_invitation(secret=secret)
    except Gone:
        return _no_longer_valid(request)
    request.session["invitation"] = found.digest
    return redirect("invitation_accept")


@require_http_methods(["GET", "HEAD", "POST"])
@never_cache
def invitation_accept(request: HttpRequest) -> HttpResponse:
    try:
        found = invitations.valid_invitation(kept=request.session.get("invitation", ""))
        if not isinstance(request.user, User):
            return render(request, "accounts/invitation_sign_in.html")
        if not invitations.may_accept(request.user, found):
            return render(request, "accounts/invitation_other_address.html", status=403)
        if request.method == "POST":
            return _accepted(request, request.user, found)
    except Gone:
        return _no_longer_valid(request)
    ctx = {"invitation": found, "role": Role(found.role).label}
    return render(request, "accounts/invitation_accept.html", ctx)


def _accepted(request: HttpRequest, user: User, found: Invitation) -> HttpResponse:
    membership = invitations.accept_invitation(actor=user, invitation=found)
    for name in ("invitation", "looking_at"):
        request.session.pop(name, None)
    request.session["organization"] = found.organization.slug
    label = Role(membership.role).label
    messages.success(request, f"Welcome to {found.organization}: you are {label} here.")
    return redirect("home")


def _no_longer_valid(request: HttpRequest) -> HttpResponse:
    request.session.pop("invitation", None)
    return render(request, "accounts/invitation_gone.html", status=410)
