"""Liveness and readiness: is this process up, and can it take work?"""

from __future__ import annotations

from django.conf import settings
from django.db import Error, connection
from django.http import HttpRequest, JsonResponse
from redis import Redis, RedisError

from batches import storage


def healthz(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"status": "ok"})


def readyz(request: HttpRequest) -> JsonResponse:
    """200 when batches can be taken: they need the database and the storage.

    Redis carries only wake-ups, which sweeps repeat; that it is away is told, not refused.
    """
    found = checks()
    ready = found["database"] and found["storage"]
    status = "ready" if ready else "not ready"
    return JsonResponse({"status": status, **found}, status=200 if ready else 503)


def checks() -> dict[str, bool]:
    """Which of the services answer."""
    return {"database": _database(), "storage": storage.is_usable(), "redis": _redis()}


def _database() -> bool:
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM batches_batch LIMIT 1")
        return True
    except Error:
        return False


def _redis() -> bool:
    # Not through Django's cache, which takes a server that is away for an empty one.
    try:
        with Redis.from_url(
            settings.REDIS_URL, socket_connect_timeout=1, socket_timeout=1
        ) as redis:
            return bool(redis.ping())
    except (RedisError, ValueError):
        return False
