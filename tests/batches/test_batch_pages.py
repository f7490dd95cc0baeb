"""The pages of batches, as a browser without scripts asks for them and as HTMX does.

What scripts do with them is in `tests/e2e/`.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from html import unescape
from typing import Any

import pytest
import time_machine
from django.contrib.messages import get_messages
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import connection
from django.template.loader import render_to_string
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django_scopes import scopes_disabled

from accounts.models import ApiKey, AuditEvent, User
from accounts.services import projects
from batches.forms.batches import BatchFilterForm
from batches.models import Batch, File
from batches.models.batches import NEXT, Status
from batches.queries import batches as queries
from batches.services import batches, files
from batches.views import batches as views
from models_registry.models import Change, Model
from models_registry.services import note_failure, note_load, register_model
from tests.conftest import PASSWORD, Person

HTMX = {"hx-request": "true", "hx-current-url": "http://testserver/batches?after=batch_7"}


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
@pytest.mark.parametrize("path", ["/batches", "/files/file-1/content"])
def test_strangers_to_the_portal_sign_in_first(path: str) -> None:
    response = Client().get(path)
    assert (response.status_code, response["Location"]) == (302, f"/accounts/login/?next={path}")


@pytest.mark.django_db
def test_an_expired_session_sends_htmx_to_sign_in_and_back() -> None:
    response = Client().get("/batches?after=batch_7", headers=HTMX)
    assert response.status_code == 200
    assert response["HX-Redirect"] == "/accounts/login/?next=/batches%3Fafter%3Dbatch_7"


def test_an_expired_session_never_comes_back_to_another_site(db: None) -> None:
    elsewhere = {"hx-request": "true", "hx-current-url": "https://evil.test/x"}
    response = Client().get("/batches", headers=elsewhere)
    assert response["HX-Redirect"] == "/accounts/login/?next=/"


def test_a_person_of_no_organization_is_told_what_to_do(db: None) -> None:
    user = User.objects.create_user("alone@nowhere.test", PASSWORD)
    client = Client()
    client.force_login(user, backend="allauth.account.auth_backends.AuthenticationBackend")
    response = client.get("/batches")
    assert response.status_code == 403
    assert "create_org" in response.content.decode()
    assert client.get("/batches", headers=HTMX)["HX-Refresh"] == "true"


def test_pages_are_not_kept_by_caches(owner: Person) -> None:
    response = owner.browser.get("/batches")
    assert response["Cache-Control"] == "max-age=0, no-cache, no-store, must-revalidate, private"


# --- The list -------------------------------------------------------------------------------


def test_the_list_has_the_organizations_batches_newest_first(
    owner: Person, teammate: Person, stranger: Person
) -> None:
    foreign = batch_of(stranger)
    mine = [batch_of(owner), batch_of(teammate), batch_of(owner)]
    newest_first = [batch.pk for batch in reversed(mine)]
    for person in (owner, teammate):
        assert shown(person.browser.get("/batches")) == newest_first
    assert shown(stranger.browser.get("/batches")) == [foreign.pk]


def test_the_list_pages_by_key(owner: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "PAGE_SIZE", 2)
    newest_first = [batch_of(owner).pk for _ in range(5)][::-1]
    found, path = [], "/batches"
    while path:
        response = owner.browser.get(path)
        found.append(shown(response))
        older = re.search(r'href="(\?after=\w+)"', response.content.decode())
        path = f"/batches{older[1]}" if older else ""
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
        ) as found:
            client.get("/batches")
        return len(found)

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
    said = owner.browser.get("/batches").content.decode()
    colour, icon = views.LOOKS[status]
    badge = re.search(r'<span class="status (.+?) .+?#(.+?)".*?</svg>\s*(.+?)</span>', said, re.S)
    assert badge
    assert badge.groups() == (f"status-{colour}", icon, Status(status).label)


def test_progress_is_shown_as_counts_and_percent(owner: Person) -> None:
    batch_of(owner, status=Status.IN_PROGRESS, total=40_000, completed=9_990, failed=10)
    said = owner.browser.get("/batches").content.decode()
    assert 'max="100" value="25"' in said
    assert "10,000 of 40,000" in said
    assert "10 failed" in said


def test_a_failed_validation_says_the_first_bad_line(owner: Person) -> None:
    bad = {"code": "x", "message": "<i>no</i> JSON", "param": None, "line": 7}
    batch_of(owner, status=Status.FAILED, errors=[bad, bad, bad])
    said = owner.browser.get("/batches").content.decode()
    assert "Line 7: &lt;i&gt;no&lt;/i&gt; JSON" in said
    assert "and 2 more" in said


def test_what_tenants_send_is_escaped(owner: Person) -> None:
    hostile = '"><img src=x onerror=alert(1)>'
    batch_of(owner, name=f"{hostile}.jsonl", metadata={hostile: hostile, "items": "0"})
    said = owner.browser.get("/batches").content.decode()
    assert "<img" not in said
    assert said.count("&lt;img src=x onerror=alert(1)&gt;") >= 3
    assert "items: 0" in said


def test_the_empty_list_says_what_to_do_next(owner: Person, echo: Model) -> None:
    said = owner.browser.get("/batches").content.decode()
    assert 'OpenAI(base_url="http://testserver/v1")' in said
    assert 'href="/organization/keys/new"' in said
    assert "register_model" not in said


@pytest.mark.parametrize("path", ["/", "/batches"])
def test_the_first_steps_name_a_model_that_answers_what_they_send(path: str, owner: Person) -> None:
    def said() -> str:
        return unescape(owner.browser.get(path).content.decode())

    register_model(name="a-scorer", source="none", engine="instant", task="score")
    assert ('"model": "a-scorer"' in said(), 'endpoint="/v1/score"' in said()) == (True, True)
    register_model(name="b-embedder", source="none", engine="instant", task="embedding")
    assert '"model": "b-embedder",\n            "input": question,' in said()
    assert 'endpoint="/v1/embeddings"' in said()
    register_model(name="c-talker", source="none", engine="instant")
    assert '"model": "c-talker",\n            "messages": [{' in said()
    assert 'endpoint="/v1/chat/completions"' in said()


def test_the_empty_list_tells_viewers_whom_to_ask(viewer: Person) -> None:
    said = viewer.browser.get("/batches").content.decode()
    assert "ask an owner or admin of the organization" in said
    assert 'href="/organization/keys/new"' not in said


def test_who_may_see_no_batches_is_sent_on(reviewer: Person) -> None:
    assert reviewer.browser.get("/")["Location"] == "/organization"
    assert reviewer.browser.get("/batches").status_code == 403


def test_the_empty_list_says_how_to_register_the_first_model(owner: Person) -> None:
    assert "./run manage register_model" in owner.browser.get("/batches").content.decode()


def test_in_production_the_snippet_has_the_public_address(owner: Person, settings: Any) -> None:
    settings.PRODUCTION, settings.BASE_URL = True, "https://batches.example"
    assert "https://batches.example/v1" in owner.browser.get("/batches").content.decode()


# --- Filters --------------------------------------------------------------------------------


def filtered(person: Person, query: str) -> list[str]:
    return shown(person.browser.get(f"/batches?{query}"))


def test_the_list_is_filtered_by_status(owner: Person) -> None:
    made = {status: batch_of(owner, status=status).pk for status in Status.values}
    for status, id in made.items():
        assert filtered(owner, f"status={status}") == [id]
    unfinished = [made[status] for status in Status.values if status in NEXT]
    assert filtered(owner, "status=unfinished") == unfinished[::-1]


def test_the_list_is_filtered_by_model_project_person_and_key(
    owner: Person, teammate: Person, echo: Model
) -> None:
    batch_of(owner)
    mine = batch_of(owner, model=echo)
    theirs = batch_of(teammate)
    project = projects.create_project(actor=owner.caller, name="Evals")
    with scopes_disabled():
        key = ApiKey.objects.get(created_by=teammate.user)
        Batch.objects.filter(pk=theirs.pk).update(project=project, api_key=key)
    assert filtered(owner, f"model={echo.pk}") == [mine.pk]
    assert filtered(owner, f"user={teammate.user.pk}") == [theirs.pk]
    assert filtered(owner, f"project={project.pk}") == [theirs.pk]
    assert filtered(owner, f"key={key.pk}") == [theirs.pk]
    assert filtered(owner, f"key={key.pk}&model={echo.pk}") == []


def test_the_list_is_filtered_by_days(owner: Person) -> None:
    found = []
    for day in (1, 2, 3):
        with time_machine.travel(datetime(2026, 5, day, 23, 59, 59, 999_000, UTC), tick=False):
            found.append(batch_of(owner).pk)
    assert filtered(owner, "since=2026-05-02") == [found[2], found[1]]
    assert filtered(owner, "until=2026-05-02") == [found[1], found[0]]
    assert filtered(owner, "since=2026-05-02&until=2026-05-02") == [found[1]]


def test_the_list_is_filtered_by_metadata(owner: Person) -> None:
    one = batch_of(owner, metadata={"run": "a=b", "of": "x"})
    batch_of(owner, metadata={"run": "a"})
    batch_of(owner)
    assert filtered(owner, "metadata=run=a%3Db") == [one.pk]
    assert filtered(owner, "metadata=+of+%3D+x+") == [one.pk]
    assert filtered(owner, "metadata=run=x") == []


def test_the_list_is_searched_by_name_and_id(owner: Person, stranger: Person) -> None:
    one, other = batch_of(owner, name="Nightly_100%.jsonl"), batch_of(owner, name="b.jsonl")
    foreign = batch_of(stranger, name="nightly.jsonl")
    assert filtered(owner, "q=nightly") == [one.pk]
    assert filtered(owner, "q=0%25") == [one.pk]
    assert filtered(owner, f"q={other.pk[-9:]}") == [other.pk]
    assert filtered(owner, f"q={foreign.pk}") == []


def test_a_search_looks_at_so_many_batches_and_can_be_gone_on_with(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "SEARCHED", 2)
    wanted = batch_of(owner, name="wanted.jsonl")
    for _ in range(6):
        batch_of(owner)
    pages, path = [], "/batches?q=wanted"
    while path:
        response = owner.browser.get(path)
        pages.append(shown(response))
        older = re.search(r'href="(\?q=wanted&amp;after=\w+)"', response.content.decode())
        path = f"/batches{unescape(older[1])}" if older else ""
    assert pages == [[], [], [wanted.pk]]


def test_paging_keeps_the_filters(owner: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "PAGE_SIZE", 2)
    wanted = [batch_of(owner, status=Status.FAILED).pk for _ in range(3)][::-1]
    batch_of(owner)
    first = owner.browser.get("/batches?status=failed&since=2020-01-01")
    assert shown(first) == wanted[:2]
    older = re.search(r'href="(\?[^"]+after=\w+)"', first.content.decode())
    assert older
    assert shown(owner.browser.get(f"/batches{unescape(older[1])}")) == wanted[2:]


def test_what_is_no_filter_is_said_and_left_out(owner: Person) -> None:
    batch = batch_of(owner)
    for query in ("since=soon", "metadata=x", "status=odd", "project=proj_0", "user=x"):
        response = owner.browser.get(f"/batches?{query}")
        assert (response.status_code, shown(response)) == (400, [batch.pk])
        assert 'class="portal-error"' in response.content.decode()


def test_filters_choose_among_ones_own(owner: Person, stranger: Person) -> None:
    batch_of(owner)
    register_model(
        name="theirs", source="none", engine="instant", organizations=[stranger.caller.organization]
    )
    said = owner.browser.get("/batches").content.decode()
    assert "theirs" not in said
    assert "globex" not in said.lower()


def test_a_whole_id_is_found_however_old_the_batch_is(
    owner: Person, stranger: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "SEARCHED", 1)
    foreign = batch_of(stranger)
    old = batch_of(owner, status=Status.FAILED)
    for _ in range(3):
        batch_of(owner)
    assert filtered(owner, f"q={old.pk}") == [old.pk]
    assert filtered(owner, f"q={old.pk}&status=completed") == []
    assert filtered(owner, f"q={foreign.pk}") == []


def test_days_say_that_they_are_utc(owner: Person) -> None:
    batch_of(owner)
    said = owner.browser.get("/batches").content.decode()
    assert ("From (UTC)</label>" in said, "To (UTC)</label>" in said) == (True, True)


def test_a_poll_asks_for_no_choices_of_the_filters(owner: Person) -> None:
    def lists_keys(query: str = "", **options: Any) -> bool:
        client = owner.browser
        with CaptureQueriesContext(connection) as found:
            assert client.get(f"/batches{query}", **options).status_code == 200
        return any('FROM "accounts_apikey"' in each["sql"] for each in found)

    with scopes_disabled():
        key = ApiKey.objects.get(created_by=owner.user)
    mine = batch_of(owner, api_key=key)
    batch_of(owner)
    assert (lists_keys(), lists_keys(headers=HTMX)) == (True, False)
    assert lists_keys(f"?key={key.pk}", headers=HTMX)  # of anything else, nothing is known of it
    assert shown(owner.browser.get(f"/batches?key={key.pk}", headers=HTMX)) == [mine.pk]


def test_where_nothing_matches_the_page_leads_back_to_all(owner: Person) -> None:
    batch_of(owner)
    said = owner.browser.get("/batches?status=failed").content.decode()
    assert "No batch is like that" in said
    assert 'value="failed" selected' in said


def test_the_choices_of_a_filter_are_asked_for_once_and_only_where_they_are_shown() -> None:
    asked = []

    def choices() -> list[tuple[str, str]]:
        asked.append(1)
        return [("a", "A")]

    every = {"models": choices, "projects": list, "users": list, "keys": list}
    form = BatchFilterForm({"model": "a"}, **every)
    assert asked == []
    assert form.is_valid()
    assert '<option value="a" selected>A</option>' in str(form["model"])
    assert asked == [1]


def test_filtered_lists_have_constant_queries(owner: Person, echo: Model) -> None:
    def count() -> int:
        client = owner.browser
        with CaptureQueriesContext(connection) as found:
            client.get("/batches?q=in&status=completed&metadata=a=b")
        return len(found)

    batch_of(owner, status=Status.COMPLETED, model=echo, metadata={"a": "b"})
    of_one = count()
    for _ in range(2):
        batch_of(owner, status=Status.COMPLETED, model=echo, metadata={"a": "b"})
    assert count() == of_one


# --- Live -----------------------------------------------------------------------------------


def test_htmx_gets_the_rows_alone_and_asks_again_while_one_is_unfinished(owner: Person) -> None:
    batch_of(owner, status=Status.COMPLETED)
    batch_of(owner)
    response = owner.browser.get("/batches", headers=HTMX)
    said = response.content.decode()
    assert response.status_code == 200
    assert said.strip().startswith('<section id="batches"')
    assert 'hx-trigger="every 3s, portal:seen from:body"' in said


@pytest.mark.parametrize("status", sorted(set(Status.values) - set(NEXT)))
def test_htmx_is_told_to_stop_when_all_are_finished(owner: Person, status: str) -> None:
    batch_of(owner, status=status)
    response = owner.browser.get("/batches", headers=HTMX)
    assert response.status_code == views.STOP_POLLING
    assert 'hx-trigger="portal:seen from:body"' in response.content.decode()


# --- Cancelling -----------------------------------------------------------------------------


def test_a_running_batch_can_be_cancelled(owner: Person, teammate: Person) -> None:
    batch = batch_of(owner, status=Status.IN_PROGRESS)
    path = reverse("cancel_batch", args=[batch.pk])
    assert path in teammate.browser.get("/batches").content.decode()
    response = teammate.browser.post(path)
    assert (response.status_code, response["Location"]) == (302, "/batches")
    assert status_of(batch) == Status.CANCELLING


@pytest.mark.parametrize("status", [Status.FINALIZING, Status.COMPLETED, Status.FAILED])
def test_a_batch_that_is_past_cancelling_says_so(owner: Person, status: str) -> None:
    batch = batch_of(owner, status=status)
    path = reverse("cancel_batch", args=[batch.pk])
    assert path not in owner.browser.get("/batches").content.decode()
    response = owner.browser.post(path)
    said = [str(message) for message in get_messages(response.wsgi_request)]
    assert said == [f"A batch that is {status} can no longer be cancelled."]
    assert status_of(batch) == status


def test_a_viewer_may_look_but_not_cancel(owner: Person, viewer: Person) -> None:
    batch = batch_of(owner)
    path = reverse("cancel_batch", args=[batch.pk])
    page = viewer.browser.get("/batches")
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


def test_several_are_cancelled_after_a_question(owner: Person, stranger: Person) -> None:
    foreign = batch_of(stranger, status=Status.IN_PROGRESS)
    chosen = [batch_of(owner, status=Status.IN_PROGRESS, name=f"{at}.jsonl") for at in range(2)]
    done = batch_of(owner, status=Status.COMPLETED)
    other = batch_of(owner, status=Status.IN_PROGRESS)
    ids = [each.pk for each in (*chosen, done, foreign)]
    asked = owner.browser.post("/batches/cancel", {"batch": ids})
    said = asked.content.decode()
    assert "Cancel 2 batches?" in said
    assert re.findall(r'name="batch" value="(\w+)"', said) == [each.pk for each in chosen[::-1]]
    assert ("1.jsonl" in said, done.pk in said, foreign.pk in said) == (True, True, False)
    assert {status_of(each) for each in chosen} == {Status.IN_PROGRESS}

    response = owner.browser.post("/batches/cancel", {"batch": ids, "sure": "yes"})
    assert response["Location"] == "/batches"
    assert [str(message) for message in get_messages(response.wsgi_request)] == [
        "2 batches are being cancelled; answered requests are kept.",
        f"It was too late to cancel {done.pk}.",
    ]
    assert {status_of(each) for each in chosen} == {Status.CANCELLING}
    assert (status_of(other), status_of(foreign)) == (Status.IN_PROGRESS, Status.IN_PROGRESS)
    with scopes_disabled():
        events = AuditEvent.objects.filter(action="batch.cancelled").order_by("number")
        assert list(events.values_list("actor", "target_id")) == [
            (owner.user.pk, each.pk) for each in chosen[::-1]
        ]


def test_cancelling_twice_is_told_once(owner: Person) -> None:
    batch = batch_of(owner, status=Status.IN_PROGRESS)
    for _ in range(2):
        batches.cancel_batch(actor=owner.caller, batch=batch)
    with scopes_disabled():
        assert AuditEvent.objects.filter(action="batch.cancelled").count() == 1


def test_cancelling_none_asks_for_some(owner: Person) -> None:
    response = owner.browser.post("/batches/cancel", {"batch": ["batch_0", "\0"], "sure": "yes"})
    said = [str(message) for message in get_messages(response.wsgi_request)]
    assert (response["Location"], said) == ("/batches", ["Choose the batches to cancel first."])


def test_a_viewer_may_not_choose(owner: Person, viewer: Person) -> None:
    batch = batch_of(owner, status=Status.IN_PROGRESS)
    assert 'name="batch"' not in viewer.browser.get("/batches").content.decode()
    assert 'name="batch"' in owner.browser.get("/batches").content.decode()
    response = viewer.browser.post("/batches/cancel", {"batch": [batch.pk], "sure": "yes"})
    assert response.status_code == 403
    assert status_of(batch) == Status.IN_PROGRESS


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
    links = re.findall(r'href="(/files/.+?)"', owner.browser.get("/batches").content.decode())
    assert links == [reverse("file_content", args=[output.pk])]


# --- All pages ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [("post", "/batches"), ("post", "/files/x/content"), ("get", "/batches/x/cancel")],
)
def test_other_methods_are_405(owner: Person, method: str, path: str) -> None:
    assert getattr(owner.browser, method)(path).status_code == 405


def test_nothing_in_a_page_needs_an_inline_exception_of_the_policy(owner: Person) -> None:
    batch_of(owner, status=Status.IN_PROGRESS, total=3, completed=1)
    batch_of(owner, status=Status.COMPLETED, output_file=file_of(owner))
    pages = [owner.browser.get(path) for path in ("/batches", "/?after=batch_", "/nothing")]
    pages += [Client().get(path) for path in ("/accounts/login/", "/accounts/signup/")]
    for response in pages:
        said = response.content.decode()
        assert "unsafe" not in response["Content-Security-Policy"]
        assert (
            re.findall(
                r"\sstyle=|<style|\son\w+=|<script(?! src=|[^>]*/json)|https?://(?!www.w3)", said
            )
            == []
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
    assert client.get("/batches").status_code == 200
    client.post("/accounts/logout/")
    assert client.get("/batches").status_code == 302


def test_the_page_of_an_unexpected_error_needs_nothing() -> None:
    said = render_to_string("500.html")
    assert "Something went wrong here" in said


def test_a_batch_that_waits_for_a_model_that_does_not_load_says_so(
    owner: Person, echo: Model
) -> None:
    batch_of(owner, status=Status.IN_PROGRESS, total=3, model=echo)
    note_failure("echo", why="no room at /a/secret/path")
    page = owner.browser.get("/batches").content.decode()
    assert "Its model could not be loaded; it is tried again from time to time." in page
    assert "/a/secret/path" not in page
    note_load("echo", Change.LOAD, worker="gpu0", gpu="", seconds=1.0)
    assert "could not be loaded" not in owner.browser.get("/batches").content.decode()


@pytest.mark.parametrize("status", [Status.FINALIZING, Status.CANCELLING, Status.COMPLETED])
def test_a_batch_that_ends_waits_for_no_model(status: Status, owner: Person, echo: Model) -> None:
    batch_of(owner, status=status, total=3, model=echo)
    note_failure("echo", why="no room")
    assert "could not be loaded" not in owner.browser.get("/batches").content.decode()
