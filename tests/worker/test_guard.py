"""The guard: what it makes of readings (pure), and its thread, on a fake of the driver's library.

The steady readings are what `nvidia-smi -q` printed on real cards; the trouble is made out of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.jobs import wait_for
from tests.worker.nvml import Card, FakeDriver, install
from worker import guard as guards
from worker.gpus import Reading
from worker.guard import CALM_SECONDS, FAILURES, SILENT_SECONDS, Guard, Limits, judge
from worker.guard import Verdict as V
from worker.models import Health

EVERY = 5.0
NONE = Limits()
# An RTX 4080 SUPER and an H100 at work (captures of utkuozdemir/nvidia_gpu_exporter).
RTX = Reading(
    0.0,
    temperature=46,
    slowdown=96,
    power=84.24,
    memory_used=1_474,
    memory_total=16_376,
    utilization=7,
)
H100 = Reading(
    0.0,
    temperature=59,
    slowdown=87,
    power=631.95,
    memory_used=19_818,
    memory_total=81_559,
    utilization=100,
    uncorrectable=0,
    correctable=0,
)
LOST = Reading(0.0, failure="GPU is lost", lost=True)
UNKNOWN = Reading(0.0, failure="Unknown Error")


def series(*readings: Reading, start: float = 0.0, every: float = EVERY) -> list[Reading]:
    """The readings one after the other, at the guard's pace."""
    return [replace(each, at=start + at * every) for at, each in enumerate(readings)]


def heated(*temperatures: int, of: Reading = RTX) -> list[Reading]:
    return series(*(replace(of, temperature=each) for each in temperatures))


def verdicts(readings: Sequence[Reading], limits: Limits = NONE) -> list[V]:
    """What the guard says after each reading, as it would have come to it."""
    said, before = [], V(Health.OK)
    for count, reading in enumerate(readings, start=1):
        before = judge(readings[:count], before, reading.at, limits)
        said.append(before)
    return said


def healths(readings: Sequence[Reading], limits: Limits = NONE) -> str:
    """One letter for each: o(k), p(aused), r(esting), s(ick)."""
    return "".join(each.health[0] for each in verdicts(readings, limits))


# --- Too hot, too much power, too much memory -----------------------------------------------


def test_a_gpu_at_work_is_fed() -> None:
    assert healths(series(*[RTX] * 5)) == "ooooo"
    assert healths(series(*[H100] * 5)) == "ooooo"


def test_hot_pauses_and_cool_for_a_while_resumes() -> None:
    temperatures = (90, 94, 95, 96, 92, 86, 85, 84, 83, 82, 82, 82)
    assert healths(heated(*temperatures)) == "oopppppppp" + "oo"


def test_the_verdict_says_how_hot_and_when_it_goes_on() -> None:
    said = verdicts(heated(95, 90))
    assert [each.why for each in said] == [
        "95 °C, and the limit is 95",
        "90 °C, and the limit is 95; goes on below 85",
    ]
    assert said == [V(Health.PAUSED, said[0].why, 0), V(Health.PAUSED, said[1].why, 0)]


def test_a_data_centre_gpu_regulates_itself_below_the_limit() -> None:
    """T.Limit 0 is where its driver begins to regulate, -2 where its hardware brakes."""
    assert healths(heated(85, 86, 87, of=replace(H100, slowdown=89))) == "ooo"
    assert healths(heated(88, of=replace(H100, slowdown=89))) == "p"


def test_a_limit_that_is_set_comes_before_the_gpus_own() -> None:
    assert healths(heated(79, 80), Limits(temperature=80)) == "op"
    assert healths(heated(96), Limits(temperature=99)) == "o"


def test_a_gpu_that_tells_no_threshold_has_only_the_limit_that_is_set() -> None:
    mute = replace(RTX, slowdown=None)
    assert healths(heated(130, of=mute)) == "o"
    assert healths(heated(80, of=mute), Limits(temperature=80)) == "p"


def test_power_pauses_above_its_limit_and_resumes_at_nine_tenths() -> None:
    watts = [300, 250, 230, 226, 225, 224, 224, 224, 224]
    readings = series(*(replace(RTX, power=each) for each in watts))
    assert healths(readings, Limits(power=250)) == "pppppppp" + "o"
    assert healths(readings) == "o" * 9


