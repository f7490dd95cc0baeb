"""/v1/organization/usage/… and /costs: days, groups, filters, pages."""

from __future__ import annotations

import time
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pytest
from django.test import Client
from django_scopes import scopes_disabled

from accounts.ids import user_id
from accounts.models import ApiKey, Project
from tests.accounts.usage_rows import used
from tests.batches.test_files_api import client_with, queries_of
from tests.conftest import Person
from tests.wire import assert_refused

DAY = 86_400
FIRST = int(datetime(2026, 3, 1, tzinfo=UTC).timestamp())
COMPLETIONS = "/v1/organization/usage/completions"
EMBEDDINGS = "/v1/organization/usage/embeddings"
ALL = "/v1/organization/usage/all"
COSTS = "/v1/organization/costs"
PATHS = [COMPLETIONS, EMBEDDINGS, ALL, COSTS]


def on(day: int) -> date:
    return date(2026, 3, day)


@pytest.fixture
def reader(owner: Person) -> Client:
    """A key that may read usage and nothing else."""
    return client_with(owner.caller.organization, "usage.read")


def asked(client: Client, path: str = COMPLETIONS, **query: Any) -> dict[str, Any]:
    given = {"start_time": FIRST, "end_time": FIRST + 31 * DAY, "limit": 31} | query
    response = client.get(path, given)
    assert response.status_code == 200, response.content
    return dict(response.json())


def results(client: Client, path: str = COMPLETIONS, **query: Any) -> list[dict[str, Any]]:
    return [each for bucket in asked(client, path, **query)["data"] for each in bucket["results"]]


def test_a_day_is_answered_as_openai_does(owner: Person, reader: Client) -> None:
    used(owner, on(2))
    used(owner, on(2), "other")
    body = asked(reader, limit=2)
    assert body == {
        "object": "page",
        "data": [
            {"object": "bucket", "start_time": FIRST, "end_time": FIRST + DAY, "results": []},
            {
                "object": "bucket",
                "start_time": FIRST + DAY,
                "end_time": FIRST + 2 * DAY,
                "results": [
                    {
                        "object": "organization.usage.completions.result",
                        "input_tokens": 200,
                        "input_cached_tokens": 80,
                        "output_tokens": 20,
                        "num_model_requests": 4,
                        "project_id": None,
                        "user_id": None,
                        "api_key_id": None,
                        "model": None,
                        "batch": True,
                        "gpu_seconds": 3.0,
                    }
                ],
            },
        ],
        "has_more": True,
        "next_page": "page_20260303",
    }


def test_costs_are_answered_as_openai_does(owner: Person, reader: Client, settings: Any) -> None:
    settings.CURRENCY = "eur"
    used(owner, on(1), cost=Decimal("0.1234567891"))
    used(owner, on(1), "other", cost=Decimal(2))
    result = {
        "object": "organization.costs.result",
        "amount": {"value": 2.1234567891, "currency": "eur"},
        "line_item": None,
        "project_id": None,
        "user_id": None,
        "api_key_id": None,
    }
    assert results(reader, COSTS) == [result]
    by_item = results(reader, COSTS, group_by=["line_item"])
    assert [(each["line_item"], each["amount"]["value"]) for each in by_item] == [
        ("echo", 0.1234567891),
        ("other", 2.0),
    ]


def test_endpoints_are_told_apart(owner: Person, reader: Client) -> None:
    for endpoint, requests in (
        ("/v1/chat/completions", 1),
        ("/v1/responses", 2),
        ("/v1/embeddings", 4),
        ("/v1/rerank", 8),
        ("", 16),
    ):
        used(owner, on(1), endpoint=endpoint, requests=requests)
    found = {path: results(reader, path)[0] for path in (COMPLETIONS, EMBEDDINGS, ALL)}
    assert {path: each["num_model_requests"] for path, each in found.items()} == {
        COMPLETIONS: 19,
        EMBEDDINGS: 4,
        ALL: 31,
    }
    assert found[EMBEDDINGS] == {
        "object": "organization.usage.embeddings.result",
        "input_tokens": 100,
        "num_model_requests": 4,
        "project_id": None,
        "user_id": None,
        "api_key_id": None,
        "model": None,
        "batch": True,
        "gpu_seconds": 1.5,
    }
    assert found[ALL]["object"] == "organization.usage.all.result"


