"""The queue of a subscriber: an asyncio.Queue, its policies, its reader, threads and endings."""

import asyncio
import contextlib
import itertools
import logging
import sys
import threading
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Generator, Hashable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from codomyrmex.events.streaming import (
    AlreadyConsumed,
    Event,
    StreamClosed,
    SubscriberQueue,
)
from codomyrmex.events.streaming.queues.bounded import hand_over_to_all
from codomyrmex.events.streaming.subscribers import (
    HEARTBEAT_INTERVAL,
    KeyedQueue,
    QueueStatistics,
    check_overflow,
    make_queue,
    prime,
    topic_of,
)
from codomyrmex.events.streaming.testing import VirtualTimeLoop, cancel_at_every_await, run

POLICIES = ("block", "drop_oldest", "drop_newest", "latest_by_key", "disconnect")


def no_key(item: Any) -> Hashable:
    """A key by which no two items are the same."""
    return object()


def queue_of(overflow: str, maxsize: int = 0, **options: Any) -> SubscriberQueue[Any]:
    return make_queue(maxsize, overflow, **options)


def either(maxsize: int = 0) -> SubscriberQueue[Any]:
    return SubscriberQueue(maxsize)


def keyed(maxsize: int = 0) -> SubscriberQueue[Any]:
    return KeyedQueue(maxsize, key=no_key)


BOTH = pytest.mark.parametrize("make", [either, keyed], ids=["bounded", "keyed"])
Make = Callable[..., SubscriberQueue[Any]]


def shown(item: Any) -> Any:
    """An item as it is; a control event as its type and data."""
    if isinstance(item, Event) and item.is_control:
        return item.type, item.data
    return item


def lost(count: int, overflow: str) -> tuple[str, dict[str, Any]]:
    return "stream.lost", {"lost": count, "overflow": overflow}


def disconnected(count: int = 1) -> tuple[str, dict[str, Any]]:
    return "stream.disconnect", {"reason": "overflow", "lost": count}


async def read(queue: SubscriberQueue[Any], **options: Any) -> list[Any]:
    """All that a reader gets until the queue's end, which is near."""
    queue.end()
    return [shown(item) async for item in prime(queue.iterate(**options))]


class Reader:
    """A task that iterates a queue."""

    def __init__(self, queue: SubscriberQueue[Any], **options: Any) -> None:
        self.got: list[Any] = []
        self.times: list[float] = []
        self.items = prime(queue.iterate(**options))
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        async with contextlib.aclosing(self.items):
            async for item in self.items:
                self.got.append(shown(item))
                self.times.append(loop.time())


class TestAsAnAsyncioQueue:
    @BOTH
    async def test_it_is_one(self, make: Make) -> None:
        queue = make(3)
        assert isinstance(queue, asyncio.Queue)
        assert queue.maxsize == 3
        assert (queue.qsize(), queue.empty(), queue.full()) == (0, True, False)
        for number in range(3):
            queue.put_nowait(number)
        assert (queue.qsize(), queue.empty(), queue.full()) == (3, False, True)
        with pytest.raises(asyncio.QueueFull):
            queue.put_nowait(3)
        assert [queue.get_nowait() for _ in range(3)] == [0, 1, 2]
        with pytest.raises(asyncio.QueueEmpty):
            queue.get_nowait()

    @pytest.mark.parametrize("policy", POLICIES)
    async def test_put_nowait_means_the_same_with_every_policy(self, policy: str) -> None:
        queue = queue_of(policy, 1, **({"key": no_key} if policy == "latest_by_key" else {}))
        queue.put_nowait(1)
        with pytest.raises(asyncio.QueueFull):
            queue.put_nowait(2)
        assert queue.statistics() == QueueStatistics(1, 1, policy, 1, 0, 0)
        assert await read(queue) == [1]

    @BOTH
    @pytest.mark.parametrize("maxsize", [0, -1])
    async def test_without_a_bound_it_is_never_full(self, make: Make, maxsize: int) -> None:
        queue = make(maxsize)
        for number in range(5000):
            queue.put_nowait(number)
        assert not queue.full()
        assert queue.maxsize == maxsize
        assert queue.statistics().maxsize == 0
        assert queue.qsize() == 5000

    @BOTH
    async def test_get_waits_for_an_item(self, make: Make) -> None:
        queue = make()
        getter = asyncio.create_task(queue.get())
        await asyncio.sleep(1)
        assert not getter.done()
        queue.put_nowait("item")
        assert await getter == "item"

    @BOTH
    async def test_put_waits_for_room(self, make: Make) -> None:
        queue = make(1)
        await queue.put(1)
        putter = asyncio.create_task(queue.put(2))
        await asyncio.sleep(1)
        assert not putter.done()
        assert await queue.get() == 1
        await putter
        assert await queue.get() == 2

    @BOTH
    async def test_those_who_wait_are_served_in_turn(self, make: Make) -> None:
        queue = make(1)
        got: list[tuple[str, int]] = []

        async def get(name: str) -> None:
            got.append((name, await queue.get()))

        getters = [asyncio.create_task(get(name)) for name in "abc"]
        await asyncio.sleep(1)
        putters = [asyncio.create_task(queue.put(number)) for number in range(3)]
        await asyncio.gather(*getters, *putters)
        assert sorted(got) == [("a", 0), ("b", 1), ("c", 2)]

    @BOTH
    async def test_every_getter_gets_one_of_a_batch(self, make: Make) -> None:
        queue = make()
        getters = [asyncio.create_task(queue.get()) for _ in range(3)]
        await asyncio.sleep(1)
        assert queue.fill([1, 2, 3]) == 3
        async with asyncio.timeout(1):
            assert await asyncio.gather(*getters) == [1, 2, 3]

    @BOTH
    async def test_every_putter_gets_room_when_all_is_taken(self, make: Make) -> None:
        queue = make(3)
        queue.fill([1, 2, 3])
        putters = [asyncio.create_task(queue.put(number)) for number in (4, 5, 6)]
        await asyncio.sleep(1)
        assert queue.take_all() == [1, 2, 3]
        async with asyncio.timeout(1):
            await asyncio.gather(*putters)
        assert queue.snapshot() == [4, 5, 6]

    @BOTH
    async def test_a_cancelled_getter_leaves_its_item_to_the_next(self, make: Make) -> None:
        queue = make()
        first, second = (asyncio.create_task(queue.get()) for _ in range(2))
        await asyncio.sleep(1)
        queue.put_nowait("item")  # wakes the first
        first.cancel()
        assert await second == "item"
        assert first.cancelled()

    @BOTH
    async def test_a_cancelled_putter_leaves_its_room_to_the_next(self, make: Make) -> None:
        queue = make(1)
        queue.put_nowait(1)
        first, second = (asyncio.create_task(queue.put(item)) for item in (2, 3))
        await asyncio.sleep(1)
        assert queue.get_nowait() == 1  # wakes the first
        first.cancel()
        await second
        assert first.cancelled()
        assert queue.snapshot() == [3]

    @pytest.mark.real_time
    async def test_a_getter_that_another_thread_wakes_may_be_cancelled_first(self) -> None:
        queue = SubscriberQueue[str]()
        first, second = (asyncio.create_task(queue.get()) for _ in range(2))
        await asyncio.sleep(0)
        thread = threading.Thread(target=queue.put_nowait, args=("item",))
        thread.start()
        thread.join()
        first.cancel()
        async with asyncio.timeout(10):
            assert await second == "item"

    @BOTH
    def test_cancellation_at_any_await_loses_no_item(self, make: Make) -> None:
        state: dict[str, Any] = {}

        async def scenario() -> None:
            queue = state["queue"] = make(2)
            state["put"], state["got"] = [], []

            async def produce() -> None:
                for number in range(6):
                    await queue.put(number)
                    state["put"].append(number)

            producer = asyncio.create_task(produce())
            try:
                for _ in range(6):
                    state["got"].append(await queue.get())
                    await asyncio.sleep(0)
                await producer
            finally:
                producer.cancel()
                await asyncio.wait([producer])

        def check() -> None:
            assert state["got"] + state["queue"].snapshot() == state["put"]

        assert cancel_at_every_await(scenario, check=check) > 4

    @BOTH
    async def test_join_waits_until_all_is_done(self, make: Make) -> None:
        queue = make()
        await queue.join()
        queue.fill([1, 2])
        joiners = [asyncio.create_task(queue.join()) for _ in range(2)]
        await asyncio.sleep(1)
        for _ in range(2):
            assert not any(joiner.done() for joiner in joiners)
            queue.get_nowait()
            await asyncio.sleep(1)
            assert not any(joiner.done() for joiner in joiners)
            queue.task_done()
            await asyncio.sleep(1)
        async with asyncio.timeout(1):
            await asyncio.gather(*joiners)
        with pytest.raises(ValueError, match="too many times"):
            queue.task_done()

    async def test_join_does_not_wait_for_what_was_dropped(self) -> None:
        queue = SubscriberQueue[int](2, "drop_oldest")
        for number in range(5):
            queue.offer(number)
        for _ in range(2):
            queue.get_nowait()
            queue.task_done()
        await queue.join()

    async def test_join_does_not_wait_for_what_was_replaced(self) -> None:
        queue = KeyedQueue[int](key=lambda number: number % 2)
        for number in range(3):
            queue.offer(number)
        queue.force(3)
        queue.put_nowait(4)
        assert (queue.get_nowait(), queue.get_nowait()) == (4, 3)
        queue.task_done()
        queue.task_done()
        await queue.join()

    @BOTH
    @pytest.mark.parametrize("forget", ["clear", "shutdown"])
    async def test_join_ends_when_what_it_waits_for_is_forgotten(
        self, make: Make, forget: str
    ) -> None:
        queue = make()
        queue.fill([1, 2])
        joiner = asyncio.create_task(queue.join())
        await asyncio.sleep(1)
        if forget == "clear":
            queue.clear()
        else:
            queue.shutdown(immediate=True)
        async with asyncio.timeout(1):
            await joiner
        assert queue.empty()
        assert queue.evicted == 2
        assert queue.ended == (forget == "shutdown")

    async def test_what_was_taken_out_is_still_to_be_done_after_clear(self) -> None:
        queue = SubscriberQueue[int]()
        queue.fill([1, 2])
        queue.get_nowait()
        joiner = asyncio.create_task(queue.join())
        await asyncio.sleep(1)
        queue.clear()
        await asyncio.sleep(1)
        assert not joiner.done()
        queue.task_done()
        await joiner

    def test_it_says_what_it_is(self) -> None:
        queue = SubscriberQueue[int](3, "block")
        queue.offer(1)
        assert repr(queue) == str(queue) == "<SubscriberQueue 1/3 block>"
        queue.end()
        assert repr(queue) == "<SubscriberQueue 1/3 block, ended>"
        assert repr(SubscriberQueue(-1)) == "<SubscriberQueue 0/unbounded drop_newest>"
        assert repr(KeyedQueue()) == "<KeyedQueue 0/unbounded latest_by_key>"


