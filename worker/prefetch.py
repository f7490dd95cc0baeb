"""The next model's weights, brought to this host while the worker still serves the one it has.

Only files are touched: what of a load needs the GPU begins when the last engine has left it. Nothing
depends on any of this; without it a load takes as long as it takes.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress

import orjson
import structlog
from django.conf import settings

from worker.database import GaveUp
from worker.engines.base import LoadFailed, ModelSpec
from worker.hosting import Host

logger = structlog.get_logger(__name__)
LOOK_SECONDS = 15.0
"""How often it is asked which model comes next; a look at a long queue takes a tenth of a second."""
WATCH_SECONDS = 0.5
"""How soon a load finds the disk free."""
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


class Prefetch:
    """Beside the lease loop, on its thread and asyncio loop; ends when it is closed."""

    def __init__(self, host: Host, upcoming: Callable[[], Awaitable[str]]) -> None:
        self._host = host
        self._upcoming = upcoming
        self._tried: tuple[float, ModelSpec] | None = None
        """What was begun last, and which load's engine was serving: once is enough for that."""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if settings.PREFETCH:
            self._task = asyncio.create_task(self._keep_looking(), name="prefetch")

    async def close(self) -> None:
        """End it, and what it started. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self._look()
            except GaveUp:
                return
            except LoadFailed:
                pass  # it has just been taken from the registry
            except Exception:
                logger.exception("prefetch failed")

    async def _look(self) -> None:
        if not (name := await self._upcoming()):
            return
        spec = await self._host.spec_of(name)
        trial = self._host.loaded_at, spec
        if spec.engine == "vllm" and trial != self._tried:
            self._tried = trial
            await self._bring(spec)

    async def _bring(self, spec: ModelSpec) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "worker.weights", spec.source, spec.revision),
            cwd=settings.BASE_DIR,
            env=os.environ | QUIET,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            said = await self._heard(process, spec.name)
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if said is not None:
            self._tell(spec.name, said)

    async def _heard(self, process: asyncio.subprocess.Process, name: str) -> bytes | None:
        """What the process says in the end; None if it has to make way for another model's load."""
        telling = asyncio.create_task(process.communicate())
        try:
            while not telling.done():
                if self._host.coming not in ("", name):
                    return None
                await asyncio.wait([telling], timeout=WATCH_SECONDS)
            return telling.result()[0]
        finally:
            telling.cancel()

    def _tell(self, name: str, said: bytes) -> None:
        found = orjson.loads(said) if said else {"error": "the process was ended"}
        if "error" in found:
            logger.warning("next model's weights not here", model=name, error=found["error"])
        else:
            logger.info("next model's weights read", model=name, bytes=found["bytes"])
