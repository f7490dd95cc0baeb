"""The workers' page for platform operators: how each is, what it does, and what they ask of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from django.contrib import messages
from django.http import Http404
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_POST, require_safe

from accounts.errors import ApiError, NotFound
from accounts.models import User
from accounts.pages import PageRequest, operator_page
from models_registry.models import ModelLoad
from worker import queries, services
from worker.models import Health, Worker, WorkerState
from worker.queries import Running, Swaps

PAGE_SIZE = 12
LOOKS: Mapping[str, tuple[str, str]] = {
    WorkerState.STARTING: ("azure", "Starting"),
    WorkerState.IDLE: ("secondary", "Idle"),
    WorkerState.LOADING: ("azure", "Loading a model"),
    WorkerState.RUNNING: ("blue", "Running"),
    WorkerState.DRAINED: ("yellow", "Drained"),
    WorkerState.STOPPED: ("secondary", "Stopped"),
}
"""The colour and the word of each state."""
ALL: Mapping[str, tuple[Callable[..., object], str]] = {
    "drain": (services.drain, "Asked {} to finish what they have and begin nothing more."),
    "resume": (services.resume, "Asked {} to take work again."),
}
"""What all workers that were found can be asked, and what is said of it."""


@dataclass(frozen=True)
class Row:
    """A worker as a card of the page."""

    worker: Any
    """With `is_alive` and `silent`, as `queries.workers` gives it."""
    running: list[Running] = field(default_factory=list)
    swaps: Swaps = field(default_factory=Swaps)
    loads: list[ModelLoad] = field(default_factory=list)

    @property
    def state(self) -> tuple[str, str]:
        if not self.worker.is_alive and self.worker.state != WorkerState.STOPPED:
            return "red", "Silent"
        return LOOKS[self.worker.state]

    @property
    def is_silent(self) -> bool:
        return self.state[1] == "Silent"

    @property
    def silent_seconds(self) -> int:
        return max(0, int(self.worker.silent.total_seconds()))

    @property
    def is_draining(self) -> bool:
        return bool(self.worker.draining) and self.worker.state != WorkerState.DRAINED

    @property
    def health(self) -> str:
        """What is wrong with its GPUs, in words; '' for nothing."""
        if self.worker.health in ("", Health.OK):
            return ""
        return f"{Health(self.worker.health).label} {self.worker.health_why}".strip()

    @property
    def draining_means(self) -> str:
        """What draining it now means, before it is done."""
        chunks = sum(each.chunks for each in self.running)
        has = {0: "It works on nothing now", 1: "It finishes the chunk that it works on now"}.get(
            chunks, f"It finishes the {chunks:,} chunks that it works on now"
        )
        return f"{has} and begins nothing more, over restarts too, until it is resumed."

    @property
    def memory_percent(self) -> int | None:
        total = self.worker.memory_total
        return round(100 * self.worker.memory_used / total) if total else None

    @property
    def memory(self) -> str:
        used, total = self.worker.memory_used, self.worker.memory_total
        return f"{used / 1024:.1f} of {total / 1024:.1f} GiB" if total else "not known"


def _asked(request: PageRequest) -> tuple[str, str, str]:
    """What of the workers is shown: the kind, the text that is looked for, after which name."""
    show, text, after = (
        request.GET.get(key, "").replace("\0", "") for key in ("show", "q", "after")
    )
    return show, text.strip()[:150], after


@require_safe
@operator_page
def operator_workers(request: PageRequest, user: User) -> HttpResponseBase:
    show, text, after = _asked(request)
    rows, more = _rows(show, text, after)
    found = {key: value for key, value in (("show", show), ("q", text)) if value}
    ctx = {
        "rows": rows,
        "found": queries.find_workers(show, text).count(),
        "fleet": queries.fleet(),
        "kinds": [(kind, words) for kind, (words, _) in queries.SHOWN.items()],
        "show": show,
        "q": text,
        "after": after,
        "here": request.GET.urlencode(),
        "first": urlencode(found),
        "next": urlencode(found | {"after": rows[-1].worker.name}) if more else "",
    }
    template = "worker/workers.html"
    return render(request, f"{template}#rows" if request.htmx else template, ctx)


def _rows(show: str, text: str, after: str) -> tuple[list[Row], bool]:
    """One page by name, and whether there are more, in as many queries for one as for many."""
    found = list(queries.find_workers(show, text).filter(name__gt=after)[: PAGE_SIZE + 1])
    shown = found[:PAGE_SIZE]
    names = [worker.name for worker in shown]
    running, swaps = queries.running_on(names), queries.swaps_of(names)
    loads = queries.last_loads(names)
    return [
        Row(
            worker,
            running.get(worker.name, []),
            swaps.get(worker.name, Swaps()),
            loads.get(worker.name, []),
        )
        for worker in shown
    ], len(found) > PAGE_SIZE


@require_POST
@operator_page
def operator_worker_drain(request: PageRequest, user: User, worker_id: int) -> HttpResponseBase:
    said = "{} finishes what it has and begins nothing more."
    return _ask(request, worker_id, said, lambda name: services.drain(actor=user, name=name))


@require_POST
@operator_page
def operator_worker_resume(request: PageRequest, user: User, worker_id: int) -> HttpResponseBase:
    said = "{} takes work again."
    return _ask(request, worker_id, said, lambda name: services.resume(actor=user, name=name))


@require_POST
@operator_page
def operator_worker_unload(request: PageRequest, user: User, worker_id: int) -> HttpResponseBase:
    said = "{} unloads its models as soon as it has nothing in hand."
    return _ask(request, worker_id, said, lambda name: services.unload(actor=user, name=name))


@require_POST
@operator_page
def operator_worker_forget(request: PageRequest, user: User, worker_id: int) -> HttpResponseBase:
    said = "{} is forgotten."
    return _ask(request, worker_id, said, lambda name: services.forget(actor=user, name=name))


@require_POST
@operator_page
def operator_workers_all(request: PageRequest, user: User, action: str) -> HttpResponseBase:
    """Drain or resume all workers that are found, on whatever page."""
    if action not in ALL:
        raise Http404
    service, said = ALL[action]
    show, text, _ = _asked(request)
    names = list(queries.find_workers(show, text).values_list("name", flat=True))
    for name in names:
        with suppress(NotFound):  # forgotten meanwhile
            service(actor=user, name=name)
    messages.success(request, said.format(f"{len(names)} worker{'' if len(names) == 1 else 's'}"))
    return redirect(f"{reverse('operator_workers')}?{request.GET.urlencode()}".rstrip("?"))


def _ask(
    request: PageRequest, worker_id: int, said: str, service: Callable[[str], object]
) -> HttpResponseBase:
    worker = Worker.objects.filter(pk=worker_id).first()
    if worker is None:
        raise Http404
    try:
        service(worker.name)
    except ApiError as error:
        messages.error(request, error.message)
    else:
        messages.success(request, said.format(worker.name))
    return redirect(f"{reverse('operator_workers')}?{request.GET.urlencode()}".rstrip("?"))
