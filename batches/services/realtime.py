"""Real-time requests on the web's side: who is let in, and the way of each to a worker and back.

A thread of a web process waits for each answer. What it used is booked by the worker, whether or
not anybody still waits; how both talk is in `batches/lane.py`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any

import structlog
from django.conf import settings
from django_scopes import scopes_disabled
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from accounts.access import Caller
from accounts.errors import Unavailable
from accounts.services import quotas
from batches import lane, wakeups
from batches.lane import Frame, Loading, Request
from batches.queries import queue as queries
from models_registry.models import Model
from models_registry.queries import prices_of

logger = structlog.get_logger(__name__)

BLOCK_SECONDS = 1.0
"""How often is looked whether the client is still there, and the worker."""
RENEW_SECONDS = 5.0
WAKE_SECONDS = 5.0
"""Workers are not woken more often than this for one model."""
LONGEST_RETRY = 120
"""Seconds: with a later Retry-After OpenAI's clients give up at once."""


class ClientGone(Exception):
    """Who asked has hung up."""


def unavailable(message: str, *, code: str, retry_after: float) -> Unavailable:
    """A 503 that says when to try again, in seconds."""
    refusal = Unavailable(message, code=code)
    refusal.headers["Retry-After"] = str(min(max(1, ceil(retry_after)), LONGEST_RETRY))
    return refusal


class Gate:
    """How many real-time requests this process has under way, so that threads are left for others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: Counter[str] = Counter()

    def enter(self, organization: str) -> None:
        """Raises `Unavailable` when too many are inside, in all or of the organization."""
        with self._lock:
            if self._inside[organization] >= settings.LANE_THREADS_OF_ONE:
                whose = "Your organization has"
            elif self._inside.total() >= settings.LANE_THREADS:
                whose = "There are"
            else:
                self._inside[organization] += 1
                return
        said = f"{whose} as many real-time requests under way as can be; try again in a moment."
        raise unavailable(said, code="too_many_requests_under_way", retry_after=1)

    def leave(self, organization: str) -> None:
        with self._lock:
            self._inside[organization] -= 1
            self._inside += Counter()  # forgets those at 0


GATE = Gate()


@dataclass(eq=False)
class Call:
    """A real-time request from its being let in until `close`, which may be called again."""

    request: Request
    organization: str
    is_gone: Callable[[], bool]
    is_open: bool = True
    is_reserved: bool = False
    is_sent: bool = False

    def send(self, model: Model) -> None:
        """Put it before the model's workers; raises `Unavailable` where there is none."""
        loading = _ask(model.name)
        if loading is not None:
            raise _not_loaded(model, loading)
        id = self.request.id
        pipe = _redis().pipeline()
        pipe.set(lane.reader_of(id), 1, ex=lane.SILENCE_SECONDS)
        pipe.set(lane.request_of(id), self.request.encoded(), ex=2 * lane.WAIT_SECONDS)
        pipe.rpush(lane.queue_of(model.name), id)
        pipe.expire(lane.queue_of(model.name), 2 * lane.WAIT_SECONDS)
        self.is_sent = True
        pipe.execute()

    def frames(self) -> Iterator[Frame]:
        """What the worker says, as it says it.

        Raises `ClientGone`; and `Unavailable` when nobody takes the request, or the worker falls
        silent, or Redis does.
        """
        try:
            yield from self._frames()
        except (RedisError, OSError) as error:
            raise _redis_away(error) from error

    def _frames(self) -> Iterator[Frame]:
        redis, began = _redis(), time.monotonic()
        heard, renewed, is_taken = began, began, False
        while True:
            popped: Any = redis.blpop([lane.reply_of(self.request.id)], timeout=BLOCK_SECONDS)
            now = time.monotonic()
            if self.is_gone():
                raise ClientGone
            if popped is not None:
                heard, is_taken = now, True
                yield Frame.decoded(popped[1])
            elif not is_taken and now - began > lane.WAIT_SECONDS:
                self._give_up_waiting()
                heard, is_taken = now, True
            elif is_taken and now - heard > lane.SILENCE_SECONDS:
                raise unavailable("The worker fell silent.", code="worker_lost", retry_after=1)
            if now - renewed > RENEW_SECONDS:
                redis.set(lane.reader_of(self.request.id), 1, ex=lane.SILENCE_SECONDS)
                renewed = now

    def _give_up_waiting(self) -> None:
        """Take the request back; if that is too late, a worker has just taken it."""
        if _redis().delete(lane.request_of(self.request.id)):
            self.is_sent = False
            said = f"No worker had room for this within {lane.WAIT_SECONDS} seconds."
            raise unavailable(said, code="workers_busy", retry_after=2)

    def close(self) -> None:
        """Nobody waits any more: a worker that still answers will stop."""
        if not self.is_open:
            return
        self.is_open = False
        try:
            if not (self.is_sent and self._was_taken()) and self.is_reserved:
                quotas.settle(self.request.id)
        finally:
            GATE.leave(self.organization)

    def _was_taken(self) -> bool:
        """Clean up; whether a worker has taken it, and will book what it used."""
        id = self.request.id
        pipe = _redis().pipeline()
        pipe.delete(lane.request_of(id))
        pipe.delete(lane.reader_of(id), lane.reply_of(id))
        try:
            was_there, _ = pipe.execute()
        except (RedisError, OSError):
            return True  # nobody knows: the sweep clears away what is still reserved much later
        return not was_there


