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
from websockets.typing import Subprotocol

from codomyrmex.events.streaming.hub.websocket import SUBPROTOCOL
from codomyrmex.events.streaming.log import Log, Record
from codomyrmex.events.streaming.models import Event
from tests.hub.serving import PATIENCE, ServedUrl, append, eventually, open_hub


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


def test_events_arrive_whole(url: ServedUrl, log: Log) -> None:
    sent = Event(id="1", type="order.paid", data={"a": None}, metadata={"topic": "orders.paid"})
    with connected(url, "topic=orders.*") as websocket:
        append(log, Event(metadata={"topic": "other"}))
        append(log, sent)
        message = receive(websocket)
    assert list(message) == ["event"]
    assert Event.from_dict(message["event"]) == sent


def test_the_first_message_tells_the_subscription(url: ServedUrl, log: Log) -> None:
    append(log, Event(id="first", metadata={"topic": "a"}))
    with connect(f"{url.websocket}/ws?topic=a&topic=b&last_event_id=7") as websocket:
        assert receive(websocket) == {
            "subscribed": {"topics": ["a", "b"], "after": "7", "earliest": "first"},
        }
    with connect(f"{url.websocket}/ws?topic=a") as websocket:
        assert receive(websocket) == {
            "subscribed": {"topics": ["a"], "after": "first", "earliest": "first"},
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
        ("null", "an object with one key and"),
        ("[]", "an object with one key and"),
        ("{}", "an object with one key and"),
        ('{"subscribe": {}}', "subscribe takes an object"),
        ('{"subscribe": {"topics": "a"}}', "topics is an array of strings"),
        ('{"subscribe": {"topics": [1]}}', "topics is an array of strings"),
        ('{"subscribe": {"topics": []}, "ref": 1}', "name what to subscribe to"),
        ('{"subscribe": {"topics": [""]}, "ref": 1}', "at least one character"),
        ('{"subscribe": {"topics": ["a"], "after": 1}, "ref": 1}', "after is a string"),
        ('{"subscribe": {"topics": ["a"], "last": true}, "ref": 1}', "last is a whole number"),
        ('{"subscribe": {"topics": ["a"], "last": -1}, "ref": 1}', "last is a number from 0"),
        ('{"subscribe": {"topics": ["a"], "last": 1, "after": "x"}, "ref": 1}', "not both"),
        ('{"subscribe": {"topics": ["a"], "first": 1}, "ref": 1}', "subscribe has no 'first'"),
        ('{"subscribe": {"topics": ["a"]}}', "a subscription with this ref"),
        ('{"unsubscribe": {}, "ref": "b"}', "no subscription with this ref"),
        ('{"ping": 1, "ref": true}', "ref is a string"),
        ('{"ping": 1, "ref": []}', "ref is a string"),
        (json.dumps({"ping": 1, "ref": "x" * 65}), "up to 64 characters"),
        ('{"shout": 1}', "there is no 'shout'"),
        ('{"publish": {"topic": "t", "data": 1, "echo": 1}}', "echo is true or false"),
        ('{"publish": {}, "x": 1}', "an object with one key and"),
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
        assert list(answer)[:2] == ["error", "status"]
        assert reason in answer["error"]
        assert 400 <= answer["status"] < 500
        send(websocket, {"publish": {"topic": "t", "data": 1}})
        assert {*receive(websocket), *receive(websocket)} == {"published", "event"}


@contextmanager
def opened(url: ServedUrl, **options: Any) -> Iterator[ClientConnection]:
    """A WebSocket without a subscription."""
    with connect(f"{url.websocket}/ws", open_timeout=PATIENCE, **options) as websocket:
        yield websocket


def test_many_subscriptions_each_with_a_cursor_of_its_own(url: ServedUrl, log: Log) -> None:
    append(log, *(Event(id=f"n{n}", data=n, metadata={"topic": "t"}) for n in range(4)))
    with opened(url) as websocket:
        send(websocket, {"subscribe": {"topics": ["t"], "after": "n2"}, "ref": "a"})
        told = receive(websocket)
        assert told == {
            "subscribed": {"topics": ["t"], "after": "n2", "earliest": "n0"},
            "ref": "a",
        }
        message = receive(websocket)
        assert (message["event"]["id"], message["ref"]) == ("n3", "a")
        send(websocket, {"subscribe": {"topics": ["t", "u.*"], "last": 2}, "ref": 7})
        assert receive(websocket)["ref"] == 7
        for expected in ("n2", "n3"):
            message = receive(websocket)
            assert (message["event"]["id"], message["ref"]) == (expected, 7)
        append(log, Event(id="both", metadata={"topic": "t"}))
        assert {receive(websocket)["ref"] for _ in range(2)} == {"a", 7}
        append(log, Event(id="one", metadata={"topic": "u.x"}))
        assert receive(websocket)["ref"] == 7
        assert log.statistics().readers == 2


def test_a_subscription_can_end_while_others_go_on(url: ServedUrl, log: Log) -> None:
    with opened(url) as websocket:
        for ref in ("a", "b"):
            send(websocket, {"subscribe": {"topics": ["t"]}, "ref": ref})
            receive(websocket)
        send(websocket, {"unsubscribe": {}, "ref": "a"})
        assert receive(websocket) == {"unsubscribed": {"topics": ["t"]}, "ref": "a"}
        assert log.statistics().readers == 1
        append(log, Event(metadata={"topic": "t"}))
        assert receive(websocket)["ref"] == "b"
        send(websocket, {"subscribe": {"topics": ["t"], "last": 1}, "ref": "a"})  # it is free again
        assert "subscribed" in receive(websocket)
        assert receive(websocket)["ref"] == "a"


def test_the_subscription_of_the_handshake_can_end_too(url: ServedUrl, log: Log) -> None:
    with connected(url, "topic=t") as websocket:
        send(websocket, {"unsubscribe": {}})
        assert receive(websocket) == {"unsubscribed": {"topics": ["t"]}}
        assert log.statistics().readers == 0


def test_a_hundred_topics_on_one_websocket(url: ServedUrl) -> None:
    with opened(url) as websocket:
        for ref in range(2):
            topics = [f"t{ref}.{n}" for n in range(50)]
            send(websocket, {"subscribe": {"topics": topics}, "ref": ref})
            assert "subscribed" in receive(websocket)
        send(websocket, {"subscribe": {"topics": ["x"]}, "ref": 3})
        answer = receive(websocket)
        assert (answer["status"], answer["ref"]) == (400, 3)
        assert "more than 100 topics" in answer["error"]


def test_a_client_need_not_hear_its_own_events(url: ServedUrl) -> None:
    with connected(url, "topic=chat") as writer, connected(url, "topic=chat") as reader:
        for number, echo in enumerate((True, False, True)):
            message = {"publish": {"topic": "chat", "data": number, "echo": echo}, "ref": number}
            send(writer, message)
        heard = [receive(writer) for _ in range(5)]
        assert sorted(each["event"]["data"] for each in heard if "event" in each) == [0, 2]
        assert [each["ref"] for each in heard if "published" in each] == [0, 1, 2]
        assert [receive(reader)["event"]["data"] for _ in range(3)] == [0, 1, 2]


def test_what_others_publish_under_its_ids_is_heard(url: ServedUrl, log: Log) -> None:
    append(log, Event(id="x", data="another's", metadata={"topic": "t"}))
    with opened(url) as websocket:
        send(websocket, {"publish": {"topic": "t", "data": "own", "id": "x", "echo": False}})
        own = receive(websocket)["published"]
        assert own != "x"
        send(websocket, {"publish": {"topic": "t", "data": 1, "id": "earliest", "echo": False}})
        assert receive(websocket)["status"] == 400
        send(websocket, {"subscribe": {"topics": ["t"], "after": "earliest"}})
        receive(websocket)
        assert receive(websocket)["event"]["id"] == "x"
        send(websocket, {"ping": 1})
        assert receive(websocket) == {"pong": 1}


def test_who_leaves_during_the_handshake_leaves_no_reader(log: Log) -> None:
    async def receive_connect() -> Any:
        return {"type": "websocket.connect"}

    async def fail(message: Any) -> None:
        raise ConnectionResetError

    scope = {"type": "websocket", "path": "/ws", "query_string": b"topic=a", "server": None}
    headers = [(b"host", b"localhost")]
    asyncio.run(open_hub(log)({**scope, "headers": headers}, receive_connect, fail))
    assert log.statistics().readers == 0


def test_the_last_thousand_of_its_own_are_remembered(url: ServedUrl) -> None:
    with opened(url) as websocket:
        for number in range(1001):
            publish = {"topic": "t", "data": number, "echo": False, "id": f"n{number}"}
            send(websocket, {"publish": publish})
        for _ in range(1001):
            assert "published" in receive(websocket)
        send(websocket, {"subscribe": {"topics": ["t"], "after": "earliest"}})
        assert "subscribed" in receive(websocket)
        assert receive(websocket)["event"]["id"] == "n0"
        send(websocket, {"ping": None})
        assert receive(websocket) == {"pong": None}


def test_pings_are_answered_with_what_they_bring(url: ServedUrl) -> None:
    with opened(url) as websocket:
        for value in (None, 0, {"a": [1]}, "x"):
            send(websocket, {"ping": value, "ref": "r"})
            assert receive(websocket) == {"pong": value, "ref": "r"}


def test_an_error_says_what_it_belongs_to(url: ServedUrl) -> None:
    with opened(url) as websocket:
        send(websocket, {"publish": {"topic": "a.*", "data": 1}, "ref": 5})
        answer = receive(websocket)
        assert (answer["status"], answer["ref"]) == (400, 5)
        send(websocket, {"publish": {"topic": "t", "data": "x" * 1024 * 1024}, "ref": 6})
        assert receive(websocket)["status"] == 413


def test_the_subprotocol_is_agreed_on(url: ServedUrl) -> None:
    with opened(url, subprotocols=[Subprotocol("x"), Subprotocol(SUBPROTOCOL)]) as websocket:
        assert websocket.subprotocol == SUBPROTOCOL
    with opened(url) as websocket:
        assert websocket.subprotocol is None
    status, reason = refused(url, "/ws", subprotocols=[Subprotocol("graphql-ws")])
    assert status == 400
    assert SUBPROTOCOL in reason


def test_a_message_far_too_large_ends_the_connection(url: ServedUrl, log: Log) -> None:
    with connected(url) as websocket:
        with suppress(ConnectionClosed):
            websocket.send("x" * 20 * 1024 * 1024)
        with pytest.raises(ConnectionClosed):
            receive(websocket)
    eventually(lambda: log.statistics().readers == 0)


def test_a_client_that_comes_back_gets_what_it_missed_or_hears_of_a_gap(
    url: ServedUrl, log: Log
) -> None:
    for number in range(3):
        append(log, Event(id=f"n{number}", metadata={"topic": "t"}))
    with connected(url, "topic=t&last_event_id=n1") as websocket:
        assert receive(websocket)["event"]["id"] == "n2"
    with connected(url, "topic=t&last_event_id=never-was") as websocket:
        assert list(receive(websocket)) == ["gap"]
        assert receive(websocket)["event"]["id"] == "n0"


def test_an_event_that_cannot_be_written_does_not_end_the_stream(
    url: ServedUrl, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    with connected(url) as websocket:
        damaged = Record.of(Event(id="bad", data="x"))._replace(body=b"\xff", topics=("t",))
        asyncio.run(log.append([damaged, Event(id="good", metadata={"topic": "t"})]))
        assert receive(websocket)["event"]["id"] == "good"
    assert "event bad cannot be sent" in caplog.text


def test_the_end_of_the_stream_is_told(url: ServedUrl, log: Log) -> None:
    with connected(url) as websocket:
        asyncio.run(log.close())
        assert receive(websocket) == {"bye": "the stream has ended"}


def test_a_client_that_leaves_is_forgotten(url: ServedUrl, log: Log) -> None:
    with connected(url):
        assert log.statistics().readers == 1
    eventually(lambda: log.statistics().readers == 0)


def test_a_client_that_is_cut_off_is_forgotten(url: ServedUrl, log: Log) -> None:
    with connected(url) as websocket:
        websocket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        websocket.socket.shutdown(socket.SHUT_RDWR)
    eventually(lambda: log.statistics().readers == 0)


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
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
