"""How moments look, in every template without a `load`: in UTC, until `portal.js` puts them into the
reader's zone."""

from __future__ import annotations

from datetime import UTC, datetime

from django import template
from django.utils.safestring import SafeString

register = template.Library()


@register.filter
def time_element(moment: datetime | None) -> SafeString:
    """Lists have hundreds of them, for which Django's own `date` filter is slow."""
    if not moment:
        return SafeString("")
    at = moment.astimezone(UTC)
    exact, short = f"{at:%Y-%m-%d %H:%M:%S}", f"{at.day} {at:%b %Y, %H:%M}"
    return SafeString(f'<time datetime="{at.isoformat()}" title="{exact} UTC">{short} UTC</time>')
