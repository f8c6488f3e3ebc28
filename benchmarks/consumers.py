"""Coroutines that wait for events: bursts of them, and one at a time.

Each contender is an async context manager: it starts `audience.size` consumers, yields a coroutine
function that publishes a list of events, and cleans up behind it. A consumer tells the audience
when it has seen a whole burst.
"""

import asyncio
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from math import inf
from typing import Any

import anyio
import culsans
from broadcaster import Broadcast
from litestar.channels import ChannelsPlugin
from litestar.channels.backends.memory import MemoryChannelsBackend

from benchmarks.clock import Stopwatch
from benchmarks.harness import Contender, Line, Run, at_least, at_most
from benchmarks.model import PlainEvent
from codomyrmex.events.streaming import AsyncStream, Event

BURST = 100


class Audience:
    """The consumers of one run, all of which are waiting before anything is published."""

    def __init__(self, size: int, burst: int) -> None:
        self.size = size
        self.burst = burst
        self.delivered = 0
        self._busy = 0
        self._everyone: asyncio.Future[float]
        self._tasks: list[asyncio.Task[None]] = []

    def seat(self, consumer: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(consumer))

    def everyone(self) -> asyncio.Future[float]:
        """The moment at which the last consumer will have got the whole next burst."""
        self._busy = self.size
        self._everyone = asyncio.get_running_loop().create_future()
        return self._everyone

    def one_is_done(self) -> None:
        self.delivered += self.burst
        self._busy -= 1
        if not self._busy:
            self._everyone.set_result(time.perf_counter())

    async def iterate(self, events: AsyncIterable[Any]) -> None:
        seen = 0
        async for _ in events:
            seen += 1
            if seen == self.burst:
                seen = 0
                self.one_is_done()

    async def pull(self, get: Callable[[], Awaitable[Any]]) -> None:
        seen = 0
        while True:
            await get()
            seen += 1
            if seen == self.burst:
                seen = 0
                self.one_is_done()

    async def settle(self) -> None:
        """Let every consumer get to where it waits."""
        for _ in range(5):
            await asyncio.sleep(0)

    async def leave(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


Publish = Callable[[list[Any]], Awaitable[None]]
Library = Callable[[Audience], AbstractAsyncContextManager[Publish]]


class SharedRecord:
    """Everything published so far; readers keep a place in it and are woken together."""

    def __init__(self) -> None:
        self._events: list[Any] = []
        self._waiting: list[asyncio.Future[None]] = []

    def publish(self, event: Any) -> None:
        self._events.append(event)
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for reader in waiting:
                reader.set_result(None)

    async def read(self) -> AsyncGenerator[Any]:
        loop = asyncio.get_running_loop()
        events = self._events
        cursor = 0
        while True:
            while cursor == len(events):
                reader = loop.create_future()
                self._waiting.append(reader)
                await reader
            event = events[cursor]
            cursor += 1
            yield event


@asynccontextmanager
async def shared_record(audience: Audience) -> AsyncIterator[Publish]:
    record = SharedRecord()
    for _ in range(audience.size):
        audience.seat(audience.iterate(record.read()))

    async def publish(events: list[Any]) -> None:
        for event in events:
            record.publish(event)

    yield publish


@asynccontextmanager
async def future_per_consumer(audience: Audience) -> AsyncIterator[Publish]:
    loop = asyncio.get_running_loop()
    waiting: list[asyncio.Future[Any]] = []

    def next_event() -> asyncio.Future[Any]:
        consumer = loop.create_future()
        waiting.append(consumer)
        return consumer

    for _ in range(audience.size):
        audience.seat(audience.pull(next_event))

    async def publish(events: list[Any]) -> None:
        for event in events:
            ready = waiting.copy()
            waiting.clear()
            for consumer in ready:
                consumer.set_result(event)

    yield publish


@asynccontextmanager
async def asyncio_queues(audience: Audience) -> AsyncIterator[Publish]:
    queues: list[asyncio.Queue[Any]] = [asyncio.Queue() for _ in range(audience.size)]
    for queue in queues:
        audience.seat(audience.pull(queue.get))

    async def publish(events: list[Any]) -> None:
        for event in events:
            for queue in queues:
                queue.put_nowait(event)

    yield publish


@asynccontextmanager
async def culsans_queues(audience: Audience) -> AsyncIterator[Publish]:
    queues: list[culsans.Queue[Any]] = [culsans.Queue() for _ in range(audience.size)]
    for queue in queues:
        audience.seat(audience.pull(queue.async_get))

    async def publish(events: list[Any]) -> None:
        for event in events:
            for queue in queues:
                queue.put_nowait(event)

    yield publish


@asynccontextmanager
async def anyio_streams(audience: Audience) -> AsyncIterator[Publish]:
    senders = []
    receivers = []
    for _ in range(audience.size):
        sender, receiver = anyio.create_memory_object_stream[Any](inf)
        senders.append(sender)
        receivers.append(receiver)
        audience.seat(audience.iterate(receiver))

    async def publish(events: list[Any]) -> None:
        for event in events:
            for sender in senders:
                sender.send_nowait(event)

    yield publish
    for stream in (*senders, *receivers):
        stream.close()


@asynccontextmanager
async def litestar_channels(audience: Audience) -> AsyncIterator[Publish]:
    plugin = ChannelsPlugin(MemoryChannelsBackend(), channels=["events"])
    async with plugin:
        for _ in range(audience.size):
            subscriber = await plugin.subscribe("events")
            audience.seat(audience.iterate(subscriber.iter_events()))

        async def publish(events: list[Any]) -> None:
            for _ in events:
                await plugin.wait_published(b"encoded", "events")

        yield publish


@asynccontextmanager
async def broadcaster_memory(audience: Audience) -> AsyncIterator[Publish]:
    async with Broadcast("memory://") as broadcast:

        async def consumer() -> None:
            async with broadcast.subscribe("events") as subscriber:
                await audience.iterate(subscriber)

        for _ in range(audience.size):
            audience.seat(consumer())

        async def publish(events: list[Any]) -> None:
            for event in events:
                await broadcast.publish("events", event)

        yield publish


@asynccontextmanager
async def ours(audience: Audience) -> AsyncIterator[Publish]:
    stream = AsyncStream()
    await stream.start()
    for _ in range(audience.size):
        subscriber = await stream.subscribe(buffer_size=BURST)
        audience.seat(audience.iterate(stream.consume(subscriber)))

    async def publish(events: list[Any]) -> None:
        for event in events:
            await stream.publish(event)

    yield publish
    await stream.stop()


def bursts(library: Library, make: Callable[[], Any] = PlainEvent) -> Contender:
    async def publish_bursts(run: Run) -> None:
        events = [make() for _ in range(BURST)]
        audience = Audience(run.width, BURST)
        async with library(audience) as publish:
            await audience.settle()
            with run.timed():
                for _ in range(run.units):
                    everyone = audience.everyone()
                    await publish(events)
                    await everyone
            await audience.leave()
        run.delivered = audience.delivered

    return publish_bursts


def one_at_a_time(library: Library, make: Callable[[], Any] = PlainEvent) -> Contender:
    async def publish_to_the_idle(run: Run) -> None:
        events = [make()]
        audience = Audience(run.width, 1)
        async with library(audience) as publish:
            with run.timed():
                for _ in range(run.units):
                    await audience.settle()
                    everyone = audience.everyone()
                    stopwatch = Stopwatch()
                    await publish(events)
                    run.latencies.append(stopwatch.seconds(until=await everyone))
            await audience.leave()
        run.delivered = audience.delivered

    return publish_to_the_idle


LINES = [
    *(
        Line(
            name=f"burst-{width}",
            work=f"burst of {BURST} to {width} consumer{'s' * (width > 1)}",
            floor=("shared record, a cursor each", bursts(shared_record)),
            peers={
                "asyncio.Queue each": bursts(asyncio_queues),
                "culsans": bursts(culsans_queues),
                "anyio": bursts(anyio_streams),
                "Litestar channels": bursts(litestar_channels),
                "broadcaster": bursts(broadcaster_memory),
            },
            ours=bursts(ours, Event),
            reach=(at_least(0.5, "floor"), at_least(2.0, "peer")),
            width=width,
            deliveries=width * BURST,
            quick_units=1,
        )
        for width in (1, 10, 100, 1000)
    ),
    *(
        Line(
            name=f"latency-{width}",
            work=f"one event to {width} idle consumer{'s' * (width > 1)}, p99 (uvloop)",
            floor=("future per consumer", one_at_a_time(future_per_consumer)),
            peers={
                "asyncio.Queue each": one_at_a_time(asyncio_queues),
                "anyio": one_at_a_time(anyio_streams),
                "Litestar channels": one_at_a_time(litestar_channels),
            },
            ours=one_at_a_time(ours, Event),
            reach=(at_most(2.0, "floor"),),
            measure="p99",
            width=width,
            deliveries=width,
            units=samples,
            quick_units=10,
            loop="uvloop",
        )
        for width, samples in ((1, 5000), (10, 2000), (100, 300), (1000, 100))
    ),
]
