"""The wire's model objects."""

from __future__ import annotations

from typing import Literal

from django.conf import settings
from ninja import Field, Schema

from models_registry.models import Model
from models_registry.queries import prices_of


class Pricing(Schema):
    """Money for a million tokens."""

    input: float
    cached_input: float
    output: float
    currency: str


class ModelOut(Schema):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    pricing: Pricing = Field(description="Ours, beyond OpenAI's.")

    @classmethod
    def of(cls, model: Model) -> ModelOut:
        prices = prices_of(model)
        pricing = Pricing(
            input=float(prices.input),
            cached_input=float(prices.cached),
            output=float(prices.output),
            currency=settings.CURRENCY,
        )
        created = int(model.created_at.timestamp())
        return cls(id=model.name, created=created, owned_by="portal", pricing=pricing)


class ModelList(Schema):
    object: Literal["list"] = "list"
    data: list[ModelOut]
