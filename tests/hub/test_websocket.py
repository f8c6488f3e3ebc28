import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from codomyrmex.events.streaming.hub import Hub
from codomyrmex.events.streaming.models import Event
from codomyrmex.events.streaming.stream import SSEStream
from tests.hub.serving import PATIENCE, ServedUrl, eventually, serving


@contextmanager
def connected(url: ServedUrl, query: str = "topic=*", **options: Any) -> Iterator[ClientConnection]:
    """A WebSocket whose subscription is there."""
    options.setdefault("open_timeout", PATIENCE)
    with connect(f"{url.websocket}/ws?{query}", **options) as websocket:
        assert list(receive(websocket)) == ["subscribed"]
        yield websocket


def receive(websocket: ClientConnection) -> dict[str, Any]:
    message = json.loads(websocket.recv(PATIENCE))
    assert isinstance(message, dict)
    return message


def send(websocket: ClientConnection, value: Any) -> None:
    websocket.send(json.dumps(value))


def refused(url: ServedUrl, path: str, **options: Any) -> tuple[int, str]:
    """Status and reason of a refused handshake."""
    with pytest.raises(InvalidStatus) as caught:
        connect(url.websocket + path, open_timeout=PATIENCE, **options)
    answer = caught.value.response
    assert answer.headers["content-type"] == "application/json"
    return answer.status_code, json.loads(answer.body or b"")["error"]


def test_events_arrive_whole(url: ServedUrl, stream: SSEStream) -> None:
    sent = Event(id="1", type="order.paid", data={"a": None}, metadata={"topic": "orders.paid"})
    with connected(url, "topic=orders.*") as websocket:
        stream.publish_nowait(Event(metadata={"topic": "other"}))
        stream.publish_nowait(sent)
        message = receive(websocket)
    assert list(message) == ["event"]
    assert Event.from_dict(message["event"]) == sent


def test_the_first_message_tells_the_subscription(url: ServedUrl) -> None:
    with connect(f"{url.websocket}/ws?topic=a&topic=b&last_event_id=7") as websocket:
        assert receive(websocket) == {
            "subscribed": {"topics": ["a", "b"], "last_event_id": "7"},
        }


def test_what_is_published_is_answered_with_its_id_and_arrives(url: ServedUrl) -> None:
    with connected(url, "topic=chat") as websocket:
        send(websocket, {"publish": {"topic": "chat", "data": {"text": "hi"}}})
        messages = dict(kind for _ in range(2) for kind in receive(websocket).items())
    assert messages["published"] == messages["event"]["id"]
    assert messages["event"]["data"] == {"text": "hi"}
    assert messages["event"]["metadata"] == {"topic": "chat"}


def test_type_and_id_can_be_given(url: ServedUrl) -> None:
    with connected(url, "topic=other") as websocket:
        send(websocket, {"publish": {"topic": "t", "data": None, "type": "x", "id": "mine"}})
        assert receive(websocket) == {"published": "mine"}


def test_answers_come_in_order(url: ServedUrl) -> None:
    with connected(url, "topic=other") as websocket:
        for number in range(100):
            send(websocket, {"publish": {"topic": "t", "data": 1, "id": f"n{number}"}})
        for number in range(100):
            assert receive(websocket) == {"published": f"n{number}"}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("NaN", "not JSON"),
        ('{"publish": {"topic": "t", "data": NaN}}', "not JSON"),
        ('{"publish": {"topic": "t", "data": "\\ud800"}}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("null", "an object with one key"),
        ("[]", "an object with one key"),
        ("{}", "an object with one key"),
        ('{"subscribe": {}}', "an object with one key"),
        ('{"publish": {}, "x": 1}', "an object with one key"),
        ('{"publish": "t"}', "publish takes an object"),
        ('{"publish": {"topic": "t"}}', "publish takes an object"),
        ('{"publish": {"data": 1}}', "publish takes an object"),
        ('{"publish": {"topic": "t", "data": 1, "retry": 5}}', "publish has no 'retry'"),
        ('{"publish": {"topic": 1, "data": 1}}', "topic is a string"),
        ('{"publish": {"topic": "t", "data": 1, "type": null}}', "type is a string"),
        ('{"publish": {"topic": "t", "data": 1, "id": {}}}', "id is a string"),
        ('{"publish": {"topic": "a.*", "data": 1}}', "pattern"),
        ('{"publish": {"topic": "", "data": 1}}', "at least one character"),
        ('{"publish": {"topic": "t", "data": 1, "type": "a\\nb"}}', "CR, LF or NUL"),
        ('{"publish": {"topic": "t", "data": 1, "id": "a\\u0000b"}}', "CR, LF or NUL"),
        ('{"publish": {"topic": "t", "data": 1, "type": "stream.end"}}', "reserved"),
        ('{"publish": {"topic": "t", "data": 1, "type": "heartbeat"}}', "the stream itself"),
        (b'{"publish": {"topic": "t", "data": 1}}', "messages are text"),
        ('"' + "x" * 1024 * 1024 + '"', "larger than"),
        ('"' + "ä" * 600 * 1024 + '"', "larger than"),
    ],
)
def test_a_wrong_message_is_answered_and_ends_nothing(
    url: ServedUrl, message: str | bytes, reason: str
) -> None:
    with connected(url) as websocket:
        websocket.send(message)
        answer = receive(websocket)
        assert list(answer) == ["error"]
        assert reason in answer["error"]
        send(websocket, {"publish": {"topic": "t", "data": 1}})
        assert {*receive(websocket), *receive(websocket)} == {"published", "event"}


