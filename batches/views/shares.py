"""An organization's place in the queue, for platform operators."""

from __future__ import annotations

from django.contrib import messages
from django.forms.models import model_to_dict
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods
from django_scopes import scopes_disabled

from accounts.models import User
from accounts.pages import PageRequest, operator_page, organization_or_404, sent
from accounts.services import audit
from batches.forms.shares import ShareForm
from batches.models import Share
from batches.queries import operators as queries
from batches.services.shares import set_share


@require_http_methods(["GET", "HEAD", "POST"])
@operator_page
def operator_share(request: PageRequest, user: User, organization_id: str) -> HttpResponseBase:
    organization = organization_or_404(organization_id)
    with scopes_disabled():
        share = Share.objects.filter(organization=organization).first() or Share()
        touches, chunks = queries.work_of(organization)
    form = ShareForm(sent(request), initial=model_to_dict(share))
    if form.is_valid():
        set_share(actor=user, organization=organization, **form.cleaned_data)
        messages.success(request, f"The share of {organization} is saved.")
        return redirect("operator_share", organization_id)
    audit.record("operator.looked", actor=user, organization=organization, label=request.path)
    ctx = {
        "organization": organization,
        "form": form,
        "share": share,
        "touches": touches,
        "chunks": chunks,
    }
    status = 400 if form.errors else 200
    return render(request, "batches/share_operator.html", ctx, status=status)
