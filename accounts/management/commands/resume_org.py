"""`resume_org SLUG`: ends an organization's suspension."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.errors import ApiError
from accounts.queries import organization_named
from accounts.services import organizations


class Command(BaseCommand):
    help = "Let a suspended organization work again."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("slug")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            organization = organization_named(options["slug"])
            organizations.resume_organization(actor=None, organization=organization)
        except ApiError as error:
            raise CommandError(error.message) from error
        self.stdout.write(f"{options['slug']} works again")
