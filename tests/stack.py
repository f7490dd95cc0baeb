"""The whole portal as a user runs it: `./run serve` in a process of its own, to talk to and to kill.

Nothing is shared with the test's own Django: it has its own data folder, PostgreSQL and Valkey.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import orjson
import psutil
from openai import OpenAI

from portal import embedded, supervisor
from tests.generous import RATE_LIMITS

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")
_OF_THE_TESTS = ("DATABASE_URL", "REDIS_URL", "DATA_DIR", "SECRET_KEY", "BASE_URL")


class Stack:
    """A running portal with one organization, `acme`, and an API key of it."""

    def __init__(self, data_dir: Path, process: subprocess.Popen[bytes]) -> None:
        self.data_dir = data_dir
        self.process = process
        self.base_url = supervisor.wait_ready(data_dir, timeout=180)
        self.manage(
            "create_org", "Acme", "--owner", "owner@acme.test", stdin="correct horse 9 battery"
        )
        self.key = self.manage("create_api_key", "--org", "acme", "--name", "tests")

    def client(self, key: str | None = None, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.base_url}/v1", api_key=key or self.key, **options)

    def manage(self, *arguments: str, stdin: str = "") -> str:
        """Run a management command; returns what it printed on stdout."""
        if arguments[0] == "create_org":
            arguments = (*arguments, "--password-stdin")
        command = [sys.executable, "-m", "portal.supervisor", "manage", *arguments]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.variables(),
            input=stdin.encode(),
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().strip()

    def variables(self) -> dict[str, str]:
        """The environment for commands and workers that join it."""
        return _environment(self.data_dir)

    def instant(self, name: str = "echo", **engine_args: Any) -> str:
        """Register an instant model; returns its name."""
        pairs = [f"--engine-arg={key}={value}" for key, value in engine_args.items()]
        return self.manage("register_model", name, "--source=none", "--engine=instant", *pairs)

    @property
    def services(self) -> embedded.Services:
        """Its own PostgreSQL and Valkey, not those of the tests."""
        saved = orjson.loads((self.data_dir / "services.json").read_bytes())
        return embedded.Services(saved["database_url"], saved["redis_url"])

    def pid(self, child: str) -> int:
        """The pid of `web`, `cpu`, `beat`, `gpu0`, `postgres` or `valkey`, as of now."""
        children = orjson.loads((self.data_dir / "serve.json").read_bytes())["children"]
        return int(children[child])

    def restarted(self, child: str, before: int) -> bool:
        """Whether the child runs again, as another process than `before`."""
        children = orjson.loads((self.data_dir / "serve.json").read_bytes())["children"]
        return children.get(child) not in (None, before)

    def kill(self, child: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to one of the children, if it is alive just now."""
        with suppress(ProcessLookupError, KeyError, TypeError):
            os.kill(self.pid(child), number)

    def kill_tree(self, child: str) -> None:
        """SIGKILL one of the children with all of its own, a prefork pool's say."""
        with suppress(psutil.Error, KeyError, TypeError):
            parent = psutil.Process(self.pid(child))
            for process in [parent, *parent.children(recursive=True)]:
                process.kill()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=90)


@contextmanager
def running(data_dir: Path, *options: str, **variables: str) -> Iterator[Stack]:
    """A portal on a free port; stopped at the end, its log kept in `data_dir`/serve.log."""
    with _serving(data_dir, *options, **variables) as process:
        yield Stack(data_dir, process)


@contextmanager
def _serving(data_dir: Path, *options: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    data_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "portal.supervisor", "serve", "--port=0"]
    command += [f"--data-dir={data_dir}", *options]
    with (data_dir / "serve.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=_environment(data_dir) | variables, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=90)
        finally:
            process.kill()


@contextmanager
def again(data_dir: Path, *options: str, **variables: str) -> Iterator[str]:
    """Serve a data folder that was served before; yields the address."""
    with _serving(data_dir, *options, **variables):
        yield supervisor.wait_ready(data_dir, timeout=180)


def pause(seconds: float) -> None:
    """Let the portal go on for a while; for tests that disturb it, not for waiting for it."""
    time.sleep(seconds)


def _environment(data_dir: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _OF_THE_TESTS}
    return RATE_LIMITS | kept | {"DATA_DIR": str(data_dir), "LOG_FORMAT": "json"}


def wait_for(look: Callable[[], T], *, seconds: float = 120, pause: float = 0.1) -> T:
    """The first truthy value that `look` returns; fails when none comes in time."""
    limit = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < limit, f"waited {seconds} s in vain for {look}"
        time.sleep(pause)
    return found


def lines(
    count: int, model: str = "echo", *, endpoint: str = "/v1/chat/completions", **body: Any
) -> bytes:
    """A batch input of `count` chat requests; the instant engine repeats each one's words."""
    return b"".join(
        orjson.dumps(
            {
                "custom_id": f"request-{at}",
                "method": "POST",
                "url": endpoint,
                "body": {
                    "model": model,
                    "messages": [{"role": "user", "content": f"words {at}"}],
                    **body,
                },
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )
        for at in range(count)
    )


def send(client: OpenAI, content: bytes, **options: Any) -> Any:
    """Upload the content and make a batch of it; returns the SDK's batch object."""
    file = client.files.create(file=("input.jsonl", content), purpose="batch")
    options = {"endpoint": "/v1/chat/completions", "completion_window": "24h"} | options
    return client.batches.create(input_file_id=file.id, **options)


def finished(client: OpenAI, batch_id: str, *, seconds: float = 180, pause: float = 0.1) -> Any:
    """The batch once it has ended, however it ended; looks again after `pause` seconds."""

    def look() -> Any:
        batch = client.batches.retrieve(batch_id)
        return batch if batch.status in ("completed", "failed", "expired", "cancelled") else None

    return wait_for(look, seconds=seconds, pause=pause)


def answers(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of an output or error file."""
    if file_id is None:
        return []
    return [orjson.loads(line) for line in client.files.content(file_id).content.splitlines()]
