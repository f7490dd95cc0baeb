"""The pages of a batch's results: the list, searched or not, and one request beside its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlencode

from django.contrib import messages
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.http import require_safe

from accounts.access import Caller
from accounts.pages import PageRequest, page
from batches import rendering, results
from batches.forms.batches import ResultsForm
from batches.models import Batch
from batches.places import Place
from batches.rendering import Shown
from batches.results import Line, Results
from batches.views.batch import number, of

PAGE_SIZE = 20
LISTED, SHOWN = 32 * 1024, 256 * 1024
"""Bytes that are read of each request and each answer: for the list, and for a page of its own."""
LAST = 2**31 - 1


@dataclass(frozen=True)
class Result:
    """A request and its answer, ready to be shown."""

    line: Line

    @cached_property
    def request(self) -> Shown | None:
        text, size = self.line.request, self.line.request_bytes
        return None if text is None else rendering.request(text, whole=len(text) == size)

    @cached_property
    def answer(self) -> Shown | None:
        text, size = self.line.answer, self.line.answer_bytes
        return None if text is None else rendering.answer(text, whole=len(text) == size)

    @property
    def custom_id(self) -> str:
        """From whichever of the two could be read as a whole."""
        return next((it.custom_id for it in (self.answer, self.request) if it and it.custom_id), "")


@dataclass
class Listed:
    """A page of the list; the numbers are lines, for links, and 0 where there is no more."""

    rows: Sequence[Result] = ()
    newer: int = 0
    older: int = 0
    stopped_at: int = 0


@require_safe
@page
def batch_results(request: PageRequest, caller: Caller, batch_id: str) -> HttpResponseBase:
    caller.require("batches.read")
    detail = of(caller, batch_id)
    given = {name: str(value).replace("\0", "") for name, value in request.GET.items()}
    form = ResultsForm(given)
    wanted = form.cleaned_data if form.is_valid() else {}
    after, before = number(given.get("after")), number(given.get("before"))
    if wanted.get("line"):
        after, before = wanted["line"] - 1, 0
    kept = {"q": wanted.get("q") or "", "failed": "on" if wanted.get("failed") else ""}
    query = {name: value for name, value in kept.items() if value}
    ctx = {
        "row": detail,
        "batch": detail.batch,
        "tab": "results",
        "form": form,
        "page": _listed(detail.batch, after, before, **kept),
        "query": urlencode(query),
        "filtered": bool(query),
        "failed": kept["failed"],
        "moved": bool(after or before),
    }
    return render(request, "batches/batch_results.html", ctx, status=400 if form.errors else 200)


def _listed(batch: Batch, after: int, before: int, *, q: str, failed: str) -> Listed | None:
    """None where there are no results to show by line."""
    try:
        with results.opened(batch) as found:
            if found is None:
                return None
            if q:
                return _searched(found, q, after, failed=bool(failed))
            return _page(found, after, before, failed=bool(failed))
    except FileNotFoundError:  # it was finalized, or its files were purged, at this moment
        return None


def _page(found: Results, after: int, before: int, *, failed: bool) -> Listed:
    if before:
        places = found.before(before, PAGE_SIZE, failed=failed)
    else:
        places = found.after(after, PAGE_SIZE, failed=failed)
    if not places:
        return Listed(newer=LAST if after and found.before(LAST, 1, failed=failed) else 0)
    first, last = places[0].line, places[-1].line
    return Listed(
        rows=_read(found, places),
        newer=first if found.before(first, 1, failed=failed) else 0,
        older=last if found.after(last, 1, failed=failed) else 0,
    )


def _searched(found: Results, q: str, after: int, *, failed: bool) -> Listed:
    matches = results.search(found, q, after=after, count=PAGE_SIZE, failed=failed)
    rows, end = _read(found, matches.places), matches.go_on_after
    cut = end if len(rows) < PAGE_SIZE else 0
    return Listed(rows=rows, older=end, stopped_at=cut)


def _read(found: Results, places: Sequence[Place]) -> list[Result]:
    return [Result(line) for line in found.read(places, LISTED)]


@require_safe
@page
def batch_result(
    request: PageRequest, caller: Caller, batch_id: str, line: str
) -> HttpResponseBase:
    """A request beside its answer. `failed` makes its neighbours those that failed, too."""
    caller.require("batches.read")
    detail = of(caller, batch_id)
    failed = bool(request.GET.get("failed"))
    ctx = _one(detail.batch, number(line), failed=failed)
    if ctx is None:
        messages.warning(request, f"There is no result of line {line[:20]} (yet).")
        return redirect("batch_results", detail.batch.pk)
    ctx |= {
        "row": detail,
        "batch": detail.batch,
        "tab": "results",
        "query": "failed=on" if failed else "",
        "most": SHOWN,
    }
    return render(request, "batches/batch_result.html", ctx)


def _one(batch: Batch, line: int, *, failed: bool) -> dict[str, Any] | None:
    try:
        with results.opened(batch) as found:
            places = found.after(line - 1, 1, failed=False) if found and line else []
            if found is None or not places or places[0].line != line:
                return None
            [read] = found.read(places, SHOWN)
            before = found.before(line, 1, failed=failed)
            after = found.after(line, 1, failed=failed)
    except FileNotFoundError:
        return None
    return {
        "result": Result(read),
        "previous": before[0].line if before else 0,
        "next": after[0].line if after else 0,
    }
