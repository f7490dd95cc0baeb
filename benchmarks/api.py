"""The wire: retrieving a batch and uploading 1 KB, one caller at a time and sixteen at once."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp

from tests import stack as stacks
from tests.generous import RATE_LIMITS
from tests.stack import Stack

SECONDS = 5.0
CONTENT = b'{"custom_id":"a"}\n' + b" " * 1000
Call = Callable[[aiohttp.ClientSession], Awaitable[None]]


def run() -> dict[str, float]:
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        stacks.running(Path(folder) / "data", "--gpu-workers=0") as stack,
    ):
        stack.instant("echo")
        batch_id = stacks.send(stack.client(), stacks.lines(10)).id
        numbers: dict[str, float] = {}
        for name, call in {
            "get_batch": _get(f"{stack.base_url}/v1/batches/{batch_id}"),
            "post_file": _post(f"{stack.base_url}/v1/files"),
        }.items():
            for at_once in (1, 16):
                numbers |= asyncio.run(_measure(stack.key, call, at_once, name))
            numbers[f"{name}_queries"] = _queries(stack, name, batch_id)
        return _headline(numbers) | numbers


def _headline(numbers: dict[str, float]) -> dict[str, float]:
    """Of retrieving a batch with sixteen callers, and the most queries of either."""
    return {
        "p50_ms": numbers["get_batch_16_p50_ms"],
        "p99_ms": numbers["get_batch_16_p99_ms"],
        "requests_per_second": numbers["get_batch_16_requests_per_second"],
        "queries": max(numbers["get_batch_queries"], numbers["post_file_queries"]),
    }


def _get(url: str) -> Call:
    async def call(session: aiohttp.ClientSession) -> None:
        async with session.get(url) as answer:
            assert answer.status == 200, await answer.text()
            await answer.read()

    return call


def _post(url: str) -> Call:
    async def call(session: aiohttp.ClientSession) -> None:
        form = aiohttp.FormData()
        form.add_field("purpose", "batch")
        form.add_field("file", CONTENT, filename="in.jsonl")
        async with session.post(url, data=form) as answer:
            assert answer.status == 200, await answer.text()
            await answer.read()

    return call


async def _measure(key: str, call: Call, at_once: int, name: str) -> dict[str, float]:
    """Call for `SECONDS` seconds from `at_once` callers, after a short warm-up."""
    times: list[float] = []
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(headers=headers) as session:

        async def caller(until: float, kept: list[float]) -> None:
            while (started := time.perf_counter()) < until:
                await call(session)
                kept.append(time.perf_counter() - started)

        for seconds, kept in ((1.0, []), (SECONDS, times)):
            until = time.perf_counter() + seconds
            await asyncio.gather(*(caller(until, kept) for _ in range(at_once)))
    times.sort()
    head = f"{name}_{at_once}"
    return {
        f"{head}_p50_ms": 1000 * times[len(times) // 2],
        f"{head}_p99_ms": 1000 * times[int(len(times) * 0.99)],
        f"{head}_requests_per_second": len(times) / SECONDS,
    }


_COUNT = """
import sys, django
django.setup()
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
name, key, batch = sys.argv[1:]
client = Client(headers={"authorization": f"Bearer {key}"})
with CaptureQueriesContext(connection) as queries:
    if name == "get_batch":
        answer = client.get(f"/v1/batches/{batch}")
    else:
        file = SimpleUploadedFile("in.jsonl", b"{}")
        answer = client.post("/v1/files", {"purpose": "batch", "file": file})
assert answer.status_code == 200, answer.content
print(len(queries))
"""


def _queries(stack: Stack, name: str, batch_id: str) -> float:
    """SQL statements of one such request, counted in a process of its own on the same database."""
    services = stack.services
    variables = {
        "DATABASE_URL": services.database_url,
        "REDIS_URL": services.redis_url,
        "DATA_DIR": str(stack.data_dir),
        "DJANGO_SETTINGS_MODULE": "portal.settings",
        "LOG_STREAM": "stderr",
    }
    done = subprocess.run(
        [sys.executable, "-c", _COUNT, name, stack.key, batch_id],
        env=os.environ | RATE_LIMITS | variables,
        cwd=stacks.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.splitlines()[-1])
