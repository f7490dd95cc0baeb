"""Email addresses as people type them. No database here."""

from __future__ import annotations

from django.core.exceptions import ValidationError
from django.core.validators import validate_email

from accounts.errors import BadRequest

LONGEST = 254


def checked_email(text: str, *, param: str = "email") -> str:
    """The address, without blanks around it; raises `BadRequest` for what is none."""
    email = text.strip()
    try:
        validate_email(email)
        email.rpartition("@")[2].encode(
            "idna"
        )  # as mail goes there: not every valid one has a form
    except (ValidationError, UnicodeError):
        raise BadRequest("This is not an email address.", param=param) from None
    if len(email) > LONGEST:
        raise BadRequest(f"An address may have at most {LONGEST} characters.", param=param)
    return email
