import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import httpx_sse
import pytest

from codomyrmex.events.streaming.codec.sse import Decoder, Frame
from codomyrmex.events.streaming.log import Log, MemoryLog, Record, Retention
from codomyrmex.events.streaming.models import Event
from tests.hub.serving import ServedUrl, append, error_of, eventually, open_hub, serving


def frames_of(answer: httpx.Response) -> Iterator[Frame]:
    decoder = Decoder()
    for chunk in answer.iter_raw():
        yield from decoder.feed(chunk)


@contextmanager
def reading(
    client: httpx.Client, query: str, headers: dict[str, str] | None = None
) -> Iterator[Iterator[Frame]]:
    """The frames after the first, which is `stream.connect`: the subscription is there."""
    with client.stream("GET", f"/events?{query}", headers=headers) as answer:
        assert answer.status_code == 200
        frames = frames_of(answer)
        assert next(frames).event == "stream.connect"
        yield frames


def event(number: int, topic: str = "numbers") -> Event:
    return Event(
        id=f"id-{number}", type="number.drawn", data={"n": number}, metadata={"topic": topic}
    )


def test_the_head_comes_at_once_and_says_what_it_is(client: httpx.Client) -> None:
    with client.stream("GET", "/events?topic=quiet") as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-accel-buffering"] == "no"
        assert "content-length" not in answer.headers


def test_the_first_frame_tells_the_subscription_and_a_reconnection_time(
    client: httpx.Client,
) -> None:
    times = set()
    for _ in range(5):
        with client.stream("GET", "/events?topic=a&topic=b.*&last_event_id=x") as answer:
            frame = next(frames_of(answer))
        assert frame.event == "stream.connect"
        assert json.loads(frame.data) == {"topics": ["a", "b.*"], "after": "x", "earliest": None}
        assert frame.id == ""
        assert frame.retry is not None
        assert 1000 <= frame.retry <= 3000
        times.add(frame.retry)
    assert len(times) > 1


def test_events_arrive_under_their_type_with_their_id(client: httpx.Client, log: Log) -> None:
    with reading(client, "topic=numbers") as frames:
        append(log, event(1))
        append(log, event(2, "other"))
        append(log, event(3))
        assert next(frames) == Frame("number.drawn", '{"n":1}', "id-1")
        assert next(frames) == Frame("number.drawn", '{"n":3}', "id-3")


def test_several_topics_and_patterns(client: httpx.Client, log: Log) -> None:
    with reading(client, "topic=a&topic=b.*&topic=c.%3E") as frames:
        for number, topic in enumerate(["a", "x", "b.1", "b.1.2", "c.1.2", "c"]):
            append(log, event(number, topic))
        append(log, event(9, "a"))
        assert [next(frames).id for _ in range(4)] == ["id-0", "id-2", "id-4", "id-9"]


def test_who_is_cut_off_before_the_first_event_can_come_back_for_it(
    client: httpx.Client, log: Log
) -> None:
    def cursor_of(topic: str) -> str:
        """What an EventSource has for its last event id, though there was no event."""
        with client.stream("GET", f"/events?topic={topic}") as answer:
            frame = next(frames_of(answer))
        assert json.loads(frame.data)["after"] == frame.id
        return frame.id

    append(log, event(0, "other"))
    cursor = cursor_of("numbers")
    assert cursor == "earliest"
    append(log, event(1))
    with reading(client, "topic=numbers", {"Last-Event-ID": cursor}) as frames:
        assert next(frames).id == "id-1"
    append(log, event(2, "other"))
    cursor = cursor_of("numbers")
    assert cursor == "id-1"
    append(log, event(3))
    with reading(client, "topic=numbers", {"Last-Event-ID": cursor}) as frames:
        assert next(frames).id == "id-3"


def test_who_asked_for_the_last_and_got_none_can_come_back_for_the_next(
    client: httpx.Client, log: Log
) -> None:
    with client.stream("GET", "/events?topic=numbers&last=2") as answer:
        assert next(frames_of(answer)).id == "earliest"
    append(log, *(event(number) for number in range(5)))
    with reading(client, "topic=numbers&last=2", {"Last-Event-ID": "earliest"}) as frames:
        assert [next(frames).id for _ in range(5)] == [f"id-{number}" for number in range(5)]


