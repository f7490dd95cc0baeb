"""Writes of the workers' rows: who has a name, what a worker says of itself, what operators want.

A name belongs to one process at a time (`life`). A process that finds its name with another one
that is alive ends itself; one that has been silent for a lease, or is known to be gone, has lost it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from django.db import transaction
from django.db.models.functions import Now

from accounts.errors import BadRequest, NotFound
from accounts.models import User
from accounts.services import audit
from worker import identity, queries
from worker.identity import Identity
from worker.models import Worker, WorkerState


class NameTaken(Exception):
    """Another process has this name and is alive; the message says where it is."""


_ANEW = {"exit_when_drained": False, "unload_asked": False, "error": ""}
"""What was said to a process that is gone."""

# --- By the workers themselves --------------------------------------------------------------


@transaction.atomic
def claim(me: Identity) -> Worker:
    """Take the worker's name; raises `NameTaken` while another process that is alive has it.

    Of two that come at once, one gets it. What operators said of this worker (draining) stays.
    """
    columns = {**asdict(me), "state": WorkerState.STARTING, "heartbeat_at": Now()}
    rows = Worker.objects.select_for_update()
    row, made = rows.get_or_create(name=me.name, defaults={**columns, "started_at": Now()})
    if made or row.life == me.life:
        return row
    if _is_alive(row) and not identity.has_ended(row.life):
        raise NameTaken(f"{row.name} runs on {row.host} (pid {row.pid}); choose another name.")
    rows.filter(pk=row.pk).update(**columns, started_at=Now(), **_ANEW)
    return rows.get(pk=row.pk)


def beat(me: Identity, **said: Any) -> Worker | None:
    """Write what the worker says of itself; None when the name is no longer this process's."""
    mine = Worker.objects.filter(name=me.name, life=me.life)
    mine.update(**said, heartbeat_at=Now())
    return mine.first()


def unload_heard(me: Identity) -> None:
    """The worker has passed on to its loop that it is to unload."""
    Worker.objects.filter(name=me.name, life=me.life).update(unload_asked=False)


def _is_alive(row: Worker) -> bool:
    return Worker.objects.filter(queries.heard_of(), pk=row.pk).exists()


# --- By operators ---------------------------------------------------------------------------


@transaction.atomic
def drain(*, actor: User | None, name: str, exit_when_drained: bool = False) -> Worker:
    """Let it finish the chunks that it has and lease no more, over restarts too, until `resume`.

    Its state says `drained` when nothing is left; with `exit_when_drained` its process ends then.
    """
    row = _locked(name)
    before = audit.snapshot(row, ["draining", "exit_when_drained"])
    row.draining, row.exit_when_drained = True, exit_when_drained
    if not before["draining"] and row.state == WorkerState.DRAINED:
        row.state = WorkerState.IDLE  # of an earlier drain; its next beat tells how it is
    return _changed(row, "worker.drained", before, actor)


@transaction.atomic
def resume(*, actor: User | None, name: str) -> Worker:
    """Let it lease again."""
    row = _locked(name)
    before = audit.snapshot(row, ["draining", "exit_when_drained"])
    row.draining = row.exit_when_drained = False
    return _changed(row, "worker.resumed", before, actor)


@transaction.atomic
def unload(*, actor: User | None, name: str) -> Worker:
    """Ask it to end its models, awake and asleep, once nothing is in hand; its next beat hears it.

    What waits has it load again: drain it first to keep its GPU free. Refused of one that is silent.
    """
    row = _locked(name)
    if not _is_alive(row):
        raise BadRequest(f"{name} is not running: it has nothing loaded.")
    if not row.unload_asked:
        row.unload_asked = True
        row.save(update_fields=["unload_asked"])
        audit.record("worker.unload_asked", actor=actor, target=row)
    return row


@transaction.atomic
def forget(*, actor: User | None, name: str) -> None:
    """Delete the row of a worker that will not come back; refused while it is alive."""
    row = _locked(name)
    if _is_alive(row):
        raise BadRequest(f"{name} is alive on {row.host}: stop it first.")
    audit.record("worker.forgotten", actor=actor, target=row)
    row.delete()


def _locked(name: str) -> Worker:
    row = Worker.objects.select_for_update().filter(name=name).first()
    if row is None:
        raise NotFound(f"There is no worker {name!r}.")
    return row


def _changed(row: Worker, action: str, before: dict[str, Any], actor: User | None) -> Worker:
    row.save(update_fields=["draining", "exit_when_drained", "state"])
    if changes := audit.difference(row, before):
        audit.record(action, actor=actor, target=row, changes=changes)
    return row
