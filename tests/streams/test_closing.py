"""The end of a subscription and of a stream: at once, in any place, without a trace."""

import asyncio
import gc
import threading
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from codomyrmex.events.streaming import (
    Event,
    InMemoryStream,
    StreamClosed,
    create_event,
)
from codomyrmex.events.streaming.testing import cancel_at_every_await
from tests.streams.handlers import PATIENCE, Gate, data_of, plainly, publish, thread


class TestEnding:
    async def test_a_subscription_ends_once(self) -> None:
        stream, got = InMemoryStream(), list[Any]()
        subscription = await stream.subscribe(lambda event: got.append(event.data))
        assert await stream.unsubscribe(subscription.id)
        assert not await stream.unsubscribe(subscription.id)
        assert not await stream.unsubscribe("unknown")
        assert not subscription.active
        subscription.cancel()
        await stream.publish(create_event(1))
        assert got == []

    async def test_a_cancelled_subscription_is_not_kept(self) -> None:
        stream = InMemoryStream()
        for _ in range(100):
            subscription = await stream.subscribe(print)
            subscription.cancel()
        assert stream.statistics().subscribers == 0

    async def test_leaving_the_block_of_a_subscription_ends_it(self) -> None:
        stream, got = InMemoryStream(), list[Any]()
        async with await stream.subscribe(lambda event: got.append(event.data)):
            await stream.publish(create_event(1))
        await stream.publish(create_event(2))
        assert got == [1]

    async def test_a_finalizer_may_end_one_wherever_the_collector_runs(self) -> None:
        # Also in the middle of a publish: a lock that the thread holds must not stop it.
        stream, got = InMemoryStream(), list[Any]()
        subscription = await stream.subscribe(lambda event: got.append(event.data))

        class Metadata(dict[str, Any]):
            def get(self, key: str, default: Any = None) -> Any:
                subscription.cancel()
                return super().get(key, default)

        await stream.publish(Event(data=1, metadata=Metadata()))
        await stream.publish(create_event(2))
        assert got == []
        assert stream.statistics().subscribers == 0

    async def test_finishing_waits_for_what_was_published_before(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def slow(event: Event) -> None:
            await asyncio.sleep(1)
            got.append(event.data)

        subscription = await stream.subscribe(slow)
        for number in range(3):
            await stream.publish(create_event(number))
        assert await stream.finish(subscription.id)
        assert got == [0, 1, 2]
        assert not await stream.finish(subscription.id)
        await stream.publish(create_event(3))
        await stream.drain()
        assert got == [0, 1, 2]

    async def test_finishing_a_sync_handler_is_unsubscribing(self) -> None:
        stream, got = InMemoryStream(), list[Any]()
        subscription = await stream.subscribe(lambda event: got.append(event.data))
        await stream.publish(create_event(1))
        assert await stream.finish(subscription.id)
        await stream.publish(create_event(2))
        assert got == [1]

    async def test_a_call_that_runs_is_not_interrupted(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def slow(event: Event) -> None:
            await asyncio.sleep(1)
            got.append(event.data)

        subscription = await stream.subscribe(slow)
        await stream.publish(create_event(1))
        await stream.publish(create_event(2))
        await asyncio.sleep(0.5)
        await stream.unsubscribe(subscription.id)
        await asyncio.sleep(10)
        assert got == [1]

    @pytest.mark.timeout(300)  # a slow machine, and coverage
    @pytest.mark.parametrize(("kind", "times"), [("sync", 100_000), ("async", 10_000)])
    async def test_a_hundred_thousand_come_and_go_without_a_trace(
        self, kind: str, times: int
    ) -> None:
        stream = InMemoryStream()

        async def ignore_async(_: Event) -> None:
            pass

        def ignore(_: Event) -> None:
            pass

        handler = ignore if kind == "sync" else ignore_async
        topics = ["*", "a", "a.*", ("b.>", "c")]
        event = create_event(1, topic="a")

        async def come_and_go(times: int) -> None:
            for number in range(times):
                subscription = await stream.subscribe(handler, topics[number % 4])
                if number % 1000 == 0:
                    await stream.publish(event)
                if number % 2:
                    subscription.cancel()
                else:
                    await stream.unsubscribe(subscription.id)

        loop = asyncio.get_running_loop()
        loop.set_debug(False)
        await come_and_go(1000)
        gc.collect()
        before = len(gc.get_objects())
        tracemalloc.start()
        try:
            start = tracemalloc.get_traced_memory()[0]
            await come_and_go(2000)
            await asyncio.sleep(1)
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - start
        finally:
            tracemalloc.stop()
        assert grown < 100_000
        await come_and_go(times - 3000)
        await asyncio.sleep(1)
        gc.collect()
        assert len(gc.get_objects()) - before < 200
        assert stream.statistics().subscribers == 0
        assert stream.statistics().queues == {}


class TestClosing:
    async def test_delivers_what_was_published_and_then_takes_no_more(self) -> None:
        got: list[Any] = []

        async def slow(event: Event) -> None:
            await asyncio.sleep(1)
            got.append(event.data)

        async with InMemoryStream() as stream:
            subscription = await stream.subscribe(slow)
            for number in range(3):
                await stream.publish(create_event(number))
        assert got == [0, 1, 2]
        assert not subscription.active
        with pytest.raises(StreamClosed):
            await stream.publish(create_event(3))
        with pytest.raises(StreamClosed):
            stream.publish_nowait(create_event(3))
        with pytest.raises(StreamClosed):
            await stream.subscribe(slow)
        assert data_of(stream.get_recent_events()) == [0, 1, 2]
        assert stream.statistics().subscribers == 0
        await stream.aclose()

    async def test_gives_up_what_is_left_when_the_block_raises(self) -> None:
        got: list[Any] = []

        async def slow(event: Event) -> None:
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                got.append(("interrupted", event.data))
                raise

        with pytest.raises(KeyError):  # noqa: PT012
            async with InMemoryStream() as stream:
                await stream.subscribe(slow)
                for number in range(3):
                    await stream.publish(create_event(number))
                await asyncio.sleep(0)
                raise KeyError
        assert got == [("interrupted", 0)]

    async def test_without_draining_interrupts_and_forgets(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def slow(event: Event) -> None:
            await asyncio.sleep(1)
            got.append(event.data)

        await stream.subscribe(slow)
        await stream.subscribe(plainly(slow))
        for number in range(3):
            await stream.publish(create_event(number))
        await asyncio.sleep(1.5)
        await stream.aclose(drain=False)
        assert asyncio.get_running_loop().time() == 1.5
        assert got == [0, 0]

    async def test_waits_for_a_handler_whose_subscription_has_ended(self) -> None:
        got: list[Any] = []

        async def slow(event: Event) -> None:
            await asyncio.sleep(1)
            got.append(event.data)

        async with InMemoryStream() as stream:
            subscription = await stream.subscribe(slow)
            await stream.publish(create_event(1))
            await asyncio.sleep(0)
            subscription.cancel()
        assert got == [1]

    async def test_leaves_nothing_wherever_it_is_cancelled(self) -> None:
        def scenarios() -> Iterator[Any]:
            for drain in (True, False):
                for ended in (True, False):

                    async def scenario(drain: bool = drain, ended: bool = ended) -> None:
                        async def slow(event: Event) -> None:
                            await asyncio.sleep(1)

                        stream = InMemoryStream()
                        try:
                            one = await stream.subscribe(slow)
                            await stream.subscribe(plainly(slow))
                            await stream.subscribe(slow, overflow="drop_oldest", buffer_size=1)
                            for number in range(3):
                                await stream.publish(create_event(number))
                            await asyncio.sleep(0)
                            if ended:
                                one.cancel()
                        finally:
                            await stream.aclose(drain=drain)

                    yield scenario

        tried = 0
        for scenario in scenarios():
            tried += await asyncio.to_thread(cancel_at_every_await, scenario)
        assert tried >= 8

    async def test_a_publisher_that_waits_for_room_is_told(self) -> None:
        stream = InMemoryStream()

        async def never(event: Event) -> None:
            await asyncio.get_running_loop().create_future()

        await stream.subscribe(never, buffer_size=1)
        await stream.publish(create_event(1))
        await asyncio.sleep(0)
        await stream.publish(create_event(2))
        waiting = asyncio.create_task(stream.publish(create_event(3)))
        await asyncio.sleep(1)
        assert not waiting.done()
        await stream.aclose(drain=False)
        with pytest.raises(StreamClosed):
            await waiting

    async def test_refuses_publishers_at_once_while_it_delivers(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def slow(event: Event) -> None:
            await asyncio.sleep(10)
            got.append(event.data)

        await stream.subscribe(slow, buffer_size=1)
        await stream.publish(create_event(1))
        await asyncio.sleep(0)
        await stream.publish(create_event(2))  # now the handler is behind
        closing = asyncio.create_task(stream.aclose())
        await asyncio.sleep(1)
        with pytest.raises(StreamClosed):
            await stream.publish(create_event(3))
        with pytest.raises(StreamClosed):
            stream.publish_nowait(create_event(3))
        assert asyncio.get_running_loop().time() == 1
        await closing
        assert got == [1, 2]
        assert stream.statistics().refused == 0

    @pytest.mark.real_time
    async def test_a_publisher_that_waits_for_another_thread_is_told(self) -> None:
        stream, gate = InMemoryStream(), Gate()
        await stream.subscribe(gate)
        with thread(lambda: publish(stream, 0)):
            assert await asyncio.to_thread(gate.entered.wait, PATIENCE)
            publish(stream, *range(1, 1001))
            waiting = asyncio.create_task(stream.publish(create_event(1001)))
            draining = asyncio.create_task(stream.drain())
            await asyncio.sleep(0.01)
            await stream.aclose(drain=False)
            with pytest.raises(StreamClosed):
                await asyncio.wait_for(waiting, PATIENCE)
            gate.open.set()
            await draining
        assert gate.got == [0]

    async def test_by_a_handler_does_not_wait_for_or_interrupt_that_one(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def close(event: Event) -> None:
            await stream.aclose()
            await asyncio.sleep(1)
            got.append(event.data)

        async def other(event: Event) -> None:
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                await asyncio.sleep(0.5)
                got.append("other")
                raise

        await stream.subscribe(other)
        await stream.subscribe(close)
        await stream.publish(create_event(1))
        await asyncio.sleep(5)
        assert got == ["other", 1]

    @pytest.mark.real_time
    async def test_interrupts_handlers_on_the_loops_of_other_threads(self) -> None:
        stream, started, interrupted = InMemoryStream(), threading.Event(), asyncio.Event()

        async def wait(event: Event) -> None:
            started.set()
            try:
                await asyncio.sleep(100)
            finally:
                interrupted.set()

        async def there() -> None:
            await stream.subscribe(wait)
            await stream.publish(create_event(1))
            await interrupted.wait()

        with thread(lambda: asyncio.run(there())):
            assert await asyncio.to_thread(started.wait, PATIENCE)
            async with asyncio.timeout(PATIENCE):
                await stream.aclose(drain=False)
            assert interrupted.is_set()
