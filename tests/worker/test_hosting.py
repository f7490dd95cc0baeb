"""Which models are on a worker's GPU: loads that lack memory, sleep, waking, and what is remembered.

The engines are scripted and the GPU is counted, for neither is to be had here.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import psutil
import pytest

from models_registry.models import Measurement, Model, ModelLoad
from models_registry.services import register_model, retry_model
from tests.jobs import TheTests, wait_for
from tests.worker import scripted
from tests.worker.conftest import Loop
from tests.worker.scripted import Gpu, Script, text
from tests.worker.test_ladder import CACHE, SAMPLER, WEIGHTS, taken
from worker import hosting, memory, orphans
from worker.engines.base import Answer, LoadFailed, ModelSpec
from worker.hosting import Host
from worker.memory import Memory
from worker.status import Status

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.usefixtures("data_dir", "models"),
]
script, gpu = scripted.script, scripted.gpu
KIND = "NVIDIA H100 80GB HBM3"
NAMES = ("a", "b", "c")


@pytest.fixture
def data_dir(tmp_path: Path, settings: Any) -> Path:
    settings.DATA_DIR = tmp_path
    return tmp_path


@pytest.fixture
def models() -> None:
    for name in NAMES:
        register_model(name=name, source=f"org/{name}")


class Running(Host):
    """A host, asked from the test's thread."""

    def __init__(self, loop: Loop, name: str = "gpu0") -> None:
        self.loop, self.database, self.told = loop, TheTests(), Status()
        super().__init__(name, 0, self.database, self.told)
        self.gpu_kind = KIND

    def use(self, *names: str) -> bool:
        return [self.loop.run(self.ensure(name)) for name in names][-1]

    def begin(self, name: str) -> Future[bool]:
        return asyncio.run_coroutine_threadsafe(self.ensure(name), self.loop.loop)

    def left_out(self) -> list[str]:
        return list(self.loop.run(self.avoided()))

    def end(self) -> None:
        self.loop.run(self.close())
        self.database.close()


@pytest.fixture
def host(loop: Loop, script: Script, gpu: Gpu) -> Iterator[Running]:
    script.sleeps = True
    made = Running(loop)
    yield made
    made.end()
    assert [each.spec.name for each in script.made if each.held] == []


def measured(name: str) -> Measurement:
    return Measurement.objects.get(model__name=name, gpu=KIND)


def history(name: str) -> list[tuple[str, str]]:
    """What happened to the model, and why not."""
    rows = ModelLoad.objects.filter(model__name=name).order_by("pk")
    return list(rows.values_list("change", "error"))


def fails(times: int, said: str, only: str = "a") -> Callable[[ModelSpec], Exception | None]:
    """A load that fails with this message so many times."""
    left = [times]

    def error(spec: ModelSpec) -> Exception | None:
        if spec.name != only or not left[0]:
            return None
        left[0] -= 1
        return LoadFailed(said)

    return error


# --- Too little memory ----------------------------------------------------------------------


def test_a_model_that_runs_out_of_memory_is_loaded_with_less(host: Running, script: Script) -> None:
    script.load_error = fails(2, SAMPLER)
    assert host.use("a")
    less = {"max-num-seqs": 64, "gpu-memory-utilization": 0.82}
    assert script.made[-1].spec.settled == less
    assert measured("a").settled == less
    assert history("a") == [("load", SAMPLER), ("load", SAMPLER), ("load", "")]
    assert (host.told.error, Model.objects.get(name="a").load_error) == ("", "")
    tried = list(ModelLoad.objects.order_by("pk").values_list("settled", flat=True))
    assert tried == [{}, {"max-num-seqs": 128, "gpu-memory-utilization": 0.87}, less]


