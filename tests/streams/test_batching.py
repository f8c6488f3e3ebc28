"""BatchingStream: when batches go out, who waits, failures, life cycle, threads, cancellation."""

import asyncio
import logging
import os
import sys
import threading
import time
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codomyrmex.events.streaming import (
    BatchingStream,
    Event,
    NoBatchHandler,
    StreamClosed,
    TopicError,
    create_event,
)
from codomyrmex.events.streaming.testing import VirtualTimeLoop, cancel_at_every_await, run

PATIENCE = 10.0  # seconds of real time for what must happen at once


def now() -> float:
    return asyncio.get_running_loop().time()


class Batches:
    """A batch handler: keeps the data of each batch, and when it came."""

    def __init__(self, stream: BatchingStream | None = None, *, seconds: float = 0.0) -> None:
        self.times: list[float] = []
        self.batches: list[list[Any]] = []
        self.ended: list[float] = []
        self._seconds = seconds
        if stream is not None:
            stream.on_batch(self)

    async def __call__(self, batch: list[Event]) -> None:
        self.times.append(now())
        self.batches.append([event.data for event in batch])
        if self._seconds:
            await asyncio.sleep(self._seconds)
        self.ended.append(now())

    @property
    def data(self) -> list[Any]:
        return [item for batch in self.batches for item in batch]


async def add_all(stream: BatchingStream, numbers: range, every: float = 0.0) -> None:
    for number in numbers:
        await stream.add(create_event(number))
        if every:
            await asyncio.sleep(every)


class TestWhen:
    async def test_at_the_size(self) -> None:
        async with BatchingStream(batch_size=3) as stream:
            got = Batches(stream)
            await add_all(stream, range(7))
            assert got.batches == [[0, 1, 2], [3, 4, 5]]
            assert got.times == [0.0, 0.0]
        assert got.batches[2:] == [[6]]

    async def test_after_the_interval_since_the_first_event(self) -> None:
        async with BatchingStream(flush_interval=1.0) as stream:
            got = Batches(stream)
            await asyncio.sleep(5.25)
            await add_all(stream, range(3), every=0.3)  # at 5.25, 5.55, 5.85
            await asyncio.sleep(3.0)
            await add_all(stream, range(3, 5), every=0.75)
            await asyncio.sleep(3.0)
        assert got.batches == [[0, 1, 2], [3, 4]]
        assert got.times == [6.25, pytest.approx(10.15)]

    async def test_a_batch_that_filled_begins_the_interval_anew(self) -> None:
        async with BatchingStream(batch_size=5, flush_interval=1.0) as stream:
            got = Batches(stream)
            await stream.add(create_event(0))
            await asyncio.sleep(0.75)
            await add_all(stream, range(1, 5))  # full at 0.75
            await stream.add(create_event(5))  # the first of the next
            await asyncio.sleep(3.0)
        assert got.batches == [[0, 1, 2, 3, 4], [5]]
        assert got.times == [0.75, 1.75]

    async def test_an_event_after_a_while_has_an_interval_of_its_own(self) -> None:
        async with BatchingStream(batch_size=2, flush_interval=1.0) as stream:
            got = Batches(stream)
            await add_all(stream, range(2))
            await asyncio.sleep(0.5)  # the timer of the batch that went is still set
            await stream.add(create_event(2))
            await asyncio.sleep(3.0)
        assert got.times == [0.0, 1.5]

    async def test_nothing_goes_out_where_nothing_came(self) -> None:
        async with BatchingStream() as stream:
            got = Batches(stream)
            await asyncio.sleep(100.0)
        assert got.batches == []

    @given(
        size=st.integers(1, 5),
        gaps=st.lists(st.sampled_from([0.0, 0.25, 0.5, 2.0]), min_size=1, max_size=25),
    )
    async def test_whatever_the_pace_each_batch_is_as_promised(
        self, size: int, gaps: list[float]
    ) -> None:
        added: list[float] = []
        async with BatchingStream(size, flush_interval=1.0) as stream:
            got = Batches(stream)
            for number, gap in enumerate(gaps):
                await asyncio.sleep(gap)
                added.append(now())
                await stream.add(create_event(number))
            await asyncio.sleep(5.0)
        assert got.data == list(range(len(gaps)))
        for batch, at in zip(got.batches, got.times, strict=True):
            if len(batch) == size and at == added[batch[-1]]:
                continue
            assert len(batch) <= size
            assert at == added[batch[0]] + 1.0
            # All that came in time is in it, and nothing that came later.
            assert all(added[number] <= at for number in batch)
            assert all(added[later] >= at for later in range(batch[-1] + 1, len(added)))

    @pytest.mark.parametrize(("size", "interval"), [(0, 1.0), (-1, 1.0), (1, 0.0), (1, -1.0)])
    def test_what_makes_no_sense_is_refused(self, size: int, interval: float) -> None:
        with pytest.raises(ValueError, match="number of"):
            BatchingStream(size, interval)

    async def test_state_names_that_callers_know(self) -> None:
        stream = BatchingStream()
        assert (stream._batch_size, stream._flush_interval) == (100, 1.0)
        assert (stream._batch, stream._handlers, stream._running) == ([], [], False)
        got = Batches(stream)
        assert stream._handlers == [got]
        await stream.start()
        assert stream._running
        event = create_event(1)
        await stream.add(event)
        assert stream._batch == [event]
        await stream._flush()
        assert stream._batch == []
        assert got.batches == [[1]]
        await stream.stop()
        assert not stream._running


