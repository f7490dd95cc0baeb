"""The forms of the queue by hand: what is shown of it, what is done to it, and moderation."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django import forms

from batches.models.batches import Priority
from batches.services.moderation import MOST_DAYS, MOST_TOKENS
from models_registry.models import Model


class QueueForm(forms.Form):
    """Which batches of the queue are shown; every field may be empty."""

    organization = forms.CharField(
        required=False,
        max_length=150,
        widget=forms.TextInput({"placeholder": "Name or slug", "type": "search"}),
    )
    model = forms.CharField(label="Model", required=False, max_length=200)
    priority = forms.ChoiceField(
        required=False, choices=[("", "Any"), *((str(v), label) for v, label in Priority.choices)]
    )
    state = forms.ChoiceField(
        required=False,
        choices=[
            ("", "Any"),
            ("running", "Running"),
            ("waiting", "Waiting"),
            ("held", "Held"),
            ("approval", "Waits for approval"),
            ("front", "Moved to the front"),
        ],
    )
    id = forms.CharField(label="Batch", required=False, max_length=48)

    @property
    def wanted(self) -> dict[str, str]:
        """What was understood, without what PostgreSQL cannot compare with."""
        given = getattr(self, "cleaned_data", {})
        return {name: value.strip() for name, value in given.items() if value and value.strip()}


class NoFieldsForm(forms.Form):
    """What needs only a yes."""


class NoteForm(forms.Form):
    note = forms.CharField(
        label="Note",
        required=False,
        max_length=500,
        help_text="The organization reads it beside its batch. May be empty.",
    )


class RejectForm(forms.Form):
    note = forms.CharField(
        label="Why", max_length=500, help_text="The organization reads it on its batch."
    )


class PriorityForm(forms.Form):
    priority = forms.TypedChoiceField(choices=Priority.choices, coerce=int, initial=Priority.NORMAL)


class DeadlineForm(forms.Form):
    hours = forms.FloatField(
        label="Hours from now",
        min_value=0.1,
        max_value=336,
        initial=24,
        help_text="What is not answered by then ends as expired.",
    )

    def clean(self) -> dict[str, Any]:
        found = dict(super().clean() or {})
        if hours := found.pop("hours", None):
            found["within"] = timedelta(hours=hours)
        return found


class ModerationForm(forms.Form):
    everything = forms.BooleanField(label="Every batch", required=False)
    over_tokens = forms.IntegerField(
        label="Batches of more tokens than",
        required=False,
        min_value=0,
        max_value=MOST_TOKENS,
        help_text="By estimate, in and out. Empty: no such rule.",
    )
    newer_than_days = forms.IntegerField(
        label="Organizations younger than (days)",
        required=False,
        min_value=0,
        max_value=MOST_DAYS,
        help_text="Empty: no such rule.",
    )
    chosen_models = forms.ModelMultipleChoiceField(
        label="Batches of these models",
        required=False,
        queryset=Model.objects.order_by("name"),
        help_text="None chosen: no such rule.",
    )
