"""A fake of NVIDIA's driver library: what libnvidia-ml.so would answer, said by Python.

Only the library is fake. nvidia-ml-py is the real one: its functions, structures and errors are
those that a GPU host has.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pynvml
import pytest

MIB = 1024 * 1024
NEW = {
    "nvmlDeviceGetMemoryInfo_v2",
    "nvmlDeviceGetMarginTemperature",
    "nvmlDeviceGetCurrentClocksEventReasons",
}
"""What drivers of some years ago do not have."""


@dataclass(eq=False)
class Card:
    """What one GPU says, None being what it does not support. An RTX 3090's values, idle."""

    name: str = "NVIDIA GeForce RTX 3090"
    compute: tuple[int, int] = (8, 6)
    temperature: int | None = 41
    slowdown: int | None = 95
    margin: int | None = None
    slowdown_margin: int | None = None
    milliwatts: int | None = 25_000
    memory_total: int | None = 24_576
    memory_reserved: int = 316
    memory_used: int = 3
    utilization: int | None = 0
    uncorrected: int | None = None
    corrected: int | None = None
    remapped: tuple[int, int, int, int] | None = None
    retired_pending: int | None = None
    recovery_action: int | None = None
    reasons: int | None = 0
    errors: dict[str, int] = field(default_factory=dict)
    """What is answered to single questions; to "" if to all of them."""


