"""What tests of the API under /v1 share: sending files and batches, and reading errors."""

from __future__ import annotations

from typing import Any

import orjson
from django.core.files.uploadedfile import SimpleUploadedFile
from django.http import HttpResponse
from django.test import Client
from django_scopes import scopes_disabled

from batches.models import Batch
from batches.services.validation import validate_batch

JSON = "application/json"
CHAT = "/v1/chat/completions"


def line(custom_id: Any = "a", model: Any = "echo", **changed: Any) -> bytes:
    """One request of a batch input, with some of its fields changed."""
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
    request = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}
    return orjson.dumps(request | changed)


def upload(api: Client, content: bytes = line(), name: str = "in.jsonl", **fields: Any) -> Any:
    """POST /v1/files; the response."""
    form = {"purpose": "batch", "file": SimpleUploadedFile(name, content)} | fields
    return api.post("/v1/files", form)


def uploaded(api: Client, content: bytes = line()) -> str:
    """The id of a file that was just uploaded."""
    response = upload(api, content)
    assert response.status_code == 200, response.content
    return str(response.json()["id"])


def post(api: Client, path: str, body: Any, **headers: Any) -> Any:
    """POST a body as JSON, or bytes as they are; the response."""
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    return api.post(path, data, content_type=JSON, headers=headers or None)


def batch_body(file_id: str, **changed: Any) -> dict[str, Any]:
    return {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"} | changed


def created(api: Client, content: bytes = line(), **changed: Any) -> dict[str, Any]:
    """A batch of this content, as POST /v1/batches answered; not yet validated."""
    response = post(api, "/v1/batches", batch_body(uploaded(api, content), **changed))
    assert response.status_code == 200, response.content
    return dict(response.json())


def validated(api: Client, content: bytes, **changed: Any) -> dict[str, Any]:
    """A batch of this content, as the wire shows it once validation has run."""
    batch = created(api, content, **changed)
    validate_batch(batch["id"])
    return dict(api.get(f"/v1/batches/{batch['id']}").json())


def row(batch_id: str) -> Batch:
    with scopes_disabled():
        return Batch.objects.select_related("input_file", "model").get(pk=batch_id)


def error_of(response: HttpResponse) -> dict[str, Any]:
    """The error in a response, which must be OpenAI's envelope with all its keys."""
    body = orjson.loads(response.content)
    assert {key: set(value) for key, value in body.items()} == {
        "error": {"message", "type", "param", "code"}
    }
    assert body["error"]["message"]
    assert response["content-type"].partition(";")[0] == JSON
    return dict(body["error"])


TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def assert_refused(
    response: HttpResponse, status: int, param: str | None = None, code: str | None = None
) -> None:
    """The response is an error of exactly this status, type, param and code."""
    error = error_of(response)
    error.pop("message")
    kind = TYPES.get(status, "invalid_request_error")
    assert (response.status_code, error) == (status, {"type": kind, "param": param, "code": code})
