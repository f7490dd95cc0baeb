"""Checking a file before there is a batch of it: the validation's own look, with nothing begun."""

from __future__ import annotations

import time
from typing import IO, Any

import orjson
import structlog
from django.conf import settings
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.access import Caller
from accounts.errors import BadRequest
from batches import storage, wakeups
from batches.lines import BYTES_A_TOKEN, BadLine, read_lines
from batches.locks import only_one
from batches.models import File, FileCheck
from batches.models.batches import Endpoint
from batches.models.files import CheckState, Purpose
from batches.services.validation import Findings, examine_stream

logger = structlog.get_logger(__name__)

AT_ONCE_BYTES = 4 * 1024 * 1024
"""Files up to this size are checked while their sender waits, which is well below a second."""
LISTED = 100
"""So many bad lines are kept."""
TOLD_EVERY = 1.0
"""Seconds between two words about the progress."""


def begin_check(*, actor: Caller, file: File) -> FileCheck:
    """Check the file anew: a small one now, another by the cpu queue. It changes no file."""
    if file.purpose != Purpose.BATCH:
        raise BadRequest(
            f"The file's purpose is {file.purpose!r}; a batch's input needs 'batch'.",
            param="file_id",
        )
    with actor.scope():
        FileCheck.objects.update_or_create(
            file=file,
            defaults={
                "state": CheckState.WAITING,
                "asked_at": timezone.now(),
                "done_at": None,
                "bytes_read": 0,
            },
        )
        if file.bytes > AT_ONCE_BYTES:
            wakeups.check(file.pk)
        else:
            run_check(file.pk)
        return FileCheck.objects.select_related("file", "model").get(pk=file.pk)


def run_check(file_id: str) -> None:
    """Do what was asked for; safe to call any number of times."""
    with scopes_disabled(), only_one(f"check {file_id}") as mine:
        waiting = FileCheck.objects.filter(pk=file_id, state=CheckState.WAITING)
        check = waiting.select_related("file__organization").first() if mine else None
        if check is not None:
            _record(check, _look(check))


def repeat_wakeups() -> None:
    """Send again what may have been lost, across tenants."""
    waiting = FileCheck.objects.filter(state=CheckState.WAITING).order_by("asked_at")
    for id in waiting.values_list("pk", flat=True)[:100]:
        wakeups.check(id)


def _look(check: FileCheck) -> Findings:
    file = check.file
    try:
        with storage.opened(file.storage_name) as stream:
            check.endpoint = _endpoint(stream)
            watched: Any = _Watched(stream, file.pk)
            return examine_stream(watched, file.organization, check.endpoint)
    except FileNotFoundError as error:
        logger.error("file missing; is STORAGE_URL the same on all hosts?", error=str(error))
        findings = Findings()
        findings.add_error(BadLine("file_not_found", "The file's content is gone."), None)
        return findings


def _endpoint(stream: IO[bytes]) -> str:
    """What the first line asks for; what a batch is mostly for where it says nothing sensible."""
    first = next(read_lines(stream, settings.MAX_LINE_BYTES), None)
    stream.seek(0)
    try:
        request = orjson.loads(first.text or b"") if first else None
    except orjson.JSONDecodeError:
        request = None
    url = request.get("url") if isinstance(request, dict) else None
    return str(url) if url in Endpoint.values else Endpoint.CHAT_COMPLETIONS.value


class _Watched:
    """A stream whose reader's progress is told from time to time."""

    def __init__(self, stream: IO[bytes], file_id: str) -> None:
        self._stream, self._file_id = stream, file_id
        self._read, self._tell_at = 0, time.monotonic() + TOLD_EVERY

    def readline(self, size: int = -1) -> bytes:
        piece = self._stream.readline(size)
        self._read += len(piece)
        if time.monotonic() >= self._tell_at:
            self._tell_at = time.monotonic() + TOLD_EVERY
            FileCheck.objects.filter(pk=self._file_id).update(bytes_read=self._read)
        return piece


def _record(check: FileCheck, findings: Findings) -> None:
    """What was found; the estimates are those that validation will make again."""
    tokens = sum(entry.tokens for entry in findings.entries)
    incoming = sum(entry.length // BYTES_A_TOKEN + 1 for entry in findings.entries)
    check.state, check.done_at = CheckState.DONE, timezone.now()
    check.bytes_read, check.model = check.file.bytes, findings.model
    check.requests, check.bad_lines = findings.requests, findings.bad_lines
    check.errors = findings.errors[:LISTED]
    check.input_tokens, check.output_tokens = incoming, tokens - incoming
    check.save(force_update=True)
    if findings.requests:
        File.objects.filter(pk=check.pk, lines=None).update(lines=findings.requests)
