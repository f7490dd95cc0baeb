"""Pausing and draining an organization's or a model's work, by platform operators.

Paused, nothing of it is leased and what runs is given back within a heartbeat; draining, what runs is
finished first. Real-time requests and deadlines go on as they were.
"""

from __future__ import annotations

from django.db import transaction
from django_scopes import scopes_disabled

from accounts.errors import BadRequest, NotFound
from accounts.models import Organization, User
from accounts.services import audit
from batches import wakeups
from batches.models import Share
from models_registry.models import Halt, Model

_ACTIONS = {Halt.PAUSED: "paused", Halt.DRAINING: "draining", "": "resumed"}


@transaction.atomic
def halt_organization(*, actor: User | None, organization: Organization, halt: str) -> Share:
    """Pause or drain all of an organization's batches; '' lets them go on."""
    _check(halt)
    with scopes_disabled():
        share, _ = Share.objects.select_for_update().get_or_create(organization=organization)
        before = audit.snapshot(share, ["halt"])
        share.halt = halt
        if changes := audit.difference(share, before):
            share.save(update_fields=["halt"])
            wakeups.gpu_workers()
            audit.record(
                f"queue.organization_{_ACTIONS[halt]}",
                actor=actor,
                target=organization,
                organization=organization,
                changes=changes,
            )
    return share


@transaction.atomic
def halt_model(*, actor: User | None, name: str, halt: str) -> Model:
    """Pause or drain all batches of a model; '' lets them go on."""
    _check(halt)
    found = None if "\0" in name else Model.objects.select_for_update().filter(name=name).first()
    if found is None:
        raise NotFound(f"There is no model {name[:64]!r}.", param="name")
    before = audit.snapshot(found, ["halt"])
    found.halt = halt
    if changes := audit.difference(found, before):
        found.save(update_fields=["halt"])  # not `updated_at`: no worker has to load it anew
        wakeups.gpu_workers()
        audit.record(f"queue.model_{_ACTIONS[halt]}", actor=actor, target=found, changes=changes)
    return found


def _check(halt: str) -> None:
    if halt not in _ACTIONS:
        raise BadRequest("halt must be paused, draining or empty.", param="halt")
