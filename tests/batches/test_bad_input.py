"""Hostile and broken input: each is refused in the envelope, naming what is wrong, or is fine.

Whatever is refused leaves nothing behind: no row, no byte.
"""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from django.utils.http import urlencode
from django_scopes import scopes_disabled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accounts.models import Organization
from batches import index, storage
from batches.models import Batch, File, Upload, UploadPart
from batches.services.files import purge_files
from batches.services.validation import validate_batch
from models_registry.models import Model
from models_registry.services import register_model
from tests.batches.conftest import Disk
from tests.conftest import Person
from tests.wire import (
    CHAT,
    JSON,
    assert_refused,
    batch_body,
    created,
    error_of,
    line,
    post,
    row,
    upload,
    uploaded,
    validated,
)


def nothing_is_stored(disk: Disk) -> bool:
    with scopes_disabled():
        rows = [File.objects.count(), Upload.objects.count(), UploadPart.objects.count()]
    return (disk.files, rows) == ([], [0, 0, 0])


def no_batch() -> bool:
    with scopes_disabled():
        return not Batch.objects.exists()


def errors_of(batch: dict[str, Any]) -> list[tuple[str, str | None, int | None]]:
    """Code, param and line of each error of a batch that failed."""
    assert (batch["status"], batch["errors"]["object"]) == ("failed", "list")
    assert all(error["message"] for error in batch["errors"]["data"])
    return [(error["code"], error["param"], error["line"]) for error in batch["errors"]["data"]]


def indexed(batch_id: str, content: bytes) -> list[str]:
    """The custom_ids that the index points to, read as a worker reads them."""
    with storage.opened(row(batch_id).index_name) as stream:
        entries = index.read(stream)
    pieces = [content[entry.offset : entry.offset + entry.length] for entry in entries]
    return [orjson.loads(piece)["custom_id"] for piece in pieces]


def nested(levels: int, inside: bytes = b"1") -> bytes:
    """A good request but for its body, which has an object nested so deep."""
    deep = b'{"a":' * levels + inside + b"}" * levels
    return line("b").replace(b'"messages"', b'"deep":' + deep + b',"messages"')


