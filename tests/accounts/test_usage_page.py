"""The usage page, its CSV, and the command that prints the same."""

from __future__ import annotations

import csv
import io
import re
from datetime import date, timedelta
from decimal import Decimal
from typing import Any

import orjson
import pytest
import time_machine
from django.core.management import CommandError, call_command
from django.test import Client
from django_scopes import scopes_disabled

from accounts.ids import user_id
from accounts.keys import redacted
from accounts.models import ApiKey, Project
from accounts.views.usage import money
from tests.accounts.usage_rows import used
from tests.batches.test_files_api import queries_of
from tests.conftest import Person

PAGE = "/organization/usage"
CSV = "/organization/usage.csv"
TODAY = date(2026, 3, 15)
SUMS = ["batches", "requests", "input_tokens", "cached_tokens", "output_tokens"]
SUMS += ["reasoning_tokens", "gpu_seconds", "cost", "currency"]


@pytest.fixture(autouse=True)
def now() -> Any:
    with time_machine.travel("2026-03-15T12:00:00Z", tick=True):
        yield


def ago(days: int) -> date:
    return TODAY - timedelta(days=days)


def shown(client: Client, **query: Any) -> str:
    response = client.get(PAGE, query)
    assert response.status_code == 200
    return response.content.decode()


def totals(said: str) -> list[str]:
    return re.findall(r"<div><dt>.+?</dt><dd>(.+?)</dd></div>", said)


def lines(said: str, by: str) -> list[list[str]]:
    """The cells of one table, line by line."""
    table = re.search(rf'id="table-{by}".+?<tbody>(.+?)</tbody>', said, re.S)
    assert table
    plain = [re.findall(r"<td.*?>(.+?)</td>", row) for row in table[1].split("</tr>")[:-1]]
    return [[re.sub(r"<.+?>", "", cell) for cell in row] for row in plain]


def charted(said: str) -> dict[str, Any]:
    found = re.search(r'<script id="usage" type="application/json">(.+?)</script>', said)
    assert found
    return dict(orjson.loads(found[1]))


def rows_of(client: Client, **query: Any) -> list[list[str]]:
    response: Any = client.get(CSV, query)
    assert response.status_code == 200
    content = b"".join(response.streaming_content).decode()
    return list(csv.reader(io.StringIO(content, newline="")))


# --- What is shown ------------------------------------------------------------------------------


def test_the_totals_are_of_the_last_thirty_days(owner: Person) -> None:
    used(owner, ago(30))
    used(owner, ago(29), gpu_seconds=5400)
    used(owner, ago(0), "other", cost=Decimal("1000"))
    assert totals(shown(owner.browser)) == ["4", "200", "80", "20", "1.50", "1,000.50 USD"]


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ({}, 3),
        ({"range": "7"}, 1),
        ({"range": "30"}, 3),
        ({"range": "90"}, 4),
        ({"range": "month"}, 2),
        ({"range": "nonsense"}, 3),
        ({"since": "2025-12-01", "until": "2026-02-14"}, 2),
        ({"since": "2026-03-15", "until": "2026-03-15"}, 1),
    ],
)
def test_the_days_may_be_chosen(query: dict[str, str], count: int, owner: Person) -> None:
    for days in (0, 14, 29, 89):
        used(owner, ago(days), requests=1)
    assert totals(shown(owner.browser, **query))[0] == str(count)


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ({"since": "2026-03-02", "until": "2026-03-01"}, "This day is before the first one."),
        ({"since": "2025-03-01", "until": "2026-03-02"}, "At most 366 days at once."),
        ({"since": "soon", "until": "2026-03-02"}, "Enter a valid date."),
        ({"since": "2026-03-02"}, "This field is required."),
        ({"since": "\0", "until": "2026-03-02"}, "Enter a valid date."),
    ],
)
def test_days_that_make_no_sense_are_told_and_kept(
    query: dict[str, str], why: str, owner: Person
) -> None:
    used(owner, ago(1))
    response = owner.browser.get(PAGE, query)
    said = response.content.decode()
    assert response.status_code == 400
    assert re.findall(r'class="portal-error" id="\w+">(.+?)<', said) == [why]
    if "\0" not in query["since"]:
        assert f'name="since" value="{query["since"]}"' in said
    assert totals(said)[0] == "2"
    refused = owner.browser.get(CSV, query)
    assert (refused.status_code, why in refused.content.decode()) == (400, True)


