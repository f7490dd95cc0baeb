"""The pages of the models that an organization may use, with a box to try one in.

They are here, not in the registry: where a model is loaded, and what answers it, is known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from django.conf import settings
from django.http.response import HttpResponseBase
from django.shortcuts import render
from django.views.decorators.http import require_http_methods, require_safe

from accounts import throttling
from accounts.access import Caller
from accounts.errors import ApiError, BadRequest, NotFound
from accounts.pages import PageRequest, page, sent
from accounts.services.quotas import Prices
from batches.forms.models import TryForm
from batches.queries.queue import Whereabouts, whereabouts
from batches.services import trying
from batches.services.validation import ENDPOINTS
from models_registry.fit import context_of
from models_registry.models import Measurement, Model, Task
from models_registry.queries import find_offered, offered_to, prices_of

STATES: Mapping[str, tuple[str, str, str]] = {
    "loaded": ("green", "circle-check", "Loaded"),
    "loading": ("blue", "hourglass", "Loading"),
    "asleep": ("azure", "moon", "Asleep"),
    "failed": ("red", "alert-triangle", "Could not be loaded"),
    "idle": ("secondary", "clock", "Loads when needed"),
}
"""The colour, the icon and the words of each state."""


@dataclass(frozen=True)
class Offer:
    """A model as its line and its page show it."""

    model: Model
    where: Whereabouts

    @property
    def state(self) -> str:
        if self.where.loaded:
            return "loaded"
        if self.where.loading:
            return "loading"
        if self.model.load_error:
            return "failed"
        return "asleep" if self.where.asleep else "idle"

    @property
    def colour(self) -> str:
        return STATES[self.state][0]

    @property
    def icon(self) -> str:
        return STATES[self.state][1]

    @property
    def state_said(self) -> str:
        return STATES[self.state][2]

    @property
    def context(self) -> int | None:
        """Tokens of the longest request; None: the portal does not know."""
        options = [self.model.engine_args, *(each.settled for each in self.measured)]
        set_by_hand = next((each["max_model_len"] for each in options if _has_length(each)), None)
        return set_by_hand or context_of(self.model.source, self.model.revision)

    @property
    def measured(self) -> Sequence[Measurement]:
        return [each for each in self.model.measurements.all() if not each.unfit_why]

    @property
    def tokens_per_second(self) -> float | None:
        """On the fastest kind of GPU that it was measured on."""
        speeds = [each.tokens_per_second for each in self.measured if each.tokens_per_second]
        return max(speeds, default=self.model.tokens_per_second)

    @property
    def load_seconds(self) -> float | None:
        return max((each.load_seconds for each in self.measured if each.load_seconds), default=None)

    @property
    def prices(self) -> Prices:
        return prices_of(self.model)

    @property
    def is_free(self) -> bool:
        return not (self.prices.input or self.prices.cached or self.prices.output)

    @property
    def price_in(self) -> str:
        return _money(self.prices.input)

    @property
    def price_cached(self) -> str:
        return _money(self.prices.cached)

    @property
    def price_out(self) -> str:
        return _money(self.prices.output)

    @property
    def endpoints(self) -> list[str]:
        return sorted(ENDPOINTS[Task(self.model.task)])


def _has_length(options: Any) -> bool:
    return isinstance(options, dict) and type(options.get("max_model_len")) is int


def _money(price: Decimal) -> str:
    """As many decimals as the price has, but never fewer than two."""
    whole, _, decimals = f"{price:,.6f}".partition(".")
    return f"{whole}.{decimals.rstrip('0'):0<2} {settings.CURRENCY.upper()}"


@require_safe
@page
def models(request: PageRequest, caller: Caller) -> HttpResponseBase:
    caller.require("models.read")
    known = whereabouts()
    offered = offered_to(caller.organization).prefetch_related("measurements")
    ctx = {"offers": [Offer(each, known[each.name]) for each in offered]}
    return render(request, "batches/models.html", ctx)


@require_http_methods(["GET", "HEAD", "POST"])
@page
def model(request: PageRequest, caller: Caller, name: str) -> HttpResponseBase:
    caller.require("inference" if request.method == "POST" else "models.read")
    found = find_offered(caller.organization, name)
    if found is None:
        raise NotFound("There is no such model for your organization.", code="model_not_found")
    if request.method == "POST" and found.task != Task.CHAT:
        raise BadRequest(f"{name} is no chat model: ask it by a batch or by the API.")
    form = TryForm(sent(request))
    ctx: dict[str, Any] = {"offer": Offer(found, whereabouts()[name]), "form": form}
    status = 200
    if form.is_valid():
        try:
            ctx["tried"] = _tried(request, caller, found, form)
        except ApiError as error:
            ctx |= {"refused": error, "wait": error.headers.get("Retry-After")}
            status = error.status
    elif form.is_bound:
        status = 400
    if request.htmx:  # what it put in place of the answer says what was wrong
        return render(request, "batches/model.html#try", ctx)
    return render(request, "batches/model.html", ctx, status=status)


def _tried(request: PageRequest, caller: Caller, found: Model, form: TryForm) -> trying.Tried:
    throttling.count(request, caller)
    return trying.try_model(
        actor=caller,
        model=found,
        prompt=form.cleaned_data["prompt"],
        most_tokens=form.cleaned_data["most_tokens"],
    )
