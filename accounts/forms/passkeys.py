"""How a passkey is added; allauth checks what the browser sends."""

from __future__ import annotations

from allauth.mfa.webauthn.forms import AddWebAuthnForm
from django import forms


class PasskeyForm(AddWebAuthnForm):
    """allauth's, in plain words, with what most people want chosen already."""

    passwordless = forms.BooleanField(
        label="Sign in with it alone, without the password",
        required=False,
        initial=True,
        help_text="It then asks for your fingerprint, face or PIN each time.",
    )
