"""The menu, and what a person may do, for templates."""

from __future__ import annotations

from typing import Any

from django import template
from django.template import Context

from accounts.access import Caller
from accounts.adapter import AccountAdapter
from accounts.models import Organization, User
from accounts.queries import organizations_of
from accounts.services.organizations import may_create
from portal.navigation import Link, place_of, sections_for

register = template.Library()


@register.simple_tag(takes_context=True)
def menu(context: Context) -> list[tuple[str, list[Link]]]:
    request: Any = context.get("request")
    user = getattr(request, "user", None)
    staff = bool(user and user.is_authenticated and user.is_staff)
    return sections_for(getattr(request, "caller", None), is_staff=staff)


@register.simple_tag(takes_context=True)
def place(context: Context) -> str:
    """The link of the menu under which this page is."""
    request: Any = context.get("request")
    return place_of(request.path) if request else ""


@register.filter
def switchable(user: User) -> list[Organization]:
    """`{% for organization in user|switchable %}`: where the person can go."""
    return organizations_of(user)


@register.filter
def may_create_organization(user: User) -> bool:
    return may_create(user)


@register.simple_tag(takes_context=True)
def may_sign_up(context: Context) -> bool:
    return bool(AccountAdapter().is_open_for_signup(context["request"]))


@register.filter
def may(caller: Caller | None, permission: str) -> bool:
    """`{% if request.caller|may:"keys" %}`"""
    return caller is not None and caller.may(permission)