def begin(
    *, actor: Caller, request: Request, model: Model, tokens: int, is_gone: Callable[[], bool]
) -> Call:
    """Let a request in, count it, and put it before the workers; the caller must `close` it.

    `tokens` is the estimate of what it will use. Raises `QuotaExceeded` and `Unavailable`.
    """
    GATE.enter(actor.organization.pk)
    call = Call(request, actor.organization.pk, is_gone)
    try:
        estimate = quotas.Estimate(
            model=model.name, requests=1, tokens=tokens, prices=prices_of(model)
        )
        quotas.open_request(request_id=request.id, actor=actor, estimate=estimate)
        call.is_reserved = True
        call.send(model)
    except (RedisError, OSError) as error:
        call.close()
        raise _redis_away(error) from error
    except BaseException:
        call.close()
        raise
    return call


@cache
def _redis() -> Redis:
    return Redis.from_url(
        settings.CELERY_BROKER_URL,
        socket_connect_timeout=1,
        socket_timeout=10,
        # A frame that is popped twice is lost once: what fails is told.
        retry=Retry(NoBackoff(), 0),
    )


def _redis_away(error: Exception) -> Unavailable:
    logger.warning("real-time request lost: redis away", error=str(error))
    said = "Real-time requests go through Redis, which cannot be reached; batches are not affected."
    return unavailable(said, code="redis_unavailable", retry_after=3)


def _ask(model: str) -> bytes | None:
    """Note that the model is asked for; None if a worker has it ready, else who loads it, if any.

    Raises `Unavailable` when too many wait for it already.
    """
    now = time.time()
    pipe = _redis().pipeline(transaction=False)
    pipe.zscore(lane.ASKED, model)
    pipe.zadd(lane.ASKED, {model: now})
    pipe.exists(lane.ready_of(model))
    pipe.llen(lane.queue_of(model))
    pipe.get(lane.loading_of(model))
    before, _, ready, waiting, loading = pipe.execute()
    if not ready:
        if before is None or now - before > WAKE_SECONDS:
            wakeups.gpu_workers()
        return loading or b""
    if waiting >= lane.QUEUE_AT_MOST:
        said = f"{waiting} requests wait for this model already."
        raise unavailable(said, code="queue_full", retry_after=2)
    return None


def _not_loaded(model: Model, loading: bytes) -> Unavailable:
    """Why the model answers nobody now, and when it may."""
    seconds = queries.load_seconds(model)
    code = "model_not_loaded"
    if loading:
        it = Loading.decoded(loading)
        left = max(seconds - it.seconds, 2.0)
        said = f"{model.name} is being loaded on {it.worker}, for about {ceil(left)} s more."
        return unavailable(said, code=code, retry_after=left)
    with scopes_disabled():
        fit, free = queries.workers_for(model)
    if not fit:
        said = f"No worker is running that {model.name} fits."
        return unavailable(said, code=code, retry_after=LONGEST_RETRY)
    if model.load_error:
        said = (
            f"{model.name} could not be loaded the last time. It is tried again from time to time."
        )
        return unavailable(said, code=code, retry_after=60)
    if free:
        said = f"{model.name} is not loaded; a free worker loads it now, which takes about {ceil(seconds)} s."
        return unavailable(said, code=code, retry_after=seconds)
    said = (
        f"{model.name} is not loaded, and no worker is free: those that it fits run batches of other"
        " models. It is loaded when one has nothing else to do; a batch has its turn before that."
    )
    return unavailable(said, code=code, retry_after=LONGEST_RETRY)
