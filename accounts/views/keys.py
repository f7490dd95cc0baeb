"""The pages of API keys: the list, making (the secret is shown once, by `reveals`), changing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlencode

from django import forms
from django.contrib import messages
from django.db.models import Q
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.debug import sensitive_variables
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from accounts import access, reveals
from accounts.access import Caller
from accounts.errors import ApiError
from accounts.forms.keys import KeyChangeForm, KeyForm, RotateForm
from accounts.forms.last_day import end_of
from accounts.keys import redacted
from accounts.models import ApiKey, Project
from accounts.pages import PageRequest, is_typed, page, sent
from accounts.paging import page_of, searched
from accounts.services import keys

PAGE_SIZE = 25
COLOURS: Mapping[str, str] = {
    "active": "green",
    "replaced": "orange",
    "expired": "secondary",
    "revoked": "red",
}


@dataclass(frozen=True)
class Row:
    """A key as a line of the list."""

    key: ApiKey
    may_change: bool

    @property
    def colour(self) -> str:
        return COLOURS[self.key.state]

    @property
    def redacted(self) -> str:
        return redacted(self.key.prefix)


@require_safe
@page
def api_keys(request: PageRequest, caller: Caller) -> HttpResponseBase:
    caller.require("keys.read")
    after, ended = request.GET.get("after", "").replace("\0", ""), "ended" in request.GET
    rows = ApiKey.objects.select_related("project", "created_by")
    if not ended:
        rows = rows.filter(revoked_at=None)
    if q := searched(request):
        start = q.removeprefix("sk-vbp-").partition("-")[0]
        rows = rows.filter(
            Q(name__icontains=q) | Q(created_by__email__icontains=q) | Q(prefix__startswith=start)
        )
    found, more = page_of(rows, after, PAGE_SIZE, descending=True)
    query = {"q": q} if q else {}
    ctx = {
        "rows": [Row(key, keys.may_change(caller, key)) for key in found],
        "after": after,
        "last": found[-1].pk if more else "",
        "ended": ended,
        "q": q,
        "query": urlencode(query | ({"ended": "1"} if ended else {})),
        "found_by": urlencode(query),
    }
    return render(request, "accounts/api_keys.html", ctx)


@require_http_methods(["GET", "HEAD", "POST"])
@sensitive_variables("text")
@page
def api_key_create(request: PageRequest, caller: Caller) -> HttpResponseBase:
    caller.require("keys")
    projects = list(Project.objects.filter(archived_at=None).order_by("pk"))
    offered = keys.scopes_to_give(caller)
    form = KeyForm(
        sent(request),
        projects=projects,
        scopes=offered,
        usual=[scope for scope in keys.FULL_SCOPES if scope in offered],
        may_serve=caller.may("keys.all"),
    )
    made = _made(caller, form, projects) if form.is_valid() else None
    if made is None:
        ctx = {"form": form}
        return render(request, "accounts/api_key_new.html", ctx, status=400 if form.errors else 200)
    key, text = made
    reveals.keep(request, key.pk, text)
    return redirect("api_key_secret", key.pk)


@require_safe
@sensitive_variables("text")
@page
def api_key_secret(request: PageRequest, caller: Caller, key_id: str) -> HttpResponseBase:
    """The one page that has the secret, and only the first time: kept by no cache."""
    key = _own(caller, key_id)
    text = reveals.take(request, key.pk)
    if not text:
        messages.info(request, "A key's secret is shown once, when it is made.")
        return redirect("api_keys")
    return render(request, "accounts/api_key_shown.html", {"key": key, "text": text})


@require_http_methods(["GET", "HEAD", "POST"])
@page
def api_key_change(request: PageRequest, caller: Caller, key_id: str) -> HttpResponseBase:
    key = _own(caller, key_id)
    initial = {
        "name": key.name,
        "allowed_ips": "\n".join(key.allowed_ips),
        "expires_on": key.expires_at and key.expires_at.date(),
    }
    form = KeyChangeForm(sent(request), initial=initial)
    if form.is_valid() and _changed(caller, key, form):
        messages.success(request, f"{form.cleaned_data['name']} is saved.")
        return redirect("api_keys")
    rotate_form = None if keys.is_anothers(caller, key) else RotateForm()
    ctx = {"row": Row(key, True), "key": key, "form": form, "rotate_form": rotate_form}
    return render(request, "accounts/api_key.html", ctx, status=400 if form.errors else 200)


@require_POST
@sensitive_variables("text")
@page
def api_key_rotate(request: PageRequest, caller: Caller, key_id: str) -> HttpResponseBase:
    key = _own(caller, key_id)
    form = RotateForm(request.POST)
    hours = int(form.cleaned_data["overlap"]) if form.is_valid() else 24
    new, text = keys.rotate_api_key(actor=caller, key=key, overlap=timedelta(hours=hours))
    reveals.keep(request, new.pk, text)
    left = (
        f"works for another {hours} hour{'s' if hours > 1 else ''}"
        if hours
        else "has stopped working"
    )
    messages.success(request, f"The old key {left}.")
    return redirect("api_key_secret", new.pk)


@require_POST
@page
def api_key_revoke(request: PageRequest, caller: Caller, key_id: str) -> HttpResponseBase:
    key = _own(caller, key_id)
    if not is_typed(request, key.name, done="revoked"):
        return redirect("api_keys")
    key = keys.revoke_api_key(actor=caller, key=key)
    messages.success(request, f"{key.name} is revoked: it and its tokens stopped working.")
    return redirect("api_keys")


def _own(caller: Caller, key_id: str) -> ApiKey:
    related = ("project", "created_by", "organization")
    key = access.get(caller, ApiKey, key_id, param="key_id", related=related)
    keys.require_may_change(caller, key)
    return key


@sensitive_variables()
def _made(caller: Caller, form: KeyForm, projects: Sequence[Project]) -> tuple[ApiKey, str] | None:
    given = form.cleaned_data
    project = next(each for each in projects if each.pk == given["project"])
    try:
        return keys.create_api_key(
            actor=caller,
            project=project,
            created_by=None if given.get("service") else caller.user,
            name=given["name"],
            scopes=given["scopes"],
            allowed_ips=given["allowed_ips"],
            expires_at=form.expires_at,
        )
    except ApiError as error:
        tell(form, error)
        return None


def _changed(caller: Caller, key: ApiKey, form: KeyChangeForm) -> bool:
    given = form.cleaned_data
    try:
        keys.update_api_key(
            actor=caller,
            key=key,
            name=given["name"],
            allowed_ips=given["allowed_ips"],
            expires_at=end_of(form.cleaned_data["expires_on"], key.expires_at),
        )
    except ApiError as error:
        tell(form, error, {"expires_at": "expires_on"})
        return False
    return True


def tell(form: forms.Form, error: ApiError, names: Mapping[str, Any] | None = None) -> None:
    """Say what a service refused beside the field that it is about."""
    name = (names or {}).get(error.param or "", error.param)
    form.add_error(name if name in form.fields else None, error.message)
