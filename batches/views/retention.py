"""The page of how long an organization's files stay."""

from __future__ import annotations

from django.contrib import messages
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods

from accounts.access import Caller
from accounts.pages import PageRequest, page, sent
from batches.forms.files import RetentionForm
from batches.queries import files as queries
from batches.services.retention import GRACE, set_retention


@require_http_methods(["GET", "HEAD", "POST"])
@page
def retention(request: PageRequest, caller: Caller) -> HttpResponseBase:
    caller.require("organization")
    row = queries.retention_of(caller.organization)
    initial = {"input_days": row.input_days, "output_days": row.output_days}
    form = RetentionForm(sent(request), initial=initial)
    if form.is_valid():
        set_retention(actor=caller, **form.cleaned_data)
        messages.success(request, "How long files stay is saved.")
        return redirect("retention")
    ctx = {"row": row, "form": form, "grace": GRACE}
    status = 400 if form.errors else 200
    return render(request, "batches/retention.html", ctx, status=status)
