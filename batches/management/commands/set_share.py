"""`set_share --org SLUG …`: what an organization weighs in the queue, and how much runs at once."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.errors import ApiError
from accounts.queries import organization_named
from batches.services.shares import set_share


class Command(BaseCommand):
    help = "Set an organization's share of the GPUs, and print it."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--org", required=True, metavar="SLUG")
        parser.add_argument("--weight", type=float, metavar="W", help="against 1 of the others")
        parser.add_argument(
            "--chunks-at-once", metavar="N", help="how many may run at once; none: no limit"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        fields: dict[str, float | None] = {}
        if options["weight"] is not None:
            fields["weight"] = options["weight"]
        if options["chunks_at_once"] is not None:
            fields["chunks_at_once"] = _count(options["chunks_at_once"])
        try:
            organization = organization_named(options["org"])
            share = set_share(actor=None, organization=organization, **fields)
        except ApiError as error:
            raise CommandError(error.message) from error
        self.stdout.write(f"Weight: {share.weight:g}")
        self.stdout.write(f"Chunks at once: {share.chunks_at_once or 'no limit'}")


def _count(text: str) -> int | None:
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise CommandError(f"--chunks-at-once needs a number or none, not {text!r}.") from None
