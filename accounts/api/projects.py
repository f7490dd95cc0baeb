"""`/v1/organization/projects`: the homes of keys and batches inside an organization."""

from __future__ import annotations

from typing import Annotated

from django.http import HttpRequest
from ninja import Field, Query, Router, Schema

from accounts import access
from accounts.access import Caller
from accounts.authentication import caller_of
from accounts.models import Project
from accounts.paging import ends, page_of
from accounts.schemas.organization import NameIn, ProjectList, ProjectOut
from accounts.services import projects

router = Router(tags=["Projects"])


class ProjectPage(Schema):
    limit: int = Field(20, ge=1, le=100)
    after: Annotated[str | None, Field(pattern=r"^(proj_[0-9a-f]{32})?$")] = None
    include_archived: bool = False


@router.get("/projects", response=ProjectList, summary="List projects")
def list_projects(request: HttpRequest, page: Query[ProjectPage]) -> ProjectList:
    caller = caller_of(request, "projects.read")
    with caller.scope():
        mine = Project.objects.all()
        if not page.include_archived:
            mine = mine.filter(archived_at=None)
        found, more = page_of(mine, page.after, page.limit, descending=False)
    return ProjectList(data=[ProjectOut.of(each) for each in found], has_more=more, **ends(found))


@router.post("/projects", response=ProjectOut, summary="Create a project")
def create_project(request: HttpRequest, given: NameIn) -> ProjectOut:
    caller = caller_of(request, "projects")
    return ProjectOut.of(projects.create_project(actor=caller, name=given.name))


@router.get("/projects/{project_id}", response=ProjectOut, summary="Retrieve a project")
def retrieve_project(request: HttpRequest, project_id: str) -> ProjectOut:
    return ProjectOut.of(_project(caller_of(request, "projects.read"), project_id))


@router.post("/projects/{project_id}", response=ProjectOut, summary="Rename a project")
def rename_project(request: HttpRequest, project_id: str, given: NameIn) -> ProjectOut:
    caller = caller_of(request, "projects")
    project = _project(caller, project_id)
    return ProjectOut.of(projects.rename_project(actor=caller, project=project, name=given.name))


@router.post("/projects/{project_id}/archive", response=ProjectOut, summary="Archive a project")
def archive_project(request: HttpRequest, project_id: str) -> ProjectOut:
    caller = caller_of(request, "projects")
    project = _project(caller, project_id)
    return ProjectOut.of(projects.archive_project(actor=caller, project=project))


def _project(caller: Caller, project_id: str) -> Project:
    return access.get(caller, Project, project_id, param="project_id")
