"""The pages of webhooks: endpoints, what was sent to them, and their dead letters.

What may be done to them is in `services/webhooks.py` and `services/deliveries.py`; the API has the
same in `webhook_api.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlencode, urlsplit

import orjson
from django.contrib import messages
from django.db.models import Q, QuerySet
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.utils import timezone
from django.views.decorators.debug import sensitive_variables
from django.views.decorators.http import require_http_methods, require_POST, require_safe
from django_scopes import scopes_disabled

from accounts import access, reveals
from accounts.access import Caller
from accounts.errors import ApiError, NotFound
from accounts.models import Organization, Project, User
from accounts.pages import PageRequest, is_typed, operator_page, page, require_valid, sent
from accounts.paging import page_of
from accounts.services import audit
from accounts.views.keys import tell
from batches.models import WebhookAttempt, WebhookDelivery, WebhookEndpoint
from batches.models.events import DeliveryState
from batches.queries import webhooks as queries
from batches.services import deliveries
from batches.services import webhooks as service
from batches.webhook_forms import (
    DeliveryForm,
    OperatorDeliveryForm,
    RotateForm,
    TestForm,
    WebhookForm,
)

PAGE_SIZE = 25
FEW = 10
"""Deliveries on the page of their endpoint."""
MOST_ATTEMPTS = 100
"""The newest of one delivery that are shown."""
MASKED = "•••"
LOOKS: Mapping[str, tuple[str, str]] = {
    DeliveryState.DELIVERED: ("green", "Delivered"),
    DeliveryState.RETRYING: ("azure", "On its way"),
    DeliveryState.DEAD: ("red", "Dead"),
}


@dataclass(frozen=True)
class Row:
    """An endpoint as a line of the list."""

    endpoint: WebhookEndpoint
    arrived: int
    sent: int

    @property
    def state(self) -> tuple[str, str]:
        """Its colour and words."""
        if not self.endpoint.enabled:
            return "secondary", "Switched off"
        return ("orange", "Failing") if self.endpoint.failing_since else ("green", "Works")

    @property
    def last_day(self) -> str:
        """As "98 % of 1,204"; nothing is sent where nothing happens."""
        if not self.sent:
            return "Nothing sent"
        return f"{100 * self.arrived // self.sent} % of {self.sent:,}"


@dataclass(frozen=True)
class Letter:
    """A delivery as a line of a list."""

    delivery: WebhookDelivery

    @property
    def colour(self) -> str:
        return LOOKS[self.delivery.state][0]

    @property
    def state(self) -> str:
        return LOOKS[self.delivery.state][1]

    @property
    def host(self) -> str:
        """Where it goes; the rest of an address may be as good as a password."""
        return urlsplit(self.delivery.endpoint.url).netloc


# --- Endpoints --------------------------------------------------------------------------------


@require_safe
@page
def webhooks(request: PageRequest, caller: Caller) -> HttpResponseBase:
    caller.require("webhooks.read")
    after = _after(request)
    mine = WebhookEndpoint.objects.filter(batch=None).select_related("project")
    found, more = page_of(mine, after, PAGE_SIZE, descending=True)
    ctx = {
        "rows": _rows(found),
        "after": after,
        "last": found[-1].pk if more else "",
        "dead": queries.dead_letters(caller),
    }
    return render(request, "batches/webhooks.html", ctx)


@require_http_methods(["GET", "HEAD", "POST"])
@sensitive_variables("secret")
@page
def webhook_create(request: PageRequest, caller: Caller) -> HttpResponseBase:
    caller.require("webhooks")
    projects = _projects()
    form = WebhookForm(sent(request), projects=projects)
    if form.is_valid():
        try:
            row, secret = service.create_webhook(actor=caller, **_fields(form, projects))
        except ApiError as error:
            tell(form, error, {"project_id": "project"})
        else:
            reveals.keep(request, row.pk, secret)
            return redirect("webhook_secret", row.pk)
    status = 400 if form.errors else 200
    return render(request, "batches/webhook_form.html", {"form": form}, status=status)


@require_safe
@page
def webhook(request: PageRequest, caller: Caller, webhook_id: str) -> HttpResponseBase:
    caller.require("webhooks.read")
    return _shown(request, _webhook(caller, webhook_id))


@require_http_methods(["GET", "HEAD", "POST"])
@page
def webhook_edit(request: PageRequest, caller: Caller, webhook_id: str) -> HttpResponseBase:
    caller.require("webhooks")
    row = _webhook(caller, webhook_id)
    projects = _projects(row)
    form = WebhookForm(sent(request), projects=projects, row=row)
    if form.is_valid():
        try:
            service.update_webhook(actor=caller, row=row, **_fields(form, projects))
        except ApiError as error:
            tell(form, error)
        else:
            messages.success(request, f"{form.cleaned_data['name']} is saved.")
            return redirect("webhook", row.pk)
    ctx = {"form": form, "webhook": row}
    return render(request, "batches/webhook_form.html", ctx, status=400 if form.errors else 200)


@require_safe
@sensitive_variables("secret")
@page
def webhook_secret(request: PageRequest, caller: Caller, webhook_id: str) -> HttpResponseBase:
    """Shows a new secret the first time that it is opened, and never again."""
    caller.require("webhooks")
    row = _webhook(caller, webhook_id)
    secret = reveals.take(request, row.pk)
    if not secret:
        messages.info(request, "A secret is shown once. If it was lost, make a new one.")
        return redirect("webhook", row.pk)
    return render(request, "batches/webhook_secret.html", {"webhook": row, "secret": secret})


@require_POST
@sensitive_variables("secret")
@page
def webhook_rotate(request: PageRequest, caller: Caller, webhook_id: str) -> HttpResponseBase:
    caller.require("webhooks")
    row, form = _webhook(caller, webhook_id), RotateForm(request.POST)
    require_valid(form)
    overlap = timedelta(hours=int(form.cleaned_data["overlap"]))
    row, secret = service.rotate_secret(actor=caller, row=row, overlap=overlap)
    reveals.keep(request, row.pk, secret)
    return redirect("webhook_secret", row.pk)


@require_POST
@page
def webhook_test(request: PageRequest, caller: Caller, webhook_id: str) -> HttpResponseBase:
    caller.require("webhooks")
    row, form = _webhook(caller, webhook_id), TestForm(request.POST)
    require_valid(form)
    receipt = service.test_webhook(
        actor=caller, row=row, event_type=form.cleaned_data["event_type"]
    )
    return _shown(request, row, form=form, receipt=receipt)


@require_POST
@page
def webhook_switch(request: PageRequest, caller: Caller, webhook_id: str) -> HttpResponseBase:
    """On, or off."""
    caller.require("webhooks")
    on = request.POST.get("to") == "on"
    row = service.update_webhook(actor=caller, row=_webhook(caller, webhook_id), enabled=on)
    said = "is sent to again, beginning with what waits" if on else "is sent nothing more"
    messages.success(request, f"{row.name} {said}.")
    return redirect("webhook", row.pk)


@require_POST
@page
def webhook_delete(request: PageRequest, caller: Caller, webhook_id: str) -> HttpResponseBase:
    caller.require("webhooks")
    row = _webhook(caller, webhook_id)
    if not is_typed(request, row.name, done="deleted"):
        return redirect("webhook", row.pk)
    service.delete_webhook(actor=caller, row=row)
    messages.success(request, f"{row.name} is deleted, with all that was sent to it.")
    return redirect("webhooks")


def _webhook(caller: Caller, id: str) -> WebhookEndpoint:
    related = ("organization", "project", "batch")
    return access.get(caller, WebhookEndpoint, id, param="webhook_id", related=related)


def _projects(row: WebhookEndpoint | None = None) -> list[Project]:
    """To choose from: also an archived one, where the endpoint is its."""
    choices = Q(archived_at=None) | Q(pk=row.project_id if row else None)
    return list(Project.objects.filter(choices).order_by("pk"))


def _fields(form: WebhookForm, projects: Sequence[Project]) -> dict[str, Any]:
    """As the services take them."""
    fields = {name: form.cleaned_data[name] for name in ("name", "url", "event_types")}
    fields |= {name: form.cleaned_data[name] for name in ("timeout", "per_minute")}
    fields["headers"] = form.headers_given
    if "project" in form.fields:
        chosen = form.cleaned_data["project"]
        fields["project"] = next((each for each in projects if each.pk == chosen), None)
    return fields


def _rows(endpoints: Sequence[WebhookEndpoint]) -> list[Row]:
    last_day = queries.last_day_of(endpoints)
    return [Row(each, *last_day.get(each.pk, (0, 0))) for each in endpoints]


def _shown(request: PageRequest, row: WebhookEndpoint, **more: Any) -> HttpResponseBase:
    """The endpoint's page; after a test with what the receiver said."""
    newest = WebhookDelivery.objects.filter(endpoint=row).select_related("event")
    old = row.old_secret_until
    ctx = {
        "webhook": row,
        "row": _rows([row])[0],
        "headers": [name for name, _ in _headers_of(row)],
        "old_secret_until": old if old and old > timezone.now() else None,
        "letters": [Letter(each) for each in newest.order_by("-pk")[:FEW]],
        "test_form": more.get("form") or TestForm({"event_type": row.event_types[0]}),
        "rotate_form": RotateForm(),
        "receipt": more.get("receipt"),
    }
    return render(request, "batches/webhook.html", ctx)


