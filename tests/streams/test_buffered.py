"""AsyncStream: order, backpressure, loss by policy, life cycle, threads and loops, cancellation."""

import asyncio
import gc
import logging
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codomyrmex.events.streaming import (
    AlreadyConsumed,
    AsyncStream,
    Event,
    EventType,
    PublishTimeout,
    StreamClosed,
    TopicError,
    UnknownSubscription,
    create_event,
)
from codomyrmex.events.streaming.testing import cancel_at_every_await, run

PATIENCE = 10.0  # seconds of real time for what must happen at once


def now() -> float:
    return asyncio.get_running_loop().time()


def data_of(events: list[Event]) -> list[Any]:
    return [event.data for event in events]


async def read(stream: AsyncStream, subscription: str, pause: float = 0.0) -> list[Event]:
    """Everything a consumer gets, to its end, if it takes so long for each event."""
    events = []
    async for event in stream.consume(subscription):
        events.append(event)
        if pause:
            await asyncio.sleep(pause)
    return events


def reading(
    stream: AsyncStream, subscription: str, pause: float = 0.0
) -> "asyncio.Task[list[Event]]":
    return asyncio.create_task(read(stream, subscription, pause))


async def publish_all(stream: AsyncStream, numbers: range) -> list[bool]:
    return [await stream.publish(create_event(number)) for number in numbers]


async def settle() -> None:
    """Let everything run that can."""
    await asyncio.sleep(0.001)


class TestDelivery:
    async def test_every_consumer_gets_every_event_in_order(self) -> None:
        async with AsyncStream() as stream:
            readers = [reading(stream, await stream.subscribe()) for _ in range(3)]
            assert all(await publish_all(stream, range(10)))
        for reader in readers:
            assert data_of(await reader) == list(range(10))

    async def test_a_burst_larger_than_the_queue_arrives_whole_where_it_is_read_at_once(
        self,
    ) -> None:
        async with AsyncStream(buffer_size=10) as stream:
            reader = reading(stream, await stream.subscribe(buffer_size=100))
            await settle()
            assert all(await publish_all(stream, range(500)))
        assert data_of(await reader) == list(range(500))

    async def test_a_burst_in_one_turn_arrives_whole_where_it_is_read_at_once(self) -> None:
        async with AsyncStream(buffer_size=1000) as stream:
            reader = reading(stream, await stream.subscribe(buffer_size=7))
            assert all(stream.publish_nowait(create_event(number)) for number in range(500))
        assert data_of(await reader) == list(range(500))

    async def test_events_published_before_start_are_kept_for_it(self) -> None:
        stream = AsyncStream(buffer_size=3)
        subscription = await stream.subscribe()
        assert await publish_all(stream, range(3)) == [True] * 3
        assert not stream.publish_nowait(create_event(3))
        assert stream.statistics().buffered == 3
        await stream.start()
        await settle()
        assert stream.statistics().buffered == 0
        await stream.stop()
        assert data_of(await read(stream, subscription)) == [0, 1, 2]

    async def test_a_subscription_gets_what_is_dispatched_from_then_on(self) -> None:
        async with AsyncStream() as stream:
            first = reading(stream, await stream.subscribe())
            await stream.publish(create_event("early"))
            await settle()
            second = reading(stream, await stream.subscribe())
            await stream.publish(create_event("late"))
        assert data_of(await first) == ["early", "late"]
        assert data_of(await second) == ["late"]

    async def test_without_subscribers_events_pass(self) -> None:
        async with AsyncStream(buffer_size=2) as stream:
            assert all(await publish_all(stream, range(10)))
            await settle()
            assert stream.statistics().buffered == 0

    async def test_state_names_that_callers_know(self) -> None:
        stream = AsyncStream(buffer_size=7)
        assert stream._buffer.maxsize == 7
        assert AsyncStream()._buffer.maxsize == 1000
        assert AsyncStream(enable_backpressure=False)._buffer.maxsize == 0
        assert not stream._running
        await stream.start()
        assert stream._running
        subscription = await stream.subscribe()
        queue = stream._subscribers[subscription]
        assert isinstance(queue, asyncio.Queue)
        assert queue.maxsize == 100
        await stream.publish(create_event(1))
        assert (await queue.get()).data == 1
        await stream.stop()
        assert not stream._running

    @pytest.mark.parametrize("size", [0, -1])
    def test_a_buffer_holds_something(self, size: int) -> None:
        with pytest.raises(ValueError, match="1 or more"):
            AsyncStream(buffer_size=size)
        assert AsyncStream(size, enable_backpressure=False)._buffer.maxsize == 0

    @settings(max_examples=25)
    @given(
        paces=st.lists(
            st.tuples(st.integers(1, 5), st.lists(st.sampled_from([0.0, 0.1, 0.3]), min_size=1)),
            min_size=1,
            max_size=4,
        ),
        buffer_size=st.integers(1, 6),
        gaps=st.lists(st.sampled_from([None, 0.0, 0.3]), min_size=1, max_size=30),
    )
    async def test_order_is_publish_order_whatever_the_consumers_do(
        self,
        paces: list[tuple[int, list[float]]],
        buffer_size: int,
        gaps: list[float | None],
    ) -> None:
        stream = AsyncStream(buffer_size, heartbeat_interval=None)

        async def consume(subscription: str, pauses: list[float]) -> list[Event]:
            events = []
            async for event in stream.consume(subscription):
                events.append(event)
                await asyncio.sleep(pauses[len(events) % len(pauses)])
            return events

        async with stream:
            readers = {}
            for overflow in ("block", "drop_newest", "drop_oldest"):
                for size, pauses in paces:
                    subscription = await stream.subscribe(size, overflow=overflow)
                    reader = asyncio.create_task(consume(subscription, pauses))
                    readers[reader] = overflow
            for number, gap in enumerate(gaps):
                if gap is not None:
                    await asyncio.sleep(gap)
                assert await stream.publish(create_event(number))
            await asyncio.sleep(4.0 * len(gaps))
        for reader, overflow in readers.items():
            events = await reader
            got = [event.data for event in events if not event.is_control]
            lost = sum(event.data["lost"] for event in events if event.is_control)
            assert got == sorted(set(got))
            assert len(got) + lost == len(gaps)
            # Wherever something is missing, the reader was told so at that very place.
            expected = 0
            for event in events:
                if event.is_control:
                    expected += event.data["lost"]
                else:
                    assert event.data == expected
                    expected += 1
            assert not lost or overflow != "block"

    async def test_a_lone_event_reaches_who_waits_and_who_does_not(self) -> None:
        async with AsyncStream() as stream:
            waiting = reading(stream, await stream.subscribe())
            unread = await stream.subscribe(buffer_size=3)
            full = await stream.subscribe(buffer_size=1)
            keyed = reading(stream, await stream.subscribe(overflow="latest_by_key"))
            for number in range(3):
                await settle()
                assert await stream.publish(create_event(number))
            await settle()
            assert stream.statistics().dropped == 2
            assert stream.statistics().published == 3
        assert data_of(await waiting) == data_of(await keyed) == [0, 1, 2]
        assert data_of(await read(stream, unread)) == [0, 1, 2]
        got = await read(stream, full)
        assert (got[0].data, got[1].type, got[1].data["lost"]) == (0, "stream.lost", 2)

    async def test_what_does_not_fit_at_once_is_not_overtaken(self) -> None:
        async with AsyncStream() as stream:
            waiting = reading(stream, await stream.subscribe())
            late = await stream.subscribe(buffer_size=2)
            for number in range(2):
                await settle()
                stream.publish_nowait(create_event(number))
            await settle()
            slow = reading(stream, late)  # it will begin with its queue full
            stream.publish_nowait(create_event(2))
            stream.publish_nowait(create_event(3))
        assert data_of(await waiting) == [0, 1, 2, 3]
        assert data_of(await slow) == [0, 1, 2, 3]


