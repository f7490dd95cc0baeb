"""Engine processes that a killed worker left behind: remembered at load, ended at the next start.

Known by their lives (`worker/identity.py`), never by name: another worker's healthy engine may
share the host.
"""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import orjson
import psutil
import structlog
from django.conf import settings

from worker.identity import life_of

logger = structlog.get_logger(__name__)
_WAIT_SECONDS = 10


def claim_name(worker: str) -> IO[bytes] | None:
    """Hold the name on this host for as long as the file is open; None when another worker does.

    Two workers of one name would end each other's engines.
    """
    path = _ledger(worker).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def remember(worker: str, pids: Sequence[int]) -> None:
    """Write down the processes of the engines that this worker has, awake, asleep or loading."""
    path = _ledger(worker)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = [{"pid": pid, "started": life} for pid in pids if (life := life_of(pid))]
    fresh = path.with_suffix(".new")
    fresh.write_bytes(orjson.dumps(known))
    fresh.rename(path)


def end_left_over(worker: str) -> int:
    """End what is left of the worker's last life; returns how many processes that were."""
    try:
        known = orjson.loads(_ledger(worker).read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        return 0
    # An older version wrote a time here, which is like no life: what it left is left alone.
    left = [each["pid"] for each in known if life_of(each["pid"]) == each["started"]]
    end(left)
    remember(worker, [])
    return len(left)


def end(pids: Sequence[int]) -> None:
    """End the processes of an engine that is of no use any more; those that are gone are no error."""
    found = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    for process in found:
        logger.warning("ending an engine's process", pid=process.pid)
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(found, timeout=_WAIT_SECONDS)


def _ledger(worker: str) -> Path:
    path: Path = settings.DATA_DIR / "workers" / f"{worker}.json"
    return path
