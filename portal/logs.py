"""One log format for every process: JSON lines, or readable text on a terminal.

What is bound to a line (request, organization, batch) is bound where it is known, not here.
"""

from __future__ import annotations

import logging
import logging.config
import os
import sys

import structlog

_SHARED: list[structlog.types.Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.ExtraAdder(),
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def wants_json() -> bool:
    """LOG_FORMAT (json or console) decides; without it a terminal gets text."""
    chosen = os.environ.get("LOG_FORMAT", "")
    return chosen == "json" or (chosen != "console" and not sys.stdout.isatty())


def configure(level: str) -> None:
    """Send structlog's and the standard library's lines to stdout in the one format."""
    final: list[structlog.types.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if wants_json()
        else [structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty())]
    )
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "one": {
                    "()": structlog.stdlib.ProcessorFormatter,
                    "foreign_pre_chain": _SHARED,
                    "processors": [
                        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                        *final,
                    ],
                }
            },
            "handlers": {
                "stdout": {
                    "class": "logging.StreamHandler",
                    "stream": f"ext://sys.{os.environ.get('LOG_STREAM', 'stdout')}",
                    "formatter": "one",
                }
            },
            "root": {"handlers": ["stdout"], "level": level},
            "loggers": {
                # Their INFO lines repeat what our own say, once for every message.
                "celery.app.trace": {"level": "WARNING"},
                "celery.worker.strategy": {"level": "WARNING"},
                "celery.beat": {"level": "WARNING"},
                "kombu": {"level": "WARNING"},
            },
        }
    )
    structlog.configure(
        processors=[*_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
