"""Looks after the GPUs of a worker: says when to pause feeding them, and when one is sick.

`judge` decides, from readings alone. The driver is asked in a thread of its own that may hang, which
is then a finding like any other; leases and the heartbeat never wait for it. What follows from a
verdict is the lease loop's (`worker/loop.py`); how a GPU is read is in `worker/gpus.py`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pynvml
import structlog
from django.conf import settings

from worker import gpus
from worker.gpus import Reading
from worker.models import Health

logger = structlog.get_logger(__name__)

READ_SECONDS = 5.0
JUDGE_SECONDS = 1.0
SILENT_SECONDS = 20.0
"""A driver that has said nothing for so long hangs."""
HISTORY_SECONDS = 900.0
"""How far back a verdict looks: for memory errors that grow, and for a driver that hangs again."""
CALM_SECONDS = 15.0
"""All readings of so long must be below the lower bound before feeding goes on."""
REST_SECONDS = 60.0
"""After a pause of so long the chunks are given back, so that another worker may run them."""
FAILURES = 3
"""So many failed readings in a row, or hangs within the history, make a GPU sick."""

SLOWDOWN_MARGIN = 1
"""°C below its slowdown at which a GPU is paused. Not more: data-centre GPUs regulate themselves to
2 °C below it (H100, L40S: slowdown at T.Limit -2), and that is ordinary work."""
COOLED = 10
"""°C below the limit at which feeding goes on."""
EASED = 0.9
"""Part of the power or memory limit below which feeding goes on."""

SICK_XIDS = {
    46: "it stopped processing",
    48: "double-bit memory error",
    62: "its controller halted",
    64: "a memory row could not be remapped",
    79: "it has fallen off the bus",
    95: "uncontained memory error",
    110: "security fault",
    119: "its controller does not answer",
    120: "error of its controller",
    136: "its link could not be trained",
    140: "unrecovered memory error",
    143: "it could not be initialized",
    155: "error of its NVLink",
    156: "a part of it was retired",
    158: "fatal timeout",
}
"""XIDs after which NVIDIA wants the GPU reset or its host restarted (docs.nvidia.com/deploy/xid-errors,
"immediate action"), and 48. All others are an application's fault or pass by themselves: if the
engine dies of one, it is started again. 109 is left out: applications cause it as well."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Above these nothing is fed; None: no limit, for the temperature the GPU's own."""

    temperature: float | None = None
    """°C."""
    power: float | None = None
    """Watts."""
    memory: float | None = None
    """Per cent of the memory that is used."""

    @classmethod
    def configured(cls) -> Limits:
        limits = (settings.GPU_MAX_TEMPERATURE, settings.GPU_MAX_POWER, settings.GPU_MAX_MEMORY)
        return cls(*(limit or None for limit in limits))


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a GPU is, why, and since when (`time.monotonic()`)."""

    health: Health
    why: str = ""
    since: float = 0.0

    @property
    def feeds(self) -> bool:
        return self.health == Health.OK

    @property
    def gives_back(self) -> bool:
        """Whether the worker may not even keep the chunks that it has."""
        return self.health in (Health.RESTING, Health.SICK)


def judge(
    history: Sequence[Reading],
    before: Verdict,
    now: float,
    limits: Limits,
    accepted: frozenset[str] = frozenset(),
) -> Verdict:
    """The verdict on one GPU that follows from its readings (one at least, oldest first).

    Sick stays sick. Nothing else is kept from before but that it was paused, and since when: a
    paused GPU must have been below the *lower* bounds for `CALM_SECONDS`. `accepted` is what an
    operator has seen and waved through, by code.
    """
    if before.health == Health.SICK:
        return before
    if why := _happened(history):
        return Verdict(Health.SICK, why, now)
    for code, why in _standing(history[-1]):
        if code not in accepted:
            return Verdict(Health.SICK, why, now)
    paused = before.health != Health.OK
    why = _silence(history, now) or _excess(history, limits, paused=paused)
    since = before.since if paused == bool(why) else now
    if not why:
        return Verdict(Health.OK, _note(history), since)
    return Verdict(Health.RESTING if now - since >= REST_SECONDS else Health.PAUSED, why, since)


def _happened(history: Sequence[Reading]) -> str:
    """What has happened to the GPU of what does not pass by itself; the gravest first."""
    latest = history[-1]
    if latest.lost:
        return f"lost: {latest.failure}"
    if len(history) >= FAILURES and all(each.failure for each in history[-FAILURES:]):
        return f"cannot be read: {latest.failure}"
    for xid in (xid for each in history for xid in each.xids):
        if xid in SICK_XIDS:
            return f"XID {xid}: {SICK_XIDS[xid]}"
    if grown := _growth([each.uncorrectable for each in history]):
        return f"{grown} uncorrectable memory error(s)"
    gaps = [after.at - each.at for each, after in pairwise(history)]
    if sum(gap > SILENT_SECONDS for gap in gaps) >= FAILURES:
        return "its driver hangs again and again"
    return ""


def _standing(latest: Reading) -> Iterator[tuple[str, str]]:
    """What the GPU says of itself until it is reset or replaced, as code and words."""
    if latest.repair_failed:
        yield "repair failed", "a repair of its memory failed"
    if latest.repair_pending:
        yield "repair pending", "a repair of its memory waits for a reset"
    if latest.recovery_action:
        yield f"recovery {latest.recovery_action}", _recovery(latest.recovery_action)


def _growth(counts: Sequence[int | None]) -> int:
    """By how much a counter has grown; one that fell was reset, with its driver."""
    known = [count for count in counts if count is not None]
    return max(0, known[-1] - known[0]) if known else 0


def _recovery(action: int) -> str:
    names = {
        pynvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET: "a reset",
        pynvml.NVML_GPU_RECOVERY_ACTION_NODE_REBOOT: "a restart of the host",
        pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET: "to be drained and reset",
    }
    return f"the driver says that it needs {names.get(action, f'recovery action {action}')}"


def _silence(history: Sequence[Reading], now: float) -> str:
    silent = now - history[-1].at
    return f"its driver has not answered for {silent:.0f} s" if silent > SILENT_SECONDS else ""


def _excess(history: Sequence[Reading], limits: Limits, *, paused: bool) -> str:
    """What is above its limit in the last reading, or in any of the last ones while paused."""
    calm = CALM_SECONDS if paused else 0
    last = [each for each in history if history[-1].at - each.at <= calm]
    return next(filter(None, (_too_much(each, limits, paused) for each in reversed(last))), "")


def _too_much(reading: Reading, limits: Limits, paused: bool) -> str:
    if reading.failure:
        return f"cannot be read: {reading.failure}"
    if reading.slowed:
        return reading.slowed
    hottest = limits.temperature
    if hottest is None and reading.slowdown is not None:
        hottest = reading.slowdown - SLOWDOWN_MARGIN
    share = None
    if reading.memory_used is not None and reading.memory_total:
        share = 100 * reading.memory_used / reading.memory_total
    return (
        _above(reading.temperature, hottest, COOLED if paused else 0, "°C")
        or _above(reading.power, limits.power, _eased(limits.power, paused), "W")
        or _above(share, limits.memory, _eased(limits.memory, paused), "% of its memory")
    )


def _eased(limit: float | None, paused: bool) -> float:
    return (1 - EASED) * limit if paused and limit is not None else 0


def _above(value: float | None, limit: float | None, below: float, unit: str) -> str:
    if value is None or limit is None or value < limit - below:
        return ""
    until = f"; goes on below {limit - below:.0f}" if below else ""
    return f"{value:.0f} {unit}, and the limit is {limit:.0f}{until}"


def _note(history: Sequence[Reading]) -> str:
    """What is worth saying of a GPU that is fed all the same."""
    grown = _growth([each.correctable for each in history])
    minutes = HISTORY_SECONDS / 60
    return f"{grown} correctable memory error(s) in {minutes:.0f} minutes" if grown else ""


class Watched:
    """One GPU, and what is known of it."""

    def __init__(self, now: float) -> None:
        self.verdict = Verdict(Health.OK, since=now)
        self.history = deque([Reading(now)])
        """Begins with a reading of nothing, so that a driver that never answers is silent, too."""
        self.accepted = frozenset[str]()

    def add(self, reading: Reading) -> None:
        self.history.append(reading)
        while reading.at - self.history[0].at > HISTORY_SECONDS:
            self.history.popleft()

    def accept(self, now: float) -> None:
        """What it says of itself, and what has happened, is no reason any more; what comes is."""
        latest = replace(self.history[-1], xids=())
        self.accepted = frozenset(code for code, _ in _standing(latest))
        self.history = deque([latest])
        self.verdict = Verdict(Health.OK, since=now)


class Guard:
    """The verdict on all GPUs of a worker: that on the worst. With no GPU all is always well.

    Every method may be called from any thread; only `look_now` waits for the driver, for a time.
    """

    def __init__(self, indexes: Sequence[int] = (), limits: Limits | None = None) -> None:
        self._limits = limits or Limits.configured()
        self._indexes = list(indexes) if settings.GPU_GUARD else []
        self._gpus: dict[int, Watched] = {}
        self._sick_before = ""
        self._judged_at = time.monotonic()
        self._lock = threading.Lock()
        self._verdict = Verdict(Health.OK)
        self._changed: Callable[[], None] = lambda: None
        self._over = threading.Event()
        self._wanted = threading.Event()
        self._reads, self._begun, self._ended = threading.Condition(), 0, 0
        self.told = False
        """Whether the worker's row says that it is sick: from then on an operator may resume it."""

    def start(self, changed: Callable[[], None]) -> None:
        """Begin to look; `changed` is called, from any thread, when the verdict is another."""
        self._changed = changed
        self._gpus = {index: Watched(time.monotonic()) for index in self._indexes}
        if self._gpus:
            threading.Thread(target=self._watch, name="gpu guard", daemon=True).start()

    def stop(self) -> None:
        """Look no more. A driver that hangs is left to itself."""
        self._over.set()
        self._wanted.set()

    @property
    def verdict(self) -> Verdict:
        """The last one."""
        return self._verdict

    def look(self) -> Verdict:
        """The verdict, judged anew now and then: a driver that hangs brings no news of it."""
        if time.monotonic() - self._judged_at >= JUDGE_SECONDS:
            self._judge()
        return self._verdict

    def _judge(self) -> None:
        with self._lock:
            now, before = time.monotonic(), self._verdict
            self._judged_at = now
            for gpu in self._gpus.values():
                readings = list(gpu.history)
                gpu.verdict = judge(readings, gpu.verdict, now, self._limits, gpu.accepted)
            self._verdict = after = self._worst()
        if after.health != before.health:
            logger.warning("GPU health", was=before.health, now=after.health, why=after.why)
            self._changed()

    def look_now(self, seconds: float) -> None:
        """Read now, not when the next reading is due; waits for it, but no longer than this."""
        if self._gpus and not self._over.is_set():
            with self._reads:
                self._wanted.set()
                fresh = self._begun + 1  # not one that has begun by now
                self._reads.wait_for(lambda: self._ended >= fresh, seconds)

    def remember(self, why: str) -> None:
        """An earlier life of this worker was sick for this reason, and nobody has resumed it."""
        if why and self._indexes:
            self._sick_before, self.told = why, True
            self._judge()

    def forgive(self) -> None:
        """An operator resumed the worker: what its GPUs have is accepted, unless it gets worse."""
        with self._lock:
            for gpu in self._gpus.values():
                gpu.accept(time.monotonic())
            self._sick_before, self.told = "", False
        self._judge()

    def columns(self) -> dict[str, Any]:
        """What the worker's row says of its GPUs; null without a fresh reading."""
        with self._lock:
            now = time.monotonic()
            fresh = [
                gpu.history[-1]
                for gpu in self._gpus.values()
                if now - gpu.history[-1].at <= SILENT_SECONDS
            ]
            verdict = self._verdict
        return {
            "health": verdict.health if self._gpus else "",
            "health_why": verdict.why[:500],
            "memory_used": _of_all(sum, [each.memory_used for each in fresh]),
            "memory_total": _of_all(sum, [each.memory_total for each in fresh]),
            "temperature": _of_all(max, [each.temperature for each in fresh]),
            "power": _of_all(sum, [each.power for each in fresh]),
            "utilization": _of_all(_mean, [each.utilization for each in fresh]),
        }

    def _worst(self) -> Verdict:
        if self._sick_before:
            return Verdict(Health.SICK, self._sick_before, self._verdict.since)
        order = list(Health)
        gpu, worst = max(
            ((gpu, each.verdict) for gpu, each in self._gpus.items()),
            key=lambda pair: order.index(pair[1].health),
            default=(0, Verdict(Health.OK)),
        )
        return replace(worst, why=f"GPU {gpu}: {worst.why}") if worst.why else worst

    # --- The thread that asks the driver -----------------------------------------------------

    def _watch(self) -> None:
        try:
            reader = gpus.Reader(list(self._gpus))
        except pynvml.NVMLError as error:
            logger.warning("no GPU guard", gpus=list(self._gpus), error=str(error))
            with self._lock:
                self._gpus.clear()
            self._judge()
            return
        while not self._over.is_set():
            with self._reads:
                self._wanted.clear()
                self._begun += 1
            try:
                self._add(reader.read())
            except Exception:
                logger.exception("GPUs not read")
            with self._reads:
                self._ended = self._begun
                self._reads.notify_all()
            self._wanted.wait(READ_SECONDS)

    def _add(self, readings: dict[int, Reading]) -> None:
        with self._lock:
            for index, reading in readings.items():
                self._gpus[index].add(reading)
        self._judge()


def _of_all(how: Callable[[list[Any]], Any], values: Sequence[float | None]) -> Any:
    known = [value for value in values if value is not None]
    return how(known) if known else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
