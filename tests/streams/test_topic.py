"""`TopicStream`: a stream for each topic, patterns across them, and topics that are let go."""

import asyncio
import gc
import logging
import threading
import tracemalloc
from typing import Any

import pytest

from codomyrmex.events.streaming import (
    Event,
    Exact,
    InMemoryStream,
    Pattern,
    StreamClosed,
    StreamingError,
    TopicError,
    TopicStream,
    create_event,
)
from codomyrmex.events.streaming.testing import cancel_at_every_await
from tests.streams.handlers import PATIENCE, Gate, data_of, plainly, thread


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


def collector(got: list[Any], name: str = "") -> Any:
    return lambda event: got.append((name, event.data) if name else event.data)


class TestTopics:
    async def test_are_streams_made_on_first_use(self) -> None:
        topics, got = TopicStream(), list[Any]()
        assert topics.list_topics() == []
        orders = topics.topic("orders")
        assert isinstance(orders, InMemoryStream)
        assert topics.topic("orders") is orders
        await orders.subscribe(collector(got))
        await topics.publish("orders", create_event(1))
        await topics.publish("users", create_event(2))
        assert topics.list_topics() == ["orders", "users"]
        assert got == [1]
        assert data_of(orders.get_recent_events()) == [1]

    async def test_are_listed_in_order(self) -> None:
        topics = TopicStream()
        for name in ("b", "a", "c"):
            topics.topic(name)
        assert topics.list_topics() == ["a", "b", "c"]

    async def test_published_to_directly_reach_whoever_subscribed_to_them(self) -> None:
        topics, got = TopicStream(), list[Any]()
        await topics.subscribe("a", collector(got, "exact"))
        await topics.subscribe("*", collector(got, "every"))
        stream = topics.topic("a")
        await stream.publish(Event(data=1))
        assert stream.publish_nowait(Event(data=2))
        assert stream.publish_soon(Event(data=3)) is None
        assert got == [(name, n) for n in (1, 2, 3) for name in ("exact", "every")]
        assert [e.metadata for e in stream.get_recent_events()] == [{"topic": "a"}] * 3

    def test_made_by_two_threads_at_once_are_one(self) -> None:
        topics = TopicStream()
        made: list[InMemoryStream] = []

        class Name(str):
            """A name that another thread takes while it is being checked."""

            __slots__ = ()

            def isprintable(self) -> bool:
                with thread(lambda: made.append(topics.topic("a"))):
                    pass
                return super().isprintable()

        assert topics.topic(Name("a")) is made[0]
        assert topics.list_topics() == ["a"]

    async def test_do_not_change_the_event_of_the_caller(self) -> None:
        topics, got = TopicStream(), list[Event]()
        await topics.subscribe("*", got.append)
        event = Event(data={"x": 1}, metadata={"user": "ada"})
        await topics.publish("a", event)
        await topics.publish("b", event)
        assert event.metadata == {"user": "ada"}
        assert [each.metadata["topic"] for each in got] == ["a", "b"]
        for each in got:
            assert (each.id, each.data, each.timestamp) == (event.id, event.data, event.timestamp)
            assert each.metadata["user"] == "ada"
        stored = topics.topic("a").get_recent_events()
        assert [each.metadata["topic"] for each in stored] == ["a"]

    async def test_do_not_copy_an_event_that_has_the_topic(self) -> None:
        topics, got = TopicStream(), list[Event]()
        await topics.subscribe("a", got.append)
        event = create_event(1, topic="a")
        await topics.publish("a", event)
        assert got[0] is event

    async def test_replace_a_topic_that_the_event_had(self) -> None:
        topics, got = TopicStream(), list[Event]()
        await topics.subscribe("*", got.append)
        await topics.publish("b", create_event(1, topic="a"))
        assert got[0].metadata["topic"] == "b"

    @pytest.mark.parametrize("name", ["", "a.*", "*", ">", "a.>", "a\nb", "x" * 1025, 7, None])
    async def test_that_cannot_be_are_refused(self, name: Any) -> None:
        topics = TopicStream()
        with pytest.raises(TopicError):
            topics.topic(name)
        with pytest.raises(TopicError):
            await topics.publish(name, create_event(1))
        with pytest.raises(TopicError):
            topics.publish_nowait(name, create_event(1))
        assert topics.list_topics() == []

    @pytest.mark.parametrize("topic", ["", "a\nb", 7, None, []])
    async def test_that_cannot_be_subscribed_to_are_refused(self, topic: Any) -> None:
        topics = TopicStream()
        with pytest.raises(TopicError):
            await topics.subscribe(topic, print)
        assert topics.list_topics() == []
        assert topics.statistics().subscribers == 0


