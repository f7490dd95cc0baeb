"""How long files stay: what an organization sets, and what becomes of the files that are there."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import IntegrityError, transaction
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.errors import BadRequest
from accounts.models import AuditEvent
from batches.models import File, Retention
from batches.services import files, retention
from batches.services.batches import cancel_batch
from batches.services.finalization import finalize_batch
from batches.services.retention import apply_to_existing, set_retention
from tests.batches.conftest import Disk
from tests.batches.test_uploads_api import CONTENT, begun, part
from tests.conftest import Person
from tests.jobs import finish, fresh, lease, running, stored
from tests.wire import JSON, line, upload


@pytest.fixture(autouse=True)
def _disk(disk: Disk, wakeups_sent: list[tuple[str, ...]]) -> None:
    """A storage of the test's own, and nobody who is woken."""


def keep(person: Person, inputs: int | None, outputs: int | None = None, **options: Any) -> None:
    set_retention(actor=person.caller, input_days=inputs, output_days=outputs, **options)


def stays(file: File) -> int | None:
    """Days from its making to its expiry."""
    with scopes_disabled():
        file = File.objects.get(pk=file.pk)
    return file.expires_at and round((file.expires_at - file.created_at) / timedelta(days=1))


def aged(
    person: Person, days: int, *, purpose: str = "batch", expires_in: int | None = None
) -> File:
    """A file that was made so long ago."""
    file = stored(person.caller, line())
    now = timezone.now()
    with scopes_disabled():
        File.objects.filter(pk=file.pk).update(
            purpose=purpose,
            created_at=now - timedelta(days=days),
            expires_at=None if expires_in is None else now + timedelta(days=expires_in),
        )
    return file


def left_days(file: File) -> int | None:
    """Days from now to its expiry."""
    with scopes_disabled():
        at = File.objects.get(pk=file.pk).expires_at
    return at and round((at - timezone.now()) / timedelta(days=1))


# --- New files ------------------------------------------------------------------------------


def test_without_a_setting_files_stay(owner: Person) -> None:
    assert stays(stored(owner.caller, line())) is None


def test_an_uploaded_file_gets_the_organizations_days_unless_it_asks_for_others(
    owner: Person, stranger: Person
) -> None:
    keep(owner, 30)
    assert stays(stored(owner.caller, line())) == 30
    assert stays(stored(stranger.caller, line())) is None
    own = files.create_file(
        actor=owner.caller,
        content=SimpleUploadedFile("in.jsonl", line()),
        filename="in.jsonl",
        purpose="batch",
        expires_after_seconds=2 * 86_400,
    )
    assert stays(own) == 2
    keep(owner, None)
    assert stays(stored(owner.caller, line())) is None


def test_programs_files_and_uploads_in_parts_get_them_too(owner: Person) -> None:
    keep(owner, 30)
    answer = upload(owner.api).json()
    assert answer["expires_at"] - answer["created_at"] == pytest.approx(30 * 86_400, abs=5)
    upload_id = begun(owner.api)["id"]
    body = {"part_ids": [part(owner.api, upload_id, CONTENT)]}
    done = owner.api.post(f"/v1/uploads/{upload_id}/complete", body, content_type=JSON).json()
    file = done["file"]
    assert file["expires_at"] - file["created_at"] == pytest.approx(30 * 86_400, abs=5)


def test_what_batches_write_has_days_of_its_own(owner: Person, echo: Any) -> None:
    keep(owner, None, 7)
    for asked, days in ((None, 7), (86_400, 1)):
        batch = running(owner.caller, 2, output_expires_after_seconds=asked)
        finish(lease())
        finalize_batch(batch.pk)
        batch = fresh(batch)
        assert batch.output_file is not None
        assert (stays(batch.output_file), batch.output_file.lines) == (days, 2)
        assert stays(batch.input_file) is None
    batch = running(owner.caller, 3)
    cancel_batch(actor=owner.caller, batch=batch)
    finalize_batch(batch.pk)
    errors = fresh(batch).error_file
    assert errors is not None
    assert (stays(errors), errors.lines) == (7, 3)


# --- Files that are here ----------------------------------------------------------------------


def test_files_that_are_here_are_left_alone_unless_that_is_chosen(owner: Person) -> None:
    file = aged(owner, 10)
    keep(owner, 30)
    apply_to_existing()
    assert left_days(file) is None


def test_files_that_are_here_get_their_days_from_when_they_were_made(
    owner: Person, stranger: Person
) -> None:
    foreign = aged(stranger, 10)
    young, output = aged(owner, 10), aged(owner, 10, purpose="batch_output")
    old = aged(owner, 100)
    sooner, later = aged(owner, 10, expires_in=3), aged(owner, 10, expires_in=60)
    keep(owner, 30, 15, to_existing=True)
    apply_to_existing()
    assert (left_days(young), left_days(output)) == (20, 5)
    assert left_days(old) == 1, "a day of grace"
    assert (left_days(sooner), left_days(later)) == (3, 20)
    assert left_days(foreign) is None


