"""Which kinds of handlers there are: those that come along, and those of other distributions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:  # pydantic is not on every host that has workers
    from batches.handlers.base import Handler

logger = structlog.get_logger(__name__)

GROUP = "vllm_batch_portal.result_handlers"
BUILT_IN: Mapping[str, str] = {
    "webhook": "batches.handlers.webhook:WebhookHandler",
    "sql": "batches.handlers.sql:SQLHandler",
    "s3": "batches.handlers.s3:S3Handler",
    "parquet": "batches.handlers.parquet:ParquetHandler",
}
"""As pyproject.toml has them: from its folder the project runs without being installed."""


@cache
def kinds() -> Mapping[str, type[Handler[Any]]]:
    """Every kind by its name, ours first; looked for once in a process's life."""
    from batches.handlers.base import Handler

    found: dict[str, type[Handler[Any]]] = {}
    for name, where in BUILT_IN.items():
        module, _, attribute = where.partition(":")
        found[name] = getattr(import_module(module), attribute)
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        if point.name not in found and (kind := _loaded(point)) is not None:
            if isinstance(kind, type) and issubclass(kind, Handler):
                found[point.name] = kind
            else:
                logger.error("not a result handler", entry_point=point.value)
    return found


def _loaded(point: EntryPoint) -> Any:
    """What the entry point names; None, and an error in the log, where it cannot be imported."""
    try:
        return point.load()
    except Exception:  # somebody else's module: whatever it does, the others are there
        logger.exception("result handler not loaded", entry_point=point.value)
        return None
