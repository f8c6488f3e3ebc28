"""Pump: events from any async iterator to a handler, and how that ends."""

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Self

import pytest

from codomyrmex.events.streaming import Event, Subscription, create_event
from codomyrmex.events.streaming.streams.pump import Pump
from codomyrmex.events.streaming.testing import cancel_at_every_await, run


class Source:
    """Numbered events, so many; says what was asked of it, and whether it was closed."""

    def __init__(self, count: int = 1000, *, error: BaseException | None = None) -> None:
        self.asked = 0
        self.closed = False
        self._count = count
        self._error = error

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self.asked == self._count:
            if self._error is not None:
                raise self._error
            raise StopAsyncIteration
        self.asked += 1
        await asyncio.sleep(0)
        return create_event(self.asked)

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        self.closed = True


async def test_every_event_is_handled_in_order_and_the_source_closed() -> None:
    source, got = Source(5), list[Any]()
    pump = Pump(Subscription(handler=lambda event: got.append(event.data)), source)
    await pump.finish()
    assert got == [1, 2, 3, 4, 5]
    assert source.closed
    assert pump.error is None


async def test_a_slow_handler_slows_the_source() -> None:
    source = Source()

    async def handle(event: Event) -> None:
        await asyncio.sleep(1.0)

    pump = Pump(Subscription(handler=handle), source)
    await asyncio.sleep(9.5)
    assert source.asked == 10
    pump.cancel()
    await pump.finish()


async def test_a_source_that_never_waits_does_not_block_the_loop() -> None:
    got: list[Any] = []

    async def events() -> AsyncIterator[Event]:
        for number in range(10_000):
            yield create_event(number)

    pump = Pump(Subscription(handler=lambda event: got.append(event.data)), events())
    for turn in range(1, 6):
        await asyncio.sleep(0)
        assert len(got) <= turn * 64
    pump.stop()
    await pump.finish()
    assert got == list(range(len(got)))
    assert 64 < len(got) < 1000


async def test_what_the_subscription_does_not_want_is_passed_over() -> None:
    got: list[Any] = []
    subscription = Subscription(
        topic="a",
        handler=lambda event: got.append(event.data),
        filter_fn=lambda event: event.data % 2 == 0,
    )

    async def events() -> AsyncIterator[Event]:
        for number in range(6):
            yield create_event(number, topic="a" if number < 4 else "b")

    await Pump(subscription, events()).finish()
    assert got == [0, 2]


async def test_a_subscription_without_a_handler_reads_the_source_to_its_end() -> None:
    source = Source(3)
    await Pump(Subscription(), source).finish()
    assert source.asked == 3
    assert source.closed


async def test_a_handler_that_raises_is_logged_counted_and_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures: list[Any] = []
    got: list[Any] = []

    async def handle(event: Event) -> None:
        if event.data == 2:
            raise KeyError("two")
        if event.data == 3:
            raise asyncio.CancelledError  # of something it awaited, not of the pump
        got.append(event.data)

    pump = Pump(
        Subscription(handler=handle), Source(4), on_failure=lambda: failures.append("failed")
    )
    await pump.finish()
    assert got == [1, 4]
    assert failures == ["failed"] * 2
    assert "KeyError: 'two'" in caplog.text
    assert caplog.text.count("Traceback") == 2


