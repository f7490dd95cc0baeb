"""Validation: one streaming pass over the input, an index of its lines, chunks cut from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import IO, Any

import structlog
from django.conf import settings
from django.db import transaction
from django_scopes import scopes_disabled

from accounts.models import Organization
from accounts.services import quotas
from batches import index, storage, wakeups
from batches.lines import BadLine, LineChecker, RawLine, read_lines, show
from batches.locks import only_one
from batches.models import Batch, Chunk, File
from batches.models.batches import Status
from batches.services import events, moderation
from models_registry.models import Model, Task
from models_registry.queries import find_offered, prices_of

logger = structlog.get_logger(__name__)

MAX_ERRORS = 1000
DEFAULT_TOKENS_PER_SECOND = 2000.0
"""Until a model has been measured."""
_GENERATING = {"/v1/chat/completions", "/v1/completions", "/v1/responses"}
ENDPOINTS = {
    Task.CHAT: _GENERATING,
    Task.EMBEDDING: {"/v1/embeddings", "/v1/score", "/v1/rerank"},
    Task.SCORE: {"/v1/score", "/v1/rerank"},
}


@dataclass
class Findings:
    """What one pass over the input found, in input order."""

    entries: list[index.Entry] = field(default_factory=list)
    ladders: list[bytes] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    bad_lines: int = 0
    requests: int = 0
    model: Model | None = None

    def add_error(self, error: BadLine, line: int | None) -> None:
        self.bad_lines += 1
        if self.bad_lines <= MAX_ERRORS:
            self.errors.append(error.as_wire(line))

    def as_wire(self) -> list[dict[str, Any]]:
        """All errors up to the cap, then one that counts the rest."""
        rest = self.bad_lines - len(self.errors)
        if not rest:
            return self.errors
        said = f"{rest:,} more lines have errors; the first {MAX_ERRORS:,} are listed."
        return [*self.errors, BadLine("too_many_errors", said).as_wire(None)]


def validate_batch(batch_id: str) -> None:
    """Read and index a batch's input, then start it or fail it; safe to call any number of times.

    A batch that was cancelled meanwhile is indexed all the same, so that each of its lines is
    answered for in the error file.
    """
    with scopes_disabled(), only_one(f"validate {batch_id}") as mine:
        batch = _waiting(batch_id) if mine else None
        if batch is None:
            return
        findings = examine(batch)
        name = "" if findings.bad_lines else _store_index(batch, findings)
        try:
            _record(batch, findings, name)
        finally:
            if name:
                _remove_unless_named(name, batch)
        if findings.requests:
            counted = File.objects.filter(pk=batch.input_file_id, lines=None)
            counted.update(lines=findings.requests)


def _waiting(batch_id: str) -> Batch | None:
    waiting = Batch.objects.filter(status__in=(Status.VALIDATING, Status.CANCELLING), index_name="")
    batch = waiting.filter(pk=batch_id, errors__isnull=True)
    return batch.select_related("organization", "input_file").first()


def examine(batch: Batch) -> Findings:
    """Check every line of the input, collecting what is wrong; nothing is written."""
    try:
        with storage.opened(batch.input_file.storage_name) as stream:
            return examine_stream(stream, batch.organization, batch.endpoint)
    except FileNotFoundError as error:
        # The bytes of a file that a batch reads are never purged: it was not its owner.
        logger.error("input missing; is STORAGE_URL the same on all hosts?", error=str(error))
        findings = Findings()
        findings.add_error(BadLine("file_not_found", "The input file was deleted."), None)
        return findings


def examine_stream(stream: IO[bytes], organization: Organization, endpoint: str) -> Findings:
    """The same of what is not yet a batch's input."""
    findings = Findings()
    checker = LineChecker(endpoint)
    _check_lines(checker, stream, findings)
    if not findings.requests:
        findings.add_error(BadLine("empty_file", "The file has no requests."), None)
    if findings.requests > settings.MAX_BATCH_REQUESTS:
        findings.add_error(_too_many(findings.requests), None)
    if checker.model is not None:
        findings.model = _offered(organization, endpoint, checker.model, findings)
    return findings


def _check_lines(checker: LineChecker, stream: IO[bytes], findings: Findings) -> None:
    for line in read_lines(stream, settings.MAX_LINE_BYTES):
        findings.requests += 1
        if findings.requests > settings.MAX_BATCH_REQUESTS:
            continue  # only counted: the file is refused, and memory stays flat
        try:
            _check_line(checker, line, findings)
        except BadLine as error:
            findings.add_error(error, line.number)


