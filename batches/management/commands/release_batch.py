"""`release_batch ID… [--approve]`: lets batches run that are held, or wait for approval."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.errors import ApiError
from batches.services import queue


class Command(BaseCommand):
    help = "Let held batches run again; with --approve those that wait for approval."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("batch", nargs="+")
        parser.add_argument("--approve", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        service = queue.approve if options["approve"] else queue.release
        try:
            done = service(actor=None, ids=options["batch"])
        except ApiError as error:
            raise CommandError(error.message) from error
        for each in done.changed:
            self.stdout.write(f"{each.batch} may run")
        if done.skipped:
            raise CommandError("\n".join(done.skipped))
