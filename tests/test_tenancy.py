"""I3: no row of a tenant is reachable for a stranger, by any route that there is.

The routes are read from the URL resolver and the API itself: a new one that takes an id fails
here until it has a row in one of the tables, and a new list until it is shown to be scoped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import orjson
import pytest
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver
from django_scopes import scopes_disabled

from accounts.ids import user_id
from accounts.models import ApiKey, AuditEvent, Project, Scope
from accounts.services import invitations, issuers, keys, members, projects, sso
from batches.models import HandlerRun, WebhookDelivery
from batches.models.events import EventType
from batches.services import events, handlers, webhooks
from models_registry.services import register_model
from portal.api import api
from tests.batches.conftest import Disk, disk  # noqa: F401 a fixture
from tests.batches.test_uploads_api import CONTENT, begun, part
from tests.conftest import Person
from tests.wire import JSON, created, error_of

HOOK = {"name": "hook", "url": "http://127.0.0.1:9/hook", "event_types": ["batch.completed"]}
"""A receiver that the tests' settings allow, and where nobody listens."""


@dataclass(frozen=True)
class Rows:
    """The ids of what one organization has."""

    file_id: str
    upload_id: str
    part_id: str
    batch_id: str
    model: str
    project_id: str
    user_id: str
    invite_id: str
    own_project_id: str
    own_user_id: str
    key_id: str
    issuer_id: str
    domain_id: str
    webhook_endpoint_id: str
    delivery_id: str
    handler_id: str
    run_id: str


MISSING = Rows(
    file_id="file-0",
    upload_id="upload_0",
    part_id="part_0",
    batch_id="batch_0",
    model="only/0",
    project_id="proj_0",
    user_id="user_0",
    invite_id="invite_0",
    own_project_id="proj_0",
    own_user_id="user_0",
    key_id="key_0",
    issuer_id="iss_0",
    domain_id="domain_0",
    webhook_endpoint_id="we_0",
    delivery_id="whd_0",
    handler_id="rh_0",
    run_id="hrun_0",
)


def rows_of(person: Person) -> Rows:
    may_everything(person)
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
    caller = person.caller
    colleague = members.enrol(
        organization=organization, email=f"colleague@{organization.slug}.test", role="member"
    )
    invitation, _ = invitations.invite(
        actor=caller, organization=organization, email="guest@elsewhere.test", role="member"
    )
    project = projects.create_project(actor=caller, name="Evals")
    issuer = issuers.create_trusted_issuer(
        actor=caller,
        project=project,
        name="CI",
        issuer="https://ci.test",
        audience="batches",
        subject_pattern="repo:acme",
        scopes=["files"],
    )
    webhook, _ = webhooks.create_webhook(
        actor=caller, name="hook", url=HOOK["url"], event_types=["batch.failed"], project=None
    )
    events.record(
        EventType.BATCH_FAILED, organization=organization, project=caller.project, data={}
    )
    with scopes_disabled():
        delivery = WebhookDelivery.objects.get(endpoint=webhook)
        dead = WebhookDelivery.objects.filter(pk=delivery.pk)
        dead.update(state="dead", next_attempt_at=None)
    handler = handlers.create_handler(
        actor=caller, name="mine", kind="parquet", settings={}, project=None
    )
    with scopes_disabled():
        run = HandlerRun.objects.create(
            organization=organization, batch_id=batch["id"], handler=handler, position=1
        )
    return Rows(
        file_id=batch["input_file_id"],
        upload_id=upload_id,
        part_id=part_id,
        batch_id=batch["id"],
        model=model.name,
        project_id=project.pk,
        user_id=user_id(colleague.user_id),
        invite_id=invitation.pk,
        own_project_id=caller.project.pk,
        own_user_id=user_id(person.user.pk),
        key_id=keys.create_api_key(project=project, name="service", scopes=["files"])[0].pk,
        issuer_id=issuer.pk,
        domain_id=sso.claim_domain(actor=caller, domain="claimed.test").pk,
        webhook_endpoint_id=webhook.pk,
        delivery_id=delivery.pk,
        handler_id=handler.pk,
        run_id=run.pk,
    )


