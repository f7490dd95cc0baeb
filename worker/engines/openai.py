"""Any OpenAI-compatible server as an engine: a `vllm serve` fleet, a gateway, a hosted service.

Only HTTP lives here: nothing of the queue, and nothing is started on this host.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson
import structlog

from worker.engines import streaming
from worker.engines.base import (
    Answer,
    Chunk,
    Engine,
    EngineAway,
    EngineDied,
    LoadFailed,
    ModelSpec,
    Refused,
    Usage,
)
from worker.engines.streaming import encoded

logger = structlog.get_logger(__name__)

RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504})
BUSY = frozenset({429, 503})
"""What a server says of itself, and not of a request."""
AWAY = BUSY | {502, 504}
"""What is said of a server that is away, but also of one that a single request was too much for."""
BODY_LIMIT = 64 * 1024 * 1024
"""Bytes of one answer, after decompression; a longer one is refused."""
EVENT_LIMIT = 4 * 1024 * 1024
"""Bytes of one event of a streamed answer."""
CONNECT_SECONDS = 30.0
LONGEST_PAUSE = 60.0
"""Seconds: cap of the pause before a retry, also of one that the server asked for."""
LOST = "The connection to the remote engine was lost"
OPTIONS: dict[str, float] = {
    "concurrency": 64,
    "max_retries": 5,
    "timeout_seconds": 600,
    "backoff_seconds": 0.5,
}
"""The `engine_args` there are, with their defaults."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back over HTTP; `pause` is how long the server asked to wait, in seconds."""

    status: int
    raw: bytes
    pause: float | None = None


class _TooLongError(Exception):
    """The body exceeds BODY_LIMIT, or an event EVENT_LIMIT."""


