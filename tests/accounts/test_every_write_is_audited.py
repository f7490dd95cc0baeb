"""Whatever the API changes leaves exactly one event, and what it refuses leaves none.

The operations are read from the API itself: a new one that writes fails here until it has a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest
from django_scopes import scopes_disabled

from accounts.models import AuditEvent, User
from tests.batches.conftest import Disk, disk  # noqa: F401 a fixture
from tests.conftest import Person
from tests.test_tenancy import HOOK, WITH_ID, Rows, operations, rows_of
from tests.wire import JSON

ORGANIZATION = "/v1/organization"
PROJECT = f"{ORGANIZATION}/projects/{{project_id}}"
KEY = f"{PROJECT}/api_keys/{{key_id}}"
AUDITED: dict[str, str] = {
    f"POST {ORGANIZATION}": "organization.renamed",
    f"POST {ORGANIZATION}/limits": "limits.changed",
    f"POST {ORGANIZATION}/projects": "project.created",
    f"POST {PROJECT}": "project.renamed",
    f"POST {PROJECT}/archive": "project.archived",
    f"POST {PROJECT}/api_keys": "api_key.created",
    f"POST {KEY}": "api_key.updated",
    f"POST {KEY}/rotate": "api_key.rotated",
    f"DELETE {KEY}": "api_key.revoked",
    "POST /v1/webhook_endpoints": "webhook.created",
    "POST /v1/webhook_endpoints/{webhook_endpoint_id}": "webhook.updated",
    "DELETE /v1/webhook_endpoints/{webhook_endpoint_id}": "webhook.deleted",
    "POST /v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret": "webhook.secret_rotated",
    "POST /v1/webhook_deliveries/replay": "webhook.replayed",
    "POST /v1/webhook_deliveries/purge": "webhook.dead_letters_purged",
    "POST /v1/result_handlers": "result_handler.created",
    "POST /v1/result_handlers/{handler_id}": "result_handler.updated",
    "DELETE /v1/result_handlers/{handler_id}": "result_handler.deleted",
    "POST /v1/batches/{batch_id}/handler_runs/{run_id}/retry": "result_handler.retried",
    f"POST {ORGANIZATION}/trusted_issuers": "trusted_issuer.created",
    f"POST {ORGANIZATION}/trusted_issuers/{{issuer_id}}": "trusted_issuer.updated",
    f"DELETE {ORGANIZATION}/trusted_issuers/{{issuer_id}}": "trusted_issuer.deleted",
    f"POST {ORGANIZATION}/users/{{user_id}}": "member.role_changed",
    f"DELETE {ORGANIZATION}/users/{{user_id}}": "member.removed",
    f"POST {ORGANIZATION}/invites": "invitation.created",
    f"DELETE {ORGANIZATION}/invites/{{invite_id}}": "invitation.revoked",
    "POST /v1/auth/token": "token.created",
    "POST /v1/auth/token/revoke": "token.revoked",
    "POST /v1/operator/leaked_keys": "api_key.revoked_as_leaked",
    "DELETE /v1/files/{file_id}": "file.deleted",
    "POST /v1/batches/{batch_id}/cancel": "batch.cancelled",
}
"""Every operation that an organization would ask about, and what its event is called."""

WORK = (
    "/v1/files",
    "/v1/uploads",
    "/v1/batches",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
)
"""The work itself is not audited, but for its end by hand: it has rows of its own that say who made
them, and when; or, of requests that are answered at once, what was used."""
NEEDS_A_RECEIVER = "POST /v1/webhook_endpoints/{webhook_endpoint_id}/test"
"""Audited, too: shown in tests/batches/test_webhook_api.py."""

ISSUER = {
    "name": "Other",
    "issuer": "https://other.test",
    "audience": "batches",
    "subject_pattern": "repo:acme",
    "scopes": ["files"],
}
Body = Callable[[Person, Rows], dict[str, Any]]
BODIES: dict[str, Body] = {
    f"POST {ORGANIZATION}": lambda person, rows: {"name": "Renamed"},
    f"POST {ORGANIZATION}/limits": lambda person, rows: {
        "api_key_id": rows.key_id,
        "requests_per_minute": 7,
    },
    f"POST {ORGANIZATION}/projects": lambda person, rows: {"name": "Nightly"},
    "POST /v1/webhook_endpoints": lambda person, rows: HOOK,
    "POST /v1/webhook_deliveries/replay": lambda person, rows: {"ids": [rows.delivery_id]},
    "POST /v1/webhook_deliveries/purge": lambda person, rows: {"ids": [rows.delivery_id]},
    "POST /v1/result_handlers": lambda person, rows: {"name": "second", "kind": "parquet"},
    f"POST {ORGANIZATION}/trusted_issuers": lambda person, rows: {
        **ISSUER,
        "project_id": rows.own_project_id,
    },
    f"POST {ORGANIZATION}/invites": lambda person, rows: {
        "email": "new@elsewhere.test",
        "role": "member",
    },
    "POST /v1/auth/token": lambda person, rows: {},
    "POST /v1/auth/token/revoke": lambda person, rows: {"token": token_of(person)},
    "POST /v1/operator/leaked_keys": lambda person, rows: {"keys": [person.key], "revoke": True},
}
"""What makes the operations succeed that take no id; the others' are those of the tenancy test."""


def token_of(person: Person) -> str:
    response = person.api.post("/v1/auth/token", b"{}", content_type=JSON)
    return str(response.json()["access_token"])


def body_of(operation: str, person: Person, rows: Rows) -> bytes:
    if make := BODIES.get(operation):
        return orjson.dumps(make(person, rows))
    known = WITH_ID[operation]
    return orjson.dumps(known(rows)) if known else b""


def events() -> list[str]:
    """The actions of all chains, oldest first."""
    with scopes_disabled():
        return list(AuditEvent.objects.order_by("created_at").values_list("action", flat=True))


def do(operation: str, person: Person, rows: Rows, body: bytes) -> Any:
    method, path = operation.split(" ")
    return person.api.generic(method, path.format(**vars(rows)), body, JSON)


def test_every_operation_that_writes_has_its_row() -> None:
    writing = {
        operation
        for operation in operations()
        if not operation.startswith("GET ")
        and (operation in AUDITED or not operation.split(" ")[1].startswith(WORK))
    }
    assert writing == {*AUDITED, NEEDS_A_RECEIVER}


@pytest.fixture
def mine(owner: Person, disk: Disk) -> Rows:  # noqa: F811
    return rows_of(owner)


@pytest.mark.parametrize("operation", AUDITED)
def test_what_succeeds_leaves_one_event(operation: str, owner: Person, mine: Rows) -> None:
    User.objects.filter(pk=owner.user.pk).update(is_staff="operator" in operation)
    body = body_of(operation, owner, mine)
    before = events()
    response = do(operation, owner, mine, body)
    assert response.status_code == 200, response.content
    assert events()[len(before) :] == [AUDITED[operation]]


@pytest.mark.parametrize("operation", AUDITED)
def test_what_is_refused_leaves_none(
    operation: str, owner: Person, viewer: Person, mine: Rows
) -> None:
    body = body_of(operation, owner, mine)
    before = events()
    viewer_may = operation.startswith("POST /v1/auth/")  # their own token
    refused = do(operation, viewer, mine, b"[]" if viewer_may else body)
    assert refused.status_code in (400, 401, 403, 404), refused.content
    assert events() == before
