"""The main menu: every page that is worth a link, and who sees the link."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from django.urls import reverse

from accounts.access import Caller

OPERATORS = "operator"
"""Instead of a permission: shown to platform operators."""
EVERYBODY = ""
"""Instead of a permission: shown to every member."""
KEYS: Mapping[str, str] = {"home": "h", "batch_list": "b", "file_list": "f", "models": "m"}


@dataclass(frozen=True)
class Link:
    label: str
    icon: str
    url_name: str
    permission: str

    @property
    def key(self) -> str:
        """Pressed after `g` it goes there; '' for most."""
        return KEYS.get(self.url_name, "")

    @cached_property
    def path(self) -> str:
        return reverse(self.url_name)


SECTIONS: Sequence[tuple[str, Sequence[Link]]] = (
    (
        "",
        (
            Link("Home", "home", "home", "batches.read"),
            Link("Batches", "stack-2", "batch_list", "batches.read"),
            Link("Files", "file-text", "file_list", "files.read"),
            Link("Models", "robot", "models", "models.read"),
        ),
    ),
    (
        "Organization",
        (
            Link("Settings", "settings", "organization_settings", EVERYBODY),
            Link("Members", "users", "organization_members", "members.read"),
            Link("Projects", "folders", "organization_projects", "projects.read"),
            Link("API keys", "key", "api_keys", "keys.read"),
            Link("Trusted issuers", "certificate", "trusted_issuers", "keys.read"),
            Link("Result handlers", "plug", "result_handlers", "webhooks.read"),
            Link("Webhooks", "webhook", "webhooks", "webhooks.read"),
            Link("Usage", "chart-bar", "usage", "usage.read"),
            Link("Limits", "gauge", "limits", "quotas.read"),
            Link("Audit", "history", "audit", "audit.read"),
            Link("Data retention", "recycle", "retention", "organization"),
            Link("Single sign-on", "login", "organization_sso", "organization"),
            Link("Roles", "shield-check", "organization_roles", EVERYBODY),
        ),
    ),
    (
        "Platform",
        (
            Link("Queue", "arrows-sort", "operator_queue", OPERATORS),
            Link("Workers", "cpu", "operator_workers", OPERATORS),
            Link("Organizations", "building-community", "operator_organizations", OPERATORS),
            Link("People", "users", "operator_people", OPERATORS),
            Link("Usage", "chart-bar", "operator_usage", OPERATORS),
            Link("Email domains", "world", "operator_domains", OPERATORS),
            Link("Leaked keys", "key", "leaked_keys", OPERATORS),
            Link("Dead letters", "mail-x", "operator_webhooks", OPERATORS),
            Link("Audit", "history", "operator_audit", OPERATORS),
            Link("System", "server", "operator_system", OPERATORS),
        ),
    ),
)


def place_of(path: str) -> str:
    """The link, by its `url_name`, that leads to this page or to the nearest one above it; or ''."""
    above = _names_by_path()
    while path not in above and "/" in path:
        path = path.rpartition("/")[0]
    return above.get(path, "")


@cache
def _names_by_path() -> Mapping[str, str]:
    return {link.path: link.url_name for _, links in SECTIONS for link in links}


def sections_for(caller: Caller | None, *, is_staff: bool) -> list[tuple[str, list[Link]]]:
    """The menu without the links, and the sections, that this person has no use for."""

    def shown(link: Link) -> bool:
        if link.permission == OPERATORS:
            return is_staff
        return caller is not None and (link.permission == EVERYBODY or caller.may(link.permission))

    found = [(title, [link for link in links if shown(link)]) for title, links in SECTIONS]
    return [(title, links) for title, links in found if links]
