"""What happens in the apps below and is told of as an event; their signals are the door to it."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from django.dispatch import receiver

from accounts.models import Quota
from accounts.services.quotas import month_used
from batches.services import events
from models_registry.models import Model
from models_registry.signals import model_changed


@receiver(model_changed)
def tell_of_model(model: Model, is_ready: bool, **_: Any) -> None:
    events.model_changed(model, is_ready=is_ready)


@receiver(month_used)
def tell_of_quota(
    quota: Quota, limit: str, most: int | Decimal, used: int | Decimal, **_: Any
) -> None:
    events.quota_used(quota, limit, most, used)