class OpenAIEngine(Engine):
    """One model behind one base URL, with or without `/v1` at its end."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.gpus = 0
        self.capacity = self.slots = int(OPTIONS["concurrency"])
        self._session: aiohttp.ClientSession | None = None
        self._alive_at = 0.0
        """`time.monotonic()` of the last sending that was answered."""

    async def check(self) -> None:
        self._settings()

    async def load(self) -> None:
        """Check the settings and the connection; raises LoadFailed."""
        await self.unload()
        self._settings()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self.capacity),
            timeout=aiohttp.ClientTimeout(total=self._timeout, sock_connect=CONNECT_SECONDS),
            headers={"Authorization": f"Bearer {self.spec.secret}"} if self.spec.secret else None,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )
        try:
            await self._greet()
        except BaseException:
            await self.unload()
            raise

    def _settings(self) -> None:
        args = self.spec.engine_args
        unknown = sorted(args.keys() - OPTIONS.keys())
        if unknown:
            raise LoadFailed(f"engine openai has no option {', '.join(unknown)}")
        self.capacity = self.slots = int(_number(args.get("concurrency"), "concurrency", 1))
        self._retries = int(_number(args.get("max_retries"), "max_retries", 0))
        self._timeout = _number(args.get("timeout_seconds"), "timeout_seconds", 0.001)
        self._backoff = _number(args.get("backoff_seconds"), "backoff_seconds", 0)
        self._root = _root(self.spec.base_url)

    async def _greet(self) -> None:
        """Ask for the model list. Not every server has one; every server can be reached."""
        try:
            reply = await self._send("GET", "/v1/models", None)
        except (aiohttp.ClientError, OSError, _TooLongError) as error:
            raise LoadFailed(f"cannot reach {self._root}: {self._reason(error)}") from error
        if reply.status in (401, 403):
            raise LoadFailed(f"{self._root} refuses the secret (HTTP {reply.status})")
        if reply.status >= 500 or 300 <= reply.status < 400:
            raise LoadFailed(f"{self._root} answers HTTP {reply.status}")

    async def answer(self, endpoint: str, body: dict[str, Any], *, urgent: bool = False) -> Answer:
        """Send one request, again where that may help.

        Raises EngineAway where nothing can be had of the remote engine. For `urgent` ones that is
        an answer: somebody waits for it, and may ask again.
        """
        if self._session is None:
            raise EngineDied(f"the engine of {self.spec.name} is not loaded")
        if body.get("stream"):
            return _error(400, "This request cannot be streamed", param="stream")
        try:
            payload = self._payload(body)
        except (ValueError, RecursionError):
            return _error(400, "The body cannot be written as JSON")
        try:
            return self._answer_of(await self._ask(endpoint, payload))
        except EngineAway:
            if not urgent:
                raise
            return _error(503, "The remote engine is away; try again soon", code="engine_away")

    def _payload(self, body: dict[str, Any]) -> bytes:
        """The body as the remote engine gets it, in which no tenant says who goes first there."""
        body = {name: value for name, value in body.items() if name != "priority"}
        if self.spec.source not in ("", "none"):
            body["model"] = self.spec.source
        return encoded(body)

    async def stream(self, endpoint: str, body: dict[str, Any]) -> AsyncGenerator[Chunk, None]:
        """Pass the remote's events on as they come. Nothing is tried again: somebody waits."""
        asked = streaming.Asked(body)
        try:
            payload = self._payload(streaming.with_usage(body))
        except (ValueError, RecursionError):
            raise Refused(_error(400, "The body cannot be written as JSON")) from None
        try:
            async with aclosing(self._events(endpoint, payload)) as events:
                async for event in events:
                    if event.get("error"):
                        raise Refused(self._error_of(Reply(502, b""), event))
                    if "model" in event:
                        event["model"] = self.spec.name
                    yield asked.chunk(event)
        except (aiohttp.ClientError, OSError, _TooLongError) as error:
            logger.warning("stream lost", engine=self._root, error=type(error).__name__)
            status = 502 if isinstance(error, _TooLongError) else 503
            raise Refused(_error(status, LOST)) from error

    async def _events(self, endpoint: str, payload: bytes) -> AsyncGenerator[dict[str, Any], None]:
        async with self._request("POST", endpoint, payload) as response:
            if response.status != 200:
                status = 503 if response.status in AWAY else response.status
                raise Refused(self._answer_of(Reply(status, await _bounded(response))))
            async for line in _lines(response):
                event = _decode(line.removeprefix(b"data:")) if line.startswith(b"data:") else None
                if isinstance(event, dict):
                    yield event

    async def _ask(self, endpoint: str, payload: bytes) -> Reply:
        """The first reply that is worth no retry, or the last one; raises EngineAway."""
        failed_at, why = 0.0, ""
        for attempt in range(self._retries + 1):
            began = time.monotonic()
            try:
                reply = await self._send("POST", endpoint, payload)
            except _TooLongError:
                return _made_up(502, f"The remote answer exceeds {BODY_LIMIT} bytes")
            except (aiohttp.ClientError, OSError) as error:
                if _is_slow(error):  # once more it would be as slow, and generated in vain
                    said = f"The remote engine did not answer in {self._timeout:g} seconds"
                    return _made_up(504, said)
                reply, why = _made_up(502, LOST), self._reason(error)
            else:
                why = f"HTTP {reply.status}"
            if reply.status not in RETRIED:
                self._alive_at = max(self._alive_at, began)
                return reply
            failed_at = failed_at or time.monotonic()
            if attempt < self._retries:
                await asyncio.sleep(self._pause(attempt, reply.pause))
        # What was sent after this one had failed, and was answered, shows that it is this one's
        # own trouble. What was sent before shows nothing: servers end what they have begun.
        if reply.status in BUSY or (reply.status in AWAY and self._alive_at < failed_at):
            raise EngineAway(f"{self._root} is away: {why}")
        return reply

    def _reason(self, error: Exception) -> str:
        return self._scrubbed(str(error)) or type(error).__name__

    def _pause(self, attempt: int, asked: float | None) -> float:
        """Seconds to wait: what the server asked for, else a random part of a doubling bound."""
        if asked is not None:
            return min(asked, LONGEST_PAUSE)
        return random.uniform(0, min(self._backoff * 2**attempt, LONGEST_PAUSE))  # noqa: S311

    async def _send(self, method: str, endpoint: str, payload: bytes | None) -> Reply:
        async with self._request(method, endpoint, payload) as response:
            return Reply(response.status, await _bounded(response), _asked_pause(response.headers))

    def _request(self, method: str, endpoint: str, payload: bytes | None) -> Any:
        if self._session is None:
            raise EngineDied(f"the engine of {self.spec.name} is not loaded")
        return self._session.request(
            method,
            self._root + endpoint,
            data=payload,
            headers={"Content-Type": "application/json"} if payload else None,
            allow_redirects=False,  # the secret and the tenant's text go to no other host
        )

    def _answer_of(self, reply: Reply) -> Answer:
        body = _decode(reply.raw)
        if reply.status >= 400:
            return self._error_of(reply, body)
        if reply.status != 200 or not isinstance(body, dict):
            return _error(502, f"The remote engine gave no JSON answer (HTTP {reply.status})")
        if "model" in body:
            body["model"] = self.spec.name
        return Answer(200, encoded(body), Usage.of(body.get("usage")))

    def _error_of(self, reply: Reply, body: Any) -> Answer:
        """The remote's error in OpenAI's shape, whatever shape it had."""
        if reply.status in (401, 403):  # about our secret, and nothing that a tenant can mend
            return _error(reply.status, "The remote engine refuses this portal's secret")
        error = body.get("error", body) if isinstance(body, dict) else None
        if not isinstance(error, dict) or not isinstance(error.get("message"), str):
            text = error if isinstance(error, str) else reply.raw[:500].decode(errors="replace")
            return _error(reply.status, self._scrubbed(text) or f"HTTP {reply.status}")
        return _error(
            reply.status,
            self._scrubbed(error["message"]),
            kind=error.get("type"),
            param=error.get("param"),
            code=error.get("code"),
        )

    def _scrubbed(self, text: str) -> str:
        return text.replace(self.spec.secret, "…") if self.spec.secret else text

    async def unload(self) -> None:
        """Close the connections. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def pids(self) -> list[int]:
        """None: the engine runs elsewhere."""
        return []


def _is_slow(error: Exception) -> bool:
    """Whether it was the answer that took too long, and not the connection."""
    is_late = isinstance(error, asyncio.TimeoutError)
    return is_late and not isinstance(error, aiohttp.ConnectionTimeoutError)


def _number(value: Any, name: str, least: float) -> float:
    """An option's value, or its default; LoadFailed when it is no number or too small."""
    if value is None:
        return OPTIONS[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
        raise LoadFailed(f"engine_args: {name} must be a number of at least {least:g}")
    return float(value)


def _root(base_url: str) -> str:
    """The address before `/v1`; raises LoadFailed for what is no plain web address."""
    try:
        parts = urlsplit(base_url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        known = False
    if not known:
        raise LoadFailed("base_url must be an http or https address")
    if parts.username or parts.password:
        raise LoadFailed("base_url must not hold a password: the secret has its own field")
    if parts.query or parts.fragment:
        raise LoadFailed("base_url must end with its path")
    return base_url.rstrip("/").removesuffix("/v1").rstrip("/")


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    raw = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        raw += chunk
        if len(raw) > BODY_LIMIT:
            raise _TooLongError
    return bytes(raw)


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The lines of a streamed answer, none of more than EVENT_LIMIT bytes."""
    rest = b""
    async for piece in response.content.iter_any():
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line
        if len(rest) > EVENT_LIMIT:
            raise _TooLongError


def _asked_pause(headers: Any) -> float | None:
    """Seconds that `retry-after-ms` or `retry-after` ask for, as OpenAI's clients read them."""
    for name, factor in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * factor
        except (KeyError, ValueError):
            continue
        return seconds if 0 <= seconds < float("inf") else None
    try:
        then = parsedate_to_datetime(headers["retry-after"])
    except (KeyError, ValueError, TypeError):
        return None
    return float(max(0.0, then.timestamp() - time.time()))


def _decode(raw: bytes) -> Any:
    for loads in (orjson.loads, json.loads):  # the second reads what the first is too strict for
        try:
            return loads(raw)
        except (ValueError, RecursionError):
            continue
    return None


def _made_up(status: int, message: str) -> Reply:
    return Reply(status, _error(status, message).body)


def _error(
    status: int, message: str, *, kind: Any = None, param: Any = None, code: Any = None
) -> Answer:
    kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
    error = {"message": message, "type": kind, "param": param, "code": code}
    return Answer(status, encoded({"error": error}))
