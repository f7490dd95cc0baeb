"""The pages of limits: the organization's, those of its people and keys, and the operators' form."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.db.models import Q
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_safe
from django_scopes import scopes_disabled

from accounts import access, ids
from accounts.access import Caller
from accounts.allowances import allowances_of, holders, is_set
from accounts.forms.limits import LimitsForm
from accounts.limits import in_words, quota_of
from accounts.models import ApiKey, Membership, Quota, User
from accounts.pages import PageRequest, operator_page, organization_or_404, page, sent
from accounts.services import audit
from accounts.services.limits import set_limits

PAGE_SIZE = 25
INLINE = "accounts/_limits_inline.html"
"""The operators' form within the list of organizations."""
OFFERED = 100
"""So many people, and so many keys, are suggested; the others can be named all the same."""


@require_safe
@page
def limits(request: PageRequest, caller: Caller) -> HttpResponseBase:
    caller.require("quotas.read")
    named = request.GET.get("of", "").strip()
    if chosen := _subject_id(named):
        return redirect("limits_of", chosen)
    after = request.GET.get("after", "")
    rows, more = _with_limits(after)
    may_write = caller.may("quotas")
    ctx = {
        "organization": caller.organization,
        "allowances": allowances_of(caller.organization),
        "holders": holders(caller.organization, rows),
        "after": after,
        "last": str(rows[-1].pk) if more else "",
        "may_write": may_write,
        "named": named,
        "people": _people() if may_write else [],
        "keys": _keys() if may_write else [],
        "offered": OFFERED,
    }
    return render(request, "accounts/limits.html", ctx, status=400 if named else 200)


@require_http_methods(["GET", "HEAD", "POST"])
@page
def limits_of(request: PageRequest, caller: Caller, subject_id: str) -> HttpResponseBase:
    """A person's or a key's limits, how much of them is used, and the form for admins."""
    caller.require("quotas" if request.method == "POST" else "quotas.read")
    user, key = _subject(caller, subject_id)
    quota = quota_of(caller.organization, user, key)
    form = LimitsForm(sent(request), quota=quota)
    if form.is_valid():
        set_limits(
            actor=caller,
            organization=caller.organization,
            user=user,
            api_key=key,
            **form.cleaned_data,
        )
        messages.success(request, f"The limits of {user or key} are saved.")
        return redirect("limits_of", subject_id)
    ctx: dict[str, Any] = {
        "user_of_limits": user,
        "key": key,
        "name": str(user or key),
        "allowances": allowances_of(caller.organization, user, key),
        "form": form if caller.may("quotas") else None,
    }
    return render(request, "accounts/limits_of.html", ctx, status=400 if form.errors else 200)


@require_http_methods(["GET", "HEAD", "POST"])
@operator_page
def operator_limits(request: PageRequest, user: User, organization_id: str) -> HttpResponseBase:
    """An organization's own limits, for platform operators."""
    organization = organization_or_404(organization_id)
    with scopes_disabled():
        # In the list several of these forms may be open at once.
        ids = f"id_{organization.pk}_%s" if request.htmx else "id_%s"
        form = LimitsForm(sent(request), quota=quota_of(organization), auto_id=ids)
    if form.is_valid():
        quota = set_limits(actor=user, organization=organization, **form.cleaned_data)
        if request.htmx:
            ctx = {"organization": organization, "saved": True, "limits": in_words(quota)}
            return render(request, INLINE, ctx)
        messages.success(request, f"The limits of {organization} are saved.")
        return redirect("operator_limits", organization_id)
    audit.record("operator.looked", actor=user, organization=organization, label=request.path)
    ctx = {"name": str(organization), "organization": organization, "form": form}
    if request.htmx:  # HTMX leaves the page as it is unless the answer is good
        return render(request, INLINE, ctx)
    ctx["allowances"] = allowances_of(organization)
    status = 400 if form.errors else 200
    return render(request, "accounts/limits_operator.html", ctx, status=status)


def _with_limits(after: str) -> tuple[list[Quota], bool]:
    """One page of the people and keys with limits of their own, newest first."""
    rows = Quota.objects.filter(is_set()).select_related("user", "api_key").order_by("-pk")
    if after.isascii() and after.isdigit() and len(after) < 19:
        rows = rows.filter(pk__lt=int(after))
    found = list(rows[: PAGE_SIZE + 1])
    return found[:PAGE_SIZE], len(found) > PAGE_SIZE


def _people() -> list[str]:
    rows = Membership.objects.order_by("user__email")
    return list(rows.values_list("user__email", flat=True)[:OFFERED])


def _keys() -> list[ApiKey]:
    return list(ApiKey.objects.filter(revoked_at=None).order_by("name", "pk")[:OFFERED])


def _subject_id(named: str) -> str:
    """The id of the person or key that is named by it, by email or by prefix; '' for nobody's."""
    if not named or "\0" in named:
        return ""
    person = Q(user__email__iexact=named) | Q(user=ids.parse_user_id(named) or 0)
    if membership := Membership.objects.filter(person).first():
        return ids.user_id(membership.user_id)
    program = Q(pk=named) | Q(prefix=named.removeprefix("sk-vbp-"))
    key = ApiKey.objects.filter(program).first()
    return key.pk if key else ""


def _subject(caller: Caller, id: str) -> tuple[User | None, ApiKey | None]:
    if id.startswith("user_"):
        return access.get_member(caller, id).user, None
    return None, access.get(caller, ApiKey, id)