@pytest.mark.parametrize("name", ["group_by", "group_by[]"])
def test_groups_are_named_with_and_without_brackets(
    name: str, owner: Person, teammate: Person, reader: Client
) -> None:
    used(owner, on(1))
    used(teammate, on(1))
    used(teammate, on(1), "other")
    assert [each["user_id"] for each in results(reader, **{name: "user_id"})] == [
        user_id(owner.user.pk),
        user_id(teammate.user.pk),
    ]
    both = results(reader, **{name: ["model", "user_id"]})
    assert [(each["model"], each["user_id"]) for each in both] == [
        ("echo", user_id(owner.user.pk)),
        ("echo", user_id(teammate.user.pk)),
        ("other", user_id(teammate.user.pk)),
    ]
    assert len(results(reader, **{name: "batch"})) == 1


def test_groups_by_project_and_key_name_their_ids(
    owner: Person, teammate: Person, reader: Client
) -> None:
    organization = owner.caller.organization
    with scopes_disabled():
        other = Project.objects.create(organization=organization, name="Other")
        key = ApiKey.objects.get(created_by=teammate.user)
    used(owner, on(1))
    used(teammate, on(1), project=other)
    used(owner, on(1), user=None, api_key=None)
    found = results(reader, group_by=["project_id", "api_key_id"], api_key_ids=[key.pk])
    assert [(each["project_id"], each["api_key_id"]) for each in found] == [(other.pk, key.pk)]
    assert {each["project_id"] for each in results(reader, group_by="project_id")} == {
        owner.caller.project.pk,
        other.pk,
    }
    assert {each["user_id"] for each in results(reader, group_by="user_id")} == {
        None,
        user_id(owner.user.pk),
        user_id(teammate.user.pk),
    }


@pytest.mark.parametrize("brackets", ["", "[]"])
def test_filters(brackets: str, owner: Person, teammate: Person, reader: Client) -> None:
    used(owner, on(1), requests=1)
    used(teammate, on(1), "other", requests=2)

    def requests(**query: Any) -> int:
        named = {f"{name}{brackets}": value for name, value in query.items()}
        return sum(each["num_model_requests"] for each in results(reader, **named))

    assert requests(user_ids=[user_id(owner.user.pk)]) == 1
    assert requests(user_ids=[user_id(owner.user.pk), user_id(teammate.user.pk)]) == 3
    assert requests(models=["other"]) == 2
    assert requests(models=["other"], user_ids=[user_id(owner.user.pk)]) == 0
    assert requests(project_ids=[owner.caller.project.pk]) == 3
    for nobody in ("nobody", "\0", "user_²", f"user_{9**30}", ""):
        for name in ("user_ids", "models", "project_ids", "api_key_ids"):
            assert requests(**{name: [nobody]}) == 0


def test_everything_here_ran_in_a_batch(owner: Person, reader: Client) -> None:
    used(owner, on(1))
    assert len(results(reader, batch="true")) == 1
    assert results(reader, batch="false") == []


def test_the_pages_together_are_the_whole_range(owner: Person, reader: Client) -> None:
    for day in (1, 3, 4, 8, 10):
        used(owner, on(day), requests=day)
    found, page, pages = [], "", 0
    while page is not None:
        body = asked(reader, end_time=FIRST + 10 * DAY - 5, limit=4, page=page)
        found += body["data"]
        page, pages = body["next_page"], pages + 1
        assert body["has_more"] == (page is not None)
    assert pages == 3
    assert [bucket["start_time"] for bucket in found] == [FIRST + n * DAY for n in range(10)]
    used_on = [result["num_model_requests"] for bucket in found for result in bucket["results"]]
    assert used_on == [1, 3, 4, 8, 10]


