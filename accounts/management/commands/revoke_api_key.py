"""`revoke_api_key ID_OR_PREFIX`: ends a key, and every token that was made of it, at once."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.queries import key_named
from accounts.services import keys


class Command(BaseCommand):
    help = "Revoke an API key; prints its id."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("key", metavar="ID_OR_PREFIX", help="key_…, or the part after sk-vbp-")

    def handle(self, *args: Any, **options: Any) -> None:
        key = key_named(options["key"])
        if key is None:
            raise CommandError("There is no such key.")
        self.stdout.write(keys.revoke_api_key(actor=None, key=key).pk)
