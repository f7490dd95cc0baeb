"""/v1/files: what the owner gets, and what everybody else does not."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.models import Organization, Project
from accounts.services import keys
from batches.models import File
from batches.services.files import expire_files, purge_files
from tests.batches.conftest import Disk
from tests.conftest import Person
from tests.wire import assert_refused, line, upload, uploaded


def client_with(organization: Organization, *scopes: str) -> Client:
    with scopes_disabled():
        project = Project.objects.get(organization=organization)
    _, key = keys.create_api_key(project=project, name="narrow", scopes=scopes)
    return Client(headers={"authorization": f"Bearer {key}"})


def queries_of(client: Client, path: str) -> int:
    client.get(path)  # the key's first use of this minute is written down
    with CaptureQueriesContext(
        connection,
    ) as queries:
        assert client.get(path).status_code == 200
    return len(queries)


def listed(client: Client, query: str = "") -> list[str]:
    return [file["id"] for file in client.get(f"/v1/files{query}").json()["data"]]


def test_an_uploaded_file_is_answered_as_openai_does(owner: Person, disk: Disk) -> None:
    response = upload(owner.api, b"{}\n")
    file = response.json()
    with scopes_disabled():
        row = File.objects.get()
    assert file == {
        "id": row.pk,
        "object": "file",
        "bytes": 3,
        "created_at": int(row.created_at.timestamp()),
        "expires_at": None,
        "filename": "in.jsonl",
        "purpose": "batch",
        "status": "processed",
        "status_details": None,
    }
    assert (row.organization, row.project) == (owner.caller.organization, owner.caller.project)
    assert owner.api.get(f"/v1/files/{row.pk}").json() == file


def test_an_upload_costs_few_queries(owner: Person, disk: Disk) -> None:
    api = owner.api
    with CaptureQueriesContext(connection) as first:
        uploaded(api)
    with CaptureQueriesContext(connection) as second:
        uploaded(api)
    # The second time: the key, its limits, a savepoint, its quotas, how long the organization keeps
    # files, the file, the savepoint's end.
    assert (len(first), len(second)) == (8, 7)


@pytest.mark.parametrize("seconds", [3600, 2_592_000])
def test_a_file_expires_after_the_seconds_it_was_given(
    seconds: int, owner: Person, disk: Disk, time_machine: Any
) -> None:
    form = {"expires_after[anchor]": "created_at", "expires_after[seconds]": str(seconds)}
    time_machine.move_to(timezone.now().replace(microsecond=500_000), tick=False)
    file = upload(owner.api, **form).json()
    assert file["expires_at"] - file["created_at"] == seconds
    time_machine.shift(timedelta(seconds=seconds - 1))
    expire_files()
    assert listed(owner.api) == [file["id"]]
    time_machine.shift(timedelta(seconds=2))
    expire_files()
    purge_files()
    assert (listed(owner.api), disk.files) == ([], [])


@pytest.mark.parametrize("purpose", ["assistants", "fine-tune", "vision", "user_data", "evals"])
def test_other_purposes_take_any_name(purpose: str, owner: Person, disk: Disk) -> None:
    file = upload(owner.api, b"\x89PNG", name="cat.png", purpose=purpose).json()
    assert (file["purpose"], file["filename"]) == (purpose, "cat.png")


def test_lists_are_paged_by_key_in_both_directions(owner: Person, disk: Disk) -> None:
    ids = [uploaded(owner.api) for _ in range(5)]
    newest = ids[::-1]
    page = owner.api.get("/v1/files?limit=2").json()
    assert {key: value for key, value in page.items() if key != "data"} == {
        "object": "list",
        "first_id": newest[0],
        "last_id": newest[1],
        "has_more": True,
    }
    assert listed(owner.api, f"?limit=2&after={newest[1]}") == newest[2:4]
    assert listed(owner.api, f"?limit=2&order=asc&after={ids[1]}") == ids[2:4]
    last = owner.api.get(f"/v1/files?limit=2&after={newest[3]}").json()
    assert ([file["id"] for file in last["data"]], last["has_more"]) == ([ids[0]], False)
    beyond = owner.api.get(f"/v1/files?after={ids[0]}").json()
    assert beyond == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }


def test_paging_goes_on_after_a_file_that_was_deleted_meanwhile(owner: Person, disk: Disk) -> None:
    first, second, third = (uploaded(owner.api) for _ in range(3))
    owner.api.delete(f"/v1/files/{second}")
    assert listed(owner.api, f"?after={second}") == [first]
    assert listed(owner.api, f"?after={second}&order=asc") == [third]


def test_a_list_can_be_of_one_purpose(owner: Person, disk: Disk) -> None:
    batch = uploaded(owner.api)
    evals = upload(owner.api, purpose="evals").json()["id"]
    assert listed(owner.api, "?purpose=evals") == [evals]
    assert listed(owner.api, "?purpose=batch") == [batch]
    assert listed(owner.api) == [evals, batch]


def test_a_list_of_three_costs_as_many_queries_as_a_list_of_one(owner: Person, disk: Disk) -> None:
    uploaded(owner.api)
    one = queries_of(owner.api, "/v1/files")
    for _ in range(2):
        uploaded(owner.api)
    assert (one, queries_of(owner.api, "/v1/files")) == (3, 3)


def test_a_deleted_file_is_gone_at_once_and_its_bytes_soon(owner: Person, disk: Disk) -> None:
    file_id = uploaded(owner.api)
    response = owner.api.delete(f"/v1/files/{file_id}")
    assert response.json() == {"id": file_id, "object": "file", "deleted": True}
    for again in (
        owner.api.get(f"/v1/files/{file_id}"),
        owner.api.get(f"/v1/files/{file_id}/content"),
        owner.api.delete(f"/v1/files/{file_id}"),
    ):
        assert_refused(again, 404, "file_id", "not_found")
    assert listed(owner.api) == []
    purge_files()
    assert disk.files == []


CONTENT = bytes(range(100))


@pytest.fixture
def content_path(owner: Person, disk: Disk) -> str:
    file = upload(owner.api, CONTENT, name="bytes.bin", purpose="user_data").json()
    return f"/v1/files/{file['id']}/content"


def test_the_content_is_the_very_bytes(owner: Person, content_path: str) -> None:
    response = owner.api.get(content_path)
    assert (response.status_code, response.getvalue()) == (200, CONTENT)
    headers = ("Content-Type", "Content-Length", "Accept-Ranges", "Content-Disposition")
    assert [response[name] for name in headers] == [
        "application/octet-stream",
        "100",
        "bytes",
        'attachment; filename="bytes.bin"',
    ]


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=0-9", 0, 9),
        ("bytes=90-", 90, 99),
        ("bytes=90-1000", 90, 99),
        ("bytes=99-99", 99, 99),
        ("bytes=-1", 99, 99),
        ("bytes=-1000", 0, 99),
        ("bytes=0-", 0, 99),
        (" bytes=5-6 ", 5, 6),
    ],
)
def test_a_range_is_a_part_of_the_content(
    asked: str, first: int, last: int, owner: Person, content_path: str
) -> None:
    response = owner.api.get(content_path, headers={"Range": asked})
    assert (response.status_code, response.getvalue()) == (206, CONTENT[first : last + 1])
    assert response["Content-Range"] == f"bytes {first}-{last}/100"
    assert response["Content-Length"] == str(last - first + 1)


@pytest.mark.parametrize("asked", ["bytes=100-", "bytes=100-200", "bytes=-0", "bytes=999999-"])
def test_a_range_beyond_the_end_cannot_be_had(asked: str, owner: Person, content_path: str) -> None:
    response = owner.api.get(content_path, headers={"Range": asked})
    assert_refused(response, 416, None, "range_not_satisfiable")
    assert response["Content-Range"] == "bytes */100"


@pytest.mark.parametrize(
    "asked",
    ["bytes=0-1,5-6", "bytes=", "bytes=-", "lines=0-1", "bytes=a-b", "nonsense", f"bytes={'9' * 5_000}-"],
)  # fmt: skip
def test_a_range_that_is_not_served_is_ignored(
    asked: str, owner: Person, content_path: str
) -> None:
    response = owner.api.get(content_path, headers={"Range": asked})
    assert (response.status_code, response.getvalue()) == (200, CONTENT)


def test_content_whose_bytes_are_lost_is_not_found(
    owner: Person, content_path: str, disk: Disk
) -> None:
    (disk.root / disk.files[0]).unlink()
    assert_refused(owner.api.get(content_path), 404, "file_id", "not_found")


ROUTES = [
    ("GET", "/v1/files/{}", "files.read"),
    ("GET", "/v1/files/{}/content", "files.read"),
    ("DELETE", "/v1/files/{}", "files"),
]


@pytest.mark.parametrize(("method", "path", "scope"), ROUTES)
def test_a_stranger_finds_nothing(
    method: str, path: str, scope: str, owner: Person, stranger: Person, disk: Disk
) -> None:
    theirs, mine = uploaded(stranger.api), uploaded(owner.api)
    assert_refused(stranger.api.generic(method, path.format(mine)), 404, "file_id", "not_found")
    assert listed(stranger.api) == [theirs]
    assert listed(stranger.api, f"?order=asc&after={mine}") == []
    assert listed(owner.api) == [mine]


@pytest.mark.parametrize(("method", "path", "scope"), ROUTES)
def test_a_key_without_the_scope_is_refused(
    method: str, path: str, scope: str, owner: Person, disk: Disk
) -> None:
    path = path.format(uploaded(owner.api))
    other = client_with(owner.caller.organization, "batches", "models.read")
    reading = client_with(owner.caller.organization, "files.read")
    assert_refused(other.generic(method, path), 403, None, "insufficient_scope")
    status = 200 if scope == "files.read" else 403
    assert reading.generic(method, path).status_code == status


def test_a_key_that_may_only_read_cannot_upload_or_delete(owner: Person, disk: Disk) -> None:
    file_id = uploaded(owner.api)
    reading = client_with(owner.caller.organization, "files.read")
    assert_refused(upload(reading), 403, None, "insufficient_scope")
    assert_refused(reading.delete(f"/v1/files/{file_id}"), 403, None, "insufficient_scope")
    assert listed(reading) == [file_id]
    assert disk.files == [f"{owner.caller.organization.pk}/{file_id}"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/files", {"GET", "POST"}),
        ("HEAD", "/v1/files", {"GET", "POST"}),
        ("OPTIONS", "/v1/files", {"GET", "POST"}),
        ("POST", "/v1/files/file-x", {"DELETE", "GET"}),
        ("DELETE", "/v1/files/file-x/content", {"GET"}),
    ],
)
def test_another_method_is_not_allowed(
    method: str, path: str, allowed: set[str], owner: Person
) -> None:
    response = owner.api.generic(method, path)
    assert response.status_code == 405
    assert set(response["Allow"].split(", ")) == allowed
    if method != "HEAD":  # whose answers have no body
        assert_refused(response, 405, None, "method_not_allowed")


def test_the_same_idempotency_key_and_file_is_the_same_answer(owner: Person, disk: Disk) -> None:
    def send(content: bytes, key: str = "once") -> Any:
        form = {"purpose": "batch", "file": SimpleUploadedFile("in.jsonl", content)}
        return owner.api.post("/v1/files", form, headers={"Idempotency-Key": key})

    first = send(line())
    assert send(line()).json() == first.json()
    assert_refused(send(line("other")), 400, None, "idempotency_key_reused")
    assert listed(owner.api) == [first.json()["id"]]
    assert disk.files == [f"{owner.caller.organization.pk}/{first.json()['id']}"]
    assert send(line(), key="twice").json()["id"] != first.json()["id"]


def test_an_idempotency_key_is_its_organizations_own(
    owner: Person, stranger: Person, disk: Disk
) -> None:
    form = {"purpose": "batch"}
    ids = [
        person.api.post(
            "/v1/files",
            form | {"file": SimpleUploadedFile("in.jsonl", line())},
            headers={"Idempotency-Key": "once"},
        ).json()["id"]
        for person in (owner, stranger)
    ]
    assert [listed(owner.api), listed(stranger.api)] == [[ids[0]], [ids[1]]]
