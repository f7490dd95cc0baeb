"""Files in a bucket: how many requests they take, and what S3's failures become."""

from __future__ import annotations

import json
import re
import threading
from datetime import timedelta
from typing import Any

import pytest
from django.core.files.storage import default_storage
from django.core.files.uploadedfile import TemporaryUploadedFile
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.services import organizations
from batches import s3, storage
from batches.models import File
from batches.models.batches import Status
from batches.services import files, finalization, leases, purge, sweep, validation
from batches.storage import StorageAway
from tests import jobs
from tests.conftest import Person
from tests.s3 import Bucket
from tests.stack import ROOT
from tests.wire import error_of, upload

pytestmark = pytest.mark.usefixtures("bucket")
database = pytest.mark.django_db
stored = pytest.mark.usefixtures("wakeups_sent", "echo")
MB = 2**20


def put(name: str, content: bytes = b"some bytes") -> str:
    with storage.temporary("x") as made:
        made.write(content)
        made.size = len(content)
        return storage.keep(name, made)


# --- How much is asked ----------------------------------------------------------------------


def test_a_small_file_is_one_request_each_way(bucket: Bucket) -> None:
    name = put("org/one")
    assert bucket.asked() == ["PUT"]
    assert bucket.keys == [f"portal/{name}"]
    bucket.asked()
    with storage.opened(name) as stream:
        assert stream.read() == b"some bytes"
    assert bucket.asked() == ["GET bytes=0-65535"]
    storage.remove(name)
    assert bucket.asked() == ["DELETE"]


def test_a_large_file_goes_in_parts_one_after_the_other(bucket: Bucket) -> None:
    put("org/large", b"x" * (2 * s3.PART_BYTES + 1))
    asked = [each.split("=")[0] for each in bucket.asked()]
    parts = ["PUT uploadId"] * 3
    assert asked == ["POST uploads", *parts, "POST uploadId"]
    assert bucket.unfinished == []


def test_a_whole_file_is_read_in_windows_that_grow(bucket: Bucket) -> None:
    content = bytes(range(256)) * (64 * 1024)
    name = put("org/large", content)
    bucket.asked()
    with storage.opened(name) as stream:
        found = b"".join(iter(lambda: stream.read(10_000), b""))
    assert found == content
    # 64 KB, then from 128 KB to 4 MB, then 4 MB each: 64 KB + 7.9 MB in 7, the other 8 MB in 3
    assert len(bucket.asked()) == 10


def test_a_few_lines_of_a_large_file_are_few_requests(bucket: Bucket) -> None:
    name = put("org/large", b"x" * (30 * MB))
    bucket.asked()
    near = [(10 * MB + at * 700_000, 400) for at in range(5)]
    far = [(at * 9 * MB, 400) for at in range(4)]
    assert {len(piece) for piece in storage.pieces(name, [*far, *near])} == {400}
    opening, *rest = bucket.asked()
    assert opening == "GET bytes=0-65535"
    # Those near each other in one, the others in one each; the first came with the opening.
    begun = sorted(int(each.removeprefix("GET bytes=").split("-")[0]) for each in rest)
    assert begun == [9 * MB, 18 * MB, 27 * MB]


@database
@stored
def test_a_chunk_costs_few_requests(owner: Person, bucket: Bucket, settings: Any) -> None:
    settings.CHUNK_SECONDS = 1_000
    jobs.running(owner.caller, jobs.lines(4_000))
    got = [jobs.lease() for _ in range(4)]
    asked = []
    for lease in sorted(got, key=lambda lease: lease.start):
        bucket.asked()
        assert len(jobs.read(lease).todo) == 1_000
        asked.append(len(bucket.asked()))
    # To open a file is its first 64 KB. The first three chunks' part of the index is in them, the
    # last one's is one request more; so are each chunk's 150 KB of lines.
    assert asked == [3, 3, 3, 4]


def test_its_memory_is_that_of_a_window(bucket: Bucket) -> None:
    windows: list[int] = []

    def fetch(start: int, length: int) -> tuple[bytes, int]:
        windows.append(length)
        return bytes(min(length, 100 * MB - start)), 100 * MB

    raw = s3.Ranges(fetch)
    buffer = bytearray(s3.BUFFER)
    total = 0
    while count := raw.readinto(buffer):
        total += count
    assert (total, max(windows)) == (100 * MB, s3.LARGEST_WINDOW)


def test_all_threads_share_one_client(bucket: Bucket) -> None:
    storage.prepare()
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(default_storage.connection)) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
        thread.join()
    assert found[0] is found[1]


