"""What processes cost: CPU seconds and peak memory, each with all of its children."""

from __future__ import annotations

from pathlib import Path

import psutil


class Family:
    """Several processes by name, measured from now on."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self._before = self._seconds()
        for pid in pids.values():
            for each in _tree(pid):
                _reset_peak(each.pid)

    def cpu_seconds(self) -> dict[str, float]:
        """Seconds of CPU since the start, user and system, children included."""
        return {name: spent - self._before[name] for name, spent in self._seconds().items()}

    def peaks_mb(self) -> dict[str, float]:
        """The largest resident set of any one process of each tree since the start, in MB."""
        return {
            name: max(peak_mb(each.pid) for each in _tree(pid)) for name, pid in self._pids.items()
        }

    def _seconds(self) -> dict[str, float]:
        return {name: sum(_cpu(each) for each in _tree(pid)) for name, pid in self._pids.items()}


def peak_mb(pid: int) -> float:
    """The largest resident set since `reset_peak`, in MB (VmHWM of proc(5))."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _reset_peak(pid: int) -> None:
    """Count the peak from now on (proc(5), clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _tree(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system + times.children_user + times.children_system
