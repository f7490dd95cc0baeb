"""Where a handler may connect to: the internet, on some ports, and what the operator lists.

As for webhooks (`batches/webhooks.py`), whose addresses are URLs that we fetch ourselves; here other
libraries connect, so they are given the address that was looked at.
"""

from __future__ import annotations

import socket

from django.conf import settings

from accounts import network
from batches.handlers.results import HandlerFailed

CONNECT_SECONDS = 10.0


def may_be_private(host: str, port: int) -> bool:
    """Whether the operator lists this host of the own networks, as `host` or `host:port`."""
    listed = settings.HANDLER_PRIVATE_HOSTS
    return host in listed or f"{host}:{port}" in listed


def address_of(host: str, port: int) -> str:
    """The address to connect to; raises `HandlerFailed` for where handlers may not go."""
    private = may_be_private(host, port)
    if not private and port not in settings.HANDLER_PORTS:
        allowed = ", ".join(map(str, sorted(settings.HANDLER_PORTS)))
        raise HandlerFailed(f"Handlers may connect to these ports: {allowed}.", final=True)
    try:
        return network.addresses_of(host, port, public=not private)[0]
    except OSError as error:
        said = f"{error}: handlers connect to the internet only."
        raise HandlerFailed(said) from None


def connect(host: str, port: int) -> socket.socket:
    """A connection to the very address that was looked at."""
    return socket.create_connection((address_of(host, port), port), timeout=CONNECT_SECONDS)
