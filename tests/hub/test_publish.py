import asyncio
import json
import threading
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from codomyrmex.events.streaming.hub import Hub
from codomyrmex.events.streaming.models import Event
from codomyrmex.events.streaming.stream import SSEStream
from tests.hub.serving import ServedUrl, error_of, serving

MEBIBYTE = 1024 * 1024


@pytest.fixture
def published(stream: SSEStream) -> list[Event]:
    """What was published, in order, as a subscriber in the process sees it."""
    events: list[Event] = []
    asyncio.run(stream.subscribe(events.append))
    return events


def test_the_body_is_the_data(client: httpx.Client, published: list[Event]) -> None:
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
def test_any_json_value_is_data(client: httpx.Client, published: list[Event], data: Any) -> None:
    assert client.post("/events/t", content=json.dumps(data)).status_code == 201
    assert published[0].data == data
    assert type(published[0].data) is type(data)


def test_type_and_id_are_in_the_query(client: httpx.Client, published: list[Event]) -> None:
    answer = client.post("/events/t?type=order.paid&id=order-17", content="1")
    assert answer.json()["id"] == "order-17"
    assert published[0].type == "order.paid"
    assert published[0].id == "order-17"


@pytest.mark.parametrize(
    "topic", ["a/b/c", "https://example.com/orders/1?x=1#y", "ä ö/ü", "a%b", "~", "a//b"]
)
def test_a_topic_can_have_any_printable_character(
    client: httpx.Client, published: list[Event], topic: str
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
    ],
)
def test_what_cannot_be_a_topic_is_refused(
    client: httpx.Client, published: list[Event], topic: str, reason: str
) -> None:
    answer = client.post(f"/events/{topic}", content="1")
    assert answer.status_code == 400
    assert reason in error_of(answer)
    assert published == []


@pytest.mark.parametrize("field", ["type", "id"])
@pytest.mark.parametrize("value", ["a%0Db", "a%0Ab", "a%00b", ""])
def test_what_would_forge_a_frame_is_refused(
    client: httpx.Client, published: list[Event], field: str, value: str
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
        ("type=a&type=b", "more than one 'type'"),
        ("type=%FF", "not UTF-8"),
    ],
)
def test_types_and_ids_that_no_event_has_are_refused(
    client: httpx.Client, published: list[Event], query: str, reason: str
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
    client: httpx.Client, published: list[Event], body: bytes
) -> None:
    answer = client.post("/events/t", content=body)
    assert answer.status_code == 400
    assert error_of(answer)
    assert published == []


def test_the_largest_body_is_taken(client: httpx.Client, published: list[Event]) -> None:
    body = b'"' + b"x" * (MEBIBYTE - 2) + b'"'
    assert client.post("/events/t", content=body).status_code == 201
    assert len(published[0].data) == MEBIBYTE - 2


def test_a_larger_body_is_refused(client: httpx.Client, published: list[Event]) -> None:
    answer = client.post("/events/t", content=b'"' + b"x" * (MEBIBYTE - 1) + b'"')
    assert answer.status_code == 413
    assert str(MEBIBYTE) in error_of(answer)
    assert published == []
    assert client.post("/events/t", content="1").status_code == 201


def test_a_larger_body_of_unknown_length_is_refused(
    client: httpx.Client, published: list[Event]
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


def test_the_limit_can_be_set(stream: SSEStream) -> None:
    with serving(Hub(stream, max_event_bytes=10)) as url:
        assert httpx.post(f"{url}/events/t", content=b'"12345678"').status_code == 201
        assert httpx.post(f"{url}/events/t", content=b'"123456789"').status_code == 413


def test_a_client_that_leaves_before_its_body_is_complete_publishes_nothing(
    client: httpx.Client, url: ServedUrl, published: list[Event]
) -> None:
    with url.connect() as connection:
        connection.sendall(
            f"POST /events/t HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: 10\r\n\r\n123".encode()
        )
    assert client.post("/events/t", content="4").status_code == 201
    assert [event.data for event in published] == [4]


def test_many_publishers_at_once(client: httpx.Client, published: list[Event]) -> None:
    def publish(start: int) -> None:
        for number in range(start, start + 20):
            assert client.post("/events/t", content=str(number)).status_code == 201

    threads = [threading.Thread(target=publish, args=(start,)) for start in range(0, 160, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(event.data for event in published) == list(range(160))
