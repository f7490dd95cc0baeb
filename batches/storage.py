"""Where bytes are kept: names, whole-or-nothing writes, and reads that start anywhere.

Django's default storage does the work; whose bytes they are is the `File` row's to say.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

from django.core.files.storage import default_storage
from django.core.files.uploadedfile import TemporaryUploadedFile, UploadedFile


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
        try:
            made.close()
        except FileNotFoundError:
            pass  # kept: it was renamed away


def opened(name: str) -> IO[bytes]:
    return cast("IO[bytes]", default_storage.open(name, "rb"))


def remove(name: str) -> None:
    default_storage.delete(name)
