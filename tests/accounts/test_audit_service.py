"""Writing the audit: what one event says, and that the chain holds whatever is written at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from django.db import InternalError, ProgrammingError, connection, transaction
from django_scopes import scopes_disabled
from hypothesis import given
from hypothesis import strategies as st

from accounts.access import Caller
from accounts.models import AuditEvent, Organization, Role, User
from accounts.models.audit import Via
from accounts.origin import Origin, current
from accounts.services import audit
from tests.conftest import Person

pytestmark = pytest.mark.django_db


@contextmanager
def coming_from(address: str | None, request_id: str = "") -> Iterator[None]:
    token = current.set(Origin(address, request_id))
    try:
        yield
    finally:
        current.reset(token)


def stored(event: AuditEvent) -> AuditEvent:
    with scopes_disabled():
        return AuditEvent.objects.get(pk=event.pk)


def assert_survives(event: AuditEvent) -> AuditEvent:
    """The event's hash is the same over what the database gives back."""
    kept = stored(event)
    assert audit.hash_of(kept) == kept.hash == event.hash
    return kept


# --- What an event says -----------------------------------------------------------------------


def test_events_of_an_organization_are_numbered_and_chained(owner: Person) -> None:
    organization = owner.caller.organization
    first = audit.verify(organization.pk)
    one = audit.record("a.b", actor=owner.caller)
    two = audit.record("a.c", actor=owner.caller)
    assert (one.number, two.number) == (first.events + 1, first.events + 2)
    assert (one.previous_hash, two.previous_hash) == (first.head, one.hash)
    assert audit.verify(organization.pk) == audit.Chain(
        organization.pk, first.events + 2, two.hash, None, False
    )


def test_the_platforms_chain_is_its_own(owner: Person, operator: User) -> None:
    audit.record("a.b", actor=owner.caller)
    event = audit.record("model.changed", actor=operator)
    assert (event.organization, event.number, event.previous_hash) == (None, 1, audit.GENESIS)
    assert_survives(event)
    assert audit.record("model.changed", actor=None).previous_hash == event.hash


def callers(owner: Person) -> dict[str, Caller]:
    organization, project, user = (
        owner.caller.organization,
        owner.caller.project,
        owner.caller.user,
    )
    with scopes_disabled():
        key = user.api_keys.get() if user else None
    assert key is not None
    service_key = key.__class__(id="key_1", name="nightly")
    return {
        "session": Caller(organization, project, user, Role.OWNER),
        "key": Caller(organization, project, user, Role.OWNER, key, ("files",)),
        "service key": Caller(organization, project, None, "", service_key, ("files",)),
        "token": Caller(organization, project, user, Role.OWNER, key, ("files",), "jti_1"),
        "workload": Caller(organization, project, None, "", None, ("files",), "j" * 99),
        "operator": Caller(organization, project, user, operator=True),
    }


@pytest.mark.parametrize(
    ("kind", "via", "label", "credential"),
    [
        ("session", Via.SESSION, "owner@acme.test", ""),
        ("key", Via.API_KEY, "owner@acme.test", "key"),
        ("service key", Via.API_KEY, "nightly", "key_1"),
        ("token", Via.TOKEN, "owner@acme.test", "jti_1"),
        ("workload", Via.TOKEN, "j" * 99, "j" * 64),
        ("operator", Via.OPERATOR, "owner@acme.test", ""),
    ],
)
def test_an_event_says_who_it_was_and_by_what(
    kind: str, via: str, label: str, credential: str, owner: Person
) -> None:
    caller = callers(owner)[kind]
    event = assert_survives(audit.record("a.b", actor=caller))
    known = caller.api_key.pk if credential == "key" and caller.api_key else credential
    assert (event.via, event.actor_label, event.credential) == (via, label, known)
    assert event.actor_id == (caller.user.pk if caller.user else None)


def test_the_system_and_the_operator_are_named(operator: User) -> None:
    system, staff = audit.record("a.b", actor=None), audit.record("a.b", actor=operator)
    assert (system.via, system.actor_label, system.actor_id) == (Via.SYSTEM, "system", None)
    assert (staff.via, staff.actor_label) == (Via.OPERATOR, "operator@portal.test")


def test_an_event_says_what_it_was_done_to_and_in_which_request(owner: Person) -> None:
    with coming_from("192.0.2.7", "req_1"):
        event = audit.record(
            "project.renamed",
            actor=owner.caller,
            target=owner.caller.project,
            changes={"name": ["Old", "Default"]},
        )
    event = assert_survives(event)
    assert (event.target_kind, event.target_id, event.target_label) == (
        "project",
        owner.caller.project.pk,
        "Default",
    )
    assert (event.address, event.request_id) == ("192.0.2.7", "req_1")
    assert event.changes == {"name": ["Old", "Default"]}


