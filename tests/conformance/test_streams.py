"""What every `Stream` promises, run over each of them."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from codomyrmex.events.streaming import (
    AsyncStream,
    BatchingStream,
    Event,
    InMemoryStream,
    SSEStream,
    Stream,
    StreamClosed,
    StreamProcessor,
    TopicError,
    TopicStream,
    WebSocketStream,
    broadcast,
    create_event,
)
from codomyrmex.events.streaming.log import LogStream, MemoryLog
from codomyrmex.events.streaming.testing import cancel_at_every_await
from tests.streams.handlers import plainly

SOON = 5.0  # seconds of virtual time in which every stream has delivered


@asynccontextmanager
async def in_memory() -> AsyncGenerator[Stream, None]:
    async with InMemoryStream() as stream:
        yield stream


@asynccontextmanager
async def server_sent() -> AsyncGenerator[Stream, None]:
    async with SSEStream() as stream:
        yield stream


@asynccontextmanager
async def topics() -> AsyncGenerator[Stream, None]:
    async with TopicStream() as stream, stream.as_stream() as as_stream:
        yield as_stream


@asynccontextmanager
async def queued() -> AsyncGenerator[Stream, None]:
    async with AsyncStream() as stream, stream.as_stream() as as_stream:
        yield as_stream


@asynccontextmanager
async def web_sockets() -> AsyncGenerator[Stream, None]:
    async with WebSocketStream() as stream, stream.as_stream() as as_stream:
        yield as_stream


@asynccontextmanager
async def batching() -> AsyncGenerator[Stream, None]:
    stream = BatchingStream(batch_size=3)
    async with stream, stream.as_stream() as as_stream:
        yield as_stream


@asynccontextmanager
async def logged() -> AsyncGenerator[Stream, None]:
    async with MemoryLog() as log, LogStream(log) as stream:
        yield stream


Open = Callable[[], AbstractAsyncContextManager[Stream]]

STREAMS: dict[str, Open] = {
    "InMemoryStream": in_memory,
    "SSEStream": server_sent,
    "TopicStream": topics,
    "AsyncStream": queued,
    "WebSocketStream": web_sockets,
    "BatchingStream": batching,
    "LogStream": logged,
}


@pytest.fixture(params=STREAMS)
def open_stream(request: pytest.FixtureRequest) -> Open:
    return STREAMS[request.param]


def event(data: Any, topic: str = "orders.new") -> Event:
    return create_event(data, topic=topic)


async def publish_all(stream: Stream, *data: Any, topic: str = "orders.new") -> None:
    for each in data:
        await stream.publish(event(each, topic))


async def settle() -> None:
    await asyncio.sleep(SOON)


@dataclass
class Collector:
    """A handler of any kind that takes its time, or none."""

    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.got: list[Any] = []

    def take(self, event: Event) -> None:
        self.got.append(event.data)

    async def take_async(self, event: Event) -> None:
        if self.seconds:
            await asyncio.sleep(self.seconds)
        self.got.append(event.data)

    def of(self, kind: str) -> Callable[[Event], Any]:
        kinds = {
            "sync": self.take,
            "async": self.take_async,
            "returns an awaitable": plainly(self.take_async),
        }
        return kinds[kind]


KINDS = ["sync", "async", "returns an awaitable"]


class TestPublishing:
    @pytest.mark.parametrize("kind", KINDS)
    async def test_reaches_a_handler_in_order(self, open_stream: Open, kind: str) -> None:
        collector = Collector()
        async with open_stream() as stream:
            assert isinstance(stream, Stream)
            await stream.subscribe(collector.of(kind))
            await publish_all(stream, *range(10))
            await settle()
            assert collector.got == list(range(10))

    async def test_reaches_every_handler_and_each_sees_the_same_event(
        self, open_stream: Open
    ) -> None:
        one, other = list[Event](), list[Event]()
        sent = event({"a": [1]})
        async with open_stream() as stream:
            await stream.subscribe(one.append)
            await stream.subscribe(other.append)
            await stream.publish(sent)
            await settle()
        assert one == other == [sent]
        assert one[0] is other[0]

    async def test_of_what_came_before_a_subscription_does_not_reach_it(
        self, open_stream: Open
    ) -> None:
        collector = Collector()
        async with open_stream() as stream:
            # A batch waits for a first handler, so there is one.
            await stream.subscribe(Collector().take)
            await publish_all(stream, "before")
            await settle()
            await stream.subscribe(collector.take)
            await publish_all(stream, "after")
            await settle()
            assert collector.got == ["after"]

    async def test_without_waiting(self, open_stream: Open) -> None:
        collector = Collector()
        async with open_stream() as stream:
            await stream.subscribe(collector.take)
            for number in range(2):
                assert stream.publish_nowait(event(number))
            await settle()
            assert collector.got == [0, 1]

    async def test_without_waiting_from_a_thread_without_a_loop(self, open_stream: Open) -> None:
        collector = Collector()
        async with open_stream() as stream:
            await stream.subscribe(collector.take)
            assert await asyncio.to_thread(stream.publish_nowait, event(1))
            await settle()
            assert collector.got == [1]

    async def test_of_what_is_no_event_is_refused_with_a_hint(self, open_stream: Open) -> None:
        not_an_event: Any = {"total": 9}
        async with open_stream() as stream:
            with pytest.raises(TypeError, match=r"an Event, not dict: create_event\(data\)"):
                await stream.publish(not_an_event)
            with pytest.raises(TypeError, match=r"an Event, not dict: create_event\(data\)"):
                stream.publish_nowait(not_an_event)
            assert stream.statistics().published == 0

    async def test_by_a_handler_does_not_wait_for_itself(self, open_stream: Open) -> None:
        collector = Collector()

        async with open_stream() as stream:

            async def answer(event: Event) -> None:
                collector.take(event)
                if event.data < 5:
                    await publish_all(stream, event.data + 1)

            await stream.subscribe(answer)
            await publish_all(stream, 0)
            for _ in range(6):
                await settle()
            assert collector.got == [0, 1, 2, 3, 4, 5]

    async def test_is_what_broadcast_does(self, open_stream: Open) -> None:
        collector = Collector()
        async with open_stream() as one, open_stream() as other:
            await one.subscribe(collector.take)
            await other.subscribe(collector.take)
            await broadcast([one, other], event(1))
            await settle()
            assert collector.got == [1, 1]

    async def test_is_counted(self, open_stream: Open) -> None:
        async with open_stream() as stream:
            assert stream.statistics().published == 0
            await publish_all(stream, 1, 2)
            assert stream.publish_nowait(event(3))
            await settle()
            assert stream.statistics().published == 3
            assert stream.statistics().refused == 0
            assert stream.statistics().dropped == 0


class TestSubscribing:
    @pytest.mark.parametrize(
        ("topic", "expected"),
        [
            ("*", ["a", "b", "c"]),
            ("orders.*", ["a"]),
            ("orders.>", ["a", "b"]),
            ("orders.new", ["a"]),
            (("users", "orders.new"), ["a", "c"]),
            ("other", []),
        ],
    )
    async def test_to_topics(self, open_stream: Open, topic: Any, expected: list[str]) -> None:
        collector = Collector()
        async with open_stream() as stream:
            await stream.subscribe(collector.take, topic)
            await publish_all(stream, "a", topic="orders.new")
            await publish_all(stream, "b", topic="orders.new.eu")
            await publish_all(stream, "c", topic="users")
            await settle()
            assert collector.got == expected

    async def test_with_a_filter(self, open_stream: Open) -> None:
        collector = Collector()
        async with open_stream() as stream:
            await stream.subscribe(collector.take, filter_fn=lambda event: event.data % 2 == 0)
            await publish_all(stream, *range(6))
            await settle()
            assert collector.got == [0, 2, 4]

    async def test_with_topic_and_filter_by_name(self, open_stream: Open) -> None:
        collector = Collector()
        async with open_stream() as stream:
            subscription = await stream.subscribe(
                handler=collector.take, topic="orders.*", filter_fn=lambda event: event.data > 1
            )
            assert subscription.topic == "orders.*"
            assert subscription.handler == collector.take
            assert subscription.active
            await publish_all(stream, 1, 2, 3)
            await publish_all(stream, 4, topic="users")
            await settle()
            assert collector.got == [2, 3]

    @pytest.mark.parametrize("topic", ["", "a\nb", 7, []])
    async def test_to_what_cannot_be_a_topic(self, open_stream: Open, topic: Any) -> None:
        async with open_stream() as stream:
            with pytest.raises(TopicError):
                await stream.subscribe(print, topic)
            assert stream.statistics().subscribers == 0
            await publish_all(stream, 1)
            await settle()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("error", [KeyError, asyncio.CancelledError])
    async def test_a_handler_that_raises_is_logged_and_harms_nobody(
        self,
        open_stream: Open,
        kind: str,
        error: type[BaseException],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        class Failing(Collector):
            def take(self, event: Event) -> None:
                super().take(event)
                raise error

            async def take_async(self, event: Event) -> None:
                self.take(event)

        failing, collector = Failing(), Collector()
        async with open_stream() as stream:
            await stream.subscribe(failing.of(kind))
            await stream.subscribe(collector.take)
            with caplog.at_level(logging.ERROR):
                await publish_all(stream, 1, 2, 3)
                await settle()
            assert collector.got == [1, 2, 3]
            assert failing.got == [1, 2, 3]
            logged = [record.exc_info[0] for record in caplog.records if record.exc_info]
            assert logged == [error] * 3
            assert stream.statistics().failed == 3

    async def test_a_filter_that_raises_is_logged_and_harms_nobody(
        self, open_stream: Open, caplog: pytest.LogCaptureFixture
    ) -> None:
        failing, collector = Collector(), Collector()
        async with open_stream() as stream:
            await stream.subscribe(failing.take, filter_fn=lambda event: bool(event.data["no"]))
            await stream.subscribe(collector.take)
            with caplog.at_level(logging.ERROR):
                await publish_all(stream, 1, 2, 3)
                await settle()
            assert (failing.got, collector.got) == ([], [1, 2, 3])
            assert len([record for record in caplog.records if record.exc_info]) == 3

    async def test_is_counted(self, open_stream: Open) -> None:
        async with open_stream() as stream:
            one = await stream.subscribe(print)
            await stream.subscribe(print)
            subscribers = stream.statistics().subscribers
            one.cancel()
            await settle()
            # Some count their own subscribers (sockets, batch handlers) and not these.
            assert stream.statistics().subscribers in (subscribers - 1, subscribers)


class TestEnding:
    async def test_a_subscription_ends_once_and_gets_no_more(self, open_stream: Open) -> None:
        collector = Collector()
        async with open_stream() as stream:
            subscription = await stream.subscribe(collector.take)
            await publish_all(stream, 1)
            await settle()
            assert await stream.unsubscribe(subscription.id)
            assert not subscription.active
            assert not await stream.unsubscribe(subscription.id)
            assert not await stream.unsubscribe("nobody")
            await publish_all(stream, 2)
            await settle()
            assert collector.got == [1]

    async def test_cancelling_is_ending_too(self, open_stream: Open) -> None:
        collector = Collector()
        async with open_stream() as stream:
            subscription = await stream.subscribe(collector.take)
            await publish_all(stream, 1)
            await settle()
            subscription.cancel()
            subscription.cancel()
            assert not subscription.active
            await publish_all(stream, 2)
            await settle()
            assert not await stream.unsubscribe(subscription.id)
            assert collector.got == [1]

    async def test_so_is_leaving_its_block(self, open_stream: Open) -> None:
        collector = Collector()
        async with open_stream() as stream:
            async with await stream.subscribe(collector.take):
                await publish_all(stream, 1)
                await settle()
            await publish_all(stream, 2)
            await settle()
            assert collector.got == [1]

    @pytest.mark.parametrize("kind", KINDS)
    async def test_a_handler_may_end_its_own_subscription(
        self, open_stream: Open, kind: str
    ) -> None:
        got: list[Any] = []

        class Once(Collector):
            def take(self, event: Event) -> None:
                got.append(event.data)
                subscription.cancel()

            async def take_async(self, event: Event) -> None:
                self.take(event)
                await asyncio.sleep(0)
                got.append("end")  # it is not interrupted

        async with open_stream() as stream:
            subscription = await stream.subscribe(Once().of(kind))
            await publish_all(stream, 1, 2, 3)
            await settle()
            assert got == ([1] if kind == "sync" else [1, "end"])

    async def test_finishing_waits_for_what_was_published_before(self, open_stream: Open) -> None:
        collector = Collector(seconds=1.0)
        async with open_stream() as stream:
            subscription = await stream.subscribe(collector.take_async)
            await publish_all(stream, 1, 2, 3)
            assert await stream.finish(subscription.id)
            assert collector.got == [1, 2, 3]
            assert not await stream.finish(subscription.id)
            await publish_all(stream, 4)
            await settle()
            assert collector.got == [1, 2, 3]

    async def test_others_go_on(self, open_stream: Open) -> None:
        one, other = Collector(), Collector()
        async with open_stream() as stream:
            first = await stream.subscribe(one.take)
            await stream.subscribe(other.take)
            first.cancel()
            await publish_all(stream, 1)
            await settle()
            assert (one.got, other.got) == ([], [1])

    @pytest.mark.parametrize("kind", [TopicStream, AsyncStream, WebSocketStream, BatchingStream])
    async def test_through_another_view_of_the_same_stream(self, kind: type[Any]) -> None:
        async with kind() as stream:
            first = await stream.as_stream().subscribe(print)
            second = await stream.as_stream().subscribe(print)
            assert await stream.as_stream().unsubscribe(first.id)
            assert await stream.as_stream().finish(second.id)
            assert not await stream.as_stream().unsubscribe(first.id)
            await settle()
            assert stream.statistics().subscribers == 0


class TestClosing:
    @pytest.mark.parametrize("kind", KINDS)
    async def test_delivers_what_was_published(self, open_stream: Open, kind: str) -> None:
        collector = Collector(seconds=1.0)
        async with open_stream() as stream:
            await stream.subscribe(collector.of(kind))
            await publish_all(stream, *range(5))
        assert collector.got == list(range(5))

    async def test_ends_publishing_and_again_does_nothing(self, open_stream: Open) -> None:
        async with open_stream() as stream:
            await stream.aclose()
            await stream.aclose()
            with pytest.raises(StreamClosed):
                await publish_all(stream, 1)

    async def test_without_draining_is_quick(self, open_stream: Open) -> None:
        collector = Collector(seconds=100.0)
        async with open_stream() as stream:
            await stream.subscribe(collector.take_async)
            await publish_all(stream, 1, 2)
            await asyncio.sleep(2)
            start = asyncio.get_running_loop().time()
            await stream.aclose(drain=False)
            assert asyncio.get_running_loop().time() - start <= 10
            await asyncio.sleep(1000)
            assert collector.got == []

    def test_leaves_nothing_wherever_it_is_cancelled(self, open_stream: Open) -> None:
        async def scenario() -> None:
            collector = Collector(seconds=1.0)
            async with open_stream() as stream:
                for kind in KINDS:
                    await stream.subscribe(collector.of(kind))
                await publish_all(stream, 1, 2)

        assert cancel_at_every_await(scenario) >= 1


async def test_a_processor_processes_what_is_published(open_stream: Open) -> None:
    collector = Collector()
    async with (
        open_stream() as stream,
        StreamProcessor(stream)
        .filter(lambda event: event.data % 2)
        .map(lambda each: event(each.data * 10))
        .sink(collector.take),
    ):
        await publish_all(stream, *range(6))
        await settle()
        assert collector.got == [10, 30, 50]
