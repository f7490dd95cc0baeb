"""Where a webhook may be sent: what its address may look like, and what it may resolve to."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from django_scopes import scopes_disabled
from pytest_httpserver import HTTPServer

from accounts import network
from accounts.errors import BadRequest
from batches import webhooks
from batches.models import WebhookEndpoint
from batches.services.webhooks import create_webhook
from batches.webhooks import Sender
from tests.conftest import Person

REFUSED = [
    "",
    "ftp://example.com/",
    "file:///etc/passwd",
    "gopher://example.com/",
    "javascript:alert(1)",
    "//example.com/",
    "http://",
    "http:///path",
    "https://user@example.com/",
    "https://user:pass@example.com/",
    "https://example.com/#fragment",
    "https://example.com\\@127.0.0.1/",
    "https://exa mple.com/",
    "https://example.com/\r\nHost: evil",
    "https://exämple.com/",
    "https://example.com:0/",
    "https://example.com:99999/",
    "https://example.com:22/",
    "https://example.com:6379/",
    "http://localhost/",
    "http://LOCALHOST/",
    "http://127.0.0.1/",
    "http://127.0.0.1:80/",
    "http://127.1/",
    "http://0/",
    "http://0.0.0.0/",
    "http://0x7f000001/",
    "http://0x7f.0.0.1/",
    "http://017700000001/",
    "http://2130706433/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://192.168.1.1/",
    "http://100.64.0.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://[::1]/",
    "http://[::]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:a9fe:a9fe]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[64:ff9b::a9fe:a9fe]/",
    "http://[2002:7f00:1::]/",
    "http://[fe80::1]/",
    "http://[fc00::1]/",
    "http://[ff02::1]/",
    "http://[fd00:ec2::254]/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
    "http://198.18.0.1/",
    "http://192.0.2.1/",
    "http://metadata/",
    "https://example.com/" + "a" * 2000,
    "https:example.com/",
    "http:///127.0.0.1/",
    "http://example.com:80:80/",
    "http://example.com:-80/",
    "http://example.com%2f@127.0.0.1/",
    "http://127%2e0%2e0%2e1/",
    "http://1.1.1.1%2e/",
    "http://%6c%6fcalhost/",
    "http://example.com;127.0.0.1/",
    "http://[::1",
    "http://[::1]x/",
    "http://[fe80::1%25eth0]/",
    "http://[2606:4700:4700::1111%25lo]/",
    "http://127.0.0.1./",
    "http://localhost./",
    "http://0177.0.0.1/",
    "http://0x7f000001./",
    "http://127.0.1/",
    "http://1.1.257/",
    "http://4294967295/",
    "http://00000000000000000177.1/",
    "http://[::127.0.0.1]/",
    "http://[::ffff:0:127.0.0.1]/",
    "http://[0:0:0:0:0:ffff:0a00:0001]/",
    "http://[64:ff9b:1::10.0.0.1]/",
    "http://[64:ff9b::100.64.0.1]/",
    "http://[2002:a9fe:a9fe::]/",
    "http://[2001:0:7f00:1::]/",
    "http://[2001:db8::1]/",
    "http://[3fff::1]/",
    "http://[fec0::1]/",
    "http://[100::1]/",
    "http://100.127.255.254/",
    "http://192.88.99.1/",
    "http://240.0.0.1/",
    "http://192.0.0.192/",
    "http://168.63.129.16/",
    "http://100.100.100.200/",
    "http://203.0.113.9/",
    "http://\u2460\u2461\u2466.0.0.1/",
    "http://127\u30020\u30020\u30021/",
    "http://\u200b127.0.0.1/",
]


@pytest.fixture(autouse=True)
def _none_is_listed(settings: Any) -> None:
    settings.WEBHOOK_PRIVATE_HOSTS = []


@pytest.mark.parametrize("url", REFUSED)
def test_an_address_that_no_webhook_may_have_is_refused(url: str) -> None:
    with pytest.raises(BadRequest) as caught:
        webhooks.require_allowed(url)
    assert caught.value.param == "url"


@pytest.fixture
def _nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be looked up or connected to."""

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("it went to the network")

    monkeypatch.setattr(network.socket, "getaddrinfo", fail)
    monkeypatch.setattr(network.socket, "create_connection", fail)


@pytest.mark.usefixtures("_nowhere")
@pytest.mark.parametrize("url", REFUSED)
def test_nor_is_anything_sent_there(url: str) -> None:
    receipt = webhooks.send(url, b"{}", {}, timeout=5)
    assert (receipt.status, receipt.ok, bool(receipt.error)) == (None, False, True)
    assert "network" not in receipt.error