def test_memory_pauses_above_its_share() -> None:
    readings = series(*(replace(RTX, memory_used=each) for each in (15_000, 16_000, 15_500)))
    assert healths(readings, Limits(memory=97)) == "opp"
    assert verdicts(readings, Limits(memory=97))[1].why == "98 % of its memory, and the limit is 97"


def test_a_brake_of_the_hardware_pauses() -> None:
    braked = replace(RTX, slowed="its hardware slows it down: power brake")
    assert healths(series(RTX, braked, RTX, RTX, RTX, RTX)) == "opppp" + "o"


def test_a_pause_that_lasts_gives_the_chunks_back_and_ends_by_itself() -> None:
    hot = heated(*[96] * 14, *[60] * 4)
    assert healths(hot) == "p" * 12 + "rr" + "rrr" + "o"
    assert {each.since for each in verdicts(hot)[:-1]} == {0.0}


@pytest.mark.parametrize("nothing", [Reading(0.0), replace(RTX, temperature=None, slowdown=None)])
def test_a_gpu_that_tells_nothing_is_fed(nothing: Reading) -> None:
    assert healths(series(nothing, nothing), Limits(80, 300, 90)) == "oo"


# --- Sick -----------------------------------------------------------------------------------

SICK = {
    "lost": ([H100, LOST], "lost: GPU is lost"),
    "unreadable": ([H100, *[UNKNOWN] * FAILURES], "cannot be read: Unknown Error"),
    "fallen off the bus": (
        [H100, replace(H100, xids=(79,))],
        "XID 79: it has fallen off the bus",
    ),
    "double-bit": (
        [H100, replace(H100, xids=(31, 48), uncorrectable=1)],
        "XID 48: double-bit memory error",
    ),
    "uncorrectable": (
        [H100, replace(H100, uncorrectable=2)],
        "2 uncorrectable memory error(s)",
    ),
    "remapping": (
        [H100, replace(H100, repair_pending=True)],
        "a repair of its memory waits for a reset",
    ),
    "worn out": (
        [H100, replace(H100, repair_failed=True, repair_pending=True)],
        "a repair of its memory failed",
    ),
    "advised": (
        [H100, replace(H100, recovery_action=pynvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET)],
        "the driver says that it needs a reset",
    ),
    "newly advised": (
        [H100, replace(H100, recovery_action=99)],
        "the driver says that it needs recovery action 99",
    ),
}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_gpu_is_known_and_stays_sick(name: str) -> None:
    readings, why = SICK[name]
    said = verdicts(series(*readings, *[H100] * 5))
    first = len(readings) - 1
    assert {each.health for each in said[first:]} == {Health.SICK}
    assert Health.SICK not in {each.health for each in said[:first]}
    assert {each.why for each in said[first:]} == {why}


@pytest.mark.parametrize(
    "passing",
    [
        replace(H100, xids=(13, 31, 43, 45, 63, 94, 109)),
        replace(H100, correctable=5_000),
        replace(H100, uncorrectable=None),
    ],
)
def test_what_applications_do_and_hardware_corrects_is_no_sickness(passing: Reading) -> None:
    assert healths(series(H100, passing, passing)) == "ooo"


def test_corrected_errors_are_told() -> None:
    said = verdicts(series(H100, replace(H100, correctable=7)))
    assert [each.why for each in said] == ["", "7 correctable memory error(s) in 15 minutes"]


def test_errors_from_before_the_guard_looked_are_no_news() -> None:
    assert healths(series(*[replace(H100, uncorrectable=4)] * 3)) == "ooo"


def test_a_reset_counter_is_no_growth() -> None:
    assert healths(series(replace(H100, uncorrectable=4), H100, H100)) == "ooo"


def test_one_failure_only_pauses() -> None:
    assert healths(series(H100, UNKNOWN, H100, H100, H100, H100)) == "opppp" + "o"
    assert healths(series(H100, UNKNOWN, UNKNOWN, H100)) == "oppp"


