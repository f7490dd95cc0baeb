"""The pages of projects: the list, making, renaming, archiving."""

from __future__ import annotations

from urllib.parse import urlencode

from django.contrib import messages
from django.db.models import Q
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_POST

from accounts import access
from accounts.access import Caller
from accounts.errors import BadRequest
from accounts.forms.organizations import NameForm
from accounts.models import Project
from accounts.pages import PageRequest, is_typed, page, sent
from accounts.paging import page_of, searched
from accounts.services import projects

PAGE_SIZE = 25


@require_http_methods(["GET", "HEAD", "POST"])
@page
def organization_projects(request: PageRequest, caller: Caller) -> HttpResponseBase:
    caller.require("projects.read")
    form = NameForm(sent(request))
    if request.method == "POST":
        caller.require("projects")
        if form.is_valid() and _created(request, caller, form):
            return redirect("organization_projects")
    after = request.GET.get("after", "").replace("\0", "")
    q = searched(request)
    rows = Project.objects.filter(Q(name__icontains=q) | Q(pk=q)) if q else Project.objects.all()
    found, more = page_of(rows, after, PAGE_SIZE, descending=True)
    ctx = {
        "projects": found,
        "form": form,
        "after": after,
        "last": found[-1].pk if more else "",
        "q": q,
        "query": urlencode({"q": q}) if q else "",
    }
    status = 400 if form.errors else 200
    return render(request, "accounts/projects.html", ctx, status=status)


@require_http_methods(["GET", "HEAD", "POST"])
@page
def project_rename(request: PageRequest, caller: Caller, project_id: str) -> HttpResponseBase:
    caller.require("projects")
    project = access.get(caller, Project, project_id, param="project_id")
    form = NameForm(sent(request), initial={"name": project.name})
    if form.is_valid() and _renamed(request, caller, project, form):
        return redirect("organization_projects")
    ctx = {"project": project, "form": form}
    status = 400 if form.errors else 200
    return render(request, "accounts/project_rename.html", ctx, status=status)


@require_POST
@page
def project_archive(request: PageRequest, caller: Caller, project_id: str) -> HttpResponseBase:
    caller.require("projects")
    project = access.get(caller, Project, project_id, param="project_id")
    if not is_typed(request, project.name, done="archived"):
        return redirect("organization_projects")
    try:
        projects.archive_project(actor=caller, project=project)
    except BadRequest as error:  # it became the last one while the person was deciding
        messages.error(request, error.message)
    else:
        messages.success(request, f"{project.name} is archived; its keys have stopped.")
    return redirect("organization_projects")


def _created(request: PageRequest, caller: Caller, form: NameForm) -> bool:
    try:
        project = projects.create_project(actor=caller, name=form.cleaned_data["name"])
    except BadRequest as error:
        form.add_error("name", error.message)
        return False
    messages.success(request, f"{project.name} is made.")
    return True


def _renamed(request: PageRequest, caller: Caller, project: Project, form: NameForm) -> bool:
    name = form.cleaned_data["name"]
    try:
        projects.rename_project(actor=caller, project=project, name=name)
    except BadRequest as error:
        form.add_error("name", error.message)
        return False
    messages.success(request, "The project has its new name.")
    return True
