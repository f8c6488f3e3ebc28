"""Delivery: one order, any thread, re-entrant handlers, the token, topics, recent events."""

import asyncio
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codomyrmex.events.streaming import (
    Event,
    InMemoryStream,
    StreamClosed,
    StreamingError,
    Subscription,
    TopicError,
    create_event,
)
from codomyrmex.events.streaming.testing import run
from tests.streams.handlers import PATIENCE, Gate, data_of, plainly, publish, thread


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads that take turns as often as they can, so that races are won that hardly ever are."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class TestOrder:
    async def test_events_come_in_the_order_they_were_published(self) -> None:
        stream, got = InMemoryStream(), list[Any]()
        await stream.subscribe(lambda event: got.append(event.data))
        for number in range(100):
            await stream.publish(create_event(number))
            assert got[-1] == number  # sync handlers have run when publish returns
        assert got == list(range(100))

    @given(
        tree=st.recursive(
            st.just([]), lambda children: st.lists(children, min_size=1, max_size=3), max_leaves=40
        ),
        publisher=st.integers(0, 4),
    )
    async def test_is_the_same_for_all_when_a_handler_publishes(
        self, tree: list[Any], publisher: int
    ) -> None:
        # Each event carries the events that its handling publishes.
        stream = InMemoryStream()
        orders: list[list[Event]] = [[] for _ in range(5)]

        def make(number: int) -> Callable[[Event], Any]:
            def take(event: Event) -> None:
                orders[number].append(event)
                if number == publisher:
                    for child in event.data:
                        assert stream.publish_nowait(create_event(child))

            async def take_async(event: Event) -> None:
                await asyncio.sleep(0)
                take(event)

            return [take, take_async, plainly(take_async)][number % 3]

        for number in range(5):
            await stream.subscribe(make(number))
        await stream.publish(create_event(tree))
        for _ in range(50):
            await stream.drain()
        order = orders[0]
        assert all(each == order for each in orders)
        assert stream.get_recent_events(1000) == order
        assert len({event.id for event in order}) == len(order)

        def count(each: list[Any]) -> int:
            return 1 + sum(map(count, each))

        assert len(order) == count(tree)

    @pytest.mark.real_time
    async def test_is_the_same_for_all_when_several_threads_publish(self) -> None:
        stream = InMemoryStream()
        orders: list[list[Any]] = [[] for _ in range(4)]
        inside = 0
        overlaps = 0

        def first(event: Event) -> None:
            nonlocal inside, overlaps
            inside += 1
            overlaps += inside != 1
            if event.data[0] != "again" and event.data[1] % 7 == 0:
                stream.publish_nowait(create_event(("again", event.data)))
            orders[0].append(event.data)
            inside -= 1

        async def third(event: Event) -> None:
            orders[2].append(event.data)

        await stream.subscribe(first)
        await stream.subscribe(lambda event: orders[1].append(event.data))
        await stream.subscribe(third)
        await stream.subscribe(lambda event: orders[3].append(event.data), filter_fn=lambda _: True)

        def work(name: int) -> None:
            publish(stream, *((name, number) for number in range(500)))

        await asyncio.gather(*(asyncio.to_thread(work, name) for name in range(4)))
        await stream.drain()
        assert overlaps == 0
        assert orders[0] == orders[1] == orders[2] == orders[3]
        for name in range(4):
            assert [b for a, b in orders[0] if a == name] == list(range(500))
        again = [b for a, b in orders[0] if a == "again"]
        assert again == [each for each in orders[0] if each[0] != "again" and each[1] % 7 == 0]

    @pytest.mark.real_time
    async def test_who_subscribes_meanwhile_gets_all_from_some_event_on(
        self, eager_threads: None
    ) -> None:
        # Whoever gets an event but not a later one has a hole.
        stream, order = InMemoryStream(), list[int]()
        await stream.subscribe(lambda event: order.append(event.data))
        seen: list[list[int]] = []
        subscriptions: list[Subscription] = []
        counter = iter(range(100_000))

        def work() -> None:
            for number in counter:
                if number >= 4000:
                    return
                publish(stream, number)

        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            mine: list[int] = []
            seen.append(mine)
            subscriptions.append(await stream.subscribe(collect(mine)))
            if len(subscriptions) > 3:
                await stream.unsubscribe(subscriptions.pop(0).id)
            await asyncio.sleep(0)
        for worker in workers:
            worker.join()
        await stream.drain()
        assert sorted(order) == list(range(4000))
        places = {number: place for place, number in enumerate(order)}
        for mine in filter(None, seen):
            first = places[mine[0]]
            assert mine == order[first : first + len(mine)]


