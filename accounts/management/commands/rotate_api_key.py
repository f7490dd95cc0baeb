"""`rotate_api_key ID_OR_PREFIX`: prints the new key, and nothing else, on stdout."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.errors import ApiError
from accounts.queries import key_named
from accounts.services import keys


class Command(BaseCommand):
    help = "Make a new API key of the same settings; the old one goes on for a while."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("key", metavar="ID_OR_PREFIX", help="key_…, or the part after sk-vbp-")
        parser.add_argument(
            "--overlap-hours", type=int, default=24, help="0 to 720 (default: %(default)s)"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        key = key_named(options["key"])
        if key is None:
            raise CommandError("There is no such key.")
        hours = options["overlap_hours"]
        if not 0 <= hours <= 720:
            raise CommandError("--overlap-hours must be 0 to 720.")
        try:
            _, text = keys.rotate_api_key(actor=None, key=key, overlap=timedelta(hours=hours))
        except ApiError as error:
            raise CommandError(error.message) from error
        self.stdout.write(text)
