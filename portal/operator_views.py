"""Operators' page of the installation as a whole."""

from __future__ import annotations

from django.http.response import HttpResponseBase
from django.shortcuts import render
from django.views.decorators.http import require_safe

from accounts.models import User
from accounts.pages import PageRequest, operator_page
from portal import failures, system
from portal.models import FailedTask

SHOWN = 20


@require_safe
@operator_page
def operator_system(request: PageRequest, user: User) -> HttpResponseBase:
    applied, pending = system.migrations()
    ctx = {
        "services": system.services().items(),
        "versions": system.versions().items(),
        "depths": system.depths().items(),
        "failed": list(FailedTask.objects.order_by("-pk")[:SHOWN]),
        "failed_kept": failures.KEPT,
        "kept": system.kept(),
        "applied": applied,
        "pending": pending,
        "settings": system.settings_in_effect(),
    }
    return render(request, "portal/system.html", ctx)
