"""A pytest plugin that starts PostgreSQL and Valkey for the run, before Django reads its settings.

Loaded by `-p tests.services` (see pyproject.toml); pytest-xdist's workers inherit the addresses.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import psycopg

from portal import embedded
from tests.generous import RATE_LIMITS

_running = ExitStack()


def _start() -> None:
    folder = Path(tempfile.mkdtemp(prefix="portal-tests-"))
    _running.callback(shutil.rmtree, folder, ignore_errors=True)
    services = _running.enter_context(embedded.running(folder))
    _keep_nothing(services.database_url)
    os.environ["DATA_DIR"] = str(folder)
    os.environ["DATABASE_URL"] = services.database_url
    os.environ["REDIS_URL"] = services.redis_url
    os.environ["SECRET_KEY"] = "only-for-tests-" + "x" * 40
    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "true"  # playwright's event loop is in our thread


def _keep_nothing(database_url: str) -> None:
    """No test outlives this server, so nothing has to reach the disk: truncating all tables after
    every test with threads takes a tenth of the time."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        for name in ("fsync", "synchronous_commit", "full_page_writes"):
            connection.execute(f"ALTER SYSTEM SET {name} = off")
        connection.execute("SELECT pg_reload_conf()")


def _take_own_redis_database() -> None:
    """Each of pytest-xdist's workers has a database in Valkey: clearing one's cache is nobody
    else's loss."""
    number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) + 1
    address, _, _ = os.environ["REDIS_URL"].rpartition("/")
    os.environ["REDIS_URL"] = f"{address}/{number}"


os.environ |= RATE_LIMITS
# Receivers of webhooks that tests start; that all others of this machine are refused is tested.
os.environ["WEBHOOK_PRIVATE_HOSTS"] = "127.0.0.1,localhost"
os.environ["HANDLER_PRIVATE_HOSTS"] = "127.0.0.1,localhost"
if "PYTEST_XDIST_WORKER" not in os.environ and "DATABASE_URL" not in os.environ:
    _start()
elif "PYTEST_XDIST_WORKER" in os.environ:
    _take_own_redis_database()


def pytest_unconfigure() -> None:
    _running.close()
