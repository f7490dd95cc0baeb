"""`create_org NAME --owner EMAIL`: an organization, its default project and its owner."""

from __future__ import annotations

import sys
from typing import Any

from django.contrib.auth.password_validation import validate_password
from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.addresses import checked_email
from accounts.errors import ApiError
from accounts.services import organizations


class Command(BaseCommand):
    help = "Make an organization and its owner; prints the organization's slug."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name")
        parser.add_argument("--owner", required=True, metavar="EMAIL")
        parser.add_argument(
            "--password-stdin",
            action="store_true",
            help="read the owner's password from the first line of standard input",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        password = sys.stdin.readline().rstrip("\r\n") if options["password_stdin"] else None
        try:
            email = checked_email(options["owner"])
            if options["password_stdin"]:
                validate_password(password or "")
            organization, _ = organizations.create_organization(
                name=options["name"], owner_email=email, password=password
            )
        except ValidationError as error:
            raise CommandError(" ".join(error.messages)) from error
        except ApiError as error:
            raise CommandError(error.message) from error
        self.stdout.write(organization.slug)
