"""What each role and each key scope may do: two tables, and nothing else decides it.

`X.read` is the reading half of `X`: who has `X` has both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from accounts.models import Role, Scope

PERMISSIONS: Mapping[str, str] = {
    "files.read": "See and download files",
    "files": "Upload and delete files",
    "batches.read": "See batches and their results",
    "batches": "Create and cancel batches",
    "models.read": "See which models are offered",
    "inference": "Call models directly",
    "labels.read": "See reviews and datasets",
    "labels": "Review and correct answers",
    "webhooks.read": "See webhooks, result handlers and how they went",
    "webhooks": "Change webhooks and result handlers, send and run again",
    "usage.read": "See what was used and what it cost",
    "keys.read": "See API keys (never their secrets)",
    "keys": "Make, rotate and revoke one's own API keys",
    "keys.all": "Revoke everybody's keys, make and rotate service keys, trust issuers",
    "members.read": "See who is in the organization",
    "members": "Invite, remove, and give roles below owner",
    "owners": "Make somebody an owner, or an owner something else",
    "projects.read": "See projects",
    "projects": "Create, rename and archive projects",
    "quotas.read": "See limits and how much of them is used",
    "quotas": "Set limits for people and keys",
    "audit.read": "Read the audit log",
    "organization": "Rename the organization, set up single sign-on",
    "organization.delete": "Delete the organization",
}

_READS = frozenset(name for name in PERMISSIONS if name.endswith(".read"))
_VIEWER = _READS - {"audit.read"}
_MEMBER = _VIEWER | {"files", "batches", "inference", "labels", "webhooks", "keys"}
_ADMIN = _MEMBER | _READS | {"keys.all", "members", "projects", "quotas", "organization"}

ROLES: Mapping[str, frozenset[str]] = {
    Role.OWNER: frozenset(PERMISSIONS),
    Role.ADMIN: _ADMIN,
    Role.MEMBER: _MEMBER,
    Role.REVIEWER: frozenset({"labels", "labels.read", "models.read"}),
    Role.VIEWER: _VIEWER,
}

_ADMIN_READS = frozenset(
    {"keys.read", "members.read", "projects.read", "quotas.read", "usage.read", "audit.read"}
)
SCOPES: Mapping[str, frozenset[str]] = {
    Scope.FILES: frozenset({"files", "files.read"}),
    Scope.FILES_READ: frozenset({"files.read"}),
    Scope.BATCHES: frozenset({"batches", "batches.read"}),
    Scope.BATCHES_READ: frozenset({"batches.read"}),
    Scope.MODELS_READ: frozenset({"models.read"}),
    Scope.INFERENCE: frozenset({"inference"}),
    Scope.LABELS: frozenset({"labels", "labels.read"}),
    Scope.LABELS_READ: frozenset({"labels.read"}),
    Scope.WEBHOOKS: frozenset({"webhooks", "webhooks.read"}),
    Scope.WEBHOOKS_READ: frozenset({"webhooks.read"}),
    Scope.USAGE_READ: frozenset({"usage.read"}),
    Scope.ADMIN_READ: _ADMIN_READS,
    Scope.ADMIN_WRITE: _ADMIN_READS
    | {"keys", "keys.all", "members", "projects", "quotas", "organization"},
    Scope.OPERATOR: frozenset(),
}
"""`operator` permits nothing inside an organization: it opens the platform's own operations."""

OPERATOR = _READS
"""What a platform operator may do in an organization they look at: read."""


def is_above(role: str, own: str) -> bool:
    """Whether `role` permits anything that `own` does not."""
    return not ROLES[role] <= ROLES[own]


def reading(permissions: frozenset[str]) -> frozenset[str]:
    """Of these permissions the ones that change nothing."""
    return permissions & _READS


def of_scopes(scopes: Iterable[str]) -> frozenset[str]:
    """All that these scopes permit together."""
    return frozenset().union(*(SCOPES.get(scope, frozenset()) for scope in scopes))


def scope_for(permission: str) -> str:
    """The narrowest scope that permits this; '' for what no key may do."""
    fitting = [scope for scope, permitted in SCOPES.items() if permission in permitted]
    return str(min(fitting, key=lambda scope: len(SCOPES[scope]), default=""))


def covers(scopes: Iterable[str], narrower: Iterable[str]) -> bool:
    """Whether `narrower` asks for nothing that `scopes` do not permit."""
    wide, asked = set(scopes), set(narrower)
    if not asked <= SCOPES.keys() or (Scope.OPERATOR in asked and Scope.OPERATOR not in wide):
        return False
    return of_scopes(asked) <= of_scopes(wide)
