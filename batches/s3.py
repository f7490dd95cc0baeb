"""Files in a bucket: django-storages' backend, read by ranges, with one client for all threads.

Every error of boto3 becomes an `OSError` here, and nowhere else: `FileNotFoundError`, or
`StorageAway` for what may pass.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NoReturn

import boto3
import structlog
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError
from django.utils import timezone
from django.utils.functional import cached_property
from storages.backends.s3 import S3Storage
from storages.utils import clean_name

from batches.storage import NEAR, StorageAway

logger = structlog.get_logger(__name__)

CONNECT_SECONDS, READ_SECONDS, ATTEMPTS = 3, 20, 3
"""A store that hangs costs a request, at worst, a minute of its thread."""
PROBE = Config(connect_timeout=1, read_timeout=2, retries={"total_max_attempts": 1})
PART_BYTES = 16 * 1024 * 1024
"""Larger files are put in parts of this size. One after the other: boto3's threads would hold
ten parts in memory for each upload."""
LOOK_SECONDS = 3600.0
BUFFER, LARGEST_WINDOW = 64 * 1024, 4 * 1024 * 1024
_MISSING = {"NoSuchKey", "NoSuchUpload"}
"""Not any 404: one of a wrong address, or of a bucket that is gone, would lose files for good."""

Fetch = Callable[[int, int], tuple[bytes, int]]
"""Bytes from an offset on, at most so many, and how many the whole has."""


class S3(S3Storage):
    client_config: Any

    def __init__(self, **options: Any) -> None:
        # Not what the sender calls it: that would go into a header.
        kind = {"ContentType": "application/octet-stream"}
        super().__init__(object_parameters=kind, **options)
        self.client_config = self.client_config.merge(
            Config(
                connect_timeout=CONNECT_SECONDS,
                read_timeout=READ_SECONDS,
                retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
                max_pool_connections=32,
                tcp_keepalive=True,
            )
        )
        self.transfer_config = TransferConfig(
            multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, use_threads=False
        )
        self._look_again_at = 0.0

    @cached_property
    def connection(self) -> Any:
        """One for all threads, where django-storages makes one for each: 12 MB and half a second."""
        return super().connection

    @cached_property
    def _session(self) -> boto3.Session:
        return super()._create_session()

    def _create_session(self) -> boto3.Session:
        return self._session

    @cached_property
    def _probe(self) -> Any:
        return self._session.client(
            "s3",
            region_name=self.region_name,
            endpoint_url=self.endpoint_url,
            config=self.client_config.merge(PROBE),
        )

    def prepare(self) -> None:
        """Make the clients, which is no thing for several threads at once: each would make its own."""
        _ = self.connection, self._probe

    def answers(self) -> bool:
        """Whether the bucket can be looked into, by one quick request."""
        prefix = f"{self.location}/" if self.location else ""
        with suppress(StorageAway), _as_os_errors(self.bucket_name):
            self._probe.list_objects_v2(Bucket=self.bucket_name, Prefix=prefix, MaxKeys=1)
            return True
        return False

    def get_available_name(self, name: str, max_length: int | None = None) -> str:
        """Always a new one: a put replaces what is there, and a look before it would be too early."""
        return self.get_alternative_name(clean_name(name), "")  # type: ignore[no-any-return]

    def _open(self, name: str, mode: str = "rb") -> io.BufferedReader:
        key = self._normalize_name(clean_name(name))
        return io.BufferedReader(Ranges(partial(self._fetch, key)), BUFFER)

    def _fetch(self, key: str, start: int, length: int) -> tuple[bytes, int]:
        """One ranged GET, and again when it breaks off: what fails earlier boto3 itself repeats."""
        left = ATTEMPTS
        with _as_os_errors(key):
            while True:
                body, size = self._get(key, start, length)
                left -= 1
                try:
                    return body.read(), size
                except (HTTPClientError, IncompleteReadError):
                    if not left:
                        raise

    def _get(self, key: str, start: int, length: int) -> tuple[Any, int]:
        """The body that is to come, and the size of the whole."""
        span = f"bytes={start}-{start + length - 1}"
        try:
            answer = self.connection.meta.client.get_object(
                Bucket=self.bucket_name, Key=key, Range=span
            )
        except ClientError as error:
            if _code(error) == "InvalidRange":  # it is empty: no byte of it can be asked for
                return io.BytesIO(), 0
            raise
        if "ContentRange" not in answer:  # more would come than there may be memory for
            answer["Body"].close()
            raise StorageAway(f"{key}: the store does not serve ranges")
        return answer["Body"], int(answer["ContentRange"].rpartition("/")[2])

    def _save(self, name: str, content: Any) -> str:
        try:
            with _as_os_errors(name):
                return super()._save(name, content)  # type: ignore[no-any-return]
        except FileNotFoundError as error:  # somebody has aborted it
            _away(name, error)

    def delete(self, name: str) -> None:
        # django-storages' own takes a bucket that is not there for an object that is gone.
        key = self._normalize_name(clean_name(name))
        with suppress(FileNotFoundError), _as_os_errors(key):
            self.connection.meta.client.delete_object(Bucket=self.bucket_name, Key=key)

    def listdir(self, name: str) -> tuple[list[str], list[str]]:
        with _as_os_errors(name):
            return super().listdir(name)  # type: ignore[no-any-return]

    def abort_abandoned(self, age: timedelta) -> None:
        """Abort uploads that were begun so long ago; looks for them once an hour."""
        if time.monotonic() >= self._look_again_at:
            self._look_again_at = time.monotonic() + LOOK_SECONDS
            self.abort_uploads("", timezone.now() - age)

    def abort_uploads(self, name: str, before: datetime) -> None:
        """Drop what was begun before then, under a folder, and never became a file."""
        client, bucket = self.connection.meta.client, {"Bucket": self.bucket_name}
        prefix = self._normalize_name(name)
        with _as_os_errors(name):
            pages = client.get_paginator("list_multipart_uploads").paginate(**bucket, Prefix=prefix)
            for upload in (each for page in pages for each in page.get("Uploads", ())):
                if upload["Initiated"] < before:
                    of = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                    with suppress(FileNotFoundError), _as_os_errors(upload["Key"]):
                        client.abort_multipart_upload(**bucket, **of)


@contextmanager
def _as_os_errors(name: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        if _code(error) in _MISSING:
            raise FileNotFoundError(f"No such object: {name}") from error
        _away(name, error)
    except (BotoCoreError, Boto3Error) as error:
        _away(name, error)


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code"))


def _away(name: str, error: Exception) -> NoReturn:
    logger.warning("storage away", object=name, error=str(error))
    raise StorageAway(f"{name}: {error}") from error


class Ranges(io.RawIOBase):
    """An object as a seekable stream, of which a window is fetched at a time.

    A read where the last window ended, or a little further on, doubles the next one: a whole file
    is few requests, a few lines of it are not much more than their bytes.
    """

    def __init__(self, fetch: Fetch) -> None:
        """The first window is fetched at once: it tells the size, and whether there is anything."""
        self._fetch = fetch
        self._at = self._start = 0
        self._ahead = BUFFER
        self._window, self._size = fetch(0, BUFFER)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("negative seek position")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._size:
            return 0
        if not self._start <= self._at < self._start + len(self._window):
            self._move(len(buffer))
        begin = self._at - self._start
        data = self._window[begin : begin + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _move(self, wanted: int) -> None:
        gap = self._at - self._start - len(self._window)
        self._ahead = min(2 * self._ahead, LARGEST_WINDOW) if 0 <= gap <= NEAR else BUFFER
        self._window = b""  # goes before the next one comes
        # BufferedReader asks for whole buffers, and for what is left in a second call.
        self._window, _ = self._fetch(self._at, max(self._ahead, wanted + BUFFER))
        self._start = self._at
