"""Every error under /v1 is OpenAI's envelope, wherever it comes from, with a request id."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import OperationalError
from django.test import Client
from django.utils import timezone
from django_scopes import scopes_disabled
from jsonschema import Draft202012Validator

from accounts.models import ApiKey, Organization
from portal.api import api
from portal.errors import envelope
from tests.conftest import Person
from tests.wire import assert_refused, error_of


@pytest.mark.parametrize(
    "path",
    ["/v1", "/v1/", "/v1/nope", "/v1/files/", "/v1/files/x/y/z", "/v1/FILES", "/v1//files", "/v1/%00", "/v10"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_an_unknown_path_is_not_found(method: str, path: str, db: None) -> None:
    response = Client().generic(method, path)
    assert_refused(response, 404, None, "unknown_url")


def test_a_page_that_does_not_exist_is_no_business_of_the_envelope(db: None) -> None:
    response = Client().get("/nope")
    assert (response.status_code, response["content-type"]) == (404, "text/html; charset=utf-8")


def test_an_address_that_is_no_page_says_so_to_a_browser(owner: Person) -> None:
    path, headers = "/organization/leave", {"accept": "text/html,*/*;q=0.8"}
    for client in (owner.browser, Client()):
        response = client.get(path, headers=headers)
        assert (response.status_code, response["Allow"]) == (405, "POST")
        assert "This address is no page" in response.content.decode()
    assert owner.browser.get(path).content == b"", "to programs"
    assert Client().get("/healthz", headers=headers).status_code == 200


def test_a_browser_gets_the_envelope_of_the_api(db: None) -> None:
    response = Client().delete("/v1/models", headers={"accept": "text/html"})
    assert_refused(response, 405, None, "method_not_allowed")


@pytest.mark.parametrize(
    "path", ["/v1/files", "/v1/batches", "/v1/batches/batch_x", "/v1/models", "/v1/models/a/b"]
)
@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (None, "missing_api_key"),
        ("", "missing_api_key"),
        ("Bearer", "missing_api_key"),
        ("Bearer   ", "missing_api_key"),
        ("Basic dXNlcjpwYXNz", "missing_api_key"),
        ("Bearer sk-nope", "invalid_api_key"),
        ("Bearer sk-vbp-0123456789abcdef-" + "x" * 40 + "000000", "invalid_api_key"),
        ("Bearer \xff\xfe", "invalid_api_key"),
        ("Bearer " + "x" * 8_000, "invalid_api_key"),
    ],
)
def test_without_a_valid_key_nothing_is_said(
    sent: str | None, code: str, path: str, db: None
) -> None:
    response = Client(headers={} if sent is None else {"authorization": sent}).get(path)
    assert_refused(response, 401, None, code)


@pytest.mark.parametrize("change", ["revoked_at", "expires_at"])
def test_a_revoked_and_an_expired_key_are_unknown(change: str, owner: Person) -> None:
    with scopes_disabled():
        ApiKey.objects.update(**{change: timezone.now()})
    assert_refused(owner.api.get("/v1/files"), 401, None, "invalid_api_key")


def test_another_key_with_the_same_prefix_is_unknown(owner: Person) -> None:
    changed = owner.key[:-8] + ("x" if owner.key[-8] != "x" else "y") + owner.key[-7:]
    response = Client(headers={"authorization": f"Bearer {changed}"}).get("/v1/files")
    assert_refused(response, 401, None, "invalid_api_key")


@pytest.mark.parametrize("name", ["OpenAI-Organization", "OpenAI-Project"])
def test_an_organization_or_project_that_is_not_the_keys_is_refused(
    name: str, owner: Person, globex: Organization
) -> None:
    assert_refused(owner.api.get("/v1/files", headers={name: globex.pk}), 401, name)
    own = {
        "OpenAI-Organization": owner.caller.organization.pk,
        "OpenAI-Project": owner.caller.project.pk,
    }
    assert owner.api.get("/v1/files", headers={name: own[name]}).status_code == 200
    assert owner.api.get("/v1/files", headers={name: ""}).status_code == 200


def test_every_response_has_a_request_id_of_its_own(owner: Person) -> None:
    paths = ["/v1/files", "/v1/nope", "/v1/files/x", "/healthz", "/nope"]
    ids = [owner.api.get(path)["x-request-id"] for path in paths]
    assert len({id for id in ids if id.startswith("req_") and len(id) == 36}) == len(paths)


@pytest.mark.parametrize(
    ("raised", "status", "kind"),
    [
        (RuntimeError("secret"), 500, "server_error"),
        (KeyError("secret"), 500, "server_error"),
        (RecursionError("secret"), 500, "server_error"),
        (OperationalError("secret"), 503, "server_error"),
    ],
)
def test_what_is_our_own_fault_says_nothing_about_us(
    raised: Exception, status: int, kind: str, owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise raised

    monkeypatch.setattr("models_registry.api.offered_to", fail)
    response = owner.api.get("/v1/models")
    error = error_of(response)
    assert (response.status_code, error["type"]) == (status, kind)
    assert "secret" not in error["message"]
    assert response.get("Retry-After") == ("2" if status == 503 else None)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "invalid_request_error"),
        (413, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_an_errors_type_follows_its_status(status: int, kind: str) -> None:
    assert error_of(envelope(status, "x", param="p", code="c")) == {
        "message": "x",
        "type": kind,
        "param": "p",
        "code": "c",
    }


@pytest.mark.parametrize("path", ["/v1/batches", "/v1/files", "/v1/batches/x/cancel"])
def test_a_body_of_unknown_length_is_refused(path: str, owner: Person) -> None:
    response = owner.api.generic(
        "POST", path, b"{}", HTTP_TRANSFER_ENCODING="chunked", CONTENT_LENGTH=""
    )
    assert_refused(response, 411, None, "length_required")


@pytest.mark.parametrize("path", ["/v1/batches", "/v1/auth/token", "/v1/nothing"])
def test_a_large_body_is_refused_unread_where_no_file_is_taken(path: str) -> None:
    large = {"CONTENT_LENGTH": str(3 * 2**20)}
    response = Client().generic("POST", path, b"x", "multipart/form-data; boundary=b", **large)
    assert_refused(response, 413, None, "body_too_large")


@pytest.mark.parametrize("path", ["/accounts/login/", "/organization/members", "/nothing"])
def test_a_page_takes_no_large_body(path: str) -> None:
    large = {"CONTENT_LENGTH": str(3 * 2**20)}
    response = Client().generic("POST", path, b"x", "multipart/form-data; boundary=b", **large)
    assert (response.status_code, response.content) == (413, b"What was sent is too large.")


# --- The OpenAPI document --------------------------------------------------------------------


@pytest.fixture
def document(db: None) -> dict[str, Any]:
    response = Client().get("/v1/openapi.json")
    assert response.status_code == 200
    return dict(response.json())


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_every_operation_documents_its_errors_and_its_key(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        error = operation["responses"]["default"]["content"]["application/json"]["schema"]
        assert error == {"$ref": "#/components/schemas/Error"}, name
        kind = "MakerAuthentication" if "/auth/token" in name else "KeyAuthentication"
        assert operation["security"] == [{kind: []}], name
    schemas = document["components"]["schemas"]
    assert schemas["Error"]["required"] == ["error"]
    assert schemas["ErrorDetail"]["required"] == ["message", "type", "param", "code"]
    assert document["components"]["securitySchemes"]["KeyAuthentication"]["scheme"] == "bearer"


AS_THE_ENGINE_GIVES_THEM = {
    f"POST /v1/{what}" for what in ("chat/completions", "completions", "embeddings")
}
"""Answers that are passed on; what is in them is vLLM's to say."""


