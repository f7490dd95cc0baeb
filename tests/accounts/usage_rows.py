"""Usage records for tests of what shows them, without the batches that would make them."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any

from django_scopes import scopes_disabled

from accounts.models import ApiKey, UsageRecord
from tests.conftest import Person


def used(person: Person, day: date, model: str = "echo", **fields: Any) -> UsageRecord:
    """One record of this person's key: 100 tokens in (40 of them cached), 10 out, cost 0.5."""
    with scopes_disabled():
        key = ApiKey.objects.filter(created_by=person.user).earliest("id")
        return UsageRecord.objects.create(
            **{
                "day": day,
                "organization": person.caller.organization,
                "project": person.caller.project,
                "user": person.user,
                "api_key": key,
                "model": model,
                "endpoint": "/v1/chat/completions",
                "batches": 1,
                "requests": 2,
                "input_tokens": 100,
                "cached_tokens": 40,
                "output_tokens": 10,
                "gpu_seconds": 1.5,
                "cost": Decimal("0.5"),
            }
            | fields
        )