BODY = {"model": "echo", "messages": []}
WITHOUT_MODEL = {"messages": []}
BAD_LINES: dict[str, tuple[bytes, str, str | None]] = {
    "not JSON": (b"{nope", "invalid_json_line", None),
    "half a line": (line("b")[:40], "invalid_json_line", None),
    "two requests on a line": (line("b") + line("c"), "invalid_json_line", None),
    "a list": (b"[1]", "invalid_json_line", None),
    "a string": (b'"text"', "invalid_json_line", None),
    "null": (b"null", "invalid_json_line", None),
    "an empty object": (b"{}", "missing_required_parameter", "custom_id"),
    "not UTF-8": (line("b").replace(b"hello", b"\xff\xfe"), "invalid_json_line", None),
    "UTF-8 of half a surrogate pair": (
        line("b").replace(b"hello", b"\xed\xa0\x80"),
        "invalid_json_line",
        None,
    ),
    "half a surrogate pair, escaped": (
        line("b").replace(b"hello", rb"\ud800"),
        "invalid_json_line",
        None,
    ),
    "a NUL byte": (line("b").replace(b"hello", b"\0"), "invalid_json_line", None),
    "NaN": (line("b").replace(b'"hello"', b"NaN"), "invalid_json_line", None),
    "Infinity": (line("b").replace(b'"hello"', b"-Infinity"), "invalid_json_line", None),
    "too large a number": (line("b").replace(b'"hello"', b"1e999"), "invalid_json_line", None),
    "an integer of 400 digits": (
        line("b").replace(b'"hello"', b"9" * 400),
        "invalid_json_line",
        None,
    ),
    "10,000 levels": (nested(10_000), "invalid_json_line", None),
    "300 levels": (nested(300), "invalid_json_line", None),
    "1,000 levels": (nested(1_000), "invalid_json_line", None),
    "a key twice, 240 levels down": (nested(240, b'{"x":1,"x":2}'), "invalid_json_line", None),
    "a key twice": (
        line("b").replace(b'"method"', b'"url":"/v1/x","method"'),
        "invalid_json_line",
        None,
    ),
    "a key twice, once escaped": (
        line("b").replace(b'"method"', rb'"u\u0072l":"/v1/x","method"'),
        "invalid_json_line",
        None,
    ),
    "a custom_id used before": (line("first"), "duplicate_custom_id", "custom_id"),
    "no custom_id": (
        orjson.dumps({"method": "POST", "url": CHAT, "body": BODY}),
        "missing_required_parameter",
        "custom_id",
    ),
    "custom_id null": (line(None), "missing_required_parameter", "custom_id"),
    "custom_id a number": (line(7), "invalid_type", "custom_id"),
    "custom_id false": (line(False), "invalid_type", "custom_id"),
    "custom_id a list": (line(["b"]), "invalid_type", "custom_id"),
    "custom_id empty": (line(""), "invalid_type", "custom_id"),
    "custom_id of 513 characters": (line("x" * 513), "invalid_type", "custom_id"),
    "method GET": (line("b", method="GET"), "invalid_method", "method"),
    "method in small letters": (line("b", method="post"), "invalid_method", "method"),
    "method a list": (line("b", method=["POST"]), "invalid_method", "method"),
    "method null": (line("b", method=None), "missing_required_parameter", "method"),
    "url of another endpoint": (line("b", url="/v1/embeddings"), "url_mismatch", "url"),
    "url with a host": (line("b", url=f"http://10.0.0.1{CHAT}"), "url_mismatch", "url"),
    "url a number": (line("b", url=1), "url_mismatch", "url"),
    "url null": (line("b", url=None), "missing_required_parameter", "url"),
    "body null": (line("b", body=None), "missing_required_parameter", "body"),
    "body a list": (line("b", body=[BODY]), "invalid_type", "body"),
    "body a string": (line("b", body="{}"), "invalid_type", "body"),
    "stream": (line("b", body=BODY | {"stream": True}), "invalid_value", "body.stream"),
    "no model": (line("b", body=WITHOUT_MODEL), "missing_required_parameter", "body.model"),
    "model a number": (line("b", model=1), "invalid_type", "body.model"),
    "another model": (line("b", model="other"), "model_mismatch", "body.model"),
    "20 MB": (line("b").replace(b"hello", b"x" * 20_000_000), "line_too_long", None),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_and_the_lines_around_it_are_not(
    name: str, owner: Person, echo: Model, disk: Disk
) -> None:
    bad, code, param = BAD_LINES[name]
    batch = validated(owner.api, b"\n".join([line("first"), bad, line("last")]))
    assert errors_of(batch) == [(code, param, 2)]
    assert (batch["request_counts"], batch["output_file_id"], batch["model"]) == (
        {"total": 0, "completed": 0, "failed": 0},
        None,
        "echo",
    )
    assert disk.files == [row(batch["id"]).input_file.storage_name]  # and no index


def test_every_bad_line_is_listed_in_the_order_of_the_input(
    owner: Person, echo: Model, disk: Disk
) -> None:
    content = b"\n".join([line(7), b"", line("a"), b"{nope", line("a"), line("b", method="PUT")])
    assert errors_of(validated(owner.api, content)) == [
        ("invalid_type", "custom_id", 1),
        ("invalid_json_line", None, 4),
        ("duplicate_custom_id", "custom_id", 5),
        ("invalid_method", "method", 6),
    ]


def test_a_thousand_bad_lines_are_listed_and_the_rest_are_counted(
    owner: Person, echo: Model, disk: Disk
) -> None:
    batch = validated(owner.api, b"{nope\n" * 1_234)
    assert errors_of(batch) == [
        *(("invalid_json_line", None, number) for number in range(1, 1_001)),
        ("too_many_errors", None, None),
    ]
    assert batch["errors"]["data"][-1]["message"] == (
        "234 more lines have errors; the first 1,000 are listed."
    )


def test_a_line_with_a_million_keys_and_one_of_them_twice_is_soon_refused(
    owner: Person, echo: Model, disk: Disk
) -> None:
    """In time that grows with the line, not with its square: that would take hours."""
    keys = b",".join(b'"%x":1' % number for number in range(600_000))
    batch = validated(owner.api, b"{" + keys + b',"927bf":2}')
    assert errors_of(batch) == [("invalid_json_line", None, 1)]


GOOD: dict[str, bytes] = {
    "plain": line("a") + b"\n" + line("b") + b"\n",
    "no line end at the end": line("a") + b"\n" + line("b"),
    "a byte order mark": b"\xef\xbb\xbf" + line("a") + b"\n" + line("b"),
    "CRLF": line("a") + b"\r\n" + line("b") + b"\r\n",
    "CRLF after a byte order mark": b"\xef\xbb\xbf" + line("a") + b"\r\n" + line("b") + b"\r\n",
    "blank lines before": b"\n\r\n" + line("a") + b"\n" + line("b"),
    "blank lines between": line("a") + b"\n\n \t\r\n\n" + line("b"),
    "blank lines after": line("a") + b"\n" + line("b") + b"\n\n \n\r\n",
    "space around": b"  " + line("a") + b" \t\n\t" + line("b") + b"  ",
    "a huge integer": line("a", body=BODY) + b"\n" + line("b").replace(b'"hello"', b"9" * 25),
    "an escaped NUL": line("a") + b"\n" + line("b").replace(b"hello", rb"\u0000"),
    "an escaped pair of surrogates": line("a") + b"\n" + line("b").replace(b"hello", rb"\ud83d\ude00"),
    "text that looks like keys": line("a") + b"\n" + line("b").replace(b"hello", rb'\"x\": \u0022y\u0022:'),
    "an unknown field": line("a") + b"\n" + line("b", note="mine"),
    "200 levels": line("a") + b"\n" + nested(200),
    "stream false": line("a") + b"\n" + line("b", body=BODY | {"stream": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_an_odd_but_right_file_is_accepted(
    name: str, owner: Person, echo: Model, disk: Disk
) -> None:
    batch = validated(owner.api, GOOD[name])
    assert (batch["status"], batch["errors"]) == ("in_progress", None)
    assert batch["request_counts"] == {"total": 2, "completed": 0, "failed": 0}
    assert indexed(batch["id"], GOOD[name]) == ["a", "b"]


@pytest.mark.parametrize("content", [b"\n", b" \r\n\t\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_a_file_of_nothing_but_blanks_fails_as_empty(
    content: bytes, owner: Person, echo: Model, disk: Disk
) -> None:
    assert errors_of(validated(owner.api, content)) == [("empty_file", None, None)]


def test_a_utf_16_file_fails_naming_its_lines(owner: Person, echo: Model, disk: Disk) -> None:
    batch = validated(owner.api, line("a").decode().encode("utf-16"))
    assert errors_of(batch) == [("invalid_json_line", None, 1)]
    assert batch["errors"]["data"][0]["message"] == "The line is not UTF-8 (byte 1)."


def test_more_than_50_000_requests_fail(owner: Person, echo: Model, disk: Disk) -> None:
    content = b"\n".join(line(str(number)) for number in range(50_001))
    batch = validated(owner.api, content)
    assert errors_of(batch) == [("too_many_tasks", None, None)]
    assert batch["errors"]["data"][0]["message"] == (
        "The file has 50,001 requests; the limit is 50,000."
    )


def test_every_line_of_another_model_than_the_first_is_named(
    owner: Person, echo: Model, disk: Disk
) -> None:
    register_model(name="other", source="none", engine="instant")
    models = ["echo", "other", "echo", "other"]
    content = b"\n".join(line(str(at), model=model) for at, model in enumerate(models))
    assert errors_of(validated(owner.api, content)) == [
        ("model_mismatch", "body.model", 2),
        ("model_mismatch", "body.model", 4),
    ]


def test_a_model_of_another_organization_is_as_unknown_as_one_that_does_not_exist(
    owner: Person, globex: Organization, disk: Disk
) -> None:
    register_model(name="theirs", source="none", engine="instant", organizations=[globex])
    foreign = validated(owner.api, line(model="theirs"))
    missing = validated(owner.api, line(model="nobodys"))
    assert errors_of(foreign) == [("model_not_found", "body.model", None)]
    assert foreign["errors"]["data"][0]["message"] == missing["errors"]["data"][0][
        "message"
    ].replace("nobodys", "theirs")
    assert (foreign["model"], missing["model"]) == (None, None)


@pytest.mark.parametrize("model", ["", "\0", "a\0b", "x" * 100_000, "'; DROP TABLE", "モデル"])
def test_a_hostile_model_name_is_not_found(
    model: str, owner: Person, echo: Model, disk: Disk
) -> None:
    batch = validated(owner.api, line(model=model))
    assert errors_of(batch) == [("model_not_found", "body.model", None)]


def test_a_model_that_does_not_answer_the_endpoint_is_refused(owner: Person, disk: Disk) -> None:
    register_model(name="embed", source="none", engine="instant", task="embedding")
    batch = validated(owner.api, line(model="embed"))
    assert errors_of(batch) == [("model_not_supported", "body.model", None)]


def test_embeddings_are_limited_in_all_their_inputs(owner: Person, disk: Disk) -> None:
    register_model(name="embed", source="none", engine="instant", task="embedding")
    url = "/v1/embeddings"

    def request(custom_id: str, given: Any) -> bytes:
        return line(custom_id, url=url, body={"model": "embed", "input": given})

    full = [request(f"full-{at}", ["x"] * 2_048) for at in range(24)]  # 49,152 inputs
    rest = [request("rest", ["x"] * 846), request("tokens", [1, 2, 3] * 25_000)]
    enough = b"\n".join(full + rest)
    fits = validated(owner.api, enough + b"\n" + request("last", "x"), endpoint=url)
    assert (fits["status"], fits["request_counts"]["total"]) == ("in_progress", 27)
    batch = validated(owner.api, enough + b"\n" + request("last", ["x", "y"]), endpoint=url)
    assert errors_of(batch) == [("too_many_inputs", "body.input", 27)]
    batch = validated(owner.api, request("one", ["x"] * 2_049), endpoint=url)
    assert errors_of(batch) == [("too_many_inputs", "body.input", 1)]


def test_a_file_that_is_deleted_before_the_batch_is_not_found(
    owner: Person, echo: Model, disk: Disk
) -> None:
    file_id = uploaded(owner.api)
    assert owner.api.delete(f"/v1/files/{file_id}").status_code == 200
    response = post(owner.api, "/v1/batches", batch_body(file_id))
    assert_refused(response, 404, "input_file_id", "not_found")
    purge_files()
    assert (disk.files, no_batch()) == ([], True)


def test_a_file_that_is_deleted_under_a_batch_is_kept_until_the_batch_has_ended(
    owner: Person, echo: Model, disk: Disk
) -> None:
    batch = created(owner.api)
    owner.api.delete(f"/v1/files/{batch['input_file_id']}")
    purge_files()
    validate_batch(batch["id"])
    assert owner.api.get(f"/v1/batches/{batch['id']}").json()["status"] == "in_progress"
    assert row(batch["id"]).input_file.storage_name in disk.files


def test_validating_twice_changes_nothing(owner: Person, echo: Model, disk: Disk) -> None:
    batch = validated(owner.api, line())
    before = disk.files
    validate_batch(batch["id"])
    assert owner.api.get(f"/v1/batches/{batch['id']}").json() == batch
    assert disk.files == before


# --- The form of POST /v1/files --------------------------------------------------------------


def form(*parts: tuple[str, bytes], boundary: str = "b0undary") -> bytes:
    """A multipart body; of each part its header's parameters and its content."""
    text = b"".join(
        f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode()
        + content
        + b"\r\n"
        for head, content in parts
    )
    return text + f"--{boundary}--\r\n".encode()


def send_form(api: Client, body: bytes, boundary: str = "b0undary", extra: str = "") -> Any:
    kind = f"multipart/form-data; boundary={boundary}{extra}"
    return api.post("/v1/files", body, content_type=kind)


PURPOSE = ('name="purpose"', b"batch")
FILE = ('name="file"; filename="in.jsonl"', line())
ANCHOR = ('name="expires_after[anchor]"', b"created_at")
SECONDS = ('name="expires_after[seconds]"', b"3600")
MISSING, INVALID, TWICE = "missing_required_parameter", "invalid_value", "duplicate_parameter"
BAD_FORMS: dict[str, tuple[bytes, str | None, str | None]] = {
    "nothing": (form(), "purpose", MISSING),
    "no file": (form(PURPOSE), "file", MISSING),
    "no purpose": (form(FILE), "purpose", MISSING),
    "a file without a filename": (form(PURPOSE, ('name="file"', line())), "file", MISSING),
    "an empty filename": (form(PURPOSE, ('name="file"; filename=""', line())), "file", MISSING),
    "a filename of dots": (form(PURPOSE, ('name="file"; filename=".."', line())), "file", MISSING),
    "two files": (form(PURPOSE, FILE, FILE), "file", TWICE),
    "two purposes": (form(PURPOSE, ('name="purpose"', b"evals"), FILE), "purpose", TWICE),
    "an empty file": (form(PURPOSE, (FILE[0], b"")), "file", "empty_file"),
    "not .jsonl": (
        form(PURPOSE, ('name="file"; filename="in.csv"', line())),
        "file",
        "invalid_file_format",
    ),
    "an unknown purpose": (form(('name="purpose"', b"fun"), FILE), "purpose", None),
    "the purpose of our own files": (
        form(('name="purpose"', b"batch_output"), FILE),
        "purpose",
        None,
    ),
    "a purpose with a NUL": (form(('name="purpose"', b"batch\0"), FILE), "purpose", None),
    "a purpose that is not UTF-8": (form(('name="purpose"', b"\xff"), FILE), "purpose", None),
    "an anchor alone": (form(PURPOSE, FILE, ANCHOR), "expires_after[seconds]", MISSING),
    "seconds alone": (form(PURPOSE, FILE, SECONDS), "expires_after[anchor]", MISSING),
    "another anchor": (
        form(PURPOSE, FILE, ('name="expires_after[anchor]"', b"now"), SECONDS),
        "expires_after[anchor]",
        None,
    ),
    **{
        f"{seconds[:20]!r} seconds": (
            form(PURPOSE, FILE, ANCHOR, ('name="expires_after[seconds]"', seconds)),
            "expires_after[seconds]",
            code,
        )
        for seconds, code in [
            (b"3599", None),
            (b"2592001", None),
            (b"-1", None),
            (b"9" * 30, None),
            (b"9" * 5_000, INVALID),
            (b"soon", INVALID),
            (b"3600.5", INVALID),
            (b"NaN", INVALID),
            (b"", INVALID),
        ]
    },
    "a field after the file that is too large": (
        form(PURPOSE, FILE, ('name="note"', b"x" * 3_000_000)),
        None,
        "body_too_large",
    ),
    "a wrong boundary": (form(PURPOSE, FILE, boundary="other"), "file", MISSING),
    "base64 that is none": (
        form(PURPOSE, ('name="file"; filename="in.jsonl"\r\nContent-Transfer-Encoding: base64', b"ab*")),
        None,
        "invalid_multipart",
    ),
    "a filename of 2,000 characters": (
        form(PURPOSE, (f'name="file"; filename="{"x" * 2_000}.jsonl"', line())),
        None,
        "invalid_multipart",
    ),
    "1,001 fields": (
        form(PURPOSE, FILE, *((f'name="f{at}"', b"") for at in range(1_001))),
        None,
        "invalid_request",
    ),
    "101 files": (
        form(PURPOSE, *((f'name="f{at}"; filename="f"', b"x") for at in range(101))),
        None,
        "invalid_multipart",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FORMS)
@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "once"}], ids=["", "with a key"])
def test_a_bad_form_is_refused_and_leaves_nothing(
    name: str, headers: dict[str, str], owner: Person, disk: Disk
) -> None:
    body, param, code = BAD_FORMS[name]
    response = owner.api.post(
        "/v1/files", body, content_type="multipart/form-data; boundary=b0undary", headers=headers
    )
    assert_refused(response, 413 if code == "body_too_large" else 400, param, code)
    assert nothing_is_stored(disk)


@pytest.mark.parametrize(
    ("kind", "body", "param", "code"),
    [
        ("multipart/form-data", form(PURPOSE, FILE), None, "invalid_multipart"),
        ("multipart/form-data; boundary=", form(PURPOSE, FILE), None, "invalid_multipart"),
        (f"multipart/form-data; boundary={'x' * 300}", form(PURPOSE, FILE), None, "invalid_multipart"),
        ("multipart/form-data; boundary=b0undary", form(PURPOSE, ("name=\"file\"; filename*=nope''%41.jsonl", b"x")), "file", MISSING),
        ("multipart/form-data; boundary=b0undary", form(PURPOSE, ("name=\"file\"; filename*=idna''%41.jsonl", b"x")), "file", MISSING),
        ("application/x-www-form-urlencoded", b"purpose=batch&file=x", "file", MISSING),
        ("application/x-www-form-urlencoded; charset=utf-16", b"purpose=batch", "file", MISSING),
        (JSON, orjson.dumps({"purpose": "batch", "file": "x"}), "purpose", MISSING),
        ("text/plain", line(), "purpose", MISSING),
        ("", line(), "purpose", MISSING),
    ],
)  # fmt: skip
def test_a_body_that_is_no_form_is_refused_and_leaves_nothing(
    kind: str, body: bytes, param: str | None, code: str, owner: Person, disk: Disk
) -> None:
    assert_refused(owner.api.generic("POST", "/v1/files", body, kind), 400, param, code)
    assert nothing_is_stored(disk)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("../../etc/passwd.jsonl", "passwd.jsonl"),
        ("/etc/passwd.jsonl", "passwd.jsonl"),
        (r"C:\\temp\\in.jsonl", "in.jsonl"),
        ("in\u202e.jsonl", "in.jsonl"),
        ("a\tb\0c.jsonl", "abc.jsonl"),
        ("データ.jsonl", "データ.jsonl"),
        ("<b>&amp;.jsonl", "<b>&.jsonl"),
        (".jsonl", ".jsonl"),
    ],
)
def test_a_trick_in_the_filename_is_only_a_name(
    sent: str, kept: str, owner: Person, acme: Organization, disk: Disk
) -> None:
    response = send_form(owner.api, form(PURPOSE, (f'name="file"; filename="{sent}"', line())))
    file = response.json()
    assert (response.status_code, file["filename"]) == (200, kept)
    assert disk.files == [f"{acme.pk}/{file['id']}"]


def test_a_filename_over_255_characters_is_shortened_before_its_ending(
    owner: Person, disk: Disk
) -> None:
    response = send_form(
        owner.api, form(PURPOSE, (f'name="file"; filename="{"x" * 400}.jsonl"', line()))
    )
    assert response.json()["filename"] == "x" * 249 + ".jsonl"


@pytest.mark.parametrize(
    ("length", "status", "code"),
    [
        (str(600 * 1024 * 1024), 413, "body_too_large"),
        ("9" * 30, 413, "body_too_large"),
        ("", 411, "length_required"),
        ("-5", 411, "length_required"),
        ("many", 411, "length_required"),
    ],
)
def test_a_body_is_refused_by_its_announced_length_alone(
    length: str, status: int, code: str, owner: Person, disk: Disk
) -> None:
    response = owner.api.generic(
        "POST",
        "/v1/files",
        form(PURPOSE, FILE),
        "multipart/form-data; boundary=b0undary",
        CONTENT_LENGTH=length,
    )
    assert_refused(response, status, None, code)
    assert nothing_is_stored(disk)


def test_a_batch_input_over_its_own_limit_is_refused(
    owner: Person, disk: Disk, settings: Any
) -> None:
    settings.MAX_BATCH_FILE_BYTES = 10
    assert_refused(upload(owner.api, b"12345678901"), 413, "file", "file_too_large")
    assert nothing_is_stored(disk)
    assert upload(owner.api, b"12345678901", name="a.txt", purpose="evals").status_code == 200


# --- JSON bodies -----------------------------------------------------------------------------

NOT_AN_OBJECT = [b"[]", b"null", b"1", b'"text"', b"true", b"[{}]"]
NOT_JSON = [
    b"",
    b"{",
    b"{} {}",
    b"{'a': 1}",
    b"\xff",
    b"\xef\xbb\xbf{}",
    b'{"a": NaN}',
    b'{"a": "\\ud800"}',
    b'{"a": "\0"}',
    b"[" * 100_000,
    b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
]
JSON_PATHS = ["/v1/batches", "/v1/uploads"]


@pytest.mark.parametrize("path", JSON_PATHS)
@pytest.mark.parametrize("body", NOT_AN_OBJECT)
def test_json_that_is_no_object_is_refused(path: str, body: bytes, owner: Person) -> None:
    response = post(owner.api, path, body)
    assert_refused(response, 400, None, "invalid_json")
    assert error_of(response)["message"] == "The body must be a JSON object."


@pytest.mark.parametrize("path", JSON_PATHS)
@pytest.mark.parametrize("body", NOT_JSON, ids=lambda body: repr(body[:16]))
def test_a_body_that_is_not_json_is_refused(path: str, body: bytes, owner: Person) -> None:
    code = "invalid_json" if body else MISSING
    assert_refused(post(owner.api, path, body), 400, None, code)


@pytest.mark.parametrize("path", JSON_PATHS)
def test_a_json_body_that_is_too_large_is_refused(path: str, owner: Person) -> None:
    body = orjson.dumps({"metadata": {"a": "x" * 3_000_000}})
    assert_refused(post(owner.api, path, body), 413, None, "body_too_large")


WRONG: dict[str, list[Any]] = {
    "text": [None, 1, 1.5, True, [], {}, ["24h"], {"a": 1}],
    "number": [None, "100", 1.5, True, [], {}, -1, 0, 2**63, 2**70, 1e30],
    "object": [1, "text", True, [], ["a"], 1.5],
}


def of_field(kind: str, name: str) -> list[tuple[str, Any]]:
    return [(name, value) for value in WRONG[kind]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *of_field("text", "input_file_id"),
        *of_field("text", "endpoint"),
        *of_field("text", "completion_window"),
        *of_field("text", "priority"),
        *of_field("object", "metadata"),
        *of_field("object", "output_expires_after"),
        ("endpoint", "/v1/files"),
        ("endpoint", "/v1/chat/completions\0"),
        ("endpoint", ""),
        ("priority", "urgent"),
        *(
            ("completion_window", window)
            for window in ("", "0h", "25x", "337h", "24", "h", "-1h", "1.5h", "24H", " 24h", "024h")
        ),
        *(("completion_window", window) for window in ("24h\n", "24h\0", "２４h", "9" * 5_000 + "h")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "once"}], ids=["", "with a key"])
