"""`/v1/files`, `/v1/uploads` and `/v1/batches`: parse, ask a service, answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

from django.conf import settings
from django.http import HttpRequest, HttpResponseBase
from ninja import Field, File, Form, Query, Router, Schema
from ninja.decorators import decorate_view
from ninja.files import UploadedFile
from ninja.operation import Operation

from accounts import access
from accounts.access import Caller
from accounts.authentication import caller_of
from accounts.errors import ApiError, BadRequest
from accounts.paging import ends, page_of
from batches import downloads, idempotency, multipart
from batches import models as rows
from batches.schemas import (
    BatchIn,
    BatchList,
    BatchOut,
    CompleteUploadIn,
    FileDeleted,
    FileList,
    FileOut,
    PartOut,
    UploadIn,
    UploadOut,
)
from batches.services import batches, files, reruns, uploads, webhooks

files_router = Router(tags=["Files"])
uploads_router = Router(tags=["Uploads"])
batches_router = Router(tags=["Batches"])


_FORM_BYTES = 64 * 1024
"""What a form's boundaries and other fields may take beside the file."""


def at_most(limit: int) -> Callable[..., Any]:
    """Refuse larger bodies before anything of them is read; for `decorate_view` alone."""

    def decorate(run: Callable[..., HttpResponseBase]) -> Callable[..., HttpResponseBase]:
        operation: Operation = run.__self__  # type: ignore[attr-defined]

        @wraps(run)
        def checked(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
            try:
                multipart.require_length(request, limit + _FORM_BYTES)
            except ApiError as error:  # nobody above an operation turns errors into answers
                return operation.api.on_exception(request, error)
            return run(request, *args, **kwargs)

        return checked

    return decorate


class FileForm(Schema):
    """The form's fields; the nested one comes in brackets, as the SDKs send it."""

    purpose: str
    expires_after_anchor: str | None = Field(None, alias="expires_after[anchor]")
    expires_after_seconds: int | None = Field(None, alias="expires_after[seconds]")


def _check_anchor(form: FileForm) -> None:
    anchor, seconds = form.expires_after_anchor, form.expires_after_seconds
    if anchor not in (None, "created_at"):
        raise BadRequest("The anchor must be 'created_at'.", param="expires_after[anchor]")
    if (anchor is None) != (seconds is None):
        missing = "anchor" if anchor is None else "seconds"
        raise BadRequest(
            f"expires_after[{missing}] is missing.",
            param=f"expires_after[{missing}]",
            code="missing_required_parameter",
        )


@files_router.post("/files", response=FileOut, summary="Upload a file")
@decorate_view(at_most(settings.MAX_FILE_BYTES))
def create_file(
    request: HttpRequest, form: Form[FileForm], file: File[UploadedFile]
) -> FileOut | dict[str, Any]:
    caller = caller_of(request, "files")
    multipart.require_whole(request)
    multipart.require_single(request)
    _check_anchor(form)

    def create() -> FileOut:
        return FileOut.of(
            files.create_file(
                actor=caller,
                content=file,
                filename=file.name or "",
                purpose=form.purpose,
                expires_after_seconds=form.expires_after_seconds,
            )
        )

    said = [form.model_dump(), file.name]
    return idempotency.once(request, caller, create, said=said, content=file)


class FilePage(Schema):
    purpose: str | None = None
    limit: int = Field(10_000, ge=1, le=10_000)
    order: Annotated[str, Field(pattern="^(asc|desc)$")] = "desc"
    after: Annotated[str | None, Field(pattern=r"^(file-[0-9a-f]{32})?$")] = None


@files_router.get("/files", response=FileList, summary="List files")
def list_files(request: HttpRequest, page: Query[FilePage]) -> FileList:
    caller = caller_of(request, "files.read")
    with caller.scope():
        mine = rows.File.objects.filter(deleted_at=None)
        if page.purpose:
            mine = mine.filter(purpose=page.purpose.replace("\0", ""))
        found, more = page_of(mine, page.after, page.limit, descending=page.order == "desc")
    return FileList(data=[FileOut.of(file) for file in found], has_more=more, **ends(found))


@files_router.get("/files/{file_id}", response=FileOut, summary="Retrieve a file")
def retrieve_file(request: HttpRequest, file_id: str) -> FileOut:
    return FileOut.of(_file(caller_of(request, "files.read"), file_id))


@files_router.delete("/files/{file_id}", response=FileDeleted, summary="Delete a file")
def delete_file(request: HttpRequest, file_id: str) -> FileDeleted:
    caller = caller_of(request, "files")
    files.delete_file(actor=caller, file=_file(caller, file_id))
    return FileDeleted(id=file_id)


@files_router.get(
    "/files/{file_id}/content",
    summary="Retrieve a file's content",
    openapi_extra={
        "responses": {
            200: {
                "description": "The bytes; a Range header is honoured.",
                "content": {"application/octet-stream": {"schema": {"format": "binary"}}},
            }
        }
    },
)
def file_content(request: HttpRequest, file_id: str) -> HttpResponseBase:
    return downloads.serve_file(request, _file(caller_of(request, "files.read"), file_id))


@uploads_router.post("/uploads", response=UploadOut, summary="Begin an upload in parts")
def create_upload(request: HttpRequest, given: UploadIn) -> UploadOut | dict[str, Any]:
    caller = caller_of(request, "files")

    def create() -> UploadOut:
        return UploadOut.of(
            uploads.create_upload(
                actor=caller,
                filename=given.filename,
                purpose=given.purpose,
                size=given.bytes,
                mime_type=given.mime_type,
                expires_after_seconds=given.expires_after.seconds if given.expires_after else None,
            )
        )

    return idempotency.once(request, caller, create, said=given.model_dump())


@uploads_router.post("/uploads/{upload_id}/parts", response=PartOut, summary="Add a part")
@decorate_view(at_most(uploads.MAX_PART_BYTES))
def add_part(
    request: HttpRequest, upload_id: str, data: File[UploadedFile]
) -> PartOut | dict[str, Any]:
    caller = caller_of(request, "files")
    multipart.require_whole(request, param="data")
    multipart.require_single(request)
    upload = _upload(caller, upload_id)

    def add() -> PartOut:
        return PartOut.of(uploads.add_part(actor=caller, upload=upload, content=data))

    return idempotency.once(request, caller, add, content=data)


@uploads_router.post("/uploads/{upload_id}/complete", response=UploadOut, summary="Complete")
def complete_upload(
    request: HttpRequest, upload_id: str, given: CompleteUploadIn
) -> UploadOut | dict[str, Any]:
    caller = caller_of(request, "files")
    upload = _upload(caller, upload_id)

    def complete() -> UploadOut:
        return UploadOut.of(
            uploads.complete_upload(
                actor=caller, upload=upload, part_ids=given.part_ids, md5=given.md5
            )
        )

    return idempotency.once(request, caller, complete, said=given.model_dump())


@uploads_router.post("/uploads/{upload_id}/cancel", response=UploadOut, summary="Cancel an upload")
def cancel_upload(request: HttpRequest, upload_id: str) -> UploadOut | dict[str, Any]:
    caller = caller_of(request, "files")
    upload = _upload(caller, upload_id)

    def cancel() -> UploadOut:
        return UploadOut.of(uploads.cancel_upload(actor=caller, upload=upload))

    return idempotency.once(request, caller, cancel)


@batches_router.post("/batches", response=BatchOut, summary="Create a batch")
def create_batch(request: HttpRequest, given: BatchIn) -> BatchOut | dict[str, Any]:
    caller = caller_of(request, "batches")
    expires, webhook = given.output_expires_after, given.webhook

    def create() -> BatchOut:
        batch = batches.create_batch(
            actor=caller,
            input_file_id=given.input_file_id,
            endpoint=given.endpoint,
            completion_window=given.completion_window,
            metadata=given.metadata,
            priority=given.priority,
            output_expires_after_seconds=expires.seconds if expires else None,
            progress_percents=given.progress_percents,
            webhook=batches.OwnWebhook(**webhook.model_dump()) if webhook else None,
        )
        return _made(batch, show_secret=webhook is not None and webhook.secret is None)

    once = {"webhook": {"secret"}}
    return idempotency.once(request, caller, create, said=given.model_dump(), only_once=once)


def _made(batch: rows.Batch, *, show_secret: bool) -> BatchOut:
    """The answer that makes a batch; in it alone is the secret that was made for its webhook."""
    made = BatchOut.of(batch)
    if show_secret and made.webhook and batch.own_webhook:
        made.webhook.secret = webhooks.secret_of(batch.own_webhook)
    return made


class BatchPage(Schema):
    limit: int = Field(20, ge=1, le=100)
    after: Annotated[str | None, Field(pattern=r"^(batch_[0-9a-f]{32})?$")] = None


@batches_router.get("/batches", response=BatchList, summary="List batches")
def list_batches(request: HttpRequest, page: Query[BatchPage]) -> BatchList:
    caller = caller_of(request, "batches.read")
    with caller.scope():
        mine = rows.Batch.objects.select_related("model", "webhook")
        found, more = page_of(mine, page.after, page.limit, descending=True)
    return BatchList(data=[BatchOut.of(batch) for batch in found], has_more=more, **ends(found))


@batches_router.get("/batches/{batch_id}", response=BatchOut, summary="Retrieve a batch")
def retrieve_batch(request: HttpRequest, batch_id: str) -> BatchOut:
    return BatchOut.of(_batch(caller_of(request, "batches.read"), batch_id))


@batches_router.post("/batches/{batch_id}/cancel", response=BatchOut, summary="Cancel a batch")
def cancel_batch(request: HttpRequest, batch_id: str) -> BatchOut | dict[str, Any]:
    caller = caller_of(request, "batches")
    batch = _batch(caller, batch_id)

    def cancel() -> BatchOut:
        return BatchOut.of(batches.cancel_batch(actor=caller, batch=batch))

    return idempotency.once(request, caller, cancel)


@batches_router.post(
    "/batches/{batch_id}/retry", response=BatchOut, summary="Retry what failed of a batch"
)
def retry_batch(request: HttpRequest, batch_id: str) -> BatchOut | dict[str, Any]:
    """Ours, not OpenAI's: a new batch of those requests that failed or were never run."""
    caller = caller_of(request, "batches")
    related = ("input_file", "project")
    batch = access.get(caller, rows.Batch, batch_id, param="batch_id", related=related)

    def retry() -> BatchOut:
        return BatchOut.of(reruns.retry_failed(actor=caller, batch=batch))

    return idempotency.once(request, caller, retry)


def _file(caller: Caller, file_id: str) -> rows.File:
    return access.get(caller, rows.File, file_id, param="file_id", deleted_at=None)


def _upload(caller: Caller, upload_id: str) -> rows.Upload:
    return access.get(caller, rows.Upload, upload_id, param="upload_id")


def _batch(caller: Caller, batch_id: str) -> rows.Batch:
    return access.get(caller, rows.Batch, batch_id, param="batch_id", related=("model", "webhook"))
