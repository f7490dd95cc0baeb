"""A copy of a batch's files in a bucket of somebody's own."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from batches.handlers import reach
from batches.handlers.base import Batch, Handler, HandlerFailed, Results, Settings

READ_SECONDS, ATTEMPTS = 30, 3
PART_BYTES = 16 * 1024 * 1024
ANSWER_BYTES = 1024 * 1024
"""Longer answers are read no further: botocore would keep them in memory, whatever their size."""
_PORTS = {"http": 80, "https": 443}
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}")
_REGION = re.compile(r"[a-z0-9-]{1,63}")
_PREFIX = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*)?")


class S3Settings(Settings):
    bucket: str = Field(title="Bucket", pattern=rf"^{_BUCKET.pattern}$")
    prefix: str = Field(
        "",
        title="Prefix",
        max_length=500,
        pattern=rf"^{_PREFIX.pattern}$",
        description="The files are at PREFIX/BATCH/output.jsonl and errors.jsonl.",
    )
    region: str = Field("us-east-1", title="Region", pattern=rf"^{_REGION.pattern}$")
    endpoint_url: str = Field(
        "", title="Endpoint", max_length=500, description="Empty: Amazon's of the region."
    )
    access_key_id: str = Field(title="Access key", min_length=1, max_length=200)
    secret_access_key: SecretStr = Field(title="Secret access key", min_length=1, max_length=500)

    @field_validator("endpoint_url")
    @classmethod
    def _is_plain(cls, url: str) -> str:
        parts = urlsplit(url)
        plain = parts.scheme in _PORTS and parts.hostname and not parts.query
        if url and (not plain or parts.username or parts.fragment or parts.path.strip("/")):
            raise ValueError("it must be https://HOST or http://HOST:PORT")
        return url


class S3Handler(Handler[S3Settings]):
    name = "s3"
    title = "S3 bucket"
    summary = "Copies the output and the error file into a bucket of yours."
    settings_schema = S3Settings
    destination = ("endpoint_url", "bucket", "region")

    @property
    def _endpoint(self) -> str:
        return self.settings.endpoint_url or f"https://s3.{self.settings.region}.amazonaws.com"

    def check(self, organization_id: str) -> None:
        parts = urlsplit(self._endpoint)
        reach.address_of(parts.hostname or "", parts.port or _PORTS[parts.scheme])

    def handle(self, batch: Batch, results: Results) -> str:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        client = self._client()
        try:
            for kind in results.files:
                self._copy(client, batch, results, kind)
        except ClientError as error:
            said = error.response.get("Error", {})
            raise HandlerFailed(f"{said.get('Code', '')}: {said.get('Message', '')}") from None
        except (Boto3Error, BotoCoreError) as error:
            raise HandlerFailed(_in_words(error)) from None
        finally:
            client.close()
        return f"s3://{self.settings.bucket}/{self._folder(batch)}"

    def _copy(self, client: Any, batch: Batch, results: Results, kind: str) -> None:
        """Streamed, in parts one after the other: threads would hold ten of them in memory."""
        from boto3.s3.transfer import TransferConfig

        with results.opened(kind) as stream:
            client.upload_fileobj(
                stream,
                self.settings.bucket,
                f"{self._folder(batch)}/{kind}.jsonl",
                ExtraArgs={"ContentType": "application/jsonl"},
                Config=TransferConfig(
                    multipart_threshold=PART_BYTES,
                    multipart_chunksize=PART_BYTES,
                    use_threads=False,
                ),
                Callback=lambda _: results.beat(),
            )

    def _folder(self, batch: Batch) -> str:
        return f"{self.settings.prefix}/{batch.pk}".lstrip("/")

    def _client(self) -> Any:
        """boto3's, with no credentials or proxies but these, which connects where it may."""
        import boto3
        from botocore.config import Config

        session = boto3.Session(
            aws_access_key_id=self.settings.access_key_id,
            aws_secret_access_key=self.settings.secret_access_key.get_secret_value(),
            region_name=self.settings.region,
        )
        path = "path" if self.settings.endpoint_url else "auto"
        client = session.client(
            "s3",
            endpoint_url=self._endpoint if self.settings.endpoint_url else None,
            config=Config(
                connect_timeout=reach.CONNECT_SECONDS,
                read_timeout=READ_SECONDS,
                retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
                proxies={},
                s3={"addressing_style": path},
            ),
        )
        pools = client._endpoint.http_session._manager
        pools.pool_classes_by_scheme = _guarded_pools()
        return client


def _guarded_pools() -> dict[str, Any]:
    """botocore's own, whose connections go to the address that was looked at."""
    from botocore import awsrequest
    from urllib3.exceptions import NewConnectionError

    def connected(connection: Any) -> socket.socket:
        host = connection.host.strip("[]").lower()
        try:
            there = reach.connect(host, connection.port or connection.default_port)
        except (OSError, HandlerFailed) as error:
            raise NewConnectionError(connection, str(error)) from error
        there.settimeout(READ_SECONDS)
        return there

    def answered(pool: Any, *args: Any, **options: Any) -> Any:
        response = super(type(pool), pool).urlopen(*args, **options)
        response.stream = partial(_cut, response.stream)
        return response

    plain = type("Plain", (awsrequest.AWSHTTPConnection,), {"_new_conn": connected})
    tls = type("TLS", (awsrequest.AWSHTTPSConnection,), {"_new_conn": connected})
    return {
        "http": type(
            "Pool",
            (awsrequest.AWSHTTPConnectionPool,),
            {"ConnectionCls": plain, "urlopen": answered},
        ),
        "https": type(
            "PoolTLS",
            (awsrequest.AWSHTTPSConnectionPool,),
            {"ConnectionCls": tls, "urlopen": answered},
        ),
    }


def _cut(stream: Callable[..., Iterator[bytes]], *args: Any, **options: Any) -> Iterator[bytes]:
    """The parts of an answer, as long as they are no more than an S3 has to say."""
    size = 0
    for part in stream(*args, **options):
        size += len(part)
        if size > ANSWER_BYTES:
            raise OSError("The answer is too long for an S3's.")
        yield part


def _in_words(error: Exception) -> str:
    return str(error)[:500] or type(error).__name__
