"""Purging: of a deleted organization everything goes, in the end; of others nothing."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from allauth.socialaccount.models import SocialAccount
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import OperationalError
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.access import Caller
from accounts.models import ApiKey, AuditEvent, Membership, Organization, Project, User
from accounts.services import audit, organizations
from batches import storage
from batches.models import Batch, Chunk, File, IdempotencyKey, Result, Upload, UploadPart
from batches.models.batches import Status
from batches.services import files, purge, uploads
from batches.services.finalization import finalize_batch
from batches.services.sweep import sweep
from models_registry.models import Model
from models_registry.queries import offered_to
from models_registry.services import register_model
from tests import jobs
from tests.conftest import Person

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("own_storage", "echo", "wakeups_sent")]
OWNED = (Batch, Chunk, Result, File, Upload, UploadPart, IdempotencyKey)
TENANTS = (ApiKey, Membership, Project)


def upload_of(caller: Caller) -> Upload:
    """One under way, with a part."""
    upload = uploads.create_upload(
        actor=caller, filename="in.jsonl", purpose="batch", size=9, mime_type="text/plain"
    )
    uploads.add_part(actor=caller, upload=upload, content=SimpleUploadedFile("part", b"123"))
    return upload


def filled(person: Person) -> None:
    """Files, deleted files, uploads, and batches before, while and after they run."""
    caller = person.caller
    with scopes_disabled():
        others = list(Batch.objects.values_list("pk", flat=True))
    done = jobs.running(caller, 3)
    jobs.finish(jobs.lease(avoid=others))
    finalize_batch(done.pk)
    assert jobs.fresh(done).status == Status.COMPLETED
    running = jobs.running(caller, 2)
    lease = jobs.lease(avoid=others)
    jobs.leases.save(lease=lease, outcomes=[jobs.outcome(1)], finished=False)
    jobs.leases.give_back(lease)
    assert jobs.journal(running) == [1]
    jobs.created(caller, jobs.jsonl(jobs.lines(1)))
    files.delete_file(actor=caller, file=jobs.stored(caller, b"x"))
    upload_of(caller)
    with scopes_disabled():
        IdempotencyKey.objects.create(organization=caller.organization, key="k")


def left(model: Any, organization: Organization) -> int:
    """How many rows of the model the organization has."""
    path = {Chunk: "batch__", Result: "batch__", UploadPart: "upload__"}.get(model, "")
    with scopes_disabled():
        return int(model.objects.filter(**{f"{path}organization": organization}).count())


def bytes_of(organization: Organization) -> set[str]:
    return {name for name in jobs.kept() if name.startswith(organization.pk)}


def deleted(organization: Organization, *, days: float = 31) -> None:
    moment = timezone.now() - timedelta(days=days)
    Organization.objects.filter(pk=organization.pk).update(deleted_at=moment)


def purged(organization: Organization, *, sweeps: int = 30) -> bool:
    for _ in range(sweeps):
        purge.purge_organizations()
        if not Organization.objects.filter(pk=organization.pk).exists():
            return True
    return False


def test_all_of_it_goes_and_nothing_of_others(owner: Person, stranger: Person) -> None:
    for person in (owner, stranger):
        filled(person)
    acme, globex = owner.caller.organization, stranger.caller.organization
    before = {model: left(model, globex) for model in (*OWNED, *TENANTS)}
    stayed = bytes_of(globex)
    assert all(before.values())
    assert {left(model, acme) for model in OWNED} == {before[model] for model in OWNED}
    deleted(acme)
    assert purged(acme)
    assert {model: left(model, acme) for model in (*OWNED, *TENANTS)} == dict.fromkeys(before, 0)
    assert bytes_of(acme) == set()
    assert {model: left(model, globex) for model in before} == before
    assert bytes_of(globex) == stayed
    assert User.objects.filter(email="owner@acme.test").exists()


def test_the_audit_stays_and_says_so(owner: Person) -> None:
    acme = owner.caller.organization
    with scopes_disabled():
        before = AuditEvent.objects.filter(organization_id=acme.pk).count()
    deleted(acme)
    assert purged(acme)
    with scopes_disabled():
        events = AuditEvent.objects.filter(organization_id=acme.pk).order_by("number")
        assert events.count() == before + 1
        last = events.last()
    assert last is not None
    assert (last.action, last.target_label) == ("organization.purged", "Acme")
    assert last.hash == audit.hash_of(last)


@pytest.mark.parametrize("days", [0, 29.9])
def test_what_can_be_restored_is_whole(days: float, owner: Person) -> None:
    filled(owner)
    acme = owner.caller.organization
    before, names = {model: left(model, acme) for model in OWNED}, bytes_of(acme)
    deleted(acme, days=days)
    assert not purged(acme, sweeps=3)
    assert ({model: left(model, acme) for model in OWNED}, bytes_of(acme)) == (before, names)


def test_an_organization_that_is_not_deleted_is_left_alone(owner: Person) -> None:
    filled(owner)
    assert not purged(owner.caller.organization, sweeps=2)


def test_it_goes_slice_by_slice(owner: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(purge, "SLICE", 2)
    for _ in range(5):
        jobs.stored(owner.caller, b"x")
    acme = owner.caller.organization
    deleted(acme)
    counts = []
    while Organization.objects.filter(pk=acme.pk).exists():
        purge.purge_organizations()
        counts.append(left(File, acme))
    assert counts == [3, 1, 0, 0]


@pytest.mark.parametrize("dies_at", range(1, 12))
def test_whenever_it_is_killed_it_can_be_repeated(
    dies_at: int, owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(owner)
    acme = owner.caller.organization
    deleted(acme)
    removed = 0
    real = storage.remove

    def remove(name: str) -> None:
        nonlocal removed
        removed += 1
        if removed == dies_at:
            raise KeyboardInterrupt
        real(name)

    monkeypatch.setattr(storage, "remove", remove)
    try:
        purged(acme)
    except KeyboardInterrupt:
        assert {name for name in bytes_of(acme) if "index" not in name} <= known_names(acme)
    assert purged(acme)
    assert bytes_of(acme) == set()


def known_names(organization: Organization) -> set[str]:
    """What rows know to be stored."""
    with scopes_disabled():
        names = [*File.objects.filter(organization=organization).values_list("storage_name")]
        names += Batch.objects.filter(organization=organization).values_list("results_name")
        names += UploadPart.objects.filter(upload__organization=organization).values_list(
            "storage_name"
        )
    return {name for (name,) in names}


def test_bytes_that_cannot_be_removed_keep_their_rows(
    owner: Person, stranger: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme, globex = owner.caller.organization, stranger.caller.organization
    file = jobs.stored(owner.caller, b"x")
    for organization in (acme, globex):
        deleted(organization)

    def refuses(name: str) -> None:
        raise PermissionError

    monkeypatch.setattr(storage, "remove", refuses)
    assert purged(globex)
    assert left(File, acme) == 1
    assert file.storage_name in known_names(acme)


def test_a_model_that_others_batches_once_used_holds_up_nothing(
    owner: Person, stranger: Person
) -> None:
    filled(owner)
    globex = stranger.caller.organization
    register_model(name="echo", source="none", engine="instant", organizations=[globex])
    deleted(globex)
    assert purged(globex)


def test_those_that_cannot_be_purged_do_not_hold_up_the_others(
    owner: Person, stranger: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(purge, "AT_ONCE", 1)
    acme, globex = owner.caller.organization, stranger.caller.organization
    jobs.stored(owner.caller, b"x")
    deleted(acme, days=60)
    deleted(globex)

    def refuses(name: str) -> None:
        raise PermissionError

    monkeypatch.setattr(storage, "remove", refuses)
    assert purged(globex, sweeps=60)  # chance: one of 2 ** 60 runs fails
    assert Organization.objects.filter(pk=acme.pk).exists()


def test_whom_its_identity_provider_knew_is_forgotten(owner: Person, stranger: Person) -> None:
    acme, globex = owner.caller.organization, stranger.caller.organization
    for organization in (acme, globex):
        SocialAccount.objects.create(user=owner.user, provider=organization.pk, uid="1")
    deleted(acme)
    assert purged(acme)
    assert list(SocialAccount.objects.values_list("provider", flat=True)) == [globex.pk]


@pytest.mark.django_db(transaction=True)
def test_while_it_goes_it_can_be_suspended(owner: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    acme = owner.caller.organization
    deleted(acme)

    def remove() -> None:
        with scopes_disabled():
            purge._remove_organization(acme)

    found = jobs.crossing(
        monkeypatch,
        remove,
        lambda: organizations.suspend_organization(actor=None, organization=acme, why="fraud"),
    )
    assert OperationalError not in map(type, found)
    assert not Organization.objects.filter(pk=acme.pk).exists()


def test_bytes_that_no_row_knows_go_too(owner: Person) -> None:
    acme = owner.caller.organization
    storage.keep(f"{acme.pk}/lost", SimpleUploadedFile("lost", b"x"))
    deleted(acme)
    assert purged(acme)
    assert bytes_of(acme) == set()


def test_a_model_of_its_own_does_not_become_everybodys(owner: Person, stranger: Person) -> None:
    acme, globex = owner.caller.organization, stranger.caller.organization
    for name, whose in (("own", [acme]), ("shared", [acme, globex])):
        register_model(name=name, source="none", engine="instant", organizations=whose)
    deleted(acme)
    assert purged(acme)
    assert set(Model.objects.values_list("name", flat=True)) == {"echo", "own", "shared"}
    assert [model.name for model in offered_to(globex)] == ["echo", "shared"]


def test_while_a_worker_holds_a_lease_nothing_goes(owner: Person) -> None:
    jobs.running(owner.caller, 1)
    lease = jobs.lease()
    acme = owner.caller.organization
    deleted(acme)
    assert not purged(acme, sweeps=2)
    assert left(Chunk, acme) == 1
    jobs.leases.give_back(lease)
    assert purged(acme)


# --- Cancelling -----------------------------------------------------------------------------


def test_a_deleted_organizations_batches_are_cancelled(owner: Person, stranger: Person) -> None:
    for person in (owner, stranger):
        filled(person)
    organizations.delete_organization(actor=owner.caller)
    purge.cancel_of_deleted()

    def statuses(person: Person) -> list[str]:
        with scopes_disabled():
            mine = Batch.objects.filter(organization=person.caller.organization)
            return list(mine.order_by("pk").values_list("status", flat=True))

    assert statuses(owner) == ["completed", "cancelling", "cancelling"]
    assert statuses(stranger) == ["completed", "in_progress", "validating"]
    with scopes_disabled():
        batches = Batch.objects.filter(status=Status.CANCELLING)
        for id in list(batches.values_list("pk", flat=True)):
            jobs.validate_batch(id)
            finalize_batch(id)
    assert statuses(owner) == ["completed", "cancelled", "cancelled"]


def test_the_sweep_does_both(owner: Person) -> None:
    filled(owner)
    acme = owner.caller.organization
    deleted(acme)
    for _ in range(10):
        sweep()
    assert not Organization.objects.filter(pk=acme.pk).exists()
    assert bytes_of(acme) == set()
