"""A portal with the models to measure, and workers that log what they do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tests import stack as stacks
from tests.stack import Stack

WORDS = 200
LONGEST_LOAD = 1800.0


@dataclass(frozen=True, slots=True)
class Move:
    """A model that was loaded, woken, put to sleep or unloaded."""

    what: str
    model: str
    seconds: float


class Site:
    """Models are called m0, m1 …, in the order of their sources."""

    def __init__(self, stack: Stack, gpu: str | None, sources: list[str]) -> None:
        self.stack, self.gpu, self.sources = stack, gpu, sources
        self.client = stack.client(timeout=300)
        self.models = [f"m{at}" for at in range(len(sources))]
        for name, source in zip(self.models, sources, strict=True):
            self.register(name, source)

    def register(self, name: str, source: str, *options: str) -> None:
        self.stack.manage("register_model", name, f"--source={source}", *options)

    @contextmanager
    def worker(self, **variables: str) -> Iterator[Path]:
        """A GPU worker with nothing loaded; yields its log."""
        log = self.stack.data_dir / "bench-worker.log"
        command = [sys.executable, "-m", "worker", "--name=bench"]
        command += [] if self.gpu is None else [f"--gpu={self.gpu}"]
        environment = self.stack.variables() | variables
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=stacks.ROOT, env=environment, stdout=out, stderr=out
            )
        try:
            yield log
        finally:
            process.terminate()
            process.wait(60)

    def batch(self, model: str, requests: int, **body: Any) -> Any:
        """Run a batch of chats with distinct prompts to its end; returns it."""
        content = self.lines(model, requests, WORDS, **body)
        sent = stacks.send(self.client, content)
        batch = stacks.finished(self.client, sent.id, seconds=LONGEST_LOAD, pause=0.2)
        assert batch.request_counts.completed == requests, batch
        return batch

    def lines(self, model: str, requests: int, words: int, **body: Any) -> bytes:
        """A batch's input: chats with distinct prompts of so many words."""
        said = (f"{at} " + f"word{at % 997} " * words for at in range(requests))
        return b"".join(
            orjson.dumps(
                {
                    "custom_id": f"request-{at}",
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": {"model": model, "messages": [{"role": "user", "content": text}]}
                    | body,
                },
                option=orjson.OPT_APPEND_NEWLINE,
            )
            for at, text in enumerate(said)
        )


def moves(log: Path) -> list[Move]:
    """What the worker said of its models, in order."""
    said = (orjson.loads(line) for line in log.read_bytes().splitlines() if line.startswith(b"{"))
    return [
        Move(each["event"].removeprefix("model "), each["model"], each["seconds"])
        for each in said
        if each["event"].startswith("model ") and "seconds" in each
    ]