def test_an_operator_can_accept_a_sickness_but_not_the_next() -> None:
    pending = replace(H100, repair_pending=True)
    after = [pending, replace(pending, uncorrectable=1)]
    accepted = frozenset({"repair pending"})
    before = V(Health.OK)
    for count, expected in ((1, Health.OK), (2, Health.SICK)):
        before = judge(series(*after)[:count], before, count * EVERY, Limits(), accepted)
        assert before.health == expected


# --- A driver that hangs --------------------------------------------------------------------


def test_a_silent_driver_pauses_then_rests_and_its_answer_ends_it() -> None:
    history, before, said = series(H100), V(Health.OK), ""
    for now in (0, 20, 21, 80, 81):
        before = judge(history, before, now, Limits())
        said += before.health[0]
    assert said == "oopp" + "r"
    assert before.why == "its driver has not answered for 81 s"
    history.append(replace(H100, at=90))
    assert judge(history, before, 90, Limits()) == V(Health.OK, "", 90)


def test_a_driver_that_hangs_again_and_again_is_sick() -> None:
    twice = series(H100, H100, H100, every=SILENT_SECONDS + 1)
    assert healths(twice) == "ooo"
    again = [*twice, replace(H100, at=twice[-1].at + SILENT_SECONDS + 1)]
    assert verdicts(again)[-1].why == "its driver hangs again and again"


# --- Properties -----------------------------------------------------------------------------

WHOLE = st.none() | st.integers(0, 200)
READINGS = st.builds(
    Reading,
    at=st.just(0.0),
    failure=st.sampled_from(["", "", "", "Unknown Error"]),
    lost=st.booleans(),
    temperature=WHOLE,
    slowdown=WHOLE,
    power=WHOLE,
    memory_used=WHOLE,
    memory_total=WHOLE,
    uncorrectable=WHOLE,
    correctable=WHOLE,
    repair_pending=st.booleans(),
    recovery_action=st.integers(0, 9),
    slowed=st.sampled_from(["", "too hot"]),
    xids=st.lists(st.sampled_from([13, 48, 79, 999]), max_size=2).map(tuple),
)
LIMITS = st.builds(Limits, WHOLE, WHOLE, WHOLE)
TEMPERATURES = st.lists(st.integers(75, 100), min_size=1, max_size=40)


@given(st.lists(READINGS, min_size=1, max_size=12), LIMITS)
def test_any_reading_has_a_verdict_and_sick_is_for_good(
    readings: list[Reading], limits: Limits
) -> None:
    said = healths(series(*readings), limits)
    assert set(said.partition("s")[2]) <= {"s"}


@given(TEMPERATURES)
def test_a_gpu_above_its_limit_is_never_fed(temperatures: list[int]) -> None:
    for temperature, verdict in zip(temperatures, verdicts(heated(*temperatures)), strict=True):
        assert not (verdict.feeds and temperature >= 95)


@given(TEMPERATURES)
def test_feeding_goes_on_only_after_a_calm(temperatures: list[int]) -> None:
    said = verdicts(heated(*temperatures))
    for at in range(1, len(said)):
        if said[at].feeds and not said[at - 1].feeds:
            calm = temperatures[max(0, at - int(CALM_SECONDS / EVERY)) : at + 1]
            assert max(calm) < 85


@given(st.lists(st.sampled_from([86, 94, 95, 96]), max_size=60))
def test_at_the_border_there_is_no_flapping(temperatures: list[int]) -> None:
    assert "po" not in healths(heated(*temperatures)).replace("r", "p")


@given(TEMPERATURES)
def test_a_gpu_that_is_cool_for_long_is_fed(temperatures: list[int]) -> None:
    assert healths(heated(*temperatures, 60, 60, 60, 60))[-1] == "o"


# --- The guard and its thread ---------------------------------------------------------------


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    monkeypatch.setattr(guards, "READ_SECONDS", 0.01)
    made = install(monkeypatch, FakeDriver(Card()))
    yield made
    made.free.set()


class Watching:
    """A guard that looks, and how often it said that it has changed its mind."""

    def __init__(self, *gpus: int, limits: Limits = NONE) -> None:
        self.changed: list[None] = []
        self.guard = Guard(gpus, limits)
        self.guard.start(lambda: self.changed.append(None))

    def until(self, health: Health) -> V:
        wait_for(lambda: self.guard.look().health == health)
        return self.guard.verdict


