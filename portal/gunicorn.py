"""Gunicorn's own settings that are functions; the others are on its command line.

It reads these in its main process, where there is no Django.
"""

from __future__ import annotations

import os
import secrets
from typing import Any

import orjson
from gunicorn import util  # type: ignore[import-untyped]
from prometheus_client.multiprocess import mark_process_dead

limit_request_line = 8190

# No header says where the application is mounted: a client could hide a path's own limits behind
# one, where a proxy on this host passes it on.
forwarder_headers = ""


def child_exit(server: Any, worker: Any) -> None:
    """Forget what a web process that ended was measuring of itself; what it counted stays."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]


def _write_error(connection: Any, status: int, reason: str, message: str) -> None:
    """Answer what gunicorn refuses before Django sees it (a line too long, a broken header).

    Which path it was is not known then, so it comes in the API's envelope whatever it was.
    """
    kind = "server_error" if status >= 500 else "invalid_request_error"
    said = f"{reason}: {message}" if message else reason
    error = {"message": said[:500], "type": kind, "param": None, "code": "invalid_request"}
    body = orjson.dumps({"error": error})
    head = (
        f"HTTP/1.1 {status} {reason}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"x-request-id: req_{secrets.token_hex(16)}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    util.write_nonblock(connection, head.encode("latin-1") + body)


# Gunicorn has no setting for it; its own answers are HTML.
util.write_error = _write_error
