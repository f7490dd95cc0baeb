"""`python -m worker.weights SOURCE [REVISION]`: brings a model's weights into this host's memory.

They are downloaded, if need be and allowed, and read once, so that the kernel keeps them in its
page cache for the engine that will load them. A process of its own, of the lowest priority, that
may be ended at any moment: what it has read stays read, and a download is taken up again. It
needs neither Django nor a GPU; what became of it is one line of JSON.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import orjson
import psutil

from worker import memory

PIECE = 16 * 1024 * 1024
KEPT_FREE = 0.2
"""The part of the host's memory that is left to everything else."""
WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""Not what many repositories hold besides: the same weights in other formats."""


class NotFound(Exception):
    """The model is not on this host, and cannot be brought there; the message says why."""


def main() -> int:
    os.nice(19)
    with suppress(psutil.Error, OSError):
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
    try:
        files = memory.weights_in(folder_of(*sys.argv[1:3]))
        said: dict[str, object] = {"bytes": read(files)}
    except (NotFound, OSError) as error:
        said = {"error": str(error)}
    sys.stdout.buffer.write(orjson.dumps(said))
    return "error" in said


def folder_of(source: str, revision: str = "") -> Path:
    """The model's folder, once it is on this host; raises NotFound."""
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_absolute():
        raise NotFound(f"There is no {source} on this host.")
    from huggingface_hub import snapshot_download

    try:  # offline (HF_HUB_OFFLINE) it finds what was downloaded before
        given = revision or None
        return Path(snapshot_download(source, revision=given, allow_patterns=list(WANTED)))
    except Exception as error:  # there is one for each way of not being downloadable
        raise NotFound(" ".join(str(error).split())[:500]) from error


def read(files: Iterable[Path]) -> int:
    """Read the files if the host has memory for all of them; returns how many bytes that were."""
    files = list(files)
    if not _has_room(sum(file.stat().st_size for file in files)):
        return 0
    buffer, size = bytearray(PIECE), 0
    for file in files:
        with file.open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while _has_room(0) and (count := stream.readinto(buffer)):
                size += count
    return size


def _has_room(size: int) -> bool:
    host = memory.of_host()
    return host.free - size >= KEPT_FREE * host.total


if __name__ == "__main__":
    sys.exit(main())
