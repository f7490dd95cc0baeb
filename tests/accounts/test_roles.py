"""Who may do what, written out: roles, key scopes, and the permission of each operation and page.

None of the tables is derived from the code. A permission, an operation or a page without a row
fails here; add a line to its table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson
import pytest
from django.test import Client
from django.urls import get_resolver
from django_scopes import scopes_disabled

from accounts import roles
from accounts.access import Caller
from accounts.models import ApiKey, Organization, Role, Scope, TrustedIssuer
from accounts.services import keys
from batches.models import ResultHandler
from tests.conftest import Person, _joined
from tests.test_tenancy import FORM, HOOK, operations, routes
from tests.wire import CHAT, JSON

OWN, ADM, MEM, REV, VIE = "owner", "admin", "member", "reviewer", "viewer"

MAY: Mapping[str, set[str]] = {
    "files.read": {OWN, ADM, MEM, VIE},
    "files": {OWN, ADM, MEM},
    "batches.read": {OWN, ADM, MEM, VIE},
    "batches": {OWN, ADM, MEM},
    "models.read": {OWN, ADM, MEM, REV, VIE},
    "inference": {OWN, ADM, MEM},
    "labels.read": {OWN, ADM, MEM, REV, VIE},
    "labels": {OWN, ADM, MEM, REV},
    "webhooks.read": {OWN, ADM, MEM, VIE},
    "webhooks": {OWN, ADM, MEM},
    "usage.read": {OWN, ADM, MEM, VIE},
    "keys.read": {OWN, ADM, MEM, VIE},
    "keys": {OWN, ADM, MEM},
    "keys.all": {OWN, ADM},
    "members.read": {OWN, ADM, MEM, VIE},
    "members": {OWN, ADM},
    "owners": {OWN},
    "projects.read": {OWN, ADM, MEM, VIE},
    "projects": {OWN, ADM},
    "quotas.read": {OWN, ADM, MEM, VIE},
    "quotas": {OWN, ADM},
    "audit.read": {OWN, ADM},
    "organization": {OWN, ADM},
    "organization.delete": {OWN},
}
"""Each permission, and the roles that have it."""

ADMIN = {"admin.read", "admin.write"}
OPENED: Mapping[str, set[str]] = {
    "files.read": {"files", "files.read"},
    "files": {"files"},
    "batches.read": {"batches", "batches.read"},
    "batches": {"batches"},
    "models.read": {"models.read"},
    "inference": {"inference"},
    "labels.read": {"labels", "labels.read"},
    "labels": {"labels"},
    "webhooks.read": {"webhooks", "webhooks.read"},
    "webhooks": {"webhooks"},
    "usage.read": {"usage.read", *ADMIN},
    "keys.read": ADMIN,
    "keys": {"admin.write"},
    "keys.all": {"admin.write"},
    "members.read": ADMIN,
    "members": {"admin.write"},
    "owners": set(),
    "projects.read": ADMIN,
    "projects": {"admin.write"},
    "quotas.read": ADMIN,
    "quotas": {"admin.write"},
    "audit.read": ADMIN,
    "organization": {"admin.write"},
    "organization.delete": set(),
}
"""Each permission, and the scopes that a key may have it by."""

ANYBODY, OPERATORS = "anybody", "operators"
"""In the tables below instead of a permission: whoever has a key or is a member; and staff."""

BATCH = {"input_file_id": "file-0", "endpoint": CHAT, "completion_window": "24h"}
UPLOAD = {"filename": "a.jsonl", "purpose": "batch", "bytes": 1, "mime_type": "text/plain"}
FILE = (
    FORM[0]
    .replace(
        b'name="data"',
        b'name="purpose"\r\n\r\nbatch\r\n--b\r\nContent-Disposition: form-data; name="file"',
    )
    .replace(b'filename="p"', b'filename="p.jsonl"')
)
ISSUER = {
    "name": "CI",
    "project_id": "proj_0",
    "issuer": "https://ci.example",
    "audience": "portal",
    "subject_pattern": "repo:acme/*",
    "scopes": ["batches"],
}
KEYS = "/v1/organization/projects/proj_0/api_keys"
API: Mapping[str, tuple[str, Any]] = {
    "POST /v1/files": ("files", FILE),
    "GET /v1/files": ("files.read", None),
    "GET /v1/files/{file_id}": ("files.read", None),
    "DELETE /v1/files/{file_id}": ("files", None),
    "GET /v1/files/{file_id}/content": ("files.read", None),
    "POST /v1/uploads": ("files", UPLOAD),
    "POST /v1/uploads/{upload_id}/parts": ("files", FORM[0]),
    "POST /v1/uploads/{upload_id}/complete": ("files", {"part_ids": ["part_0"]}),
    "POST /v1/uploads/{upload_id}/cancel": ("files", None),
    "POST /v1/batches": ("batches", BATCH),
    "GET /v1/batches": ("batches.read", None),
    "GET /v1/batches/{batch_id}": ("batches.read", None),
    "POST /v1/batches/{batch_id}/cancel": ("batches", None),
    "POST /v1/batches/{batch_id}/retry": ("batches", None),
    "POST /v1/chat/completions": ("inference", {"model": "none_0", "messages": [{}]}),
    "POST /v1/completions": ("inference", {"model": "none_0", "prompt": "a"}),
    "POST /v1/embeddings": ("inference", {"model": "none_0", "input": "a"}),
    "GET /v1/models": ("models.read", None),
    "GET /v1/models/{model}": ("models.read", None),
    "GET /v1/webhook_event_types": ("webhooks.read", None),
    "GET /v1/webhook_endpoints": ("webhooks.read", None),
    "POST /v1/webhook_endpoints": ("webhooks", HOOK),
    "GET /v1/webhook_endpoints/{webhook_endpoint_id}": ("webhooks.read", None),
    "POST /v1/webhook_endpoints/{webhook_endpoint_id}": ("webhooks", {"name": "Hook"}),
    "DELETE /v1/webhook_endpoints/{webhook_endpoint_id}": ("webhooks", None),
    "POST /v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret": ("webhooks", {}),
    "POST /v1/webhook_endpoints/{webhook_endpoint_id}/test": ("webhooks", {"event_type": "x"}),
    "GET /v1/webhook_deliveries": ("webhooks.read", None),
    "GET /v1/webhook_deliveries/{delivery_id}": ("webhooks.read", None),
    "POST /v1/webhook_deliveries/replay": ("webhooks", {}),
    "POST /v1/webhook_deliveries/purge": ("webhooks", {}),
    "GET /v1/result_handler_kinds": ("webhooks.read", None),
    "GET /v1/result_handlers": ("webhooks.read", None),
    "POST /v1/result_handlers": ("webhooks", {"name": "none", "kind": "parquet"}),
    "GET /v1/result_handlers/{handler_id}": ("webhooks.read", None),
    "POST /v1/result_handlers/{handler_id}": ("webhooks", {"enabled": False}),
    "DELETE /v1/result_handlers/{handler_id}": ("webhooks", None),
    "GET /v1/batches/{batch_id}/handler_runs": ("webhooks.read", None),
    "POST /v1/batches/{batch_id}/handler_runs/{run_id}/retry": ("webhooks", None),
    "GET /v1/organization": ("projects.read", None),
    "POST /v1/organization": ("organization", {"name": "Acme"}),
    "GET /v1/organization/projects": ("projects.read", None),
    "POST /v1/organization/projects": ("projects", {"name": "Default"}),
    "GET /v1/organization/projects/{project_id}": ("projects.read", None),
    "POST /v1/organization/projects/{project_id}": ("projects", {"name": "Evals"}),
    "POST /v1/organization/projects/{project_id}/archive": ("projects", None),
    "GET /v1/organization/projects/{project_id}/api_keys": ("keys.read", None),
    "POST /v1/organization/projects/{project_id}/api_keys": ("keys", {"name": "k"}),
    "GET /v1/organization/projects/{project_id}/api_keys/{key_id}": ("keys.read", None),
    "POST /v1/organization/projects/{project_id}/api_keys/{key_id}": ("keys", {"name": "k"}),
    "DELETE /v1/organization/projects/{project_id}/api_keys/{key_id}": ("keys", None),
    "POST /v1/organization/projects/{project_id}/api_keys/{key_id}/rotate": ("keys", {}),
    "GET /v1/organization/users": ("members.read", None),
    "GET /v1/organization/users/{user_id}": ("members.read", None),
    "POST /v1/organization/users/{user_id}": ("members", {"role": "viewer"}),
    "DELETE /v1/organization/users/{user_id}": ("members", None),
    "GET /v1/organization/invites": ("members.read", None),
    "POST /v1/organization/invites": ("members", {"email": "a@b.test", "role": "viewer"}),
    "GET /v1/organization/invites/{invite_id}": ("members.read", None),
    "DELETE /v1/organization/invites/{invite_id}": ("members", None),
    "GET /v1/organization/trusted_issuers": ("keys.read", None),
    "POST /v1/organization/trusted_issuers": ("keys.all", ISSUER),
    "GET /v1/organization/trusted_issuers/{issuer_id}": ("keys.read", None),
    "POST /v1/organization/trusted_issuers/{issuer_id}": ("keys.all", {"name": "CI"}),
    "DELETE /v1/organization/trusted_issuers/{issuer_id}": ("keys.all", None),
    "POST /v1/auth/token": (ANYBODY, {}),
    "POST /v1/auth/token/revoke": (ANYBODY, {"token": "x"}),
    "GET /v1/organization/usage/completions?start_time=0": ("usage.read", None),
    "GET /v1/organization/usage/embeddings?start_time=0": ("usage.read", None),
    "GET /v1/organization/usage/all?start_time=0": ("usage.read", None),
    "GET /v1/organization/costs?start_time=0": ("usage.read", None),
    "GET /v1/organization/audit_logs": ("audit.read", None),
    "GET /v1/organization/limits": ("quotas.read", None),
    "POST /v1/organization/limits": ("quotas", {"user_id": "user_0"}),
    "POST /v1/operator/leaked_keys": (OPERATORS, {"keys": ["x"]}),
}
"""Each operation of the API: the permission it needs, and a body to ask with."""

PAGES: Mapping[str, str] = {
    "GET ": ANYBODY,  # who may see no batches is sent on
    "GET batches": "batches.read",
    "GET batches/new": "batches",
    "POST batches/new": "batches",
    "GET batches/new/<str:file_id>": "batches",
    "POST batches/new/<str:file_id>": "batches",
    "POST batches/new/<str:file_id>/check": "batches",
    "GET batches/new/<str:file_id>/table": "batches",
    "POST batches/new/<str:file_id>/table": "batches",
    "GET batches/<str:batch_id>/handler-runs": "webhooks.read",
    "POST batches/<str:batch_id>/handler-runs/<str:run_id>/retry": "webhooks",
    "GET files": "files.read",
    "POST files": "files",
    "GET files/<str:file_id>": "files.read",
    "POST files/<str:file_id>/expiry": "files",
    "POST files/<str:file_id>/delete": "files",
    "POST batches/cancel": "batches",
    "GET batches/<str:batch_id>": "batches.read",
    "GET batches/<str:batch_id>/chunks": "batches.read",
    "GET batches/<str:batch_id>/log": "batches.read",
    "GET batches/<str:batch_id>/results": "batches.read",
    "GET batches/<str:batch_id>/results/<str:line>": "batches.read",
    "POST batches/<str:batch_id>/cancel": "batches",
    "POST batches/<str:batch_id>/retry": "batches",
    "GET batches/<str:batch_id>/clone": "batches",
    "POST batches/<str:batch_id>/clone": "batches",
    "GET files/<str:file_id>/content": "files.read",
    "GET models": "models.read",
    "GET models/<path:name>": "models.read",
    "POST models/<path:name>": "inference",
    "GET organization": ANYBODY,
    "POST organization": "organization",
    "POST organization/switch": ANYBODY,
    "POST organization/leave": ANYBODY,
    "POST organization/delete": "organization.delete",
    "GET organization/roles": ANYBODY,
    "GET organization/projects": "projects.read",
    "POST organization/projects": "projects",
    "GET organization/projects/<str:project_id>": "projects",
    "POST organization/projects/<str:project_id>": "projects",
    "POST organization/projects/<str:project_id>/archive": "projects",
    "GET organization/members": "members.read",
    "POST organization/members": "members",
    "POST organization/members/<str:user_id>/role": "members",
    "POST organization/members/<str:user_id>/remove": "members",
    "POST organization/invitations/<str:invite_id>/resend": "members",
    "POST organization/invitations/<str:invite_id>/revoke": "members",
    "GET organization/keys": "keys.read",
    "GET organization/keys/new": "keys",
    "POST organization/keys/new": "keys",
    "GET organization/keys/<str:key_id>": "keys",
    "POST organization/keys/<str:key_id>": "keys",
    "GET organization/keys/<str:key_id>/secret": "keys",
    "POST organization/keys/<str:key_id>/rotate": "keys",
    "POST organization/keys/<str:key_id>/revoke": "keys",
    "GET organization/webhooks": "webhooks.read",
    "GET organization/webhooks/new": "webhooks",
    "POST organization/webhooks/new": "webhooks",
    "GET organization/webhooks/deliveries": "webhooks.read",
    "POST organization/webhooks/deliveries/replay": "webhooks",
    "POST organization/webhooks/deliveries/purge": "webhooks",
    "GET organization/webhooks/deliveries/<str:delivery_id>": "webhooks.read",
    "GET organization/webhooks/<str:webhook_id>": "webhooks.read",
    "GET organization/webhooks/<str:webhook_id>/edit": "webhooks",
    "POST organization/webhooks/<str:webhook_id>/edit": "webhooks",
    "GET organization/webhooks/<str:webhook_id>/secret": "webhooks",
    "POST organization/webhooks/<str:webhook_id>/rotate": "webhooks",
    "POST organization/webhooks/<str:webhook_id>/test": "webhooks",
    "POST organization/webhooks/<str:webhook_id>/switch": "webhooks",
    "POST organization/webhooks/<str:webhook_id>/delete": "webhooks",
    "GET organization/trusted-issuers": "keys.read",
    "POST organization/trusted-issuers": "keys.all",
    "GET organization/trusted-issuers/<str:issuer_id>": "keys.all",
    "POST organization/trusted-issuers/<str:issuer_id>": "keys.all",
    "POST organization/trusted-issuers/<str:issuer_id>/delete": "keys.all",
    "GET organization/handlers": "webhooks.read",
    "GET organization/handlers/new/<str:kind>": "webhooks",
    "POST organization/handlers/new/<str:kind>": "webhooks",
    "GET organization/handlers/<str:handler_id>": "webhooks",
    "POST organization/handlers/<str:handler_id>": "webhooks",
    "POST organization/handlers/<str:handler_id>/move": "webhooks",
    "POST organization/handlers/<str:handler_id>/delete": "webhooks",
    "GET organization/retention": "organization",
    "POST organization/retention": "organization",
    "GET organization/limits": "quotas.read",
    "GET organization/limits/<str:subject_id>": "quotas.read",
    "POST organization/limits/<str:subject_id>": "quotas",
    "GET organization/audit": "audit.read",
    "GET organization/audit.jsonl": "audit.read",
    "GET organization/usage": "usage.read",
    "GET organization/usage.csv": "usage.read",
    "GET organization/sign-in": "organization",
    "POST organization/sign-in": "organization",
    "POST organization/sign-in/remove": "organization",
    "POST organization/domains": "organization",
    "POST organization/domains/<str:domain_id>/check": "organization",
    "POST organization/domains/<str:domain_id>/remove": "organization",
}
"""Each page that is an organization's: the permission it needs."""

