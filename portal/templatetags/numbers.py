"""How numbers look: grouped by thousands, with a unit, the same on every page."""

from __future__ import annotations

from django import template

register = template.Library()


@register.filter
def thousands(number: float | None) -> str:
    """1234567 as "1,234,567"; nothing known is a dash."""
    return "–" if number is None else f"{number:,.0f}"


@register.filter
def seconds(number: float | None) -> str:
    """A length of time in its largest unit that says enough: "850 ms", "12 s", "3 min", "2.5 h"."""
    if number is None:
        return "–"
    if number < 1:
        return f"{number * 1000:,.0f} ms"
    if number < 120:
        return f"{number:,.0f} s"
    return f"{number / 60:,.0f} min" if number < 7200 else f"{number / 3600:,.1f} h"
