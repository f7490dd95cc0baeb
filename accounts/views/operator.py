"""Platform operators' pages of organizations: finding, suspending, restoring, looking into one.

What an operator sees while looking is each page's own; `middleware.py` audits it.
"""

from __future__ import annotations

from urllib.parse import urlencode

from django.conf import settings
from django.contrib import messages
from django.http import Http404
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_POST, require_safe
from django_scopes import scopes_disabled

from accounts.consumption import unfinished_batches
from accounts.errors import BadRequest, NotFound
from accounts.forms.organizations import SuspendForm
from accounts.limits import in_words
from accounts.models import Organization, User
from accounts.pages import PageRequest, operator_page
from accounts.paging import page_of
from accounts.queries import RANKS, organizations_found, own_limits, people_found, ranking
from accounts.services import audit, organizations, people
from accounts.views.usage import PRESETS, days_of

PAGE_SIZE = 25
RANKED = 50
SAID = {
    "shut_out": "{} is shut out: signed out everywhere, and keys of theirs do not work.",
    "let_in": "{} may sign in again, and their keys work.",
    "made_operator": "{} is an operator now.",
    "made_no_operator": "{} is no operator any more.",
}
"""What each of `people.DECISIONS` came to."""


@require_safe
@operator_page
def operator_organizations(request: PageRequest, user: User) -> HttpResponseBase:
    given = {name: request.GET.get(name, "").replace("\0", "") for name in ("q", "state", "after")}
    after = given.pop("after")
    found, more = page_of(
        organizations_found(given["q"].strip(), given["state"]), after, PAGE_SIZE, descending=True
    )
    limits = own_limits(found)
    rows = [(organization, in_words(limits.get(organization.pk))) for organization in found]
    query = urlencode({name: value for name, value in given.items() if value})
    last = found[-1].pk if more else ""
    ctx = given | {"rows": rows, "after": after, "last": last, "query": query}
    return render(request, "accounts/operator_organizations.html", ctx)


@require_safe
@operator_page
def operator_people(request: PageRequest, user: User) -> HttpResponseBase:
    given = {name: request.GET.get(name, "").replace("\0", "") for name in ("q", "after")}
    after = given["after"] if given["after"].isdigit() and given["after"].isascii() else ""
    with scopes_disabled():
        found, more = page_of(
            people_found(given["q"].strip()), after[:18], PAGE_SIZE, descending=True
        )
    query = urlencode({"q": given["q"]}) if given["q"] else ""
    last = str(found[-1].pk) if more else ""
    ctx = {"people": found, "q": given["q"], "after": after, "last": last, "query": query}
    ctx["here"] = request.GET.urlencode()
    return render(request, "accounts/operator_people.html", ctx)


@require_POST
@operator_page
def operator_person(request: PageRequest, user: User, person_id: int) -> HttpResponseBase:
    """Carry out what the operator decided about a person."""
    decision = request.POST.get("decision", "")
    if decision not in SAID:
        raise Http404
    try:
        person = people.decide(decision, actor=user, person_id=person_id)
    except NotFound:
        raise Http404 from None
    except BadRequest as error:
        messages.error(request, error.message)
    else:
        messages.success(request, SAID[decision].format(person.email))
    return redirect(f"{reverse('operator_people')}?{request.GET.urlencode()}".rstrip("?"))


@require_safe
@operator_page
def operator_usage(request: PageRequest, user: User) -> HttpResponseBase:
    """Which organizations used most."""
    days, by = days_of(request), request.GET.get("by", "")
    by = by if by in RANKS else "tokens"
    ctx = {
        "days": days,
        "presets": PRESETS,
        "by": by,
        "ranks": (("tokens", "Tokens"), ("cost", "Cost"), ("gpu", "GPU time")),
        "rows": ranking(days.since, days.until, by, most=RANKED),
        "most": RANKED,
        "currency": settings.CURRENCY.upper(),
    }
    status = 400 if days.form.is_bound and days.form.errors else 200
    return render(request, "accounts/operator_usage.html", ctx, status=status)


@require_safe
@operator_page
def operator_organization(
    request: PageRequest, user: User, organization_id: str
) -> HttpResponseBase:
    organization = _organization(organization_id)
    audit.record("operator.looked", actor=user, organization=organization, label=request.path)
    return _shown(request, organization, SuspendForm())


@require_POST
@operator_page
def operator_suspend(request: PageRequest, user: User, organization_id: str) -> HttpResponseBase:
    organization = _organization(organization_id)
    form = SuspendForm(request.POST)
    if not form.is_valid():
        return _shown(request, organization, form, status=400)
    why = form.cleaned_data["reason"]
    organizations.suspend_organization(actor=user, organization=organization, why=why)
    messages.success(request, f"{organization} is suspended.")
    return redirect("operator_organization", organization.pk)


@require_POST
@operator_page
def operator_resume(request: PageRequest, user: User, organization_id: str) -> HttpResponseBase:
    organization = _organization(organization_id)
    organizations.resume_organization(actor=user, organization=organization)
    messages.success(request, f"{organization} works again.")
    return redirect("operator_organization", organization.pk)


@require_POST
@operator_page
def operator_restore(request: PageRequest, user: User, organization_id: str) -> HttpResponseBase:
    organization = _organization(organization_id)
    try:
        organizations.restore_organization(actor=user, organization=organization)
    except BadRequest as error:
        messages.error(request, error.message)
    else:
        messages.success(request, f"{organization} is back.")
    return redirect("operator_organization", organization.pk)


@require_POST
@operator_page
def operator_look(request: PageRequest, user: User, organization_id: str) -> HttpResponseBase:
    organization = _organization(organization_id)
    audit.record("operator.look_began", actor=user, organization=organization, target=organization)
    request.session["looking_at"] = organization.pk
    request.session.pop("looked_at", None)
    return redirect("home")


@require_POST
@operator_page
def operator_look_end(request: PageRequest, user: User) -> HttpResponseBase:
    id = request.session.pop("looking_at", "")
    if organization := Organization.objects.filter(pk=id).first():
        audit.record(
            "operator.look_ended", actor=user, organization=organization, target=organization
        )
    return redirect("operator_organizations")


def _organization(id: str) -> Organization:
    found = None if "\0" in id else organizations_found("", "").filter(pk=id).first()
    if found is None:
        raise Http404
    return found


def _shown(
    request: PageRequest, organization: Organization, form: SuspendForm, *, status: int = 200
) -> HttpResponseBase:
    looking = request.session.get("looking_at") == organization.pk
    ctx = {
        "organization": organization,
        "form": form,
        "looking": looking,
        "days": organizations.RESTORABLE.days,
        "unfinished": unfinished_batches(organization),
    }
    return render(request, "accounts/operator_organization.html", ctx, status=status)
