"""What forms of files and of their retention hold; services check what it means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django import forms

from accounts.forms.last_day import LastDayField
from accounts.models import Project
from batches.forms.projects import offer_projects
from batches.models.files import MOST_DAYS, Purpose

_UPLOADED = [choice for choice in Purpose.choices if choice[0] != Purpose.BATCH_OUTPUT]


class FilterForm(forms.Form):
    purpose = forms.ChoiceField(
        required=False, choices=[("", "Any"), *((each.value, each.value) for each in Purpose)]
    )
    q = forms.CharField(
        required=False,
        max_length=200,
        label="Name or id",
        widget=forms.TextInput({"type": "search"}),
    )


class UploadForm(forms.Form):
    """A file; where it may be anything, with its purpose; where there are several, its project."""

    file = forms.FileField(allow_empty_file=True)  # the service says so in its own words
    purpose = forms.ChoiceField(
        choices=[(value, value) for value, _ in _UPLOADED], initial=Purpose.BATCH
    )

    def __init__(
        self,
        *args: Any,
        projects: Sequence[Project],
        accept: str = "",
        purposes: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        offer_projects(self, projects)
        if accept:
            self.fields["file"].widget.attrs["accept"] = accept
        if not purposes:
            del self.fields["purpose"]


class ExpiryForm(forms.Form):
    expires_on = LastDayField(help_text="In UTC; empty: it stays until somebody deletes it.")


class RetentionForm(forms.Form):
    input_days = forms.IntegerField(
        label="Uploaded files: delete after how many days",
        required=False,
        min_value=1,
        max_value=MOST_DAYS,
        help_text="Inputs of batches and all else that people and programs upload. Empty: never.",
    )
    output_days = forms.IntegerField(
        label="Output and error files: delete after how many days",
        required=False,
        min_value=1,
        max_value=MOST_DAYS,
        help_text="What batches write. Empty: never.",
    )
    to_existing = forms.BooleanField(label="Also the files that are here already", required=False)