def _headers_of(row: WebhookEndpoint) -> list[tuple[str, str]]:
    """Those of the tenant's own: what they hold is secret."""
    return [(name, MASKED) for name in deliveries.headers_of(row)]


# --- Deliveries and dead letters --------------------------------------------------------------


@require_safe
@page
def webhook_deliveries(request: PageRequest, caller: Caller) -> HttpResponseBase:
    caller.require("webhooks.read")
    form, after = _delivery_form(request.GET), _after(request)
    mine = form.found.select_related("event", "endpoint")
    found, more = page_of(mine, after, PAGE_SIZE, descending=True)
    ctx = {
        "form": form,
        "letters": [Letter(each) for each in found],
        "after": after,
        "last": found[-1].pk if more else "",
        "query": urlencode(form.given),
        "filtered": bool(form.given),
        "dead": queries.dead_letters(caller),
        "retrying": queries.deliveries_in(caller, DeliveryState.RETRYING),
    }
    status = 400 if form.errors else 200
    return render(request, "batches/webhook_deliveries.html", ctx, status=status)


@require_safe
@page
def webhook_delivery(request: PageRequest, caller: Caller, delivery_id: str) -> HttpResponseBase:
    caller.require("webhooks.read")
    related = ("event", "endpoint")
    row = access.get(caller, WebhookDelivery, delivery_id, param="delivery_id", related=related)
    newest = WebhookAttempt.objects.filter(delivery=row).order_by("-pk")
    ctx = {
        "letter": Letter(row),
        "delivery": row,
        "payload": orjson.dumps(orjson.loads(row.event.body), option=orjson.OPT_INDENT_2).decode(),
        "headers": [*_headers_of(row.endpoint), *_own_headers(row)],
        "attempts": newest[:MOST_ATTEMPTS],
        "most": MOST_ATTEMPTS,
    }
    return render(request, "batches/webhook_delivery.html", ctx)


