"""`rotate_signing_key [--now]`: the next key of access tokens; prints its id."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from accounts.services import tokens


class Command(BaseCommand):
    help = "Make a new key that signs access tokens; those that were signed before stay good."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--published-minutes",
            type=int,
            default=int(tokens.PUBLISHED_FOR.total_seconds() // 60),
            help="for so long the new key is published before it signs (default: %(default)s)",
        )
        parser.add_argument(
            "--now",
            action="store_true",
            help="after a leak: sign with it at once, and refuse all that was signed before",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        minutes = 0 if options["now"] else max(options["published_minutes"], 1)
        made = tokens.rotate_signing_key(published_for=timedelta(minutes=minutes))
        self.stdout.write(made.pk)
