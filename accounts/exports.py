"""Rows as files that are made while they are sent: CSV, and one JSON object a line.

Which rows, and who may have them, is decided by the doors.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import orjson
from django.conf import settings
from django.http import StreamingHttpResponse

from accounts import ids
from accounts.models import AuditEvent
from accounts.queries import GROUPS, SUMS, Used
from accounts.services.audit import as_said

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class _Line:
    """What a CSV writer wants to write to: gives the line back."""

    def write(self, line: str) -> str:
        return line


def csv_lines(rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """RFC 4180, with an apostrophe before any text that a spreadsheet would take for a formula."""
    writer = csv.writer(_Line())
    for row in rows:
        yield writer.writerow([_harmless(cell) for cell in row])


def _harmless(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def usage_csv(rows: Iterable[Used], by: Sequence[str]) -> Iterator[str]:
    """These sums with a line of headings; `by` is what they were grouped by."""
    fields = [*(name for group in by for name in GROUPS[group]), *SUMS]
    yield from csv_lines([[*fields, "currency"]])
    yield from csv_lines(
        [*(_cell(row, field) for field in fields), settings.CURRENCY] for row in rows
    )


def _cell(row: Used, field: str) -> Any:
    value = getattr(row, field)
    if value is None:
        return ""
    return ids.user_id(value) if field == "user_id" else value


def audit_jsonl(events: Iterable[AuditEvent]) -> Iterator[bytes]:
    """All that each event says, and its hash: the SHA-256 of the rest of the line, keys sorted."""
    for event in events:
        yield orjson.dumps(as_said(event) | {"hash": event.hash}) + b"\n"


def download(
    lines: Iterator[str] | Iterator[bytes], filename: str, content_type: str
) -> StreamingHttpResponse:
    """The lines as an attachment, sent as they are made."""
    response = StreamingHttpResponse(lines, content_type=content_type)
    response["Content-Disposition"] = f'attachment; filename="{filename}"'
    return response
