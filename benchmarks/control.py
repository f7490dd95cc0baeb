"""The control plane alone: 50,000 requests on the instant engine, from upload to completed.

The GPU takes no time here, so what remains is ours: wire, validation, leases, saves, files.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.processes import Family
from tests import stack as stacks

REQUESTS = 50_000
CHILDREN = ("web", "cpu", "beat", "gpu0", "postgres", "valkey")


def run() -> dict[str, float]:
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        stacks.running(Path(folder) / "data") as stack,
    ):
        stack.instant("echo")
        client = stack.client()
        stacks.finished(client, stacks.send(client, stacks.lines(500)).id)
        content = stacks.lines(REQUESTS)
        family = Family({name: stack.pid(name) for name in CHILDREN})
        started = time.perf_counter()
        batch = stacks.send(client, content)
        uploaded = time.perf_counter()
        batch = stacks.finished(client, batch.id)
        ended = time.perf_counter()
        assert batch.request_counts.completed == REQUESTS, batch
        took = ended - started
        phases = {
            "upload_seconds": uploaded - started,
            "validate_seconds": batch.in_progress_at - batch.created_at,
            "run_seconds": batch.finalizing_at - batch.in_progress_at,
            "finalize_seconds": batch.completed_at - batch.finalizing_at,
        }
        return {
            "requests_per_second": REQUESTS / took,
            "seconds": took,
            **{name: float(value) for name, value in phases.items()},
            **{f"cpu_seconds_{name}": spent for name, spent in family.cpu_seconds().items()},
            "peak_mb": max(family.peaks_mb().values()),
            **{f"peak_mb_{name}": peak for name, peak in family.peaks_mb().items()},
        }
