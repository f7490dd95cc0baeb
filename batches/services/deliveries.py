"""Deliveries: sending what is due, and what becomes of it; replaying and forgetting.

At least once, and in the order of events as far as that goes: a few are on their way to a receiver
side by side, and one that fails waits for its next attempt while those after it go first.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic, sleep

import orjson
from django.conf import settings
from django.db import transaction
from django.db.models import Exists, F, OuterRef, Q, QuerySet
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts import secrets
from accounts.access import Caller
from accounts.ids import first_id
from accounts.services import audit
from batches import wakeups, webhooks
from batches.models import Event, WebhookAttempt, WebhookDelivery, WebhookEndpoint
from batches.models.events import DeliveryState, EventType
from batches.services import events
from batches.webhooks import Receipt, Sender

SCHEDULE = settings.WEBHOOK_RETRY_SECONDS
"""Seconds before each attempt; with the last, 72 hours have gone by unless the operator says else."""
JITTER = 0.2
"""The waits are up to so much longer, so that what failed together does not come back together."""
SIDE_BY_SIDE = 8
"""Deliveries that are on their way to one receiver at once: one round, recorded together."""
TURN_SECONDS, TURN_DELIVERIES = 10.0, 200
"""How long one endpoint is served before others that wait have a turn."""
GRACE_SECONDS = settings.WEBHOOK_GRACE_SECONDS
"""How long after its timeout an endpoint counts as left by a process that died."""
PAUSE_SECONDS = settings.WEBHOOK_PAUSE_SECONDS
"""After so many failed rounds in a row an endpoint is left alone for so long, whatever is due."""
NAP_SECONDS = 1.0
"""An endpoint with a rate is waited for that long; a longer wait is left to the sweep."""
SLOW_SECONDS, SLOW_AT_ONCE = 1.0, 8
"""An organization's receivers that fail, have a rate, or keep us longer than this, take so many
threads at most; new ones of it, which nobody knows yet, twice as many."""
DISABLE_AFTER = timedelta(days=5)
KEEP = timedelta(days=30)
"""How long events are kept; what is dead or due stays until it is purged or arrives."""
GONE = 410
CONTENT_TYPE, USER_AGENT = "application/json", "vLLM-Batch-Portal-Webhooks/1"


def send_due(endpoint_id: str) -> None:
    """Send what is due to an endpoint, unless another does; safe to call at any moment."""
    with _lock:
        if turn := _turns.get(endpoint_id):
            turn.woken = True
            return
        turn = _turns[endpoint_id] = _Turn()
    try:
        with scopes_disabled():
            more = _served(endpoint_id, turn)
    finally:
        with _lock:
            del _turns[endpoint_id]
    if more or turn.woken:
        wakeups.deliver(endpoint_id)


def repeat_wakeups() -> None:
    """Wake for every endpoint that something is due to, should its message have got lost."""
    due = WebhookDelivery.objects.filter(
        endpoint=OuterRef("pk"), state=DeliveryState.RETRYING, next_attempt_at__lte=timezone.now()
    )
    for id in _open().filter(Exists(due)).values_list("pk", flat=True):
        wakeups.deliver(id)


def forget_old() -> None:
    """Forget events that are older than `KEEP`, but for those with a delivery not yet arrived.

    By the ids, which begin with the time: all sweeps look here, and nearly all events are newer.
    """
    undone = WebhookDelivery.objects.filter(event=OuterRef("pk")).exclude(
        state=DeliveryState.DELIVERED
    )
    old = Event.objects.filter(pk__lt=first_id("evt_", timezone.now() - KEEP))
    old = old.exclude(Exists(undone))
    ids = list(old.order_by("pk").values_list("pk", flat=True)[:1000])
    Event.objects.filter(pk__in=ids).delete()


# --- A turn -----------------------------------------------------------------------------------


@dataclass
class _Turn:
    """An endpoint that a thread of this process sends to."""

    woken: bool = False
    """Whether a wake-up came meanwhile; it is not worth a query of its own."""
    organization_id: str = ""
    waits: bool = False
    """Whether it keeps its thread while nothing is sent: it fails, or has a rate."""
    round_began: float = 0.0

    def starts(self, endpoint: WebhookEndpoint) -> None:
        self.organization_id = endpoint.organization_id
        self.waits = endpoint.failures > 0 or endpoint.per_minute is not None
        self.round_began = monotonic()

    @property
    def is_slow(self) -> bool:
        return self.waits or monotonic() - self.round_began > SLOW_SECONDS


_lock = threading.Lock()
_turns: dict[str, _Turn] = {}


def _served(endpoint_id: str, turn: _Turn) -> bool:
    """Send to the endpoint for a while; whether more is due."""
    ends, sent = monotonic() + TURN_SECONDS, 0
    endpoint = _taken(endpoint_id)
    if endpoint is None:
        return False
    if _is_crowded(endpoint):
        return _left(endpoint)  # and the sweep comes back to it
    with Sender(endpoint.url, endpoint.timeout, side_by_side=SIDE_BY_SIDE) as sender:
        while endpoint is not None:
            turn.starts(endpoint)
            due = _due(endpoint)
            over = monotonic() > ends or sent >= TURN_DELIVERIES
            if not due or over or (endpoint.url, endpoint.timeout) != (sender.url, sender.timeout):
                _left(endpoint)
                # What came before it was left has woken whoever found it taken.
                return bool(due or _due(endpoint))
            endpoint = _settled(endpoint, due, sender.send_all(_signed(endpoint, due)))
            sent += len(due)
            if endpoint is not None:
                sleep(max(0.0, (endpoint.resume_at - timezone.now()).total_seconds()))
    return False


def _is_crowded(endpoint: WebhookEndpoint) -> bool:
    """Whether slow receivers of the same organization take enough of this process's threads."""
    with _lock:
        same = [t for t in _turns.values() if t.organization_id == endpoint.organization_id]
    most = SLOW_AT_ONCE if endpoint.failures else 2 * SLOW_AT_ONCE
    return sum(turn.is_slow for turn in same) >= most


