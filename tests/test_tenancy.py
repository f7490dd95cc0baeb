"""I3: no row of a tenant is reachable for a stranger, by any route that there is.

The routes are read from the URL resolver and the API itself: a new one that takes an id fails
here until it has a row in one of the tables, and a new list until it is shown to be scoped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson
import pytest
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver

from models_registry.services import register_model
from portal.api import api
from tests.batches.conftest import Disk, disk  # noqa: F401 a fixture
from tests.batches.test_uploads_api import CONTENT, begun, part
from tests.conftest import Person
from tests.wire import JSON, created, error_of


@dataclass(frozen=True)
class Rows:
    """The ids of what one organization has."""

    file_id: str
    upload_id: str
    part_id: str
    batch_id: str
    model: str


def rows_of(person: Person) -> Rows:
    batch = created(person.api)
    upload_id = begun(person.api)["id"]
    organization = person.caller.organization
    model = register_model(
        name=f"only/{organization.slug}",
        source="none",
        engine="instant",
        organizations=[organization],
    )
    part_id = part(person.api, upload_id, CONTENT)
    return Rows(batch["input_file_id"], upload_id, part_id, batch["id"], model.name)


@pytest.fixture
def mine(owner: Person, disk: Disk) -> Rows:  # noqa: F811
    return rows_of(owner)


@pytest.fixture
def theirs(stranger: Person, disk: Disk) -> Rows:  # noqa: F811
    return rows_of(stranger)


Body = Callable[[Rows], dict[str, Any] | bytes]
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="data"; filename="p"\r\n\r\nx\r\n--b--\r\n',
    "multipart/form-data; boundary=b",
)
WITH_ID: dict[str, Body | None] = {
    "GET /v1/files/{file_id}": None,
    "DELETE /v1/files/{file_id}": None,
    "GET /v1/files/{file_id}/content": None,
    "POST /v1/uploads/{upload_id}/parts": lambda _: FORM[0],
    "POST /v1/uploads/{upload_id}/complete": lambda rows: {"part_ids": [rows.part_id]},
    "POST /v1/uploads/{upload_id}/cancel": None,
    "GET /v1/batches/{batch_id}": None,
    "POST /v1/batches/{batch_id}/cancel": None,
    "GET /v1/models/{model}": None,
}
"""Every operation of the API that takes an id, with the body that would do, if it were one's own."""

LISTS: dict[str, Callable[[Rows], set[str]]] = {
    "GET /v1/files": lambda rows: {rows.file_id},
    "GET /v1/batches": lambda rows: {rows.batch_id},
    "GET /v1/models": lambda rows: {rows.model},
}
"""Every list, and what of an organization's it shows."""

MAKING = {"POST /v1/files", "POST /v1/uploads", "POST /v1/batches"}
"""What makes a row of the caller's own; that it takes no foreign id is tested with the endpoint."""

PAGES: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "batches/<str:batch_id>/cancel": ("POST", lambda rows: f"/batches/{rows.batch_id}/cancel"),
    "files/<str:file_id>/content": ("GET", lambda rows: f"/files/{rows.file_id}/content"),
}
"""Every page that takes an id, by its route: the method it answers, and the path of a row's page."""

NO_TENANTS = {
    "accounts/": "sign-in: what it takes are signed tokens and a person's own ids",
}


def operations() -> Iterator[str]:
    for path, methods in api.get_openapi_schema()["paths"].items():
        for method in methods:
            yield f"{method.upper()} {path}"


def routes(patterns: list[Any], before: str = "") -> Iterator[str]:
    for pattern in patterns:
        route = before + str(pattern.pattern)
        if isinstance(pattern, URLResolver):
            yield from routes(pattern.url_patterns, route)
        elif isinstance(pattern, URLPattern):
            yield route


def takes_an_id(route: str) -> bool:
    return "<" in route or "(" in route


def call(client: Client, operation: str, rows: Rows) -> Any:
    """Do the operation on these rows."""
    method, path = operation.split(" ")
    make = WITH_ID[operation]
    made = make(rows) if make else b""
    body, kind = (made, FORM[1]) if isinstance(made, bytes) else (orjson.dumps(made), JSON)
    return client.generic(method, path.format(**vars(rows)), body, kind)


def test_every_operation_of_the_api_has_its_row_here() -> None:
    named = set(operations())
    assert {operation for operation in named if "{" in operation} == set(WITH_ID)
    assert {operation for operation in named if "{" not in operation} == set(LISTS) | MAKING


def test_every_route_of_the_api_is_one_of_its_operations() -> None:
    paths = {operation.split(" ")[1].strip("/") for operation in [*WITH_ID, *LISTS, *MAKING]}
    own = {"v1/openapi.json", "v1/docs", "v1/"}
    found = {route for route in routes(get_resolver().url_patterns) if route.startswith("v1/")}
    plain = {
        route.replace("<path:", "<").replace("<", "{").replace(">", "}") for route in found - own
    }
    assert plain == paths


def test_every_page_that_takes_an_id_has_its_row_here() -> None:
    found = {
        route
        for route in routes(get_resolver().url_patterns)
        if takes_an_id(route) and not route.startswith(("v1/", *NO_TENANTS))
    }
    assert found == set(PAGES)


@pytest.mark.parametrize("operation", WITH_ID)
def test_a_strangers_row_is_not_found_by(
    operation: str, owner: Person, mine: Rows, theirs: Rows
) -> None:
    refused = call(owner.api, operation, theirs)
    assert (refused.status_code, error_of(refused)["type"]) == (404, "invalid_request_error")
    assert call(owner.api, operation, mine).status_code == 200  # so it was not the request's fault


@pytest.mark.parametrize("operation", WITH_ID)
def test_a_foreign_row_and_a_missing_one_are_answered_alike_by(
    operation: str, owner: Person, theirs: Rows
) -> None:
    missing = Rows("file-0", "upload_0", "part_0", "batch_0", "only/0")
    answers = []
    for rows in (theirs, missing):
        error = error_of(call(owner.api, operation, rows))
        for id in vars(rows).values():
            error["message"] = error["message"].replace(id, "ID")
        answers.append(error)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("operation", LISTS)
def test_a_list_shows_only_its_organizations_own(
    operation: str, owner: Person, stranger: Person, mine: Rows, theirs: Rows
) -> None:
    path = operation.split(" ")[1]
    for person, rows in ((owner, mine), (stranger, theirs)):
        found = {row["id"] for row in person.api.get(path).json()["data"]}
        assert found == LISTS[operation](rows)


@pytest.mark.parametrize("route", PAGES)
def test_a_strangers_page_is_not_found(route: str, owner: Person, mine: Rows, theirs: Rows) -> None:
    method, path = PAGES[route]
    assert owner.browser.generic(method, path(theirs)).status_code == 404
    assert owner.browser.generic(method, path(mine)).status_code in (200, 302)
