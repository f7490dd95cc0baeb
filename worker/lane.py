"""The interactive lane: answers real-time requests on the worker's engine, ahead of its batches.

They come and go through Redis, in the words of `batches/lane.py`. Which model is loaded is decided
elsewhere; here is only known which ones are asked for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import orjson
import structlog
from django.conf import settings
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from accounts.services import quotas
from batches import lane
from batches.lane import Frame, Kind, Loading, Request
from batches.lines import BYTES_A_TOKEN
from worker.database import Database
from worker.engines.base import Engine, EngineDied, Refused, Usage
from worker.hosting import Host
from worker.metering import SharedClock
from worker.status import Status

logger = structlog.get_logger(__name__)

TICK_SECONDS = 1.0
"""How often the lane says that it is there, and looks who still waits."""
BLOCK_SECONDS = 1.0
PAUSE_SECONDS = 0.1
"""Until it looks again for room, or for a reader that is behind."""
RETRY_SECONDS = 1.0
"""With Redis away."""
REDIS_SECONDS = 10.0
"""For so long it may take over a command."""
ASKED_WITHIN = 3600.0
"""Older wishes are nobody's business."""
IN_USE_SECONDS = 60.0
"""After its last request batches get all of the engine again."""
CLEAR_SECONDS, SETTLE_SECONDS = 30.0, 5.0
"""What is under way may go on for so long before a swap; and when all ends, the booking of it."""

STOPPING = lane.error(
    503, "The worker that answered was stopped; try again.", code="worker_stopped"
)
SWAPPED = lane.error(503, "The model made room for another one; try again.", code="model_unloaded")
CRASHED = lane.error(
    500,
    "The engine crashed while it ran this request, be it by this one or by another.",
    code="engine_crashed",
)
FAILED = lane.error(500, "The engine failed on this request.", code="engine_error")
OUR_FAULT = (STOPPING, SWAPPED, CRASHED, FAILED)
TOO_LARGE = lane.error(500, f"The answer is larger than {lane.ANSWER_BYTES:,} bytes.")


class ReaderGone(Exception):
    """Nobody waits for the answer any more."""


@dataclass(slots=True, eq=False)
class Live:
    """A request in the engine."""

    request: Request
    engine: Engine
    begun: float
    """What the engine's shared clock showed when it entered."""
    spoke_at: float = field(default_factory=time.monotonic)
    usage: Usage | None = None
    chunks: int = 0
    task: asyncio.Task[None] | None = None
    cut_short: Frame | None = None
    """What to say when it is cancelled; None: there is nobody to say it to."""
    is_free: bool = False
    """It was broken off here before anything of it was delivered."""

    def used(self, gpu_seconds: float) -> quotas.Used:
        """What it used. Where the engine did not say, as many tokens as can be told from outside:
        by the length of the prompt, and one for each chunk."""
        known = self.usage or Usage(
            input=len(self.request.body) // BYTES_A_TOKEN + 1, output=self.chunks
        )
        return quotas.Used(
            endpoint=self.request.endpoint,
            requests=1,
            input_tokens=known.input,
            cached_tokens=known.cached,
            output_tokens=known.output,
            reasoning_tokens=known.reasoning,
            gpu_seconds=gpu_seconds,
            batches=0,
        )