def test_who_knows_its_place_keeps_it(client: httpx.Client, log: Log) -> None:
    append(log, event(1))
    for query in ("last_event_id=id-1", "after=earliest", "last=1"):
        with client.stream("GET", f"/events?topic=numbers&{query}") as answer:
            assert next(frames_of(answer)).id == ""


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("after=id-3", ["id-4"]),
        ("after=earliest", ["id-0", "id-1", "id-2", "id-3", "id-4"]),
        ("last=2", ["id-3", "id-4"]),
        ("last=100", ["id-0", "id-1", "id-2", "id-3", "id-4"]),
        ("last=0", []),
        ("after=latest", []),
        ("after=", []),
        ("after=id-0&last_event_id=id-3", ["id-4"]),
        ("last=2&last_event_id=id-2", ["id-3", "id-4"]),
    ],
)
def test_where_to_begin(client: httpx.Client, log: Log, query: str, expected: list[str]) -> None:
    append(log, *(event(number) for number in range(5)))
    with reading(client, f"topic=numbers&{query}") as frames:
        append(log, event(5))
        assert [next(frames).id for _ in range(len(expected) + 1)] == [*expected, "id-5"]


def test_an_event_source_that_was_given_the_last_goes_on_from_its_own_place(
    client: httpx.Client, log: Log
) -> None:
    append(log, *(event(number) for number in range(5)))
    with reading(client, "topic=numbers&last=5", {"Last-Event-ID": "id-3"}) as frames:
        assert next(frames).id == "id-4"


def test_what_retention_took_is_told_with_how_many(client: httpx.Client, current: Any) -> None:
    log = MemoryLog(Retention(count=3))
    current.hub = open_hub(log)
    append(log, *(event(number) for number in range(6)))
    with reading(client, "topic=*&after=id-0") as frames:
        gap = next(frames)
        assert gap.event == "stream.gap"
        assert json.loads(gap.data) == {"after": "id-0", "reason": "trimmed", "missed": 2}
        assert next(frames).id == "id-3"


def test_many_events_at_once_arrive_in_order(client: httpx.Client, log: Log) -> None:
    events = [event(number) for number in range(1000)]
    events.insert(500, Event(id="large", data="x" * 500_000, metadata={"topic": "numbers"}))
    append(log, *events)
    with reading(client, "topic=numbers&after=earliest") as frames:
        assert [next(frames).id for _ in events] == [each.id for each in events]


def test_whole_events_have_no_event_line(client: httpx.Client, log: Log) -> None:
    sent = event(1)
    with reading(client, "topic=*&format=event") as frames:
        append(log, sent)
        frame = next(frames)
    assert frame.event == "message"
    assert frame.id == "id-1"
    assert json.loads(frame.data) == sent.to_dict()
    assert Event.from_json(frame.data) == sent


def test_a_reader_comes_back_with_the_header(client: httpx.Client, log: Log) -> None:
    for number in range(5):
        append(log, event(number))
    with reading(client, "topic=numbers", {"Last-Event-ID": "id-2"}) as frames:
        append(log, event(5))
        assert [next(frames).id for _ in range(3)] == ["id-3", "id-4", "id-5"]


def test_a_reader_comes_back_with_the_query(client: httpx.Client, log: Log) -> None:
    for number in range(3):
        append(log, event(number))
    with reading(client, "topic=numbers&last_event_id=id-1") as frames:
        assert next(frames).id == "id-2"


def test_the_header_is_newer_than_the_query(client: httpx.Client, log: Log) -> None:
    for number in range(3):
        append(log, event(number))
    headers = {"Last-Event-ID": "id-1"}
    with reading(client, "topic=numbers&last_event_id=id-0", headers) as frames:
        assert next(frames).id == "id-2"


def test_an_id_in_utf8_comes_back(client: httpx.Client, log: Log) -> None:
    for id_ in ("ä-1", "ä-2"):
        append(log, Event(id=id_, metadata={"topic": "t"}))
    headers = httpx.Headers([(b"Last-Event-ID", "ä-1".encode())])
    with client.stream("GET", "/events?topic=t", headers=headers) as answer:
        frames = frames_of(answer)
        next(frames)
        assert next(frames).id == "ä-2"


def test_an_unknown_id_is_told_as_a_gap_without_an_id(client: httpx.Client, log: Log) -> None:
    append(log, event(1))
    with reading(client, "topic=numbers&last_event_id=never-was") as frames:
        gap = next(frames)
        assert gap.event == "stream.gap"
        assert gap.id == ""
        assert next(frames).id == "id-1"


