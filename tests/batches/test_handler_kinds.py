"""The handlers that come along, against real receivers: HTTP, PostgreSQL, SQLite, S3, Parquet."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import psycopg
import pytest
from django.db import connection
from django.utils import timezone
from django_scopes import scopes_disabled
from pyarrow import parquet
from pytest_httpserver import HTTPServer
from standardwebhooks import Webhook
from werkzeug import Response

from accounts.errors import BadRequest
from batches import storage, webhooks
from batches.handlers import paths
from batches.handlers import sql as sql_handler
from batches.handlers.results import Results
from batches.models import Batch, File, HandlerRun, ResultHandler
from batches.services import files, handler_runs, handlers
from batches.services.finalization import finalize_batch
from batches.services.leases import Outcome, save
from tests import jobs
from tests.conftest import Person
from tests.receiver import receiving
from tests.s3 import REGION, Bucket, S3Server

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("own_storage", "echo"),
]
ANSWER = "response.choices[0].message.content"


def chat(number: int, said: str = "") -> Outcome:
    """The line that a worker writes for a chat's answer."""
    body = {
        "id": f"chatcmpl-{number}",
        "choices": [
            {
                "message": {"role": "assistant", "content": said or f"answer {number}"},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 10 + number, "completion_tokens": number},
    }
    return line_of(number, True, {"status_code": 200, "request_id": "r", "body": body}, None)


def refused(number: int) -> Outcome:
    body = {"error": {"message": "too long", "code": 400}}
    return line_of(number, False, {"status_code": 400, "request_id": "r", "body": body}, None)


def line_of(number: int, ok: bool, response: Any, error: Any) -> Outcome:
    given = {"id": f"r{number}", "custom_id": f"say {number}", "response": response, "error": error}
    return Outcome(number, ok, orjson.dumps(given, option=orjson.OPT_APPEND_NEWLINE))


def ended(person: Person, *outcomes: Outcome, **options: Any) -> Batch:
    """A batch of these, which are its lines 1 to n."""
    batch = jobs.running(person.caller, len(outcomes), **options)
    save(lease=jobs.lease(), outcomes=list(outcomes), finished=True)
    finalize_batch(batch.pk)
    return jobs.fresh(batch)


def handler(person: Person, kind: str, **settings: Any) -> ResultHandler:
    return handlers.create_handler(
        actor=person.caller, name=f"my-{kind}", kind=kind, settings=settings, project=None
    )


def ran(batch: Batch) -> HandlerRun:
    """Its one run, after an attempt."""
    handler_runs.run_due(batch.pk)
    with scopes_disabled():
        return HandlerRun.objects.get(batch=batch)


def again(run: HandlerRun) -> HandlerRun:
    """The same once more, as after a death that nobody saw the end of."""
    with scopes_disabled():
        HandlerRun.objects.filter(pk=run.pk).update(
            state="waiting", next_attempt_at=timezone.now(), ended_at=None
        )
    return ran(run.batch)


# --- What they are given ----------------------------------------------------------------------


def test_results_are_those_of_the_output_then_those_of_the_error_file(owner: Person) -> None:
    batch = ended(owner, chat(1), refused(2), chat(3))
    results = Results(batch)
    found = list(results)
    assert [(each.custom_id, each.ok, each.status_code) for each in found] == [
        ("say 1", True, 200),
        ("say 3", True, 200),
        ("say 2", False, 400),
    ]
    assert (results.taken, found[0].request, found[0].error) == (3, None, None)
    assert orjson.loads(found[0].line)["response"]["body"] == found[0].response


def test_with_their_requests_results_come_in_the_order_of_the_input(owner: Person) -> None:
    batch = ended(owner, chat(1), refused(2), chat(3))
    found = list(Results(batch, requests=True))
    assert [each.custom_id for each in found] == ["say 1", "say 2", "say 3"]
    assert [each.request for each in found] == [line["body"] for line in jobs.lines(3)]


def test_without_the_input_there_are_the_results_alone(owner: Person) -> None:
    batch = ended(owner, chat(1), refused(2), chat(3))
    files.delete_file(actor=owner.caller, file=batch.input_file)
    with scopes_disabled():
        files.purge_files()
    found = list(Results(batch, requests=True))
    assert [(each.custom_id, each.request) for each in found] == [
        ("say 1", None),
        ("say 3", None),
        ("say 2", None),
    ]


# --- Webhook ----------------------------------------------------------------------------------


def test_a_webhook_gets_the_lines_in_signed_parts(owner: Person, httpserver: HTTPServer) -> None:
    httpserver.expect_request("/results").respond_with_data("thanks")
    secret = webhooks.new_secret()
    handler(owner, "webhook", url=httpserver.url_for("/results"), secret=secret, lines=2)
    batch = ended(owner, chat(1), refused(2), chat(3))
    run = ran(batch)
    assert (run.state, run.result, run.rows) == ("done", "2 requests", 3)
    bodies, ids = [], []
    for request, _ in httpserver.log:
        headers = {name.lower(): value for name, value in request.headers.items()}
        bodies.append(Webhook(secret).verify(request.get_data(), headers))
        ids.append(headers["webhook-id"])
    assert ids == [f"{batch.pk}.1", f"{batch.pk}.2"]
    assert [body["data"]["part"] for body in bodies] == [1, 2]
    assert {(body["type"], body["data"]["batch_id"]) for body in bodies} == {
        ("batch.results", batch.pk)
    }
    lines = [line for body in bodies for line in body["data"]["results"]]
    assert lines == jobs.content(batch.output_file) + jobs.content(batch.error_file)


def test_a_webhook_that_fails_is_tried_again_with_the_same_ids(
    owner: Person, httpserver: HTTPServer
) -> None:
    answers = itertools.chain([200, 503], itertools.repeat(200))
    httpserver.expect_request("/results").respond_with_handler(
        lambda request: Response(status=next(answers))
    )
    url, secret = httpserver.url_for("/results"), webhooks.new_secret()
    handler(owner, "webhook", url=url, secret=secret, lines=1)
    run = ran(ended(owner, chat(1), chat(2)))
    assert (run.state, run.error) == ("waiting", "Request 2: HTTP 503")
    assert again(run).state == "done"
    ids = [request.headers["webhook-id"].rpartition(".")[2] for request, _ in httpserver.log]
    assert ids == ["1", "2", "1", "2"]


def test_a_webhook_that_is_gone_is_not_tried_again(owner: Person, httpserver: HTTPServer) -> None:
    httpserver.expect_request("/results").respond_with_data(status=410)
    url = httpserver.url_for("/results")
    handler(owner, "webhook", url=url, secret=webhooks.new_secret())
    assert ran(ended(owner, chat(1))).state == "failed"


# --- SQL --------------------------------------------------------------------------------------


@pytest.fixture
def database() -> Iterator[str]:
    """A database of its own on the tests' server; its URL, as a tenant would write it.

    Its name is this process's: pytest-xdist's share the server.
    """
    of = connection.settings_dict
    name = f"warehouse_{os.getpid()}"
    where = {"host": of["HOST"], "port": of["PORT"], "user": of["USER"]}
    with psycopg.connect(
        dbname=of["NAME"], password=of["PASSWORD"] or None, autocommit=True, **where
    ) as server:
        server.execute(f"CREATE DATABASE {name}")
        yield f"postgresql://{of['USER']}@{of['HOST'] or '127.0.0.1'}:{of['PORT']}/{name}"
        server.execute(f"DROP DATABASE {name} WITH (FORCE)")


def asked(url: str, *statements: str) -> list[tuple[Any, ...]]:
    """What the last of these statements answers."""
    password = connection.settings_dict["PASSWORD"] or None
    with psycopg.connect(url, password=password, autocommit=True) as there:
        for statement in statements:
            cursor = there.execute(statement)  # type: ignore[arg-type]
        return cursor.fetchall() if cursor.description else []


TABLE = """CREATE TABLE "Some answers" (
    "custom id" text, batch text, "select" text, tokens int, body jsonb, asked jsonb,
    status text, went boolean, PRIMARY KEY (batch, "custom id"))"""
COLUMNS = {
    "custom id": "custom_id",
    "batch": "$.batch_id",
    "select": ANSWER,
    "tokens": "response.usage.completion_tokens",
    "body": "response",
    "asked": "request.messages",
    "status": "status_code",
    "went": "ok",
}
SELECT = 'SELECT "custom id", "select", tokens, body, asked, status, went FROM "Some answers"'


def into(url: str, **settings: Any) -> dict[str, Any]:
    password = connection.settings_dict["PASSWORD"] or "none is needed"
    key = ["batch", "custom id"]
    given = {"url": url, "password": password, "table": "Some answers", "columns": COLUMNS}
    return given | {"key": key} | settings


def test_sql_upserts_a_row_for_each_result(owner: Person, database: str) -> None:
    asked(database, TABLE)
    handler(owner, "sql", **into(database, failed=True))
    evil = '\'); DROP TABLE "Some answers"; -- \0 é'
    run = ran(ended(owner, chat(1, evil), refused(2), chat(3)))
    assert (run.state, run.error, run.result) == ("done", "", "3 rows in Some answers")
    first = asked(database, SELECT + ' ORDER BY "custom id"')
    assert [row[:3] + row[5:] for row in first] == [
        ("say 1", evil.replace("\0", "\ufffd"), 1, "200", True),
        ("say 2", None, None, "400", False),
        ("say 3", "answer 3", 3, "200", True),
    ]
    assert first[0][4] == [{"role": "user", "content": "say 1"}]
    assert first[2][3]["id"] == "chatcmpl-3"
    asked(database, 'UPDATE "Some answers" SET tokens = 0')
    assert again(run).state == "done"
    assert asked(database, SELECT + ' ORDER BY "custom id"') == first


def test_sql_leaves_out_what_failed_unless_it_is_asked_for(owner: Person, database: str) -> None:
    asked(database, TABLE)
    handler(owner, "sql", **into(database))
    assert ran(ended(owner, chat(1), refused(2))).result == "1 row in Some answers"


def test_sql_that_does_not_answer_is_given_up(
    owner: Person, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(
        database,
        TABLE,
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_sleep(600); RETURN NEW; END'",
        'CREATE TRIGGER slow BEFORE INSERT ON "Some answers" EXECUTE FUNCTION wait()',
    )
    monkeypatch.setattr(handler_runs, "SILENT_SECONDS", 3.0)
    handler(owner, "sql", **into(database))
    run = ran(ended(owner, chat(1)))
    assert (run.state, run.error) == ("waiting", handler_runs.HANGS)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ('DROP TABLE "Some answers"', "There is no table 'Some answers'."),
        ('ALTER TABLE "Some answers" DROP COLUMN went', "Some answers has no column 'went'."),
    ],
)
def test_sql_says_what_the_table_lacks(
    owner: Person, database: str, change: str, error: str
) -> None:
    asked(database, TABLE, change)
    handler(owner, "sql", **into(database))
    run = ran(ended(owner, chat(1)))
    assert (run.state, run.error) == ("waiting", error)