def test_what_it_settled_on_is_used_at_once_by_the_next_worker_of_that_kind(
    host: Running, loop: Loop, script: Script
) -> None:
    script.load_error = fails(1, CACHE)
    assert host.use("a")
    host.loop.run(host.unload())
    other = Running(loop, "gpu1")
    assert other.use("a")
    other.end()
    assert script.made[-1].spec.settled == {"gpu-memory-utilization": 0.97}
    assert script.loads == ["a", "a"]


def test_other_kinds_of_gpu_have_their_own(host: Running, script: Script) -> None:
    script.load_error = fails(1, CACHE)
    assert host.use("a")
    host.loop.run(host.unload())
    host.gpu_kind = "NVIDIA GeForce RTX 4090"
    assert host.use("a")
    assert script.made[-1].spec.settled == {}


@pytest.mark.parametrize(
    "again", [lambda: register_model(name="a", source="org/a"), lambda: retry_model(name="a")]
)
def test_registered_anew_or_given_another_chance_it_begins_at_the_top(
    host: Running, script: Script, again: Callable[[], Model]
) -> None:
    script.load_error = fails(1, CACHE)
    assert host.use("a")
    host.loop.run(host.unload())
    again()
    assert measured("a").settled == {}
    assert host.use("a")
    assert script.made[-1].spec.settled == {}


def test_what_is_learned_of_an_entry_that_was_changed_meanwhile_is_not_kept(
    host: Running, script: Script
) -> None:
    script.load_error, script.hangs = fails(1, CACHE), "load"
    coming = host.begin("a")
    wait_for(lambda: script.loading)
    register_model(name="a", source="org/other")
    script.hangs = ""
    assert coming.result(60)
    assert measured("a").settled == {}


def test_a_model_that_does_not_fit_is_remembered_with_the_reason(
    host: Running, script: Script
) -> None:
    script.load_error = fails(1, WEIGHTS)
    assert not host.use("a")
    why = f"It does not fit this GPU: {WEIGHTS}"
    assert measured("a").unfit_why == why
    assert (Model.objects.get(name="a").load_error, host.told.error) == (why, f"a: {why}")
    assert history("a") == [("load", WEIGHTS)]
    assert host.left_out() == []  # the queue leaves it out, for every worker of this kind
    assert host.engine is None


def test_a_ladder_that_is_exhausted_says_so(host: Running, script: Script) -> None:
    script.load_error = fails(99, SAMPLER)
    assert not host.use("a")
    assert measured("a").unfit_why == f"It does not fit this GPU: {SAMPLER}"
    assert measured("a").settled == {}
    assert len(history("a")) == 6


def test_a_gpu_that_others_fill_is_waited_for(host: Running, script: Script) -> None:
    script.load_error = fails(99, taken(10.0))
    assert not host.use("a")
    assert Measurement.objects.filter(model__name="a").count() == 0
    assert host.left_out() == ["a"]


def test_what_others_leave_is_used_but_not_remembered(host: Running, script: Script) -> None:
    script.load_error = fails(1, taken(60.0))
    assert host.use("a")
    assert script.made[-1].spec.settled == {"gpu-memory-utilization": 0.73}
    assert measured("a").settled == {}


