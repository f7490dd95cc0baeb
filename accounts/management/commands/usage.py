"""`usage --org SLUG [--since DATE] [--csv]`: what an organization used, this month or since a day."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils import timezone

from accounts import exports, queries
from accounts.models import Organization
from accounts.queries import GROUPS, Used

HEADINGS = ["Model", "Requests", "Tokens in", "Cached", "Tokens out", "GPU hours", "Cost"]


class Command(BaseCommand):
    help = "What an organization used, by model; with --csv every record."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--org", required=True, metavar="SLUG")
        parser.add_argument("--since", metavar="DATE", help="first day (UTC); else this month")
        parser.add_argument("--csv", action="store_true", help="all records, for a spreadsheet")

    def handle(self, *args: Any, **options: Any) -> None:
        organization = Organization.objects.filter(slug=options["org"]).first()
        if organization is None:
            raise CommandError(f"There is no organization {options['org']!r}.")
        today = timezone.now().date()
        since = _day(options["since"]) if options["since"] else today.replace(day=1)
        if since > today:
            raise CommandError("--since is after today.")
        by = list(GROUPS) if options["csv"] else ["model"]
        rows = queries.usage(organization, since, today, by=by)
        if options["csv"]:
            for line in exports.usage_csv(rows, by):
                self.stdout.write(line, ending="")
            return
        self.stdout.write(f"{since} to {today}")
        for line in _aligned(list(rows)):
            self.stdout.write(line)


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise CommandError(f"--since takes a day as 2026-01-31, not {text!r}.") from error


def _aligned(rows: Sequence[Used]) -> list[str]:
    """The names to the left, the numbers to the right."""
    cells = [HEADINGS, *(_cells(row.model or "", row) for row in rows)]
    cells.append(_cells("All", queries.total(rows)))
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADINGS) - 1)]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(text.rjust(width) for text, width in zip(row[1:-1], widths[1:], strict=True)),
                row[-1],
            ]
        )
        for row in cells
    ]


def _cells(name: str, used: Used) -> list[str]:
    return [
        name,
        f"{used.requests:,}",
        f"{used.input_tokens:,}",
        f"{used.cached_tokens:,}",
        f"{used.output_tokens:,}",
        f"{used.gpu_hours:,.2f}",
        f"{used.cost:,.2f} {settings.CURRENCY.upper()}",
    ]