def test_a_wrong_value_in_a_batch_names_its_field(
    name: str, value: Any, headers: dict[str, str], owner: Person, disk: Disk
) -> None:
    body = batch_body(uploaded(owner.api)) | {name: value}
    response = post(owner.api, "/v1/batches", json.dumps(body).encode(), **headers)
    param = str(error_of(response)["param"]).removesuffix(".anchor")  # the first of two missing
    assert (response.status_code, param, no_batch()) == (400, name, True)


@pytest.mark.parametrize("name", ["input_file_id", "endpoint", "completion_window"])
def test_a_batch_without_a_required_field_names_it(name: str, owner: Person, disk: Disk) -> None:
    body = batch_body(uploaded(owner.api))
    del body[name]
    assert_refused(post(owner.api, "/v1/batches", body), 400, name, MISSING)


@pytest.mark.parametrize(
    "file_id",
    ["", "file-nope", "\0", "file-\0", "x" * 10_000, "../in.jsonl", "' OR 1=1 --", "ファイル"],
)
def test_an_input_file_that_is_none_is_not_found(file_id: str, owner: Person) -> None:
    response = post(owner.api, "/v1/batches", batch_body(file_id))
    assert_refused(response, 404, "input_file_id", "not_found")
    assert no_batch()


def test_a_file_of_another_purpose_is_no_input(owner: Person, disk: Disk) -> None:
    file = upload(owner.api, purpose="evals").json()
    response = post(owner.api, "/v1/batches", batch_body(file["id"]))
    assert_refused(response, 400, "input_file_id")


