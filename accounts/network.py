"""Connections to hosts that tenants name: where they may not lead, and when they end.

What is said over them is in `federation.py` (others' keys) and `outbound.py` (their sign-in).
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_RESERVED = [
    ipaddress.ip_network(each)
    for each in ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20", "168.63.129.16/32")
]
"""Nobody's, though `is_global` of some Pythons takes them: RFC 6890, RFC 7526, RFC 9637. The last is
a cloud's own, which answers its virtual machines only, as does 192.0.0.192."""


class Deadline:
    """So many seconds for a piece of work; then its connections are hung up.

    Timeouts of a socket are for each byte, and who sends one now and then would hold us for hours.
    """

    def __init__(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds
        self._watched: list[socket.socket] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._hang_up)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        with self._lock:
            for each in self._watched:
                each.close()
            self._watched.clear()

    @property
    def left(self) -> float:
        return max(self._ends - time.monotonic(), 0)

    def require_left(self) -> None:
        """Raise `TimeoutError` once it is over: what was read since may be half of it."""
        if not self.left:
            raise TimeoutError("it takes too long")

    def watch(self, there: socket.socket) -> None:
        """Hang this connection up when it is over; by a copy, as TLS takes the socket itself."""
        with self._lock:
            self._watched.append(there.dup())
        if not self.left:
            self._hang_up()

    def _hang_up(self) -> None:
        with self._lock:
            for each in self._watched:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)


def connect(
    host: str, port: int, deadline: Deadline, *, timeout: float, public: bool
) -> socket.socket:
    """A connection to the very address that was looked at: no second answer of the DNS counts.

    With `public` only to the internet's addresses; `timeout` in seconds, for each byte.
    """
    failed = OSError(f"{host} has no address")
    for address in addresses_of(host, port, public=public):
        deadline.require_left()
        try:
            there = socket.create_connection((address, port), timeout=min(timeout, deadline.left))
        except OSError as error:
            failed = error
            continue
        there.settimeout(timeout)
        deadline.watch(there)
        return there
    raise failed


def addresses_of(host: str, port: int, *, public: bool) -> list[str]:
    """The host's addresses; with `public` refused if any of them is not the internet's."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise OSError(f"{host} is not known") from None
    addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
    if public and not all(is_public(each) for each in addresses):
        raise OSError(f"{host} has a private address")
    return addresses


def is_public(text: str) -> bool:
    """Whether an IP address is one of the internet's, also inside IPv6's dresses of IPv4."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if address not in _UNICAST:
            return False
    reserved = any(address in each for each in _RESERVED)
    return address.is_global and not address.is_multicast and not reserved
