"""A network that can be cut: a TCP proxy on loopback, for tests of what workers do without a server."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit, urlunsplit

_ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset


class Proxy:
    """Passes bytes between its own port and the server of `url`, until the network is cut.

    `url` is the same URL through the proxy.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._server = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        user, at, _ = parts.netloc.rpartition("@")
        self.url = urlunsplit(parts._replace(netloc=f"{user}{at}127.0.0.1:{self.port}"))
        self.closed = False
        self._flowing = threading.Event()
        self._flowing.set()
        self._swallowing = self._refusing = False
        self._links: list[_Link] = []
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def stall(self) -> None:
        """Nothing passes; what is sent meanwhile arrives after `mend`, as TCP sends it again."""
        self._flowing.clear()

    def swallow(self) -> None:
        """What is sent is taken and lost: the connections of that time stay open and mute for ever."""
        self._swallowing = True
        for link in self._links:
            link.mute = True

    def reset(self) -> None:
        """Every connection is reset, and so is every new one."""
        self._refusing = True
        for link in self._links:
            link.abort()

    def mend(self) -> None:
        self._swallowing = self._refusing = False
        self._flowing.set()

    def close(self) -> None:
        self.closed = True
        with suppress(OSError):  # the thread that waits in it
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._flowing.set()
        for link in self._links:
            link.abort()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            link = _Link(client, mute=self._swallowing)
            self._links.append(link)
            if self._refusing:
                link.abort()
            else:
                threading.Thread(target=self._connect, args=(link,), daemon=True).start()

    def _connect(self, link: _Link) -> None:
        self._flowing.wait()
        try:
            link.sockets.append(socket.create_connection(self._server))
        except OSError:
            link.abort()
            return
        client, server = link.sockets
        threading.Thread(target=self._pump, args=(link, client, server), daemon=True).start()
        self._pump(link, server, client)

    def _pump(self, link: _Link, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._flowing.wait()
                if not link.mute:
                    sink.sendall(data)
        self._flowing.wait()
        if not link.mute:  # who is mute does not say that it goes, either
            link.close()


class _Link:
    """One client's connection, and ours to the server for it."""

    def __init__(self, client: socket.socket, *, mute: bool) -> None:
        self.sockets = [client]
        self.mute = mute

    def close(self) -> None:
        for each in self.sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def abort(self) -> None:
        for each in self.sockets:
            with suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        self.close()


@contextmanager
def proxied(url: str) -> Iterator[Proxy]:
    proxy = Proxy(url)
    try:
        yield proxy
    finally:
        proxy.close()