def test_what_a_sender_calls_its_content_is_not_passed_on(bucket: Bucket) -> None:
    evil = "text/html\r\nx-amz-acl: public-read"
    content = TemporaryUploadedFile("x.html.gz", evil, 1, None)
    content.write(b"x")
    storage.keep("org/one.html.gz", content)
    [key] = bucket.keys
    found = bucket.client.head_object(Bucket=bucket.name, Key=key)
    assert (found["ContentType"], found.get("ContentEncoding")) == (
        "application/octet-stream",
        None,
    )


# --- The whole way --------------------------------------------------------------------------


@database
@stored
def test_a_batch_goes_its_way_and_leaves_what_it_should(owner: Person, bucket: Bucket) -> None:
    batch = jobs.running(owner.caller, 20)
    lease = jobs.lease()
    assert [each.line for each in jobs.read(lease).todo] == list(range(1, 21))
    found = [jobs.outcome(at, ok=at % 5 != 0) for at in range(1, 21)]
    leases.save(lease=lease, outcomes=found, finished=True)
    finalization.finalize_batch(batch.pk)
    end = jobs.fresh(batch)
    assert (end.status, end.completed, end.failed) == (Status.COMPLETED, 16, 4)
    assert jobs.custom_ids(end.error_file) == ["5", "10", "15", "20"]
    assert end.output_file is not None
    response = owner.api.get(f"/v1/files/{end.output_file.pk}/content")
    whole = response.getvalue()
    assert whole.count(b"\n") == 16
    part = owner.api.get(
        f"/v1/files/{end.output_file.pk}/content", headers={"Range": "bytes=10-19"}
    )
    assert (part.status_code, part.getvalue()) == (206, whole[10:20])


@database
@stored
def test_an_organizations_purge_leaves_nothing_under_its_folder(
    owner: Person, stranger: Person, bucket: Bucket
) -> None:
    acme = owner.caller.organization
    jobs.running(owner.caller, 3)
    other = jobs.stored(stranger.caller, b"x")
    put(f"{acme.pk}/lost")
    bucket.begin(f"portal/{acme.pk}/broken-off")
    bucket.begin(f"portal/{stranger.caller.organization.pk}/broken-off")
    organizations.delete_organization(actor=owner.caller)
    with scopes_disabled():
        type(acme).objects.filter(pk=acme.pk).update(deleted_at=timezone.now() - timedelta(days=40))
    for _ in range(9):
        purge.purge_organizations()
    assert jobs.kept() == {other.storage_name}
    assert bucket.unfinished == [f"portal/{stranger.caller.organization.pk}/broken-off"]


def test_what_was_begun_long_ago_is_aborted_and_looked_for_now_and_then(bucket: Bucket) -> None:
    bucket.begin("portal/org/killed")
    bucket.begin("another/portal/killed")
    bucket.asked()
    storage.remove_abandoned()
    storage.remove_abandoned()
    assert [each for each in bucket.asked() if each.startswith("GET")] == [
        "GET uploads&prefix=portal%2F"
    ]
    assert bucket.unfinished == ["another/portal/killed"]


def test_what_was_begun_a_moment_ago_is_left_alone(bucket: Bucket) -> None:
    bucket.begin("portal/org/under-way")
    moto_says_2010 = timezone.now().replace(year=2010, month=1)
    default_storage.abort_uploads("", moto_says_2010)
    assert bucket.unfinished == ["portal/org/under-way"]
    default_storage.abort_uploads("other/", timezone.now())
    assert bucket.unfinished == ["portal/org/under-way"]
    default_storage.abort_uploads("org/", timezone.now())
    assert bucket.unfinished == []


# --- Permissions ----------------------------------------------------------------------------

POLICY = ROOT / "docs" / "OPERATIONS.md"


def documented(bucket: Bucket) -> list[dict[str, Any]]:
    """The statements of the documentation's policy, for this bucket; each of one action.

    Without conditions, which moto does not know how to meet.
    """
    text = re.search(r"```json\n(\{\n  \"Version.*?)```", POLICY.read_text(), re.DOTALL)
    assert text is not None
    found = []
    for each in json.loads(text[1].replace("my-bucket", bucket.name))["Statement"]:
        actions = each["Action"] if isinstance(each["Action"], list) else [each["Action"]]
        found += [each | {"Action": action, "Condition": {}} for action in actions]
    return found


