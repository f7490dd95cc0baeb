"""What the sign-up forms (with a password, by a provider) have more than allauth's."""

from __future__ import annotations

from typing import Any

from allauth.core import context
from django import forms
from django.http import HttpRequest

from accounts.models import User


class InvitedEmail(forms.Form):
    """Who was invited signs up with the address that the invitation was mailed to, no other."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from accounts.adapter import invited  # which imports allauth's forms, and they this one

        super().__init__(*args, **kwargs)
        if invitation := invited(context.request):
            self.initial["email"] = invitation.email
            self.fields["email"].disabled = True

    def signup(self, request: HttpRequest, user: User) -> None:
        """allauth's hook; there is nothing more to keep."""
