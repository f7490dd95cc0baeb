"""Reads of the registry: what an organization may use, what it could run on, what was learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.db.models import Q, QuerySet

from accounts.models import Organization
from accounts.services.quotas import Prices
from models_registry.models import Measurement, Model, Task
from models_registry.profiles import GpuProfile

SeeGpus = Callable[[], list[GpuProfile]]
_see_gpus: list[SeeGpus] = []


def see_gpus_with(see: SeeGpus) -> None:
    """GPUs are known to workers, rows of an app above this one, which says here what there are."""
    _see_gpus[:] = [see]


def gpus() -> list[GpuProfile]:
    """Each kind of GPU that a worker has."""
    return [profile for see in _see_gpus for profile in see()]


def offered_to(organization: Organization) -> QuerySet[Model]:
    """Models open to everybody, and the restricted ones that name this organization."""
    mine = Q(restricted=False) | Q(organizations=organization)
    return Model.objects.filter(mine).order_by("name").distinct()


def example_for(organization: Organization) -> Model | None:
    """One that the first steps can name: a chat model, where one is offered."""
    offered = offered_to(organization)
    chat = offered.filter(task=Task.CHAT).first()
    return chat or offered.order_by("task", "name").first()


def may_be_offered_to(model: Model) -> QuerySet[Organization]:
    """The organizations that may use it; the other side of `offered_to`."""
    if not model.restricted:
        return Organization.objects.all()
    return Organization.objects.filter(pk__in=model.organizations.values("pk"))


def find_offered(organization: Organization, name: str) -> Model | None:
    """The model of that name, which may be anything that a caller sent; None if there is none."""
    # PostgreSQL refuses a NUL even in a comparison.
    return offered_to(organization).filter(name=name).first() if "\0" not in name else None


def private_models() -> dict[str, set[str]]:
    """The restricted models by name, with the ids of the organizations that may know of them."""
    found: dict[str, set[str]] = {}
    rows = Model.objects.filter(restricted=True).values_list("name", "organizations")
    for name, organization in rows:
        found.setdefault(name, set()).update([organization] if organization else [])
    return found


def unloadable_models() -> set[str]:
    """Those whose last load failed."""
    return set(Model.objects.exclude(load_error="").values_list("name", flat=True))


def prices_of(model: Model) -> Prices:
    """What a million tokens cost; cached input costs as much as other input unless priced."""
    cached = model.input_price if model.cached_price is None else model.cached_price
    return Prices(model.input_price, cached, model.output_price)


def settled_on(name: str, gpu: str) -> dict[str, Any]:
    """The options with which the model was found to fit this kind of GPU; mostly none."""
    found = Measurement.objects.filter(model__name=name, gpu=gpu).values_list("settled", flat=True)
    return dict(found.first() or {})
