"""The page of what was used, and its download.

What is summed is in `queries.py`; the API has the same in `api/usage.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from decimal import Decimal
from typing import Any
from urllib.parse import urlencode

from django.conf import settings
from django.http.response import HttpResponseBase
from django.shortcuts import render
from django.utils import timezone
from django.views.decorators.http import require_safe

from accounts import exports, queries
from accounts.access import Caller
from accounts.forms.usage import DaysForm, preset
from accounts.keys import redacted
from accounts.models import Organization
from accounts.pages import PageRequest, page, require_valid
from accounts.queries import GROUPS, Used

PRESETS = (("7", "7 days"), ("30", "30 days"), ("90", "90 days"), ("month", "This month"))
TOP = 20
"""Lines of a table; the rest is in its download."""
SERIES = 7
"""Models with a colour of their own in the chart."""


@dataclass(frozen=True)
class Days:
    """What was asked for: the days, and how a link says so."""

    since: date
    until: date
    chosen: str
    form: DaysForm

    @property
    def query(self) -> str:
        if self.chosen != "custom":
            return urlencode({"range": self.chosen})
        return urlencode({"since": self.since.isoformat(), "until": self.until.isoformat()})

    def __iter__(self) -> Any:
        count = (self.until - self.since).days + 1
        return (self.since + timedelta(days=number) for number in range(count))


@dataclass(frozen=True)
class Line:
    """One line of a table, or the totals."""

    used: Used
    label: str = ""
    note: str = ""

    @property
    def requests(self) -> str:
        return f"{self.used.requests:,}"

    @property
    def input_tokens(self) -> str:
        return f"{self.used.input_tokens:,}"

    @property
    def cached_tokens(self) -> str:
        return f"{self.used.cached_tokens:,}"

    @property
    def output_tokens(self) -> str:
        return f"{self.used.output_tokens:,}"

    @property
    def gpu_hours(self) -> str:
        return f"{self.used.gpu_hours:,.2f}"

    @property
    def cost(self) -> str:
        return f"{money(self.used.cost)} {settings.CURRENCY.upper()}"


@dataclass(frozen=True)
class Table:
    title: str
    heading: str
    by: str
    lines: Sequence[Line] = field(default_factory=list)
    more: int = 0


@require_safe
@page
def usage(request: PageRequest, caller: Caller) -> HttpResponseBase:
    caller.require("usage.read")
    days, organization = days_of(request), caller.organization
    daily = list(queries.usage(organization, days.since, days.until, by=["day", "model"]))
    ctx = {"days": days, "presets": PRESETS, "total": Line(queries.total(daily))}
    if daily:
        ctx |= {"chart": _chart(days, daily), "tables": _tables(organization, days, daily)}
    else:
        ctx |= {"first": queries.first_day_of_usage(organization)}
    status = 400 if days.form.is_bound and days.form.errors else 200
    return render(request, "accounts/usage.html", ctx, status=status)


@require_safe
@page
def usage_csv(request: PageRequest, caller: Caller) -> HttpResponseBase:
    """One of the page's tables in full, or without `by` the records that all of them are sums of."""
    caller.require("usage.read")
    days, asked = days_of(request), request.GET.get("by", "")
    require_valid(days.form)
    by = [asked] if asked in GROUPS else list(GROUPS)
    rows = queries.usage(caller.organization, days.since, days.until, by=by)
    slug, what = caller.organization.slug, f"-by-{asked}" if asked in GROUPS else ""
    filename = f"usage-{slug}-{days.since}-{days.until}{what}.csv"
    return exports.download(exports.usage_csv(rows, by), filename, "text/csv; charset=utf-8")


def money(cost: Decimal) -> str:
    """Two decimals; of less than one, as many as say something, up to six."""
    if cost == 0 or cost >= 1:
        return f"{cost:,.2f}"
    whole, _, decimals = f"{cost:.6f}".partition(".")
    return f"{whole}.{decimals.rstrip('0'):0<2}"