def test_sql_repeats_no_rows_in_its_errors(owner: Person, database: str) -> None:
    asked(database, TABLE, 'ALTER TABLE "Some answers" ADD CONSTRAINT many CHECK (tokens > 5)')
    handler(owner, "sql", **into(database))
    run = ran(ended(owner, chat(1, "a secret of the prompt")))
    said = 'new row for relation "Some answers" violates check constraint "many"'
    assert (run.state, run.error) == ("waiting", said)


def test_sql_into_sqlite_where_the_operator_has_a_folder(
    owner: Person, settings: Any, tmp_path: Path
) -> None:
    import sqlite3

    settings.HANDLER_SQLITE_DIR = str(tmp_path / "sqlite")
    columns = {"id": "custom_id", "answer": ANSWER, "body": "response"}
    given = {"table": "answers", "columns": columns, "key": ["id"]}
    handler(owner, "sql", url="sqlite:///results.db", **given)
    file = tmp_path / "sqlite" / owner.caller.organization.pk / "results.db"
    with sqlite3.connect(file) as there:
        there.execute("CREATE TABLE answers (id TEXT PRIMARY KEY, answer TEXT, body TEXT)")
    run = ran(ended(owner, chat(1), chat(2)))
    assert (run.state, run.error) == ("done", "")
    again(run)
    found = there.execute("SELECT id, answer, body FROM answers ORDER BY id").fetchall()
    assert [row[:2] for row in found] == [("say 1", "answer 1"), ("say 2", "answer 2")]
    assert orjson.loads(found[0][2])["id"] == "chatcmpl-1"


