"""What forms of organizations, projects and invitations hold; services check the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django import forms

from accounts.models import Role


class NameForm(forms.Form):
    name = forms.CharField(max_length=150)


class InviteForm(forms.Form):
    email = forms.EmailField(max_length=254, label="Email address")
    role = forms.ChoiceField()

    def __init__(self, data: Any = None, *, roles: Sequence[Role]) -> None:
        super().__init__(data, initial={"role": Role.MEMBER})
        field: Any = self.fields["role"]
        field.choices = [(role.value, role.label) for role in roles]


class SuspendForm(forms.Form):
    reason = forms.CharField(
        max_length=500, help_text="Its members read this.", widget=forms.Textarea({"rows": 3})
    )