@pytest.mark.parametrize(
    ("metadata", "param"),
    [
        ({f"key{number}": "x" for number in range(17)}, "metadata"),
        ({"k" * 65: "x"}, f"metadata.{'k' * 64}"),
        ({"k": "x" * 513}, "metadata.k"),
        ({"k": 1}, "metadata.k"),
        ({"k": None}, "metadata.k"),
        ({"k": ["x"]}, "metadata.k"),
        ({"k": {"a": {"b": "c"}}}, "metadata.k"),
        ({"k": "a\0b"}, "metadata"),
        ({"k\0": "x"}, "metadata"),
    ],
)
def test_metadata_beyond_its_limits_is_refused(
    metadata: dict[str, Any], param: str, owner: Person, disk: Disk
) -> None:
    response = post(owner.api, "/v1/batches", batch_body(uploaded(owner.api), metadata=metadata))
    assert (response.status_code, error_of(response)["param"]) == (400, param)
    assert no_batch()


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {f"{number:064}": "😀" * 512 for number in range(16)}, {"": ""}, {"a\tb": "\u202e"}],
)
def test_metadata_within_its_limits_comes_back_as_it_was(
    metadata: dict[str, str] | None, owner: Person, disk: Disk
) -> None:
    assert created(owner.api, metadata=metadata)["metadata"] == metadata


