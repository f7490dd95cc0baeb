"""Writes of projects: making, renaming, archiving."""

from __future__ import annotations

from django.db import IntegrityError, transaction
from django.utils import timezone

from accounts import names
from accounts.access import Caller
from accounts.errors import BadRequest
from accounts.models import Project
from accounts.services import audit
from accounts.services.organizations import locked


@transaction.atomic
def create_project(*, actor: Caller, name: str) -> Project:
    """Raises `BadRequest` for a name that another of the organization's projects has."""
    project = Project(organization=actor.organization, name=names.clean(name))
    _save_named(project)
    audit.record("project.created", actor=actor, target=project)
    return project


@transaction.atomic
def rename_project(*, actor: Caller, project: Project, name: str) -> Project:
    with actor.scope():
        project = Project.objects.select_for_update(no_key=True).get(pk=project.pk)
    before = audit.snapshot(project, ["name"])
    project.name = names.clean(name)
    if changes := audit.difference(project, before):
        _save_named(project)
        audit.record("project.renamed", actor=actor, target=project, changes=changes)
    return project


@transaction.atomic
def archive_project(*, actor: Caller, project: Project) -> Project:
    """Stop the project's keys; what it has stays. One project always remains active.

    Archiving an archived project changes nothing.
    """
    locked(actor.organization)  # two projects archived at once must not be the last two
    with actor.scope():
        project = Project.objects.get(pk=project.pk)
        if project.archived_at:
            return project
        others = Project.objects.filter(archived_at=None).exclude(pk=project.pk)
        if not others.exists():
            raise BadRequest(
                "The last active project cannot be archived: make another one first.",
                param="project_id",
                code="last_project",
            )
        project.archived_at = timezone.now()
        project.save(update_fields=["archived_at"])
    audit.record("project.archived", actor=actor, target=project)
    return project


def _save_named(project: Project) -> None:
    try:
        with transaction.atomic():
            project.save()
    except IntegrityError:
        raise BadRequest(
            f"There is already a project {project.name!r}.", param="name", code="name_taken"
        ) from None
