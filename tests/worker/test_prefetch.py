"""The next model's weights are brought to the host while the worker still serves another's batch.

The engines are scripted; the process that reads is the real one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from structlog.testing import capture_logs

from models_registry.services import register_model
from tests import jobs
from tests.conftest import Person
from tests.jobs import wait_for
from tests.worker import scripted
from tests.worker.scripted import Script, answer, hold, running
from worker import prefetch
from worker.loop import LeaseLoop

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("own_storage", "wakeups_sent", "echo", "data_dir"),
]
script = scripted.script


@pytest.fixture
def data_dir(tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.DATA_DIR = tmp_path / "data"
    settings.PREFETCH = True
    monkeypatch.setattr(prefetch, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(prefetch, "WATCH_SECONDS", 0.02)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Looking.looks.clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder, of 30 bytes of weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(30))
    return folder


@pytest.fixture
def said() -> Iterator[list[Any]]:
    with capture_logs() as logs:
        yield logs


class Looking(LeaseLoop):
    """Remembers what it saw coming."""

    looks: ClassVar[list[str]] = []

    async def _upcoming(self) -> str:
        self.looks.append(await super()._upcoming())
        return self.looks[-1]


def told(said: list[Any], level: str = "info") -> list[dict[str, Any]]:
    """What was logged of the next model's weights."""
    return [
        {name: value for name, value in each.items() if name != "log_level"}
        for each in said
        if each["log_level"] == level and each["event"].startswith("next model's weights")
    ]


def readers() -> list[psutil.Process]:
    """The processes that read weights now, as children of the tests'."""
    found = psutil.Process().children()
    return [each for each in found if "worker.weights" in each.cmdline()]


def endless(folder: Path) -> None:
    """Weights that are read for ever: a pipe to which nobody writes."""
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def both(owner: Person, source: str, **options: Any) -> None:
    """A batch of a model that is being served, and one of another that waits."""
    register_model(name="next", source=source, **options)
    jobs.running(owner.caller, 3)
    jobs.running(owner.caller, jobs.lines(3, model="next"))


def test_the_next_models_weights_are_read_while_the_other_still_serves(
    owner: Person, script: Script, folder: Path, said: list[Any]
) -> None:
    script.reply = hold
    both(owner, str(folder))
    with running() as it:
        wait_for(lambda: told(said))
        assert (it.loop.status.loaded, script.loads) == ("echo", ["echo"])
    assert told(said) == [{"event": "next model's weights read", "model": "next", "bytes": 30}]


def test_they_are_read_once_for_each_load(
    owner: Person, script: Script, folder: Path, said: list[Any]
) -> None:
    script.reply = hold
    both(owner, str(folder))
    with running(kind=Looking):
        wait_for(lambda: Looking.looks.count("next") >= 3)
    assert len(told(said)) == 1


def test_a_model_that_is_not_to_be_had_is_told_and_harms_nothing(
    owner: Person, script: Script, folder: Path, said: list[Any]
) -> None:
    script.reply = hold
    shutil.rmtree(folder)
    both(owner, str(folder))
    with running():
        wait_for(lambda: told(said, "warning"))
        script.reply = answer
        wait_for(lambda: script.loads == ["echo", "next"])
    assert [each["error"] for each in told(said, "warning")] == [
        f"There is no {folder} on this host."
    ]


def test_nothing_is_read_of_models_without_weights_here_nor_when_it_is_switched_off(
    owner: Person, script: Script, settings: Any, said: list[Any]
) -> None:
    script.reply = hold
    both(owner, "none", engine="instant")
    with running(kind=Looking):
        wait_for(lambda: Looking.looks.count("next") >= 3)
    settings.PREFETCH = False
    with running() as it:
        assert it.loop.prefetch._task is None
    assert told(said) == []


def test_a_draining_worker_looks_for_nothing(owner: Person, script: Script, folder: Path) -> None:
    script.reply = hold
    both(owner, str(folder))
    with running(kind=Looking) as it:
        wait_for(lambda: "next" in Looking.looks)
        it.loop.draining = True
        Looking.looks.clear()
        wait_for(lambda: len(Looking.looks) >= 3)
    assert set(Looking.looks[1:]) == {""}  # the first may have been under way


def test_a_stop_ends_the_reading(
    owner: Person, script: Script, folder: Path, said: list[Any]
) -> None:
    endless(folder)
    script.reply = hold
    both(owner, str(folder))
    with running():
        wait_for(readers)
    assert readers() == []
    assert told(said) == []


def test_another_models_load_ends_the_reading(
    owner: Person, script: Script, folder: Path, said: list[Any]
) -> None:
    endless(folder)
    script.reply = hold
    both(owner, str(folder))
    with running() as it:
        wait_for(readers)
        it.loop.host._coming = "other"
        wait_for(lambda: not readers())
    assert told(said) == []
