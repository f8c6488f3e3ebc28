import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import httpx_sse
import pytest

from codomyrmex.events.streaming.codec.sse import Decoder, Frame
from codomyrmex.events.streaming.hub import Hub
from codomyrmex.events.streaming.models import Event
from codomyrmex.events.streaming.stream import SSEStream
from tests.hub.serving import ServedUrl, error_of, eventually, serving


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
        assert json.loads(frame.data) == {"topics": ["a", "b.*"], "last_event_id": "x"}
        assert frame.id == ""
        assert frame.retry is not None
        assert 1000 <= frame.retry <= 3000
        times.add(frame.retry)
    assert len(times) > 1


def test_events_arrive_under_their_type_with_their_id(
    client: httpx.Client, stream: SSEStream
) -> None:
    with reading(client, "topic=numbers") as frames:
        stream.publish_nowait(event(1))
        stream.publish_nowait(event(2, "other"))
        stream.publish_nowait(event(3))
        assert next(frames) == Frame("number.drawn", '{"n":1}', "id-1")
        assert next(frames) == Frame("number.drawn", '{"n":3}', "id-3")


def test_several_topics_and_patterns(client: httpx.Client, stream: SSEStream) -> None:
    with reading(client, "topic=a&topic=b.*&topic=c.%3E") as frames:
        for number, topic in enumerate(["a", "x", "b.1", "b.1.2", "c.1.2", "c"]):
            stream.publish_nowait(event(number, topic))
        stream.publish_nowait(event(9, "a"))
        assert [next(frames).id for _ in range(4)] == ["id-0", "id-2", "id-4", "id-9"]


def test_whole_events_have_no_event_line(client: httpx.Client, stream: SSEStream) -> None:
    sent = event(1)
    with reading(client, "topic=*&format=event") as frames:
        stream.publish_nowait(sent)
        frame = next(frames)
    assert frame.event == "message"
    assert frame.id == "id-1"
    assert json.loads(frame.data) == sent.to_dict()
    assert Event.from_json(frame.data) == sent


def test_a_reader_comes_back_with_the_header(client: httpx.Client, stream: SSEStream) -> None:
    for number in range(5):
        stream.publish_nowait(event(number))
    with reading(client, "topic=numbers", {"Last-Event-ID": "id-2"}) as frames:
        stream.publish_nowait(event(5))
        assert [next(frames).id for _ in range(3)] == ["id-3", "id-4", "id-5"]


def test_a_reader_comes_back_with_the_query(client: httpx.Client, stream: SSEStream) -> None:
    for number in range(3):
        stream.publish_nowait(event(number))
    with reading(client, "topic=numbers&last_event_id=id-1") as frames:
        assert next(frames).id == "id-2"


def test_the_header_is_newer_than_the_query(client: httpx.Client, stream: SSEStream) -> None:
    for number in range(3):
        stream.publish_nowait(event(number))
    headers = {"Last-Event-ID": "id-1"}
    with reading(client, "topic=numbers&last_event_id=id-0", headers) as frames:
        assert next(frames).id == "id-2"


def test_an_id_in_utf8_comes_back(client: httpx.Client, stream: SSEStream) -> None:
    for id_ in ("ä-1", "ä-2"):
        stream.publish_nowait(Event(id=id_, metadata={"topic": "t"}))
    headers = httpx.Headers([(b"Last-Event-ID", "ä-1".encode())])
    with client.stream("GET", "/events?topic=t", headers=headers) as answer:
        frames = frames_of(answer)
        next(frames)
        assert next(frames).id == "ä-2"


def test_an_unknown_id_is_told_as_a_gap_without_an_id(
    client: httpx.Client, stream: SSEStream
) -> None:
    stream.publish_nowait(event(1))
    with reading(client, "topic=numbers&last_event_id=never-was") as frames:
        gap = next(frames)
        assert gap.event == "stream.gap"
        assert gap.id == ""
        assert next(frames).id == "id-1"


def test_a_gap_is_a_frame_of_its_own_among_whole_events_too(client: httpx.Client) -> None:
    with reading(client, "topic=*&format=event&last_event_id=never-was") as frames:
        assert next(frames).event == "stream.gap"


def test_an_idle_stream_is_kept_open_by_comments() -> None:
    hub = Hub(SSEStream(heartbeat_interval=0.05))
    with serving(hub) as url, httpx.stream("GET", f"{url}/events?topic=a") as answer:
        text = ""
        for chunk in answer.iter_text():
            text += chunk
            if text.endswith(":\n:\n"):
                break
    assert text.count("event:") == 1


def test_a_client_that_takes_odd_blocks_for_events_gets_none(
    client: httpx.Client, stream: SSEStream
) -> None:
    with httpx_sse.connect_sse(client, "GET", "/events?topic=numbers") as source:
        received = source.iter_sse()
        assert next(received).event == "stream.connect"
        for number in range(3):
            stream.publish_nowait(event(number))
            assert next(received).data == f'{{"n":{number}}}'


def test_a_client_that_leaves_is_forgotten(client: httpx.Client, stream: SSEStream) -> None:
    for _ in range(5):
        with reading(client, "topic=numbers"):
            assert stream.statistics().subscribers == 1
        eventually(lambda: stream.statistics().subscribers == 0)


def test_a_client_that_is_cut_off_is_forgotten(url: ServedUrl, stream: SSEStream) -> None:
    with url.connect() as connection:
        connection.sendall(f"GET /events?topic=a HTTP/1.1\r\nHost: {url.host}\r\n\r\n".encode())
        assert connection.recv(4).startswith(b"HTTP")
        assert stream.statistics().subscribers == 1
        connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
        )  # close with a reset
    eventually(lambda: stream.statistics().subscribers == 0)


def test_head_is_answered_without_a_stream(client: httpx.Client, stream: SSEStream) -> None:
    answer = client.head("/events?topic=a")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.content == b""
    eventually(lambda: stream.statistics().subscribers == 0)
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
        ("topic=a&last_event_id=1&last_event_id=2", "more than one 'last_event_id'"),
    ],
)
def test_what_cannot_be_subscribed_to_is_refused(
    client: httpx.Client, stream: SSEStream, query: str, reason: str
) -> None:
    answer = client.get(f"/events?{query}")
    assert answer.status_code == 400
    assert reason in error_of(answer)
    head = client.head(f"/events?{query}")
    assert head.status_code == 400
    assert head.content == b""
    assert stream.statistics().subscribers == 0


def test_a_hundred_topics_are_not_too_many(client: httpx.Client) -> None:
    with reading(client, "&".join(f"topic=t{number}" for number in range(100))):
        pass


def test_an_event_that_cannot_be_written_does_not_end_the_stream(
    client: httpx.Client, stream: SSEStream, caplog: pytest.LogCaptureFixture
) -> None:
    with reading(client, "topic=*&format=event") as frames:
        stream.publish_nowait(Event(id="bad", metadata={"topic": "t", "cause": object()}))
        stream.publish_nowait(event(1))
        assert next(frames).id == "id-1"
    assert "event bad cannot be sent" in caplog.text


def test_the_end_of_the_stream_is_told(client: httpx.Client, stream: SSEStream) -> None:
    with client.stream("GET", "/events?topic=a") as answer:
        frames = frames_of(answer)
        next(frames)
        [subscription] = stream.statistics().queues
        asyncio.run(stream.unsubscribe(subscription))
        last = next(frames)
        assert last.event == "stream.disconnect"
        assert json.loads(last.data) == {"reason": "the stream has ended"}
        assert last.id == ""
        assert last.retry is not None
        assert list(frames) == []
