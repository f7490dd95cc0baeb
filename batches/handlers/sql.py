"""Results into a table of somebody's database: a row for each, written again when it comes again.

SQLAlchemy reads the table's columns and quotes their names; values are parameters, always.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from django.conf import settings as portal
from pydantic import Field, SecretStr, field_validator, model_validator

from batches.handlers import paths, reach
from batches.handlers.base import Answer, Batch, Handler, HandlerFailed, Results, Settings

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection, Engine, Table

ROWS_AT_ONCE = 500
STATEMENT_SECONDS = 60
ROOTS = "batch_id, custom_id, ok, status_code, response, error, request"
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_DRIVERS = {
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mysql+pymysql",
    "sqlite": "sqlite",
}
_PORTS = {"postgresql": 5432, "mysql": 3306}
_PYMYSQL = {
    "connect_timeout": int(reach.CONNECT_SECONDS),
    "read_timeout": STATEMENT_SECONDS,
    "write_timeout": STATEMENT_SECONDS,
}
_SSL = ("prefer", "require", "verify-full")


class SQLSettings(Settings):
    url: str = Field(
        title="Database",
        max_length=500,
        description="As postgresql://user@host:5432/database, with ?sslmode=verify-full if you"
        " like. The password goes into its own field.",
    )
    password: SecretStr = Field(SecretStr(""), title="Password", max_length=500)
    table: str = Field(
        title="Table", min_length=1, max_length=128, description="With its schema, if it has one."
    )
    columns: dict[str, str] = Field(
        title="Columns",
        min_length=1,
        max_length=200,
        description="Which column gets what, one a line, as"
        " answer = response.choices[0].message.content. Paths begin with " + ROOTS + ".",
    )
    key: list[str] = Field(
        title="Key columns",
        min_length=1,
        max_length=20,
        description="By which a row is known again: those of a unique index of the table.",
    )
    failed: bool = Field(
        False, title="Also requests that failed", description="With error and no response."
    )

    @field_validator("columns")
    @classmethod
    def _paths(cls, columns: dict[str, str]) -> dict[str, str]:
        for path in columns.values():
            if str(paths.parsed(path)[0]) not in ROOTS.split(", "):
                raise ValueError(f"{path[:100]!r} begins with none of {ROOTS}")
        return columns

    @model_validator(mode="after")
    def _key_is_written(self) -> SQLSettings:
        if missing := set(self.key) - set(self.columns):
            raise ValueError(f"the key column {min(missing)[:100]!r} is not among the columns")
        return self


class SQLHandler(Handler[SQLSettings]):
    name = "sql"
    title = "SQL database"
    summary = "Writes a row for each result into a table of yours: PostgreSQL, MySQL and the like."
    settings_schema = SQLSettings
    destination = ("url",)

    @property
    def wants_requests(self) -> bool:
        return any(steps[0] == "request" for steps in self._steps.values())

    @property
    def _steps(self) -> dict[str, tuple[str | int, ...]]:
        return {name: paths.parsed(path) for name, path in self.settings.columns.items()}

    def check(self, organization_id: str) -> None:
        self._connection(organization_id)

    def handle(self, batch: Batch, results: Results) -> str:
        import sqlalchemy
        from sqlalchemy.exc import SQLAlchemyError

        url, arguments = self._connection(batch.organization_id)
        engine = sqlalchemy.create_engine(
            url, connect_args=arguments, poolclass=sqlalchemy.pool.NullPool, hide_parameters=True
        )
        try:
            return self._written(engine, batch, results)
        except SQLAlchemyError as error:
            raise HandlerFailed(_in_words(error)) from None
        finally:
            engine.dispose()

    def _written(self, engine: Engine, batch: Batch, results: Results) -> str:
        rows = 0
        with engine.connect() as connection:
            table = self._table(connection)
            statement = _upsert(table, connection.dialect.name, self.settings.key, self._steps)
            for some in self._rows(table, batch, results):
                with connection.begin():
                    connection.execute(statement, some)
                rows += len(some)
                results.beat()
        return f"{rows:,} row{'' if rows == 1 else 's'} in {self.settings.table}"

    def _table(self, connection: Connection) -> Table:
        """The table as it is there; raises `HandlerFailed` where it lacks a column."""
        import sqlalchemy
        from sqlalchemy.exc import NoSuchTableError

        schema, _, name = self.settings.table.rpartition(".")
        try:
            with connection.begin():
                table = sqlalchemy.Table(
                    name,
                    sqlalchemy.MetaData(),
                    schema=schema or None,
                    autoload_with=connection,
                    resolve_fks=False,
                )
        except NoSuchTableError:
            raise HandlerFailed(f"There is no table {self.settings.table!r}.") from None
        if missing := set(self.settings.columns) - set(table.columns.keys()):
            said = f"{self.settings.table} has no column {min(missing)!r}."
            raise HandlerFailed(said)
        return table

    def _rows(self, table: Table, batch: Batch, results: Results) -> Iterator[list[dict[str, Any]]]:
        some: list[dict[str, Any]] = []
        for answer in results:
            if answer.ok or self.settings.failed:
                some.append(self._row(table, batch, answer))
            if len(some) >= ROWS_AT_ONCE:
                yield some
                some = []
        if some:
            yield some

    def _row(self, table: Table, batch: Batch, answer: Answer) -> dict[str, Any]:
        said = {name: getattr(answer, name) for name in ROOTS.split(", ")[1:]}
        said["batch_id"] = batch.pk
        return {
            name: _fitting(paths.found(said, steps), table.columns[name])
            for name, steps in self._steps.items()
        }

    # --- Where to ---------------------------------------------------------------------------

    def _connection(self, organization_id: str) -> tuple[URL, dict[str, Any]]:
        """SQLAlchemy's URL and the driver's arguments, with the address that was looked at."""
        url = self._url()
        kind = url.get_backend_name()
        if kind == "sqlite":
            return _file_of(url, organization_id), {}
        if not url.host or not url.username or not url.database:
            raise _refused("The database's URL must name a user, a host and a database.")
        if not self.settings.password.get_secret_value():
            raise _refused("Give the database's password.")  # or the driver takes one of ours
        port = url.port or _PORTS[kind]
        address = reach.address_of(url.host, port)
        url = url.set(port=port, password=self.settings.password.get_secret_value())
        if kind == "postgresql":
            return url.set(query={}), _libpq(address, str(url.query.get("sslmode", "prefer")))
        return url.set(host=address, query={}), _PYMYSQL

    def _url(self) -> URL:
        from sqlalchemy import make_url
        from sqlalchemy.exc import ArgumentError

        try:
            url = make_url(self.settings.url)
        except (ArgumentError, ValueError):
            raise _refused("This is not a database's URL.") from None
        if url.drivername not in _DRIVERS:
            raise _refused("The URL must begin with postgresql://, mysql:// or sqlite:///.")
        if url.password is not None:
            raise _refused("Put the password into its own field, not into the URL.")
        if set(url.query) - {"sslmode"} or url.query.get("sslmode", "prefer") not in _SSL:
            raise _refused(f"The URL's only option is sslmode: {', '.join(_SSL)}.")
        return _with_driver(url.set(drivername=_DRIVERS[url.drivername]))


def _refused(said: str) -> HandlerFailed:
    return HandlerFailed(said, final=True)


def _with_driver(url: URL) -> URL:
    try:
        url.get_dialect().import_dbapi()
    except ImportError:
        said = f"The portal has no driver for {url.get_backend_name()}; its operator can add one."
        raise _refused(said) from None
    return url


def _libpq(address: str, sslmode: str) -> dict[str, Any]:
    """Nothing of this machine's own (password files, tickets) is offered to whoever answers."""
    return {
        "hostaddr": address,
        "connect_timeout": int(reach.CONNECT_SECONDS),
        "sslmode": sslmode,
        **({"sslrootcert": "system"} if sslmode == "verify-full" else {}),
        "gssencmode": "disable",
        "application_name": "vLLM Batch Portal",
        "options": f"-c statement_timeout={STATEMENT_SECONDS * 1000}",
    }