class FakeDriver:
    """A loaded libnvidia-ml, whose functions are attributes by their C names.

    `events` are XIDs to tell, as (GPU, XID). While `free` is cleared every call hangs.
    """

    def __init__(self, *cards: Card, error: int = 0, old: bool = False) -> None:
        self.cards = list(cards)
        self.error = error
        self.old = old
        self.events: list[tuple[int, int]] = []
        self.registered: list[int] = []
        self.asked: list[str] = []
        self.free = threading.Event()
        self.free.set()

    def __getattr__(self, name: str) -> Callable[..., int]:
        answer = getattr(type(self), f"_{name}", None)
        if answer is None or (self.old and name in NEW):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.asked.append(name)
            self.free.wait(60)
            return self._called(name, answer, arguments)

        return call

    def _called(self, name: str, answer: Any, arguments: tuple[Any, ...]) -> int:
        if name.startswith("nvmlDevice") and "HandleBy" not in name:
            card = self.cards[_index(arguments[0])]
            if error := card.errors.get("") or card.errors.get(name):
                return error
            return int(answer(self, card, *arguments[1:]))
        return int(answer(self, *arguments))

    # --- The library itself, and events ---------------------------------------------------------

    def _nvmlInitWithFlags(self, flags: int) -> int:
        return self.error

    def _nvmlErrorString(self, code: int) -> bytes:
        return f"error {code}".encode()

    def _nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        if index.value >= len(self.cards):
            return pynvml.NVML_ERROR_INVALID_ARGUMENT
        _point(handle._obj, index.value)
        return self.cards[index.value].errors.get("", 0)

    def _nvmlEventSetCreate(self, events: Any) -> int:
        return 0

    def _nvmlEventSetWait_v2(self, events: Any, data: Any, milliseconds: Any) -> int:
        if not self.events:
            return pynvml.NVML_ERROR_TIMEOUT
        gpu, xid = self.events.pop(0)
        handle = pynvml.c_nvmlDevice_t()
        _point(handle, gpu)
        data._obj.device, data._obj.eventData = handle, xid
        data._obj.eventType = pynvml.nvmlEventTypeXidCriticalError
        return 0

    # --- One GPU --------------------------------------------------------------------------------

    def _nvmlDeviceRegisterEvents(self, card: Card, kinds: Any, events: Any) -> int:
        assert kinds.value == pynvml.nvmlEventTypeXidCriticalError
        self.registered.append(self.cards.index(card))
        return 0

    def _nvmlDeviceGetIndex(self, card: Card, index: Any) -> int:
        return _put(index, self.cards.index(card))

    def _nvmlDeviceGetName(self, card: Card, name: Any, length: Any) -> int:
        name.value = card.name.encode()
        return 0

    def _nvmlDeviceGetCudaComputeCapability(self, card: Card, major: Any, minor: Any) -> int:
        return _put(major, card.compute[0]) or _put(minor, card.compute[1])

    def _nvmlDeviceGetTemperature(self, card: Card, sensor: Any, found: Any) -> int:
        assert sensor.value == pynvml.NVML_TEMPERATURE_GPU
        return _put(found, card.temperature)

    def _nvmlDeviceGetTemperatureThreshold(self, card: Card, which: Any, found: Any) -> int:
        assert which.value == pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
        return _put(found, card.slowdown)

    def _nvmlDeviceGetMarginTemperature(self, card: Card, found: Any) -> int:
        if card.margin is None:
            return int(pynvml.NVML_ERROR_NOT_SUPPORTED)
        found._obj.marginTemperature = card.margin
        return 0

    def _nvmlDeviceGetFieldValues(self, card: Card, count: Any, values: Any) -> int:
        known = {
            pynvml.NVML_FI_DEV_TEMPERATURE_SLOWDOWN_TLIMIT: card.slowdown_margin,
            pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION: card.recovery_action,
        }
        for value in values._obj:
            if (said := known[value.fieldId]) is None:
                value.nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED
            else:
                value.value.siVal = said
        return 0

    def _nvmlDeviceGetPowerUsage(self, card: Card, found: Any) -> int:
        return _put(found, card.milliwatts)

    def _nvmlDeviceGetMemoryInfo(self, card: Card, found: Any) -> int:
        return self._memory(card, found, card.memory_used + card.memory_reserved)

    def _nvmlDeviceGetMemoryInfo_v2(self, card: Card, found: Any) -> int:
        assert found._obj.version == pynvml.nvmlMemory_v2
        return self._memory(card, found, card.memory_used)

    def _memory(self, card: Card, found: Any, used: int) -> int:
        if card.memory_total is None:
            return int(pynvml.NVML_ERROR_NOT_SUPPORTED)
        found._obj.total, found._obj.used = card.memory_total * MIB, used * MIB
        return 0

    def _nvmlDeviceGetUtilizationRates(self, card: Card, found: Any) -> int:
        if card.utilization is None:
            return int(pynvml.NVML_ERROR_NOT_SUPPORTED)
        found._obj.gpu = card.utilization
        return 0

    def _nvmlDeviceGetTotalEccErrors(self, card: Card, kind: Any, since: Any, found: Any) -> int:
        assert since.value == pynvml.NVML_VOLATILE_ECC
        corrected = kind.value == pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED
        return _put(found, card.corrected if corrected else card.uncorrected)

    def _nvmlDeviceGetRemappedRows(self, card: Card, *found: Any) -> int:
        if card.remapped is None:
            return int(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return max(_put(ref, said) for ref, said in zip(found, card.remapped, strict=True))

    def _nvmlDeviceGetRetiredPagesPendingStatus(self, card: Card, found: Any) -> int:
        return _put(found, card.retired_pending)

    def _nvmlDeviceGetCurrentClocksEventReasons(self, card: Card, found: Any) -> int:
        return _put(found, card.reasons)

    _nvmlDeviceGetCurrentClocksThrottleReasons = _nvmlDeviceGetCurrentClocksEventReasons


def _put(reference: Any, value: int | None) -> int:
    if value is None:
        return int(pynvml.NVML_ERROR_NOT_SUPPORTED)
    reference._obj.value = value
    return 0


def _point(handle: Any, index: int) -> None:
    """Handles are pointers to what only the driver knows: here, to the card's number and one."""
    ctypes.c_void_p.from_buffer(handle).value = index + 1


def _index(handle: Any) -> int:
    return (ctypes.cast(handle, ctypes.c_void_p).value or 0) - 1


def install(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver) -> FakeDriver:
    """Let nvidia-ml-py find this library loaded."""
    monkeypatch.setattr(pynvml, "nvmlLib", driver)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    return driver
