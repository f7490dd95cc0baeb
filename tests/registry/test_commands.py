"""`models` and `retry_model`: what operators see of a model's loads, and how they have it retried."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import pytest
from django.core.management import CommandError, call_command

from models_registry import services
from models_registry.models import Change, Measurement, Model, ModelLoad
from models_registry.services import register_model

pytestmark = pytest.mark.django_db


def run(*arguments: str) -> list[str]:
    out = io.StringIO()
    call_command(*arguments, stdout=out)
    return out.getvalue().splitlines()


def test_models_shows_how_each_did_on_each_kind_of_gpu() -> None:
    register_model(name="echo", source="none", engine="instant")
    model = register_model(name="qwen3-8b", source="Qwen/Qwen3-8B")
    services.note_load("qwen3-8b", Change.LOAD, worker="gpu0", gpu="H100", seconds=61.25)
    services.note_load("qwen3-8b", Change.WAKE, worker="gpu0", gpu="H100", seconds=2.5)
    services.note_speed("qwen3-8b", 12345.6, "H100")
    found = {"max-num-seqs": 128, "gpu-memory-utilization": 0.87}
    services.note_settled("qwen3-8b", "H100", settled=found, seen=model.updated_at)
    services.note_unfit("qwen3-8b", "4060", why="too large", seen=model.updated_at)
    services.note_failure("qwen3-8b", why="too large")
    Model.objects.update(load_failed_at=datetime(2026, 11, 22, 3, 4, tzinfo=UTC))
    assert run("models") == [
        "echo  (instant)",
        "qwen3-8b  (vllm)",
        "  not loaded at 2026-11-22 03:04: too large",
        "  4060: not measured",
        "    left out: too large",
        "  H100: 12,346 tokens/s, load 61.2 s, wake 2.5 s",
        "    for want of memory: max-num-seqs=128 gpu-memory-utilization=0.87",
    ]


def test_models_of_one_shows_its_last_loads_too() -> None:
    register_model(name="m", source="org/m")
    register_model(name="other", source="org/other")
    less = {"max-num-seqs": 128}
    for name, seconds, settled, error in [
        ("other", 1.0, {}, ""),
        ("m", 30.0, {}, "no room"),
        ("m", 61.25, less, ""),
    ]:
        services.note_load(
            name,
            Change.LOAD,
            worker="gpu0",
            gpu="",
            seconds=seconds,
            settled=settled,
            error=error,
        )
    ModelLoad.objects.update(at=datetime(2026, 11, 22, 3, 4, 5, tzinfo=UTC))
    assert run("models", "m") == [
        "m  (vllm)",
        "  no GPU: load 61.2 s",
        "2026-11-22 03:04:05  load       61.2 s  gpu0  with max-num-seqs=128",
        "2026-11-22 03:04:05  load       30.0 s  gpu0  failed: no room",
    ]


def test_retry_model_gives_it_another_chance() -> None:
    model = register_model(name="m", source="org/m")
    services.note_unfit("m", "4060", why="too large", seen=model.updated_at)
    assert run("retry_model", "m") == ["m"]
    assert Measurement.objects.get().unfit_why == ""


@pytest.mark.parametrize("command", ["models", "retry_model"])
def test_a_model_that_is_not_there_is_said_to_be_none(command: str) -> None:
    with pytest.raises(CommandError, match="There is no model 'gone'"):
        run(command, "gone")
