"""HTTP to addresses that tenants name: what they may not make the portal reach or wait for.

The connections themselves are made in `network.py`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextvars import ContextVar
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import urlsplit

import requests
from django.conf import settings
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import NewConnectionError

from accounts import network
from accounts.network import Deadline

SECONDS = 10
"""For one request with all that it is redirected to."""
TIMEOUT = 5
LARGEST = 1024 * 1024
_PORTS = {"http": 80, "https": 443}
MayBePrivate = Callable[[str, str, int], bool]
"""Of a scheme, host and port: whether it may lead into the portal's own networks."""
Connected = Callable[[socket.socket], None]
_request: ContextVar[tuple[Deadline, MayBePrivate, Connected]] = ContextVar("request")


def may_be_private(scheme: str, host: str, port: int) -> bool:
    """Whether an address of the portal's own networks will do: in production, where it is listed.

    The operator may name such hosts; the site's own provider is one, at its very origin.
    """
    if not settings.PRODUCTION or host in settings.TRUSTED_ISSUER_PRIVATE_HOSTS:
        return True
    own = urlsplit(settings.OIDC_ISSUER)
    own_port = own.port or _PORTS.get(own.scheme)
    return (scheme, host, port) == (own.scheme, own.hostname, own_port)


class _Watched(HTTPConnection):
    scheme = "http"

    def _new_conn(self) -> socket.socket:
        host, port = self.host.strip("[]").lower(), self.port or _PORTS[self.scheme]
        deadline, may_be_private, connected = _request.get()
        public = not may_be_private(self.scheme, host, port)
        try:
            there = network.connect(host, port, deadline, timeout=TIMEOUT, public=public)
        except OSError as error:
            raise NewConnectionError(self, f"{host}: {error}") from error
        connected(there)
        return there


class _WatchedTLS(_Watched, HTTPSConnection):
    scheme = "https"


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Watched


class _PoolTLS(HTTPSConnectionPool):
    ConnectionCls = _WatchedTLS


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _PoolTLS}


class Session(requests.Session):
    """requests' own, which looks where it connects to, and takes so many bytes and seconds.

    An answer that is larger is refused, or with `cut` only its beginning is kept. With `keep` its
    connection stays open for the next request, which has to be of the same thread and origin, and
    without redirects. Raises `requests.RequestException` for all that goes wrong.
    """

    def __init__(
        self,
        *,
        seconds: float | None = None,
        largest: int | None = None,
        cut: bool = False,
        keep: bool = False,
        may_be_private: MayBePrivate = may_be_private,
    ) -> None:
        super().__init__()
        self._seconds, self._largest, self._cut = seconds or SECONDS, largest or LARGEST, cut
        self._may_be_private, self._keep = may_be_private, keep
        self._kept: list[socket.socket] = []
        self.trust_env = False  # neither proxies nor passwords of this machine
        self.max_redirects = 3
        if keep:
            self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        for scheme in ("http://", "https://"):
            self.mount(scheme, _Adapter())

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        with Deadline(self._seconds) as deadline:
            for each in self._kept:
                deadline.watch(each)  # it ends with this request's time, not with its first one's
            before = _request.set((deadline, self._may_be_private, self._connected))
            keep = False
            try:
                response = self._answered(deadline, *args, **kwargs)
                keep = self._keep
            except (OSError, UnicodeError) as error:
                if not deadline.left:  # hung up on by ourselves, however that looked
                    raise requests.Timeout("it takes too long") from error
                if isinstance(error, requests.RequestException):
                    raise
                raise requests.RequestException(str(error)) from error
            finally:
                _request.reset(before)
                if not keep:
                    self.close()
        return response

    @property
    def is_connected(self) -> bool:
        """Whether a connection was kept; its other end may have closed it since."""
        return bool(self._kept)

    def close(self) -> None:
        super().close()
        self._forget()

    def _connected(self, there: socket.socket) -> None:
        """Remember it by a copy, as TLS takes the socket itself; the one before it is over."""
        self._forget()
        if self._keep:
            self._kept.append(there.dup())

    def _forget(self) -> None:
        for each in self._kept:
            each.close()
        self._kept.clear()

    def _answered(self, deadline: Deadline, *args: Any, **kwargs: Any) -> requests.Response:
        content = bytearray()
        with super().request(*args, **{"timeout": TIMEOUT, **kwargs, "stream": True}) as response:
            for part in response.iter_content(min(self._largest, 64 * 1024)):
                content += part
                if len(content) > self._largest:
                    break
        deadline.require_left()
        if len(content) > self._largest and not self._cut:
            raise requests.RequestException("The answer is too large")
        response._content = bytes(content[: self._largest])
        return response
