"""`register_model NAME --source …`: makes a registry entry, or changes the one of that name."""

from __future__ import annotations

import os
from decimal import Decimal, InvalidOperation
from typing import Any

import orjson
from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.errors import ApiError
from accounts.models import Organization
from models_registry import fit, queries, services
from models_registry.models import EngineKind, Model, Task


class Command(BaseCommand):
    help = "Register a model under the name that requests will carry."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name")
        parser.add_argument("--source", required=True, help="a folder, a Hugging Face name, none")
        parser.add_argument("--revision", default="")
        parser.add_argument("--task", choices=Task.values, default=Task.CHAT)
        parser.add_argument("--engine", choices=EngineKind.values, default=EngineKind.VLLM)
        parser.add_argument("--base-url", default="", help="of the openai engine")
        secret = parser.add_mutually_exclusive_group()
        secret.add_argument(
            "--secret-env", metavar="NAME", help="variable with the bearer token; else as it was"
        )
        secret.add_argument("--no-secret", action="store_true")
        engine_args = parser.add_mutually_exclusive_group()
        engine_args.add_argument(
            "--engine-arg",
            action="append",
            metavar="KEY=VALUE",
            dest="engine_args",
            help="these and no others; else as they were",
        )
        engine_args.add_argument("--no-engine-args", action="store_true")
        for kind in ("input", "cached", "output"):
            parser.add_argument(
                f"--{kind}-price", metavar="MONEY", help="for a million tokens; else as it was"
            )
        whose = parser.add_mutually_exclusive_group()
        whose.add_argument(
            "--org",
            action="append",
            metavar="SLUG",
            dest="slugs",
            help="offer it to these and no others; else as it was",
        )
        whose.add_argument("--everybody", action="store_true", help="offer it to everybody")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            model = services.register_model(
                name=options["name"],
                source=options["source"],
                revision=options["revision"],
                task=options["task"],
                engine=options["engine"],
                base_url=options["base_url"],
                secret="" if options["no_secret"] else _secret(options["secret_env"]),
                engine_args={} if options["no_engine_args"] else _pairs(options["engine_args"]),
                organizations=[] if options["everybody"] else _organizations(options["slugs"]),
                input_price=_price(options["input_price"]),
                cached_price=_price(options["cached_price"]),
                output_price=_price(options["output_price"]),
            )
        except ApiError as error:
            raise CommandError(error.message) from error
        self.stdout.write(model.name)
        for words in _warnings(model):
            self.stderr.write(self.style.WARNING(f"warning: {model.name} {words}"))


def _warnings(model: Model) -> list[str]:
    """What the model's folder lets expect on the GPUs that there are; nothing without both."""
    if model.engine != EngineKind.VLLM:
        return []
    try:
        shape = fit.read(
            fit.folder_of(model.source, model.revision), generates=model.task == Task.CHAT
        )
    except fit.Unknown:
        return []
    found = [fit.estimate(shape, gpu, model.engine_args) for gpu in queries.gpus()]
    return [f"{each.words} (an estimate)" for each in found if not each.fits]


def _pairs(texts: list[str] | None) -> dict[str, Any] | None:
    return None if texts is None else dict(_pair(text) for text in texts)


def _pair(text: str) -> tuple[str, Any]:
    """`key=value`, the value read as JSON where it is JSON and as text otherwise."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise CommandError(f"--engine-arg takes key=value, not {text!r}")
    try:
        return key, orjson.loads(value)
    except orjson.JSONDecodeError:
        return key, value


def _price(text: str | None) -> Decimal | None:
    try:
        return None if text is None else Decimal(text)
    except InvalidOperation as error:
        raise CommandError(f"A price is a number, not {text!r}.") from error


def _secret(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise CommandError(f"The environment has no variable {variable}.")
    return os.environ[variable]


def _organizations(slugs: list[str] | None) -> list[Organization] | None:
    return None if slugs is None else [_organization(slug) for slug in slugs]


def _organization(slug: str) -> Organization:
    organization = Organization.objects.filter(slug=slug).first()
    if organization is None:
        raise CommandError(f"There is no organization {slug!r}.")
    return organization
