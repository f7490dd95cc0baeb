"""The wire's objects: what comes in under /v1 and what goes out, as OpenAI names it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from ninja import Field, Schema
from pydantic import ConfigDict, StrictInt, StrictStr

from batches import standings
from batches.models import Batch, File, Upload, UploadPart
from batches.models.batches import Priority, Status
from batches.models.files import UploadStatus

PriorityName = Literal["low", "normal", "high"]
_PRIORITIES: dict[int, PriorityName] = {
    Priority.LOW: "low",
    Priority.NORMAL: "normal",
    Priority.HIGH: "high",
}


def epoch(moment: datetime | None) -> int | None:
    """Seconds since 1970, as the wire has its times."""
    return int(moment.timestamp()) if moment else None


class FileOut(Schema):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"] = "processed"
    status_details: str | None = None

    @classmethod
    def of(cls, file: File) -> FileOut:
        return cls(
            id=file.pk,
            bytes=file.bytes,
            created_at=int(file.created_at.timestamp()),
            expires_at=epoch(file.expires_at),
            filename=file.filename,
            purpose=file.purpose,
        )


class FileList(Schema):
    object: Literal["list"] = "list"
    data: list[FileOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(Schema):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class ExpiresAfter(Schema):
    anchor: Literal["created_at"]
    seconds: StrictInt


class UploadIn(Schema):
    filename: Annotated[StrictStr, Field(min_length=1, max_length=255)]
    purpose: StrictStr
    bytes: Annotated[StrictInt, Field(gt=0, lt=2**62)]
    mime_type: StrictStr
    expires_after: ExpiresAfter | None = None


class UploadOut(Schema):
    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: UploadStatus
    file: FileOut | None

    @classmethod
    def of(cls, upload: Upload) -> UploadOut:
        return cls(
            id=upload.pk,
            bytes=upload.bytes,
            created_at=int(upload.created_at.timestamp()),
            expires_at=int(upload.expires_at.timestamp()),
            filename=upload.filename,
            purpose=upload.purpose,
            status=UploadStatus(upload.status),
            file=FileOut.of(upload.file) if upload.file else None,
        )


class PartOut(Schema):
    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str

    @classmethod
    def of(cls, part: UploadPart) -> PartOut:
        return cls(
            id=part.pk, created_at=int(part.created_at.timestamp()), upload_id=part.upload_id
        )


class CompleteUploadIn(Schema):
    part_ids: Annotated[list[StrictStr], Field(min_length=1, max_length=10_000)]
    md5: StrictStr | None = None


class OwnWebhookIn(Schema):
    url: Annotated[StrictStr, Field(min_length=1, max_length=2000)]
    secret: Annotated[StrictStr, Field(max_length=200)] | None = Field(
        None, description="`whsec_` and base64 of 24 to 64 bytes; left out: one is made."
    )
    events: Annotated[list[StrictStr], Field(max_length=50)] | None = Field(
        None, description="Of the types `batch.*`; left out: the four that end a batch."
    )


class BatchIn(Schema):
    # Later fields of OpenAI's must not break a client that already sends them.
    model_config = ConfigDict(extra="ignore")

    input_file_id: StrictStr
    endpoint: StrictStr
    completion_window: StrictStr
    metadata: dict[StrictStr, StrictStr] | None = None
    output_expires_after: ExpiresAfter | None = None
    priority: Annotated[
        Literal["low", "normal", "high"], Field(description="Ours, not OpenAI's.")
    ] = "normal"
    progress_percents: Annotated[
        list[StrictInt] | None,
        Field(max_length=20, description="Ours: when to tell of `batch.progress`; 25, 50, 75."),
    ] = None
    webhook: Annotated[
        OwnWebhookIn | None, Field(description="Ours: an address that is told of this batch.")
    ] = None


class BatchError(Schema):
    code: str | None
    message: str | None
    param: str | None
    line: int | None


class BatchErrors(Schema):
    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(Schema):
    total: int
    completed: int
    failed: int


class InputTokensDetails(Schema):
    cached_tokens: int


class OutputTokensDetails(Schema):
    reasoning_tokens: int


class BatchUsage(Schema):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int

    @classmethod
    def of(cls, batch: Batch) -> BatchUsage:
        return cls(
            input_tokens=batch.input_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=batch.cached_tokens),
            output_tokens=batch.output_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=batch.reasoning_tokens),
            total_tokens=batch.input_tokens + batch.output_tokens,
        )


class QueueOut(Schema):
    """Ours, not OpenAI's."""

    position: Annotated[
        int, Field(description="Among the batches that wait for its model, from 1; 0: it runs.")
    ]
    reason: Annotated[str, Field(description="Why it waits, in words.")]
    estimated_start_at: Annotated[
        int | None, Field(description="When it begins, as if no more work came; or when it began.")
    ]
    estimated_completion_at: Annotated[
        int | None, Field(description="When all of it is done, as if no more work came.")
    ]

    @classmethod
    def of(cls, batch: Batch) -> QueueOut | None:
        found = standings.of(batch)
        return cls(**found._asdict()) if found else None


class OwnWebhookOut(Schema):
    """Ours, not OpenAI's."""

    url: str
    events: list[str]
    secret: str | None = Field(
        None, description="Only in the answer that made the batch, if it was made there, too."
    )

    @classmethod
    def of(cls, batch: Batch) -> OwnWebhookOut | None:
        found = batch.own_webhook
        return cls(url=found.url, events=found.event_types, secret=None) if found else None


class BatchOut(Schema):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None
    priority: PriorityName
    queue: Annotated[
        QueueOut | None, Field(description="While it waits or runs: where it stands in the queue.")
    ]
    webhook: OwnWebhookOut | None

    @classmethod
    def of(cls, batch: Batch) -> BatchOut:
        """The batch as the wire shows it; its `model` and `webhook` are to be fetched with it."""
        times = {
            name: epoch(getattr(batch, name))
            for name in cls.model_fields
            if name.endswith("_at") and name not in ("created_at", "expires_at")
        }
        return cls(
            id=batch.pk,
            endpoint=batch.endpoint,
            model=batch.model.name if batch.model else None,
            errors=BatchErrors(data=batch.errors) if batch.errors else None,
            input_file_id=batch.input_file_id,
            completion_window=batch.completion_window,
            status=Status(batch.status),
            output_file_id=batch.output_file_id,
            error_file_id=batch.error_file_id,
            created_at=int(batch.created_at.timestamp()),
            expires_at=int(batch.expires_at.timestamp()),
            request_counts=RequestCounts(
                total=batch.total, completed=batch.completed, failed=batch.failed
            ),
            usage=BatchUsage.of(batch),
            metadata=batch.metadata,
            priority=_PRIORITIES[batch.priority],
            queue=QueueOut.of(batch),
            webhook=OwnWebhookOut.of(batch),
            **times,  # type: ignore[arg-type]
        )


class BatchList(Schema):
    object: Literal["list"] = "list"
    data: list[BatchOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ErrorDetail(Schema):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorOut(Schema):
    error: ErrorDetail
