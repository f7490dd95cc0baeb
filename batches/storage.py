"""Where bytes are kept: names, whole-or-nothing writes, and reads that start anywhere.

Django's default storage does the work, on a disk or in a bucket (`batches/s3.py`); whose bytes
they are is the `File` row's to say.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import structlog
from django.conf import settings
from django.core.files.storage import FileSystemStorage, default_storage
from django.core.files.uploadedfile import TemporaryUploadedFile, UploadedFile
from django.core.files.uploadhandler import TemporaryFileUploadHandler
from django.utils import timezone

from accounts.errors import Unavailable

if TYPE_CHECKING:  # boto3 takes 25 MB, which disks do without
    from batches.s3 import S3

logger = structlog.get_logger(__name__)

ABANDONED = timedelta(days=1)
"""A temporary file that nobody has written to for so long is nobody's any more."""
NEAR = 1024 * 1024
"""Bytes that are read and thrown away sooner than another read is begun: a bucket answers after
some 20 ms, in which it could have sent about so much."""
AT_ONCE = 4 * 1024 * 1024
"""Bytes that pieces may have together to be read in one go."""


class StorageAway(Unavailable, OSError):
    """The store does not answer, or not to us: later it may. A caller's 503.

    Its text is for the log; callers are told no more than that.
    """

    def __init__(self, why: str) -> None:
        super().__init__("The storage cannot be reached; try again soon.", code="unavailable")
        self.args = (why,)


def _bucket() -> S3 | None:
    """The backend, unless files lie on a disk."""
    if isinstance(default_storage, FileSystemStorage):
        return None
    return cast("S3", default_storage)


# --- Writing --------------------------------------------------------------------------------


def keep(name: str, content: UploadedFile) -> str:
    """Store an uploaded or self-written temporary file under `name`; returns the name it got.

    Whole or not at all, whatever crashes. On a disk the bytes reach it before the name does, and
    the last step is a rename on the storage's own filesystem. A bucket shows what is complete.
    """
    if isinstance(content, TemporaryUploadedFile) and _bucket() is None:
        content.flush()
        os.fsync(content.fileno())
    return default_storage.save(name, content)


@contextmanager
def temporary(name: str) -> Iterator[TemporaryUploadedFile]:
    """A file to write to and then `keep`; gone at the end when it was not kept."""
    made = TemporaryUploadedFile(name, "application/octet-stream", 0, None)
    _forget_name(made)
    try:
        yield made
    finally:
        with suppress(FileNotFoundError):  # kept: it was renamed away
            made.close()


class UploadHandler(TemporaryFileUploadHandler):
    """Django's, but what comes is a `temporary` file of ours."""

    def new_file(self, *args: Any, **kwargs: Any) -> None:
        super().new_file(*args, **kwargs)
        _forget_name(self.file)


def _forget_name(made: TemporaryUploadedFile) -> None:
    """Only a rename needs a name. Without one the file is gone with its process, however that
    ends: no sweep looks after the disks of all hosts."""
    if _bucket() is not None:
        os.unlink(made.temporary_file_path())


# --- Reading --------------------------------------------------------------------------------


def opened(name: str) -> IO[bytes]:
    return cast("IO[bytes]", default_storage.open(name, "rb"))


def pieces(name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes of each span (offset, length), in the order given; shorter where the file ends.

    Spans that lie near each other are read together.
    """
    found = [b""] * len(spans)
    if not spans:
        return found
    with opened(name) as stream:
        for run in _runs(spans):
            start = spans[run[0]][0]
            stream.seek(start)
            data = stream.read(max(sum(spans[at]) for at in run) - start)
            for at in run:
                offset, length = spans[at]
                found[at] = data[offset - start : offset - start + length]
    return found


def _runs(spans: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Positions of the spans that are read together, each run by where they lie."""
    run: list[int] = []
    start = end = 0
    for at in sorted(range(len(spans)), key=spans.__getitem__):
        offset, length = spans[at]
        if run and (offset > end + NEAR or offset + length > start + AT_ONCE):
            yield run
            run = []
        if not run:
            start = end = offset
        run.append(at)
        end = max(end, offset + length)
    if run:
        yield run


# --- Removing -------------------------------------------------------------------------------


def remove(name: str) -> None:
    default_storage.delete(name)


def discard(name: str) -> None:
    """Remove what no row knows of. A failure is told, and holds up nobody: in the end such bytes
    go with their organization."""
    try:
        remove(name)
    except OSError as error:
        logger.error("bytes not removed", object=name, error=str(error))


def remove_folder(name: str) -> None:
    """Remove a folder of files, should there be one."""
    with suppress(FileNotFoundError):
        _, files = default_storage.listdir(name)
        for each in files:
            remove(f"{name}/{each}")
        remove(name)
    if (bucket := _bucket()) is not None:
        bucket.abort_uploads(f"{name}/", timezone.now())


def remove_abandoned() -> None:
    """Remove half-written files of processes that were killed while they wrote."""
    before = time.time() - ABANDONED.total_seconds()
    for path in Path(settings.FILE_UPLOAD_TEMP_DIR).iterdir():
        with suppress(FileNotFoundError):  # another sweep, or kept at this moment
            if path.is_file() and path.stat().st_mtime < before:
                path.unlink()
    if (bucket := _bucket()) is not None:
        bucket.abort_abandoned(ABANDONED)


# --- Processes ------------------------------------------------------------------------------


def prepare() -> None:
    """What a process of several threads calls before they begin."""
    if (bucket := _bucket()) is not None:
        bucket.prepare()


def is_usable() -> bool:
    """Whether files can be taken now: spooled here, and then kept. Takes 3 seconds at most."""
    if not os.access(settings.FILE_UPLOAD_TEMP_DIR, os.W_OK):
        return False
    bucket = _bucket()
    return bucket is None or bucket.answers()
