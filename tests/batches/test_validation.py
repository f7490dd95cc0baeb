"""Validation: bad lines told, good files indexed and cut, nothing half; safe to run twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from django.db import OperationalError
from django.utils import timezone
from django_scopes import scopes_disabled

from batches import index, storage
from batches.models import Batch, File
from batches.models.batches import Status
from batches.services import batches, files, validation
from batches.services.finalization import finalize_batch
from batches.services.validation import validate_batch
from models_registry.models import Model
from models_registry.services import register_model
from tests import jobs
from tests.conftest import Person

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.usefixtures("own_storage", "wakeups_sent", "echo"),
]


def validated(owner: Person, content: bytes, **options: Any) -> Batch:
    batch = jobs.created(owner.caller, content, **options)
    validate_batch(batch.pk)
    return jobs.fresh(batch)


def errors(batch: Batch) -> list[tuple[str, str | None, int | None]]:
    return [(each["code"], each["param"], each["line"]) for each in batch.errors or []]


def bounds(batch: Batch) -> list[tuple[int, int]]:
    return [(chunk.start, chunk.end) for chunk in jobs.chunks(batch)]


def indexed(batch: Batch) -> list[index.Entry]:
    with storage.opened(batch.index_name) as stream:
        return index.read(stream)


def test_a_good_file_is_indexed_cut_and_started(owner: Person, settings: Any) -> None:
    settings.CHUNK_REQUESTS = 4
    batch = validated(owner, jobs.jsonl(jobs.lines(10)))
    assert (batch.status, batch.total, batch.errors) == (Status.IN_PROGRESS, 10, None)
    assert batch.model is not None
    assert batch.model.name == "echo"
    assert batch.in_progress_at is not None
    assert bounds(batch) == [(0, 4), (4, 8), (8, 10)]
    assert [entry.line for entry in indexed(batch)] == list(range(1, 11))
    assert [chunk.tokens for chunk in jobs.chunks(batch)] == [
        sum(entry.tokens for entry in indexed(batch)[start:end]) for start, end in bounds(batch)
    ]


def test_the_index_says_where_each_line_is(owner: Person) -> None:
    content = (
        b"\xef\xbb\xbf" + jobs.jsonl([jobs.line("a")]) + b"\r\n \n" + jobs.jsonl(jobs.lines(2))
    )
    batch = validated(owner, content)
    with storage.opened(batch.input_file.storage_name) as stream:
        found = []
        for entry in indexed(batch):
            stream.seek(entry.offset)
            found.append((entry.line, orjson.loads(stream.read(entry.length))["custom_id"]))
    assert found == [(1, "a"), (4, "say 1"), (5, "say 2")]


def test_trap_04_blank_lines_drop_no_trailing_request(owner: Person) -> None:
    lines = [orjson.dumps(each) for each in jobs.lines(6)]
    content = (
        b"\n\n" + b"\n\n".join(lines[:3]) + b"\r\n   \r\n" + b"\n\n\n".join(lines[3:]) + b"\n\n"
    )
    batch = validated(owner, content)
    assert (batch.status, batch.total) == (Status.IN_PROGRESS, 6)
    jobs.finish(jobs.lease())


def test_trap_02_a_file_of_mixed_models_fails_naming_each_line(
    owner: Person,
) -> None:
    register_model(name="other", source="none", engine="instant")
    mixed = [
        jobs.line("1"),
        jobs.line("2", model="other"),
        jobs.line("3"),
        jobs.line("4", model="x"),
    ]
    batch = validated(owner, jobs.jsonl(mixed))
    assert batch.status == Status.FAILED
    assert errors(batch) == [
        ("model_mismatch", "body.model", 2),
        ("model_mismatch", "body.model", 4),
    ]


def test_trap_03_every_bad_line_is_listed_and_nothing_is_half_done(
    owner: Person, own_storage: Path
) -> None:
    good = jobs.jsonl(jobs.lines(3))
    content = b"\n{\n" + good + b"[]\n\n" + jobs.jsonl([jobs.line("say 2")]) + b'{"a":1}'
    batch = validated(owner, content)
    assert (batch.status, batch.total, batch.index_name) == (Status.FAILED, 0, "")
    assert batch.failed_at is not None
    assert errors(batch) == [
        ("invalid_json_line", None, 2),
        ("invalid_json_line", None, 6),
        ("duplicate_custom_id", "custom_id", 8),
        ("missing_required_parameter", "custom_id", 9),
    ]
    assert jobs.chunks(batch) == []
    assert jobs.kept() == {batch.input_file.storage_name}


def test_a_thousand_bad_lines_are_listed_and_the_rest_is_counted(owner: Person) -> None:
    batch = validated(owner, b"{\n" * 1_234)
    assert [line for _, _, line in errors(batch)] == [*range(1, 1_001), None]
    assert batch.errors[-1]["message"] == (
        "234 more lines have errors; the first 1,000 are listed."
    )
    assert batch.errors[-1]["code"] == "too_many_errors"


def test_exactly_a_thousand_bad_lines_leave_no_rest(owner: Person) -> None:
    batch = validated(owner, b"{\n" * 1_000)
    assert [line for _, _, line in errors(batch)] == list(range(1, 1_001))


@pytest.mark.parametrize("content", [b"\n", b" \n\r\n", b"\xef\xbb\xbf\n"])
def test_a_file_without_requests_fails(owner: Person, content: bytes) -> None:
    assert errors(validated(owner, content)) == [("empty_file", None, None)]


def test_a_file_of_too_many_requests_fails(owner: Person, settings: Any) -> None:
    settings.MAX_BATCH_REQUESTS = 3
    batch = validated(owner, jobs.jsonl(jobs.lines(5)))
    assert errors(batch) == [("too_many_tasks", None, None)]
    assert batch.errors[0]["message"] == "The file has 5 requests; the limit is 3."
    assert validated(owner, jobs.jsonl(jobs.lines(3))).status == Status.IN_PROGRESS


@pytest.mark.parametrize("longer_by", [1, 2, 500])
def test_a_line_that_is_too_long_is_named(owner: Person, settings: Any, longer_by: int) -> None:
    settings.MAX_LINE_BYTES = 300
    wide = orjson.dumps(jobs.line("x" * 100, custom_id="1"))
    wide = wide.replace(b"xxx", b"x" * (300 + longer_by - len(wide) + 3), 1)
    content = jobs.jsonl(jobs.lines(1)) + wide + b"\n" + jobs.jsonl(jobs.lines(1, prefix="b"))
    assert errors(validated(owner, content)) == [("line_too_long", None, 2)]


def test_a_line_of_the_largest_length_is_taken(owner: Person, settings: Any) -> None:
    wide = orjson.dumps(jobs.line("x"))
    settings.MAX_LINE_BYTES = len(wide)
    assert validated(owner, wide + b"\r\n").status == Status.IN_PROGRESS


@pytest.mark.parametrize("name", ["nobody", "no\0body", "x" * 5_000, ""])
def test_an_unknown_model_fails_the_batch(owner: Person, name: str) -> None:
    batch = validated(owner, jobs.jsonl([jobs.line("a", model=name)]))
    assert errors(batch) == [("model_not_found", "body.model", None)]


def test_a_model_of_another_organization_does_not_exist(owner: Person, stranger: Person) -> None:
    register_model(
        name="theirs",
        source="none",
        engine="instant",
        organizations=[stranger.caller.organization],
    )
    line = jobs.jsonl([jobs.line("a", model="theirs")])
    assert errors(validated(owner, line)) == [("model_not_found", "body.model", None)]
    assert validated(stranger, line).status == Status.IN_PROGRESS


@pytest.mark.parametrize(
    ("task", "endpoint", "fits"),
    [
        *[
            ("chat", f"/v1/{each}", True)
            for each in ("chat/completions", "completions", "responses")
        ],
        *[("chat", f"/v1/{each}", False) for each in ("embeddings", "score", "rerank")],
        *[("embedding", f"/v1/{each}", True) for each in ("embeddings", "score", "rerank")],
        ("embedding", "/v1/chat/completions", False),
        *[("score", f"/v1/{each}", True) for each in ("score", "rerank")],
        ("score", "/v1/embeddings", False),
        ("score", "/v1/responses", False),
    ],
)
def test_a_model_answers_the_endpoints_of_its_task(
    owner: Person, task: str, endpoint: str, fits: bool
) -> None:
    register_model(name="m", source="none", engine="instant", task=task)
    line = jobs.line("a", model="m") | {"url": endpoint}
    batch = validated(owner, jobs.jsonl([line]), endpoint=endpoint)
    if fits:
        assert batch.status == Status.IN_PROGRESS
    else:
        assert errors(batch) == [("model_not_supported", "body.model", None)]


def test_lines_with_a_shared_prefix_are_run_side_by_side(owner: Person) -> None:
    long = {name: name * 3_000 for name in "ab"}
    said = [long["a"] + "1", long["b"] + "1", "short", long["a"] + "2", long["b"] + "2"]
    lines = [jobs.line(text, custom_id=str(at)) for at, text in enumerate(said, 1)]
    batch = validated(owner, jobs.jsonl(lines))
    assert [entry.line for entry in indexed(batch)] == [1, 4, 2, 5, 3]


def test_a_slow_models_chunks_are_small(owner: Person, echo: Model, settings: Any) -> None:
    settings.CHUNK_SECONDS = 10
    Model.objects.filter(pk=echo.pk).update(tokens_per_second=100)
    one = validated(owner, jobs.jsonl(jobs.lines(9)))
    assert [chunk.tokens <= 1_000 for chunk in jobs.chunks(one)] == [True, True, True]
    assert bounds(one) == [(0, 3), (3, 6), (6, 9)]


def test_a_repeated_validation_changes_nothing(owner: Person) -> None:
    batch = jobs.running(owner.caller, 5)
    before = (batch.in_progress_at, [chunk.pk for chunk in jobs.chunks(batch)], jobs.kept())
    validate_batch(batch.pk)
    again = jobs.fresh(batch)
    assert before == (again.in_progress_at, [each.pk for each in jobs.chunks(again)], jobs.kept())


def test_a_batch_that_failed_stays_failed(owner: Person) -> None:
    batch = validated(owner, b"{")
    validate_batch(batch.pk)
    assert jobs.fresh(batch).failed_at == batch.failed_at


def test_a_batch_that_nobody_knows_is_no_error() -> None:
    validate_batch("batch_none")
    with scopes_disabled():
        assert not Batch.objects.exists()


def test_the_index_of_the_one_that_came_too_late_is_removed(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = jobs.created(owner.caller, jobs.jsonl(jobs.lines(3)))
    record = validation._record

    def beaten(*args: Any) -> None:
        monkeypatch.setattr(validation, "_record", record)
        findings = validation.examine(batch)
        record(batch, findings, validation._store_index(batch, findings))
        record(*args)

    monkeypatch.setattr(validation, "_record", beaten)
    validate_batch(batch.pk)
    assert jobs.kept() == {batch.input_file.storage_name, jobs.fresh(batch).index_name}


def test_the_index_of_what_could_not_be_recorded_is_removed(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = jobs.created(owner.caller, jobs.jsonl(jobs.lines(3)))

    def full(*args: Any) -> None:
        raise OperationalError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(validation, "_cut", full)
        with pytest.raises(OperationalError, match="no space"):
            validate_batch(batch.pk)
    assert jobs.kept() == {batch.input_file.storage_name}
    validate_batch(batch.pk)
    assert jobs.kept() == {batch.input_file.storage_name, jobs.fresh(batch).index_name}


@pytest.mark.django_db(transaction=True)
def test_validations_at_the_same_time_make_the_chunks_once(owner: Person, settings: Any) -> None:
    settings.CHUNK_REQUESTS = 10
    batch = jobs.created(owner.caller, jobs.jsonl(jobs.lines(45)))
    calls = [lambda: validate_batch(batch.pk)] * 4
    assert jobs.together(*calls) == [None] * 4
    assert bounds(batch) == [(0, 10), (10, 20), (20, 30), (30, 40), (40, 45)]
    assert jobs.kept() == {batch.input_file.storage_name, jobs.fresh(batch).index_name}


def test_trap_06_a_batch_cancelled_while_validating_answers_every_line(owner: Person) -> None:
    batch = jobs.created(owner.caller, jobs.jsonl(jobs.lines(3)))
    batches.cancel_batch(actor=owner.caller, batch=batch)
    finalize_batch(batch.pk)  # nothing to do yet: the lines are not known
    assert jobs.fresh(batch).status == Status.CANCELLING
    validate_batch(batch.pk)
    assert jobs.fresh(batch).status == Status.CANCELLING
    finalize_batch(batch.pk)
    ended = jobs.fresh(batch)
    assert (ended.status, ended.output_file) == (Status.CANCELLED, None)
    assert jobs.counters(batch) == (3, 0, 3)
    assert [
        (each["custom_id"], each["error"]["code"]) for each in jobs.content(ended.error_file)
    ] == [
        ("say 1", "batch_cancelled"),
        ("say 2", "batch_cancelled"),
        ("say 3", "batch_cancelled"),
    ]


def test_a_cancel_in_the_midst_of_validation_is_kept(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = jobs.created(owner.caller, jobs.jsonl(jobs.lines(3)))
    examine = validation.examine

    def cancelled_meanwhile(given: Batch) -> validation.Findings:
        batches.cancel_batch(actor=owner.caller, batch=batch)
        return examine(given)

    monkeypatch.setattr(validation, "examine", cancelled_meanwhile)
    validate_batch(batch.pk)
    assert (jobs.fresh(batch).status, jobs.fresh(batch).total) == (Status.CANCELLING, 3)


def test_a_bad_file_of_a_cancelled_batch_ends_cancelled_with_its_errors(owner: Person) -> None:
    batch = jobs.created(owner.caller, b"{\n")
    batches.cancel_batch(actor=owner.caller, batch=batch)
    validate_batch(batch.pk)
    finalize_batch(batch.pk)
    ended = jobs.fresh(batch)
    assert (ended.status, ended.output_file, ended.error_file) == (Status.CANCELLED, None, None)
    assert errors(ended) == [("invalid_json_line", None, 1)]


def test_a_file_deleted_after_the_batch_was_made_is_read_all_the_same(owner: Person) -> None:
    batch = jobs.created(owner.caller, jobs.jsonl(jobs.lines(1)))
    files.delete_file(actor=owner.caller, file=batch.input_file)
    files.purge_files()
    validate_batch(batch.pk)
    assert jobs.fresh(batch).status == Status.IN_PROGRESS


def test_a_file_whose_bytes_are_gone_fails_the_batch(owner: Person) -> None:
    batch = jobs.created(owner.caller, jobs.jsonl(jobs.lines(1)))
    storage.remove(batch.input_file.storage_name)
    with owner.caller.scope():
        File.objects.filter(pk=batch.input_file_id).update(purged_at=timezone.now())
    validate_batch(batch.pk)
    assert errors(jobs.fresh(batch)) == [("file_not_found", None, None)]


def test_gpu_workers_are_woken_when_chunks_are_ready(
    owner: Person, wakeups_sent: list[Any], django_capture_on_commit_callbacks: Any
) -> None:
    batch = jobs.created(owner.caller, jobs.jsonl(jobs.lines(1)))
    with django_capture_on_commit_callbacks(execute=True):
        validate_batch(batch.pk)
    assert wakeups_sent == [("worker.tasks.wake",)]
