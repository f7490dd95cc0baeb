"""/v1/uploads: files that come in parts."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_scopes import scopes_disabled

from batches import storage
from batches.models import File, Upload, UploadPart
from batches.services import uploads
from batches.services.files import purge_parts
from batches.storage import StorageAway
from tests.batches.conftest import Disk
from tests.batches.test_files_api import client_with
from tests.conftest import Person
from tests.wire import assert_refused, post

CONTENT = b'{"custom_id":"a"}\n{"custom_id":"b"}\n'
ASKED = {
    "filename": "in.jsonl",
    "purpose": "batch",
    "bytes": len(CONTENT),
    "mime_type": "text/jsonl",
}


def begun(api: Client, **changed: Any) -> dict[str, Any]:
    response = post(api, "/v1/uploads", ASKED | changed)
    assert response.status_code == 200, response.content
    return dict(response.json())


def send_part(api: Client, upload_id: str, content: bytes, **headers: str) -> Any:
    form = {"data": SimpleUploadedFile("part", content)}
    return api.post(f"/v1/uploads/{upload_id}/parts", form, headers=headers or None)


def part(api: Client, upload_id: str, content: bytes) -> str:
    response = send_part(api, upload_id, content)
    assert response.status_code == 200, response.content
    return str(response.json()["id"])


def complete(api: Client, upload_id: str, *part_ids: str, **more: Any) -> Any:
    return post(api, f"/v1/uploads/{upload_id}/complete", {"part_ids": part_ids, **more})


def cancel(api: Client, upload_id: str, **headers: str) -> Any:
    return api.post(f"/v1/uploads/{upload_id}/cancel", headers=headers or None)


def test_parts_become_a_file_in_the_order_of_their_ids(owner: Person, disk: Disk) -> None:
    upload = begun(owner.api)
    with scopes_disabled():
        row = Upload.objects.get()
    assert upload == {
        "id": row.pk,
        "object": "upload",
        "bytes": len(CONTENT),
        "created_at": int(row.created_at.timestamp()),
        "expires_at": int(row.expires_at.timestamp()),
        "filename": "in.jsonl",
        "purpose": "batch",
        "status": "pending",
        "file": None,
    }
    assert upload["expires_at"] - upload["created_at"] in (3599, 3600)
    second, first = part(owner.api, row.pk, CONTENT[10:]), part(owner.api, row.pk, CONTENT[:10])
    part(owner.api, row.pk, b"sent twice")
    digest = hashlib.md5(CONTENT).hexdigest().upper()
    done = complete(owner.api, row.pk, first, second, md5=digest).json()
    file = owner.api.get(f"/v1/files/{done['file']['id']}").json()
    assert done == upload | {"status": "completed", "file": file}
    assert (file["bytes"], file["purpose"]) == (len(CONTENT), "batch")
    assert owner.api.get(f"/v1/files/{file['id']}/content").getvalue() == CONTENT
    purge_parts()
    assert disk.files == [f"{owner.caller.organization.pk}/{file['id']}"]


def test_a_part_is_answered_as_openai_does(owner: Person, disk: Disk) -> None:
    upload = begun(owner.api)
    answer = send_part(owner.api, upload["id"], b"x").json()
    assert set(answer) == {"id", "object", "created_at", "upload_id"}
    assert (answer["object"], answer["upload_id"]) == ("upload.part", upload["id"])


def test_the_files_lifetime_begins_with_the_file(owner: Person, disk: Disk) -> None:
    upload = begun(owner.api, expires_after={"anchor": "created_at", "seconds": 3600})
    file = complete(owner.api, upload["id"], part(owner.api, upload["id"], CONTENT)).json()["file"]
    assert file["expires_at"] - file["created_at"] in (3600, 3601)


def test_parts_that_do_not_make_up_the_whole_are_refused(owner: Person, disk: Disk) -> None:
    id = begun(owner.api)["id"]
    half, other = part(owner.api, id, CONTENT[:10]), part(owner.api, id, CONTENT[11:])
    foreign = part(owner.api, begun(owner.api)["id"], CONTENT[10:])
    refused = [
        ([half], {}, "part_ids", "size_mismatch"),
        ([half, other], {}, "part_ids", "size_mismatch"),
        ([half, half], {}, "part_ids", "duplicate_part"),
        ([half, foreign], {}, "part_ids", "unknown_part"),
    ]
    for ids, more, param, code in refused:
        assert_refused(complete(owner.api, id, *ids, **more), 400, param, code)
    rest = part(owner.api, id, CONTENT[10:])
    wrong = complete(owner.api, id, half, rest, md5="0" * 32)
    assert_refused(wrong, 400, "md5", "checksum_mismatch")
    with scopes_disabled():
        assert File.objects.count() == 0
    assert complete(owner.api, id, half, rest).json()["status"] == "completed"


@pytest.mark.parametrize("content", [b"", b"x" * 101])
def test_a_part_without_bytes_or_with_too_many_is_refused(
    content: bytes, owner: Person, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_PART_BYTES", 100)
    response = send_part(owner.api, begun(owner.api)["id"], content)
    assert_refused(response, 400, "data", "invalid_part")
    assert disk.files == []


def test_parts_of_more_than_twice_what_was_announced_are_refused(owner: Person, disk: Disk) -> None:
    id = begun(owner.api)["id"]
    part(owner.api, id, b"x" * len(CONTENT))
    part(owner.api, id, b"x" * len(CONTENT))
    before = disk.files
    assert_refused(send_part(owner.api, id, b"x"), 413, "data", "upload_too_large")
    assert disk.files == before


def test_a_part_without_data_or_with_two_is_refused(owner: Person, disk: Disk) -> None:
    path = f"/v1/uploads/{begun(owner.api)['id']}/parts"
    missing = owner.api.post(path, {"data": "text"})
    assert_refused(missing, 400, "data", "missing_required_parameter")
    files = [SimpleUploadedFile("a", b"x"), SimpleUploadedFile("b", b"x")]
    assert_refused(owner.api.post(path, {"data": files}), 400, "data", "duplicate_parameter")
    assert disk.files == []


def test_a_cancelled_upload_takes_nothing_more_and_keeps_nothing(owner: Person, disk: Disk) -> None:
    upload = begun(owner.api)
    id = upload["id"]
    sent = part(owner.api, id, CONTENT)
    assert cancel(owner.api, id).json() == upload | {"status": "cancelled"}
    for response in (
        cancel(owner.api, id),
        complete(owner.api, id, sent),
        send_part(owner.api, id, b"x"),
    ):
        assert_refused(response, 400, "upload_id", "upload_not_pending")
    purge_parts()
    assert disk.files == []


def test_an_upload_expires_after_an_hour(owner: Person, disk: Disk, time_machine: Any) -> None:
    id = begun(owner.api)["id"]
    sent = part(owner.api, id, CONTENT)
    time_machine.move_to(timezone.now() + timedelta(minutes=61))
    assert_refused(complete(owner.api, id, sent), 400, "upload_id", "upload_expired")
    uploads.expire_uploads()
    purge_parts()
    assert_refused(cancel(owner.api, id), 400, "upload_id", "upload_not_pending")
    with scopes_disabled():
        assert [upload.status for upload in Upload.objects.all()] == ["expired"]
    assert disk.files == []


def test_completing_while_another_request_completes_is_the_callers_fault(
    owner: Person,
    disk: Disk,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the loser is still reading is removed meanwhile."""
    id = begun(owner.api)["id"]
    sent = part(owner.api, id, CONTENT)
    read = uploads._put_together

    def overtaken(*arguments: Any) -> str:
        monkeypatch.setattr(uploads, "_put_together", read)
        assert complete(owner.api, id, sent).status_code == 200
        purge_parts()
        return read(*arguments)

    monkeypatch.setattr(uploads, "_put_together", overtaken)
    assert_refused(complete(owner.api, id, sent), 400, "upload_id", "upload_not_pending")
    with scopes_disabled():
        assert disk.files == [File.objects.get().storage_name]