class TestSubscriptions:
    async def test_to_patterns_get_all_that_match(self) -> None:
        topics, got = TopicStream(), list[Any]()
        for topic in ("orders.*", "orders.>", "*", ">", "orders.new", "*.new", ("x", "orders.new")):
            await topics.subscribe(topic, collector(got, str(topic)))
        await topics.publish("orders.new", create_event(1))
        assert [name for name, _ in got] == [
            "orders.*", "orders.>", "*", ">", "orders.new", "*.new", "('x', 'orders.new')",
        ]  # fmt: skip
        got.clear()
        await topics.publish("orders.new.eu", create_event(2))
        assert [name for name, _ in got] == ["orders.>", "*", ">"]
        got.clear()
        await topics.publish("other", create_event(3))
        assert [name for name, _ in got] == ["*", ">"]

    async def test_of_the_topic_itself_come_before_those_that_topics_share(self) -> None:
        topics, got = TopicStream(), list[Any]()
        await topics.subscribe("a", collector(got, "shared 1"))
        await topics.topic("a").subscribe(collector(got, "own 1"))
        await topics.subscribe("*", collector(got, "shared 2"))
        await topics.topic("a").subscribe(collector(got, "own 2"))
        await topics.publish("a", create_event(1))
        assert [name for name, _ in got] == ["own 1", "own 2", "shared 1", "shared 2"]

    async def test_may_come_and_go_at_any_time(self) -> None:
        topics, got = TopicStream(), list[Any]()
        await topics.publish("a.b", create_event(0))
        one = await topics.subscribe("a.*", collector(got, "one"))
        await topics.publish("a.b", create_event(1))
        two = await topics.subscribe("a.>", collector(got, "two"))
        own = await topics.topic("a.b").subscribe(collector(got, "own"))
        await topics.publish("a.b", create_event(2))
        assert await topics.unsubscribe(one.id)
        own.cancel()
        await topics.publish("a.b", create_event(3))
        two.cancel()
        await topics.publish("a.b", create_event(4))
        assert got == [("one", 1), ("own", 2), ("one", 2), ("two", 2), ("two", 3)]
        assert not await topics.unsubscribe(one.id)
        assert not await topics.unsubscribe(two.id)
        assert not await topics.unsubscribe("nobody")
        assert topics.statistics().subscribers == 0

    async def test_may_come_to_a_topic_that_had_none(self) -> None:
        topics, got = TopicStream(), list[Any]()
        await topics.publish("a", create_event(0))
        one = await topics.subscribe("a", collector(got, "one"))
        await topics.publish("a", create_event(1))
        one.cancel()
        await topics.publish("a", create_event(2))
        await topics.subscribe("a", collector(got, "two"))
        await topics.publish("a", create_event(3))
        assert got == [("one", 1), ("two", 3)]

    async def test_of_a_topic_get_nothing_of_another(self) -> None:
        topics, got = TopicStream(), list[Any]()
        await topics.topic("a").subscribe(collector(got), "b")
        await topics.publish("a", create_event(1))
        await topics.publish("b", create_event(2))
        assert got == []

    async def test_make_the_topic_that_they_name(self) -> None:
        topics = TopicStream()
        await topics.subscribe("a", print)
        await topics.subscribe("b.*", print)
        assert topics.list_topics() == ["a"]

    async def test_may_say_what_they_mean(self) -> None:
        topics, got = TopicStream(), list[Any]()
        await topics.subscribe(Exact("a.*"), collector(got, "exact"))
        await topics.subscribe(Pattern("a.*"), collector(got, "pattern"))
        await topics.publish("a.b", create_event(1))
        assert got == [("pattern", 1)]

    async def test_have_filters(self) -> None:
        topics, got = TopicStream(), list[Any]()
        await topics.subscribe("a", collector(got), lambda event: event.data > 1)
        for number in range(4):
            await topics.publish("a", create_event(number))
        assert got == [2, 3]

    async def test_that_fail_harm_nobody(self, caplog: pytest.LogCaptureFixture) -> None:
        topics, got = TopicStream(), list[Any]()

        def fail(event: Event) -> None:
            raise KeyError

        await topics.subscribe("*", fail)
        await topics.topic("a").subscribe(fail)
        await topics.subscribe("a", collector(got))
        await topics.publish("a", create_event(1))
        assert got == [1]
        assert topics.statistics().failed == 2
        assert len(caplog.records) == 2

    async def test_have_policies(self) -> None:
        topics, got = TopicStream(), list[Any]()

        async def slow(event: Event) -> None:
            await asyncio.sleep(1)
            got.append(event.data)

        await topics.subscribe("a.*", slow, overflow="latest_by_key", buffer_size=10)
        await topics.publish("a.x", create_event("first"))
        await asyncio.sleep(0)
        for number in range(3):
            for name in ("a.x", "a.y"):
                await topics.publish(name, create_event((name, number)))
        await topics.drain()
        assert got == ["first", ("a.x", 2), ("a.y", 2)]
        with pytest.raises(ValueError, match="overflow is one of"):
            await topics.subscribe("z", print, overflow="drop")
        with pytest.raises(ValueError, match="a key is for"):
            await topics.subscribe("z", print, key=lambda event: event.id)
        assert "z" not in topics.list_topics()

    @pytest.mark.parametrize("topic", ["a", "a.b", "*"])
    async def test_that_are_async_make_publish_wait(self, topic: str) -> None:
        topics = TopicStream()

        async def slow(event: Event) -> None:
            await asyncio.sleep(1)

        await topics.subscribe(topic, slow, buffer_size=2)
        name = "a" if topic == "*" else topic
        await topics.publish(name, create_event(0))
        await asyncio.sleep(0)
        for number in range(2):
            await topics.publish(name, create_event(number))
        assert not topics.publish_nowait(name, create_event("refused"))
        assert topics.statistics().refused == 1
        assert topics.publish_nowait("quick", create_event(1)) == (topic != "*")
        await topics.publish(name, create_event(3))
        assert asyncio.get_running_loop().time() == 1
        await topics.aclose()

    async def test_make_publish_wait_on_a_topic_that_nobody_published_to_before(self) -> None:
        topics = TopicStream()

        async def slow(event: Event) -> None:
            await asyncio.sleep(1)

        await topics.subscribe("a.*", slow, buffer_size=1)
        await topics.publish("a.x", create_event(0))
        await asyncio.sleep(0)
        await topics.publish("a.x", create_event(1))
        assert not topics.publish_nowait("a.new", create_event(2))
        await topics.publish("a.new", create_event(3))
        assert asyncio.get_running_loop().time() == 1
        await topics.aclose()

    async def test_publish_in_a_handler_never_waits_whatever_the_topic(self) -> None:
        topics, got = TopicStream(), list[Any]()

        async def handler(event: Event) -> None:
            got.append(event.data)
            if event.data < 3:
                for name in ("a.x", "a.y", "a.z"):
                    await topics.publish(name, create_event(event.data + 1))
                await topics.topic("b").publish(create_event(100))

        await topics.subscribe("a.*", handler, buffer_size=1)
        await topics.topic("b").subscribe(handler, buffer_size=1)
        await topics.publish("a.0", create_event(0))
        for _ in range(20):
            await topics.drain()
        assert asyncio.get_running_loop().time() == 0
        assert sorted(got) == [0, *[1] * 3, *[2] * 9, *[3] * 27, *[100] * 13]

    async def test_that_return_awaitables_have_one_queue_for_all_their_topics(self) -> None:
        topics, got = TopicStream(), list[Any]()

        async def slow(event: Event) -> None:
            await asyncio.sleep(1)
            got.append(event.data)

        subscription = await topics.subscribe("a.*", plainly(slow))
        for number in range(4):
            await topics.publish(f"a.{number % 2}", create_event(number))
        await topics.drain()
        assert got == [0, 1, 2, 3]
        assert asyncio.get_running_loop().time() == 4
        assert list(topics.statistics().queues) == [subscription.id]

    @pytest.mark.real_time
    async def test_that_return_awaitables_in_two_threads_at_once_have_one_queue(self) -> None:
        topics, got = TopicStream(), list[Any]()
        inside = 0

        async def take(event: Event) -> None:
            nonlocal inside
            inside += 1
            await asyncio.sleep(0.001)
            got.append((event.data, inside))
            inside -= 1

        both = threading.Barrier(2, timeout=PATIENCE)

        def returning(event: Event) -> Any:
            if event.data == 0:
                both.wait()  # both threads are in the handler before it has a queue
            return take(event)

        await topics.subscribe("*", returning)

        def work(name: str) -> None:
            for number in range(3):
                topics.publish_nowait(name, create_event(number))

        await asyncio.gather(*(asyncio.to_thread(work, name) for name in "ab"))
        await topics.drain()
        assert sorted(got) == sorted([(number, 1) for number in range(3)] * 2)
        await topics.aclose()

    @pytest.mark.real_time
    async def test_that_return_awaitables_after_their_end_are_not_waited_for(self) -> None:
        topics, got = TopicStream(), list[Any]()
        inside, leave = threading.Event(), threading.Event()

        async def take(event: Event) -> None:
            got.append(event.data)

        def returning(event: Event) -> Any:
            if event.data == "slow":
                inside.set()
                assert leave.wait(PATIENCE)
            return take(event)

        subscription = await topics.subscribe("*", returning)
        with thread(lambda: topics.publish_nowait("a", create_event("slow"))):
            assert await asyncio.to_thread(inside.wait, PATIENCE)
            await topics.publish("b", create_event("quick"))
            await asyncio.sleep(0.01)
            assert got == ["quick"]
            subscription.cancel()
            leave.set()
        await topics.aclose()
        assert got == ["quick"]

    @pytest.mark.real_time
    async def test_to_a_pattern_see_each_topic_in_its_order_whatever_the_threads(self) -> None:
        topics = TopicStream()
        got: list[tuple[str, int]] = []
        own: dict[str, list[int]] = {name: [] for name in "abcd"}
        await topics.subscribe("*", lambda event: got.append((event.metadata["topic"], event.data)))
        for name, into in own.items():
            await topics.topic(name).subscribe(collector(into))

        def work(name: str) -> None:
            for number in range(500):
                while not topics.publish_nowait(name, create_event(number)):
                    pass

        await asyncio.gather(*(asyncio.to_thread(work, name) for name in own))
        for name, numbers in own.items():
            assert [number for topic, number in got if topic == name] == list(range(500))
            assert numbers == list(range(500))

    @pytest.mark.real_time
    async def test_a_slow_handler_of_one_topic_keeps_nobody_from_another(self) -> None:
        topics, gate, got = TopicStream(), Gate(), list[Any]()
        await topics.topic("slow").subscribe(gate)
        await topics.subscribe("*", collector(got))
        with thread(lambda: topics.publish_nowait("slow", create_event(1))):
            assert await asyncio.to_thread(gate.entered.wait, PATIENCE)
            async with asyncio.timeout(PATIENCE):
                await topics.publish("quick", create_event(2))
            assert got == [2]
            gate.open.set()
        assert got == [2, 1]


