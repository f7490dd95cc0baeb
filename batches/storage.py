"""Where bytes are kept: names, whole-or-nothing writes, and reads that start anywhere.

Django's default storage does the work; whose bytes they are is the `File` row's to say.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, cast

from django.conf import settings
from django.core.files.storage import default_storage
from django.core.files.uploadedfile import TemporaryUploadedFile, UploadedFile

ABANDONED_SECONDS = 24 * 3600
"""A temporary file that nobody has written to for so long is nobody's any more."""


def keep(name: str, content: UploadedFile) -> str:
    """Store an uploaded or self-written temporary file under `name`; returns the name it got.

    The bytes reach the disk before the name does, and on the storage's own filesystem the last
    step is a rename: a crash leaves the whole file or none.
    """
    if isinstance(content, TemporaryUploadedFile):
        content.flush()
        os.fsync(content.fileno())
    return default_storage.save(name, content)


@contextmanager
def temporary(name: str) -> Iterator[TemporaryUploadedFile]:
    """A file to write to and then `keep`; gone at the end when it was not kept."""
    made = TemporaryUploadedFile(name, "application/octet-stream", 0, None)
    try:
        yield made
    finally:
        with suppress(FileNotFoundError):  # kept: it was renamed away
            made.close()


def opened(name: str) -> IO[bytes]:
    return cast("IO[bytes]", default_storage.open(name, "rb"))


def remove(name: str) -> None:
    default_storage.delete(name)


def remove_abandoned() -> None:
    """Remove half-written files of processes that were killed while they wrote."""
    before = time.time() - ABANDONED_SECONDS
    for path in Path(settings.FILE_UPLOAD_TEMP_DIR).iterdir():
        with suppress(FileNotFoundError):  # another sweep, or kept at this moment
            if path.is_file() and path.stat().st_mtime < before:
                path.unlink()
