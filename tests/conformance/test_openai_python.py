"""The official Python SDK, unmodified: only `base_url` and `api_key` are set."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest
from openai import OpenAI

from tests.conformance.conftest import Tenant
from tests.stack import Stack, answers, finished, lines, send, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("stack")]

CHAT: Any = "/v1/chat/completions"


@pytest.fixture
def client(tenant: Tenant) -> OpenAI:
    return tenant.client


def error_of(call: Callable[[], Any], kind: type[openai.APIStatusError]) -> dict[str, Any]:
    """The body of the error that the call raises, which must be of this very class."""
    with pytest.raises(kind) as raised:
        call()
    assert type(raised.value) is kind
    body = raised.value.body
    assert isinstance(body, dict)
    assert set(body) == {"message", "type", "param", "code"}
    assert raised.value.request_id is not None
    assert raised.value.request_id.startswith("req_")
    return {name: body[name] for name in ("type", "param", "code")}


def invalid(param: str | None, code: str | None) -> dict[str, Any]:
    return {"type": "invalid_request_error", "param": param, "code": code}


# --- Files -----------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_went(client: OpenAI, tmp_path: Path) -> None:
    content = lines(2)
    path = tmp_path / "from-disk.jsonl"
    path.write_bytes(content)
    stream = io.BytesIO(content)
    stream.name = "stream.jsonl"
    given: list[tuple[Any, str]] = [
        (path, "from-disk.jsonl"),
        (path.open("rb"), "from-disk.jsonl"),
        (("named.jsonl", content), "named.jsonl"),
        (("typed.jsonl", content, "application/jsonl"), "typed.jsonl"),
        (stream, "stream.jsonl"),
    ]
    for file, name in given:
        made = client.files.create(file=file, purpose="batch")
        assert made._request_id is not None
        assert (made.object, made.bytes, made.filename, made.purpose, made.status) == (
            "file",
            len(content),
            name,
            "batch",
            "processed",
        )
        assert client.files.retrieve(made.id) == made
        assert client.files.wait_for_processing(made.id, poll_interval=0.1) == made
        assert client.files.content(made.id).content == content
        assert client.files.delete(made.id).to_dict() == {
            "id": made.id,
            "object": "file",
            "deleted": True,
        }
        error = error_of(lambda id=made.id: client.files.retrieve(id), openai.NotFoundError)
        assert error == invalid("file_id", "not_found")


def test_bytes_without_a_name_have_no_ending_and_are_no_batch_input(client: OpenAI) -> None:
    error = error_of(
        lambda: client.files.create(file=b"{}\n", purpose="batch"), openai.BadRequestError
    )
    assert error == invalid("file", "invalid_file_format")
    assert client.files.create(file=b"{}\n", purpose="user_data").filename == "upload"


def test_a_file_that_expires_says_when(client: OpenAI) -> None:
    file = client.files.create(
        file=("in.jsonl", lines(1)),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert file.expires_at is not None
    assert file.expires_at - file.created_at in (3600, 3601)


def test_a_part_of_the_content_can_be_had(client: OpenAI) -> None:
    file = client.files.create(file=("x.bin", b"0123456789"), purpose="user_data")
    part = client.files.with_raw_response.content(file.id, extra_headers={"Range": "bytes=2-4"})
    assert (part.http_response.status_code, part.http_response.content) == (206, b"234")
    with client.files.with_streaming_response.content(file.id) as whole:
        assert b"".join(whole.iter_bytes(3)) == b"0123456789"


def test_paging_walks_all_files_in_either_order(stack: Stack) -> None:
    tenant = Tenant(stack, "paging", "")
    tenant.slug = stack.manage(
        "create_org", "Paging", "--owner", "o@paging.test", stdin="correct horse 9"
    )
    tenant.key = stack.manage("create_api_key", "--org", tenant.slug, "--name", "tests")
    client = tenant.client
    ids = [
        client.files.create(file=(f"{n}.jsonl", b"{}\n"), purpose="evals" if n % 3 else "batch").id
        for n in range(7)
    ]
    assert [file.id for file in client.files.list(limit=2)] == ids[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == ids
    assert [file.id for file in client.files.list()] == ids[::-1]
    assert [file.id for file in client.files.list(purpose="batch", limit=2, order="asc")] == ids[
        ::3
    ]
    assert [file.id for file in client.files.list(after=ids[2], order="asc", limit=3)] == ids[3:]
    page = client.files.list(limit=4)
    assert (len(page.data), page.has_more, page.has_next_page()) == (4, True, True)
    batches = [
        client.batches.create(input_file_id=ids[0], endpoint=CHAT, completion_window="24h").id
        for _ in range(5)
    ]
    assert [batch.id for batch in client.batches.list(limit=2)] == batches[::-1]


# --- Uploads ---------------------------------------------------------------------------------


def test_an_upload_in_parts_becomes_a_file(client: OpenAI) -> None:
    content = lines(20)
    upload = client.uploads.create(
        filename="parts.jsonl", purpose="batch", bytes=len(content), mime_type="text/jsonl"
    )
    assert (upload.status, upload.bytes, upload.file) == ("pending", len(content), None)
    pieces = [content[:100], content[100:700], content[700:]]
    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(lambda p: client.uploads.parts.create(upload.id, data=p), pieces))
    assert [part.upload_id for part in parts] == [upload.id] * 3
    ids = [part.id for part in parts]
    error = error_of(
        lambda: client.uploads.complete(upload.id, part_ids=ids[:2]), openai.BadRequestError
    )
    assert error == invalid("part_ids", "size_mismatch")
    done = client.uploads.complete(
        upload.id, part_ids=ids, md5=hashlib.md5(content, usedforsecurity=False).hexdigest()
    )
    assert done.file is not None
    assert (done.status, done.file.bytes) == ("completed", len(content))
    assert client.files.retrieve(done.file.id) == done.file
    assert client.files.content(done.file.id).content == content


def test_the_sdks_own_helper_uploads_in_chunks(client: OpenAI, tmp_path: Path) -> None:
    content = lines(100)
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    path = tmp_path / "big.jsonl"
    path.write_bytes(content)
    of_path = client.uploads.upload_file_chunked(
        file=path, mime_type="text/jsonl", purpose="batch", part_size=4096, md5=md5
    )
    of_bytes = client.uploads.upload_file_chunked(
        file=content,
        filename="big.jsonl",
        bytes=len(content),
        mime_type="text/jsonl",
        purpose="batch",
        part_size=5000,
    )
    for upload in (of_path, of_bytes):
        assert upload.file is not None
        assert upload.file.filename == "big.jsonl"
        assert client.files.content(upload.file.id).content == content
    error = error_of(
        lambda: client.uploads.upload_file_chunked(
            file=path, mime_type="text/jsonl", purpose="batch", md5="0" * 32
        ),
        openai.BadRequestError,
    )
    assert error == invalid("md5", "checksum_mismatch")


def test_a_cancelled_upload_is_over(client: OpenAI) -> None:
    upload = client.uploads.create(
        filename="x.jsonl", purpose="batch", bytes=10, mime_type="text/jsonl"
    )
    assert client.uploads.cancel(upload.id).status == "cancelled"
    for call in (
        lambda: client.uploads.parts.create(upload.id, data=b"x"),
        lambda: client.uploads.complete(upload.id, part_ids=["part_x"]),
        lambda: client.uploads.cancel(upload.id),
    ):
        assert error_of(call, openai.BadRequestError) == invalid("upload_id", "upload_not_pending")


# --- Batches ---------------------------------------------------------------------------------


def test_a_batch_is_answered_line_for_line_in_the_order_of_its_input(client: OpenAI) -> None:
    made = send(
        client,
        lines(50),
        metadata={"run": "7"},
        output_expires_after={"anchor": "created_at", "seconds": 3600},
        extra_body={"priority": "high"},
    )
    assert (made.status, made.metadata, made.to_dict()["priority"]) == (
        "validating",
        {"run": "7"},
        "high",
    )
    batch = finished(client, made.id)
    assert (batch.status, batch.model, batch.errors, batch.error_file_id) == (
        "completed",
        "echo",
        None,
        None,
    )
    assert batch.request_counts.to_dict() == {"total": 50, "completed": 50, "failed": 0}
    assert batch.usage.total_tokens == batch.usage.input_tokens + batch.usage.output_tokens > 0
    output = answers(client, batch.output_file_id)
    assert [line["custom_id"] for line in output] == [f"request-{at}" for at in range(50)]
    said = [line["response"]["body"]["choices"][0]["message"]["content"] for line in output]
    assert said == [f"words {at}" for at in range(50)]
    assert {(line["error"], line["response"]["status_code"]) for line in output} == {(None, 200)}
    file = client.files.retrieve(batch.output_file_id)
    assert (file.purpose, file.expires_at is not None) == ("batch_output", True)
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert times == sorted(times)
    error = error_of(lambda: client.batches.cancel(batch.id), openai.BadRequestError)
    assert error == invalid("batch_id", "batch_not_cancellable")


def test_every_bad_line_is_listed(client: OpenAI) -> None:
    good = lines(2).splitlines()
    other = good[1].replace(b"request-1", b"other").replace(b'"echo"', b'"another"')
    content = b"\n".join([good[0], b"{nope", good[1], good[1], other])
    batch = finished(client, send(client, content).id)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    found = [(error.code, error.param, error.line) for error in batch.errors.data]
    assert found == [
        ("invalid_json_line", None, 2),
        ("duplicate_custom_id", "custom_id", 4),
        ("model_mismatch", "body.model", 5),
    ]


def test_a_model_that_is_not_offered_fails_the_batch(client: OpenAI, stack: Stack) -> None:
    stack.manage("register_model", "acmes", "--source=none", "--engine=instant", "--org=acme")
    batch = finished(client, send(client, lines(1, "acmes")).id)
    assert [(error.code, error.param) for error in batch.errors.data] == [
        ("model_not_found", "body.model")
    ]


def test_a_cancelled_batch_answers_for_every_line(client: OpenAI, stack: Stack) -> None:
    model = stack.instant("slowly", delay_ms=2_000, concurrency=2)
    batch = send(client, lines(200, model))
    assert batch.queue is None
    queue = wait_for(lambda: client.batches.retrieve(batch.id).queue)
    assert set(queue) == {"position", "reason", "estimated_start_at", "estimated_completion_at"}
    assert str(queue["reason"]).startswith(("waiting: ", "running on "))
    cancelled = client.batches.cancel(batch.id)
    assert cancelled.status in ("cancelling", "cancelled")
    assert cancelled.queue is None
    ended = finished(client, batch.id)
    found = answers(client, ended.output_file_id) + answers(client, ended.error_file_id)
    assert (ended.status, ended.request_counts.total) == ("cancelled", 200)
    assert sorted(line["custom_id"] for line in found) == sorted(
        f"request-{at}" for at in range(200)
    )
    undone = answers(client, ended.error_file_id)
    assert {line["error"]["code"] for line in undone} == {"batch_cancelled"}


@pytest.mark.parametrize(
    ("changed", "param", "code"),
    [
        ({"endpoint": "/v1/nope"}, "endpoint", "invalid_value"),
        ({"completion_window": "25x"}, "completion_window", "invalid_value"),
        ({"metadata": {"k": "x" * 513}}, "metadata.k", None),
        ({"extra_body": {"priority": "urgent"}}, "priority", "invalid_value"),
    ],
)
def test_a_bad_request_names_its_field(
    changed: dict[str, Any], param: str, code: str | None, client: OpenAI
) -> None:
    file = client.files.create(file=("in.jsonl", lines(1)), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"} | changed
    error = error_of(lambda: client.batches.create(**body), openai.BadRequestError)
    assert error == invalid(param, code)


def test_one_idempotency_key_makes_one_batch(client: OpenAI) -> None:
    file = client.files.create(file=("in.jsonl", lines(1)), purpose="batch")

    def create(key: str, window: Any = "24h") -> str:
        return client.batches.create(
            input_file_id=file.id,
            endpoint=CHAT,
            completion_window=window,
            extra_headers={"Idempotency-Key": key},
        ).id

    assert create(f"a-{file.id}") == create(f"a-{file.id}")
    error = error_of(lambda: create(f"a-{file.id}", "48h"), openai.BadRequestError)
    assert error == invalid(None, "idempotency_key_reused")
    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(create, [f"b-{file.id}"] * 8))
    assert len(ids) == 1
    mine = [batch for batch in client.batches.list() if batch.input_file_id == file.id]
    assert len(mine) == 2


# --- Models, keys and errors -----------------------------------------------------------------


def test_models_are_found_by_ids_with_slashes(client: OpenAI, stack: Stack) -> None:
    stack.instant("Qwen/Qwen3-8B")
    models = {model.id: model for model in client.models.list()}
    assert {"echo", "Qwen/Qwen3-8B"} <= set(models)
    assert client.models.retrieve("Qwen/Qwen3-8B") == models["Qwen/Qwen3-8B"]
    assert (models["echo"].object, models["echo"].owned_by) == ("model", "portal")
    error = error_of(lambda: client.models.retrieve("nope/nope"), openai.NotFoundError)
    assert error == invalid("model", "model_not_found")


def test_a_wrong_key_is_an_authentication_error(stack: Stack) -> None:
    client = stack.client("sk-nope")
    for call in (client.files.list, client.batches.list, client.models.list):
        error = error_of(call, openai.AuthenticationError)
        assert error == {
            "type": "authentication_error",
            "param": None,
            "code": "invalid_api_key",
        }


def test_a_key_without_the_scope_is_denied(tenant: Tenant) -> None:
    client = tenant.narrow("files.read")
    assert client.files.list(limit=1).object == "list"
    denied = {"type": "permission_error", "param": None, "code": "insufficient_scope"}
    for call in (
        lambda: client.files.create(file=("in.jsonl", b"{}\n"), purpose="batch"),
        lambda: client.files.delete("file-x"),
        client.batches.list,
        client.models.list,
    ):
        assert error_of(call, openai.PermissionDeniedError) == denied


def test_another_organizations_rows_are_not_found(client: OpenAI, outsider: Tenant) -> None:
    theirs = outsider.client.files.list().data[0]
    for call in (
        lambda: client.files.retrieve(theirs.id),
        lambda: client.files.content(theirs.id),
        lambda: client.files.delete(theirs.id),
    ):
        assert error_of(call, openai.NotFoundError) == invalid("file_id", "not_found")
    error = error_of(
        lambda: client.batches.create(
            input_file_id=theirs.id, endpoint=CHAT, completion_window="24h"
        ),
        openai.NotFoundError,
    )
    assert error == invalid("input_file_id", "not_found")
    assert theirs.id not in [file.id for file in client.files.list()]


@pytest.mark.parametrize("option", ["organization", "project"])
def test_another_organization_or_project_is_not_the_keys(option: str, tenant: Tenant) -> None:
    client = tenant.stack.client(tenant.key, **{option: "org_other"})
    error = error_of(client.files.list, openai.AuthenticationError)
    header = {"organization": "OpenAI-Organization", "project": "OpenAI-Project"}[option]
    assert error == {"type": "authentication_error", "param": header, "code": None}


def test_an_unknown_path_is_a_not_found_error(client: OpenAI) -> None:
    error = error_of(lambda: client.get("/nope", cast_to=object), openai.NotFoundError)
    assert error == invalid(None, "unknown_url")


def test_the_async_client_does_the_same(tenant: Tenant) -> None:
    async def go() -> tuple[str, list[Any]]:
        url = f"{tenant.stack.base_url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=tenant.key) as client:
            file = await client.files.create(file=("in.jsonl", lines(3)), purpose="batch")
            listed = [found.id async for found in client.files.list(limit=2)]
            assert file.id in listed
            batch = await client.batches.create(
                input_file_id=file.id, endpoint=CHAT, completion_window="24h"
            )
            while batch.status not in ("completed", "failed"):
                await asyncio.sleep(0.1)
                batch = await client.batches.retrieve(batch.id)
            content = await client.files.content(batch.output_file_id or "")
            with pytest.raises(openai.NotFoundError):
                await client.batches.retrieve("batch_nope")
            return batch.status, [orjson.loads(line) for line in content.content.splitlines()]

    status, output = asyncio.run(go())
    assert (status, [line["custom_id"] for line in output]) == (
        "completed",
        ["request-0", "request-1", "request-2"],
    )
