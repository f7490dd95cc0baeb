"""Writes of API keys: making, changing, rotating, revoking, and when one was last used."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

from django.db import transaction
from django.db.models import Q
from django.utils import timezone
from django_scopes import scope, scopes_disabled

from accounts import keys, names, roles, second_factor, secrets
from accounts.access import Caller
from accounts.errors import BadRequest, Forbidden
from accounts.models import ApiKey, Project, Quota, Scope, User
from accounts.services import audit

FULL_SCOPES = [Scope.FILES, Scope.BATCHES, Scope.MODELS_READ, Scope.INFERENCE]
LAST_USED_EVERY = timedelta(minutes=1)
MAX_NETWORKS = 50
OVERLAP = timedelta(hours=24)
MAX_OVERLAP = timedelta(days=30)
_CHANGEABLE = ("name", "allowed_ips", "expires_at")


@transaction.atomic
def create_api_key(
    *,
    project: Project,
    name: str,
    actor: Caller | None = None,
    created_by: User | None = None,
    scopes: Sequence[str] = (),
    allowed_ips: Sequence[str] = (),
    expires_at: datetime | None = None,
) -> tuple[ApiKey, str]:
    """Make a key; the text it returns is shown once and cannot be had again.

    Without `created_by` it is a service key. Without `scopes` it gets those of `FULL_SCOPES` that
    the actor may give. `actor` is None when the installation's own shell makes it. What a key
    makes works from no other networks than that key, and no longer.
    """
    if actor is not None:
        _require_may_make(actor, created_by)
    _require_known(scopes)
    scopes = list(dict.fromkeys(scopes)) or _usual_scopes(actor)
    _require_may_give(actor, scopes, created_by)
    if project.archived_at:
        raise BadRequest("This project is archived.", param="project_id", code="project_archived")
    networks, expires_at = checked_networks(allowed_ips), _checked_expiry(expires_at)
    if maker := actor.api_key if actor is not None else None:
        networks, expires_at = networks or maker.allowed_ips, expires_at or maker.expires_at
        _require_within(maker, networks, expires_at)
    key, text = _made(
        project=project,
        created_by=created_by,
        name=names.clean(name),
        scopes=scopes,
        allowed_ips=networks,
        expires_at=expires_at,
    )
    said = {"project": [None, project.pk], **audit_of(key)}
    audit.record(
        "api_key.created", actor=actor, target=key, organization=project.organization, changes=said
    )
    return key, text


@transaction.atomic
def update_api_key(
    *,
    actor: Caller,
    key: ApiKey,
    name: str,
    allowed_ips: Sequence[str],
    expires_at: datetime | None,
) -> ApiKey:
    """Change what a key is called, from where it works and how long; None: without end.

    Another person's key may be tightened, not loosened; and so may a key by itself.
    """
    require_may_change(actor, key)
    _require_no_token(actor)
    key = _locked(key)
    _require_active(key)
    networks = checked_networks(allowed_ips)
    if expires_at != key.expires_at:
        _checked_expiry(expires_at)
    if not _is_within(key, networks, expires_at):
        _require_may_loosen(actor, key, networks, expires_at)
    before = audit.snapshot(key, _CHANGEABLE)
    key.name, key.allowed_ips, key.expires_at = names.clean(name), networks, expires_at
    if changes := audit.difference(key, before):
        key.save(update_fields=_CHANGEABLE)
        audit.record("api_key.updated", actor=actor, target=key, changes=changes)
    return key


@transaction.atomic
def rotate_api_key(
    *, actor: Caller | None, key: ApiKey, overlap: timedelta = OVERLAP
) -> tuple[ApiKey, str]:
    """A new key of the same settings and limits; the old one ends after `overlap` (0 s – 30 days).

    A key that was made to live for a time is followed by one that lives as long, unless a key
    asks for it that ends before.
    """
    if actor is not None:
        _require_may_rotate(actor, key)
    _require_may_give(actor, key.scopes, key.created_by)
    if not timedelta(0) <= overlap <= MAX_OVERLAP:
        raise BadRequest("The overlap must be between 0 seconds and 30 days.", param="overlap")
    key, now = _locked(key), timezone.now()
    _require_active(key)
    expires_at = _next_end(key, now)
    if maker := actor.api_key if actor is not None else None:
        expires_at = min(filter(None, [expires_at, maker.expires_at]), default=None)
        _require_within(maker, key.allowed_ips, expires_at)
    new, text = _made(
        project=key.project,
        created_by=key.created_by,
        name=key.name,
        scopes=key.scopes,
        allowed_ips=key.allowed_ips,
        expires_at=expires_at,
    )
    _copy_limits(key, new)
    key.replaced_by = new
    key.expires_at = min(now + overlap, key.expires_at or now + overlap)
    key.save(update_fields=["replaced_by", "expires_at"])
    changes = {"replaced_by": [None, new.pk], "expires_at": [None, key.expires_at.isoformat()]}
    audit.record(
        "api_key.rotated", actor=actor, target=key, organization=key.organization, changes=changes
    )
    return new, text


@transaction.atomic
def revoke_api_key(*, actor: Caller | None, key: ApiKey) -> ApiKey:
    """End a key at once, and with it every token that was made of it; twice is once."""
    if actor is not None:
        require_may_change(actor, key)
    return _revoked(key, actor, "api_key.revoked")


@transaction.atomic
def revoke_leaked_key(*, actor: Caller | User, key: ApiKey) -> ApiKey:
    """A platform operator ends a key of any organization, whose audit says so."""
    user = actor if isinstance(actor, User) else actor.user
    if user is None or not user.is_staff:
        raise Forbidden("This is for platform operators.", code="insufficient_role")
    return _revoked(key, actor, "api_key.revoked_as_leaked")


def require_may_change(actor: Caller, key: ApiKey) -> None:
    """Own keys need `keys`; others' and the projects' need `keys.all`."""
    own = actor.user is not None and key.created_by_id == actor.user.pk
    actor.require("keys" if own else "keys.all")


def may_change(actor: Caller, key: ApiKey) -> bool:
    try:
        require_may_change(actor, key)
    except Forbidden:
        return False
    return True


def is_anothers(actor: Caller, key: ApiKey) -> bool:
    """Whether the key speaks as another person: nobody else is to have its secret."""
    return key.created_by_id is not None and key.created_by != actor.user


def scopes_to_give(actor: Caller) -> list[str]:
    """The scopes that permit nothing beyond what the actor may do."""
    return [scope for scope in Scope.values if _may_give(actor, scope)]


def checked_networks(texts: Sequence[str]) -> list[str]:
    """IPv4 and IPv6 networks in their one spelling: `10.1.2.3/8` becomes `10.0.0.0/8`."""
    if len(texts) > MAX_NETWORKS:
        said = f"At most {MAX_NETWORKS} networks."
        raise BadRequest(said, param="allowed_ips", code="invalid_value")
    return list(dict.fromkeys(_network(text) for text in texts))


def require_scopes(actor: Caller | None, scopes: Sequence[str]) -> None:
    """Refuse unknown scopes, and those that permit what the actor may not do."""
    _require_known(scopes)
    _require_may_give(actor, scopes, actor.user if actor else None)


def audit_of(key: ApiKey) -> dict[str, list[Any]]:
    """What the audit tells of a new key."""
    expires = key.expires_at.isoformat() if key.expires_at else None
    said = {"scopes": key.scopes, "allowed_ips": key.allowed_ips, "expires_at": expires}
    return {"secret": [None, audit.MASK]} | {
        name: [None, value] for name, value in said.items() if value
    }


def note_use(key: ApiKey) -> None:
    """Remember when the key was last used, to the minute: not a write for every request."""
    now = timezone.now()
    if key.last_used_at and now - key.last_used_at < LAST_USED_EVERY:
        return
    stale = Q(last_used_at__isnull=True) | Q(last_used_at__lt=now - LAST_USED_EVERY)
    with scopes_disabled():
        ApiKey.objects.filter(stale, pk=key.pk).update(last_used_at=now)


# --- What may be asked for ----------------------------------------------------------------------


def _require_no_token(actor: Caller) -> None:
    """A token lives for minutes; no key that it makes or changes may live on without it."""
    if actor.token_id:
        said = "A token cannot make, change or rotate a key; use an API key or sign in."
        raise Forbidden(said, code="key_from_token")


def _require_may_rotate(actor: Caller, key: ApiKey) -> None:
    require_may_change(actor, key)
    _require_no_token(actor)
    if is_anothers(actor, key):
        said = "This key is another person's: revoke it, and they make a new one."
        raise Forbidden(said, code="not_your_key")


def _require_may_loosen(
    actor: Caller, key: ApiKey, networks: Sequence[str], expires_at: datetime | None
) -> None:
    if is_anothers(actor, key):
        said = "Another person's key may be tightened, not loosened."
        raise Forbidden(said, code="not_your_key")
    if actor.api_key is not None:
        _require_within(actor.api_key, networks, expires_at)


def _require_within(maker: ApiKey, networks: Sequence[str], expires_at: datetime | None) -> None:
    if not _is_within(maker, networks, expires_at):
        said = "A key gives no key more networks or a later end than it has itself."
        raise Forbidden(said, code="key_too_wide")


def _is_within(key: ApiKey, networks: Sequence[str], expires_at: datetime | None) -> bool:
    """Whether these networks and this end permit nothing that the key's own do not."""
    longer = key.expires_at is not None and (expires_at is None or expires_at > key.expires_at)
    if longer or not key.allowed_ips:
        return not longer
    own = [ip_network(each) for each in key.allowed_ips]
    return bool(networks) and all(_is_inside(ip_network(each), own) for each in networks)


