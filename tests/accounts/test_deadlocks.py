"""Two writes of the same rows at once: each takes the rows first and the audit's chain last."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from django.db import OperationalError, connections
from django_scopes import scopes_disabled

from accounts.models import EmailDomain, IdentityProvider
from accounts.services import audit, issuers, sso
from tests.conftest import Person

pytestmark = pytest.mark.django_db(transaction=True)
Work = Callable[[], Any]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[Work, Work], list[Any]]:
    """What both come to, where one has the chain as soon as the other has its rows, if it can."""
    record, met, role = audit.record, threading.Barrier(2, timeout=1), threading.local()

    def meet() -> None:
        with suppress(threading.BrokenBarrierError):  # the other waits for us: as it should
            met.wait()

    def recorded(*args: Any, **kwargs: Any) -> Any:
        if role.is_first:
            event = record(*args, **kwargs)
            meet()
            time.sleep(0.2)
            return event
        meet()
        return record(*args, **kwargs)

    def run(work: Work, is_first: bool) -> Any:
        role.is_first = is_first
        try:
            return work()
        except Exception as error:
            return error
        finally:
            connections.close_all()

    def both(first: Work, second: Work) -> list[Any]:
        monkeypatch.setattr(audit, "record", recorded)
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run, (first, second), (True, False)))

    return both


@pytest.fixture
def domain(owner: Person) -> EmailDomain:
    organization = owner.caller.organization
    with scopes_disabled():
        fields = {"name": "i", "issuer": "https://i.test", "client_id": "c", "role": "member"}
        IdentityProvider.objects.create(organization=organization, **fields)
        return EmailDomain.objects.create(organization=organization, domain="acme.test", token="t")


def deadlocked(results: list[Any]) -> list[Any]:
    return [each for each in results if isinstance(each, OperationalError)]


def test_an_issuer_is_changed_while_it_is_deleted(owner: Person, at_once: Any) -> None:
    fields: dict[str, Any] = {
        "project": owner.caller.project,
        "issuer": "https://x.test",
        "audience": "a",
        "subject_pattern": "repo:a",
        "scopes": ["files"],
    }
    row = issuers.create_trusted_issuer(actor=owner.caller, name="x", **fields)
    results = at_once(
        lambda: issuers.delete_trusted_issuer(actor=owner.caller, row=row),
        lambda: issuers.update_trusted_issuer(actor=owner.caller, row=row, name="y", **fields),
    )
    assert deadlocked(results) == []


def test_a_domain_is_verified_while_it_is_removed(
    owner: Person, domain: EmailDomain, at_once: Any
) -> None:
    results = at_once(
        lambda: sso.remove_domain(actor=owner.caller, domain=domain),
        lambda: sso.vouch_for_domain(actor=None, domain=domain),
    )
    assert deadlocked(results) == []


def test_a_domain_is_verified_while_its_provider_is_removed(
    owner: Person, domain: EmailDomain, at_once: Any
) -> None:
    results = at_once(
        lambda: sso.remove_provider(actor=owner.caller),
        lambda: sso.vouch_for_domain(actor=None, domain=domain),
    )
    assert deadlocked(results) == []
