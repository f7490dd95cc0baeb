"""`verify_audit`: finds whatever somebody with the database's password did to the audit."""

from __future__ import annotations

import io
import tracemalloc

import pytest
from django.core.management import CommandError, call_command
from django.db import connection

from accounts.models import AuditEvent, Organization
from accounts.services import audit
from tests.conftest import Person

pytestmark = pytest.mark.django_db


def run(*arguments: str) -> list[str]:
    out = io.StringIO()
    call_command("verify_audit", *arguments, stdout=out)
    return out.getvalue().splitlines()


def refused(*arguments: str) -> tuple[list[str], str]:
    """What it printed and what it failed with."""
    out = io.StringIO()
    with pytest.raises(CommandError) as caught:
        call_command("verify_audit", *arguments, stdout=out)
    assert caught.value.returncode == 1
    return out.getvalue().splitlines(), str(caught.value)


@pytest.fixture
def chain(acme: Organization) -> list[AuditEvent]:
    """Six events of an organization whose chain had none."""
    tamper("DELETE FROM accounts_auditevent WHERE organization_id = %s", acme.pk)
    return [
        audit.record("a.b", actor=None, organization=acme, changes={"n": [None, n]})
        for n in range(6)
    ]


def tamper(sql: str, *values: object) -> None:
    """Run this as somebody who may switch the trigger off."""
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE accounts_auditevent DISABLE TRIGGER USER")
        cursor.execute(sql, values)
        cursor.execute("ALTER TABLE accounts_auditevent ENABLE TRIGGER USER")


def test_every_chain_is_walked_and_its_head_is_said(chain: list[AuditEvent]) -> None:
    audit.record("model.changed", actor=None)
    platform = audit.verify(None)
    assert run() == [
        f"(platform): {platform.events} events, head {platform.head}, whole",
        f"acme: 6 events, head {chain[-1].hash}, whole",
    ]
    assert run("--org=acme") == [f"acme: 6 events, head {chain[-1].hash}, whole"]


def test_a_chain_without_events_is_whole(chain: list[AuditEvent], globex: Organization) -> None:
    tamper("DELETE FROM accounts_auditevent WHERE organization_id = %s", globex.pk)
    assert run("--org=globex") == [f"globex: 0 events, head {'0' * 64}, whole"]


def test_a_purged_organizations_chain_is_still_walked(chain: list[AuditEvent]) -> None:
    tamper("UPDATE accounts_auditevent SET organization_id = 'org_0' WHERE false")
    event = audit.record("a.b", actor=None, organization=Organization(pk="org_gone"))
    assert f"org_gone (purged): 1 events, head {event.hash}, whole" in run()


def test_an_unknown_organization_is_told() -> None:
    assert refused("--org=nobody") == ([], "There is no organization 'nobody'.")


SWAP = """
UPDATE accounts_auditevent SET number = CASE number WHEN 3 THEN -4 ELSE -3 END
WHERE organization_id = %s AND number IN (3, 4);
UPDATE accounts_auditevent SET number = -number WHERE organization_id = %s AND number < 0
"""
COLUMNS = [
    "id = 'audit_0'",
    "created_at = created_at + interval '1 microsecond'",
    "action = 'a.c'",
    "via = 'session'",
    "actor_id = 7",
    "actor_label = 'somebody'",
    "credential = 'key_1'",
    "address = '192.0.2.1'",
    "request_id = 'req_1'",
    "target_kind = 'project'",
    "target_id = 'proj_1'",
    "target_label = 'x'",
    """changes = '{"n": [null, 7]}'""",
    "changes = '[1e400]'",
    "previous_hash = repeat('0', 64)",
    "hash = repeat('0', 64)",
    "number = 99",
    "number = -1",
    "organization_id = 'org_0'",
    "organization_id = NULL",
]


@pytest.mark.parametrize("change", COLUMNS)
def test_a_changed_column_is_found(change: str, chain: list[AuditEvent]) -> None:
    tamper(f"UPDATE accounts_auditevent SET {change} WHERE id = %s", chain[2].pk)
    said, _ = refused("--org=acme")
    first = 1 if change == "number = -1" else 3
    assert said[0].endswith(f", BROKEN at number {first}")


def test_what_moved_into_another_chain_breaks_both(chain: list[AuditEvent]) -> None:
    tamper("UPDATE accounts_auditevent SET organization_id = NULL WHERE id = %s", chain[2].pk)
    said, why = refused()
    assert [line.partition("BROKEN at ")[2] for line in said] == ["number 1", "number 3"]
    assert why == "2 of 2 chains: not as written."


@pytest.mark.parametrize("lost", [1, 3])
def test_a_deleted_event_is_found(lost: int, chain: list[AuditEvent]) -> None:
    tamper("DELETE FROM accounts_auditevent WHERE id = %s", chain[lost - 1].pk)
    said, why = refused("--org=acme")
    assert said == [f"acme: 5 events, head {chain[-1].hash}, BROKEN at number {lost}"]
    assert why == "1 of 1 chains: not as written."


def test_a_deleted_event_is_found_though_the_rest_was_numbered_anew(
    chain: list[AuditEvent], acme: Organization
) -> None:
    tamper("DELETE FROM accounts_auditevent WHERE id = %s", chain[2].pk)
    for event in chain[3:]:
        tamper("UPDATE accounts_auditevent SET number = number - 1 WHERE id = %s", event.pk)
    assert refused("--org=acme")[0][0].endswith("BROKEN at number 3")


def test_events_in_another_order_are_found(chain: list[AuditEvent], acme: Organization) -> None:
    for statement in SWAP.split(";"):
        tamper(statement, *[acme.pk] * statement.count("%s"))
    assert refused("--org=acme")[0][0].endswith("BROKEN at number 3")


def test_only_who_kept_the_head_finds_a_cut_off_end(chain: list[AuditEvent]) -> None:
    assert run("--org=acme", f"--head={chain[-1].hash}") == run("--org=acme")
    tamper("DELETE FROM accounts_auditevent WHERE id = %s", chain[-1].pk)
    assert run("--org=acme") == [f"acme: 5 events, head {chain[-2].hash}, whole"]
    assert run("--org=acme", f"--head={chain[2].hash.upper()}") == run("--org=acme")
    for arguments in (["--org=acme"], []):
        _, why = refused(*arguments, f"--head={chain[-1].hash}")
        assert why == "No chain has that head: events were cut off, or it is another's."


def test_a_head_of_another_chain_is_not_this_ones(owner: Person, stranger: Person) -> None:
    head = audit.verify(stranger.caller.organization.pk).head
    refused("--org=acme", f"--head={head}")
    assert len(run(f"--head={head}")) == 3


def test_a_long_chain_is_walked_with_flat_memory(acme: Organization) -> None:
    rows = []
    for n in range(1, 6_001):
        rows.append(AuditEvent(organization=acme, number=-n, created_at=acme.created_at))
        rows[-1].changes = {"x": "y" * 1_000}
    AuditEvent.objects.bulk_create(rows, batch_size=1_000)
    del rows
    tracemalloc.start()
    audit.verify(acme.pk)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6_000 * 1_000
