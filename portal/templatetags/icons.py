"""Icons, in every template without a `load`."""

from __future__ import annotations

from functools import cache

from django import template
from django.templatetags.static import static
from django.utils.html import format_html
from django.utils.safestring import SafeString

register = template.Library()


@register.simple_tag
@cache  # there are a few dozen, and lists have hundreds of them
def icon(name: str, css: str = "") -> SafeString:
    """One of the sprite's, by its name in Tabler's set; of no meaning to those who hear the page."""
    return format_html(
        '<svg class="icon {}" aria-hidden="true" focusable="false"><use href="{}#{}"></use></svg>',
        css,
        static("vendor/tabler/icons.svg"),
        name,
    )