class TestHandlers:
    async def test_sync_and_async_each_get_every_batch_in_their_order(self) -> None:
        calls: list[Any] = []

        async def asynchronous(batch: list[Event]) -> None:
            await asyncio.sleep(0.1)
            calls.append(("async", len(batch)))

        def returns_an_awaitable(batch: list[Event]) -> Any:
            return asynchronous(batch)

        async with BatchingStream(batch_size=2) as stream:
            stream.on_batch(asynchronous)
            stream.on_batch(lambda batch: calls.append(("sync", len(batch))))
            stream.on_batch(returns_an_awaitable)
            await add_all(stream, range(2))
        assert calls == [("async", 2), ("sync", 2), ("async", 2)]

    async def test_a_handler_may_change_its_list(self) -> None:
        lengths: list[int] = []

        def greedy(batch: list[Event]) -> None:
            lengths.append(len(batch))
            batch.clear()

        async with BatchingStream(batch_size=2) as stream:
            stream.on_batch(greedy)
            stream.on_batch(greedy)
            await add_all(stream, range(2))
        assert lengths == [2, 2]

    @pytest.mark.parametrize("error", [KeyError("k"), asyncio.CancelledError()])
    @pytest.mark.parametrize("asynchronous", [False, True])
    async def test_one_that_raises_affects_neither_others_nor_later_batches(
        self, error: BaseException, asynchronous: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(batch: list[Event]) -> None:
            raise error

        async def fail_later(batch: list[Event]) -> None:
            await asyncio.sleep(0.1)
            raise error

        async with BatchingStream(batch_size=2, flush_interval=1.0) as stream:
            stream.on_batch(fail_later if asynchronous else fail)
            got = Batches(stream)
            await add_all(stream, range(3))  # by size, then by time
            await asyncio.sleep(2.0)
            await stream.add(create_event(3))
            await asyncio.sleep(2.0)
            assert stream.statistics().failed == 3
        assert got.batches == [[0, 1], [2], [3]]
        assert caplog.text.count("Traceback") == 3
        assert "a batch of 2 events" in caplog.text

    async def test_add_waits_while_the_batch_it_filled_is_being_handled(self) -> None:
        async with BatchingStream(batch_size=2) as stream:
            got = Batches(stream, seconds=3.0)
            await stream.add(create_event(0))
            assert now() == 0.0
            await stream.add(create_event(1))
            assert now() == 3.0
            await stream.add(create_event(2))
            assert now() == 3.0
        assert got.batches == [[0, 1], [2]]

    async def test_many_adders_wait_each_for_its_batch_and_batches_go_one_by_one(self) -> None:
        async with BatchingStream(batch_size=3) as stream:
            got = Batches(stream, seconds=1.0)
            waits: dict[int, float] = {}

            async def add(number: int) -> None:
                await stream.add(create_event(number))
                waits[number] = now()

            await asyncio.gather(*(add(number) for number in range(9)))
        assert got.batches == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
        assert got.times == [0.0, 1.0, 2.0]
        assert [waits[number] for number in range(9)] == [0, 0, 1, 0, 0, 2, 0, 0, 3]

    async def test_the_loop_is_free_while_a_batch_is_handled(self) -> None:
        async with BatchingStream(batch_size=1) as stream:
            Batches(stream, seconds=5.0)
            adding = asyncio.create_task(stream.add(create_event(0)))
            await asyncio.sleep(1.0)
            assert now() == 1.0
            await adding

    async def test_a_handler_may_add_to_its_own_stream(self) -> None:
        got: list[list[Any]] = []

        async def echo(batch: list[Event]) -> None:
            got.append([event.data for event in batch])
            for event in batch:
                if event.data < 4:
                    await stream.add(create_event(event.data + 4))
                    await stream.add(create_event(event.data + 8))
            await stream._flush()

        async with BatchingStream(batch_size=2) as stream:
            stream.on_batch(echo)
            await asyncio.wait_for(add_all(stream, range(2)), 60.0)
        assert got == [[0, 1], [4, 8], [5, 9]]

    @pytest.mark.parametrize("asynchronous", [False, True])
    async def test_a_handler_that_adds_for_ever_does_not_block_its_loop(
        self, asynchronous: bool
    ) -> None:
        count, going_on = 0, True

        def again(batch: list[Event]) -> None:
            nonlocal count
            count += 1
            if going_on and count < 10_000:
                assert stream.publish_nowait(create_event(count))

        async def again_async(batch: list[Event]) -> None:
            again(batch)

        async with BatchingStream(batch_size=1) as stream:
            stream.on_batch(again_async if asynchronous else again)
            assert stream.publish_nowait(create_event(0))
            for turn in range(1, 6):
                await asyncio.sleep(0)
                assert count <= turn * 64
            going_on = False
        assert stream.statistics().published == count > 64

    async def test_a_handler_may_publish_without_waiting_and_stop_its_stream(self) -> None:
        got: list[int] = []

        async def handle(batch: list[Event]) -> None:
            got.append(len(batch))
            if len(got) == 1:
                assert all(stream.publish_nowait(create_event(number)) for number in range(4))
                await stream.stop()

        stream = BatchingStream(batch_size=2)
        stream.on_batch(handle)
        await asyncio.wait_for(add_all(stream, range(2)), 60.0)
        await stream.stop()
        assert got == [2, 2, 2]

    async def test_sync_handlers_have_run_when_add_returns_which_never_paused(self) -> None:
        stream = BatchingStream(batch_size=2)
        got: list[Any] = []
        stream.on_batch(lambda batch: got.append([event.data for event in batch]))
        for number in range(5):
            with pytest.raises(StopIteration):  # it ran from its beginning to its end
                stream.add(create_event(number)).send(None)
        assert got == [[0, 1], [2, 3]]
        assert stream.statistics().buffered == 1

    async def test_what_a_function_returns_is_awaited_before_the_next_handler(self) -> None:
        stream = BatchingStream(batch_size=2)
        got: list[tuple[str, float]] = []

        async def insert(name: str) -> None:
            await asyncio.sleep(1.0)
            got.append((name, now()))

        stream.on_batch(lambda _: insert("first"))
        stream.on_batch(lambda _: got.append(("second", now())))
        stream.on_batch(lambda _: insert("third"))
        adding = asyncio.create_task(add_all(stream, range(4)))
        await asyncio.sleep(0.5)
        assert (got, stream.statistics().buffered) == ([], 0)
        await adding
        assert got == [
            *(("first", 1.0), ("second", 1.0), ("third", 2.0)),
            *(("first", 3.0), ("second", 3.0), ("third", 4.0)),
        ]

    async def test_what_a_function_returned_is_given_up_with_its_batch(self) -> None:
        stream = BatchingStream(batch_size=2)
        began: list[str] = []

        async def insert() -> None:
            began.append("insert")

        stream.on_batch(lambda _: insert())
        adding = asyncio.create_task(add_all(stream, range(2)))
        asyncio.get_running_loop().call_soon(adding.cancel)
        await asyncio.sleep(0)  # the batch is full, and nothing has been awaited yet
        assert stream.statistics().buffered == 2
        await stream.as_stream().aclose(drain=False)
        assert (began, stream.statistics().dropped) == ([], 2)
        with pytest.raises(asyncio.CancelledError):
            await adding

    async def test_a_function_in_whose_call_an_event_is_added_gets_that_next(self) -> None:
        stream = BatchingStream(batch_size=1)
        got: list[Any] = []

        def handler(batch: list[Event]) -> None:
            got.append(batch[0].data)
            if batch[0].data < 3:
                assert stream.publish_nowait(create_event(batch[0].data + 1))
                got.append("after")

        stream.on_batch(handler)
        await stream.add(create_event(0))
        await stream.stop()
        assert got == [0, "after", 1, "after", 2, "after", 3]

    async def test_what_interrupts_a_function_is_raised_and_the_next_batch_handled(self) -> None:
        stream = BatchingStream(batch_size=1)
        got: list[Any] = []

        def handler(batch: list[Event]) -> None:
            if not got:
                got.append("interrupted")
                raise KeyboardInterrupt
            got.append(batch[0].data)

        stream.on_batch(handler)
        with pytest.raises(KeyboardInterrupt):
            stream.add(create_event(0)).send(None)
        await stream.add(create_event(1))
        assert got == ["interrupted", 1]

    async def test_one_registered_while_a_batch_is_handled_gets_the_next(self) -> None:
        late = Batches()

        def register(batch: list[Event]) -> None:
            if late not in stream._handlers:
                stream.on_batch(late)

        async with BatchingStream(batch_size=1) as stream:
            stream.on_batch(register)
            await add_all(stream, range(3))
        assert late.batches == [[1], [2]]

    async def test_a_task_that_a_handler_has_returned_ends_with_the_stream(self) -> None:
        tasks: list[asyncio.Task[None]] = []

        def handle(batch: list[Event]) -> asyncio.Task[None]:
            tasks.append(asyncio.create_task(asyncio.sleep(1000)))
            return tasks[-1]

        stream = BatchingStream(batch_size=1)
        stream.on_batch(handle)
        adding = asyncio.create_task(stream.add(create_event(1)))
        await asyncio.sleep(0)
        await stream.as_stream().aclose(drain=False)
        await adding
        assert tasks[0].cancelled()
        assert stream.statistics().dropped == 1


class TestWithoutHandler:
    async def test_a_full_batch_takes_nothing_more_and_loses_nothing(self) -> None:
        stream = BatchingStream(batch_size=3)
        await add_all(stream, range(3))
        with pytest.raises(NoBatchHandler, match="3 events"):
            await stream.add(create_event("over"))
        with pytest.raises(NoBatchHandler):
            stream.publish_nowait(create_event("over"))
        statistics = stream.statistics()
        assert (statistics.published, statistics.buffered, statistics.dropped) == (3, 3, 0)
        got = Batches(stream)
        await add_all(stream, range(3, 5))
        assert got.batches == [[0, 1, 2]]
        await stream.stop()
        assert got.batches == [[0, 1, 2], [3, 4]]

    async def test_without_waiting_too(self) -> None:
        stream = BatchingStream(batch_size=2)
        assert all(stream.publish_nowait(create_event(number)) for number in range(2))
        got = Batches(stream)
        assert stream.publish_nowait(create_event(2))
        await stream.stop()
        assert got.batches == [[0, 1], [2]]

    async def test_a_full_batch_goes_out_as_soon_as_there_is_one(self) -> None:
        async with BatchingStream(batch_size=2, flush_interval=5.0) as stream:
            await add_all(stream, range(2))
            await asyncio.sleep(2.0)
            got = Batches(stream)
            other = Batches(stream)  # registered in the same breath: it gets the batch as well
            await asyncio.sleep(0.001)
            assert got.batches == other.batches == [[0, 1]]
            assert got.times == [2.0]

    async def test_a_batch_that_is_overdue_goes_out_as_soon_as_there_is_one(self) -> None:
        async with BatchingStream(flush_interval=1.0) as stream:
            await add_all(stream, range(2))
            await asyncio.sleep(3.0)
            await stream.add(create_event(2))
            got = Batches(stream)
            await asyncio.sleep(0.001)
            assert got.batches == [[0, 1, 2]]
            assert got.times == [3.0]

    async def test_the_interval_of_what_collected_before_begins_with_the_start(self) -> None:
        stream = BatchingStream(flush_interval=1.0)
        await stream.add(create_event(0))
        await asyncio.sleep(1.0)
        await stream.start()
        await asyncio.sleep(0.5)
        got = Batches(stream)
        await asyncio.sleep(3.0)
        assert got.times == [2.0]
        await stream.stop()

    async def test_a_batch_in_time_goes_out_in_time(self) -> None:
        async with BatchingStream(flush_interval=1.0) as stream:
            await stream.add(create_event(0))
            await asyncio.sleep(0.25)
            got = Batches(stream)
            await asyncio.sleep(3.0)
            assert got.times == [1.0]

    async def test_a_flush_drops_it_and_says_so(self, caplog: pytest.LogCaptureFixture) -> None:
        stream = BatchingStream()
        await add_all(stream, range(3))
        await stream._flush()
        assert stream._batch == []
        assert stream.statistics().dropped == 3
        assert "3 events is lost" in caplog.text
        caplog.clear()
        await stream._flush()
        assert stream.statistics().dropped == 3
        assert caplog.text == ""

    async def test_so_does_a_stop(self) -> None:
        async with BatchingStream() as stream:
            await add_all(stream, range(3))
        assert stream.statistics().dropped == 3


class TestLifeCycle:
    async def test_stop_flushes_once_and_waits_for_the_handlers(self) -> None:
        stream = BatchingStream()
        await stream.start()
        got = Batches(stream, seconds=2.0)
        await add_all(stream, range(3))
        await stream.stop()
        assert got.ended == [2.0]
        await stream.stop()
        assert got.batches == [[0, 1, 2]]

    async def test_two_stops_at_a_time_both_wait(self) -> None:
        stream = BatchingStream()
        got = Batches(stream, seconds=2.0)
        await add_all(stream, range(3))
        await asyncio.gather(stream.stop(), stream.stop())
        assert got.batches == [[0, 1, 2]]
        assert now() == 2.0

    async def test_after_stop_nothing_is_taken(self) -> None:
        async with BatchingStream() as stream:
            got = Batches(stream)
        with pytest.raises(StreamClosed):
            await stream.add(create_event(1))
        with pytest.raises(StreamClosed):
            stream.publish_nowait(create_event(1))
        assert got.batches == []
        assert stream.statistics().published == 0

    async def test_before_start_sizes_count_and_intervals_do_not(self) -> None:
        stream = BatchingStream(batch_size=2, flush_interval=1.0)
        got = Batches(stream)
        await add_all(stream, range(3))
        await asyncio.sleep(10.0)
        assert got.batches == [[0, 1]]
        await stream.start()
        await asyncio.sleep(10.0)
        assert got.batches == [[0, 1], [2]]
        assert got.times == [0.0, 11.0]
        await stream.stop()

    async def test_a_full_batch_that_waited_for_its_handler_goes_out_at_the_start(self) -> None:
        stream = BatchingStream(batch_size=2)
        await add_all(stream, range(2))
        got = Batches(stream)
        await stream.start()
        await asyncio.sleep(0.001)
        assert got.batches == [[0, 1]]
        await stream.stop()

    async def test_a_size_that_is_made_smaller_is_obeyed(self) -> None:
        async with BatchingStream(batch_size=10) as stream:
            got = Batches(stream)
            await add_all(stream, range(5))
            stream._batch_size = 2
            await stream.add(create_event(5))
            assert got.batches == [[0, 1], [2, 3], [4, 5]]

    async def test_start_twice_does_nothing(self) -> None:
        stream = BatchingStream(flush_interval=1.0)
        got = Batches(stream)
        await stream.start()
        await stream.add(create_event(0))
        await asyncio.sleep(0.5)
        await stream.start()
        await asyncio.sleep(3.0)
        assert got.times == [1.0]
        await stream.stop()

    async def test_started_twice_it_leaves_no_timer_when_it_is_stopped(self) -> None:
        stream = BatchingStream(flush_interval=1.0)
        got = Batches(stream)
        await stream.start()
        await stream.add(create_event(0))
        await stream.start()
        await stream.stop()
        assert got.batches == [[0]]
        assert now() == 0.0  # and a timer that is left would fail this test

    async def test_it_can_be_started_again(self) -> None:
        stream = BatchingStream(flush_interval=1.0)
        got = Batches(stream)
        for number in range(3):
            await stream.start()
            await stream.add(create_event(number))
            await asyncio.sleep(2.0)
            await stream.add(create_event(-number))
            await stream.stop()
        assert got.batches == [[0], [0], [1], [-1], [2], [-2]]
        assert got.times == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]

    async def test_a_stop_that_is_cancelled_gives_up_and_counts_what_it_gives_up(self) -> None:
        stream = BatchingStream(batch_size=2)
        got = Batches(stream, seconds=5.0)
        adding = asyncio.create_task(add_all(stream, range(2)))
        await asyncio.sleep(1.0)
        await stream.add(create_event(2))
        stopping = asyncio.create_task(stream.stop())
        await asyncio.sleep(1.0)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        await adding
        assert now() == 2.0
        assert (got.batches, got.ended) == ([[0, 1]], [])
        assert stream.statistics().dropped == 3
        await stream.start()
        await stream.add(create_event(3))
        await stream.stop()
        assert got.batches == [[0, 1], [3]]

    def test_cancelled_anywhere_nothing_is_left_behind(self) -> None:
        async def scenario() -> None:
            async with BatchingStream(batch_size=2, flush_interval=0.5) as stream:
                Batches(stream, seconds=0.1)
                await add_all(stream, range(3))
                await asyncio.sleep(0.4)
                await stream.add(create_event(3))

        assert cancel_at_every_await(scenario) >= 3

    def test_an_add_that_is_cancelled_has_added_its_event(self) -> None:
        handled: list[Any] = []

        async def scenario() -> None:
            async def handle(batch: list[Event]) -> None:
                await asyncio.sleep(0.1)
                handled.extend(event.data for event in batch)

            handled.clear()
            stream = BatchingStream(batch_size=1)
            stream.on_batch(handle)
            try:
                await stream.add(create_event(1))
            finally:
                await stream.stop()

        assert cancel_at_every_await(scenario, check=lambda: handled.remove(1)) >= 1


