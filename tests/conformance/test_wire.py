"""What only a real server shows: bodies that break off, lengths that lie, and any request at all."""

from __future__ import annotations

import re
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import urlsplit

import orjson
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode, checks

from tests.conformance.conftest import Tenant, tenant_of
from tests.stack import Stack, lines, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("stack")]

BOUNDARY = "b0undary"


@pytest.fixture(scope="module")
def raw(stack: Stack) -> Tenant:
    """An organization that has stored nothing yet."""
    return tenant_of(stack, "raw")


@pytest.fixture(scope="module")
def fuzzed(stack: Stack) -> Tenant:
    return tenant_of(stack, "fuzzed")


@pytest.fixture
def nothing_stored(raw: Tenant) -> Iterator[None]:
    """Whatever the test sends, neither a row nor a byte stays behind."""
    incoming = raw.stack.data_dir / "files" / "incoming"
    before = set(incoming.iterdir())
    yield
    assert raw.client.files.list().data == []
    assert not list((raw.stack.data_dir / "files" / raw.organization).glob("*"))
    wait_for(lambda: set(incoming.iterdir()) <= before, seconds=20)


def form(content: bytes, name: str = "file", end: bytes = f"--{BOUNDARY}--\r\n".encode()) -> bytes:
    head = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name="
    return b"".join(
        [
            f'{head}"purpose"\r\n\r\nbatch\r\n'.encode(),
            f'{head}"{name}"; filename="in.jsonl"\r\n\r\n'.encode() + content + b"\r\n",
            end,
        ]
    )


def exchange(
    raw: Tenant,
    body: bytes,
    *headers: str,
    path: str = "/v1/files",
    method: str = "POST",
    kind: str = f"multipart/form-data; boundary={BOUNDARY}",
    shut: bool = False,
) -> tuple[int, dict[str, str], bytes]:
    """Send these very bytes; `shut`: then say that no more will come. Status, headers, body."""
    address = urlsplit(raw.stack.base_url)
    lines = [
        f"{method} {path} HTTP/1.1",
        f"Host: {address.netloc}",
        f"Authorization: Bearer {raw.key}",
        f"Content-Type: {kind}",
        "Connection: close",
        *headers,
    ]
    with closing(socket.create_connection((address.hostname, address.port), timeout=30)) as link:
        link.sendall("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)
        if shut:
            link.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: link.recv(65536), b""))
    head, _, content = answer.partition(b"\r\n\r\n")
    status, *fields = head.decode("latin-1").split("\r\n")
    pairs = (field.split(": ", 1) for field in fields)
    return int(status.split()[1]), {name.lower(): value for name, value in pairs}, content


def refused(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, str | None, str | None]:
    """Status, param and code of an answer that must be the envelope with a request id."""
    status, headers, content = answer
    error = orjson.loads(content)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert re.fullmatch("req_[0-9a-f]{32}", headers["x-request-id"])
    return status, error["param"], error["code"]


WHOLE = form(lines(20))