@pytest.mark.parametrize("window", ["24h", "1m", "1h", "336h", "20160m", "90m"])
def test_a_completion_window_in_hours_or_minutes_sets_the_end(
    window: str, owner: Person, disk: Disk
) -> None:
    batch = created(owner.api, completion_window=window)
    seconds = int(window[:-1]) * {"h": 3600, "m": 60}[window[-1]]
    assert (batch["completion_window"], batch["expires_at"] - batch["created_at"]) == (
        window,
        seconds,
    )


@pytest.mark.parametrize(
    ("expires", "param"),
    [
        ({}, "output_expires_after.anchor"),
        ({"anchor": "created_at"}, "output_expires_after.seconds"),
        ({"seconds": 3600}, "output_expires_after.anchor"),
        ({"anchor": "now", "seconds": 3600}, "output_expires_after.anchor"),
        ({"anchor": "created_at", "seconds": "3600"}, "output_expires_after.seconds"),
        ({"anchor": "created_at", "seconds": 3600.5}, "output_expires_after.seconds"),
        ({"anchor": "created_at", "seconds": True}, "output_expires_after.seconds"),
        ({"anchor": "created_at", "seconds": 3599}, "output_expires_after.seconds"),
        ({"anchor": "created_at", "seconds": 2592001}, "output_expires_after.seconds"),
        ({"anchor": "created_at", "seconds": 2**63 - 1}, "output_expires_after.seconds"),
    ],
)
def test_a_wrong_output_expiry_is_refused(
    expires: dict[str, Any], param: str, owner: Person, disk: Disk
) -> None:
    body = batch_body(uploaded(owner.api), output_expires_after=expires)
    response = post(owner.api, "/v1/batches", body)
    assert (response.status_code, error_of(response)["param"]) == (400, param)
    assert no_batch()