def test_a_message_far_too_large_ends_the_connection(url: ServedUrl, stream: SSEStream) -> None:
    with connected(url) as websocket:
        with suppress(ConnectionClosed):
            websocket.send("x" * 20 * 1024 * 1024)
        with pytest.raises(ConnectionClosed):
            receive(websocket)
    eventually(lambda: stream.statistics().subscribers == 0)


def test_a_client_that_comes_back_gets_what_it_missed_or_hears_of_a_gap(
    url: ServedUrl, stream: SSEStream
) -> None:
    for number in range(3):
        stream.publish_nowait(Event(id=f"n{number}", metadata={"topic": "t"}))
    with connected(url, "topic=t&last_event_id=n1") as websocket:
        assert receive(websocket)["event"]["id"] == "n2"
    with connected(url, "topic=t&last_event_id=never-was") as websocket:
        assert list(receive(websocket)) == ["gap"]
        assert receive(websocket)["event"]["id"] == "n0"


def test_an_event_that_cannot_be_written_does_not_end_the_stream(
    url: ServedUrl, stream: SSEStream, caplog: pytest.LogCaptureFixture
) -> None:
    with connected(url) as websocket:
        stream.publish_nowait(Event(id="bad", metadata={"topic": "t", "cause": object()}))
        stream.publish_nowait(Event(id="good", metadata={"topic": "t"}))
        assert receive(websocket)["event"]["id"] == "good"
    assert "event bad cannot be sent" in caplog.text


def test_heartbeats_are_not_sent() -> None:
    stream = SSEStream(heartbeat_interval=0.02)
    with serving(Hub(stream)) as url, connected(url) as websocket:
        with pytest.raises(TimeoutError):
            websocket.recv(0.2)
        stream.publish_nowait(Event(id="1"))
        assert receive(websocket)["event"]["id"] == "1"


def test_the_end_of_the_stream_is_told(url: ServedUrl, stream: SSEStream) -> None:
    with connected(url) as websocket:
        [subscription] = stream.statistics().queues
        asyncio.run(stream.unsubscribe(subscription))
        assert receive(websocket) == {"bye": "the stream has ended"}


def test_a_client_that_leaves_is_forgotten(url: ServedUrl, stream: SSEStream) -> None:
    with connected(url):
        assert stream.statistics().subscribers == 1
    eventually(lambda: stream.statistics().subscribers == 0)


def test_a_client_that_is_cut_off_is_forgotten(url: ServedUrl, stream: SSEStream) -> None:
    with connected(url) as websocket:
        websocket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        websocket.socket.shutdown(socket.SHUT_RDWR)
    eventually(lambda: stream.statistics().subscribers == 0)


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("/ws", 400, "name what to subscribe to"),
        ("/ws?topic=", 400, "at least one character"),
        ("/ws?topic=%00", 400, "control characters"),
        ("/other?topic=a", 404, "no WebSocket is at '/other'"),
        ("/events?topic=a", 404, "no WebSocket"),
    ],
)
def test_a_handshake_is_refused_with_a_reason(
    url: ServedUrl, path: str, status: int, reason: str
) -> None:
    got, told = refused(url, path)
    assert got == status
    assert reason in told


def test_pages_of_others_may_not_connect(url: ServedUrl) -> None:
    status, reason = refused(url, "/ws?topic=a", origin="http://evil.example")
    assert status == 403
    assert "evil.example" in reason
    for origin in (url, "https://friend.example"):
        with connected(url, origin=origin):
            pass


def test_another_name_for_this_machine_is_refused(url: ServedUrl) -> None:
    port = url.rpartition(":")[2]
    with (
        url.connect() as connection,
        pytest.raises(InvalidStatus) as caught,
    ):
        connect(f"ws://rebound.example:{port}/ws?topic=a", sock=connection)
    assert caught.value.response.status_code == 403


def test_a_plain_request_is_told_that_it_is_a_websocket(client: httpx.Client) -> None:
    answer = client.get("/ws?topic=a")
    assert answer.status_code == 426
    assert answer.headers["upgrade"] == "websocket"
