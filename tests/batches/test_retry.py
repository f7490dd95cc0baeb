"""Batches made of others: of what failed, and once more as it was; on pages and by the API."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from typing import Any

import pytest
from django.contrib.messages import get_messages
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.errors import BadRequest, QuotaExceeded
from accounts.models import AuditEvent, Project, Quota
from accounts.services import projects
from batches import storage
from batches.models import Batch, File
from batches.models.batches import Priority, Status
from batches.services import batches, files, leases, reruns
from batches.services.finalization import LETTING_GO, finalize_batch
from batches.services.validation import validate_batch
from tests import jobs
from tests.conftest import Person
from tests.wire import assert_refused, post

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.usefixtures("own_storage", "wakeups_sent", "echo"),
]


def partly_failed(person: Person, requests: Any = 5, bad: Any = (2, 4), **options: Any) -> Batch:
    """A finished batch of which these lines failed."""
    batch = jobs.running(person.caller, requests, **options)
    lease = jobs.lease()
    numbers = range(1, lease.end - lease.start + 1)
    found = [jobs.outcome(at, ok=at not in bad) for at in numbers]
    leases.save(lease=lease, outcomes=found, finished=True)
    finalize_batch(batch.pk)
    return jobs.fresh(batch)


def newest() -> Batch:
    with scopes_disabled():
        return Batch.objects.select_related("input_file").order_by("pk").last()  # type: ignore[return-value]


def said_in(response: Any) -> list[str]:
    return [str(message) for message in get_messages(response.wsgi_request)]


# --- Retrying -------------------------------------------------------------------------------


def test_a_retry_has_the_failed_requests_alone_and_the_batchs_settings(owner: Person) -> None:
    batch = partly_failed(
        owner,
        completion_window="48h",
        priority="high",
        metadata={"run": "7"},
        output_expires_after_seconds=7_200,
        progress_percents=[10, 90],
    )
    response = owner.browser.post(f"/batches/{batch.pk}/retry")
    made = newest()
    assert response["Location"] == f"/batches/{made.pk}"
    assert jobs.custom_ids(made.input_file) == ["say 2", "say 4"]
    assert made.input_file.filename == "input-retry.jsonl"
    assert made.metadata == {"run": "7", "retry_of": batch.pk}
    assert (made.endpoint, made.completion_window) == (batch.endpoint, "48h")
    assert (made.priority, made.output_expires_after_seconds) == (Priority.HIGH, 7_200)
    assert made.progress_percents == [10, 90]
    validate_batch(made.pk)
    assert (jobs.fresh(made).status, jobs.fresh(made).total) == (Status.IN_PROGRESS, 2)


def test_what_was_never_run_is_retried_too(owner: Person) -> None:
    batch = jobs.running(owner.caller, 3)
    lease = jobs.lease()
    leases.save(lease=lease, outcomes=[jobs.outcome(2)], finished=False)
    leases.give_back(lease)
    batches.cancel_batch(actor=owner.caller, batch=batch)
    jobs.change(batch, cancelling_at=timezone.now() - 2 * LETTING_GO)
    finalize_batch(batch.pk)
    made = reruns.retry_failed(actor=owner.caller, batch=jobs.fresh(batch))
    assert jobs.custom_ids(made.input_file) == ["say 1", "say 3"]


def test_the_requests_are_the_same_to_the_byte(owner: Person) -> None:
    odd = b'{"custom_id": "a",  "method":"POST","url":"/v1/chat/completions",'
    odd += '"body":{"model":"echo","messages":[{"role":"user","content":"é\\u2028"}]}}'.encode()
    batch = jobs.created(owner.caller, b"\xef\xbb\xbf" + odd + b"\r\n\r\n")
    validate_batch(batch.pk)
    leases.save(lease=jobs.lease(), outcomes=[jobs.outcome(1, ok=False)], finished=True)
    finalize_batch(batch.pk)
    made = reruns.retry_failed(actor=owner.caller, batch=jobs.fresh(batch))
    with storage.opened(made.input_file.storage_name) as stream:
        assert stream.read() == odd + b"\n"


def test_a_retry_is_copied_in_pieces(owner: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = partly_failed(owner, requests=30, bad=range(1, 31))
    monkeypatch.setattr(reruns, "_PLACES_A_READ", 7)
    monkeypatch.setattr(reruns, "_BYTES_A_READ", 500)
    read = []
    pieces = storage.pieces

    def looked(name: str, spans: Any) -> list[bytes]:
        found = pieces(name, spans)
        read.append(sum(map(len, found)))
        return found

    monkeypatch.setattr(storage, "pieces", looked)
    made = reruns.retry_failed(actor=owner.caller, batch=batch)
    assert jobs.custom_ids(made.input_file) == [f"say {at}" for at in range(1, 31)]
    assert max(read) <= 500


def test_full_metadata_stays_as_it_is(owner: Person) -> None:
    full = {f"key {at}": "value" for at in range(batches.MAX_PAIRS)}
    batch = partly_failed(owner, metadata=full)
    assert reruns.retry_failed(actor=owner.caller, batch=batch).metadata == full


def test_what_cannot_be_retried_says_why(owner: Person) -> None:
    running = jobs.running(owner.caller, 1)
    jobs.finish(jobs.lease())
    finalize_batch(running.pk)
    complete = jobs.fresh(running)
    without_files, without_input = partly_failed(owner), partly_failed(owner)
    jobs.change(without_files, results_name="")
    files.delete_file(actor=owner.caller, file=without_input.input_file)
    unfinished = jobs.running(owner.caller, 1)
    said = []
    for batch in (complete, without_files, without_input, unfinished):
        with pytest.raises(BadRequest) as refused:
            reruns.retry_failed(actor=owner.caller, batch=jobs.fresh(batch))
        said.append(refused.value.message)
    assert said == [
        "No request of this batch failed.",
        "Which requests failed is not known any more: the batch's files were deleted.",
        "The batch's input file was deleted: there is nothing left to retry.",
        "The batch is not finished: what fails can be retried when it is.",
    ]


def test_a_retry_over_the_quota_leaves_no_file_behind(owner: Person) -> None:
    batch = partly_failed(owner)
    jobs.running(owner.caller, 1)
    with scopes_disabled():
        Quota.objects.create(organization=owner.caller.organization, concurrent_batches=1)
        before = set(File.objects.filter(deleted_at=None))
        with pytest.raises(QuotaExceeded):
            reruns.retry_failed(actor=owner.caller, batch=batch)
        assert set(File.objects.filter(deleted_at=None)) == before
    response = owner.browser.post(f"/batches/{batch.pk}/retry")
    assert response["Location"] == f"/batches/{batch.pk}"
    assert ["limit is 1 unfinished batches" in said for said in said_in(response)] == [True]
    with scopes_disabled():
        assert not AuditEvent.objects.filter(action="file.deleted").exists()


def test_a_viewer_may_not_retry_or_clone(owner: Person, viewer: Person) -> None:
    batch = partly_failed(owner)
    for action in ("retry", "clone"):
        assert viewer.browser.post(f"/batches/{batch.pk}/{action}").status_code == 403
    assert newest() == batch


def test_the_api_retries_too_and_once_by_key(owner: Person) -> None:
    batch = partly_failed(owner)
    path = f"/v1/batches/{batch.pk}/retry"
    first, again = (owner.api.post(path, headers={"idempotency-key": "k"}) for _ in range(2))
    assert first.status_code == 200
    assert first.json() == again.json()
    assert first.json()["metadata"] == {"retry_of": batch.pk}
    assert first.json()["id"] == newest().pk


def test_the_api_refuses_what_cannot_be_retried(owner: Person, stranger: Person) -> None:
    batch = jobs.running(owner.caller, 1)
    path = f"/v1/batches/{batch.pk}/retry"
    refused, missing = (post(person.api, path, b"") for person in (owner, stranger))
    assert_refused(refused, 400, "batch_id", "batch_not_retryable")
    assert_refused(missing, 404, "batch_id", "not_found")


# --- Whose they are -------------------------------------------------------------------------


@pytest.fixture
def research(owner: Person) -> Project:
    return projects.create_project(actor=owner.caller, name="Research")


def in_project(person: Person, project: Project) -> Person:
    """The person at work there, as a browser's choice or a key of the project makes it."""
    return replace(person, caller=replace(person.caller, project=project))


