"""Writes of limits: operators set an organization's, its admins those of its people and keys."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

from django.db import transaction
from django_scopes import scopes_disabled

from accounts.access import Caller
from accounts.errors import BadRequest, Forbidden, NotFound
from accounts.limits import LIMITS, MOST, Amount
from accounts.models import ApiKey, Membership, Organization, Quota, User
from accounts.services import audit


def set_limits(
    *,
    actor: Caller | User | None,
    organization: Organization,
    user: User | None = None,
    api_key: ApiKey | None = None,
    **fields: Amount | None,
) -> Quota:
    """Set the named limits of one subject, and leave its others as they are; None clears one.

    Without `user` and `api_key` they are the organization's own, for platform operators only.
    `actor` is None for the installation's own shell.
    """
    _require(actor, organization, own=user is None and api_key is None)
    checked = {field: _checked(field, value) for field, value in fields.items()}
    with transaction.atomic(), scopes_disabled():
        _require_subject(organization, user, api_key)
        quota = _locked(organization, user, api_key)
        before = audit.snapshot(quota, checked)
        for field, value in checked.items():
            setattr(quota, field, value)
        if changes := audit.difference(quota, before):
            quota.save()
            audit.record(
                "limits.changed",
                actor=actor,
                target=api_key or user or organization,
                organization=organization,
                changes=changes,
            )
    return quota


def _require(actor: Caller | User | None, organization: Organization, *, own: bool) -> None:
    if actor is None or (isinstance(actor, User) and actor.is_staff):
        return
    if own or not isinstance(actor, Caller):
        raise Forbidden(
            "Only a platform operator can change the organization's own limits.",
            code="operators_only",
        )
    if actor.organization.pk != organization.pk:
        raise NotFound("No such organization.", code="not_found")
    actor.require("quotas")


def _checked(field: str, value: object) -> Amount | None:
    if field not in LIMITS:
        raise BadRequest(f"There is no limit {field!r}.", param=field, code="unknown_parameter")
    if value is None:
        return None
    if LIMITS[field].unit == "money":
        return _money(field, value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST:
        raise BadRequest(f"{field} must be a whole number from 0 to {MOST}.", param=field)
    return value


def _money(field: str, value: object) -> Decimal:
    """With two decimals; more would not be kept."""
    try:
        amount = Decimal(str(value))
        rounded = amount.quantize(Decimal("0.01"))
    except InvalidOperation:
        raise BadRequest(f"{field} must be an amount of money.", param=field) from None
    if amount != rounded or not 0 <= amount < 10**12:
        raise BadRequest(
            f"{field} must be from 0 to 999999999999.99, with at most two decimals.", param=field
        )
    return rounded


def _require_subject(organization: Organization, user: User | None, api_key: ApiKey | None) -> None:
    """Refuse who does not belong to the organization; a foreign key would not."""
    if user is not None and api_key is not None:
        raise BadRequest("Limits are of a person or of a key, not of both.", param="api_key_id")
    members = Membership.objects.filter(organization=organization, user=user)
    if user is not None and not members.exists():
        raise NotFound("No such member.", param="user_id", code="not_found")
    if api_key is not None and api_key.organization_id != organization.pk:
        raise NotFound("No such API key.", param="api_key_id", code="not_found")


def _locked(organization: Organization, user: User | None, api_key: ApiKey | None) -> Quota:
    """The subject's row, made if there is none; nobody else changes it before we are done."""
    quota, _ = Quota.objects.select_for_update(of=("self",)).get_or_create(
        organization=organization, user=user, api_key=api_key
    )
    return quota
