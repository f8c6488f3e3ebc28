"""`LogStream`: what it does beyond what every stream promises."""

import asyncio
import logging
from contextlib import suppress
from typing import Any

import pytest

from codomyrmex.events.streaming import (
    EncodeError,
    Event,
    IdConflict,
    StreamClosed,
    StreamProcessor,
    TopicError,
    create_event,
)
from codomyrmex.events.streaming.log import (
    EARLIEST,
    LogStream,
    MemoryLog,
    Record,
    Retention,
    turns,
)
from codomyrmex.events.streaming.testing import cancel_at_every_await, run
from tests.conformance.test_logs import event, events, read_all


async def publish_all(stream: LogStream, *names: str) -> None:
    for each in events(*names):
        await stream.publish(each)


class Collector:
    """A handler that keeps the ids of what it gets, and what it is told is missing."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.got: list[Any] = []
        self._seconds = seconds

    async def __call__(self, event: Event) -> None:
        await asyncio.sleep(self._seconds)
        self.got.append(event.data if event.is_control else event.id)


async def settle() -> None:
    await asyncio.sleep(0.001)


class TestSubscriptions:
    async def test_begin_now_or_after_a_cursor_or_with_the_last_few(self) -> None:
        async with LogStream("memory://") as stream:
            await publish_all(stream, "a/1", "b/1", "a/2")
            now, all_of_them, later, last = (Collector() for _ in range(4))
            await stream.subscribe(now, "a")
            await stream.subscribe(all_of_them, after=EARLIEST)
            await stream.subscribe(later, "*", after="a/1")
            await stream.subscribe(last, ["a", "b"], last=2)
            await publish_all(stream, "a/3")
        assert now.got == ["a/3"]
        assert all_of_them.got == ["a/1", "b/1", "a/2", "a/3"]
        assert later.got == ["b/1", "a/2", "a/3"]
        assert last.got == ["b/1", "a/2", "a/3"]

    async def test_are_told_what_they_cannot_have_whatever_their_topics_and_filters(self) -> None:
        log = MemoryLog(Retention(count=2))
        async with LogStream(log) as stream:
            await publish_all(stream, "a/1", "a/2", "a/3", "a/4")
            got, limited = Collector(), Collector()
            await stream.subscribe(got, "a", lambda event: event.id != "a/3", after="a/1")
            await stream.subscribe(limited, after=EARLIEST, replay_limit=1)
            await settle()
        assert got.got == [{"after": "a/1", "reason": "trimmed", "missed": None}, "a/4"]
        assert limited.got == [{"after": "earliest", "reason": "limit", "missed": 1}, "a/4"]

    async def test_match_any_topic_of_a_record(self) -> None:
        async with MemoryLog() as log, LogStream(log) as stream:
            got = Collector()
            await stream.subscribe(got, "second")
            await log.append([Record.of(Event(id="1"), topics=["first", "second"])])
            await settle()
            assert got.got == ["1"]

    async def test_read_at_their_own_pace_and_lose_nothing(self) -> None:
        async with LogStream("memory://") as stream:
            slow, quick = Collector(1.0), Collector()
            await stream.subscribe(slow)
            await stream.subscribe(quick)
            await publish_all(stream, *(str(number) for number in range(50)))
            await settle()
            assert quick.got == [str(number) for number in range(50)]
            assert slow.got == []
        assert slow.got == quick.got

    async def test_finish_deals_with_what_was_published_and_no_more(self) -> None:
        async with LogStream("memory://") as stream:
            got = Collector(1.0)
            subscription = await stream.subscribe(got)
            await publish_all(stream, "1", "2")
            finishing = asyncio.create_task(stream.finish(subscription.id))
            await asyncio.sleep(0.5)
            await publish_all(stream, "3", "4")
            assert await finishing
            assert not subscription.active
            assert not await stream.finish(subscription.id)
            assert not await stream.unsubscribe(subscription.id)
            await asyncio.sleep(10)
            assert got.got == ["1", "2"]

    async def test_one_whose_place_cannot_be_found_leaves_nothing(self) -> None:
        async with MemoryLog() as log, LogStream(log) as stream:
            with pytest.raises(TopicError):
                await stream.subscribe(print, "")
            with pytest.raises(ValueError, match="0 or more"):
                await stream.subscribe(print, last=-1)
            assert log.statistics().readers == stream.statistics().subscribers == 0

    async def test_without_a_handler_nothing_happens(self) -> None:
        async with LogStream("memory://") as stream:
            subscription = await stream.subscribe(print)
            subscription.handler = None
            await publish_all(stream, "1")
            await settle()
            assert stream.statistics().failed == 0

    async def test_what_cannot_be_decoded_is_logged_and_the_rest_delivered(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with MemoryLog() as log, LogStream(log) as stream:
            got = Collector()
            await stream.subscribe(got)
            broken = Record.of(event("broken"))._replace(body=b"{")
            await log.append([*events("1"), broken, *events("2")])
            await settle()
            assert got.got == ["1", "2"]
            assert stream.statistics().failed == 1
        assert "event broken in the log cannot be decoded" in caplog.text

    async def test_an_event_is_decoded_once_for_all_and_kept_for_a_while(self) -> None:
        async with LogStream("memory://?count=5000") as stream:
            got: list[Event] = []
            for _ in range(2):
                await stream.subscribe(got.append)
            await stream.publish(create_event(["shared"]))
            await settle()
            assert got[0] is got[1]
            await publish_all(stream, *(str(number) for number in range(2500)))
            await settle()
            assert len(got) == 2 * 2501
            assert len(stream._decoded) <= 1000

    async def test_few_large_ones_are_kept(self) -> None:
        async with LogStream("memory://") as stream:
            got: list[Event] = []
            await stream.subscribe(got.append)
            for _ in range(20):
                await stream.publish(create_event("x" * 1_000_000))
            await settle()
            assert len(got) == 20
            assert 1 <= len(stream._decoded) <= 8


class TestEvents:
    async def test_are_an_iterator_from_a_place_on(self) -> None:
        async with LogStream("memory://") as stream:
            await publish_all(stream, "a/1", "b/1", "a/2")
            async with stream.events("a", after="a/1") as later, stream.events(last=2) as last:
                assert [(await anext(later)).id for _ in range(1)] == ["a/2"]
                assert [(await anext(last)).id for _ in range(2)] == ["b/1", "a/2"]
                waiting = asyncio.create_task(anext(later))
                await settle()
                await publish_all(stream, "b/2", "a/3")
                assert (await waiting).id == "a/3"
            assert stream.log.statistics().readers == 0

    async def test_begin_when_the_block_is_entered(self) -> None:
        async with LogStream("memory://") as stream, stream.events() as entered:
            await publish_all(stream, "1")
            assert (await anext(entered)).id == "1"

    async def test_tell_of_gaps(self) -> None:
        async with LogStream("memory://") as stream, stream.events(after="never") as from_never:
            gap = await anext(from_never)
            assert gap.type == "stream.gap"
            assert gap.data == {"after": "never", "reason": "unknown", "missed": None}
            assert gap.is_control

    @pytest.mark.parametrize("drain", [True, False])
    async def test_end_with_the_stream(self, drain: bool) -> None:
        async with MemoryLog() as log:
            stream = LogStream(log)
            async with stream.events() as entered:
                await publish_all(stream, "1")
                reading = asyncio.create_task(all_of(entered))
                await settle()
                await stream.aclose(drain=drain)
                assert await reading == ["1"]
            assert log.statistics().readers == 0

    async def test_never_iterated_leave_nothing(self) -> None:
        async with LogStream("memory://") as stream:
            async with stream.events():
                assert stream.log.statistics().readers == 1
            assert stream.log.statistics().readers == 0

    async def test_are_entered_once_and_before_they_are_iterated(self) -> None:
        async with LogStream("memory://") as stream:
            all_events = stream.events()
            with pytest.raises(RuntimeError, match=r"async with stream\.events\(\)"):
                await anext(all_events)
            async with all_events:
                with pytest.raises(RuntimeError, match="entered once"):
                    await all_events.__aenter__()
        with pytest.raises(StreamClosed):
            await stream.events().__aenter__()

    async def test_a_wait_that_is_given_up_ends_nothing(self) -> None:
        async with LogStream("memory://") as stream, stream.events("t") as found:
            for number in range(3):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(1):
                        await anext(found)
                await stream.publish(Event(id=f"{number}", metadata={"topic": "t"}))
                assert (await anext(found)).id == f"{number}"

    async def test_give_others_a_turn_now_and_then(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(turns, "_TURN", 0.0)
        seen = 0

        async def count() -> None:
            nonlocal seen
            while True:
                seen += 1
                await asyncio.sleep(0)

        async with LogStream("memory://") as stream:
            for _ in range(10):
                await stream.publish(Event(metadata={"topic": "t"}))
            counting = asyncio.create_task(count())
            async with stream.events("t", after=EARLIEST) as found:
                for _ in range(10):
                    await anext(found)
            counting.cancel()
            await asyncio.wait([counting])
        assert seen >= 9

    async def test_are_waited_for_by_one_at_a_time(self) -> None:
        async with LogStream("memory://") as stream, stream.events("t") as found:
            waiting = asyncio.ensure_future(anext(found))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="waits for the next event already"):
                await anext(found)
            await stream.publish(Event(id="1", metadata={"topic": "t"}))
            assert (await waiting).id == "1"


async def all_of(iterator: Any) -> list[str]:
    return [event.id async for event in iterator]


class TestPublishing:
    async def test_has_stored_the_event_when_it_returns(self) -> None:
        async with MemoryLog() as log, LogStream(log) as stream:
            await stream.publish(event("1", "a"))
            assert await read_all(log) == ["1"]
            with pytest.raises(IdConflict):
                await stream.publish(event("1", "b"))
            with pytest.raises(EncodeError):
                await stream.publish(Event(data={1}))
            assert stream.statistics().published == 1

    async def test_without_waiting_keeps_the_order(self) -> None:
        async with MemoryLog() as log, LogStream(log) as stream:
            assert all(stream.publish_nowait(each) for each in events("1", "2", "3"))
            assert stream.statistics().buffered == 3
            await stream.publish(event("4"))
            assert await read_all(log) == ["1", "2", "3", "4"]
            assert stream.statistics().published == 4

    async def test_without_waiting_is_refused_where_too_many_wait(self) -> None:
        async with LogStream("memory://") as stream:
            taken = [stream.publish_nowait(create_event(number)) for number in range(1001)]
            assert taken == [True] * 1000 + [False]
            await settle()
            counts = stream.statistics()
            assert (counts.published, counts.refused, counts.buffered) == (1000, 1, 0)

    async def test_without_waiting_what_the_log_refuses_is_logged_and_the_rest_stored(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with MemoryLog() as log, LogStream(log) as stream:
            with pytest.raises(EncodeError):
                stream.publish_nowait(Event(data={1}))
            for each in (*events("1", "2"), event("1", data="another"), *events("3")):
                assert stream.publish_nowait(each)
            await settle()
            assert await read_all(log) == ["1", "2", "3"]
            assert (stream.statistics().published, stream.statistics().failed) == (3, 1)
        assert "event 1 could not be appended to the log" in caplog.text

    @pytest.mark.real_time
    async def test_without_waiting_from_a_thread(self) -> None:
        async with MemoryLog() as log, LogStream(log) as stream:
            assert await asyncio.to_thread(stream.publish_nowait, event("1"))
            await stream.publish(event("2"))
            assert await read_all(log) == ["1", "2"]


class TestClosing:
    async def test_closes_a_log_that_was_opened_by_its_url_and_no_other(self) -> None:
        async with LogStream("memory://") as stream:
            await publish_all(stream, "1")
        with pytest.raises(StreamClosed):
            await stream.log.read()
        async with MemoryLog() as log:
            async with LogStream(log) as stream:
                await publish_all(stream, "1")
            assert await read_all(log) == ["1"]
            for call in (stream.publish(event("2")), stream.subscribe(print)):
                with pytest.raises(StreamClosed):
                    await call
            with pytest.raises(StreamClosed):
                stream.publish_nowait(event("2"))

    async def test_without_draining_gives_up_and_counts(self) -> None:
        async with MemoryLog() as log:
            stream = LogStream(log)
            got = Collector(10.0)
            await stream.subscribe(got)
            await publish_all(stream, "1")
            await settle()
            assert stream.publish_nowait(event("2"))
            await stream.aclose(drain=False)
            assert (got.got, stream.statistics().dropped) == ([], 1)
            assert await read_all(log) == ["1"]

    async def test_lets_handlers_finish_though_the_log_was_closed_before(self) -> None:
        log = MemoryLog()
        stream = LogStream(log)
        got = Collector(10.0)
        await stream.subscribe(got)
        consumer = stream.consumer("c")
        await consumer.__aenter__()
        await publish_all(stream, "1")
        await settle()
        await log.close()
        await stream.aclose()
        assert got.got == ["1"]
        assert [event async for event in consumer] == []

    def test_leaves_nothing_wherever_it_is_cancelled(self) -> None:
        async def scenario() -> None:
            async with LogStream("memory://") as stream:
                await stream.subscribe(Collector(0.1))
                await stream.publish(event("1"))
                async with stream.events(last=1) as last:
                    await anext(last)
                stream.publish_nowait(event("2"))

        assert cancel_at_every_await(scenario) >= 2

    def test_a_subscription_ends_with_its_loop_and_another_goes_on(self) -> None:
        stream = LogStream(MemoryLog())
        left, got = Collector(), Collector()

        async def leave() -> None:
            await stream.subscribe(left)

        async def go_on() -> None:
            await stream.subscribe(got)
            await stream.publish(event("1"))
            await stream.aclose()

        with suppress(BaseException):
            asyncio.run(leave())
        run(go_on())
        assert got.got == ["1"]


class TestWithOthers:
    async def test_as_source_and_sink_of_a_pipeline(self) -> None:
        async with LogStream("memory://") as source, LogStream("memory://") as target:
            pipeline = StreamProcessor(source).filter(lambda event: event.data > 1)
            async with pipeline.sink(target):
                for number in range(4):
                    await source.publish(create_event(number))
            async with target.events(after=EARLIEST) as found:
                assert [(await anext(found)).data for _ in range(2)] == [2, 3]

    async def test_a_handler_may_publish_to_it_and_unsubscribe(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with LogStream("memory://") as stream:

            async def handler(event: Event) -> None:
                await stream.publish(create_event(event.data + 1))
                if event.data == 2:
                    subscription.cancel()

            subscription = await stream.subscribe(handler)
            await stream.publish(create_event(0))
            await settle()
            assert stream.statistics().published == 4
            assert stream.statistics().subscribers == 0
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
