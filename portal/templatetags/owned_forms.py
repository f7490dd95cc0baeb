"""`{% csrf_token %}` of every form, in every template without a `load`: with the organization that the
page was made for, which `accounts/pages.py` compares with the session's."""

from __future__ import annotations

from typing import Any

from django import template
from django.template import Context
from django.template.defaulttags import CsrfTokenNode
from django.utils.html import format_html
from django.utils.safestring import SafeString

register = template.Library()


@register.simple_tag(takes_context=True)
def csrf_token(context: Context) -> SafeString:
    """Django's own field and, on pages of an organization, `for_organization`.

    Lists have a form in every row: it is rendered once a request.
    """
    request: Any = context.get("request")
    fields: SafeString | None = getattr(request, "owned_form_fields", None)
    if fields is None:
        fields = SafeString(CsrfTokenNode().render(context)) + _owner(request)
        if request is not None:
            request.owned_form_fields = fields
    return fields


def _owner(request: Any) -> SafeString:
    caller = getattr(request, "caller", None)
    if caller is None:
        return SafeString("")
    return format_html(
        '<input type="hidden" name="for_organization" value="{}">', caller.organization.pk
    )