def test_mysqls_upsert_is_its_own() -> None:
    import sqlalchemy as sa
    from sqlalchemy.dialects import mysql

    table = sa.Table("t", sa.MetaData(), sa.Column("id", sa.String(9)), sa.Column("a", sa.Text))
    for columns, again_ in ({"id": (), "a": ()}, "a = VALUES(a)"), ({"id": ()}, "id = VALUES(id)"):
        statement = sql_handler._upsert(table, "mysql", ["id"], columns)
        said = str(statement.compile(dialect=mysql.dialect()))  # type: ignore[no-untyped-call]
        assert said.endswith(f"ON DUPLICATE KEY UPDATE {again_}")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite:///results.db", "SQLite is a file on the portal's own host"),
        ("postgresql://u:secret@127.0.0.1/d", "Put the password into its own field"),
        ("postgresql://u@127.0.0.1/d?host=/var/run", "The URL's only option is sslmode"),
        ("postgresql://u@127.0.0.1/d?sslmode=require&sslkey=/etc/x", "The URL's only option"),
        ("postgresql:///d", "must name a user, a host and a database"),
        ("postgresql://u@/d", "must name a user, a host and a database"),
        ("mssql+pyodbc://u@127.0.0.1/d", "The URL must begin with"),
        ("nonsense", "This is not a database's URL."),
        ("postgresql://u@10.0.0.1/d", "10.0.0.1 has a private address"),
        ("postgresql://u@169.254.169.254/d", "169.254.169.254 has a private address"),
        ("postgresql://u@2130706433/d", "2130706433 has a private address"),
        ("postgresql://u@0/d", "0 has a private address"),
        ("postgresql://u@[::1]/d", "::1 has a private address"),
        ("postgresql://u@[::ffff:10.0.0.1]/d", "has a private address"),
        ("postgresql://u@8.8.8.8:22/d", "Handlers may connect to these ports"),
        ("mysql://u@127.0.0.1/d", "The portal has no driver for mysql"),
    ],
)
def test_sql_goes_nowhere_that_it_may_not(owner: Person, url: str, said: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        handler(owner, "sql", **into(url))
    assert said in str(refusal.value)
    with scopes_disabled():
        assert not ResultHandler.objects.exists()


@pytest.mark.parametrize("url", ["sqlite:////etc/passwd", "sqlite:///../other/a.db", "sqlite://"])
def test_sqlites_files_are_in_the_organizations_folder(
    owner: Person, settings: Any, tmp_path: Path, url: str
) -> None:
    settings.HANDLER_SQLITE_DIR = str(tmp_path)
    with pytest.raises(BadRequest, match="a name, and no folder"):
        handler(owner, "sql", **into(url))


def test_a_host_that_became_private_is_not_connected_to(
    owner: Person, database: str, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: what was public when it was saved."""
    asked(database, TABLE)
    handler(owner, "sql", **into(database))
    settings.HANDLER_PRIVATE_HOSTS = []
    settings.HANDLER_PORTS = range(65536)
    run = ran(ended(owner, chat(1)))
    assert run.state == "waiting"
    assert run.error.endswith("has a private address: handlers connect to the internet only.")


@pytest.mark.parametrize(
    ("columns", "key", "where"),
    [
        ({"a": "custom_id"}, ["b"], "settings"),
        ({"a": "elsewhere.x"}, ["a"], "settings.columns"),
        ({"a": "response..x"}, ["a"], "settings.columns"),
        ({"a": ""}, ["a"], "settings.columns"),
        ({}, ["a"], "settings.columns"),
    ],
)
def test_sql_refuses_columns_that_mean_nothing(
    owner: Person, columns: dict[str, str], key: list[str], where: str
) -> None:
    given = into("postgresql://u@127.0.0.1/d", columns=columns, key=key)
    with pytest.raises(BadRequest) as refusal:
        handler(owner, "sql", **given)
    assert refusal.value.param == where


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("a.b", 1),
        ("$.a.c[1].d", 2),
        ("a.c[9].d", None),
        ("a.b.c", None),
        ("a[0]", None),
        ("e", None),
        ("a.c[0]", "x"),
    ],
)
def test_a_path_finds(path: str, value: Any) -> None:
    assert paths.found({"a": {"b": 1, "c": ["x", {"d": 2}]}}, paths.parsed(path)) == value


# --- S3 ---------------------------------------------------------------------------------------


def into_bucket(server: S3Server, bucket: Bucket, **settings: Any) -> dict[str, Any]:
    return {
        "bucket": bucket.name,
        "prefix": "from/portal",
        "region": REGION,
        "endpoint_url": server.url,
        "access_key_id": "tests",
        "secret_access_key": "no secret",
    } | settings


def test_s3_copies_both_files(owner: Person, s3_server: S3Server) -> None:
    bucket = s3_server.bucket("")
    handler(owner, "s3", **into_bucket(s3_server, bucket))
    batch = ended(owner, chat(1), refused(2))
    run = ran(batch)
    assert (run.state, run.error) == ("done", "")
    assert run.result == f"s3://{bucket.name}/from/portal/{batch.pk}"
    assert again(run).state == "done"
    assert bucket.keys == [f"from/portal/{batch.pk}/{kind}.jsonl" for kind in ("errors", "output")]
    for kind, file in Results(batch).files.items():
        got = bucket.client.get_object(
            Bucket=bucket.name, Key=f"from/portal/{batch.pk}/{kind}.jsonl"
        )
        with storage.opened(file.storage_name) as stream:
            assert got["Body"].read() == stream.read()


def test_s3_says_what_the_store_refused(owner: Person, s3_server: S3Server) -> None:
    bucket = s3_server.bucket("")
    handler(owner, "s3", **(into_bucket(s3_server, bucket) | {"bucket": "not-there"}))
    run = ran(ended(owner, chat(1)))
    assert (run.state, run.error) == (
        "waiting",
        "NoSuchBucket: The specified bucket does not exist",
    )


def test_s3_reads_no_endless_answer(owner: Person, s3_server: S3Server) -> None:
    """botocore keeps all of an answer in memory."""
    long = b"HTTP/1.1 400 Bad\r\nContent-Length: 3000000\r\n\r\n" + b"x" * 3_000_000
    with receiving(raw=long) as receiver:
        there = receiver.url("")
        settings = into_bucket(s3_server, s3_server.bucket(""), endpoint_url=there)
        handler(owner, "s3", **settings)
        run = ran(ended(owner, chat(1)))
    assert run.state == "waiting"
    assert run.error.endswith("The answer is too long for an S3's.")


def test_s3_that_does_not_answer_is_given_up(
    owner: Person, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler_runs, "SILENT_SECONDS", 3.0)
    with receiving(lambda _: None) as receiver:
        there = receiver.url("")
        settings = into_bucket(s3_server, s3_server.bucket(""), endpoint_url=there)
        handler(owner, "s3", **settings)
        run = ran(ended(owner, chat(1)))
    assert (run.state, run.error) == ("waiting", handler_runs.HANGS)


def test_s3_connects_nowhere_that_it_may_not(
    owner: Person, s3_server: S3Server, settings: Any
) -> None:
    """Looked at when it is saved, and again with each connection."""
    bucket = s3_server.bucket("")
    handler(owner, "s3", **into_bucket(s3_server, bucket))
    settings.HANDLER_PRIVATE_HOSTS = []
    settings.HANDLER_PORTS = range(65536)
    run = ran(ended(owner, chat(1)))
    assert run.state == "waiting"
    assert bucket.keys == []
    for url in ("http://169.254.169.254", "http://[::1]:9000", "http://localhost:9000"):
        with pytest.raises(BadRequest, match="private address"):
            handlers.create_handler(
                actor=owner.caller,
                name="other",
                kind="s3",
                settings=into_bucket(s3_server, bucket, endpoint_url=url),
                project=None,
            )


# --- Parquet ----------------------------------------------------------------------------------


def made(run: HandlerRun) -> File:
    with scopes_disabled():
        return File.objects.get(pk=run.result)


def test_parquet_is_a_file_of_the_organizations(owner: Person, tmp_path: Path) -> None:
    handler(owner, "parquet")
    batch = ended(owner, chat(1), refused(2), chat(3))
    run = ran(batch)
    assert (run.state, run.error, run.rows) == ("done", "", 3)
    file = made(run)
    assert (file.filename, file.purpose) == (f"{batch.pk}.parquet", "batch_output")
    assert (file.organization, file.project) == (batch.organization, batch.project)
    with storage.opened(file.storage_name) as stream:
        table = parquet.read_table(stream)
    assert table.num_rows == 3
    rows = table.drop_columns(["response"]).to_pylist()
    assert rows == [
        {
            "custom_id": f"say {at}",
            "ok": True,
            "status_code": 200,
            "content": f"answer {at}",
            "finish_reason": "stop",
            "input_tokens": 10 + at,
            "output_tokens": at,
            "error": None,
        }
        for at in (1, 3)
    ] + [
        {
            "custom_id": "say 2",
            "ok": False,
            "status_code": 400,
            "content": None,
            "finish_reason": None,
            "input_tokens": None,
            "output_tokens": None,
            "error": '{"message":"too long","code":400}',
        }
    ]
    assert orjson.loads(table["response"][0].as_py())["id"] == "chatcmpl-1"


def test_parquet_that_is_made_again_takes_the_others_place(owner: Person) -> None:
    handler(owner, "parquet")
    run = ran(ended(owner, chat(1)))
    first = made(run)
    second = made(again(run))
    assert second.pk != first.pk
    with scopes_disabled():
        live = File.objects.filter(filename=first.filename, deleted_at=None)
        assert [file.pk for file in live] == [second.pk]


def test_parquet_is_written_in_row_groups(owner: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batches.handlers.parquet.GROUP_ROWS", 2)
    handler(owner, "parquet", compression="none")
    file = made(ran(ended(owner, *(chat(at) for at in range(1, 6)))))
    with storage.opened(file.storage_name) as stream:
        assert parquet.ParquetFile(stream).metadata.num_row_groups == 3
