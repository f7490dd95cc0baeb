"""The pages of result handlers: forms made of a kind's settings, and a batch's runs."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts.services import projects
from batches.handlers import registry
from batches.models import Batch, HandlerRun, ResultHandler
from batches.models.batches import Status
from batches.services import handlers
from tests.conftest import Person
from tests.wire import created

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("own_storage", "wakeups_sent")]
HERE = "/organization/handlers"
SQL = {
    "name": "warehouse",
    "project": "",
    "settings-url": "postgresql://loader@127.0.0.1:5433/warehouse",
    "settings-password": "open sesame",
    "settings-table": "answers",
    "settings-columns": "id = custom_id\r\n\r\nanswer = response.choices[0].text",
    "settings-key": "id",
    "by_default": "on",
    "enabled": "on",
}


def the_handler() -> ResultHandler:
    with scopes_disabled():
        return ResultHandler.objects.select_related("project").get()


def handler(person: Person, name: str = "table", **fields: Any) -> ResultHandler:
    given: dict[str, Any] = {"kind": "parquet", "settings": {}, "project": None}
    return handlers.create_handler(actor=person.caller, name=name, **(given | fields))


def run(person: Person, batch_id: str, row: ResultHandler, **fields: Any) -> HandlerRun:
    with scopes_disabled():
        return HandlerRun.objects.create(
            organization=row.organization,
            batch_id=batch_id,
            handler=row,
            position=row.position,
            **fields,
        )


def names_of(page: str) -> list[str]:
    return re.findall(r'<div class="fw-semibold">(.+?)</div>', page)


def test_the_page_offers_every_kind(owner: Person) -> None:
    page = owner.browser.get(HERE).content.decode()
    offered = re.findall(r'<h3 class="h4">(.+?)</h3>', page)
    assert offered == [kind.title for kind in registry.kinds().values()]
    assert re.findall(rf'href="{HERE}/new/(\w+)"', page) == list(registry.kinds())
    form = owner.browser.get(f"{HERE}/new/sql").content.decode()
    assert re.findall(r'<h1 class="portal-title.*?">(.+?)</h1>', form) == ["SQL database"]


def test_a_handler_is_made_with_the_form_of_its_kind(owner: Person) -> None:
    form = owner.browser.get(f"{HERE}/new/sql").content.decode()
    assert re.findall(r'name="settings-(\w+)"', form) == [
        "url",
        "password",
        "table",
        "columns",
        "key",
        "failed",
    ]
    response = owner.browser.post(f"{HERE}/new/sql", SQL)
    assert (response.status_code, response["Location"]) == (302, HERE)
    row = the_handler()
    assert (row.kind, row.name, row.project, row.by_default, row.enabled) == (
        "sql",
        "warehouse",
        None,
        True,
        True,
    )
    assert row.settings == {
        "url": SQL["settings-url"],
        "table": "answers",
        "columns": {"id": "custom_id", "answer": "response.choices[0].text"},
        "key": ["id"],
        "failed": False,
    }
    assert handlers.made(row).settings.password.get_secret_value() == "open sesame"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "none"}, "and is not “none”"),
        ({"settings-url": ""}, "This field is required."),
        ({"settings-columns": "id"}, "“id” has no “=”."),
        ({"settings-key": "other"}, "The key column &#x27;other&#x27; is not among the columns"),
        ({"settings-url": "postgresql://u@10.0.0.1/d"}, "10.0.0.1 has a private address"),
        ({"settings-columns": "id = <b>"}, "&#x27;&lt;b&gt;&#x27; begins with none of"),
    ],
)
def test_what_is_refused_is_said_and_kept(owner: Person, changed: Any, said: str) -> None:
    response = owner.browser.post(f"{HERE}/new/sql", SQL | changed)
    page = response.content.decode()
    assert (response.status_code, page.count(said)) == (400, 1)
    assert "open sesame" not in page
    with scopes_disabled():
        assert not ResultHandler.objects.exists()


def test_a_change_keeps_the_secret_that_is_not_given(owner: Person) -> None:
    owner.browser.post(f"{HERE}/new/sql", SQL)
    row = the_handler()
    page = owner.browser.get(f"{HERE}/{row.pk}").content.decode()
    assert "answer = response.choices[0].text" in page
    assert "Empty: the one that is there stays." in page
    assert "sesame" not in page
    project = owner.caller.project.pk
    given = SQL | {"settings-password": "", "settings-table": "others", "project": project}
    assert owner.browser.post(f"{HERE}/{row.pk}", given).status_code == 302
    row = the_handler()
    assert (row.settings["table"], row.project_id) == ("others", project)
    assert handlers.secrets_set(row) == ["password"]


def test_a_change_leaves_a_handler_to_its_archived_project(owner: Person) -> None:
    evals = projects.create_project(actor=owner.caller, name="Evals")
    row = handler(owner, project=evals)
    projects.archive_project(actor=owner.caller, project=evals)
    page = owner.browser.get(f"{HERE}/{row.pk}").content.decode()
    assert f'<option value="{evals.pk}" selected>Evals</option>' in page
    given = {"name": "renamed", "project": evals.pk, "settings-compression": "zstd"}
    changed = owner.browser.post(f"{HERE}/{row.pk}", given | {"settings-days": "0"})
    assert changed.status_code == 302
    assert (the_handler().name, the_handler().project) == ("renamed", evals)


def test_a_foreign_project_is_refused(owner: Person, stranger: Person) -> None:
    theirs = projects.create_project(actor=stranger.caller, name="Theirs")
    given = {"name": "table", "project": theirs.pk, "settings-compression": "zstd"}
    assert owner.browser.post(f"{HERE}/new/parquet", given).status_code == 400


def test_they_are_moved_and_deleted(owner: Person, stranger: Person) -> None:
    rows = {name: handler(owner, name) for name in ("first", "second")}
    handler(stranger, "theirs")
    assert owner.browser.post(f"{HERE}/{rows['second'].pk}/move").status_code == 302
    assert names_of(owner.browser.get(HERE).content.decode()) == ["second", "first"]
    assert owner.browser.post(f"{HERE}/{rows['second'].pk}/delete").status_code == 302
    assert names_of(owner.browser.get(HERE).content.decode()) == ["first"]


def test_a_viewer_sees_them_and_has_no_buttons(owner: Person, viewer: Person) -> None:
    row = handler(owner)
    page = viewer.browser.get(HERE).content.decode()
    assert names_of(page) == ["table"]
    assert f"{HERE}/" not in page
    for path in (f"{HERE}/new/parquet", f"{HERE}/{row.pk}/move", f"{HERE}/{row.pk}/delete"):
        assert viewer.browser.post(path).status_code == 403


def test_without_any_the_page_says_what_to_do(owner: Person, viewer: Person) -> None:
    assert "Choose below where else" in owner.browser.get(HERE).content.decode()
    assert "Choose below where else" not in viewer.browser.get(HERE).content.decode()


def test_a_handler_whose_kind_is_gone_can_still_be_deleted(owner: Person) -> None:
    row = handler(owner)
    with scopes_disabled():
        ResultHandler.objects.update(kind="gone")
    assert owner.browser.get(HERE).status_code == 200
    assert owner.browser.get(f"{HERE}/{row.pk}").status_code == 400
    assert owner.browser.post(f"{HERE}/{row.pk}/delete").status_code == 302


# --- A batch's runs ---------------------------------------------------------------------------


def test_a_batchs_runs_are_shown_in_order_with_what_came_of_them(owner: Person) -> None:
    batch = created(owner.api)
    now = timezone.now()
    over = {"next_attempt_at": None, "ended_at": now, "attempts": 1}
    run(owner, batch["id"], handler(owner, "a"), state="done", result="file-1", **over)
    run(owner, batch["id"], handler(owner, "b"), state="failed", error="<no> room", **over)
    run(owner, batch["id"], handler(owner, "c"))
    page = owner.browser.get(f"/batches/{batch['id']}/handler-runs").content.decode()
    assert names_of(page) == ["a", "b", "c"]
    states = re.findall(
        r'<span class="status status-\w+ portal-status"><svg.+?</svg>(.+?)</span>', page, re.S
    )
    assert [state.strip() for state in states] == ["Done", "Failed", "Waiting"]
    assert page.count("&lt;no&gt; room") == page.count("file-1") == 1
    assert page.count("every 3s") == 1


def test_the_partial_stops_asking_when_all_is_over(owner: Person) -> None:
    batch = created(owner.api)
    row = run(owner, batch["id"], handler(owner))
    path, htmx = f"/batches/{batch['id']}/handler-runs", {"HX-Request": "true"}
    assert owner.browser.get(path, headers=htmx).status_code == 200
    with scopes_disabled():
        HandlerRun.objects.filter(pk=row.pk).update(state="done", next_attempt_at=None)
    assert owner.browser.get(path, headers=htmx).status_code == 200  # there may be others yet
    with scopes_disabled():
        Batch.objects.update(status=Status.COMPLETED)
    response = owner.browser.get(path, headers=htmx)
    assert (response.status_code, b"<html" in response.content) == (286, False)


def test_a_run_is_retried_by_its_button(owner: Person, viewer: Person) -> None:
    batch = created(owner.api)
    row = run(owner, batch["id"], handler(owner), state="failed", next_attempt_at=None)
    path = f"/batches/{batch['id']}/handler-runs"
    assert "Retry now" in owner.browser.get(path).content.decode()
    assert "Retry now" not in viewer.browser.get(path).content.decode()
    assert viewer.browser.post(f"{path}/{row.pk}/retry").status_code == 403
    assert owner.browser.post(f"{path}/{row.pk}/retry")["Location"] == path
    with scopes_disabled():
        assert HandlerRun.objects.get().state == "waiting"
        until = timezone.now()
        HandlerRun.objects.update(state="running", next_attempt_at=None, busy_until=until)
    page = owner.browser.post(f"{path}/{row.pk}/retry", follow=True).content.decode()
    assert page.count("It is running; wait for its end.") == 1


def test_pages_ask_as_often_for_three_as_for_one(owner: Person) -> None:
    batch = created(owner.api)
    counts: dict[str, list[int]] = {}
    for rows in (1, 3):
        for at in range(rows):
            run(owner, batch["id"], handler(owner, f"of-{rows}-{at}"))
        for path in (HERE, f"/batches/{batch['id']}/handler-runs"):
            browser = owner.browser
            browser.get(path)
            with CaptureQueriesContext(connection) as asked:
                browser.get(path)
            counts.setdefault(path, []).append(len(asked))
    assert all(first == second for first, second in counts.values())