UPLOAD = {"filename": "in.jsonl", "purpose": "batch", "bytes": 100, "mime_type": "text/jsonl"}


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        *((name, value, 400) for name, value in of_field("text", "filename")),
        *((name, value, 400) for name, value in of_field("text", "purpose")),
        *((name, value, 400) for name, value in of_field("text", "mime_type")),
        *((name, value, 400) for name, value in of_field("number", "bytes")),
        *((name, value, 400) for name, value in of_field("object", "expires_after")),
        ("filename", "", 400),
        ("filename", "in.csv", 400),
        ("filename", "x" * 256 + ".jsonl", 400),
        ("mime_type", "text/\0", 400),
        ("purpose", "batch_output", 400),
        ("purpose", "\0", 400),
        ("bytes", 200 * 1024 * 1024 + 1, 413),
        ("bytes", 8 * 1024**3 + 1, 413),
    ],
)
@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "once"}], ids=["", "with a key"])
def test_a_wrong_value_in_an_upload_names_its_field(
    name: str, value: Any, status: int, headers: dict[str, str], owner: Person, disk: Disk
) -> None:
    body = json.dumps(UPLOAD | {name: value}).encode()
    response = post(owner.api, "/v1/uploads", body, **headers)
    param = str(error_of(response)["param"]).removesuffix(".anchor")
    assert (response.status_code, param) == (status, name)
    assert nothing_is_stored(disk)