def test_every_answer_has_a_schema_that_says_more_than_object(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        content = operation["responses"]["200"]["content"]
        if name == "GET /v1/files/{file_id}/content":
            assert set(content) == {"application/octet-stream"}
            continue
        if name in AS_THE_ENGINE_GIVES_THEM:
            assert content["application/json"]["schema"] == {"type": "object"}, name
            continue
        reference = content["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
        schema = document["components"]["schemas"][reference]
        Draft202012Validator.check_schema(schema)
        if "/auth/token" not in name:  # RFC 6749's answers have no such field
            assert schema["properties"]["object"]["type"] == "string", name


def test_the_form_of_a_file_shows_its_bracketed_keys(document: dict[str, Any]) -> None:
    body = operations(document)["POST /v1/files"]["requestBody"]["content"]["multipart/form-data"]
    assert set(body["schema"]["properties"]) == {
        "purpose",
        "file",
        "expires_after[anchor]",
        "expires_after[seconds]",
    }
    assert sorted(body["schema"]["required"]) == ["file", "purpose"]


def test_every_reference_in_the_document_leads_somewhere(document: dict[str, Any]) -> None:
    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return own + [found for inner in value.values() for found in references(inner)]
        return (
            [found for inner in value for found in references(inner)]
            if isinstance(value, list)
            else []
        )

    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(references(document)) <= known
    assert api.title == document["info"]["title"]
