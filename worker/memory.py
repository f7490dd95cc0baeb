"""Memory in bytes: what is free on GPUs and on this host, and what a model's weights take."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from models_registry import fit
from worker import gpus

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_CGROUP = Path("/sys/fs/cgroup")


class Memory(NamedTuple):
    free: int
    total: int


def of_gpu(gpu: int | str | None) -> Memory | None:
    """Of these GPUs together; None where that is not to be known, as with GPUs that nobody named."""
    found = gpus.memory(gpu)
    return Memory(sum(free for free, _ in found), sum(all for _, all in found)) if found else None


def of_host() -> Memory:
    """Of this host, or of the container (cgroup v2) where that has less."""
    known = psutil.virtual_memory()
    with suppress(OSError, ValueError, StopIteration):  # "max": no limit
        total = int((_CGROUP / "memory.max").read_text())
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        free = total - int((_CGROUP / "memory.current").read_text()) + cached
        return Memory(min(free, known.available), min(total, known.total))
    return Memory(known.available, known.total)


def of_weights(source: str, revision: str = "") -> int:
    """What a model's files hold, in a folder or in Hugging Face's cache; 0 where there are none."""
    with suppress(fit.Unknown, OSError):
        return sum(file.stat().st_size for file in weights_in(fit.folder_of(source, revision)))
    return 0


def weights_in(folder: Path) -> list[Path]:
    """The files that hold a model's weights, in the order in which they are read."""
    found = (sorted(folder.glob(pattern)) for pattern in _WEIGHTS)
    return next((files for files in found if files), [])