def _is_inside(network: IPv4Network | IPv6Network, others: Sequence[Any]) -> bool:
    fitting = (other for other in others if other.version == network.version)
    return any(network.subnet_of(other) for other in fitting)


def _next_end(key: ApiKey, now: datetime) -> datetime | None:
    if key.expires_at is None:
        return None
    try:
        return now + (key.expires_at - key.created_at)
    except OverflowError:  # it ends when the calendar does
        return key.expires_at


def _require_may_make(actor: Caller, created_by: User | None) -> None:
    _require_no_token(actor)
    if created_by is None:
        actor.require("keys.all")
    elif created_by == actor.user:
        actor.require("keys")
    else:
        raise Forbidden("A key is made for oneself or for the project.", code="not_your_key")


def _require_known(scopes: Sequence[str]) -> None:
    unknown = sorted(set(scopes) - set(Scope.values))
    if unknown:
        known = ", ".join(Scope.values)
        said = f"Unknown scope {unknown[0][:64]!r}; there are: {known}"
        raise BadRequest(said, param="scope", code="invalid_value")


def _may_give(actor: Caller, scope: str) -> bool:
    if scope == Scope.OPERATOR:
        person = actor.user
        return (
            person is not None
            and actor.is_platform_operator
            and not second_factor.is_lacking(person)
        )
    return roles.of_scopes([scope]) <= actor.permissions


