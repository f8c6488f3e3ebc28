"""Tasks that nobody holds: asyncio refers to them weakly, and events must not vanish with them."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest

from codomyrmex.events.streaming import (
    AsyncStream,
    Event,
    InMemoryStream,
    StreamProcessor,
    TopicStream,
    create_event,
)
from codomyrmex.events.streaming.streams.tasks import hold, release


class Waits:
    """A handler that waits for what only a weak reference leads to, as some connections do."""

    def __init__(self) -> None:
        self.got: list[Any] = []
        self._future: weakref.ref[asyncio.Future[None]] | None = None

    async def __call__(self, event: Event) -> None:
        future = asyncio.get_running_loop().create_future()
        self._future = weakref.ref(future)
        await future
        self.got.append(event.data)

    async def check(self) -> None:
        """It is still waiting, and goes on when it can."""
        await asyncio.sleep(5.0)
        gc.collect()
        assert self._future is not None
        future = self._future()
        assert future is not None
        future.set_result(None)
        del future
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert self.got == [1]


class TestAHandlerGoesOn:
    async def test_when_its_stream_was_dropped(self) -> None:
        async def publish() -> None:
            stream = InMemoryStream()
            await stream.subscribe(handler)
            await stream.publish(create_event(1))

        handler = Waits()
        await publish()
        await handler.check()

    async def test_when_it_is_one_of_several_at_a_time_in_a_pipeline(self) -> None:
        async def source() -> AsyncIterator[Event]:
            yield create_event(1)

        async def start() -> None:
            await StreamProcessor(source(), max_concurrency=3).sink(handler).start()

        handler = Waits()
        await start()
        await handler.check()

    async def test_when_its_topic_was_let_go(self) -> None:
        time = [0.0]
        topics = TopicStream(idle_ttl=1.0, clock=lambda: time[0])
        handler = Waits()
        subscription = await topics.topic("a").subscribe(handler)
        await topics.publish("a", create_event(1))
        await asyncio.sleep(0)
        subscription.cancel()
        del subscription
        time[0] = 10.0
        assert topics.list_topics() == []
        await handler.check()

    async def test_when_the_view_of_its_stream_was_dropped(self) -> None:
        async with AsyncStream() as stream:
            handler = Waits()
            await stream.as_stream().subscribe(handler)
            await stream.publish(create_event(1))
            await handler.check()

    @pytest.mark.parametrize("max_concurrency", [1, 3])
    @pytest.mark.parametrize("source", ["stream", "async stream", "iterator"])
    async def test_when_its_pipeline_was_dropped(self, source: str, max_concurrency: int) -> None:
        handler = Waits()

        async def events() -> AsyncIterator[Event]:
            yield create_event(1)
            await asyncio.sleep(100.0)

        async def start(source: Any) -> None:
            processor = StreamProcessor(source, max_concurrency=max_concurrency)
            await processor.sink(handler).start()

        async with AsyncStream() as buffered, InMemoryStream() as memory:
            sources = {"stream": memory, "async stream": buffered, "iterator": events()}
            await start(sources.pop(source))
            sources.clear()
            await memory.publish(create_event(1))
            await buffered.publish(create_event(1))
            await handler.check()
            await asyncio.sleep(100.0)


async def test_a_handler_that_has_returned_holds_nothing() -> None:
    async def publish() -> "weakref.ref[InMemoryStream]":
        stream = InMemoryStream()
        await stream.subscribe(handler)
        await stream.publish(create_event(1))
        return weakref.ref(stream)

    handler = Waits()
    stream = await publish()
    await handler.check()
    gc.collect()
    assert stream() is None


def test_tasks_of_a_loop_that_was_closed_are_let_go_when_another_has_some() -> None:
    def wait_in(loop: asyncio.AbstractEventLoop) -> "weakref.ref[asyncio.Task[Any]]":
        task = loop.create_task(asyncio.Event().wait())
        loop.run_until_complete(asyncio.sleep(0))
        hold(task)
        return weakref.ref(task)

    async def in_another() -> None:
        task = asyncio.current_task()
        assert task is not None
        hold(task)
        release(task)
        release(task)  # again does nothing

    closed, resting = asyncio.new_event_loop(), asyncio.new_event_loop()
    gone, there = wait_in(closed), wait_in(resting)
    closed.close()
    asyncio.run(in_another())
    gc.collect()
    assert gone() is None
    task = there()
    assert task is not None
    release(task)
    task.cancel()
    resting.run_until_complete(asyncio.wait([task]))
    resting.close()
