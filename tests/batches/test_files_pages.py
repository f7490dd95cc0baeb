"""The pages of files: the list, uploading, one file, its expiry, deleting it."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.models import AuditEvent
from accounts.services import projects
from batches import previews
from batches.models import File
from batches.models.batches import Status
from batches.services import checks, files
from batches.services.batches import create_batch
from batches.views import files as views
from tests.batches.conftest import Disk
from tests.conftest import Person
from tests.jobs import change, created, finish, fresh, jsonl, lease, lines, running, stored
from tests.wire import line

HTML = b'{"said": "<script>alert(1)</script>"}\n'


@pytest.fixture(autouse=True)
def _disk(disk: Disk, wakeups_sent: list[tuple[str, ...]]) -> None:
    """A storage of the test's own, and nobody who is woken."""


def shown(client: Client, query: str = "") -> list[str]:
    """The names of the files on the page, in their order."""
    response = client.get(f"/files{query}")
    assert response.status_code == 200
    return re.findall(
        r'<a class="fw-semibold" href="/files/file-\w+">(.+?)</a>', response.content.decode()
    )


def named(person: Person, name: str, *, purpose: str = "batch", content: bytes = b"{}\n") -> File:
    return files.create_file(
        actor=person.caller,
        content=SimpleUploadedFile(name, content),
        filename=name,
        purpose=purpose,
    )


def again(file: File) -> File:
    with scopes_disabled():
        return File.objects.get(pk=file.pk)


def deletions() -> list[tuple[str, str, str]]:
    """Who deleted which file, by the audit."""
    with scopes_disabled():
        found = AuditEvent.objects.filter(action="file.deleted").order_by("number")
        return list(found.values_list("actor_label", "target_id", "target_label"))


def preview(client: Client, file: File) -> list[str]:
    page = client.get(f"/files/{file.pk}").content.decode()
    return re.findall(r'<pre class="portal-preview".*?>(.*?)</pre>', page, re.S)


def statuses(client: Client) -> list[str]:
    page = client.get("/files").content.decode()
    return re.findall(r'<span class="status status-\w+">(.+?)</span>', page)


# --- The list -------------------------------------------------------------------------------


def test_the_list_has_the_organizations_files_newest_first(
    owner: Person, teammate: Person, viewer: Person, stranger: Person
) -> None:
    named(stranger, "theirs.jsonl")
    for person, name in ((owner, "1.jsonl"), (teammate, "2.jsonl"), (owner, "3.jsonl")):
        named(person, name)
    files.delete_file(actor=owner.caller, file=named(owner, "gone.jsonl"))
    for person in (owner, teammate, viewer):
        assert shown(person.browser) == ["3.jsonl", "2.jsonl", "1.jsonl"]
    assert shown(stranger.browser) == ["theirs.jsonl"]


def test_it_is_filtered_by_purpose_and_by_any_part_of_a_name_or_a_whole_id(owner: Person) -> None:
    file = named(owner, "Questions.jsonl")
    named(owner, "answers 100%.jsonl")
    named(owner, "picture.png", purpose="vision")
    browser = owner.browser
    assert shown(browser, "?purpose=vision") == ["picture.png"]
    assert shown(browser, "?q=QUEST") == ["Questions.jsonl"]
    assert shown(browser, "?q=%25") == ["answers 100%.jsonl"]
    assert shown(browser, f"?q={file.pk}") == ["Questions.jsonl"]
    assert shown(browser, f"?q={file.pk}&purpose=vision") == []
    for wrong in ("?purpose=other", "?q=%00", "?after=%00", "?q=" + "x" * 201):
        assert browser.get(f"/files{wrong}").status_code == 200


def test_it_is_walked_by_key_with_the_filters_kept(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "PAGE_SIZE", 2)
    for at in range(5):
        named(owner, f"{at}.jsonl")
    named(owner, "other.txt", purpose="vision")
    found, query = [], "?purpose=batch&q=json"
    while True:
        found += shown(owner.browser, query)
        page = owner.browser.get(f"/files{query}").content.decode()
        older = re.search(r'href="(\?[^"]+)" rel="next"', page)
        if older is None:
            break
        query = older[1].replace("&amp;", "&")
    assert found == ["4.jsonl", "3.jsonl", "2.jsonl", "1.jsonl", "0.jsonl"]


def test_its_queries_do_not_grow_with_its_rows(owner: Person, echo: Any) -> None:
    def row() -> None:
        file = running(owner.caller, 2).input_file
        checks.begin_check(actor=owner.caller, file=file)

    def count() -> int:
        client = owner.browser
        with CaptureQueriesContext(connection) as queries:
            client.get("/files")
        return len(queries)

    row()
    of_one = count()
    row()
    row()
    assert count() == of_one


def test_a_files_status_says_who_uses_it_and_what_a_check_found(owner: Person, echo: Any) -> None:
    named(owner, "good.jsonl")
    soon = named(owner, "soon.jsonl")
    files.set_expiry(actor=owner.caller, file=soon, expires_at=timezone.now() + timedelta(hours=2))
    checks.begin_check(actor=owner.caller, file=named(owner, "bad.jsonl", content=b"{\n"))
    running(owner.caller, 1)
    assert statuses(owner.browser) == ["In use by 1", "Bad lines", "Expires soon", "Ready"]


