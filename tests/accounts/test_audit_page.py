"""The pages of the audit: an organization's, and the operators' over all of them."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
import time_machine
from django.test import Client
from django_scopes import scopes_disabled

from accounts.models import AuditEvent, Organization, User
from accounts.services import audit
from accounts.views.audit import PAGE_SIZE
from tests.accounts.test_audit_service import coming_from
from tests.batches.test_files_api import queries_of
from tests.conftest import Person

PAGE = "/organization/audit"
EXPORT = "/organization/audit.jsonl"
OPERATORS = "/operator/audit"
OPERATORS_EXPORT = "/operator/audit.jsonl"


@pytest.fixture
def staff(operator: User) -> Client:
    client = Client()
    client.force_login(operator, backend="allauth.account.auth_backends.AuthenticationBackend")
    return client


def said(client: Client, path: str = PAGE, **query: Any) -> str:
    response = client.get(path, query)
    assert response.status_code == 200, response.content
    return response.content.decode()


def ids(client: Client, path: str = PAGE, **query: Any) -> list[str]:
    return re.findall(r'<details class="portal-event" id="(\w+)"', said(client, path, **query))


def exported(client: Client, path: str = EXPORT, **query: Any) -> list[dict[str, Any]]:
    response: Any = client.get(path, query)
    assert response.status_code == 200
    return [orjson.loads(line) for line in b"".join(response.streaming_content).splitlines()]


def happened(person: Person, action: str = "a.b", **fields: Any) -> AuditEvent:
    return audit.record(action, actor=person.caller, **fields)


# --- The list -----------------------------------------------------------------------------------


def test_the_newest_event_comes_first_and_others_events_do_not(
    owner: Person, stranger: Person
) -> None:
    happened(stranger)
    mine = [happened(owner).pk for _ in range(3)]
    assert ids(owner.browser)[:3] == mine[::-1]
    with scopes_disabled():
        own = AuditEvent.objects.filter(organization=owner.caller.organization)
        assert set(ids(owner.browser)) == set(own.values_list("pk", flat=True))


def test_an_event_says_all_that_is_kept_of_it(owner: Person) -> None:
    with coming_from("192.0.2.7", "req_1"):
        event = happened(
            owner,
            "project.renamed",
            target=owner.caller.project,
            changes={"name": ["Old", "<i>new</i>"], "limit": [None, 5], "ips": [[], ["::1"]]},
        )
    page = said(owner.browser)
    text = page[page.index(f'id="{event.pk}"') :].partition("</details>")[0]
    cells = re.findall(r'<th scope="row">(.+?)</th><td.+?>(.*?)</td><td.+?>(.*?)</td>', text)
    assert sorted(cells) == [
        ("ips", "[]", "[&quot;::1&quot;]"),
        ("limit", "—", "5"),
        ("name", "Old", "&lt;i&gt;new&lt;/i&gt;"),
    ]
    facts = re.findall(r"<dt>(.+?)</dt><dd>(.+?)</dd>", text)
    assert [(name, re.sub("<.+?>", "", value)) for name, value in facts] == [
        ("How", "signed in on these pages"),
        ("From where", "192.0.2.7"),
        ("Target", f"project {owner.caller.project.pk}"),
        ("Request", "req_1"),
        ("Event", f"number {event.number}, {event.pk}"),
        ("Hash", event.hash),
    ]


def test_pages_follow_each_other_without_gaps(owner: Person) -> None:
    with time_machine.travel("2026-03-15T12:00:00Z", tick=False):  # ids are in no order then
        for _ in range(PAGE_SIZE + 10):
            happened(owner, "page.me")
    first = ids(owner.browser, action="page.me")
    link = re.search(r'href="\?(.+?)" rel="next"', said(owner.browser, action="page.me"))
    assert link
    assert link[1] == f"action=page.me&amp;after={first[-1]}"
    second = ids(owner.browser, action="page.me", after=first[-1])
    with scopes_disabled():
        newest_first = AuditEvent.objects.filter(action="page.me").order_by("-number")
        assert first + second == list(newest_first.values_list("pk", flat=True))
    assert len(first) == PAGE_SIZE


@pytest.mark.parametrize("after", ["audit_0", "\0", "nonsense"])
def test_there_is_nothing_older_than_what_is_not_there(after: str, owner: Person) -> None:
    assert ("There is nothing older" in said(owner.browser, after=after)) == (after != "\0")


def test_a_strangers_event_is_no_place_to_go_on_from(owner: Person, stranger: Person) -> None:
    happened(owner)
    assert ids(owner.browser, after=happened(stranger).pk) == []


@pytest.mark.parametrize(
    "query",
    [
        {"action": "key."},
        {"action": "key.made"},
        {"actor": "TEAM"},
        {"actor": "teammate@acme.test"},
        {"target": "nightly"},
        {"target": "key_1"},
        {"address": "2001:DB8::1"},
        {"since": "2026-03-02", "until": "2026-03-02"},
        {"action": "key", "actor": "teammate", "since": "2026-03-01"},
    ],
)
def test_filters(query: dict[str, str], owner: Person, teammate: Person) -> None:
    target = owner.caller.project.__class__(pk="key_1", name="Nightly job")
    with time_machine.travel("2026-03-01T23:59:59.999Z", tick=False):
        happened(owner, "member.invited")
    with time_machine.travel("2026-03-02T00:00:00Z", tick=False), coming_from("2001:db8::1"):
        wanted = happened(teammate, "key.made", target=target)
    with time_machine.travel("2026-03-03T00:00:00Z", tick=False):
        happened(owner, "member.invited")
    assert ids(owner.browser, **query) == [wanted.pk]
    assert [row["id"] for row in exported(owner.browser, **query)] == [wanted.pk]


@pytest.mark.parametrize("path", [PAGE, EXPORT])
@pytest.mark.parametrize("query", [{"since": "0001-01-01"}, {"until": "9999-12-31"}])
def test_the_first_day_and_the_last_are_days(
    path: str, query: dict[str, str], owner: Person
) -> None:
    assert owner.browser.get(path, query).status_code == 200


def test_a_filter_that_finds_nothing_says_so(owner: Person) -> None:
    assert "No event is like that" in said(owner.browser, action="no.such")


@pytest.mark.parametrize(
    "query", [{"address": "here"}, {"since": "soon"}, {"until": "2026-02-30"}, {"action": "x" * 65}]
)
def test_a_filter_that_makes_no_sense_is_told_and_kept(
    query: dict[str, str], owner: Person
) -> None:
    response = owner.browser.get(PAGE, query | {"actor": "owner"})
    text = response.content.decode()
    assert response.status_code == 400
    assert len(re.findall('class="portal-error"', text)) == 1
    assert 'name="actor" value="owner"' in text
    name, value = next(iter(query.items()))
    assert f'name="{name}" value="{value}"' in text


# --- Who may see it -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", [PAGE, EXPORT])
def test_only_owners_and_admins_may_see_it(
    path: str, owner: Person, teammate: Person, viewer: Person
) -> None:
    assert owner.browser.get(path).status_code == 200
    for person in (teammate, viewer):
        response = person.browser.get(path)
        assert response.status_code == 403
        assert b"an owner or admin can change your role" in response.content


@pytest.mark.django_db
@pytest.mark.parametrize("path", [PAGE, EXPORT, OPERATORS, OPERATORS_EXPORT])
def test_one_signs_in_first(path: str) -> None:
    response = Client().get(path)
    assert (response.status_code, response["Location"]) == (302, f"/accounts/login/?next={path}")


@pytest.mark.parametrize("path", [PAGE, EXPORT, OPERATORS, OPERATORS_EXPORT])
def test_other_methods_are_405(path: str, owner: Person) -> None:
    assert owner.browser.post(path).status_code == 405


def test_three_events_cost_as_many_queries_as_one(owner: Person) -> None:
    happened(owner)
    one = queries_of(owner.browser, PAGE)
    for _ in range(20):
        happened(owner)
    assert queries_of(owner.browser, PAGE) == one


def test_nothing_in_the_page_needs_an_exception_of_the_policy(owner: Person) -> None:
    happened(owner, changes={"a": [1, 2]})
    assert re.findall(r"\sstyle=|<style|\son\w+=|<script(?! src=)", said(owner.browser)) == []


# --- Export -------------------------------------------------------------------------------------


def test_the_export_can_be_checked_without_us(owner: Person, stranger: Person) -> None:
    happened(stranger)
    happened(owner, changes={"name": ["é", 1.5], "when": [None, datetime(2026, 1, 1, tzinfo=UTC)]})
    rows = exported(owner.browser)
    organization = owner.caller.organization.pk
    assert [row["number"] for row in rows] == list(range(1, len(rows) + 1))
    assert {row["organization_id"] for row in rows} == {organization}
    before = audit.GENESIS
    for row in rows:
        known = row.pop("hash")
        assert row["previous_hash"] == before
        before = hashlib.sha256(orjson.dumps(row, option=orjson.OPT_SORT_KEYS)).hexdigest()
        assert known == before
    assert before == audit.verify(organization).head


def test_the_export_is_streamed_under_a_name_of_its_own(owner: Person) -> None:
    with time_machine.travel("2026-03-15T12:00:00Z"):
        response = owner.browser.get(EXPORT)
    assert response.streaming  # type: ignore[attr-defined]
    assert response["Content-Type"] == "application/jsonl"
    assert response["Content-Disposition"] == 'attachment; filename="audit-acme-2026-03-15.jsonl"'


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ({"since": "soon"}, "From (UTC): Enter a valid date."),
        ({"address": "here"}, "IP address: Enter a valid IPv4 or IPv6 address."),
    ],
)
def test_an_export_of_what_makes_no_sense_is_refused(
    query: dict[str, str], why: str, owner: Person, staff: Client
) -> None:
    for response in (owner.browser.get(EXPORT, query), staff.get(OPERATORS_EXPORT, query)):
        assert (response.status_code, why in response.content.decode()) == (400, True)


# --- Operators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [OPERATORS, OPERATORS_EXPORT])
def test_the_operators_page_is_not_there_for_others(path: str, owner: Person) -> None:
    assert owner.browser.get(path).status_code == 404


def test_operators_see_every_chain(staff: Client, owner: Person, stranger: Person) -> None:
    events = [happened(owner), happened(stranger), audit.record("model.changed", actor=None)]
    found = ids(staff, OPERATORS)
    assert {event.pk for event in events} <= set(found)
    text = said(staff, OPERATORS)
    for name in ("Acme", "Globex", "Platform"):
        assert f'<span class="text-secondary">{name}</span>' in text


@pytest.mark.parametrize("path", [OPERATORS, OPERATORS_EXPORT])
def test_an_operators_look_is_written_into_the_chain_that_is_looked_at(
    path: str, staff: Client, operator: User, owner: Person
) -> None:
    def last(organization: Organization | None) -> tuple[str, User | None, str]:
        with scopes_disabled():
            chain = AuditEvent.objects.filter(organization=organization)
            event = chain.select_related("actor").latest("number")
        return event.action, event.actor, event.target_label

    acme = owner.caller.organization
    before = audit.verify(acme.pk).events
    staff.get(path)
    staff.get(path, {"organization": "platform"})
    assert last(None) == ("operator.looked", operator, path)
    assert (audit.verify(None).events, audit.verify(acme.pk).events) == (2, before)
    staff.get(path, {"organization": "acme"})
    assert last(acme) == ("operator.looked", operator, path)
    assert (audit.verify(None).events, audit.verify(acme.pk).events) == (2, before + 1)


@pytest.mark.parametrize("name", ["acme", "id"])
def test_operators_may_ask_for_one_chain(
    name: str, staff: Client, owner: Person, stranger: Person
) -> None:
    happened(stranger)
    acme = owner.caller.organization
    given = acme.pk if name == "id" else name
    found = ids(staff, OPERATORS, organization=given)
    exports = exported(staff, OPERATORS_EXPORT, organization=given)
    with scopes_disabled():
        chain = AuditEvent.objects.filter(organization=acme).order_by("number")
        assert set(found) == set(chain.values_list("pk", flat=True)[: len(found)])
        assert [row["id"] for row in exports] == list(chain.values_list("pk", flat=True))
    assert {row["organization_id"] for row in exports} == {acme.pk}


def test_operators_may_ask_for_the_platforms_own_chain(staff: Client, owner: Person) -> None:
    event = audit.record("model.changed", actor=None)
    assert ids(staff, OPERATORS, organization="platform")[1:] == [event.pk]


def test_an_organization_that_is_not_there_is_told(staff: Client) -> None:
    response = staff.get(OPERATORS, {"organization": "nobody"})
    assert response.status_code == 404
    assert audit.verify(None).events == 0


def test_events_of_a_purged_organization_are_listed_by_its_id(staff: Client) -> None:
    audit.record("a.b", actor=None, organization=Organization(pk="org_gone"))
    assert '<span class="text-secondary">org_gone</span>' in said(staff, OPERATORS)


def test_three_organizations_cost_the_operator_as_many_queries_as_one(
    staff: Client, owner: Person, stranger: Person
) -> None:
    one = queries_of(staff, OPERATORS)
    happened(stranger)
    happened(owner)
    assert queries_of(staff, OPERATORS) == one
