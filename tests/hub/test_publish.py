import asyncio
import json
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from codomyrmex.events.streaming.hub import Limits
from codomyrmex.events.streaming.log import Log
from codomyrmex.events.streaming.models import Event
from tests.hub.serving import ServedUrl, error_of, open_hub, serving

MEBIBYTE = 1024 * 1024


class Published(Sequence[Event]):
    """What the log holds now."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def _events(self) -> list[Event]:
        return [record.event() for record in asyncio.run(self._log.read())]

    def __len__(self) -> int:
        return len(self._events())

    def __getitem__(self, index: Any) -> Any:
        return self._events()[index]

    def __eq__(self, other: object) -> bool:
        return self._events() == other

    __hash__ = None  # type: ignore[assignment]


@pytest.fixture
def published(log: Log) -> Published:
    return Published(log)


def test_the_body_is_the_data(client: httpx.Client, published: Published) -> None:
    answer = client.post("/events/orders.paid", json={"total": 12.5})
    assert answer.status_code == 201
    [event] = published
    assert answer.json() == {"id": event.id, "topic": "orders.paid"}
    assert event.data == {"total": 12.5}
    assert event.type == "message"
    assert event.metadata == {"topic": "orders.paid"}


@pytest.mark.parametrize(
    "data", [None, False, True, 0, -1, 1.5, "", "text", [], {}, [[{"a": None}]], "\u2028\U0001f41c"]
)
def test_any_json_value_is_data(client: httpx.Client, published: Published, data: Any) -> None:
    assert client.post("/events/t", content=json.dumps(data)).status_code == 201
    assert published[0].data == data
    assert type(published[0].data) is type(data)


def test_type_and_id_are_in_the_query(client: httpx.Client, published: Published) -> None:
    answer = client.post("/events/t?type=order.paid&id=order-17", content="1")
    assert answer.json()["id"] == "order-17"
    assert published[0].type == "order.paid"
    assert published[0].id == "order-17"


@pytest.mark.parametrize(
    "topic", ["a/b/c", "https://example.com/orders/1?x=1#y", "ä ö/ü", "a%b", "~", "a//b"]
)
def test_a_topic_can_have_any_printable_character(
    client: httpx.Client, published: Published, topic: str
) -> None:
    answer = client.post(f"/events/{quote(topic, safe='')}", content="1")
    assert answer.json()["topic"] == topic
    assert published[0].metadata["topic"] == topic


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", None])
def test_the_body_is_json_whatever_it_is_called(
    client: httpx.Client, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    assert client.post("/events/t", content="[1]", headers=headers).status_code == 201


@pytest.mark.parametrize(
    ("topic", "reason"),
    [
        ("", "at least one character"),
        ("orders.*", "pattern"),
        ("*", "pattern"),
        ("orders.%3E", "pattern"),
        ("a%00b", "control characters"),
        ("a%0Ab", "control characters"),
        ("x" * 1025, "1024 bytes"),
        ("%FF", "not UTF-8"),
        ("%ED%A0%80", "not UTF-8"),
        ("https://h/.well-known/mercure/subscriptions/x", "the hub's own"),
    ],
)
def test_what_cannot_be_a_topic_is_refused(
    client: httpx.Client, published: Published, topic: str, reason: str
) -> None:
    answer = client.post(f"/events/{topic}", content="1")
    assert answer.status_code == 400
    assert reason in error_of(answer)
    assert published == []


@pytest.mark.parametrize("field", ["type", "id"])
@pytest.mark.parametrize("value", ["a%0Db", "a%0Ab", "a%00b", ""])
def test_what_would_forge_a_frame_is_refused(
    client: httpx.Client, published: Published, field: str, value: str
) -> None:
    answer = client.post(f"/events/t?{field}={value}", content="1")
    assert answer.status_code == 400
    assert field in error_of(answer)
    assert published == []


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("type=stream.gap", "reserved"),
        ("type=heartbeat", "come from the stream itself"),
        ("type=connect", "come from the stream itself"),
        ("type=disconnect", "come from the stream itself"),
        ("id=%20x", "space"),
        ("id=a%01b", "control characters"),
        ("id=a%7Fb", "control characters"),
        ("id=%23x", "does not begin with #"),
        ("type=mercure", "come from the stream itself"),
        ("type=a&type=b", "more than one 'type'"),
        ("type=%FF", "not UTF-8"),
    ],
)
def test_types_and_ids_that_no_event_has_are_refused(
    client: httpx.Client, published: Published, query: str, reason: str
) -> None:
    answer = client.post(f"/events/t?{query}", content="1")
    assert answer.status_code == 400
    assert reason in error_of(answer)
    assert published == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b'{"a": NaN}',
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e999",
        b"'a'",
        b"{a: 1}",
        b"[1,]",
        b"1 2",
        b'"\xff"',
        b'"\\ud800"',
        b"\xef\xbb\xbf1",
        b"text=hello",
        b"[" * 500_000,
        b"1" * 10_000,
    ],
)
def test_what_is_not_json_is_refused(
    client: httpx.Client, published: Published, body: bytes
) -> None:
    answer = client.post("/events/t", content=body)
    assert answer.status_code == 400
    assert error_of(answer)
    assert published == []


def test_the_largest_event_is_taken(client: httpx.Client, published: Published) -> None:
    size = MEBIBYTE - len("topic") - len("id") - 2  # the log counts these, too
    body = b'"' + b"x" * size + b'"'
    assert client.post("/events/topic?id=id", content=body).status_code == 201
    assert len(published[0].data) == size
    answer = client.post("/events/topic?id=i2", content=b'"' + b"x" * (size + 1) + b'"')
    assert answer.status_code == 413
    assert str(MEBIBYTE) in error_of(answer)
    assert len(published) == 1


def test_a_larger_body_is_refused(client: httpx.Client, published: Published) -> None:
    answer = client.post("/events/t", content=b'"' + b"x" * (MEBIBYTE - 1) + b'"')
    assert answer.status_code == 413
    assert str(MEBIBYTE) in error_of(answer)
    assert published == []
    assert client.post("/events/t", content="1").status_code == 201


def test_a_larger_body_of_unknown_length_is_refused(
    client: httpx.Client, published: Published
) -> None:
    answer = client.post("/events/t", content=(b"x" * 65536 for _ in range(17)))
    assert answer.status_code == 413
    assert published == []


def test_a_length_that_is_too_large_is_refused_before_the_body_is_sent(url: ServedUrl) -> None:
    with url.connect() as connection:
        connection.sendall(
            f"POST /events/t HTTP/1.1\r\nHost: {url.host}\r\n"
            "Content-Length: 100000000000\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_the_limit_can_be_set(log: Log) -> None:
    with serving(open_hub(log, limits=Limits(event_bytes=10))) as url:
        assert httpx.post(f"{url}/events/t", content=b'"12345678"').status_code == 201
        assert httpx.post(f"{url}/events/t", content=b'"123456789"').status_code == 413


def test_a_client_that_leaves_before_its_body_is_complete_publishes_nothing(
    client: httpx.Client, url: ServedUrl, published: Published
) -> None:
    with url.connect() as connection:
        connection.sendall(
            f"POST /events/t HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: 10\r\n\r\n123".encode()
        )
    assert client.post("/events/t", content="4").status_code == 201
    assert [event.data for event in published] == [4]


def test_many_publishers_at_once(client: httpx.Client, published: Published) -> None:
    def publish(start: int) -> None:
        for number in range(start, start + 20):
            assert client.post("/events/t", content=str(number)).status_code == 201

    threads = [threading.Thread(target=publish, args=(start,)) for start in range(0, 160, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(event.data for event in published) == list(range(160))


def test_the_same_event_published_again_is_stored_once(
    client: httpx.Client, published: Published
) -> None:
    for _ in range(2):
        assert client.post("/events/t?id=once", content="1").json()["id"] == "once"
    assert len(published) == 1


def test_another_event_under_the_same_id_gets_one_of_its_own(
    client: httpx.Client, published: Published
) -> None:
    client.post("/events/t?id=taken", content="1")
    given = client.post("/events/t?id=taken", content="2").json()["id"]
    assert given != "taken"
    assert [(event.id, event.data) for event in published] == [("taken", 1), (given, 2)]


def test_a_whole_event(client: httpx.Client, published: Published) -> None:
    sent = Event(
        id="mine",
        type="order.paid",
        data={"total": 9},
        metadata={"trace": "abc", "topic": "elsewhere"},
        timestamp=datetime(2026, 1, 2, 3, 4, 5, 6, UTC),
    )
    answer = client.post("/events/orders?format=event", content=sent.to_json())
    assert answer.json() == {"id": "mine", "topic": "orders"}
    sent.metadata["topic"] = "orders"  # the path says where to
    assert published == [sent]
    client.post("/events/orders?format=event", content='{"data": 1}')
    assert published[1].data == 1


@pytest.mark.parametrize(
    ("query", "content_type", "body"),
    [
        ("batch=true", "application/json", '[{"n": 1}, [2], "three", null]'),
        ("batch=1", "text/plain", '[{"n": 1}, [2], "three", null]'),
        ("", "application/x-ndjson", '{"n": 1}\n[2]\n\n"three"\r\nnull'),
        ("", "Application/JSONL; charset=utf-8", '{"n": 1}\n[2]\n"three"\nnull\n'),
    ],
)
def test_a_batch(
    client: httpx.Client, published: Published, query: str, content_type: str, body: str
) -> None:
    answer = client.post(
        f"/events/t?type=x&{query}", content=body, headers={"Content-Type": content_type}
    )
    assert answer.status_code == 201
    assert [event.data for event in published] == [{"n": 1}, [2], "three", None]
    assert {event.type for event in published} == {"x"}
    assert answer.json() == {"ids": [event.id for event in published], "topic": "t"}


def test_an_array_is_the_data_of_one_event_unless_told_otherwise(
    client: httpx.Client, published: Published
) -> None:
    for query in ("", "?batch=false"):
        client.post(f"/events/t{query}", content="[1, 2]")
    assert [event.data for event in published] == [[1, 2], [1, 2]]


def test_a_batch_of_whole_events(client: httpx.Client, published: Published) -> None:
    body = '[{"data": 1, "id": "a"}, {"data": 2, "type": "y"}]'
    answer = client.post("/events/t?batch=true&format=event", content=body)
    assert answer.json()["ids"][0] == "a"
    assert [(event.data, event.type) for event in published] == [(1, "message"), (2, "y")]


def test_the_largest_batch(client: httpx.Client, published: Published) -> None:
    numbers = json.dumps(list(range(1001)))
    lines = "\n".join(str(number) for number in range(1001))
    ndjson = {"Content-Type": "application/x-ndjson"}
    for answer in (
        client.post("/events/t?batch=true", content=numbers),
        client.post("/events/t", content=lines, headers=ndjson),
    ):
        assert answer.status_code == 413
        assert "1000 events" in error_of(answer)
    assert published == []
    lines = "\n".join(str(number) for number in range(1000))
    client.post("/events/t", content=lines, headers=ndjson)
    assert [event.data for event in published] == list(range(1000))


@pytest.mark.parametrize(
    ("query", "body", "refused"),
    [
        ("batch=true", "{}", (400, "the body is an array")),
        ("batch=true&id=x", "[1]", (400, "an id each")),
        ("format=event&id=x", '{"data": 1}', (400, "not in the query")),
        ("format=event&type=x", '{"data": 1}', (400, "not in the query")),
        ("format=xml", "1", (400, "one of data, event")),
        ("format=event", "1", (400, "an event is an object")),
        ("format=event", "{}", (400, "an event is an object")),
        ("format=event", '{"data": 1, "topic": "t"}', (400, "an event has no 'topic'")),
        ("format=event", '{"data": 1, "timestamp": 3}', (400, "timestamp")),
        ("format=event", '{"data": 1, "metadata": 3}', (400, "metadata is a mapping")),
        ("format=event", '{"data": 1, "metadata": []}', (400, "metadata is a mapping")),
        ("format=event", '{"data": 1, "id": "earliest"}', (400, "cursor")),
        ("format=event", '{"data": 1, "metadata": {"control": true}}', (400, "stream itself")),
        ("format=event", '{"data": 1, "metadata": {"retry": 1}}', (400, "stream itself")),
        ("format=event", '{"data": 1, "type": "stream.end"}', (400, "reserved")),
        ("format=event", '{"data": 1, "metadata": {"content_type": "text/plain"}}', (400, "a str")),
        ("format=event&batch=true", '[{"data": 1}, {"data": 2, "id": 5}]', (400, "id")),
        ("format=event&batch=true", '[{"data": 1}, {"data": 2, "id": "taken"}]', (409, "'taken'")),
    ],
)
def test_a_batch_is_stored_whole_or_not_at_all(
    client: httpx.Client, published: Published, query: str, body: str, refused: tuple[int, str]
) -> None:
    client.post("/events/t?id=taken", content="0")
    answer = client.post(f"/events/t?{query}", content=body)
    status, reason = refused
    assert answer.status_code == status
    assert reason in error_of(answer)
    assert [event.data for event in published] == [0]


def test_the_line_of_a_batch_that_is_wrong_is_named(client: httpx.Client) -> None:
    headers = {"Content-Type": "application/x-ndjson"}
    answer = client.post("/events/t", content='1\n\n{"a": NaN}', headers=headers)
    assert "line 3" in error_of(answer)


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_a_batch_of_nothing(client: httpx.Client, published: Published, content: bytes) -> None:
    headers = {"Content-Type": "application/x-ndjson"}
    answer = client.post("/events/t", content=content, headers=headers)
    assert answer.status_code == 400
    assert "no event" in error_of(answer) or "empty" in error_of(answer)
    assert published == []
