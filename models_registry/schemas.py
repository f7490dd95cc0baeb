"""The wire's model objects."""

from __future__ import annotations

from typing import Literal

from ninja import Schema

from models_registry.models import Model


class ModelOut(Schema):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str

    @classmethod
    def of(cls, model: Model) -> ModelOut:
        return cls(id=model.name, created=int(model.created_at.timestamp()), owned_by="portal")


class ModelList(Schema):
    object: Literal["list"] = "list"
    data: list[ModelOut]
