"""Hosts that share a database, a Redis and a bucket, and nothing else; and a bucket that goes away."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import psycopg
import pytest

from benchmarks.processes import Family
from tests import stack as stacks
from tests.s3 import CREDENTIALS, Bucket, S3Server
from tests.stack import ROOT, Stack, answers, finished, lines, send, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chaos")]

MB = 2**20
LARGE_MB, ROOM_MB = 128, 64
QUICK = {"SWEEP_SECONDS": "1", "CHUNK_REQUESTS": "40"}


def test_hosts_share_nothing_but_three_addresses(tmp_path: Path, s3_server: S3Server) -> None:
    bucket = s3_server.bucket()
    shared = {"STORAGE_URL": bucket.url, **CREDENTIALS}
    with (
        stacks.running(tmp_path / "web", "--gpu-workers=0", **shared, **QUICK) as stack,
        _far_worker(tmp_path / "far", stack, shared) as log,
    ):
        stack.instant("slow", delay_ms=250, concurrency=4)
        client = stack.client(timeout=300, max_retries=0)
        file_id = _large_file_and_back(stack, client)
        _parts_become_a_file(client)
        _an_outage_loses_and_doubles_nothing(client, s3_server, log)
        client.files.delete(file_id)
        wait_for(lambda: not any(file_id in key for key in bucket.keys))
        assert _left_on(tmp_path) == []
        _a_purged_organization_leaves_nothing(stack, bucket)


@contextmanager
def _far_worker(data_dir: Path, stack: Stack, shared: dict[str, str]) -> Iterator[Path]:
    """A worker of another host; yields its log."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    known = {
        "DATABASE_URL": stack.services.database_url,
        "REDIS_URL": stack.services.redis_url,
        "DATA_DIR": str(data_dir),
    }
    log = data_dir.with_suffix(".log")
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker", "--name", "far"],
            cwd=ROOT,
            env=kept | known | shared,
            stdout=file,
            stderr=file,
        )
    try:
        yield log
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        finally:
            process.kill()
            process.wait()


def _large_file_and_back(stack: Stack, client: openai.OpenAI) -> str:
    """Up and down, and a range of it, in a fraction of its size of memory."""
    content = os.urandom(MB) * LARGE_MB
    family = Family({"web": stack.pid("web")})
    idle = family.peaks_mb()["web"]
    file = client.files.create(file=("large.bin", content), purpose="user_data")
    digest, size = hashlib.md5(), 0
    with client.files.with_streaming_response.content(file.id) as response:
        for block in response.iter_bytes():
            digest.update(block)
            size += len(block)
    assert (size, digest.digest()) == (len(content), hashlib.md5(content).digest())
    span = {"Range": f"bytes={100 * MB - 5}-{100 * MB + 4}"}
    part = client.files.content(file.id, extra_headers=span).content
    assert part == content[100 * MB - 5 : 100 * MB + 5]
    assert family.peaks_mb()["web"] - idle < ROOM_MB
    return file.id


def _parts_become_a_file(client: openai.OpenAI) -> None:
    content = os.urandom(MB) * 20
    upload = client.uploads.create(
        bytes=len(content), filename="x.bin", mime_type="x/y", purpose="user_data"
    )
    halves = content[: 8 * MB], content[8 * MB :]
    ids = [client.uploads.parts.create(upload.id, data=half).id for half in halves]
    done = client.uploads.complete(upload.id, part_ids=ids, md5=hashlib.md5(content).hexdigest())
    assert done.file is not None
    assert client.files.content(done.file.id).content == content


def _an_outage_loses_and_doubles_nothing(
    client: openai.OpenAI, server: S3Server, log: Path
) -> None:
    """While one batch runs, one waits for its validation, and one for its files."""
    batch = send(client, lines(160, "slow"))
    other = client.files.create(file=("in.jsonl", lines(10, "slow")), purpose="batch")
    wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed)
    with server.stopped():
        waiting = client.batches.create(
            input_file_id=other.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        with pytest.raises(openai.InternalServerError) as refused:
            client.files.create(file=("in.jsonl", lines(1)), purpose="batch")
        assert (refused.value.status_code, refused.value.code) == (503, "unavailable")
        wait_for(lambda: b"chunk cannot be read" in log.read_bytes())
        assert client.batches.retrieve(waiting.id).status == "validating"
    for made, count in ((batch, 160), (waiting, 10)):
        ended = finished(client, made.id)
        assert (ended.status, ended.request_counts.completed) == ("completed", count)
        found = answers(client, ended.output_file_id)
        assert [line["custom_id"] for line in found] == [f"request-{at}" for at in range(count)]
        said = [line["response"]["body"]["choices"][0]["message"]["content"] for line in found]
        assert said == [f"words {at}" for at in range(count)]
    assert len(list(client.files.list(purpose="batch_output"))) == 2


def _left_on(folder: Path) -> list[Path]:
    """What was spooled on either host."""
    found: list[Path] = []
    for host in ("web", "far"):
        found += (folder / host / "incoming").iterdir()
    return found


def _a_purged_organization_leaves_nothing(stack: Stack, bucket: Bucket) -> None:
    bucket.begin(f"portal/{bucket.keys[0].split('/')[1]}/broken-off")
    with psycopg.connect(stack.services.database_url) as connection:
        connection.execute(
            "UPDATE accounts_organization SET deleted_at = now() - interval '31 days'"
        )
    wait_for(lambda: bucket.keys == [] and bucket.unfinished == [])
