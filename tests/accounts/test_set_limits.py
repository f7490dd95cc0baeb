"""`./run manage set_limits`, and the service behind it."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django_scopes import scopes_disabled

from accounts.errors import ApiError, Forbidden, NotFound
from accounts.models import ApiKey, AuditEvent, Organization, Quota, User
from accounts.services.limits import set_limits
from tests.conftest import Person


@pytest.fixture(autouse=True)
def _defaults(settings: Any) -> None:
    settings.RATE_LIMIT_REQUESTS = 600
    settings.RATE_LIMIT_BATCHES, settings.RATE_LIMIT_FILES = 10, 20


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """What the command prints, line by line."""
    capsys.readouterr()
    call_command("set_limits", *arguments)
    return capsys.readouterr().out.splitlines()


def quotas() -> list[Quota]:
    with scopes_disabled():
        return list(Quota.objects.order_by("pk"))


def changes() -> list[AuditEvent]:
    with scopes_disabled():
        found = AuditEvent.objects.select_related("organization", "actor")
        return list(found.filter(action="limits.changed").order_by("created_at"))


def key_of(person: Person) -> ApiKey:
    with scopes_disabled():
        return ApiKey.objects.get(created_by=person.user)


# --- The command ----------------------------------------------------------------------------


def test_it_sets_an_organizations_limits_and_prints_those_that_hold(
    acme: Organization, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run(capsys, "--org=acme", "--requests-per-minute=5000", "--budget=99.5")
    assert said == [
        "API calls a minute: 5,000 calls",
        "New batches a minute: 10 batches",
        "New files a minute: 20 files",
        "Tokens a month: no limit",
        "Enqueued tokens of one model: no limit",
        "Unfinished batches: no limit",
        "Requests in one batch: no limit",
        "Storage: no limit",
        "Money a month: 99.50 USD",
    ]
    [quota] = quotas()
    assert (quota.organization, quota.user, quota.api_key) == (acme, None, None)
    assert (quota.requests_per_minute, quota.budget_per_month) == (5000, Decimal("99.50"))


def test_none_clears_one_and_leaves_the_others(
    acme: Organization, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "--org=acme", "--requests-per-minute=5", "--storage-bytes=1024")
    said = run(capsys, "--org=acme", "--requests-per-minute", "none")
    assert (said[0], said[7]) == ("API calls a minute: 600 calls", "Storage: 1.0\xa0KB")


def test_every_limit_has_its_option(acme: Organization, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        capsys,
        *("--org=acme", "--requests-per-minute=1", "--batches-per-minute=2"),
        *("--files-per-minute=3", "--tokens-per-month=4", "--enqueued-tokens=5"),
        *("--concurrent-batches=6", "--requests-per-batch=7", "--storage-bytes=8", "--budget=9"),
    )
    [quota] = quotas()
    assert [
        quota.requests_per_minute,
        quota.batches_per_minute,
        quota.files_per_minute,
        quota.tokens_per_month,
        quota.enqueued_tokens,
        quota.concurrent_batches,
        quota.requests_per_batch,
        quota.storage_bytes,
        quota.budget_per_month,
    ] == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_it_sets_those_of_a_person_and_of_a_key(
    owner: Person, capsys: pytest.CaptureFixture[str]
) -> None:
    key = key_of(owner)
    said = run(capsys, "--org=acme", "--user=Owner@acme.test", "--batches-per-minute=3")
    assert said[:2] == ["API calls a minute: no limit", "New batches a minute: 3 batches"]
    run(capsys, "--org=acme", f"--key={key.pk}", "--batches-per-minute=4")
    run(capsys, "--org=acme", f"--key={key.prefix}", "--files-per-minute=5")
    mine, keys_own = quotas()
    assert (mine.user, mine.api_key, mine.batches_per_minute) == (owner.user, None, 3)
    assert (keys_own.user, keys_own.api_key) == (None, key)
    assert (keys_own.batches_per_minute, keys_own.files_per_minute) == (4, 5)


def test_without_a_limit_to_set_it_only_prints(
    acme: Organization, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "--org=acme")[0] == "API calls a minute: 600 calls"
    assert changes() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--org=nobody"], "There is no organization 'nobody'."),
        (["--org=acme", "--user=x@acme.test"], "acme has no member 'x@acme.test'."),
        (
            ["--org=acme", "--user=stranger@globex.test"],
            "acme has no member 'stranger@globex.test'.",
        ),
        (["--org=acme", "--key=key_0"], "acme has no API key 'key_0'."),
        (
            ["--org=acme", "--requests-per-minute=many"],
            "--requests-per-minute needs a number or none, not 'many'.",
        ),
        (["--org=acme", "--budget=x"], "--budget needs a number or none, not 'x'."),
        (
            ["--org=acme", "--files-per-minute=-1"],
            "files_per_minute must be a whole number from 0 to 9007199254740992.",
        ),
        (
            ["--org=acme", "--budget=NaN"],
            "budget_per_month must be from 0 to 999999999999.99, with at most two decimals.",
        ),
        (["--org=acme", "--budget=sNaN"], "budget_per_month must be an amount of money."),
        (
            ["--org=acme", "--budget=0.001"],
            "budget_per_month must be from 0 to 999999999999.99, with at most two decimals.",
        ),
    ],
)
def test_what_is_wrong_is_said(
    acme: Organization, stranger: Person, arguments: list[str], said: str
) -> None:
    with pytest.raises(CommandError) as error:
        call_command("set_limits", *arguments)
    assert str(error.value) == said
    assert quotas() == []


def test_a_person_and_a_key_at_once_are_refused(acme: Organization) -> None:
    with pytest.raises(CommandError):
        call_command("set_limits", "--org=acme", "--user=owner@acme.test", "--key=key_0")


# --- The service ----------------------------------------------------------------------------


def test_operators_set_an_organizations_limits_and_it_is_audited(
    acme: Organization, operator: User
) -> None:
    set_limits(actor=operator, organization=acme, budget_per_month=Decimal("10"))
    set_limits(actor=operator, organization=acme, budget_per_month=Decimal("10.00"))
    [event] = changes()
    assert (event.organization, event.actor, event.target_id) == (acme, operator, acme.pk)
    assert event.changes == {"budget_per_month": [None, "10.00"]}


@pytest.mark.parametrize("who", ["owner", "user"])
def test_nobody_else_sets_them(owner: Person, who: str) -> None:
    actor: Any = owner.caller if who == "owner" else owner.user
    with pytest.raises(Forbidden):
        set_limits(actor=actor, organization=owner.caller.organization, requests_per_minute=1)
    assert quotas() == []


def test_another_organizations_admin_sets_nothing(owner: Person, stranger: Person) -> None:
    with pytest.raises(NotFound):
        set_limits(
            actor=stranger.caller,
            organization=owner.caller.organization,
            user=owner.user,
            requests_per_minute=1,
        )


@pytest.mark.parametrize("subject", ["user", "api_key"])
def test_who_is_not_of_the_organization_gets_no_limits_in_it(
    owner: Person, stranger: Person, subject: str
) -> None:
    of: Any = {"user": stranger.user} if subject == "user" else {"api_key": key_of(stranger)}
    with pytest.raises(NotFound):
        set_limits(
            actor=owner.caller,
            organization=owner.caller.organization,
            **of,
            requests_per_minute=1,
        )
    assert quotas() == []


@pytest.mark.parametrize("value", [True, 1.0, "5", Decimal(5)])
def test_only_whole_numbers_are_counts(acme: Organization, value: Any) -> None:
    with pytest.raises(ApiError):
        set_limits(actor=None, organization=acme, requests_per_minute=value)