@pytest.mark.usefixtures("nothing_stored")
def test_an_upload_that_breaks_off_is_refused_and_nothing_is_kept(raw: Tenant) -> None:
    announced = f"Content-Length: {len(WHOLE)}"
    for cut in (1, 4, 20, 300, len(WHOLE) // 2, len(WHOLE) - 200):
        answer = exchange(raw, WHOLE[:-cut], announced, shut=True)
        assert refused(answer) == (400, "file", "incomplete_body"), cut
    for kept in (0, 60):  # before the file began
        answer = exchange(raw, WHOLE[:kept], announced, shut=True)
        assert refused(answer)[0] == 400


@pytest.mark.usefixtures("nothing_stored")
def test_a_body_without_its_last_boundary_is_refused(raw: Tenant) -> None:
    for end in (b"", b"--other--\r\n", f"--{BOUNDARY}\r\n".encode(), f"--{BOUNDARY}-".encode()):
        body = form(lines(20), end=end)
        answer = exchange(raw, body, f"Content-Length: {len(body)}")
        assert refused(answer) == (400, "file", "incomplete_body"), end


@pytest.mark.usefixtures("nothing_stored")
def test_a_body_larger_than_its_content_length_is_refused(raw: Tenant) -> None:
    """What comes after the announced length is another request, or none: never part of the file."""
    for missing in (3, 100, len(WHOLE) // 2):
        answer = exchange(raw, WHOLE, f"Content-Length: {len(WHOLE) - missing}")
        assert refused(answer) == (400, "file", "incomplete_body"), missing


@pytest.mark.usefixtures("nothing_stored")
def test_a_part_that_breaks_off_is_refused_too(raw: Tenant) -> None:
    upload = raw.client.uploads.create(
        filename="x.jsonl", purpose="batch", bytes=1_000, mime_type="text/jsonl"
    )
    body, path = form(lines(20), name="data"), f"/v1/uploads/{upload.id}/parts"
    answer = exchange(raw, body[:-200], f"Content-Length: {len(body)}", path=path, shut=True)
    assert refused(answer) == (400, "data", "incomplete_body")


@pytest.mark.usefixtures("nothing_stored")
def test_too_large_a_body_is_refused_before_it_is_sent(raw: Tenant) -> None:
    """The answer comes though not one byte of the body does."""
    for path, length in (("/v1/files", 537_000_000), ("/v1/uploads/upload_x/parts", 68_000_000)):
        answer = exchange(raw, b"", f"Content-Length: {length}", path=path)
        assert refused(answer) == (413, None, "body_too_large")
    answer = exchange(
        raw, b"", "Content-Length: 3000000", path="/v1/batches", kind="application/json"
    )
    assert refused(answer) == (413, None, "body_too_large")


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


CHUNKED = "Transfer-Encoding: chunked"
LAST_CHUNK = b"0\r\n\r\n"


@pytest.mark.usefixtures("nothing_stored")
def test_a_chunked_form_that_breaks_off_is_refused(raw: Tenant) -> None:
    pieces = [WHOLE[:500], WHOLE[500:-30], WHOLE[-30:]]
    for body in (chunked(*pieces[:2]), chunked(*pieces)[:-40], chunked(pieces[0])[:-100]):
        status, _, code = refused(exchange(raw, body, CHUNKED, shut=True))
        assert (status, code) in ((400, "incomplete_body"), (400, "invalid_multipart"))
    for kept in (1, 2):  # the chunks end as they should, but too soon
        answer = exchange(raw, chunked(*pieces[:kept]) + LAST_CHUNK, CHUNKED)
        assert refused(answer) == (400, "file", "incomplete_body")


@pytest.mark.usefixtures("nothing_stored")
def test_a_chunked_form_that_is_too_large_is_refused(raw: Tenant) -> None:
    upload = raw.client.uploads.create(
        filename="x.jsonl", purpose="batch", bytes=1_000, mime_type="text/jsonl"
    )
    body = chunked(form(b"x" * (65 * 1024 * 1024), name="data")) + LAST_CHUNK
    answer = exchange(raw, body, CHUNKED, path=f"/v1/uploads/{upload.id}/parts")
    assert refused(answer) == (413, None, "body_too_large")


@pytest.mark.usefixtures("nothing_stored")
def test_a_chunked_body_that_is_no_form_is_refused(raw: Tenant) -> None:
    body = chunked(b"{}") + LAST_CHUNK
    for path in ("/v1/batches", "/v1/files"):
        answer = exchange(raw, body, CHUNKED, path=path, kind="application/json")
        assert refused(answer) == (411, None, "length_required")


@pytest.mark.usefixtures("nothing_stored")
def test_a_form_without_a_length_is_refused(raw: Tenant) -> None:
    assert refused(exchange(raw, b"")) == (411, None, "length_required")


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        (f"/v1/files?after={'x' * 9000}", "X-Some: thing", 414),
        ("/v1/files", f"X-Some: {'x' * 9000}", 431),
        ("/v1/files", "X Some: thing", 400),
    ],
)
def test_what_the_server_itself_refuses_comes_in_the_envelope(
    raw: Tenant, path: str, header: str, status: int
) -> None:
    answer = exchange(raw, b"", header, path=path, method="GET")
    assert refused(answer) == (status, None, "invalid_request")


def test_an_answer_to_head_has_no_body(raw: Tenant) -> None:
    status, headers, content = exchange(raw, b"", path="/v1/files", method="HEAD")
    assert (status, content, set(headers["allow"].split(", "))) == (405, b"", {"GET", "POST"})


@pytest.mark.parametrize("chunks", [False, True], ids=["with its length", "in chunks"])
def test_a_whole_upload_is_kept_byte_for_byte(chunks: bool, fuzzed: Tenant) -> None:
    kept = fuzzed
    if chunks:
        body = chunked(WHOLE[:10], WHOLE[10:777], WHOLE[777:]) + LAST_CHUNK
        status, _, content = exchange(kept, body, CHUNKED)
    else:
        status, _, content = exchange(kept, WHOLE, f"Content-Length: {len(WHOLE)}")
    file = orjson.loads(content)
    assert (status, kept.client.files.content(file["id"]).content) == (200, lines(20))
    path = f"/v1/files/{file['id']}/content"
    status, headers, part = exchange(kept, b"", "Range: bytes=10-19", path=path, method="GET")
    assert (status, part) == (206, lines(20)[10:20])
    assert headers["content-range"] == f"bytes 10-19/{len(lines(20))}"


# --- Any request that the OpenAPI document allows, and many that it does not ------------------


CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,  # of errors too: their schema is the envelope's
]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("valid", [True, False], ids=["a valid key", "a wrong key"])
def test_no_request_is_our_fault_and_every_answer_is_as_documented(
    valid: bool, mode: GenerationMode, fuzzed: Tenant
) -> None:
    schema = schemathesis.openapi.from_url(f"{fuzzed.stack.base_url}/v1/openapi.json")
    headers = {"Authorization": f"Bearer {fuzzed.key if valid else 'sk-nope'}"}
    statuses: Counter[int] = Counter()

    def drive(case: Case) -> None:
        response = case.call(headers=headers, timeout=30)
        case.validate_response(response, checks=CHECKS)
        statuses[response.status_code] += 1

    bounded = settings(
        max_examples=12 if valid else 3,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    for found in schema.get_all_operations():
        strategy = found.ok().as_strategy(generation_mode=mode)
        bounded(given(case=strategy)(drive))()
    assert sum(statuses.values()) > 40
    if not valid:
        assert set(statuses) <= {401, 404, 405, 411, 413}
