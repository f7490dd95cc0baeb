"""In which project a person's work lands; a program's is that of its key or token.

Others' projects, and archived ones, are not there.
"""

from __future__ import annotations

from dataclasses import replace

from accounts import access
from accounts.access import Caller
from accounts.models import Project


def open_projects(caller: Caller) -> list[Project]:
    """Where something new can be made, the usual one (the oldest) first."""
    with caller.scope():
        return list(Project.objects.filter(archived_at=None).order_by("id"))


def chosen(caller: Caller, id: str) -> Caller:
    """The caller at work in the project of this id (of '': the usual one); else `NotFound`."""
    if not id:
        return caller
    project = access.get(caller, Project, id, param="project", archived_at=None)
    return replace(caller, project=project)


def within(caller: Caller, project: Project) -> Caller:
    """The caller at work where something of theirs is already, as far as that is theirs to choose
    and still open: what is made of it belongs beside it."""
    is_program = caller.scopes is not None
    return caller if is_program or project.archived_at else replace(caller, project=project)
