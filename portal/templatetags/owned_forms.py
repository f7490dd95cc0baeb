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
    """Django's own field and, on pages of an organization, `for_organization`."""
    token = SafeString(CsrfTokenNode().render(context))
    caller: Any = getattr(context.get("request"), "caller", None)
    if caller is None:
        return token
    return token + format_html(
        '<input type="hidden" name="for_organization" value="{}">', caller.organization.pk
    )
