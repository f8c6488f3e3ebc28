"""`InMemoryStream`: sync and async handlers, their queues, and what happens when these are full."""

import asyncio
import functools
import gc
import logging
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from codomyrmex.events.streaming import (
    Event,
    InMemoryStream,
    QueueStatistics,
    StreamingError,
    Subscription,
    create_event,
)
from codomyrmex.events.streaming.testing import cancel_at_every_await
from tests.streams.handlers import plainly

Handler = Callable[[Event], Any]


def now() -> float:
    return asyncio.get_running_loop().time()


async def publish_all(stream: InMemoryStream, *data: Any) -> None:
    for each in data:
        await stream.publish(create_event(each))


def queue_of(stream: InMemoryStream, subscription: Subscription) -> QueueStatistics:
    return stream.statistics().queues[subscription.id]


class AsyncObject:
    def __init__(self, got: list[Any]) -> None:
        self.got = got

    async def __call__(self, event: Event) -> None:
        await asyncio.sleep(1)
        self.got.append(event.data)

    async def method(self, event: Event) -> None:
        await self(event)


class AwaitableObject:
    def __init__(self, coroutine: Awaitable[Any]) -> None:
        self.coroutine = coroutine

    def __await__(self) -> Any:
        return self.coroutine.__await__()


ASYNC_KINDS: dict[str, Callable[[AsyncObject], Handler]] = {
    "an async function": lambda one: one.method,
    "an object with an async call": lambda one: one,
    "a partial of an async function": lambda one: functools.partial(AsyncObject.method, one),
    "a partial of a partial of an object": lambda one: functools.partial(functools.partial(one)),
    "a lambda that returns a coroutine": plainly,
    "a function that returns a task": lambda one: lambda event: asyncio.ensure_future(one(event)),
    "a function that returns an awaitable": lambda one: lambda e: AwaitableObject(one(e)),
}


@pytest.mark.parametrize("kind", ASYNC_KINDS)
class TestAsyncHandlers:
    async def test_get_every_event_in_order_and_one_at_a_time(self, kind: str) -> None:
        stream, got = InMemoryStream(), list[Any]()
        await stream.subscribe(ASYNC_KINDS[kind](AsyncObject(got)))
        await publish_all(stream, 1, 2, 3)
        assert got == []
        assert now() == 0  # publish has not waited for them
        await asyncio.sleep(1.5)
        assert got == [1]
        await stream.drain()
        assert got == [1, 2, 3]
        assert now() == 3
        await stream.aclose()

    async def test_are_counted_and_bounded_by_a_queue(self, kind: str) -> None:
        stream, got = InMemoryStream(), list[Any]()
        subscription = await stream.subscribe(ASYNC_KINDS[kind](AsyncObject(got)))
        await publish_all(stream, *range(5))
        assert queue_of(stream, subscription).maxsize == 1000
        assert queue_of(stream, subscription).overflow == "block"
        assert queue_of(stream, subscription).received == 5
        await stream.aclose()


async def test_an_async_handler_runs_with_the_context_of_whoever_subscribed() -> None:
    import contextvars

    variable = contextvars.ContextVar("variable", default="nothing")
    stream, got = InMemoryStream(), list[str]()

    async def take(event: Event) -> None:
        got.append(variable.get())

    variable.set("subscriber")
    await stream.subscribe(take)
    variable.set("publisher")
    await publish_all(stream, 1)
    await stream.drain()
    assert got == ["subscriber"]


async def test_a_filter_keeps_events_from_a_handler_and_out_of_its_queue() -> None:
    stream, got = InMemoryStream(), list[Any]()

    async def take(event: Event) -> None:
        got.append(event.data)

    subscription = await stream.subscribe(take, filter_fn=lambda event: event.data % 2 == 0)
    await publish_all(stream, *range(6))
    assert queue_of(stream, subscription).received == 3
    await stream.drain()
    assert got == [0, 2, 4]


