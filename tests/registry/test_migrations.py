"""Migrations on a database that has models: who may use them stays."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.db import connection
from django.db.migrations.executor import MigrationExecutor

from models_registry.models import Model
from models_registry.services import register_model
from tests.conftest import Person


@pytest.fixture
def latest() -> Iterator[None]:
    """Whatever the test did, the others find the database as it was."""
    yield
    executor = MigrationExecutor(connection)
    executor.migrate(executor.loader.graph.leaf_nodes())


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("latest")
def test_models_that_name_organizations_are_restricted_to_them(
    owner: Person, stranger: Person
) -> None:
    acme, globex = owner.caller.organization, stranger.caller.organization
    for name, whose in (("all", []), ("both", [acme, globex]), ("ours", [acme])):
        register_model(name=name, source="none", engine="instant", organizations=whose)
    MigrationExecutor(connection).migrate([("models_registry", "0002_prices")])
    MigrationExecutor(connection).migrate([("models_registry", "0003_restricted")])
    assert list(Model.objects.order_by("name").values_list("name", "restricted")) == [
        ("all", False),
        ("both", True),
        ("ours", True),
    ]
