"""The forms of batches that are there: which of the list, what of their results, and running one again."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, time, timedelta
from typing import Any

from django import forms
from django.db.models import Q

from accounts.errors import BadRequest
from accounts.forms.long_select import LongSelect
from accounts.ids import first_id
from batches import windows
from batches.models.batches import UNFINISHED, Priority, Status

Choices = Iterable[tuple[str, str]]


class BatchFilterForm(forms.Form):
    """Which batches of the list are wanted. Every field may be empty; days are whole ones (UTC)."""

    q = forms.CharField(
        label="Search",
        required=False,
        max_length=200,
        widget=forms.TextInput({"type": "search", "placeholder": "File name or batch id"}),
    )
    status = forms.ChoiceField(
        required=False,
        choices=[("", "Any"), ("unfinished", "Unfinished"), *Status.choices],
    )
    model = forms.ChoiceField(required=False)
    project = forms.ChoiceField(required=False)
    user = forms.ChoiceField(required=False, label="Person", widget=LongSelect)
    key = forms.ChoiceField(required=False, label="API key", widget=LongSelect)
    since = forms.DateField(
        label="From (UTC)", required=False, widget=forms.DateInput({"type": "date"})
    )
    until = forms.DateField(
        label="To (UTC)", required=False, widget=forms.DateInput({"type": "date"})
    )
    metadata = forms.CharField(
        required=False,
        max_length=600,
        widget=forms.TextInput({"placeholder": "key=value"}),
    )

    def __init__(
        self, data: Any, *, models: Choices, projects: Choices, users: Choices, keys: Choices
    ) -> None:
        super().__init__(data)
        offered = {"model": models, "project": projects, "user": users, "key": keys}
        for name, choices in offered.items():
            field: Any = self.fields[name]
            field.choices = [("", "Any"), *choices]

    def clean_metadata(self) -> dict[str, str]:
        key, equals, value = self.cleaned_data["metadata"].partition("=")
        if not key and not equals:
            return {}
        if not key.strip() or not equals:
            raise forms.ValidationError("Write it as key=value.")
        return {key.strip(): value.strip()}

    @property
    def wanted(self) -> Q:
        """The filter without the text; of a form that is not valid, what was understood of it."""
        given = getattr(self, "cleaned_data", {})
        found = Q()
        fields = {"model": "model_id", "project": "project_id", "user": "user_id"}
        for name, column in (fields | {"key": "api_key_id"}).items():
            if value := given.get(name):
                found &= Q(**{column: value})
        if status := given.get("status"):
            found &= Q(status__in=sorted(UNFINISHED) if status == "unfinished" else [status])
        if metadata := given.get("metadata"):
            found &= Q(metadata__contains=metadata)
        return found & _made(given.get("since"), given.get("until"))

    @property
    def text(self) -> str:
        return str(getattr(self, "cleaned_data", {}).get("q") or "")


def _made(since: Any, until: Any) -> Q:
    """Of these days, by their ids, which begin with the time and have an index."""
    found = Q()
    if since:
        found &= Q(pk__gte=first_id("batch_", datetime.combine(since, time(), UTC)))
    if until:
        end = datetime.combine(until, time(), UTC) + timedelta(days=1)
        found &= Q(pk__lt=first_id("batch_", end))
    return found


class MetadataField(forms.CharField):
    """Pairs, one a line, as `key=value`."""

    def __init__(self) -> None:
        super().__init__(
            required=False,
            max_length=12_000,
            help_text="One pair a line, as <code>key=value</code>; at most 16.",
            widget=forms.Textarea({"rows": 4}),
        )

    def prepare_value(self, value: Any) -> Any:
        if isinstance(value, dict):
            return "\n".join(f"{key}={each}" for key, each in value.items())
        return value

    def clean(self, value: Any) -> dict[str, str]:
        found = {}
        for line in filter(str.strip, super().clean(value).splitlines()):
            key, equals, said = line.partition("=")
            if not equals or not key.strip():
                raise forms.ValidationError(f"Write {line[:80]!r} as key=value.")
            found[key.strip()] = said.strip()
        return found


class CloneForm(forms.Form):
    completion_window = forms.CharField(
        label="Window",
        max_length=16,
        help_text="Hours or minutes within which it should be done, as <code>24h</code>.",
    )
    priority = forms.ChoiceField(
        choices=[(each.name.lower(), each.label) for each in reversed(Priority)]
    )
    metadata = MetadataField()

    def clean_completion_window(self) -> str:
        window = str(self.cleaned_data["completion_window"])
        try:
            windows.parse(window)
        except BadRequest as error:
            raise forms.ValidationError(error.message) from None
        return window


class ResultsForm(forms.Form):
    """Which results are wanted: a text in them, those that failed, or one line."""

    q = forms.CharField(
        label="Search",
        required=False,
        max_length=200,
        widget=forms.TextInput({"type": "search", "placeholder": "Text in a request or an answer"}),
    )
    line = forms.IntegerField(label="Go to line", required=False, min_value=1, max_value=2**31 - 1)
    failed = forms.BooleanField(label="Failed only", required=False)