NOT_OF_AN_ORGANIZATION = (
    "healthz",
    "readyz",
    "metrics",
    ".well-known/",
    "v1/",
    "accounts/",
    "operator/",  # shown to be nobody else's in test_tenancy.py
    "invitations/",
    "organization/new",  # by REGISTRATION, in test_organizations.py
)


@pytest.fixture
def people(owner: Person, acme: Organization) -> dict[str, Person]:
    """One person of each role, each with a key that may all but operate."""
    found = {
        role: owner if role == Role.OWNER else _joined(f"one-{role}@acme.test", acme, role)
        for role in Role.values
    }
    with scopes_disabled():
        ApiKey.objects.update(scopes=sorted(set(Scope.values) - {Scope.OPERATOR}))
    return found


@pytest.fixture(autouse=True)
def no_rate_limits(settings: Any) -> None:
    for name in ("REQUESTS", "BATCHES", "FILES", "ANONYMOUS"):
        setattr(settings, f"RATE_LIMIT_{name}", 10_000)


# --- The two tables of the code -----------------------------------------------------------------


@pytest.mark.parametrize("role", Role.values)
@pytest.mark.parametrize("permission", roles.PERMISSIONS)
def test_a_role_permits(permission: str, role: str) -> None:
    caller = Caller(Organization(), project=None, role=role)  # type: ignore[arg-type]
    assert caller.may(permission) == (role in MAY[permission])