def test_a_kind_that_stays_for_ever_is_left_alone(owner: Person) -> None:
    file, output = aged(owner, 10), aged(owner, 10, purpose="batch_output", expires_in=3)
    keep(owner, None, None, to_existing=True)
    apply_to_existing()
    assert (left_days(file), left_days(output)) == (None, 3)


def test_it_goes_in_steps_and_ends(owner: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "SLICE", 2)
    old = [aged(owner, 1) for _ in range(5)]
    keep(owner, 30, to_existing=True)
    new = aged(owner, 0)
    for done in (2, 4, 5):
        apply_to_existing()
        assert [left_days(file) for file in old] == [29] * done + [None] * (5 - done)
    apply_to_existing()
    assert left_days(new) is None, "only what was there before"
    with scopes_disabled():
        row = Retention.objects.get()
    assert (row.applying_at, row.cursor) == (None, "")


def test_a_changed_setting_begins_anew_or_stops(owner: Person) -> None:
    file = aged(owner, 10)
    keep(owner, 30, to_existing=True)
    keep(owner, 30)
    apply_to_existing()
    assert left_days(file) is None
    keep(owner, 20, to_existing=True)
    apply_to_existing()
    assert left_days(file) == 10


def test_what_is_past_its_days_goes_after_the_grace(owner: Person) -> None:
    file = aged(owner, 100)
    keep(owner, 30, to_existing=True)
    apply_to_existing()
    files.expire_files()
    with scopes_disabled():
        assert File.objects.get(pk=file.pk).deleted_at is None
        File.objects.update(expires_at=timezone.now())
    files.expire_files()
    with scopes_disabled():
        assert File.objects.get(pk=file.pk).deleted_at is not None


# --- The setting ----------------------------------------------------------------------------


def test_it_is_set_on_its_page_and_audited(owner: Person) -> None:
    given = {"input_days": "30", "output_days": "", "to_existing": "on"}
    assert owner.browser.post("/organization/retention", given).status_code == 302
    with scopes_disabled():
        row = Retention.objects.get()
        event = AuditEvent.objects.get(action="retention.changed")
    assert (row.input_days, row.output_days, row.applying_at is not None) == (30, None, True)
    assert event.changes == {"input_days": [None, 30], "existing_files": [False, True]}
    assert (event.actor, event.organization) == (owner.user, owner.caller.organization)
    page = owner.browser.get("/organization/retention").content.decode()
    assert 'value="30"' in page
    assert "are being given their last day" in page


def test_what_files_lose_is_asked_before(owner: Person, stranger: Person) -> None:
    aged(stranger, 10)
    sooner, later = aged(owner, 10, expires_in=3), [aged(owner, 10), aged(owner, 100)]
    given = {"input_days": "30", "output_days": "", "to_existing": "on"}
    page = owner.browser.post("/organization/retention", given)
    said = page.content.decode()
    assert page.status_code == 200
    assert "Save, and expire 2 files" in said
    assert ('name="sure" value="30 never"' in said, 'value="30"' in said) == (True, True)
    other = given | {"input_days": "20", "sure": "30 never"}
    assert owner.browser.post("/organization/retention", other).status_code == 200
    with scopes_disabled():
        assert not Retention.objects.exists()
    sure = given | {"sure": "30 never"}
    assert owner.browser.post("/organization/retention", sure).status_code == 302
    apply_to_existing()
    assert [left_days(file) for file in (sooner, *later)] == [3, 20, 1]


def test_what_changes_nothing_leaves_no_event(owner: Person) -> None:
    keep(owner, None, None)
    with scopes_disabled():
        assert not AuditEvent.objects.filter(action="retention.changed").exists()


@pytest.mark.parametrize("days", ["0", "-1", "3651", "many"])
def test_wrong_days_are_refused_and_stay_in_the_form(days: str, owner: Person) -> None:
    response = owner.browser.post("/organization/retention", {"input_days": days})
    assert response.status_code == 400
    assert f'value="{days}"' in response.content.decode()
    with scopes_disabled():
        assert Retention.objects.count() == 0


@pytest.mark.parametrize("days", [0, 3651])
def test_the_service_and_the_database_refuse_wrong_days(days: int, owner: Person) -> None:
    with pytest.raises(BadRequest):
        keep(owner, days)
    organization = owner.caller.organization
    with scopes_disabled(), pytest.raises(IntegrityError), transaction.atomic():
        Retention.objects.create(organization=organization, output_days=days)


def test_members_cannot_set_it(teammate: Person, viewer: Person) -> None:
    for person in (teammate, viewer):
        assert person.browser.get("/organization/retention").status_code == 403
        response = person.browser.post("/organization/retention", {"input_days": "1"})
        assert response.status_code == 403
        assert "/organization/retention" not in person.browser.get("/").content.decode()