def test_other_failures_are_tried_again_later_and_later(
    host: Running, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(hosting, "time", SimpleNamespace(monotonic=lambda: now[0]))
    script.load_error = fails(99, "OSError: the hub cannot be reached")
    for pause in (60, 120, 240, 480, 960, 1800, 1800):
        assert not host.use("a")
        now[0] += pause - 1
        assert host.left_out() == ["a"]
        now[0] += 2
        assert host.left_out() == []
    script.load_error = fails(1, "once more", only="b")
    assert host.use("a")
    assert not host.use("b")
    now[0] += 61
    assert host.left_out() == []


@pytest.mark.parametrize(
    "again", [lambda: register_model(name="a", source="org/a"), lambda: retry_model(name="a")]
)
def test_registered_anew_or_given_another_chance_it_is_tried_at_once(
    host: Running, script: Script, again: Callable[[], Model]
) -> None:
    script.load_error = fails(1, "OSError: no such repository")
    assert not host.use("a")
    assert host.left_out() == ["a"]
    again()
    assert host.left_out() == []
    assert host.use("a")


def test_what_can_be_known_beforehand_costs_the_other_model_nothing(
    host: Running, script: Script
) -> None:
    assert host.use("a")
    script.check_error = lambda spec: LoadFailed("There is no /models/b on this host.")
    assert not host.use("b")
    assert script.happened == ["load a"]
    assert (host.told.loaded, host.engine) == ("a", script.made[0])
    assert Model.objects.get(name="b").load_error == "There is no /models/b on this host."
    assert host.left_out() == ["b"]
    assert host.use("a")
    assert script.happened == ["load a"]


def test_a_load_that_never_ends_is_ended(host: Running, script: Script, settings: Any) -> None:
    settings.LOAD_SECONDS = 0
    script.hangs, process = "load", _process()
    script.pids = {"a": [process.pid]}
    try:
        assert not host.use("a")
        assert not psutil.pid_exists(process.pid)  # what it had started is ended
    finally:
        process.kill()
        process.wait()
    said = (
        "It was not loaded within 0 seconds, so its load was ended. If it only takes longer (a "
        "large download, a slow disk), raise LOAD_SECONDS; else see the worker's log for what it "
        "waited for."
    )
    assert (Model.objects.get(name="a").load_error, host.left_out()) == (said, ["a"])
    assert history("a") == [("load", said)]
    assert (host.engine, script.happened[-1]) == (None, "unload a")


def test_an_engine_that_dies_of_its_first_request_was_not_loaded(
    host: Running, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found out by a request of the host's own, and left out for longer each time."""
    now = [1000.0]
    monkeypatch.setattr(hosting, "time", SimpleNamespace(monotonic=lambda: now[0]))
    script.sleeps, script.canary = False, scripted.deadly
    for pause in (60, 120):
        assert not host.use("a")
        now[0] += pause - 1
        assert host.left_out() == ["a"]
        now[0] += 2
        assert host.left_out() == []
    said = "It was loaded, and died of its first request: as the script says"
    assert (Model.objects.get(name="a").load_error, host.engine) == (said, None)


def test_one_that_cannot_be_asked_has_answered_nothing_yet(host: Running, script: Script) -> None:
    assert host.use("a")
    assert host.has_answered
    script.canary = lambda engine: Answer(400, b"{}")
    assert host.use("b")
    assert not host.has_answered
    host.answered()
    assert host.has_answered


def test_a_model_that_is_left_out_is_left_out_for_longer_unless_it_has_answered(
    host: Running, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(hosting, "time", SimpleNamespace(monotonic=lambda: now[0]))
    script.canary = lambda engine: Answer(400, b"{}")
    for answers, pause in ((False, 60), (False, 120), (True, 60), (False, 120)):
        assert host.use("a")
        if answers:
            host.answered()
        host.loop.run(host.leave_out("away"))
        assert (host.told.loaded, host.engine) == ("", None)
        now[0] += pause - 1
        assert host.left_out() == ["a"]
        now[0] += 2
        assert host.left_out() == []
    assert Model.objects.get(name="a").load_error == "away"


def test_an_engine_that_died_awake_is_not_had_and_loaded_anew(
    host: Running, script: Script
) -> None:
    assert host.use("a")
    assert script.engine is not None
    script.engine.die()
    assert not host.loop.run(host.has("a"))
    assert host.use("a")
    assert script.happened == ["load a", "unload a", "load a"]
    assert host.loop.run(host.has("a"))


def test_an_engines_bug_while_it_loads_leaves_nothing(host: Running, script: Script) -> None:
    script.load_error = lambda spec: KeyError("a bug")
    assert not host.use("a")
    assert script.happened == ["load a", "unload a"]
    assert host.left_out() == ["a"]


# --- Sleep ----------------------------------------------------------------------------------


def test_models_fall_asleep_and_wake_instead_of_being_loaded_again(
    host: Running, script: Script
) -> None:
    assert host.use("a", "b", "a", "b")
    assert script.happened == [
        *("load a", "sleep a", "load b", "sleep b", "wake a", "sleep a", "wake b")
    ]
    assert (host.told.loaded, host.told.asleep) == ("b", ["a"])
    assert sorted(host.near) == ["a", "b"]
    assert host.told.loads == 4


def test_a_model_that_was_loaded_costs_a_load_until_it_has_slept(
    host: Running, script: Script
) -> None:
    assert host.use("a")
    assert host.near == []
    assert host.use("b")
    assert host.near == ["a"]


def test_every_load_sleep_and_waking_is_written_down_and_measured(
    host: Running, script: Script
) -> None:
    assert host.use("a", "b", "a")
    assert history("a") == [("load", ""), ("sleep", ""), ("wake", "")]
    woken = ModelLoad.objects.get(change="wake")
    assert (woken.worker, woken.gpu, woken.seconds >= 0) == ("gpu0", KIND, True)
    assert measured("a").wake_seconds == woken.seconds
    assert (
        measured("a").load_seconds == ModelLoad.objects.get(change="load", model__name="a").seconds
    )
    assert measured("b").wake_seconds is None
    host.loop.run(host.unload())
    assert history("a")[-1] == ("unload", "")


def test_a_model_that_keeps_the_gpus_memory_asleep_is_unloaded(
    host: Running, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripted.ScriptedEngine, "held_asleep", 6)
    assert host.use("a", "b")
    assert script.happened == ["load a", "sleep a", "unload a", "load b"]
    assert history("a") == [
        ("load", ""),
        ("sleep", "Asleep, it still held the GPU's memory."),
        ("unload", ""),
    ]
    assert (host.told.asleep, host.near) == ([], [])


def test_what_sleeping_models_keep_of_the_gpu_does_not_add_up_unseen(
    host: Running, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each may keep a little; when vLLM finds too little free, they go before anything else."""
    monkeypatch.setattr(scripted.ScriptedEngine, "held_asleep", 5)

    def startup(spec: ModelSpec) -> Exception | None:
        held = sum(each.held for each in script.made)
        return LoadFailed(taken(100.0 - held, 100.0)) if held > 5 else None

    script.load_error = startup
    assert host.use("a", "b", "c")
    assert script.happened[-4:] == ["load c", "unload c", "unload a", "load c"]
    assert (host.told.asleep, host.told.loaded) == (["b"], "c")
    assert script.made[-1].spec.settled == {}
    assert measured("c").settled == {}


@pytest.mark.parametrize("error", [RuntimeError("a bug"), LoadFailed("no")])
def test_a_model_that_cannot_fall_asleep_is_unloaded(
    host: Running, script: Script, error: Exception
) -> None:
    script.sleep_error = lambda spec: error
    assert host.use("a", "b")
    assert script.happened == ["load a", "sleep a", "unload a", "load b"]


@pytest.mark.parametrize("error", [RuntimeError("CUDA Error: out of memory"), LoadFailed("no")])
def test_a_model_that_cannot_wake_is_loaded_anew(
    host: Running, script: Script, error: Exception
) -> None:
    script.wake_error = lambda spec: error
    assert host.use("a", "b", "a")
    assert script.happened == [
        *("load a", "sleep a", "load b", "sleep b", "wake a", "unload a", "load a")
    ]
    assert history("a")[2:] == [("wake", str(error)), ("unload", ""), ("load", "")]
    assert host.near == ["b"]
    assert measured("a").wake_seconds is None


@pytest.mark.parametrize("what", ["sleep", "wake"])
def test_who_falls_asleep_or_wakes_for_ever_is_given_up(
    host: Running, script: Script, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(hosting, "SLEEP_SECONDS", 0.05)
    assert host.use("a")
    script.hangs = what
    assert host.use("b", "a")
    assert (host.told.loaded, script.happened[-1]) == ("a", "load a")


def test_a_model_that_says_something_else_after_its_sleep_is_loaded_anew(
    host: Running, script: Script
) -> None:
    assert host.use("a", "b")
    script.canary = lambda engine: text("gibberish")
    assert host.use("a")
    assert script.happened[-3:] == ["wake a", "unload a", "load a"]
    said = "After its sleep the model did not say what it had said before."
    assert ("wake", said) in history("a")


def test_a_model_that_never_repeats_itself_need_only_answer(host: Running, script: Script) -> None:
    script.canary = lambda engine: text(str(time.perf_counter_ns()))
    assert host.use("a", "b", "a")
    assert script.happened[-1] == "wake a"
    script.canary = lambda engine: Answer(500, b"{}")
    assert host.use("b")
    assert script.happened[-3:] == ["wake b", "unload b", "load b"]


def test_a_model_that_cannot_be_asked_does_not_sleep(host: Running, script: Script) -> None:
    script.canary = lambda engine: Answer(400, b"{}")
    assert host.use("a", "b")
    assert script.happened == ["load a", "unload a", "load b"]


def test_where_the_gpus_memory_is_not_to_be_known_nothing_sleeps(
    host: Running, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "of_gpu", lambda gpu: None)
    assert host.use("a", "b")
    assert script.happened == ["load a", "unload a", "load b"]
    assert [each.spec.may_sleep for each in script.made] == [False] * len(script.made)


def test_the_one_that_slept_longest_makes_room_for_the_next(
    host: Running, script: Script, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.SLEEPING_MODELS_GB = 2
    monkeypatch.setattr(memory, "of_host", lambda: Memory(100 * 10**9, 100 * 10**9))
    monkeypatch.setattr(memory, "of_weights", lambda source, revision="": 10**9)
    register_model(name="d", source="org/d")
    assert host.use("a", "b", "c", "d")
    assert host.told.asleep == ["b", "c"]
    assert script.happened[-3:] == ["unload a", "sleep c", "load d"]
    assert host.use("b")
    assert host.told.asleep == ["c", "d"]


@pytest.mark.parametrize(
    ("gigabytes", "free"), [(0, 100), (3, 100), (None, 23), (None, 3)], ids=str
)
def test_a_model_too_large_for_the_host_does_not_sleep(
    host: Running,
    script: Script,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    gigabytes: int | None,
    free: int,
) -> None:
    """Four gigabytes against a bound of fewer, and against a host of which a fifth stays free."""
    settings.SLEEPING_MODELS_GB = gigabytes
    monkeypatch.setattr(memory, "of_host", lambda: Memory(free * 10**9, 100 * 10**9))
    monkeypatch.setattr(memory, "of_weights", lambda source, revision="": 4 * 10**9)
    assert host.use("a", "b")
    assert script.happened == ["load a", "unload a", "load b"]
    assert script.made[0].spec.may_sleep is (gigabytes is None)


def test_an_engine_that_dies_in_its_sleep_is_noticed(host: Running, script: Script) -> None:
    assert host.use("a", "b")
    script.made[0].die()
    host.loop.run(host.tend())
    assert (host.told.asleep, script.happened[-1]) == ([], "unload a")
    assert host.use("a")
    assert script.happened[-2:] == ["sleep b", "load a"]


def test_an_engine_that_died_unnoticed_is_loaded_anew(host: Running, script: Script) -> None:
    assert host.use("a", "b")
    script.made[0].die()
    assert host.use("a")
    assert script.happened[-3:] == ["unload a", "sleep b", "load a"]


def test_where_the_host_runs_short_of_memory_the_oldest_sleeper_goes(
    host: Running, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert host.use("a", "b", "c")
    host.loop.run(host.tend())
    assert host.told.asleep == ["a", "b"]
    monkeypatch.setattr(memory, "of_host", lambda: Memory(9, 100))
    host.loop.run(host.tend())
    assert host.told.asleep == ["b"]


def test_a_model_that_was_registered_anew_in_its_sleep_is_loaded_anew(
    host: Running, script: Script
) -> None:
    assert host.use("a", "b")
    register_model(name="a", source="org/newer")
    assert host.use("a")
    assert script.happened[-3:] == ["unload a", "sleep b", "load a"]
    assert script.made[-1].spec.source == "org/newer"


def test_the_processes_of_all_engines_are_remembered(
    host: Running, script: Script, data_dir: Path
) -> None:
    started = {name: _process() for name in "ab"}
    script.pids = {name: [process.pid] for name, process in started.items()}
    try:
        assert host.use("a", "b")
        assert remembered(data_dir) == {process.pid for process in started.values()}
        host.loop.run(host.close())
        assert remembered(data_dir) == set()
        assert [process.poll() for process in started.values()] == [None, None]
    finally:
        for process in started.values():
            process.kill()
            process.wait()


@pytest.mark.parametrize("sleeps", [True, False])
def test_one_that_is_about_to_be_woken_is_remembered_while_the_other_goes(
    host: Running, script: Script, monkeypatch: pytest.MonkeyPatch, sleeps: bool
) -> None:
    """A worker that is killed in between leaves no engine that nobody knows of."""
    script.pids = {"a": [1001], "b": [1002]}
    script.sleep_error = lambda spec: None if sleeps or spec.name == "a" else LoadFailed("cannot")
    written: list[list[int]] = []
    monkeypatch.setattr(orphans, "remember", lambda worker, pids: written.append(list(pids)))
    assert host.use("a", "b")
    written.clear()
    assert host.use("a")
    assert [each for each in written if 1001 not in each] == []
    assert (written == []) is sleeps  # both are remembered all the while


def _process() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])


def remembered(folder: Path) -> set[int]:
    known = orjson.loads((folder / "workers" / "gpu0.json").read_bytes())
    return {each["pid"] for each in known}


def test_at_the_end_nothing_is_left_awake_or_asleep(host: Running, script: Script) -> None:
    assert host.use("a", "b", "c")
    host.loop.run(host.close())
    assert sorted(script.happened[-3:]) == ["unload a", "unload b", "unload c"]
    assert (host.told.loaded, host.told.asleep, host.engine) == ("", [], None)


@pytest.mark.parametrize("what", ["load", "sleep", "wake"])
def test_a_stop_waits_for_nothing(host: Running, script: Script, what: str) -> None:
    assert host.use("a", "b")
    script.hangs = what
    name = {"load": "c", "sleep": "a", "wake": "a"}[what]
    coming = host.begin(name)
    wait_for(lambda: script.loading)
    host.stopping = True
    assert coming.result(60) is False
    host.loop.run(host.close())
    assert Model.objects.get(name=name).load_error == ""


@pytest.mark.parametrize("what", ["load", "wake"])
def test_a_model_that_nobody_wants_any_more_is_not_waited_for(
    host: Running, script: Script, what: str
) -> None:
    assert host.use("a", "b")
    script.hangs = what
    name = {"load": "c", "wake": "a"}[what]
    process = _process()
    script.pids = {name: [process.pid]}
    try:
        coming = host.begin(name)
        wait_for(lambda: script.loading)
        assert host.is_coming(name)
        host.loop.loop.call_soon_threadsafe(host.cancel, "another")
        host.loop.loop.call_soon_threadsafe(host.cancel, name)
        assert coming.result(60) is False
        assert not psutil.pid_exists(process.pid)  # what it had started is ended
    finally:
        process.kill()
        process.wait()
    assert (Model.objects.get(name=name).load_error, host.left_out()) == ("", [])
    script.hangs, script.pids = "", {}
    assert host.use(name)
