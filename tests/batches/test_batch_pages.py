"""The pages of batches, as a browser without scripts asks for them and as HTMX does.

What scripts do with them is in `tests/e2e/`.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.contrib.messages import get_messages
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import connection
from django.template.loader import render_to_string
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django_scopes import scopes_disabled

from accounts.models import User
from batches import views
from batches.models import Batch, File
from batches.models.batches import NEXT, Status
from batches.services import batches, files
from models_registry.models import Model
from models_registry.services import note_load
from tests.conftest import PASSWORD, Person

HTMX = {"hx-request": "true", "hx-current-url": "http://testserver/?after=batch_7"}


def file_of(
    person: Person, content: bytes = b"{}\n", name: str = "in.jsonl", **fields: Any
) -> File:
    return files.create_file(
        actor=person.caller,
        content=SimpleUploadedFile(name, content),
        filename=name,
        purpose="batch",
        **fields,
    )


def batch_of(
    person: Person, *, name: str = "in.jsonl", metadata: Any = None, **fields: Any
) -> Batch:
    """A batch in any state, without the way there."""
    batch = batches.create_batch(
        actor=person.caller,
        input_file_id=file_of(person, name=name).pk,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata=metadata,
    )
    with scopes_disabled():
        Batch.objects.filter(pk=batch.pk).update(**fields)
        return Batch.objects.get(pk=batch.pk)


def shown(response: Any) -> list[str]:
    """The ids of the batches on the page, in their order."""
    return re.findall(r'<code class="portal-id" title="(\w+)"', response.content.decode())


def status_of(batch: Batch) -> str:
    with scopes_disabled():
        return Batch.objects.get(pk=batch.pk).status


# --- The door -------------------------------------------------------------------------------


@pytest.mark.django_db
@pytest.mark.parametrize("path", ["/", "/files/file-1/content"])
def test_strangers_to_the_portal_sign_in_first(path: str) -> None:
    response = Client().get(path)
    assert (response.status_code, response["Location"]) == (302, f"/accounts/login/?next={path}")


@pytest.mark.django_db
def test_an_expired_session_sends_htmx_to_sign_in_and_back() -> None:
    response = Client().get("/?after=batch_7", headers=HTMX)
    assert response.status_code == 200
    assert response["HX-Redirect"] == "/accounts/login/?next=/%3Fafter%3Dbatch_7"


def test_an_expired_session_never_comes_back_to_another_site(db: None) -> None:
    elsewhere = {"hx-request": "true", "hx-current-url": "https://evil.test/x"}
    response = Client().get("/", headers=elsewhere)
    assert response["HX-Redirect"] == "/accounts/login/?next=/"


def test_a_person_of_no_organization_is_told_what_to_do(db: None) -> None:
    user = User.objects.create_user("alone@nowhere.test", PASSWORD)
    client = Client()
    client.force_login(user, backend="allauth.account.auth_backends.AuthenticationBackend")
    response = client.get("/")
    assert response.status_code == 403
    assert "create_org" in response.content.decode()
    assert client.get("/", headers=HTMX)["HX-Refresh"] == "true"


def test_pages_are_not_kept_by_caches(owner: Person) -> None:
    response = owner.browser.get("/")
    assert response["Cache-Control"] == "max-age=0, no-cache, no-store, must-revalidate, private"


# --- The list -------------------------------------------------------------------------------


def test_the_list_has_the_organizations_batches_newest_first(
    owner: Person, teammate: Person, stranger: Person
) -> None:
    foreign = batch_of(stranger)
    mine = [batch_of(owner), batch_of(teammate), batch_of(owner)]
    newest_first = [batch.pk for batch in reversed(mine)]
    for person in (owner, teammate):
        assert shown(person.browser.get("/")) == newest_first
    assert shown(stranger.browser.get("/")) == [foreign.pk]


def test_the_list_pages_by_key(owner: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "PAGE_SIZE", 2)
    newest_first = [batch_of(owner).pk for _ in range(5)][::-1]
    found, path = [], "/"
    while path:
        response = owner.browser.get(path)
        found.append(shown(response))
        older = re.search(r'href="(\?after=\w+)"', response.content.decode())
        path = f"/{older[1]}" if older else ""
    assert found == [newest_first[:2], newest_first[2:4], newest_first[4:]]


@pytest.mark.parametrize("after", ["batch_", "%00", "%22%3E%3Cb%3E", "é" * 300])
def test_any_after_is_an_answer(owner: Person, after: str) -> None:
    batch_of(owner)
    response = owner.browser.get(f"/?after={after}")
    assert response.status_code == 200
    assert b"<b>" not in response.content


def test_the_lists_queries_do_not_grow_with_its_rows(owner: Person, echo: Model) -> None:
    def count() -> int:
        client = owner.browser
        with CaptureQueriesContext(
            connection,
        ) as queries:
            client.get("/")
        return len(queries)

    def finished() -> None:
        made = {"output_file": file_of(owner), "error_file": file_of(owner), "model": echo}
        batch_of(owner, status=Status.COMPLETED, total=2, completed=1, failed=1, **made)

    finished()
    of_one = count()
    finished()
    batch_of(owner)
    assert count() == of_one


@pytest.mark.parametrize("status", Status.values)
def test_every_status_is_shown_in_words_with_an_icon(owner: Person, status: str) -> None:
    batch_of(owner, status=status, total=3, completed=1, failed=1)
    said = owner.browser.get("/").content.decode()
    colour, icon = views.LOOKS[status]
    badge = re.search(r'<span class="status (.+?) .+?#(.+?)".*?</svg>\s*(.+?)</span>', said, re.S)
    assert badge
    assert badge.groups() == (f"status-{colour}", icon, Status(status).label)


def test_progress_is_shown_as_counts_and_percent(owner: Person) -> None:
    batch_of(owner, status=Status.IN_PROGRESS, total=40_000, completed=9_990, failed=10)
    said = owner.browser.get("/").content.decode()
    assert 'max="100" value="25"' in said
    assert "10,000 of 40,000" in said
    assert "10 failed" in said


def test_a_failed_validation_says_the_first_bad_line(owner: Person) -> None:
    bad = {"code": "x", "message": "<i>no</i> JSON", "param": None, "line": 7}
    batch_of(owner, status=Status.FAILED, errors=[bad, bad, bad])
    said = owner.browser.get("/").content.decode()
    assert "Line 7: &lt;i&gt;no&lt;/i&gt; JSON" in said
    assert "and 2 more" in said


def test_what_tenants_send_is_escaped(owner: Person) -> None:
    hostile = '"><img src=x onerror=alert(1)>'
    batch_of(owner, name=f"{hostile}.jsonl", metadata={hostile: hostile, "items": "0"})
    said = owner.browser.get("/").content.decode()
    assert "<img" not in said
    assert said.count("&lt;img src=x onerror=alert(1)&gt;") >= 3
    assert "items: 0" in said


def test_the_empty_list_says_what_to_do_next(owner: Person, echo: Model) -> None:
    said = owner.browser.get("/").content.decode()
    assert 'OpenAI(base_url="http://testserver/v1")' in said
    assert "./run manage create_api_key --org acme --name" in said
    assert "register_model" not in said


def test_the_empty_list_says_how_to_register_the_first_model(owner: Person) -> None:
    assert "./run manage register_model" in owner.browser.get("/").content.decode()


def test_in_production_the_snippet_has_the_public_address(owner: Person, settings: Any) -> None:
    settings.PRODUCTION, settings.BASE_URL = True, "https://batches.example"
    assert "https://batches.example/v1" in owner.browser.get("/").content.decode()


# --- Live -----------------------------------------------------------------------------------


def test_htmx_gets_the_rows_alone_and_asks_again_while_one_is_unfinished(owner: Person) -> None:
    batch_of(owner, status=Status.COMPLETED)
    batch_of(owner)
    response = owner.browser.get("/", headers=HTMX)
    said = response.content.decode()
    assert response.status_code == 200
    assert said.strip().startswith('<section id="batches"')
    assert 'hx-trigger="every 3s, portal:seen from:body"' in said


@pytest.mark.parametrize("status", sorted(set(Status.values) - set(NEXT)))
def test_htmx_is_told_to_stop_when_all_are_finished(owner: Person, status: str) -> None:
    batch_of(owner, status=status)
    response = owner.browser.get("/", headers=HTMX)
    assert response.status_code == views.STOP_POLLING
    assert 'hx-trigger="portal:seen from:body"' in response.content.decode()


# --- Cancelling -----------------------------------------------------------------------------


def test_a_running_batch_can_be_cancelled(owner: Person, teammate: Person) -> None:
    batch = batch_of(owner, status=Status.IN_PROGRESS)
    path = reverse("cancel_batch", args=[batch.pk])
    assert path in teammate.browser.get("/").content.decode()
    response = teammate.browser.post(path)
    assert (response.status_code, response["Location"]) == (302, "/")
    assert status_of(batch) == Status.CANCELLING


@pytest.mark.parametrize("status", [Status.FINALIZING, Status.COMPLETED, Status.FAILED])
def test_a_batch_that_is_past_cancelling_says_so(owner: Person, status: str) -> None:
    batch = batch_of(owner, status=status)
    path = reverse("cancel_batch", args=[batch.pk])
    assert path not in owner.browser.get("/").content.decode()
    response = owner.browser.post(path)
    said = [str(message) for message in get_messages(response.wsgi_request)]
    assert said == [f"A batch that is {status} can no longer be cancelled."]
    assert status_of(batch) == status


def test_a_viewer_may_look_but_not_cancel(owner: Person, viewer: Person) -> None:
    batch = batch_of(owner)
    path = reverse("cancel_batch", args=[batch.pk])
    page = viewer.browser.get("/")
    assert shown(page) == [batch.pk]
    assert path not in page.content.decode()
    assert viewer.browser.post(path).status_code == 403
    assert status_of(batch) == Status.VALIDATING


def test_a_stranger_cannot_tell_a_foreign_batch_from_a_missing_one(
    owner: Person, stranger: Person
) -> None:
    batch_of(stranger)
    batch = batch_of(owner)
    foreign, missing = (
        stranger.browser.post(reverse("cancel_batch", args=[pk]))
        for pk in (batch.pk, f"batch_{'0' * 32}")
    )
    assert (foreign.status_code, missing.status_code) == (404, 404)
    assert b"There is nothing here" in foreign.content
    assert status_of(batch) == Status.VALIDATING


def test_cancelling_needs_the_forms_token(owner: Person) -> None:
    batch = batch_of(owner)
    client = Client(enforce_csrf_checks=True)
    client.force_login(owner.user, backend="allauth.account.auth_backends.AuthenticationBackend")
    response = client.post(reverse("cancel_batch", args=[batch.pk]))
    assert response.status_code == 403
    assert b"This form is out of date" in response.content


# --- Downloads ------------------------------------------------------------------------------


def test_members_download_files(owner: Person, viewer: Person) -> None:
    file = file_of(owner, b"content\n", name="out.jsonl")
    for person in (owner, viewer):
        response: Any = person.browser.get(reverse("file_content", args=[file.pk]))
        assert b"".join(response.streaming_content) == b"content\n"
        assert response["Content-Disposition"] == 'attachment; filename="out.jsonl"'


def test_strangers_and_deleted_files_are_404_pages(owner: Person, stranger: Person) -> None:
    file_of(stranger)
    file = file_of(owner)
    path = reverse("file_content", args=[file.pk])
    assert stranger.browser.get(path).status_code == 404
    files.delete_file(actor=owner.caller, file=file)
    response = owner.browser.get(path)
    assert response.status_code == 404
    assert b"There is nothing here" in response.content


def test_a_finished_batch_links_the_files_that_are_left(owner: Person) -> None:
    output, errors = file_of(owner, name="o.jsonl"), file_of(owner, name="e.jsonl")
    batch_of(owner, status=Status.COMPLETED, output_file=output, error_file=errors)
    files.delete_file(actor=owner.caller, file=errors)
    links = re.findall(r'href="(/files/.+?)"', owner.browser.get("/").content.decode())
    assert links == [reverse("file_content", args=[output.pk])]


# --- All pages ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [("post", "/"), ("post", "/files/x/content"), ("get", "/batches/x/cancel")],
)
def test_other_methods_are_405(owner: Person, method: str, path: str) -> None:
    assert getattr(owner.browser, method)(path).status_code == 405


def test_nothing_in_a_page_needs_an_inline_exception_of_the_policy(owner: Person) -> None:
    batch_of(owner, status=Status.IN_PROGRESS, total=3, completed=1)
    batch_of(owner, status=Status.COMPLETED, output_file=file_of(owner))
    pages = [owner.browser.get(path) for path in ("/", "/?after=batch_", "/nothing")]
    pages += [Client().get(path) for path in ("/accounts/login/", "/accounts/signup/")]
    for response in pages:
        said = response.content.decode()
        assert "unsafe" not in response["Content-Security-Policy"]
        assert (
            re.findall(r"\sstyle=|<style|\son\w+=|<script(?! src=)|https?://(?!www.w3)", said) == []
        )


@pytest.mark.parametrize("path", ["login", "signup", "password/reset", "password/reset/done"])
def test_sign_in_pages_are_in_the_layout(db: None, path: str) -> None:
    response = Client().get(f"/accounts/{path}/")
    assert response.status_code == 200
    assert 'class="portal-entrance"' in response.content.decode()


@pytest.mark.parametrize("path", ["logout", "password/change", "email"])
def test_account_pages_are_in_the_layout(owner: Person, path: str) -> None:
    response = owner.browser.get(f"/accounts/{path}/")
    assert response.status_code == 200
    assert 'class="portal-sidebar"' in response.content.decode()


def test_signing_in_and_out(owner: Person) -> None:
    client = Client()
    wrong = client.post("/accounts/login/", {"login": "owner@acme.test", "password": "wrong"})
    assert wrong.status_code == 200
    assert 'class="alert alert-danger"' in wrong.content.decode()
    right = client.post("/accounts/login/", {"login": "owner@acme.test", "password": PASSWORD})
    assert (right.status_code, right["Location"]) == (302, "/")
    assert client.get("/").status_code == 200
    client.post("/accounts/logout/")
    assert client.get("/").status_code == 302


def test_the_page_of_an_unexpected_error_needs_nothing() -> None:
    said = render_to_string("500.html")
    assert "Something went wrong here" in said


def test_a_batch_that_waits_for_a_model_that_does_not_load_says_so(
    owner: Person, echo: Model
) -> None:
    batch_of(owner, status=Status.IN_PROGRESS, total=3, model=echo)
    note_load("echo", error="no room at /a/secret/path")
    page = owner.browser.get("/").content.decode()
    assert "Its model could not be loaded; it is tried again every minute." in page
    assert "/a/secret/path" not in page
    note_load("echo", error="")
    assert "could not be loaded" not in owner.browser.get("/").content.decode()