async def test_a_subscription_without_a_handler_gets_nothing() -> None:
    stream = InMemoryStream()
    nobody: Any = None
    await stream.subscribe(nobody)
    await publish_all(stream, 1)
    assert stream.statistics().published == 1
    assert stream.statistics().failed == 0


class TestBlock:
    """The policy `block`, which is the default: publish waits."""

    async def test_publish_waits_when_a_thousand_events_wait_and_until_it_is_half_that(
        self,
    ) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def slow(event: Event) -> None:
            await asyncio.sleep(1)
            got.append(event.data)

        subscription = await stream.subscribe(slow)
        await publish_all(stream, 0)
        await asyncio.sleep(0)  # it is in the handler, not in the queue
        await publish_all(stream, *range(1, 1001))
        assert now() == 0
        assert not stream.publish_nowait(create_event("refused"))
        assert stream.statistics().refused == 1
        await publish_all(stream, 1001)
        assert now() == 500
        assert queue_of(stream, subscription).size == 501
        assert stream.publish_nowait(create_event(1002))
        await stream.drain()
        assert got == list(range(1003))
        assert stream.statistics().dropped == 0

    async def test_only_those_wait_whose_event_is_for_the_handler_that_is_behind(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def slow(event: Event) -> None:
            await asyncio.sleep(10)

        await stream.subscribe(slow, "slow", buffer_size=1)
        await stream.subscribe(lambda event: got.append(event.data), "quick")
        for _ in range(2):
            await stream.publish(create_event(0, topic="slow"))
            await asyncio.sleep(0)
        await stream.publish(create_event(1, topic="quick"))
        assert stream.publish_nowait(create_event(2, topic="quick"))
        assert got == [1, 2]
        assert now() == 0
        assert not stream.publish_nowait(create_event(3, topic="slow"))
        await stream.aclose(drain=False)

    async def test_a_publish_of_the_handler_itself_never_waits(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def handler(event: Event) -> None:
            got.append(event.data)
            if event.data == 0:
                for number in range(1, 4):
                    await stream.publish(create_event(number))
                await asyncio.gather(*(publish_all(stream, number) for number in range(4, 7)))
                assert stream.publish_nowait(create_event(7))
                await asyncio.create_task(publish_all(stream, 8, 9))

        await stream.subscribe(handler, buffer_size=1)
        await publish_all(stream, 0)
        await stream.drain()
        await stream.drain()
        assert got == list(range(10))
        assert now() == 0

    async def test_handlers_that_publish_to_each_other_do_not_wait_for_each_other(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def ping(event: Event) -> None:
            for _ in range(3):
                await stream.publish(create_event(event.data, topic="pong"))

        async def pong(event: Event) -> None:
            got.append(event.data)
            if event.data < 3:
                await stream.publish(create_event(event.data + 1, topic="ping"))

        await stream.subscribe(ping, "ping", buffer_size=1)
        await stream.subscribe(pong, "pong", buffer_size=1)
        await stream.publish(create_event(0, topic="ping"))
        for _ in range(20):
            await stream.drain()
        assert len(got) == 3 + 9 + 27 + 81

    async def test_a_publish_of_a_task_that_a_handler_left_behind_waits(self) -> None:
        stream, left = InMemoryStream(), list[asyncio.Task[None]]()

        async def later() -> None:
            await asyncio.sleep(1)
            await publish_all(stream, *range(3))

        async def handler(event: Event) -> None:
            if event.data == "begin":
                left.append(asyncio.create_task(later()))

        async def slow(event: Event) -> None:
            await asyncio.sleep(10)

        await stream.subscribe(handler)
        await stream.subscribe(slow, buffer_size=1)
        await publish_all(stream, "begin")
        await asyncio.sleep(1)
        await left[0]
        assert now() >= 20
        await stream.aclose()

    async def test_a_publisher_that_is_cancelled_while_it_waits_has_published_nothing(
        self,
    ) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def slow(event: Event) -> None:
            await asyncio.sleep(1)
            got.append(event.data)

        await stream.subscribe(slow, buffer_size=1)
        await publish_all(stream, 0)
        await asyncio.sleep(0)
        await publish_all(stream, 1)
        waiting = asyncio.create_task(publish_all(stream, 2))
        other = asyncio.create_task(publish_all(stream, 3))
        await asyncio.sleep(0.5)
        waiting.cancel()
        await asyncio.wait([waiting])
        await other
        await stream.drain()
        assert got == [0, 1, 3]

    async def test_who_unsubscribes_does_not_keep_publishers_waiting(self) -> None:
        stream = InMemoryStream()

        async def never(event: Event) -> None:
            await asyncio.get_running_loop().create_future()

        subscription = await stream.subscribe(never, buffer_size=1)
        await publish_all(stream, 0)
        await asyncio.sleep(0)
        await publish_all(stream, 1)
        waiting = asyncio.create_task(publish_all(stream, 2))
        await asyncio.sleep(1)
        subscription.cancel()
        await waiting
        assert now() == 1
        await stream.aclose(drain=False)

    async def test_given_by_name_it_queues_a_sync_handler_too(self) -> None:
        stream, got = InMemoryStream(), list[Any]()
        await stream.subscribe(lambda event: got.append(event.data), overflow="block")
        await publish_all(stream, 1, 2)
        assert got == []
        await stream.drain()
        assert got == [1, 2]

    async def test_a_size_of_zero_is_no_bound(self) -> None:
        stream, got = InMemoryStream(), list[Any]()
        await stream.subscribe(plainly(AsyncObject(got)))
        await stream.subscribe(AsyncObject(got), buffer_size=0)
        for number in range(900):
            await publish_all(stream, number)
        assert now() == 0
        await stream.aclose(drain=False)

    def test_nothing_is_lost_or_left_wherever_a_publisher_is_cancelled(self) -> None:
        accepted: list[int] = []
        got: list[int] = []

        async def scenario() -> None:
            accepted.clear()
            got.clear()

            async def slow(event: Event) -> None:
                await asyncio.sleep(1)
                got.append(event.data)

            stream = InMemoryStream()
            try:
                await stream.subscribe(slow, buffer_size=2)
                for number in range(8):
                    await stream.publish(create_event(number))
                    accepted.append(number)
            finally:
                await stream.aclose()

        def check() -> None:
            # What it had taken may be given up at the end, but only from the end.
            assert got == list(range(len(got)))
            assert len(got) <= len(accepted) + 1

        assert cancel_at_every_await(scenario, check=check) >= 5


class TestLossyPolicies:
    """The other policies: publish never waits, losses are counted, and the handler is told."""

    async def run(self, overflow: str, *data: Any, **options: Any) -> tuple[list[Any], Any]:
        stream, got = InMemoryStream(), list[Any]()

        async def slow(event: Event) -> None:
            await asyncio.sleep(1)
            got.append((event.type, event.data) if event.is_control else event.data)

        subscription = await stream.subscribe(slow, overflow=overflow, **options)
        await publish_all(stream, "first")
        await asyncio.sleep(0)
        for each in data:
            await stream.publish(create_event(each, topic=str(each)[0]))
        assert now() == 0
        statistics = queue_of(stream, subscription)
        await stream.drain()
        await stream.aclose()
        return got, statistics

    async def test_drop_oldest(self) -> None:
        got, statistics = await self.run("drop_oldest", 1, 2, 3, 4, 5, buffer_size=2)
        lost = ("stream.lost", {"lost": 3, "overflow": "drop_oldest"})
        assert got == ["first", lost, 4, 5]
        assert (statistics.dropped, statistics.received, statistics.size) == (3, 6, 2)

    async def test_drop_newest(self) -> None:
        got, statistics = await self.run("drop_newest", 1, 2, 3, 4, 5, buffer_size=2)
        lost = ("stream.lost", {"lost": 3, "overflow": "drop_newest"})
        assert got[:3] == ["first", 1, 2]
        assert got[3:] == [lost]
        assert (statistics.dropped, statistics.received, statistics.size) == (3, 3, 2)

    async def test_latest_by_key_is_by_topic(self) -> None:
        got, statistics = await self.run("latest_by_key", "a1", "b1", "a2", "b2", buffer_size=2)
        assert got == ["first", "a2", "b2"]
        assert (statistics.dropped, statistics.replaced, statistics.size) == (0, 2, 2)

    async def test_latest_by_key_of_more_keys_than_there_is_room_for(self) -> None:
        got, statistics = await self.run("latest_by_key", "a1", "b1", "c1", "b2", buffer_size=2)
        lost = ("stream.lost", {"lost": 1, "overflow": "latest_by_key"})
        assert got == ["first", lost, "b2", "c1"]
        assert (statistics.dropped, statistics.replaced) == (1, 1)

    async def test_latest_by_a_key_of_ones_own(self) -> None:
        got, _ = await self.run("latest_by_key", "a1", "b1", "a2", key=lambda event: event.data[1])
        assert got == ["first", "b1", "a2"]

    async def test_disconnect_gives_what_was_queued_tells_and_ends(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def slow(event: Event) -> None:
            await asyncio.sleep(1)
            got.append((event.type, event.data) if event.is_control else event.data)

        subscription = await stream.subscribe(slow, overflow="disconnect", buffer_size=2)
        await publish_all(stream, 0)
        await asyncio.sleep(0)
        await publish_all(stream, 1, 2, 3, 4)
        assert now() == 0
        assert stream.statistics().dropped == 1
        await asyncio.sleep(10)
        reason = ("stream.disconnect", {"reason": "overflow", "lost": 1})
        assert got == [0, 1, 2, reason]
        assert stream.statistics().subscribers == 0
        assert stream.statistics().dropped == 1
        assert not subscription.active

    async def test_a_loss_is_said_in_the_log_once(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            await self.run("drop_oldest", *range(50), buffer_size=2)
        assert len(caplog.records) == 1

    async def test_a_handler_that_fails_on_what_it_lost_still_gets_the_rest(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def handler(event: Event) -> None:
            got.append(event.data["total"])

        await stream.subscribe(handler, overflow="drop_oldest", buffer_size=1)
        await publish_all(stream, *({"total": number} for number in range(3)))
        await stream.drain()
        assert got == [2]
        assert stream.statistics().failed == 1
        assert "stream.lost" in caplog.text

    async def test_a_key_that_cannot_be_made_loses_nothing(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        got, statistics = await self.run(
            "latest_by_key", "a", "b", key=lambda event: event.data["nothing"]
        )
        assert sorted(got[1:]) == ["a", "b"]
        assert statistics.dropped == 0
        assert "key function" in caplog.text

    @pytest.mark.parametrize("overflow", ["catch_up", "drop", "", "BLOCK"])
    async def test_one_that_does_not_exist_is_refused(self, overflow: str) -> None:
        stream = InMemoryStream()
        with pytest.raises(ValueError, match="overflow is one of block, drop_oldest"):
            await stream.subscribe(print, overflow=overflow)
        assert stream.statistics().subscribers == 0
        await publish_all(stream, 1)

    @pytest.mark.parametrize("overflow", [None, "drop_oldest", "block"])
    async def test_a_key_for_another_one_is_refused(self, overflow: str | None) -> None:
        stream = InMemoryStream()
        with pytest.raises(ValueError, match="a key is for"):
            await stream.subscribe(print, overflow=overflow, key=lambda event: event.id)
        assert stream.statistics().subscribers == 0


class TestFunctionsThatReturnAwaitables:
    async def test_are_queued_from_the_first_on(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def slow(event: Event) -> None:
            got.append(("begin", event.data))
            await asyncio.sleep(1)
            got.append(("end", event.data))

        subscription = await stream.subscribe(plainly(slow))
        await publish_all(stream, 1)
        assert list(stream.statistics().queues) == [subscription.id]
        await publish_all(stream, 2)
        await stream.drain()
        assert got == [("begin", 1), ("end", 1), ("begin", 2), ("end", 2)]

    async def test_may_return_one_sometimes(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def later(event: Event) -> None:
            got.append(event.data)

        def sometimes(event: Event) -> Any:
            return later(event) if event.data % 2 else got.append(event.data)

        await stream.subscribe(sometimes)
        await publish_all(stream, *range(6))
        await stream.drain()
        assert got == list(range(6))

    async def test_may_end_their_subscription_before(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def later(event: Event) -> None:
            await asyncio.sleep(1)
            got.append(event.data)

        def once(event: Event) -> Any:
            subscription.cancel()
            return later(event)

        subscription = await stream.subscribe(once)
        await publish_all(stream, 1, 2)
        assert stream.statistics().queues == {}
        await stream.aclose()  # waits for it
        assert got == [1]

    async def test_that_ended_their_subscription_are_not_kept(self) -> None:
        stream = InMemoryStream()

        class Once:
            def __init__(self) -> None:
                self.subscription: Subscription | None = None

            async def later(self) -> None:
                await asyncio.sleep(1)

            def __call__(self, event: Event) -> Any:
                assert self.subscription is not None
                self.subscription.cancel()
                return self.later()

        once = Once()
        once.subscription = await stream.subscribe(once)
        await publish_all(stream, 1)
        gone = weakref.ref(once)
        del once
        await asyncio.sleep(5)
        gc.collect()
        assert gone() is None

    async def test_whose_stream_is_closed_at_once_have_their_tasks_cancelled(self) -> None:
        stream, got = InMemoryStream(), list[Any]()
        await stream.subscribe(lambda event: asyncio.create_task(AsyncObject(got)(event)))
        await publish_all(stream, 1, 2)
        await stream.aclose(drain=False)
        await asyncio.sleep(10)
        assert got == []

    @pytest.mark.parametrize("drain", [True, False])
    async def test_whose_stream_is_closed_meanwhile_leave_nothing_unawaited(
        self, drain: bool
    ) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def later(event: Event) -> None:
            await asyncio.sleep(1)
            got.append(event.data)

        await stream.subscribe(plainly(later))
        await publish_all(stream, 1, 2)
        await stream.aclose(drain=drain)
        assert got == ([1, 2] if drain else [])

    def test_with_no_loop_anywhere_wait_for_one(self) -> None:
        stream, got = InMemoryStream(), list[Any]()

        async def later(event: Event) -> None:
            got.append(event.data)

        asyncio.run(stream.subscribe(plainly(later)))
        assert stream.publish_nowait(create_event(1))
        assert got == []
        asyncio.run(stream.drain())
        assert got == [1]


async def test_drain_in_a_handler_would_wait_for_itself(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stream, errors = InMemoryStream(), list[Exception]()

    async def handler(event: Event) -> None:
        try:
            await stream.drain()
        except StreamingError as error:
            errors.append(error)

    await stream.subscribe(handler)
    await publish_all(stream, 1)
    await stream.drain()
    assert len(errors) == 1


async def test_finish_in_a_handler_ends_its_subscription(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stream, got = InMemoryStream(), list[Any]()

    async def handler(event: Event) -> None:
        got.append(event.data)
        assert await stream.finish(subscription.id)
        await asyncio.sleep(1)
        got.append("end")

    subscription = await stream.subscribe(handler)
    await publish_all(stream, 1, 2)
    await stream.aclose()
    assert got == [1, "end"]


async def test_many_slow_handlers_do_not_wait_for_each_other() -> None:
    stream, got = InMemoryStream(), list[Any]()
    for _ in range(50):
        await stream.subscribe(AsyncObject(got))
    await publish_all(stream, 1)
    await stream.drain()
    assert now() == 1
    assert len(got) == 50
