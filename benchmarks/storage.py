"""Files of 200 MB on a disk and in a bucket (moto's): peak memory, seconds, requests to S3.

moto answers from this process, on the same cores: its seconds say what ours cost, not what S3 does.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from benchmarks.processes import Family
from tests import stack as stacks
from tests.s3 import CREDENTIALS, S3Server

MB = 2**20
REQUESTS = 50_000
CHILDREN = ("web", "cpu", "gpu0")


def run() -> dict[str, float]:
    server = S3Server()
    server.start()
    bucket = server.bucket()
    found: dict[str, float] = {}
    long = {"CHUNK_SECONDS": "1000"}  # chunks of 1,000 requests, whatever a request's estimate
    on_s3 = {"STORAGE_URL": bucket.url, **CREDENTIALS}
    for kind, variables in (("file", long), ("s3", long | on_s3)):
        with ExitStack() as on_exit:
            folder = on_exit.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
            stack = on_exit.enter_context(stacks.running(Path(folder) / "data", **variables))
            found |= {f"{kind}_{name}": value for name, value in _measured(stack).items()}
    for method, count in Counter(each.split()[0] for each in bucket.asked()).items():
        found[f"s3_requests_{method.lower()}"] = count
    server.stop()
    return found


def _measured(stack: stacks.Stack) -> dict[str, float]:
    stack.instant("echo")
    client = stack.client(timeout=600)
    stacks.finished(client, stacks.send(client, stacks.lines(5_000)).id)  # everything is warm
    family = Family({name: stack.pid(name) for name in CHILDREN})
    idle = family.peaks_mb()
    content = os.urandom(MB) * 200
    started = time.perf_counter()
    file = client.files.create(file=("large.bin", content), purpose="user_data")
    uploaded = time.perf_counter()
    with client.files.with_streaming_response.content(file.id) as response:
        size = sum(len(block) for block in response.iter_bytes())
    downloaded = time.perf_counter()
    assert size == len(content)
    web = family.peaks_mb()["web"]
    large = stacks.lines(REQUESTS, padding="x" * 3_990)
    began = time.perf_counter()
    batch = stacks.finished(client, stacks.send(client, large).id, seconds=1_800, pause=1)
    ended = time.perf_counter()
    assert batch.request_counts.completed == REQUESTS
    return {
        "upload_seconds": uploaded - started,
        "download_seconds": downloaded - uploaded,
        "batch_seconds": ended - began,
        "files_grew_mb_web": web - idle["web"],
        **{f"batch_grew_mb_{name}": mb - idle[name] for name, mb in family.peaks_mb().items()},
        **{f"peak_mb_{name}": mb for name, mb in family.peaks_mb().items()},
    }
