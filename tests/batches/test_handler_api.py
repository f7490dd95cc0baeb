"""`/v1/result_handlers` and a batch's runs over the API; what is kept of settings and secrets."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from django.db import IntegrityError, connection, transaction
from django.test.utils import CaptureQueriesContext
from django_scopes import scopes_disabled
from pytest_httpserver import HTTPServer

from accounts.models import AuditEvent
from accounts.services import projects
from batches.models import Batch, HandlerRun, ResultHandler
from batches.services import handlers
from tests.conftest import Person
from tests.test_tenancy import may_everything
from tests.wire import JSON, created, error_of

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("own_storage", "wakeups_sent")]
HERE = "/v1/result_handlers"
PARQUET = {"name": "table", "kind": "parquet"}
SQL: dict[str, Any] = {
    "name": "warehouse",
    "kind": "sql",
    "settings": {
        "url": "postgresql://loader@127.0.0.1:5433/warehouse",
        "password": "open sesame",
        "table": "answers",
        "columns": {"id": "custom_id"},
        "key": ["id"],
    },
}


@pytest.fixture(autouse=True)
def _every_scope(owner: Person, stranger: Person) -> None:
    may_everything(owner)
    may_everything(stranger)


def post(person: Person, path: str, body: Any) -> Any:
    return person.api.post(path, orjson.dumps(body), content_type=JSON)


def made(person: Person, **fields: Any) -> dict[str, Any]:
    response = post(person, HERE, PARQUET | fields)
    assert response.status_code == 200, response.content
    found: dict[str, Any] = response.json()
    return found


def run_of(person: Person, batch_id: str, handler_id: str, **fields: Any) -> HandlerRun:
    with scopes_disabled():
        return HandlerRun.objects.create(
            organization=person.caller.organization,
            batch_id=batch_id,
            handler_id=handler_id,
            **{"position": 1} | fields,
        )


def test_the_kinds_tell_what_their_settings_are(owner: Person) -> None:
    found = {
        kind["name"]: kind for kind in owner.api.get("/v1/result_handler_kinds").json()["data"]
    }
    assert list(found) == ["webhook", "sql", "s3", "parquet"]
    assert found["sql"]["settings_schema"]["required"] == ["url", "table", "columns", "key"]
    password = found["sql"]["settings_schema"]["properties"]["password"]
    assert (password["format"], password["writeOnly"]) == ("password", True)


def test_a_handler_is_what_was_asked_for(owner: Person) -> None:
    handler = made(owner, settings={"days": 7}, project_id="all")
    assert handler == {
        "id": handler["id"],
        "object": "result_handler",
        "created_at": handler["created_at"],
        "updated_at": handler["updated_at"],
        "name": "table",
        "kind": "parquet",
        "settings": {"compression": "zstd", "days": 7},
        "secrets": [],
        "project_id": None,
        "position": 1,
        "enabled": True,
        "by_default": True,
    }
    assert owner.api.get(f"{HERE}/{handler['id']}").json() == handler
    assert made(owner, name="mine")["project_id"] == owner.caller.project.pk


def test_secrets_are_encrypted_and_shown_nowhere(owner: Person) -> None:
    handler = made(owner, **SQL)
    assert (handler["secrets"], "password" in handler["settings"]) == (["password"], False)
    listed = owner.api.get(HERE).content.decode()
    changed = post(owner, f"{HERE}/{handler['id']}", {"settings": SQL["settings"]}).content.decode()
    with scopes_disabled():
        (row,) = ResultHandler.objects.all()
        kept = str(vars(row))
        told = "".join(str(event.changes) for event in AuditEvent.objects.all())
        assert handlers.made(row).settings.password.get_secret_value() == "open sesame"
    assert not [text for text in (listed, changed, kept, told) if "sesame" in text]


def test_a_secret_that_is_left_out_stays(owner: Person) -> None:
    handler = made(owner, **SQL)
    settings = {**SQL["settings"], "table": "others"}
    del settings["password"]
    changed = post(owner, f"{HERE}/{handler['id']}", {"settings": settings}).json()
    assert (changed["settings"]["table"], changed["secrets"]) == ("others", ["password"])


def test_a_secret_is_not_sent_to_where_somebody_else_says(owner: Person) -> None:
    handler = made(owner, **SQL)
    settings = {**SQL["settings"], "url": "postgresql://loader@localhost:5433/mine"}
    del settings["password"]
    refused = post(owner, f"{HERE}/{handler['id']}", {"settings": settings})
    assert (refused.status_code, error_of(refused)["code"]) == (400, "secret_needed")
    assert error_of(refused)["param"] == "settings.password"
    settings["password"] = "another"
    assert post(owner, f"{HERE}/{handler['id']}", {"settings": settings}).status_code == 200


def test_what_is_left_out_of_a_change_stays(owner: Person) -> None:
    handler = made(owner)
    changed = post(owner, f"{HERE}/{handler['id']}", {"enabled": False}).json()
    assert changed == handler | {"enabled": False, "updated_at": changed["updated_at"]}


def test_they_are_listed_in_order_and_can_be_moved(owner: Person) -> None:
    ids = {name: made(owner, name=name)["id"] for name in ("a", "b", "c")}

    def order() -> list[tuple[str, int]]:
        rows = owner.api.get(HERE).json()["data"]
        return [(row["name"], row["position"]) for row in rows]

    assert order() == [("a", 1), ("b", 2), ("c", 3)]
    moved = post(owner, f"{HERE}/{ids['c']}", {"position": 1})
    assert (moved.json()["position"], order()) == (1, [("c", 1), ("a", 2), ("b", 3)])
    post(owner, f"{HERE}/{ids['c']}", {"position": 99})
    assert order() == [("a", 1), ("b", 2), ("c", 3)]
    assert owner.api.delete(f"{HERE}/{ids['a']}").json() == {
        "id": ids["a"],
        "object": "result_handler.deleted",
        "deleted": True,
    }
    assert order() == [("b", 1), ("c", 2)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"kind": "teleport"}, "kind"),
        ({"name": "none"}, "name"),
        ({"name": "a,b"}, "name"),
        ({"name": ""}, "name"),
        ({"settings": {"days": 31}}, "settings.days"),
        ({"settings": {"days": "soon"}}, "settings.days"),
        ({"settings": {"colour": "red"}}, "settings.colour"),
        ({"settings": {"compression": "z\0"}}, "settings"),
        ({"settings": []}, "settings"),
        ({"project_id": "proj_0"}, "project_id"),
        ({**SQL, "settings": {}}, "settings.url"),
        ({**SQL, "settings": {**SQL["settings"], "url": "postgresql://u@10.0.0.1/d"}}, "settings"),
    ],
)
def test_bad_input_names_the_field(owner: Person, fields: dict[str, Any], param: str) -> None:
    refused = post(owner, HERE, PARQUET | fields)
    assert refused.status_code in (400, 404)
    assert error_of(refused)["param"] == param


def test_what_is_refused_is_not_repeated(owner: Person) -> None:
    bad = {**SQL["settings"], "password": {"not": "open sesame"}}
    refused = post(owner, HERE, {**SQL, "settings": bad})
    assert refused.status_code == 400
    assert b"sesame" not in refused.content


def test_a_name_is_given_once(owner: Person, stranger: Person) -> None:
    made(owner)
    refused = post(owner, HERE, PARQUET)
    assert (refused.status_code, error_of(refused)["code"]) == (400, "name_taken")
    made(stranger)


def test_an_organization_has_so_many_and_no_more(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "MOST", 1)
    made(owner)
    refused = post(owner, HERE, PARQUET | {"name": "second"})
    assert error_of(refused)["code"] == "too_many_handlers"


def test_a_foreign_project_is_not_found(owner: Person, stranger: Person) -> None:
    theirs = projects.create_project(actor=stranger.caller, name="Theirs")
    assert post(owner, HERE, PARQUET | {"project_id": theirs.pk}).status_code == 404


def test_a_batchs_runs_are_listed_and_retried(owner: Person) -> None:
    batch, handler = created(owner.api), made(owner)
    run = run_of(
        owner, batch["id"], handler["id"], state="failed", next_attempt_at=None, error="no", rows=2
    )
    path = f"/v1/batches/{batch['id']}/handler_runs"
    listed = owner.api.get(path).json()
    assert (listed["first_id"], listed["has_more"]) == (run.pk, False)
    assert listed["data"] == [
        {
            "id": run.pk,
            "object": "handler_run",
            "created_at": int(run.created_at.timestamp()),
            "batch_id": batch["id"],
            "handler_id": handler["id"],
            "handler_name": "table",
            "kind": "parquet",
            "state": "failed",
            "attempts": 0,
            "next_attempt_at": None,
            "started_at": None,
            "ended_at": None,
            "rows": 2,
            "result": None,
            "error": "no",
        }
    ]
    again = post(owner, f"{path}/{run.pk}/retry", {})
    assert (again.status_code, again.json()["state"]) == (200, "waiting")


def test_a_run_of_another_batch_is_not_found(owner: Person) -> None:
    one, other, handler = created(owner.api), created(owner.api), made(owner)
    run = run_of(owner, one["id"], handler["id"])
    refused = post(owner, f"/v1/batches/{other['id']}/handler_runs/{run.pk}/retry", {})
    assert (refused.status_code, error_of(refused)["param"]) == (404, "run_id")


def test_lists_ask_as_often_for_three_as_for_one(owner: Person) -> None:
    batch = created(owner.api)
    with scopes_disabled():
        assert Batch.objects.filter(pk=batch["id"]).exists()
    counts: dict[str, list[int]] = {}
    for rows in (1, 3):
        for at in range(rows):
            name = f"of-{rows}-{at}"
            run_of(owner, batch["id"], made(owner, name=name)["id"])
        for path in (HERE, f"/v1/batches/{batch['id']}/handler_runs"):
            owner.api.get(path)
            with CaptureQueriesContext(connection) as asked:
                owner.api.get(path)
            counts.setdefault(path, []).append(len(asked))
    assert all(first == second for first, second in counts.values())


def test_a_row_cannot_join_two_organizations(owner: Person, stranger: Person) -> None:
    batch, handler = created(owner.api), made(stranger)

    @transaction.atomic
    def join() -> None:
        run_of(owner, batch["id"], handler["id"])
        connection.check_constraints()

    with pytest.raises(IntegrityError):
        join()


def test_a_webhooks_settings_are_checked_when_they_are_saved(
    owner: Person, httpserver: HTTPServer
) -> None:
    settings = {"url": httpserver.url_for("/"), "secret": "too short"}
    refused = post(owner, HERE, {"name": "w", "kind": "webhook", "settings": settings})
    assert "whsec_ followed by base64" in error_of(refused)["message"]
