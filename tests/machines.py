"""A worker as on another host: what `./run worker` becomes, with a DATA_DIR of its own and told nothing
but where the portal's database, Redis and storage are.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.stack import ROOT, Stack


class Machine:
    """One worker process, which tests start, disturb and end; its log is `log`."""

    def __init__(self, stack: Stack, folder: Path, name: str, **variables: str) -> None:
        self.name = name
        self.log = folder / "worker.log"
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "DATA_DIR": str(folder),
            "DATABASE_URL": stack.services.database_url,
            "REDIS_URL": stack.services.redis_url,
            "STORAGE_URL": f"file:{stack.data_dir / 'files'}",
            **variables,
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "worker", "--name", self.name]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, env=self.environment, cwd=self.log.parent, stdout=log, stderr=log
            )

    def again(self, **variables: str) -> None:
        """Start the next process of this worker, with other variables."""
        assert self.process.poll() is not None
        self.environment |= variables
        self.process = self._start()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self, seconds: float = 60) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(seconds)

    def has_said(self, text: str, *, times: int = 1) -> bool:
        return self.log.read_text().count(text) >= times


@contextmanager
def machine(stack: Stack, folder: Path, name: str, **variables: str) -> Iterator[Machine]:
    """A machine that is ended afterwards, whatever the test did to it."""
    made = Machine(stack, folder, name, **variables)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.process.send_signal(signal.SIGCONT)
            made.process.terminate()
            try:
                made.process.wait(40)
            finally:
                made.process.kill()
                made.process.wait()
