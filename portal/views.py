"""The home page: the one page that brings together what the apps know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.conf import settings
from django.db.models import prefetch_related_objects
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.http import require_safe

from accounts.access import Caller
from accounts.pages import STOP_POLLING, PageRequest, page
from accounts.queries import Hour
from batches.models import Batch
from batches.queries.webhooks import dead_letters
from batches.views.batches import Row
from models_registry.queries import example_for
from portal import queries

SHOWN = 5
"""Batches of a kind; the list has the others."""


@require_safe
@page
def home(request: PageRequest, caller: Caller) -> HttpResponseBase:
    if not caller.may("batches.read"):  # a reviewer's way in is elsewhere
        return redirect("organization_settings")
    ctx = _now(request, caller)
    if request.htmx:
        status = 200 if ctx["live"] else STOP_POLLING
        return render(request, "portal/home.html#now", ctx, status=status)
    return render(request, "portal/home.html", ctx | _used(caller) | _limits(caller))


def _now(request: PageRequest, caller: Caller) -> dict[str, Any]:
    """What changes while one looks, and the first steps of who has not run a batch yet."""
    unfinished, failures = queries.unfinished(), queries.failures()
    running, waiting = unfinished.running[:SHOWN], unfinished.waiting[:SHOWN]
    prefetch_related_objects([*running, *waiting, *failures], "model", "input_file")
    ctx: dict[str, Any] = {
        "running": _rows(running),
        "waiting": _rows(waiting),
        "more": unfinished.total - len(running) - len(waiting),
        "live": unfinished.total,
        "failures": _rows(failures),
        "failing_models": queries.failing_models(caller.organization),
        "dead_letters": dead_letters(caller) if caller.may("webhooks.read") else 0,
    }
    if not unfinished and not queries.has_run():
        ctx |= {
            "first": True,
            "api_url": api_url(request),
            "model": example_for(caller.organization),
        }
    return ctx


def _rows(found: Sequence[Batch]) -> list[Row]:
    return [Row(batch, may_write=False) for batch in found]


def _used(caller: Caller) -> dict[str, Any]:
    if not caller.may("usage.read"):
        return {}
    hours = queries.hourly(caller.organization)
    day, week = queries.span("Last 24 hours", hours, 24), queries.span("Last 7 days", hours, 168)
    return {"spans": [day, week], "hours": _points(hours)}


def _points(hours: Sequence[Hour]) -> dict[str, Any]:
    """For the charts: moments in seconds since 1970, hours without use left out."""
    return {
        "now": int(queries.this_hour().timestamp()),
        "hours": [
            [int(each.hour.timestamp()), each.requests, each.input_tokens, each.output_tokens]
            for each in hours
        ],
    }


def _limits(caller: Caller) -> dict[str, Any]:
    if not caller.may("quotas.read"):
        return {}
    return {"allowances": queries.tightest(caller, 4)}


def api_url(request: PageRequest) -> str:
    """Where programs reach the API; in development the port may be any."""
    return f"{settings.BASE_URL}/v1" if settings.PRODUCTION else request.build_absolute_uri("/v1")
