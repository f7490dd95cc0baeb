"""What the tests of the engines share: an event loop in a thread, and the tiny models.

Celery runs an engine's loop in a thread too, and not in the main one.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest


class Loop:
    """An asyncio loop that runs in its own thread until it is closed."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="engine loop")
        self.thread.start()

    def run(self, work: Coroutine[Any, Any, Any], timeout: float = 180) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(timeout)
        except TimeoutError:
            future.cancel()
            raise

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="session")
def loop() -> Iterator[Loop]:
    running = Loop()
    yield running
    running.close()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from examples.make_tiny_models import make

    folder = os.environ.get("TINY_MODELS")  # a folder to keep them in between runs
    return make(Path(folder) if folder else tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def compiled_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where nothing may write bytecode beside the modules, let the engines' processes write it
    elsewhere: each compiles torch and vLLM otherwise, which takes longer than all tests here."""
    if "PYTHONDONTWRITEBYTECODE" not in os.environ:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE")
        patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.mktemp("bytecode")))
        yield
