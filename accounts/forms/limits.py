"""The form of one subject's limits; an empty field is no limit of its own."""

from __future__ import annotations

from typing import Any

from django import forms
from django.conf import settings

from accounts.limits import LIMITS, MOST, Limit, default_of
from accounts.models import Quota


class LimitsForm(forms.Form):
    def __init__(self, *args: Any, quota: Quota, **options: Any) -> None:
        options["initial"] = {field: getattr(quota, field) for field in LIMITS}
        super().__init__(*args, **options)
        is_whole = quota.user_id is None and quota.api_key_id is None
        for limit in LIMITS.values():
            self.fields[limit.field] = _field(limit, default_of(limit.field) if is_whole else None)


def _field(limit: Limit, default: int | None) -> forms.Field:
    empty = f"Empty: {default:,}, as everybody" if default is not None else "Empty: no limit"
    if limit.unit == "money":
        hint = f"In {settings.CURRENCY.upper()}. {empty}."
        return forms.DecimalField(
            label=limit.label,
            help_text=hint,
            required=False,
            min_value=0,
            max_digits=14,
            decimal_places=2,
        )
    hint = f"In bytes. {empty}." if limit.unit == "bytes" else f"{empty}."
    return forms.IntegerField(
        label=limit.label, help_text=hint, required=False, min_value=0, max_value=MOST
    )