def test_days_are_whole_and_end_time_is_not_among_them(owner: Person, reader: Client) -> None:
    body = asked(reader, start_time=FIRST + 5, end_time=FIRST + DAY)
    assert [bucket["start_time"] for bucket in body["data"]] == [FIRST]
    body = asked(reader, start_time=FIRST + 5, end_time=FIRST + DAY + 1)
    assert [bucket["start_time"] for bucket in body["data"]] == [FIRST, FIRST + DAY]


def test_without_an_end_it_is_now_and_seven_days_are_a_page(owner: Person, reader: Client) -> None:
    now = int(time.time())
    today = reader.get(COSTS, {"start_time": now}).json()
    assert ([each["start_time"] for each in today["data"]], today["has_more"]) == (
        [now - now % DAY],
        False,
    )
    month = reader.get(COSTS, {"start_time": now - 30 * DAY}).json()
    assert (len(month["data"]), month["has_more"]) == (7, True)


@pytest.mark.parametrize("path", PATHS)
def test_a_stranger_sees_only_their_own(
    path: str, owner: Person, stranger: Person, reader: Client
) -> None:
    used(stranger, on(1), endpoint="/v1/embeddings")
    used(stranger, on(1))
    assert results(reader, path) == []
    assert results(reader, path, project_ids=[stranger.caller.project.pk]) == []
    assert len(results(client_with(stranger.caller.organization, "usage.read"), path)) == 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"start_time": ""}, "start_time"),
        ({"start_time": "soon"}, "start_time"),
        ({"start_time": -1}, "start_time"),
        ({"start_time": 10**15}, "start_time"),
        ({"start_time": "9" * 5_000}, "start_time"),
        ({"end_time": FIRST}, "end_time"),
        ({"end_time": 0}, "end_time"),
        ({"bucket_width": "1h"}, "bucket_width"),
        ({"bucket_width": "1m"}, "bucket_width"),
        ({"bucket_width": "1y"}, "bucket_width"),
        ({"limit": 0}, "limit"),
        ({"limit": 181}, "limit"),
        ({"page": "x"}, "page"),
        ({"page": "page_20260230"}, "page"),
        ({"page": "page_20260228"}, "page"),
        ({"page": "page_99991231"}, "page"),
        ({"page": "page_00000000"}, "page"),
        ({"page": "page_\0"}, "page"),
        ({"group_by": "colour"}, "group_by.0"),
        ({"group_by[]": "colour"}, "group_by[].0"),
        ({"user_ids": ["1"] * 101}, "user_ids"),
    ],
)
def test_what_makes_no_sense_is_refused(
    path: str, query: dict[str, Any], param: str, reader: Client
) -> None:
    given = {"start_time": FIRST, "end_time": FIRST + DAY} | query
    response = reader.get(path, given)
    code = None if response.json()["error"]["code"] is None else "invalid_value"
    assert_refused(response, 400, param, code)


def test_the_reason_for_days_is_given(reader: Client) -> None:
    response = reader.get(COSTS, {"start_time": FIRST, "bucket_width": "1h"})
    said = "Usage is kept by day: bucket_width can only be '1d'."
    assert response.json()["error"]["message"] == said


@pytest.mark.parametrize("path", PATHS)
def test_start_time_is_required(path: str, reader: Client) -> None:
    assert_refused(reader.get(path), 400, "start_time", "missing_required_parameter")


@pytest.mark.parametrize("path", PATHS)
def test_three_years_cost_as_many_queries_as_a_day(
    path: str, owner: Person, teammate: Person, reader: Client
) -> None:
    query = f"{path}?start_time={FIRST}&group_by=project_id&limit=180"
    used(owner, on(1))
    one = queries_of(reader, query)
    for day in range(2, 30):
        used(teammate, on(day))
    assert queries_of(reader, query) == one


@pytest.mark.parametrize("path", PATHS)
def test_a_key_without_the_scope_is_refused(path: str, owner: Person) -> None:
    other = client_with(owner.caller.organization, "files", "batches")
    assert_refused(other.get(path, {"start_time": 1}), 403, None, "insufficient_scope")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_another_method_is_not_allowed(method: str, path: str, reader: Client) -> None:
    assert_refused(reader.generic(method, path), 405, None, "method_not_allowed")
