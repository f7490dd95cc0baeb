"""/v1/models: what an organization may put into `model`."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from django.test import Client

from accounts.models import Organization
from models_registry.models import Model
from models_registry.services import register_model
from tests.batches.test_files_api import client_with, queries_of
from tests.conftest import Person
from tests.wire import assert_refused


def named(name: str, *organizations: Organization) -> Model:
    return register_model(name=name, source="none", engine="instant", organizations=organizations)


def listed(client: Client) -> list[str]:
    return [model["id"] for model in client.get("/v1/models").json()["data"]]


FREE = {"input": 0.0, "cached_input": 0.0, "output": 0.0, "currency": "usd"}


def as_wire(model: Model) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.created_at.timestamp()),
        "owned_by": "portal",
        "pricing": FREE,
    }


def test_models_are_listed_by_name(owner: Person) -> None:
    second, first = named("b"), named("a/b:c.d")
    assert owner.api.get("/v1/models").json() == {
        "object": "list",
        "data": [as_wire(first), as_wire(second)],
    }


@pytest.mark.parametrize("name", ["echo", "Qwen/Qwen3-8B", "a/b/c:d.e-f_g"])
def test_a_model_is_found_by_its_name_whatever_it_has_in_it(name: str, owner: Person) -> None:
    model = named(name)
    assert owner.api.get(f"/v1/models/{name}").json() == as_wire(model)
    assert owner.api.get(f"/v1/models/{name.replace('/', '%2F')}").json() == as_wire(model)


def test_a_model_says_what_it_costs(owner: Person, settings: Any) -> None:
    settings.CURRENCY = "eur"
    prices = {"input_price": Decimal("0.15"), "output_price": Decimal("0.000001")}
    register_model(name="m", source="none", engine="instant", **prices)
    assert owner.api.get("/v1/models/m").json()["pricing"] == {
        "input": 0.15,
        "cached_input": 0.15,
        "output": 0.000001,
        "currency": "eur",
    }
    register_model(name="m", source="none", engine="instant", cached_price=Decimal(0))
    assert owner.api.get("/v1/models/m").json()["pricing"]["cached_input"] == 0.0


@pytest.mark.parametrize("name", ["nope", "nope/nope", "echo/", "ECHO", "x" * 5_000, "%00", "%FF"])
def test_a_model_that_does_not_exist_is_not_found(name: str, owner: Person, echo: Model) -> None:
    assert_refused(owner.api.get(f"/v1/models/{name}"), 404, "model", "model_not_found")


def test_a_stranger_sees_only_what_they_are_offered(
    owner: Person, stranger: Person, acme: Organization, globex: Organization
) -> None:
    named("everybodys")
    named("acmes", acme)
    named("globexs", globex)
    named("both", acme, globex)
    assert listed(owner.api) == ["acmes", "both", "everybodys"]
    assert listed(stranger.api) == ["both", "everybodys", "globexs"]
    assert_refused(stranger.api.get("/v1/models/acmes"), 404, "model", "model_not_found")


def test_a_list_of_three_costs_as_many_queries_as_a_list_of_one(
    owner: Person, acme: Organization
) -> None:
    named("one", acme)
    one = queries_of(owner.api, "/v1/models")
    named("two", acme)
    named("three")
    assert queries_of(owner.api, "/v1/models") == one


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/echo"])
def test_a_key_without_the_scope_is_refused(path: str, owner: Person, echo: Model) -> None:
    other = client_with(owner.caller.organization, "files", "batches")
    assert_refused(other.get(path), 403, None, "insufficient_scope")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/echo"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_another_method_is_not_allowed(method: str, path: str, owner: Person) -> None:
    response = owner.api.generic(method, path)
    assert_refused(response, 405, None, "method_not_allowed")
    assert response["Allow"] == "GET"