def test_every_step_can_be_repeated_with_its_idempotency_key(owner: Person, disk: Disk) -> None:
    api, key = owner.api, {"Idempotency-Key": "begin"}
    upload = post(api, "/v1/uploads", ASKED, **key).json()
    assert post(api, "/v1/uploads", ASKED, **key).json() == upload
    key = {"Idempotency-Key": "part"}
    sent = send_part(api, upload["id"], CONTENT, **key).json()
    assert send_part(api, upload["id"], CONTENT, **key).json() == sent
    other = send_part(api, upload["id"], b"other", **key)
    assert_refused(other, 400, None, "idempotency_key_reused")
    path, body = f"/v1/uploads/{upload['id']}/complete", {"part_ids": [sent["id"]]}
    done = post(api, path, body, **{"Idempotency-Key": "done"}).json()
    assert post(api, path, body, **{"Idempotency-Key": "done"}).json() == done
    assert done["status"] == "completed"
    cancelled = begun(api)["id"]
    first = cancel(api, cancelled, **{"Idempotency-Key": "stop"}).json()
    assert cancel(api, cancelled, **{"Idempotency-Key": "stop"}).json() == first


def test_a_part_costs_few_queries(owner: Person, disk: Disk) -> None:
    api, id = owner.api, begun(owner.api)["id"]
    with CaptureQueriesContext(connection) as queries:
        part(api, id, b"x")
    # the key, its limits, the upload, a savepoint, the upload's lock, the sum, the part, the
    # savepoint's end
    assert len(queries) == 8


