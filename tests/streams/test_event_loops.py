"""A stream belongs to no event loop, and works in a forked child."""

import asyncio
import gc
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from codomyrmex.events.streaming import (
    Event,
    InMemoryStream,
    create_event,
)
from codomyrmex.events.streaming.subscribers import make_queue
from tests.forks import in_a_child
from tests.streams.handlers import PATIENCE, Gate, publish, thread


class TestLoops:
    """A stream belongs to no event loop."""

    def test_subscribed_in_one_run_published_in_the_next(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def take(event: Event) -> None:
            await asyncio.sleep(0)
            got.append(event.data)

        async def publish_and_drain(*data: Any) -> None:
            for each in data:
                await stream.publish(create_event(each))
            await stream.drain()

        asyncio.run(stream.subscribe(take))
        asyncio.run(stream.subscribe(lambda event: got.append(("sync", event.data))))
        asyncio.run(publish_and_drain(1, 2))
        assert got == [("sync", 1), ("sync", 2), 1, 2]
        got.clear()
        asyncio.run(publish_and_drain(3))
        assert got == [("sync", 3), 3]

    def test_what_one_run_left_over_is_handled_first_in_the_next(self) -> None:
        stream, got, second_begun = InMemoryStream(), list[Any](), asyncio.Event()

        async def take(event: Event) -> None:
            if event.data == 1:
                second_begun.set()
                await asyncio.sleep(100)
            got.append(event.data)

        async def first() -> None:
            await stream.subscribe(take)
            for number in range(5):
                await stream.publish(create_event(number))
            await second_begun.wait()

        async def second() -> None:
            await stream.publish(create_event(5))
            await stream.drain()

        asyncio.run(first())
        assert got == [0]
        asyncio.run(second())
        # The one that the end of the first run interrupted is not handled twice.
        assert got == [0, 2, 3, 4, 5]

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_a_loop_that_was_closed_with_a_handler_in_it_does_not_stop_the_next(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def take(event: Event) -> None:
            if event.data == 1:
                await asyncio.get_running_loop().create_future()
            await asyncio.sleep(0.001)
            got.append(event.data)

        async def second() -> None:
            await stream.publish(create_event(3))
            await stream.drain()
            assert got == [2, 3]
            gc.collect()  # what is left of the first loop, in the middle of the second
            await stream.publish(create_event(4))
            await stream.drain()

        loop = asyncio.new_event_loop()
        loop.run_until_complete(stream.subscribe(take))
        loop.run_until_complete(stream.publish(create_event(1)))
        loop.run_until_complete(stream.publish(create_event(2)))
        loop.close()
        asyncio.run(second())
        assert got == [2, 3, 4]

    def test_a_publisher_does_not_wait_for_a_loop_that_is_closed(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def take(event: Event) -> None:
            got.append(event.data)

        async def publish_all(*data: int) -> None:
            for each in data:
                await stream.publish(create_event(each))

        async def second() -> None:
            await publish_all(*range(3, 8))
            await stream.drain()

        asyncio.run(stream.subscribe(take, buffer_size=3))
        publish(stream, 0, 1, 2)  # now the handler is behind
        asyncio.run(asyncio.wait_for(second(), PATIENCE))
        assert got == list(range(8))

    def test_published_without_a_loop_and_handled_by_the_next_drain(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def take(event: Event) -> None:
            got.append(event.data)

        asyncio.run(stream.subscribe(take))
        publish(stream, 1, 2)
        assert got == []
        asyncio.run(stream.drain())
        assert got == [1, 2]

    @pytest.mark.real_time
    async def test_async_handlers_run_on_the_loop_that_subscribed(self) -> None:
        stream, threads = InMemoryStream(), list[int]()
        handled = asyncio.Event()

        async def take(event: Event) -> None:
            threads.append(threading.get_ident())
            if event.data == 2:
                handled.set()

        await stream.subscribe(take)
        await asyncio.to_thread(publish, stream, 1)
        await asyncio.to_thread(lambda: asyncio.run(stream.publish(create_event(2))))
        await asyncio.wait_for(handled.wait(), PATIENCE)
        assert threads == [threading.get_ident()] * 2

    @pytest.mark.real_time
    async def test_a_publisher_in_another_thread_waits_for_an_async_handler(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def slow(event: Event) -> None:
            await asyncio.sleep(0.0005)
            got.append(event.data)

        await stream.subscribe(slow, buffer_size=2)

        async def there() -> int:
            longest = 0
            for number in range(50):
                await stream.publish(create_event(number))
                longest = max(longest, number - len(got))
            await stream.drain()
            return longest

        longest = await asyncio.to_thread(lambda: asyncio.run(there()))
        assert got == list(range(50))
        assert longest <= 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
class TestForks:
    """A stream that was made before a fork works in the child."""

    def test_although_another_thread_is_filling_a_queue_of_the_newest(self) -> None:
        queue = make_queue(3, "latest_by_key", key=lambda event: event.data)
        filling, forked = threading.Event(), threading.Event()

        def fill() -> None:
            with queue._queue.lock:
                filling.set()
                forked.wait(PATIENCE)

        thread = threading.Thread(target=fill)
        thread.start()
        filling.wait(PATIENCE)
        assert in_a_child(lambda: queue.offer(create_event(1)) and queue.qsize() == 1)
        forked.set()
        thread.join()

    def test_for_the_thread_that_forked(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def take(event: Event) -> None:
            got.append(event.data)

        async def here() -> None:
            await stream.subscribe(take)
            await stream.subscribe(lambda event: got.append(("sync", event.data)))
            await stream.publish(create_event(1))
            await stream.drain()

        async def there() -> None:
            await stream.publish(create_event(2))
            await stream.drain()

        def check() -> bool:
            asyncio.run(there())
            return got == [("sync", 1), 1, ("sync", 2), 2]

        asyncio.run(here())
        assert in_a_child(check)
        assert got == [("sync", 1), 1]

    def test_while_another_thread_was_delivering(self) -> None:
        stream, gate, got = InMemoryStream(), Gate(), list[Any]()
        asyncio.run(stream.subscribe(gate, "slow"))
        asyncio.run(stream.subscribe(lambda event: got.append(event.data), "quick"))

        def check() -> bool:
            stream.publish_nowait(create_event(2, topic="quick"))
            return got == [2]

        def work() -> None:
            stream.publish_nowait(create_event(1, topic="slow"))

        with thread(work):
            assert gate.entered.wait(PATIENCE)
            try:
                assert in_a_child(check)
            finally:
                gate.open.set()

    def test_while_another_thread_held_its_lock(self) -> None:
        stream, got = InMemoryStream(), list[Any]()
        asyncio.run(stream.subscribe(lambda event: got.append(event.data), "quick"))
        inside, leave = threading.Event(), threading.Event()

        class Metadata(dict[str, Any]):
            def get(self, key: str, default: Any = None) -> Any:
                inside.set()
                assert leave.wait(PATIENCE)
                return super().get(key, default)

        def check() -> bool:
            stream.publish_nowait(create_event(2, topic="quick"))
            return got == [2]

        with thread(lambda: stream.publish_nowait(Event(metadata=Metadata()))):
            assert inside.wait(PATIENCE)
            try:
                assert in_a_child(check)
            finally:
                leave.set()

    def test_in_a_handler(self) -> None:
        stream, got, worked = InMemoryStream(), list[Any](), list[bool]()

        def fork(event: Event) -> None:
            got.append(event.data)
            if event.data == 1:
                worked.append(in_a_child(check))

        def check() -> bool:
            # The delivery goes on in the child: its own publish comes after it.
            stream.publish_nowait(create_event(2))
            return got == [1]

        asyncio.run(stream.subscribe(fork))
        stream.publish_nowait(create_event(1))
        assert worked == [True]

    def test_while_an_async_handler_was_running(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def take(event: Event) -> None:
            await asyncio.sleep(0)
            got.append(event.data)

        def check() -> bool:
            async def there() -> None:
                await stream.publish(create_event(2))
                await stream.drain()

            asyncio.run(there())
            return got == [2]

        async def here() -> bool:
            await stream.subscribe(take)
            await stream.publish(create_event(1))
            await asyncio.sleep(0)  # it is running
            child_worked = in_a_child(lambda: asyncio_in_a_thread_of_its_own(check))
            await stream.drain()
            return child_worked

        assert asyncio.run(here())
        assert got == [1]


def asyncio_in_a_thread_of_its_own(check: Callable[[], bool]) -> bool:  # pragma: no cover
    # In a child that was forked in a coroutine, the parent's loop is still on the stack.
    results: list[bool] = []
    with thread(lambda: results.append(check())):
        pass
    return results == [True]
