"""The one door to tenant data: who calls, and which of their own rows they may have.

Missing and foreign rows are the same 404; a caller who may look but not touch gets 403.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from django.db.models import Model
from django_scopes import scope

from accounts.errors import Forbidden, NotFound
from accounts.models import ApiKey, Membership, Organization, Project, Role, User

M = TypeVar("M", bound=Model)

WRITERS = {Role.OWNER, Role.ADMIN, Role.MEMBER}


@dataclass(frozen=True)
class Caller:
    """Who is asking, for which organization and project: a person's membership or a key."""

    organization: Organization
    project: Project
    user: User | None = None
    membership: Membership | None = None
    api_key: ApiKey | None = None

    def require(self, needed: str) -> None:
        """Raise `Forbidden` unless the caller has this scope (`batches`, `files.read`, …)."""
        if self.api_key is not None:
            if not self.api_key.allows(needed):
                raise Forbidden(
                    f"This API key lacks the scope {needed!r}.", code="insufficient_scope"
                )
        elif self.membership is None:
            raise Forbidden("You are not a member of this organization.", code="not_a_member")
        elif not needed.endswith(".read") and self.membership.role not in WRITERS:
            raise Forbidden(
                f"Your role ({self.membership.role}) may look but not change this.",
                code="insufficient_role",
            )

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
