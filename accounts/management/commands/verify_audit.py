"""`verify_audit [--org SLUG] [--head HASH]`: whether the audit is as it was written.

Keep a chain's head somewhere else from time to time: only who has it can tell a cut-off end.
"""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.models import Organization
from accounts.services import audit


class Command(BaseCommand):
    help = "Walk the audit's chains; fails on the first event that is missing or was changed."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--org", metavar="SLUG", help="only this organization's chain")
        parser.add_argument(
            "--head", default="", metavar="HASH", help="fail unless a chain has this hash"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        ids = [_organization_id(options["org"])] if options["org"] else audit.chains()
        names = dict(Organization.objects.values_list("pk", "slug"))
        broken, has_head = 0, not options["head"]
        for id in ids:
            chain = audit.verify(id, sought=options["head"].strip().lower())
            self.stdout.write(f"{_name(id, names)}: {_verdict(chain)}")
            broken += chain.broken_at is not None
            has_head = has_head or chain.has_sought
        if broken:
            raise CommandError(f"{broken} of {len(ids)} chains: not as written.")
        if not has_head:
            raise CommandError("No chain has that head: events were cut off, or it is another's.")


def _organization_id(slug: str) -> str:
    organization = Organization.objects.filter(slug=slug).first()
    if organization is None:
        raise CommandError(f"There is no organization {slug!r}.")
    return organization.pk


def _name(id: str | None, names: dict[str, str]) -> str:
    return names.get(id, f"{id} (purged)") if id else "(platform)"


def _verdict(chain: audit.Chain) -> str:
    said = f"{chain.events:,} events, head {chain.head}"
    if chain.broken_at is None:
        return f"{said}, whole"
    return f"{said}, BROKEN at number {chain.broken_at}"
