"""What forms of API keys and of trusted issuers hold; services check what it means."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from django import forms
from django.utils import timezone
from django.utils.html import format_html

from accounts import roles
from accounts.forms.last_day import LastDayField
from accounts.models import Project

LIFETIMES = [("", "Never"), ("7", "In 7 days"), ("30", "In 30 days"), ("90", "In 90 days")]
LIFETIMES += [("365", "In a year")]
OVERLAPS = [("0", "At once"), ("1", "In an hour"), ("24", "In a day"), ("168", "In a week")]
OVERLAPS += [("720", "In 30 days")]
_NETWORKS = "One a line, as <code>10.0.0.0/8</code>; empty: from anywhere."


def permits(scope: str) -> str:
    """A scope in words."""
    words = [roles.PERMISSIONS[each] for each in roles.PERMISSIONS if each in roles.SCOPES[scope]]
    first, *rest = words or ["The platform operators' own API"]
    return "; ".join([first, *(word[0].lower() + word[1:] for word in rest)])


class ScopesField(forms.MultipleChoiceField):
    """Checkboxes, each with what it permits."""

    widget = forms.CheckboxSelectMultiple({"class": "form-check-input"})

    def offer(self, scopes: Iterable[str]) -> None:
        self.choices = [
            (
                scope,
                format_html("<code>{}</code> {}", scope, permits(scope)),
            )
            for scope in scopes
        ]


class NetworksField(forms.CharField):
    """Text on lines (or with commas) as a list."""

    def __init__(self) -> None:
        super().__init__(
            required=False,
            max_length=4000,
            label="Networks",
            help_text=_NETWORKS,
            widget=forms.Textarea({"rows": 2}),
        )

    def clean(self, value: Any) -> list[str]:
        return str(super().clean(value)).replace(",", " ").split()


class KeyForm(forms.Form):
    name = forms.CharField(max_length=150, help_text="What will use it, as <em>nightly CI</em>.")
    project = forms.ChoiceField()
    scopes = ScopesField()
    lifetime = forms.ChoiceField(choices=LIFETIMES, required=False, label="Expires")
    allowed_ips = NetworksField()
    service = forms.BooleanField(
        required=False,
        label="Of the project: it stays when I leave",
    )

    def __init__(
        self,
        data: Any = None,
        *,
        projects: Iterable[Project],
        scopes: Iterable[str],
        usual: Iterable[str],
        may_serve: bool,
    ) -> None:
        super().__init__(data, initial={"scopes": list(usual), "lifetime": "90"})
        project: Any = self.fields["project"]
        project.choices = [(each.pk, each.name) for each in projects]
        offered: Any = self.fields["scopes"]
        offered.offer(scopes)
        if not may_serve:
            del self.fields["service"]

    @property
    def expires_at(self) -> datetime | None:
        days = self.cleaned_data["lifetime"]
        return timezone.now() + timedelta(days=int(days)) if days else None


class KeyChangeForm(forms.Form):
    name = forms.CharField(max_length=150)
    allowed_ips = NetworksField()
    expires_on = LastDayField(help_text="In UTC; empty: it never expires.")


class RotateForm(forms.Form):
    overlap = forms.ChoiceField(choices=OVERLAPS, initial="24", label="The old key stops working")


class IssuerForm(forms.Form):
    name = forms.CharField(max_length=150)
    project = forms.ChoiceField()
    issuer = forms.CharField(
        max_length=500,
        help_text="Exactly as in the token's <code>iss</code>, as"
        " <code>https://token.actions.githubusercontent.com</code>.",
    )
    audience = forms.CharField(max_length=500, help_text="The token's <code>aud</code>.")
    subject_pattern = forms.CharField(
        max_length=500,
        help_text="Of the token's <code>sub</code>, as"
        " <code>repo:acme/app:ref:refs/heads/main</code>;"
        " <code>*</code> stands for anything but a colon.",
    )
    jwks_url = forms.CharField(
        max_length=500,
        required=False,
        label="Address of its keys",
        help_text="Empty: found by OpenID Connect discovery.",
    )
    scopes = ScopesField()

    def __init__(
        self,
        data: Any = None,
        *,
        projects: Iterable[Project],
        scopes: Iterable[str],
        initial: Any = None,
    ) -> None:
        super().__init__(data, initial=initial)
        project: Any = self.fields["project"]
        project.choices = [(each.pk, each.name) for each in projects]
        offered: Any = self.fields["scopes"]
        offered.offer(scopes)


class LeakedForm(forms.Form):
    keys = forms.CharField(
        max_length=200_000,
        label="Texts",
        help_text="At most 1,000, one a line. What is no key of ours is only counted.",
        widget=forms.Textarea({"rows": 6, "autocomplete": "off", "spellcheck": "false"}),
    )
    revoke = forms.BooleanField(required=False)

    def clean_keys(self) -> list[str]:
        texts = list(dict.fromkeys(str(self.cleaned_data["keys"]).split()))
        if len(texts) > 1000:
            raise forms.ValidationError("These are more than 1,000.")
        return texts
