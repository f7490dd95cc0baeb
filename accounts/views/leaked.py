"""The operators' page that says which of some texts are keys of ours; it keeps none of them."""

from __future__ import annotations

from django.contrib import messages
from django.http.response import HttpResponseBase
from django.shortcuts import render
from django.views.decorators.debug import sensitive_post_parameters, sensitive_variables
from django.views.decorators.http import require_http_methods

from accounts import queries
from accounts.forms.keys import LeakedForm
from accounts.models import User
from accounts.pages import PageRequest, operator_page, sent
from accounts.services import keys
from accounts.views.keys import Row


@sensitive_post_parameters("keys")
@sensitive_variables("form", "texts")
@require_http_methods(["GET", "HEAD", "POST"])
@operator_page
def leaked_keys(request: PageRequest, operator: User) -> HttpResponseBase:
    form = LeakedForm(sent(request))
    if not form.is_valid():
        status = 400 if form.errors else 200
        return render(request, "accounts/leaked_keys.html", {"form": form}, status=status)
    texts = form.cleaned_data["keys"]
    found = [key for key in queries.keys_of_texts(texts) if key]
    if form.cleaned_data["revoke"]:
        live = sum(key.is_usable for key in found)
        found = [keys.revoke_leaked_key(actor=operator, key=key) for key in found]
        messages.success(request, f"{live} of them worked and are revoked.")
    ctx = {"form": LeakedForm(), "rows": [Row(key, False) for key in found], "count": len(texts)}
    return render(request, "accounts/leaked_keys.html", ctx)