def _own_headers(row: WebhookDelivery) -> list[tuple[str, str]]:
    """Those that are ours; the two that differ with each attempt are told of, not shown."""
    return [
        ("content-type", deliveries.CONTENT_TYPE),
        ("user-agent", deliveries.USER_AGENT),
        ("webhook-id", row.event_id),
        ("webhook-timestamp", "the attempt's, in seconds since 1970"),
        ("webhook-signature", f"v1,{MASKED}"),
    ]


@require_POST
@page
def webhook_deliveries_replay(request: PageRequest, caller: Caller) -> HttpResponseBase:
    caller.require("webhooks")
    count = deliveries.replay(actor=caller, deliveries=_chosen(request))
    said = f"{count:,} {'is' if count == 1 else 'are'} sent again."
    messages.success(request, said if count else "Nothing of it can be sent again.")
    return _back(request)


@require_POST
@page
def webhook_deliveries_purge(request: PageRequest, caller: Caller) -> HttpResponseBase:
    caller.require("webhooks")
    count = deliveries.purge(actor=caller, deliveries=_chosen(request))
    said = f"{count:,} dead letter{'' if count == 1 else 's'} forgotten."
    messages.success(request, said if count else "None of it was dead: nothing is forgotten.")
    return _back(request)


def _chosen(request: PageRequest) -> QuerySet[WebhookDelivery]:
    """Those that were ticked; or, where all was asked for, what the page's filters find."""
    if request.POST.get("which") == "all":
        form = _delivery_form(request.POST)
        require_valid(form)
        return queries.oldest_of(form.found)
    ids = [id.replace("\0", "") for id in request.POST.getlist("ids")[: queries.MOST_DELIVERIES]]
    return WebhookDelivery.objects.filter(pk__in=ids)


