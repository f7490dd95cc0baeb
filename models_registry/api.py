"""`/v1/models`: what the caller's organization may put into `model`."""

from __future__ import annotations

from django.http import HttpRequest
from ninja import Router

from accounts.authentication import caller_of
from accounts.errors import NotFound
from models_registry.queries import find_offered, offered_to
from models_registry.schemas import ModelList, ModelOut

router = Router(tags=["Models"])


@router.get("/models", response=ModelList, summary="List models")
def list_models(request: HttpRequest) -> ModelList:
    caller = caller_of(request, "models.read")
    return ModelList(data=[ModelOut.of(model) for model in offered_to(caller.organization)])


@router.get("/models/{path:model}", response=ModelOut, summary="Retrieve a model")
def retrieve_model(request: HttpRequest, model: str) -> ModelOut:
    caller = caller_of(request, "models.read")
    found = find_offered(caller.organization, model)
    if found is None:
        raise NotFound(
            f"The model {model[:64]!r} does not exist or is not offered to your organization.",
            param="model",
            code="model_not_found",
        )
    return ModelOut.of(found)
