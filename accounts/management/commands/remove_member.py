"""`remove_member --org SLUG --email E`: ends a membership, and the person's keys with it."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.errors import ApiError
from accounts.queries import member_named, organization_named
from accounts.services import members


class Command(BaseCommand):
    help = "Remove a person from an organization; their keys in it stop at once."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--org", required=True, metavar="SLUG")
        parser.add_argument("--email", required=True)

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            organization = organization_named(options["org"])
            membership = member_named(organization, options["email"])
            members.remove_member(actor=None, membership=membership)
        except ApiError as error:
            raise CommandError(error.message) from error
        self.stdout.write(f"{options['email']} is no longer in {organization.slug}")
