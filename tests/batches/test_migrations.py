"""Migrations on a database that has data: what an older version left is carried over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.db import connection
from django.db.migrations.executor import MigrationExecutor
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.operations import AddField, CreateModel
from django_scopes import scopes_disabled

from accounts.models import Reservation, UsageRecord
from batches.services.finalization import finalize_batch
from tests import jobs
from tests.conftest import Person

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("own_storage", "wakeups_sent", "echo"),
]
LATER = {"accounts": 6, "batches": 8, "models_registry": 6, "worker": 6}
"""From these migrations on, two versions run side by side (docs/OPERATIONS.md)."""
BEFORE, AFTER = ("batches", "0003_usage"), ("batches", "0004_one_tenant_a_row_again")


def test_the_version_before_can_go_on_making_rows() -> None:
    """It knows nothing of a column that came later: the database has a default, or it may be null."""
    missing: list[str] = []
    for (app, name), migration in MigrationLoader(None).disk_migrations.items():
        if int(name[:4]) < LATER.get(app, 10_000):
            continue
        new = {each.name_lower for each in migration.operations if isinstance(each, CreateModel)}
        added = [each for each in migration.operations if isinstance(each, AddField)]
        missing += [
            f"{app}.{name}: {each.model_name}.{each.name}"
            for each in added
            if not (each.field.null or each.field.has_db_default() or each.model_name_lower in new)
        ]
    assert missing == []


def migrate(*targets: tuple[str, str]) -> None:
    MigrationExecutor(connection).migrate(list(targets))


@pytest.fixture
def latest() -> Iterator[None]:
    """Whatever the test did, the others find the database as it was."""
    yield
    executor = MigrationExecutor(connection)
    executor.migrate(executor.loader.graph.leaf_nodes())


@pytest.mark.usefixtures("latest")
def test_unfinished_batches_get_a_reservation_and_ended_ones_are_booked(owner: Person) -> None:
    for _ in range(2):
        done = jobs.running(owner.caller, 3)
        jobs.finish(jobs.lease())
        finalize_batch(done.pk)
    running = jobs.running(owner.caller, 3)
    waiting = jobs.created(owner.caller, jobs.jsonl(jobs.lines(1)))
    with scopes_disabled():
        reserved = sorted(Reservation.objects.values_list("batch_id", "model", "tokens"))
        booked = list(UsageRecord.objects.values())
    assert [id for id, _, _ in reserved] == sorted([running.pk, waiting.pk])
    migrate(BEFORE)
    with scopes_disabled():
        assert (Reservation.objects.count(), UsageRecord.objects.count()) == (0, 0)
    migrate(AFTER)
    with scopes_disabled():
        assert sorted(Reservation.objects.values_list("batch_id", "model", "tokens")) == reserved
        again = list(UsageRecord.objects.values())
    for row in [*booked, *again]:
        del row["id"]
    assert again == booked