def _open() -> QuerySet[WebhookEndpoint]:
    """Endpoints that may be sent to now and that nobody is sending to."""
    now = timezone.now()
    nobodys = Q(busy_until=None) | Q(busy_until__lt=now)
    return WebhookEndpoint.objects.filter(
        nobodys,
        disabled_at=None,
        resume_at__lte=now,
        organization__suspended_at=None,
        organization__deleted_at=None,
    )


def _taken(endpoint_id: str) -> WebhookEndpoint | None:
    """The endpoint, held for one round; None if it is not to be sent to, or another's.

    A hold is known by its `busy_until`: one that is taken over ends later than the one that ended.
    The lock is not in the way of events, whose new deliveries refer to the row.
    """
    with transaction.atomic():
        rows = _open().select_for_update(of=("self",), skip_locked=True, no_key=True)
        endpoint = rows.filter(pk=endpoint_id).first()
        if endpoint is not None:
            _hold(endpoint)
            endpoint.save(update_fields=["busy_until"])
    return endpoint


def _hold(endpoint: WebhookEndpoint) -> None:
    seconds = endpoint.timeout + GRACE_SECONDS
    endpoint.busy_until = timezone.now() + timedelta(seconds=seconds)


def _left(endpoint: WebhookEndpoint) -> bool:
    held = WebhookEndpoint.objects.filter(pk=endpoint.pk, busy_until=endpoint.busy_until)
    held.update(busy_until=None)
    return False


def _due(endpoint: WebhookEndpoint) -> list[WebhookDelivery]:
    """What is to be sent in one round, the longest due first.

    One by one to a receiver that fails, which may be about to recover, or that has a rate.
    """
    most = 1 if endpoint.failures or endpoint.per_minute else SIDE_BY_SIDE
    due = WebhookDelivery.objects.filter(
        endpoint=endpoint, state=DeliveryState.RETRYING, next_attempt_at__lte=timezone.now()
    )
    return list(due.select_related("event").order_by("next_attempt_at", "pk")[:most])


def _signed(
    endpoint: WebhookEndpoint, due: Sequence[WebhookDelivery]
) -> list[tuple[bytes, dict[str, str]]]:
    """The body and headers of each."""
    headers, keys, now = headers_of(endpoint), secrets_of(endpoint), timezone.now()
    headers |= {"content-type": CONTENT_TYPE, "user-agent": USER_AGENT}
    bodies = [(each.event.body.encode(), each.event_id) for each in due]
    return [
        (body, headers | webhooks.signed(body, id=id, at=now, secrets=keys)) for body, id in bodies
    ]