@pytest.mark.django_db
def test_none_of_them_can_be_saved_nor_is_sent_to_had_it_been(
    owner: Person,
) -> None:
    """By the service itself; what was saved before a rule was made is refused when it is sent."""
    given: dict[str, Any] = {"event_types": ["batch.failed"], "project": None, "name": "hook"}
    receipts = []
    for url in filter(None, REFUSED):  # that there is one at all is the schema's and the form's
        with pytest.raises(BadRequest) as caught:
            create_webhook(actor=owner.caller, url=url, **given)
        assert caught.value.param == "url"
        with Sender(url, 5, side_by_side=1) as sender:
            receipts += sender.send_all([(b"{}", {})])
    assert [receipt.status for receipt in receipts] == [None] * (len(REFUSED) - 1)
    with scopes_disabled():
        assert WebhookEndpoint.objects.count() == 0


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/",
        "http://example.com:80/hook?token=1",
        "https://1.1.1.1/",
        "https://[2606:4700:4700::1111]/hook",
        "https://hooks.example.co.uk./x",
        "https://xn--exmple-cua.com/",
        "https://my_host-1.example.com/",
    ],
)
def test_an_address_of_the_internet_is_allowed(url: str) -> None:
    webhooks.require_allowed(url)


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `rebound.test` resolves to, one answer a look."""
    answers: list[str] = []

    def look(host: str, port: int, **_: Any) -> list[Any]:
        assert host == "rebound.test"
        family = socket.AF_INET6 if ":" in answers[0] else socket.AF_INET
        return [(family, socket.SOCK_STREAM, 6, "", (answers.pop(0), port))]

    monkeypatch.setattr(socket, "getaddrinfo", look)
    return answers


@pytest.mark.parametrize("private", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1"])
def test_a_name_that_resolves_to_a_private_address_is_refused(
    private: str, resolver: list[str]
) -> None:
    resolver.append(private)
    with pytest.raises(BadRequest, match="private address"):
        webhooks.require_reachable("https://rebound.test/")


def test_a_name_that_was_public_when_saved_is_looked_at_again_with_each_delivery(
    resolver: list[str],
) -> None:
    resolver += ["1.1.1.1", "127.0.0.1"]
    webhooks.require_reachable("http://rebound.test/")
    receipt = webhooks.send("http://rebound.test/", b"{}", {}, timeout=5)
    assert (receipt.status, receipt.error) == (None, "rebound.test has a private address")
    assert resolver == []


def test_the_address_that_was_looked_at_is_the_one_that_is_connected_to(
    resolver: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []

    def connect(address: Any, **_: Any) -> Any:
        tried.append(address)
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(network.socket, "create_connection", connect)
    resolver += ["1.1.1.1", "127.0.0.1"]
    assert webhooks.send("http://rebound.test/", b"{}", {}, timeout=5).status is None
    assert (tried, resolver) == ([("1.1.1.1", 80)], ["127.0.0.1"])


def test_one_private_address_among_others_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [(2, 1, 6, "", (each, 80)) for each in ("1.1.1.1", "10.0.0.1")]
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *_, **__: both)
    with pytest.raises(BadRequest, match="private address"):
        webhooks.require_reachable("http://both.test/")
    receipt = webhooks.send("http://both.test/", b"{}", {}, timeout=5)
    assert receipt.error == "both.test has a private address"


def test_a_redirect_into_the_own_networks_is_an_answer_and_no_more(
    settings: Any, httpserver: HTTPServer
) -> None:
    settings.WEBHOOK_PRIVATE_HOSTS = [f"{httpserver.host}:{httpserver.port}"]
    there = {"Location": httpserver.url_for("/inner")}
    httpserver.expect_request("/hook").respond_with_data("see there", status=307, headers=there)
    receipt = webhooks.send(httpserver.url_for("/hook"), b"{}", {}, timeout=5)
    assert (receipt.status, receipt.ok, len(httpserver.log)) == (307, False, 1)


def test_the_operator_may_list_receivers_of_the_own_networks(settings: Any) -> None:
    settings.WEBHOOK_PRIVATE_HOSTS = ["10.0.0.5", "hooks.local:8080"]
    webhooks.require_allowed("http://10.0.0.5:9000/")
    webhooks.require_allowed("http://hooks.local:8080/")
    for url in ("http://10.0.0.6/", "http://hooks.local:8081/"):
        with pytest.raises(BadRequest):
            webhooks.require_allowed(url)