class TestPolicies:
    def test_one_that_does_not_exist_is_refused(self) -> None:
        says = "block, drop_oldest, drop_newest, latest_by_key, disconnect here, not 'drop'"
        with pytest.raises(ValueError, match=says):
            make_queue(1, "drop")
        with pytest.raises(ValueError, match="block, disconnect here, not 'drop_oldest'"):
            check_overflow("drop_oldest", ["block", "disconnect"])
        assert check_overflow("block") == "block"

    def test_latest_by_key_needs_a_queue_of_its_own(self) -> None:
        with pytest.raises(ValueError, match="block, drop_oldest, drop_newest, disconnect here"):
            SubscriberQueue(1, "latest_by_key")

    def test_a_key_is_for_latest_by_key_only(self) -> None:
        with pytest.raises(ValueError, match="not for 'drop_oldest'"):
            make_queue(1, "drop_oldest", key=topic_of)

    @pytest.mark.parametrize("policy", POLICIES)
    def test_make_queue_makes_the_queue_of_a_policy(self, policy: str) -> None:
        queue = make_queue(7, policy, name="someone")
        assert (queue.maxsize, queue.overflow, queue.name) == (7, policy, "someone")
        assert isinstance(queue, KeyedQueue) == (policy == "latest_by_key")

    async def test_drop_newest_keeps_what_is_there(self) -> None:
        queue = SubscriberQueue[int](2, "drop_newest")
        assert [queue.offer(number) for number in range(5)] == [True, True, False, False, False]
        assert queue.statistics() == QueueStatistics(2, 2, "drop_newest", 2, 3, 0)
        assert await read(queue) == [0, 1, lost(3, "drop_newest")]

    async def test_drop_oldest_keeps_what_is_new(self) -> None:
        queue = SubscriberQueue[int](2, "drop_oldest")
        assert all(queue.offer(number) for number in range(5))
        assert queue.statistics() == QueueStatistics(2, 2, "drop_oldest", 5, 3, 0)
        assert queue.evicted == 3
        assert await read(queue) == [lost(3, "drop_oldest"), 3, 4]

    async def test_block_takes_nothing_more_and_loses_nothing(self) -> None:
        queue = SubscriberQueue[int](2, "block")
        assert [queue.offer(number) for number in range(4)] == [True, True, False, False]
        assert queue.statistics() == QueueStatistics(2, 2, "block", 2, 0, 0)
        assert await read(queue) == [0, 1]

    async def test_disconnect_ends_the_subscriber_and_tells_it(self) -> None:
        queue = SubscriberQueue[int](2, "disconnect")
        assert [queue.offer(number) for number in range(5)] == [True, True, False, False, False]
        assert queue.ended
        assert queue.statistics() == QueueStatistics(2, 2, "disconnect", 2, 1, 0)
        assert await read(queue) == [0, 1, disconnected()]

    async def test_latest_by_key_keeps_the_newest_in_the_place_of_the_first(self) -> None:
        queue = KeyedQueue[str](2, key=lambda item: item[0])
        assert all(queue.offer(item) for item in ("a1", "b1", "a2", "a3", "b2"))
        assert queue.statistics() == QueueStatistics(2, 2, "latest_by_key", 2, 0, 3)
        assert queue.snapshot() == ["a3", "b2"]
        assert await read(queue) == ["a3", "b2"]

    async def test_latest_by_key_drops_the_oldest_of_too_many_keys(self) -> None:
        queue = KeyedQueue[str](2, key=lambda item: item[0])
        assert all(queue.offer(item) for item in ("a1", "b1", "c1", "b2", "d1"))
        assert queue.statistics() == QueueStatistics(2, 2, "latest_by_key", 4, 2, 1)
        assert await read(queue) == [lost(2, "latest_by_key"), "c1", "d1"]

    @pytest.mark.parametrize("policy", ["drop_oldest", "latest_by_key"])
    async def test_losses_with_nothing_kept_between_them_are_one(self, policy: str) -> None:
        queue = queue_of(policy, 1, **({"key": no_key} if policy == "latest_by_key" else {}))
        queue.offer(0)
        queue.offer(1)
        queue.lose(1)
        queue.offer(2)
        queue.offer(3)
        assert await read(queue) == [lost(4, policy), 3]

    async def test_latest_by_key_takes_the_topic_for_the_key(self) -> None:
        queue = make_queue(10, "latest_by_key")
        events = [
            Event(data=number, metadata={"topic": topic} if topic else None)
            for number, topic in enumerate(["a", "b", None, "a", None])
        ]
        for event in events:
            queue.feed(event)
        assert [event.data for event in queue.snapshot()] == [3, 1, 4]

    @pytest.mark.parametrize("way", ["offer", "feed", "force", "put_nowait", "fill"])
    async def test_every_way_in_replaces_what_has_the_key(self, way: str) -> None:
        discarded: list[str] = []

        class Watched(KeyedQueue[str]):
            def _discard(self, item: str) -> None:
                discarded.append(item)

        queue = Watched(2, key=lambda item: item[0])
        queue.fill(["a1", "b1"])
        getattr(queue, way)(["a2"] if way == "fill" else "a2")
        assert discarded == ["a1"]
        assert queue.statistics() == QueueStatistics(2, 2, "latest_by_key", 2, 0, 1)
        assert await read(queue) == ["a2", "b1"]

    async def test_put_lets_a_key_in_that_is_there_and_waits_for_room_for_others(self) -> None:
        queue = KeyedQueue[str](1, key=lambda item: item[0])
        await queue.put("a1")
        await queue.put("a2")
        putter = asyncio.create_task(queue.put("b1"))
        await asyncio.sleep(1)
        assert not putter.done()
        assert queue.get_nowait() == "a2"
        await putter
        assert queue.get_nowait() == "b1"

    async def test_an_item_without_a_key_is_like_no_other(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        def key(item: Any) -> Hashable:
            if item == "bad":
                raise KeyError("no key")
            return [] if item == "unhashable" else "same"  # pyright: ignore[reportReturnType]

        queue = KeyedQueue[str](10, key=key)
        for item in ("good", "bad", "unhashable", "bad", "good"):
            assert queue.offer(item)
        assert queue.snapshot() == ["good", "bad", "unhashable", "bad"]
        assert [record.levelname for record in caplog.records] == ["ERROR"] * 3
        assert "KeyError: 'no key'" in caplog.text
        assert "'bad'" in caplog.text

    @BOTH
    async def test_none_is_an_item_like_others(self, make: Make) -> None:
        queue = make()
        queue.fill([None, 0, "", None])
        assert await read(queue) == [None, 0, "", None]

    async def test_a_replaced_none_is_counted(self) -> None:
        queue = KeyedQueue[Any](key=lambda item: "same")
        assert all(queue.offer(None) for _ in range(3))
        assert queue.statistics() == QueueStatistics(1, 0, "latest_by_key", 1, 0, 2)

    async def test_what_is_dropped_is_discarded(self) -> None:
        discarded: list[int] = []

        class Watched(SubscriberQueue[int]):
            def _discard(self, item: int) -> None:
                discarded.append(item)

        queue = Watched(2, "drop_oldest")
        for number in range(5):
            queue.offer(number)
        assert discarded == [0, 1, 2]

    @pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest", "disconnect"])
    async def test_the_first_loss_is_logged_and_no_other(
        self, policy: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        queue = queue_of(policy, 1, name="ada")
        for number in range(10):
            queue.offer(number)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "ada" in record.getMessage()
        assert policy in record.getMessage()

    async def test_lose_tells_of_what_came_after_the_items(self) -> None:
        queue = SubscriberQueue[int](10, "block")
        queue.offer(1)
        queue.lose(2)
        queue.lose(3)
        queue.offer(2)
        queue.lose(1)
        assert queue.statistics().dropped == 6
        assert await read(queue) == [1, lost(5, "block"), 2, lost(1, "block")]

    async def test_a_loss_at_the_tail_stays_behind_one_at_the_head(self) -> None:
        queue = SubscriberQueue[int](3, "drop_oldest")
        queue.fill([1, 2, 3])
        queue.lose(5)
        queue.offer(4)
        assert await read(queue) == [lost(1, "drop_oldest"), 2, 3, lost(5, "drop_oldest"), 4]


class TestFilling:
    async def test_fill_takes_what_has_room(self) -> None:
        queue = SubscriberQueue[int](3, "drop_newest")
        assert queue.fill([]) == 0
        assert queue.fill([1, 2]) == 2
        items = [3, 4, 5]
        assert queue.fill(items) == 1
        assert items == [3, 4, 5]
        assert queue.fill([4]) == 0
        assert queue.statistics() == QueueStatistics(3, 3, "drop_newest", 3, 0, 0)

    async def test_fill_takes_nothing_when_there_is_more_than_room(self) -> None:
        queue = SubscriberQueue[int](1, "block")
        for number in range(3):
            queue.force(number)
        assert queue.fill([4, 5, 6]) == 0
        assert queue.snapshot() == [0, 1, 2]
        assert queue.received == 3

    async def test_fill_of_an_ended_queue_takes_all_for_nobody(self) -> None:
        queue = SubscriberQueue[int](1)
        queue.end()
        assert queue.fill([1, 2, 3]) == 3
        assert queue.received == 0
        assert queue.empty()

    @pytest.mark.parametrize("policy", POLICIES)
    async def test_feed_is_offer_but_never_refused_by_block(self, policy: str) -> None:
        options = {"key": no_key} if policy == "latest_by_key" else {}
        fed, offered = (queue_of(policy, 2, **options) for _ in range(2))
        for number in range(4):
            fed.feed(number)
            offered.offer(number)
        if policy == "block":
            assert fed.snapshot() == [0, 1, 2, 3]
        else:
            assert fed.statistics() == offered.statistics()
            assert fed.snapshot() == offered.snapshot()

    @pytest.mark.parametrize("policy", POLICIES)
    async def test_an_ended_queue_takes_nothing_but_by_force(self, policy: str) -> None:
        queue = queue_of(policy, 1)
        event = Event()
        queue.end()
        assert queue.offer(event) is False
        queue.feed(event)
        with pytest.raises(StreamClosed):
            queue.put_nowait(event)
        with pytest.raises(StreamClosed):
            await queue.put(event)
        assert queue.statistics() == QueueStatistics(0, 1, policy, 0, 0, 0)
        queue.force(event)
        assert await read(queue) == [event]

    @BOTH
    async def test_take_takes_as_many_as_there_are(self, make: Make) -> None:
        queue = make()
        queue.fill([1, 2, 3])
        assert queue.take(0) == []
        assert queue.take(2) == [1, 2]
        assert queue.take(2) == [3]
        assert queue.take(2) == []

    @BOTH
    async def test_take_all_takes_all_and_forgets_what_was_lost(self, make: Make) -> None:
        queue = make(2)
        queue.fill([1, 2])
        queue.lose(1)
        assert queue.take_all() == [1, 2]
        assert queue.take_all() == []
        queue.put_nowait(3)
        assert await read(queue) == [3]
        assert queue.evicted == 0

    @pytest.mark.real_time
    async def test_take_all_ends_while_others_fill_as_fast_as_it_takes(self) -> None:
        class Refilled(SubscriberQueue[int]):
            """A queue that another thread puts an item into whenever one is taken out."""

            def _init(self, maxsize: int) -> None:
                class Items(deque[int]):
                    def popleft(self) -> int:
                        self.append(0)
                        return super().popleft()

                self._queue: Any = Items()

        queue = Refilled(5)
        queue.fill([1, 2, 3])
        assert queue.take_all() == [1, 2, 3]
        assert queue.snapshot() == [0, 0, 0]

    async def test_take_all_takes_what_another_thread_leaves(self) -> None:
        class Shared(SubscriberQueue[int]):
            """A queue of which another thread takes the rest after the first item."""

            def _init(self, maxsize: int) -> None:
                class Items(deque[int]):
                    def popleft(self) -> int:
                        item = super().popleft()
                        self.clear()
                        return item

                self._queue: Any = Items()

        queue = Shared(5)
        queue.fill([1, 2, 3])
        assert queue.take_all() == [1]

    async def test_drop_oldest_has_room_when_a_reader_was_quicker(self) -> None:
        class Raced(SubscriberQueue[int]):
            """A queue that a reader in another thread empties just before the oldest is dropped."""

            def _init(self, maxsize: int) -> None:
                class Items(deque[int]):
                    def popleft(self) -> int:
                        self.clear()
                        return super().popleft()

                self._queue: Any = Items()

        queue = Raced(1, "drop_oldest")
        assert queue.offer(1)
        assert queue.offer(2)
        assert queue.snapshot() == [2]
        assert queue.dropped == 0
        assert queue.due_loss() is None


class TestCrowd:
    async def test_a_full_queue_stands_in_the_crowd_until_it_is_down_to_half(self) -> None:
        crowd: set[SubscriberQueue[int]] = set()
        queue = SubscriberQueue[int](4, "block", crowd=crowd)
        for number in range(3):
            queue.offer(number)
        assert not queue.crowded
        queue.offer(3)
        assert queue.crowded
        assert crowd == {queue}
        queue.get_nowait()
        assert crowd == {queue}
        queue.get_nowait()
        assert not queue.crowded
        assert not crowd

    @pytest.mark.parametrize("way", ["offer", "feed", "force", "fill", "put_nowait"])
    async def test_every_way_in_fills_it(self, way: str) -> None:
        queue = SubscriberQueue[Any](1, "block")
        getattr(queue, way)([1] if way == "fill" else 1)
        assert queue.crowded

    @pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest", "latest_by_key"])
    async def test_only_block_makes_a_crowd(self, policy: str) -> None:
        crowd: set[SubscriberQueue[Event]] = set()
        queue = make_queue(1, policy, crowd=crowd)
        queue.force(Event())
        queue.force(Event())
        assert not queue.crowded
        assert not crowd

    @pytest.mark.parametrize("way", ["end", "clear", "take_all", "iterate"])
    async def test_room_waits_until_it_leaves_the_crowd(self, way: str) -> None:
        crowd: set[SubscriberQueue[int]] = set()
        queue = SubscriberQueue[int](2, "block", crowd=crowd)
        queue.fill([1, 2])
        waiting = [asyncio.create_task(queue.room()) for _ in range(2)]
        called: list[float] = []
        loop = asyncio.get_running_loop()
        queue.when_room(lambda: called.append(loop.time()))
        await asyncio.sleep(1)
        assert not any(task.done() for task in waiting)
        assert not called
        if way == "iterate":
            items = prime(queue.iterate())
            assert await anext(items) == 1
            await items.aclose()
        else:
            getattr(queue, way)()
        await asyncio.gather(*waiting)
        await asyncio.sleep(1)
        assert called == [1.0]
        assert not crowd
        assert not queue.crowded

    async def test_room_is_there_at_once_where_there_is_some(self) -> None:
        queue = SubscriberQueue[int](2, "block")
        await queue.room()
        called: list[None] = []
        queue.when_room(lambda: called.append(None))
        assert not called
        await asyncio.sleep(1)
        assert called == [None]

    async def test_who_is_called_back_when_there_is_room_is_called_for_each_place(self) -> None:
        queue = SubscriberQueue[int](2, "drop_newest")
        queue.fill([1, 2])
        called: list[int] = []
        queue.when_room(lambda: called.append(queue.free))
        await asyncio.sleep(1)
        assert not called
        queue.get_nowait()
        await asyncio.sleep(1)
        assert called == [1]  # not down to half: any place will do

    async def test_a_call_back_that_needs_no_room_leaves_it_to_who_waits(self) -> None:
        queue = SubscriberQueue[int](1)
        queue.put_nowait(1)
        queue.when_room(lambda: None)
        putter = asyncio.create_task(queue.put(2))
        await asyncio.sleep(1)
        assert queue.get_nowait() == 1
        async with asyncio.timeout(1):
            await putter

    async def test_free_is_the_room_there_is(self) -> None:
        queue = SubscriberQueue[int](2, "block")
        assert queue.free == 2
        queue.fill([1, 2])
        queue.force(3)
        assert queue.free == -1

    async def test_take_all_leaves_it_only_if_that_made_room(self) -> None:
        class Refilled(SubscriberQueue[int]):
            def _init(self, maxsize: int) -> None:
                class Items(deque[int]):
                    def popleft(self) -> int:
                        self.append(0)
                        return super().popleft()

                self._queue: Any = Items()

        queue = Refilled(2, "block")
        queue.fill([1, 2])
        queue.take_all()
        assert queue.crowded

    @pytest.mark.parametrize("meanwhile", ["emptied", "ended"])
    async def test_a_queue_that_is_emptied_or_ended_while_it_is_filled_is_not_crowded(
        self, meanwhile: str
    ) -> None:
        """What another thread does between the last item and the entry into the crowd."""

        class Crowd(set[SubscriberQueue[int]]):
            def add(self, queue: SubscriberQueue[int]) -> None:
                if meanwhile == "emptied":
                    queue._queue.clear()
                else:
                    queue.ended = True
                super().add(queue)

        crowd = Crowd()
        queue = SubscriberQueue[int](2, "block", crowd=crowd)
        queue.fill([1, 2])
        assert not queue.crowded
        assert not crowd
        async with asyncio.timeout(1):
            await queue.room()

    async def test_block_lets_no_publisher_wait_for_ever(self) -> None:
        queue = SubscriberQueue[int](10, "block")
        reader = Reader(queue)
        for number in range(1000):
            while not queue.offer(number):
                await queue.room()
        queue.end()
        await reader.task
        assert reader.got == list(range(1000))


class TestReading:
    async def test_a_reader_wakes_once_for_all_that_has_come(self) -> None:
        queue = SubscriberQueue[int]()
        reader = Reader(queue)
        await asyncio.sleep(1)
        for number in range(100):
            queue.offer(number)
        await asyncio.sleep(0)  # once round the loop
        assert reader.got == list(range(100))
        queue.end()
        await reader.task

    @BOTH
    @pytest.mark.parametrize("way", ["offer", "feed", "force", "put_nowait", "fill"])
    async def test_every_way_in_wakes_it(self, make: Make, way: str) -> None:
        queue = make()
        reader = Reader(queue)
        await asyncio.sleep(1)
        getattr(queue, way)([1] if way == "fill" else 1)
        await asyncio.sleep(1)
        assert reader.got == [1]
        queue.end()
        await reader.task

    async def test_it_gets_what_was_there_and_then_the_end(self) -> None:
        queue = SubscriberQueue[int]()
        queue.fill([1, 2])
        reader = Reader(queue)
        queue.offer(3)
        queue.end()
        await reader.task
        assert reader.got == [1, 2, 3]

    @pytest.mark.parametrize("way", ["end", "shutdown"])
    async def test_an_end_wakes_everyone_at_once(self, way: str) -> None:
        queue = SubscriberQueue[int](1)
        queue.put_nowait(0)
        putters = [asyncio.create_task(queue.put(1)) for _ in range(2)]
        reader_of_none = SubscriberQueue[int]()
        reader = Reader(reader_of_none)
        getters = [asyncio.create_task(reader_of_none.get()) for _ in range(2)]
        await asyncio.sleep(1)
        getattr(queue, way)()
        getattr(reader_of_none, way)()
        ends = await asyncio.gather(*putters, *getters, reader.task, return_exceptions=True)  # pyright: ignore[reportCallIssue,reportArgumentType]
        assert [type(end) for end in ends] == [StreamClosed] * 4 + [type(None)]
        assert asyncio.get_running_loop().time() == 1.0
        assert queue.get_nowait() == 0  # an end forgets nothing

    @pytest.mark.parametrize("what", ["get", "iterate"])
    async def test_an_end_after_the_last_look_is_seen(self, what: str) -> None:
        class EndsAfterOneHasLooked(SubscriberQueue[int]):
            """A queue that another thread ends, but wakes nobody yet."""

            looks = 0

            @property
            def ended(self) -> bool:
                self.looks += 1
                return self.looks > 1

            @ended.setter
            def ended(self, value: bool) -> None:
                pass

        queue = EndsAfterOneHasLooked()
        async with asyncio.timeout(1):
            if what == "get":
                with pytest.raises(StreamClosed):
                    await queue.get()
            else:
                assert [item async for item in prime(queue.iterate())] == []

    async def test_a_loss_after_the_last_look_is_seen(self) -> None:
        class Queue(SubscriberQueue[int]):
            """A queue that loses something in another thread after one has looked."""

            def _init(self, maxsize: int) -> None:
                lose = self.lose

                class Items(deque[int]):
                    def __bool__(self) -> bool:
                        if queue.received == queue.dropped == 0:
                            lose(1)
                        return bool(len(self))

                self._queue: Any = Items()

        queue = Queue()
        items = prime(queue.iterate())
        async with asyncio.timeout(1):
            assert shown(await anext(items)) == lost(1, "drop_newest")
        await items.aclose()

    @pytest.mark.parametrize("what", ["put", "get"])
    async def test_an_end_between_looking_and_waiting_is_seen(self, what: str) -> None:
        class EndsMeanwhile(SubscriberQueue[int]):
            """A queue that another thread ends just after one has looked."""

            def put_nowait(self, item: int) -> None:
                try:
                    super().put_nowait(item)
                except asyncio.QueueFull:
                    self.end()
                    raise

            def get_nowait(self) -> int:
                try:
                    return super().get_nowait()
                except asyncio.QueueEmpty:
                    if self.ended:
                        raise
                    self.lose(1)  # which is no item
                    super().end()
                    raise

        queue = EndsMeanwhile(1)
        async with asyncio.timeout(1):
            if what == "put":
                await queue.put(1)
                with pytest.raises(StreamClosed):
                    await queue.put(2)
            else:
                with pytest.raises(StreamClosed):
                    await queue.get()

    async def test_an_item_between_looking_and_waiting_is_seen(self) -> None:
        class FilledMeanwhile(deque[int]):
            """The items of a queue into which another thread puts one after one has looked."""

            def __bool__(self) -> bool:
                if not len(self):
                    self.append(7)
                    return False
                return True

        class Queue(SubscriberQueue[int]):
            def _init(self, maxsize: int) -> None:
                self._queue: Any = FilledMeanwhile()

        items = prime(Queue().iterate())
        async with asyncio.timeout(1):
            assert await anext(items) == 7
        await items.aclose()

    async def test_an_item_that_another_thread_drops_after_one_has_looked_is_not_there(
        self,
    ) -> None:
        class Items(deque[int]):
            """Items of which another thread drops the oldest after one has looked."""

            def popleft(self) -> int:
                if len(self) == 1 and self[0] == 1:
                    self.clear()
                return super().popleft()

        class Queue(SubscriberQueue[int]):
            def _init(self, maxsize: int) -> None:
                self._queue: Any = Items()

        queue = Queue()
        queue.offer(1)
        reader = Reader(queue)
        await asyncio.sleep(1)
        queue.offer(2)
        await asyncio.sleep(1)
        assert reader.got == [2]
        queue.end()
        await reader.task

    async def test_a_second_reader_that_would_wait_beside_the_first_is_refused(self) -> None:
        queue = SubscriberQueue[int](name="someone")
        first = Reader(queue)
        await asyncio.sleep(1)
        with pytest.raises(AlreadyConsumed) as refusal:
            await anext(prime(queue.iterate()))
        assert refusal.value.subscription_id == "someone"
        assert queue.reading == 1
        queue.offer(1)
        await asyncio.sleep(1)
        assert first.got == [1]
        queue.end()
        await first.task

    def test_a_reader_that_ended_with_its_loop_is_in_nobodys_way(self) -> None:
        queue = SubscriberQueue[int]()
        left = prime(queue.iterate())
        loop = VirtualTimeLoop()
        step = left.__anext__().__await__()
        asyncio.events._set_running_loop(loop)
        step.send(None)  # it waits, and its loop ends without a word
        asyncio.events._set_running_loop(None)
        loop.close()

        async def read_on() -> None:
            reader = Reader(queue)
            await asyncio.sleep(1)
            queue.offer(1)
            queue.end()
            await reader.task
            assert reader.got == [1]

        run(read_on())
        step.close()

    async def test_a_reader_lets_those_in_who_wait_for_room(self) -> None:
        queue = SubscriberQueue[int](1, "drop_newest")
        queue.offer(1)
        putter = asyncio.create_task(queue.put(2))
        await asyncio.sleep(1)
        items = prime(queue.iterate())
        assert await anext(items) == 1
        async with asyncio.timeout(1):
            await putter
            assert await anext(items) == 2
        await items.aclose()

    async def test_get_gives_what_is_left_before_the_end(self) -> None:
        queue = SubscriberQueue[int]()
        queue.fill([1, 2])
        queue.shutdown()
        assert [await queue.get(), await queue.get()] == [1, 2]
        with pytest.raises(StreamClosed):
            await queue.get()

    async def test_a_loss_alone_wakes_a_reader(self) -> None:
        queue = SubscriberQueue[int]()
        reader = Reader(queue)
        await asyncio.sleep(1)
        queue.lose(3)
        await asyncio.sleep(1)
        assert reader.got == [lost(3, "drop_newest")]
        queue.end()
        await reader.task

    async def test_losses_are_told_where_they_were_while_the_reader_goes_on(self) -> None:
        queue = SubscriberQueue[int](2, "drop_newest")
        items = prime(queue.iterate())
        queue.fill([1, 2])
        queue.offer(3)
        assert await anext(items) == 1
        queue.offer(4)
        queue.offer(5)
        assert await anext(items) == 2
        assert shown(await anext(items)) == lost(1, "drop_newest")
        assert await anext(items) == 4
        assert shown(await anext(items)) == lost(1, "drop_newest")
        queue.end()
        assert [item async for item in items] == []

    async def test_what_comes_first_comes_first(self) -> None:
        queue = SubscriberQueue[int]()
        queue.fill([3])
        assert await read(queue, first=[1, 2]) == [1, 2, 3]

    async def test_a_closed_reader_leaves_the_rest_to_the_next(self) -> None:
        closed: list[int] = []
        queue = SubscriberQueue[int]()
        queue.fill([1, 2, 3])
        first = prime(queue.iterate(on_close=lambda: closed.append(1)))
        assert queue.reading == 1
        assert await anext(first) == 1
        assert not closed
        await first.aclose()
        assert queue.reading == 0
        assert closed == [1]
        assert await read(queue, on_close=lambda: closed.append(2)) == [2, 3]
        assert closed == [1, 2]

    async def test_a_primed_reader_is_closed_even_if_it_never_read(self) -> None:
        closed: list[bool] = []
        queue = SubscriberQueue[int]()
        reader = prime(queue.iterate(on_close=lambda: closed.append(True)))
        await reader.aclose()
        assert closed == [True]
        assert queue.reading == 0

    def test_a_primed_reader_is_closed_even_if_it_is_dropped_outside_of_a_loop(self) -> None:
        closed: list[bool] = []
        queue = SubscriberQueue[int]()
        reader = prime(queue.iterate(on_close=lambda: closed.append(True)))
        del reader
        assert closed == [True]
        assert queue.reading == 0

    async def test_a_cancelled_reader_passes_its_wake_up_on(self) -> None:
        queue = SubscriberQueue[int]()
        reader = Reader(queue)
        await asyncio.sleep(1)
        getter = asyncio.create_task(queue.get())
        await asyncio.sleep(1)
        queue.offer(1)  # wakes the reader
        reader.task.cancel()
        assert await getter == 1
        assert reader.task.cancelled()
        assert reader.got == []

    async def test_it_does_so_only_if_there_is_something(self) -> None:
        queue = SubscriberQueue[int]()
        reader = Reader(queue)
        await asyncio.sleep(1)
        getter = asyncio.create_task(queue.get())
        await asyncio.sleep(1)
        queue.offer(1)  # wakes the reader
        assert queue.get_nowait() == 1
        reader.task.cancel()
        await asyncio.sleep(1)
        assert not getter.done()
        queue.offer(2)
        assert await getter == 2

    def test_cancellation_at_any_await_loses_nothing(self) -> None:
        state: dict[str, Any] = {}

        async def scenario() -> None:
            queue = state["queue"] = SubscriberQueue[int](2, "drop_oldest")
            state["got"], state["given"] = [], 0

            async def produce() -> None:
                for number in range(6):
                    queue.offer(number)
                    state["given"] = number + 1
                    if number % 3 == 2:
                        await asyncio.sleep(1)
                queue.end()

            producer = asyncio.create_task(produce())
            items = prime(queue.iterate(idle=0.3, on_idle=lambda: -1))
            try:
                async for item in items:
                    state["got"].append(shown(item))
                await producer
            finally:
                await items.aclose()
                producer.cancel()
                await asyncio.wait([producer])

        async def check() -> None:
            queue = state["queue"]
            got = state["got"] + await read(queue)
            numbers = [item for item in got if isinstance(item, int) and item >= 0]
            told = sum(item[1]["lost"] for item in got if isinstance(item, tuple))
            assert numbers == sorted(numbers)
            assert len(numbers) + told == state["given"]
            assert queue.reading == 0

        assert cancel_at_every_await(scenario, check=check) > 3

    async def test_a_getter_finds_losses_with_due_loss(self) -> None:
        queue = SubscriberQueue[int](2, "drop_oldest")
        assert queue.due_loss() is None
        for number in range(4):
            queue.offer(number)
        loss = queue.due_loss()
        assert shown(loss) == lost(2, "drop_oldest")
        assert queue.due_loss() is None
        assert queue.get_nowait() == 2
        queue.offer(4)
        queue.offer(5)
        assert queue.get_nowait() == 4
        assert shown(queue.due_loss(before_last=True)) == lost(1, "drop_oldest")
        assert queue.due_loss(before_last=True) is None
        queue.lose(1)  # after the 5
        assert queue.due_loss() is None
        assert queue.get_nowait() == 5
        assert queue.due_loss(before_last=True) is None
        assert shown(queue.due_loss()) == lost(1, "drop_oldest")

    async def test_losses_a_getter_has_passed_are_told_with_the_next(self) -> None:
        queue = SubscriberQueue[int](2, "drop_oldest")
        for number in (0, 1, 2):
            queue.offer(number)
        assert queue.get_nowait() == 1  # without asking
        for number in (3, 4):
            queue.offer(number)
        assert queue.due_loss(before_last=True) is None
        assert shown(queue.due_loss()) == lost(2, "drop_oldest")

    async def test_losses_that_another_thread_clears_are_no_more(self) -> None:
        class Cleared(list[Any]):
            """Losses that another thread clears after one has looked."""

            def __bool__(self) -> bool:
                there = len(self) > 0
                self.clear()
                return there

        queue = SubscriberQueue[int](1)
        queue.offer(1)
        queue._losses = Cleared()
        queue.offer(2)
        assert queue.due_loss() is None
        queue.offer(3)
        assert queue.get_nowait() == 1
        assert await read(queue) == []

    @pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
    async def test_losses_that_nobody_asks_for_do_not_pile_up(self, policy: str) -> None:
        queue = queue_of(policy, 3)

        def rounds(times: int) -> None:
            for number in range(times):
                queue.offer(number)
                queue.offer(number)
                queue.get_nowait()

        rounds(100)
        before = sys.getallocatedblocks()
        rounds(20_000)
        assert sys.getallocatedblocks() - before < 100
        queue.take(3)
        told = 0
        while (loss := queue.due_loss()) is not None:
            told += loss.data["lost"]
        assert told == queue.dropped

    async def test_readers_that_come_and_go_leave_nothing(self) -> None:
        queue = SubscriberQueue[int](10, "block")

        async def rounds(times: int) -> None:
            for number in range(times):
                items = prime(queue.iterate(idle=30, on_idle=int))
                reader = asyncio.ensure_future(anext(items))
                await asyncio.sleep(0)
                queue.offer(number)
                assert await reader == number
                await items.aclose()

        asyncio.get_running_loop().set_debug(False)
        await rounds(200)
        before = sys.getallocatedblocks()
        await rounds(3000)
        assert sys.getallocatedblocks() - before < 500

    async def test_a_hundred_thousand_items_go_through_without_growth(self) -> None:
        queue = SubscriberQueue[int](10)
        for number in range(1000):
            queue.offer(number % 100)
            queue.get_nowait()
        before = sys.getallocatedblocks()
        for number in range(100_000):
            queue.offer(number % 100)
            queue.get_nowait()
        assert sys.getallocatedblocks() - before < 100


class TestPrime:
    def test_a_generator_must_yield_before_it_awaits(self) -> None:
        class Step:
            def __await__(self) -> Generator[None, None, None]:
                yield

        async def awaits_first() -> AsyncGenerator[int, None]:
            await Step()
            yield 1

        with pytest.raises(AssertionError, match="awaited before its first yield"):
            prime(awaits_first())


class TestIdle:
    async def test_the_default_is_thirty_seconds(self) -> None:
        assert HEARTBEAT_INTERVAL == 30.0

    async def test_an_idle_reader_gets_one_exactly_every_interval(self) -> None:
        queue = SubscriberQueue[Any]()
        reader = Reader(queue, idle=30.0, on_idle=lambda: "idle")
        await asyncio.sleep(95)
        queue.end()
        await reader.task
        assert reader.got == ["idle"] * 3
        assert reader.times == [30.0, 60.0, 90.0]

    async def test_the_interval_begins_anew_with_every_item(self) -> None:
        queue = SubscriberQueue[Any]()
        reader = Reader(queue, idle=30.0, on_idle=lambda: "idle")
        for pause in (10, 29, 1, 25.5):
            await asyncio.sleep(pause)
            queue.offer("item")
        await asyncio.sleep(70)
        queue.end()
        await reader.task
        assert reader.got == ["item"] * 4 + ["idle"] * 2
        assert reader.times == [10, 39, 40, 65.5, 95.5, 125.5]

    async def test_a_loss_counts_as_an_item(self) -> None:
        queue = SubscriberQueue[Any]()
        reader = Reader(queue, idle=30.0, on_idle=lambda: "idle")
        await asyncio.sleep(20)
        queue.lose(1)
        await asyncio.sleep(29)
        assert reader.got == [lost(1, "drop_newest")]
        queue.end()
        await reader.task

    async def test_there_is_one_timer_however_many_items(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        queue = SubscriberQueue[Any]()
        reader = Reader(queue, idle=30.0, on_idle=lambda: "idle")
        await asyncio.sleep(0)
        (timer,) = loop.timers()
        for number in range(100):
            queue.offer(number)
            await asyncio.sleep(0)
            assert loop.timers() == [timer]
        queue.end()
        await reader.task
        assert loop.timers() == []
        assert len(reader.got) == 100

    async def test_a_reader_that_is_busy_is_not_idle(self) -> None:
        queue = SubscriberQueue[Any]()
        queue.offer(1)
        items = prime(queue.iterate(idle=30.0, on_idle=lambda: "idle"))
        assert await anext(items) == 1
        waiting = asyncio.ensure_future(anext(items))
        await asyncio.sleep(10)
        queue.offer(2)
        assert await waiting == 2
        await asyncio.sleep(1000)  # busy with it
        assert await anext(items) == "idle"
        assert asyncio.get_running_loop().time() == 1040.0
        await items.aclose()

    async def test_who_is_woken_for_what_another_took_is_still_idle(self) -> None:
        queue = SubscriberQueue[Any]()
        reader = Reader(queue, idle=30.0, on_idle=lambda: "idle")
        await asyncio.sleep(40)  # once idle
        queue.offer("item")
        queue.get_nowait()
        await asyncio.sleep(29)
        assert reader.got == ["idle"]
        await asyncio.sleep(1)
        assert reader.times == [30.0, 70.0]
        queue.end()
        await reader.task

    async def test_ten_thousand_idle_times_leave_nothing(self) -> None:
        queue = SubscriberQueue[Any]()
        asyncio.get_running_loop().set_debug(False)
        items = prime(queue.iterate(idle=30.0, on_idle=lambda: "idle"))

        async def be_idle(times: int) -> None:
            for _ in range(times):
                assert await anext(items) == "idle"

        await be_idle(100)
        before = sys.getallocatedblocks()
        await be_idle(10_000)
        assert sys.getallocatedblocks() - before < 500
        await items.aclose()

    async def test_an_item_of_the_same_moment_comes_instead(self) -> None:
        queue = SubscriberQueue[Any]()
        reader = Reader(queue, idle=30.0, on_idle=lambda: "idle")
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(30.0, queue.offer, "item")
        await asyncio.sleep(40)
        queue.end()
        await reader.task
        assert reader.got == ["item"]

    @pytest.mark.parametrize("options", [{"idle": 30.0}, {"on_idle": int}, {}])
    async def test_without_both_there_is_none(self, options: dict[str, Any]) -> None:
        queue = SubscriberQueue[Any]()
        reader = Reader(queue, **options)
        await asyncio.sleep(1000)
        queue.end()
        await reader.task
        assert reader.got == []

    async def test_a_cancelled_reader_leaves_no_timer(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        reader = Reader(SubscriberQueue[Any](), idle=30.0, on_idle=lambda: "idle")
        await asyncio.sleep(1)
        reader.task.cancel()
        await asyncio.wait([reader.task])
        assert loop.timers() == []

    def test_the_interval_goes_on_in_the_next_event_loop(self) -> None:
        queue = SubscriberQueue[Any]()
        items = prime(queue.iterate(idle=30.0, on_idle=lambda: "idle"))

        async def one() -> Any:
            return await anext(items)

        for _ in range(2):
            loop = VirtualTimeLoop()
            try:
                assert loop.run_until_complete(one()) == "idle"
                assert loop.time() == 30.0
                task = loop.create_task(one())
                loop.call_later(10, queue.offer, "item")
                assert loop.run_until_complete(task) == "item"
                assert len(loop.timers()) == 1  # for the next wait, which is in another loop
            finally:
                loop.close()

        run(items.aclose())


class TestHandingOver:
    """Past the queue, to the reader who waits: the way of a lone event."""

    @pytest.mark.parametrize("way", ["hand_over", "feed"])
    async def test_a_reader_that_waits_is_given_the_item(self, way: str) -> None:
        queue = SubscriberQueue[Any](1, "drop_newest")
        reader = Reader(queue, idle=30.0, on_idle=lambda: "idle")
        for number in range(3):
            await asyncio.sleep(10)
            getattr(queue, way)(number)
            assert queue.empty()
        await asyncio.sleep(35)
        queue.end()
        await reader.task
        assert reader.got == [0, 1, 2, "idle"]
        assert reader.times == [10, 20, 30, 60]
        assert queue.received == 3

    async def test_what_comes_after_it_comes_after_it(self) -> None:
        queue = SubscriberQueue[int](2, "drop_oldest")
        reader = Reader(queue)
        await asyncio.sleep(1)
        assert queue.hand_over(1)
        assert not queue.hand_over(2)
        for number in (2, 3, 4):
            queue.feed(number)
        queue.lose(5)
        queue.end()
        await reader.task
        assert reader.got == [1, lost(1, "drop_oldest"), 3, 4, lost(5, "drop_oldest")]

    async def test_it_never_overtakes_what_another_thread_has_just_put_in(self) -> None:
        items: deque[int] = deque()

        class Queue(SubscriberQueue[int]):
            def _init(self, maxsize: int) -> None:
                self._queue: Any = items

        queue = Queue()
        reader = Reader(queue)
        await asyncio.sleep(1)
        items.append(1)  # by a thread that has not woken the reader yet
        assert not queue.hand_over(2)
        queue.feed(2)
        queue.end()
        await reader.task
        assert reader.got == [1, 2]

    async def test_it_is_not_done_where_nobody_waits(self) -> None:
        queue = SubscriberQueue[Any]()
        assert not queue.hand_over(1)
        items = prime(queue.iterate())
        assert not queue.hand_over(1)
        assert queue.received == 0
        await items.aclose()

    async def test_none_goes_through_the_queue(self) -> None:
        queue = SubscriberQueue[Any]()
        reader = Reader(queue)
        await asyncio.sleep(1)
        assert not queue.hand_over(None)
        queue.feed(None)
        queue.end()
        await reader.task
        assert reader.got == [None]

    async def test_who_is_woken_already_is_not_given_another(self) -> None:
        queue = SubscriberQueue[int]()
        reader = Reader(queue)
        await asyncio.sleep(1)
        queue.lose(1)
        assert not queue.hand_over(1)
        reader.task.cancel()
        await asyncio.wait([reader.task])
        again = Reader(queue)
        await asyncio.sleep(1)
        again.task.cancel()  # it has not noticed yet
        assert not queue.hand_over(1)
        await asyncio.wait([again.task])
        assert queue.received == 0

    async def test_latest_by_key_gives_the_item_too_and_replaces_what_comes_back(self) -> None:
        discarded: list[int] = []

        class Queue(KeyedQueue[int]):
            def _discard(self, item: int) -> None:
                discarded.append(item)

        queue = Queue(key=lambda number: number % 3)
        reader = Reader(queue)
        await asyncio.sleep(1)
        assert queue.hand_over(1)
        await asyncio.sleep(1)
        assert reader.got == [1]
        assert queue.hand_over(2)
        queue.feed(3)
        queue.feed(5)  # has the key of the 2, which the reader has not received yet
        reader.task.cancel()
        await asyncio.wait([reader.task])
        assert (queue.snapshot(), discarded, queue.replaced) == ([3, 5], [2], 1)
        again = Reader(queue)
        await asyncio.sleep(1)
        assert queue.hand_over(7)
        queue.feed(9)
        again.task.cancel()
        await asyncio.wait([again.task])
        assert again.got == [3, 5]
        assert (queue.snapshot(), queue.replaced) == ([7, 9], 1)
        assert queue.received - queue.evicted == 1 + 2 + 2

    async def test_all_who_wait_are_given_it_in_one_call_which_says_who_was_not(self) -> None:
        queues = [SubscriberQueue[int](name=str(number)) for number in range(4)]
        readers = [Reader(queue) for queue in queues[:3]]
        await asyncio.sleep(1)
        readers[1].task.cancel()  # it has not noticed yet
        loop = asyncio.get_running_loop()
        assert hand_over_to_all(queues, 7, loop) == [queues[1], queues[3]]
        await asyncio.sleep(1)
        assert [reader.got for reader in readers] == [[7], [], [7]]
        assert [queue.received for queue in queues] == [1, 0, 1, 0]
        for queue in queues:
            queue.end()
        await asyncio.wait([reader.task for reader in readers])

    async def test_a_reader_that_is_cancelled_first_leaves_it_to_the_next(self) -> None:
        queue = SubscriberQueue[int](1, "drop_newest")
        reader = Reader(queue)
        await asyncio.sleep(1)
        assert queue.hand_over(1)
        queue.feed(2)
        reader.task.cancel()
        await asyncio.wait([reader.task])
        assert reader.got == []
        assert queue.snapshot() == [1, 2]
        assert queue.received == 2
        assert await read(queue) == [1, 2]

    @pytest.mark.parametrize("is_closed", [False, True])
    @pytest.mark.parametrize("idle", [None, 30.0])
    def test_a_reader_may_read_on_in_another_loop(
        self, is_closed: bool, idle: float | None
    ) -> None:
        queue = SubscriberQueue[Any]()
        items = prime(queue.iterate(idle=idle, on_idle=lambda: "idle"))
        loops = [VirtualTimeLoop() for _ in range(4)]
        handed: list[bool] = []

        async def read_one(item: int) -> Any:
            loop = asyncio.get_running_loop()
            loop.call_later(1, lambda: handed.append(queue.hand_over(item)))
            return await anext(items)

        for number, loop in enumerate(loops):
            assert loop.run_until_complete(read_one(number)) == number
            if is_closed:
                loop.close()
        assert handed == [True] * 4
        run(items.aclose())
        for loop in loops:
            loop.close()

    async def test_what_is_thrown_in_while_it_waits_comes_out(self) -> None:
        queue = SubscriberQueue[Any]()
        items = prime(queue.iterate())
        waiting = items.__anext__().__await__()
        waiting.send(None)
        with pytest.raises(RuntimeError, match="mine"):
            waiting.throw(RuntimeError("mine"))
        assert queue.reading == 0

    async def test_it_leaves_it_to_one_who_gets_too(self) -> None:
        queue = SubscriberQueue[int]()
        reader = Reader(queue)
        getter = asyncio.create_task(queue.get())
        await asyncio.sleep(1)
        assert queue.hand_over(1)
        reader.task.cancel()
        async with asyncio.timeout(1):
            assert await getter == 1

    @pytest.mark.real_time
    async def test_it_is_not_done_from_another_thread(self) -> None:
        queue = SubscriberQueue[int]()
        reader = Reader(queue)
        await asyncio.sleep(0)
        assert not await asyncio.to_thread(queue.hand_over, 1)
        await asyncio.to_thread(queue.feed, 1)
        queue.end()
        await reader.task
        assert reader.got == [1]

    @pytest.mark.real_time
    async def test_a_reader_woken_by_another_thread_and_cancelled_first_wakes_who_gets(
        self,
    ) -> None:
        queue = SubscriberQueue[int]()
        reader = Reader(queue)
        getter = asyncio.create_task(queue.get())
        await asyncio.sleep(0)
        thread = threading.Thread(target=queue.offer, args=(1,))
        thread.start()
        thread.join()
        reader.task.cancel()
        async with asyncio.timeout(10):
            assert await getter == 1


@pytest.mark.real_time
class TestThreads:
    @pytest.mark.parametrize("way", ["offer", "feed"])
    async def test_a_reader_that_comes_as_an_item_is_added_is_told_what_was_lost_before(
        self, way: str
    ) -> None:
        queue = SubscriberQueue[Any](2, "drop_oldest")

        class Read(deque[Any]):
            """Is read right after an item was added, as by another thread."""

            def append(self, item: Any) -> None:
                super().append(item)
                told.append(queue.due_loss())

        queue.offer(0)
        queue.offer(1)
        told: list[Event | None] = []
        queue._queue = Read(queue._queue)
        getattr(queue, way)(2)
        assert [loss and loss.data for loss in told] == [{"lost": 1, "overflow": "drop_oldest"}]
        assert (queue.get_nowait(), queue.get_nowait()) == (1, 2)

    async def test_a_reader_gets_all_that_threads_fill_in(self) -> None:
        queue = SubscriberQueue[tuple[int, int]]()
        reader = Reader(queue)

        def fill(thread: int) -> None:
            for number in range(5000):
                queue.offer((thread, number))

        await asyncio.gather(*(asyncio.to_thread(fill, thread) for thread in range(4)))
        queue.end()
        async with asyncio.timeout(20):
            await reader.task
        assert len(reader.got) == queue.received == 20_000
        for thread in range(4):
            assert [n for t, n in reader.got if t == thread] == list(range(5000))

    async def test_threads_are_held_by_block_and_always_let_go(self) -> None:
        queue = SubscriberQueue[int](8, "block")
        reader = Reader(queue)

        async def publish() -> None:
            for number in range(5000):
                while not queue.offer(number):
                    async with asyncio.timeout(20):
                        await queue.room()

        def in_a_loop_of_its_own() -> None:
            asyncio.run(publish())

        await asyncio.to_thread(in_a_loop_of_its_own)
        queue.end()
        async with asyncio.timeout(20):
            await reader.task
        assert reader.got == list(range(5000))

    async def test_putters_and_getters_of_several_loops_meet(self) -> None:
        queue = SubscriberQueue[int](3)
        got: Counter[int] = Counter()

        async def put() -> None:
            for number in range(500):
                await queue.put(number)

        async def get() -> None:
            for _ in range(500):
                got[await queue.get()] += 1

        def run_it(what: Callable[[], Any]) -> None:
            asyncio.run(asyncio.wait_for(what(), 30))

        await asyncio.gather(
            *(asyncio.to_thread(run_it, what) for what in (put, put, get, get)),
        )
        assert got == dict.fromkeys(range(500), 2)
        assert queue.empty()

    @pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
    async def test_what_a_slow_reader_does_not_get_it_is_told(self, policy: str) -> None:
        queue = queue_of(policy, 4)
        total = 20_000
        reader = Reader(queue)

        def fill() -> None:
            for number in range(total):
                queue.offer(number)

        await asyncio.to_thread(fill)
        queue.end()
        async with asyncio.timeout(20):
            await reader.task
        numbers = [item for item in reader.got if isinstance(item, int)]
        told = sum(item[1]["lost"] for item in reader.got if isinstance(item, tuple))
        assert numbers == sorted(numbers)
        assert len(numbers) + told == total
        assert told == queue.dropped

    async def test_latest_by_key_is_whole_while_threads_fill_and_read_it(self) -> None:
        queue = KeyedQueue[tuple[int, int, int]](5, key=lambda item: item[0])
        reader = Reader(queue)
        total = 4 * 5000

        def fill(thread: int) -> None:
            for number in range(5000):
                queue.offer((number % 7, thread, number))

        await asyncio.gather(*(asyncio.to_thread(fill, thread) for thread in range(4)))
        queue.end()
        async with asyncio.timeout(20):
            await reader.task
        items = [item for item in reader.got if isinstance(item[0], int)]
        told = sum(item[1]["lost"] for item in reader.got if item[0] == "stream.lost")
        counts = queue.statistics()
        assert told == counts.dropped
        assert len(items) + counts.replaced + told == total
        assert counts.received == len(items) + queue.evicted
        for thread in range(4):
            mine = [number for _, by, number in items if by == thread]
            assert len(mine) == len(set(mine))


class Reference:
    """What the documentation says a queue does, in the simplest way."""

    def __init__(self, policy: str, maxsize: int) -> None:
        self.policy = policy
        self.maxsize = maxsize
        self.line: list[Any] = []  # items, and ints below zero: so many were lost here
        self.ended = False
        self.given = 0
        self.refused = 0  # by block: the caller's still
        self.replaced = 0
        self.lost = 0

    @property
    def items(self) -> list[int]:
        return [item for item in self.line if isinstance(item, int)]

    def _lose(self, place: int, why: tuple[str, int]) -> None:
        self.lost += why[1]
        self.line.insert(place, why)
        if place + 1 < len(self.line):
            self._join(place)
        if place > 0:
            self._join(place - 1)

    def _join(self, place: int) -> None:
        """What was lost with nothing kept between is told once."""
        first, second = self.line[place : place + 2]
        if not isinstance(first, int) and not isinstance(second, int):
            self.line[place : place + 2] = [(first[0], first[1] + second[1])]

    def offer(self, item: int) -> bool:
        if self.ended:
            self.refused += 1
            return False
        if self.policy == "latest_by_key":
            for place, other in enumerate(self.line):
                if isinstance(other, int) and other % 3 == item % 3:
                    self.line[place] = item
                    self.replaced += 1
                    return True
        if len(self.items) >= self.maxsize:
            match self.policy:
                case "block":
                    self.refused += 1
                    return False
                case "drop_newest":
                    self._lose(len(self.line), ("lost", 1))
                    return False
                case "disconnect":
                    self.line.append(("disconnect", 1))
                    self.lost += 1
                    self.ended = True
                    return False
                case _:
                    place = next(i for i, each in enumerate(self.line) if isinstance(each, int))
                    del self.line[place]
                    self._lose(place, ("lost", 1))
        self.line.append(item)
        return True


class LikeTheReference(RuleBasedStateMachine):
    """A queue with a reader, beside the reference, step for step, in one event loop."""

    @initialize(policy=st.sampled_from(POLICIES), maxsize=st.integers(1, 4))
    def begin(self, policy: str, maxsize: int) -> None:
        self.loop = VirtualTimeLoop()
        self.model = Reference(policy, maxsize)
        key = {"key": lambda item: item % 3} if policy == "latest_by_key" else {}
        self.crowd: set[SubscriberQueue[Any]] = set()
        self.queue = queue_of(policy, maxsize, crowd=self.crowd, **key)
        self.numbers = itertools.count()
        self.taken = 0
        self.told = 0
        self.at_the_end = False
        self.reader = prime(self.queue.iterate())

    @rule(way=st.sampled_from(["offer", "feed"]))
    def fill_in(self, way: str) -> None:
        number = next(self.numbers)
        self.model.given += 1
        expected = self.model.offer(number)
        if way == "offer":
            assert self.queue.offer(number) is expected
        elif expected or self.model.policy != "block" or self.model.ended:
            self.queue.feed(number)

    @rule(count=st.integers(0, 5))
    def fill_in_many(self, count: int) -> None:
        numbers = list(itertools.islice(self.numbers, count))
        taken = self.queue.fill(numbers)
        if self.model.ended:
            assert taken == count
            return
        if self.model.policy != "latest_by_key":
            assert taken == min(count, self.model.maxsize - len(self.model.items))
        for number in numbers[:taken]:
            self.model.given += 1
            assert self.model.offer(number)

    @rule(count=st.integers(1, 3))
    def lose(self, count: int) -> None:
        if self.model.policy != "disconnect":
            self.queue.lose(count)
            self.model.given += count
            self.model._lose(len(self.model.line), ("lost", count))

    @rule()
    def read(self) -> None:
        if not self.model.line and not self.model.ended:
            return  # it would wait
        if not self.model.line:
            with pytest.raises(StopAsyncIteration):
                self.loop.run_until_complete(anext(self.reader))
            self.reader = prime(self.queue.iterate())
            return
        got = shown(self.loop.run_until_complete(anext(self.reader)))
        match self.model.line.pop(0):
            case int(item):
                assert got == item
                self.taken += 1
            case ("lost", count):
                assert got == lost(count, self.model.policy)
                self.told += count
            case (_, count):
                assert got == disconnected(count)
                self.told += count

    @precondition(lambda self: self.queue.qsize() > 1)
    @rule()
    def another_reader(self) -> None:
        self.loop.run_until_complete(self.reader.aclose())
        self.reader = prime(self.queue.iterate())

    @rule()
    def end(self) -> None:
        self.queue.end()
        self.model.ended = True

    @rule()
    def clear(self) -> None:
        forgotten = len(self.model.items)
        self.queue.clear()
        self.model.given -= forgotten + sum(
            each[1] for each in self.model.line if not isinstance(each, int)
        )
        self.model.lost -= sum(each[1] for each in self.model.line if not isinstance(each, int))
        self.cleared = getattr(self, "cleared", 0) + sum(
            each[1] for each in self.model.line if not isinstance(each, int)
        )
        self.model.line.clear()

    @invariant()
    def they_are_alike(self) -> None:
        if not hasattr(self, "queue"):
            return
        queue, model = self.queue, self.model
        assert queue.snapshot() == model.items
        assert queue.qsize() == len(model.items)
        assert queue.full() == (len(model.items) >= model.maxsize)
        assert queue.ended == model.ended
        assert queue.dropped == model.lost + getattr(self, "cleared", 0)
        assert queue.replaced == model.replaced
        assert queue.received - queue.evicted == self.taken + len(model.items)
        assert model.given == (
            self.taken + len(model.items) + model.lost + model.replaced + model.refused
        )
        waiting = sum(each[1] for each in model.line if not isinstance(each, int))
        assert self.told + waiting == model.lost
        assert (queue in self.crowd) == queue.crowded

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.loop.run_until_complete(self.reader.aclose())
            self.loop.close()


def test_every_policy_is_what_the_documentation_says() -> None:
    run_state_machine_as_test(
        LikeTheReference, settings=settings(max_examples=60, stateful_step_count=30)
    )