class TestSlowConsumers:
    async def test_one_loses_the_newest_is_told_and_the_others_lose_nothing(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with AsyncStream() as stream:
            slow = await stream.subscribe(buffer_size=3)
            quick = reading(stream, await stream.subscribe(buffer_size=3))
            await publish_all(stream, range(10))
            await settle()
            statistics = stream.statistics()
            assert statistics.queues[slow].dropped == statistics.dropped == 7
            async with aclosing(stream.consume(slow)) as events:
                got = [await anext(events) for _ in range(4)]
                await stream.publish(create_event("next"))
                got.append(await anext(events))
                await publish_all(stream, range(10, 20))
                await settle()
        assert data_of(got[:3]) == [0, 1, 2]
        assert (got[3].type, got[3].data) == (
            "stream.lost",
            {"lost": 7, "overflow": "drop_newest"},
        )
        assert got[3].is_control
        assert got[4].data == "next"
        assert data_of(await quick) == [*range(10), "next", *range(10, 20)]
        warned = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warned) == 1
        assert slow in warned[0].getMessage()
        assert stream.statistics().dropped == 14

    async def test_drop_oldest_keeps_the_newest(self) -> None:
        async with AsyncStream() as stream:
            subscription = await stream.subscribe(3, overflow="drop_oldest")
            await publish_all(stream, range(10))
        events = await read(stream, subscription)
        assert events[0].data == {"lost": 7, "overflow": "drop_oldest"}
        assert data_of(events[1:]) == [7, 8, 9]

    async def test_latest_by_key_keeps_the_newest_of_each(self) -> None:
        async with AsyncStream() as stream:
            by_topic = await stream.subscribe(3, overflow="latest_by_key")
            parity = await stream.subscribe(
                3, overflow="latest_by_key", key=lambda event: event.data % 2
            )
            for number in range(10):
                await stream.publish(create_event(number, topic=f"t{number % 3}"))
        assert data_of(await read(stream, by_topic)) == [9, 7, 8]
        assert data_of(await read(stream, parity)) == [8, 9]
        assert stream.statistics().dropped == 0

    async def test_a_key_function_that_raises_stops_nobody(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        def key(event: Event) -> int:
            return int(10 / event.data)

        async with AsyncStream() as stream:
            broken = await stream.subscribe(9, overflow="latest_by_key", key=key)
            other = reading(stream, await stream.subscribe())
            for number in (0, 5, 0, 5, 10):
                await stream.publish(create_event(number))
        assert data_of(await other) == [0, 5, 0, 5, 10]
        assert data_of(await read(stream, broken)) == [0, 5, 0, 10]
        assert "ZeroDivisionError" in caplog.text

    async def test_disconnect_ends_the_consumer_with_the_reason(self) -> None:
        async with AsyncStream() as stream:
            subscription = await stream.subscribe(3, overflow="disconnect")
            await publish_all(stream, range(10))
            await settle()
            events = await read(stream, subscription)
            assert data_of(events[:3]) == [0, 1, 2]
            assert (events[3].type, events[3].data["reason"]) == ("stream.disconnect", "overflow")
            assert len(events) == 4
            assert stream.statistics().subscribers == 0
            with pytest.raises(UnknownSubscription):
                stream.consume(subscription)
            assert stream.statistics().dropped == 1  # counted although it is gone

    async def test_block_makes_the_publisher_wait_and_loses_nothing(self) -> None:
        async with AsyncStream(buffer_size=2) as stream:
            blocking = reading(stream, await stream.subscribe(2, overflow="block"), pause=0.1)
            quick = reading(stream, await stream.subscribe(2))
            assert all(await publish_all(stream, range(50)))
            assert 4.0 < now() < 5.0  # the pace of the slow one, less what waits in line
        assert data_of(await blocking) == list(range(50))
        assert data_of(await quick) == list(range(50))
        assert stream.statistics().dropped == 0

    async def test_a_blocked_consumer_costs_the_same_however_much_waits_for_it(self) -> None:
        stream = AsyncStream(enable_backpressure=False)
        async with stream:
            subscription = await stream.subscribe(2, overflow="block")
            await publish_all(stream, range(3))
            await settle()
            gc.collect()
            before = sum(isinstance(each, asyncio.Future) for each in gc.get_objects())
            for number in range(3, 500):
                await stream.publish(create_event(number))
                await asyncio.sleep(0)
            assert sum(isinstance(each, asyncio.Future) for each in gc.get_objects()) <= before + 2
            assert stream.statistics().buffered == 498
            reader = reading(stream, subscription)
        assert data_of(await reader) == list(range(500))

    async def test_a_consumer_that_reads_one_at_a_turn_loses_nothing(self) -> None:
        """What did not fit is offered again after each turn in which it took something."""

        async def one_at_a_turn() -> list[Event]:
            events = []
            async for event in stream.consume(subscription):
                events.append(event)
                await asyncio.sleep(0)
            return events

        async with AsyncStream() as stream:
            subscription = await stream.subscribe(buffer_size=1)
            reader = asyncio.create_task(one_at_a_turn())
            await publish_all(stream, range(50))
        assert data_of(await reader) == list(range(50))

    async def test_an_unknown_policy_is_refused(self) -> None:
        stream = AsyncStream()
        with pytest.raises(ValueError, match="drop_newest"):
            await stream.subscribe(overflow="drop_all")
        with pytest.raises(ValueError, match="latest_by_key"):
            await stream.subscribe(key=lambda event: event.id)
        assert stream.statistics().subscribers == 0

    async def test_a_bound_of_zero_is_none(self) -> None:
        async with AsyncStream() as stream:
            subscription = await stream.subscribe(0)
            await publish_all(stream, range(900))
        assert data_of(await read(stream, subscription)) == list(range(900))

    async def test_what_a_key_function_publishes_comes_next(self) -> None:
        def key(event: Event) -> Any:
            if event.data == 0:
                stream.publish_nowait(create_event(2))
            return event.data

        async with AsyncStream() as stream:
            readers = [
                reading(stream, await stream.subscribe(overflow="latest_by_key", key=key)),
                reading(stream, await stream.subscribe()),
            ]
            await publish_all(stream, range(2))
            await settle()
        for reader in readers:
            assert data_of(await reader) == [0, 1, 2]

    async def test_a_key_function_that_is_cancelled_keeps_no_event_from_anybody(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        def key(event: Event) -> str:
            raise asyncio.CancelledError

        async with AsyncStream() as stream:
            readers = [
                reading(stream, await stream.subscribe(overflow="latest_by_key", key=key)),
                reading(stream, await stream.subscribe()),
            ]
            await publish_all(stream, range(3))
        for reader in readers:
            assert data_of(await reader) == [0, 1, 2]
        assert "key function" in caplog.text


class TestBroadcast:
    async def test_it_drops_where_a_queue_is_full_and_counts(self) -> None:
        stream = AsyncStream()
        full, roomy = await stream.subscribe(1), await stream.subscribe(5)
        for number in range(3):
            await stream._broadcast(create_event(number))
        assert stream._subscribers[full].qsize() == 1
        assert stream._subscribers[roomy].qsize() == 3
        assert stream.statistics().queues[full].dropped == 2
        await stream.stop()
        assert data_of((await read(stream, full))[:1]) == [0]
        assert data_of(await read(stream, roomy)) == [0, 1, 2]

    async def test_it_waits_where_the_policy_is_to_block(self) -> None:
        async with AsyncStream() as stream:
            subscription = await stream.subscribe(1, overflow="block")
            await stream._broadcast(create_event(0))
            waiting = asyncio.create_task(stream._broadcast(create_event(1)))
            await settle()
            assert not waiting.done()
            async with aclosing(stream.consume(subscription)) as events:
                assert (await anext(events)).data == 0
                await waiting
                assert (await anext(events)).data == 1

    async def test_it_passes_over_those_that_have_ended(self) -> None:
        stream = AsyncStream()
        await stream.subscribe(1, overflow="block")
        await stream._broadcast(create_event(0))
        waiting = asyncio.create_task(stream._broadcast(create_event(1)))
        await settle()
        await stream.stop()
        await waiting
        await stream._broadcast(create_event(2))


class TestFullBuffer:
    async def test_publish_waits_for_five_seconds_and_returns_false(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        stream = AsyncStream(buffer_size=2)  # never started
        await publish_all(stream, range(2))
        event = create_event(2)
        before = now()
        assert await stream.publish(event) is False
        assert now() - before == 5.0
        assert event.id in caplog.text
        assert stream.statistics().refused == 1
        assert stream.statistics().published == 2

    async def test_publish_arms_no_timer_and_gives_up_no_turn_while_there_is_room(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_timer(*_: Any, **options: Any) -> None:
            raise AssertionError("a timer, although there is nothing to wait for")

        async with AsyncStream() as stream:
            reader = reading(stream, await stream.subscribe())
            await settle()
            with monkeypatch.context() as patch:
                patch.setattr(asyncio.get_running_loop(), "call_at", no_timer)
                for number in range(500):
                    with pytest.raises(StopIteration) as done:
                        stream.publish(create_event(number)).send(None)
                    assert done.value.value is True
        assert data_of(await reader) == list(range(500))

    async def test_publish_goes_on_as_soon_as_there_is_room(self) -> None:
        stream = AsyncStream(buffer_size=1)
        subscription = await stream.subscribe()
        await stream.publish(create_event(0))
        waiting = [
            asyncio.create_task(stream.publish(create_event(number))) for number in range(1, 6)
        ]
        await asyncio.sleep(3.0)
        await stream.start()
        assert await asyncio.gather(*waiting) == [True] * 5
        assert now() == 3.0
        await stream.stop()
        assert data_of(await read(stream, subscription)) == list(range(6))

    async def test_a_publisher_that_was_cancelled_has_published_nothing(self) -> None:
        stream = AsyncStream(buffer_size=1)
        subscription = await stream.subscribe()
        await stream.publish(create_event(0))
        waiting = [asyncio.create_task(stream.publish(create_event(n))) for n in (1, 2)]
        await settle()
        waiting[0].cancel()
        await settle()
        await stream.start()
        assert await waiting[1] is True
        await stream.stop()
        assert data_of(await read(stream, subscription)) == [0, 2]

    async def test_one_cancelled_as_it_is_let_in_has_published_nothing(self) -> None:
        stream = AsyncStream(buffer_size=2)
        subscription = await stream.subscribe()
        await publish_all(stream, range(2))
        waiting = [asyncio.create_task(stream.publish(create_event(n))) for n in (2, 3, 4)]
        await settle()
        await stream.start()
        asyncio.get_running_loop().call_soon(waiting[0].cancel)  # right after the dispatcher
        assert await asyncio.gather(*waiting[1:]) == [True, True]
        assert waiting[0].cancelled()
        assert stream.statistics().published == 4
        await stream.stop()
        assert data_of(await read(stream, subscription)) == [0, 1, 3, 4]

    async def test_one_cancelled_as_it_is_let_in_before_a_dispatch_that_was_due_has_not_either(
        self,
    ) -> None:
        async with AsyncStream(buffer_size=2) as stream:
            subscription = await stream.subscribe(3)
            await publish_all(stream, range(2))
            await settle()
            assert await publish_all(stream, range(2, 4)) == [True] * 2  # one will be late
            reader = reading(stream, subscription)

            async def give_up() -> None:
                await publish_all(stream, range(4, 6))  # which asks for a dispatch
                asyncio.get_running_loop().call_soon(publishing.cancel)
                await stream.publish(create_event(6))

            publishing = asyncio.create_task(give_up())
            await settle()
            assert publishing.cancelled()
            assert stream.statistics().published == 6
        assert data_of(await reader) == list(range(6))

    @pytest.mark.real_time
    async def test_one_in_another_loop_that_is_cancelled_as_it_is_let_in_takes_nothing_back(
        self,
    ) -> None:
        stream = AsyncStream(buffer_size=1)
        subscription = await stream.subscribe()
        await stream.publish(create_event(0))
        in_line = threading.Event()
        let_in = threading.Event()

        async def give_up() -> None:
            publishing = asyncio.create_task(stream.publish(create_event(1)))
            await asyncio.sleep(0)
            in_line.set()
            let_in.wait(PATIENCE)
            publishing.cancel()
            await asyncio.wait([publishing])

        elsewhere = asyncio.create_task(asyncio.to_thread(asyncio.run, give_up()))
        assert await asyncio.to_thread(in_line.wait, PATIENCE)
        await stream.start()
        await settle()
        assert stream.statistics().published == 2
        let_in.set()
        await elsewhere
        await stream.stop()
        assert data_of(await read(stream, subscription)) == [0, 1]

    async def test_one_that_leaves_the_line_as_it_is_let_in_takes_no_event_with_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stream = AsyncStream(buffer_size=1)
        subscription = await stream.subscribe()
        await stream.publish(create_event(0))
        waiting = asyncio.create_task(stream.publish(create_event(1)))
        await settle()

        def full() -> bool:  # between two looks, as its publisher would in another thread
            waiting.cancel()
            stream._line.clear()
            return False

        monkeypatch.setattr(stream._buffer, "full", full)
        await stream.start()
        await settle()
        assert waiting.cancelled()
        await stream.stop()
        assert data_of(await read(stream, subscription)) == [0]

    async def test_waiting_publishers_get_false_at_once_when_it_stops(self) -> None:
        async with AsyncStream(buffer_size=1) as stream:
            await stream.subscribe(1, overflow="block")
            await stream.publish(create_event(0))
            await settle()  # it is in the consumer's queue
            await stream.publish(create_event(1))
            await settle()  # it does not fit
            await stream.publish(create_event(2))
            waiting = asyncio.create_task(stream.publish(create_event(3)))
            await settle()
            before = now()
            stopping = asyncio.create_task(stream.stop())
            assert await waiting is False
            assert now() == before
            await stopping

    async def test_a_publisher_that_waited_at_the_stop_is_not_let_into_what_comes_after(
        self,
    ) -> None:
        stream = AsyncStream(buffer_size=1)
        await stream.publish(create_event(0))
        waiting = asyncio.create_task(stream.publish(create_event(1)))
        await settle()
        await stream.stop()
        await stream.start()
        assert await waiting is False
        await stream.stop()

    async def test_a_stop_at_the_very_end_of_the_wait_is_one_refusal(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        stream = AsyncStream(buffer_size=1)
        await stream.publish(create_event(0))
        stopping = []
        asyncio.get_running_loop().call_at(
            5.0, lambda: stopping.append(asyncio.create_task(stream.stop()))
        )
        assert await stream.publish(create_event(1)) is False
        await stopping[0]
        assert now() == 5.0
        assert stream.statistics().refused == 1
        assert caplog.text == ""

    async def test_publish_after_stop_is_false_at_once(self) -> None:
        async with AsyncStream() as stream:
            pass
        before = now()
        assert await publish_all(stream, range(10)) == [False] * 10
        assert not stream.publish_nowait(create_event(1))
        assert now() == before
        assert stream.statistics().refused == 11
        assert stream.statistics().published == 0

    async def test_without_backpressure_publish_never_waits(self) -> None:
        stream = AsyncStream(buffer_size=1, enable_backpressure=False)
        subscription = await stream.subscribe(0)
        assert all(await publish_all(stream, range(3000)))
        assert now() == 0.0
        await stream.start()
        await stream.stop()
        assert data_of(await read(stream, subscription)) == list(range(3000))

    async def test_publish_nowait_says_what_it_took(self) -> None:
        stream = AsyncStream(buffer_size=2)
        subscription = await stream.subscribe()
        taken = [stream.publish_nowait(create_event(number)) for number in range(4)]
        assert taken == [True, True, False, False]
        assert stream.statistics().refused == 2
        async with stream:
            await settle()
            assert stream.publish_nowait(create_event(4))
        assert data_of(await read(stream, subscription)) == [0, 1, 4]


class TestStop:
    async def test_what_was_published_is_delivered_and_then_consumers_end_at_once(self) -> None:
        stream = AsyncStream()
        await stream.start()
        idle = reading(stream, await stream.subscribe())
        busy = reading(stream, await stream.subscribe(), pause=0.1)
        await asyncio.gather(*(stream.publish(create_event(number)) for number in range(10)))
        await stream.stop()
        assert now() == 0.0
        assert data_of(await idle) == list(range(10))
        assert now() == 0.0
        assert data_of(await busy) == list(range(10))
        assert now() == pytest.approx(1.0)

    async def test_an_idle_consumer_ends_without_a_heartbeat(self) -> None:
        async with AsyncStream() as stream:
            reader = reading(stream, await stream.subscribe())
            await asyncio.sleep(7.0)
        assert await reader == []
        assert now() == 7.0

    async def test_before_any_start_it_flushes(self) -> None:
        stream = AsyncStream()
        subscription = await stream.subscribe(2)
        reader = reading(stream, subscription)
        await settle()
        await publish_all(stream, range(5))
        await stream.stop()
        assert data_of(await reader) == list(range(5))

    async def test_twice_does_nothing(self) -> None:
        stream = AsyncStream()
        await stream.start()
        await stream.stop()
        await stream.stop()
        assert not stream._running

    async def test_a_second_one_waits_for_the_first(self) -> None:
        stream = AsyncStream()
        await stream.start()
        await stream.subscribe(1, overflow="block")
        await publish_all(stream, range(3))
        await settle()
        first = asyncio.create_task(stream.stop(timeout=3.0))
        await settle()
        await stream.stop()
        assert now() == pytest.approx(3.0, abs=0.01)
        await first

    async def test_a_start_waits_for_it_and_loses_nothing(self) -> None:
        stream = AsyncStream()
        await stream.start()
        reader = reading(stream, await stream.subscribe(1, overflow="block"), pause=0.5)
        await publish_all(stream, range(5))
        stopping = asyncio.create_task(stream.stop())
        await settle()
        await stream.start()
        assert stopping.done()
        second = await stream.subscribe()
        assert await stream.publish(create_event("again"))
        await stream.stop()
        assert data_of(await reader) == list(range(5))
        assert data_of(await read(stream, second)) == ["again"]

    async def test_start_twice_does_nothing(self) -> None:
        stream = AsyncStream()
        await stream.start()
        await stream.start()
        reader = reading(stream, await stream.subscribe())
        await publish_all(stream, range(5))
        await stream.stop()
        assert data_of(await reader) == list(range(5))

    async def test_it_can_be_started_again(self) -> None:
        stream = AsyncStream(buffer_size=5)
        await stream.start()
        first = await stream.subscribe()
        await publish_all(stream, range(3))
        await stream.stop()
        between = await stream.subscribe()
        await stream.start()
        second = reading(stream, await stream.subscribe())
        assert all(await publish_all(stream, range(3, 6)))
        await stream.stop()
        assert data_of(await read(stream, first)) == [0, 1, 2]
        assert data_of(await read(stream, between)) == [3, 4, 5]
        assert data_of(await second) == [3, 4, 5]
        statistics = stream.statistics()
        assert (statistics.published, statistics.dropped, statistics.subscribers) == (6, 0, 0)

    async def test_a_consumer_that_blocks_is_waited_for_until_the_timeout(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        stream = AsyncStream()
        await stream.start()
        stuck = await stream.subscribe(2, overflow="block")
        other = reading(stream, await stream.subscribe(2))
        await publish_all(stream, range(6))
        await settle()
        before = now()
        await stream.stop(timeout=3.0)
        assert now() - before == 3.0
        assert "no room within 3 s" in caplog.text
        events = await read(stream, stuck)
        assert data_of(events[:2]) == [0, 1]
        assert events[2].data == {"lost": 4, "overflow": "block"}
        assert len(events) == 3
        assert data_of(await other) == list(range(6))
        assert stream.statistics().dropped == 4

    async def test_a_consumer_that_blocks_and_reads_on_gets_everything(self) -> None:
        stream = AsyncStream()
        await stream.start()
        reader = reading(stream, await stream.subscribe(2, overflow="block"), pause=0.5)
        await publish_all(stream, range(7))
        await stream.stop()
        assert now() < 5.0
        assert data_of(await reader) == list(range(7))

    async def test_a_subscription_left_unread_does_not_count_what_comes_after_it(self) -> None:
        stream = AsyncStream()
        old = await stream.subscribe(1, overflow="block")
        await stream.publish(create_event(0))
        await stream.stop()
        await stream.start()
        new = await stream.subscribe(1, overflow="block")
        await publish_all(stream, range(1, 4))
        await settle()
        await stream.stop(timeout=0.1)
        assert stream.statistics().queues[old].dropped == 0
        assert stream.statistics().queues[new].dropped == 2

    async def test_cancelled_it_still_stops_and_passes_the_cancellation_on(self) -> None:
        stream = AsyncStream()
        await stream.start()
        stuck = await stream.subscribe(1, overflow="block")
        reader = reading(stream, await stream.subscribe())
        await publish_all(stream, range(4))
        await settle()
        stopping = asyncio.create_task(stream.stop())
        await settle()
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        assert await stream.publish(create_event(9)) is False
        assert data_of(await reader) == [0, 1, 2, 3]
        assert [event.data for event in await read(stream, stuck)] == [
            0,
            {"lost": 3, "overflow": "block"},
        ]


class TestConsume:
    async def test_a_heartbeat_comes_after_thirty_seconds_without_an_event(self) -> None:
        async with AsyncStream() as stream:
            subscription = await stream.subscribe()
            async with aclosing(stream.consume(subscription)) as events:
                beat = await anext(events)
                assert (beat.type, now()) == (EventType.HEARTBEAT, 30.0)
                await asyncio.sleep(10.0)
                await stream.publish(create_event(1))
                assert (await anext(events)).data == 1
                before = now()
                assert (await anext(events)).type is EventType.HEARTBEAT
                assert now() - before == 30.0
        assert stream.statistics().published == 1

    @pytest.mark.parametrize("interval", [0.5, None])
    async def test_the_interval_can_be_chosen(self, interval: float | None) -> None:
        async with AsyncStream(heartbeat_interval=interval) as stream:
            reader = reading(stream, await stream.subscribe())
            await asyncio.sleep(2.2)
        beats = await reader
        assert [event.type for event in beats] == [EventType.HEARTBEAT] * (4 if interval else 0)

    async def test_a_second_reader_of_one_subscription_is_refused(self) -> None:
        async with AsyncStream() as stream:
            subscription = await stream.subscribe()
            reader = reading(stream, subscription)
            await settle()
            with pytest.raises(AlreadyConsumed, match=subscription):
                stream.consume(subscription)
            await publish_all(stream, range(6))
        assert data_of(await reader) == list(range(6))

    async def test_a_reader_that_has_not_begun_counts_as_one(self) -> None:
        async with AsyncStream() as stream:
            subscription = await stream.subscribe()
            first = stream.consume(subscription)
            with pytest.raises(AlreadyConsumed):
                stream.consume(subscription)
            await first.aclose()
            async with aclosing(stream.consume(subscription)):
                pass

    async def test_an_unknown_subscription_is_refused(self) -> None:
        stream = AsyncStream()
        with pytest.raises(UnknownSubscription, match="nobody"):
            stream.consume("nobody")

    async def test_after_a_break_it_goes_on_where_it_was(self) -> None:
        async with AsyncStream() as stream:
            subscription = await stream.subscribe()
            await publish_all(stream, range(9))
            got = []
            for _ in range(3):
                async for event in stream.consume(subscription):
                    got.append(event.data)
                    if len(got) % 3 == 0:
                        break
            assert got == list(range(9))
            await settle()  # the loops that were left are closed only now
            async with aclosing(stream.consume(subscription)):
                with pytest.raises(AlreadyConsumed):
                    stream.consume(subscription)
                await settle()
                with pytest.raises(AlreadyConsumed):
                    stream.consume(subscription)

    async def test_a_loop_left_long_ago_does_not_let_a_second_reader_in(self) -> None:
        async with AsyncStream() as stream:
            subscription = await stream.subscribe()
            await stream.publish(create_event(0))
            async for _ in stream.consume(subscription):
                break
            reader = reading(stream, subscription)  # begins before the first one is closed
            await settle()
            with pytest.raises(AlreadyConsumed):
                stream.consume(subscription)
        assert await reader == []

    async def test_a_consumer_that_was_cancelled_has_lost_nothing(self) -> None:
        async with AsyncStream() as stream:
            subscription = await stream.subscribe()
            reader = reading(stream, subscription)
            await settle()
            await stream.publish(create_event(1))
            reader.cancel()
            await settle()
            assert reader.cancelled()
            reader = reading(stream, subscription)
            await stream.publish(create_event(2))
        assert data_of(await reader) == [1, 2]

    async def test_one_that_leaves_just_before_a_loss_at_the_end_can_come_back_for_it(self) -> None:
        stream = AsyncStream()
        subscription = await stream.subscribe(1)
        await publish_all(stream, range(3))
        await stream.start()
        await stream.stop()
        async with aclosing(stream.consume(subscription)) as events:
            assert (await anext(events)).data == 0
        assert data_of(await read(stream, subscription)) == [
            {"lost": 2, "overflow": "drop_newest"},
        ]
        with pytest.raises(UnknownSubscription):
            stream.consume(subscription)


class TestUnsubscribe:
    async def test_the_consumer_gets_what_was_published_and_ends_at_once(self) -> None:
        async with AsyncStream() as stream:
            subscription = await stream.subscribe(3)
            reader = reading(stream, subscription, pause=0.1)
            await publish_all(stream, range(3))
            await asyncio.sleep(0.05)
            await publish_all(stream, range(3, 8))  # still in the stream's own buffer
            assert await stream.unsubscribe(subscription)
            await stream.publish(create_event("after"))
            assert data_of(await reader) == list(range(8))
            assert now() == pytest.approx(0.8)

    async def test_an_idle_consumer_ends_at_once(self) -> None:
        async with AsyncStream() as stream:
            subscription = await stream.subscribe()
            reader = reading(stream, subscription)
            await asyncio.sleep(3.0)
            assert await stream.unsubscribe(subscription)
            assert await reader == []
            assert now() == 3.0
            with pytest.raises(UnknownSubscription):
                stream.consume(subscription)

    async def test_before_start_it_gets_what_has_collected(self) -> None:
        stream = AsyncStream()
        subscription = await stream.subscribe()
        await publish_all(stream, range(3))
        reader = reading(stream, subscription)
        await settle()
        await stream.unsubscribe(subscription)
        assert data_of(await reader) == [0, 1, 2]

    async def test_what_did_not_fit_into_its_queue_is_not_lost(self) -> None:
        async with AsyncStream() as stream:
            subscription = await stream.subscribe(2, overflow="block")
            await publish_all(stream, range(5))
            await settle()
            await publish_all(stream, range(5, 7))
            events = stream.consume(subscription)
            await stream.unsubscribe(subscription)
            assert [event.data async for event in events] == list(range(7))
            assert await stream.publish(create_event("the others go on"))

    async def test_what_is_about_to_be_tried_again_is_not_lost(self) -> None:
        async with AsyncStream() as stream:
            subscription = await stream.subscribe(1)
            events = stream.consume(subscription)
            assert all(stream.publish_nowait(create_event(number)) for number in range(3))
            await asyncio.sleep(0)  # one event has been moved, and for two there was no room
            await stream.unsubscribe(subscription)
            assert [event.data async for event in events] == [0, 1, 2]

    async def test_one_that_was_disconnected_gets_nothing_more(self) -> None:
        async with AsyncStream() as stream:
            subscription = await stream.subscribe(1, overflow="disconnect")
            events = stream.consume(subscription)
            await publish_all(stream, range(3))
            await settle()
            await stream.publish(create_event("after"))
            assert await stream.unsubscribe(subscription)
            assert [event.type async for event in events] == ["message", "stream.disconnect"]

    async def test_an_unknown_id_is_false(self) -> None:
        stream = AsyncStream()
        subscription = await stream.subscribe()
        assert not await stream.unsubscribe("nobody")
        assert await stream.unsubscribe(subscription)
        assert not await stream.unsubscribe(subscription)

    async def test_thousands_come_and_go_without_a_trace(self) -> None:
        async with AsyncStream() as stream:
            for _ in range(1000):
                subscription = await stream.subscribe()
                events = stream.consume(subscription)
                await stream.unsubscribe(subscription)
                assert [event async for event in events] == []
            gc.collect()
            before = len(gc.get_objects())
            for _ in range(10_000):
                await stream.unsubscribe(await stream.subscribe())
            gc.collect()
            assert len(gc.get_objects()) < before + 100
            assert stream.statistics().subscribers == 0


class TestThreadsAndLoops:
    @pytest.mark.real_time
    async def test_publishers_in_other_threads_wake_the_consumer(self) -> None:
        stream = AsyncStream(buffer_size=100_000)
        each, threads = 2000, 4

        def publish(first: int) -> None:
            for number in range(first, first + each):
                assert stream.publish_nowait(create_event(number))

        async with stream:
            subscription = await stream.subscribe(0)
            reader = reading(stream, subscription)
            await asyncio.gather(
                *(asyncio.to_thread(publish, each * index) for index in range(threads))
            )
        got = data_of(await reader)
        assert sorted(got) == list(range(each * threads))
        for index in range(threads):
            of_one = [number for number in got if number // each == index]
            assert of_one == sorted(of_one)
        assert stream.statistics().published == each * threads

    async def test_an_event_added_as_the_dispatcher_passes_is_not_left_behind(self) -> None:
        class Items(deque[Event]):
            """The dispatcher, in its thread, has taken all there was when this adds."""

            def append(self, event: Event) -> None:
                stream._scheduled = False
                super().append(event)

        async with AsyncStream() as stream:
            reader = reading(stream, await stream.subscribe())
            await settle()
            stream._items = stream._buffer._queue = Items()
            stream._scheduled = True
            assert await stream.publish(create_event("behind"))
            await settle()
            stream._items = stream._buffer._queue = deque()
        assert data_of(await reader) == ["behind"]

    @pytest.mark.real_time
    async def test_a_publisher_with_a_loop_of_its_own_waits_for_room_there(self) -> None:
        async with AsyncStream(buffer_size=5) as stream:
            reader = reading(stream, await stream.subscribe(5, overflow="block"))
            taken = await asyncio.to_thread(asyncio.run, publish_all(stream, range(500)))
        assert all(taken)
        assert data_of(await reader) == list(range(500))

    @pytest.mark.real_time
    async def test_a_lone_event_of_another_thread_arrives_at_once(self) -> None:
        async with AsyncStream() as stream:
            subscription = await stream.subscribe()
            async with aclosing(stream.consume(subscription)) as events:
                thread = threading.Timer(0.05, stream.publish_nowait, [create_event(1)])
                thread.start()
                event = await asyncio.wait_for(anext(events), PATIENCE)
                assert event.data == 1

    @pytest.mark.real_time
    async def test_a_start_in_another_loop_does_not_take_a_running_stream_there(self) -> None:
        started, over = threading.Event(), threading.Event()

        async def elsewhere() -> None:
            await stream.start()
            started.set()
            over.wait(PATIENCE)  # and this loop does nothing

        async with AsyncStream() as stream:
            subscription = await stream.subscribe()
            thread = threading.Thread(target=asyncio.run, args=[elsewhere()])
            thread.start()
            await asyncio.to_thread(started.wait, PATIENCE)
            await stream.publish(create_event(1))
            async with aclosing(stream.consume(subscription)) as events:
                assert (await asyncio.wait_for(anext(events), PATIENCE / 2)).data == 1
            over.set()
            thread.join()

    @pytest.mark.real_time
    async def test_it_can_be_stopped_from_another_loop(self) -> None:
        for _ in range(20):
            stream = AsyncStream()
            await stream.start()
            reader = reading(stream, await stream.subscribe(2))
            await asyncio.sleep(0)
            await publish_all(stream, range(50))
            await asyncio.to_thread(asyncio.run, stream.stop())
            assert data_of(await asyncio.wait_for(reader, PATIENCE)) == list(range(50))

    @pytest.mark.real_time
    async def test_a_stop_that_is_cancelled_in_another_loop_ends_it_all_the_same(self) -> None:
        stream = AsyncStream()
        await stream.start()
        subscription = await stream.subscribe(1, overflow="block")
        await publish_all(stream, range(3))

        async def stop() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(stream.stop(), 0.05)

        await asyncio.to_thread(asyncio.run, stop())
        await stream.stop()
        assert [event.data for event in await read(stream, subscription)] == [
            0,
            {"lost": 2, "overflow": "block"},
        ]

    @pytest.mark.real_time
    async def test_a_stop_does_not_wait_for_a_loop_that_does_not_go_on(self) -> None:
        stream = AsyncStream()
        await stream.start()
        subscription = await stream.subscribe(1)
        roomy = await stream.subscribe()
        await publish_all(stream, range(3))
        stopped = threading.Event()

        def stop() -> None:
            asyncio.run(stream.stop(timeout=0.01))
            stopped.set()

        thread = threading.Thread(target=stop)
        thread.start()
        assert stopped.wait(PATIENCE)  # in the loop, which can do nothing meanwhile
        thread.join()
        assert not await stream.publish(create_event(9))
        await stream.stop()  # done by the loop, as soon as it goes on
        await asyncio.sleep(0)
        assert data_of(await read(stream, roomy)) == [0, 1, 2]
        assert [event.data for event in await read(stream, subscription)] == [
            0,
            {"lost": 2, "overflow": "drop_newest"},
        ]

    @pytest.mark.real_time
    async def test_a_stop_goes_on_here_when_the_loop_it_waits_for_is_closed(self) -> None:
        for cancelled in (False, True):
            stream = AsyncStream()
            ready, over = threading.Event(), threading.Event()

            async def home(stream: AsyncStream, ready: Any, over: Any) -> None:
                await stream.start()
                await stream.subscribe(1, overflow="block")
                await publish_all(stream, range(3))
                ready.set()
                await asyncio.to_thread(over.wait, PATIENCE)

            living = asyncio.create_task(asyncio.to_thread(asyncio.run, home(stream, ready, over)))
            await asyncio.to_thread(ready.wait, PATIENCE)
            stopping = asyncio.create_task(stream.stop(timeout=PATIENCE if cancelled else 0.2))
            await asyncio.sleep(0)
            over.set()
            await living
            if cancelled:
                stopping.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await stopping
            else:
                await stopping
            assert stream.statistics().dropped == 2

    def test_a_loop_that_was_closed_without_stop_is_replaced(self) -> None:
        stream = AsyncStream()

        async def first() -> str:
            await stream.start()
            subscription = await stream.subscribe()
            await publish_all(stream, range(2))
            return subscription

        async def second(subscription: str) -> list[Event]:
            assert await stream.publish(create_event(2))  # without another start
            async with aclosing(stream.consume(subscription)) as events:
                return [await anext(events) for _ in range(3)]

        subscription = asyncio.run(first())
        assert data_of(asyncio.run(second(subscription))) == [0, 1, 2]

    def leave_unfinished(self, stream: AsyncStream) -> str:
        """A loop that is closed with the dispatcher due in it, and a publisher."""

        async def main() -> str:
            await stream.start()
            subscription = await stream.subscribe(1, overflow="block")
            await publish_all(stream, range(3))
            return subscription

        loop = asyncio.new_event_loop()
        subscription = loop.run_until_complete(main())
        assert stream.publish_nowait(create_event(3))
        loop.close()
        return subscription

    def test_start_in_a_new_loop_takes_up_what_was_left(self) -> None:
        stream = AsyncStream()
        subscription = self.leave_unfinished(stream)
        assert stream.publish_nowait(create_event(4))  # no loop at all

        async def again() -> list[Event]:
            await stream.start()
            reader = reading(stream, subscription)
            await stream.publish(create_event(5))
            await stream.stop()
            return await reader

        assert data_of(run(again())) == list(range(6))

    def test_what_did_not_fit_when_the_loop_was_closed_is_not_lost(self) -> None:
        stream = AsyncStream()

        async def first() -> str:
            await stream.start()
            subscription = await stream.subscribe(1)
            assert all(stream.publish_nowait(create_event(number)) for number in range(3))
            return subscription  # in this turn the first is moved, and no other fits

        async def second() -> list[Event]:
            reader = reading(stream, subscription)
            await stream.start()
            await settle()
            await stream.stop()
            return await reader

        loop = asyncio.new_event_loop()
        subscription = loop.run_until_complete(first())
        loop.close()
        assert data_of(run(second())) == [0, 1, 2]

    @pytest.mark.real_time
    async def test_a_stop_that_was_overtaken_ends_nothing_else(self) -> None:
        """What a stop in another thread asked for in vain does not touch a stream that goes on."""
        stream = AsyncStream()
        await stream.start()
        subscription = await stream.subscribe()
        await publish_all(stream, range(3))
        thread = threading.Thread(target=asyncio.run, args=[stream.stop(timeout=0.01)])
        thread.start()
        thread.join()
        await stream.start()
        later = await stream.subscribe()
        await stream.publish(create_event(3))
        await asyncio.sleep(0.01)
        assert await stream.publish(create_event(4))
        await stream.stop()
        assert data_of(await read(stream, subscription)) == [0, 1, 2]
        assert data_of(await read(stream, later)) == [3, 4]

    def test_stop_in_a_new_loop_delivers_what_was_left(self) -> None:
        stream = AsyncStream()
        subscription = self.leave_unfinished(stream)

        async def again() -> list[Event]:
            reader = reading(stream, subscription)
            await settle()
            await stream.stop()
            return await reader

        assert data_of(run(again())) == list(range(4))

    def test_a_publisher_without_a_loop_leaves_its_event_for_the_next(self) -> None:
        stream = AsyncStream()

        async def first() -> str:
            await stream.start()
            return await stream.subscribe()

        async def second(subscription: str) -> list[Event]:
            await stream.stop()
            return await read(stream, subscription)

        subscription = asyncio.run(first())
        assert stream.publish_nowait(create_event(1))
        assert data_of(asyncio.run(second(subscription))) == [1]

    def test_a_loop_that_closes_before_it_has_dispatched_leaves_that_to_the_next(self) -> None:
        stream = AsyncStream(heartbeat_interval=None)
        loop = asyncio.new_event_loop()

        async def first() -> str:
            await stream.start()
            return await stream.subscribe()

        async def second(subscription: str) -> list[Event]:
            assert await stream.publish(create_event(2))
            async with asyncio.timeout(PATIENCE), aclosing(stream.consume(subscription)) as events:
                return [await anext(events) for _ in range(2)]

        subscription = loop.run_until_complete(first())
        assert stream.publish_nowait(create_event(1))
        loop.close()
        assert data_of(run(second(subscription))) == [1, 2]

    def test_a_loop_that_closes_while_a_consumer_blocks_leaves_the_rest_to_the_next(self) -> None:
        stream = AsyncStream(heartbeat_interval=None)

        async def first() -> str:
            await stream.start()
            subscription = await stream.subscribe(1, overflow="block")
            await publish_all(stream, range(3))
            await settle()
            return subscription

        async def second(subscription: str) -> list[Event]:
            async with asyncio.timeout(PATIENCE), aclosing(stream.consume(subscription)) as events:
                return [await anext(events) for _ in range(3)]

        subscription = run(first())
        assert data_of(run(second(subscription))) == [0, 1, 2]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    @pytest.mark.real_time
    async def test_a_child_without_a_loop_publishes_where_one_waited_in_its_parent(self) -> None:
        async with AsyncStream() as stream:
            reader = reading(stream, await stream.subscribe())
            await settle()
            full = await stream.subscribe(1)
            stream._subscribers[full].put_nowait(create_event("full"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:  # pragma: no cover - in the child
                try:
                    os._exit(0 if stream.publish_nowait(create_event("child")) else 1)
                finally:
                    os._exit(2)
            assert (await asyncio.to_thread(os.waitpid, child, 0))[1] == 0
        assert await reader == []

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    def test_one_made_before_a_fork_works_in_the_child(self) -> None:
        stream = AsyncStream()

        async def there() -> list[Event]:
            await stream.start()
            reader = reading(stream, await stream.subscribe())
            await stream.publish(create_event("child"))
            await stream.stop()
            return await reader

        async def here() -> int:
            await stream.start()
            await stream.publish(create_event("parent"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:  # pragma: no cover - in the child
                try:
                    got = data_of(asyncio.run(there()))
                    os._exit(0 if got == ["parent", "child"] else 1)
                finally:
                    os._exit(2)
            await stream.stop()
            return child

        child = asyncio.run(here())
        deadline = time.monotonic() + PATIENCE
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert ended[1] == 0


class TestAsStream:
    async def test_handlers_get_the_events_sync_and_async(self) -> None:
        got: list[Any] = []

        async def later(event: Event) -> None:
            await asyncio.sleep(0.1)
            got.append(("async", event.data))

        async with AsyncStream() as stream, stream.as_stream() as as_stream:
            await as_stream.subscribe(lambda event: got.append(("sync", event.data)))
            await as_stream.subscribe(later)
            await as_stream.publish(create_event(1))
            assert as_stream.publish_nowait(create_event(2))
        assert got == [("sync", 1), ("sync", 2), ("async", 1), ("async", 2)]

    async def test_topics_and_filters_choose(self) -> None:
        got: list[Any] = []
        async with AsyncStream().as_stream() as stream:
            await stream.subscribe(
                lambda event: got.append(event.data),
                topic="orders.*",
                filter_fn=lambda event: event.data > 1,
            )
            for number in range(4):
                await stream.publish(create_event(number, topic="orders.new"))
            await stream.publish(create_event(9, topic="other"))
            await stream.publish(create_event(9))
        assert got == [2, 3]

    async def test_what_a_handler_raises_is_logged_and_counted(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        got: list[Any] = []

        def handle(event: Event) -> None:
            got.append(1 / event.data)

        async with AsyncStream().as_stream() as stream:
            await stream.subscribe(handle)
            for number in (1, 0, 2):
                await stream.publish(create_event(number))
        assert got == [1.0, 0.5]
        assert caplog.text.count("ZeroDivisionError") == 1
        assert stream.statistics().failed == 1

    async def test_a_slow_handler_slows_the_publisher(self) -> None:
        async def handle(event: Event) -> None:
            await asyncio.sleep(0.1)

        async with AsyncStream(buffer_size=10) as stream:
            as_stream = stream.as_stream()
            subscription = await as_stream.subscribe(handle)
            for number in range(300):
                await as_stream.publish(create_event(number))
            assert 15.0 < now() < 25.0
            subscription.cancel()
            await as_stream.aclose()  # waits for the handler that is still at it

    async def test_unsubscribe_stops_a_handler_without_interrupting_it(self) -> None:
        got: list[Any] = []

        async def handle(event: Event) -> None:
            await asyncio.sleep(1.0)
            got.append(event.data)

        async with AsyncStream() as stream:
            as_stream = stream.as_stream()
            subscription = await as_stream.subscribe(handle)
            idle = await as_stream.subscribe(handle, topic="nothing")
            await as_stream.publish(create_event(1))
            await as_stream.publish(create_event(2))
            await asyncio.sleep(0.5)
            assert await as_stream.unsubscribe(subscription.id)
            assert not await as_stream.unsubscribe(subscription.id)
            assert await as_stream.unsubscribe(idle.id)
            assert stream.statistics().subscribers == 0
            await asyncio.sleep(5.0)
        assert got == [1]

    async def test_a_handler_can_end_its_own_subscription(self) -> None:
        got: list[Any] = []
        async with AsyncStream() as stream:
            as_stream = stream.as_stream()

            async def handle(event: Event) -> None:
                got.append(event.data)
                assert await as_stream.unsubscribe(subscription.id)
                await asyncio.sleep(0.1)
                got.append("to its end")

            subscription = await as_stream.subscribe(handle)
            await publish_all(stream, range(3))
            await asyncio.sleep(1.0)
        assert got == [0, "to its end"]

    async def test_finish_waits_for_what_was_published(self) -> None:
        got: list[Any] = []

        async def handle(event: Event) -> None:
            await asyncio.sleep(0.1)
            got.append(event.data)

        async with AsyncStream() as stream:
            as_stream = stream.as_stream()
            subscription = await as_stream.subscribe(handle)
            await publish_all(stream, range(300))
            assert await as_stream.finish(subscription.id)
            assert got == list(range(300))
            assert not await as_stream.finish(subscription.id)
            assert stream.statistics().subscribers == 0

    async def test_finish_in_the_handler_does_not_wait_for_itself(self) -> None:
        got: list[Any] = []
        async with AsyncStream() as stream:
            as_stream = stream.as_stream()

            async def handle(event: Event) -> None:
                if event.data == 1:
                    assert await as_stream.finish(subscription.id)
                got.append(event.data)

            subscription = await as_stream.subscribe(handle)
            await publish_all(stream, range(4))
            await settle()
        assert got == [0, 1, 2, 3]

    async def test_a_full_buffer_is_a_publish_timeout(self) -> None:
        stream = AsyncStream(buffer_size=1).as_stream()
        await stream.publish(create_event(0))
        assert not stream.publish_nowait(create_event(1))
        with pytest.raises(PublishTimeout, match="5 s"):
            await stream.publish(create_event(1))
        assert now() == 5.0

    async def test_after_it_is_closed_nothing_is_taken(self) -> None:
        stream = AsyncStream().as_stream()
        await stream.aclose()
        with pytest.raises(StreamClosed):
            await stream.publish(create_event(0))
        with pytest.raises(StreamClosed):
            stream.publish_nowait(create_event(0))
        with pytest.raises(StreamClosed):
            await stream.subscribe(print)

    async def test_what_is_no_topic_is_refused(self) -> None:
        stream = AsyncStream().as_stream()
        with pytest.raises(TopicError):
            await stream.subscribe(print, topic="a\nb")
        assert stream.statistics().subscribers == 0

    async def test_closing_lets_slow_handlers_finish_however_long_that_takes(self) -> None:
        got: list[Any] = []

        async def handle(event: Event) -> None:
            await asyncio.sleep(1.0)
            got.append(event.data)

        async with AsyncStream() as stream:
            as_stream = stream.as_stream()
            await as_stream.subscribe(handle)
            await publish_all(stream, range(200))
            await as_stream.aclose()
        assert got == list(range(200))
        assert stream.statistics().dropped == 0

    async def test_closing_without_draining_interrupts_the_handlers_at_once(self) -> None:
        got: list[Any] = []

        async def handle(event: Event) -> None:
            await asyncio.sleep(1.0)
            got.append(event.data)

        async with AsyncStream() as stream:
            as_stream = stream.as_stream()
            await as_stream.subscribe(handle)
            await publish_all(stream, range(300))
            await asyncio.sleep(0.5)
            await as_stream.aclose(drain=False)
        assert now() == 0.5
        assert got == []
        assert stream.statistics().subscribers == 0

    @pytest.mark.real_time
    async def test_a_subscription_can_be_cancelled_from_another_thread(self) -> None:
        async with AsyncStream() as stream:
            as_stream = stream.as_stream()
            subscriptions = [await as_stream.subscribe(lambda event: None) for _ in range(100)]
            survivor: list[Any] = []
            await as_stream.subscribe(lambda event: survivor.append(event.data))

            def cancel_all() -> None:
                for subscription in subscriptions:
                    subscription.cancel()

            cancelling = asyncio.create_task(asyncio.to_thread(cancel_all))
            for number in range(100):
                await as_stream.publish(create_event(number))
                await asyncio.sleep(0)
            await cancelling
            assert stream.statistics().subscribers == 1
            await as_stream.aclose()
        assert survivor == list(range(100))


class TestCancellation:
    """Wherever it is cancelled, nothing is left behind and nothing that was taken is lost."""

    def everywhere(
        self,
        scenario: Callable[[AsyncStream], Coroutine[Any, Any, object]],
        *,
        buffer_size: int = 2,
        check: Callable[[AsyncStream, list[Event]], object] = lambda stream, events: None,
    ) -> int:
        """Cancel a scenario everywhere, beside a consumer that is always there."""
        state: dict[str, Any] = {}

        async def main() -> None:
            stream = state["stream"] = AsyncStream(buffer_size)
            subscription = await stream.subscribe(1, overflow="block")
            state["reader"] = reading(stream, subscription, pause=0.1)
            await scenario(stream)

        async def after() -> None:
            stream, reader = state["stream"], state["reader"]
            await stream.stop()
            events = await reader
            check(stream, events)

        # The reader belongs to `main`, but ends only with the stream.
        return cancel_at_every_await(main, check=after)

    def test_publish(self) -> None:
        def check(stream: AsyncStream, events: list[Event]) -> None:
            got = [event.data for event in events if not event.is_control]
            assert got == list(range(len(got)))
            assert stream.statistics().published == len(got) + stream.statistics().dropped

        async def scenario(stream: AsyncStream) -> None:
            await stream.start()
            await publish_all(stream, range(12))

        assert self.everywhere(scenario, check=check) >= 3

    def test_start_stop_and_the_context(self) -> None:
        async def scenario(stream: AsyncStream) -> None:
            async with stream:
                await publish_all(stream, range(4))
            assert not await stream.publish(create_event("late"))

        def check(stream: AsyncStream, events: list[Event]) -> None:
            assert not stream._running
            statistics = stream.statistics()
            got = [event.data for event in events if not event.is_control]
            assert got == list(range(len(got)))
            assert len(got) + statistics.dropped == statistics.published

        assert self.everywhere(scenario, buffer_size=5, check=check) >= 1

    def test_consume(self) -> None:
        got: list[Any] = []

        async def scenario() -> None:
            got.clear()
            async with AsyncStream() as stream:
                subscription = await stream.subscribe()
                publishing = asyncio.create_task(publish_all(stream, range(9)))
                try:
                    while len(got) < 9:
                        try:
                            async with aclosing(stream.consume(subscription)) as events:
                                async for event in events:
                                    got.append(event.data)
                                    if len(got) % 2:
                                        await asyncio.sleep(0.1)
                                    if len(got) == 9:
                                        break
                        except asyncio.CancelledError:
                            continue  # and read on: nothing is lost
                finally:
                    await publishing

        def check() -> None:
            assert got == list(range(9))

        assert cancel_at_every_await(scenario, check=check) >= 5

    def test_the_stream_view(self) -> None:
        async def handle(event: Event) -> None:
            await asyncio.sleep(0.1)

        async def scenario() -> None:
            async with AsyncStream().as_stream() as stream:
                subscription = await stream.subscribe(handle)
                await stream.subscribe(handle)
                await stream.publish(create_event(1))
                await stream.finish(subscription.id)
                await stream.publish(create_event(2))

        assert cancel_at_every_await(scenario) >= 3


async def test_statistics_add_up() -> None:
    async with AsyncStream(buffer_size=4) as stream:
        slow = await stream.subscribe(2)
        gone = await stream.subscribe(1)
        reader = reading(stream, await stream.subscribe())
        await publish_all(stream, range(10))
        await settle()
        statistics = stream.statistics()
        assert statistics.published == 10
        assert statistics.subscribers == 3
        assert statistics.queues[slow].received == 2
        assert statistics.queues[slow].dropped == 8
        assert statistics.dropped == 17
        await stream.unsubscribe(gone)
        assert stream.statistics().dropped == 17
        assert stream.statistics().subscribers == 2
    await reader
    assert stream.statistics().subscribers == 1  # what nobody has read is still there
    assert len(await read(stream, slow)) == 3
    statistics = stream.statistics()
    assert (statistics.subscribers, statistics.dropped, statistics.failed) == (0, 17, 0)


async def test_the_buffer_counts_what_did_not_fit() -> None:
    async with AsyncStream(buffer_size=10) as stream:
        subscription = await stream.subscribe(2, overflow="block")
        await publish_all(stream, range(7))
        await settle()
        assert stream.statistics().buffered == 5
        await publish_all(stream, range(7, 10))
        await settle()
        assert stream.statistics().buffered == 8
        await stream.unsubscribe(subscription)