def test_lines_are_shown_where_somebody_has_counted_them(owner: Person, echo: Any) -> None:
    batch = running(owner.caller, 2)
    finish(lease())
    named(owner, "unknown.jsonl")
    page = owner.browser.get("/files").content.decode()
    assert re.findall(r'data-label="Lines">(.+?)<', page) == ["–", "2"]
    assert fresh(batch).input_file.lines == 2


# --- Uploading ------------------------------------------------------------------------------


def test_a_file_is_uploaded_by_the_form(owner: Person) -> None:
    form = {"file": SimpleUploadedFile("a.png", b"x"), "purpose": "vision"}
    response = owner.browser.post("/files", form)
    with scopes_disabled():
        file = File.objects.get()
    assert response["Location"] == f"/files/{file.pk}"
    assert (file.filename, file.purpose, file.user) == ("a.png", "vision", owner.user)


def test_where_there_are_several_projects_one_is_chosen(owner: Person, stranger: Person) -> None:
    usual, foreign = owner.caller.project, stranger.caller.project
    assert 'name="project"' not in owner.browser.get("/files").content.decode()
    research = projects.create_project(actor=owner.caller, name="Research")
    old = projects.create_project(actor=owner.caller, name="Old")
    projects.archive_project(actor=owner.caller, project=old)
    said = owner.browser.get("/files").content.decode()
    assert re.findall(r'<option value="(proj_\w+)"( selected)?>', said) == [
        (usual.pk, " selected"),
        (research.pk, ""),
    ]
    for project in (research, usual):
        form = {"file": SimpleUploadedFile("a.jsonl", b"x"), "project": project.pk}
        assert owner.browser.post("/files", form).status_code == 302
    form = {"file": SimpleUploadedFile("a.jsonl", b"x")}
    assert owner.browser.post("/files", form).status_code == 302
    for project in (foreign, old):
        form = {"file": SimpleUploadedFile("a.jsonl", b"x"), "project": project.pk}
        refused = owner.browser.post("/files", form)
        assert refused.status_code == 404
        assert refused.content.decode().count("No such project") == 1
    with scopes_disabled():
        found = list(File.objects.order_by("pk").values_list("project", flat=True))
    assert found == [research.pk, usual.pk, usual.pk]


@pytest.mark.parametrize(
    ("name", "purpose", "said"),
    [
        ("a.txt", "batch", "A batch&#x27;s input must be a .jsonl file"),
        ("a.jsonl", "batch_output", "purpose must be one of"),
        ("a.jsonl", "nonsense", "purpose must be one of"),
    ],
)
def test_what_the_api_refuses_is_refused_in_its_words(
    name: str, purpose: str, said: str, owner: Person
) -> None:
    form = {"file": SimpleUploadedFile(name, b"x"), "purpose": purpose}
    response = owner.browser.post("/files", form)
    assert response.status_code == 400
    assert said in response.content.decode()
    with scopes_disabled():
        assert File.objects.count() == 0


def test_who_may_only_look_sees_no_form_and_uploads_nothing(viewer: Person) -> None:
    assert "data-upload" not in viewer.browser.get("/files").content.decode()
    form = {"file": SimpleUploadedFile("a.jsonl", b"x"), "purpose": "batch"}
    assert viewer.browser.post("/files", form).status_code == 403


def test_a_reviewer_has_no_files(reviewer: Person) -> None:
    assert reviewer.browser.get("/files").status_code == 403


# --- One file -------------------------------------------------------------------------------


def test_the_first_lines_are_shown_as_json_and_never_as_html(owner: Person) -> None:
    file = stored(owner.caller, HTML + b"not json <b>\n")
    assert preview(owner.browser, file) == [
        "{\n  &quot;said&quot;: &quot;&lt;script&gt;alert(1)&lt;/script&gt;&quot;\n}",
        "not json &lt;b&gt;",
    ]


@pytest.mark.parametrize("content", [b"a\0b", b"\x89PNG\r\n", b"\xff\xfe" * 10])
def test_what_is_not_text_is_not_shown(content: bytes, owner: Person) -> None:
    file = stored(owner.caller, content, purpose="vision")
    page = owner.browser.get(f"/files/{file.pk}").content.decode()
    assert "This is not text" in page
    assert "portal-preview" not in page.replace("preview-title", "")


def test_a_preview_reads_little_of_a_large_file(owner: Person) -> None:
    content = "ä".encode() * 40_000 + b"\n" + b"x\n" * 50
    shown = previews.of(stored(owner.caller, content))
    assert [(each.is_cut, len(each.text)) for each in shown.lines] == [(True, previews.LINE)]
    assert (shown.count, shown.is_least) == (51, False)


