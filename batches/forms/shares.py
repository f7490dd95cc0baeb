"""The form of an organization's place in the queue."""

from __future__ import annotations

from django import forms

from batches.services.shares import HEAVIEST, LIGHTEST, MOST_CHUNKS


class ShareForm(forms.Form):
    weight = forms.FloatField(
        min_value=LIGHTEST,
        max_value=HEAVIEST,
        help_text="Against 1 of the others: 2 gets twice as much where there is not enough for all.",
    )
    chunks_at_once = forms.IntegerField(
        label="Chunks at once",
        required=False,
        min_value=1,
        max_value=MOST_CHUNKS,
        help_text="How many may run at the same time. Empty: as many as there are workers.",
    )
