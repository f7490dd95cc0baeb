"""HTTP to addresses that tenants name: where it does not go, and that it ends."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests
from pytest_httpserver import HTTPServer

from accounts import network, outbound


@contextmanager
def dripping(first: bytes) -> Iterator[str]:
    """A server that says this, and then a byte now and then without end."""
    listening = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        while True:
            try:
                there, _ = listening.accept()
                there.recv(1000)
                there.sendall(first)
                while True:
                    there.sendall(b"1")
                    time.sleep(0.05)
            except OSError:
                if listening.fileno() < 0:
                    return

    threading.Thread(target=drip, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()


@pytest.mark.parametrize(
    "first",
    [
        b"HTTP/1.1 200 ",
        b"HTTP/1.1 200 OK\r\nX: ",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
    ],
)
def test_an_answer_that_drips_without_end_is_hung_up_on(
    first: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbound, "SECONDS", 0.5)
    with dripping(first) as url, pytest.raises(requests.RequestException):
        outbound.Session().get(url)


def test_redirects_have_no_time_of_their_own(
    httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbound, "SECONDS", 0.5)
    with dripping(b"HTTP/1.1 200 OK\r\nX: ") as url:
        httpserver.expect_request("/").respond_with_data(status=302, headers={"Location": url})
        with pytest.raises(requests.RequestException):
            outbound.Session().get(httpserver.url_for("/"))


def test_addresses_that_do_not_answer_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [(2, 1, 6, "", (f"192.0.2.{number}", 443)) for number in range(100)]
    tried = []

    def away(address: Any, timeout: float) -> Any:
        tried.append(address)
        clock[0] += timeout
        raise TimeoutError

    clock = [0.0]
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *_, **__: many)
    monkeypatch.setattr(network.socket, "create_connection", away)
    monkeypatch.setattr(network.time, "monotonic", lambda: clock[0])
    with pytest.raises(TimeoutError, match="too long"):
        network.connect("many.test", 443, network.Deadline(10), timeout=5, public=False)
    assert len(tried) == 2


@pytest.mark.parametrize(
    "url", ["http://a..b/", f"http://{'a' * 80}/", "http://", "http://[::1", "http://x\r\n.test/"]
)
def test_what_is_no_address_is_told(url: str) -> None:
    with pytest.raises(requests.RequestException):
        outbound.Session().get(url)


def test_a_header_that_cannot_be_sent_is_told(httpserver: HTTPServer) -> None:
    with pytest.raises(requests.RequestException):
        outbound.Session().get(httpserver.url_for("/"), headers={"Authorization": "Bearer \u1234"})


@pytest.mark.parametrize(
    ("scheme", "host", "port", "may"),
    [
        ("https", "idp.internal", 443, True),
        ("https", "idp.internal", 8443, False),
        ("http", "idp.internal", 443, False),
        ("http", "idp.internal", 80, False),
        ("https", "other.internal", 443, False),
        ("http", "listed.internal", 8080, True),
    ],
)
def test_in_production_only_the_sites_own_origin_and_listed_hosts_may_be_private(
    settings: Any, scheme: str, host: str, port: int, may: bool
) -> None:
    settings.PRODUCTION = True
    settings.OIDC_ISSUER = "https://idp.internal/realms/main"
    settings.TRUSTED_ISSUER_PRIVATE_HOSTS = ["listed.internal"]
    assert outbound.may_be_private(scheme, host, port) is may
