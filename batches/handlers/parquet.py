"""Results as a Parquet file among the organization's files."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Literal

import orjson
from django.core.files.uploadedfile import TemporaryUploadedFile
from django.utils import timezone
from django_scopes import scopes_disabled
from pydantic import Field

from batches import storage
from batches.handlers import paths
from batches.handlers.base import Answer, Batch, Handler, Results, Settings
from batches.models import File
from batches.models.files import Purpose
from batches.services import files

GROUP_ROWS, GROUP_BYTES = 5_000, 16 * 1024 * 1024
"""A row group is written when it has so many, or its lines had together: what is in memory."""
_CONTENT = (
    "choices[0].message.content",
    "choices[0].text",
    "output[0].content[0].text",
)
"""Where the text is: of a chat, a completion, a response."""


class ParquetSettings(Settings):
    compression: Literal["zstd", "snappy", "none"] = Field("zstd", title="Compression")
    days: int = Field(
        0, title="Keep for", ge=0, le=30, description="In days; 0: until somebody deletes it."
    )


class ParquetHandler(Handler[ParquetSettings]):
    name = "parquet"
    title = "Parquet file"
    summary = "Makes a Parquet file of the results and keeps it among your files."
    settings_schema = ParquetSettings

    def handle(self, batch: Batch, results: Results) -> str:
        with storage.temporary("parquet") as made:
            self._write(made, results)
            made.size = made.tell()
            with files.kept(batch.organization_id, made) as [stored]:
                return self._record(batch, stored).pk

    def _write(self, made: TemporaryUploadedFile, results: Results) -> None:
        import pyarrow
        from pyarrow import parquet

        schema = pyarrow.schema(
            [
                pyarrow.field("custom_id", pyarrow.string(), nullable=False),
                pyarrow.field("ok", pyarrow.bool_(), nullable=False),
                pyarrow.field("status_code", pyarrow.int32()),
                pyarrow.field("content", pyarrow.string()),
                pyarrow.field("finish_reason", pyarrow.string()),
                pyarrow.field("input_tokens", pyarrow.int64()),
                pyarrow.field("output_tokens", pyarrow.int64()),
                pyarrow.field("error", pyarrow.string()),
                pyarrow.field("response", pyarrow.string()),
            ]
        )
        compression = self.settings.compression
        with parquet.ParquetWriter(made.file, schema, compression=compression) as writer:
            for rows in _groups(results):
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
                results.beat()

    def _record(self, batch: Batch, stored: files.Kept) -> File:
        """Its row, in place of the one that an earlier run of this batch has made."""
        with scopes_disabled():
            Batch.objects.select_for_update(of=("self",)).get(pk=batch.pk)
            filename = f"{batch.pk}.parquet"
            earlier = File.objects.filter(
                organization=batch.organization,
                filename=filename,
                purpose=Purpose.BATCH_OUTPUT,  # which no upload has
                deleted_at=None,
            )
            earlier.update(deleted_at=timezone.now())
            return files.record(
                stored,
                organization=batch.organization,
                project=batch.project,
                user=batch.user,
                api_key=batch.api_key,
                filename=filename,
                purpose=Purpose.BATCH_OUTPUT,
                expires_after=timedelta(days=self.settings.days) or None,
            )


def _groups(results: Results) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    size = 0
    for answer in results:
        rows.append(row_of(answer))
        size += len(answer.line)
        if len(rows) >= GROUP_ROWS or size >= GROUP_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def row_of(answer: Answer) -> dict[str, Any]:
    body = answer.response or {}
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    error = answer.error or (None if answer.ok else body.get("error"))
    return {
        "custom_id": answer.custom_id,
        "ok": answer.ok,
        "status_code": answer.status_code,
        "content": _content(body),
        "finish_reason": _text(paths.found(body, paths.parsed("choices[0].finish_reason"))),
        "input_tokens": _count(usage, "prompt_tokens", "input_tokens"),
        "output_tokens": _count(usage, "completion_tokens", "output_tokens"),
        "error": orjson.dumps(error).decode() if error is not None else None,
        "response": orjson.dumps(body).decode() if answer.response is not None else None,
    }


def _content(body: dict[str, Any]) -> str | None:
    texts = (paths.found(body, paths.parsed(path)) for path in _CONTENT)
    return next((text for text in texts if isinstance(text, str)), None)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _count(usage: dict[str, Any], *names: str) -> int | None:
    return next((usage[name] for name in names if isinstance(usage.get(name), int)), None)
