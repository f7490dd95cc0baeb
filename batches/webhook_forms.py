"""The forms of webhooks' pages; services check what their fields mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from django import forms
from django.db.models import QuerySet
from django.utils.html import format_html

from accounts.models import Project
from batches.models import WebhookDelivery, WebhookEndpoint
from batches.models.events import DeliveryState, EventType
from batches.queries import webhooks as queries
from batches.services.webhooks import OF_BATCHES, OF_BATCHES_ENDS

ALL_PROJECTS = ""
OVERLAPS = [("0", "At once"), ("1", "In an hour"), ("24", "In a day"), ("168", "In a week")]
MEANINGS = {
    EventType.BATCH_COMPLETED: "every request was run",
    EventType.BATCH_FAILED: "its input could not be used",
    EventType.BATCH_EXPIRED: "its window ended first",
    EventType.BATCH_CANCELLED: "somebody stopped it",
    EventType.BATCH_IN_PROGRESS: "it was checked, and may run",
    EventType.BATCH_PROGRESS: "a share of its requests is answered",
    EventType.FILE_EXPIRED: "a file's time is over",
    EventType.MODEL_READY: "a model loads now",
    EventType.MODEL_FAILED: "a model cannot be loaded any more",
    EventType.QUOTA_THRESHOLD: "80 % or 100 % of a month's quota is used",
    EventType.WEBHOOK_DISABLED: "a webhook was given up",
}


class WebhookForm(forms.Form):
    """All of an endpoint but its secret. Its headers come in, and are never shown again."""

    name = forms.CharField(max_length=150, help_text="What it is for, as <em>nightly import</em>.")
    url = forms.CharField(
        label="Address",
        max_length=2000,
        help_text="Where we send to, with <code>https://</code>.",
        widget=forms.URLInput({"spellcheck": "false", "autocomplete": "off"}),
    )
    event_types = forms.MultipleChoiceField(
        label="Events", widget=forms.CheckboxSelectMultiple({"class": "form-check-input"})
    )
    project = forms.ChoiceField(required=False, help_text="Whose batches and files it is told of.")
    timeout = forms.IntegerField(
        min_value=5, max_value=30, help_text="Seconds, 5 to 30, in which it has to answer."
    )
    per_minute = forms.IntegerField(
        label="At most a minute",
        required=False,
        min_value=1,
        max_value=2**31 - 1,
        help_text="Deliveries. Empty: as fast as it answers.",
    )
    headers = forms.CharField(
        label="Headers",
        required=False,
        max_length=25_000,
        help_text="Sent along; one a line, as <code>X-Token: abc</code>.",
        widget=forms.Textarea({"rows": 3, "spellcheck": "false", "autocomplete": "off"}),
    )
    no_headers = forms.BooleanField(label="Send no headers of our own any more", required=False)

    def __init__(
        self, data: Any = None, *, projects: Iterable[Project], row: WebhookEndpoint | None = None
    ) -> None:
        super().__init__(data, initial=_initial(row))
        types = OF_BATCHES if row is not None and row.batch_id else set(EventType.values)
        events: Any = self.fields["event_types"]
        events.choices = [
            (type.value, format_html("<code>{}</code> {}", type.value, MEANINGS[type]))
            for type in EventType
            if type in types
        ]
        project: Any = self.fields["project"]
        project.choices = [(ALL_PROJECTS, "All projects")]
        project.choices += [(each.pk, each.name) for each in projects]
        if row is None:
            del self.fields["no_headers"]
        else:
            self.fields["headers"].help_text += " Empty: those that it has stay."
        if row is not None and row.batch_id:
            del self.fields["project"]

    def clean_headers(self) -> dict[str, str] | None:
        """None: as they are."""
        lines = [line for line in self.cleaned_data["headers"].splitlines() if line.strip()]
        pairs = [line.partition(":") for line in lines]
        if not all(colon for _, colon, _ in pairs):
            raise forms.ValidationError("Each line is a name, a colon and a value.")
        return {name.strip(): value.strip() for name, _, value in pairs} or None

    @property
    def headers_given(self) -> dict[str, str] | None:
        given: dict[str, str] | None = self.cleaned_data["headers"]
        return {} if given is None and self.cleaned_data.get("no_headers") else given


def _initial(row: WebhookEndpoint | None) -> dict[str, Any]:
    if row is None:
        return {"timeout": 15, "event_types": [type.value for type in OF_BATCHES_ENDS]}
    return {
        "name": row.name,
        "url": row.url,
        "event_types": row.event_types,
        "project": row.project_id or ALL_PROJECTS,
        "timeout": row.timeout,
        "per_minute": row.per_minute,
    }


class RotateForm(forms.Form):
    overlap = forms.ChoiceField(
        choices=OVERLAPS,
        initial="24",
        label="The old secret stops signing",
        help_text="Until then both sign, so that the receiver can change over in its own time.",
    )


class TestForm(forms.Form):
    event_type = forms.ChoiceField(
        label="Event", choices=[(each, each) for each in EventType.values]
    )


class DeliveryForm(forms.Form):
    """Which deliveries; every field may be empty, times are UTC."""

    state = forms.ChoiceField(
        required=False,
        choices=[
            ("", "Any"),
            (DeliveryState.DEAD, "Dead"),
            (DeliveryState.RETRYING, "On its way"),
            (DeliveryState.DELIVERED, "Delivered"),
        ],
    )
    endpoint = forms.ChoiceField(label="Webhook", required=False)
    event = forms.ChoiceField(
        required=False, choices=[("", "Any"), *((each, each) for each in EventType.values)]
    )
    error = forms.CharField(required=False, max_length=200)
    since = forms.DateTimeField(
        label="From", required=False, widget=forms.DateTimeInput({"type": "datetime-local"})
    )
    until = forms.DateTimeField(
        label="To", required=False, widget=forms.DateTimeInput({"type": "datetime-local"})
    )

    def __init__(self, data: Any, *, endpoints: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(data)
        endpoint: Any = self.fields["endpoint"]
        endpoint.choices = [("", "Any"), *endpoints]

    @property
    def found(self) -> QuerySet[WebhookDelivery]:
        """What is like it; of a form that is not valid, nothing: it may be about to be purged."""
        if not self.is_valid():
            return WebhookDelivery.objects.none()
        return queries.deliveries_found(
            **{name: value or None for name, value in self.cleaned_data.items()}
        )

    @property
    def given(self) -> dict[str, str]:
        """What was chosen, as the page's address has it."""
        return {name: self.data[name] for name in self.fields if self.data.get(name)}


class OperatorDeliveryForm(DeliveryForm):
    """Of dead letters of all organizations, or of one."""

    organization = forms.CharField(
        required=False,
        max_length=150,
        widget=forms.TextInput({"placeholder": "Slug or id"}),
    )
    field_order = ("organization", "event")

    def __init__(self, data: Any) -> None:
        super().__init__(data)
        del self.fields["state"], self.fields["endpoint"]

    @property
    def found(self) -> QuerySet[WebhookDelivery]:
        if not self.is_valid():
            return WebhookDelivery.objects.none()
        given = {name: value or None for name, value in self.cleaned_data.items()}
        del given["organization"]
        return queries.deliveries_found(state=DeliveryState.DEAD, **given)