class Lane:
    """Beside the lease loop, on its thread and asyncio loop; ends when it is closed."""

    def __init__(
        self,
        name: str,
        host: Host,
        status: Status,
        database: Database,
        clock: SharedClock,
        *,
        may_take: Callable[[], bool],
        died: Callable[[str], None],
    ) -> None:
        self.name = name
        self.asked: dict[str, float] = {}
        """Models that were asked for lately, and when (seconds since 1970)."""
        self._host = host
        self._status = status
        self._database = database
        self._clock = clock
        self._may_take = may_take
        self._died = died
        self._live: dict[str, Live] = {}
        self._shut = 0
        self._ending: Frame | None = None
        """Why this engine answers nothing new: a swap, or the worker's end, is under way."""
        self._loading: tuple[str, float] | None = None
        self._last_used = float("-inf")
        self._tasks: list[asyncio.Task[None]] = []
        self._settling: set[asyncio.Task[None]] = set()
        self._redis: Any = None

    def start(self) -> None:
        """Begin to take requests."""
        self._redis = Redis.from_url(
            settings.CELERY_BROKER_URL,
            socket_connect_timeout=2,
            # Not its own timeout, with which it would swallow a cancellation now and then.
            socket_timeout=None,
            # A command that is sent twice could be done twice: what fails is told.
            retry=Retry(NoBackoff(), 0),
        )
        self._tasks = [
            asyncio.create_task(self._keep_doing(self._take), name="lane takes"),
            asyncio.create_task(self._keep_doing(self._tick), name="lane ticks"),
        ]

    @property
    def in_flight(self) -> int:
        return len(self._live)

    @property
    def headroom(self) -> int:
        """How many requests fewer than its capacity the engine should be fed.

        While the lane is in use none waits inside the engine, and some of its slots stay free, so
        that a real-time request starts with the engine's next step.
        """
        engine = self._host.engine
        is_idle = time.monotonic() - self._last_used > IN_USE_SECONDS
        if engine is None or not settings.LANE_SLOTS or (is_idle and not self._live):
            return 0
        free = min(settings.LANE_SLOTS, max(1, engine.slots // 8))
        return min(engine.capacity - engine.slots + free, engine.capacity - 1)

    # --- Around loads and stops ---------------------------------------------------------------

    @asynccontextmanager
    async def loading(self, model: str) -> AsyncIterator[None]:
        """Take nothing meanwhile, and say what is being loaded; before a swap all comes to its end."""
        self._shut += 1
        try:
            if not await self._host.has(model):
                self._ending = SWAPPED
                await self.clear(CLEAR_SECONDS, SWAPPED)
            self._loading = model, time.monotonic()
            yield
        finally:
            self._shut -= 1
            self._loading = self._ending = None

    async def clear(self, seconds: float, why: Frame) -> None:
        """Wait until nothing is under way; what takes longer than this is cut short."""
        tasks = [live.task for live in self._live.values() if live.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
        for live in list(self._live.values()):
            self._cut(live, why)
        if tasks:
            await asyncio.wait(tasks)

    async def close(self, seconds: float) -> None:
        """Take nothing more, end what is under way, settle all of it. Idempotent."""
        self._shut += 1
        self._ending = STOPPING
        await self.clear(seconds, STOPPING)
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
            await self._redis.aclose()
        if self._settling:
            await asyncio.wait(self._settling, timeout=SETTLE_SECONDS)

    async def claim(self, model: str) -> bool:
        """Whether it is this worker that shall load a model that is asked for."""
        try:
            said = Loading(self.name, 0).encoded()
            claim = self._redis.set(lane.loading_of(model), said, nx=True, ex=lane.READY_SECONDS)
            return bool(await _in_time(claim))
        except (RedisError, OSError):
            return False

    # --- Its two tasks ------------------------------------------------------------------------

    async def _keep_doing(self, step: Callable[[], Awaitable[None]]) -> None:
        is_away = False
        while True:
            try:
                await step()
                is_away = False
            except (RedisError, OSError) as error:
                if not is_away:
                    logger.warning("no real-time requests: redis away", error=str(error))
                is_away = True
                await asyncio.sleep(RETRY_SECONDS)
            except Exception:
                logger.exception("lane step failed")
                await asyncio.sleep(RETRY_SECONDS)

    async def _take(self) -> None:
        """Take one request, if there is room for one."""
        model = self._status.loaded
        if not self._has_room():
            await asyncio.sleep(PAUSE_SECONDS)
            return
        popped = await _in_time(self._redis.blpop([lane.queue_of(model)], timeout=BLOCK_SECONDS))
        if popped is None:
            return
        id = popped[1].decode()
        if model != self._status.loaded or not self._has_room():
            await _in_time(self._redis.lpush(lane.queue_of(model), id))  # for another worker
            return
        pipe = self._redis.pipeline()
        pipe.getdel(lane.request_of(id)).exists(lane.reader_of(id))
        text, reader = await _in_time(pipe.execute())
        if text is None or not reader:  # nobody waits for it any more
            return
        request = Request.decoded(text)
        # The model may have gone while Redis answered.
        is_here = self._host.engine is not None and model == self._status.loaded
        if self._ending is None and is_here:
            self._begin(request)
        else:
            await self._decline(request, self._ending or SWAPPED)

    def _has_room(self) -> bool:
        engine = self._host.engine
        if engine is None or self._shut or not self._may_take():
            return False
        return len(self._live) < max(1, engine.slots // 2)  # batches go on, if slowly

    async def _tick(self) -> None:
        """Say what this worker is there for, and end what nobody waits for."""
        now, lives = time.monotonic(), list(self._live.values())
        pipe = self._redis.pipeline(transaction=False)
        pipe.zrangebyscore(lane.ASKED, time.time() - ASKED_WITHIN, "inf", withscores=True)
        for live in lives:
            pipe.exists(lane.reader_of(live.request.id))
        if self._host.engine is not None and not self._shut and self._may_take():
            pipe.set(lane.ready_of(self._status.loaded), self.name, ex=lane.READY_SECONDS)
        if self._loading is not None:
            model, since = self._loading
            said = Loading(self.name, now - since).encoded()
            pipe.set(lane.loading_of(model), said, ex=lane.READY_SECONDS)
        for live in lives:
            if now - live.spoke_at > lane.ALIVE_SECONDS - TICK_SECONDS:
                _say(pipe, live.request, lane.ALIVE)
                live.spoke_at = now
        asked, *rest = await _in_time(pipe.execute())
        self.asked = {model.decode(): at for model, at in asked}
        for live, waited_for in zip(lives, rest, strict=False):
            if not waited_for:
                self._cut(live, None)
        await asyncio.sleep(TICK_SECONDS)

    # --- One request --------------------------------------------------------------------------

    def _begin(self, request: Request) -> None:
        engine = self._host.engine
        assert engine is not None
        live = Live(request, engine, self._clock.begin())
        self._live[request.id] = live
        self._status.in_flight += 1
        self._last_used = time.monotonic()
        live.task = asyncio.create_task(self._serve(live))
        live.task.add_done_callback(partial(self._landed, live))

    async def _decline(self, request: Request, why: Frame) -> None:
        """Answer what was taken and cannot be run."""
        self._book(request.id, None)
        pipe = self._redis.pipeline(transaction=False)
        _say(pipe, request, why)
        await _in_time(pipe.execute())

    def _cut(self, live: Live, why: Frame | None) -> None:
        if live.task is not None and not live.task.cancelling():
            live.cut_short = why
            live.task.cancel()

    async def _serve(self, live: Live) -> None:
        """Answer it, and say how it ended."""
        last: Frame | None
        try:
            async with asyncio.timeout(live.request.seconds):
                last = await self._answer(live)
        except Refused as refusal:
            live.usage = live.usage or refusal.answer.usage
            last = lane.answer(refusal.answer.status, refusal.answer.body)
        except EngineDied as error:
            if self._host.engine is live.engine:
                self._died(str(error))
            last = CRASHED if self._host.engine is live.engine else SWAPPED
        except TimeoutError:
            said = f"The answer took longer than {live.request.seconds:g} seconds."
            last = lane.error(504, said, code="timeout")
        except (ReaderGone, RedisError, OSError):
            return  # nobody can be told
        except asyncio.CancelledError:
            last = live.cut_short
        except Exception as error:
            # Without the error's own words: they may repeat the tenant's.
            logger.error("engine error", request_id=live.request.id, kind=type(error).__name__)
            last = FAILED
        live.is_free = last in OUR_FAULT and not live.chunks
        if last is not None:
            with suppress(ReaderGone, RedisError, OSError):
                # Nothing comes after it that could be too much, and a swap or a stop waits for it.
                await self._push(live, last, waits=False)

    async def _answer(self, live: Live) -> Frame:
        """Push what comes; returns the last frame."""
        request, body = live.request, orjson.loads(live.request.body)
        if not request.stream:
            answer = await live.engine.answer(request.endpoint, body, urgent=True)
            live.usage = answer.usage
            is_small = len(answer.body) <= lane.ANSWER_BYTES
            return lane.answer(answer.status, answer.body) if is_small else TOO_LARGE
        async with aclosing(live.engine.stream(request.endpoint, body)) as chunks:
            async for chunk in chunks:
                live.usage = chunk.usage or live.usage
                live.chunks += 1
                if chunk.data:
                    await self._push(live, Frame(Kind.CHUNK, chunk.data))
        return lane.END

    async def _push(self, live: Live, frame: Frame, *, waits: bool = True) -> None:
        """Hand the frame to the reader, waiting (if so told) for one that is far behind."""
        id = live.request.id
        pipe = self._redis.pipeline(transaction=False)
        pipe.exists(lane.reader_of(id))
        _say(pipe, live.request, frame)
        reader, unread, _ = await _in_time(pipe.execute())
        live.spoke_at = time.monotonic()
        while waits and reader and unread > lane.FRAMES_AT_MOST:
            await asyncio.sleep(PAUSE_SECONDS)
            pipe.exists(lane.reader_of(id)).llen(lane.reply_of(id))
            reader, unread = await _in_time(pipe.execute())
        if not reader:
            raise ReaderGone

    def _landed(self, live: Live, task: asyncio.Task[None]) -> None:
        """Count it out, and what it used."""
        gpu_seconds = self._clock.share(live.begun) * live.engine.gpus
        self._clock.end()
        del self._live[live.request.id]
        self._status.in_flight -= 1
        self._last_used = time.monotonic()
        used = None if live.is_free else live.used(gpu_seconds)
        if used is not None:
            self._status.answers += 1
            self._status.tokens += used.input_tokens + used.output_tokens
        self._book(live.request.id, used)

    def _book(self, id: str, used: quotas.Used | None) -> None:
        """Settle the request with what it used; None: it costs nothing."""
        settling = asyncio.create_task(self._settle(id, used))
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)

    async def _settle(self, id: str, used: quotas.Used | None) -> None:
        try:
            await self._database.run(quotas.settle, id, used)
        except Exception:
            logger.exception("usage not booked", request_id=id)


async def _in_time(command: Awaitable[Any]) -> Any:
    """What Redis answers; raises its own TimeoutError when that takes too long."""
    try:
        async with asyncio.timeout(REDIS_SECONDS):
            return await command
    except TimeoutError:
        raise RedisTimeoutError("no answer") from None


def _say(pipe: Any, request: Request, frame: Frame) -> None:
    """A frame at the end of the reply, which outlives the request by a minute at most."""
    reply = lane.reply_of(request.id)
    pipe.rpush(reply, frame.encoded())
    pipe.expire(reply, int(request.seconds) + 60)