def days_of(request: PageRequest) -> Days:
    """The days that the address names; the last 30 where it names none that make sense."""
    today = timezone.now().date()
    if "since" in request.GET or "until" in request.GET:
        form = DaysForm(request.GET)
        if form.is_valid():
            return Days(form.cleaned_data["since"], form.cleaned_data["until"], "custom", form)
        return Days(*preset("30", today), "30", form)
    chosen = request.GET.get("range", "30")
    chosen = chosen if chosen in dict(PRESETS) else "30"
    since, until = preset(chosen, today)
    return Days(since, until, chosen, DaysForm(initial={"since": since, "until": until}))


def _chart(days: Days, daily: Sequence[Used]) -> dict[str, Any]:
    """The numbers of the two charts: tokens of the busiest models, and what they cost."""
    models = [line.label for line in _lines(_by_model(daily))]
    named, others = models[:SERIES], set(models[SERIES:])
    tokens: dict[tuple[str, date | None], int] = defaultdict(int)
    for row in daily:
        tokens["Other models" if row.model in others else row.model or "", row.day] += row.tokens
    labels = [*named, "Other models"] if others else named
    by_day = {line.used.day: line.used for line in _by_day(daily)}
    priced = any(row.cost for row in daily)
    name = f"Cost ({settings.CURRENCY.upper()})" if priced else "Requests"
    every_day, none = list(days), Used()
    second = [by_day.get(day, none) for day in every_day]
    return {
        "days": [f"{day:%-d %b}" for day in every_day],
        "tokens": [
            {"label": label, "data": [tokens.get((label, day), 0) for day in every_day]}
            for label in labels
        ],
        "second": {
            "label": name,
            "data": [float(used.cost) if priced else used.requests for used in second],
        },
    }


def _tables(organization: Organization, days: Days, daily: Sequence[Used]) -> list[Table]:
    # What they used is added up once in the database, and the little that comes of it here.
    rows = queries.usage_by_whom(organization, days.since, days.until)
    return [
        _table("By model", "Model", "model", _by_model(daily)),
        _table("By project", "Project", "project", map(_of_project, _grouped(rows, "project"))),
        _table("By person", "Person", "user", map(_of_person, _grouped(rows, "user"))),
        _table("By API key", "API key", "key", map(_of_key, _grouped(rows, "key"))),
        Table("By day", "Day", "day", list(reversed(_by_day(daily)))),
    ]


def _grouped(rows: Sequence[Used], group: str) -> list[Used]:
    """The rows summed by one of `GROUPS`."""
    fields, found = list(GROUPS[group]), defaultdict(list)
    for row in rows:
        found[tuple(getattr(row, name) for name in fields)].append(row)
    return [
        replace(queries.total(each), **dict(zip(fields, values, strict=True)))
        for values, each in found.items()
    ]


def _table(title: str, heading: str, by: str, lines: Iterable[Line]) -> Table:
    found = _lines(lines)
    return Table(title, heading, by, found[:TOP], max(len(found) - TOP, 0))


def _lines(lines: Iterable[Line]) -> list[Line]:
    """Those with the most tokens first."""
    return sorted(lines, key=lambda line: (-line.used.tokens, -line.used.requests, line.label))


def _summed(rows: Sequence[Used], name: str) -> dict[Any, Used]:
    found = defaultdict(list)
    for row in rows:
        found[getattr(row, name)].append(row)
    return {value: queries.total(each) for value, each in found.items()}


def _by_model(daily: Sequence[Used]) -> list[Line]:
    return [Line(used, model) for model, used in _summed(daily, "model").items()]


def _by_day(daily: Sequence[Used]) -> list[Line]:
    return [
        Line(Used(**vars(used) | {"day": day}), f"{day:%-d %b %Y}")
        for day, used in _summed(daily, "day").items()
    ]


def _of_project(used: Used) -> Line:
    return Line(used, used.project_name or "")


def _of_person(used: Used) -> Line:
    return Line(used, used.email or "Service keys", "" if used.email else "belong to no person")


def _of_key(used: Used) -> Line:
    if used.api_key_id is None:
        return Line(used, "No key", "used from these pages")
    return Line(used, used.key_name or "", redacted(used.key_prefix or ""))
