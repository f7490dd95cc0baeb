"""The pages of limits: the organization's, a person's or key's, and the operators' form."""

from __future__ import annotations

import re
from datetime import timedelta
from decimal import Decimal
from html import escape, unescape
from typing import Any

import pytest
from django.contrib.messages import get_messages
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts import ids
from accounts.models import ApiKey, Quota, Reservation, UsageRecord, User
from accounts.services.limits import set_limits
from accounts.views import limits
from tests.conftest import Person

PATH = "/organization/limits"


@pytest.fixture(autouse=True)
def _defaults(settings: Any) -> None:
    settings.RATE_LIMIT_REQUESTS = 600
    settings.RATE_LIMIT_BATCHES, settings.RATE_LIMIT_FILES = 10, 20


def path_of(person: Person) -> str:
    return f"{PATH}/{ids.user_id(person.user.pk)}"


def key_of(person: Person) -> ApiKey:
    with scopes_disabled():
        return ApiKey.objects.filter(created_by=person.user).earliest("pk")


def text_of(response: Any) -> str:
    """What the page says, without its markup."""
    main = response.content.decode().split('<main class="portal-main"', 1)[1]
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", main)).split())


def use(person: Person, *, tokens: int, cost: int = 0, days_ago: int = 0) -> None:
    caller = person.caller
    with scopes_disabled():
        UsageRecord.objects.create(
            day=timezone.now().date() - timedelta(days=days_ago),
            organization=caller.organization,
            project=caller.project,
            user=person.user,
            api_key=key_of(person),
            model="echo",
            input_tokens=tokens,
            cost=cost,
        )


def reserve(person: Person, *, tokens: int, model: str = "echo", cost: int = 0) -> None:
    caller = person.caller
    with scopes_disabled():
        Reservation.objects.create(
            batch_id=f"batch_{Reservation.objects.count()}",
            organization=caller.organization,
            project=caller.project,
            user=person.user,
            api_key=key_of(person),
            model=model,
            tokens=tokens,
            cost=cost,
        )


def limited(person: Person, *, key: bool = False, **fields: Any) -> None:
    subject: Any = {"api_key": key_of(person)} if key else {"user": person.user}
    set_limits(actor=None, organization=person.caller.organization, **subject, **fields)


# --- The organization's page ----------------------------------------------------------------


def test_it_says_what_there_is_how_much_is_used_and_who_can_raise_it(owner: Person) -> None:
    set_limits(
        actor=None,
        organization=owner.caller.organization,
        tokens_per_month=1_000,
        concurrent_batches=0,
        budget_per_month=Decimal("12.50"),
    )
    use(owner, tokens=120)
    reserve(owner, tokens=5)
    said = text_of(owner.browser.get(PATH))
    assert "Only a platform operator can change these limits" in said
    assert "New batches a minute 10 batches (the default) 0 % 0 of 10 batches 0 %" in said
    assert "Tokens a month 1,000 tokens 12 % 125 of 1,000 tokens 12 %" in said
    assert "Unfinished batches 0 batches 100 % 1 of 0 batches 100 %" in said
    assert "Enqueued tokens of one model no limit 5 tokens" in said
    assert "Money a month 12.50 USD 0 % 0.00 of 12.50 USD 0 %" in said


def test_people_and_keys_with_limits_are_listed_with_their_use(
    owner: Person, teammate: Person
) -> None:
    set_limits(
        actor=None, organization=owner.caller.organization, tokens_per_month=500, storage_bytes=10
    )
    limited(teammate, tokens_per_month=1_000, enqueued_tokens=100)
    limited(owner, key=True, concurrent_batches=4, budget_per_month=Decimal(20), storage_bytes=5)
    use(teammate, tokens=200)
    use(owner, tokens=9_999, cost=3)
    reserve(teammate, tokens=30, model="a")
    reserve(teammate, tokens=40, model="b")
    reserve(owner, tokens=1, cost=2)
    said = text_of(owner.browser.get(PATH)).partition("People and keys with limits")[2]
    assert (
        "teammate@acme.test Tokens a month 27 % 270 of 1,000 tokens 27 % No effect: the"
        " organization's 500 tokens is tighter Enqueued tokens of one model 40 % 40 of 100 tokens"
    ) in said
    assert "Unfinished batches 25 % 1 of 4 batches 25 % Storage: 5\xa0bytes".replace(
        "\xa0", " "
    ) in said.replace("\xa0", " ")
    assert "Money a month 25 % 5.00 of 20.00 USD 25 %" in said


def test_use_of_other_months_does_not_count(owner: Person) -> None:
    limited(owner, tokens_per_month=100)
    use(owner, tokens=50, days_ago=40)
    use(owner, tokens=10)
    assert "10 of 100 tokens 10 %" in text_of(owner.browser.get(PATH))