def test_what_a_person_makes_of_a_batch_stays_in_its_project(
    owner: Person, teammate: Person, research: Project
) -> None:
    batch = partly_failed(in_project(owner, research))
    for action in ("retry", "clone"):
        response = teammate.browser.post(f"/batches/{batch.pk}/{action}", CLONE)
        assert response["Location"] == f"/batches/{newest().pk}"
        assert (newest().project_id, newest().user) == (research.pk, teammate.user)
    with scopes_disabled():
        made = File.objects.get(filename="input-retry.jsonl")
    assert made.project_id == research.pk


def test_of_an_archived_project_they_go_where_new_batches_go(
    owner: Person, research: Project
) -> None:
    batch = partly_failed(in_project(owner, research))
    projects.archive_project(actor=owner.caller, project=research)
    for action in ("retry", "clone"):
        owner.browser.post(f"/batches/{batch.pk}/{action}", CLONE)
        assert newest() != batch
        assert newest().project_id == owner.caller.project.pk


def test_a_keys_retry_is_its_own_projects(owner: Person, research: Project) -> None:
    batch = partly_failed(in_project(owner, research))
    assert owner.api.post(f"/v1/batches/{batch.pk}/retry").status_code == 200
    assert newest() != batch
    assert newest().project_id == owner.caller.project.pk


