"""What the head of a request may take, in bytes and in time."""

import logging
import time

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect as websocket_client

from codomyrmex.events.streaming.server import bounded_head
from tests.hub.serving import eventually, open_hub, serving
from tests.server.clients import connect, open_sse, open_websocket, read_to_the_end, read_until

LOOPS = ["asyncio", "uvloop"]
HEALTHZ = "GET /healthz HTTP/1.1\r\nHost: localhost:{port}\r\n"


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_head, "_HEAD_TIMEOUT", 0.2)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("begin", ["GET /", HEALTHZ + "X: ", HEALTHZ + "X: 1\r\n" * 20_000])
def test_a_head_that_is_too_large_is_refused(loop: str, begin: str) -> None:
    with serving(open_hub(), loop=loop) as url, connect(url) as client:
        port = url.rpartition(":")[2]
        client.sendall(begin.format(port=port).encode())
        if len(begin) < 1000:
            client.sendall(b"a" * 70_000)
        answer = read_to_the_end(client)
        assert answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
        assert answer.endswith(b'{"error":"Request Header Fields Too Large"}\n')
        eventually(lambda: url.connections() == 0)


def test_one_that_is_not_is_served_in_whatever_pieces_it_comes() -> None:
    with serving(open_hub()) as url, connect(url) as client:
        port = url.rpartition(":")[2]
        head = HEALTHZ.format(port=port) + "X: " + "a" * 30_000 + "\r\n\r\n"
        for _ in range(3):  # on one connection: each has a bound of its own
            client.sendall(head[:20].encode())
            client.sendall(head[20:].encode())
            assert b'{"status":"ok"}' in read_until(client, b"ok")


def test_a_large_body_is_not_part_of_the_head() -> None:
    with serving(open_hub()) as url:
        body = b'"' + b"a" * 1_000_000 + b'"'
        assert httpx.post(f"{url}/events/t", content=body).status_code == 201


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.usefixtures("hurry")
def test_a_head_that_does_not_come_is_not_waited_for(loop: str) -> None:
    with (
        serving(open_hub(), loop=loop) as url,
        connect(url) as silent,
        connect(url) as slow,
    ):
        slow.sendall(b"GET / HT")
        assert read_to_the_end(silent) == b""
        assert read_to_the_end(slow).startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        eventually(lambda: url.connections() == 0)


@pytest.mark.usefixtures("hurry")
def test_nor_is_the_rest_of_a_later_one() -> None:
    with serving(open_hub()) as url, connect(url) as client:
        client.sendall((HEALTHZ + "\r\n").format(port=url.rpartition(":")[2]).encode())
        read_until(client, b"ok")
        client.sendall(b"GET / HT")
        assert b"HTTP/1.1 408 Request Timeout\r\n" in read_to_the_end(client)


@pytest.mark.usefixtures("hurry")
def test_streams_are_not_ended_by_it() -> None:
    hub = open_hub()
    with serving(hub) as url, open_sse(url) as reader, open_websocket(url) as websocket:
        time.sleep(0.5)  # more than twice what a head may take
        assert hub.log.statistics().readers == 2
        httpx.post(f"{url}/events/t", content='"here"')
        read_until(reader, b"here")
        read_until(websocket, b"here")


def test_a_handshake_that_is_refused_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with serving(open_hub()) as url, pytest.raises(InvalidStatus) as caught:
        websocket_client(f"{url.websocket}/ws?topic=")
    assert caught.value.response.status_code == 400
    assert b"at least one character" in (caught.value.response.body or b"")
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
