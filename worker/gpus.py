"""The GPUs of this host, as NVIDIA's driver tells of them through NVML.

Without a driver there are none. With a GPU in trouble any call here may hang: only threads that
nobody waits for may make them. Indexes are the driver's, in the order of the PCI bus, as nvidia-smi
shows them; CUDA counts alike only under CUDA_DEVICE_ORDER=PCI_BUS_ID, which the engines set.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import pynvml
import structlog

T = TypeVar("T")
logger = structlog.get_logger(__name__)
MIB = 1024 * 1024
ANSWER_SECONDS = 30.0
"""How long the driver may take to say what kind of GPU there is, before there is taken to be none."""
MEMORY_SECONDS = 5.0
"""And to say how much of its memory is free."""
FP8_SINCE = (8, 9)
"""Compute capability."""
MOST_XIDS = 100
"""Of a storm of events so many are looked at for each reading."""

NO_DRIVER = frozenset(
    {
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,  # upgraded under us: what runs goes on running
        pynvml.NVML_ERROR_NO_PERMISSION,
    }
)
LOST = frozenset({pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED})
"""After these the GPU is gone until it is reset, or its host is."""
ABSENT = frozenset({pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND})
"""This kind of GPU, or this driver, has no such value."""

SLOWED_BY = {
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "its hardware slows it down: too hot",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "its hardware slows it down: power brake",
}
"""Both halve the clocks, or worse. What the driver's software does is ordinary regulation."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One GPU at one moment; None is what this GPU, or its driver, does not tell."""

    at: float
    """`time.monotonic()`."""
    failure: str = ""
    """Why the driver could not read it; everything else is None then."""
    lost: bool = False
    """The failure is one that does not pass."""
    temperature: int | None = None
    """°C."""
    slowdown: int | None = None
    """°C from which the hardware slows down."""
    power: float | None = None
    """Watts."""
    memory_used: int | None = None
    memory_total: int | None = None
    """MiB."""
    utilization: int | None = None
    """Per cent of the time in which something ran."""
    uncorrectable: int | None = None
    correctable: int | None = None
    """Memory errors since the driver was loaded."""
    repair_pending: bool = False
    """Rows to remap, or pages to retire, at the next reset."""
    repair_failed: bool = False
    recovery_action: int = 0
    """What the driver recommends (`NVML_GPU_RECOVERY_ACTION_…`); 0: nothing."""
    slowed: str = ""
    """Why its hardware slows it down."""
    xids: tuple[int, ...] = ()
    """The driver's error codes since the last reading."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a GPU is."""

    name: str
    memory: int
    """MiB; 0 where it has none of its own, but the host's."""
    compute: tuple[int, int]
    """The compute capability."""


def indexes(gpu: int | str | None) -> list[int]:
    """The GPUs that `--gpu` names: an index, or several with commas between; None: none."""
    return [] if gpu is None else [int(part) for part in str(gpu).split(",")]


def kind_of(gpu: int | str | None) -> str:
    """The product name of the GPU, as the driver says it; empty without a GPU or a driver.

    Several of one kind are a kind of their own, "2 x …": they hold and do more. Of different kinds
    it is the first one's.
    """
    found = facts(gpu)
    if not found:
        return ""
    many = f"{len(found)} x " if len(found) > 1 else ""
    return f"{many}{found[0].name}"[:100]


def facts(gpu: int | str | None) -> list[Facts]:
    """What each of these GPUs is; nothing without a driver, or when it does not answer in time."""
    try:
        return _within(ANSWER_SECONDS, lambda: [_facts(index) for index in indexes(gpu)]) or []
    except pynvml.NVMLError as error:
        if error.value not in NO_DRIVER:
            logger.warning("GPU not known", gpu=gpu, error=str(error))
        return []


def keeps_fp8(gpu: int | str | None) -> bool:
    """Whether all of these GPUs can keep a KV cache in fp8 (Ada, Hopper and later)."""
    found = facts(gpu)
    return bool(found) and min(each.compute for each in found) >= FP8_SINCE


def _facts(index: int) -> Facts:
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = _memory(handle)
    return Facts(
        pynvml.nvmlDeviceGetName(handle),
        0 if memory is None else memory.total // MIB,
        pynvml.nvmlDeviceGetCudaComputeCapability(handle),
    )


def memory(gpu: int | str | None) -> list[tuple[int, int]]:
    """Of each of these GPUs the bytes that are free, and all; nothing where that is not to be known."""
    try:
        return _within(MEMORY_SECONDS, lambda: [_memory_of(index) for index in indexes(gpu)]) or []
    except pynvml.NVMLError:
        return []


def _memory_of(index: int) -> tuple[int, int]:
    pynvml.nvmlInit()
    known = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index))
    return known.free, known.total


def _within(seconds: float, call: Callable[[], T]) -> T | None:
    """What the call answers or raises; None when it does not come back in time."""
    answers: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=run, name="gpu facts", daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        logger.warning("the GPU's driver does not answer", seconds=seconds)
        return None
    if error is not None:
        raise error
    return answer