@pytest.mark.parametrize("name", UPLOAD)
def test_an_upload_without_a_required_field_names_it(name: str, owner: Person) -> None:
    body = {key: value for key, value in UPLOAD.items() if key != name}
    assert_refused(post(owner.api, "/v1/uploads", body), 400, name, MISSING)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "part_ids"),
        ({"part_ids": []}, "part_ids"),
        ({"part_ids": None}, "part_ids"),
        ({"part_ids": "part_1"}, "part_ids"),
        ({"part_ids": [1]}, "part_ids.0"),
        ({"part_ids": ["\0"]}, "part_ids"),
        ({"part_ids": ["part_nope"]}, "part_ids"),
        ({"part_ids": ["x"] * 10_001}, "part_ids"),
        ({"part_ids": ["x"], "md5": 1}, "md5"),
    ],
)
def test_a_wrong_completion_names_its_field(
    body: dict[str, Any], param: str, owner: Person, disk: Disk
) -> None:
    made = post(owner.api, "/v1/uploads", UPLOAD).json()
    response = post(owner.api, f"/v1/uploads/{made['id']}/complete", body)
    assert (response.status_code, error_of(response)["param"]) == (400, param)


# --- Paths, queries and headers --------------------------------------------------------------

HOSTILE = [
    "\0",
    "file-\0",
    "' OR 1=1 --",
    "x" * 5_000,
    "../../etc",
    "%00",
    "ＡＢＣ",
    "\ud7ff",
    "{}",
]
BAD_QUERIES = [
    ("limit", "0"),
    ("limit", "-1"),
    ("limit", "abc"),
    ("limit", "1.5"),
    ("limit", ""),
    ("limit", "9" * 5_000),
    ("limit", "\0"),
    ("after", "unknown"),
    ("after", "\0"),
    ("after", "file-\0" + "0" * 31),
    ("after", "file-" + "0" * 33),
    ("after", "upload_" + "0" * 32),
]


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        *(("/v1/files", *query) for query in BAD_QUERIES),
        *(("/v1/batches", *query) for query in BAD_QUERIES),
        ("/v1/files", "limit", "10001"),
        ("/v1/files", "order", "up"),
        ("/v1/files", "order", "asc\0"),
        ("/v1/files", "order", "asc\n"),
        ("/v1/files", "after", "batch_" + "0" * 32),
        ("/v1/batches", "limit", "101"),
        ("/v1/batches", "after", "file-" + "0" * 32),
    ],
)
def test_a_wrong_query_names_its_parameter(path: str, name: str, value: str, owner: Person) -> None:
    assert_refused(owner.api.get(f"{path}?{urlencode({name: value})}"), 400, name, INVALID)


