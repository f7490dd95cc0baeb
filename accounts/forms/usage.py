"""Which days the usage page shows."""

from __future__ import annotations

from datetime import date, timedelta
from typing import Any

from django import forms

LONGEST = timedelta(days=366)


class DaysForm(forms.Form):
    """Two days (UTC), both of them included."""

    since = forms.DateField(label="From", widget=forms.DateInput({"type": "date"}))
    until = forms.DateField(label="To", widget=forms.DateInput({"type": "date"}))

    def clean(self) -> dict[str, Any]:
        given = super().clean() or {}
        since, until = given.get("since"), given.get("until")
        if since and until and until < since:
            self.add_error("until", "This day is before the first one.")
        elif since and until and until - since >= LONGEST:
            self.add_error("until", f"At most {LONGEST.days} days at once.")
        return given


def preset(name: str, today: date) -> tuple[date, date]:
    """The last 7, 30 or 90 days, or this month so far; 30 days for any other name."""
    if name == "month":
        return today.replace(day=1), today
    days = {"7": 7, "90": 90}.get(name, 30)
    return today - timedelta(days=days - 1), today
