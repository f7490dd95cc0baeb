"""A pytest plugin that starts PostgreSQL and Valkey for the run, before Django reads its settings.

Loaded by `-p tests.services` (see pyproject.toml); pytest-xdist's workers inherit the addresses.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

from portal import embedded

_running = ExitStack()


def _start() -> None:
    folder = Path(tempfile.mkdtemp(prefix="portal-tests-"))
    _running.callback(shutil.rmtree, folder, ignore_errors=True)
    services = _running.enter_context(embedded.running(folder))
    os.environ["DATA_DIR"] = str(folder)
    os.environ["DATABASE_URL"] = services.database_url
    os.environ["REDIS_URL"] = services.redis_url
    os.environ["SECRET_KEY"] = "only-for-tests-" + "x" * 40
    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "true"  # playwright's event loop is in our thread


if "PYTEST_XDIST_WORKER" not in os.environ and "DATABASE_URL" not in os.environ:
    _start()


def pytest_unconfigure() -> None:
    _running.close()