def headers_of(endpoint: WebhookEndpoint) -> dict[str, str]:
    found: dict[str, str] = orjson.loads(secrets.decrypt(endpoint.encrypted_headers) or "{}")
    return found


def secrets_of(endpoint: WebhookEndpoint) -> list[str]:
    """The secrets that sign now: the old one, too, until its time is over."""
    texts = [endpoint.encrypted_secret]
    if endpoint.old_secret_until and endpoint.old_secret_until > timezone.now():
        texts.append(endpoint.encrypted_old_secret)
    return [secrets.decrypt(text) for text in texts]


# --- What became of it ------------------------------------------------------------------------


@transaction.atomic
def _settled(
    endpoint: WebhookEndpoint, sent: Sequence[WebhookDelivery], receipts: Sequence[Receipt]
) -> WebhookEndpoint | None:
    """Record a round, and leave the endpoint or hold it for the next; then it is returned.

    Of a hold that another took over meanwhile, only the attempts are recorded.
    """
    rows = WebhookEndpoint.objects.select_for_update(of=("self",), no_key=True)
    now_there = rows.select_related("organization", "project").filter(pk=endpoint.pk).first()
    pairs = _recorded(sent, receipts)
    if now_there is None or now_there.busy_until != endpoint.busy_until:
        return None
    # A receiver that was exchanged meanwhile is not judged by what the one before it said.
    same = now_there.url == endpoint.url
    _mark(pairs, may_be_gone=same)
    return _judged(now_there, receipts if same else [])


def _recorded(
    sent: Sequence[WebhookDelivery], receipts: Sequence[Receipt]
) -> list[tuple[WebhookDelivery, Receipt]]:
    """Write the attempts; the deliveries as they are now, but for those that were deleted."""
    rows = WebhookDelivery.objects.select_for_update(of=("self",), no_key=True)
    now_there = {row.pk: row for row in rows.filter(pk__in=[d.pk for d in sent]).order_by("pk")}
    pairs = [
        (now_there[delivery.pk], receipt)
        for delivery, receipt in zip(sent, receipts, strict=True)
        if delivery.pk in now_there
    ]
    WebhookAttempt.objects.bulk_create(
        WebhookAttempt(
            delivery=delivery,
            milliseconds=receipt.milliseconds,
            status=receipt.status,
            answer=receipt.answer,
            error=receipt.error,
        )
        for delivery, receipt in pairs
    )
    return pairs


def _mark(pairs: Sequence[tuple[WebhookDelivery, Receipt]], *, may_be_gone: bool) -> None:
    """The deliveries' new states: arrived, to be tried again, or dead."""
    arrived = [delivery.pk for delivery, receipt in pairs if receipt.ok]
    WebhookDelivery.objects.filter(pk__in=arrived).update(
        state=DeliveryState.DELIVERED,
        tries=F("tries") + 1,
        error="",
        next_attempt_at=None,
        ended_at=timezone.now(),
    )
    for delivery, receipt in pairs:
        if not receipt.ok and delivery.state == DeliveryState.RETRYING:
            _put_off(delivery, receipt, dies=may_be_gone and receipt.status == GONE)


def _put_off(delivery: WebhookDelivery, receipt: Receipt, *, dies: bool) -> None:
    now = timezone.now()
    delivery.tries, delivery.error = delivery.tries + 1, receipt.why
    if dies or delivery.tries >= len(SCHEDULE):
        delivery.state = DeliveryState.DEAD
        delivery.next_attempt_at, delivery.ended_at = None, now
    else:
        wait = SCHEDULE[delivery.tries] * (1 + random.uniform(0, JITTER))  # noqa: S311
        delivery.next_attempt_at = now + timedelta(seconds=max(wait, receipt.retry_after))
    delivery.save(update_fields=["state", "tries", "error", "next_attempt_at", "ended_at"])