class Reader:
    """Reads some GPUs again and again, from one thread.

    Raises NVMLError when made where there is no driver; afterwards a failure is a reading, too.
    """

    def __init__(self, gpus: Sequence[int]) -> None:
        pynvml.nvmlInit()
        self._gpus = gpus
        self._events = _ask(pynvml.nvmlEventSetCreate)
        self._watched: set[int] = set()

    def read(self) -> dict[int, Reading]:
        """A reading of each GPU, by index."""
        xids = self._xids()
        return {gpu: self._read(gpu, tuple(xids.get(gpu, ()))) for gpu in self._gpus}

    def _read(self, gpu: int, xids: tuple[int, ...]) -> Reading:
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(gpu)
            self._watch(gpu, handle)
            return _reading(handle, xids)
        except pynvml.NVMLError as error:
            lost = error.value in LOST
            return Reading(time.monotonic(), failure=str(error), lost=lost, xids=xids)

    def _watch(self, gpu: int, handle: Any) -> None:
        """Ask for the GPU's XIDs, once; a GPU or driver that has none to tell is read without."""
        if self._events is not None and gpu not in self._watched:
            self._watched.add(gpu)
            kinds = pynvml.nvmlEventTypeXidCriticalError
            _ask(pynvml.nvmlDeviceRegisterEvents, handle, kinds, self._events)

    def _xids(self) -> dict[int, list[int]]:
        """What has happened since the last time, by GPU; does not wait for more."""
        found: dict[int, list[int]] = {}
        with suppress(pynvml.NVMLError):  # none left; or a GPU is lost, as its reading will tell
            for _ in range(MOST_XIDS if self._watched else 0):
                event = pynvml.nvmlEventSetWait_v2(self._events, 0)
                for gpu in self._concerned(event.device):
                    found.setdefault(gpu, []).append(int(event.eventData))
        return found

    def _concerned(self, handle: Any) -> Sequence[int]:
        """The GPU of an event; all, if it is too far gone to know its own index."""
        try:
            return [pynvml.nvmlDeviceGetIndex(handle)]
        except pynvml.NVMLError:
            return self._gpus


def _reading(handle: Any, xids: tuple[int, ...]) -> Reading:
    temperature = _temperature(handle)
    memory = _memory(handle)
    load = _ask(pynvml.nvmlDeviceGetUtilizationRates, handle)
    pending, failed = _repairs(handle)
    return Reading(
        time.monotonic(),
        temperature=temperature,
        slowdown=_slowdown(handle, temperature),
        power=_watts(_ask(pynvml.nvmlDeviceGetPowerUsage, handle)),
        memory_used=None if memory is None else memory.used // MIB,
        memory_total=None if memory is None else memory.total // MIB,
        utilization=None if load is None else load.gpu,
        uncorrectable=_errors(handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
        correctable=_errors(handle, pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
        repair_pending=pending,
        repair_failed=failed,
        recovery_action=_field(handle, pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION) or 0,
        slowed=_slowed(handle),
        xids=xids,
    )


def _ask(call: Callable[..., T], *arguments: Any) -> T | None:
    """What the driver says; None for what it cannot say. Raises only when the GPU is lost.

    Single sensors answer all kinds of errors on healthy GPUs, "unknown" among them.
    """
    try:
        return call(*arguments)
    except pynvml.NVMLError as error:
        if error.value in LOST:
            raise
        return None


def _temperature(handle: Any) -> int | None:
    """°C. Every GPU can tell it (a part of one cannot), so one that fails to is in trouble."""
    try:
        return int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
    except pynvml.NVMLError as error:
        if error.value in ABSENT:
            return None
        raise


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _memory(handle: Any) -> Any:
    """The newer form tells apart what the driver itself keeps; old drivers do not have it."""
    newer = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
    return _ask(pynvml.nvmlDeviceGetMemoryInfo, handle) if newer is None else newer


def _slowdown(handle: Any, temperature: int | None) -> int | None:
    """°C of the hardware's slowdown.

    Data-centre GPUs since Ada tell no temperature for it but how far they are from their highest
    operating temperature, and how far beyond that (a negative number) the slowdown begins.
    """
    threshold = pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
    known = _ask(pynvml.nvmlDeviceGetTemperatureThreshold, handle, threshold)
    if known:
        return int(known)
    margin = _ask(pynvml.nvmlDeviceGetMarginTemperature, handle)
    begins = _field(handle, pynvml.NVML_FI_DEV_TEMPERATURE_SLOWDOWN_TLIMIT)
    if temperature is None or margin is None or begins is None:
        return None
    return temperature + int(margin) - begins


def _field(handle: Any, field: int) -> int | None:
    values = _ask(pynvml.nvmlDeviceGetFieldValues, handle, [field])
    if values is None or values[0].nvmlReturn != pynvml.NVML_SUCCESS:
        return None
    return int(values[0].value.siVal)


def _errors(handle: Any, severity: int) -> int | None:
    return _ask(pynvml.nvmlDeviceGetTotalEccErrors, handle, severity, pynvml.NVML_VOLATILE_ECC)


def _repairs(handle: Any) -> tuple[bool, bool]:
    """Whether a repair of its memory is pending, and whether one has failed.

    Since Ampere rows are remapped; before, pages were retired.
    """
    rows = _ask(pynvml.nvmlDeviceGetRemappedRows, handle)
    if rows is not None:
        return bool(rows[2]), bool(rows[3])
    return bool(_ask(pynvml.nvmlDeviceGetRetiredPagesPendingStatus, handle)), False


def _slowed(handle: Any) -> str:
    reasons = _ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    if reasons is None:  # the older name of the same
        reasons = _ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
    return "; ".join(words for bit, words in SLOWED_BY.items() if reasons & bit)
