"""`set_limits --org SLUG …`: what an organization, a person in it or a key may use."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django_scopes import scopes_disabled

from accounts import limits
from accounts.errors import ApiError
from accounts.limits import LIMITS, Amount
from accounts.models import ApiKey, Membership, Organization, User
from accounts.services.limits import set_limits


def option(field: str) -> str:
    """The option that sets this limit."""
    return "--budget" if field == "budget_per_month" else f"--{field.replace('_', '-')}"


class Command(BaseCommand):
    help = "Set limits, and print those that hold now; the word none clears one."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--org", required=True, metavar="SLUG")
        whose = parser.add_mutually_exclusive_group()
        whose.add_argument("--user", metavar="EMAIL", help="of this member, not of everybody")
        whose.add_argument("--key", metavar="ID", help="of this API key, by its id or its prefix")
        for field, limit in LIMITS.items():
            metavar = "AMOUNT" if limit.unit == "money" else "N"
            parser.add_argument(option(field), dest=field, metavar=metavar, help=limit.label)

    def handle(self, *args: Any, **options: Any) -> None:
        organization = Organization.objects.filter(slug=options["org"]).first()
        if organization is None:
            raise CommandError(f"There is no organization {options['org']!r}.")
        user = _member(organization, options["user"]) if options["user"] else None
        key = _key(organization, options["key"]) if options["key"] else None
        given = {field: options[field] for field in LIMITS if options[field] is not None}
        fields = {field: _amount(field, text) for field, text in given.items()}
        try:
            quota = set_limits(
                actor=None, organization=organization, user=user, api_key=key, **fields
            )
        except ApiError as error:
            raise CommandError(error.message) from error
        for field, limit in LIMITS.items():
            self.stdout.write(f"{limit.label}: {limit.said(limits.in_effect(quota, field))}")


def _member(organization: Organization, email: str) -> User:
    with scopes_disabled():
        mine = Membership.objects.select_related("user").filter(organization=organization)
        found = mine.filter(user__email__iexact=email).first()
    if found is None:
        raise CommandError(f"{organization.slug} has no member {email!r}.")
    return found.user


def _key(organization: Organization, id: str) -> ApiKey:
    with scopes_disabled():
        mine = ApiKey.objects.filter(organization=organization)
        found = mine.filter(pk=id).first() or mine.filter(prefix=id).first()
    if found is None:
        raise CommandError(f"{organization.slug} has no API key {id!r}.")
    return found


def _amount(field: str, text: str) -> Amount | None:
    if text.lower() == "none":
        return None
    try:
        return Decimal(text) if LIMITS[field].unit == "money" else int(text)
    except (InvalidOperation, ValueError):
        raise CommandError(f"{option(field)} needs a number or none, not {text!r}.") from None
