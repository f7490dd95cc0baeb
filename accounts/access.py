"""The one door to tenant data: who calls, and which of their own rows they may have.

Missing and foreign rows are the same 404; a caller who may look but not touch gets 403.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from django.db.models import Model
from django_scopes import scope

from accounts import ids, roles
from accounts.errors import Forbidden, NotFound
from accounts.models import ApiKey, Membership, Organization, Project, Role, Scope, User

M = TypeVar("M", bound=Model)


@dataclass(frozen=True)
class Caller:
    """Who is asking, for which organization and project.

    A person has a `role`; a program has `scopes`, from its key or its token, and a person's key
    has both: it may do what its scopes and its person's role permit. An `operator` looks at an
    organization that is not theirs.
    """

    organization: Organization
    project: Project
    user: User | None = None
    role: str = ""
    api_key: ApiKey | None = None
    scopes: tuple[str, ...] | None = None
    token_id: str = ""
    operator: bool = False

    @cached_property
    def permissions(self) -> frozenset[str]:
        if self.operator:
            return roles.OPERATOR
        permitted = self._permissions
        return roles.reading(permitted) if self.organization.suspended_at else permitted

    @property
    def _permissions(self) -> frozenset[str]:
        by_role = roles.ROLES[self.role] if self.role else None
        by_scope = roles.of_scopes(self.scopes) if self.scopes is not None else None
        if by_role is None or by_scope is None:
            return by_role or by_scope or frozenset()
        return by_role & by_scope

    def may(self, permission: str) -> bool:
        """Whether `accounts/roles.py` gives the caller this permission."""
        return permission in self.permissions

    def require(self, permission: str) -> None:
        """Raise `Forbidden`, saying what is missing, unless the caller `may`."""
        if self.may(permission):
            return
        if self.organization.suspended_at and permission in self._permissions:
            raise Forbidden(
                "This organization is suspended: what it has can be seen, but not changed.",
                code="organization_suspended",
            )
        if self.scopes is not None and permission not in roles.of_scopes(self.scopes):
            kind = "access token" if self.token_id else "API key"
            needed = roles.scope_for(permission)
            said = f"lacks the scope {needed!r}" if needed else "cannot do this; a person can"
            raise Forbidden(f"This {kind} {said}.", code="insufficient_scope")
        if self.operator:
            raise Forbidden("An operator may look at this but not change it.", code="read_only")
        if not self.role:
            raise Forbidden("You are not a member of this organization.", code="not_a_member")
        raise Forbidden(
            f"Your role ({self.role}) does not permit this"
            f" ({roles.PERMISSIONS[permission].lower()}); an owner or admin can change your role.",
            code="insufficient_role",
        )

    @property
    def role_label(self) -> str:
        return "Operator" if self.operator else Role(self.role).label if self.role else ""

    @property
    def is_platform_operator(self) -> bool:
        """Whether the caller may use the platform's own operations, across tenants."""
        staff = self.user is not None and self.user.is_staff and self.user.is_active
        return staff and (self.scopes is None or Scope.OPERATOR in self.scopes)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Everything read inside belongs to the caller's organization."""
        with scope(organization=self.organization):
            yield


def get(
    caller: Caller,
    model: type[M],
    id: str,
    *,
    param: str = "id",
    related: Sequence[str] = (),
    **lookup: Any,
) -> M:
    """The caller's own row of that id, with `related` rows fetched along; else `NotFound`."""
    row: M | None = None
    if "\0" not in id:  # PostgreSQL cannot store a NUL, so no row has such an id
        with caller.scope():
            manager: Any = model._default_manager
            row = manager.select_related(*related).filter(pk=id, **lookup).first()
    if row is None:
        kind = model._meta.verbose_name
        raise NotFound(f"No such {kind}: {id[:64]!r}", param=param, code="not_found")
    return row


def get_member(caller: Caller, id: str, *, param: str = "user_id") -> Membership:
    """The membership of the person with this `user_…` id; else `NotFound`."""
    with caller.scope():
        mine = Membership.objects.select_related("user")
        membership = mine.filter(user_id=ids.parse_user_id(id) or 0).first()
    if membership is None:
        raise NotFound(f"No such member: {id[:64]!r}", param=param, code="not_found")
    return membership
