"""Handlers and filters that raise: isolated and logged, unless it is to end the program."""

import asyncio
import logging
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from codomyrmex.events.streaming import (
    Event,
    InMemoryStream,
    create_event,
)
from codomyrmex.events.streaming.streams import dispatching
from tests.streams.handlers import PATIENCE, Gate, plainly, publish, thread


class Custom(Exception):
    pass


@pytest.mark.parametrize("kind", [KeyError, Custom, asyncio.CancelledError, RecursionError])
class TestFailures:
    """A handler or filter that raises is logged with its traceback and harms nobody else."""

    async def test_of_a_sync_handler(
        self, kind: type[BaseException], caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(event: Event) -> None:
            raise kind("on purpose")

        await self.check(fail, None, caplog, kind)

    async def test_of_an_async_handler(
        self, kind: type[BaseException], caplog: pytest.LogCaptureFixture
    ) -> None:
        async def fail(event: Event) -> None:
            await asyncio.sleep(0)
            raise kind("on purpose")

        await self.check(fail, None, caplog, kind)

    async def test_of_a_function_that_returns_an_awaitable(
        self, kind: type[BaseException], caplog: pytest.LogCaptureFixture
    ) -> None:
        async def fail(event: Event) -> None:
            raise kind("on purpose")

        await self.check(plainly(fail), None, caplog, kind)

    async def test_of_a_filter(
        self, kind: type[BaseException], caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(event: Event) -> bool:
            raise kind("on purpose")

        await self.check(print, fail, caplog, kind)

    async def check(
        self,
        handler: Callable[[Event], Any],
        filter_fn: Callable[[Event], bool] | None,
        caplog: pytest.LogCaptureFixture,
        kind: type[BaseException],
    ) -> None:
        stream, got = InMemoryStream(), list[Any]()
        failing = await stream.subscribe(handler, filter_fn=filter_fn)
        await stream.subscribe(lambda event: got.append(event.data))
        with caplog.at_level(logging.ERROR):
            await stream.publish(create_event(1))
            await stream.publish(create_event(2))
            await stream.drain()
        assert got == [1, 2]
        assert len(caplog.records) == 2
        for record in caplog.records:
            assert record.name == "codomyrmex.events.streaming"
            assert record.exc_info is not None
            assert record.exc_info[0] is kind
            assert record.exc_info[2] is not None
            assert failing.id in record.getMessage()
        assert stream.statistics().failed == 2
        assert stream.statistics().subscribers == 2


async def test_the_cancellation_of_what_a_handler_waits_for_is_a_failure_like_any_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stream, got = InMemoryStream(), list[Any]()

    async def wait(event: Event) -> None:
        got.append(event.data)
        work = asyncio.create_task(asyncio.sleep(1))
        asyncio.get_running_loop().call_soon(work.cancel)
        await work

    await stream.subscribe(wait)
    await stream.publish(create_event(1))
    await stream.publish(create_event(2))
    await stream.drain()
    assert got == [1, 2]
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [
        asyncio.CancelledError,
        asyncio.CancelledError,
    ]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
class TestInterrupts:
    def test_of_a_sync_handler_reach_the_publisher_and_the_stream_still_works(
        self, kind: type[BaseException]
    ) -> None:
        stream, got = InMemoryStream(), list[Any]()

        def interrupt(event: Event) -> None:
            if event.data == 1:
                publish(stream, 2, 3)
                raise kind

        asyncio.run(stream.subscribe(interrupt))
        asyncio.run(stream.subscribe(lambda event: got.append(event.data)))
        with pytest.raises(kind):
            stream.publish_nowait(create_event(1))
        assert got == []
        stream.publish_nowait(create_event(4))
        assert got == [2, 3, 4]

    def test_of_a_later_event_reach_the_one_who_delivers_it(
        self, kind: type[BaseException]
    ) -> None:
        stream, got = InMemoryStream(), list[Any]()

        def interrupt(event: Event) -> None:
            if event.data == 1:
                publish(stream, 2, 3)
            if event.data == 2:
                raise kind

        asyncio.run(stream.subscribe(interrupt))
        asyncio.run(stream.subscribe(lambda event: got.append(event.data)))
        with pytest.raises(kind):
            stream.publish_nowait(create_event(1))
        assert got == [1]
        asyncio.run(stream.drain())
        assert got == [1, 3]

    @pytest.mark.real_time
    async def test_do_not_keep_others_waiting(self, kind: type[BaseException]) -> None:
        stream, gate, got = InMemoryStream(), Gate(), list[Any]()

        def interrupt(event: Event) -> None:
            gate(event)
            if event.data == 0:
                raise kind

        await stream.subscribe(interrupt)
        await stream.subscribe(lambda event: got.append(event.data))

        def work() -> None:
            with pytest.raises(kind):
                stream.publish_nowait(create_event(0))

        with thread(work):
            assert await asyncio.to_thread(gate.entered.wait, PATIENCE)
            publish(stream, *range(1, 1001))
            waiting = asyncio.create_task(stream.publish(create_event(1001)))
            await asyncio.sleep(0)
            draining = asyncio.create_task(stream.drain())
            await asyncio.sleep(0)
            gate.open.set()
        async with asyncio.timeout(PATIENCE):
            await waiting
            await draining
            await stream.drain()
        assert got == list(range(1, 1002))

    @pytest.mark.real_time
    async def test_do_not_keep_one_waiting_who_only_drains(self, kind: type[BaseException]) -> None:
        stream, gate, got = InMemoryStream(), Gate(), list[Any]()

        def interrupt(event: Event) -> None:
            gate(event)
            if event.data == 0:
                raise kind

        await stream.subscribe(interrupt)
        await stream.subscribe(lambda event: got.append(event.data))

        def work() -> None:
            with pytest.raises(kind):
                stream.publish_nowait(create_event(0))

        with thread(work):
            assert await asyncio.to_thread(gate.entered.wait, PATIENCE)
            publish(stream, 1, 2)
            draining = asyncio.create_task(stream.drain())
            await asyncio.sleep(0)
            gate.open.set()
        async with asyncio.timeout(PATIENCE):
            await draining
        assert got == [1, 2]

    def test_of_an_async_handler_end_the_run_and_the_stream_still_works(
        self, kind: type[BaseException]
    ) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def interrupt(event: Event) -> None:
            if event.data == 1:
                raise kind
            await asyncio.sleep(0.01)
            got.append(event.data)

        async def first() -> None:
            await stream.subscribe(interrupt)
            for number in range(4):
                await stream.publish(create_event(number))
            await stream.drain()

        async def second() -> None:
            await stream.publish(create_event(4))
            await stream.drain()

        with pytest.raises(kind):
            asyncio.run(first())
        asyncio.run(second())
        assert got == [0, 2, 3, 4]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no such timers")
def test_an_interrupt_at_any_moment_leaves_the_stream_working() -> None:
    stream, got = InMemoryStream(), list[Any]()

    def handler(event: Event) -> None:
        got.append(event.data)
        if event.data == "and another":
            stream.publish_nowait(create_event("another"))

    files = {dispatching.__file__, __file__}

    def interrupt(_: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code.co_filename in files:
            raise KeyboardInterrupt
        # Not in a callback of the garbage collector, which would keep the exception to itself.
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0001)

    asyncio.run(stream.subscribe(handler))
    interrupted = 0
    before = signal.signal(signal.SIGVTALRM, interrupt)
    try:
        for number in range(100):
            event = create_event("and another" if number % 2 else "alone")
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0.0003 + number * 1e-7)
                while True:
                    stream.publish_nowait(event)
            except KeyboardInterrupt:
                interrupted += 1
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            assert stream.publish_nowait(create_event(number))
            assert got[-1] == number
            got.clear()
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert interrupted == 100
