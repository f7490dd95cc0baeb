"""The form to try a model."""

from __future__ import annotations

from django import forms


class TryForm(forms.Form):
    prompt = forms.CharField(
        max_length=20_000, widget=forms.Textarea(attrs={"rows": 4}), label="Your question"
    )
    most_tokens = forms.IntegerField(
        label="Tokens at most", min_value=1, max_value=2048, initial=256, help_text="1 to 2,048."
    )