def test_who_has_no_limits_of_their_own_is_not_listed(owner: Person) -> None:
    limited(owner, tokens_per_month=1)
    limited(owner, tokens_per_month=None)
    assert "Nobody has limits of their own" in text_of(owner.browser.get(PATH))


def test_a_strangers_limits_are_not_shown(owner: Person, stranger: Person) -> None:
    limited(stranger, tokens_per_month=7_777_777)
    use(stranger, tokens=5_555_555)
    said = text_of(owner.browser.get(PATH))
    assert [word for word in ("globex", "7,777,777", "5,555,555") if word in said] == []


def test_viewers_see_it_without_what_changes_it(owner: Person, viewer: Person) -> None:
    limited(owner, tokens_per_month=1)
    page = viewer.browser.get(PATH)
    assert (page.status_code, b"Set limits for" in page.content) == (200, False)
    assert b"Set limits for" in owner.browser.get(PATH).content


def test_choosing_somebody_leads_to_their_page(owner: Person, teammate: Person) -> None:
    page = owner.browser.get(PATH)
    assert re.findall(r'<option value="(.+?)">', page.content.decode()) == [
        "owner@acme.test",
        "teammate@acme.test",
        key_of(owner).prefix,
        key_of(teammate).prefix,
    ]
    id, key = ids.user_id(teammate.user.pk), key_of(teammate)
    named = {
        id: id,
        " Teammate@acme.test ": id,
        key.pk: key.pk,
        key.prefix: key.pk,
        f"sk-vbp-{key.prefix}": key.pk,
    }
    for text, there in named.items():
        answer = owner.browser.get(PATH, {"of": text})
        assert (answer.status_code, answer["Location"]) == (302, f"{PATH}/{there}")


@pytest.mark.parametrize("text", ["nobody", "a/b", "user_0", "\0", "<b>", "user_" + "9" * 30, "."])
def test_who_is_not_there_is_told_and_kept(text: str, owner: Person) -> None:
    answer = owner.browser.get(PATH, {"of": text})
    assert answer.status_code == 400
    assert "Nobody here, and no API key, is called that." in text_of(answer)
    assert re.findall(r'name="of" value="(.*?)"', answer.content.decode()) == [escape(text)]


def test_strangers_cannot_be_chosen(owner: Person, stranger: Person) -> None:
    key = key_of(stranger)
    for text in ("stranger@globex.test", ids.user_id(stranger.user.pk), key.pk, key.prefix):
        assert owner.browser.get(PATH, {"of": text}).status_code == 400


def test_only_so_many_are_suggested(
    owner: Person, teammate: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "OFFERED", 1)
    page = owner.browser.get(PATH)
    offered = re.findall(r'<option value="(.+?)">', page.content.decode())
    assert offered == ["owner@acme.test", key_of(owner).prefix]
    assert "At most 1 people and 1 keys are suggested; others can be typed." in text_of(page)