def test_lines_are_counted_as_far_as_they_are_read(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(previews, "READ", 10)
    monkeypatch.setattr(previews, "COUNTED", 10)
    for content, count, is_least in ((b"x\n" * 10, 10, False), (b"x\n" * 9 + b"xy", 10, False)):
        shown = previews.of(stored(owner.caller, content))
        assert (shown.count, shown.is_least) == (count, is_least)
    shown = previews.of(stored(owner.caller, b"x\n" * 100))
    assert (shown.count, shown.is_least) == (10, True)
    page = owner.browser.get("/files").content.decode()
    assert re.findall(r'data-label="Lines">(.+?)<', page) == ["–"] * 3


def test_a_file_whose_bytes_are_gone_has_a_page_all_the_same(owner: Person, disk: Disk) -> None:
    file = stored(owner.caller, HTML)
    (disk.root / file.storage_name).unlink()
    assert "content is gone" in owner.browser.get(f"/files/{file.pk}").content.decode()


def test_a_deleted_file_has_no_page(owner: Person) -> None:
    file = stored(owner.caller, HTML)
    files.delete_file(actor=owner.caller, file=file)
    for path in ("", "/content"):
        assert owner.browser.get(f"/files/{file.pk}{path}").status_code == 404
    for path in ("/delete", "/expiry"):
        assert owner.browser.post(f"/files/{file.pk}{path}").status_code == 404


def test_who_may_only_look_is_shown_no_way_to_change_it(viewer: Person, owner: Person) -> None:
    file = stored(owner.caller, HTML)
    page = viewer.browser.get(f"/files/{file.pk}").content.decode()
    assert f'action="/files/{file.pk}' not in page
    assert 'action="/batches/new"' not in page
    for path in ("delete", "expiry"):
        given = {"typed": file.filename}
        assert viewer.browser.post(f"/files/{file.pk}/{path}", given).status_code == 403
    assert again(file).deleted_at is None


# --- Expiry ---------------------------------------------------------------------------------


def test_a_last_day_is_set_and_taken_back(owner: Person) -> None:
    file = stored(owner.caller, HTML)
    day = (timezone.now() + timedelta(days=5)).date()
    path = f"/files/{file.pk}/expiry"
    assert owner.browser.post(path, {"expires_on": day.isoformat()}).status_code == 302
    assert again(file).expires_at == datetime(day.year, day.month, day.day, 23, 59, 59, tzinfo=UTC)
    assert f'value="{day.isoformat()}"' in owner.browser.get(f"/files/{file.pk}").content.decode()
    assert owner.browser.post(path, {"expires_on": day.isoformat()}).status_code == 302
    assert owner.browser.post(path, {"expires_on": ""}).status_code == 302
    assert again(file).expires_at is None
    with scopes_disabled():
        events = AuditEvent.objects.filter(action="file.expiry_changed")
        assert [event.target_id for event in events] == [file.pk, file.pk]


@pytest.mark.parametrize("day", ["2020-01-01", "2999-01-01", "tomorrow"])
def test_a_day_that_cannot_be_is_refused_and_stays_in_the_form(day: str, owner: Person) -> None:
    file = stored(owner.caller, HTML)
    response = owner.browser.post(f"/files/{file.pk}/expiry", {"expires_on": day})
    assert response.status_code == 400
    page = response.content.decode()
    assert f'value="{day}"' in page
    assert "expires_on_error" in page
    assert again(file).expires_at is None


# --- Deleting -------------------------------------------------------------------------------


def test_deleting_asks_for_the_name_and_says_which_batches_use_it(owner: Person, echo: Any) -> None:
    batch = created(owner.caller, jsonl(lines(1)))
    file = batch.input_file
    browser = owner.browser
    page = browser.get(f"/files/{file.pk}").content.decode()
    said = f"1 batch uses it: {batch.pk}. Those that still run read it to their end."
    assert said in page
    browser.post(f"/files/{file.pk}/delete", {"typed": "another"})
    assert again(file).deleted_at is None
    assert deletions() == []
    response = browser.post(f"/files/{file.pk}/delete", {"typed": f" {file.filename} "})
    assert response["Location"] == "/files"
    assert again(file).deleted_at is not None
    files.delete_file(actor=owner.caller, file=file)  # which changes nothing any more
    assert deletions() == [(owner.user.email, file.pk, file.filename)]
    change(batch, status=Status.COMPLETED)
    assert (
        "No batch uses it"
        in browser.get(f"/files/{stored(owner.caller, line()).pk}").content.decode()
    )


def test_the_batches_that_use_a_file_are_counted_up_to_some(
    owner: Person, echo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "USES_SHOWN", 1)
    file = stored(owner.caller, line())
    page = f"/files/{file.pk}"
    batches = [created_of(owner, file) for _ in range(2)]
    shown = owner.browser.get(page).content.decode()
    assert "More than 1 batches use it" in shown
    assert "and older ones" in shown
    listed = re.findall(r'href="/batches/(batch_\w+)"', shown)
    assert listed == [batches[1]]


def created_of(person: Person, file: File) -> str:
    return create_batch(
        actor=person.caller,
        input_file_id=file.pk,
        endpoint="/v1/chat/completions",
        completion_window="24h",
    ).pk