def may_everything(person: Person) -> None:
    """Let the person's key do whatever a key may."""
    with scopes_disabled():
        ApiKey.objects.filter(created_by=person.user).update(scopes=Scope.values)


@pytest.fixture
def mine(owner: Person, disk: Disk) -> Rows:  # noqa: F811
    return rows_of(owner)


@pytest.fixture
def theirs(stranger: Person, disk: Disk) -> Rows:  # noqa: F811
    return rows_of(stranger)


def newest_events(rows: Rows) -> set[str]:
    """As many of the organization's audit events as a page of the API has."""
    with scopes_disabled():
        organization = Project.objects.get(pk=rows.own_project_id).organization_id
        chain = AuditEvent.objects.filter(organization=organization).order_by("-number")
        return set(chain.values_list("pk", flat=True)[:20])


Body = Callable[[Rows], dict[str, Any] | bytes]
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="data"; filename="p"\r\n\r\nx\r\n--b--\r\n',
    "multipart/form-data; boundary=b",
)
KEY = {"name": "CI", "scopes": ["files"]}
WITH_ID: dict[str, Body | None] = {
    "GET /v1/files/{file_id}": None,
    "DELETE /v1/files/{file_id}": None,
    "GET /v1/files/{file_id}/content": None,
    "POST /v1/uploads/{upload_id}/parts": lambda _: FORM[0],
    "POST /v1/uploads/{upload_id}/complete": lambda rows: {"part_ids": [rows.part_id]},
    "POST /v1/uploads/{upload_id}/cancel": None,
    "GET /v1/batches/{batch_id}": None,
    "POST /v1/batches/{batch_id}/cancel": None,
    "POST /v1/batches/{batch_id}/retry": None,
    "GET /v1/models/{model}": None,
    "GET /v1/webhook_endpoints/{webhook_endpoint_id}": None,
    "POST /v1/webhook_endpoints/{webhook_endpoint_id}": lambda _: {"name": "Hook"},
    "DELETE /v1/webhook_endpoints/{webhook_endpoint_id}": None,
    "POST /v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret": lambda _: {},
    "POST /v1/webhook_endpoints/{webhook_endpoint_id}/test": lambda _: {
        "event_type": "batch.failed"
    },
    "GET /v1/webhook_deliveries/{delivery_id}": None,
    "GET /v1/result_handlers/{handler_id}": None,
    "POST /v1/result_handlers/{handler_id}": lambda _: {"name": "Warehouse"},
    "DELETE /v1/result_handlers/{handler_id}": None,
    "GET /v1/batches/{batch_id}/handler_runs": None,
    "POST /v1/batches/{batch_id}/handler_runs/{run_id}/retry": None,
    "GET /v1/organization/projects/{project_id}": None,
    "POST /v1/organization/projects/{project_id}": lambda _: {"name": "Nightly"},
    "POST /v1/organization/projects/{project_id}/archive": None,
    "GET /v1/organization/projects/{project_id}/api_keys": None,
    "POST /v1/organization/projects/{project_id}/api_keys": lambda _: KEY,
    "GET /v1/organization/projects/{project_id}/api_keys/{key_id}": None,
    "POST /v1/organization/projects/{project_id}/api_keys/{key_id}": lambda _: {"name": "CI"},
    "POST /v1/organization/projects/{project_id}/api_keys/{key_id}/rotate": lambda _: {},
    "DELETE /v1/organization/projects/{project_id}/api_keys/{key_id}": None,
    "GET /v1/organization/trusted_issuers/{issuer_id}": None,
    "POST /v1/organization/trusted_issuers/{issuer_id}": lambda _: {"name": "GitHub"},
    "DELETE /v1/organization/trusted_issuers/{issuer_id}": None,
    "GET /v1/organization/users/{user_id}": None,
    "POST /v1/organization/users/{user_id}": lambda _: {"role": "viewer"},
    "DELETE /v1/organization/users/{user_id}": None,
    "GET /v1/organization/invites/{invite_id}": None,
    "DELETE /v1/organization/invites/{invite_id}": None,
}
"""Every operation of the API that takes an id, with the body that would do, if it were one's own."""