@pytest.mark.parametrize("scope", Scope.values)
@pytest.mark.parametrize("permission", roles.PERMISSIONS)
def test_a_scope_permits(permission: str, scope: str) -> None:
    caller = Caller(Organization(), project=None, scopes=(scope,))  # type: ignore[arg-type]
    assert caller.may(permission) == (scope in OPENED[permission])
    with_role = replace(caller, role="viewer")
    assert with_role.may(permission) == (
        scope in OPENED[permission] and "viewer" in MAY[permission]
    )


def test_the_tables_have_no_other_rows() -> None:
    assert set(MAY) == set(OPENED) == set(roles.PERMISSIONS)
    assert set().union(*MAY.values()) == set(Role.values)


def test_operators_only_read() -> None:
    reading = {name for name in MAY if name.endswith(".read")}
    caller = Caller(Organization(), project=None, operator=True)  # type: ignore[arg-type]
    assert caller.permissions == reading


def test_the_page_is_the_table(reviewer: Person) -> None:
    page = reviewer.browser.get("/organization/roles").content.decode()
    shown = {}
    for row in re.findall(r"<tr>(.+?)</tr>", page, re.S)[1:]:
        name = re.search(r'<code class="portal-id">(.+?)</code>', row)
        cells = re.findall(r'data-label="(.+?)">.*?<span class="visually-hidden">(\w+)<', row, re.S)
        assert name
        shown[name[1]] = {label.lower() for label, may in cells if may == "yes"}
    assert shown == MAY


