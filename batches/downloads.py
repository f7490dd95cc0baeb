"""The one way in which a stored file leaves the house: streamed, whole or a range of it."""

from __future__ import annotations

import re
from typing import IO

from django.http import FileResponse, HttpRequest
from django.http.response import HttpResponseBase

from accounts.errors import ApiError, NotFound
from batches import storage
from batches.models import File

BLOCK_BYTES = 64 * 1024
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


class RangeNotSatisfiable(ApiError):
    status = 416

    def __init__(self, size: int) -> None:
        super().__init__(f"The file has {size:,} bytes.", code="range_not_satisfiable")
        self.headers = {"Content-Range": f"bytes */{size}"}


def serve_file(request: HttpRequest, file: File) -> HttpResponseBase:
    """The file as an attachment; honours a single byte range (RFC 9110, section 14)."""
    span = _span(request.headers.get("Range", ""), file.bytes)
    try:
        stream = storage.opened(file.storage_name)
    except FileNotFoundError:
        raise NotFound("The file's content is gone.", param="file_id", code="not_found") from None
    if span is None:
        response = FileResponse(stream, as_attachment=True, filename=file.filename)
        response["Content-Type"] = "application/octet-stream"
        response["Content-Length"] = str(file.bytes)
    else:
        response = _partial(stream, file, *span)
    response.block_size = BLOCK_BYTES
    response["Accept-Ranges"] = "bytes"
    return response


def _span(header: str, size: int) -> tuple[int, int] | None:
    """First and last byte asked for; None where the whole file is meant."""
    found = _RANGE.fullmatch(header.strip())
    if not found or not (found[1] or found[2]):
        return None  # several ranges, other units: a server may ignore what it does not serve
    if found[1]:
        first, last = int(found[1]), min(int(found[2] or size), size - 1)
    else:
        first, last = max(size - int(found[2]), 0), size - 1
    if first > last:
        raise RangeNotSatisfiable(size)
    return first, last


def _partial(stream: IO[bytes], file: File, first: int, last: int) -> FileResponse:
    stream.seek(first)
    part = _Part(stream, last - first + 1)
    response = FileResponse(part, as_attachment=True, filename=file.filename, status=206)
    response["Content-Type"] = "application/octet-stream"
    response["Content-Length"] = str(last - first + 1)
    response["Content-Range"] = f"bytes {first}-{last}/{file.bytes}"
    return response


class _Part:
    """The next `left` bytes of a stream, as a readable of its own."""

    def __init__(self, stream: IO[bytes], left: int) -> None:
        self._stream, self._left = stream, left

    def read(self, size: int = -1) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        data = self._stream.read(wanted)
        self._left -= len(data)
        return data

    def close(self) -> None:
        self._stream.close()