# --- Cloning --------------------------------------------------------------------------------

CLONE = {"completion_window": "2h", "priority": "low", "metadata": "run = 8\r\n\r\nof=a=b"}


def test_a_clone_runs_the_same_file_with_other_settings(owner: Person) -> None:
    batch = partly_failed(
        owner, metadata={"run": "7"}, output_expires_after_seconds=7_200, progress_percents=[50]
    )
    response = owner.browser.post(f"/batches/{batch.pk}/clone", CLONE)
    made = newest()
    assert response["Location"] == f"/batches/{made.pk}"
    assert (made.input_file, made.completion_window) == (batch.input_file, "2h")
    assert (made.priority, made.metadata) == (Priority.LOW, {"run": "8", "of": "a=b"})
    assert (made.output_expires_after_seconds, made.progress_percents) == (7_200, [50])


def test_the_form_begins_with_the_batchs_own_settings(owner: Person) -> None:
    batch = partly_failed(owner, priority="high", metadata={"run": "7", "of": "a"})
    said = owner.browser.get(f"/batches/{batch.pk}/clone").content.decode()
    assert 'name="completion_window" value="24h"' in said
    assert '<option value="high" selected>' in said
    assert "of=a\nrun=7</textarea>" in said


ODD = {"two": "first\nsecond", "a=b": "c", " spaced ": " x ", "": "no key", "{": '"', "é": "\u2028"}


@pytest.mark.parametrize("key", ODD)
def test_metadata_that_lines_cannot_say_is_edited_as_json(key: str, owner: Person) -> None:
    metadata = {key: ODD[key], "run": "7"}
    batch = partly_failed(owner, metadata=metadata)
    said = owner.browser.get(f"/batches/{batch.pk}/clone").content.decode()
    found = re.search(r"<textarea[^>]*>\n?(.*?)</textarea>", said, re.S)
    assert found is not None
    shown = unescape(found[1])
    assert shown.startswith("{")
    sent = shown.replace("\n", "\r\n")  # as browsers do
    owner.browser.post(f"/batches/{batch.pk}/clone", CLONE | {"metadata": sent})
    assert newest() != batch
    assert newest().metadata == metadata


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"metadata": '{"a": 1}'}, "Every value must be a text"),
        ({"metadata": '{"a": '}, "This is no JSON"),
        ({"metadata": '{"a": "\\u0000"}'}, "must not contain NUL"),
        ({"metadata": '{"a": "\\ud800"}'}, "This is no JSON"),
        ({"completion_window": "soon"}, "completion_window must be a number of hours or minutes"),
        ({"priority": "top"}, "Select a valid choice"),
        ({"metadata": "no pair"}, "Write &#x27;no pair&#x27; as key=value."),
        ({"metadata": "=value"}, "as key=value."),
        ({"metadata": "\n".join(f"k{at}=v" for at in range(17))}, "at most 16 pairs"),
        ({"metadata": "k=" + "v" * 513}, "its values 512"),
    ],
)
def test_what_makes_no_sense_is_said_in_the_form(
    changed: dict[str, str], said: str, owner: Person
) -> None:
    batch = partly_failed(owner)
    response = owner.browser.post(f"/batches/{batch.pk}/clone", CLONE | changed)
    assert response.status_code == 400
    assert said in response.content.decode()
    assert newest() == batch


def test_a_deleted_file_is_not_run_again(owner: Person) -> None:
    batch = partly_failed(owner)
    files.delete_file(actor=owner.caller, file=batch.input_file)
    response = owner.browser.post(f"/batches/{batch.pk}/clone", CLONE)
    assert response.status_code == 400
    assert "No such file" in response.content.decode()