def test_the_list_is_paged(owner: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PAGE_SIZE", 1)
    limited(owner, tokens_per_month=111)
    limited(owner, key=True, tokens_per_month=222)
    first = owner.browser.get(PATH)
    [after] = re.findall(r'after=(\d+)" rel="next"', first.content.decode())
    second = text_of(owner.browser.get(f"{PATH}?after={after}"))
    assert ("222" in text_of(first), "111" in text_of(first)) == (True, False)
    assert ("222" in second, "111" in second) == (False, True)
    assert "There is nothing older" in text_of(owner.browser.get(f"{PATH}?after=0"))
    for bad in ("x", "%00", "9" * 40, "²"):
        assert owner.browser.get(f"{PATH}?after={bad}").status_code == 200


def test_three_cost_as_many_queries_as_one(owner: Person, teammate: Person) -> None:
    limited(owner, tokens_per_month=1)
    browser = owner.browser
    browser.get(PATH)
    with CaptureQueriesContext(connection) as one:
        browser.get(PATH)
    limited(teammate, tokens_per_month=1, storage_bytes=1)
    limited(owner, key=True, tokens_per_month=1, enqueued_tokens=7)
    limited(teammate, key=True, requests_per_minute=1)
    reserve(teammate, tokens=1)
    with CaptureQueriesContext(connection) as more:
        browser.get(PATH)
    assert len(more) == len(one)


# --- One person's or key's page ---------------------------------------------------------------


def form(**fields: Any) -> dict[str, Any]:
    return dict.fromkeys(limits.LimitsForm(quota=Quota()).fields, "") | fields


def test_an_admin_sets_a_persons_limits(owner: Person, teammate: Person) -> None:
    path = path_of(teammate)
    response = owner.browser.post(path, form(tokens_per_month="500", budget_per_month="1.5"))
    assert (response.status_code, response["Location"]) == (302, path)
    [message] = get_messages(response.wsgi_request)
    assert str(message) == "The limits of teammate@acme.test are saved."
    with scopes_disabled():
        quota = Quota.objects.get()
    assert (quota.user, quota.tokens_per_month) == (teammate.user, 500)
    assert (quota.budget_per_month, quota.files_per_minute) == (Decimal("1.50"), None)
    page = owner.browser.get(path).content.decode()
    assert re.findall(r'type="number" name="(\w+)" value="(.+?)"', page) == [
        ("tokens_per_month", "500"),
        ("budget_per_month", "1.50"),
    ]


def test_an_admin_sets_a_keys_limits_with_nothing_but_zero(owner: Person) -> None:
    path = f"{PATH}/{key_of(owner).pk}"
    owner.browser.post(path, form(requests_per_minute="0"))
    with scopes_disabled():
        quota = Quota.objects.get()
    assert (quota.api_key, quota.requests_per_minute) == (key_of(owner), 0)


def test_what_was_typed_wrong_is_kept_and_nothing_saved(owner: Person) -> None:
    bad = form(tokens_per_month="-5", files_per_minute="x\0", budget_per_month="1.234")
    response = owner.browser.post(path_of(owner), bad)
    page = response.content.decode()
    assert response.status_code == 400
    assert 'value="-5"' in page
    assert page.count('class="portal-error"') == 3
    with scopes_disabled():
        assert not Quota.objects.exists()


def test_members_look_but_do_not_change(owner: Person, teammate: Person) -> None:
    limited(teammate, tokens_per_month=5)
    page = teammate.browser.get(path_of(teammate))
    assert (page.status_code, b"Change the limits" in page.content) == (200, False)
    assert teammate.browser.post(path_of(teammate), form()).status_code == 403


def test_a_limit_above_the_organizations_is_said_to_do_nothing(owner: Person) -> None:
    limited(owner, requests_per_minute=601)
    said = text_of(owner.browser.get(path_of(owner)))
    assert "601 calls No effect: the organization's 600 calls is tighter" in said
    assert "New batches a minute no limit Not counted" in said


@pytest.mark.parametrize("method", ["get", "post"])
def test_a_stranger_finds_nothing(owner: Person, stranger: Person, method: str) -> None:
    paths = [path_of(stranger), f"{PATH}/{key_of(stranger).pk}", f"{PATH}/user_0", f"{PATH}/key_0"]
    answers = [getattr(owner.browser, method)(path, form()) for path in paths]
    assert [answer.status_code for answer in answers] == [404] * 4
    with scopes_disabled():
        assert not Quota.objects.exists()


def test_reviewers_have_no_such_page(owner: Person, teammate: Person) -> None:
    with scopes_disabled():
        teammate.user.memberships.update(role="reviewer")
    assert teammate.browser.get(PATH).status_code == 403


# --- The operators' form ----------------------------------------------------------------------


def operators_browser(operator: User) -> Client:
    client = Client()
    client.force_login(operator, backend="allauth.account.auth_backends.AuthenticationBackend")
    return client


def operators_path(person: Person) -> str:
    return f"/operator/organizations/{person.caller.organization.pk}/limits"


def test_operators_set_an_organizations_limits(owner: Person, operator: User) -> None:
    browser, path = operators_browser(operator), operators_path(owner)
    assert "Empty: 600, as everybody." in text_of(browser.get(path))
    response = browser.post(path, form(requests_per_minute="900"))
    assert (response.status_code, response["Location"]) == (302, path)
    assert "900 calls" in text_of(browser.get(path))
    assert "900 calls" in text_of(owner.browser.get(PATH))
    assert browser.post(path, form(requests_per_minute="x")).status_code == 400


def test_others_have_no_operators_page(owner: Person) -> None:
    path = operators_path(owner)
    assert [owner.browser.get(path).status_code, owner.browser.post(path).status_code] == [404] * 2


def test_an_organization_that_is_not_there_is_404(operator: User) -> None:
    browser = operators_browser(operator)
    for id in ("org_0", "%00"):
        assert browser.get(f"/operator/organizations/{id}/limits").status_code == 404


# --- All --------------------------------------------------------------------------------------


def test_other_methods_are_405(owner: Person) -> None:
    assert owner.browser.post(PATH).status_code == 405
    assert owner.browser.put(path_of(owner)).status_code == 405


def test_nothing_needs_an_inline_exception_of_the_policy(owner: Person, operator: User) -> None:
    limited(owner, tokens_per_month=5)
    pages = [owner.browser.get(PATH), owner.browser.get(path_of(owner))]
    pages.append(operators_browser(operator).get(operators_path(owner)))
    for response in pages:
        found = re.findall(r"\sstyle=|<style|\son\w+=|<script(?! src=)", response.content.decode())
        assert (response.status_code, found) == (200, [])
