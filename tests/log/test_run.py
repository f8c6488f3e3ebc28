"""Runs: recorded whatever becomes of their readers, and ended by an event that says how."""

import asyncio
import logging
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest

from codomyrmex.events.streaming import (
    Event,
    LogFull,
    LogUnusable,
    StreamClosed,
    TopicError,
    UnknownRun,
    create_event,
)
from codomyrmex.events.streaming.log import (
    LATEST,
    LogStream,
    MemoryLog,
    Record,
    Retention,
    Run,
    RunStatus,
    SQLiteLog,
)
from codomyrmex.events.streaming.log import run as run_module
from codomyrmex.events.streaming.log.base import Change, Note, Start
from codomyrmex.events.streaming.testing import cancel_at_every_await, run
from codomyrmex.events.streaming.topics import Selection
from tests.conformance.test_logs import events, read_all

PATIENCE = 30.0  # seconds of real time for what must happen soon

T = TypeVar("T")

WORDS = ["nothing", "is", "lost", "in", "silence"]


def loop_clock() -> int:
    return int(asyncio.get_running_loop().time() * 1_000_000) + 1_700_000_000_000_000


def new_log(**options: Any) -> MemoryLog:
    """A log whose time of day is the loop's."""
    return MemoryLog(clock=loop_clock, **options)


async def speak(seconds: float = 1.0) -> AsyncGenerator[str, None]:
    for word in WORDS:
        await asyncio.sleep(seconds)
        yield word


async def for_ever() -> AsyncGenerator[int, None]:
    number = 0
    while True:
        yield number
        number += 1
        await asyncio.sleep(1)


async def text(events: AsyncIterator[Event]) -> tuple[list[Any], Any]:
    """What a reader ends up with, and what the last event says of the end."""
    found = [event async for event in events]
    assert found[-1].type == "stream.end"
    assert found[-1].is_control
    return [event.data for event in found[:-1]], found[-1].data["state"]


async def read(stream: LogStream, topic: str, after: str | None = None) -> tuple[list[Any], Any]:
    async with stream.attach(topic, after) as events:
        return await text(events)


class TestReaders:
    async def test_attach_at_any_time_and_all_get_the_whole(self) -> None:
        async with LogStream(new_log()) as stream:
            run = await stream.run("answer", speak())
            assert run.is_new
            reading = [asyncio.create_task(read(stream, "answer"))]
            for _ in WORDS:
                await asyncio.sleep(1)
                reading.append(asyncio.create_task(text(aiter(run))))
            reading.append(asyncio.create_task(read(stream, "answer")))
            for task in reading:
                assert await task == (WORDS, "completed")
            assert await read(stream, "answer") == (WORDS, "completed")

    async def test_goes_on_though_nobody_reads(self) -> None:
        async with LogStream(new_log()) as stream:
            run = await stream.run("answer", speak())
            async with run.events() as events:
                assert (await anext(events)).data == WORDS[0]
            assert await run.wait() == RunStatus(run.id, "completed")
            assert await text(aiter(run)) == (WORDS, "completed")

    async def test_one_that_was_cut_off_goes_on_at_its_cursor(self) -> None:
        async with LogStream(new_log()) as stream:
            await stream.run("answer", speak())
            found: list[Any] = []
            cursor: str | None = None
            while True:
                async with stream.attach("answer", cursor) as events:
                    event = await anext(events)  # and then the connection is cut
                if event.type == "stream.end":
                    break
                found.append(event.data)
                cursor = event.id
            assert found == WORDS

    async def test_one_past_the_end_is_told_so_at_once(self) -> None:
        async with LogStream(new_log()) as stream:
            run = await stream.run("answer", speak())
            async with run.events() as events:
                ids = [event.id async for event in events]
            await stream.publish(create_event("afterwards", topic="answer"))
            for cursor in (ids[-2], ids[-1], (await stream.log.read(LATEST)).cursor):
                async with asyncio.timeout(0.5):
                    assert await read(stream, "answer", cursor) == ([], "completed")

    async def test_one_that_knows_of_the_end_before_the_log_is_told_so_too(self) -> None:
        async with LogStream(new_log()) as stream:
            run = await stream.run("answer", for_ever())
            async with run.events(after=f"{run.id}.end") as events:
                assert (await anext(events)).type == "stream.end"

    async def test_what_others_publish_to_the_topic_is_read_as_well(self) -> None:
        async with LogStream(new_log()) as stream:
            await stream.publish(create_event("before", topic="answer"))
            run = await stream.run("answer", speak())
            await asyncio.sleep(1.5)
            await stream.publish(create_event("hm", topic="answer"))
            assert await text(aiter(run)) == ([WORDS[0], "hm", *WORDS[1:]], "completed")

    async def test_a_cursor_that_is_unknown_is_a_gap_and_the_whole_run(self) -> None:
        async with LogStream(new_log()) as stream:
            await stream.publish(create_event("before", topic="answer"))
            await stream.run("answer", speak())
            (gap, *found), state = await read(stream, "answer", "never")
            assert (gap["after"], gap["reason"]) == ("never", "unknown")
            assert (found, state) == (WORDS, "completed")

    async def test_of_a_topic_without_a_run_is_refused(self) -> None:
        async with LogStream(new_log()) as stream:
            await stream.publish(create_event("event", topic="answer"))
            with pytest.raises(UnknownRun, match="no run of topic 'answer' is known") as caught:
                await read(stream, "answer")
            assert caught.value.topic == "answer"
            assert await stream.status("answer") is None
            assert not await stream.stop("answer")

    async def test_that_wait_for_a_while_only_lose_nothing(self) -> None:
        async with LogStream(new_log()) as stream:
            await stream.run("answer", speak())
            found: list[Any] = []
            async with stream.attach("answer") as events:
                while len(found) < len(WORDS):
                    with suppress(TimeoutError):
                        found.append((await asyncio.wait_for(anext(events), 0.3)).data)
                assert found == WORDS
                assert (await anext(events)).type == "stream.end"
                with pytest.raises(StopAsyncIteration):
                    await anext(events)

    async def test_and_who_waits_are_told_that_the_stream_is_closed(self) -> None:
        log = new_log()
        async with LogStream(log) as other:
            run = await other.run("answer", for_ever())
            stream = LogStream(log)
            joined = await stream.run("answer", speak())
            waiting = asyncio.create_task(joined.wait())
            await asyncio.sleep(0.5)
            async with stream.attach("answer", LATEST) as events:
                await stream.aclose()
                assert [event async for event in events] == []
            with pytest.raises(StreamClosed):
                await waiting
            assert not (await run._runs.status("answer")).is_over  # type: ignore[union-attr]

    async def test_attach_is_entered_once_and_is_a_context_manager(self) -> None:
        async with LogStream(new_log()) as stream:
            await stream.run("answer", speak())
            await stream.attach("answer").__aexit__(None, None, None)
            attached = stream.attach("answer")
            with pytest.raises(RuntimeError, match="async with"):
                await anext(attached)
            async with attached:
                with pytest.raises(RuntimeError, match="once"):
                    await attached.__aenter__()


