"""What platform operators do to batches that wait or run, one or many at a time.

Each batch is changed in a transaction of its own, with an event in its organization's audit: many
organizations' chains locked at once would stand in each other's way. Deadlines run on while a batch
is held. What can be undone comes back as `Before`, the row as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from django.db import transaction
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.errors import BadRequest
from accounts.models import User
from accounts.services import audit
from batches import wakeups, windows
from batches.lines import BadLine
from batches.models import Batch
from batches.models.batches import HeldWhy, Priority, Status
from batches.services.batches import begin_cancelling

MOST = 500
"""So many batches at a time."""
WAITING = (Status.VALIDATING, Status.IN_PROGRESS)
_HOLD = ("held_at", "held_why", "held_note")

Fields = Mapping[str, Any]
Change = Callable[[Batch], Fields]
"""What a batch's fields should be; raises `BadRequest` where that cannot be."""


@dataclass(frozen=True)
class Before:
    """A batch's fields as they were before a change, and as it left them."""

    batch: str
    was: Fields
    now: Fields


@dataclass(frozen=True)
class Done:
    """What became of some batches: those that changed, and why others did not."""

    changed: list[Before] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def hold(*, actor: User | None, ids: Sequence[str], note: str = "") -> Done:
    """Lease nothing more of them; what runs is given back within a heartbeat."""
    note = _clean(note)

    def change(batch: Batch) -> Fields:
        if batch.held_why == HeldWhy.MODERATION:
            raise BadRequest("it waits for approval already")
        since = batch.held_at or timezone.now()
        return {"held_at": since, "held_why": HeldWhy.OPERATOR, "held_note": note}

    return _each(actor, "batch.held", ids, change)


def release(*, actor: User | None, ids: Sequence[str]) -> Done:
    """Let them run again."""

    def change(batch: Batch) -> Fields:
        if batch.held_why == HeldWhy.MODERATION:
            raise BadRequest("it waits for approval: approve or reject it")
        return dict(_FREE)

    return _each(actor, "batch.released", ids, change)


def approve(*, actor: User | None, ids: Sequence[str]) -> Done:
    """Let batches run that wait for approval."""

    def change(batch: Batch) -> Fields:
        _require_moderated(batch)
        return dict(_FREE)

    return _each(actor, "batch.approved", ids, change)


def reject(*, actor: User | None, ids: Sequence[str], note: str) -> Done:
    """Cancel batches that wait for approval; their organizations read the note."""
    note = _clean(note)
    if not note:
        raise BadRequest("Say why: the organization reads it.", param="note")

    def change(batch: Batch) -> Fields:
        _require_moderated(batch)
        said = BadLine("batch_rejected", f"An operator did not approve this batch: {note}")
        return {"errors": [said.as_wire(None)]}

    return _each(actor, "batch.rejected", ids, change, then=begin_cancelling)


def cancel(*, actor: User | None, ids: Sequence[str]) -> Done:
    """Stop them for good; what has been answered is kept."""
    return _each(actor, "batch.cancelled", ids, lambda _: {}, then=begin_cancelling)


def set_priority(*, actor: User | None, ids: Sequence[str], priority: int) -> Done:
    if priority not in Priority.values:
        raise BadRequest("priority must be low, normal or high.", param="priority")
    return _each(actor, "batch.reprioritised", ids, lambda _: {"priority": priority})


def move_to_front(*, actor: User | None, ids: Sequence[str]) -> Done:
    """Before all else of their models, but for batches that have waited too long; the last first."""
    now = timezone.now()
    places = {id: now - timedelta(milliseconds=at) for at, id in enumerate(ids)}
    return _each(actor, "batch.moved_to_front", ids, lambda batch: {"front_at": places[batch.pk]})


def set_deadline(*, actor: User | None, ids: Sequence[str], within: timedelta) -> Done:
    """Give them so long from now on."""
    if not windows.SHORTEST <= within <= windows.LONGEST:
        raise BadRequest("A deadline must be from a minute to 14 days away.", param="hours")
    expires_at = timezone.now() + within
    return _each(actor, "batch.deadline_changed", ids, lambda _: {"expires_at": expires_at})


def undo(*, actor: User | None, before: Iterable[Before]) -> Done:
    """Give batches back what they had, unless somebody has changed that since."""
    known = {each.batch: each for each in before}

    def change(batch: Batch) -> Fields:
        each = known[batch.pk]
        if any(getattr(batch, name) != value for name, value in each.now.items()):
            raise BadRequest("it was changed again since")
        if each.was.get("expires_at", timezone.now()) < timezone.now() - timedelta(seconds=1):
            raise BadRequest("its old deadline is over")
        return each.was

    return _each(actor, "batch.change_undone", list(known), change)


_FREE: Fields = {"held_at": None, "held_why": "", "held_note": ""}


def _require_moderated(batch: Batch) -> None:
    if batch.held_why != HeldWhy.MODERATION:
        raise BadRequest("it does not wait for approval")


def _clean(note: str) -> str:
    """On one line, without what PostgreSQL cannot keep."""
    note = " ".join(note.replace("\0", "").split())
    if len(note) > 500:
        raise BadRequest("A note may have 500 characters.", param="note")
    return note


def _each(
    actor: User | None,
    action: str,
    ids: Sequence[str],
    change: Change,
    then: Callable[[Batch], None] | None = None,
) -> Done:
    if len(ids) > MOST:
        raise BadRequest(f"At most {MOST} batches at a time.", param="batch")
    done = Done()
    for id in dict.fromkeys(ids):
        try:
            before = _one(actor, action, id, change, then)
        except BadRequest as error:
            done.skipped.append(f"{id[:64]}: {error.message}")
        else:
            done.changed.extend([before] if before else [])
    if done.changed:
        wakeups.gpu_workers()
    return done


def _one(
    actor: User | None,
    action: str,
    id: str,
    change: Change,
    then: Callable[[Batch], None] | None,
) -> Before | None:
    """Change one batch; None where it is so already."""
    with transaction.atomic(), scopes_disabled():
        batch = _locked(id)
        fields = change(batch)
        was = audit.snapshot(batch, [*fields, *(["status"] if then else [])])
        for name, value in fields.items():
            setattr(batch, name, value)
        if then is not None:
            then(batch)
        changes = audit.difference(batch, was)
        if not changes:
            return None
        batch.save(update_fields=list(fields))
        audit.record(
            action, actor=actor, target=batch, organization=batch.organization, changes=changes
        )
    return Before(id, was, {name: getattr(batch, name) for name in was})


def _locked(id: str) -> Batch:
    """The batch, which must still wait or run."""
    rows = Batch.objects.select_for_update(of=("self",)).select_related("organization")
    batch = None if "\0" in id else rows.filter(pk=id).first()
    if batch is None:
        raise BadRequest("there is no such batch")
    if batch.status not in WAITING:
        raise BadRequest(f"it is {Status(batch.status).label.lower()}")
    return batch


def as_kept(before: Before) -> dict[str, Any]:
    """As JSON, for a session that may undo it."""
    return {
        "batch": before.batch,
        "was": {name: _json(value) for name, value in before.was.items()},
        "now": {name: _json(value) for name, value in before.now.items()},
    }


def from_kept(kept: Mapping[str, Any]) -> Before:
    return Before(kept["batch"], _from_json(kept["was"]), _from_json(kept["now"]))


def _json(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _from_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: datetime.fromisoformat(value) if value and name.endswith("_at") else value
        for name, value in fields.items()
    }
