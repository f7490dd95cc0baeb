"""`models [NAME]`: the models and how they did on each kind of GPU; of one also its last loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from models_registry.models import Measurement, Model, ModelLoad

LOADS_SHOWN = 30


class Command(BaseCommand):
    help = "List the models, and how each did on each kind of GPU; of one also its last loads."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", nargs="?")

    def handle(self, *args: Any, **options: Any) -> None:
        models = Model.objects.order_by("name").prefetch_related("measurements")
        if options["name"]:
            models = models.filter(name=options["name"])
            if not models:
                raise CommandError(f"There is no model {options['name']!r}.")
        for model in models:
            self.stdout.write("\n".join(_about(model)))
        if options["name"]:
            self.stdout.write("\n".join(_loads(models[0])))


def _about(model: Model) -> Iterator[str]:
    yield f"{model.name}  ({model.engine})"
    if model.load_error:
        yield f"  not loaded at {model.load_failed_at:%Y-%m-%d %H:%M}: {model.load_error}"
    for each in sorted(model.measurements.all(), key=lambda each: each.gpu):
        yield f"  {each.gpu or 'no GPU'}: {', '.join(_figures(each)) or 'not measured'}"
        if each.settled:
            yield f"    for want of memory: {_options(each.settled)}"
        if each.unfit_why:
            yield f"    left out: {each.unfit_why}"


def _figures(each: Measurement) -> Iterator[str]:
    if each.tokens_per_second:
        yield f"{each.tokens_per_second:,.0f} tokens/s"
    if each.load_seconds is not None:
        yield f"load {each.load_seconds:.1f} s"
    if each.wake_seconds is not None:
        yield f"wake {each.wake_seconds:.1f} s"


def _loads(model: Model) -> Iterator[str]:
    for each in model.loads.order_by("-at", "-pk")[:LOADS_SHOWN]:
        yield _load(each)


def _load(each: ModelLoad) -> str:
    what = f"{each.at:%Y-%m-%d %H:%M:%S}  {each.change:6}  {each.seconds:7.1f} s  {each.worker}"
    options = f"  with {_options(each.settled)}" if each.settled else ""
    return f"{what}{options}" + (f"  failed: {each.error}" if each.error else "")


def _options(settled: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in settled.items())
