"""I6: memory of every process is flat in the size of a file and of a batch (trap 10)."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.processes import Family
from tests import stack as stacks
from tests.stack import finished, lines, send

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chaos")]

REQUESTS = 50_000
ROOM_MB = 64
PROCESSES = ("web", "cpu", "gpu0")


def test_trap_10_a_200_mb_batch_of_50_000_requests_takes_no_memory(tmp_path: Path) -> None:
    """Upload, validation, run and finalizing, each within 64 MB of the process's idle value."""
    with stacks.running(tmp_path / "data") as stack:
        stack.instant("echo")
        client = stack.client(timeout=300)
        finished(client, send(client, lines(200)).id)  # everything imported, every pool warm
        idle = Family({name: stack.pid(name) for name in PROCESSES}).peaks_mb()
        measured = Family({name: stack.pid(name) for name in PROCESSES})
        batch = finished(client, send(client, _large_input()).id, seconds=600)
        assert batch.request_counts.completed == REQUESTS
        grown = {name: peak - idle[name] for name, peak in measured.peaks_mb().items()}
        assert {name: mb for name, mb in grown.items() if mb > ROOM_MB} == {}, (idle, grown)


def _large_input() -> bytes:
    """Just under the limit of 200 MiB."""
    content = lines(REQUESTS, padding="x" * 3_990)
    assert 195 * 2**20 < len(content) < 200 * 2**20
    return content
