"""`fit NAME_OR_FOLDER`: on which GPUs a model would run, by an estimate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from models_registry import fit, queries
from models_registry.fit import GIB, MIB, Fit
from models_registry.models import EngineKind, Model, Task
from models_registry.profiles import PROFILES, GpuProfile, profiles_named

HEADINGS = ("GPU", "MEMORY", "WEIGHTS", "KV TOKENS", "LONGEST", "VERDICT")


class Command(BaseCommand):
    help = "Estimate on which GPUs a model would run, from its folder; nothing is downloaded."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("model", help="a registered name, a folder, or a Hugging Face name")
        parser.add_argument("--gpu", metavar="KIND", help="only these, as 3060 or a100 80")
        parser.add_argument("--task", choices=Task.values, help="of what is not registered")

    def handle(self, *args: Any, **options: Any) -> None:
        model = _model(options["model"], options["task"])
        if model.engine != EngineKind.VLLM:
            raise CommandError(f"{model.name} does not run on vLLM here.")
        try:
            folder = fit.folder_of(model.source, model.revision)
            shape = fit.read(folder, generates=model.task == Task.CHAT)
        except fit.Unknown as error:
            raise CommandError(str(error)) from error
        fits = [fit.estimate(shape, gpu, model.engine_args) for gpu in _gpus(options["gpu"])]
        rows = [HEADINGS, *(_columns(each) for each in fits)]
        widths = [max(len(row[at]) for row in rows) for at in range(len(HEADINGS))]
        for row in rows:
            self.stdout.write(_line(row, widths))


def _model(name: str, task: str | None) -> Model:
    """The entry of that name; else one as it would be for this folder."""
    registered = None if Path(name).is_dir() else Model.objects.filter(name=name).first()
    return registered or Model(name=name, source=name, task=task or Task.CHAT)


def _gpus(kind: str | None) -> list[GpuProfile]:
    """Those of that kind; without one all that are known, and first those that workers have."""
    here = queries.gpus()
    if kind is None:
        return list(dict.fromkeys([*here, *PROFILES]))
    known = [gpu for gpu in here if kind.lower() in gpu.name.lower()] or profiles_named(kind)
    if not known:
        names = ", ".join(profile.name for profile in PROFILES)
        raise CommandError(f"There is no GPU profile {kind!r}: {names}.")
    return known


def _columns(found: Fit) -> tuple[str, ...]:
    return (
        found.profile.name,
        f"{found.profile.memory * MIB / GIB:.1f} GB",
        f"{found.weights / GIB:.1f} GB",
        f"{found.tokens:,}",
        f"{found.longest:,}",
        found.words,
    )


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
