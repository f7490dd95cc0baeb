"""Reading GPUs through the real nvidia-ml-py, with a fake of the driver's library behind it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest

from tests.worker.nvml import Card, FakeDriver, install
from worker import gpus, guard
from worker.gpus import Facts, Reader, Reading


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """A driver with one card, an idle RTX 3090; more can be added."""
    made = install(monkeypatch, FakeDriver(Card()))
    yield made
    made.free.set()


def read(gpu: int = 0, of: Reader | None = None) -> Reading:
    return (of or Reader([gpu])).read()[gpu]


def told(reading: Reading) -> dict[str, Any]:
    """What the driver did tell."""
    fields = {name: getattr(reading, name) for name in Reading.__slots__ if name != "at"}
    return {name: value for name, value in fields.items() if value}


# Values that `nvidia-smi -q` printed on real cards, idle and at work: the captures of
# github.com/utkuozdemir/nvidia_gpu_exporter (internal/captures), drivers 590 to 610.
CAPTURES = {
    "RTX 2080 SUPER": Card(
        "NVIDIA GeForce RTX 2080 SUPER",
        (7, 5),
        temperature=38,
        slowdown=97,
        milliwatts=98_140,
        memory_total=8_192,
        memory_reserved=400,
        memory_used=815,
        utilization=8,
        recovery_action=0,
    ),
    "H100 at work": Card(
        "NVIDIA H100 80GB HBM3",
        (9, 0),
        temperature=59,
        slowdown=None,
        margin=26,
        slowdown_margin=-2,
        milliwatts=631_950,
        memory_total=81_559,
        memory_reserved=479,
        memory_used=19_818,
        utilization=100,
        uncorrected=0,
        corrected=0,
        remapped=(0, 0, 0, 0),
        recovery_action=0,
    ),
    "L40S": Card(
        "NVIDIA L40S",
        (8, 9),
        temperature=54,
        slowdown=None,
        margin=34,
        slowdown_margin=-2,
        milliwatts=110_230,
        memory_total=46_068,
        memory_reserved=609,
        memory_used=1_235,
        utilization=9,
        uncorrected=0,
        corrected=0,
        remapped=(0, 0, 0, 0),
        recovery_action=0,
    ),
}
READ = {
    "RTX 2080 SUPER": {
        "temperature": 38,
        "slowdown": 97,
        "power": 98.14,
        "memory_used": 815,
        "memory_total": 8_192,
        "utilization": 8,
    },
    "H100 at work": {
        "temperature": 59,
        "slowdown": 87,
        "power": 631.95,
        "memory_used": 19_818,
        "memory_total": 81_559,
        "utilization": 100,
    },
    "L40S": {
        "temperature": 54,
        "slowdown": 90,
        "power": 110.23,
        "memory_used": 1_235,
        "memory_total": 46_068,
        "utilization": 9,
    },
}


@pytest.mark.parametrize("name", CAPTURES)
def test_real_cards_are_read_as_nvidia_smi_reads_them(driver: FakeDriver, name: str) -> None:
    driver.cards = [CAPTURES[name]]
    assert told(read()) == READ[name]


def test_what_a_gpu_does_not_support_is_none(driver: FakeDriver) -> None:
    driver.cards = [
        Card(
            temperature=None,
            slowdown=None,
            milliwatts=None,
            memory_total=None,
            utilization=None,
            reasons=None,
        )
    ]
    reading = read()
    assert reading == Reading(reading.at)


def test_an_old_driver_is_asked_by_the_old_names(driver: FakeDriver) -> None:
    driver.old = True
    driver.cards = [Card(reasons=pynvml.nvmlClocksThrottleReasonHwThermalSlowdown)]
    reading = read()
    assert (reading.memory_total, reading.memory_used) == (24_576, 319)
    assert reading.slowed == "its hardware slows it down: too hot"


@pytest.mark.parametrize(
    ("reasons", "slowed"),
    [
        (pynvml.nvmlClocksEventReasonGpuIdle, ""),
        (pynvml.nvmlClocksEventReasonSwPowerCap, ""),
        (pynvml.nvmlClocksEventReasonSwThermalSlowdown, ""),
        (pynvml.nvmlClocksEventReasonHwThermalSlowdown, "its hardware slows it down: too hot"),
        (
            pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
            "its hardware slows it down: power brake",
        ),
    ],
)
def test_only_the_hardwares_own_brakes_count_as_slowed(
    driver: FakeDriver, reasons: int, slowed: str
) -> None:
    driver.cards = [Card(reasons=reasons)]
    assert read().slowed == slowed


@pytest.mark.parametrize(
    ("card", "pending", "failed"),
    [
        (Card(remapped=(1, 0, 0, 0)), False, False),
        (Card(remapped=(0, 1, 1, 0)), True, False),
        (Card(remapped=(0, 0, 0, 1)), False, True),
        (Card(retired_pending=0), False, False),
        (Card(retired_pending=1), True, False),
    ],
)
def test_repairs_are_rows_to_remap_or_pages_to_retire(
    driver: FakeDriver, card: Card, pending: bool, failed: bool
) -> None:
    driver.cards = [card]
    reading = read()
    assert (reading.repair_pending, reading.repair_failed) == (pending, failed)


def test_memory_errors_and_the_advised_recovery_are_read(driver: FakeDriver) -> None:
    driver.cards = [Card(uncorrected=2, corrected=70, recovery_action=1)]
    reading = read()
    assert (reading.uncorrectable, reading.correctable, reading.recovery_action) == (2, 70, 1)


# --- Trouble --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (pynvml.NVML_ERROR_GPU_IS_LOST, True),
        (pynvml.NVML_ERROR_RESET_REQUIRED, True),
        (pynvml.NVML_ERROR_UNKNOWN, False),
        (pynvml.NVML_ERROR_NOT_FOUND, False),
    ],
)
def test_a_gpu_that_cannot_be_read_is_a_reading_too(
    driver: FakeDriver, error: int, lost: bool
) -> None:
    reader = Reader([0])
    assert read(of=reader).temperature == 41
    driver.cards[0].errors[""] = error
    reading = read(of=reader)
    words = str(pynvml.NVMLError(error))
    assert reading == Reading(reading.at, failure=words, lost=lost)
    driver.cards[0].errors.clear()
    assert read(of=reader).temperature == 41


def test_a_gpu_that_is_lost_between_two_questions_is_lost(driver: FakeDriver) -> None:
    driver.cards[0].errors["nvmlDeviceGetPowerUsage"] = pynvml.NVML_ERROR_GPU_IS_LOST
    assert read().lost


def test_a_single_sensor_that_fails_says_nothing_of_the_gpu(driver: FakeDriver) -> None:
    driver.cards[0].errors["nvmlDeviceGetPowerUsage"] = pynvml.NVML_ERROR_UNKNOWN
    reading = read()
    assert (reading.power, reading.failure, reading.temperature) == (None, "", 41)


def test_a_gpu_that_is_not_there_cannot_be_read(driver: FakeDriver) -> None:
    assert read(3).failure == str(pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT))


def test_of_two_gpus_the_one_that_is_lost_does_not_hide_the_other(driver: FakeDriver) -> None:
    driver.cards = [Card(errors={"": pynvml.NVML_ERROR_GPU_IS_LOST}), Card(temperature=70)]
    readings = Reader([0, 1]).read()
    assert (readings[0].lost, readings[1].temperature) == (True, 70)


def test_xids_are_told_once_to_the_gpu_that_they_are_of(driver: FakeDriver) -> None:
    driver.cards.append(Card())
    reader = Reader([0, 1])
    reader.read()
    assert driver.registered == [0, 1]
    driver.events = [(1, 31), (1, 79), (0, 48)]
    readings = reader.read()
    assert (readings[0].xids, readings[1].xids) == ((48,), (31, 79))
    assert [each.xids for each in reader.read().values()] == [(), ()]
    assert driver.registered == [0, 1]


def test_an_xid_of_a_gpu_that_knows_itself_no_more_concerns_all(driver: FakeDriver) -> None:
    reader = Reader([0])
    reader.read()
    driver.events = [(0, 79)]
    driver.cards[0].errors[""] = pynvml.NVML_ERROR_GPU_IS_LOST
    reading = read(of=reader)
    assert (reading.xids, reading.lost) == ((79,), True)


def test_a_gpu_without_events_is_read_without(driver: FakeDriver) -> None:
    driver.cards[0].errors["nvmlDeviceRegisterEvents"] = pynvml.NVML_ERROR_NOT_SUPPORTED
    reading = read()
    assert (reading.temperature, reading.xids) == (41, ())


# --- What there is --------------------------------------------------------------------------


@pytest.mark.parametrize(("gpu", "found"), [(None, []), (1, [1]), ("0", [0]), ("0,2,1", [0, 2, 1])])
def test_gpus_are_named_by_their_indexes(gpu: int | str | None, found: list[int]) -> None:
    assert gpus.indexes(gpu) == found


def test_the_kind_is_the_products_name(driver: FakeDriver) -> None:
    assert gpus.kind_of(0) == "NVIDIA GeForce RTX 3090"
    assert gpus.facts("0") == [Facts("NVIDIA GeForce RTX 3090", 24_576, (8, 6))]


def test_several_are_a_kind_of_their_own(driver: FakeDriver) -> None:
    driver.cards.append(Card())
    assert gpus.kind_of("0,1") == "2 x NVIDIA GeForce RTX 3090"


@pytest.mark.parametrize("error", sorted(gpus.NO_DRIVER))
def test_without_a_driver_there_is_nothing(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    install(monkeypatch, FakeDriver(error=error))
    assert gpus.kind_of(0) == ""
    assert gpus.facts("0,1") == []
    with pytest.raises(pynvml.NVMLError):
        Reader([0])


def test_this_host_has_no_driver_or_says_what_it_has() -> None:
    """The real thing, whatever it is here."""
    found = gpus.facts(0)
    assert gpus.kind_of(0) == (found[0].name if found else "")


def test_an_index_that_is_none_is_no_kind(driver: FakeDriver) -> None:
    assert gpus.kind_of(7) == ""


def test_a_driver_that_hangs_does_not_hold_up_the_start(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "ANSWER_SECONDS", 0.05)
    driver.free.clear()
    before = time.monotonic()
    assert gpus.kind_of(0) == ""
    assert time.monotonic() - before < 30


# --- The contract with nvidia-ml-py ---------------------------------------------------------


def test_every_fake_function_is_one_that_nvidia_ml_py_asks_for() -> None:
    source = Path(pynvml.__file__).read_text()
    asked = set(re.findall(r'_nvmlGetFunctionPointer\("(\w+)"\)', source))
    fakes = {name[1:] for name in vars(FakeDriver) if name.startswith("_nvml")}
    assert fakes - asked == set()


def test_all_that_is_used_exists_in_the_installed_nvidia_ml_py() -> None:
    sources = [Path(module.__file__).read_text() for module in (gpus, guard)]
    used = {name for source in sources for name in re.findall(r"pynvml\.(\w+)", source)}
    assert {name for name in used if not hasattr(pynvml, name)} == set()
    assert {name for name in used if name.startswith("nvmlDeviceGet")} > {"nvmlDeviceGetName"}