@pytest.fixture
def watching(driver: FakeDriver) -> Iterator[Callable[..., Watching]]:
    made: list[Watching] = []

    def make(*gpus: int, **options: Any) -> Watching:
        made.append(Watching(*gpus, **options))
        return made[-1]

    yield make
    driver.free.set()
    for each in made:
        each.guard.stop()
    wait_for(lambda: "gpu guard" not in {thread.name for thread in threading.enumerate()})


def test_the_guard_reads_judges_and_tells(
    driver: FakeDriver, watching: Callable[..., Watching], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "CALM_SECONDS", 0.05)
    it = watching(0)
    wait_for(lambda: it.guard.columns()["temperature"] == 41)
    driver.cards[0].temperature = 97
    assert it.until(Health.PAUSED).why.startswith("GPU 0: 97 °C, and the limit is 94")
    driver.cards[0].temperature = 60
    it.until(Health.OK)
    wait_for(lambda: len(it.changed) == 2)


def test_its_columns_are_of_all_gpus_together(
    driver: FakeDriver, watching: Callable[..., Watching]
) -> None:
    driver.cards.append(
        Card(temperature=70, utilization=60, milliwatts=100_000, memory_used=10_000)
    )
    it = watching(0, 1)
    wait_for(lambda: it.guard.columns()["temperature"])
    assert it.guard.columns() == {
        "health": "ok",
        "health_why": "",
        "memory_used": 10_003,
        "memory_total": 49_152,
        "temperature": 70,
        "power": 125.0,
        "utilization": 30.0,
    }


def test_the_worst_gpu_decides(driver: FakeDriver, watching: Callable[..., Watching]) -> None:
    driver.cards = [Card(temperature=99), Card(errors={"": pynvml.NVML_ERROR_GPU_IS_LOST}), Card()]
    assert watching(0, 1, 2).until(Health.SICK).why.startswith("GPU 1: lost: ")


def test_without_gpus_all_is_well_and_nothing_is_asked(
    driver: FakeDriver, watching: Callable[..., Watching]
) -> None:
    it = watching()
    nothing = dict.fromkeys(["memory_used", "memory_total", "temperature", "power", "utilization"])
    assert it.guard.look().feeds
    assert it.guard.columns() == {"health": "", "health_why": "", **nothing}
    it.guard.look_now(60)
    assert driver.asked == []


def test_without_a_driver_it_is_as_without_gpus(
    driver: FakeDriver, watching: Callable[..., Watching]
) -> None:
    driver.error = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    it = watching(0)
    wait_for(lambda: it.guard.columns()["health"] == "")
    assert it.guard.look().feeds


def test_it_can_be_switched_off(
    driver: FakeDriver, watching: Callable[..., Watching], settings: Any
) -> None:
    settings.GPU_GUARD = False
    driver.cards[0].errors[""] = pynvml.NVML_ERROR_GPU_IS_LOST
    it = watching(0)
    assert it.guard.look().feeds
    assert driver.asked == []


def test_limits_come_from_the_settings(settings: Any) -> None:
    settings.GPU_MAX_TEMPERATURE, settings.GPU_MAX_POWER = 80, 0
    assert Limits.configured() == Limits(80, None, None)


