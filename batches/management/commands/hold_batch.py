"""`hold_batch ID… [--note TEXT]`: lets nothing more of these batches run until they are released."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.errors import ApiError
from batches.services import queue


class Command(BaseCommand):
    help = "Hold batches: nothing more of them runs until release_batch. Deadlines run on."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("batch", nargs="+")
        parser.add_argument("--note", default="", help="the organization reads it")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            done = queue.hold(actor=None, ids=options["batch"], note=options["note"])
        except ApiError as error:
            raise CommandError(error.message) from error
        for each in done.changed:
            self.stdout.write(f"{each.batch} is held")
        if done.skipped:
            raise CommandError("\n".join(done.skipped))
