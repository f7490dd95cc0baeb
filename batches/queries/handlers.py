"""Reads of result handlers and their runs."""

from __future__ import annotations

from datetime import datetime

from django.db.models import Count, Min, Q, QuerySet

from batches.models import Batch, HandlerRun, ResultHandler
from batches.models.handlers import RunState


def result_handlers() -> list[ResultHandler]:
    """The organization's handlers, in order; inside its scope."""
    return list(ResultHandler.objects.select_related("project").order_by("position", "pk"))


def handlers_for(batch: Batch, chosen: frozenset[str] | None) -> QuerySet[ResultHandler]:
    """The handlers that have the batch's results, in order: those named, else those by default."""
    mine = ResultHandler.objects.filter(
        Q(project=None) | Q(project=batch.project_id), organization=batch.organization_id
    ).filter(enabled=True)
    named = Q(by_default=True) if chosen is None else Q(name__in=chosen)
    return mine.filter(named).order_by("position", "pk")


def handler_runs(batch: Batch) -> list[HandlerRun]:
    """The batch's runs, in order, with their handlers; inside the organization's scope."""
    runs = HandlerRun.objects.filter(batch=batch).select_related("handler")
    return list(runs.order_by("position", "pk"))


def runs_to_take() -> QuerySet[HandlerRun]:
    """Runs that are not over, of organizations and by handlers that may work."""
    return HandlerRun.objects.filter(
        state__in=(RunState.WAITING, RunState.RUNNING),
        handler__enabled=True,
        organization__suspended_at=None,
        organization__deleted_at=None,
    ).select_related(
        "organization",
        "handler",
        "batch__project",
        "batch__user",
        "batch__api_key",
        "batch__model",
        "batch__input_file",
        "batch__output_file",
        "batch__error_file",
    )


def batches_to_handle(now: datetime, at_once: int) -> QuerySet[HandlerRun, str]:
    """The ids of batches with a run that is due, those that wait longest first; none of
    organizations that have so many runs already, behind which the others' would be too far down."""
    due = Q(next_attempt_at__lte=now) | Q(busy_until__lt=now)
    full = _runs_held(now).values("organization").annotate(held=Count("pk"))
    full = full.filter(held__gte=at_once).values("organization")
    runs = runs_to_take().select_related(None).filter(due).exclude(organization__in=full)
    found = runs.values_list("batch", flat=True)
    return found.annotate(since=Min("created_at")).order_by("since")


def runs_at_once(organization_id: str, now: datetime) -> int:
    """How many runs of the organization are being worked on."""
    return _runs_held(now).filter(organization=organization_id).count()


def _runs_held(now: datetime) -> QuerySet[HandlerRun]:
    return HandlerRun.objects.filter(state=RunState.RUNNING, busy_until__gte=now)