def one_of_everything() -> None:
    """Each kind of request that is ever sent."""
    large = put("org/large", b"x" * (s3.PART_BYTES + 1))
    assert len(storage.pieces(large, [(1, 5)])) == 1
    put("org/one")
    storage.remove(large)
    storage.remove_folder("org")
    if not storage.is_usable():
        raise StorageAway("not usable")


def test_the_documented_policy_is_enough_and_no_more(
    bucket: Bucket, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * MB)
    statements = documented(bucket)
    options = settings.STORAGES["default"]["OPTIONS"]
    for at in range(len(statements) + 1):
        bucket.begin("portal/org/killed")
        allowed = statements[:at] + statements[at + 1 :]
        with bucket.server.as_user(allowed) as key:
            default = {"BACKEND": "batches.s3.S3", "OPTIONS": options | key}
            settings.STORAGES = settings.STORAGES | {"default": default}
            if allowed == statements:
                one_of_everything()
            else:
                with pytest.raises(StorageAway):
                    one_of_everything()
    assert (bucket.keys, bucket.unfinished) == ([], [])


# --- Trouble --------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting as short, and as seldom, as a test can."""
    monkeypatch.setattr(s3, "CONNECT_SECONDS", 1)
    monkeypatch.setattr(s3, "READ_SECONDS", 0.3)
    monkeypatch.setattr(s3, "ATTEMPTS", 1)


def everything(name: str) -> list[Any]:
    return [
        lambda: storage.opened(name),
        lambda: storage.pieces(name, [(0, 1)]),
        lambda: put("org/new"),
        lambda: storage.remove(name),
        lambda: storage.remove_folder("org"),
    ]


def assert_away(name: str) -> None:
    for call in everything(name):
        with pytest.raises(StorageAway) as away:
            call()
        assert isinstance(away.value, OSError)
        assert (away.value.status, away.value.code) == (503, "unavailable")
        assert "org" in str(away.value)
    assert not storage.is_usable()


@pytest.mark.usefixtures("impatient")
def test_a_store_that_is_gone_is_away_and_then_back(bucket: Bucket) -> None:
    name = put("org/one")
    with bucket.server.stopped():
        assert_away(name)
    assert storage.is_usable()
    with storage.opened(name) as stream:
        assert stream.read() == b"some bytes"


@pytest.mark.usefixtures("impatient")
def test_a_store_that_hangs_holds_nobody_for_ever(bucket: Bucket) -> None:
    name = put("org/one")
    with bucket.server.hanging():
        assert_away(name)
    assert storage.is_usable()


@pytest.mark.usefixtures("impatient")
def test_a_store_that_lets_nobody_in_is_away(bucket: Bucket) -> None:
    name = put("org/one")
    with bucket.server.refusing("403 Forbidden", "AccessDenied"):
        assert_away(name)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("code", ["NoSuchBucket", ""])
def test_not_every_404_is_a_missing_file(bucket: Bucket, code: str) -> None:
    """A bucket that is gone, and a server that is no store at all."""
    with bucket.server.refusing("404 Not Found", code):
        assert_away("org/one")


def test_a_put_that_somebody_aborts_is_tried_later(bucket: Bucket) -> None:
    with (
        bucket.server.refusing("404 Not Found", "NoSuchUpload", method="PUT"),
        pytest.raises(StorageAway),
    ):
        put("org/large", b"x" * (s3.PART_BYTES + 1))