NOT_REACHED = {
    "POST /v1/webhook_endpoints/{webhook_endpoint_id}/test",
    "POST /v1/batches/{batch_id}/retry",
}
"""What asks a receiver of ours, where nobody listens; and what needs a batch that has ended."""

LISTS: dict[str, Callable[[Rows], set[str]]] = {
    "GET /v1/files": lambda rows: {rows.file_id},
    "GET /v1/batches": lambda rows: {rows.batch_id},
    "GET /v1/models": lambda rows: {rows.model},
    "GET /v1/webhook_endpoints": lambda rows: {rows.webhook_endpoint_id},
    "GET /v1/webhook_deliveries": lambda rows: {rows.delivery_id},
    "GET /v1/result_handlers": lambda rows: {rows.handler_id},
    "GET /v1/organization/projects": lambda rows: {rows.own_project_id, rows.project_id},
    "GET /v1/organization/users": lambda rows: {rows.own_user_id, rows.user_id},
    "GET /v1/organization/invites": lambda rows: {rows.invite_id},
    "GET /v1/organization/trusted_issuers": lambda rows: {rows.issuer_id},
    "GET /v1/organization/audit_logs": lambda rows: newest_events(rows),
}
"""Every list, and what of an organization's it shows."""

MAKING = {
    "POST /v1/result_handlers",
    "POST /v1/webhook_endpoints",
    "POST /v1/webhook_deliveries/replay",  # of others' ids nothing is found: test_webhook_api.py
    "POST /v1/webhook_deliveries/purge",
    "POST /v1/files",
    "POST /v1/uploads",
    "POST /v1/batches",
    "POST /v1/organization/projects",
    "POST /v1/organization/invites",
    "POST /v1/organization/limits",
    "POST /v1/organization/trusted_issuers",
    "POST /v1/auth/token",
    "POST /v1/auth/token/revoke",
}
"""What makes a row of the caller's own; that it takes no foreign id is tested with the endpoint."""

ASKING = {"POST /v1/chat/completions", "POST /v1/completions", "POST /v1/embeddings"}
"""What asks a model; that one which is not offered is not found is tested with the endpoint."""

OWN = {
    "GET /v1/webhook_event_types",
    "GET /v1/result_handler_kinds",
    "GET /v1/organization",
    "POST /v1/organization",
    "GET /v1/organization/limits",
    "GET /v1/organization/usage/completions",
    "GET /v1/organization/usage/embeddings",
    "GET /v1/organization/usage/all",
    "GET /v1/organization/costs",
}
"""What is about the caller's organization alone and takes no id; tested with the endpoint."""