# --- The way through the database ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("::192.0.2.7", "::c000:207"),  # PostgreSQL writes this one as it came
        ("fe80::1%eth0", "fe80::1"),
        ("192.0.2.7:4711", None),
        ("unknown", None),
        ("", None),
        (None, None),
    ],
)
def test_an_address_is_kept_in_one_form_and_junk_is_not(
    given: str | None, kept: str | None, owner: Person
) -> None:
    with coming_from(given):
        event = audit.record("a.b", actor=owner.caller)
    assert audit._address(assert_survives(event).address) == event.address == kept


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (1, 1),
        (True, True),
        (None, None),
        (2**63 - 1, 2**63 - 1),
        (2**63, str(2**63)),
        (1e16, "1e+16"),
        (-0.0, "-0.0"),
        (0.1, "0.1"),
        (float("nan"), "nan"),
        (Decimal("1.50"), "1.50"),
        (Role.OWNER, "owner"),
        ({"b", "a"}, ["a", "b"]),
        ((1, (2,)), [1, [2]]),
        ({2: {"x": Decimal(1)}}, {"2": {"x": "1"}}),
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05+00:00"),
        (
            datetime(2026, 1, 2, 3, tzinfo=timezone(timedelta(hours=2))),
            "2026-01-02T01:00:00+00:00",
        ),
        ("a\0b\ud800", "a\ufffdb?"),
        ("é…\u2028'\"", "é…\u2028'\""),
    ],
)
def test_changes_are_kept_as_the_database_gives_them_back(
    value: Any, kept: Any, owner: Person
) -> None:
    event = audit.record("a.b", actor=owner.caller, changes={"field": [None, value]})
    assert assert_survives(event).changes == {"field": [None, kept]}


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.decimals(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
def test_what_was_made_plain_once_stays_as_it_is(value: Any) -> None:
    plain = audit._plain(value)
    assert audit._plain(plain) == plain
    json.dumps(plain, allow_nan=False).encode()


@given(st.dictionaries(st.text(), PLAIN, max_size=3))
def test_any_changes_survive(changes: dict[str, Any]) -> None:
    with transaction.atomic():
        assert_survives(audit.record("a.b", actor=None, changes=changes))


def test_the_order_of_keys_does_not_matter(owner: Person) -> None:
    event = audit.record("a.b", actor=owner.caller, changes={"bb": 1, "a": 2, "é": 3})
    kept = assert_survives(event)
    kept.changes = dict(reversed(kept.changes.items()))
    assert audit.hash_of(kept) == kept.hash


def test_whole_seconds_survive(owner: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    monkeypatch.setattr(audit.timezone, "now", lambda: moment)
    assert assert_survives(audit.record("a.b", actor=owner.caller)).created_at == moment


def test_texts_that_no_column_holds_are_cut(owner: Person) -> None:
    with coming_from("192.0.2.1", "r" * 99):
        event = audit.record("a.b", actor=owner.caller, label="/x\0" + "y" * 400)
    kept = assert_survives(event)
    assert (kept.target_label, kept.request_id) == ("/x\ufffd" + "y" * 317, "r" * 64)


def test_every_column_but_the_hash_is_hashed() -> None:
    columns = {field.attname for field in AuditEvent._meta.concrete_fields}
    assert set(audit.HASHED) == columns - {"hash"}


# --- Append only --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.update(action="nothing"),
        lambda rows: rows.delete(),
    ],
)
def test_the_database_refuses_to_change_an_event(change: Callable[[Any], Any]) -> None:
    event = audit.record("a.b", actor=None)
    refused = (InternalError, ProgrammingError)
    with scopes_disabled(), pytest.raises(refused, match="append-only"), transaction.atomic():
        change(AuditEvent.objects.filter(pk=event.pk))
    assert stored(event).action == "a.b"


def test_an_event_that_is_rolled_back_leaves_no_gap(owner: Person) -> None:
    before = audit.verify(owner.caller.organization.pk)
    with transaction.atomic():
        audit.record("a.b", actor=owner.caller)
        transaction.set_rollback(True)
    event = audit.record("a.c", actor=owner.caller)
    assert event.number == before.events + 1


# --- Many at once -------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_the_chain_stays_whole_when_many_write_at_once(acme: Organization) -> None:
    before = audit.verify(acme.pk).events

    def write(number: int) -> None:
        try:
            with transaction.atomic():
                audit.record(f"a.{number}", actor=None, organization=acme)
                if number % 5 == 0:  # one that fails in the end takes its number with it
                    transaction.set_rollback(True)
            audit.record("platform", actor=None)
        finally:
            connection.close()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, range(100)))
    mine, platform = audit.verify(acme.pk), audit.verify(None)
    assert (mine.events, mine.broken_at) == (before + 80, None)
    assert (platform.events, platform.broken_at) == (100, None)
