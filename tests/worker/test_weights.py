"""A model's weights, read into the page cache: asked of the kernel (mincore(2)), not of our own word."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import orjson
import pytest
from django.conf import settings

from worker import memory, weights
from worker.memory import Memory

SIZE = 3 * weights.PIECE + 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of two files, of which the kernel keeps nothing."""
    (tmp_path / "config.json").write_text("{}")
    for name in ("model-1.safetensors", "model-2.safetensors"):
        _write(tmp_path / name)
    if any(map(cached, tmp_path.glob("*.safetensors"))):
        pytest.skip("this file system keeps its files in memory")
    return tmp_path


def _write(path: Path) -> None:
    with path.open("wb") as stream:
        stream.write(bytes(SIZE))
        stream.flush()
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(path: Path) -> float:
    """The part of the file that is in the page cache, from 0 to 1."""
    pages = -(-path.stat().st_size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        # A view of it keeps the mapping from being closed.
        start = ctypes.c_char.from_buffer(mapped)
        size = ctypes.c_size_t(len(mapped))
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), size, found)
        del start
    assert not failed, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in found) / pages


def run(*arguments: str) -> tuple[int, dict[str, object]]:
    """The command, as a worker starts it."""
    command = [sys.executable, "-m", "worker.weights", *arguments]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=settings.BASE_DIR, env=offline, capture_output=True)
    return done.returncode, orjson.loads(done.stdout)


def test_all_of_the_weights_are_in_the_page_cache_then(folder: Path) -> None:
    assert run(str(folder), "") == (0, {"bytes": 2 * SIZE})
    assert [cached(path) for path in sorted(folder.glob("*.safetensors"))] == [1.0, 1.0]


def test_a_host_without_the_memory_reads_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 2 * SIZE + 20
    monkeypatch.setattr(memory, "of_host", lambda: Memory(free, 101))
    assert weights.read(memory.weights_in(folder)) == 0
    assert [cached(path) for path in folder.glob("*.safetensors")] == [0.0, 0.0]


def test_a_host_that_runs_short_meanwhile_reads_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "model.safetensors")
    plenty = iter([Memory(100 + SIZE, 100), Memory(20, 100), Memory(19, 100)])
    monkeypatch.setattr(memory, "of_host", lambda: next(plenty))
    assert weights.read(memory.weights_in(tmp_path)) == weights.PIECE


def test_of_weights_in_two_formats_one_is_read(tmp_path: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(bytes(10))
    assert weights.read(memory.weights_in(tmp_path)) == 10


def test_a_folder_that_is_missing_is_told(tmp_path: Path) -> None:
    missing = str(tmp_path / "gone")
    assert run(missing, "") == (1, {"error": f"There is no {missing} on this host."})


def test_what_was_not_downloaded_is_told_offline() -> None:
    code, said = run("nobody/has-this-model", "main")
    assert (code, list(said)) == (1, ["error"])


def test_what_is_not_on_this_host_is_downloaded_in_one_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None, list[str]]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    wanted = list(weights.WANTED)
    assert weights.folder_of("org/model") == tmp_path
    assert weights.folder_of("org/model", "v2") == tmp_path
    assert asked == [("org/model", None, wanted), ("org/model", "v2", wanted)]
    assert "*.bin" not in wanted