class TestSources:
    async def test_give_values_or_events(self) -> None:
        async def source() -> AsyncIterator[Any]:
            yield {"step": 1}
            yield Event(id="mine", type="tool.call", data=2, metadata={"topic": "else", "by": "x"})
            yield create_event(3)

        async with LogStream(new_log()) as stream:
            run = await stream.run("agent", source, event_type="agent.step", private=True)
            async with run.events() as events:
                found = [event async for event in events]
            assert [event.data for event in found[:-1]] == [{"step": 1}, 2, 3]
            assert [event.type for event in found[:-1]] == ["agent.step", "tool.call", "message"]
            assert found[1].id == "mine"
            assert found[1].metadata == {"topic": "agent", "by": "x"}
            assert all(record.private for record in (await stream.log.read()).records[:-1])

    async def test_that_never_wait_leave_turns_to_others(self) -> None:
        async def source() -> AsyncIterator[int]:
            for number in range(5000):
                yield number

        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        async with LogStream(new_log()) as stream:
            task = asyncio.create_task(others())
            assert await text(aiter(await stream.run("rows", source()))) == (
                list(range(5000)),
                "completed",
            )
            assert turns > 50
            task.cancel()

    async def test_wait_while_too_much_is_to_be_appended(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = 0

        async def source() -> AsyncIterator[int]:
            nonlocal given
            for number in range(10_000):
                given += 1
                yield number

        class Slow(MemoryLog):
            async def _append(
                self, drafts: list[Record], guard: Note | None = None
            ) -> list[Record]:
                await asyncio.sleep(60)
                return await super()._append(drafts, guard)

        async with LogStream(Slow(clock=loop_clock), lease=1000) as stream:
            run = await stream.run("rows", source())
            await asyncio.sleep(59)
            assert given < 2100
            assert await text(aiter(run)) == (list(range(10_000)), "completed")

    async def test_that_raise_end_it_as_failed_after_what_they_gave(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def source() -> AsyncIterator[str]:
            yield "some"
            raise ValueError("the model is down")

        async with LogStream(new_log()) as stream:
            run = await stream.run("answer", source())
            with caplog.at_level(logging.ERROR):
                assert await run.wait() == RunStatus(
                    run.id, "failed", "ValueError: the model is down"
                )
            assert await text(aiter(run)) == (["some"], "failed")
            assert await stream.status("answer") == await run.wait()
            assert "Traceback" in caplog.text

    async def test_may_raise_whatever_they_like(self, caplog: pytest.LogCaptureFixture) -> None:
        class Mute(Exception):
            def __str__(self) -> str:
                raise RuntimeError

        async def source(error: Exception) -> AsyncIterator[str]:
            yield "some"
            raise error

        async with LogStream(new_log()) as stream:
            for error, said in [
                (FileNotFoundError("\udcff"), "FileNotFoundError: \\udcff"),
                (Mute(), "Mute"),
                (ValueError("x" * 2_000_000), f"ValueError: {'x' * 987}…"),
            ]:
                run = await stream.run("answer", source(error))
                async with asyncio.timeout(1):
                    assert await run.wait() == RunStatus(run.id, "failed", said)
            assert all(record.size < 2000 for record in await stream.log.read())

    @pytest.mark.parametrize("value", [float("nan"), object()])
    async def test_that_give_what_is_not_json_end_it_as_failed(self, value: Any) -> None:
        async def source() -> AsyncIterator[Any]:
            yield "some"
            yield value

        async with LogStream(new_log()) as stream:
            run = await stream.run("answer", source())
            status = await run.wait()
            assert status.state == "failed"
            assert status.error is not None
            assert status.error.startswith("EncodeError: ")
            assert await text(aiter(run)) == (["some"], "failed")

    async def test_may_be_the_run_of_another_log(self) -> None:
        async with LogStream(new_log()) as one, LogStream(new_log()) as other:
            await one.run("answer", speak())
            async with one.attach("answer") as events:
                run = await other.run("copy", events)
                await asyncio.sleep(2.5)
                await one.stop("answer")
                await run.wait()
            assert await text(aiter(run)) == (WORDS[:2], "completed")

    async def test_that_cannot_be_closed_are_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        class Source:
            def __aiter__(self) -> AsyncIterator[int]:
                return self

            async def __anext__(self) -> int:
                raise StopAsyncIteration

            async def aclose(self) -> None:
                raise ValueError("not now")

        async with LogStream(new_log()) as stream:
            run = await stream.run("answer", Source())
            assert (await run.wait()).state == "completed"
        assert "could not be closed" in caplog.text

    async def test_are_closed_where_they_are_iterated_and_where_they_were_made(self) -> None:
        closed: list[str] = []

        class Source:
            async def __aiter__(self) -> AsyncGenerator[Any, None]:
                try:
                    yield object()  # which is no JSON
                finally:
                    closed.append("what it gives")

            async def aclose(self) -> None:
                closed.append("the source")

        async with LogStream(new_log()) as stream:
            run = await stream.run("answer", Source())
            assert (await run.wait()).state == "failed"
            assert closed == ["what it gives", "the source"]

    async def test_that_meet_with_a_cancellation_which_is_not_theirs_fail(self) -> None:
        async def source() -> AsyncIterator[str]:
            yield "some"
            asking = asyncio.create_task(asyncio.sleep(1000))
            asyncio.get_running_loop().call_later(1, asking.cancel)
            await asking

        async def closed_badly() -> AsyncIterator[str]:
            try:
                yield "some"
                await asyncio.sleep(1000)
            finally:
                raise asyncio.CancelledError

        async with LogStream(new_log()) as stream:
            run = await stream.run("answer", source())
            assert await run.wait() == RunStatus(run.id, "failed", "CancelledError: ")
            assert await text(aiter(run)) == (["some"], "failed")
            run = await stream.run("another", closed_badly())
            await asyncio.sleep(1)
            assert await run.stop()
            assert (await run.wait()).state == "cancelled"

    @pytest.mark.parametrize("reason", ["cancelled", "the stream is closed"])
    async def test_of_a_run_that_could_not_begin_are_closed(self, reason: str) -> None:
        closed = False

        async def source() -> AsyncIterator[int]:
            nonlocal closed
            try:
                yield 1
            finally:
                closed = True

        given = source()
        await anext(given)
        log = SlowNotes(clock=loop_clock)
        async with LogStream(log) as stream:
            log.seconds = 1
            if reason == "the stream is closed":
                await stream.aclose()
                with pytest.raises(StreamClosed):
                    await stream.run("answer", given)
            else:
                beginning = asyncio.create_task(stream.run("answer", given))
                await asyncio.sleep(0.5)
                beginning.cancel()
                await asyncio.wait([beginning])
                assert beginning.cancelled()
                assert await stream.status("answer") is None
            assert closed

    async def test_what_cannot_be_asked_for_is_refused(self) -> None:
        async with LogStream(new_log()) as stream:
            source = speak()
            with pytest.raises(TopicError):
                await stream.run("answers.*", source)
            with pytest.raises(TopicError):
                stream.attach("answers.*")
            with pytest.raises(TopicError):
                await stream.status("*")
            for ttl in (-1, float("inf"), float("nan")):
                with pytest.raises(ValueError, match="ttl is a number of seconds"):
                    await stream.run("answer", source, ttl=ttl)
            wrong: Any = ["no", "iterator"]
            with pytest.raises(TypeError, match="a function that returns one, not list"):
                await stream.run("answer", wrong)
            await source.aclose()

    @pytest.mark.parametrize("given", [1, asyncio.sleep])
    async def test_functions_that_return_no_iterator_fail(self, given: Any) -> None:
        async with LogStream(new_log()) as stream:
            wrong: Any = (lambda: 1) if given == 1 else (lambda: given(1))
            run = await stream.run("answer", wrong)
            status = await run.wait()
            assert status.state == "failed"
            assert "which is no async iterable" in str(status.error)

    @pytest.mark.parametrize("error", [GeneratorExit, BaseException, StopIteration])
    async def test_that_raise_what_nobody_should_end_it_too(
        self, error: type[BaseException]
    ) -> None:
        class Source:
            def __aiter__(self) -> "Source":
                return self

            async def __anext__(self) -> int:
                raise error("on purpose")

        async with LogStream(new_log()) as stream:
            run = await stream.run("answer", Source())
            assert (await run.wait()).state == "failed"
            assert not await stream.stop("answer")

    async def test_that_take_no_notice_of_being_cancelled_are_not_taken_from(self) -> None:
        class Stubborn:
            def __aiter__(self) -> "Stubborn":
                return self

            async def __anext__(self) -> int:
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(1)
                return 1

        async with LogStream(new_log()) as stream:
            run = await stream.run("answer", Stubborn())
            await asyncio.sleep(2.5)
            async with asyncio.timeout(1):
                assert await run.stop()
            assert await text(aiter(run)) == ([1, 1, 1], "cancelled")

    async def test_wait_while_too_many_bytes_are_to_be_appended(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(run_module, "_MOST_PENDING_BYTES", 1000)
        most = 0

        async def source() -> AsyncIterator[str]:
            nonlocal most
            (producer,) = stream._runs._producers.values()
            for _ in range(50):
                yield "x" * 300
                most = max(most, len(producer._pending))

        async with LogStream(new_log()) as stream:
            assert len((await text(aiter(await stream.run("rows", source))))[0]) == 50
            assert most <= 4


class TestOneAtATime:
    async def test_the_second_asker_joins_the_first(self) -> None:
        async with LogStream(new_log()) as stream:
            runs = await asyncio.gather(*(stream.run("answer", speak()) for _ in range(5)))
            assert sum(each.is_new for each in runs) == 1
            assert len({each.id for each in runs}) == 1
            for each in runs:
                assert await text(aiter(each)) == (WORDS, "completed")

    async def test_one_that_has_ended_is_followed_by_another_or_joined(self) -> None:
        async with LogStream(new_log()) as stream:
            first = await stream.run("answer", speak())
            await first.wait()
            joined = await stream.run("answer", speak, once=True)
            assert (joined.id, joined.is_new) == (first.id, False)
            second = await stream.run("answer", speak())
            assert second.is_new
            assert await text(aiter(second)) == (WORDS, "completed")
            assert (await first.wait()).id == first.id
            assert len(await read_all(stream.log, topics="answer")) == 2 * len(WORDS) + 2

    async def test_who_was_in_the_first_as_the_second_began_reads_its_end(self) -> None:
        async with LogStream(new_log()) as stream:
            run = await stream.run("answer", speak())
            async with run.events() as events:
                cursor = (await anext(events)).id
            await run.wait()
            await stream.run("answer", for_ever())
            assert await read(stream, "answer", cursor) == (WORDS[1:], "completed")

    async def test_each_gives_its_own_events_and_stops_no_other(self) -> None:
        async with LogStream(new_log()) as stream:
            first = await stream.run("answer", speak())
            joined = await stream.run("answer", speak())
            await first.wait()
            second = await stream.run("answer", for_ever())
            await asyncio.sleep(2.5)
            async with first.events() as events:
                cursors = [event.id async for event in events]
            for run in (first, joined):
                assert await text(aiter(run)) == (WORDS, "completed")
                assert await run.wait() == RunStatus(first.id, "completed")
                async with asyncio.timeout(1):
                    assert not await run.stop()
            assert await second.stop()
            assert await text(aiter(second)) == ([0, 1, 2], "cancelled")
            # Whoever comes with a cursor of the first goes on there.
            for after, found in [(None, WORDS), (cursors[1], WORDS[2:]), (cursors[-1], [])]:
                async with first.events(after) as events:
                    assert await text(events) == (found, "completed")
            for after in (*cursors, None):
                async with second.events(after) as events:
                    assert await text(events) == ([0, 1, 2], "cancelled")

    async def test_the_end_of_another_is_not_its_end(self) -> None:
        async with LogStream(new_log()) as stream:
            run = await stream.run("answer", speak())
            forged = {"control": True, "topic": "answer"}
            for data in ({"run": "x", "state": "failed", "error": None}, "no"):
                await stream.publish(Event(type="stream.end", data=data, metadata=forged))
            assert await text(aiter(run)) == (WORDS, "completed")
            assert await read(stream, "answer") == (WORDS, "completed")

    async def test_one_whose_end_has_gone_is_not_known_any_more(self) -> None:
        log = new_log(retention=Retention(count=1))
        async with LogStream(log) as stream:
            first = await stream.run("answer", speak(), ttl=10)
            async with first.events() as events:
                await anext(events)
                await first.wait()
                await asyncio.sleep(20)
                await log.append(events_of_others())
                second = await stream.run("answer", for_ever())
                assert (await anext(events)).type == "stream.gap"
                with pytest.raises(UnknownRun):
                    await anext(events)
            with pytest.raises(UnknownRun):
                await text(aiter(first))
            await second.stop()

    async def test_those_of_different_topics_do_not_know_each_other(self) -> None:
        async with LogStream(new_log()) as stream:
            runs = [await stream.run(f"answers.{n}", speak(0.1 * (n + 1))) for n in range(20)]
            for each in runs:
                assert await text(aiter(each)) == (WORDS, "completed")

    async def test_two_streams_of_one_log_are_as_two_processes(self) -> None:
        log = new_log()
        async with LogStream(log) as one, LogStream(log) as other:
            first = await one.run("answer", speak())
            second = await other.run("answer", speak())
            assert (second.id, second.is_new) == (first.id, False)
            assert await text(aiter(second)) == (WORDS, "completed")
            assert await second.wait() == await first.wait()


class TestStopping:
    async def test_ends_it_as_cancelled_and_its_source_is_closed(self) -> None:
        closed = False

        async def source() -> AsyncIterator[str]:
            nonlocal closed
            try:
                yield "some"
                await asyncio.sleep(1000)
            finally:
                closed = True

        async with LogStream(new_log()) as stream:
            run = await stream.run("answer", source())
            await asyncio.sleep(1)
            assert await stream.stop("answer")
            assert closed
            assert await text(aiter(run)) == (["some"], "cancelled")
            assert not await run.stop()
            assert (await run.wait()).state == "cancelled"

    async def test_comes_too_late_for_what_its_source_has_given(self) -> None:
        class Slow(MemoryLog):
            async def _append(
                self, drafts: list[Record], guard: Note | None = None
            ) -> list[Record]:
                await asyncio.sleep(1)
                return await super()._append(drafts, guard)

        async def source() -> AsyncIterator[int]:
            for number in range(200):
                yield number

        async with LogStream(Slow(clock=loop_clock)) as stream:
            run = await stream.run("rows", source())
            await asyncio.sleep(0.5)
            assert await run.stop()
            await asyncio.sleep(10)
            ids = await read_all(stream.log, topics="rows", limit=1000)
            assert ids[-1] == f"{run.id}.end"
            assert len(ids) == 201
            assert await text(aiter(run)) == (list(range(200)), "completed")

    async def test_does_not_disturb_a_source_that_is_being_closed(self) -> None:
        closed = False

        class Source:
            def __aiter__(self) -> "Source":
                return self

            async def __anext__(self) -> int:
                raise StopAsyncIteration

            async def aclose(self) -> None:
                nonlocal closed
                await asyncio.sleep(1)
                closed = True

        async with LogStream(new_log()) as stream:
            run = await stream.run("answer", Source())
            await asyncio.sleep(0.5)
            assert await run.stop()
            assert closed
            assert (await run.wait()).state == "cancelled"

    async def test_before_it_began_closes_its_source(self) -> None:
        async with LogStream(new_log()) as stream:
            source = speak()
            run = await stream.run("answer", source)
            assert await run.stop()
            assert await text(aiter(run)) == ([], "cancelled")
            with pytest.raises(StopAsyncIteration):
                await anext(source)

    async def test_works_from_another_process(self) -> None:
        log = new_log()
        async with LogStream(log) as one, LogStream(log) as other:
            run = await one.run("answer", for_ever())
            another = await one.run("another", for_ever())
            await asyncio.sleep(2.5)
            async with asyncio.timeout(0.1):
                assert await other.stop("answer")
            assert await text(aiter(run)) == ([0, 1, 2], "cancelled")
            assert not (await one.status("another")).is_over  # type: ignore[union-attr]
            await another.stop()

    async def test_of_one_without_a_time_to_live_does_not_wait_for_ever(self) -> None:
        log = new_log()
        async with LogStream(log) as one, LogStream(log) as other:
            await one.run("answer", for_ever(), ttl=0)
            assert await other.stop("answer")
            await asyncio.sleep(1)
            assert await other.status("answer") is None

    async def test_the_stream_ends_its_runs_as_interrupted(self) -> None:
        log = new_log()
        async with LogStream(log) as stream:
            run = await stream.run("answer", for_ever())
            await asyncio.sleep(1.5)
        with pytest.raises(StreamClosed):
            await stream.run("answer", speak)
        with pytest.raises(StreamClosed):
            await read(stream, "answer")
        async with LogStream(log) as stream:
            assert await read(stream, "answer") == ([0, 1], "interrupted")
            again = await stream.run("answer", speak())
            assert again.id != run.id

    def test_so_does_the_end_of_the_event_loop(self) -> None:
        log = MemoryLog()

        async def begin() -> None:
            await LogStream(log).run("answer", for_ever())
            await asyncio.sleep(0.5)

        async def look() -> Any:
            async with LogStream(log) as stream:
                return await read(stream, "answer")

        asyncio.run(begin())
        assert asyncio.run(look()) == ([0], "interrupted")

    async def test_also_those_that_are_about_to_begin(self) -> None:
        log = SlowNotes(clock=loop_clock)
        stream = LogStream(log)
        log.seconds = 1
        beginning = asyncio.create_task(stream.run("answer", for_ever()))
        await asyncio.sleep(0.5)
        await stream.aclose()
        run = await beginning
        await asyncio.sleep(2)
        assert await stream.status("answer") == RunStatus(run.id, "interrupted")

    async def test_waiting_ends_when_the_log_is_closed(self) -> None:
        async with LogStream(new_log()) as stream:
            run = await stream.run("answer", for_ever())
            waiting = asyncio.create_task(run.wait())
            await asyncio.sleep(0.5)
            await stream.log.close()
            with pytest.raises(StreamClosed):
                await waiting


class SlowNotes(MemoryLog):
    """A log that takes its time to say that a note was changed."""

    seconds = 0.0

    async def _change(self, change: Change) -> Note | None:
        changed = await super()._change(change)
        await asyncio.sleep(self.seconds)
        return changed


class Full(MemoryLog):
    """A log that has no room at times."""

    has_no_room_for: str | None = None
    seconds = 0.0

    async def _append(self, drafts: list[Record], guard: Note | None = None) -> list[Record]:
        await asyncio.sleep(self.seconds)
        if self.has_no_room_for == "an event":
            raise LogFull("events.db")
        return await super()._append(drafts, guard)

    async def _change(self, change: Change) -> Note | None:
        if self.has_no_room_for == "a note":
            raise LogFull("events.db")
        return await super()._change(change)


def events_of_others() -> list[Event]:
    return events(*(f"busy/{number}" for number in range(20)))


class Crash(LogStream):
    """A stream whose process is killed, as far as its log can tell."""

    async def crash(self) -> None:
        self._runs.is_closed = True  # it looks after nothing any more
        for producer in tuple(self._runs._producers.values()):
            await producer._lease.abandon()
            producer._lease.lost = True
            producer.give_up()
        await asyncio.sleep(0)


class TestProcessesThatEnd:
    async def test_readers_elsewhere_are_told_within_the_lease(self) -> None:
        log = new_log()
        loop = asyncio.get_running_loop()
        async with LogStream(log) as other:
            dying = Crash(log)
            await dying.run("answer", for_ever())
            reading = asyncio.create_task(read(other, "answer"))
            waiting = asyncio.create_task((await other.run("answer", speak())).wait())
            await asyncio.sleep(21.5)
            await dying.crash()
            crashed = loop.time()
            assert await reading == (list(range(22)), "interrupted")
            assert loop.time() - crashed <= 15.1
            assert (await waiting).state == "interrupted"
            await dying.aclose()

    async def test_whoever_asks_for_another_finds_it(self) -> None:
        log = new_log()
        dying = Crash(log)
        first = await dying.run("answer", for_ever())
        await asyncio.sleep(2.5)
        await dying.crash()
        async with LogStream(log) as stream:
            joined = await stream.run("answer", speak())
            assert joined.id == first.id  # it may be alive
            await asyncio.sleep(30)
            # What was found by looking after it has been told; a new one may begin.
            assert (await joined.wait()).state == "interrupted"
            second = await stream.run("answer", speak())
            assert second.is_new
            assert await text(aiter(second)) == (WORDS, "completed")
        await dying.aclose()

    @pytest.mark.parametrize("once", [False, True])
    async def test_one_that_nobody_looked_after_is_told_to_be_over_first(self, once: bool) -> None:
        log = new_log()
        dying = Crash(log)
        first = await dying.run("answer", for_ever())
        await asyncio.sleep(2.5)
        await dying.crash()
        await asyncio.sleep(60)
        async with LogStream(log) as stream:
            run = await stream.run("answer", speak(), once=once)
            assert run.is_new is not once
            assert (
                await Run(stream._runs, "answer", first.id, 0, is_new=False).wait()
            ) == RunStatus(first.id, "interrupted")
        await dying.aclose()

    async def test_those_left_behind_are_found_by_the_next_process(self) -> None:
        log = new_log()
        dying = Crash(log)
        for number in range(3):
            await dying.run(f"answers.{number}", for_ever())
        await asyncio.sleep(2.5)
        await dying.crash()
        async with LogStream(log) as stream:
            async with stream.events("answers.*") as events:
                await stream.run("another", speak())
                found = [await anext(events) for _ in range(3)]
            assert {event.metadata["topic"] for event in found} == {
                f"answers.{number}" for number in range(3)
            }
            assert {event.data["state"] for event in found} == {"interrupted"}
        await dying.aclose()

    async def test_one_that_was_killed_after_it_said_how_it_ended(self) -> None:
        log = new_log()
        async with LogStream(log) as stream:
            run = await stream.run("answer", speak())
            await run.wait()
            # As if it had not come to writing that down.
            note = await log._note("run:answer")
            value = {**note.value, "state": "running", "expires": loop_clock() + 1_000_000}
            await log._change(
                Change(Note(note.key, value, note.revision), expires=loop_clock() + 10**9)
            )
            async with LogStream(log) as other:
                assert await read(other, "answer") == (WORDS, "completed")
                await asyncio.sleep(2)
                assert await other.status("answer") == RunStatus(run.id, "completed")

    async def test_one_that_was_given_up_for_dead_adds_nothing_behind_its_end(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        log = new_log()
        hung, other = LogStream(log), LogStream(log)
        await hung.run("answer", for_ever())
        await asyncio.sleep(2.5)
        (producer,) = hung._runs._producers.values()
        await producer._lease.abandon()  # it hangs for a while, and does not renew it
        loop = asyncio.get_running_loop()
        loop.call_later(15, lambda: producer._pending.append(producer._record_of("late")))
        assert await read(other, "answer") == (list(range(15)), "interrupted")
        await asyncio.sleep(60)
        assert len(await read_all(log, topics="answer", limit=100)) == 16
        assert "given up for dead" in caplog.text
        await hung.aclose()
        await other.aclose()

    async def test_one_that_finds_out_by_renewing_ends(self) -> None:
        log = new_log()
        async with LogStream(log) as stream:

            async def source() -> AsyncIterator[str]:
                yield "some"
                await asyncio.sleep(10_000)

            await stream.run("answer", source())
            await asyncio.sleep(1)
            note = await log._note("run:answer")
            await log._change(Change(Note(note.key, {**note.value, "holder": "x"}, note.revision)))
            await asyncio.sleep(6)
            assert not stream._runs._producers

    async def test_a_full_disk_ends_it_and_that_is_said_when_there_is_room(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        log = Full(clock=loop_clock)
        async with LogStream(log) as stream:
            run = await stream.run("answer", for_ever())
            reading = asyncio.create_task(read(stream, "answer"))
            waiting = asyncio.create_task(run.wait())
            await asyncio.sleep(2.5)
            log.has_no_room_for = "an event"
            await asyncio.sleep(7)
            assert "could not be recorded; it is tried again" in caplog.text
            log.has_no_room_for = None
            async with asyncio.timeout(2):
                assert await reading == ([0, 1, 2], "failed")
                error = f"LogFull: {LogFull('events.db')}"
                assert await waiting == RunStatus(run.id, "failed", error)

    async def test_one_that_ended_and_could_not_be_noted_is_in_nobodys_way(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        log = Full(clock=loop_clock)
        async with LogStream(log) as stream:
            run = await stream.run("answer", speak(), ttl=100)
            await asyncio.sleep(4.5)
            log.has_no_room_for = "a note"
            assert await run.wait() == RunStatus(run.id, "completed")
            await asyncio.sleep(1)
            assert "could not be noted" in caplog.text
            log.has_no_room_for = None
            await asyncio.sleep(16)
            assert await stream.status("answer") == RunStatus(run.id, "completed")
            await asyncio.sleep(101)
            assert await stream.status("answer") is None

    async def test_one_that_is_full_for_too_long_leaves_the_rest_to_others(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        log = Full(clock=loop_clock)
        async with LogStream(log) as stream:
            run = await stream.run("answer", for_ever())
            reading = asyncio.create_task(read(stream, "answer"))
            waiting = asyncio.create_task(run.wait())
            await asyncio.sleep(2.5)
            log.has_no_room_for = "an event"
            await asyncio.sleep(100)
            assert f"the end of run {run.id} could not be recorded\n" in caplog.text
            log.has_no_room_for = None
            async with asyncio.timeout(16):
                assert await reading == ([0, 1, 2], "interrupted")
                assert await waiting == RunStatus(run.id, "interrupted")

    async def test_a_full_disk_does_not_keep_a_stream_from_closing(self) -> None:
        log = Full(clock=loop_clock)
        stream = LogStream(log)
        await stream.run("answer", for_ever())
        await asyncio.sleep(2.5)
        log.has_no_room_for = "an event"
        async with asyncio.timeout(2):
            await stream.aclose()
        log.has_no_room_for = None
        async with LogStream(log) as other:
            assert await read(other, "answer") == ([0, 1, 2], "interrupted")

    @pytest.mark.parametrize("seconds", [0.1, 0.4])
    def test_the_end_of_an_event_loop_leaves_it_the_last_word(self, seconds: float) -> None:
        """While it appends, and while it says how it ended."""

        async def begin() -> None:
            await LogStream(log).run("answer", speak(0))
            await asyncio.sleep(seconds)

        async def look() -> Any:
            async with LogStream(log) as stream:
                return await read(stream, "answer")

        log = Full()
        log.seconds = 0.15  # for one word, for the others, and for the end
        asyncio.run(begin())
        log.seconds = 0.0
        assert asyncio.run(look()) == (WORDS, "completed")

    def test_and_does_not_wait_for_a_disk_that_is_full(self) -> None:
        async def begin() -> None:
            await LogStream(log, lease=1000).run("answer", speak(0))
            await asyncio.sleep(0.1)

        log = Full()
        log.has_no_room_for = "an event"
        before = time.monotonic()
        asyncio.run(begin())
        assert time.monotonic() - before < PATIENCE

    @pytest.mark.parametrize("what", ["the log", "the source"])
    async def test_who_cancels_all_tasks_again_and_again_need_not_wait(self, what: str) -> None:
        class Source:
            def __aiter__(self) -> "Source":
                return self

            async def __anext__(self) -> int:
                await asyncio.sleep(1)
                return 1

            async def aclose(self) -> None:
                if what == "the source":
                    await asyncio.sleep(1000)

        log = Full(clock=loop_clock)
        stream = LogStream(log)
        await stream.run("answer", Source())
        await asyncio.sleep(0.5)
        if what == "the log":
            log.seconds = 1000
        others: set[asyncio.Task[Any]] = set()
        for _ in range(4):
            others = {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.sleep(0.1)
        assert all(task.done() for task in others)

    async def test_one_that_ends_after_it_was_given_up_says_nothing(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        log = new_log()
        async with LogStream(log) as stream:
            await stream.run("answer", speak(0.5))
            await asyncio.sleep(2.3)
            note = await log._note("run:answer")
            await log._change(Change(Note(note.key, {}, note.revision)))
            (producer,) = stream._runs._producers.values()
            producer.stop()
            await asyncio.sleep(1)
            assert "given up for dead" in caplog.text
            assert [each.type for each in await log.read()] == ["message"] * 4

    async def test_one_that_another_has_overtaken_begins_after_that(self) -> None:
        class Slow(MemoryLog):
            seconds = 0.0

            async def _end(self) -> int:
                seconds, self.seconds = self.seconds, 0.0
                await asyncio.sleep(seconds)
                return await super()._end()

        log = Slow(clock=loop_clock)
        async with LogStream(log) as one, LogStream(log) as other:
            log.seconds = 100.0
            beginning = asyncio.create_task(one.run("answer", speak()))
            await asyncio.sleep(1)
            first = await other.run("answer", speak())
            assert await first.wait() == RunStatus(first.id, "completed")
            second = await beginning
            assert second.is_new
            assert await text(aiter(second)) == await text(aiter(first)) == (WORDS, "completed")

    @pytest.mark.parametrize("reason", ["what it gave was not taken", "it was given up"])
    async def test_a_source_that_takes_no_notice_is_asked_no_more(self, reason: str) -> None:
        class Failing(MemoryLog):
            fails = False

            async def _append(
                self, drafts: list[Record], guard: Note | None = None
            ) -> list[Record]:
                if self.fails:
                    self.fails = False
                    raise LogFull("events.db")
                return await super()._append(drafts, guard)

        given = 0

        class Stubborn:
            def __aiter__(self) -> "Stubborn":
                return self

            async def __anext__(self) -> int:
                nonlocal given
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(1)
                given += 1
                return given

        log = Failing(clock=loop_clock)
        async with LogStream(log) as stream:
            await stream.run("answer", Stubborn())
            await asyncio.sleep(2.5)
            if reason == "it was given up":
                note = await log._note("run:answer")
                await log._change(Change(Note(note.key, {}, note.revision)))
            else:
                log.fails = True
            await asyncio.sleep(1)
            before = given
            await asyncio.sleep(60)
            assert given <= before + 1
            stored = [each.event().data for each in await log.read(topics="answer")]
            if reason == "it was given up":
                assert stored == [1, 2]
            else:
                assert stored[:-1] == [1, 2]
                assert stored[-1]["state"] == "failed"

    async def test_so_does_one_that_begins_another(self) -> None:
        log = new_log()
        async with LogStream(log) as stream:
            first = await stream.run("answer", speak())
            await first.wait()
            note = await log._note("run:answer")
            value = {**note.value, "state": "running", "expires": loop_clock() - 1}
            await log._change(Change(Note(note.key, value, note.revision)))
            async with LogStream(log) as other:
                second = await other.run("answer", speak())
                assert second.is_new
                assert await text(aiter(second)) == (WORDS, "completed")
            assert [each.id for each in await log.read(limit=100) if each.type == "stream.end"] == [
                f"{first.id}.end",
                f"{second.id}.end",
            ]

    async def test_one_without_a_time_to_live_is_found_too(self) -> None:
        log = new_log()
        dying = Crash(log)
        await dying.run("answer", for_ever(), ttl=0)
        async with LogStream(log) as other:
            reading = asyncio.create_task(read(other, "answer"))
            await asyncio.sleep(2.5)
            await dying.crash()
            assert await reading == ([0, 1, 2], "interrupted")
            await asyncio.sleep(1)
            assert await other.status("answer") is None
        await dying.aclose()

    async def test_who_looks_after_one_is_not_put_off_by_an_error(self) -> None:
        class Failing(MemoryLog):
            fails = 0

            async def _append(
                self, drafts: list[Record], guard: Note | None = None
            ) -> list[Record]:
                if self.fails:
                    self.fails -= 1
                    raise OSError("on purpose")
                return await super()._append(drafts, guard)

        log = Failing(clock=loop_clock)
        dying = Crash(log)
        await dying.run("answer", for_ever())
        async with LogStream(log) as other:
            reading = asyncio.create_task(read(other, "answer"))
            await asyncio.sleep(2.5)
            await dying.crash()
            log.fails = 1
            assert await reading == ([0, 1, 2], "interrupted")
        await dying.aclose()

    async def test_two_who_find_it_tell_it_once(self) -> None:
        class Slow(MemoryLog):
            """The second who looks is told what was so before the first had done it."""

            looked: ClassVar[list[Note]] = []

            async def _note(self, key: str) -> Note:
                note = await super()._note(key)
                if self.looked:
                    return self.looked.pop()
                return note

        log = Slow(clock=loop_clock)
        dying = Crash(log)
        await dying.run("answer", for_ever())
        await dying.crash()
        await asyncio.sleep(60)
        before = await log._note("run:answer")
        async with LogStream(log) as one:
            await one._runs._interrupt("answer")
            log.looked.append(before)
            await one._runs._interrupt("answer")
            assert len(await read_all(log)) == 2
        await dying.aclose()

    async def test_a_log_that_fails_is_told_of(self) -> None:
        class Failing(MemoryLog):
            async def _begin(self, after: str, selection: Selection) -> Start:
                raise LogUnusable("events.db", "it is damaged")

        log = Failing(clock=loop_clock)
        async with LogStream(log) as stream:
            run = await stream.run("answer", speak())
            assert repr(run) == f"Run(topic='answer', id={run.id!r})"
            with pytest.raises(LogUnusable):
                await read(stream, "answer", "cursor")
            assert log.statistics().readers == 0

    async def test_how_long_a_lease_runs_is_its_holders_choice(self) -> None:
        log = new_log()
        async with LogStream(log, lease=60) as one, LogStream(log, lease=5) as other:
            await one.run("answer", speak(50))
            assert await read(other, "answer") == (WORDS, "completed")

    async def test_a_clock_that_is_set_back_interrupts_nobody_who_is_alive(self) -> None:
        ahead = 0
        log = MemoryLog(clock=lambda: loop_clock() + ahead)
        async with LogStream(log) as one, LogStream(log) as other:
            ahead = 3_600_000_000
            await one.run("answer", speak(20))
            dying = Crash(log)
            await dying.run("another", for_ever())
            await dying.crash()
            ahead = 0
            reading = asyncio.create_task(read(other, "another"))
            assert await read(other, "answer") == (WORDS, "completed")
            assert (await reading)[1] == "interrupted"
            await dying.aclose()

    async def test_a_log_that_fails_once_is_asked_again(self) -> None:
        class Failing(MemoryLog):
            failures = 0

            async def _append(
                self, drafts: list[Record], guard: Note | None = None
            ) -> list[Record]:
                self.fail()
                return await super()._append(drafts, guard)

            async def _notes(self, prefix: str) -> list[Note]:
                self.fail()
                return await super()._notes(prefix)

            def fail(self) -> None:
                if self.failures:
                    self.failures -= 1
                    raise LogFull("events.db")

        log = Failing(clock=loop_clock)
        dying = Crash(log)
        await dying.run("answer", for_ever())
        async with LogStream(log) as one, LogStream(log) as other:
            reading = asyncio.create_task(read(other, "answer"))
            await asyncio.sleep(2.5)
            await dying.crash()
            log.failures = 2
            assert (await reading)[1] == "interrupted"
            run = await one.run("another", for_ever())
            await asyncio.sleep(0.5)
            log.failures = 1
            await log._change(Change(Note("anything", {})))  # who watches reads the notes
            await asyncio.sleep(0.5)
            assert not log.failures
            assert await other.stop("another")
            assert (await run.wait()).state == "cancelled"
        await dying.aclose()

    async def test_one_that_ends_late_is_in_nobodys_way(self) -> None:
        log = new_log()

        async def slow() -> AsyncIterator[str]:
            try:
                yield "some"
                await asyncio.sleep(10_000)
            finally:
                await asyncio.sleep(100)

        async with LogStream(log) as one:
            await one.run("answer", slow())
            await asyncio.sleep(1)
            note = await log._note("run:answer")
            await log._change(Change(Note(note.key, {}, note.revision)))
            await asyncio.sleep(6)  # it finds that it has lost its lease
            second = await one.run("answer", for_ever())
            await asyncio.sleep(200)
            assert await one.stop("answer")
            assert (await second.wait()).state == "cancelled"

    async def test_an_event_that_has_the_name_of_its_end_is_not_its_end(self) -> None:
        async with LogStream(new_log()) as stream:
            run = await stream.run("answer", for_ever())
            forged = {"control": True, "topic": "answer"}
            await stream.publish(Event(id=f"{run.id}.end", data="no", metadata={"topic": "answer"}))
            await stream.publish(Event(type="stream.end", data="no", metadata=forged))
            await stream.publish(Event(type="stream.end", data={"run": 1}, metadata=forged))
            assert (await run._runs.status("answer")) == RunStatus(run.id, "running")
            waiting = asyncio.create_task(run.wait())
            await asyncio.sleep(1)
            await stream.publish(Event(type="stream.end", data={"run": 2}, metadata=forged))
            assert await run.stop()
            assert (await waiting).state == "cancelled"
            await asyncio.sleep(1)
            assert (await stream.status("answer")) == RunStatus(run.id, "cancelled")

    async def test_a_log_that_is_closed_is_watched_no_more(self) -> None:
        log = new_log()
        dying = Crash(log)
        await dying.run("another", for_ever())
        await dying.crash()
        async with LogStream(log) as one:
            await one.run("answer", for_ever())
            async with one.attach("another"):
                await log.close()
                log._notes_changed.set_off()
                await asyncio.sleep(30)
            assert not any(place.guards for place in one._runs._places.values())
        await dying.aclose()

    def test_an_interrupt_of_the_program_is_one(self) -> None:
        async def source() -> AsyncIterator[int]:
            yield 1
            raise KeyboardInterrupt

        async def main() -> None:
            async with LogStream(log) as stream:
                await (await stream.run("answer", source())).wait()
                await asyncio.sleep(PATIENCE)

        async def look() -> Any:
            async with LogStream(log) as stream:
                return await read(stream, "answer")

        log = MemoryLog()
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(main())
        assert asyncio.run(look()) == ([1], "failed")


class TestRetention:
    async def test_that_takes_the_end_from_under_who_waits_for_it_ends_the_wait(self) -> None:
        log = new_log(retention=Retention(count=1))
        dying = Crash(log)
        run = await dying.run("answer", for_ever())
        async with LogStream(log) as other:
            waiting = asyncio.create_task((await other.run("answer", speak())).wait())
            await asyncio.sleep(1)
            await log.append(events("x/1", "x/2"))
            await asyncio.sleep(1)
            # None of this lets anybody else have a turn.
            end = {"control": True, "topic": "answer"}
            await log.append([Event(f"{run.id}.end", "stream.end", None, end)])
            await log._change(Change(await log._note("run:answer"), gone=True))
            await log.append(events("x/3", "x/4"))
            with pytest.raises(UnknownRun):
                await waiting
        await dying.aclose()

    async def test_that_takes_the_end_from_under_a_reader_ends_its_wait(self) -> None:
        log = new_log(retention=Retention(count=2))
        async with LogStream(log) as stream:
            run = await stream.run("answer", speak(), ttl=10)
            async with run.events() as events:
                first = await anext(events)
                await run.wait()
                await asyncio.sleep(20)
                for each in events_of_others():
                    await stream.publish(each)
                await log.trim()
                assert first.data == WORDS[0]
                with pytest.raises(UnknownRun):
                    assert [event.type async for event in events][-1] == "stream.gap"

    async def test_spares_a_run_until_its_end_and_its_time_to_live(self) -> None:
        log = new_log(retention=Retention(count=5))
        async with LogStream(log) as stream:
            run = await stream.run("answer", speak(10), ttl=100)
            for number in range(20):
                await asyncio.sleep(5)
                for each in events(*(f"busy/{number}.{part}" for part in range(10))):
                    await stream.publish(each)
            assert await text(aiter(run)) == (WORDS, "completed")
            await asyncio.sleep(100)
            await stream.publish(create_event("busy"))
            await log.trim()
            assert await read_all(log, topics="answer") == []
            with pytest.raises(UnknownRun):
                await read(stream, "answer")
            with pytest.raises(UnknownRun):
                await run.wait()

    async def test_spares_it_though_others_have_begun(self) -> None:
        log = new_log(retention=Retention(count=1))
        async with LogStream(log) as stream:
            runs = [await stream.run("answer", speak(), ttl=100)]
            for _ in range(2):
                await runs[-1].wait()
                await asyncio.sleep(45)
                runs.append(await stream.run("answer", speak(), ttl=100))
            await log.append(events_of_others())
            await asyncio.sleep(3)
            for run in runs:
                assert await text(aiter(run)) == (WORDS, "completed")
            await asyncio.sleep(5)  # 103 seconds after the end of the first
            await log.append(events_of_others())
            with pytest.raises(UnknownRun):
                await text(aiter(runs[0]))
            for run in runs[1:]:
                assert await text(aiter(run)) == (WORDS, "completed")
            await asyncio.sleep(200)
            await log.append(events_of_others())
            assert await read_all(log, topics="answer") == []

    async def test_spares_it_though_another_was_about_to_begin(self) -> None:
        log = SlowNotes(clock=loop_clock, retention=Retention(count=1))
        async with LogStream(log) as stream:
            run = await stream.run("answer", speak(), ttl=100)
            await run.wait()
            log.seconds = 1
            beginning = asyncio.create_task(stream.run("answer", speak()))
            await asyncio.sleep(0.5)
            beginning.cancel()
            await asyncio.wait([beginning])
            assert beginning.cancelled()
            log.seconds = 0
            await log.append(events_of_others())
            assert await read(stream, "answer") == (WORDS, "completed")
            await asyncio.sleep(100)
            assert await stream.status("answer") is None

    async def test_spares_it_though_who_found_it_interrupted_could_not_say_so(self) -> None:
        log = SlowNotes(clock=loop_clock, retention=Retention(count=1))
        dying = Crash(log)
        await dying.run("answer", for_ever(), ttl=100)
        await asyncio.sleep(2.5)
        await dying.crash()
        async with LogStream(log) as finder, finder.attach("answer"):
            log.seconds = 4
            await asyncio.sleep(15)  # its lease is over, and is being taken
        log.seconds = 0
        await log.append(events_of_others())
        async with LogStream(log) as other:
            assert await read(other, "answer") == ([0, 1, 2], "interrupted")
        await dying.aclose()

    async def test_forgets_what_stopped_runs_leave_behind(self) -> None:
        log = new_log()
        async with LogStream(log) as one, LogStream(log) as other:
            for number in range(5):
                await one.run(f"answers.{number}", for_ever(), ttl=10)
                await other.stop(f"answers.{number}")
            await asyncio.sleep(100)
            await log.trim()
            assert not log._notes_by_key


KINDS: dict[str, Callable[[Path], Any]] = {
    "MemoryLog": lambda path: MemoryLog(),
    "SQLiteLog": lambda path: SQLiteLog(path, durability="normal"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.real_time
async def test_works_on_every_log(kind: str, tmp_path: Path) -> None:
    async with KINDS[kind](tmp_path / "events.db") as log, LogStream(log) as stream:
        runs = [await stream.run(f"answers.{n}", speak(0.002)) for n in range(20)]
        found = await asyncio.gather(*(text(aiter(each)) for each in runs for _ in range(5)))
        assert found == [(WORDS, "completed")] * 100
        run = await stream.run("long", for_ever())
        async with run.events() as events:
            await anext(events)
        await run.stop()
        assert (await run.wait()).state == "cancelled"
        assert await read(stream, "long") == ([0], "cancelled")


async def test_closing_that_is_cancelled_does_not_wait_for_ever_for_a_source_that_hangs() -> None:
    let_go = asyncio.Event()

    async def hangs() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.sleep(10_000)
        finally:
            await let_go.wait()

    stream = LogStream(new_log())
    await stream.run("answer", hangs())
    await asyncio.sleep(1)
    closing = asyncio.create_task(stream.aclose())
    await asyncio.sleep(1)
    closing.cancel()
    await asyncio.sleep(4)
    assert not closing.done()
    await asyncio.sleep(2)
    assert closing.cancelled()
    let_go.set()
    await stream.aclose()


def test_cancelled_anywhere_it_leaves_nothing() -> None:
    async def scenario() -> None:
        async with LogStream(new_log()) as stream:
            run = await stream.run("answer", speak())
            async with run.events() as events:
                await anext(events)
            await stream.stop("answer")
            await stream.run("answer", speak, once=True)

    cancel_at_every_await(scenario)


def test_beginning_that_was_cancelled_holds_nobody_up() -> None:
    async def scenario() -> None:
        log = new_log()

        async def begin() -> None:
            async with LogStream(log) as stream:
                await stream.run("answer", speak())

        for steps in range(12):
            task = asyncio.create_task(begin())
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            async with LogStream(log) as stream, asyncio.timeout(10):
                run = await stream.run("answer", speak())
                await run.wait()

    run(scenario())


class Elsewhere:
    """An event loop in a thread of its own, which ends as `asyncio.run` ends one."""

    _loop: asyncio.AbstractEventLoop
    _over: asyncio.Event

    def __enter__(self) -> "Elsewhere":
        is_there = threading.Event()

        async def serve() -> None:
            self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
            is_there.set()
            await self._over.wait()

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()))
        self._thread.start()
        assert is_there.wait(PATIENCE)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(PATIENCE)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)


class TestEventLoops:
    """Each looks after what goes on in it, since any of them may end."""

    def test_a_run_is_stopped_from_elsewhere_when_the_loop_of_another_has_ended(self) -> None:
        log = MemoryLog()
        stream, other = LogStream(log), LogStream(log)
        with Elsewhere() as there:
            with Elsewhere() as first:
                first.run(stream.run("one", for_ever()))
                there.run(stream.run("two", for_ever()))
            assert there.run(other.stop("two"))
            assert [there.run(stream.status(each)).state for each in ("one", "two")] == [  # type: ignore[union-attr]
                "interrupted",
                "cancelled",
            ]
        asyncio.run(stream.aclose())
        asyncio.run(other.aclose())

    def test_a_reader_is_told_of_the_end_when_the_loop_of_another_has_ended(self) -> None:
        log = MemoryLog()
        stream, dying = LogStream(log), Crash(log, lease=0.3)
        with Elsewhere() as there:
            there.run(dying.run("answer", for_ever()))
            events = stream.attach("answer")
            with Elsewhere() as first:
                first.run(stream.attach("answer").__aenter__())
                there.run(events.__aenter__())
            there.run(dying.crash())
            assert there.run(text(events))[1] == "interrupted"
            there.run(events.__aexit__(None, None, None))
            there.run(stream.aclose())
            there.run(dying.aclose())

    def test_a_stream_that_is_closed_waits_for_runs_elsewhere(self, tmp_path: Path) -> None:
        url = f"sqlite:///{tmp_path / 'events.db'}"
        stream = LogStream(url)

        async def last_type() -> str:
            async with SQLiteLog(tmp_path / "events.db") as log:
                return (await log.read()).records[-1].type

        with Elsewhere() as there:
            there.run(stream.run("answer", for_ever()))
            asyncio.run(stream.aclose())
            assert asyncio.run(last_type()) == "stream.end"

    def test_but_not_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(run_module, "_PATIENCE", 0.1)
        let_go = asyncio.Event()

        async def hangs() -> AsyncIterator[int]:
            try:
                yield 1
                await asyncio.sleep(10_000)
            finally:
                await let_go.wait()

        stream = LogStream(MemoryLog())
        with Elsewhere() as there:
            run = there.run(stream.run("answer", hangs()))
            there.run(anext(aiter(run)))
            asyncio.run(stream.aclose())
            there._loop.call_soon_threadsafe(let_go.set)


PRODUCER = """
import asyncio, sys
from codomyrmex.events.streaming.log import LogStream, SQLiteLog

async def numbers():
    number = 0
    while True:
        yield number
        number += 1
        await asyncio.sleep(0.01)

async def main():
    log = SQLiteLog(sys.argv[1], durability="normal")
    async with log, LogStream(log, lease=0.6) as stream:
        await stream.run("answer", numbers())
        print("there", flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.mark.real_time
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no such signal")
class TestOtherProcesses:
    def start(self, path: Path) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PRODUCER), str(path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        return process

    async def test_one_that_is_killed_is_told_to_be_interrupted(self, tmp_path: Path) -> None:
        path = tmp_path / "events.db"
        process = await asyncio.to_thread(self.start, path)
        log = SQLiteLog(path, durability="normal")
        async with (
            log,
            LogStream(log, lease=0.6) as stream,
            stream.attach("answer") as events,
        ):
            found = [(await anext(events)).data for _ in range(20)]
            process.kill()
            found += [event.data async for event in events]
        process.communicate()
        assert found[-1]["state"] == "interrupted"
        assert found[:-1] == list(range(len(found) - 1))

    async def test_one_is_stopped_from_elsewhere(self, tmp_path: Path) -> None:
        path = tmp_path / "events.db"
        process = await asyncio.to_thread(self.start, path)
        log = SQLiteLog(path, durability="normal")
        async with log, LogStream(log, lease=0.6) as stream:
            async with asyncio.timeout(PATIENCE):
                assert await stream.stop("answer")
            assert (await stream.status("answer")).state == "cancelled"  # type: ignore[union-attr]
        process.kill()
        process.communicate()