class TestThreadsAndLoops:
    @pytest.mark.real_time
    async def test_handlers_run_on_the_loop_of_start_wherever_a_batch_is_filled(self) -> None:
        loops: list[asyncio.AbstractEventLoop] = []

        async def handle(batch: list[Event]) -> None:
            loops.append(asyncio.get_running_loop())

        # Made where no loop runs, as a global is.
        stream = await asyncio.to_thread(BatchingStream, batch_size=2)
        stream.on_batch(handle)
        await stream.start()
        await asyncio.to_thread(asyncio.run, add_all(stream, range(4)))
        await stream.stop()
        assert loops == [asyncio.get_running_loop()] * 2

    @pytest.mark.real_time
    async def test_a_handler_that_is_at_work_elsewhere_stays_there_until_it_is_done(self) -> None:
        loops: list[asyncio.AbstractEventLoop] = []
        begun, let_go = threading.Event(), threading.Event()

        async def handle(batch: list[Event]) -> None:
            loops.append(asyncio.get_running_loop())
            begun.set()
            await asyncio.to_thread(let_go.wait, PATIENCE)

        stream = await asyncio.to_thread(BatchingStream, batch_size=1)
        stream.on_batch(handle)
        adding = asyncio.create_task(asyncio.to_thread(asyncio.run, add_all(stream, range(1))))
        assert await asyncio.to_thread(begun.wait, PATIENCE)
        await stream.start()
        let_go.set()
        await adding
        assert stream.statistics().buffered == 0
        await stream.add(create_event(1))
        await stream.stop()
        assert len(loops) == 2
        assert loops[1] is asyncio.get_running_loop() is not loops[0]

    def test_a_batch_that_was_filled_without_a_loop_goes_out_at_the_start(self) -> None:
        stream = BatchingStream(batch_size=2)
        batches = Batches(stream)
        assert stream.publish_nowait(create_event(0))
        assert stream.publish_nowait(create_event(1))

        async def main() -> None:
            await stream.start()
            await asyncio.sleep(0.5)
            assert batches.batches == [[0, 1]]
            await stream.stop()

        run(main())

    @pytest.mark.real_time
    @pytest.mark.parametrize("batch_size", [1, 3, 50])
    async def test_threads_lose_nothing_and_make_no_batch_too_large(self, batch_size: int) -> None:
        sizes: list[int] = []
        got: list[int] = []

        def handle(batch: list[Event]) -> None:
            sizes.append(len(batch))
            got.extend(event.data for event in batch)

        each, threads = 400, 3

        def publish(first: int) -> None:
            for number in range(first, first + each):
                while not stream.publish_nowait(create_event(number)):
                    time.sleep(0.0001)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)  # so that threads interrupt one another wherever they can
        try:
            async with BatchingStream(batch_size, flush_interval=0.05) as stream:
                stream.on_batch(handle)
                await asyncio.gather(
                    add_all(stream, range(each)),
                    *(asyncio.to_thread(publish, each * index) for index in range(1, threads)),
                )
        finally:
            sys.setswitchinterval(interval)
        assert sorted(got) == list(range(each * threads))
        assert max(sizes) <= batch_size
        for index in range(threads):
            of_one = [number for number in got if number // each == index]
            assert of_one == sorted(of_one)
        assert stream.statistics().published == each * threads

    def test_two_threads_that_fill_a_batch_at_a_time_send_each_event_once(self) -> None:
        class Slow(list[Event]):
            def __getitem__(self, index: Any) -> Any:
                taken = super().__getitem__(index)
                time.sleep(0.02)  # time enough for another thread to take the same
                return taken

        stream = BatchingStream(batch_size=1)
        stream._batch = Slow()
        got = Batches(stream)
        threads = [
            threading.Thread(target=stream.publish_nowait, args=[create_event(number)])
            for number in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        run(stream.stop())
        assert sorted(got.batches) == [[0], [1]]

    @pytest.mark.real_time
    async def test_an_event_of_another_thread_begins_the_interval(self) -> None:
        handled = asyncio.Event()

        async def handle(batch: list[Event]) -> None:
            handled.set()

        async with BatchingStream(flush_interval=0.01) as stream:
            stream.on_batch(handle)
            for _ in range(3):
                thread = threading.Thread(target=stream.publish_nowait, args=[create_event(1)])
                thread.start()
                await asyncio.wait_for(handled.wait(), PATIENCE)
                handled.clear()
                thread.join()

    @pytest.mark.real_time
    async def test_a_handler_registered_in_another_thread_gets_what_waits(self) -> None:
        handled = asyncio.Event()

        async def handle(batch: list[Event]) -> None:
            handled.set()

        async with BatchingStream(flush_interval=0.01) as stream:
            await stream.add(create_event(1))
            await asyncio.sleep(0.03)
            await asyncio.to_thread(stream.on_batch, handle)
            await asyncio.wait_for(handled.wait(), PATIENCE)

    @pytest.mark.real_time
    async def test_it_can_be_stopped_from_another_loop(self) -> None:
        stream = BatchingStream(flush_interval=1000.0)
        await stream.start()
        got = Batches(stream)
        await add_all(stream, range(3))
        await asyncio.to_thread(asyncio.run, stream.stop())
        assert got.batches == [[0, 1, 2]]

    async def test_publish_nowait_says_when_it_would_have_to_wait(self) -> None:
        async with BatchingStream(batch_size=2) as stream:
            got = Batches(stream, seconds=5.0)
            taken = [stream.publish_nowait(create_event(number)) for number in range(5)]
            assert taken == [True, True, True, False, False]
            assert stream.statistics().refused == 2
        assert got.batches == [[0, 1], [2]]

    def test_without_any_loop_batches_wait_for_one(self) -> None:
        stream = BatchingStream(batch_size=2)
        got = Batches(stream)
        assert all(stream.publish_nowait(create_event(number)) for number in range(3))
        run(stream.stop())
        assert got.batches == [[0, 1], [2]]

    def test_a_loop_that_was_closed_without_stop_is_replaced(self) -> None:
        stream = BatchingStream(flush_interval=1.0)
        got = Batches(stream)

        async def first() -> None:
            await stream.start()
            await stream.add(create_event(0))

        async def second() -> None:
            await stream._flush()
            await stream.add(create_event(1))  # without another start
            await asyncio.sleep(5.0)
            await stream.stop()

        asyncio.run(first())
        assert stream.publish_nowait(create_event(2))
        stream.on_batch(lambda batch: None)
        run(second())
        assert got.batches == [[0, 2], [1]]
        assert got.times == [0.0, 1.0]

    def test_start_in_a_new_loop_goes_on_with_the_interval(self) -> None:
        stream = BatchingStream(flush_interval=1.0)
        got = Batches(stream)

        async def first() -> None:
            await stream.start()
            await stream.add(create_event(0))

        async def second() -> None:
            await stream.start()
            await asyncio.sleep(5.0)
            await stream.stop()

        loop = VirtualTimeLoop()
        loop.run_until_complete(first())
        loop.close()
        run(second())
        assert got.batches == [[0]]
        assert got.times == [1.0]

    def test_start_in_a_new_loop_begins_the_interval_anew(self) -> None:
        stream = BatchingStream(flush_interval=1.0)
        got = Batches(stream)

        async def first() -> None:
            await stream.start()
            await stream.add(create_event(0))
            await stream._flush()

        async def second() -> None:
            await asyncio.sleep(10.0)
            await stream.start()
            await asyncio.sleep(5.0)
            await stream.stop()

        asyncio.run(first())
        assert stream.publish_nowait(create_event(1))
        run(second())
        assert got.batches == [[0], [1]]
        assert got.times[1] == 11.0

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    def test_one_made_before_a_fork_works_in_the_child(self) -> None:
        stream = BatchingStream(flush_interval=0.001)
        got = Batches(stream)

        async def there() -> None:  # pragma: no cover - in the child
            await stream.start()
            await asyncio.sleep(0.05)  # the interval runs here
            await stream.add(create_event("child"))
            await stream.stop()

        async def here() -> int:
            await stream.start()
            await stream.add(create_event("parent"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:  # pragma: no cover - in the child
                try:
                    stream.publish_nowait(create_event("before"))
                    asyncio.run(there())
                    os._exit(0 if got.batches == [["parent", "before"], ["child"]] else 1)
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
    async def test_handlers_get_the_events_one_by_one_when_the_batch_goes_out(self) -> None:
        got: list[Any] = []

        async def later(event: Event) -> None:
            await asyncio.sleep(0.1)
            got.append(("async", event.data))

        async with BatchingStream(batch_size=2) as stream:
            as_stream = stream.as_stream()
            await as_stream.subscribe(lambda event: got.append(("sync", event.data)))
            await as_stream.subscribe(later)
            await as_stream.publish(create_event(1))
            assert got == []
            assert as_stream.publish_nowait(create_event(2))
            await asyncio.sleep(1.0)
        assert got == [("sync", 1), ("sync", 2), ("async", 1), ("async", 2)]

    async def test_topics_and_filters_choose(self) -> None:
        got: list[Any] = []
        async with BatchingStream().as_stream() as stream:
            await stream.subscribe(
                lambda event: got.append(event.data),
                topic="orders.*",
                filter_fn=lambda event: event.data > 1,
            )
            for number in range(4):
                await stream.publish(create_event(number, topic="orders.new"))
            await stream.publish(create_event(9))
        assert got == [2, 3]

    async def test_what_is_no_topic_is_refused(self) -> None:
        stream = BatchingStream()
        with pytest.raises(TopicError):
            await stream.as_stream().subscribe(print, topic="")
        assert stream._handlers == []

    async def test_what_a_handler_raises_is_logged_and_counted(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        got: list[Any] = []
        async with BatchingStream().as_stream() as stream:
            await stream.subscribe(lambda event: got.append(1 / event.data))
            for number in (1, 0, 2):
                await stream.publish(create_event(number))
        assert got == [1.0, 0.5]
        assert caplog.text.count("ZeroDivisionError") == 1
        assert stream.statistics().failed == 1

    async def test_the_last_to_leave_leaves_no_handler(self) -> None:
        stream = BatchingStream(batch_size=1)
        as_stream = stream.as_stream()
        first, second = [await as_stream.subscribe(print) for _ in range(2)]
        assert await as_stream.unsubscribe(first.id)
        assert not await as_stream.unsubscribe(first.id)
        second.cancel()
        assert not await as_stream.finish(second.id)
        assert stream._handlers == []
        await stream.add(create_event(1))
        with pytest.raises(NoBatchHandler):  # and nothing vanishes in silence
            await stream.add(create_event(2))

    async def test_finish_includes_the_batch_that_is_not_full(self) -> None:
        got: list[Any] = []

        async def handle(event: Event) -> None:
            await asyncio.sleep(0.1)
            got.append(event.data)

        async with BatchingStream() as stream:
            as_stream = stream.as_stream()
            subscription = await as_stream.subscribe(handle)
            await add_all(stream, range(3))
            assert await as_stream.finish(subscription.id)
            assert got == [0, 1, 2]
            assert stream._handlers == []

    async def test_unsubscribed_in_the_middle_of_a_batch_it_gets_no_more_of_it(self) -> None:
        got: list[Any] = []

        async def handle(event: Event) -> None:
            got.append(event.data)
            await as_stream.unsubscribe(subscription.id)

        async with BatchingStream(batch_size=3) as stream:
            as_stream = stream.as_stream()
            subscription = await as_stream.subscribe(handle)
            await add_all(stream, range(3))
        assert got == [0]

    async def test_closing_delivers_and_ends_everything(self) -> None:
        got: list[Any] = []
        stream = BatchingStream()
        as_stream = stream.as_stream()
        await as_stream.subscribe(lambda event: got.append(event.data))
        await add_all(stream, range(3))
        await as_stream.aclose()
        assert got == [0, 1, 2]
        assert as_stream.statistics().subscribers == 0
        with pytest.raises(StreamClosed):
            await as_stream.publish(create_event(1))
        with pytest.raises(StreamClosed):
            await as_stream.subscribe(print)

    async def test_closing_without_draining_gives_up(self) -> None:
        got: list[Any] = []

        async def handle(event: Event) -> None:
            await asyncio.sleep(1.0)
            got.append(event.data)

        stream = BatchingStream(batch_size=2)
        as_stream = stream.as_stream()
        await as_stream.subscribe(handle)
        for number in range(3):
            assert stream.publish_nowait(create_event(number))
        await asyncio.sleep(0.5)
        await as_stream.aclose(drain=False)
        assert now() == 0.5
        assert got == []
        assert stream.statistics().dropped == 3


async def test_statistics(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)

    def fail(batch: list[Event]) -> None:
        raise LookupError

    async with BatchingStream(batch_size=3) as stream:
        stream.on_batch(fail)
        Batches(stream, seconds=1.0)
        assert all(stream.publish_nowait(create_event(number)) for number in range(5))
        assert not stream.publish_nowait(create_event(5))
        statistics = stream.statistics()
        assert (statistics.published, statistics.refused, statistics.buffered) == (5, 1, 5)
        assert (statistics.subscribers, statistics.failed) == (2, 0)
    statistics = stream.statistics()
    assert (statistics.buffered, statistics.failed, statistics.dropped) == (0, 2, 0)