def test_the_tables_name_whose_it_was_with_the_most_tokens_first(
    owner: Person, teammate: Person
) -> None:
    with scopes_disabled():
        other = Project.objects.create(organization=owner.caller.organization, name="Other")
        key = ApiKey.objects.get(created_by=teammate.user)
    used(owner, ago(1))
    used(owner, ago(2), "big", project=other, user=None, api_key=None, input_tokens=5_000)
    used(teammate, ago(2))
    said = shown(owner.browser)
    numbers = ["2", "100", "40", "10", "0.00", "0.50 USD"]
    doubled = ["4", "200", "80", "20", "0.00", "1.00 USD"]
    large = ["2", "5,000", "40", "10", "0.00", "0.50 USD"]
    assert lines(said, "model") == [["big", *large], ["echo", *doubled]]
    assert lines(said, "project") == [["Other", *large], ["Default", *doubled]]
    assert lines(said, "user") == [
        ["Service keys belong to no person", *large],
        ["owner@acme.test", *numbers],
        ["teammate@acme.test", *numbers],
    ]
    assert [row[0] for row in lines(said, "key")] == [
        "No key used from these pages",
        f"owner@acme.test {redacted(owner.key.split('-')[2])}",
        f"teammate@acme.test {redacted(key.prefix)}",
    ]
    assert [row[:3] for row in lines(said, "day")] == [
        ["14 Mar 2026", "2", "100"],
        ["13 Mar 2026", "4", "5,100"],
    ]


def test_long_tables_end_with_a_word_of_the_rest(owner: Person) -> None:
    for number in range(23):
        used(owner, ago(1), f"m{number:02}")
    said = shown(owner.browser)
    assert len(lines(said, "model")) == 20
    assert "3 more with fewer tokens are in the CSV." in said
    assert len(rows_of(owner.browser, by="model")) == 24


def test_the_charts_have_every_day_and_the_busiest_models(owner: Person) -> None:
    for number in range(9):
        used(owner, ago(1), f"m{number}", input_tokens=1000 - number, output_tokens=0)
    data = charted(shown(owner.browser, range="7"))
    assert data["days"] == ["9 Mar", "10 Mar", "11 Mar", "12 Mar", "13 Mar", "14 Mar", "15 Mar"]
    assert [each["label"] for each in data["tokens"]] == [
        *[f"m{number}" for number in range(7)],
        "Other models",
    ]
    assert data["tokens"][0]["data"] == [0, 0, 0, 0, 0, 1000, 0]
    assert data["tokens"][-1]["data"] == [0, 0, 0, 0, 0, 993 + 992, 0]
    assert data["second"] == {"label": "Cost (USD)", "data": [0, 0, 0, 0, 0, 4.5, 0]}


def test_without_prices_the_second_chart_is_of_requests(owner: Person) -> None:
    used(owner, TODAY, cost=0)
    data = charted(shown(owner.browser, range="7"))
    assert data["second"] == {"label": "Requests", "data": [0, 0, 0, 0, 0, 0, 2]}


def test_the_currency_is_a_setting(owner: Person, settings: Any) -> None:
    settings.CURRENCY = "eur"
    used(owner, TODAY)
    assert totals(shown(owner.browser))[-1] == "0.50 EUR"


@pytest.mark.parametrize(
    ("cost", "said"),
    [
        ("0", "0.00"),
        ("0E-10", "0.00"),
        ("0.1", "0.10"),
        ("0.123456789", "0.123457"),
        ("0.0000001", "0.00"),
        ("1", "1.00"),
        ("1234567.891", "1,234,567.89"),
    ],
)
def test_money(cost: str, said: str) -> None:
    assert money(Decimal(cost)) == said


def test_names_are_escaped_on_the_page(owner: Person) -> None:
    used(owner, TODAY, '</script><img src=x onerror="alert(1)">')
    said = shown(owner.browser)
    assert "<img" not in said
    assert charted(said)["tokens"][0]["label"].startswith("</script><img")


# --- Nothing yet --------------------------------------------------------------------------------


def test_where_nothing_was_used_the_page_says_what_to_do(owner: Person, stranger: Person) -> None:
    used(stranger, TODAY)
    said = shown(owner.browser)
    assert "Nothing has been used yet" in said
    assert "chart.umd" not in said
    used(owner, ago(200))
    said = shown(owner.browser)
    assert "Nothing was used on these days" in said
    assert "27 August 2025" in said


# --- Who may see it -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", [PAGE, CSV])
def test_viewers_may_see_it_and_strangers_see_their_own(
    path: str, owner: Person, viewer: Person, stranger: Person
) -> None:
    used(owner, TODAY, "acmes")
    used(stranger, TODAY, "globexs")
    for person, own, foreign in ((viewer, b"acmes", b"globexs"), (stranger, b"globexs", b"acmes")):
        response: Any = person.browser.get(path)
        content = b"".join(response.streaming_content) if path == CSV else response.content
        assert (own in content, foreign in content) == (True, False)


@pytest.mark.parametrize("path", [PAGE, CSV])
def test_reviewers_may_not_see_it(path: str, reviewer: Person) -> None:
    assert reviewer.browser.get(path).status_code == 403


@pytest.mark.django_db
@pytest.mark.parametrize("path", [PAGE, CSV])
def test_one_signs_in_first(path: str) -> None:
    response = Client().get(path)
    assert (response.status_code, response["Location"]) == (302, f"/accounts/login/?next={path}")