def _back(request: PageRequest) -> HttpResponseBase:
    """To the one delivery whose page it was done on, else to the list as it was filtered."""
    if one := request.POST.get("one"):
        exists = WebhookDelivery.objects.filter(pk=one.replace("\0", "")).exists()
        return redirect("webhook_delivery", one) if exists else redirect("webhook_deliveries")
    given = _delivery_form(request.POST).given
    answer = redirect("webhook_deliveries")
    answer["Location"] += f"?{urlencode(given)}" if given else ""
    return answer


def _delivery_form(data: Mapping[str, Any]) -> DeliveryForm:
    """Always bound. A batch's own webhook is no choice, unless it is the chosen one."""
    given = {name: str(value).replace("\0", "") for name, value in data.items()}
    chosen = Q(batch=None) | Q(pk=given.get("endpoint", ""))
    endpoints = WebhookEndpoint.objects.filter(chosen).order_by("name", "pk")
    form = DeliveryForm(given, endpoints=list(endpoints.values_list("pk", "name")))
    form.is_valid()
    return form


def _after(request: PageRequest) -> str:
    return request.GET.get("after", "").replace("\0", "")


# --- Operators --------------------------------------------------------------------------------


@require_safe
@operator_page
def operator_webhooks(request: PageRequest, user: User) -> HttpResponseBase:
    """Dead letters of all tenants, without what is in them; looking is audited."""
    form, after = _operator_form(request), _after(request)
    organization = _organization(form)
    with scopes_disabled():
        dead = form.found
        if organization is not None:
            dead = dead.filter(organization=organization)
        audit.record("operator.looked", actor=user, organization=organization, label=request.path)
        related = dead.select_related("event", "endpoint", "organization")
        found, more = page_of(related, after, PAGE_SIZE, descending=True)
        count = WebhookDelivery.objects.filter(state=DeliveryState.DEAD).count()
    ctx = {
        "form": form,
        "letters": [Letter(each) for each in found],
        "after": after,
        "last": found[-1].pk if more else "",
        "query": urlencode(form.given),
        "filtered": bool(form.given),
        "dead": count,
    }
    status = 400 if form.errors else 200
    return render(request, "batches/operator_webhooks.html", ctx, status=status)


def _operator_form(request: PageRequest) -> OperatorDeliveryForm:
    given = {name: str(value).replace("\0", "") for name, value in request.GET.items()}
    form = OperatorDeliveryForm(given)
    form.is_valid()
    return form


def _organization(form: OperatorDeliveryForm) -> Organization | None:
    slug = form.cleaned_data.get("organization", "")
    if not slug:
        return None
    found = Organization.objects.filter(Q(slug=slug) | Q(pk=slug)).first()
    if found is None:
        raise NotFound(f"There is no organization {slug!r}.", param="organization")
    return found