class TestLettingGo:
    async def test_of_twenty_thousand_topics_leaves_none(self) -> None:
        clock = Clock()
        topics = TopicStream(clock=clock)
        for number in range(20_000):
            await topics.publish(f"user.{number}", create_event(number))
        assert len(topics.list_topics()) == 20_000
        clock.time += 601
        assert topics.list_topics() == []
        statistics = topics.statistics()
        assert (statistics.published, statistics.buffered) == (20_000, 0)

    async def test_happens_while_others_are_published_to(self) -> None:
        clock = Clock()
        topics = TopicStream(clock=clock)

        async def publish_to(first: int, last: int) -> None:
            for number in range(first, last):
                await topics.publish(f"user.{number}", create_event(number))
                clock.time += 1  # so 600 of them are not idle for long enough
            gc.collect()

        asyncio.get_running_loop().set_debug(False)
        tracemalloc.start()
        try:
            await publish_to(0, 2000)
            before = tracemalloc.get_traced_memory()[0]
            await publish_to(2000, 6000)
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert 600 <= topics.statistics().buffered < 800  # one event in each topic there is
        # What grew is what is known of who matches a topic, for a bounded number of topics.
        assert grown / 4000 < 400

    async def test_happens_while_only_a_topic_that_is_there_is_published_to(self) -> None:
        clock = Clock()
        topics = TopicStream(idle_ttl=100, clock=clock)
        for period in range(3):
            for number in range(30):
                await topics.publish(f"user.{period}.{number}", create_event(number))
            assert topics.statistics().buffered >= 30
            for _ in range(250):
                clock.time += 1
                await topics.topic("busy").publish(create_event("one"))
            assert topics.statistics().buffered == len(topics.topic("busy").get_recent_events(999))

    async def test_comes_after_ten_minutes_and_not_before(self) -> None:
        clock = Clock()
        topics = TopicStream(clock=clock)
        await topics.publish("a", create_event(1))
        clock.time += 599.9
        assert topics.list_topics() == ["a"]
        clock.time += 0.2
        assert topics.list_topics() == []

    async def test_is_counted_from_the_last_event(self) -> None:
        clock = Clock()
        topics = TopicStream(idle_ttl=10, clock=clock)
        for _ in range(5):
            await topics.publish("a", create_event(1))
            clock.time += 9
            assert topics.list_topics() == ["a"]
        clock.time += 9
        assert topics.list_topics() == []

    async def test_is_for_topics_without_subscribers_of_their_own(self) -> None:
        clock = Clock()
        topics = TopicStream(idle_ttl=10, clock=clock)
        await topics.topic("own").subscribe(print)
        exact = await topics.subscribe("exact", print)
        await topics.subscribe(("one of several", "b.*"), print)
        await topics.subscribe("*", print)
        for name in ("own", "exact", "one of several", "b.x", "nobody"):
            topics.topic(name)
        clock.time += 100
        assert topics.list_topics() == ["exact", "one of several", "own"]
        exact.cancel()
        clock.time += 100
        assert topics.list_topics() == ["one of several", "own"]

    async def test_takes_a_topic_with_all_that_was_kept_for_it(self) -> None:
        clock = Clock()
        topics = TopicStream(idle_ttl=10, clock=clock)
        await topics.publish("a", create_event(1))
        clock.time += 100
        assert topics.list_topics() == []
        assert topics.topic("a").get_recent_events() == []

    async def test_leaves_a_stream_that_is_held_what_it_was(self) -> None:
        clock = Clock()
        topics, got = TopicStream(idle_ttl=10, clock=clock), list[Any]()
        held = topics.topic("a")
        await held.publish(create_event(1))
        clock.time += 100
        assert topics.list_topics() == []
        await topics.subscribe("a", collector(got, "shared"))
        await held.subscribe(collector(got, "own"))
        await held.publish(create_event(2))
        await topics.publish("a", create_event(3))
        assert topics.topic("a") is held
        assert topics.list_topics() == ["a"]
        assert got == [("own", 2), ("shared", 2), ("own", 3), ("shared", 3)]
        assert data_of(held.get_recent_events()) == [1, 2, 3]
        assert topics.statistics().published == 3

    @pytest.mark.parametrize("first", ["publish", "subscribe", "topic"])
    async def test_takes_back_a_stream_that_is_held_as_soon_as_it_is_used(self, first: str) -> None:
        clock = Clock()
        topics = TopicStream(idle_ttl=10, clock=clock)
        held = topics.topic("a")
        clock.time += 100
        assert topics.list_topics() == []
        if first == "publish":
            await held.publish(create_event(1))
        elif first == "subscribe":
            await held.subscribe(print)
        else:
            topics.topic("a")
        assert topics.list_topics() == ["a"]
        assert topics.topic("a") is held

    async def test_keeps_its_counts(self) -> None:
        clock = Clock()
        topics = TopicStream(idle_ttl=10, clock=clock)
        held = topics.topic("a")

        def fail(event: Event) -> None:
            raise KeyError

        logging.getLogger("codomyrmex.events.streaming").disabled = True
        try:
            subscription = await held.subscribe(fail)
            for _ in range(3):
                await held.publish(create_event(1))
        finally:
            logging.getLogger("codomyrmex.events.streaming").disabled = False
        subscription.cancel()
        for _ in range(3):
            clock.time += 100
            assert topics.list_topics() == []
            statistics = topics.statistics()
            assert (statistics.published, statistics.failed, statistics.buffered) == (3, 3, 0)
            topics.topic("a")
            statistics = topics.statistics()
            assert (statistics.published, statistics.failed, statistics.buffered) == (3, 3, 3)

    @pytest.mark.parametrize("ttl", [0, -1])
    def test_after_no_time_is_refused(self, ttl: float) -> None:
        with pytest.raises(ValueError, match="idle_ttl"):
            TopicStream(idle_ttl=ttl)

    @pytest.mark.parametrize("use", ["subscribe", "publish"])
    async def test_does_not_happen_to_a_topic_that_is_used_at_this_moment(self, use: str) -> None:
        # The clock is asked between looking up a topic and using it: that is when another thread
        # could let it go. Here the clock does, the first time that it is asked for a while.
        class Sweeping(Clock):
            def __call__(self) -> float:
                if self.time == 1100.0:
                    self.time = 1100.5
                    topics.list_topics()
                return super().__call__()

        clock, got = Sweeping(), list[Any]()
        topics = TopicStream(idle_ttl=10, clock=clock)
        held = topics.topic("a")
        clock.time = 1100.0
        if use == "subscribe":
            await held.subscribe(collector(got))
            await topics.publish("a", create_event(1))
            assert got == [1]
        else:
            await held.publish(create_event(1))
        assert topics.list_topics() == ["a"]
        assert topics.topic("a") is held
        assert data_of(topics.topic("a").get_recent_events()) == [1]
        assert topics.statistics().published == 1

    @pytest.mark.real_time
    async def test_while_threads_subscribe_and_publish_loses_nothing(self) -> None:
        clock = Clock()
        topics = TopicStream(idle_ttl=1, clock=clock)
        going_on = True

        def sweep() -> None:
            while going_on:
                clock.time += 0.5
                topics.list_topics()

        with thread(sweep):
            try:
                for number in range(2000):
                    got: list[Any] = []
                    name = f"t.{number % 3}"
                    subscription = await topics.topic(name).subscribe(collector(got))
                    await topics.publish(name, create_event(number))
                    assert got == [number]
                    subscription.cancel()
            finally:
                going_on = False
        assert topics.statistics().published == 2000