def _file_of(url: URL, organization_id: str) -> URL:
    """A file on our own disk, so only where the operator has set a folder for it."""
    folder = portal.HANDLER_SQLITE_DIR
    if not folder:
        raise _refused("SQLite is a file on the portal's own host, which it does not allow.")
    if not _FILE.fullmatch(url.database or "") or url.host:
        raise _refused("SQLite's URL is sqlite:///name.db: a name, and no folder.")
    mine = Path(folder) / organization_id
    mine.mkdir(parents=True, exist_ok=True)
    return url.set(database=str(mine / (url.database or "")), query={})


def _in_words(error: Exception) -> str:
    """The first line: those that follow repeat whole rows, which are nobody's to read here."""
    said = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
    return _plain(said.splitlines()[0])[:900]


# --- What is written ----------------------------------------------------------------------------


def _upsert(table: Table, dialect: str, key: list[str], columns: Any) -> Any:
    """INSERT, or UPDATE of the row that has the key, as this dialect has it."""
    others = [name for name in columns if name not in key]
    if dialect == "mysql":
        from sqlalchemy.dialects import mysql

        insert = mysql.insert(table)
        # With nothing else to set, a key's column is set to itself.
        again = {name: insert.inserted[name] for name in others or key[:1]}
        return insert.on_duplicate_key_update(again)
    if dialect == "sqlite":
        from sqlalchemy.dialects import sqlite as on_conflict
    else:
        from sqlalchemy.dialects import postgresql as on_conflict  # type: ignore[no-redef]
    insert_or = on_conflict.insert(table)
    if not others:
        return insert_or.on_conflict_do_nothing(index_elements=key)
    changed = {name: insert_or.excluded[name] for name in others}
    return insert_or.on_conflict_do_update(index_elements=key, set_=changed)


def _fitting(value: Any, column: Any) -> Any:
    """The value as the column takes it: objects go into JSON columns, or as text."""
    from sqlalchemy import JSON, String

    if isinstance(column.type, JSON):
        return _without_nul(value)
    if isinstance(value, dict | list):
        value = orjson.dumps(value).decode()
    if value is not None and not isinstance(value, str) and isinstance(column.type, String):
        value = orjson.dumps(value).decode()
    return _plain(value) if isinstance(value, str) else value


def _plain(text: str) -> str:
    """PostgreSQL's text takes no NUL."""
    return text.replace("\0", "\ufffd")


def _without_nul(value: Any) -> Any:
    if isinstance(value, str):
        return _plain(value)
    if isinstance(value, dict):
        return {_plain(name): _without_nul(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_nul(each) for each in value]
    return value
