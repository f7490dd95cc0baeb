"""What vLLM is told, and where its engine finds its GPUs: before anything of vLLM's runs."""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from models_registry.profiles import PROFILES, engine_args
from tests.worker.nvml import Card, FakeDriver, install
from worker.engines.base import ModelSpec
from worker.engines.vllm import options
from worker.engines.vllm.engine import VllmEngine

KNOWN = {
    f"--{name}": argparse.Action([], "", nargs=None)
    for name in ("gpu-memory-utilization", "max-num-seqs", "runner")
}
SMALL = engine_args(12_288)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "on_cpu", lambda: False)


def test_a_process_that_ends_just_when_it_is_to_be_ended_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = VllmEngine(ModelSpec("m", "source"))
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    monkeypatch.setattr(engine, "pids", lambda: [child.pid])
    monkeypatch.setattr(psutil, "pid_exists", lambda pid: True)  # as a moment before
    asyncio.run(engine._end_processes())


def words(usual: dict[str, Any], **fields: Any) -> list[str]:
    return options.words(ModelSpec("m", "source", **fields), usual, KNOWN)[2:]


def test_the_gpus_defaults_are_told(on_gpu: None) -> None:
    assert words(SMALL) == ["--gpu-memory-utilization=0.89", "--max-num-seqs=128"]
    assert words({}) == []


@pytest.mark.parametrize("name", ["max_num_seqs", "max-num-seqs", "--max-num-seqs"])
def test_an_entry_comes_before_them(on_gpu: None, name: str) -> None:
    found = words(SMALL, engine_args={name: 7})
    assert found == ["--gpu-memory-utilization=0.89", "--max-num-seqs=7"]


def test_a_task_comes_before_them_too(on_gpu: None) -> None:
    assert words({"runner": "generate"}, task="embedding") == ["--runner=pooling"]


def test_an_engine_has_the_defaults_of_its_gpu(
    on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = (Card(), Card(memory_total=12_288), Card(memory_total=None))
    install(monkeypatch, FakeDriver(*cards))
    spec = ModelSpec("m", "source")
    assert VllmEngine(spec, gpu="0")._usual_options() == engine_args(24_576)
    assert VllmEngine(spec, gpu="1")._usual_options() == SMALL
    assert VllmEngine(spec, gpu="0,1")._usual_options() == SMALL
    assert VllmEngine(spec, gpu=None)._usual_options() == {}
    assert VllmEngine(spec, gpu="2")._usual_options() == {}  # the host's memory is the GPU's, too
    assert VllmEngine(spec, gpu="5")._usual_options() == {}


def test_without_a_gpu_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "on_cpu", lambda: True)
    install(monkeypatch, FakeDriver(Card()))
    assert VllmEngine(ModelSpec("m", "source"), gpu="0")._usual_options() == {}


def test_the_engine_counts_gpus_as_the_driver_does(on_gpu: None) -> None:
    args = argparse.Namespace(enforce_eager=False)
    assert VllmEngine(ModelSpec("m", "source"), gpu="1")._environment(args) == {
        "CUDA_VISIBLE_DEVICES": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    assert VllmEngine(ModelSpec("m", "source"))._environment(args) == {}


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
@pytest.mark.filterwarnings("default")
def test_every_profiles_arguments_are_ones_that_vllm_takes(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own parser, and its own check of the whole configuration."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    for name, task in (("tiny-chat-a", "chat"), ("tiny-embed", "embedding")):
        spec = ModelSpec(name, str(tiny_models[name]), task=task)
        for profile in PROFILES:
            usual = engine_args(profile.memory)
            args = AsyncEngineArgs.from_cli_args(options.parsed(spec, usual))
            config = args.create_engine_config(UsageContext.LLM_CLASS)
            told = {
                "gpu-memory-utilization": config.cache_config.gpu_memory_utilization,
                "max-num-seqs": config.scheduler_config.max_num_seqs,
            }
            assert told | usual == told, profile.name
