"""The page of how long an organization's files stay."""

from __future__ import annotations

from django.contrib import messages
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.utils import timezone
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
    sooner, days = _asked(request, form)
    if form.is_valid() and not sooner:
        set_retention(actor=caller, **form.cleaned_data)
        messages.success(request, "How long files stay is saved.")
        return redirect("retention")
    ctx = {"row": row, "form": form, "sooner": sooner, "days": days}
    status = 400 if form.errors else 200
    return render(request, "batches/retention.html", ctx, status=status)


def _asked(request: PageRequest, form: RetentionForm) -> tuple[int, str]:
    """How many files that are here would go sooner, where the person has yet to agree to it; and
    what exactly they would agree to."""
    if not form.is_valid() or not form.cleaned_data["to_existing"]:
        return 0, ""
    given = form.cleaned_data["input_days"], form.cleaned_data["output_days"]
    days = " ".join("never" if each is None else str(each) for each in given)
    if request.POST.get("sure") == days:
        return 0, ""
    return queries.count_sooner(*given, timezone.now() + GRACE), days
