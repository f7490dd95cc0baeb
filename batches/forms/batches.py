"""The forms of batches that are there: which of the list, what of their results, and running one again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, time, timedelta
from functools import cached_property
from typing import Any

import orjson
from django import forms
from django.db.models import Q
from django.utils.choices import BaseChoiceIterator

from accounts.errors import BadRequest
from accounts.forms.plain_select import PlainSelect
from accounts.ids import first_id
from batches import windows
from batches.models.batches import UNFINISHED, Priority, Status

Choices = Callable[[], Iterable[tuple[str, str]]]


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
        widget=PlainSelect,
    )
    model = forms.ChoiceField(required=False, widget=PlainSelect)
    project = forms.ChoiceField(required=False, widget=PlainSelect)
    user = forms.ChoiceField(required=False, label="Person", widget=PlainSelect)
    key = forms.ChoiceField(required=False, label="API key", widget=PlainSelect)
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
        """The choices are asked for where they are shown, or one of them is wanted: a poll of the
        list mostly needs none."""
        super().__init__(data)
        offered = {"model": models, "project": projects, "user": users, "key": keys}
        for name, choices in offered.items():
            field: Any = self.fields[name]
            field.choices = AnyOr(choices)

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


class AnyOr(BaseChoiceIterator):
    """The choices, asked for once and at the first look, behind "Any".

    A plain callable Django would ask, and build all pairs anew, whenever it looks.
    """

    def __init__(self, choices: Choices) -> None:
        self._choices = choices

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._all)

    @cached_property
    def _all(self) -> list[tuple[str, str]]:
        return [("", "Any"), *self._choices()]


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
    """Pairs, one a line, as `key=value`; or a JSON object, which can say what lines cannot."""

    def __init__(self) -> None:
        super().__init__(
            required=False,
            max_length=60_000,  # 16 pairs, were each character an escape of six
            help_text="One pair a line, as <code>key=value</code>; at most 16. Or a JSON object of "
            'texts, as <code>{"key": "value"}</code>: a text of several lines needs that.',
            widget=forms.Textarea({"rows": 4}),
        )

    def prepare_value(self, value: Any) -> Any:
        """As lines if they would be read as the same metadata again, else as JSON."""
        if not isinstance(value, dict):
            return value
        lines = "\n".join(f"{key}={each}" for key, each in value.items())
        try:
            same = self.clean(lines) == value
        except forms.ValidationError:
            same = False
        return lines if same else orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()

    def clean(self, value: Any) -> dict[str, str]:
        said: str = super().clean(value)
        return self._object(said) if said.startswith("{") else self._lines(said)

    @staticmethod
    def _object(text: str) -> dict[str, str]:
        try:
            found = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise forms.ValidationError(f"This is no JSON: {error}.") from None
        if not all(isinstance(each, str) for each in found.values()):
            raise forms.ValidationError("Every value must be a text, in quotes.")
        return dict(found)

    @staticmethod
    def _lines(text: str) -> dict[str, str]:
        found = {}
        for line in filter(str.strip, text.splitlines()):
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
