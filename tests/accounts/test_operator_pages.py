"""Operators' pages of people, of usage across organizations, and of limits within the list."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django_scopes import scopes_disabled

from accounts.errors import BadRequest
from accounts.models import AuditEvent, Organization, Quota, User
from accounts.services.limits import set_limits
from accounts.services.people import decide as decide_about
from accounts.views import operator as views
from tests.accounts.usage_rows import used
from tests.conftest import Person

PEOPLE, USAGE, LIST = "/operator/people", "/operator/usage", "/operator/organizations"
HTMX = {"HX-Request": "true"}
TODAY = datetime.now(UTC).date()


@pytest.fixture
def desk(operator: User) -> Client:
    client = Client()
    client.force_login(operator, backend="allauth.account.auth_backends.AuthenticationBackend")
    return client


def text(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def people(desk: Client, query: str = "") -> list[str]:
    page = desk.get(f"{PEOPLE}{query}").content.decode()
    return re.findall(r'<span class="fw-semibold">(.+?)</span>', page)


def ranked(desk: Client, query: str = "") -> list[str]:
    page = desk.get(f"{USAGE}{query}").content.decode()
    return re.findall(r'\d\. <a class="fw-semibold" href=".+?">(.+?)</a>', page)


def queries_of(desk: Client, path: str) -> int:
    with CaptureQueriesContext(connection) as found:
        desk.get(path)
    return len(found)


# --- People ---------------------------------------------------------------------------------


def test_people_are_listed_with_where_they_belong(
    desk: Client, owner: Person, teammate: Person, stranger: Person
) -> None:
    assert people(desk) == [
        "stranger@globex.test",
        "teammate@acme.test",
        "owner@acme.test",
        "operator@portal.test",
    ]
    said = text(desk.get(f"{PEOPLE}?q=TEAMmate").content.decode())
    assert "teammate@acme.test Acme member" in said
    assert people(desk, "?q=globex") == ["stranger@globex.test"]
    assert "Nobody is like this" in desk.get(f"{PEOPLE}?q=nobody").content.decode()


def test_people_are_paged_by_key(
    desk: Client, owner: Person, stranger: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "PAGE_SIZE", 2)
    page = desk.get(PEOPLE).content.decode()
    older = re.search(r'href="(\?after=\d+)"', page)
    assert older
    assert len(people(desk)) == 2
    assert len(people(desk, older[1])) == 1


@pytest.mark.parametrize("query", ["q=%00", "after=%00", "after=x", "after=" + "9" * 40])
def test_any_query_for_people_is_an_answer(query: str, desk: Client) -> None:
    assert desk.get(f"{PEOPLE}?{query}").status_code == 200


def test_the_queries_for_people_do_not_grow(desk: Client, owner: Person) -> None:
    queries_of(desk, PEOPLE)
    of_one = queries_of(desk, f"{PEOPLE}?q=owner")
    for name in ("a", "b"):
        User.objects.create_user(f"{name}@x.test")
    assert queries_of(desk, PEOPLE) == of_one


def decide(desk: Client, person: User, decision: str) -> str:
    answer = desk.post(f"{PEOPLE}/{person.pk}?q=acme", {"decision": decision}, follow=True)
    assert answer.redirect_chain == [(f"{PEOPLE}?q=acme", 302)]
    return text(answer.content.decode())


def test_a_person_is_shut_out_and_let_in_again(desk: Client, teammate: Person) -> None:
    assert teammate.api.get("/v1/batches").status_code == 200
    assert "teammate@acme.test is shut out" in decide(desk, teammate.user, "shut_out")
    assert teammate.browser.get("/batches")["Location"].startswith("/accounts/login/")
    assert teammate.api.get("/v1/batches").status_code == 401
    assert "shut out: let them in first" in decide(desk, teammate.user, "made_operator")

    assert "may sign in again" in decide(desk, teammate.user, "let_in")
    decide(desk, teammate.user, "let_in")
    assert teammate.api.get("/v1/batches").status_code == 200
    assert decisions() == ["person.shut_out", "person.let_in"]


def test_operators_make_operators_but_decide_nothing_about_themselves(
    desk: Client, operator: User, teammate: Person
) -> None:
    assert "is an operator now" in decide(desk, teammate.user, "made_operator")
    assert teammate.browser.get(PEOPLE).status_code == 200
    for decision in ("made_no_operator", "shut_out"):
        assert "it is about yourself" in decide(desk, operator, decision)
    assert "is no operator any more" in decide(desk, teammate.user, "made_no_operator")
    assert teammate.browser.get(PEOPLE).status_code == 404
    operator.refresh_from_db()
    assert (operator.is_staff, operator.is_active) == (True, True)
    assert decisions() == ["person.made_operator", "person.made_no_operator"]


def test_who_was_an_operator_a_moment_ago_decides_nothing(operator: User, teammate: Person) -> None:
    stale = User.objects.get(pk=operator.pk)
    User.objects.filter(pk=operator.pk).update(is_staff=False)
    with pytest.raises(BadRequest):
        decide_about("shut_out", actor=stale, person_id=teammate.user.pk)


def test_only_operators_decide_and_only_what_there_is(
    desk: Client, owner: Person, teammate: Person
) -> None:
    path = f"{PEOPLE}/{teammate.user.pk}"
    assert owner.browser.post(path, {"decision": "shut_out"}).status_code == 404
    assert desk.post(path, {"decision": "crowned"}).status_code == 404
    assert desk.post(f"{PEOPLE}/999999", {"decision": "shut_out"}).status_code == 404
    assert desk.get(path).status_code == 405
    assert decisions() == []


def decisions() -> list[str]:
    with scopes_disabled():
        found = AuditEvent.objects.filter(action__startswith="person.").order_by("number")
        return list(found.values_list("action", flat=True))


# --- Usage ----------------------------------------------------------------------------------


def test_organizations_are_ranked_by_tokens_cost_and_gpu_time(
    desk: Client, owner: Person, stranger: Person
) -> None:
    used(owner, TODAY, input_tokens=900, cost=Decimal(1), gpu_seconds=10)
    used(stranger, TODAY, input_tokens=80, cost=Decimal(9), gpu_seconds=5)
    used(stranger, TODAY - timedelta(days=60), input_tokens=10_000, gpu_seconds=1)
    assert ranked(desk) == ["Acme", "Globex"]
    assert ranked(desk, "?by=cost") == ["Globex", "Acme"]
    assert ranked(desk, "?by=gpu") == ["Acme", "Globex"]
    assert ranked(desk, "?range=90") == ["Globex", "Acme"]
    assert "2 910 0.00 1.00 USD 91 %" in text(desk.get(USAGE).content.decode())


def test_without_usage_it_says_so_and_bad_days_are_refused(desk: Client) -> None:
    assert "Nothing was used on these days" in desk.get(USAGE).content.decode()
    assert desk.get(f"{USAGE}?since=x&until=2026-01-01").status_code == 400


def test_the_queries_for_usage_do_not_grow(desk: Client, owner: Person, stranger: Person) -> None:
    used(owner, TODAY)
    queries_of(desk, USAGE)
    of_one = queries_of(desk, USAGE)
    used(stranger, TODAY)
    used(owner, TODAY - timedelta(days=1))
    assert queries_of(desk, USAGE) == of_one


# --- Limits within the list -------------------------------------------------------------------


def test_limits_are_shown_and_edited_within_the_list(
    desk: Client, operator: User, acme: Organization
) -> None:
    set_limits(actor=operator, organization=acme, concurrent_batches=5)
    assert "Unfinished batches: 5" in text(desk.get(LIST).content.decode())
    path = f"{LIST}/{acme.pk}/limits"
    form = desk.get(path, headers=HTMX).content.decode()
    assert form.lstrip().startswith("<form")
    assert 'name="concurrent_batches" value="5"' in form
    assert f'data-empty="limits-{acme.pk}"' in form
    refused = desk.post(path, {"concurrent_batches": "many"}, headers=HTMX)
    assert refused.status_code == 200
    assert "Enter a whole number." in refused.content.decode()
    saved = desk.post(path, {"concurrent_batches": 6}, headers=HTMX).content.decode()
    assert "The limits of Acme are saved." in saved
    cell = saved.partition(f'<div id="own-limits-{acme.pk}" hx-swap-oob="true">')[2]
    assert "Unfinished batches: 6" in text(cell)
    assert f'<div id="own-limits-{acme.pk}">' in desk.get(LIST).content.decode()
    with scopes_disabled():
        assert Quota.objects.get(organization=acme).concurrent_batches == 6
        found = AuditEvent.objects.filter(organization=acme, via="operator").order_by("number")
        assert list(found.values_list("action", flat=True)) == [
            "limits.changed",
            "operator.looked",
            "operator.looked",
            "limits.changed",
        ]


def test_two_forms_of_the_list_share_no_id(
    desk: Client, acme: Organization, globex: Organization
) -> None:
    found = []
    for organization in (acme, globex):
        form = desk.get(f"{LIST}/{organization.pk}/limits", headers=HTMX).content.decode()
        ids = re.findall(r' id="(.+?)"', form)
        assert set(re.findall(r' for="(.+?)"', form)) <= set(ids)
        assert {id for each in re.findall(r'describedby="(.+?)"', form) for id in each.split()} <= (
            set(ids)
        )
        found += ids
    assert len(found) == len(set(found)) > 20


@pytest.mark.parametrize("path", [PEOPLE, USAGE])
def test_others_are_not_let_in(path: str, owner: Person) -> None:
    assert owner.browser.get(path).status_code == 404
    assert Client().get(path)["Location"].startswith("/accounts/login/")