@pytest.mark.parametrize("value", HOSTILE)
def test_an_unknown_purpose_lists_nothing(value: str, owner: Person, disk: Disk) -> None:
    uploaded(owner.api)
    response = owner.api.get(f"/v1/files?{urlencode({'purpose': value})}")
    assert (response.status_code, response.json()["data"]) == (200, [])


@pytest.mark.parametrize("id", HOSTILE)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/files/{}"),
        ("DELETE", "/v1/files/{}"),
        ("GET", "/v1/files/{}/content"),
        ("POST", "/v1/uploads/{}/cancel"),
        ("GET", "/v1/batches/{}"),
        ("POST", "/v1/batches/{}/cancel"),
        ("GET", "/v1/models/{}"),
    ],
)
def test_a_hostile_id_is_not_found(method: str, path: str, id: str, owner: Person) -> None:
    escaped = urlencode({"": id})[1:].replace("+", "%20")
    response = owner.api.generic(method, path.format(escaped))
    assert (response.status_code, error_of(response)["type"]) == (404, "invalid_request_error")


@pytest.mark.parametrize("charset", ["hex", "utf-7", "utf-16", "idna", "nope"])
def test_a_charset_of_the_clients_changes_nothing(charset: str, owner: Person, disk: Disk) -> None:
    """Django would decode by it: to nothing, to half a surrogate pair, or not at all."""
    query = owner.api.generic(
        "GET", "/v1/files?purpose=%2B2AA-", content_type=f"text/plain; charset={charset}"
    )
    assert (query.status_code, query.json()["data"]) == (200, [])
    body = form(PURPOSE, ('name="file"; filename="+2AA-.jsonl"', line()))
    kind = f"multipart/form-data; boundary=b0undary; charset={charset}"
    file = owner.api.generic("POST", "/v1/files", body, kind).json()
    assert (file["filename"], file["purpose"]) == ("+2AA-.jsonl", "batch")


@pytest.mark.parametrize("key", ["k" * 256, "a\tb", "a\x7fb"])
def test_a_wrong_idempotency_key_is_refused(key: str, owner: Person, disk: Disk) -> None:
    form = {"purpose": "batch", "file": SimpleUploadedFile("in.jsonl", line())}
    response = owner.api.post("/v1/files", form, headers={"Idempotency-Key": key})
    assert (response.status_code, nothing_is_stored(disk)) == (400, True)


# --- Anything at all -------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
SOME_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
bounded = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def is_answered(response: Any) -> None:
    """Success, or the caller's fault in the envelope."""
    if response.status_code >= 400:
        error_of(response)
    assert response.status_code < 500


@bounded
@given(
    path=st.sampled_from([*JSON_PATHS, "/v1/uploads/upload_x/complete"]),
    changed=st.dictionaries(
        st.sampled_from([*UPLOAD, *batch_body(""), "metadata", "expires_after", "part_ids"]),
        ANYTHING,
    ),
    key=st.sampled_from([{}, {"Idempotency-Key": "k"}]),
)
def test_no_json_body_is_our_fault(
    path: str, changed: dict[str, Any], key: dict[str, str], owner: Person, disk: Disk
) -> None:
    body = json.dumps(UPLOAD | batch_body("file-x") | changed).encode()
    is_answered(post(owner.api, path, body, **key))


@bounded
@given(body=st.binary(), kind=st.sampled_from([JSON, "multipart/form-data; boundary=b", "text/x"]))
def test_no_bytes_are_our_fault(body: bytes, kind: str, owner: Person, disk: Disk) -> None:
    for path in ("/v1/batches", "/v1/files", "/v1/uploads/upload_x/parts"):
        is_answered(owner.api.post(path, body, content_type=kind))
    assert nothing_is_stored(disk)


@bounded
@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "purpose": st.sampled_from(["batch", "evals"]) | SOME_TEXT,
            "expires_after[anchor]": st.just("created_at") | SOME_TEXT,
            "expires_after[seconds]": st.integers() | SOME_TEXT,
        },
    )
)
def test_no_form_is_our_fault(fields: dict[str, Any], owner: Person, disk: Disk) -> None:
    is_answered(upload(owner.api, **fields))


@bounded
@given(
    query=st.dictionaries(
        st.sampled_from(["limit", "after", "order", "purpose"]), SOME_TEXT | st.integers()
    )
)
def test_no_query_is_our_fault(query: dict[str, Any], owner: Person) -> None:
    for path in ("/v1/files", "/v1/batches", "/v1/models"):
        is_answered(owner.api.get(f"{path}?{urlencode(query)}"))


@bounded
@given(lines=st.lists(st.binary() | ANYTHING.map(lambda any: json.dumps(any).encode()), min_size=1))
def test_no_input_file_stops_the_validation(
    lines: list[bytes], owner: Person, echo: Model, disk: Disk
) -> None:
    batch = validated(owner.api, b"\n".join(lines) + b"\n")
    assert batch["status"] == "failed"
    assert batch["errors"]["data"] != []
