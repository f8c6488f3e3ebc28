"""`broadcast` and `as_sink`: events to all that takes events."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from codomyrmex.events.streaming import (
    AsyncStream,
    BatchingStream,
    EncodeError,
    Event,
    InMemoryStream,
    SSEStream,
    Stream,
    StreamClosed,
    StreamingError,
    Subscription,
    TopicError,
    TopicStream,
    WebSocketStream,
    broadcast,
    create_event,
)
from codomyrmex.events.streaming.streams.sinks import as_sink
from codomyrmex.events.streaming.testing import FaultySocket


class OwnStream(Stream):
    """A stream as somebody else might write one, with what the interface asks for and no more."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    async def publish(self, event: Event) -> None:
        self.got.append(event.data)

    async def subscribe(self, *args: Any, **options: Any) -> Subscription:
        return Subscription()

    async def unsubscribe(self, subscription_id: str) -> bool:
        return subscription_id == "known"


async def test_an_event_reaches_every_kind_of_stream_and_function() -> None:
    memory, server_sent, topics, own = InMemoryStream(), SSEStream(), TopicStream(), OwnStream()
    got: dict[str, Any] = {}

    def note(name: str) -> Callable[[Event], None]:
        return lambda event: got.__setitem__(name, event.data)

    async def async_function(event: Event) -> None:
        await asyncio.sleep(1)
        got["async function"] = event.data

    def batch(events: list[Event]) -> None:
        got["batching"] = [event.data for event in events]

    class Awaits:
        def __call__(self, event: Event) -> Awaitable[None]:
            return async_function(event)

    await memory.subscribe(note("memory"))
    await server_sent.subscribe(note("server sent"))
    await topics.subscribe("orders", note("topics"))
    socket = FaultySocket()
    async with AsyncStream() as queued, WebSocketStream() as sockets, BatchingStream(1) as batching:
        consumer = await queued.subscribe()
        await sockets.connect(socket, "ada")
        batching.on_batch(batch)
        await broadcast(
            [
                memory, server_sent, topics, own, queued, sockets, batching, queued.as_stream(),
                note("function"), async_function, Awaits(),
            ],
            create_event(9, topic="orders"),
        )  # fmt: skip
    assert got == {
        "memory": 9, "server sent": 9, "topics": 9, "function": 9, "async function": 9,
        "batching": [9],
    }  # fmt: skip
    assert own.got == [9]
    assert [json.loads(text)["data"] for text in socket.sent] == [9]
    assert [event.data async for event in queued.consume(consumer)] == [9, 9]


async def test_failures_come_back_together_and_the_others_have_it() -> None:
    first, last, closed, got = InMemoryStream(), InMemoryStream(), InMemoryStream(), list[Any]()
    await first.subscribe(lambda event: got.append("first"))
    await last.subscribe(lambda event: got.append("last"))
    await closed.aclose()

    def fail(event: Event) -> None:
        raise ZeroDivisionError

    async def fail_later(event: Event) -> None:
        await asyncio.sleep(1)
        raise KeyError

    with pytest.raises(ExceptionGroup) as caught:
        await broadcast(
            [first, fail, closed, fail_later, TopicStream(), SSEStream(), last],
            Event(data=object()),
        )
    assert [type(error) for error in caught.value.exceptions] == [
        ZeroDivisionError, StreamClosed, KeyError, TopicError, EncodeError,
    ]  # fmt: skip
    assert "5 of 7 streams" in str(caught.value)
    assert got == ["first", "last"]


async def test_a_stream_whose_handler_raises_has_taken_the_event(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stream = InMemoryStream()

    def fail(event: Event) -> None:
        raise ZeroDivisionError

    await stream.subscribe(fail)
    await broadcast([stream], create_event(1))
    assert "ZeroDivisionError" in caplog.text


async def test_a_cancellation_inside_one_is_a_failure_like_any_other() -> None:
    got: list[Any] = []

    async def wait(event: Event) -> None:
        work = asyncio.create_task(asyncio.sleep(1))
        asyncio.get_running_loop().call_soon(work.cancel)
        await work

    with pytest.raises(ExceptionGroup) as caught:
        await broadcast([wait, got.append], create_event(1))
    assert isinstance(caught.value.exceptions[0], StreamingError)
    assert isinstance(caught.value.exceptions[0].__cause__, asyncio.CancelledError)
    assert len(got) == 1


async def test_its_own_cancellation_ends_it() -> None:
    interrupted: list[bool] = []

    async def wait(event: Event) -> None:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            interrupted.append(True)
            raise

    task = asyncio.create_task(broadcast([wait, wait], create_event(1)))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert interrupted == [True, True]


async def test_the_slow_do_not_keep_the_others_waiting() -> None:
    times: list[float] = []

    async def wait(event: Event) -> None:
        await asyncio.sleep(1)
        times.append(asyncio.get_running_loop().time())

    await broadcast([wait] * 3, create_event(1))
    assert times == [1, 1, 1]


async def test_to_nobody_it_does_nothing() -> None:
    await broadcast([], create_event(1))


@pytest.mark.parametrize("target", [None, 7, "stream", [InMemoryStream()]])
async def test_what_takes_no_events_is_refused_before_anybody_gets_it(target: Any) -> None:
    got: list[Any] = []
    with pytest.raises(TypeError, match="events go to a stream or a function"):
        await broadcast([got.append, target], create_event(1))
    assert got == []


async def test_a_sink_that_need_not_wait_gives_nothing_to_await() -> None:
    stream, got = InMemoryStream(), list[Any]()
    sink = as_sink(stream)

    async def slow(event: Event) -> None:
        await asyncio.sleep(1)
        got.append(event.data)

    await stream.subscribe(slow, buffer_size=1)
    assert sink(create_event(1)) is None
    await asyncio.sleep(0)
    assert sink(create_event(2)) is None
    waiting = sink(create_event(3))
    assert waiting is not None
    await waiting
    await stream.aclose()
    assert got == [1, 2, 3]


class TestTheInterface:
    """What a stream has that defines only what it must."""

    async def test_says_what_it_has_not(self) -> None:
        stream = OwnStream()
        with pytest.raises(NotImplementedError, match="OwnStream has no publish_nowait"):
            stream.publish_nowait(create_event(1))
        with pytest.raises(NotImplementedError, match="OwnStream does not count"):
            stream.statistics()

    async def test_finishes_by_unsubscribing_and_closes_by_doing_nothing(self) -> None:
        async with OwnStream() as stream:
            assert await stream.finish("known")
            assert not await stream.finish("unknown")

    def test_must_be_implemented(self) -> None:
        class Nothing(Stream):
            pass

        with pytest.raises(TypeError, match="abstract"):
            Nothing()  # type: ignore[abstract]
