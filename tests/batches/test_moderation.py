"""Moderation: which batches wait for an operator's approval, who is told, and how they end."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.errors import BadRequest
from accounts.models import AuditEvent, Organization, User
from batches import standings
from batches.models import Moderation
from batches.services import leases, moderation, queue
from batches.services.finalization import finalize_batch
from batches.services.sweep import sweep
from batches.services.validation import validate_batch
from models_registry.models import Model
from models_registry.services import register_model
from tests import jobs
from tests.conftest import Person

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.usefixtures("own_storage", "wakeups_sent", "echo"),
]


@pytest.fixture
def desk(operator: User) -> Client:
    client = Client()
    client.force_login(operator, backend="allauth.account.auth_backends.AuthenticationBackend")
    return client


def rules(organization: Organization | None = None, **fields: Any) -> None:
    moderation.set_moderation(actor=None, organization=organization, **fields)


def waits(person: Person, requests: Any = 1) -> bool:
    batch = jobs.running(person.caller, requests)
    assert batch.status == "in_progress"
    return batch.held_why == "moderation"


def next_lease() -> leases.Lease | None:
    return leases.lease_next(owner="w", loaded="echo", residency=timedelta(0))


def test_without_rules_nothing_waits(owner: Person) -> None:
    assert not waits(owner)


def test_batches_of_more_tokens_wait(owner: Person) -> None:
    tokens = sum(chunk.tokens for chunk in jobs.chunks(jobs.running(owner.caller, 1)))
    rules(over_tokens=tokens)
    assert [waits(owner, many) for many in (1, 2)] == [False, True]


def test_batches_of_young_organizations_wait(owner: Person, stranger: Person) -> None:
    old = timezone.now() - timedelta(days=8)
    Organization.objects.filter(pk=owner.caller.organization.pk).update(created_at=old)
    rules(newer_than_days=7)
    assert [waits(owner), waits(stranger)] == [False, True]


def test_batches_of_chosen_models_wait(owner: Person) -> None:
    other = register_model(name="other", source="none", engine="instant")
    rules(chosen_models=[other])
    assert [waits(owner), waits(owner, [jobs.line("a", model="other")])] == [False, True]


def test_an_organizations_own_rules_stand_instead_of_the_platforms(
    owner: Person, stranger: Person, acme: Organization
) -> None:
    rules(everything=True)
    rules(acme)
    assert [waits(owner), waits(stranger)] == [False, True]
    moderation.follow_platform(actor=None, organization=acme)
    assert waits(owner)
    rules()
    rules(acme, everything=True)
    assert [waits(owner), waits(stranger)] == [True, False]


def test_what_waits_runs_once_it_is_approved(owner: Person, operator: User) -> None:
    rules(everything=True)
    batch = jobs.running(owner.caller, 3)
    assert next_lease() is None
    assert [each.batch for each in queue.approve(actor=operator, ids=[batch.pk]).changed] == [
        batch.pk
    ]
    assert jobs.lease().batch_id == batch.pk
    with scopes_disabled():
        event = AuditEvent.objects.filter(organization=batch.organization_id).latest("number")
    assert (event.action, event.target_id, event.via) == ("batch.approved", batch.pk, "operator")


def test_its_tenant_is_told_that_it_waits(owner: Person) -> None:
    standings._ask_again_at = 0.0
    rules(everything=True)
    batch = jobs.running(owner.caller, 1)
    sweep()
    told = owner.api.get(f"/v1/batches/{batch.pk}").json()
    assert told["status"] == "in_progress"
    assert told["queue"]["reason"] == "held: waits for an operator's approval"
    assert told["queue"]["estimated_start_at"] is None
    page = owner.browser.get("/batches").content.decode()
    assert "Held: waits for an operator&#x27;s approval" in page


def test_what_is_rejected_ends_cancelled_and_says_why(owner: Person, operator: User) -> None:
    rules(everything=True)
    batch = jobs.running(owner.caller, 2)
    queue.reject(actor=operator, ids=[batch.pk], note="Ask us first.")
    finalize_batch(batch.pk)
    ended = jobs.fresh(batch)
    said = "An operator did not approve this batch: Ask us first."
    assert (ended.status, ended.failed) == ("cancelled", 2)
    assert owner.api.get(f"/v1/batches/{batch.pk}").json()["errors"]["data"] == [
        {"code": "batch_rejected", "message": said, "param": None, "line": None}
    ]
    errors = [each["error"] for each in jobs.content(ended.error_file)]
    assert errors == [{"code": "batch_rejected", "message": said}] * 2


def test_a_rejection_needs_a_reason(owner: Person, operator: User) -> None:
    rules(everything=True)
    batch = jobs.running(owner.caller, 1)
    with pytest.raises(BadRequest, match="Say why"):
        queue.reject(actor=operator, ids=[batch.pk], note=" ")
    assert jobs.fresh(batch).held_why == "moderation"


def test_only_what_waits_for_approval_is_approved_or_rejected(
    owner: Person, operator: User
) -> None:
    batch = jobs.running(owner.caller, 1)
    for done in (
        queue.approve(actor=operator, ids=[batch.pk]),
        queue.reject(actor=operator, ids=[batch.pk], note="No."),
    ):
        assert done == queue.Done([], [f"{batch.pk}: it does not wait for approval"])
    rules(everything=True)
    held = jobs.running(owner.caller, 1)
    assert queue.release(actor=operator, ids=[held.pk]).changed == []
    assert queue.hold(actor=operator, ids=[held.pk]).changed == []
    assert jobs.fresh(held).held_why == "moderation"


def test_what_an_operator_held_before_its_validation_waits_for_approval_too(
    owner: Person, operator: User
) -> None:
    """Whoever releases it has not read it."""
    rules(everything=True)
    batch = jobs.created(owner.caller, jobs.jsonl(jobs.lines(1)))
    assert len(queue.hold(actor=operator, ids=[batch.pk], note="Later.").changed) == 1
    validate_batch(batch.pk)
    assert jobs.fresh(batch).held_why == "moderation"
    assert queue.release(actor=operator, ids=[batch.pk]).changed == []
    assert next_lease() is None
    queue.approve(actor=operator, ids=[batch.pk])
    assert next_lease() is not None


@pytest.mark.parametrize("end", ["expired", "cancelled"])
def test_what_waits_still_expires_and_can_be_cancelled(owner: Person, end: str) -> None:
    rules(everything=True)
    batch = jobs.running(owner.caller, 2)
    if end == "expired":
        jobs.change(batch, expires_at=timezone.now() - timedelta(seconds=1))
        sweep()
    else:
        owner.api.post(f"/v1/batches/{batch.pk}/cancel")
    finalize_batch(batch.pk)
    ended = jobs.fresh(batch)
    assert (ended.status, ended.failed, ended.is_held) == (end, 2, False)


def test_a_batch_that_is_cancelled_before_its_validation_is_not_held(owner: Person) -> None:
    rules(everything=True)
    batch = jobs.created(owner.caller, jobs.jsonl(jobs.lines(1)))
    owner.api.post(f"/v1/batches/{batch.pk}/cancel")
    validate_batch(batch.pk)
    assert (jobs.fresh(batch).status, jobs.fresh(batch).held_why) == ("cancelling", "")


def test_the_pages_set_and_forget_rules_and_each_is_audited(
    desk: Client, acme: Organization, echo: Model
) -> None:
    own = f"/operator/organizations/{acme.pk}/moderation"
    assert desk.post("/operator/moderation", {"over_tokens": "x"}).status_code == 400
    assert desk.post("/operator/moderation", {"over_tokens": 9}).status_code == 302
    given = {"everything": "on", "newer_than_days": 3, "chosen_models": [echo.pk]}
    assert desk.post(own, given).status_code == 302
    page = desk.get(own).content.decode()
    assert "These rules stand instead of the platform" in page
    with scopes_disabled():
        row = Moderation.objects.get(organization=acme)
        assert (row.everything, row.over_tokens, row.newer_than_days) == (True, None, 3)
    assert "Acme" in desk.get("/operator/moderation").content.decode()
    assert desk.post(own, {"follow": "1"}).status_code == 302
    with scopes_disabled():
        assert list(Moderation.objects.values_list("organization", "over_tokens")) == [(None, 9)]
        found = AuditEvent.objects.filter(action="moderation.changed").order_by("pk")
        assert sorted(found.values_list("organization", flat=True), key=str) == [
            None,
            acme.pk,
            acme.pk,
        ]


@pytest.mark.parametrize("path", ["/operator/moderation", "/operator/pauses", "/operator/queue"])
def test_they_are_operators_pages(path: str, owner: Person, desk: Client) -> None:
    assert owner.browser.get(path).status_code == 404
    assert Client().get(path)["Location"].startswith("/accounts/login/")
    assert desk.get(path).status_code == 200
