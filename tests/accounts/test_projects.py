"""Projects: unique names, archiving that stops keys, and one that always stays."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.contrib.messages import get_messages
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django_scopes import scopes_disabled

from accounts.errors import BadRequest
from accounts.models import AuditEvent, Project
from accounts.services import keys, projects
from accounts.views import projects as views
from tests import jobs
from tests.accounts.test_members import admin_key
from tests.conftest import Person
from tests.wire import assert_refused, post

PROJECTS = "/v1/organization/projects"


def made(person: Person, name: str) -> Project:
    return projects.create_project(actor=person.caller, name=name)


def active(person: Person) -> list[str]:
    with person.caller.scope():
        names = Project.objects.filter(archived_at=None).order_by("pk")
        return list(names.values_list("name", flat=True))


# --- The rules ------------------------------------------------------------------------------


def test_a_name_is_put_on_one_line(owner: Person) -> None:
    assert made(owner, "  Nightly\n\tevals \0").name == "Nightly evals"


@pytest.mark.parametrize("name", ["", "  ", "\0", "\u200b", "x" * 151])
def test_a_name_is_needed(name: str, owner: Person) -> None:
    with pytest.raises(BadRequest) as caught:
        made(owner, name)
    assert caught.value.param == "name"


def test_names_are_unique_inside_an_organization(owner: Person, stranger: Person) -> None:
    made(owner, "Evals")
    with pytest.raises(BadRequest) as caught:
        made(owner, "Evals")
    assert (caught.value.param, caught.value.code) == ("name", "name_taken")
    assert made(stranger, "Evals").organization == stranger.caller.organization


def test_an_archived_projects_keys_stop(owner: Person) -> None:
    project = made(owner, "Evals")
    _, text = keys.create_api_key(project=project, name="k", created_by=owner.user)
    api = Person(owner.user, owner.caller, text).api
    assert api.get("/v1/files").status_code == 200
    projects.archive_project(actor=owner.caller, project=project)
    assert api.get("/v1/files").status_code == 401
    assert owner.api.get("/v1/files").status_code == 200


def test_archiving_twice_is_one_event(owner: Person) -> None:
    project = made(owner, "Evals")
    for _ in range(2):
        projects.archive_project(actor=owner.caller, project=project)
    with scopes_disabled():
        assert AuditEvent.objects.filter(action="project.archived").count() == 1


def test_the_last_active_project_stays(owner: Person) -> None:
    project = made(owner, "Evals")
    projects.archive_project(actor=owner.caller, project=owner.caller.project)
    with pytest.raises(BadRequest) as caught:
        projects.archive_project(actor=owner.caller, project=project)
    assert caught.value.code == "last_project"
    assert active(owner) == ["Evals"]
    assert owner.browser.get("/").status_code == 200


@pytest.mark.django_db(transaction=True)
def test_of_two_projects_archived_at_once_one_stays(owner: Person) -> None:
    both = [owner.caller.project, made(owner, "Evals")]
    found = jobs.together(
        *(
            lambda each=each: projects.archive_project(actor=owner.caller, project=each)
            for each in both
        )
    )
    assert [type(each) for each in found if isinstance(each, Exception)] == [BadRequest]
    assert len(active(owner)) == 1


# --- By API ---------------------------------------------------------------------------------


def test_a_project_is_made_renamed_and_archived(owner: Person) -> None:
    api = admin_key(owner)
    project = post(api, PROJECTS, {"name": "Evals"}).json()
    assert project == {
        "id": project["id"],
        "object": "organization.project",
        "name": "Evals",
        "created_at": project["created_at"],
        "archived_at": None,
        "status": "active",
    }
    path = f"{PROJECTS}/{project['id']}"
    assert post(api, path, {"name": "Nightly"}).json()["name"] == "Nightly"
    assert api.get(path).json() == project | {"name": "Nightly"}
    archived = post(api, f"{path}/archive", b"").json()
    assert (archived["status"], archived["archived_at"] is None) == ("archived", False)


def test_the_list_leaves_out_archived_ones_unless_asked(owner: Person) -> None:
    api = admin_key(owner)
    old, new = made(owner, "Old"), made(owner, "New")
    projects.archive_project(actor=owner.caller, project=old)

    def names(query: str = "") -> list[str]:
        return [row["name"] for row in api.get(f"{PROJECTS}{query}").json()["data"]]

    assert names() == ["Default", "New"]
    assert names("?include_archived=true") == ["Default", "Old", "New"]
    first = api.get(f"{PROJECTS}?limit=1").json()
    assert (first["has_more"], first["last_id"]) == (True, owner.caller.project.pk)
    assert names(f"?after={first['last_id']}") == ["New"]
    assert new.archived_at is None


@pytest.mark.parametrize("body", [{}, {"name": 1}, {"name": ""}, {"name": "\0"}, {"name": None}])
def test_bad_names_are_named(body: dict[str, Any], owner: Person) -> None:
    api = admin_key(owner)
    for path in (PROJECTS, f"{PROJECTS}/{owner.caller.project.pk}"):
        response = post(api, path, body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "name")


def test_a_taken_name_is_a_400(owner: Person) -> None:
    refused = post(admin_key(owner), PROJECTS, {"name": "Default"})
    assert_refused(refused, 400, "name", "name_taken")


def test_members_may_not_make_projects(teammate: Person) -> None:
    refused = post(admin_key(teammate), PROJECTS, {"name": "Mine"})
    assert_refused(refused, 403, None, "insufficient_role")


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "after=x", "include_archived=maybe"])
def test_bad_queries_are_refused(query: str, owner: Person) -> None:
    assert admin_key(owner).get(f"{PROJECTS}?{query}").status_code == 400


def queries_of(read: Any) -> int:
    with CaptureQueriesContext(connection) as queries:
        assert read().status_code == 200
    return len(queries)


def test_the_lists_queries_do_not_grow(owner: Person) -> None:
    admin_key(owner)
    reads = [lambda: owner.api.get(PROJECTS), lambda: owner.browser.get("/organization/projects")]
    for read in reads:
        read()
    of_one = [queries_of(read) for read in reads]
    made(owner, "a")
    made(owner, "b")
    assert [queries_of(read) for read in reads] == of_one


# --- By page --------------------------------------------------------------------------------


def said(response: Any) -> list[str]:
    return [str(message) for message in get_messages(response.wsgi_request)]


def test_a_project_by_page(owner: Person) -> None:
    response = owner.browser.post("/organization/projects", {"name": "Evals"})
    assert (response.status_code, response["Location"]) == (302, "/organization/projects")
    with owner.caller.scope():
        project = Project.objects.get(name="Evals")
    path = f"/organization/projects/{project.pk}"
    assert b'value="Evals"' in owner.browser.get(path).content
    assert owner.browser.post(path, {"name": "Nightly"}).status_code == 302
    assert active(owner) == ["Default", "Nightly"]
    assert "Archive the project <bdi>Nightly</bdi>?" in (
        owner.browser.get("/organization/projects").content.decode()
    )
    response = owner.browser.post(f"{path}/archive", {"typed": "Default"})
    assert said(response) == ["Nothing is archived: the name that you typed is another."]
    assert active(owner) == ["Default", "Nightly"]
    response = owner.browser.post(f"{path}/archive", {"typed": " Nightly "})
    assert said(response) == ["Nightly is archived; its keys have stopped."]
    assert active(owner) == ["Default"]


def test_projects_are_found_by_name_and_id(
    owner: Person, stranger: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, _ = made(owner, "Evals one"), made(owner, "Evals two")
    path = "/organization/projects"

    def found(**query: str) -> list[str]:
        rows = owner.browser.get(path, query).context["projects"]
        return [each.name for each in rows]

    assert found(q="EVALS") == ["Evals two", "Evals one"]
    assert found(q=project.pk) == ["Evals one"]
    assert found(q=stranger.caller.project.pk) == []
    assert "No project is like this" in owner.browser.get(path, {"q": "none"}).content.decode()
    monkeypatch.setattr(views, "PAGE_SIZE", 1)
    page = owner.browser.get(path, {"q": "evals"}).content.decode()
    assert re.search(r'href="\?q=evals&amp;after=\w+" rel="next"', page)


def test_a_form_keeps_its_input_and_says_what_is_wrong(owner: Person) -> None:
    page = owner.browser.post("/organization/projects", {"name": "Default"})
    assert page.status_code == 400
    assert "There is already a project &#x27;Default&#x27;." in page.content.decode()
    assert b'value="Default"' in page.content
    assert owner.browser.post("/organization/projects", {}).status_code == 400


def test_the_page_says_why_the_last_one_stays(owner: Person) -> None:
    path = f"/organization/projects/{owner.caller.project.pk}/archive"
    response = owner.browser.post(path, {"typed": "Default"})
    assert said(response) == ["The last active project cannot be archived: make another one first."]


def test_members_look_but_do_not_touch(teammate: Person) -> None:
    assert teammate.browser.get("/organization/projects").status_code == 200
    path = f"/organization/projects/{teammate.caller.project.pk}"
    assert teammate.browser.get(path).status_code == 403
    for each in ("/organization/projects", path, f"{path}/archive"):
        assert teammate.browser.post(each, {"name": "x"}).status_code == 403


def test_a_strangers_project_is_not_found(owner: Person, stranger: Person) -> None:
    path = f"/organization/projects/{stranger.caller.project.pk}"
    assert owner.browser.get(path).status_code == 404
    assert owner.browser.post(path, {"name": "x"}).status_code == 404
    assert owner.browser.post(f"{path}/archive").status_code == 404


def test_archiving_is_a_post(owner: Person) -> None:
    path = f"/organization/projects/{owner.caller.project.pk}/archive"
    assert owner.browser.get(path).status_code == 405