@pytest.mark.parametrize("error", [OSError("gone"), asyncio.CancelledError()])
async def test_what_the_source_raises_is_kept(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source(2, error=error)
    got: list[Any] = []
    ended: list[str] = []
    pump = Pump(
        Subscription(handler=lambda event: got.append(event.data)),
        source,
        on_end=lambda: ended.append("once"),
    )
    await pump.finish()
    assert pump.error is error
    assert got == [1, 2]
    assert ended == ["once"]
    assert source.closed
    assert "source of subscription" in caplog.text


async def test_a_source_that_cannot_be_closed_ends_it_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Stubborn(Source):
        async def aclose(self) -> None:
            raise OSError("no")

    pump = Pump(Subscription(), Stubborn(1))
    await pump.finish()
    assert pump.error is None
    assert "OSError: no" in caplog.text


async def test_a_source_without_a_way_to_be_closed() -> None:
    class Plain:
        def __aiter__(self) -> Self:
            return self

        async def __anext__(self) -> Event:
            raise StopAsyncIteration

    await Pump(Subscription(), Plain()).finish()


class TestEnding:
    async def test_stop_lets_the_handler_finish(self) -> None:
        source, got = Source(), list[Any]()

        async def handle(event: Event) -> None:
            await asyncio.sleep(1.0)
            got.append(event.data)

        pump = Pump(Subscription(handler=handle), source)
        await asyncio.sleep(1.5)
        pump.stop()
        await pump.finish()
        assert got == [1, 2]
        assert asyncio.get_running_loop().time() == 2.0
        assert source.closed

    async def test_stop_ends_a_wait_for_the_next_event(self) -> None:
        closed: list[str] = []

        async def silent() -> AsyncGenerator[Event, None]:
            try:
                await asyncio.Event().wait()
                yield create_event(1)
            finally:
                closed.append("closed")

        pump = Pump(Subscription(handler=print), silent())
        await asyncio.sleep(1.0)
        pump.stop()
        await pump.finish()
        assert closed == ["closed"]

    async def test_cancel_interrupts_the_handler(self) -> None:
        got: list[str] = []

        async def handle(event: Event) -> None:
            try:
                await asyncio.sleep(1.0)
                got.append("whole")
            finally:
                got.append("left")

        source = Source()
        pump = Pump(Subscription(handler=handle), source)
        await asyncio.sleep(0.5)
        pump.cancel()
        await pump.finish()
        assert got == ["left"]
        assert source.closed
        assert asyncio.get_running_loop().time() == 0.5

    @pytest.mark.parametrize("how", ["stop", "cancel", "finish"])
    async def test_the_handler_itself_may_ask_for_it(self, how: str) -> None:
        got: list[Any] = []

        async def handle(event: Event) -> None:
            if how == "finish":
                await pump.finish()
            else:
                getattr(pump, how)()
                subscription.active = False
            await asyncio.sleep(0.1)
            got.append(event.data)

        subscription = Subscription(handler=handle)
        pump = Pump(subscription, Source(3))
        await asyncio.wait_for(pump.finish(), 10.0)
        assert got == ([1, 2, 3] if how == "finish" else [1])

    async def test_a_subscription_that_is_no_longer_active_ends_it(self) -> None:
        source, got = Source(), list[Any]()

        def handle(event: Event) -> None:
            got.append(event.data)
            subscription.active = len(got) < 3

        subscription = Subscription(handler=handle)
        await Pump(subscription, source).finish()
        assert got == [1, 2, 3]
        assert source.asked == 3
        assert source.closed

    async def test_before_it_has_begun(self) -> None:
        ended: list[str] = []
        pump = Pump(Subscription(), Source(), on_end=lambda: ended.append("once"))
        pump.cancel()
        await pump.finish()
        assert ended == ["once"]

    async def test_again_does_nothing(self) -> None:
        pump = Pump(Subscription(), Source(1))
        await pump.finish()
        pump.stop()
        pump.cancel()
        await pump.finish()

    @pytest.mark.real_time
    @pytest.mark.parametrize("how", ["stop", "cancel"])
    async def test_from_another_thread(self, how: str) -> None:
        pump = Pump(Subscription(), Source(-1))

        async def elsewhere() -> None:
            getattr(pump, how)()
            await asyncio.wait_for(pump.finish(), 10.0)

        await asyncio.to_thread(asyncio.run, elsewhere())

    def test_after_its_loop_was_closed(self) -> None:
        async def begin() -> Pump:
            return Pump(Subscription(), Source(-1))

        pump = asyncio.run(begin())
        thread = threading.Thread(target=pump.cancel)
        thread.start()
        thread.join()
        pump.stop()
        run(pump.finish())

    def test_after_its_loop_was_closed_in_the_middle(self) -> None:
        async def begin() -> Pump:
            pump = Pump(Subscription(), Source(-1))
            await asyncio.sleep(0)
            return pump

        loop = asyncio.new_event_loop()
        pump = loop.run_until_complete(begin())
        task = asyncio.all_tasks(loop).pop()
        loop.close()
        run(pump.finish())
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        coroutine = task.get_coro()
        assert coroutine is not None
        with pytest.raises(RuntimeError):  # its source awaits as it is closed
            coroutine.close()

    def test_cancelled_anywhere_the_source_is_closed(self) -> None:
        sources: list[Source] = []

        async def scenario() -> None:
            sources.append(Source(3))
            pump = Pump(Subscription(handler=lambda event: asyncio.sleep(0.1)), sources[-1])
            try:
                await pump.finish()
            finally:
                pump.cancel()
                await pump.finish()

        def check() -> None:
            assert sources[-1].closed or sources[-1].asked == 0

        assert cancel_at_every_await(scenario, check=check) == 1
