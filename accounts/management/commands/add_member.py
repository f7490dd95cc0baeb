"""`add_member --org SLUG --email E --role R`: lets a person in, who is made if not yet known."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.errors import ApiError
from accounts.models import Role
from accounts.queries import organization_named
from accounts.services import members


class Command(BaseCommand):
    help = "Add a person to an organization; one who is not known is made, without a password."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--org", required=True, metavar="SLUG")
        parser.add_argument("--email", required=True)
        parser.add_argument("--role", default=Role.MEMBER, choices=Role.values)

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            organization = organization_named(options["org"])
            membership = members.enrol(
                organization=organization, email=options["email"], role=options["role"]
            )
        except ApiError as error:
            raise CommandError(error.message) from error
        self.stdout.write(f"{membership.user.email} is {membership.role} of {organization.slug}")
