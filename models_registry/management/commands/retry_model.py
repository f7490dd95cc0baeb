"""`retry_model NAME`: forget why a model did not load or fit, and what it settled on; try it anew."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.errors import NotFound
from models_registry import services


class Command(BaseCommand):
    help = "Have workers try again to load a model, also where it was found not to fit."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            model = services.retry_model(name=options["name"])
        except NotFound as error:
            raise CommandError(error.message) from error
        self.stdout.write(model.name)
