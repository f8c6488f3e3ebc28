"""StreamProcessor: order, backpressure, failures, concurrency, endings; every source and sink."""

import asyncio
import gc
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codomyrmex.events.streaming import (
    AsyncStream,
    BatchingStream,
    Event,
    InMemoryStream,
    ProcessorStatistics,
    Retry,
    SSEStream,
    Stream,
    StreamingError,
    StreamProcessor,
    Subscription,
    TopicStream,
    WebSocketStream,
    create_event,
)
from codomyrmex.events.streaming.testing import FaultySocket, cancel_at_every_await, run

Policy = Any


def now() -> float:
    return asyncio.get_running_loop().time()


class Sink:
    """Takes events, each for so long; knows what it has, and how many it had at a time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.events: list[Event] = []
        self.times: list[float] = []
        self.busy = 0
        self.most = 0
        self._seconds = seconds

    async def __call__(self, event: Event) -> None:
        self.busy += 1
        self.most = max(self.most, self.busy)
        try:
            if self._seconds:
                await asyncio.sleep(self._seconds)
            self.events.append(event)
            self.times.append(now())
        finally:
            self.busy -= 1

    @property
    def data(self) -> list[Any]:
        return [event.data for event in self.events]


async def numbers(count: int) -> AsyncGenerator[Event, None]:
    for number in range(count):
        yield create_event(number)


async def publish_all(stream: Stream, data: range) -> None:
    for each in data:
        await stream.publish(create_event(each))


def with_data(event: Event, data: Any) -> Event:
    return create_event(data, event.type, **event.metadata)


def double(event: Event) -> Event:
    return with_data(event, event.data * 2)


async def double_later(event: Event) -> Event:
    await asyncio.sleep(0.1)
    return double(event)


def adds_up(statistics: ProcessorStatistics) -> bool:
    return statistics.received == (
        statistics.filtered + statistics.delivered + statistics.failed + statistics.in_flight
    )


async def settle() -> None:
    """Let everything run that can."""
    await asyncio.sleep(0.001)


class TestSteps:
    async def test_building_returns_the_processor_and_starting_a_subscription(self) -> None:
        stream = InMemoryStream()
        processor = StreamProcessor(stream)
        assert processor.map(double) is processor
        assert processor.filter(bool) is processor
        assert processor.sink(print) is processor
        assert processor.source is stream
        subscription = await processor.start()
        assert isinstance(subscription, Subscription)
        assert subscription.active
        await processor.stop()
        assert not subscription.active

    async def test_functions_are_called_in_the_order_in_which_they_were_added(self) -> None:
        stream, got = InMemoryStream(), list[Any]()
        processor = (
            StreamProcessor(stream)
            .filter(lambda event: event.data > 1)
            .map(double)
            .filter(lambda event: event.data < 10)
            .map(lambda event: with_data(event, event.data + 1))
            .sink(lambda event: got.append(event.data))
        )
        async with processor:
            await publish_all(stream, range(7))
        assert got == [5, 7, 9]
        assert processor.statistics() == ProcessorStatistics(7, 4, 3, 0, 0)

    @pytest.mark.parametrize("asynchronous", [False, True])
    async def test_a_sync_pipeline_is_done_when_publish_returns(self, asynchronous: bool) -> None:
        stream, got = InMemoryStream(), list[Any]()
        processor = StreamProcessor(stream).map(double).sink(lambda event: got.append(event.data))
        if asynchronous:
            processor.map(double_later)
        async with processor:
            await stream.publish(create_event(1))
            assert got == ([] if asynchronous else [2])

    async def test_async_functions_of_every_kind_are_awaited(self) -> None:
        class Doubler:
            async def __call__(self, event: Event) -> Event:
                return await double_later(event)

            async def method(self, event: Event) -> Event:
                return await double_later(event)

        async def big(limit: int, event: Event) -> bool:
            await asyncio.sleep(0.1)
            return bool(event.data >= limit)

        def returns_an_awaitable(event: Event) -> Awaitable[Event]:
            return double_later(event)

        def returns_a_future(event: Event) -> "asyncio.Future[Event]":
            return asyncio.ensure_future(double_later(event))

        stream, sink = InMemoryStream(), Sink(0.1)
        processor = (
            StreamProcessor(stream)
            .map(double_later)
            .map(Doubler())
            .map(Doubler().method)
            .filter(partial(big, 8))
            .map(returns_an_awaitable)
            .map(returns_a_future)
            .sink(sink)
        )
        async with processor:
            await publish_all(stream, range(3))
        assert sink.data == [32, 64]
        assert processor.statistics() == ProcessorStatistics(3, 1, 2, 0, 0)

    async def test_a_pipeline_that_only_looked_sync_keeps_its_order(self) -> None:
        sink = Sink()

        def sometimes_later(event: Event) -> Any:
            return double_later(event) if event.data % 2 else double(event)

        def sometimes_asked(event: Event) -> Any:
            async def later() -> bool:
                await asyncio.sleep(0.1)
                return bool(event.data != 4)

            return later() if event.data % 4 == 0 else event.data != 2

        def drop_in(event: Event) -> Any:
            return sink(event) if event.data % 3 else sink.events.append(event)

        stream = InMemoryStream()
        processor = (
            StreamProcessor(stream).map(sometimes_later).filter(sometimes_asked).sink(drop_in)
        )
        async with processor:
            await publish_all(stream, range(10))
        assert sink.data == [0, 6, 8, 10, 12, 14, 16, 18]
        assert processor.statistics() == ProcessorStatistics(10, 2, 8, 0, 0)

    @pytest.mark.parametrize("asynchronous", [False, True])
    async def test_none_leaves_the_pipeline(self, asynchronous: bool) -> None:
        stream, sink = InMemoryStream(), Sink()

        def odd(event: Event) -> Event | None:
            return event if event.data % 2 else None

        async def odd_later(event: Event) -> Event | None:
            await asyncio.sleep(0.1)
            return odd(event)

        processor = StreamProcessor(stream).map(odd_later if asynchronous else odd)
        processor.map(double).sink(sink)
        async with processor:
            await publish_all(stream, range(6))
        assert sink.data == [2, 6, 10]
        assert processor.statistics().filtered == 3

    @pytest.mark.parametrize("asynchronous", [False, True])
    @pytest.mark.parametrize(
        ("answer", "passes"), [(1, True), ("x", True), (0, False), ("", False), (None, False)]
    )
    async def test_a_filter_answers_by_truth(
        self, answer: Any, passes: bool, asynchronous: bool
    ) -> None:
        async def later(event: Event) -> Any:
            return answer

        got: list[Any] = []
        processor = (
            StreamProcessor(numbers(1))
            .filter(later if asynchronous else lambda event: answer)
            .sink(lambda event: got.append(event.data))
        )
        await processor.start()
        await processor.wait()
        assert got == ([0] if passes else [])

    async def test_a_map_may_return_what_is_no_event(self) -> None:
        got: list[Any] = []
        processor = StreamProcessor(numbers(3)).map(lambda event: event.data).sink(got.append)
        await processor.start()
        await processor.wait()
        assert got == [0, 1, 2]

    async def test_a_sink_may_return_what_it_likes(self) -> None:
        first, second = list[Any](), list[Any]()

        def keep(event: Event) -> Event:
            first.append(event.data)
            return double(event)

        processor = StreamProcessor(numbers(3)).sink(keep)
        processor.sink(lambda event: second.append(event.data))
        await processor.start()
        await processor.wait()
        assert first == second == [0, 1, 2]

    async def test_every_sink_has_an_event_before_the_next_one_is_begun(self) -> None:
        calls: list[Any] = []

        def sink(name: str, seconds: float) -> Callable[[Event], Awaitable[None]]:
            async def take(event: Event) -> None:
                await asyncio.sleep(seconds)
                calls.append((event.data, name))

            return take

        processor = StreamProcessor(numbers(3)).sink(sink("slow", 1.0)).sink(sink("quick", 0.1))
        await processor.start()
        await processor.wait()
        assert calls == [(n, name) for n in range(3) for name in ("slow", "quick")]

    async def test_without_sinks_it_is_there_for_what_its_maps_do(self) -> None:
        got: list[Any] = []
        processor = StreamProcessor(numbers(3)).map(lambda event: got.append(event.data))
        await processor.start()
        await processor.wait()
        assert got == [0, 1, 2]
        assert processor.statistics().filtered == 3

    async def test_what_is_no_sink_is_refused(self) -> None:
        with pytest.raises(TypeError, match="stream or a function"):
            StreamProcessor(InMemoryStream()).sink(cast("Any", 42))

    async def test_it_is_built_before_it_is_started(self) -> None:
        stream = InMemoryStream()
        processor = StreamProcessor(stream).map(double)
        async with processor:
            for build in (processor.map, processor.filter, processor.sink):
                with pytest.raises(RuntimeError, match="before it is started"):
                    build(double)
        processor.map(double)


class TestOrderAndBackpressure:
    async def test_a_sink_that_gets_quicker_does_not_turn_the_order_around(self) -> None:
        got: list[Any] = []

        async def sink(event: Event) -> None:
            await asyncio.sleep((50 - 10 * event.data) / 1000)
            got.append(event.data)

        stream = InMemoryStream()
        async with StreamProcessor(stream).sink(sink):
            await publish_all(stream, range(5))
        assert got == [0, 1, 2, 3, 4]

    async def test_a_slow_sink_slows_a_publisher_and_starts_no_tasks(self) -> None:
        stream, sink = InMemoryStream(), Sink(0.1)
        async with StreamProcessor(stream).sink(sink):
            before = len(asyncio.all_tasks())
            for number in range(1500):
                await stream.publish(create_event(number))
                assert len(asyncio.all_tasks()) <= before + 1
            # All but what the queue of a thousand holds has been dealt with.
            assert now() >= 0.1 * 490
            assert sink.data == list(range(len(sink.data)))
        assert sink.data == list(range(1500))

    async def test_a_sink_that_never_returns_stops_a_publisher(self) -> None:
        stream = InMemoryStream()
        forever = asyncio.Event()

        async def stuck(event: Event) -> None:
            await forever.wait()

        processor = StreamProcessor(stream).sink(stuck)
        await processor.start()
        publishing = asyncio.create_task(publish_all(stream, range(10_000)))
        await asyncio.sleep(100.0)
        assert not publishing.done()
        assert stream.statistics().published <= 1002
        assert len(asyncio.all_tasks()) == 3  # this test, the publisher, the handler
        gc.collect()
        forever.set()
        await publishing
        await processor.stop()
        assert processor.statistics().delivered == 10_000

    async def test_a_slow_sink_slows_an_async_stream(self) -> None:
        sink = Sink(0.5)
        async with AsyncStream(buffer_size=10) as stream:
            processor = StreamProcessor(stream).sink(sink)
            async with processor:
                for number in range(200):
                    assert await stream.publish(create_event(number))
                assert now() > 0.5 * 80  # what is left is in the queue of a hundred
            assert sink.data == list(range(200))

    async def test_a_slow_sink_slows_an_iterator(self) -> None:
        asked = 0

        async def events() -> AsyncIterator[Event]:
            nonlocal asked
            while True:
                asked += 1
                yield create_event(asked)

        async with StreamProcessor(events()).sink(Sink(1.0)):
            await asyncio.sleep(9.5)
            assert asked == 10


class TestConcurrency:
    def pause(self, seconds: dict[int, float], calls: list[Any] | None = None) -> Any:
        async def wait(event: Event) -> Event:
            if calls is not None:
                calls.append((now(), event.data))
            await asyncio.sleep(seconds.get(event.data, 1.0))
            return event

        return wait

    async def test_never_more_than_so_many_at_a_time_and_the_order_is_kept(self) -> None:
        stream, sink, inside = InMemoryStream(), Sink(), 0
        most = 0

        async def work(event: Event) -> Event:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(1.0 + (event.data * 7 % 5) / 10)
            inside -= 1
            return event

        processor = StreamProcessor(stream, max_concurrency=4).map(work).sink(sink)
        before = len(asyncio.all_tasks())
        async with processor:
            for number in range(40):
                await stream.publish(create_event(number))
                assert len(asyncio.all_tasks()) <= before + 5
            await asyncio.sleep(5.0)
            assert len(asyncio.all_tasks()) <= before + 5
        assert most == 4
        assert sink.data == list(range(40))
        assert sink.most == 1
        assert 10.0 < now() < 20.0

    async def test_unordered_each_leaves_as_soon_as_it_is_ready(self) -> None:
        sink = Sink(0.1)
        processor = (
            StreamProcessor(numbers(5), max_concurrency=3, ordered=False)
            .map(self.pause({0: 5.0}))
            .sink(sink)
        )
        await processor.start()
        await processor.wait()
        assert sink.data == [1, 2, 3, 4, 0]
        assert sink.most == 2  # the sink takes several at a time, too

    async def test_a_slow_one_holds_the_line_but_not_the_work(self) -> None:
        sink, calls = Sink(), list[Any]()
        processor = (
            StreamProcessor(numbers(4), max_concurrency=3)
            .map(self.pause({0: 5.0}, calls))
            .sink(sink)
        )
        await processor.start()
        await processor.wait()
        assert sink.data == [0, 1, 2, 3]
        assert sink.times == [5.0, 5.0, 5.0, 6.0]
        assert calls == [(0.0, 0), (0.0, 1), (0.0, 2), (5.0, 3)]

    @pytest.mark.parametrize("ordered", [True, False])
    @pytest.mark.parametrize("leaves", ["by a failure", "by a filter"])
    async def test_one_that_leaves_early_does_not_let_others_overtake(
        self, ordered: bool, leaves: str
    ) -> None:
        sink = Sink()

        def leave(event: Event) -> bool:
            if event.data == 1 and leaves == "by a failure":
                raise LookupError
            return bool(event.data != 1)

        processor = (
            StreamProcessor(numbers(5), max_concurrency=3, ordered=ordered)
            .filter(leave)
            .map(self.pause({0: 5.0}))
            .sink(sink)
        )
        await processor.start()
        await processor.wait()
        assert sink.data == ([0, 2, 3, 4] if ordered else [2, 3, 4, 0])
        statistics = processor.statistics()
        assert (statistics.delivered, statistics.failed + statistics.filtered) == (4, 1)

    async def test_with_raise_what_came_before_is_delivered_and_what_came_after_is_not(
        self,
    ) -> None:
        sink = Sink()

        async def work(event: Event) -> Event:
            await asyncio.sleep(3.0 if event.data == 1 else 0.5)
            if event.data == 2:
                raise LookupError(event.data)
            return event

        stream = InMemoryStream()
        processor = StreamProcessor(stream, on_error="raise", max_concurrency=5)
        processor.map(work).sink(sink)
        await processor.start()
        await publish_all(stream, range(20))
        await asyncio.sleep(20.0)
        with pytest.raises(LookupError, match="2"):
            await processor.stop()
        assert sink.data == [0, 1]
        statistics = processor.statistics()
        assert statistics.in_flight == 0
        assert adds_up(statistics)
        assert statistics.received < 20

    async def test_with_raise_the_first_failure_is_the_one_that_is_raised(self) -> None:
        async def fail(event: Event) -> None:
            await asyncio.sleep(3.0 - event.data)
            raise LookupError(event.data)

        for ordered, first in ((True, "0"), (False, "2")):
            processor = StreamProcessor(
                numbers(3), on_error="raise", max_concurrency=3, ordered=ordered
            )
            await processor.map(fail).start()
            with pytest.raises(LookupError, match=first):
                await processor.wait()
            assert processor.statistics() == ProcessorStatistics(3, 0, 0, 3, 0)

    async def test_dead_letters_come_in_order(self) -> None:
        letters = Sink()

        async def work(event: Event) -> Event:
            await asyncio.sleep(3.0 - event.data)
            raise LookupError

        processor = StreamProcessor(numbers(3), on_error=letters, max_concurrency=3).map(work)
        await processor.start()
        await processor.wait()
        assert letters.data == [0, 1, 2]

    @given(
        delays=st.lists(st.sampled_from([0.0, 0.1, 0.5, None]), min_size=1, max_size=20),
        sink_delays=st.lists(st.sampled_from([0.0, 0.2]), min_size=1, max_size=3),
        concurrency=st.integers(1, 5),
        ordered=st.booleans(),
    )
    async def test_whatever_each_takes(
        self,
        delays: list[float | None],
        sink_delays: list[float],
        concurrency: int,
        ordered: bool,
    ) -> None:
        got: list[int] = []
        letters: list[int] = []
        inside = 0

        async def work(event: Event) -> Event:
            nonlocal inside
            inside += 1
            assert inside <= concurrency
            try:
                delay = delays[event.data]
                await asyncio.sleep(delay or 0.3)
                if delay is None:
                    raise LookupError
                return event
            finally:
                inside -= 1

        async def sink(event: Event) -> None:
            await asyncio.sleep(sink_delays[event.data % len(sink_delays)])
            got.append(event.data)

        processor = (
            StreamProcessor(
                numbers(len(delays)),
                max_concurrency=concurrency,
                ordered=ordered,
                on_error=lambda event: letters.append(event.data),
            )
            .map(work)
            .sink(sink)
        )
        await processor.start()
        await processor.wait()
        assert sorted(got + letters) == list(range(len(delays)))
        assert letters == [n for n in letters if delays[n] is None]
        if ordered:
            assert got == sorted(got)
            assert letters == sorted(letters)
        assert adds_up(processor.statistics())
        assert processor.statistics().in_flight == 0

    @pytest.mark.parametrize("concurrency", [0, -1])
    def test_less_than_one_at_a_time_is_refused(self, concurrency: int) -> None:
        with pytest.raises(ValueError, match="1 or more"):
            StreamProcessor(InMemoryStream(), max_concurrency=concurrency)


WHERE = ["first map", "filter", "last map", "sink", "second sink"]
HOW = ["sync", "async", "at once in async"]


class Faulty:
    """A pipeline of which one step raises on the event 1, so often."""

    def __init__(
        self,
        where: str,
        how: str,
        on_error: Policy,
        *,
        times: int = 1000,
        max_concurrency: int = 1,
        error: BaseException | None = None,
    ) -> None:
        self.stream = InMemoryStream()
        self.got: list[Any] = []
        self.attempts: list[float] = []
        self.error = LookupError("on one") if error is None else error

        def step(event: Event) -> Any:
            if event.data == 1:
                self.attempts.append(now())
                if len(self.attempts) <= times:
                    raise self.error
            return event

        async def later(event: Event) -> Any:
            if how == "async":
                await asyncio.sleep(0)
            return step(event)

        def harmless(event: Event) -> Event:
            return event

        faulty = step if how == "sync" else later
        steps = [faulty if where == each else harmless for each in WHERE]
        self.processor = (
            StreamProcessor(self.stream, on_error=on_error, max_concurrency=max_concurrency)
            .map(steps[0])
            .filter(steps[1])
            .map(steps[2])
            .sink(steps[3])
            .sink(steps[4])
            .sink(lambda event: self.got.append(event.data))
        )

    async def process(self, count: int = 4) -> None:
        async with self.processor:
            await publish_all(self.stream, range(count))
            await asyncio.sleep(100.0)


@pytest.mark.parametrize("max_concurrency", [1, 3])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("where", WHERE)
class TestErrorPolicies:
    async def test_log(
        self, where: str, how: str, max_concurrency: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        faulty = Faulty(where, how, "log", max_concurrency=max_concurrency)
        await faulty.process()
        assert faulty.got == [0, 2, 3]
        assert faulty.processor.statistics() == ProcessorStatistics(4, 0, 3, 1, 0)
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 1
        assert "LookupError: on one" in caplog.text
        assert "left out" in caplog.text

    async def test_raise(self, where: str, how: str, max_concurrency: int) -> None:
        faulty = Faulty(where, how, "raise", max_concurrency=max_concurrency)
        subscription = await faulty.processor.start()
        await publish_all(faulty.stream, range(4))
        await asyncio.sleep(1.0)
        assert not subscription.active
        await publish_all(faulty.stream, range(4, 8))
        with pytest.raises(LookupError, match="on one"):
            await faulty.processor.stop()
        assert faulty.got == [0]
        statistics = faulty.processor.statistics()
        assert (statistics.delivered, statistics.in_flight) == (1, 0)
        assert adds_up(statistics)
        await faulty.processor.stop()  # it is said once

    async def test_retry(
        self, where: str, how: str, max_concurrency: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        retry = Retry(attempts=4, delay=1.0, factor=3.0)
        faulty = Faulty(where, how, retry, times=3, max_concurrency=max_concurrency)
        await faulty.process()
        assert faulty.got == [0, 1, 2, 3]
        begun = faulty.attempts[0]
        assert [at - begun for at in faulty.attempts] == [0.0, 1.0, 4.0, 13.0]
        assert faulty.processor.statistics() == ProcessorStatistics(4, 0, 4, 0, 0)
        levels = [record.levelno for record in caplog.records]
        assert levels == [logging.WARNING] * 3

    async def test_retry_and_then_log(
        self, where: str, how: str, max_concurrency: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        faulty = Faulty(where, how, Retry(attempts=2), max_concurrency=max_concurrency)
        await faulty.process()
        assert faulty.got == [0, 2, 3]
        assert [at - faulty.attempts[0] for at in faulty.attempts] == [0.0, pytest.approx(0.1)]
        assert "left out" in caplog.text

    async def test_retry_and_then_raise(self, where: str, how: str, max_concurrency: int) -> None:
        retry = Retry(attempts=2, delay=0.0, then="raise")
        faulty = Faulty(where, how, retry, max_concurrency=max_concurrency)
        with pytest.raises(LookupError):
            await faulty.process()
        assert faulty.got == [0]
        assert len(faulty.attempts) == 2

    async def test_retry_and_then_a_sink(self, where: str, how: str, max_concurrency: int) -> None:
        letters = Sink(0.1)
        retry = Retry(attempts=2, delay=0.0, then=letters)
        faulty = Faulty(where, how, retry, max_concurrency=max_concurrency)
        await faulty.process()
        assert faulty.got == [0, 2, 3]
        assert letters.data == [1]

    @pytest.mark.parametrize("asynchronous", [False, True])
    async def test_a_sink_for_dead_letters(
        self, where: str, how: str, max_concurrency: int, asynchronous: bool
    ) -> None:
        later = Sink(0.1)
        letters: list[Event] = later.events
        on_error: Policy = later if asynchronous else letters.append
        faulty = Faulty(where, how, on_error, max_concurrency=max_concurrency)
        await faulty.process()
        assert faulty.got == [0, 2, 3]
        (letter,) = letters
        assert letter.data == 1
        assert letter.metadata["error"] == "LookupError: on one"
        name = "step" if how == "sync" else "later"
        assert letter.metadata["failed_in"].endswith(f"<locals>.{name}")
        assert faulty.processor.statistics() == ProcessorStatistics(4, 0, 3, 1, 0)

    async def test_a_cancellation_of_something_else_is_a_failure_like_others(
        self, where: str, how: str, max_concurrency: int
    ) -> None:
        error = asyncio.CancelledError()
        faulty = Faulty(where, how, "log", max_concurrency=max_concurrency, error=error)
        await faulty.process()
        assert faulty.got == [0, 2, 3]
        assert faulty.processor.statistics().failed == 1


class TestFailures:
    async def test_a_cancellation_of_something_else_is_not_raised_as_one(self) -> None:
        faulty = Faulty("sink", "async", "raise", error=asyncio.CancelledError())
        with pytest.raises(StreamingError, match="was cancelled") as caught:
            await faulty.process()
        assert isinstance(caught.value.__cause__, asyncio.CancelledError)

    async def test_a_dead_letter_is_the_event_as_the_source_gave_it(self) -> None:
        letters: list[Event] = []
        event = create_event({"n": 1}, "order.created", topic="orders")

        def fail(event: Event) -> None:
            raise ValueError("no")

        stream = InMemoryStream()
        async with StreamProcessor(stream, on_error=letters.append).map(double_fields).sink(fail):
            await stream.publish(event)
        (letter,) = letters
        assert letter.id == event.id
        assert letter.timestamp == event.timestamp
        assert (letter.type, letter.data) == ("order.created", {"n": 1})
        assert letter.metadata.pop("error") == "ValueError: no"
        assert letter.metadata.pop("failed_in").endswith("<locals>.fail")
        assert letter.metadata == {"topic": "orders"} == event.metadata

    async def test_a_dead_letter_names_what_has_no_name(self) -> None:
        class Step:
            def __call__(self, event: Event) -> None:
                raise ValueError

            def __repr__(self) -> str:
                return "the step"

        letters: list[Event] = []
        processor = StreamProcessor(numbers(1), on_error=letters.append).map(Step())
        await processor.start()
        await processor.wait()
        assert letters[0].metadata["failed_in"] == "the step"

    async def test_a_control_event_can_become_a_dead_letter(self) -> None:
        letters: list[Event] = []

        def fail(event: Event) -> None:
            raise ValueError(event.type)

        async with AsyncStream() as stream:
            subscription = await stream.subscribe(1)
            for number in range(3):
                await stream.publish(create_event(number))
            await settle()
            processor = StreamProcessor(stream.consume(subscription), on_error=letters.append)
            async with processor.map(fail):
                await settle()
        assert [str(letter.type) for letter in letters] == ["message", "stream.lost"]

    @pytest.mark.parametrize("asynchronous", [False, True])
    async def test_a_dead_letter_sink_that_fails_is_logged(
        self, asynchronous: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(event: Event) -> None:
            raise LookupError("the first")

        def fail_too(event: Event) -> None:
            raise OSError("the second")

        async def fail_later(event: Event) -> None:
            fail_too(event)

        on_error = fail_later if asynchronous else fail_too
        processor = StreamProcessor(numbers(2), on_error=on_error).sink(fail)
        await processor.start()
        await processor.wait()
        assert "the dead-letter sink failed" in caplog.text
        assert "OSError: the second" in caplog.text
        assert "LookupError: the first" in caplog.text
        assert processor.statistics() == ProcessorStatistics(2, 0, 0, 2, 0)

    async def test_dead_letters_go_to_streams_as_well(self) -> None:
        graveyard = InMemoryStream()
        faulty = Faulty("sink", "sync", graveyard)
        await faulty.process()
        assert [event.data for event in graveyard.get_recent_events()] == [1]

    async def test_later_events_wait_while_one_is_tried_again(self) -> None:
        faulty = Faulty("sink", "sync", Retry(attempts=3, delay=1.0, factor=1.0), times=2)
        async with faulty.processor:
            await publish_all(faulty.stream, range(4))
            await asyncio.sleep(0.5)
            assert faulty.got == [0]
            assert faulty.processor.statistics().in_flight == 1
        assert faulty.got == [0, 1, 2, 3]
        assert now() == 2.0

    @pytest.mark.parametrize(
        "make",
        [
            lambda: Retry(attempts=0),
            lambda: Retry(delay=-1.0),
            lambda: Retry(factor=-1.0),
            lambda: StreamProcessor(InMemoryStream(), on_error=cast("Any", "explode")),
            lambda: StreamProcessor(InMemoryStream(), on_error=Retry(then=cast("Any", "nothing"))),
        ],
    )
    def test_a_policy_that_makes_no_sense_is_refused(self, make: Callable[[], object]) -> None:
        with pytest.raises(ValueError, match=r"attempts|on_error"):
            make()

    async def test_a_policy_that_is_no_sink_is_refused(self) -> None:
        with pytest.raises(TypeError):
            StreamProcessor(InMemoryStream(), on_error=cast("Any", 42))

    async def test_what_the_block_raises_is_not_hidden(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        faulty = Faulty("sink", "sync", "raise")

        async def block() -> None:
            async with faulty.processor:
                await publish_all(faulty.stream, range(3))
                raise KeyError("of the block")

        with pytest.raises(KeyError, match="of the block"):
            await block()
        assert "LookupError: on one" in caplog.text

    async def test_what_the_block_raises_comes_out_of_it(self) -> None:
        async def block() -> None:
            async with StreamProcessor(InMemoryStream()):
                raise KeyError

        with pytest.raises(KeyError):
            await block()


def double_fields(event: Event) -> Event:
    return with_data(event, {key: value * 2 for key, value in event.data.items()})


class TestLifeCycle:
    async def test_stop_finishes_what_was_received(self) -> None:
        stream, sink = InMemoryStream(), Sink(1.0)
        processor = StreamProcessor(stream).sink(sink)
        await processor.start()
        await publish_all(stream, range(10))
        await processor.stop()
        assert sink.data == list(range(10))
        await stream.publish(create_event("after"))
        await asyncio.sleep(10.0)
        assert sink.data == list(range(10))
        assert stream.statistics().subscribers == 0

    async def test_stop_twice_and_before_any_start(self) -> None:
        processor = StreamProcessor(InMemoryStream())
        await processor.stop()
        await processor.start()
        await processor.stop()
        await processor.stop()

    async def test_two_stops_at_a_time_both_wait(self) -> None:
        stream, sink = InMemoryStream(), Sink(1.0)
        processor = StreamProcessor(stream).sink(sink)
        await processor.start()
        await publish_all(stream, range(3))
        first, second = asyncio.create_task(processor.stop()), asyncio.create_task(processor.stop())
        await second
        assert sink.data == [0, 1, 2]
        await first

    async def test_a_second_start_is_refused(self) -> None:
        async with StreamProcessor(InMemoryStream()) as processor:
            with pytest.raises(RuntimeError, match="running already"):
                await processor.start()

    async def test_it_can_be_started_again(self) -> None:
        stream, sink = InMemoryStream(), Sink(0.1)
        processor = StreamProcessor(stream).sink(sink)
        for number in range(3):
            async with processor:
                await stream.publish(create_event(number))
        assert sink.data == [0, 1, 2]
        assert processor.statistics() == ProcessorStatistics(3, 0, 3, 0, 0)

    async def test_it_can_be_started_again_after_a_failure(self) -> None:
        faulty = Faulty("sink", "async", "raise", times=1)
        with pytest.raises(LookupError):
            await faulty.process()
        faulty.got.clear()
        await faulty.process()
        assert faulty.got == [0, 1, 2, 3]

    async def test_cancelling_the_subscription_ends_it_at_once(self) -> None:
        stream, sink = InMemoryStream(), Sink(1.0)
        processor = StreamProcessor(stream).sink(sink)
        subscription = await processor.start()
        await publish_all(stream, range(5))
        await asyncio.sleep(1.5)
        subscription.cancel()
        await processor.stop()
        await stream.aclose()
        assert len(sink.data) <= 2

    @pytest.mark.parametrize("max_concurrency", [1, 3])
    @pytest.mark.parametrize("source", ["stream", "iterator", "async stream"])
    async def test_a_stop_that_is_cancelled_interrupts_what_is_in_work(
        self, source: str, max_concurrency: int
    ) -> None:
        sink = Sink(1000.0)
        async with InMemoryStream() as memory, AsyncStream() as buffered:
            sources: dict[str, Any] = {
                "stream": memory,
                "iterator": numbers(10),
                "async stream": buffered,
            }
            processor = StreamProcessor(sources[source], max_concurrency=max_concurrency)
            await processor.sink(sink).start()
            for number in range(10):
                await memory.publish(create_event(number))
                await buffered.publish(create_event(number))
            await asyncio.sleep(1.0)
            stopping = asyncio.create_task(processor.stop())
            await asyncio.sleep(1.0)
            stopping.cancel()
            with pytest.raises(asyncio.CancelledError):
                await stopping
            await settle()
            assert sink.busy == 0
            assert now() < 3.0
            statistics = processor.statistics()
            assert statistics.in_flight == 0
            assert adds_up(statistics)
            await processor.stop()

    async def test_a_stop_that_is_cancelled_leaves_a_batch_to_its_stream(self) -> None:
        """A batch is handled for all who want it: the processor gives up only what is its own."""
        sink = Sink(10.0)
        async with BatchingStream(batch_size=2) as stream:
            processor = StreamProcessor(stream).sink(sink)
            await processor.start()
            for number in range(2):
                assert stream.publish_nowait(create_event(number))
            await asyncio.sleep(1.0)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(processor.stop(), 1.0)
            assert now() == 2.0
        assert sink.data == [0]

    async def test_a_stop_that_is_cancelled_interrupts_the_dead_letter_sink(self) -> None:
        letters = Sink(1000.0)
        faulty = Faulty("sink", "async", letters)
        await faulty.processor.start()
        await publish_all(faulty.stream, range(3))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(faulty.processor.stop(), 1.0)
        await settle()
        assert letters.busy == 0
        assert faulty.processor.statistics() == ProcessorStatistics(2, 0, 1, 1, 0)

    @pytest.mark.parametrize("max_concurrency", [1, 3])
    @pytest.mark.parametrize("source", ["stream", "iterator", "async stream"])
    async def test_a_function_of_the_pipeline_may_stop_it(
        self, source: str, max_concurrency: int
    ) -> None:
        got: list[Any] = []

        async def sink(event: Event) -> None:
            got.append(event.data)
            if event.data == 1:
                await processor.stop()
                got.append("stopped")

        async with asyncio.timeout(1000.0), InMemoryStream() as memory, AsyncStream() as buffered:
            sources: dict[str, Any] = {
                "stream": memory,
                "iterator": numbers(10),
                "async stream": buffered,
            }
            processor = StreamProcessor(sources[source], max_concurrency=max_concurrency)
            await processor.sink(sink).start()
            for number in range(3):
                await memory.publish(create_event(number))
                await buffered.publish(create_event(number))
            await asyncio.sleep(1.0)
            await processor.stop()
        assert got[:2] == [0, 1]
        assert "stopped" in got

    @pytest.mark.parametrize("max_concurrency", [1, 3])
    def test_cancelled_anywhere_nothing_is_left_behind(self, max_concurrency: int) -> None:
        closed: list[str] = []
        processors: list[StreamProcessor] = []

        async def events() -> AsyncIterator[Event]:
            try:
                for number in range(5):
                    yield create_event(number)
                    await asyncio.sleep(0.05)
            finally:
                await asyncio.sleep(0)
                closed.append("closed")

        async def scenario() -> None:
            closed.clear()
            processors.clear()
            stream = InMemoryStream()
            source = events()
            for each in (stream, source):
                processor = StreamProcessor(
                    each,
                    max_concurrency=max_concurrency,
                    on_error=Retry(attempts=2, delay=0.1, then=Sink(0.1)),
                )
                processors.append(processor.map(double_later).sink(fails_on_four))
            async with processors[0], processors[1]:
                await publish_all(stream, range(3))
                await asyncio.sleep(0.3)
            await processors[1].wait()

        async def fails_on_four(event: Event) -> None:
            await asyncio.sleep(0.05)
            if event.data == 4:
                raise LookupError

        def check() -> None:
            assert len(closed) <= 1
            for processor in processors:
                statistics = processor.statistics()
                assert statistics.in_flight == 0
                assert adds_up(statistics)

        assert cancel_at_every_await(scenario, check=check) >= 3

    @pytest.mark.real_time
    @pytest.mark.parametrize("max_concurrency", [1, 3])
    async def test_it_can_be_stopped_from_another_loop(self, max_concurrency: int) -> None:
        stream, sink = InMemoryStream(), Sink(0.02)
        processor = StreamProcessor(stream, max_concurrency=max_concurrency).sink(sink)
        await processor.start()
        await publish_all(stream, range(5))
        await asyncio.to_thread(asyncio.run, processor.stop())
        assert sink.data == list(range(5))

    @pytest.mark.real_time
    async def test_a_stop_in_another_loop_can_be_cancelled(self) -> None:
        stream, sink = InMemoryStream(), Sink(1000.0)
        processor = StreamProcessor(stream, max_concurrency=3).sink(sink)
        await processor.start()
        await publish_all(stream, range(5))
        await asyncio.sleep(0.01)

        async def stop() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(processor.stop(), 0.01)

        await asyncio.to_thread(asyncio.run, stop())
        async with asyncio.timeout(10.0):
            while sink.busy:  # noqa: ASYNC110 - tasks of the processor, which nobody else knows
                await asyncio.sleep(0.005)

    def test_what_was_in_work_in_a_loop_that_was_closed_is_given_up(self) -> None:
        stream, sink = InMemoryStream(), Sink(1000.0)
        processor = StreamProcessor(stream, max_concurrency=3).sink(sink)

        async def first() -> None:
            await processor.start()
            await publish_all(stream, range(3))
            await asyncio.sleep(0)

        async def second() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(processor.stop(), 1.0)

        loop = asyncio.new_event_loop()
        loop.run_until_complete(first())
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.wait(tasks))
        loop.close()
        run(processor.stop())
        assert processor.statistics().delivered == 0


class TestIterators:
    async def test_wait_until_all_is_processed(self) -> None:
        sink = Sink(1.0)
        processor = StreamProcessor(numbers(5)).sink(sink)
        await processor.start()
        await processor.wait()
        assert sink.data == [0, 1, 2, 3, 4]
        assert now() == 5.0
        await processor.wait()
        await processor.stop()

    @pytest.mark.parametrize("max_concurrency", [1, 2])
    async def test_wait_raises_what_the_source_raised(self, max_concurrency: int) -> None:
        async def events() -> AsyncIterator[Event]:
            yield create_event(0)
            yield create_event(1)
            raise OSError("gone")

        sink = Sink(1.0)
        processor = StreamProcessor(events(), max_concurrency=max_concurrency).sink(sink)
        await processor.start()
        with pytest.raises(OSError, match="gone"):
            await processor.wait()
        assert sink.data == [0, 1]

    async def test_wait_raises_what_a_function_raised_before_what_the_source_did(self) -> None:
        async def events() -> AsyncIterator[Event]:
            yield create_event(0)
            raise OSError

        def fail(event: Event) -> None:
            raise LookupError

        processor = StreamProcessor(events(), on_error="raise").map(fail)
        await processor.start()
        with pytest.raises(LookupError):
            await processor.wait()

    async def test_wait_is_for_iterators_that_were_started(self) -> None:
        with pytest.raises(RuntimeError, match="async iterator"):
            await StreamProcessor(numbers(1)).wait()
        async with StreamProcessor(InMemoryStream()) as processor:
            with pytest.raises(RuntimeError, match="async iterator"):
                await processor.wait()

    async def test_stop_closes_the_generator(self) -> None:
        closed: list[float] = []

        async def events() -> AsyncIterator[Event]:
            try:
                while True:
                    yield create_event(1)
                    await asyncio.sleep(1.0)
            finally:
                await asyncio.sleep(0.25)
                closed.append(now())

        async with StreamProcessor(events()).sink(Sink()):
            await asyncio.sleep(3.5)
        assert closed == [3.75]

    async def test_a_failure_with_raise_closes_the_generator(self) -> None:
        closed: list[str] = []

        async def events() -> AsyncIterator[Event]:
            try:
                while True:
                    yield create_event(1)
            finally:
                closed.append("closed")

        def fail(event: Event) -> None:
            raise LookupError

        processor = StreamProcessor(events(), on_error="raise").map(fail)
        await processor.start()
        with pytest.raises(LookupError):
            await processor.wait()
        assert closed == ["closed"]
        assert processor.statistics().received == 1

    async def test_cancelling_the_subscription_interrupts_it(self) -> None:
        sink = Sink(10.0)
        processor = StreamProcessor(numbers(5)).sink(sink)
        subscription = await processor.start()
        await asyncio.sleep(15.0)
        subscription.cancel()
        await processor.wait()
        assert sink.data == [0]
        assert now() == 15.0

    async def test_what_can_be_iterated_again_can_be_started_again(self) -> None:
        class Numbers:
            def __aiter__(self) -> AsyncIterator[Event]:
                return numbers(2)

        sink = Sink()
        processor = StreamProcessor(Numbers()).sink(sink)
        for _ in range(2):
            await processor.start()
            await processor.wait()
        assert sink.data == [0, 1, 0, 1]

    async def test_what_gives_no_events_is_refused(self) -> None:
        processor = StreamProcessor([create_event(1)])
        with pytest.raises(TypeError, match="stream or an async iterator"):
            await processor.start()
        await processor.stop()


class Minimal(Stream):
    """A stream of somebody else: it has only what every stream must have."""

    def __init__(self) -> None:
        self.published: list[Event] = []
        self._subscription = Subscription()

    async def publish(self, event: Event) -> None:
        self.published.append(event)
        if self._subscription.should_receive(event) and self._subscription.handler is not None:
            result = self._subscription.handler(event)
            if result is not None:
                await result

    async def subscribe(self, handler: Any, topic: Any = "*", filter_fn: Any = None) -> Any:
        self._subscription = Subscription(handler=handler, topic=topic, filter_fn=filter_fn)
        return self._subscription

    async def unsubscribe(self, subscription_id: str) -> bool:
        self._subscription.active = False
        return True


async def test_a_stream_that_replays_to_a_new_subscriber_and_what_that_raises() -> None:
    class Replaying(Minimal):
        async def subscribe(self, handler: Any, topic: Any = "*", filter_fn: Any = None) -> Any:
            subscription = await super().subscribe(handler, topic, filter_fn)
            for number in range(2):
                await self.publish(create_event(number))
            return subscription

    got: list[Any] = []
    stream = Replaying()
    processor = StreamProcessor(stream, on_error="raise").map(lambda event: 1 / event.data)
    subscription = await processor.sink(got.append).start()
    assert not subscription.active
    await stream.publish(create_event(2))
    with pytest.raises(ZeroDivisionError):
        await processor.stop()
    assert got == [1.0]  # what it was sent before it could say no


class TestEverySource:
    async def process(self, source: Any, publish: Callable[[Event], Awaitable[Any]]) -> None:
        """Sync, async, and several at a time: each gets every event, to the last one."""
        sinks = [Sink(), Sink(0.1), Sink(0.1)]
        quick: list[Any] = []
        processors = [
            StreamProcessor(source).map(double).sink(lambda event: quick.append(event.data)),
            StreamProcessor(source).map(double).sink(sinks[1]),
            StreamProcessor(source, max_concurrency=3).map(double_later).sink(sinks[2]),
        ]
        for processor in processors:
            await processor.start()
        for number in range(5):
            await publish(create_event(number, topic="numbers"))
        for processor in processors:
            await processor.stop()
        for got in (quick, sinks[1].data, sinks[2].data):
            assert got == [0, 2, 4, 6, 8]
        await publish(create_event(99, topic="numbers"))
        await asyncio.sleep(1.0)
        assert quick == [0, 2, 4, 6, 8]

    async def test_in_memory_stream(self) -> None:
        async with InMemoryStream() as stream:
            await self.process(stream, stream.publish)

    async def test_sse_stream(self) -> None:
        async with SSEStream() as stream:
            await self.process(stream, stream.publish)

    async def test_topic_stream(self) -> None:
        async with TopicStream() as stream:
            await self.process(stream, lambda event: stream.publish("numbers", event))
            await self.process(stream.topic("one"), lambda event: stream.publish("one", event))

    async def test_async_stream(self) -> None:
        async with AsyncStream() as stream:
            await self.process(stream, stream.publish)
            await self.process(stream.as_stream(), stream.publish)

    async def test_websocket_stream(self) -> None:
        async with WebSocketStream() as stream:
            await self.process(stream, stream.broadcast)

    async def test_batching_stream(self) -> None:
        async with BatchingStream(batch_size=3) as stream:
            await self.process(stream, stream.add)

    async def test_a_stream_of_somebody_else(self) -> None:
        stream, sink = Minimal(), Sink(0.1)
        async with StreamProcessor(stream).map(double).sink(sink):
            await publish_all(stream, range(3))
        await publish_all(stream, range(3))
        assert sink.data == [0, 2, 4]


class TestEverySink:
    async def process(self, *sinks: Any) -> None:
        for max_concurrency in (1, 3):
            processor = StreamProcessor(numbers(3), max_concurrency=max_concurrency)
            for sink in sinks:
                processor.sink(sink)
            processor.map(lambda event: event.with_topic("numbers"))
            await processor.start()
            await processor.wait()
            assert processor.statistics().delivered == 3

    async def test_functions(self) -> None:
        got, sink = list[Any](), Sink(0.1)
        await self.process(lambda event: got.append(event.data), sink)
        assert got == sink.data == [0, 1, 2] * 2

    async def test_streams_with_handlers(self) -> None:
        got: list[Any] = []
        async with InMemoryStream() as memory, SSEStream() as sse, TopicStream() as topics:
            for stream in (memory, sse, topics.as_stream()):
                await stream.subscribe(lambda event: got.append(event.data))
            await self.process(memory, sse, topics)
            assert topics.list_topics() == ["numbers"]
        assert got == [n for n in (0, 1, 2) for _ in range(3)] * 2

    async def test_async_stream(self) -> None:
        got: list[Any] = []
        async with AsyncStream() as stream:
            as_stream = stream.as_stream()
            await as_stream.subscribe(lambda event: got.append(event.data))
            await self.process(stream, as_stream)
            await as_stream.aclose()
        assert got == [n for n in (0, 1, 2) for _ in range(2)] * 2

    async def test_websocket_stream(self) -> None:
        socket = FaultySocket()
        async with WebSocketStream() as stream:
            await stream.connect(socket, "a")
            await self.process(stream)
        assert [Event.from_json(text).data for text in socket.sent] == [0, 1, 2] * 2

    async def test_batching_stream(self) -> None:
        batches: list[list[Any]] = []
        async with BatchingStream(batch_size=2) as stream:
            stream.on_batch(lambda batch: batches.append([event.data for event in batch]))
            await self.process(stream)
        assert batches == [[0, 1], [2, 0], [1, 2]]

    async def test_a_stream_of_somebody_else(self) -> None:
        stream = Minimal()
        await self.process(stream)
        assert len(stream.published) == 6

    async def test_a_full_sink_slows_the_source(self) -> None:
        target, sink = InMemoryStream(), Sink(1.0)
        source = InMemoryStream()
        await target.subscribe(sink, buffer_size=2)
        async with target, StreamProcessor(source).sink(target):
            async with asyncio.timeout(10_000.0):
                await publish_all(source, range(1200))
            assert now() > 100.0
        assert sink.data == list(range(1200))

    async def test_pipelines_can_be_chained(self) -> None:
        first, second, got = InMemoryStream(), InMemoryStream(), list[Any]()
        async with (
            StreamProcessor(second).map(double).sink(lambda event: got.append(event.data)),
            StreamProcessor(first).map(double_later).sink(second),
        ):
            await publish_all(first, range(3))
        assert got == [0, 4, 8]


class TestCircles:
    @pytest.mark.parametrize("how", ["the stream", "its publish"])
    async def test_a_source_that_is_its_own_sink_is_refused(self, how: str) -> None:
        stream = InMemoryStream()
        processor = StreamProcessor(stream).map(double)
        processor.sink(stream if how == "the stream" else stream.publish)
        with pytest.raises(ValueError, match="its own source"):
            await processor.start()
        assert stream.statistics().subscribers == 0

    @pytest.mark.parametrize("kind", [TopicStream, AsyncStream, BatchingStream, WebSocketStream])
    @pytest.mark.parametrize("views", ["sink", "source", "both"])
    async def test_however_it_is_seen(self, kind: type[Any], views: str) -> None:
        stream = kind()
        source = stream if views == "sink" else stream.as_stream()
        target = stream if views == "source" else stream.as_stream()
        processor = StreamProcessor(source).map(double).sink(target)
        with pytest.raises(ValueError, match="its own source"):
            await processor.start()
        assert stream.statistics().subscribers == 0
        await stream.as_stream().aclose()

    async def test_all_topics_do_not_lead_to_one_of_them(self) -> None:
        topics = TopicStream()
        with pytest.raises(ValueError, match="its own source"):
            await StreamProcessor(topics).sink(topics.topic("b")).start()

    async def test_one_topic_leads_to_another(self) -> None:
        topics, got = TopicStream(), list[Any]()
        await topics.subscribe("b", lambda event: got.append(event.data))
        async with StreamProcessor(topics.topic("a")).map(double).sink(topics.topic("b")):
            await topics.publish("a", create_event(2))
        assert got == [4]

    async def test_unless_a_filter_ends_the_circle(self) -> None:
        stream, got = InMemoryStream(), list[Any]()
        await stream.subscribe(lambda event: got.append(event.data))
        processor = StreamProcessor(stream).filter(lambda event: event.data < 20).map(double)
        async with processor.sink(stream):
            await stream.publish(create_event(3))
        assert got == [3, 6, 12, 24]

    async def test_in_an_async_pipeline_too(self) -> None:
        stream, got = InMemoryStream(), list[Any]()
        await stream.subscribe(lambda event: got.append(event.data))
        processor = StreamProcessor(stream).filter(lambda event: event.data < 20).map(double_later)
        async with asyncio.timeout(100.0), processor.sink(stream):
            await stream.publish(create_event(3))
            await asyncio.sleep(10.0)
        assert got == [3, 6, 12, 24]

    async def test_equal_is_not_the_same(self) -> None:
        class Anything(InMemoryStream):
            def __eq__(self, other: object) -> bool:
                return True

            __hash__ = InMemoryStream.__hash__

        source, target = Anything(), Anything()
        async with StreamProcessor(source).sink(target):
            await source.publish(create_event(1))
        assert len(target.get_recent_events()) == 1


async def test_statistics_add_up_at_every_moment() -> None:
    stream, sink = InMemoryStream(), Sink(1.0)

    def work(event: Event) -> Event | None:
        if event.data % 3 == 0:
            raise LookupError
        return event if event.data % 3 == 1 else None

    processor = StreamProcessor(stream, max_concurrency=2).map(work).sink(sink)
    async with processor:
        await publish_all(stream, range(12))
        for _ in range(50):
            await asyncio.sleep(0.1)
            statistics = processor.statistics()
            assert adds_up(statistics)
            assert 0 <= statistics.in_flight <= 2
    assert processor.statistics() == ProcessorStatistics(12, 4, 4, 4, 0)