def _check_line(checker: LineChecker, line: RawLine, findings: Findings) -> None:
    if line.text is None or len(line.text) > settings.MAX_LINE_BYTES:
        limit = f"{settings.MAX_LINE_BYTES:,}"
        raise BadLine("line_too_long", f"The line is longer than the limit of {limit} bytes.")
    checked = checker.check(line.text)
    if not findings.bad_lines:
        entry = index.Entry(line.number, line.offset, len(line.text), checked.tokens)
        findings.entries.append(entry)
        findings.ladders.append(checked.prefix)


def _too_many(count: int) -> BadLine:
    limit = settings.MAX_BATCH_REQUESTS
    return BadLine("too_many_tasks", f"The file has {count:,} requests; the limit is {limit:,}.")


def _offered(
    organization: Organization, endpoint: str, name: str, findings: Findings
) -> Model | None:
    """The model of that name if the organization may use it, for this endpoint."""
    model = find_offered(organization, name)
    if model is None:
        said = f"There is no model {show(name)} for this organization."
        findings.add_error(BadLine("model_not_found", said, "body.model"), None)
    elif endpoint not in ENDPOINTS[Task(model.task)]:
        said = f"{name} is a {model.task} model: it does not answer {endpoint}."
        findings.add_error(BadLine("model_not_supported", said, "body.model"), None)
    return model


def _store_index(batch: Batch, findings: Findings) -> str:
    order = index.execution_order(findings.ladders)
    findings.entries = [findings.entries[at] for at in order]
    findings.ladders.clear()
    with storage.temporary("index") as made:
        index.write(made, findings.entries)
        return storage.keep(f"{batch.organization_id}/index-{batch.pk}", made)


def _remove_unless_named(name: str, batch: Batch) -> None:
    """Asked of the row: a commit that failed here may have been done all the same."""
    if not Batch.objects.filter(pk=batch.pk, index_name=name).exists():
        storage.discard(name)


@transaction.atomic
def _record(batch: Batch, findings: Findings, index_name: str) -> None:
    """Write the outcome in one transaction, unless somebody else has already done so."""
    batch = Batch.objects.select_for_update(of=("self",)).get(pk=batch.pk)
    cancelled = batch.status == Status.CANCELLING
    if batch.index_name or batch.errors or not (cancelled or batch.status == Status.VALIDATING):
        return
    batch.model = findings.model
    if not (findings.bad_lines or cancelled):
        _reserve(batch, findings)
    if findings.bad_lines:
        batch.errors = findings.as_wire()
        if not cancelled:
            batch.move_to(Status.FAILED)
    else:
        batch.index_name = index_name
        batch.total = len(findings.entries)
        _cut(batch, findings.entries)
        if not cancelled:
            batch.move_to(Status.IN_PROGRESS)
            moderation.hold_if_due(batch, tokens=sum(entry.tokens for entry in findings.entries))
    batch.save()
    events.batch_changed(batch)
    if batch.status == Status.FAILED:
        quotas.settle(batch.pk)  # last: it holds up others of the organization
    logger.info("validated", batch_id=batch.pk, status=batch.status, requests=findings.requests)
    wakeups.finalize(batch.pk) if cancelled else wakeups.gpu_workers()


_QUOTA_CODES = {"requests_per_batch": "too_many_tasks", "budget_per_month": "insufficient_quota"}


def _reserve(batch: Batch, findings: Findings) -> None:
    """Set aside what the batch may use; what it would use too much of becomes its errors."""
    assert findings.model is not None
    estimate = quotas.Estimate(
        model=findings.model.name,
        requests=len(findings.entries),
        tokens=sum(entry.tokens for entry in findings.entries),
        prices=prices_of(findings.model),
    )
    for excess in quotas.reserve(batch.pk, estimate):
        code = _QUOTA_CODES.get(excess.field, "token_limit_exceeded")
        findings.add_error(BadLine(code, excess.message), None)


def _cut(batch: Batch, entries: Iterable[index.Entry]) -> None:
    assert batch.model is not None
    speed = batch.model.tokens_per_second or DEFAULT_TOKENS_PER_SECOND
    pieces = index.cut(
        (entry.tokens for entry in entries),
        max_requests=settings.CHUNK_REQUESTS,
        max_tokens=speed * settings.CHUNK_SECONDS,
    )
    Chunk.objects.bulk_create(
        Chunk(batch=batch, start=start, end=end, tokens=tokens) for start, end, tokens in pieces
    )
