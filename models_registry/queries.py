"""Reads of the registry: what an organization may use."""

from __future__ import annotations

from django.db.models import Q, QuerySet

from accounts.models import Organization
from models_registry.models import Model


def offered_to(organization: Organization) -> QuerySet[Model]:
    """Models open to everybody, and those that name this organization."""
    mine = Q(organizations__isnull=True) | Q(organizations=organization)
    return Model.objects.filter(mine).order_by("name").distinct()
