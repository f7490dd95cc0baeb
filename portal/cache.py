"""The default cache; what counts calls has a cache of its own (see CACHES)."""

from __future__ import annotations

from typing import Any

from django_redis.cache import RedisCache  # type: ignore[import-untyped]


class Cache(RedisCache):
    """With Redis away everything is a miss, and every lock is free.

    allauth counts attempts under a lock: one that nobody can get would let nobody sign in.
    """

    def add(self, key: str, *args: Any, **kwargs: Any) -> bool | None:
        added: bool | None = super().add(key, *args, **kwargs)
        return True if added is None and key.endswith(":lock") else added