def collect(into: list[Any]) -> Callable[[Event], None]:
    def handler(event: Event) -> None:
        into.append(event.data)

    return handler


class TestHandlers:
    """What a handler may do while it is being called."""

    async def test_may_publish(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        def answer(event: Event) -> None:
            got.append(("answer", event.data))
            if event.data < 3:
                stream.publish_nowait(create_event(event.data + 1))

        await stream.subscribe(answer)
        await stream.subscribe(lambda event: got.append(("log", event.data)))
        await stream.publish(create_event(1))
        assert got == [(who, n) for n in (1, 2, 3) for who in ("answer", "log")]

    async def test_may_publish_what_makes_others_fail_or_return_awaitables(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        stream, got = InMemoryStream(), list[Any]()

        def publish_more(event: Event) -> None:
            if event.data == 0:
                publish(stream, 1, 2)

        def fail(event: Event) -> None:
            if event.data == 1:
                raise KeyError

        async def take(event: Event) -> None:
            got.append(event.data)

        await stream.subscribe(publish_more)
        await stream.subscribe(fail)
        await stream.subscribe(lambda event: take(event) if event.data == 2 else None)
        await stream.subscribe(lambda event: got.append(event.data))
        await stream.publish(create_event(0))
        assert got == [0, 1, 2]
        await stream.drain()
        assert got == [0, 1, 2, 2]
        assert stream.statistics().failed == 1
        assert "KeyError" in caplog.text

    async def test_may_subscribe_others_who_get_what_comes_later(self) -> None:
        stream, got = InMemoryStream(), list[Any]()
        made: list[asyncio.Task[Subscription]] = []

        def subscribe(event: Event) -> None:
            if event.data == 1:
                made.append(asyncio.ensure_future(stream.subscribe(lambda e: got.append(e.data))))

        await stream.subscribe(subscribe)
        await stream.publish(create_event(1))
        await made[0]
        await stream.publish(create_event(2))
        assert got == [2]

    async def test_may_end_its_own_subscription(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        def once(event: Event) -> None:
            got.append(event.data)
            subscription.cancel()

        subscription = await stream.subscribe(once)
        await stream.publish(create_event(1))
        await stream.publish(create_event(2))
        assert got == [1]
        assert stream.statistics().subscribers == 0

    async def test_may_end_the_subscription_of_one_that_would_come_after_it(self) -> None:
        stream, got = InMemoryStream(), list[Any]()
        await stream.subscribe(lambda _: second.cancel())
        second = await stream.subscribe(lambda event: got.append(event.data))
        await stream.publish(create_event(1))
        assert got == []

    def test_may_run_an_event_loop_to_unsubscribe_where_there_is_none(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        def once(event: Event) -> None:
            got.append(event.data)
            assert asyncio.run(stream.unsubscribe(subscription.id))
            asyncio.run(stream.publish(create_event("next")))

        subscription = asyncio.run(stream.subscribe(once))
        with thread(lambda: publish(stream, 1)):
            pass
        assert got == [1]
        assert data_of(stream.get_recent_events()) == [1, "next"]

    def test_may_not_wait_for_itself(self) -> None:
        stream, errors = InMemoryStream(), list[BaseException]()

        def wait(_: Event) -> None:
            try:
                asyncio.run(stream.drain())
            except StreamingError as error:
                errors.append(error)

        asyncio.run(stream.subscribe(wait))
        with thread(lambda: publish(stream, 1)):
            pass
        assert len(errors) == 1
        assert "would wait for itself" in str(errors[0])

    def test_may_finish_its_own_subscription_and_close_the_stream(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        def end(event: Event) -> None:
            got.append(event.data)
            assert asyncio.run(stream.finish(subscription.id))
            asyncio.run(stream.aclose())

        subscription = asyncio.run(stream.subscribe(end))
        with thread(lambda: publish(stream, 1)):
            pass
        assert got == [1]
        with pytest.raises(StreamClosed):
            stream.publish_nowait(create_event(2))

    def test_a_publish_of_its_own_does_not_wait_however_much_is_pending(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        def flood(event: Event) -> None:
            got.append(event.data)
            if event.data == "start":
                for number in range(1500):
                    assert stream.publish_nowait(create_event(number))
                asyncio.run(stream.publish(create_event("end")))

        asyncio.run(stream.subscribe(flood))
        with thread(lambda: publish(stream, "start")):
            pass
        assert got == ["start", *range(1500), "end"]

    async def test_one_that_a_subscriber_exchanges_takes_over_at_once(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def first(event: Event) -> None:
            got.append(("first", event.data))

        async def second(event: Event) -> None:
            got.append(("second", event.data))

        subscription = await stream.subscribe(first)
        await stream.publish(create_event(1))
        await stream.drain()
        subscription.handler = second
        await stream.publish(create_event(2))
        await stream.drain()
        subscription.handler = None
        await stream.publish(create_event(3))
        await stream.drain()
        assert got == [("first", 1), ("second", 2)]


class TestThreads:
    @pytest.mark.real_time
    async def test_a_slow_handler_in_one_thread_does_not_block_the_loop_of_another(self) -> None:
        stream, gate, later = InMemoryStream(), Gate(), list[Any]()
        await stream.subscribe(gate)
        with thread(lambda: publish(stream, "slow")):
            assert await asyncio.to_thread(gate.entered.wait, PATIENCE)
            async with asyncio.timeout(PATIENCE):
                subscription = await stream.subscribe(lambda event: later.append(event.data))
                await stream.publish(create_event("next"))
                assert stream.publish_nowait(create_event("last"))
                assert data_of(stream.get_recent_events()) == ["slow", "next", "last"]
                assert stream.statistics().subscribers == 2
                other = await stream.subscribe(print, "elsewhere")
                assert await stream.unsubscribe(other.id)
            assert later == []  # queued for delivery: the thread delivers
            gate.open.set()
            await stream.drain()
            assert later == ["next", "last"]
        assert gate.got == ["slow", "next", "last"]
        subscription.cancel()

    @pytest.mark.real_time
    async def test_publishers_wait_when_a_thousand_events_are_pending(self) -> None:
        stream, gate = InMemoryStream(), Gate()
        await stream.subscribe(gate)
        with thread(lambda: publish(stream, 0)):
            assert await asyncio.to_thread(gate.entered.wait, PATIENCE)
            for number in range(1, 1001):
                assert stream.publish_nowait(create_event(number))
            assert not stream.publish_nowait(create_event("too much"))
            assert stream.statistics().refused == 1
            waiting = asyncio.create_task(stream.publish(create_event(1001)))
            await asyncio.sleep(0.01)
            assert not waiting.done()
            gate.open.set()
            await waiting
            await stream.drain()
        assert gate.got == list(range(1002))

    @pytest.mark.real_time
    async def test_what_a_loop_left_behind_does_not_stop_others(self) -> None:
        # A loop that was handed the delivery ended before it came to it.
        stream, got = InMemoryStream(), list[Any]()

        def flood(event: Event) -> None:
            got.append(event.data)
            if event.data == "start":
                publish(stream, *range(2000))

        await stream.subscribe(flood)

        def in_a_loop_that_ends_at_once() -> None:
            loop = asyncio.new_event_loop()
            loop.run_until_complete(stream.publish(create_event("start")))
            loop.close()

        with thread(in_a_loop_that_ends_at_once):
            pass
        assert len(got) < 1000
        assert stream.publish_nowait(create_event("refused or not")) in (True, False)
        async with asyncio.timeout(PATIENCE):
            await stream.publish(create_event("end"))
            await stream.drain()
        assert [each for each in got if isinstance(each, int)] == list(range(2000))
        assert got[-1] == "end"

    @pytest.mark.parametrize("topic", ["a.*", {}])
    def test_a_publisher_that_is_refused_delivers_what_others_left_to_it(self, topic: Any) -> None:
        # While it finds out that its own cannot be published, another thread publishes.
        stream, got = InMemoryStream(), list[Any]()

        class Metadata(dict[str, Any]):
            def get(self, key: str, default: Any = None) -> Any:
                if not done:
                    done.append(True)
                    with thread(lambda: publish(stream, 1)):
                        pass
                    assert got == []
                return super().get(key, default)

        done: list[bool] = []
        asyncio.run(stream.subscribe(lambda event: got.append(event.data)))
        with pytest.raises(TopicError):
            stream.publish_nowait(Event(metadata=Metadata(topic=topic)))
        assert got == [1]

    @pytest.mark.real_time
    async def test_drain_waits_for_what_another_thread_delivers(self) -> None:
        stream, gate = InMemoryStream(), Gate()
        await stream.subscribe(gate)
        with thread(lambda: publish(stream, 1)):
            assert await asyncio.to_thread(gate.entered.wait, PATIENCE)
            draining = asyncio.create_task(stream.drain())
            await asyncio.sleep(0.01)
            assert not draining.done()
            gate.open.set()
            await draining
            assert gate.got == [1]


class TestHandingOn:
    """A thread that delivers hands the token on after 64 events."""

    async def test_a_handler_that_republishes_for_ever_does_not_block_its_loop(self) -> None:
        stream, count, going_on = InMemoryStream(), 0, True

        def again(event: Event) -> None:
            nonlocal count
            count += 1
            if going_on:
                stream.publish_nowait(event)

        await stream.subscribe(again)
        await stream.publish(create_event(0))
        for turn in range(1, 6):
            assert turn * 64 <= count <= turn * 64 + 1
            await asyncio.sleep(0)
        going_on = False
        await stream.drain()
        assert stream.statistics().published == count

    async def test_an_async_handler_that_republishes_for_ever_does_not_either(self) -> None:
        stream, count, going_on = InMemoryStream(), 0, True

        async def again(event: Event) -> None:
            nonlocal count
            count += 1
            if going_on and count < 10_000:
                await stream.publish(event)

        await stream.subscribe(again)
        await stream.publish(create_event(0))
        for turn in range(1, 6):
            await asyncio.sleep(0)
            assert count <= turn * 64
        going_on = False
        await stream.drain()
        assert stream.statistics().published == count > 64

    @pytest.mark.real_time
    async def test_a_thread_without_a_loop_is_relieved_by_the_loop_of_an_async_handler(
        self,
    ) -> None:
        await self.relieve(with_async_handler=True)

    @pytest.mark.real_time
    async def test_a_thread_without_a_loop_is_relieved_by_a_loop_that_waits(self) -> None:
        await self.relieve(with_async_handler=False)

    async def relieve(self, *, with_async_handler: bool) -> None:
        stream, going_on = InMemoryStream(), True
        threads: list[int] = []

        def again(event: Event) -> None:
            threads.append(threading.get_ident())
            if going_on:
                stream.publish_nowait(event)

        async def ignore(_: Event) -> None:
            pass

        await stream.subscribe(again)
        if with_async_handler:
            await stream.subscribe(ignore, "another topic")
        waiting = asyncio.create_task(stream.drain())
        with thread(lambda: publish(stream, 0)) as worker:
            while worker.is_alive():
                if not with_async_handler and waiting.done():
                    waiting = asyncio.create_task(stream.drain())
                await asyncio.sleep(0)
        assert threads[0] == worker.ident
        handed_over = len(threads)
        await asyncio.sleep(0.01)
        assert len(threads) > handed_over
        assert threads[-1] == threading.get_ident()
        going_on = False
        await waiting
        await stream.drain()

    def test_without_any_loop_it_delivers_all(self) -> None:
        stream, got = InMemoryStream(), list[int]()

        def count_down(event: Event) -> None:
            got.append(event.data)
            if event.data:
                stream.publish_nowait(create_event(event.data - 1))

        async def ignore(_: Event) -> None:
            pass

        asyncio.run(stream.subscribe(count_down))
        asyncio.run(stream.subscribe(ignore, "another topic"))  # on a loop that is closed
        resting = asyncio.new_event_loop()
        resting.run_until_complete(stream.subscribe(ignore, "another topic"))
        assert stream.publish_nowait(create_event(500))
        resting.close()
        assert got == list(range(500, -1, -1))


class TestRecentEvents:
    @pytest.mark.parametrize(
        ("count", "expected"),
        [(0, []), (-1, []), (-2, []), (1, [4]), (3, [2, 3, 4]), (5, [0, 1, 2, 3, 4]), (99, None)],
    )
    async def test_are_the_latest_oldest_first(
        self, count: int, expected: list[int] | None
    ) -> None:
        stream = InMemoryStream()
        for number in range(5):
            await stream.publish(create_event(number))
        got = data_of(stream.get_recent_events(count))
        assert got == (list(range(5)) if expected is None else expected)

    async def test_are_ten_by_default_and_a_thousand_at_most(self) -> None:
        stream = InMemoryStream()
        for number in range(1500):
            await stream.publish(create_event(number))
        assert data_of(stream.get_recent_events()) == list(range(1490, 1500))
        assert data_of(stream.get_recent_events(5000)) == list(range(500, 1500))
        assert stream.statistics().buffered == 1000

    async def test_are_bounded_by_a_size_that_can_be_set(self) -> None:
        stream = InMemoryStream(3)
        assert stream._buffer_size == 3
        for number in range(5):
            await stream.publish(create_event(number))
        assert data_of(stream.get_recent_events()) == [2, 3, 4]
        stream._buffer_size = 2
        assert data_of(stream.get_recent_events()) == [3, 4]
        stream._buffer_size = 4
        for number in range(5, 9):
            await stream.publish(create_event(number))
        assert data_of(stream.get_recent_events()) == [5, 6, 7, 8]
        assert stream._buffer_size == 4

    async def test_may_be_none(self) -> None:
        stream = InMemoryStream(0)
        await stream.publish(create_event(1))
        assert stream.get_recent_events() == []
        assert stream._buffer_size == 0

    def test_cannot_be_fewer_than_none(self) -> None:
        with pytest.raises(ValueError, match=r"buffer_size .* not -1"):
            InMemoryStream(-1)

    @pytest.mark.real_time
    async def test_can_be_read_while_other_threads_publish(self) -> None:
        stream = InMemoryStream(50)
        with thread(lambda: publish(stream, *range(20_000))) as worker:
            while worker.is_alive():
                got = data_of(stream.get_recent_events(50))
                assert got == list(range(got[0], got[0] + len(got))) if got else True
                await asyncio.sleep(0)


class TestRouting:
    async def test_follows_topics_patterns_and_several_of_them(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        def note(topics: Any) -> Callable[[Event], None]:
            return lambda event: got.append((topics, event.data))

        for topics in ("orders.*", "orders.>", "orders.new", "*", ("a", "orders.new"), "b"):
            await stream.subscribe(note(topics), topics)
        await stream.publish(create_event(1, topic="orders.new"))
        assert [topics for topics, _ in got] == [
            "orders.*", "orders.>", "orders.new", "*", ("a", "orders.new"),
        ]  # fmt: skip
        got.clear()
        await stream.publish(create_event(2, topic="orders.new.eu"))
        assert [topics for topics, _ in got] == ["orders.>", "*"]
        got.clear()
        await stream.publish(create_event(3))  # without a topic
        assert got == [("*", 3)]

    @pytest.mark.parametrize("topic", ["", "a.*", ">", 7, ["a"], {"a": 1}, "a\nb"])
    async def test_refuses_what_cannot_be_a_topic(self, topic: Any) -> None:
        stream, got = InMemoryStream(), list[Any]()
        await stream.subscribe(got.append)
        with pytest.raises(TopicError):
            await stream.publish(Event(metadata={"topic": topic}))
        with pytest.raises(TopicError):
            stream.publish_nowait(Event(metadata={"topic": topic}))
        assert got == []
        assert stream.statistics().published == 0
        await stream.publish(create_event(1, topic="a"))
        assert len(got) == 1

    @pytest.mark.parametrize("topic", ["", 7, [], "a\nb"])
    async def test_refuses_what_cannot_be_subscribed_to(self, topic: Any) -> None:
        stream = InMemoryStream()
        with pytest.raises(TopicError):
            await stream.subscribe(print, topic)
        assert stream.statistics().subscribers == 0


async def test_statistics_count() -> None:
    stream = InMemoryStream()

    async def slow(event: Event) -> None:
        await asyncio.sleep(1)

    await stream.subscribe(slow, overflow="drop_newest", buffer_size=2)
    subscription = await stream.subscribe(slow, overflow="drop_oldest", buffer_size=2)
    for number in range(5):
        await stream.publish(create_event(number))
    statistics = stream.statistics()
    assert (statistics.published, statistics.subscribers, statistics.dropped) == (5, 2, 6)
    assert statistics.queues[subscription.id].size == 2
    assert statistics.queues[subscription.id].received == 5
    subscription.cancel()
    assert stream.statistics().dropped == 6
    assert list(stream.statistics().queues) != [subscription.id]
    await stream.aclose()


async def test_a_dropped_stream_is_not_kept_by_what_it_was_made_of() -> None:
    stream = InMemoryStream()

    async def take(event: Event) -> None:
        pass

    await stream.subscribe(take)
    await stream.publish(create_event(1))
    await stream.drain()
    await asyncio.sleep(1)
    gone = weakref.ref(stream)
    del stream
    gc.collect()
    assert gone() is None


def test_publishing_needs_no_event_loop() -> None:
    async def scenario() -> None:
        pass

    stream, got = InMemoryStream(), list[Any]()
    run(stream.subscribe(lambda event: got.append(event.data)))
    assert stream.publish_nowait(create_event(1))
    assert got == [1]
    run(scenario())