def _judged(endpoint: WebhookEndpoint, receipts: Sequence[Receipt]) -> WebhookEndpoint | None:
    """How the endpoint stands after a round: well, failing, or disabled; and held if well.

    A receiver that took anything is well: what it did not take has a schedule of its own.
    """
    now = timezone.now()
    if any(receipt.ok for receipt in receipts):
        endpoint.failing_since, endpoint.failures = None, 0
    elif receipts:
        endpoint.failing_since = endpoint.failing_since or now
        endpoint.failures += 1
    _pause(endpoint, receipts)
    gone = any(receipt.status == GONE for receipt in receipts)
    lost = endpoint.failing_since is not None and now - endpoint.failing_since > DISABLE_AFTER
    endpoint.busy_until = None
    if not gone and not lost and _may_go_on(endpoint):
        _hold(endpoint)
    endpoint.save(update_fields=["failing_since", "failures", "resume_at", "busy_until"])
    if gone:
        disable(endpoint, "The receiver answered 410: it is gone for good.")
    elif lost:
        disable(endpoint, f"Nothing arrived for {DISABLE_AFTER.days} days.")
    return endpoint if endpoint.busy_until else None


def _pause(endpoint: WebhookEndpoint, receipts: Sequence[Receipt]) -> None:
    """Set until when it is left alone: after failures, by its own wish, or for its rate."""
    now = timezone.now()
    if endpoint.per_minute:
        pace = timedelta(seconds=60 / endpoint.per_minute)
        # What the sweep came too late for is made up, but for no more than one delivery.
        endpoint.resume_at = max(endpoint.resume_at + pace, now)
    waits = [receipt.retry_after for receipt in receipts if not receipt.ok]
    if receipts and endpoint.failures:
        waits.append(PAUSE_SECONDS[min(endpoint.failures, len(PAUSE_SECONDS)) - 1])
    if waits:
        asked = now + timedelta(seconds=max(waits))
        endpoint.resume_at = max(endpoint.resume_at, asked)


def _may_go_on(endpoint: WebhookEndpoint) -> bool:
    there = endpoint.organization
    soon = timezone.now() + timedelta(seconds=0 if endpoint.failures else NAP_SECONDS)
    return (
        endpoint.enabled
        and endpoint.resume_at <= soon
        and there.suspended_at is None
        and there.deleted_at is None
    )


def disable(endpoint: WebhookEndpoint, why: str) -> None:
    """Send nothing more until somebody enables it; what is due waits, and is told as an event."""
    if endpoint.disabled_at is not None:
        return
    endpoint.disabled_at, endpoint.disabled_why = timezone.now(), why
    endpoint.save(update_fields=["disabled_at", "disabled_why"])
    events.record(
        EventType.WEBHOOK_DISABLED,
        organization=endpoint.organization,
        project=endpoint.project,
        data={"id": endpoint.pk, "reason": why},
    )
    wakeups.mail_of_disabled(endpoint.pk)
    audit.record(
        "webhook.disabled",
        actor=None,
        organization=endpoint.organization,
        target=endpoint,
        changes={"reason": ["", why]},
    )


# --- Dead letters -----------------------------------------------------------------------------


@transaction.atomic
def replay(*, actor: Caller, deliveries: QuerySet[WebhookDelivery]) -> int:
    """Try these again from the schedule's start, the same body under the same id; how many."""
    actor.require("webhooks")
    with actor.scope():
        rows = deliveries.exclude(state=DeliveryState.RETRYING).select_for_update(of=("self",))
        found = list(rows.order_by("pk").values_list("pk", "endpoint_id"))
        WebhookDelivery.objects.filter(pk__in=[pk for pk, _ in found]).update(
            state=DeliveryState.RETRYING, tries=0, next_attempt_at=timezone.now(), ended_at=None
        )
    for endpoint_id in {endpoint_id for _, endpoint_id in found}:
        wakeups.deliver(endpoint_id)
    _tell("webhook.replayed", actor, [pk for pk, _ in found])
    return len(found)


@transaction.atomic
def purge(*, actor: Caller, deliveries: QuerySet[WebhookDelivery]) -> int:
    """Forget these dead letters; how many that were."""
    actor.require("webhooks")
    with actor.scope():
        dead = deliveries.filter(state=DeliveryState.DEAD)
        ids = list(dead.order_by("pk").values_list("pk", flat=True))
        WebhookDelivery.objects.filter(pk__in=ids).delete()
    _tell("webhook.dead_letters_purged", actor, ids)
    return len(ids)


def _tell(action: str, actor: Caller, ids: Sequence[str]) -> None:
    if ids:
        changes = {"deliveries": [None, list(ids[:100])], "count": [None, len(ids)]}
        audit.record(action, actor=actor, changes=changes)
