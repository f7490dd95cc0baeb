"""Operators' pages of what keeps work from being begun: pauses of organizations and models, and
the rules by which batches have to be approved first."""

from __future__ import annotations

from django.contrib import messages
from django.forms.models import model_to_dict
from django.http import Http404
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_POST, require_safe
from django_scopes import scopes_disabled

from accounts.models import Organization, User
from accounts.pages import PageRequest, operator_page, organization_or_404, sent
from accounts.services import audit
from batches.forms.queue import ModerationForm
from batches.models import Moderation
from batches.queries import operators as queries
from batches.services import halts
from batches.services.moderation import follow_platform, set_moderation
from models_registry.models import Model

FIELDS = ("everything", "over_tokens", "newer_than_days", "chosen_models")


@require_safe
@operator_page
def operator_pauses(request: PageRequest, user: User) -> HttpResponseBase:
    with scopes_disabled():
        models = list(queries.models_with_work())
        shares = list(queries.halted_organizations())
    return render(request, "batches/pauses_operator.html", {"models": models, "shares": shares})


@require_POST
@operator_page
def operator_halt_model(request: PageRequest, user: User, model_id: int) -> HttpResponseBase:
    model = Model.objects.filter(pk=model_id).first()
    if model is None:
        raise Http404
    model = halts.halt_model(actor=user, name=model.name, halt=request.POST.get("halt", ""))
    messages.success(request, _said(model.name, model.halt))
    return redirect("operator_pauses")


@require_POST
@operator_page
def operator_halt_organization(
    request: PageRequest, user: User, organization_id: str
) -> HttpResponseBase:
    organization = organization_or_404(organization_id)
    share = halts.halt_organization(
        actor=user, organization=organization, halt=request.POST.get("halt", "")
    )
    messages.success(request, _said(organization.name, share.halt))
    return redirect("operator_pauses")


def _said(name: str, halt: str) -> str:
    if not halt:
        return f"Batches of {name} go on."
    if halt == "paused":
        return f"Batches of {name} are paused; what runs is given back within a few seconds."
    return f"Batches of {name} are draining: what runs is finished, and nothing more is begun."


@require_http_methods(["GET", "HEAD", "POST"])
@operator_page
def operator_moderation(request: PageRequest, user: User) -> HttpResponseBase:
    """The platform's rules, and which organizations have their own."""
    return _moderation(request, user, None)


@require_http_methods(["GET", "HEAD", "POST"])
@operator_page
def operator_organization_moderation(
    request: PageRequest, user: User, organization_id: str
) -> HttpResponseBase:
    organization = organization_or_404(organization_id)
    if request.method == "POST" and "follow" in request.POST:
        follow_platform(actor=user, organization=organization)
        messages.success(request, f"The platform's rules hold for {organization} again.")
        return redirect(request.path)
    if request.method != "POST":
        audit.record("operator.looked", actor=user, organization=organization, label=request.path)
    return _moderation(request, user, organization)


def _moderation(
    request: PageRequest, user: User, organization: Organization | None
) -> HttpResponseBase:
    with scopes_disabled():
        row = Moderation.objects.filter(organization=organization).first()
        initial = model_to_dict(row, FIELDS) if row else {}
        own = Moderation.objects.exclude(organization=None).select_related("organization")
        others = list(own.order_by("organization__name")[:200]) if organization is None else []
    form = ModerationForm(sent(request), initial=initial)
    if form.is_valid():
        set_moderation(actor=user, organization=organization, **form.cleaned_data)
        messages.success(request, "The rules are saved; they are for batches from now on.")
        return redirect(request.path)
    ctx = {"organization": organization, "form": form, "row": row, "others": others}
    status = 400 if form.errors else 200
    return render(request, "batches/moderation_operator.html", ctx, status=status)
