"""Writing the audit, and checking that nobody has rewritten it.

Called by every service that changes what an organization would ask about; who may read it, and
how it is shown, is the doors' business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from ipaddress import IPv6Address, ip_address
from typing import Any

import orjson
from django.db import connection, transaction
from django.db.models import Model
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.access import Caller
from accounts.models import AuditEvent, Organization, User
from accounts.models.audit import Via
from accounts.origin import current

MASK = "•••"
GENESIS = "0" * 64

HASHED = (
    "id",
    "organization_id",
    "number",
    "created_at",
    "action",
    "via",
    "actor_id",
    "actor_label",
    "credential",
    "address",
    "request_id",
    "target_kind",
    "target_id",
    "target_label",
    "changes",
    "previous_hash",
)
"""What an event's hash is made over. Named, so that a column added later breaks no old hash."""

_INT64 = 2**63


def record(
    action: str,
    *,
    actor: Caller | User | None,
    target: Model | None = None,
    organization: Organization | None = None,
    label: str = "",
    changes: Mapping[str, Any] | None = None,
) -> AuditEvent:
    """Append one event, in the transaction of the change it tells of.

    `actor` is None for the system itself. The organization is the caller's unless another is
    given; a user who acts without one (an operator) writes the platform's own chain. `changes`
    maps fields to [before, after]; mask secrets with `MASK`.

    The chain is locked until that transaction ends: call this last in it, or two services that
    each hold what the other waits for stand still until the database ends one of them.
    """
    if organization is None and isinstance(actor, Caller):
        organization = actor.organization
    origin = current.get()
    with transaction.atomic(), scopes_disabled():
        previous = _last_of_chain(organization)
        event = AuditEvent(
            organization=organization,
            number=previous.number + 1 if previous else 1,
            created_at=timezone.now(),
            action=action,
            address=_address(origin.address),
            request_id=_text(origin.request_id, 64),
            target_kind=target._meta.model_name or "" if target is not None else "",
            target_id=_text(str(target.pk), 200) if target is not None else "",
            target_label=_text(label or (str(target) if target is not None else ""), 320),
            changes=_plain(changes or {}),
            previous_hash=previous.hash if previous else GENESIS,
            **_who(actor),
        )
        event.hash = hash_of(event)
        event.save(force_insert=True)
    return event


def difference(row: Model, before: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The fields of `before` that are another now, as `changes` has them."""
    now = {name: getattr(row, name) for name in before}
    return {
        name: [_plain(value), _plain(now[name])]
        for name, value in before.items()
        if value != now[name]
    }


def snapshot(row: Model, fields: Iterable[str]) -> dict[str, Any]:
    """These fields as they are, for `difference` to compare with later."""
    return {name: getattr(row, name) for name in fields}


def as_said(event: AuditEvent) -> dict[str, Any]:
    """All that the event says, as the hash takes it: plain JSON, the moment in UTC."""
    return {name: _plain(getattr(event, name)) for name in HASHED} | {
        "address": _address(event.address)
    }


def hash_of(event: AuditEvent) -> str:
    """SHA-256 over all that this event says, the previous event's hash among it, as sorted JSON."""
    return hashlib.sha256(orjson.dumps(as_said(event), option=orjson.OPT_SORT_KEYS)).hexdigest()


@dataclass(frozen=True)
class Chain:
    """What a walk along one chain found.

    `head` is the newest event's hash; `broken_at` the number of the first event that is missing
    or is not what was written; `has_sought` whether the hash that was looked for is in the chain.
    """

    organization_id: str | None
    events: int
    head: str
    broken_at: int | None
    has_sought: bool


def verify(organization_id: str | None, *, sought: str = "") -> Chain:
    """Walk one chain (None: the platform's own) from its beginning, a few rows at a time.

    A chain cannot say that its end was cut off: look for a hash that was kept elsewhere.
    """
    events, head, broken_at, has_sought = 0, GENESIS, None, False
    with scopes_disabled():
        chain = AuditEvent.objects.filter(organization=organization_id).order_by("number")
        for event in chain.iterator(chunk_size=500):
            events += 1
            follows = event.number == events and event.previous_hash == head
            if broken_at is None and not (follows and event.hash == hash_of(event)):
                broken_at = events
            head = event.hash
            has_sought = has_sought or head == sought
    return Chain(organization_id, events, head, broken_at, has_sought)


def chains() -> list[str | None]:
    """Every chain there is or should be: the platform's, each organization's, purged ones' too."""
    with scopes_disabled():
        written = AuditEvent.objects.order_by().values_list("organization_id", flat=True)
        known = set(written.distinct()) | set(Organization.objects.values_list("pk", flat=True))
    return [None, *sorted(id for id in known if id is not None)]


def _plain(value: Any) -> Any:
    """The value as JSON has it after a trip through the database, which changes it no more.

    PostgreSQL gives numbers back by value (1e16 as an integer, -0.0 as 0), so what is not a small
    integer is kept as text; it takes neither NUL nor half of a surrogate pair.
    """
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if -_INT64 <= value < _INT64 else str(value)
    if isinstance(value, Mapping):
        return {_text(str(_plain(key))): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(each) for each in value), key=str)
    if isinstance(value, datetime) and value.tzinfo is not None:
        value = value.astimezone(UTC)
    return value.isoformat() if hasattr(value, "isoformat") else _text(str(value))


def _text(value: str, limit: int | None = None) -> str:
    """What PostgreSQL can keep of it, at most `limit` characters."""
    return value.replace("\0", "\ufffd").encode(errors="replace").decode()[:limit]


def _address(value: str | None) -> str | None:
    """The IP address in its one form; None for what is none, which a proxy's header may hold."""
    try:
        parsed = ip_address((value or "").partition("%")[0])
    except ValueError:
        return None
    mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
    return str(mapped or parsed)


def _last_of_chain(organization: Organization | None) -> AuditEvent | None:
    """The newest event, with the chain locked until the transaction ends."""
    with connection.cursor() as cursor:
        name = f"audit {organization.pk if organization else 'platform'}"
        cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [name])
    return AuditEvent.objects.filter(organization=organization).order_by("-number").first()


def _who(actor: Caller | User | None) -> dict[str, Any]:
    if actor is None:
        return {"via": Via.SYSTEM, "actor_label": "system"}
    if isinstance(actor, User):
        via = Via.OPERATOR if actor.is_staff else Via.SESSION
        return {"via": via, "actor": actor, "actor_label": _text(actor.email, 320)}
    key, user = actor.api_key, actor.user
    if actor.token_id:
        via, credential = Via.TOKEN, actor.token_id
    elif key is not None:
        via, credential = Via.API_KEY, key.pk
    else:
        via, credential = (Via.OPERATOR if actor.operator else Via.SESSION), ""
    label = user.email if user else (key.name if key else credential)
    return {
        "via": via,
        "actor": user,
        "actor_label": _text(label, 320),
        "credential": _text(credential, 64),
    }
