"""What forms of single sign-on hold; `services/sso.py` checks what it means."""

from __future__ import annotations

from django import forms

from accounts.models import Role
from accounts.models.sso import JOINING_ROLES


class ProviderForm(forms.Form):
    name = forms.CharField(max_length=40, help_text="As people call it: on the button.")
    issuer = forms.CharField(
        max_length=500, help_text="Its address, as <code>https://login.example.com</code>."
    )
    client_id = forms.CharField(max_length=191, label="Client ID")
    client_secret = forms.CharField(
        max_length=500,
        required=False,
        widget=forms.PasswordInput(attrs={"autocomplete": "off"}),
        help_text="Kept encrypted. Leave it empty to keep the one that is stored.",
    )
    role = forms.ChoiceField(
        choices=JOINING_ROLES,
        initial=Role.MEMBER,
        label="Role of who joins",
        help_text="An owner or admin can give another one later.",
    )


class DomainForm(forms.Form):
    domain = forms.CharField(max_length=253, label="Email domain")


class EmailForm(forms.Form):
    email = forms.EmailField(max_length=254, widget=forms.EmailInput({"autocomplete": "email"}))
