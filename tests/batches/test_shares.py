"""What an organization weighs in the queue: the service, the command, and the operators' page."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.messages import get_messages
from django.core.management import CommandError, call_command
from django.test import Client
from django_scopes import scopes_disabled

from accounts.errors import BadRequest
from accounts.models import AuditEvent, Organization, User
from batches.models import Share
from batches.services.shares import set_share
from tests import jobs
from tests.conftest import Person


def shares() -> list[tuple[float, int | None]]:
    with scopes_disabled():
        return list(Share.objects.values_list("weight", "chunks_at_once"))


def events(organization: Organization) -> list[tuple[str, str, dict[str, Any]]]:
    with scopes_disabled():
        found = AuditEvent.objects.filter(organization=organization, action="share.changed")
        ordered = found.order_by("number")
        return [(each.actor_label, each.target_id, each.changes) for each in ordered]


# --- The service ----------------------------------------------------------------------------


def test_a_change_is_audited_and_none_is_not(acme: Organization, operator: User) -> None:
    for _ in range(2):
        set_share(actor=operator, organization=acme, weight=2.5)
    set_share(actor=None, organization=acme, chunks_at_once=4)
    assert shares() == [(2.5, 4)]
    assert events(acme) == [
        ("operator@portal.test", acme.pk, {"weight": ["1.0", "2.5"]}),
        ("system", acme.pk, {"chunks_at_once": [None, 4]}),
    ]


@pytest.mark.usefixtures("own_storage", "wakeups_sent", "echo")
def test_what_was_served_stays(owner: Person) -> None:
    jobs.running(owner.caller, 1)
    charged = jobs.lease().charged
    set_share(actor=None, organization=owner.caller.organization, weight=3.0)
    with scopes_disabled():
        assert Share.objects.get().served == pytest.approx(charged)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"weight": 0.0}, "weight must be from 0.01 to 100."),
        ({"weight": -1.0}, "weight must be from 0.01 to 100."),
        ({"weight": 1e9}, "weight must be from 0.01 to 100."),
        ({"weight": float("nan")}, "weight must be from 0.01 to 100."),
        ({"weight": float("inf")}, "weight must be from 0.01 to 100."),
        ({"weight": None}, "weight must be from 0.01 to 100."),
        (
            {"weight": 2.0, "chunks_at_once": 0},
            "chunks_at_once must be from 1 to 10000; to stop all its work, suspend it.",
        ),
        (
            {"chunks_at_once": 10_001},
            "chunks_at_once must be from 1 to 10000; to stop all its work, suspend it.",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    acme: Organization, fields: dict[str, float | None], said: str
) -> None:
    with pytest.raises(BadRequest) as error:
        set_share(actor=None, organization=acme, **fields)
    assert error.value.message == said
    assert (shares(), events(acme)) == ([], [])


# --- The command ----------------------------------------------------------------------------


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    def command(*arguments: str) -> list[str]:
        call_command("set_share", "--org=acme", *arguments)
        return capsys.readouterr().out.splitlines()

    return command


def test_the_command_sets_what_is_named(acme: Organization, run: Callable[..., list[str]]) -> None:
    assert run() == ["Weight: 1", "Chunks at once: no limit"]
    assert run("--weight=0.5", "--chunks-at-once=8") == ["Weight: 0.5", "Chunks at once: 8"]
    assert run("--weight=2") == ["Weight: 2", "Chunks at once: 8"]
    assert run("--chunks-at-once=none") == ["Weight: 2", "Chunks at once: no limit"]


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--org=nobody", "There is no organization 'nobody'."),
        ("--chunks-at-once=many", "--chunks-at-once needs a number or none, not 'many'."),
        ("--weight=0", "weight must be from 0.01 to 100."),
    ],
)
def test_the_command_says_what_is_wrong(
    acme: Organization, run: Callable[..., list[str]], argument: str, said: str
) -> None:
    with pytest.raises(CommandError) as error:
        run(argument)
    assert str(error.value) == said


# --- The page -------------------------------------------------------------------------------


@pytest.fixture
def desk(operator: User) -> Client:
    client = Client()
    client.force_login(operator, backend="allauth.account.auth_backends.AuthenticationBackend")
    return client


def path_of(organization: Organization) -> str:
    return f"/operator/organizations/{organization.pk}/share"


def values(response: Any) -> list[str]:
    page = response.content.decode()
    return [
        *re.findall(r'name="weight" value="(.*?)"', page),
        *re.findall(r'name="chunks_at_once" value="(.*?)"', page),
    ]


def test_an_operator_sees_and_sets_it(desk: Client, acme: Organization) -> None:
    path = path_of(acme)
    assert path in desk.get(f"/operator/organizations/{acme.pk}").content.decode()
    assert values(desk.get(path)) == ["1.0"]
    answer = desk.post(path, {"weight": "2", "chunks_at_once": "3"})
    assert (answer.status_code, answer["Location"]) == (302, path)
    assert [str(each) for each in get_messages(answer.wsgi_request)] == [
        "The share of Acme is saved."
    ]
    assert values(desk.get(path)) == ["2.0", "3"]
    desk.post(path, {"weight": "2", "chunks_at_once": ""})
    assert shares() == [(2.0, None)]
    assert len(events(acme)) == 2


@pytest.mark.parametrize(
    "given", [{}, {"weight": "0"}, {"weight": "x"}, {"weight": "1", "chunks_at_once": "0"}]
)
def test_what_makes_no_sense_is_shown(
    desk: Client, acme: Organization, given: dict[str, str]
) -> None:
    answer = desk.post(path_of(acme), given)
    assert answer.status_code == 400
    assert 'class="portal-error"' in answer.content.decode()
    assert shares() == []


def test_there_is_no_such_page_for_others_or_of_nobody(desk: Client, owner: Person) -> None:
    path = path_of(owner.caller.organization)
    assert owner.browser.post(path, {"weight": "9"}).status_code == 404
    assert desk.put(path).status_code == 405
    for id in ("org_0", "%00"):
        assert desk.get(f"/operator/organizations/{id}/share").status_code == 404
    assert shares() == []