def test_a_driver_that_hangs_holds_up_nobody_and_is_noticed(
    driver: FakeDriver, watching: Callable[..., Watching], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(guards, "REST_SECONDS", 0.2)
    it = watching(0)
    wait_for(lambda: it.guard.columns()["temperature"])
    driver.free.clear()
    it.until(Health.RESTING)
    assert it.guard.columns()["temperature"] is None
    monkeypatch.setattr(guards, "SILENT_SECONDS", 600)
    driver.free.set()
    it.until(Health.OK)
    wait_for(lambda: len(it.changed) == 3)


def test_a_driver_that_never_answers_is_noticed_too(
    driver: FakeDriver, watching: Callable[..., Watching], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "SILENT_SECONDS", 0.05)
    driver.free.clear()
    it = watching(0)
    it.until(Health.PAUSED)


def test_it_looks_at_once_when_asked(
    driver: FakeDriver, watching: Callable[..., Watching], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "READ_SECONDS", 3_600)
    it = watching(0)
    wait_for(lambda: it.guard.columns()["temperature"])
    driver.cards[0].errors[""] = pynvml.NVML_ERROR_GPU_IS_LOST
    assert it.guard.verdict.feeds
    it.guard.look_now(60)
    assert it.guard.verdict.health == Health.SICK


def test_a_look_at_a_driver_that_hangs_does_not_wait_for_it(
    driver: FakeDriver, watching: Callable[..., Watching]
) -> None:
    it = watching(0)
    wait_for(lambda: it.guard.columns()["temperature"])
    driver.free.clear()
    before = time.monotonic()
    it.guard.look_now(0.05)
    assert time.monotonic() - before < 30


def test_a_sick_gpu_is_well_when_an_operator_says_so_until_it_gets_worse(
    driver: FakeDriver, watching: Callable[..., Watching]
) -> None:
    driver.cards[0].remapped = (0, 1, 1, 0)
    it = watching(0)
    it.until(Health.SICK)
    it.guard.forgive()
    asked = len(driver.asked)
    wait_for(lambda: len(driver.asked) > asked + 100)
    assert it.guard.look().feeds
    driver.cards[0].errors[""] = pynvml.NVML_ERROR_GPU_IS_LOST
    assert it.until(Health.SICK).why.startswith("GPU 0: lost")
    wait_for(lambda: len(it.changed) == 3)


@pytest.mark.parametrize("again", ["uncorrectable", "xid", "lost"])
def test_what_happens_again_after_an_operators_word_makes_it_sick_again(
    driver: FakeDriver, watching: Callable[..., Watching], again: str
) -> None:
    card = driver.cards[0]
    card.uncorrected = 0

    def happen() -> None:
        if again == "uncorrectable":
            card.uncorrected += 1
        elif again == "xid":
            driver.events.append((0, 48))
        else:
            card.errors[""] = pynvml.NVML_ERROR_GPU_IS_LOST

    it = watching(0)
    wait_for(lambda: it.guard.columns()["temperature"])
    for count in (1, 3):
        happen()
        it.until(Health.SICK)
        wait_for(lambda count=count: len(it.changed) == count)
        card.errors.clear()
        it.guard.look_now(60)
        it.guard.forgive()
        assert it.guard.verdict.feeds


def test_a_gpu_that_is_still_lost_is_sick_again_at_once(
    driver: FakeDriver, watching: Callable[..., Watching]
) -> None:
    it = watching(0)
    driver.cards[0].errors[""] = pynvml.NVML_ERROR_GPU_IS_LOST
    it.until(Health.SICK)
    it.guard.forgive()
    it.until(Health.SICK)
    assert it.guard.told is False  # so its row is told to drain again


def test_what_an_earlier_life_had_is_remembered_until_an_operator_says_so(
    driver: FakeDriver, watching: Callable[..., Watching]
) -> None:
    it = watching(0)
    it.guard.remember("GPU 0: XID 79: it has fallen off the bus")
    wait_for(lambda: it.guard.columns()["temperature"])
    said = it.guard.columns()
    assert (said["health"], said["health_why"]) == (
        "sick",
        "GPU 0: XID 79: it has fallen off the bus",
    )
    assert it.guard.told
    it.guard.forgive()
    assert (it.guard.look().health, it.guard.told) == (Health.OK, False)


@pytest.mark.parametrize(("gpus", "why"), [([0], ""), ([], "GPU 0: lost")])
def test_with_nothing_to_remember_or_no_gpu_any_more_it_is_well(
    driver: FakeDriver, gpus: list[int], why: str
) -> None:
    it = Guard(gpus, Limits())
    it.remember(why)
    assert (it.look().health, it.told) == (Health.OK, False)


def test_a_guard_that_fails_goes_on(
    driver: FakeDriver, watching: Callable[..., Watching], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "judge", lambda *given: 1 / 0)
    it = watching(0)
    wait_for(lambda: len(driver.asked) > 100)
    monkeypatch.undo()
    install(monkeypatch, driver)
    assert it.until(Health.OK).feeds
