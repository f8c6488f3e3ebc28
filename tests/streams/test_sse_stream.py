"""`SSEStream`: bounded queues, heartbeats, replay without gap or duplicate, ends at once."""

import asyncio
import gc
import logging
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from datetime import datetime
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codomyrmex.events.streaming import (
    AlreadyConsumed,
    EncodeError,
    Event,
    EventType,
    SSEStream,
    StreamClosed,
    Subscription,
    UnknownSubscription,
    create_event,
)
from codomyrmex.events.streaming.codec import sse
from codomyrmex.events.streaming.testing import cancel_at_every_await
from tests.streams.handlers import PATIENCE, Gate, data_of, plainly, thread


def now() -> float:
    return asyncio.get_running_loop().time()


def event(data: Any, **metadata: Any) -> Event:
    return Event(id=str(data), data=data, metadata=metadata)


async def publish_all(stream: SSEStream, *data: Any, **metadata: Any) -> None:
    for each in data:
        await stream.publish(event(each, **metadata))


async def take(events: AsyncIterator[Any], count: int) -> list[Any]:
    return [await anext(events) for _ in range(count)]


async def read(events: AsyncIterator[Event]) -> list[Any]:
    """What a reader gets until its end: data, or type and data of what the stream says itself."""
    return [shown(event) async for event in events]


def shown(event: Event) -> Any:
    return (event.type, event.data) if event.is_control else event.data


def lost(count: int) -> tuple[str, dict[str, Any]]:
    return "stream.lost", {"lost": count, "overflow": "drop_oldest"}


def gap(after: str) -> tuple[str, dict[str, Any]]:
    return "stream.gap", {"after": after}


