"""Rate limits of the API: what is counted for whom, what is said, and Redis being away.

That several processes count together is in `test_rate_limits_processes.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import time_machine
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django_scopes import scopes_disabled
from structlog.testing import capture_logs

from accounts import throttling
from accounts.models import ApiKey, Quota
from accounts.services import keys
from portal import embedded
from tests.batches.conftest import Disk, disk  # noqa: F401 a fixture
from tests.conftest import Person
from tests.wire import batch_body, error_of, post, upload, uploaded

LIMIT, REMAINING, RESET = (
    f"x-ratelimit-{name}-requests" for name in ("limit", "remaining", "reset")
)
HEADERS = (LIMIT, REMAINING, RESET)
SERVED = "/v1/models"
ANYWHERE = iter(range(1, 250))


@pytest.fixture(autouse=True)
def _one_minute() -> Iterator[None]:
    """The clock stands, so that no minute ends within a test."""
    with time_machine.travel(datetime.now(UTC), tick=False):
        yield


@pytest.fixture
def address() -> dict[str, Any]:
    """A network address that no other test calls from."""
    return {"REMOTE_ADDR": f"198.51.100.{next(ANYWHERE)}"}


def limited(person: Person, *, user: bool = False, key: bool = False, **fields: int) -> None:
    with scopes_disabled():
        Quota.objects.create(
            organization=person.caller.organization,
            user=person.user if user else None,
            api_key=ApiKey.objects.get(created_by=person.user) if key else None,
            **fields,
        )


def statuses(person: Person, calls: int) -> list[int]:
    api = person.api
    return [api.get(SERVED).status_code for _ in range(calls)]


def left(response: Any) -> tuple[str, str]:
    return response[LIMIT], response[REMAINING]


# --- What is counted ------------------------------------------------------------------------


def test_without_limits_of_its_own_an_organization_has_the_default(
    owner: Person, settings: Any
) -> None:
    settings.RATE_LIMIT_REQUESTS = 3
    assert statuses(owner, 5) == [200, 200, 200, 429, 429]


def test_an_organizations_own_limit_replaces_the_default(owner: Person, settings: Any) -> None:
    settings.RATE_LIMIT_REQUESTS = 1
    limited(owner, requests_per_minute=2)
    assert statuses(owner, 3) == [200, 200, 429]


def test_all_of_an_organization_count_together_and_no_one_else(
    owner: Person, teammate: Person, stranger: Person
) -> None:
    limited(owner, requests_per_minute=2)
    assert statuses(owner, 1) + statuses(teammate, 2) == [200, 200, 429]
    assert statuses(stranger, 1) == [200]


def test_a_persons_limit_holds_for_all_of_their_keys_and_for_nobody_else(
    owner: Person, teammate: Person
) -> None:
    _, second = keys.create_api_key(
        project=owner.caller.project, name="second", created_by=owner.user
    )
    limited(owner, user=True, requests_per_minute=2)
    other = Client(headers={"authorization": f"Bearer {second}"})
    answers = [owner.api.get(SERVED), other.get(SERVED), owner.api.get(SERVED), other.get(SERVED)]
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
    assert statuses(teammate, 1) == [200]


def test_a_keys_limit_holds_for_that_key_alone(owner: Person) -> None:
    limited(owner, key=True, requests_per_minute=1)
    _, second = keys.create_api_key(
        project=owner.caller.project, name="second", created_by=owner.user
    )
    assert statuses(owner, 2) == [200, 429]
    other = Client(headers={"authorization": f"Bearer {second}"})
    assert other.get(SERVED).status_code == 200


@pytest.mark.parametrize("tightest", ["organization", "user", "api_key"])
def test_the_tightest_limit_wins_and_is_the_one_that_is_told(owner: Person, tightest: str) -> None:
    room = {"organization": 50, "user": 50, "api_key": 50} | {tightest: 2}
    limited(owner, requests_per_minute=room["organization"])
    limited(owner, user=True, requests_per_minute=room["user"])
    limited(owner, key=True, requests_per_minute=room["api_key"])
    assert left(owner.api.get(SERVED)) == ("2", "1")
    assert statuses(owner, 2) == [200, 429]


def test_a_limit_above_the_organizations_gives_nothing(owner: Person) -> None:
    limited(owner, requests_per_minute=1)
    limited(owner, user=True, requests_per_minute=50)
    assert statuses(owner, 2) == [200, 429]


def test_what_a_keys_limit_refuses_does_not_count_against_the_organization(
    owner: Person, teammate: Person
) -> None:
    limited(owner, requests_per_minute=2)
    limited(owner, key=True, requests_per_minute=1)
    assert statuses(owner, 4) == [200, 429, 429, 429]
    assert statuses(teammate, 2) == [200, 429]


def test_no_calls_at_all_may_be_allowed(owner: Person) -> None:
    limited(owner, user=True, requests_per_minute=0)
    refused = owner.api.get(SERVED)
    assert (refused.status_code, left(refused)) == (429, ("0", "0"))
    said = error_of(refused)["message"]
    assert said.startswith("You may make no calls of the API. An owner or admin of your")


def test_new_batches_are_limited_besides(owner: Person, settings: Any, disk: Disk) -> None:  # noqa: F811
    settings.RATE_LIMIT_BATCHES = 1
    api = owner.api
    body = batch_body(uploaded(api))
    first, second = post(api, "/v1/batches", body), post(api, "/v1/batches", body)
    assert (first.status_code, left(first)) == (200, ("1", "0"))
    assert (second.status_code, left(second)) == (429, ("1", "0"))
    assert api.get("/v1/batches").status_code == 200
    assert post(api, f"/v1/batches/{first.json()['id']}/cancel", {}).status_code == 200


def test_new_files_and_uploads_are_limited_together(
    owner: Person,
    settings: Any,
    disk: Disk,  # noqa: F811
) -> None:
    settings.RATE_LIMIT_FILES = 2
    api = owner.api
    begin = {"filename": "a.jsonl", "purpose": "batch", "bytes": 1, "mime_type": "text/plain"}
    answers = [upload(api), post(api, "/v1/uploads", begin), upload(api)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert api.get("/v1/files").status_code == 200


def test_a_refused_file_is_not_even_read(owner: Person, disk: Disk, monkeypatch: Any) -> None:  # noqa: F811
    def read(*_: Any) -> None:
        raise AssertionError("the body was read")

    limited(owner, files_per_minute=0)
    monkeypatch.setattr("django.http.HttpRequest._load_post_and_files", read)
    assert upload(owner.api).status_code == 429


def test_a_changed_limit_holds_at_once_for_what_was_counted_before(owner: Person) -> None:
    limited(owner, requests_per_minute=2)
    assert statuses(owner, 3) == [200, 200, 429]
    with scopes_disabled():
        Quota.objects.update(requests_per_minute=5)
    assert statuses(owner, 3) == [200, 200, 429]


def test_the_next_minute_is_a_new_one(owner: Person) -> None:
    limited(owner, requests_per_minute=1)
    assert statuses(owner, 2) == [200, 429]
    with time_machine.travel(datetime.now(UTC).timestamp() + 60, tick=False):
        assert statuses(owner, 2) == [200, 429]


def test_counting_costs_one_query_whatever_is_limited(owner: Person) -> None:
    path, api = SERVED, owner.api
    api.get(path)  # also notes the key's use
    with CaptureQueriesContext(connection) as without:
        api.get(path)
    limited(owner, requests_per_minute=50)
    limited(owner, user=True, requests_per_minute=50)
    limited(owner, key=True, requests_per_minute=50)
    with CaptureQueriesContext(connection) as with_all:
        api.get(path)
    assert [str(q["sql"]).count("accounts_quota") > 0 for q in with_all].count(True) == 1
    assert len(with_all) == len(without)


# --- What is said ---------------------------------------------------------------------------


def test_a_refusal_says_whose_limit_it_is_and_who_can_raise_it(owner: Person) -> None:
    limited(owner, requests_per_minute=0, batches_per_minute=3)
    limited(owner, key=True, batches_per_minute=1)
    with scopes_disabled():
        Quota.objects.filter(api_key=None).update(requests_per_minute=50)
    post(owner.api, "/v1/batches", {})
    refused = post(owner.api, "/v1/batches", {})
    seconds = int(refused["Retry-After"])
    assert error_of(refused) == {
        "message": f"This API key may make 1 new batches a minute; try again in {seconds} s. An "
        "owner or admin of your organization can raise this limit: "
        "http://127.0.0.1:8000/organization/limits",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert refused["retry-after-ms"] == f"{seconds}000"
    assert 1 <= seconds <= 60


def test_an_organizations_limit_is_raised_by_operators(owner: Person) -> None:
    limited(owner, requests_per_minute=0)
    said = error_of(owner.api.get(SERVED))["message"]
    assert said.startswith(
        "Your organization may make no calls of the API. A platform operator can raise this limit:"
    )


@pytest.mark.parametrize(("seconds", "said"), [(1, "1s"), (59, "59s"), (60, "1m0s")])
def test_the_reset_is_a_duration_as_openai_writes_it(seconds: int, said: str) -> None:
    usage = throttling.Usage("requests", "user", 5, 7, seconds)
    assert usage.headers == {LIMIT: "5", REMAINING: "0", RESET: said}


def test_every_answer_under_v1_has_the_three_headers(
    owner: Person, viewer: Person, address: dict[str, Any]
) -> None:
    limited(viewer, user=True, batches_per_minute=0)
    unknown = Client(headers={"authorization": "Bearer sk-nothing"})
    answers = [
        owner.api.get(SERVED),
        owner.api.get("/v1/batches/batch_0"),
        owner.api.get("/v1/batches?limit=x"),
        post(owner.api, "/v1/batches", b"{"),
        post(viewer.api, "/v1/batches", {}),
        owner.api.get("/v1/nothing", **address),
        owner.api.delete("/v1/batches", **address),
        Client().get(SERVED, **address),
        unknown.get(SERVED, **address),
        Client().get("/v1/openapi.json", **address),
    ]
    assert [answer.status_code for answer in answers] == [
        *(200, 404, 400, 400, 429, 404, 405, 401, 401, 200)
    ]
    assert [[name in answer for name in HEADERS] for answer in answers] == [[True] * 3] * 10


def test_pages_are_not_limited(owner: Person) -> None:
    limited(owner, requests_per_minute=0)
    response = owner.browser.get("/")
    assert (response.status_code, [name in response for name in HEADERS]) == (200, [False] * 3)


# --- Nobody known ---------------------------------------------------------------------------


def test_calls_with_wrong_keys_are_limited_by_address(
    owner: Person, settings: Any, address: dict[str, Any]
) -> None:
    settings.RATE_LIMIT_ANONYMOUS = 2
    unknown = Client(headers={"authorization": "Bearer sk-nothing"})
    answers = [unknown.get(SERVED, **address) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [401, 401, 429]
    error = error_of(answers[2])
    assert (error["code"], left(answers[2])) == ("rate_limit_exceeded", ("2", "0"))
    assert unknown.get(SERVED, REMOTE_ADDR="203.0.113.1").status_code == 401
    assert owner.api.get(SERVED, **address).status_code == 200  # not their neighbour's fault


def test_addresses_of_one_ipv6_network_count_together(db: None, settings: Any) -> None:
    settings.RATE_LIMIT_ANONYMOUS = 1
    answers = [
        Client().get(SERVED, REMOTE_ADDR=address)
        for address in ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", "2001:db8:0:2::1")
    ]
    assert [answer.status_code for answer in answers] == [401, 429, 401]


def test_ipv4_in_the_dress_of_ipv6_counts_as_ipv4(db: None, settings: Any) -> None:
    settings.RATE_LIMIT_ANONYMOUS = 1
    answers = [
        Client().get(SERVED, REMOTE_ADDR=address)
        for address in ("::ffff:203.0.113.7", "::ffff:203.0.113.8", "203.0.113.7")
    ]
    assert [answer.status_code for answer in answers] == [401, 401, 429]


@pytest.mark.parametrize("address", ["", "unix:", "1.2.3.4:5678", "fe80::1%eth0"])
def test_an_address_that_is_none_does_no_harm(db: None, address: str) -> None:
    assert Client().get(SERVED, REMOTE_ADDR=address).status_code == 401


# --- Without Redis --------------------------------------------------------------------------


def redis_at(settings: Any, url: str) -> None:
    limits = settings.CACHES["limits"] | {"LOCATION": f"{url}#limits"}
    settings.CACHES = settings.CACHES | {"limits": limits}


@pytest.fixture
def no_redis(settings: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(throttling, "_away_until", 0.0)
    redis_at(settings, "redis://127.0.0.1:1/0")
    return settings


@pytest.mark.parametrize(
    ("chosen", "read", "write"),
    [("open-for-reads", 200, 503), ("open", 200, 400), ("closed", 503, 503)],
)
def test_with_redis_away_the_setting_decides(
    owner: Person, no_redis: Any, chosen: str, read: int, write: int
) -> None:
    no_redis.RATE_LIMIT_WHEN_REDIS_IS_DOWN = chosen
    answers = [owner.api.get(SERVED), post(owner.api, "/v1/batches", {})]
    assert [answer.status_code for answer in answers] == [read, write]
    for answer in answers:
        if answer.status_code == 503:
            error = error_of(answer)
            assert (error["type"], error["code"]) == ("server_error", "rate_limiter_unavailable")
            assert answer["Retry-After"] == "3"
        assert LIMIT not in answer


def test_with_redis_away_strangers_are_answered_as_ever(db: None, no_redis: Any) -> None:
    assert Client().get(SERVED).status_code == 401


def test_redis_away_is_logged_counted_and_not_asked_again_for_every_call(
    owner: Person, no_redis: Any
) -> None:
    before = failures("passed"), failures("refused")
    with capture_logs() as logged:
        owner.api.get(SERVED)
        owner.api.get(SERVED)
        post(owner.api, "/v1/batches", {})
    assert [line["event"] for line in logged if "rate" in line["event"]] == ["rate limiter away"]
    assert (failures("passed") - before[0], failures("refused") - before[1]) == (2, 1)


def failures(outcome: str) -> float:
    return throttling.FAILURES.labels(outcome)._value.get()


def test_a_refused_call_is_counted_by_group_and_subject(owner: Person) -> None:
    limited(owner, key=True, requests_per_minute=0)
    counter = throttling.REFUSED.labels("requests", "api_key")._value
    before = counter.get()
    owner.api.get(SERVED)
    assert counter.get() - before == 1


def test_a_valkey_that_stops_and_comes_back_counts_again(
    owner: Person, settings: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(throttling, "_away_until", 0.0)
    monkeypatch.setattr(throttling, "AWAY_SECONDS", 0.0)
    tmp_path.chmod(0o711)
    valkey = embedded.Valkey(tmp_path, embedded.free_port(), "secret")
    redis_at(settings, valkey.url)
    limited(owner, requests_per_minute=2)
    process = embedded.start(valkey)
    try:
        assert statuses(owner, 1) == [200]
        embedded.stop(valkey, process)
        assert post(owner.api, "/v1/batches", {}).status_code == 503
        assert statuses(owner, 3) == [200, 200, 200]
        process = embedded.start(valkey)
        assert statuses(owner, 2) == [200, 429]
    finally:
        embedded.stop(valkey, process)
