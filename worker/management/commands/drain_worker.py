"""`drain_worker NAME [--exit] [--wait]`: lets a worker finish what it has and lease no more."""

from __future__ import annotations

import time
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.errors import ApiError
from worker import queries, services
from worker.models import Worker, WorkerState

LOOK_SECONDS = 0.5


class Command(BaseCommand):
    help = "Let a worker finish the chunks that it has and lease no more, until resume_worker."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name")
        parser.add_argument("--exit", action="store_true", help="its process ends once drained")
        parser.add_argument(
            "--wait", action="store_true", help="until it is drained (and has ended)"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            row = services.drain(
                actor=None, name=options["name"], exit_when_drained=options["exit"]
            )
        except ApiError as error:
            raise CommandError(error.message) from error
        if not options["wait"]:
            self.stdout.write(f"{row.name} is draining")
            return
        while not _is_done(row, to_end=options["exit"]):
            time.sleep(LOOK_SECONDS)
        self.stdout.write(f"{row.name} is drained{' and has ended' if options['exit'] else ''}")


def _is_done(before: Worker, *, to_end: bool) -> bool:
    """Whether it is drained, or with `to_end` its process has ended; CommandError if it cannot."""
    row = queries.workers().filter(pk=before.pk).first()
    if row is None:
        raise CommandError(f"{before.name} was forgotten meanwhile.")
    if row.state == WorkerState.STOPPED or row.life != before.life:
        return True
    if not row.draining:
        raise CommandError(f"{row.name} was resumed meanwhile.")
    if not row.is_alive:
        seconds = row.silent.total_seconds()
        raise CommandError(f"{row.name} has not been heard of for {seconds:.0f} seconds.")
    return row.state == WorkerState.DRAINED and not to_end
