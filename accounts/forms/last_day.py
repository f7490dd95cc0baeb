"""Until when something is good, as people say it: by its last day."""

from __future__ import annotations

from datetime import UTC, date, datetime, time
from typing import Any

from django import forms


class LastDayField(forms.DateField):
    """A day in UTC, which may be empty; `end_of` makes a moment of it."""

    def __init__(self, **kwargs: Any) -> None:
        widget = forms.DateInput({"type": "date"}, format="%Y-%m-%d")
        super().__init__(label="Last day", required=False, widget=widget, **kwargs)


def end_of(day: date | None, before: datetime | None) -> datetime | None:
    """The end of the chosen day; the very moment of before where the day is the same."""
    if day is None:
        return None
    if before is not None and before.astimezone(UTC).date() == day:
        return before
    return datetime.combine(day, time(23, 59, 59), UTC)
