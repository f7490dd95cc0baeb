"""`create_api_key --org SLUG --name N`: prints the key, and nothing else, on stdout."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db.models import Q
from django.utils import timezone
from django_scopes import scope

from accounts.errors import ApiError
from accounts.models import Membership, Organization, Project, Role, User
from accounts.services import keys


class Command(BaseCommand):
    help = (
        "Make an API key; it is shown this once. It is the oldest owner's, unless said otherwise."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--org", required=True, metavar="SLUG")
        parser.add_argument("--name", required=True)
        parser.add_argument("--scope", action="append", default=[], dest="scopes")
        parser.add_argument(
            "--project", metavar="NAME_OR_ID", help="(default: the oldest that is not archived)"
        )
        parser.add_argument("--expires-days", type=int, metavar="N")
        parser.add_argument(
            "--allow-ip", action="append", default=[], dest="allowed_ips", metavar="NETWORK"
        )
        whose = parser.add_mutually_exclusive_group()
        whose.add_argument("--owner", metavar="EMAIL", help="the key is this member's")
        whose.add_argument(
            "--service", action="store_true", help="the key is the project's, not a person's"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        organization = Organization.objects.filter(slug=options["org"], deleted_at=None).first()
        if organization is None:
            raise CommandError(f"There is no organization {options['org']!r}.")
        days = options["expires_days"]
        if days is not None and not 0 < days <= 36_500:
            raise CommandError("--expires-days must be 1 to 36500.")
        try:
            _, text = keys.create_api_key(
                project=_project(organization, options["project"]),
                name=options["name"],
                created_by=None if options["service"] else _person(organization, options["owner"]),
                scopes=options["scopes"],
                allowed_ips=options["allowed_ips"],
                expires_at=timezone.now() + timedelta(days=days) if days else None,
            )
        except ApiError as error:
            raise CommandError(error.message) from error
        self.stdout.write(text)


def _project(organization: Organization, named: str | None) -> Project:
    with scope(organization=organization):
        active = Project.objects.select_related("organization").filter(archived_at=None)
        if named is not None:
            active = active.filter(Q(pk=named) | Q(name=named))
        found = active.order_by("pk").first()
    if found is None:
        raise CommandError(f"There is no project {named!r}.")
    return found


def _person(organization: Organization, email: str | None) -> User:
    """The member of this address, else the oldest owner; one who can sign in."""
    with scope(organization=organization):
        members = Membership.objects.select_related("user").filter(user__is_active=True)
        named = Q(role=Role.OWNER) if email is None else Q(user__email__iexact=email)
        found = members.filter(named).order_by("id").first()
    if found is None:
        missing = "owner who can sign in" if email is None else f"member {email!r}"
        raise CommandError(
            f"{organization.slug} has no {missing}: use --service, or --owner EMAIL."
        )
    return found.user
