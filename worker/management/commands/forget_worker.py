"""`forget_worker NAME`: deletes the row of a worker that will not come back."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.errors import ApiError
from worker import services


class Command(BaseCommand):
    help = "Forget a worker whose host is gone for good; refused while it is alive."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            services.forget(actor=None, name=options["name"])
        except ApiError as error:
            raise CommandError(error.message) from error
        self.stdout.write(f"{options['name']} is forgotten")