@pytest.mark.parametrize("path", [PAGE, CSV])
def test_other_methods_are_405(path: str, owner: Person) -> None:
    assert owner.browser.post(path).status_code == 405


def test_three_models_on_many_days_cost_as_many_queries_as_one(
    owner: Person, teammate: Person
) -> None:
    used(owner, TODAY)
    one = queries_of(owner.browser, PAGE)
    for days in range(20):
        used(owner, ago(days), "second")
        used(teammate, ago(days), "third")
    assert queries_of(owner.browser, PAGE) == one


def test_scripts_are_files_of_our_own(owner: Person) -> None:
    used(owner, TODAY)
    said = shown(owner.browser)
    found = re.findall(r"<script(?! src=)(.*?)>|\sstyle=|<style|\son\w+=", said)
    assert found == [' id="usage" type="application/json"']


# --- CSV ----------------------------------------------------------------------------------------


def test_each_table_comes_as_csv(owner: Person, teammate: Person) -> None:
    used(owner, ago(1), "m1", reasoning_tokens=3)
    used(teammate, ago(2), "m2", cost=Decimal("0.0000000001"))
    assert rows_of(owner.browser, by="model") == [
        ["model", *SUMS],
        ["m1", "1", "2", "100", "40", "10", "3", "1.5", "0.5000000000", "usd"],
        ["m2", "1", "2", "100", "40", "10", "0", "1.5", "1E-10", "usd"],
    ]
    people = [row[:2] for row in rows_of(owner.browser, by="user")]
    assert people == [
        ["user_id", "email"],
        [user_id(owner.user.pk), "owner@acme.test"],
        [user_id(teammate.user.pk), "teammate@acme.test"],
    ]
    assert [row[0] for row in rows_of(owner.browser, by="day")] == [
        "day",
        "2026-03-13",
        "2026-03-14",
    ]


def test_the_whole_csv_has_a_line_for_each_record_of_the_days(owner: Person) -> None:
    used(owner, ago(8))
    used(owner, ago(1), endpoint="/v1/embeddings")
    used(owner, ago(1), user=None, api_key=None)
    header, *rows = rows_of(owner.browser, range="7", by="nonsense")
    assert header[:10] == [
        "day",
        "project_id",
        "project_name",
        "user_id",
        "email",
        "api_key_id",
        "key_name",
        "key_prefix",
        "model",
        "endpoint",
    ]
    assert sorted((row[0], row[4], row[9]) for row in rows) == [
        ("2026-03-14", "", "/v1/chat/completions"),
        ("2026-03-14", "owner@acme.test", "/v1/embeddings"),
    ]


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_name_becomes_a_formula(start: str, owner: Person) -> None:
    name = f'{start}cmd|" /C calc"!A0'
    used(owner, TODAY, name)
    assert [row[0] for row in rows_of(owner.browser, by="model")] == ["model", f"'{name}"]


def test_the_csv_is_named_after_what_is_in_it(owner: Person) -> None:
    response = owner.browser.get(CSV, {"range": "month", "by": "user"})
    assert response["Content-Type"] == "text/csv; charset=utf-8"
    name = "usage-acme-2026-03-01-2026-03-15-by-user.csv"
    assert response["Content-Disposition"] == f'attachment; filename="{name}"'
    assert response.streaming  # type: ignore[attr-defined]


# --- The command --------------------------------------------------------------------------------


def printed(*arguments: str) -> list[str]:
    out = io.StringIO()
    call_command("usage", *arguments, stdout=out)
    return out.getvalue().splitlines()


def test_the_command_prints_the_month_by_model(owner: Person) -> None:
    used(owner, ago(20), "old")
    used(owner, ago(1))
    used(owner, ago(2), "a-model-with-a-long-name", input_tokens=1_000_000)
    assert printed("--org=acme") == [
        "2026-03-01 to 2026-03-15",
        "Model                     Requests  Tokens in  Cached  Tokens out  GPU hours  Cost",
        "a-model-with-a-long-name         2  1,000,000      40          10       0.00  0.50 USD",
        "echo                             2        100      40          10       0.00  0.50 USD",
        "All                              4  1,000,100      80          20       0.00  1.00 USD",
    ]


def test_the_command_takes_a_first_day_and_prints_csv(owner: Person) -> None:
    used(owner, ago(20), "old")
    out = printed("--org=acme", "--since=2026-02-01", "--csv")
    rows = list(csv.reader(out))
    assert rows[0][-9:] == SUMS
    assert [row[8] for row in rows[1:]] == ["old"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--org=nobody"], "There is no organization 'nobody'."),
        (["--org=acme", "--since=soon"], "--since takes a day as 2026-01-31, not 'soon'."),
        (["--org=acme", "--since=2026-03-16"], "--since is after today."),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], why: str, owner: Person) -> None:
    with pytest.raises(CommandError) as caught:
        printed(*arguments)
    assert str(caught.value) == why