def _usual_scopes(actor: Caller | None) -> list[str]:
    scopes = [scope for scope in FULL_SCOPES if actor is None or _may_give(actor, scope)]
    if not scopes:
        raise BadRequest("Name the scopes of the key.", param="scopes", code="invalid_value")
    return [str(scope) for scope in scopes]


def _require_may_give(actor: Caller | None, scopes: Sequence[str], created_by: User | None) -> None:
    if Scope.OPERATOR in scopes and (created_by is None or not created_by.is_staff):
        said = "Only a platform operator's own key may have the scope 'operator'."
        raise Forbidden(said, code="insufficient_role")
    if Scope.OPERATOR in scopes and actor is not None and actor.user is not None:
        second_factor.require(actor.user)
    refused = [scope for scope in scopes if actor is not None and not _may_give(actor, scope)]
    if refused:
        said = f"You may not give the scope {refused[0]!r}: it permits more than you may do."
        raise Forbidden(said, code="scope_too_wide")


def _network(text: str) -> str:
    try:
        network = ip_network(text.strip(), strict=False)
    except ValueError:
        said = f"No IP address or network: {text[:64]!r}; one is as 10.0.0.0/8 or 2001:db8::/32."
        raise BadRequest(said, param="allowed_ips", code="invalid_value") from None
    if "%" in str(network):
        said = "A network has no zone."
        raise BadRequest(said, param="allowed_ips", code="invalid_value")
    return str(network)


def _checked_expiry(expires_at: datetime | None) -> datetime | None:
    if expires_at is not None and expires_at <= timezone.now():
        said = "The expiry must be in the future."
        raise BadRequest(said, param="expires_at", code="invalid_value")
    return expires_at


def _require_active(key: ApiKey) -> None:
    if key.state != "active":
        raise BadRequest(f"This key is {key.state}.", param="key_id", code="key_not_active")


# --- Rows ---------------------------------------------------------------------------------------


def _made(
    *,
    project: Project,
    created_by: User | None,
    name: str,
    scopes: Sequence[str],
    allowed_ips: Sequence[str],
    expires_at: datetime | None,
) -> tuple[ApiKey, str]:
    text = keys.make()
    with scope(organization=project.organization_id):
        key = ApiKey.objects.create(
            organization_id=project.organization_id,
            project=project,
            created_by=created_by,
            name=name,
            prefix=text.prefix,
            digest=secrets.digest(text.secret),
            scopes=list(scopes),
            allowed_ips=list(allowed_ips),
            expires_at=expires_at,
        )
    return key, str(text)


def _locked(key: ApiKey) -> ApiKey:
    """The key as it is now, held until the transaction ends."""
    with scopes_disabled():
        rows = ApiKey.objects.select_related("organization", "project", "created_by")
        return rows.select_for_update(of=("self",)).get(pk=key.pk)


def _revoked(key: ApiKey, actor: Caller | User | None, action: str) -> ApiKey:
    key = _locked(key)
    if key.revoked_at is None:
        changes = {"state": [key.state, "revoked"]}
        key.revoked_at = timezone.now()
        key.save(update_fields=["revoked_at"])
        audit.record(
            action, actor=actor, target=key, organization=key.organization, changes=changes
        )
    return key


def _copy_limits(old: ApiKey, new: ApiKey) -> None:
    """Give the new key the old one's own limits, so that rotating loosens nothing."""
    with scopes_disabled():
        for quota in Quota.objects.filter(api_key=old):
            quota.pk, quota.api_key = None, new
            quota._state.adding = True
            quota.save(force_insert=True)
