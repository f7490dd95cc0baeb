"""A server that speaks S3 (moto's) over real HTTP on loopback: to count what is asked of it, to stop
and start, and to make trouble."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto.core.authorization import enable_iam_authentication
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import BaseWSGIServer, make_server

from accounts.ids import new_id
from portal import embedded

logging.getLogger("werkzeug").setLevel(logging.ERROR)  # which tells of every request
REGION = "eu-central-1"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "no secret"}

Answer = Callable[[dict[str, Any], Any], Iterable[bytes]]


class S3Server:
    """What it keeps outlives a stop: it is in this process's memory."""

    def __init__(self) -> None:
        self.port = embedded.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.asked: list[str] = []
        """Of each request its method, and its range or query."""
        self._moto: Answer = DomainDispatcherApplication(create_backend_app)
        self._answer = self._moto
        self._server: BaseWSGIServer
        self._thread: threading.Thread

    def start(self) -> None:
        self._server = make_server(
            "127.0.0.1", self.port, self._app, threaded=True, request_handler=MotoRequestHandler
        )
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        self._server.shutdown()
        self._thread.join()

    def _app(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        more = environ.get("HTTP_RANGE") or environ["QUERY_STRING"]
        self.asked.append(f"{environ['REQUEST_METHOD']} {more}".strip())
        return self._answer(environ, start_response)

    # --- Trouble ----------------------------------------------------------------------------

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self.stop()
        try:
            yield
        finally:
            self.start()

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Take every request, and answer none."""
        released = threading.Event()

        def hang(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            released.wait(60)
            return self._moto(environ, start_response)

        with self._answering(hang):
            try:
                yield
            finally:
                released.set()

    @contextmanager
    def refusing(
        self, status: str, code: str, method: str = "", times: int = 999
    ) -> Iterator[None]:
        """Answer requests (of one method) with an error of S3's, the first so many times."""
        left = [times]

        def refuse(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            if left[0] < 1 or environ["REQUEST_METHOD"] != (method or environ["REQUEST_METHOD"]):
                return self._moto(environ, start_response)
            left[0] -= 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(status, [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()]

        with self._answering(refuse):
            yield

    @contextmanager
    def breaking_off(self, times: int) -> Iterator[None]:
        """Send half of what was asked for, the first so many times."""
        left = [times]

        def half(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            whole = b"".join(self._moto(environ, start_response))
            left[0] -= 1
            return [whole if left[0] < 0 else whole[: len(whole) // 2]]

        with self._answering(half):
            yield

    @contextmanager
    def _answering(self, answer: Answer) -> Iterator[None]:
        self._answer = answer
        try:
            yield
        finally:
            self._answer = self._moto

    @contextmanager
    def as_user(self, allowed: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
        """Check who asks, and what they may; the key of a user who may just this."""
        iam, name = self._client("iam"), new_id("user-")
        iam.create_user(UserName=name)
        policy = json.dumps({"Version": "2012-10-17", "Statement": allowed})
        iam.put_user_policy(UserName=name, PolicyName="tests", PolicyDocument=policy)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        with enable_iam_authentication():
            yield {"access_key": key["AccessKeyId"], "secret_key": key["SecretAccessKey"]}

    # --- Buckets ----------------------------------------------------------------------------

    def _client(self, service: str) -> Any:
        return boto3.client(
            service,
            endpoint_url=self.url,
            region_name=REGION,
            aws_access_key_id="tests",
            aws_secret_access_key="no secret",
        )

    def bucket(self, prefix: str = "portal") -> Bucket:
        name = new_id("tests-")
        where = {"LocationConstraint": REGION}
        client = self._client("s3")
        client.create_bucket(Bucket=name, CreateBucketConfiguration=where)
        return Bucket(self, client, name, prefix)


class Bucket:
    def __init__(self, server: S3Server, client: Any, name: str, prefix: str) -> None:
        self.server, self.client, self.name, self.prefix = server, client, name, prefix

    @property
    def url(self) -> str:
        """As STORAGE_URL."""
        options = f"endpoint_url={self.server.url}&region={REGION}&addressing_style=path"
        return f"s3://{self.name}/{self.prefix}?{options}"

    @property
    def keys(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket=self.name).get("Contents", [])
        return [each["Key"] for each in found]

    @property
    def unfinished(self) -> list[str]:
        """Keys of multipart uploads that were neither completed nor aborted."""
        found = self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", [])
        return [each["Key"] for each in found]

    def begin(self, key: str) -> None:
        """What a process leaves that is killed while it puts a large file."""
        begun = self.client.create_multipart_upload(Bucket=self.name, Key=key)
        part = {"Bucket": self.name, "Key": key, "UploadId": begun["UploadId"]}
        self.client.upload_part(**part, PartNumber=1, Body=b"x")

    def asked(self) -> list[str]:
        """The requests since the last time."""
        found, self.server.asked = self.server.asked, []
        return found
