"""`suspend_org SLUG --reason TEXT`: stops an organization's keys and work."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.errors import ApiError
from accounts.queries import organization_named
from accounts.services import organizations


class Command(BaseCommand):
    help = "Suspend an organization: keys refused, work stopped, pages read-only."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("slug")
        parser.add_argument("--reason", required=True, help="its members read this")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            organizations.suspend_organization(
                actor=None,
                organization=organization_named(options["slug"]),
                why=options["reason"],
            )
        except ApiError as error:
            raise CommandError(error.message) from error
        self.stdout.write(f"{options['slug']} is suspended")