class TestClosing:
    async def test_of_all_delivers_and_then_takes_no_more(self) -> None:
        got: list[Any] = []

        async def slow(event: Event) -> None:
            await asyncio.sleep(1)
            got.append(event.data)

        async with TopicStream() as topics:
            await topics.subscribe("*", slow)
            await topics.topic("a").subscribe(slow)
            held = topics.topic("a")
            await topics.publish("a", create_event(1))
            await topics.publish("b", create_event(2))
        assert sorted(got) == [1, 1, 2]
        for publish in (topics.publish("a", create_event(3)), topics.publish("c", create_event(3))):
            with pytest.raises(StreamClosed):
                await publish
        with pytest.raises(StreamClosed):
            await held.publish(create_event(3))
        with pytest.raises(StreamClosed):
            topics.publish_nowait("a", create_event(3))
        with pytest.raises(StreamClosed):
            topics.topic("c")
        with pytest.raises(StreamClosed):
            await topics.subscribe("c", print)
        assert topics.statistics().subscribers == 0
        await topics.aclose()

    async def test_gives_up_what_is_left_when_the_block_raises(self) -> None:
        got: list[Any] = []

        async def slow(event: Event) -> None:
            await asyncio.sleep(1)
            got.append(event.data)

        with pytest.raises(KeyError):  # noqa: PT012
            async with TopicStream() as topics:
                await topics.subscribe("*", slow)
                await topics.publish("a", create_event(1))
                await asyncio.sleep(0)
                raise KeyError
        assert got == []

    @pytest.mark.parametrize("drain", [True, False])
    def test_leaves_nothing_wherever_it_is_cancelled(self, drain: bool) -> None:
        async def scenario() -> None:
            async def slow(event: Event) -> None:
                await asyncio.sleep(1)

            topics = TopicStream()
            try:
                await topics.subscribe("*", slow)
                for name in "abc":
                    await topics.topic(name).subscribe(slow)
                    await topics.publish(name, create_event(1))
                await asyncio.sleep(0)
            finally:
                await topics.aclose(drain=drain)

        assert cancel_at_every_await(scenario) >= 2

    async def test_in_a_handler_does_not_wait_for_it(self) -> None:
        topics, got = TopicStream(), list[Any]()

        async def close(event: Event) -> None:
            await topics.aclose()
            await asyncio.sleep(1)
            got.append(event.data)

        await topics.subscribe("*", close)
        await topics.publish("a", create_event(1))
        await asyncio.sleep(5)
        assert got == [1]

    async def test_of_one_topic_lets_it_be_made_anew(self) -> None:
        topics, got = TopicStream(), list[Any]()
        await topics.subscribe("a", collector(got, "shared"))
        async with topics.topic("a") as held:
            await held.subscribe(collector(got, "own"))
            await held.publish(create_event(1))
        with pytest.raises(StreamClosed):
            await held.publish(create_event(2))
        with pytest.raises(StreamClosed):
            await held.subscribe(print)
        assert topics.list_topics() == []
        await topics.publish("a", create_event(3))
        assert topics.topic("a") is not held
        assert got == [("own", 1), ("shared", 1), ("shared", 3)]
        assert topics.statistics().published == 2
        await held.aclose()
        assert topics.list_topics() == ["a"]

    async def test_of_one_that_was_let_go_lets_it_be_made_anew(self) -> None:
        clock = Clock()
        topics = TopicStream(idle_ttl=10, clock=clock)
        held = topics.topic("a")
        clock.time += 100
        assert topics.list_topics() == []
        await held.aclose()
        assert topics.topic("a") is not held
        await topics.publish("a", create_event(1))

    async def test_drain_waits_for_all_topics(self) -> None:
        topics, got = TopicStream(), list[Any]()

        async def slow(event: Event) -> None:
            await asyncio.sleep(1)
            got.append(event.data)

        await topics.topic("a").subscribe(slow)
        await topics.subscribe("b", slow)
        await topics.publish("a", create_event(1))
        await topics.publish("b", create_event(2))
        await topics.drain()
        assert sorted(got) == [1, 2]

    async def test_drain_in_a_handler_would_wait_for_itself(self) -> None:
        topics, errors = TopicStream(), list[Exception]()

        async def handler(event: Event) -> None:
            try:
                await topics.drain()
            except StreamingError as error:
                errors.append(error)

        await topics.subscribe("*", handler)
        await topics.publish("a", create_event(1))
        await topics.drain()
        assert len(errors) == 1


