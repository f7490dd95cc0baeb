"""Webhook endpoints: who is told of what, and with which secret. Sending is `deliveries`'s."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import orjson
from django.db import transaction
from django.utils import timezone
from django_scopes import scopes_disabled
from standardwebhooks import Webhook
from standardwebhooks.webhooks import EmptyWebhookSecretError

from accounts import names, secrets
from accounts.access import Caller
from accounts.errors import ApiError, BadRequest, NotFound
from accounts.models import Organization, Project
from accounts.services import audit
from batches import webhooks
from batches.models import Batch, WebhookEndpoint
from batches.models.events import EventType
from batches.services import deliveries
from batches.webhooks import Receipt

MOST = 100
"""Endpoints of one organization, those of single batches aside."""
MOST_HEADERS, LONGEST_HEADER = 20, 1000
TESTS_AT_ONCE = 3
"""Of one process: each holds one of its threads until the receiver has answered."""
NONE, OVERLAP = timedelta(0), timedelta(hours=24)
"""How long an old secret may go on signing."""
_FIELDS = ("name", "url", "event_types", "project_id", "timeout", "per_minute", "disabled_at")
OF_BATCHES = frozenset(type for type in EventType.values if type.startswith("batch."))
OF_BATCHES_ENDS = (
    EventType.BATCH_COMPLETED,
    EventType.BATCH_FAILED,
    EventType.BATCH_EXPIRED,
    EventType.BATCH_CANCELLED,
)
"""What a batch's own webhook is told of, unless it names others of `OF_BATCHES`."""
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")
_OURS = re.compile("webhook-.*|host|content-.*|transfer-encoding|connection|user-agent", re.I)
"""Headers that are ours to set, by Standard Webhooks or by HTTP."""
_tests = threading.BoundedSemaphore(TESTS_AT_ONCE)


class Busy(ApiError):
    """Too many of these are under way."""

    status = 429