PAGES: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "batches/<str:batch_id>": ("GET", lambda rows: f"/batches/{rows.batch_id}"),
    "batches/<str:batch_id>/chunks": ("GET", lambda rows: f"/batches/{rows.batch_id}/chunks"),
    "batches/<str:batch_id>/log": ("GET", lambda rows: f"/batches/{rows.batch_id}/log"),
    "batches/<str:batch_id>/results": ("GET", lambda rows: f"/batches/{rows.batch_id}/results"),
    "batches/<str:batch_id>/results/<str:line>": (
        "GET",
        lambda rows: f"/batches/{rows.batch_id}/results/1",
    ),
    "batches/<str:batch_id>/cancel": ("POST", lambda rows: f"/batches/{rows.batch_id}/cancel"),
    "batches/<str:batch_id>/handler-runs": (
        "GET",
        lambda rows: f"/batches/{rows.batch_id}/handler-runs",
    ),
    "batches/<str:batch_id>/handler-runs/<str:run_id>/retry": (
        "POST",
        lambda rows: f"/batches/{rows.batch_id}/handler-runs/{rows.run_id}/retry",
    ),
    "organization/handlers/<str:handler_id>": (
        "GET",
        lambda rows: f"/organization/handlers/{rows.handler_id}",
    ),
    "organization/handlers/<str:handler_id>/move": (
        "POST",
        lambda rows: f"/organization/handlers/{rows.handler_id}/move",
    ),
    "organization/handlers/<str:handler_id>/delete": (
        "POST",
        lambda rows: f"/organization/handlers/{rows.handler_id}/delete",
    ),
    "batches/new/<str:file_id>": ("GET", lambda rows: f"/batches/new/{rows.file_id}"),
    "batches/new/<str:file_id>/check": ("POST", lambda rows: f"/batches/new/{rows.file_id}/check"),
    "batches/new/<str:file_id>/table": ("GET", lambda rows: f"/batches/new/{rows.file_id}/table"),
    "files/<str:file_id>": ("GET", lambda rows: f"/files/{rows.file_id}"),
    "files/<str:file_id>/expiry": ("POST", lambda rows: f"/files/{rows.file_id}/expiry"),
    "files/<str:file_id>/delete": ("POST", lambda rows: f"/files/{rows.file_id}/delete"),
    "batches/<str:batch_id>/retry": ("POST", lambda rows: f"/batches/{rows.batch_id}/retry"),
    "batches/<str:batch_id>/clone": ("GET", lambda rows: f"/batches/{rows.batch_id}/clone"),
    "files/<str:file_id>/content": ("GET", lambda rows: f"/files/{rows.file_id}/content"),
    "models/<path:name>": ("GET", lambda rows: f"/models/{rows.model}"),
    "organization/projects/<str:project_id>": (
        "GET",
        lambda rows: f"/organization/projects/{rows.project_id}",
    ),
    "organization/projects/<str:project_id>/archive": (
        "POST",
        lambda rows: f"/organization/projects/{rows.project_id}/archive",
    ),
    "organization/keys/<str:key_id>": ("GET", lambda rows: f"/organization/keys/{rows.key_id}"),
    "organization/keys/<str:key_id>/secret": (
        "GET",
        lambda rows: f"/organization/keys/{rows.key_id}/secret",
    ),
    "organization/webhooks/deliveries/<str:delivery_id>": (
        "GET",
        lambda rows: f"/organization/webhooks/deliveries/{rows.delivery_id}",
    ),
    "organization/webhooks/<str:webhook_id>": (
        "GET",
        lambda rows: f"/organization/webhooks/{rows.webhook_endpoint_id}",
    ),
    "organization/webhooks/<str:webhook_id>/edit": (
        "GET",
        lambda rows: f"/organization/webhooks/{rows.webhook_endpoint_id}/edit",
    ),
    "organization/webhooks/<str:webhook_id>/secret": (
        "GET",
        lambda rows: f"/organization/webhooks/{rows.webhook_endpoint_id}/secret",
    ),
    "organization/webhooks/<str:webhook_id>/rotate": (
        "POST",
        lambda rows: f"/organization/webhooks/{rows.webhook_endpoint_id}/rotate",
    ),
    "organization/webhooks/<str:webhook_id>/test": (
        "POST",
        lambda rows: f"/organization/webhooks/{rows.webhook_endpoint_id}/test",
    ),
    "organization/webhooks/<str:webhook_id>/switch": (
        "POST",
        lambda rows: f"/organization/webhooks/{rows.webhook_endpoint_id}/switch",
    ),
    "organization/webhooks/<str:webhook_id>/delete": (
        "POST",
        lambda rows: f"/organization/webhooks/{rows.webhook_endpoint_id}/delete",
    ),
    "organization/keys/<str:key_id>/rotate": (
        "POST",
        lambda rows: f"/organization/keys/{rows.key_id}/rotate",
    ),
    "organization/keys/<str:key_id>/revoke": (
        "POST",
        lambda rows: f"/organization/keys/{rows.key_id}/revoke",
    ),
    "organization/trusted-issuers/<str:issuer_id>": (
        "GET",
        lambda rows: f"/organization/trusted-issuers/{rows.issuer_id}",
    ),
    "organization/trusted-issuers/<str:issuer_id>/delete": (
        "POST",
        lambda rows: f"/organization/trusted-issuers/{rows.issuer_id}/delete",
    ),
    "organization/domains/<str:domain_id>/check": (
        "POST",
        lambda rows: f"/organization/domains/{rows.domain_id}/check",
    ),
    "organization/domains/<str:domain_id>/remove": (
        "POST",
        lambda rows: f"/organization/domains/{rows.domain_id}/remove",
    ),
    "organization/limits/<str:subject_id>": (
        "GET",
        lambda rows: f"/organization/limits/{rows.user_id}",
    ),
    "organization/members/<str:user_id>/role": (
        "POST",
        lambda rows: f"/organization/members/{rows.user_id}/role",
    ),
    "organization/members/<str:user_id>/remove": (
        "POST",
        lambda rows: f"/organization/members/{rows.user_id}/remove",
    ),
    "organization/invitations/<str:invite_id>/resend": (
        "POST",
        lambda rows: f"/organization/invitations/{rows.invite_id}/resend",
    ),
    "organization/invitations/<str:invite_id>/revoke": (
        "POST",
        lambda rows: f"/organization/invitations/{rows.invite_id}/revoke",
    ),
}
"""Every page that takes an id, by its route: the method it answers, and the path of a row's page."""