# --- Every operation of the API -------------------------------------------------------------


def ask(client: Client, operation: str) -> int:
    """The status that the operation answers, asked for what does not exist."""
    method, path = operation.split(" ")
    given = API[operation][1]
    body, kind = (given, FORM[1]) if isinstance(given, bytes) else (orjson.dumps(given), JSON)
    path = re.sub(r"\{(\w+?)_?(?:id)?\}", r"\1_0", path)
    status = client.generic(method, path, b"" if given is None else body, kind).status_code
    assert status < 500
    return int(status)


def test_every_operation_has_its_row_here() -> None:
    assert {operation.partition("?")[0] for operation in API} == set(operations())


@pytest.mark.parametrize("operation", API)
def test_an_operation_is_open_to_the_roles(operation: str, people: dict[str, Person]) -> None:
    needed = API[operation][0]
    allowed = {ANYBODY: set(people), OPERATORS: set()}.get(needed) or MAY.get(needed, set())
    found = {role for role, person in people.items() if ask(person.api, operation) != 403}
    assert found == allowed


@pytest.mark.parametrize("operation", API)
def test_an_operation_is_open_to_the_scopes(operation: str, owner: Person) -> None:
    """By service keys, which have no person's role."""
    needed = API[operation][0]
    allowed = {ANYBODY: set(Scope.values), OPERATORS: set()}.get(needed) or OPENED.get(
        needed, set()
    )
    key, text = keys.create_api_key(project=owner.caller.project, name="service")
    client = Client(headers={"authorization": f"Bearer {text}"})
    found = set()
    for scope in Scope.values:
        with scopes_disabled():
            ApiKey.objects.filter(pk=key.pk).update(scopes=[scope])
        if ask(client, operation) != 403:
            found.add(scope)
    assert found == allowed


