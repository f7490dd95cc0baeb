"""`register_model NAME --source …`: makes a registry entry, or changes the one of that name."""

from __future__ import annotations

import os
from typing import Any

import orjson
from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.errors import ApiError
from accounts.models import Organization
from models_registry import services
from models_registry.models import EngineKind, Task


class Command(BaseCommand):
    help = "Register a model under the name that requests will carry."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name")
        parser.add_argument("--source", required=True, help="a folder, a Hugging Face name, none")
        parser.add_argument("--revision", default="")
        parser.add_argument("--task", choices=Task.values, default=Task.CHAT)
        parser.add_argument("--engine", choices=EngineKind.values, default=EngineKind.VLLM)
        parser.add_argument("--base-url", default="", help="of the openai engine")
        parser.add_argument(
            "--secret-env", default="", metavar="NAME", help="variable with the bearer token"
        )
        parser.add_argument(
            "--engine-arg", action="append", default=[], metavar="KEY=VALUE", dest="engine_args"
        )
        parser.add_argument("--org", action="append", default=[], metavar="SLUG", dest="slugs")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            model = services.register_model(
                name=options["name"],
                source=options["source"],
                revision=options["revision"],
                task=options["task"],
                engine=options["engine"],
                base_url=options["base_url"],
                secret=_secret(options["secret_env"]),
                engine_args=dict(_pair(text) for text in options["engine_args"]),
                organizations=[_organization(slug) for slug in options["slugs"]],
            )
        except ApiError as error:
            raise CommandError(error.message) from error
        self.stdout.write(model.name)


def _pair(text: str) -> tuple[str, Any]:
    """`key=value`, the value read as JSON where it is JSON and as text otherwise."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise CommandError(f"--engine-arg takes key=value, not {text!r}")
    try:
        return key, orjson.loads(value)
    except orjson.JSONDecodeError:
        return key, value


def _secret(variable: str) -> str:
    if variable and not os.environ.get(variable):
        raise CommandError(f"The environment has no variable {variable}.")
    return os.environ[variable] if variable else ""


def _organization(slug: str) -> Organization:
    organization = Organization.objects.filter(slug=slug).first()
    if organization is None:
        raise CommandError(f"There is no organization {slug!r}.")
    return organization
