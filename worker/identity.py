"""Who a worker is: what its row says of its process, and whether that process can still be there.

Nothing of the database is here; who may have a name is in `worker/services.py`.
"""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from django.conf import settings

_GONE = ("Z", "X", "x")
"""States of a process that has ended and only waits for its parent to look (proc(5))."""


@dataclass(frozen=True, slots=True)
class Identity:
    """One run of a worker's process; each field is a column of its row."""

    name: str
    gpu: str | None
    gpu_kind: str
    host: str
    pid: int
    life: str
    """The process, as no other is anywhere or will ever be: boot, PID namespace, pid, start."""
    version: str


def of_this_process(name: str, *, gpu: str | None = None, gpu_kind: str = "") -> Identity:
    pid = os.getpid()
    return Identity(name, gpu, gpu_kind, socket.gethostname(), pid, life_of(pid), _version())


def life_of(pid: int) -> str:
    """The life of a process that is here; empty if it has ended, or cannot be seen."""
    started = _started(pid)
    return f"{_place()}:{pid}:{started}" if started else ""


def has_ended(life: str) -> bool:
    """Whether this process is sure to be gone; of other hosts and containers nothing is sure."""
    if life.count(":") != 3:
        return False
    place, pid, started = life.rsplit(":", 2)
    return place == _place() and _is_gone(int(pid), started)


def _place() -> str:
    """Within which a pid means one process: the kernel's boot, and the PID namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"


def _is_gone(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's, whose /proc may be hidden from us
    return _started(pid) not in (None, started)


def _started(pid: int) -> str | None:
    """Clock ticks from boot to the process's start; empty once it has ended, None if unknown.

    Not psutil's `create_time`, which moves when somebody sets the clock.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in _GONE else fields[18]


def _version() -> str:
    """BUILD_ID, or the commit that this code is of; empty where neither is known."""
    return settings.BUILD_ID or _commit()


def _commit() -> str:
    asked = ["git", "-C", str(settings.BASE_DIR), "describe", "--always", "--tags"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.stdout.strip()[:100]