def test_without_credentials_it_is_away(
    bucket: Bucket, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    options = settings.STORAGES["default"]["OPTIONS"]
    kept = {key: value for key, value in options.items() if key not in ("access_key", "secret_key")}
    default = {"BACKEND": "batches.s3.S3", "OPTIONS": kept}
    settings.STORAGES = settings.STORAGES | {"default": default}
    with pytest.raises(StorageAway, match="Unable to locate credentials"):
        storage.opened("org/one")


def test_a_store_that_is_too_busy_is_asked_again(bucket: Bucket) -> None:
    name = put("org/one")
    bucket.asked()
    with bucket.server.refusing("503 Slow Down", "SlowDown", times=2):
        assert put("org/two")
    assert bucket.asked() == ["PUT"] * 3
    with bucket.server.refusing("500 Oh", "InternalError", times=2), storage.opened(name) as stream:
        assert stream.read() == b"some bytes"


def test_an_answer_that_breaks_off_is_asked_for_again(bucket: Bucket) -> None:
    content = bytes(range(256)) * 1_000
    name = put("org/one", content)
    with bucket.server.breaking_off(times=2), storage.opened(name) as stream:
        assert stream.read() == content
    with bucket.server.breaking_off(times=99), pytest.raises(StorageAway):
        storage.opened(name)


@pytest.mark.usefixtures("impatient")
def test_a_file_whose_last_part_is_refused_is_not_there_and_leaves_no_parts(bucket: Bucket) -> None:
    with (
        bucket.server.refusing("403 Forbidden", "AccessDenied", method="PUT"),
        pytest.raises(StorageAway),
    ):
        put("org/large", b"x" * (s3.PART_BYTES + 1))
    with (
        bucket.server.refusing("500 Oh", "InternalError", method="POST"),
        pytest.raises(StorageAway),
    ):
        put("org/large", b"x" * (s3.PART_BYTES + 1))
    assert (bucket.keys, bucket.unfinished) == ([], [])


def test_a_store_without_ranges_is_refused_before_all_of_it_comes(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = put("org/one")
    real = bucket.server._moto

    def unranged(environ: dict[str, Any], start_response: Any) -> Any:
        environ.pop("HTTP_RANGE", None)
        return real(environ, start_response)

    with (
        bucket.server._answering(unranged),
        pytest.raises(StorageAway, match="does not serve ranges"),
    ):
        storage.opened(name)


# --- Trouble, as people and workers meet it -------------------------------------------------


@database
@stored
@pytest.mark.usefixtures("impatient")
def test_an_upload_to_a_store_that_is_away_is_a_503_and_nothing_is_stored(
    owner: Person, bucket: Bucket
) -> None:
    with bucket.server.stopped():
        response = upload(owner.api)
    assert (response.status_code, response["Retry-After"]) == (503, "2")
    assert error_of(response) == {
        "message": "The storage cannot be reached; try again soon.",
        "type": "server_error",
        "param": None,
        "code": "unavailable",
    }
    with scopes_disabled():
        assert File.objects.count() == 0
    assert (bucket.keys, upload(owner.api).status_code) == ([], 200)


@database
@stored
@pytest.mark.usefixtures("impatient")
def test_a_download_is_a_404_only_when_the_bytes_are_gone(owner: Person, bucket: Bucket) -> None:
    id = upload(owner.api).json()["id"]
    with bucket.server.stopped():
        assert owner.api.get(f"/v1/files/{id}/content").status_code == 503
        assert owner.browser.get(f"/files/{id}/content").status_code == 503
    with scopes_disabled():
        storage.remove(File.objects.get().storage_name)
    assert owner.api.get(f"/v1/files/{id}/content").status_code == 404
    assert owner.browser.get(f"/files/{id}/content").status_code == 404


@database
@stored
@pytest.mark.usefixtures("impatient")
def test_what_the_store_interrupts_goes_on_when_it_is_back(owner: Person, bucket: Bucket) -> None:
    batch = jobs.created(owner.caller, jobs.jsonl(jobs.lines(4)))
    with bucket.server.stopped(), pytest.raises(StorageAway):
        validation.validate_batch(batch.pk)
    assert jobs.fresh(batch).status == Status.VALIDATING
    validation.validate_batch(batch.pk)
    lease = jobs.lease()
    with bucket.server.stopped(), pytest.raises(OSError, match="/index-"):
        jobs.read(lease)
    leases.save(lease=lease, outcomes=[jobs.outcome(at) for at in range(1, 5)], finished=True)
    with bucket.server.stopped(), pytest.raises(StorageAway):
        finalization.finalize_batch(batch.pk)
    assert (jobs.fresh(batch).status, jobs.journal(batch)) == (Status.FINALIZING, [1, 2, 3, 4])
    finalization.finalize_batch(batch.pk)
    assert jobs.custom_ids(jobs.fresh(batch).output_file) == ["1", "2", "3", "4"]


@database
@stored
@pytest.mark.usefixtures("impatient")
def test_a_sweep_asks_a_store_that_is_away_once_a_step(owner: Person, bucket: Bucket) -> None:
    for _ in range(3):
        files.delete_file(actor=owner.caller, file=jobs.stored(owner.caller, b"x"))
    bucket.asked()
    with bucket.server.refusing("403 Forbidden", "AccessDenied", method="DELETE"):
        sweep.sweep()
    assert bucket.asked().count("DELETE") == 1
    assert len(bucket.keys) == 3
    sweep.sweep()
    assert bucket.keys == []


@database
@stored
def test_a_worker_that_does_not_see_the_files_says_what_to_look_at(owner: Person) -> None:
    batch = jobs.running(owner.caller, 3)
    storage.remove(batch.input_file.storage_name)
    with pytest.raises(FileNotFoundError, match="is STORAGE_URL the same place on all hosts"):
        jobs.read(jobs.lease())