def create_webhook(
    *,
    actor: Caller,
    name: str,
    url: str,
    event_types: Sequence[str],
    project: Project | None,
    timeout: int = 15,
    per_minute: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[WebhookEndpoint, str]:
    """Tell this address of such events of the project (of all, without one); and its secret.

    Raises `BadRequest` naming the field.
    """
    actor.require("webhooks")
    secret = webhooks.new_secret()
    row = WebhookEndpoint(organization=actor.organization)
    _set_secret(row, secret)
    _fill(row, name, url, event_types, project, timeout, per_minute)
    _set_headers(row, headers or {})
    webhooks.require_reachable(url)  # while nothing is locked: name servers may take their time
    with transaction.atomic():
        _require_room(actor.organization)
        row.save(force_insert=True)
        changes = audit.difference(row, dict.fromkeys(_FIELDS))
        audit.record("webhook.created", actor=actor, target=row, changes=changes)
    return row, secret


def _require_room(organization: Organization) -> None:
    with scopes_disabled():
        mine = Organization.objects.select_for_update(no_key=True).get(pk=organization.pk)
        if WebhookEndpoint.objects.filter(organization=mine, batch=None).count() >= MOST:
            said = f"An organization has at most {MOST} webhooks."
            raise BadRequest(said, code="too_many_webhooks")


def of_batch(
    batch: Batch, *, url: str, secret: str, event_types: Sequence[str] | None
) -> WebhookEndpoint:
    """Tell this address of this batch alone, in the transaction that makes it.

    What comes in was `checked_of_batch`. Like the batch it is work, and not audited.
    """
    row = WebhookEndpoint(
        organization=batch.organization,
        project=batch.project,
        batch=batch,
        name=f"Webhook of {batch.pk}",
        url=url,
        event_types=_known(event_types or OF_BATCHES_ENDS),
    )
    _set_secret(row, secret)
    _set_headers(row, {})
    row.save(force_insert=True)
    return row


def checked_of_batch(*, url: str, secret: str | None, event_types: Sequence[str] | None) -> str:
    """The secret (a new one, if none is brought) of a batch's own webhook, if it may be such.

    Asks the name servers, so before anything is locked. Raises `BadRequest` naming the field.
    """
    if (event_types is not None and not set(event_types) <= OF_BATCHES) or event_types == []:
        said = f"webhook.events must be some of: {', '.join(sorted(OF_BATCHES))}."
        raise BadRequest(said, param="webhook.events", code="invalid_value")
    try:
        webhooks.require_reachable(url)
    except BadRequest as error:
        raise BadRequest(error.message, param="webhook.url") from None
    return checked_secret(secret) if secret is not None else webhooks.new_secret()


def update_webhook(
    *,
    actor: Caller,
    row: WebhookEndpoint,
    enabled: bool | None = None,
    headers: Mapping[str, str] | None = None,
    **fields: Any,
) -> WebhookEndpoint:
    """Change what is given of `create_webhook`'s fields; what is due goes to the new address."""
    actor.require("webhooks")
    if fields.get("url", row.url) != row.url:
        webhooks.require_reachable(fields["url"])  # as above, before the row is locked
    with transaction.atomic():
        row = _locked(row)
        if headers is None:
            _require_same_origin(row, fields.get("url", row.url))
        before = audit.snapshot(row, _FIELDS)
        now = {"name": row.name, "url": row.url, "event_types": row.event_types}
        now |= {"project": row.project, "timeout": row.timeout, "per_minute": row.per_minute}
        _fill(row, **(now | fields))
        if headers is not None:
            _set_headers(row, headers)
        if enabled is not None:
            _enable(row, enabled)
        changes = audit.difference(row, before)
        if headers is not None:
            changes["headers"] = [audit.MASK, audit.MASK]
        if changes:
            row.updated_at = timezone.now()
            row.save(force_update=True)
            audit.record("webhook.updated", actor=actor, target=row, changes=changes)
    return row


def _require_same_origin(row: WebhookEndpoint, url: str) -> None:
    """Headers that stay may be somebody's password: not for whom another member names."""
    if deliveries.headers_of(row) and urlsplit(url)[:2] != urlsplit(row.url)[:2]:
        said = "Give the headers again, or none: those that are there were meant for another host."
        raise BadRequest(said, param="headers", code="secret_needed")


def _enable(row: WebhookEndpoint, enabled: bool) -> None:
    if enabled and row.disabled_at is not None:
        row.disabled_at, row.disabled_why = None, ""
        row.failing_since, row.failures, row.resume_at = None, 0, timezone.now()
    elif not enabled and row.disabled_at is None:
        row.disabled_at, row.disabled_why = timezone.now(), "Switched off."


@transaction.atomic
def rotate_secret(
    *, actor: Caller, row: WebhookEndpoint, overlap: timedelta = NONE
) -> tuple[WebhookEndpoint, str]:
    """A new secret; for so long the old one signs as well."""
    actor.require("webhooks")
    row, secret = _locked(row), webhooks.new_secret()
    row.encrypted_old_secret = row.encrypted_secret if overlap else ""
    row.old_secret_until = timezone.now() + overlap if overlap else None
    _set_secret(row, secret)
    row.updated_at = timezone.now()
    row.save(force_update=True)
    changes = {"secret": [audit.MASK, audit.MASK]}
    audit.record("webhook.secret_rotated", actor=actor, target=row, changes=changes)
    return row, secret


@transaction.atomic
def delete_webhook(*, actor: Caller, row: WebhookEndpoint) -> None:
    """Forget the endpoint with all that was and was to be sent to it."""
    actor.require("webhooks")
    row = _locked(row, to_delete=True)
    with scopes_disabled():
        WebhookEndpoint.objects.filter(pk=row.pk).delete()
    audit.record("webhook.deleted", actor=actor, target=row)


def test_webhook(*, actor: Caller, row: WebhookEndpoint, event_type: str) -> Receipt:
    """Send a sample event now; of it the audit alone is kept.

    Raises `Busy` while this process sends others: it has pages and calls to answer meanwhile.
    """
    actor.require("webhooks")
    _known([event_type])
    if not _tests.acquire(blocking=False):
        raise Busy("Other tests are being sent. Try again in a few seconds.")
    try:
        receipt = _tested(row, event_type)
    finally:
        _tests.release()
    audit.record("webhook.tested", actor=actor, target=row, changes={"type": [None, event_type]})
    return receipt


def _tested(row: WebhookEndpoint, event_type: str) -> Receipt:
    now = timezone.now()
    id = f"evt_test_{int(now.timestamp())}"
    body = {"id": id, "object": "event", "created_at": int(now.timestamp()), "type": event_type}
    text = orjson.dumps(body | {"data": {"id": "batch_test"}})
    signed = webhooks.signed(text, id=id, at=now, secrets=deliveries.secrets_of(row))
    headers = deliveries.headers_of(row) | {"content-type": "application/json", **signed}
    return webhooks.send(row.url, text, headers, timeout=row.timeout)


def _fill(
    row: WebhookEndpoint,
    name: str,
    url: str,
    event_types: Sequence[str],
    project: Project | None,
    timeout: int,
    per_minute: int | None,
) -> None:
    if not 5 <= timeout <= 30:
        raise BadRequest("timeout is from 5 to 30 seconds.", param="timeout")
    if per_minute is not None and not 0 < per_minute < 2**31:
        raise BadRequest("per_minute must be at least 1.", param="per_minute")
    row.name, row.url, row.project = names.clean(name), url, project
    row.event_types, row.timeout, row.per_minute = _known(event_types), timeout, per_minute


def _set_secret(row: WebhookEndpoint, secret: str) -> None:
    row.encrypted_secret, row.secret_hint = secrets.encrypt(secret), f"whsec_…{secret[-4:]}"


def secret_of(row: WebhookEndpoint) -> str:
    return secrets.decrypt(row.encrypted_secret)


def _known(types: Sequence[str]) -> list[str]:
    """Each type once, in our order; raises `BadRequest` for none, and for one we do not send."""
    if not types or set(types) - set(EventType.values):
        said = f"event_types must be some of: {', '.join(EventType.values)}."
        raise BadRequest(said, param="event_types", code="invalid_value")
    return [each for each in EventType.values if each in types]


def _set_headers(row: WebhookEndpoint, headers: Mapping[str, str]) -> None:
    if len(headers) > MOST_HEADERS:
        raise BadRequest(f"At most {MOST_HEADERS} headers may be sent along.", param="headers")
    for name, value in headers.items():
        fine = value.isascii() and value.isprintable() and len(value) <= LONGEST_HEADER
        if not _HEADER.fullmatch(name) or _OURS.fullmatch(name) or not fine:
            said = f"The header {name[:100]!r} cannot be sent along, or its value cannot."
            raise BadRequest(said, param="headers")
    row.encrypted_headers = secrets.encrypt(orjson.dumps(dict(headers)).decode())


def checked_secret(secret: str) -> str:
    """A secret that somebody brings: `whsec_` and base64 of 24 to 64 bytes."""
    try:
        size = len(Webhook(secret)._whsecret)
    except (ValueError, RuntimeError, EmptyWebhookSecretError):
        size = 0
    if not secret.startswith(webhooks.PREFIX) or not 24 <= size <= 64:
        said = "A webhook secret is whsec_ followed by base64 of 24 to 64 bytes."
        raise BadRequest(said, param="webhook.secret")
    return secret


def _locked(row: WebhookEndpoint, *, to_delete: bool = False) -> WebhookEndpoint:
    """The row as it is now, held until the transaction ends; `NotFound` if it is gone.

    Events that are on their way to it hold up only who deletes it, with all that is sent to it.
    """
    with scopes_disabled():
        rows = WebhookEndpoint.objects.select_related("organization", "project")
        rows = rows.select_for_update(of=("self",), no_key=not to_delete)
        found = rows.filter(pk=row.pk).first()
    if found is None:
        said = f"No such webhook endpoint: {row.pk!r}"
        raise NotFound(said, param="webhook_endpoint_id", code="not_found")
    return found