def test_a_gap_is_a_frame_of_its_own_among_whole_events_too(client: httpx.Client) -> None:
    with reading(client, "topic=*&format=event&last_event_id=never-was") as frames:
        assert next(frames).event == "stream.gap"


def test_an_idle_stream_is_kept_open_by_comments() -> None:
    hub = open_hub(keep_alive=0.05)
    with serving(hub) as url, httpx.stream("GET", f"{url}/events?topic=a") as answer:
        text = ""
        for chunk in answer.iter_text():
            text += chunk
            if text.endswith(":\n:\n"):
                break
    assert text.count("event:") == 1


def test_a_client_that_takes_odd_blocks_for_events_gets_none(
    client: httpx.Client, log: Log
) -> None:
    with httpx_sse.connect_sse(client, "GET", "/events?topic=numbers") as source:
        received = source.iter_sse()
        assert next(received).event == "stream.connect"
        for number in range(3):
            append(log, event(number))
            assert next(received).data == f'{{"n":{number}}}'


def test_a_client_that_leaves_is_forgotten(client: httpx.Client, log: Log) -> None:
    for _ in range(5):
        with reading(client, "topic=numbers"):
            assert log.statistics().readers == 1
        eventually(lambda: log.statistics().readers == 0)


def test_a_client_that_is_cut_off_is_forgotten(url: ServedUrl, log: Log) -> None:
    with url.connect() as connection:
        connection.sendall(f"GET /events?topic=a HTTP/1.1\r\nHost: {url.host}\r\n\r\n".encode())
        assert connection.recv(4).startswith(b"HTTP")
        assert log.statistics().readers == 1
        connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
        )  # close with a reset
    eventually(lambda: log.statistics().readers == 0)


def test_head_is_answered_without_a_stream(client: httpx.Client, log: Log) -> None:
    answer = client.head("/events?topic=a")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.content == b""
    eventually(lambda: log.statistics().readers == 0)
    assert client.get("/healthz").status_code == 200  # on the same connection


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("", "name what to subscribe to"),
        ("topics=a", "name what to subscribe to"),
        ("topic=", "at least one character"),
        ("topic=a%00b", "control characters"),
        ("topic=a%0D%0Ab", "control characters"),
        ("topic=" + "x" * 1025, "1024 bytes"),
        ("topic=%FF", "not UTF-8"),
        ("&".join(f"topic=t{number}" for number in range(101)), "more than 100 topics"),
        ("topic=a&" + "x=1&" * 1000, "query fields"),
        ("topic=a&format=xml", "format is one of"),
        ("topic=a&format=data&format=event", "more than one 'format'"),
        ("topic=a&last=1&after=x", "not both"),
        ("topic=a&last=-1", "last is a number"),
        ("topic=a&last=1e3", "last is a number"),
        ("topic=a&last=100001", "last is a number from 0 to 100000"),
        ("topic=a&last_event_id=1&last_event_id=2", "more than one 'last_event_id'"),
    ],
)
def test_what_cannot_be_subscribed_to_is_refused(
    client: httpx.Client, log: Log, query: str, reason: str
) -> None:
    answer = client.get(f"/events?{query}")
    assert answer.status_code == 400
    assert reason in error_of(answer)
    head = client.head(f"/events?{query}")
    assert head.status_code == 400
    assert head.content == b""
    assert log.statistics().readers == 0


def test_a_hundred_topics_are_not_too_many(client: httpx.Client) -> None:
    with reading(client, "&".join(f"topic=t{number}" for number in range(100))):
        pass


def test_an_event_that_cannot_be_written_does_not_end_the_stream(
    client: httpx.Client, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    with reading(client, "topic=*&format=event") as frames:
        damaged = Record.of(Event(id="bad", data="x"))._replace(body=b"\xff")
        asyncio.run(log.append([damaged, event(1)]))
        assert next(frames).id == "id-1"
    assert "event bad cannot be sent" in caplog.text


def test_the_end_of_the_log_is_told(client: httpx.Client, log: Log) -> None:
    with client.stream("GET", "/events?topic=a") as answer:
        frames = frames_of(answer)
        next(frames)
        asyncio.run(log.close())
        last = next(frames)
        assert last.event == "stream.disconnect"
        assert json.loads(last.data) == {"reason": "the stream has ended"}
        assert last.id == "earliest"  # the place of the first frame: it has none of its own
        assert last.retry is not None
        assert list(frames) == []