# --- Every page -----------------------------------------------------------------------------


def test_every_page_has_its_row_here() -> None:
    found = {
        route
        for route in routes(get_resolver().url_patterns)
        if not route.startswith(NOT_OF_AN_ORGANIZATION)
    }
    assert {row.partition(" ")[2] for row in PAGES} == found


def path_of(route: str, person: Person) -> str:
    """The page's path: of something there is, where only that tells who may, else of nothing."""
    with scopes_disabled():
        key = ApiKey.objects.get(created_by=person.user)  # one's own, which takes less
        ApiKey.objects.filter(pk=key.pk).update(scopes=["models.read"])
        project = person.caller.project
        issuer = TrustedIssuer.objects.create(
            organization=project.organization, project=project, scopes=["batches"]
        )
        handler, _ = ResultHandler.objects.get_or_create(
            organization=project.organization, name="mine", kind="parquet", position=1
        )
    route = route.replace("<str:key_id>", key.pk).replace("<str:issuer_id>", issuer.pk)
    route = route.replace("<str:handler_id>", handler.pk)
    return "/" + re.sub("<.+?>", "none_0", route)


@pytest.mark.parametrize("row", PAGES)
def test_a_page_is_open_to_the_roles(row: str, people: dict[str, Person]) -> None:
    method, _, route = row.partition(" ")
    allowed = set(people) if PAGES[row] == ANYBODY else MAY[PAGES[row]]
    found = set()
    for role, person in people.items():
        response = person.browser.generic(method, path_of(route, person))
        assert response.status_code in (200, 302, 400, 403, 404)
        if response.status_code != 403:
            found.add(role)
    assert found == allowed
