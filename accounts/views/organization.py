"""The pages of an organization itself: settings, switching, making, leaving, deleting, roles."""

from __future__ import annotations

from django.contrib import messages
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from accounts import roles
from accounts.access import Caller
from accounts.errors import BadRequest, Forbidden, NotFound
from accounts.forms.organizations import NameForm
from accounts.models import Role, User
from accounts.pages import PageRequest, is_typed, page, person_page, sent
from accounts.queries import organizations_of
from accounts.services import members, organizations


@require_http_methods(["GET", "HEAD", "POST"])
@page
def organization_settings(request: PageRequest, caller: Caller) -> HttpResponseBase:
    form = NameForm(sent(request), initial={"name": caller.organization.name})
    if request.method == "POST":
        caller.require("organization")
        if form.is_valid():
            organizations.rename_organization(actor=caller, name=form.cleaned_data["name"])
            messages.success(request, "The organization has its new name.")
            return redirect("organization_settings")
    ctx = {"organization": caller.organization, "form": form, "days": organizations.RESTORABLE.days}
    return render(request, "accounts/organization.html", ctx, status=_status(form))


@require_http_methods(["GET", "HEAD", "POST"])
@person_page
def organization_create(request: PageRequest, user: User) -> HttpResponseBase:
    if not organizations.may_create(user):
        raise Forbidden("Only operators of this portal make organizations; ask one of them.")
    form = NameForm(sent(request))
    if form.is_valid():
        made = organizations.create_own_organization(actor=user, name=form.cleaned_data["name"])
        _enter(request, made.slug)
        messages.success(request, f"{made.name} is made, and you own it.")
        return redirect("home")
    return render(request, "accounts/organization_new.html", {"form": form}, status=_status(form))


@require_POST
@person_page
def organization_switch(request: PageRequest, user: User) -> HttpResponseBase:
    slug = request.POST.get("slug", "")
    if slug not in [each.slug for each in organizations_of(user)]:
        raise NotFound("You belong to no organization of this name.")
    _enter(request, slug)
    return redirect("home")


@require_POST
@page
def organization_leave(request: PageRequest, caller: Caller) -> HttpResponseBase:
    try:
        members.leave_organization(actor=caller)
    except BadRequest as error:  # the last owner cannot
        messages.error(request, error.message)
        return redirect("organization_settings")
    request.session.pop("organization", None)
    messages.success(request, f"You have left {caller.organization.name}.")
    return redirect("home")


@require_POST
@page
def organization_delete(request: PageRequest, caller: Caller) -> HttpResponseBase:
    caller.require("organization.delete")
    if not is_typed(request, caller.organization.name, done="deleted"):
        return redirect("organization_settings")
    organizations.delete_organization(actor=caller)
    request.session.pop("organization", None)
    messages.success(request, f"{caller.organization.name} is deleted.")
    return redirect("home")


@require_safe
@page
def organization_roles(request: PageRequest, caller: Caller) -> HttpResponseBase:
    rows = [
        (name, said, [(role.label, name in roles.ROLES[role]) for role in Role])
        for name, said in roles.PERMISSIONS.items()
    ]
    return render(request, "accounts/roles.html", {"roles": Role, "rows": rows, "own": caller.role})


def _enter(request: PageRequest, slug: str) -> None:
    request.session["organization"] = slug
    request.session.pop("looking_at", None)


def _status(form: NameForm) -> int:
    return 400 if form.errors else 200
