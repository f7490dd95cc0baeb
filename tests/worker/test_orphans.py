"""Engine processes that a killed worker left behind, known by pid and start time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest

from worker import orphans
from worker.identity import life_of

Start = Callable[[], "subprocess.Popen[bytes]"]


@pytest.fixture
def ledger(tmp_path: Path, settings: Any) -> Path:
    settings.DATA_DIR = tmp_path
    return tmp_path / "workers" / "gpu0.json"


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def one() -> subprocess.Popen[bytes]:
        code = "import time; time.sleep(600)"
        started.append(subprocess.Popen([sys.executable, "-S", "-c", code]))
        return started[-1]

    yield one
    for process in started:
        process.kill()
        process.wait()


def test_what_was_left_is_ended(ledger: Path, start: Start) -> None:
    left, other = start(), start()
    orphans.remember("gpu0", [left.pid])
    assert orphans.end_left_over("gpu0") == 1
    assert not psutil.pid_exists(left.pid)
    assert other.poll() is None
    assert orjson.loads(ledger.read_bytes()) == []
    assert orphans.end_left_over("gpu0") == 0


def test_another_workers_engine_is_left_alone(ledger: Path, start: Start) -> None:
    theirs = start()
    orphans.remember("gpu1", [theirs.pid])
    assert orphans.end_left_over("gpu0") == 0
    assert theirs.poll() is None


def test_what_was_left_is_known_again_after_somebody_set_the_clock(
    ledger: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = start()
    orphans.remember("gpu0", [left.pid])
    then = psutil.Process(left.pid).create_time()
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: then + 30)
    assert orphans.end_left_over("gpu0") == 1
    assert not psutil.pid_exists(left.pid)


@pytest.mark.parametrize("of_old", [False, True])
def test_a_pid_that_is_used_anew_is_left_alone(ledger: Path, start: Start, of_old: bool) -> None:
    """Nor does what an older version wrote, a time, end anything."""
    innocent = start()
    ledger.parent.mkdir()
    place, _, _ = life_of(innocent.pid).rpartition(":")
    started = psutil.Process(innocent.pid).create_time() if of_old else f"{place}:17"
    ledger.write_bytes(orjson.dumps([{"pid": innocent.pid, "started": started}]))
    assert orphans.end_left_over("gpu0") == 0
    assert innocent.poll() is None


def test_what_has_ended_by_itself_is_forgotten(ledger: Path, start: Start) -> None:
    gone = start()
    orphans.remember("gpu0", [gone.pid])
    gone.kill()
    gone.wait()
    assert orphans.end_left_over("gpu0") == 0


def test_a_process_that_ends_just_now_is_no_error(
    ledger: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = start()
    orphans.remember("gpu0", [left.pid])

    def too_late(process: psutil.Process) -> None:
        os.kill(process.pid, 9)
        left.wait()
        raise psutil.NoSuchProcess(process.pid)

    monkeypatch.setattr(psutil.Process, "kill", too_late)
    assert orphans.end_left_over("gpu0") == 1


def test_pids_that_do_not_exist_are_not_written_down(ledger: Path) -> None:
    orphans.remember("gpu0", [2**22 + 1])
    assert orjson.loads(ledger.read_bytes()) == []


@pytest.mark.parametrize("content", [None, b"", b"[{"])
def test_without_a_ledger_nothing_is_ended(ledger: Path, content: bytes | None) -> None:
    if content is not None:
        ledger.parent.mkdir()
        ledger.write_bytes(content)
    assert orphans.end_left_over("gpu0") == 0


def test_a_name_is_held_by_one_worker_of_a_host_at_a_time() -> None:
    first = orphans.claim_name("only-one")
    assert first is not None
    assert orphans.claim_name("only-one") is None
    first.close()
    again = orphans.claim_name("only-one")
    assert again is not None
    again.close()
