"""`verify_email_domain DOMAIN --org SLUG`: say that a domain is the organization's, without DNS."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django_scopes import scopes_disabled

from accounts.errors import ApiError
from accounts.models import EmailDomain
from accounts.services import sso


class Command(BaseCommand):
    help = "Verify an email domain that an organization has claimed."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("domain")
        parser.add_argument("--org", required=True, metavar="SLUG")

    def handle(self, *args: Any, **options: Any) -> None:
        with scopes_disabled():
            rows = EmailDomain.objects.select_related("organization")
            domain = rows.filter(
                domain=options["domain"].lower(), organization__slug=options["org"]
            ).first()
        if domain is None:
            raise CommandError(f"{options['org']!r} does not claim {options['domain']!r}.")
        try:
            sso.vouch_for_domain(actor=None, domain=domain)
        except ApiError as error:
            raise CommandError(error.message) from error
