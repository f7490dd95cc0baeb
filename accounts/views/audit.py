"""The pages of the audit: an organization's own, and the operators' over all of them.

Writing it, and what one event says, is in `services/audit.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import orjson
from django.db.models import Q, QuerySet, Subquery
from django.http.response import HttpResponseBase
from django.shortcuts import render
from django.utils import timezone
from django.views.decorators.http import require_safe
from django_scopes import scopes_disabled

from accounts import exports
from accounts.access import Caller
from accounts.errors import NotFound
from accounts.forms.audit import AuditForm, OperatorAuditForm
from accounts.models import AuditEvent, Organization, User
from accounts.models.audit import Via
from accounts.pages import PageRequest, operator_page, page, require_valid
from accounts.paging import page_of
from accounts.services import audit as service

PAGE_SIZE = 25
PLATFORM = "platform"
"""In the operators' filter: the chain of no organization; one of that slug is found by its id."""
HOW = {
    Via.SESSION: "signed in on these pages",
    Via.API_KEY: "with an API key",
    Via.TOKEN: "with an access token",
    Via.OPERATOR: "as a platform operator",
    Via.SYSTEM: "by itself",
}


@dataclass(frozen=True)
class Shown:
    """An event as a line that opens."""

    event: AuditEvent
    organization: str = ""

    @property
    def how(self) -> str:
        return HOW[Via(self.event.via)]

    @property
    def changes(self) -> list[tuple[str, str, str]]:
        """Field, before, after; what is kept in another form is shown as it is."""
        kept = self.event.changes
        pairs = kept.items() if isinstance(kept, dict) else [("changes", kept)]
        return [(str(name), *_before_and_after(value)) for name, value in pairs]


def _before_and_after(value: Any) -> tuple[str, str]:
    if isinstance(value, list) and len(value) == 2:
        return _said(value[0]), _said(value[1])
    return "", _said(value)


def _said(value: Any) -> str:
    if value is None or value == "":
        return "—"
    if isinstance(value, str):
        return value
    return orjson.dumps(value).decode()


@require_safe
@page
def audit(request: PageRequest, caller: Caller) -> HttpResponseBase:
    caller.require("audit.read")
    form = _form(request, AuditForm)
    chain = AuditEvent.objects.filter(organization=caller.organization)
    wanted = chain.filter(form.wanted)
    after = _after(request)
    if after:  # by number: ids made within a millisecond are in no order
        wanted = wanted.filter(number__lt=Subquery(chain.filter(pk=after).values("number")))
    found = list(wanted.order_by("-number")[: PAGE_SIZE + 1])
    rows = [Shown(event) for event in found[:PAGE_SIZE]]
    return _page(request, form, rows, more=len(found) > PAGE_SIZE, export="audit_export")


@require_safe
@page
def audit_export(request: PageRequest, caller: Caller) -> HttpResponseBase:
    """All that the filters find, oldest first, as JSON lines."""
    caller.require("audit.read")
    form = _form(request, AuditForm)
    require_valid(form)
    chain = AuditEvent.objects.filter(organization=caller.organization)
    return _export(form, chain, caller.organization.slug)


@require_safe
@operator_page
def operator_audit(request: PageRequest, user: User) -> HttpResponseBase:
    form = _form(request, OperatorAuditForm)
    with scopes_disabled():
        events = _chain_of(form, user, request.path).select_related("organization")
        wanted = events.filter(form.wanted)
        found, more = page_of(wanted, _after(request), PAGE_SIZE, descending=True)
    rows = [Shown(event, _organization_name(event)) for event in found]
    return _page(request, form, rows, more=more, export="operator_audit_export")


@require_safe
@operator_page
def operator_audit_export(request: PageRequest, user: User) -> HttpResponseBase:
    form = _form(request, OperatorAuditForm)
    require_valid(form)
    with scopes_disabled():
        events = _chain_of(form, user, request.path)
        name = form.cleaned_data.get("organization") or "all"
        return _export(form, events, name)


def _chain_of(form: AuditForm, user: User, path: str) -> QuerySet[AuditEvent]:
    """The events of the chain that was asked for; looking at it is written down there first."""
    slug = form.cleaned_data.get("organization", "") if form.is_bound else ""
    if slug in ("", PLATFORM):
        service.record("operator.looked", actor=user, label=path)
        return AuditEvent.objects.filter(organization=None) if slug else AuditEvent.objects.all()
    organization = Organization.objects.filter(Q(slug=slug) | Q(pk=slug)).first()
    if organization is None:
        raise NotFound(f"There is no organization {slug!r}.", param="organization")
    service.record("operator.looked", actor=user, organization=organization, label=path)
    return AuditEvent.objects.filter(organization=organization)


def _organization_name(event: AuditEvent) -> str:
    """A purged organization's events are left with its id."""
    return str(event.organization or event.organization_id or "Platform")


def _form(request: PageRequest, kind: type[AuditForm]) -> AuditForm:
    """Always bound, so that what was understood of it is there even where some is wrong."""
    given = {name: str(value).replace("\0", "") for name, value in request.GET.items()}
    form = kind(given)
    form.is_valid()
    return form


def _after(request: PageRequest) -> str:
    return request.GET.get("after", "").replace("\0", "")


def _page(
    request: PageRequest, form: AuditForm, rows: Sequence[Shown], *, more: bool, export: str
) -> HttpResponseBase:
    given = {name: form.data[name] for name in form.fields if form.data.get(name)}
    ctx = {
        "form": form,
        "rows": rows,
        "after": _after(request),
        "last": rows[-1].event.pk if more else "",
        "query": urlencode(given),
        "filtered": bool(given),
        "export": export,
    }
    template = "operator_audit" if export.startswith("operator") else "audit"
    status = 400 if form.errors else 200
    return render(request, f"accounts/{template}.html", ctx, status=status)


def _export(form: AuditForm, events: QuerySet[AuditEvent], name: str) -> HttpResponseBase:
    wanted = events.filter(form.wanted).order_by("organization", "number")
    lines = exports.audit_jsonl(wanted.iterator(chunk_size=500))
    filename = f"audit-{name}-{timezone.now():%Y-%m-%d}.jsonl"
    return exports.download(lines, filename, "application/jsonl")