class TestAsAStream:
    async def test_publishes_to_the_topic_in_the_metadata(self) -> None:
        topics, got = TopicStream(), list[Any]()
        await topics.subscribe("a", collector(got))
        stream = topics.as_stream()
        await stream.publish(create_event(1, topic="a"))
        assert stream.publish_nowait(create_event(2, topic="a"))
        assert got == [1, 2]
        assert topics.list_topics() == ["a"]
        assert stream.statistics() == topics.statistics()

    async def test_refuses_events_without_a_topic(self) -> None:
        stream = TopicStream().as_stream()
        with pytest.raises(TopicError):
            await stream.publish(create_event(1))
        with pytest.raises(TopicError):
            stream.publish_nowait(create_event(1))

    async def test_knows_the_subscriptions_of_the_topics(self) -> None:
        topics = TopicStream()
        one = await topics.subscribe("a", print)
        two = await topics.as_stream().subscribe(print, "b")
        assert await topics.as_stream().unsubscribe(one.id)
        assert await topics.unsubscribe(two.id)

    @pytest.mark.real_time
    async def test_finishing_waits_for_what_another_thread_delivers(self) -> None:
        topics, gate, got = TopicStream(), Gate(), list[Any]()
        stream = topics.as_stream()
        await topics.topic("a").subscribe(gate)
        subscription = await stream.subscribe(collector(got), "a")
        with thread(lambda: topics.publish_nowait("a", create_event(1))):
            assert await asyncio.to_thread(gate.entered.wait, PATIENCE)
            finishing = asyncio.create_task(stream.finish(subscription.id))
            await asyncio.sleep(0.01)
            assert not finishing.done()
            gate.open.set()
            assert await finishing
            assert got == [1]

    def test_finishing_in_a_sync_handler_does_not_wait_for_it(self) -> None:
        topics, got = TopicStream(), list[Any]()
        stream = topics.as_stream()

        def once(event: Event) -> None:
            got.append(event.data)
            assert asyncio.run(stream.finish(subscription.id))

        subscription = asyncio.run(stream.subscribe(once, "a"))
        with thread(lambda: [topics.publish_nowait("a", create_event(n)) for n in range(2)]):
            pass
        assert got == [0]

    async def test_finishing_in_a_handler_does_not_wait_for_it(self) -> None:
        topics, got = TopicStream(), list[Any]()
        stream = topics.as_stream()

        async def once(event: Event) -> None:
            got.append(event.data)
            assert await stream.finish(subscription.id)

        subscription = await stream.subscribe(once, "a")
        await topics.publish("a", create_event(1))
        await topics.publish("a", create_event(2))
        await topics.aclose()
        assert got == [1]
