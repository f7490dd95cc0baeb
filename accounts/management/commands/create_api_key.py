"""`create_api_key --org SLUG --name N`: prints the key, and nothing else, on stdout."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django_scopes import scope

from accounts import services
from accounts.errors import ApiError
from accounts.models import Membership, Organization, Project, Role


class Command(BaseCommand):
    help = "Make an API key; it is shown this once."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--org", required=True, metavar="SLUG")
        parser.add_argument("--name", required=True)
        parser.add_argument("--scope", action="append", default=[], dest="scopes")

    def handle(self, *args: Any, **options: Any) -> None:
        organization = Organization.objects.filter(slug=options["org"]).first()
        if organization is None:
            raise CommandError(f"There is no organization {options['org']!r}.")
        with scope(organization=organization):
            project = Project.objects.order_by("id")[0]
            owner = Membership.objects.filter(role=Role.OWNER).order_by("id").first()
        try:
            _, text = services.create_api_key(
                project=project,
                name=options["name"],
                created_by=owner.user if owner else None,
                scopes=options["scopes"],
            )
        except ApiError as error:
            raise CommandError(error.message) from error
        self.stdout.write(text)
