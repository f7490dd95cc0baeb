"""Which events of the audit are looked for."""

from __future__ import annotations

from datetime import UTC, datetime, time

from django import forms
from django.db.models import Q


class AuditForm(forms.Form):
    """Every field may be empty; days are whole ones (UTC)."""

    action = forms.CharField(
        label="Action",
        required=False,
        max_length=64,
        widget=forms.TextInput({"placeholder": "member.role_changed, or api_key."}),
    )
    actor = forms.CharField(
        label="Who",
        required=False,
        max_length=320,
        widget=forms.TextInput({"placeholder": "Email, or a key's name or id"}),
    )
    target = forms.CharField(
        label="Target",
        required=False,
        max_length=320,
        widget=forms.TextInput({"placeholder": "Name or id"}),
    )
    address = forms.GenericIPAddressField(label="IP address", required=False)
    since = forms.DateField(
        label="From (UTC)", required=False, widget=forms.DateInput({"type": "date"})
    )
    until = forms.DateField(
        label="To (UTC)", required=False, widget=forms.DateInput({"type": "date"})
    )

    @property
    def wanted(self) -> Q:
        """The filter; of a form that is not valid, what was understood of it."""
        given = getattr(self, "cleaned_data", {})
        found = Q()
        if action := given.get("action"):
            found &= Q(action__startswith=action)
        if actor := given.get("actor"):
            found &= Q(actor_label__icontains=actor) | Q(credential=actor)
        if target := given.get("target"):
            found &= Q(target_label__icontains=target) | Q(target_id=target)
        if address := given.get("address"):
            found &= Q(address=address)
        if since := given.get("since"):
            found &= Q(created_at__gte=datetime.combine(since, time(), UTC))
        if until := given.get("until"):
            found &= Q(created_at__lte=datetime.combine(until, time.max, UTC))
        return found


class OperatorAuditForm(AuditForm):
    """With the choice of one chain: an organization's, the platform's own, or all of them."""

    organization = forms.CharField(
        label="Organization",
        required=False,
        max_length=150,
        widget=forms.TextInput({"placeholder": "Slug or id, or platform"}),
    )
    field_order = ("organization",)
