"""Somebody's receiver of webhooks, which keeps what came and answers, fails or hangs as it is told.

A thread of the test's own process; connections stay open between requests, as most servers' do.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Came:
    """One request."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


Answer = Callable[[Came], int | None]
"""The status of the answer; None: the sender is left waiting."""


def thanks(_: Came) -> int:
    return 200


@dataclass
class Receiver:
    answer: Answer = thanks
    came: list[Came] = field(default_factory=list)
    raw: bytes = b""
    """Said in place of any answer, after which the connection is closed."""
    port: int = 0
    connections: int = 0
    transports: list[asyncio.Transport] = field(default_factory=list)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def url(self, path: str = "/hook") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def drop(self) -> None:
        """Close all connections, as a server does with those that nobody uses."""

        async def close() -> None:
            for transport in self.transports:
                transport.abort()

        asyncio.run_coroutine_threadsafe(close(), self.loop).result(10)

    def take(self, came: Came) -> int | None:
        self.came.append(came)
        return self.answer(came)


class _Connection(asyncio.Protocol):
    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._read = bytearray()
        receiver.connections += 1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._receiver.transports.append(transport)

    def data_received(self, data: bytes) -> None:
        self._read += data
        head, blank, rest = bytes(self._read).partition(b"\r\n\r\n")
        if not blank:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (li.partition(": ") for li in lines)}
        if len(rest) < int(headers["content-length"]):
            return
        self._read.clear()
        if self._receiver.raw:
            self._transport.write(self._receiver.raw)
            self._transport.close()
            return
        status = self._receiver.take(Came(first.split()[1], headers, rest))
        if status is not None:
            said = f"HTTP/1.1 {status} Said\r\nContent-Length: 2\r\n\r\nok"
            self._transport.write(said.encode())


@contextmanager
def receiving(answer: Answer = thanks, *, raw: bytes = b"") -> Iterator[Receiver]:
    receiver = Receiver(answer, raw=raw)
    loop = receiver.loop
    making = loop.create_server(lambda: _Connection(receiver), "127.0.0.1", 0, backlog=1000)
    server = loop.run_until_complete(making)
    receiver.port = server.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.drop()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()  # not under the loop's hands: it is closed by one thread at a time
        loop.close()