def test_parts_are_kept_as_long_as_their_upload_is_pending(owner: Person, disk: Disk) -> None:
    part(owner.api, begun(owner.api)["id"], CONTENT)
    purge_parts()
    assert len(disk.files) == 1


def test_parts_that_cannot_be_removed_are_tried_again(
    owner: Person, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(name: str) -> None:
        raise StorageAway("gone fishing")

    id = begun(owner.api)["id"]
    part(owner.api, id, CONTENT)
    assert cancel(owner.api, id).status_code == 200
    monkeypatch.setattr(storage, "remove", away)
    with pytest.raises(StorageAway):
        purge_parts()
    assert len(disk.files) == 1
    monkeypatch.undo()
    purge_parts()
    with scopes_disabled():
        assert (disk.files, UploadPart.objects.count()) == ([], 0)


def every_step(api: Client, id: str) -> list[Any]:
    return [send_part(api, id, b"x"), complete(api, id, "part_x"), cancel(api, id)]


def test_a_stranger_finds_nothing(owner: Person, stranger: Person, disk: Disk) -> None:
    begun(stranger.api)
    for response in every_step(stranger.api, begun(owner.api)["id"]):
        assert_refused(response, 404, "upload_id", "not_found")
    assert disk.files == []


def test_a_strangers_part_is_unknown(owner: Person, stranger: Person, disk: Disk) -> None:
    theirs = part(stranger.api, begun(stranger.api)["id"], CONTENT)
    mine = begun(owner.api)["id"]
    assert_refused(complete(owner.api, mine, theirs), 400, "part_ids", "unknown_part")


def test_a_key_that_may_only_read_is_refused(owner: Person, disk: Disk) -> None:
    reading = client_with(owner.caller.organization, "files.read", "batches")
    steps = every_step(reading, begun(owner.api)["id"])
    for response in [post(reading, "/v1/uploads", ASKED), *steps]:
        assert_refused(response, 403, None, "insufficient_scope")
    assert disk.files == []


@pytest.mark.parametrize("path", ["", "/upload_x/parts", "/upload_x/complete", "/upload_x/cancel"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_another_method_is_not_allowed(method: str, path: str, owner: Person) -> None:
    response = owner.api.generic(method, f"/v1/uploads{path}")
    assert_refused(response, 405, None, "method_not_allowed")
    assert response["Allow"] == "POST"
