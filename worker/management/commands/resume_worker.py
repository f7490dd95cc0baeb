"""`resume_worker NAME`: lets a drained worker lease again."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.errors import ApiError
from worker import services


class Command(BaseCommand):
    help = "Let a worker that was drained lease again."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            row = services.resume(actor=None, name=options["name"])
        except ApiError as error:
            raise CommandError(error.message) from error
        self.stdout.write(f"{row.name} may lease")
