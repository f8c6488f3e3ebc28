from typing import Any

import pytest

from codomyrmex.events.streaming.hub.hosts import Hosts
from codomyrmex.events.streaming.hub.http import Refusal, Request


def request(
    host: str | None,
    origin: str | None = None,
    *,
    scheme: str = "http",
) -> Request:
    async def nothing(*_: Any) -> Any:
        raise AssertionError

    headers = [(b"host", host.encode("latin-1"))] if host is not None else []
    if origin is not None:
        headers.append((b"origin", origin.encode("latin-1")))
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "query_string": b"",
        "headers": headers,
        "scheme": scheme,
    }
    return Request(scope, nothing, nothing)


def refusal(hosts: Hosts, asked: Request) -> Refusal:
    with pytest.raises(Refusal) as caught:
        hosts.check(asked)
    return caught.value


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:8000",
        "127.3.2.1:8000",
        "localhost:8000",
        "LocalHost:8000",
        "localhost.:8000",
        "app.localhost:8000",
        "[::1]:8000",
        "localhost:9000",  # a tunnel's
        "localhost",  # port 80
    ],
)
def test_loopback_names_are_served(host: str) -> None:
    assert Hosts().check(request(host)) is None


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:8000",
        "evil.example",
        "127.0.0.1.evil.example:8000",
        "localhost.evil.example:8000",
        "evillocalhost:8000",
        "192.168.1.2:8000",
        "0.0.0.0:8000",
        "[::2]:8000",
        "2130706433:8000",
        "128.0.0.1:8000",
    ],
)
def test_other_names_are_refused(host: str) -> None:
    error = refusal(Hosts(), request(host))
    assert error.status == 403
    assert "--allow-host" in error.reason


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        ":8000",
        "local host:8000",
        "localhost:0",
        "localhost:65536",
        "localhost:8000:8000",
        "localhost:80x",
        "localhost:",
        "user@localhost:8000",
        "localhost:8000/",
        "[::1:8000",
        "[localhost]:8000",
        ".:8000",
        "localhost:8\u0660",
    ],
)
def test_a_host_that_cannot_be_read_is_refused(host: str | None) -> None:
    asked = request(host and host.encode().decode("latin-1"))
    assert refusal(Hosts(["*"]), asked).status in (400, 403)
    assert refusal(Hosts(), asked).status in (400, 403)


def test_without_a_port_the_scheme_tells_it() -> None:
    hosts = Hosts(["hub.example:80", "hub.example:443"])
    assert hosts.check(request("hub.example")) is None
    assert hosts.check(request("hub.example", scheme="wss")) is None
    assert refusal(Hosts(["hub.example:443"]), request("hub.example")).status == 403


def test_hosts_can_be_allowed() -> None:
    hosts = Hosts(["hub.example", "other.example:8443", "*.sub.example", "[2001:db8::1]"])
    for host in ("hub.example", "HUB.example:81", "other.example:8443", "a.b.sub.example:9"):
        assert hosts.check(request(host)) is None
    assert hosts.check(request("[2001:DB8::1]:8000")) is None
    for host in ("other.example:8444", "sub.example", "notsub.example", "x.hub.example"):
        assert refusal(hosts, request(host)).status == 403


def test_every_host_can_be_allowed() -> None:
    assert Hosts(["*"]).check(request("anything.example:1")) is None


def test_its_own_page_may_use_it() -> None:
    hosts = Hosts(["hub.example"])
    assert hosts.check(request("localhost:8000", "http://localhost:8000")) is None
    assert hosts.check(request("[::1]:8000", "http://[::1]:8000")) is None
    # Behind a proxy that ends TLS the origin says https and the request does not.
    assert hosts.check(request("hub.example", "https://hub.example")) is None
    assert hosts.check(request("hub.example", "http://hub.example")) is None


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "http://localhost:9000",
        "http://localhost",
        "http://127.0.0.1:8000",  # another name for the same, but not the one that was asked
        "null",
        "",
        "file://",
        "http://localhost:8000.evil.example",
        "http://localhost:8000@evil.example",
        "http://evil.example/http://localhost:8000",
        "chrome-extension://abcdef",
    ],
)
def test_pages_of_others_may_not(origin: str) -> None:
    error = refusal(Hosts(), request("localhost:8000", origin))
    assert error.status == 403
    assert "--allow-origin" in error.reason


def test_origins_can_be_allowed() -> None:
    hosts = Hosts(allowed_origins=["https://app.example", "http://dev.example:3000"])
    for origin in ("https://app.example", "http://dev.example:3000"):
        assert hosts.check(request("localhost:8000", origin)) == origin
    for origin in ("http://app.example", "https://app.example:444", "http://dev.example"):
        assert refusal(hosts, request("localhost:8000", origin)).status == 403


def test_every_origin_can_be_allowed() -> None:
    hosts = Hosts(allowed_origins=["*"])
    assert hosts.check(request("localhost:8000", "null")) == "null"


def test_an_allowed_origin_does_not_allow_a_host() -> None:
    hosts = Hosts(allowed_origins=["http://evil.example"])
    assert refusal(hosts, request("evil.example", "http://evil.example")).status == 403


@pytest.mark.parametrize("host", ["", "http://hub.example", "hub.example/", "a b", "*.", "h:x"])
def test_what_cannot_be_a_host_cannot_be_allowed(host: str) -> None:
    with pytest.raises(ValueError, match="not a host"):
        Hosts([host])


@pytest.mark.parametrize("origin", ["", "app.example", "https://app.example/", "ftp://a", "null"])
def test_what_cannot_be_an_origin_cannot_be_allowed(origin: str) -> None:
    with pytest.raises(ValueError, match="not an origin"):
        Hosts(allowed_origins=[origin])


def test_one_string_is_not_taken_for_many() -> None:
    with pytest.raises(TypeError):
        Hosts("hub.example")
    with pytest.raises(TypeError):
        Hosts(allowed_origins="https://app.example")