FIELDS = {
    "organization/webhooks/<str:webhook_id>/rotate": {"overlap": "0"},
    "organization/webhooks/<str:webhook_id>/test": {"event_type": "batch.failed"},
}
"""What a page's form must hold."""

NO_TENANTS = {
    "accounts/": "sign-in: what it takes are signed tokens and a person's own ids",
    "invitations/": "the link's secret is the right to it; tested in accounts/test_invitations.py",
    "organization/handlers/new/": "a kind of handler is the platform's",
    "operator/": "operators' pages, across tenants; to others there are none, as tested below",
}


PLATFORM = {"POST /v1/operator/leaked_keys"}
"""The platform operators' own, across tenants; that others may not is tested with the endpoint."""


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
    assert {operation for operation in named if "{" not in operation} == set(
        LISTS
    ) | MAKING | ASKING | OWN | PLATFORM


def test_every_route_of_the_api_is_one_of_its_operations() -> None:
    paths = {
        operation.split(" ")[1].strip("/")
        for operation in [*WITH_ID, *LISTS, *MAKING, *ASKING, *OWN, *PLATFORM]
    }
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
    own = call(owner.api, operation, mine)  # so it was not the request's fault
    assert own.status_code == (400 if operation in NOT_REACHED else 200)


@pytest.mark.parametrize("operation", WITH_ID)
def test_a_foreign_row_and_a_missing_one_are_answered_alike_by(
    operation: str, owner: Person, theirs: Rows
) -> None:
    may_everything(owner)
    answers = []
    for rows in (theirs, MISSING):
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
    form = urlencode(FIELDS.get(route, {}))
    kind = "application/x-www-form-urlencoded"
    assert owner.browser.generic(method, path(mine), form, kind).status_code in (200, 302)


def test_to_others_than_operators_there_are_no_operators_pages(owner: Person) -> None:
    found = {
        route for route in routes(get_resolver().url_patterns) if route.startswith("operator/")
    }
    assert found
    for route in found:
        path = "/" + re.sub("<.+?>", owner.caller.organization.pk, route)
        for method in ("GET", "POST"):
            assert owner.browser.generic(method, path).status_code in (404, 405), route
