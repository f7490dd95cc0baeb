"""`invite --org SLUG --email E --role R`: mails an invitation, and prints its link."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.errors import ApiError
from accounts.models import Role
from accounts.queries import organization_named
from accounts.services import invitations


class Command(BaseCommand):
    help = "Invite a person to an organization; the link is mailed, and printed too."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--org", required=True, metavar="SLUG")
        parser.add_argument("--email", required=True)
        parser.add_argument("--role", default=Role.MEMBER, choices=Role.values)

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            _, secret = invitations.invite(
                actor=None,
                organization=organization_named(options["org"]),
                email=options["email"],
                role=options["role"],
            )
        except ApiError as error:
            raise CommandError(error.message) from error
        self.stdout.write(invitations.link(secret))
