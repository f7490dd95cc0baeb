"""A process's life: unlike every other, and known to be over only where that is sure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import wait_for
from worker import identity


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    code = "import time; time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-S", "-c", code])
    yield process
    process.kill()
    process.wait()


def changed(life: str, field: int, value: str) -> str:
    fields = life.split(":")
    fields[field] = value
    return ":".join(fields)


def test_a_process_is_who_it_is_and_nobody_else(child: subprocess.Popen[bytes]) -> None:
    mine = identity.of_this_process("gpu0", gpu="0,1", gpu_kind="H200")
    assert (mine.name, mine.gpu, mine.gpu_kind, mine.pid) == ("gpu0", "0,1", "H200", os.getpid())
    assert mine == identity.of_this_process("gpu0", gpu="0,1", gpu_kind="H200")
    assert mine.life != identity.life_of(child.pid)


def test_one_that_runs_or_is_stopped_has_not_ended(child: subprocess.Popen[bytes]) -> None:
    life = identity.life_of(child.pid)
    assert identity.has_ended(life) is False
    child.send_signal(signal.SIGSTOP)
    wait_for(lambda: identity._started(child.pid) and state(child.pid) == "T")
    assert identity.has_ended(life) is False


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_one_that_was_killed_has_ended_before_and_after_its_parent_looks(
    child: subprocess.Popen[bytes],
) -> None:
    life = identity.life_of(child.pid)
    child.kill()
    wait_for(lambda: state(child.pid) == "Z")
    assert identity.has_ended(life) is True
    child.wait()
    assert identity.has_ended(life) is True


def test_one_whose_pid_is_used_anew_has_ended() -> None:
    assert identity.has_ended(changed(identity.life_of(os.getpid()), 3, "17")) is True


@pytest.mark.parametrize("field", [0, 1])
def test_of_another_boot_or_pid_namespace_nothing_is_sure(
    child: subprocess.Popen[bytes], field: int
) -> None:
    life = changed(identity.life_of(child.pid), field, "another")
    child.kill()
    child.wait()
    assert identity.has_ended(life) is False


def test_another_users_process_that_is_hidden_has_not_ended(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    life = identity.life_of(child.pid)

    def forbid(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbid)
    monkeypatch.setattr(identity, "_started", lambda pid: None)
    assert identity.has_ended(life) is False
    monkeypatch.undo()  # the fixture ends the child


@pytest.mark.parametrize("life", ["", "x", "a:b", "a:b:c:d:e"])
def test_what_is_no_life_says_nothing(life: str) -> None:
    assert identity.has_ended(life) is False


def test_the_version_is_the_build_or_else_the_commit(settings: Any, tmp_path: Path) -> None:
    settings.BUILD_ID = "build 7"
    assert identity.of_this_process("gpu0").version == "build 7"
    settings.BUILD_ID, settings.BASE_DIR = "", tmp_path
    assert identity.of_this_process("gpu0").version == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t.test"]
    for command in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    found = identity.of_this_process("gpu0").version
    assert len(found) >= 7
    assert head.stdout.startswith(found)
