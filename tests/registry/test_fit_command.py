"""`fit` and what `register_model` says of GPUs: folders, entries, and the GPUs that workers have."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from models_registry import queries
from models_registry.models import Model
from models_registry.profiles import PROFILES
from models_registry.services import register_model
from tests.registry.test_fit import LLAMA_8B, QWEN3_06B
from worker.models import Worker

pytestmark = pytest.mark.django_db


def folder(path: Path, config: dict[str, Any], gib: float) -> Path:
    """A model's folder of so many GiB, the weights of which are a hole in a file."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    count = int(gib * 2**30) // 2
    header = {"a": {"dtype": "BF16", "shape": [count], "data_offsets": [0, 2 * count]}}
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    return path


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return folder(tmp_path / "llama", LLAMA_8B, 14.96)


def worker(name: str, kind: str, memory: int | None) -> None:
    now = timezone.now()
    rows = Worker.objects.create(name=name, host="h", pid=1, started_at=now, heartbeat_at=now)
    Worker.objects.filter(pk=rows.pk).update(gpu_kind=kind, memory_total=memory)


def run(command: str, *arguments: str) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    call_command(command, *arguments, stdout=out, stderr=err, no_color=True)
    return out.getvalue(), err.getvalue()


def table(*arguments: str) -> list[list[str]]:
    """The command's rows, without the headings."""
    out, _ = run("fit", *arguments)
    headings, *rows = [re.split(" {2,}", line) for line in out.splitlines()]
    assert headings == ["GPU", "MEMORY", "WEIGHTS", "KV TOKENS", "LONGEST", "VERDICT"]
    return rows


def test_a_folder_is_held_against_every_profile(llama: Path) -> None:
    rows = table(str(llama))
    assert [row[0] for row in rows] == [profile.name for profile in PROFILES]
    verdicts = {row[0]: row[-1] for row in rows}
    assert verdicts["RTX 3060 12 GB"] == ("does not fit: needs 19 GB, RTX 3060 12 GB has 12 GB")
    assert verdicts["RTX 4090"].startswith("fits RTX 4090 with max_model_len ")
    assert verdicts["A100 80 GB"] == "fits"


def test_one_kind_can_be_asked_for(llama: Path) -> None:
    assert [row[0] for row in table(str(llama), "--gpu", "a100")] == [
        "A100 40 GB",
        "A100 80 GB",
    ]


def test_the_gpus_that_workers_have_come_first(llama: Path) -> None:
    worker("a", "NVIDIA L4", 23_034)
    worker("b", "NVIDIA L4", 23_034)
    worker("c", "NVIDIA RTX A6000", 49_140)
    worker("d", "2 x NVIDIA RTX A6000", 98_280)
    worker("none", "", None)
    worker("mute", "NVIDIA GB10", None)
    assert [gpu.name for gpu in queries.gpus()] == [
        "NVIDIA RTX A6000 (48 GB)",
        "L4",
    ]
    names = [row[0] for row in table(str(llama))]
    assert names[:2] == ["NVIDIA RTX A6000 (48 GB)", "L4"]
    assert len(names) == len(PROFILES) + 1
    assert [row[0] for row in table(str(llama), "--gpu", "A6000")] == ["NVIDIA RTX A6000 (48 GB)"]


def test_a_registered_model_is_known_by_its_name_with_its_arguments(llama: Path) -> None:
    register_model(name="llama", source=str(llama), engine_args={"max_model_len": 8192})
    rows = {row[0]: row[-1] for row in table("llama")}
    assert rows["RTX 4090"] == "fits"


def test_an_embedding_model_is_one(tmp_path: Path) -> None:
    made = str(folder(tmp_path / "m", QWEN3_06B, 1.1))
    chat, embeds = (table(made, "--gpu=3060", *more)[0] for more in ([], ["--task=embedding"]))
    assert int(embeds[3].replace(",", "")) > int(chat[3].replace(",", ""))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["acme/unknown"], "acme/unknown is not on this host"),
        (["remote"], "remote does not run on vLLM here."),
        (["{folder}", "--gpu=9999"], "There is no GPU profile '9999': RTX 3060 12 GB, "),
    ],
)
def test_what_cannot_be_told_is_said(llama: Path, arguments: list[str], words: str) -> None:
    register_model(name="remote", source="gpt", engine="openai", base_url="https://host/v1")
    with pytest.raises(CommandError) as error:
        run("fit", *[each.replace("{folder}", str(llama)) for each in arguments])
    assert str(error.value).startswith(words)


# --- register_model -------------------------------------------------------------------------


def test_registering_warns_of_gpus_that_are_too_small(llama: Path) -> None:
    worker("a", "NVIDIA GeForce RTX 3060", 12_288)
    worker("b", "NVIDIA A100-SXM4-80GB", 81_920)
    worker("c", "NVIDIA GeForce RTX 4090", 24_564)
    out, err = run("register_model", "llama", f"--source={llama}")
    assert out == "llama\n"
    first, second = err.splitlines()
    assert first == (
        "warning: llama does not fit: needs 19 GB, RTX 3060 12 GB has 12 GB (an estimate)"
    )
    assert re.fullmatch(
        r"warning: llama fits RTX 4090 with max_model_len up to [\d,]+ \(an estimate\)", second
    )


def test_arguments_that_make_it_fit_are_looked_at(llama: Path) -> None:
    worker("c", "NVIDIA GeForce RTX 4090", 24_564)
    fitting = "--engine-arg=max_model_len=8192"
    assert run("register_model", "llama", f"--source={llama}", fitting) == ("llama\n", "")


def test_without_gpus_or_without_the_folder_nothing_is_said(llama: Path) -> None:
    assert run("register_model", "llama", f"--source={llama}") == ("llama\n", "")
    worker("a", "NVIDIA GeForce RTX 3060", 12_288)
    assert run("register_model", "far", "--source=acme/far") == ("far\n", "")
    assert run("register_model", "echo", "--source=none", "--engine=instant") == ("echo\n", "")
    assert Model.objects.count() == 3
