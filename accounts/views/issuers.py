"""The pages of trusted issuers: whose tokens are exchanged for ours."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.db.models import Q
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_POST

from accounts import access
from accounts.access import Caller
from accounts.errors import ApiError
from accounts.forms.keys import IssuerForm
from accounts.models import Project, Scope, TrustedIssuer
from accounts.pages import PageRequest, page, sent
from accounts.paging import page_of
from accounts.services import issuers, keys
from accounts.views.keys import tell

PAGE_SIZE = 25
_FIELDS = ("name", "issuer", "audience", "subject_pattern", "jwks_url", "scopes")


@require_http_methods(["GET", "HEAD", "POST"])
@page
def trusted_issuers(request: PageRequest, caller: Caller) -> HttpResponseBase:
    caller.require("keys.read")
    form = _form(request, caller)
    if request.method == "POST":
        caller.require("keys.all")
        if form.is_valid() and _saved(caller, form, None):
            messages.success(request, f"{form.cleaned_data['name']} is trusted.")
            return redirect("trusted_issuers")
    after = request.GET.get("after", "").replace("\0", "")
    rows = TrustedIssuer.objects.select_related("project")
    found, more = page_of(rows, after, PAGE_SIZE, descending=True)
    ctx = {"rows": found, "form": form, "after": after, "last": found[-1].pk if more else ""}
    status = 400 if form.errors else 200
    return render(request, "accounts/trusted_issuers.html", ctx, status=status)


@require_http_methods(["GET", "HEAD", "POST"])
@page
def trusted_issuer(request: PageRequest, caller: Caller, issuer_id: str) -> HttpResponseBase:
    caller.require("keys.all")
    row = _issuer(caller, issuer_id)
    initial = {name: getattr(row, name) for name in _FIELDS} | {"project": row.project_id}
    form = _form(request, caller, initial)
    if form.is_valid() and _saved(caller, form, row):
        messages.success(request, f"{form.cleaned_data['name']} is saved.")
        return redirect("trusted_issuers")
    ctx = {"row": row, "form": form}
    status = 400 if form.errors else 200
    return render(request, "accounts/trusted_issuer.html", ctx, status=status)


@require_POST
@page
def trusted_issuer_delete(request: PageRequest, caller: Caller, issuer_id: str) -> HttpResponseBase:
    row = _issuer(caller, issuer_id)
    issuers.delete_trusted_issuer(actor=caller, row=row)
    messages.success(request, f"{row.name} is not trusted any more; its tokens stopped working.")
    return redirect("trusted_issuers")


def _issuer(caller: Caller, issuer_id: str) -> TrustedIssuer:
    related = ("project",)
    return access.get(caller, TrustedIssuer, issuer_id, param="issuer_id", related=related)


def _form(request: PageRequest, caller: Caller, initial: Any = None) -> IssuerForm:
    offered = [each for each in keys.scopes_to_give(caller) if each != Scope.OPERATOR]
    # Also an archived one, where the issuer is its: else saving would give it another project's.
    choices = Q(archived_at=None) | Q(pk=(initial or {}).get("project"))
    projects = Project.objects.filter(choices).order_by("pk")
    return IssuerForm(sent(request), projects=projects, scopes=offered, initial=initial)


def _saved(caller: Caller, form: IssuerForm, row: TrustedIssuer | None) -> bool:
    fields = {name: form.cleaned_data[name] for name in _FIELDS}
    try:
        project = access.get(caller, Project, form.cleaned_data["project"], param="project")
        if row is None:
            issuers.create_trusted_issuer(actor=caller, project=project, **fields)
        else:
            issuers.update_trusted_issuer(actor=caller, row=row, project=project, **fields)
    except ApiError as error:
        tell(form, error)
        return False
    return True