class TestReading:
    async def test_gives_what_was_published_since_the_subscription(self) -> None:
        stream = SSEStream()
        await publish_all(stream, "before")
        subscription = await stream.subscribe()
        await publish_all(stream, 1, 2)
        async with aclosing(stream.events(subscription.id)) as events:
            assert data_of(await take(events, 2)) == [1, 2]
            await publish_all(stream, 3)
            assert data_of(await take(events, 1)) == [3]

    async def test_gives_frames_of_a_response(self) -> None:
        stream = SSEStream()
        subscription = await stream.subscribe()
        await publish_all(stream, "a")
        await stream.publish(Event(id="7", type="order.created", data={"total": 9}))
        async with aclosing(stream.sse_generator(subscription.id)) as texts:
            first, second = await take(texts, 2)
        assert first == 'id: a\nevent: message\ndata: "a"\n\n'
        frame = sse.Decoder().feed(second.encode())[0]
        assert (frame.id, frame.event, frame.data) == ("7", "order.created", '{"total":9}')

    async def test_keeps_each_readers_topics_and_filter_to_the_end(self) -> None:
        stream = SSEStream()
        orders = await stream.subscribe(topic="orders.*")
        even = await stream.subscribe(filter_fn=lambda event: event.data % 2 == 0)
        readers = [stream.events(orders.id), stream.events(even.id)]
        for number in range(4):
            topic = "orders.new" if number > 1 else "other"
            await stream.publish(event(number, topic=topic))
        await stream.aclose()
        assert [await read(reader) for reader in readers] == [[2, 3], [0, 2]]
        assert now() == 0

    async def test_a_filter_that_raises_harms_only_its_reader(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        stream = SSEStream()
        bad = await stream.subscribe(filter_fn=lambda event: bool(event.data["no"]))
        good = await stream.subscribe()
        readers = [stream.events(bad.id), stream.events(good.id)]
        await publish_all(stream, 1, 2)
        await stream.aclose()
        assert [await read(reader) for reader in readers] == [[], [1, 2]]
        assert stream.statistics().failed == 2
        assert all(record.exc_info for record in caplog.records)

    async def test_an_id_that_nobody_has_is_refused_at_the_call(self) -> None:
        stream = SSEStream()
        for read in (stream.events, stream.sse_generator):
            with pytest.raises(UnknownSubscription) as caught:
                read("nobody")
            assert caught.value.subscription_id == "nobody"

    async def test_a_second_reader_is_refused_and_the_first_goes_on(self) -> None:
        stream = SSEStream()
        subscription = await stream.subscribe()
        async with aclosing(stream.events(subscription.id)) as events:
            for read in (stream.events, stream.sse_generator):
                with pytest.raises(AlreadyConsumed) as caught:
                    read(subscription.id)
                assert caught.value.subscription_id == subscription.id
            await publish_all(stream, 1)
            assert data_of(await take(events, 1)) == [1]

    async def test_an_event_that_cannot_be_encoded_is_its_publishers_error(self) -> None:
        stream = SSEStream()
        subscription = await stream.subscribe()
        async with aclosing(stream.sse_generator(subscription.id)) as texts:
            await publish_all(stream, 1)
            for data in (object(), float("nan"), {"a": [{1, 2}]}):
                with pytest.raises(EncodeError) as caught:
                    await stream.publish(Event(id="bad", data=data))
                assert "event bad" in str(caught.value)
                with pytest.raises(EncodeError):
                    stream.publish_nowait(Event(id="bad", data=data))
            await publish_all(stream, 2)
            assert [text.splitlines()[0] for text in await take(texts, 2)] == ["id: 1", "id: 2"]
        assert stream.statistics().published == 2
        assert data_of(stream.get_recent_events()) == [1, 2]

    async def test_data_with_a_json_form_of_its_own_is_sent(self) -> None:
        stream = SSEStream()
        subscription = await stream.subscribe()
        await stream.publish(create_event({"at": datetime(2024, 5, 6)}))
        async with aclosing(stream.sse_generator(subscription.id)) as texts:
            assert '"2024-05-06T00:00:00"' in (await take(texts, 1))[0]

    @pytest.mark.real_time
    async def test_a_reader_is_woken_at_once_by_a_publisher_in_another_thread(self) -> None:
        stream = SSEStream(heartbeat_interval=None)
        subscription = await stream.subscribe()
        async with aclosing(stream.events(subscription.id)) as events:
            for number in range(20):
                reading = asyncio.ensure_future(anext(events))
                await asyncio.sleep(0)
                with thread(partial(stream.publish_nowait, event(number))):
                    got = await asyncio.wait_for(reading, PATIENCE)
                assert got.data == number


class TestBounds:
    async def test_fifty_thousand_events_leave_the_latest_and_a_count(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        stream = SSEStream(buffer_size=10)
        subscription = await stream.subscribe()
        reader = stream.events(subscription.id)
        for number in range(50_000):
            stream.publish_nowait(create_event(number))
        statistics = stream.statistics()
        assert statistics.queues[subscription.id].size == 10
        assert statistics.queues[subscription.id].maxsize == 10
        assert statistics.dropped == 49_990
        assert statistics.buffered == 10
        await stream.aclose()
        assert await read(reader) == [lost(49_990), *range(49_990, 50_000)]
        assert len(caplog.records) == 1
        assert stream.statistics().dropped == 49_990

    async def test_a_loss_is_told_where_it_happened(self) -> None:
        stream = SSEStream(buffer_size=2)
        subscription = await stream.subscribe()
        async with aclosing(stream.events(subscription.id)) as events:
            await publish_all(stream, 1, 2)
            assert [shown(each) for each in await take(events, 1)] == [1]
            await publish_all(stream, 3, 4, 5)
            assert [shown(each) for each in await take(events, 3)] == [lost(2), 4, 5]
            await publish_all(stream, 6)
            assert [shown(each) for each in await take(events, 1)] == [6]

    async def test_a_frame_of_a_loss_has_no_id(self) -> None:
        stream = SSEStream(buffer_size=1)
        subscription = await stream.subscribe()
        async with aclosing(stream.sse_generator(subscription.id)) as texts:
            await publish_all(stream, 1, 2)
            frame = (await take(texts, 1))[0]
        assert "\nid:" not in "\n" + frame
        assert frame.startswith("event: stream.lost\n")

    async def test_a_queue_is_bounded_before_anybody_reads_it(self) -> None:
        stream = SSEStream(buffer_size=3)
        subscription = await stream.subscribe()
        await publish_all(stream, *range(10))
        assert stream.statistics().queues[subscription.id].size == 3
        async with aclosing(stream.events(subscription.id)) as events:
            assert [shown(each) for each in await take(events, 4)] == [lost(7), 7, 8, 9]

    @pytest.mark.parametrize(
        ("overflow", "expected"),
        [
            ("drop_newest", [1, 2, ("stream.lost", {"lost": 2, "overflow": "drop_newest"})]),
            ("latest_by_key", [3, 4]),
            ("disconnect", [1, 2, ("stream.disconnect", {"reason": "overflow", "lost": 1})]),
        ],
    )
    async def test_other_policies(self, overflow: str, expected: list[Any]) -> None:
        stream = SSEStream(buffer_size=2)
        subscription = await stream.subscribe(overflow=overflow)
        reader = stream.events(subscription.id)
        for number in range(1, 5):
            await stream.publish(event(number, topic="odd" if number % 2 else "even"))
        await stream.aclose()
        assert await read(reader) == expected

    async def test_a_reader_that_is_disconnected_comes_to_its_end_by_itself(self) -> None:
        stream = SSEStream(buffer_size=1)
        subscription = await stream.subscribe(overflow="disconnect")
        reader = stream.events(subscription.id)
        await publish_all(stream, 1, 2, 3)
        assert len(await read(reader)) == 2
        assert now() == 0
        assert stream.statistics().subscribers == 0

    async def test_latest_by_a_key_of_ones_own(self) -> None:
        stream = SSEStream()
        subscription = await stream.subscribe(
            overflow="latest_by_key", key=lambda event: event.data % 3
        )
        reader = stream.events(subscription.id)
        await publish_all(stream, *range(6))
        await stream.aclose()
        assert await read(reader) == [3, 4, 5]

    async def test_block_makes_publish_wait_for_the_reader(self) -> None:
        stream, got = SSEStream(buffer_size=2), list[Any]()
        subscription = await stream.subscribe(overflow="block")

        async def slow() -> None:
            async with aclosing(stream.events(subscription.id)) as events:
                async for each in events:
                    got.append(each.data)
                    await asyncio.sleep(1)

        reading = asyncio.create_task(slow())
        await publish_all(stream, *range(6))
        assert now() > 2
        assert stream.statistics().dropped == 0
        await stream.aclose()
        await reading
        assert got == list(range(6))

    async def test_block_refuses_publish_nowait(self) -> None:
        stream = SSEStream(buffer_size=1)
        await stream.subscribe(overflow="block")
        assert stream.publish_nowait(event(1))
        assert not stream.publish_nowait(event(2))
        assert stream.statistics().refused == 1

    async def test_who_unsubscribes_lets_the_publisher_go_on(self) -> None:
        stream = SSEStream(buffer_size=1)
        subscription = await stream.subscribe(overflow="block")
        await publish_all(stream, 1)
        waiting = asyncio.create_task(publish_all(stream, 2))
        await asyncio.sleep(1)
        assert not waiting.done()
        await stream.unsubscribe(subscription.id)
        await waiting
        assert now() == 1

    @pytest.mark.parametrize("size", [0, -1])
    def test_a_size_below_one_is_refused(self, size: int) -> None:
        with pytest.raises(ValueError, match="buffer_size is a number of events, 1 or more"):
            SSEStream(buffer_size=size)

    async def test_a_policy_that_does_not_exist_is_refused(self) -> None:
        stream = SSEStream()
        with pytest.raises(ValueError, match="overflow is one of"):
            await stream.subscribe(overflow="catch_up")
        with pytest.raises(ValueError, match="a key is for"):
            await stream.subscribe(key=lambda event: event.id)
        assert stream.statistics().subscribers == 0
        assert stream.statistics().queues == {}


class TestHeartbeats:
    async def test_come_exactly_after_thirty_seconds_without_an_event(self) -> None:
        stream = SSEStream()
        subscription = await stream.subscribe()
        async with aclosing(stream.events(subscription.id)) as events:
            first = await anext(events)
            assert (first.type, now()) == (EventType.HEARTBEAT, 30.0)
            await asyncio.sleep(12)  # of its own time
            second = await anext(events)
            assert (second.type, now()) == (EventType.HEARTBEAT, 72.0)
            asyncio.get_running_loop().call_later(20, stream.publish_nowait, event(1))
            assert (await anext(events)).data == 1
            third = await anext(events)
            assert (third.type, now()) == (EventType.HEARTBEAT, 122.0)
        assert first.id != second.id

    async def test_are_frames_without_an_id(self) -> None:
        stream = SSEStream()
        subscription = await stream.subscribe()
        async with aclosing(stream.sse_generator(subscription.id)) as texts:
            frame = await anext(texts)
        assert frame == "event: heartbeat\ndata: null\n\n"

    async def test_come_as_often_as_one_likes_or_never(self) -> None:
        often = SSEStream(heartbeat_interval=0.5)
        subscription = await often.subscribe()
        async with aclosing(often.events(subscription.id)) as events:
            await take(events, 4)
            assert now() == 2
        never = SSEStream(heartbeat_interval=None)
        subscription = await never.subscribe()
        async with aclosing(never.events(subscription.id)) as events:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(events), 1000)

    async def test_are_neither_queued_nor_kept_nor_counted(self) -> None:
        stream = SSEStream()
        subscription = await stream.subscribe()
        async with aclosing(stream.events(subscription.id)) as events:
            await take(events, 2)
            assert stream.statistics().published == 0
            assert stream.get_recent_events() == []


async def cancel(stream: SSEStream, subscription: Subscription) -> None:
    subscription.cancel()


async def unsubscribe(stream: SSEStream, subscription: Subscription) -> None:
    assert await stream.unsubscribe(subscription.id)


async def finish(stream: SSEStream, subscription: Subscription) -> None:
    assert await stream.finish(subscription.id)


async def close(stream: SSEStream, subscription: Subscription) -> None:
    await stream.aclose()


async def close_without_draining(stream: SSEStream, subscription: Subscription) -> None:
    await stream.aclose(drain=False)


class TestEnd:
    @pytest.mark.parametrize("end", [cancel, unsubscribe, finish, close, close_without_draining])
    @pytest.mark.parametrize("form", ["events", "sse_generator"])
    async def test_comes_at_once_for_a_reader_that_waits(
        self, end: Callable[[SSEStream, Subscription], Any], form: str
    ) -> None:
        stream = SSEStream()
        subscription = await stream.subscribe()
        got: list[Any] = []

        async def reader() -> float:
            async with aclosing(getattr(stream, form)(subscription.id)) as events:
                got.extend([each async for each in events])
            return now()

        reading = asyncio.create_task(reader())
        await asyncio.sleep(5)
        await end(stream, subscription)
        assert await reading == 5.0
        assert got == []  # not a last heartbeat either
        assert not subscription.active
        assert stream.statistics().subscribers == 0

    @pytest.mark.parametrize("form", ["events", "sse_generator"])
    @pytest.mark.parametrize("taken", [None, 0, 1])
    async def test_of_a_generator_is_the_end_of_its_subscription(
        self, form: str, taken: int | None
    ) -> None:
        stream = SSEStream()
        subscription = await stream.subscribe()
        generator = getattr(stream, form)(subscription.id)
        await publish_all(stream, 1, 2)
        if taken is not None:
            await take(generator, taken)
        await generator.aclose()
        assert stream.statistics().subscribers == 0
        assert stream.statistics().queues == {}
        assert not subscription.active
        for number in range(1000):
            await publish_all(stream, number)
        assert not await stream.unsubscribe(subscription.id)

    @pytest.mark.parametrize("form", ["events", "sse_generator"])
    @pytest.mark.parametrize("started", [False, True])
    async def test_of_a_generator_that_was_dropped_as_well(self, form: str, started: bool) -> None:
        stream = SSEStream()
        subscription = await stream.subscribe()
        generator = getattr(stream, form)(subscription.id)
        await publish_all(stream, 1, 2)
        if started:
            async for _ in generator:
                break
        del generator
        gc.collect()
        await asyncio.sleep(1)
        assert stream.statistics().subscribers == 0

    def test_of_a_generator_that_was_made_and_dropped_without_a_loop(self) -> None:
        stream = SSEStream()
        subscription = asyncio.run(stream.subscribe())
        generator = stream.sse_generator(subscription.id)
        assert stream.statistics().subscribers == 1
        del generator
        gc.collect()
        assert stream.statistics().subscribers == 0

    def test_comes_wherever_the_reader_is_cancelled(self) -> None:
        streams: list[SSEStream] = []

        async def scenario() -> None:
            stream = SSEStream(buffer_size=2)
            streams.append(stream)
            for number in range(3):
                await stream.publish(event(number))
            subscription = await stream.subscribe()
            loop = asyncio.get_running_loop()
            for number in range(3, 6):
                loop.call_later(number, stream.publish_nowait, event(number))
            async with aclosing(stream.sse_generator(subscription.id, "1")) as texts:
                await take(texts, 5)

        def check() -> None:
            assert streams[-1].statistics().subscribers == 0

        def run_out(main: Any) -> Any:
            # Its timers publish to a stream that nobody reads: let them.
            from codomyrmex.events.streaming.testing import run

            async def and_wait() -> Any:
                try:
                    return await main
                finally:
                    await asyncio.sleep(10)

            return run(and_wait())

        assert cancel_at_every_await(scenario, check=check, run=run_out) >= 4

    async def test_of_the_stream_refuses_subscribers_and_publishers(self) -> None:
        async with SSEStream() as stream:
            pass
        with pytest.raises(StreamClosed):
            await stream.subscribe()
        with pytest.raises(StreamClosed):
            await publish_all(stream, 1)


class TestHandlers:
    @pytest.mark.parametrize("kind", ["sync", "async", "returns an awaitable"])
    async def test_are_called_and_the_reader_gets_the_event_too(self, kind: str) -> None:
        stream, got = SSEStream(), list[Any]()

        def sync_handler(event: Event) -> None:
            got.append(event.data)

        async def async_handler(event: Event) -> None:
            await asyncio.sleep(1)
            got.append(event.data)

        handlers: dict[str, Callable[[Event], Any]] = {
            "sync": sync_handler,
            "async": async_handler,
            "returns an awaitable": plainly(async_handler),
        }
        subscription = await stream.subscribe(
            handlers[kind], filter_fn=lambda event: bool(event.data)
        )
        reader = stream.events(subscription.id)
        await publish_all(stream, *range(5))
        await stream.drain()
        assert got == [1, 2, 3, 4]
        await stream.aclose()
        assert await read(reader) == [1, 2, 3, 4]

    async def test_that_fail_harm_nobody(self, caplog: pytest.LogCaptureFixture) -> None:
        stream = SSEStream()

        def fail(event: Event) -> None:
            raise KeyError(event.data)

        subscription = await stream.subscribe(fail)
        reader = stream.events(subscription.id)
        await publish_all(stream, 1, 2)
        await stream.aclose()
        assert await read(reader) == [1, 2]
        assert stream.statistics().failed == 2

    async def test_alone_make_no_losses_of_a_queue_that_nobody_reads(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        stream, got = SSEStream(buffer_size=5), list[Any]()
        subscription = await stream.subscribe(lambda event: got.append(event.data))
        with caplog.at_level(logging.WARNING):
            await publish_all(stream, *range(20))
        assert got == list(range(20))
        assert stream.statistics().dropped == 0
        assert stream.statistics().queues[subscription.id].size == 5
        assert caplog.records == []

    async def test_get_an_event_while_a_reader_comes_that_takes_over_what_was_queued(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stream, got = SSEStream(buffer_size=2), list[Any]()
        subscription = await stream.subscribe(lambda event: got.append(event.data))
        await publish_all(stream, 0, 1)
        queue = stream._queues[subscription.id]
        readers: list[Any] = []

        def full() -> bool:  # as if the reader came in another thread, right after this look
            readers.append(stream.events(subscription.id, "1"))
            return True

        with monkeypatch.context() as patched:
            patched.setattr(queue, "full", full)
            await publish_all(stream, 2)
        await stream.aclose()
        assert got == [0, 1, 2]
        assert stream.statistics().failed == 0
        assert await read(readers[0]) == [2]

    async def test_with_a_reader_that_came_late_who_is_told_what_it_missed(self) -> None:
        stream = SSEStream(buffer_size=5)
        subscription = await stream.subscribe(lambda event: None)
        await publish_all(stream, *range(8))
        reader = stream.events(subscription.id)
        await publish_all(stream, *range(8, 10))
        await stream.aclose()
        assert await read(reader) == [lost(3), lost(2), *range(5, 10)]

    async def test_that_are_async_make_publish_wait_when_they_are_behind(self) -> None:
        stream = SSEStream(buffer_size=2)

        async def slow(event: Event) -> None:
            await asyncio.sleep(1)

        await stream.subscribe(slow)
        await publish_all(stream, *range(6))
        assert now() >= 2
        await stream.aclose()
        assert now() == 6

    async def test_may_be_exchanged(self) -> None:
        stream, got = SSEStream(), list[Any]()
        subscription = await stream.subscribe(lambda event: got.append(("first", event.data)))
        await publish_all(stream, 1)
        subscription.handler = lambda event: got.append(("second", event.data))
        await publish_all(stream, 2)
        subscription.handler = None
        await publish_all(stream, 3)
        assert got == [("first", 1), ("second", 2)]
        async with aclosing(stream.events(subscription.id)) as events:
            assert data_of(await take(events, 3)) == [1, 2, 3]


class TestReplay:
    async def test_gives_what_came_after_the_last_event_and_goes_on(self) -> None:
        stream = SSEStream()
        await publish_all(stream, *range(5))
        subscription = await stream.subscribe()
        await publish_all(stream, 5)
        async with aclosing(stream.events(subscription.id, "2")) as events:
            await publish_all(stream, 6)
            assert data_of(await take(events, 4)) == [3, 4, 5, 6]

    async def test_is_text_too(self) -> None:
        stream = SSEStream()
        await publish_all(stream, *range(3))
        subscription = await stream.subscribe()
        async with aclosing(stream.sse_generator(subscription.id, "0")) as texts:
            assert [text.splitlines()[0] for text in await take(texts, 2)] == ["id: 1", "id: 2"]

    async def test_of_the_latest_event_is_empty(self) -> None:
        stream = SSEStream()
        await publish_all(stream, *range(3))
        subscription = await stream.subscribe()
        async with aclosing(stream.events(subscription.id, "2")) as events:
            await publish_all(stream, 3)
            assert data_of(await take(events, 1)) == [3]

    @pytest.mark.parametrize("last", [None, ""])
    async def test_does_not_happen_without_a_last_event(self, last: str | None) -> None:
        stream = SSEStream()
        await publish_all(stream, *range(3))
        subscription = await stream.subscribe()
        await publish_all(stream, 3)
        async with aclosing(stream.events(subscription.id, last)) as events:
            assert data_of(await take(events, 1)) == [3]

    async def test_begins_with_the_gap_when_the_buffer_does_not_reach_back(self) -> None:
        stream = SSEStream(buffer_size=3)
        await publish_all(stream, *range(6))
        subscription = await stream.subscribe()
        async with aclosing(stream.events(subscription.id, "1")) as events:
            assert [shown(each) for each in await take(events, 4)] == [gap("1"), 3, 4, 5]

    async def test_begins_with_the_gap_for_an_id_that_never_was(self) -> None:
        stream = SSEStream()
        subscription = await stream.subscribe()
        await publish_all(stream, 1)
        async with aclosing(stream.sse_generator(subscription.id, "never")) as texts:
            told, first = await take(texts, 2)
        assert told == 'event: stream.gap\ndata: {"after":"never"}\n\n'
        assert first.startswith("id: 1\n")

    async def test_of_all_that_is_kept_can_be_asked_for_and_is_no_gap(self) -> None:
        stream = SSEStream(buffer_size=3)
        await publish_all(stream, *range(6))
        subscription = await stream.subscribe()
        async with aclosing(stream.events(subscription.id, "earliest")) as events:
            assert [shown(each) for each in await take(events, 3)] == [3, 4, 5]

    async def test_is_of_what_the_subscription_asked_for(self) -> None:
        stream = SSEStream()
        for number in range(10):
            await stream.publish(event(number, topic="orders.new" if number % 2 else "other"))
        subscription = await stream.subscribe(topic="orders.*", filter_fn=lambda e: e.data != 5)
        async with aclosing(stream.events(subscription.id, "2")) as events:
            assert data_of(await take(events, 3)) == [3, 7, 9]

    async def test_of_a_quiet_topic_reaches_as_far_back_as_its_queue(self) -> None:
        # The queue of a reader of few events holds older ones than the buffer of all events.
        stream = SSEStream(buffer_size=3)
        subscription = await stream.subscribe(topic="quiet")
        await publish_all(stream, "a", topic="quiet")
        await publish_all(stream, *range(5), topic="loud")
        await publish_all(stream, "b", topic="quiet")
        async with aclosing(stream.events(subscription.id, "before")) as events:
            assert [shown(each) for each in await take(events, 3)] == [gap("before"), "a", "b"]

    async def test_puts_right_what_the_queue_had_lost(self) -> None:
        stream = SSEStream(buffer_size=4)
        subscription = await stream.subscribe(overflow="drop_newest")
        await publish_all(stream, *range(6))
        async with aclosing(stream.events(subscription.id, "2")) as events:
            assert [shown(each) for each in await take(events, 3)] == [3, 4, 5]

    async def test_leaves_out_what_a_filter_raises_on(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        stream = SSEStream()
        await publish_all(stream, *range(4))
        subscription = await stream.subscribe(filter_fn=lambda event: bool(1 / (event.data - 2)))
        async with aclosing(stream.events(subscription.id, "0")) as events:
            assert data_of(await take(events, 2)) == [1, 3]
        assert stream.statistics().failed == 1
        assert caplog.records[0].exc_info is not None

    async def test_goes_on_to_its_end_when_the_subscription_ends(self) -> None:
        stream = SSEStream()
        await publish_all(stream, *range(4))
        subscription = await stream.subscribe()
        reader = stream.events(subscription.id, "0")
        await publish_all(stream, 4)
        assert data_of(await take(reader, 1)) == [1]
        subscription.cancel()
        await publish_all(stream, 5)
        assert await read(reader) == [2, 3, 4]

    async def test_begins_after_the_first_of_events_with_one_id_so_that_nothing_is_missed(
        self,
    ) -> None:
        stream = SSEStream()
        for number in range(3):
            await stream.publish(Event(id="same", data=number))
            await publish_all(stream, f"after {number}")
        subscription = await stream.subscribe()
        async with aclosing(stream.events(subscription.id, "same")) as events:
            got = data_of(await take(events, 5))
        assert got == ["after 0", 1, "after 1", 2, "after 2"]

    @given(
        size=st.integers(1, 6),
        before=st.integers(0, 8),
        between=st.integers(0, 8),
        after=st.integers(0, 4),
        last=st.integers(0, 16),
    )
    async def test_and_what_follows_have_no_hole_and_nothing_twice(
        self, size: int, before: int, between: int, after: int, last: int
    ) -> None:
        stream = SSEStream(size)
        await publish_all(stream, *range(before))
        subscription = await stream.subscribe()
        await publish_all(stream, *range(before, before + between))
        reader = stream.events(subscription.id, str(last))
        total = before + between
        await publish_all(stream, *range(total, total + min(after, size)))
        await stream.aclose()
        got = await read(reader)
        kept = range(max(0, total - size), total)
        new = list(range(total, total + min(after, size)))
        if last in kept:
            assert got == [*range(last + 1, total), *new]
        else:
            assert got == [gap(str(last)), *kept, *new]

    @pytest.mark.real_time
    @pytest.mark.parametrize("overflow", ["block", "drop_oldest"])
    async def test_has_no_hole_and_nothing_twice_while_threads_publish(
        self, overflow: str, eager_threads: None
    ) -> None:
        stream = SSEStream(buffer_size=2000)
        going_on = True
        last = 0

        def work() -> None:
            nonlocal last
            while going_on:
                if stream.publish_nowait(event(last + 1)):  # not full for one who reads slowly
                    last += 1

        await stream.publish(event(0))
        with thread(work):
            try:
                for _ in range(150):
                    recent = stream.get_recent_events(500)
                    seen = recent[len(recent) // 2].data
                    subscription = await stream.subscribe(overflow=overflow)
                    async with aclosing(stream.events(subscription.id, str(seen))) as events:
                        count = min(len(recent) + 20, 300)
                        taken = await take(events, count)
                    got = data_of([each for each in taken if not each.is_control])
                    if len(got) == len(taken):
                        assert got == list(range(seen + 1, seen + 1 + len(got)))
                    else:  # a thread has outrun even this queue, and the reader was told
                        assert all(one < next_ for one, next_ in pairwise(got))
            finally:
                going_on = False

    @pytest.mark.real_time
    async def test_counts_an_event_once_that_is_being_delivered(self) -> None:
        # A slow handler in another thread stands between the buffer and the reader's queue.
        stream, gate = SSEStream(), Gate()
        await stream.subscribe(gate)
        await asyncio.sleep(0)
        subscription = await stream.subscribe()

        def work() -> None:
            stream.publish_nowait(event(1))

        gate.open.set()
        await publish_all(stream, 0)
        gate.open.clear()
        gate.entered.clear()
        with thread(work):
            assert await asyncio.to_thread(gate.entered.wait, PATIENCE)
            await publish_all(stream, 2)  # queued for delivery, behind that one
            async with aclosing(stream.events(subscription.id, "0")) as events:
                gate.open.set()
                await stream.drain()
                await publish_all(stream, 3)
                assert data_of(await take(events, 3)) == [1, 2, 3]

    @pytest.mark.real_time
    async def test_is_bounded_by_the_buffer_also_while_events_are_pending(self) -> None:
        stream, gate = SSEStream(buffer_size=3), Gate()
        await stream.subscribe(gate)
        with thread(lambda: stream.publish_nowait(event(0))):
            assert await asyncio.to_thread(gate.entered.wait, PATIENCE)
            await publish_all(stream, *range(1, 9))  # behind that one
            assert data_of(stream.get_recent_events(99)) == [6, 7, 8]
            subscription = await stream.subscribe()
            reader = stream.events(subscription.id, "2")
            gate.open.set()
            await stream.aclose()
        assert await read(reader) == [gap("2"), 6, 7, 8]

    @pytest.mark.real_time
    async def test_counts_an_event_once_that_has_just_been_delivered_to_the_reader(self) -> None:
        stream, gate = SSEStream(), Gate()
        subscription = await stream.subscribe()
        await stream.subscribe(gate)
        gate.open.set()
        await publish_all(stream, 0)
        gate.open.clear()
        gate.entered.clear()
        with thread(lambda: stream.publish_nowait(event(1))):
            assert await asyncio.to_thread(gate.entered.wait, PATIENCE)
            await publish_all(stream, 2)
            async with aclosing(stream.events(subscription.id, "0")) as events:
                gate.open.set()
                await stream.drain()
                await publish_all(stream, 3)
                assert data_of(await take(events, 3)) == [1, 2, 3]


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads that take turns as often as they can, so that races are won that hardly ever are."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.real_time
async def test_a_reader_keeps_the_order_of_several_threads() -> None:
    stream = SSEStream(buffer_size=5000, heartbeat_interval=None)
    subscription = await stream.subscribe()
    handled: list[Any] = []
    await stream.subscribe(lambda event: handled.append(event.data))
    reader = stream.events(subscription.id)

    def work(name: int) -> None:
        for number in range(500):
            while not stream.publish_nowait(create_event((name, number))):
                pass

    threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
    for each in threads:
        each.start()
    got = [event.data for event in await asyncio.wait_for(take(reader, 1500), PATIENCE)]
    for each in threads:
        each.join()
    await stream.aclose()
    assert got == handled
    for name in range(3):
        assert [b for a, b in got if a == name] == list(range(500))
