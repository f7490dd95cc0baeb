"""The pages of single sign-on: an organization sets it up, and its people find the way to it.

allauth does the talking with providers; who may come in is `services/sso.py`'s.
"""

from __future__ import annotations

from django.conf import settings
from django.contrib import messages
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_http_methods, require_POST, require_safe
from django_scopes import scopes_disabled

from accounts import access
from accounts.access import Caller
from accounts.errors import ApiError, NotFound
from accounts.forms.sso import DomainForm, EmailForm, ProviderForm
from accounts.models import EmailDomain, IdentityProvider, User
from accounts.pages import PageRequest, operator_page, page, sent
from accounts.services import sso


@require_http_methods(["GET", "HEAD", "POST"])
@page
def organization_sso(request: PageRequest, caller: Caller) -> HttpResponseBase:
    caller.require("organization")
    provider = IdentityProvider.objects.first()
    form = ProviderForm(sent(request), initial=vars(provider) if provider else None)
    if form.is_valid():
        try:
            sso.save_provider(actor=caller, **form.cleaned_data)
        except ApiError as error:
            form.add_error(error.param if error.param in form.fields else None, error.message)
        else:
            messages.success(request, "The identity provider is saved.")
            return redirect("organization_sso")
    return _page(request, caller, form, DomainForm())


@require_POST
@page
def organization_sso_remove(request: PageRequest, caller: Caller) -> HttpResponseBase:
    sso.remove_provider(actor=caller)
    messages.success(request, "People sign in without the identity provider again.")
    return redirect("organization_sso")


@require_POST
@page
def email_domain_claim(request: PageRequest, caller: Caller) -> HttpResponseBase:
    caller.require("organization")
    form = DomainForm(request.POST)
    if form.is_valid():
        try:
            sso.claim_domain(actor=caller, domain=form.cleaned_data["domain"])
            return redirect("organization_sso")
        except ApiError as error:
            form.add_error("domain", error.message)
    provider = IdentityProvider.objects.first()
    return _page(request, caller, ProviderForm(initial=vars(provider) if provider else None), form)


@require_POST
@page
def email_domain_check(request: PageRequest, caller: Caller, domain_id: str) -> HttpResponseBase:
    caller.require("organization")
    domain = access.get(caller, EmailDomain, domain_id, related=["organization"])
    try:
        sso.check_domain(actor=caller, domain=domain)
    except ApiError as error:
        messages.error(request, error.message)
    else:
        messages.success(request, f"{domain} is verified.")
    return redirect("organization_sso")


@require_POST
@page
def email_domain_remove(request: PageRequest, caller: Caller, domain_id: str) -> HttpResponseBase:
    caller.require("organization")
    sso.remove_domain(actor=caller, domain=access.get(caller, EmailDomain, domain_id))
    return redirect("organization_sso")


@require_safe
@operator_page
def operator_domains(request: PageRequest, operator: User) -> HttpResponseBase:
    with scopes_disabled():
        rows = EmailDomain.objects.filter(organization__deleted_at=None, verified_at=None)
        related = ("organization__identity_provider",)
        claims = list(rows.select_related(*related).order_by("-id")[:200])
    return render(request, "accounts/operator_domains.html", {"claims": claims})


@require_POST
@operator_page
def operator_domain_verify(
    request: PageRequest, operator: User, domain_id: str
) -> HttpResponseBase:
    with scopes_disabled():
        rows = EmailDomain.objects.filter(pk=domain_id.replace("\0", ""))
        domain = rows.select_related("organization").first()
    if domain is None:
        raise NotFound("No such claim of a domain.")
    # Each issuer's claim has another token: one that was set up since this page was shown has not
    # been looked at.
    domain.token = request.POST.get("seen", "").replace("\0", "")
    try:
        sso.vouch_for_domain(actor=operator, domain=domain)
    except ApiError as error:
        messages.error(request, error.message)
    else:
        messages.success(request, f"{domain} is verified for {domain.organization}.")
    return redirect("operator_domains")


@require_http_methods(["GET", "HEAD", "POST"])
def sso_start(request: HttpRequest) -> HttpResponseBase:
    """To the provider that speaks for an address; it is the domain that is known, not people."""
    form = EmailForm(request.POST if request.method == "POST" else None)
    if form.is_valid():
        provider = sso.provider_of_email(form.cleaned_data["email"])
        if provider is not None:
            return redirect("openid_connect_login", provider_id=provider.pk)
        form.add_error("email", "No organization signs in with addresses of this domain.")
    status = 400 if form.errors else 200
    return render(request, "accounts/sso_start.html", {"form": form}, status=status)


def _page(
    request: PageRequest, caller: Caller, form: ProviderForm, domain_form: DomainForm
) -> HttpResponseBase:
    callback = reverse("openid_connect_callback", args=[caller.organization.pk])
    ctx = {
        "provider": IdentityProvider.objects.first(),
        "form": form,
        "domain_form": domain_form,
        "domains": EmailDomain.objects.order_by("domain"),
        "callback": settings.BASE_URL + callback,
        "start": settings.BASE_URL + reverse("sso_start"),
    }
    status = 400 if form.errors or domain_form.errors else 200
    return render(request, "accounts/sso.html", ctx, status=status)
