"""`Consumer`: a durable cursor, one holder, at least once; and what becomes of poison."""

import asyncio
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest

from codomyrmex.events.streaming import (
    ConsumerInUse,
    Event,
    LogFull,
    StreamClosed,
    TopicError,
    create_event,
)
from codomyrmex.events.streaming.log import (
    EARLIEST,
    LATEST,
    Consumer,
    Lag,
    Location,
    Log,
    LogStream,
    MemoryLog,
    Record,
    Retention,
    SQLiteLog,
)
from codomyrmex.events.streaming.log import (
    consumer as consumer_module,
)
from codomyrmex.events.streaming.log.base import Change, Note, Page, Start
from codomyrmex.events.streaming.log.lease import LEASE
from codomyrmex.events.streaming.testing import cancel_at_every_await
from codomyrmex.events.streaming.topics import Selection
from tests.conformance.test_logs import event, events, ids, read_all
from tests.log.test_lease import LoopClock
from tests.log.test_peers import Process

PATIENCE = 30.0  # seconds of real time for what must happen soon

OpenLog = Callable[..., Log]


class FileLog(SQLiteLog):
    """One for which virtual time stands still while it appends."""

    async def _append(self, drafts: list[Record], guard: Note | None = None) -> list[Record]:
        done = threading.Event()
        asyncio.get_running_loop().run_in_executor(None, done.wait)
        try:
            return await super()._append(drafts, guard)
        finally:
            done.set()


@pytest.fixture(params=["memory", "file"])
def open_log(request: pytest.FixtureRequest, tmp_path: Path) -> OpenLog:
    """A new log, whose clock is the loop's."""
    number = itertools.count()

    def open_log(*, clock: Callable[[], int] | None = None, **options: Any) -> Log:
        clock = clock or LoopClock()
        if request.param == "memory":
            return MemoryLog(clock=clock, **options)
        return FileLog(tmp_path / f"{next(number)}.db", clock=clock, **options)

    return open_log


class Full(MemoryLog):
    """One whose notes cannot be written while it is full."""

    full = False

    async def _change(self, change: Change) -> Note | None:
        if self.full:
            raise LogFull("somewhere")
        return await super()._change(change)


def rounded(lag: Lag) -> tuple[int, int]:
    return lag.events, round(lag.seconds)


def names(found: Iterable[Event]) -> list[Any]:
    """The ids of events, and what gaps say."""
    return [each.data if each.is_control else each.id for each in found]


async def take(consumer: AsyncIterator[Event], count: int) -> list[Any]:
    return names([await anext(consumer) for _ in range(count)])


async def handled(stream: LogStream, name: str = "c", **options: Any) -> list[Any]:
    """What a consumer of this name gets at once, when it is entered."""
    async with stream.consumer(name, **options) as consumer:
        lag = await consumer.lag()
        return await take(consumer, lag.events)


async def committed(stream: LogStream, count: int, name: str = "c", **options: Any) -> None:
    """Have a consumer of this name commit so many."""
    async with stream.consumer(name, **options) as consumer:
        found = [await anext(consumer) for _ in range(count)]
        await consumer.commit(found[-1])


class TestConsuming:
    async def test_goes_on_after_what_was_committed(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1", "2", "3", "4"))
            async with stream.consumer("c") as consumer:
                assert await take(consumer, 3) == ["1", "2", "3"]
                await consumer.commit("2")
            async with stream.consumer("c") as consumer:
                assert await take(consumer, 2) == ["3", "4"]
                waiting = asyncio.create_task(take(consumer, 1))
                await asyncio.sleep(60)
                await log.append(events("5"))
                assert await waiting == ["5"]
            assert await handled(stream) == ["3", "4", "5"]

    async def test_commits_nothing_by_itself(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1", "2"))
            for _ in range(2):
                assert await handled(stream) == ["1", "2"]

    async def test_each_name_has_a_place_of_its_own(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("a/1", "b/1", "a/2"))
            await committed(stream, 1, "one", topic="a")
            assert await handled(stream, "one", topic="a") == ["a/2"]
            assert await handled(stream, "one", topic=["a", "b"]) == ["b/1", "a/2"]
            assert await handled(stream, "two") == ["a/1", "b/1", "a/2"]

    async def test_it_is_there_when_the_file_is_opened_again(self, tmp_path: Path) -> None:
        url = f"sqlite:///{tmp_path}/events.db"
        async with LogStream(url) as stream:
            await stream.log.append(events("1", "2", "3"))
            await committed(stream, 2)
        async with LogStream(url) as stream:
            assert await handled(stream) == ["3"]

    @pytest.mark.parametrize(
        ("start", "expected"), [(EARLIEST, ["1", "2", "3"]), (LATEST, ["3"]), ("1", ["2", "3"])]
    )
    async def test_a_new_name_begins_where_it_is_told_to(
        self, open_log: OpenLog, start: str, expected: list[str]
    ) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1", "2"))
            async with stream.consumer("c", start=start):
                pass
            await log.append(events("3"))
            assert await handled(stream, start="2") == expected

    @pytest.mark.parametrize("there", [[], ["x/1"], ["a/1"], ["a/1", "x/1"]])
    async def test_the_latest_is_after_all_there_is(
        self, open_log: OpenLog, there: list[str]
    ) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events(*there))
            assert await handled(stream, topic="a", start=LATEST) == []
            await log.append(events("x/9", "a/9"))
            assert await handled(stream, topic="a", start=LATEST) == ["a/9"]

    async def test_a_name_that_has_a_place_looks_for_no_other(self) -> None:
        class Counting(MemoryLog):
            looked = 0

            async def _locate(self, cursor: str, selection: Selection) -> Location:
                self.looked += 1
                return await super()._locate(cursor, selection)

            async def _begin(self, after: str, selection: Selection) -> Start:
                self.looked += 1
                return await super()._begin(after, selection)

        async with Counting() as log, LogStream(log) as stream:
            for _ in range(3):
                async with stream.consumer("c", start=LATEST) as consumer:
                    await consumer.lag()
            assert log.looked == 1

    async def test_the_latest_of_a_quiet_topic_is_known_for_as_long_as_nothing_is_missed(
        self, open_log: OpenLog
    ) -> None:
        async with open_log(retention=Retention(count=10)) as log, LogStream(log) as stream:
            await log.append(events("quiet/1", "busy/0"))
            await handled(stream, topic="quiet", start=LATEST)
            for start in range(1, 15_001, 5000):
                await log.append(events(*(f"busy/{start + n}" for n in range(5000))))
            await log.trim()
            await log.append(events("quiet/2"))
            assert await handled(stream, topic="quiet") == ["quiet/2"]

    async def test_what_retention_took_is_told_in_its_place(self, open_log: OpenLog) -> None:
        async with open_log(retention=Retention(count=2)) as log, LogStream(log) as stream:
            await log.append(events("1", "2"))
            await committed(stream, 1)
            await log.append(events("3", "4", "5"))
            await log.trim()
            gap = {"after": "1", "reason": "trimmed", "missed": 2}
            async with stream.consumer("c") as consumer:
                assert await take(consumer, 2) == [gap, "4"]
            async with stream.consumer("c") as consumer:  # it is told until it is passed
                told = await anext(consumer)
                assert (told.type, told.data) == ("stream.gap", gap)
                await take(consumer, 2)
                await consumer.commit("4")
                await consumer.commit(told)
            assert await handled(stream) == ["5"]

    async def test_that_is_told_no_more_once_it_is_committed(self, open_log: OpenLog) -> None:
        async with open_log(retention=Retention(count=2)) as log, LogStream(log) as stream:
            await log.append(events("1", "2"))
            await committed(stream, 1)
            await log.append(events("3", "4", "5"))
            await log.trim()
            async with stream.consumer("c") as consumer:
                told = await anext(consumer)
                for again in (told, told.id):
                    await consumer.commit(again)
                assert (await consumer.lag()).events == 2
            assert await handled(stream) == ["4", "5"]
            await log.append(events("6"))
            await log.trim()
            async with stream.consumer("c") as consumer:
                gap = {"after": "1", "reason": "trimmed", "missed": 1}
                assert await take(consumer, 3) == [gap, "5", "6"]

    @pytest.mark.parametrize("how", ["new", "reset", "reset to a time", "reset by nobody"])
    async def test_what_went_before_the_first_commit_is_told_too(
        self, open_log: OpenLog, how: str
    ) -> None:
        async with open_log(retention=Retention(count=3)) as log, LogStream(log) as stream:
            await log.append(events("1", "2"))
            consumer = stream.consumer("c")
            if how != "new":
                await committed(stream, 2)
            if how == "reset by nobody":
                await consumer.reset(EARLIEST)
            async with consumer:
                if how == "reset":
                    await consumer.reset(EARLIEST)
                elif how == "reset to a time":
                    await consumer.reset(datetime(1980, 1, 1, tzinfo=UTC))
                await take(consumer, 1)
            await log.append(events("3", "4", "5", "6"))
            await log.trim()
            async with consumer:
                gap = {"after": EARLIEST, "reason": "trimmed", "missed": 3}
                assert await take(consumer, 4) == [gap, "4", "5", "6"]

    async def test_what_went_before_the_first_visit_is_not(self, open_log: OpenLog) -> None:
        async with open_log(retention=Retention(count=2)) as log, LogStream(log) as stream:
            await log.append(events("1", "2", "3", "4"))
            await log.trim()
            assert await handled(stream) == ["3", "4"]

    @pytest.mark.parametrize("how", ["latest", "reset", "reset to a time", "committed"])
    async def test_a_quiet_topic_raises_no_alarm_whatever_is_forgotten(
        self, open_log: OpenLog, how: str
    ) -> None:
        async with open_log(retention=Retention(count=5)) as log, LogStream(log) as stream:
            await log.append(events("quiet/1", "busy/0"))
            start = LATEST if how == "latest" else EARLIEST
            async with stream.consumer("c", "quiet", start=start) as consumer:
                if how == "committed":
                    await consumer.commit(await anext(consumer))
                elif how == "reset":
                    await consumer.reset(LATEST)
                elif how == "reset to a time":
                    await consumer.reset(datetime(2100, 1, 1, tzinfo=UTC))
            for number in range(24):
                await log.append([event(f"{number}.{n}", "busy") for n in range(500)])
                await log.trim()
            await log.append(events("quiet/2"))
            assert await handled(stream, topic="quiet") == ["quiet/2"]

    async def test_an_id_that_comes_again_is_another_event(self, open_log: OpenLog) -> None:
        async with open_log(retention=Retention(count=3)) as log, LogStream(log) as stream:
            await log.append(events("1", "2", "3"))
            async with stream.consumer("c") as consumer:
                await take(consumer, 3)
                await log.append(events("4"))
                await log.trim()
                (again,) = await log.append(events("1"))
                assert await take(consumer, 2) == ["4", "1"]
                await consumer.commit("1")  # the first by this name
                assert (await consumer.lag()).events == 3
                await consumer.commit("3")
                await consumer.commit("1")
                assert await consumer.lag() == Lag(0, 0.0)
                await consumer.commit(again)
            assert await handled(stream) == []

    async def test_a_record_that_was_not_yielded_is_not_one_of_the_same_id(
        self, open_log: OpenLog
    ) -> None:
        async with open_log(retention=Retention(count=1)) as log, LogStream(log) as stream:
            await log.append(events("1"))
            async with stream.consumer("c") as consumer:
                await take(consumer, 1)
                await log.append(events("2"))
                await log.trim()
                (again,) = await log.append(events("1"))
                for _ in range(2):
                    with pytest.raises(ValueError, match="has not yielded"):
                        await consumer.commit(again)
                    await consumer.commit("1")

    async def test_a_note_that_knows_no_position_goes_by_the_id(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1", "2", "3"))
            await log._change(Change(Note("consumer:c", {"cursor": "1", "attempts": {}})))
            assert (await stream.consumer("c").lag()).events == 2
            assert await handled(stream) == ["2", "3"]

    async def test_what_cannot_be_decoded_is_passed_over(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            broken = Record.of(event("broken"))._replace(body=b"{")
            await log.append([broken, *events("1"), broken._replace(id="again"), *events("2")])
            async with stream.consumer("c") as consumer:
                assert await take(consumer, 2) == ["1", "2"]
                await consumer.commit("1")
            assert stream.statistics().failed == 2

    async def test_more_than_are_read_at_a_time_come_in_order(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            expected = [str(number) for number in range(2500)]
            await log.append(events(*expected))
            async with stream.consumer("c") as consumer:
                assert await take(consumer, 2500) == expected

    async def test_is_entered_before_anything_else_and_again_when_it_was_left(
        self, open_log: OpenLog
    ) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1", "2"))
            consumer = stream.consumer("c")
            for call in (anext(consumer), anext(consumer.batches()), consumer.commit("1")):
                with pytest.raises(RuntimeError, match="async with"):
                    await call
            for expected in ("1", "2"):
                async with consumer:
                    with pytest.raises(RuntimeError, match="entered already"):
                        await consumer.__aenter__()
                    found = await anext(consumer)
                    assert found.id == expected
                    await consumer.commit(found)

    async def test_leaves_no_reader(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            async with stream.consumer("c"):
                assert log.statistics().readers == 1
            assert log.statistics().readers == 0

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"name": ""}, "printable"),
            ({"name": "a\nb"}, "printable"),
            ({"commit_every": 0}, "1 or more"),
            ({"commit_seconds": 0.0}, "above 0"),
            ({"topic": ""}, "topic"),
        ],
    )
    async def test_what_cannot_be_is_refused_where_it_is_given(
        self, options: dict[str, Any], says: str
    ) -> None:
        async with LogStream("memory://") as stream:
            with pytest.raises(ValueError, match=says):
                stream.consumer(**{"name": "c", **options})
            for limit, seconds in ((0, 0.0), (1, -1.0)):
                with pytest.raises(ValueError, match="0 or more"):
                    stream.consumer("c").batches(limit, seconds=seconds)
        for lease in (0.0, float("nan"), float("inf"), 1e300):
            with pytest.raises(ValueError, match="above 0"):
                LogStream("memory://", lease=lease)


class TestCommitting:
    async def test_is_up_to_and_including(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            (record, *_) = await log.append(events("1", "2", "3", "4", "5"))
            async with stream.consumer("c") as consumer:
                found = [await anext(consumer) for _ in range(4)]
                await consumer.commit(record)
                assert (await consumer.lag()).events == 4
                await consumer.commit(found[2])
                assert (await consumer.lag()).events == 2
                for again in ("1", found[1], "3", record):
                    await consumer.commit(again)
                assert (await consumer.lag()).events == 2
                await consumer.commit("4")
                for other in (EARLIEST, LATEST):
                    with pytest.raises(ValueError, match="has not yielded the event"):
                        await consumer.commit(other)
            assert await handled(stream) == ["5"]

    async def test_of_what_was_not_yielded_is_refused(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("a/1", "b/1", "a/2", "a/3"))
            async with stream.consumer("c", "a") as consumer:
                await take(consumer, 2)
                for other in ("never", "b/1", "a/3", LATEST, create_event(1)):
                    with pytest.raises(ValueError, match="has not yielded the event"):
                        await consumer.commit(other)
                assert (await consumer.lag()).events == 3

    async def test_of_the_same_by_two_at_once_goes_never_back(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events(*(str(number) for number in range(20))))
            async with stream.consumer("c") as consumer:
                found = [await anext(consumer) for _ in range(20)]
                found.reverse()
                await asyncio.gather(*(consumer.commit(each) for each in found))
            assert await handled(stream) == []

    async def test_the_oldest_of_too_many_go_with_later_ones(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(consumer_module, "_MOST_UNCOMMITTED", 3)
        async with MemoryLog() as log, LogStream(log) as stream:
            await log.append(events("1", "2", "3", "4", "5"))
            async with stream.consumer("c") as consumer:
                await take(consumer, 4)
                with pytest.raises(ValueError, match="too many others"):
                    await consumer.commit("1")
                await consumer.commit("2")
                await consumer.commit("1")
            assert await handled(stream) == ["3", "4", "5"]

    async def test_what_was_trimmed_meanwhile_is_committed_too(self, open_log: OpenLog) -> None:
        async with open_log(retention=Retention(count=1)) as log, LogStream(log) as stream:
            await log.append(events("1"))
            async with stream.consumer("c") as consumer:
                found = await anext(consumer)
                for start in range(0, 15_000, 5000):
                    await log.append(events(*(f"x/{start + n}" for n in range(5000))))
                await log.trim()
                await consumer.commit(found)
                await consumer.commit(found)
                with pytest.raises(ValueError, match="has not yielded"):
                    await consumer.commit("x/3")

    async def test_every_so_many_when_the_next_is_asked_for(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events(*(str(number) for number in range(10))))
            lags: list[int] = []
            async with stream.consumer("c", commit_every=3) as consumer:
                for _ in range(9):
                    await anext(consumer)
                    lags.append((await consumer.lag()).events)
                assert lags == [10, 10, 10, 7, 7, 7, 4, 4, 4]
            assert await handled(stream) == ["8", "9"]  # nobody asked for the one after "8"

    async def test_every_so_many_though_that_is_more_than_are_known(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(consumer_module, "_MOST_UNCOMMITTED", 3)
        async with MemoryLog() as log, LogStream(log) as stream:
            await log.append(events(*(str(number) for number in range(12))))
            async with stream.consumer("c", commit_every=5) as consumer:
                lags: list[int] = []
                for _ in range(12):
                    await anext(consumer)
                    lags.append((await consumer.lag()).events)
                assert lags == [12] * 5 + [7] * 5 + [2] * 2

    async def test_every_so_many_seconds_whether_or_not_something_comes(
        self, open_log: OpenLog
    ) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1", "2", "3"))
            async with stream.consumer("c", commit_seconds=5.0) as consumer:
                await take(consumer, 2)
                await asyncio.sleep(5)  # of these, "1" is dealt with
                await take(consumer, 1)
                assert (await consumer.lag()).events == 1
                waiting = asyncio.create_task(take(consumer, 1))
                await asyncio.sleep(4.9)
                assert (await consumer.lag()).events == 1
                await asyncio.sleep(0.2)
                assert (await consumer.lag()).events == 0
                await log.append(events("4"))
                assert await waiting == ["4"]

    async def test_a_commit_of_ones_own_is_as_good(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1", "2", "3"))
            async with stream.consumer("c", commit_seconds=5.0) as consumer:
                await take(consumer, 2)
                await consumer.commit("2")
                await asyncio.sleep(10)
                await take(consumer, 1)
                await asyncio.sleep(10)
            assert await handled(stream) == ["3"]

    async def test_a_commit_of_ones_own_begins_the_time_anew(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1", "2", "3"))
            async with stream.consumer("c", commit_seconds=5.0) as consumer:
                await take(consumer, 2)
                await asyncio.sleep(4)
                await consumer.commit("2")
                await take(consumer, 1)
                waiting = asyncio.create_task(take(consumer, 1))
                await asyncio.sleep(4)
                assert (await consumer.lag()).events == 1
                await asyncio.sleep(2)
                assert (await consumer.lag()).events == 0
                waiting.cancel()
                await asyncio.wait([waiting])

    async def test_a_commit_of_ones_own_keeps_what_is_due_later(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1", "2", "3"))
            async with stream.consumer("c", commit_seconds=5.0) as consumer:
                await take(consumer, 3)
                waiting = asyncio.create_task(take(consumer, 1))
                await asyncio.sleep(4)
                await consumer.commit("1")
                await asyncio.sleep(2)
                assert (await consumer.lag()).events == 0
                waiting.cancel()
                await asyncio.wait([waiting])

    async def test_that_is_late_when_the_next_is_asked_for_is_done_first(
        self, open_log: OpenLog
    ) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1", "2", "3"))
            async with stream.consumer("c", commit_seconds=5.0) as consumer:
                await take(consumer, 2)
                await asyncio.sleep(10)
                await take(consumer, 1)
                assert (await consumer.lag()).events == 1

    @pytest.mark.parametrize("fails", [False, True])
    async def test_at_the_end_of_a_block_that_ends_well(
        self, open_log: OpenLog, fails: bool
    ) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1", "2", "3"))
            try:
                async with stream.consumer("c", commit_every=100) as consumer:
                    await take(consumer, 3)
                    if fails:
                        raise KeyError
            except KeyError:
                pass
            assert await handled(stream) == (["1", "2", "3"] if fails else ["3"])


class TestBatches:
    async def test_have_what_is_there_and_no_more_than_asked_for(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events(*(str(number) for number in range(2500))))
            async with stream.consumer("c") as consumer:
                batches = consumer.batches(1200)
                found = [await anext(batches) for _ in range(3)]
                assert [len(batch) for batch in found] == [1200, 1200, 100]
                assert names(found[0] + found[1] + found[2]) == [str(n) for n in range(2500)]
                waiting = asyncio.create_task(anext(batches))
                await asyncio.sleep(60)
                await log.append(events("a", "b"))
                assert names(await waiting) == ["a", "b"]
                await consumer.commit("a")
                await log.append(events("c"))
            assert await handled(stream) == ["b", "c"]

    async def test_wait_to_be_filled_for_as_long_as_they_are_told(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            loop = asyncio.get_running_loop()
            async with stream.consumer("c") as consumer:
                batches = consumer.batches(3, seconds=10.0)
                waiting = asyncio.create_task(anext(batches))
                await asyncio.sleep(100)
                for name in ("1", "2"):
                    await log.append(events(name))
                    await asyncio.sleep(4)
                assert not waiting.done()
                assert names(await waiting) == ["1", "2"]
                assert loop.time() == pytest.approx(110)
                await log.append(events("3", "4", "5", "6"))
                assert names(await anext(batches)) == ["3", "4", "5"]
                assert loop.time() == pytest.approx(110)

    async def test_are_dealt_with_as_a_whole(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1", "2", "3", "4", "5"))
            async with stream.consumer("c", commit_every=1) as consumer:
                batches = consumer.batches(2)
                await anext(batches)
                assert (await consumer.lag()).events == 5
                await anext(batches)
                assert (await consumer.lag()).events == 3

    async def test_commit_in_time_while_they_wait_to_be_filled(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1", "2", "3"))
            async with stream.consumer("c", commit_seconds=5.0) as consumer:
                batches = consumer.batches(2, seconds=60.0)
                await anext(batches)
                waiting = asyncio.create_task(anext(batches))
                await asyncio.sleep(6)
                assert (await consumer.lag()).events == 1
                assert names(await waiting) == ["3"]

    async def test_end_with_the_log(self, open_log: OpenLog) -> None:
        log = open_log()
        async with LogStream(log) as stream, stream.consumer("c") as consumer:
            waiting = asyncio.create_task(all_of(consumer.batches()))
            await asyncio.sleep(1)
            await log.append(events("1"))
            await asyncio.sleep(1)
            await log.close()
            assert [names(batch) for batch in await waiting] == [["1"]]


@pytest.mark.real_time
class TestTurns:
    """Others on the event loop have theirs, though there is always something to read."""

    @pytest.mark.parametrize("how", ["iterator", "batches", "run", "events"])
    async def test_of_others_and_of_the_lease(self, how: str) -> None:
        async with MemoryLog() as log, LogStream(log, lease=0.6) as stream:
            await log.append(events(*(str(number) for number in range(2000))))

            worked: list[Event] = []

            def works(event: Event) -> None:
                worked.append(event)
                until = time.perf_counter() + 0.001
                while time.perf_counter() < until:
                    pass

            async def consume() -> None:
                if how == "events":
                    async with stream.events(after=EARLIEST) as found:
                        async for each in found:
                            works(each)
                async with stream.consumer("c", commit_every=1000) as consumer:
                    if how == "run":
                        await consumer.run(works)
                    elif how == "iterator":
                        async for each in consumer:
                            works(each)
                    else:
                        async for batch in consumer.batches(2):
                            works(batch[0])

            consuming = asyncio.create_task(consume())
            turns = 0
            while len(worked) < 1000:  # which takes a second
                await asyncio.sleep(0)
                turns += len(worked) > 0
            assert turns > 20
            if how != "events":
                with pytest.raises(ConsumerInUse):  # for it is renewed
                    await stream.consumer("c").__aenter__()
            consuming.cancel()
            await asyncio.wait([consuming])


async def all_of(iterator: AsyncIterator[Any]) -> list[Any]:
    return [each async for each in iterator]


class TestHolding:
    async def test_one_at_a_time(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream, LogStream(log) as other:
            async with stream.consumer("c"):
                for _ in range(10):
                    await asyncio.sleep(LEASE)
                    with pytest.raises(ConsumerInUse, match="consumer 'c' is in use") as caught:
                        await other.consumer("c").__aenter__()
                    assert caught.value.name == "c"
                    assert 0 < caught.value.seconds <= LEASE
                    with pytest.raises(ConsumerInUse):
                        await other.consumer("c").reset(EARLIEST)
                async with other.consumer("d"):
                    pass
            async with other.consumer("c"):
                pass

    @pytest.mark.parametrize("lease", [1.0, 60.0])
    async def test_for_the_seconds_that_a_stream_says(
        self, open_log: OpenLog, lease: float
    ) -> None:
        async with (
            open_log() as log,
            LogStream(log, lease=lease) as stream,
            stream.consumer("c"),
        ):
            with pytest.raises(ConsumerInUse) as caught:
                await LogStream(log).consumer("c").__aenter__()
            assert lease * 0.9 < caught.value.seconds <= lease

    async def test_who_hung_for_too_long_gets_and_commits_nothing_more(
        self, open_log: OpenLog
    ) -> None:
        clock = LoopClock()
        async with open_log(clock=clock) as log, LogStream(log) as stream:
            await log.append(events("1", "2", "3"))
            slow = stream.consumer("c")
            async with slow, stream.consumer("d") as waits:
                await take(slow, 2)
                await take(waits, 3)
                waiting = asyncio.create_task(anext(waits))
                await asyncio.sleep(1)
                clock.set_by += 2 * LEASE  # all hang, and their leases are not renewed
                async with stream.consumer("c") as quick, stream.consumer("d"):
                    assert await take(quick, 1) == ["1"]
                    await quick.commit("1")
                    with pytest.raises(ConsumerInUse) as caught:
                        await slow.commit("2")
                    assert caught.value.seconds > 0
                    with pytest.raises(ConsumerInUse):
                        await anext(slow)
                    with pytest.raises(ConsumerInUse):
                        await slow.commit("1")
                    with pytest.raises(ConsumerInUse):
                        await slow.reset(LATEST)
                    with pytest.raises(ConsumerInUse):  # at the next renewal
                        await waiting
                    assert (await quick.lag()).events == 2
                    assert await take(quick, 2) == ["2", "3"]
            assert await handled(stream) == ["2", "3"]

    async def test_who_hung_finds_out_before_the_first_event(self, open_log: OpenLog) -> None:
        clock = LoopClock()
        async with open_log(clock=clock) as log, LogStream(log) as stream:
            await log.append(events("1", "2", "3"))
            handler = Handler()

            async def hangs(event: Event) -> None:
                await handler(event)
                await asyncio.sleep(1)

            async with stream.consumer("a") as a, stream.consumer("b") as b:
                running = asyncio.create_task(stream.consumer("c").run(hangs))
                await take(a, 1)
                batches = b.batches(1)
                await anext(batches)
                await asyncio.sleep(0.5)
                clock.set_by += 2 * LEASE
                async with stream.consumer("a"), stream.consumer("b"), stream.consumer("c"):
                    for call in (anext(a), anext(batches), running):
                        with pytest.raises(ConsumerInUse):
                            await call
            assert handler.got == ["1"]

    async def test_who_waits_finds_out_before_it_gets_what_comes(self, open_log: OpenLog) -> None:
        clock = LoopClock()
        async with open_log(clock=clock) as log, LogStream(log) as stream:
            async with stream.consumer("c") as slow:
                waiting = asyncio.create_task(anext(slow))
                await asyncio.sleep(1)
                clock.set_by += 2 * LEASE
                async with stream.consumer("c"):
                    await log.append(events("1"))
                    with pytest.raises(ConsumerInUse):
                        await waiting
            assert asyncio.get_running_loop().time() < LEASE / 3  # before it is to be renewed

    async def test_who_hung_goes_on_where_nobody_else_has_come(self, open_log: OpenLog) -> None:
        clock = LoopClock()
        async with open_log(clock=clock) as log, LogStream(log) as stream:
            await log.append(events("1", "2"))
            async with stream.consumer("c") as consumer:
                await take(consumer, 1)
                clock.set_by += 2 * LEASE
                assert await take(consumer, 1) == ["2"]
                with pytest.raises(ConsumerInUse):  # for it is renewed
                    await stream.consumer("c").__aenter__()

    async def test_who_lost_it_commits_nothing_whether_or_not_it_is_committed(
        self, open_log: OpenLog
    ) -> None:
        clock = LoopClock()
        async with open_log(clock=clock) as log, LogStream(log) as stream:
            await log.append(events("1", "2"))
            async with stream.consumer("c") as slow:
                found = [await anext(slow) for _ in range(2)]
                await slow.commit("1")
                clock.set_by += 2 * LEASE
                async with stream.consumer("c"):
                    for id_ in ("1", "never"):
                        with pytest.raises(ConsumerInUse):
                            await slow.commit(id_)
                    for each in found:
                        with pytest.raises(ConsumerInUse):
                            await slow.commit(each)

    async def test_who_lost_it_comes_to_the_end_when_the_log_is_closed(
        self, open_log: OpenLog
    ) -> None:
        clock = LoopClock()
        log = open_log(clock=clock)
        async with LogStream(log) as stream:
            await log.append(events("1"))
            async with stream.consumer("c") as slow:
                clock.set_by += 2 * LEASE
                async with stream.consumer("c"):
                    with pytest.raises(ConsumerInUse):
                        await anext(slow)
                    await log.close()
                    assert await all_of(slow) == []

    async def test_is_over_at_once_when_the_stream_is_closed(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as other:
            stream = LogStream(log)
            await log.append(events("1", "2"))
            async with stream.consumer("c", commit_every=100) as consumer:
                found = await anext(consumer)
                waiting = asyncio.create_task(all_of(consumer))
                await asyncio.sleep(1)
                await stream.aclose()
                assert names(await waiting) == ["2"]
                assert await handled(other) == []  # for the one after "2" was asked for
                with pytest.raises(StreamClosed):
                    await consumer.commit(found)
                with pytest.raises(StreamClosed):
                    await consumer.reset(EARLIEST)
            with pytest.raises(StreamClosed):
                await stream.consumer("c").__aenter__()

    async def test_and_when_the_log_is(self, open_log: OpenLog) -> None:
        log = open_log()
        stream = LogStream(log)
        await log.append(events("1", "2"))
        async with stream.consumer("c", commit_every=1) as consumer:
            found = await anext(consumer)
            await log.close()
            with pytest.raises(StreamClosed):
                await consumer.commit(found)
            assert await all_of(consumer) == []
        await stream.aclose()

    async def test_a_lease_that_cannot_be_let_go_is_in_nobodys_way(self) -> None:
        async with Full(clock=LoopClock()) as log:
            stream = LogStream(log)
            async with stream.consumer("c"):
                log.full = True
                await stream.aclose()
                log.full = False
            with pytest.raises(ConsumerInUse):
                await LogStream(log).consumer("c").__aenter__()
            await asyncio.sleep(LEASE)
            async with LogStream(log).consumer("c"):
                pass

    async def test_a_full_log_hides_neither_the_blocks_error_nor_a_cancellation(self) -> None:
        async def use(log: Full, error: BaseException | None = None) -> None:
            async with LogStream(log).consumer("c"):
                log.full = True
                if error is not None:
                    raise error
                await asyncio.sleep(60)

        for _ in range(2):
            async with Full(clock=LoopClock()) as log:
                with pytest.raises(KeyError, match="mine"):
                    await use(log, KeyError("mine"))
            async with Full(clock=LoopClock()) as log:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(1):
                        await use(log)
            async with Full(clock=LoopClock()) as log:
                using = asyncio.create_task(use(log))
                await asyncio.sleep(1)
                using.cancel()
                await asyncio.wait([using])
                assert using.cancelled()

    async def test_what_a_closed_stream_cannot_commit_comes_again(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with Full(clock=LoopClock()) as log:
            stream = LogStream(log)
            await log.append(events("1"))
            async with stream.consumer("c", commit_every=100) as consumer:
                waiting = asyncio.create_task(all_of(consumer))
                await asyncio.sleep(1)
                log.full = True
                await stream.aclose()
                assert names(await waiting) == ["1"]
            log.full = False
            await asyncio.sleep(LEASE)
            assert await handled(LogStream(log)) == ["1"]
        assert "consumer c could not commit as it ended" in caplog.text

    async def test_nothing_that_was_read_is_got_once_the_stream_is_closed(
        self, open_log: OpenLog
    ) -> None:
        async with open_log() as log:
            stream = LogStream(log)
            await log.append(events("1", "2", "3"))
            async with stream.consumer("c") as consumer, stream.consumer("d") as other:
                await take(consumer, 1)
                batches = other.batches(1)
                await anext(batches)
                await stream.aclose()
                assert await all_of(consumer) == []
                assert await all_of(batches) == []

    async def test_a_closed_stream_is_not_entered_whoever_holds_it(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as other, other.consumer("c"):
            stream = LogStream(log)
            await stream.aclose()
            with pytest.raises(StreamClosed):
                await stream.consumer("c").__aenter__()
            with pytest.raises(StreamClosed):
                await stream.consumer("c").reset(EARLIEST)

    async def test_a_stream_is_closed_while_others_leave(self, tmp_path: Path) -> None:
        for url in ("memory://", f"sqlite:///{tmp_path}/events.db"):
            stream = LogStream(url)

            entered = [asyncio.Event() for _ in range(6)]

            async def consume(
                number: int,
                stream: LogStream = stream,
                entered: list[asyncio.Event] = entered,
            ) -> None:
                async with stream.consumer(str(number)) as consumer:
                    entered[number].set()
                    await all_of(consumer)

            consuming = [asyncio.create_task(consume(number)) for number in range(6)]
            for each in entered:
                await each.wait()
            for task in consuming[::2]:
                task.cancel()
            await stream.aclose()
            await asyncio.wait(consuming)
            assert [each.cancelled() for each in consuming] == [True, False] * 3
            with pytest.raises(StreamClosed):
                await stream.log.append([])
            if url != "memory://":
                async with LogStream(url) as again:
                    for number in range(6):
                        async with again.consumer(str(number)):  # all have let go
                            pass

    @pytest.mark.real_time
    async def test_a_stream_is_closed_where_another_thread_consumes(self) -> None:
        async with MemoryLog() as log:
            stream = LogStream(log)
            await log.append(events("1"))
            entered, closed = threading.Event(), threading.Event()

            async def consume() -> list[Any]:
                async with stream.consumer("c", commit_every=100) as consumer:
                    found = await take(consumer, 1)
                    waiting = asyncio.create_task(all_of(consumer))
                    await asyncio.sleep(0)
                    entered.set()
                    found += await waiting
                    await asyncio.to_thread(closed.wait)
                    return found

            consuming = asyncio.create_task(asyncio.to_thread(asyncio.run, consume()))
            await asyncio.to_thread(entered.wait)
            async with asyncio.timeout(PATIENCE):
                await stream.aclose()
            assert await handled(LogStream(log)) == []
            closed.set()
            assert await consuming == ["1"]

    @pytest.mark.real_time
    async def test_a_stream_is_closed_where_another_threads_loop_stands_still(self) -> None:
        async with MemoryLog() as log:
            stream = LogStream(log)
            loop = asyncio.new_event_loop()
            consumer = stream.consumer("c")
            await asyncio.to_thread(loop.run_until_complete, consumer.__aenter__())
            async with asyncio.timeout(PATIENCE):
                await stream.aclose()
            await asyncio.to_thread(loop.run_until_complete, consumer.__aexit__(None, None, None))
            loop.close()

    async def test_a_stream_that_is_closed_meanwhile_is_not_consumed(self) -> None:
        class Slow(MemoryLog):
            async def _begin(self, after: str, selection: Selection) -> Start:
                await asyncio.sleep(1)
                return await super()._begin(after, selection)

        async with Slow(clock=LoopClock()) as log:
            stream = LogStream(log)
            entering = asyncio.create_task(stream.consumer("c").__aenter__())
            await asyncio.sleep(0.5)
            await stream.aclose()
            with pytest.raises(StreamClosed):
                await entering
            assert log.statistics().readers == 0
            async with LogStream(log).consumer("c"):
                pass


class TestLag:
    async def test_is_what_comes_after_the_committed_and_since_when(
        self, open_log: OpenLog
    ) -> None:
        async with open_log() as log, LogStream(log) as stream:
            consumer = stream.consumer("c", "a")
            assert await consumer.lag() == Lag(0, 0.0)
            await log.append(events("a/1", "b/1"))
            await asyncio.sleep(10)
            await log.append(events("a/2", "b/2", "a/3"))
            await asyncio.sleep(5)
            assert rounded(await consumer.lag()) == (3, 15)
            assert await stream.consumer("c", "a", start=LATEST).lag() == Lag(0, 0.0)
            async with consumer:
                await take(consumer, 2)
                assert (await consumer.lag()).events == 3
                await consumer.commit("a/1")
                assert rounded(await consumer.lag()) == (2, 5)
                assert rounded(await stream.consumer("c", "*").lag()) == (4, 15)
                await consumer.commit("a/2")
            again = stream.consumer("c", "a", start=LATEST)
            assert rounded(await again.lag()) == (1, 5)

    async def test_counts_what_is_retained(self, open_log: OpenLog) -> None:
        async with open_log(retention=Retention(count=3)) as log, LogStream(log) as stream:
            await log.append(events("1", "2"))
            await committed(stream, 1)
            await log.append(events("3", "4", "5", "6"))
            await log.trim()
            assert (await stream.consumer("c").lag()).events == 3

    async def test_counts_what_is_kept_besides(self, open_log: OpenLog) -> None:
        async with open_log(retention=Retention(count=2)) as log, LogStream(log) as stream:
            await log._change(Change(Note("run", {}), keep=("run", 0)))
            await log.append(events("run/1", "run/2", "x/1", "x/2", "x/3"))
            await log.trim()
            assert (await stream.consumer("c", "*").lag()).events == 4
            assert (await stream.consumer("c", "run").lag()).events == 2

    async def test_is_no_less_than_nothing_where_the_clock_was_set_back(
        self, open_log: OpenLog
    ) -> None:
        clock = LoopClock()
        async with open_log(clock=clock) as log, LogStream(log) as stream:
            await log.append(events("1"))
            clock.set_by -= 60.0
            assert await stream.consumer("c").lag() == Lag(1, 0.0)


class TestReset:
    @pytest.mark.parametrize("is_entered", [True, False])
    @pytest.mark.parametrize(
        ("to", "expected"),
        [
            (EARLIEST, ["1", "2", "3", "4"]),
            ("1", ["2", "3", "4"]),
            (LATEST, []),
            (1.0, ["3", "4"]),
            (-1.0, ["1", "2", "3", "4"]),
        ],
    )
    async def test_goes_on_from_there(
        self, open_log: OpenLog, to: Any, expected: list[str], is_entered: bool
    ) -> None:
        clock = LoopClock()
        async with open_log(clock=clock) as log, LogStream(log) as stream:
            begin = datetime.fromtimestamp(clock() / 1_000_000, UTC)
            await log.append(events("1", "2"))
            await asyncio.sleep(1)
            await log.append(events("3", "4"))
            place = begin + timedelta(seconds=to) if isinstance(to, float) else to
            async with stream.consumer("c") as consumer:
                await take(consumer, 3)
                await consumer.commit("3")
                if is_entered:
                    await consumer.reset(place)
                    assert await take(consumer, len(expected)) == expected
                    with pytest.raises(ValueError, match="not yielded"):
                        await consumer.commit("never")
            if not is_entered:
                await consumer.reset(place)
            assert await handled(stream) == expected

    async def test_of_one_that_waits_has_it_go_on_there(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1", "2"))
            async with stream.consumer("c") as consumer:
                await take(consumer, 2)
                waiting = asyncio.create_task(take(consumer, 2))
                await asyncio.sleep(1)
                await consumer.reset(EARLIEST)
                assert await waiting == ["1", "2"]
                assert log.statistics().readers == 1

    async def test_to_a_time_without_a_timezone_is_refused(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            with pytest.raises(ValueError, match="timezone"):
                await stream.consumer("c").reset(datetime(2026, 1, 1))

    @pytest.mark.parametrize("to", [EARLIEST, LATEST])
    async def test_revives_none_whose_stream_is_closed_meanwhile(
        self, open_log: OpenLog, to: str
    ) -> None:
        for turns in range(12):
            async with open_log() as log:
                stream = LogStream(log)
                await log.append(events("1", "2"))
                async with stream.consumer("c") as consumer:
                    await take(consumer, 2)
                    waiting = asyncio.create_task(all_of(consumer))
                    await asyncio.sleep(1)
                    resetting = asyncio.create_task(consumer.reset(to))
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    await stream.aclose()
                    await asyncio.wait([resetting])
                    with suppress(StreamClosed):
                        resetting.result()
                    found = names(await waiting)
                    assert found == (["1", "2"][: len(found)] if to == EARLIEST else [])
                    assert await all_of(consumer) == []

    async def test_while_something_is_read_for_it_drops_that(self) -> None:
        class Slow(MemoryLog):
            seconds = 0

            async def _page(self, after: int, selection: Selection, limit: int, told: int) -> Page:
                page = await super()._page(after, selection, limit, told)
                await asyncio.sleep(self.seconds)
                return page

        async with Slow(clock=LoopClock()) as log, LogStream(log) as stream:
            await log.append(events("1", "2"))
            async with stream.consumer("c") as consumer:
                await take(consumer, 2)
                await log.append(events("3"))
                log.seconds = 2
                waiting = asyncio.create_task(take(consumer, 3))
                await asyncio.sleep(1)
                await consumer.reset(EARLIEST)
                assert await waiting == ["1", "2", "3"]

    async def test_that_fails_changes_nothing(self) -> None:
        log = MemoryLog(clock=LoopClock())
        stream = LogStream(log)
        await log.append(events("1", "2"))
        async with stream.consumer("c") as consumer:
            await take(consumer, 1)
            await stream.aclose()
            with pytest.raises(StreamClosed):
                await consumer.reset(EARLIEST)
        assert log.statistics().readers == 0


class Handler:
    """Keeps what it gets, and fails where it is told to, so often."""

    def __init__(self, **failures: int) -> None:
        self.got: list[Any] = []
        self.times: list[float] = []
        self.failures = failures

    async def __call__(self, event: Event) -> None:
        await asyncio.sleep(0)
        self.got += names([event])
        self.times.append(asyncio.get_running_loop().time())
        if self.failures.get(event.id, 0) > 0:
            self.failures[event.id] -= 1
            raise LookupError(f"no {event.id}")


async def run_for(seconds: float, consumer: Consumer, handler: Any, **options: Any) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await consumer.run(handler, **options)


def gives(event: Event) -> Iterator[Event]:
    yield event


async def gives_async(number: int, event: Event) -> AsyncIterator[Event]:
    yield event


class GivesAsync:
    async def __call__(self, event: Event) -> AsyncIterator[Event]:
        yield event


async def forever(event: Event) -> None:
    await asyncio.sleep(1e9)


class Crashes:
    """Processes that are killed one after the other: they say nothing more, and time goes by."""

    def __init__(self, open_log: OpenLog) -> None:
        self.clock = LoopClock()
        self.log = open_log(clock=self.clock)
        self.stream = LogStream(self.log)
        self.calls = 0

    async def by(
        self, name: str, handler: Any = None, *, commit_every: int | None = None, **options: Any
    ) -> None:
        """One is killed as it handles the event of this name, or when it has nothing to do."""

        async def hangs(event: Event) -> None:
            if event.id == name:
                self.calls += 1
                await forever(event)
            if handler is not None:
                await handler(event)

        consumer = self.stream.consumer("c", "a", commit_every=commit_every)
        running = asyncio.create_task(consumer.run(hangs, **options))
        await asyncio.sleep(1)
        lease = consumer._lease
        assert lease is not None
        await lease.abandon()
        lease._is_held = False
        running.cancel()
        await asyncio.wait([running])
        self.clock.set_by += 2 * LEASE

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stream.aclose()
        await self.log.close()


async def enter_for(turns: int, consumer: Consumer) -> None:
    """Enter, and think better of it after so many turns of the event loop."""
    entering = asyncio.ensure_future(consumer.__aenter__())
    for _ in range(turns):
        await asyncio.sleep(0)
    entering.cancel()
    await asyncio.wait([entering])
    if not entering.cancelled():
        await consumer.__aexit__(None, None, None)


class TestRun:
    async def test_handles_and_commits_each(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1", "2"))
            handler, consumer = Handler(), stream.consumer("c")
            running = asyncio.create_task(consumer.run(handler))
            await asyncio.sleep(1)
            assert (await consumer.lag()).events == 0
            await log.append(events("3"))
            await asyncio.sleep(1)
            assert handler.got == ["1", "2", "3"]
            assert (await consumer.lag()).events == 0
            await log.close()
            await running

    async def test_in_a_block_too_and_with_functions_that_are_not_async(
        self, open_log: OpenLog
    ) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1", "2", "3"))
            got: list[Event] = []
            async with stream.consumer("c") as consumer:
                await take(consumer, 1)
                await run_for(1, consumer, got.append)
            assert names(got) == ["2", "3"]
            assert await handled(stream) == []

    async def test_tries_again_after_a_growing_random_delay_in_order(
        self, open_log: OpenLog
    ) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1", "2"))
            handler = Handler(**{"1": 9})
            await run_for(600, stream.consumer("c"), handler, retries=9, backoff=1.0)
            assert handler.got == ["1"] * 10 + ["2"]
            delays = [after - before for before, after in itertools.pairwise(handler.times)][:-1]
            for delay, longest in zip(delays, (1, 2, 4, 8, 16, 32, 60, 60, 60), strict=True):
                assert longest / 2 <= delay <= longest
            assert len({delay / round(delay) for delay in delays}) > 1

    async def test_without_dead_letters_ends_by_the_last_error_and_loses_nothing(
        self, open_log: OpenLog
    ) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1", "2", "3"))
            handler = Handler(**{"2": 4})
            with pytest.raises(LookupError, match="no 2"):
                await stream.consumer("c").run(handler, retries=2)
            assert handler.got == ["1", "2", "2", "2"]
            with pytest.raises(LookupError):  # it has been tried enough before
                await stream.consumer("c").run(handler, retries=2)
            await run_for(60, stream.consumer("c"), handler, retries=2)
            assert handler.got == ["1", *["2"] * 5, "3"]

    async def test_what_keeps_failing_goes_to_the_dead_letters(self, open_log: OpenLog) -> None:
        published = Event(
            id="2",
            type="order.paid",
            data={"total": 9},
            metadata={"topic": "orders.new", "by": "ada"},
        )
        async with open_log() as log, LogStream(log) as stream:
            record = Record.of(published, topics=["orders.new", "other"], private=True)
            await log.append([*events("orders/1"), record, *events("orders/3")])
            handler = Handler(**{"2": 99})
            consumer = stream.consumer("billing", ["orders", "orders.>"])
            await run_for(60, consumer, handler, retries=1, dead_letter="dead")
            assert handler.got == ["orders/1", "2", "2", "orders/3"]
            (letter,) = await log.read(topics="dead")
            assert (letter.id, letter.private, letter.topics) == (
                "dead/billing/dead/2",
                True,
                ("dead",),
            )
            assert letter.timestamp == record.timestamp
            found = letter.event()
            assert (found.type, found.data) == ("order.paid", {"total": 9})
            assert found.metadata == {
                "topic": "dead",
                "by": "ada",
                "error": "LookupError: no 2",
                "attempts": 2,
                "consumer": "billing",
                "event": "2",
                "from": "orders.new",
            }
            assert (await consumer.lag()).events == 0

    async def test_errors_of_any_length_and_kind_are_told(self, open_log: OpenLog) -> None:
        class Odd(Exception):
            def __str__(self) -> str:
                raise ValueError

        errors: dict[str, BaseException] = {
            "1": Exception("\ud800" + "x" * 10_000),
            "2": Odd(),
            "3": asyncio.CancelledError("another's"),
        }

        def handler(event: Event) -> None:
            raise errors[event.id]

        async with open_log(max_size=100) as log, LogStream(log) as stream:
            await log.append([event(name, data="x" * 97) for name in errors])
            consumer = stream.consumer("c")
            await run_for(60, consumer, handler, retries=0, dead_letter="dead")
            letters = [record.event() for record in await log.read(topics="dead")]
            told = [letter.metadata["error"] for letter in letters]
            assert told[0].startswith("Exception: ?xxx")
            assert len(told[0]) == 1000
            assert told[1].endswith("<exception str() failed>")
            assert told[2].endswith("CancelledError: another's")
            assert [letter.metadata["from"] for letter in letters] == [None] * 3
            assert await consumer.lag() == Lag(0, 0.0)  # the letters themselves are passed over

    async def test_passes_over_its_own_dead_letters(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1"))
            handler = Handler(**{"1": 99})
            consumer = stream.consumer("c", "*")
            await run_for(60, consumer, handler, retries=1, dead_letter="dead")
            assert handler.got == ["1", "1"]
            assert len(await log.read(topics="dead")) == 1
            assert (await consumer.lag()).events == 0
            with pytest.raises(ValueError, match="dead letters go elsewhere"):
                await stream.consumer("c", "dead").run(handler, dead_letter="dead")

    async def test_one_that_is_there_already_is_not_there_twice(self, open_log: OpenLog) -> None:
        """As after a crash between the dead letter and the commit."""
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("a/1"))
            consumer = stream.consumer("c", "a")
            for number in (1, 2):
                handler = Handler(**{"a/1": 99})
                await run_for(60, consumer, handler, retries=number, dead_letter="dead")
                assert len(handler.got) == number + 1
                await consumer.reset(EARLIEST)
            assert len(await log.read(topics="dead")) == 1

    async def test_no_two_events_have_one_dead_letter(self, open_log: OpenLog) -> None:
        async with open_log(retention=Retention(count=6)) as log, LogStream(log) as stream:
            handler = Handler(**{"eu.1": 9, "1": 9})

            async def fail(name: str, topic: str, dead_letter: str = "dead") -> None:
                consumer = stream.consumer(name, topic)
                await run_for(1, consumer, handler, retries=0, dead_letter=dead_letter)
                assert (await consumer.lag()).events == 0

            await log.append([event("eu.1", "a", "A"), event("1", "b", "B")])
            await fail("billing", "a")
            await fail("billing.eu", "b")
            letters = [*await log.read(topics="dead")]
            await log.append(events(*(f"x/{number}" for number in range(4))))
            await log.trim()
            await log.append([event("1", "b", "C")])  # the first by this name has gone
            await fail("billing.eu", "b")
            await stream.consumer("billing.eu", "b").reset(EARLIEST)
            await fail("billing.eu", "b", "other")
            letters += await log.read(topics=["dead", "other"])
            assert [letter.id for letter in letters] == [
                "dead/billing/dead/1",
                "dead/billing.eu/dead/2",
                "dead/billing.eu/dead/9",
                "dead/billing.eu/other/9",
            ]
            assert [(letter.event().data, letter.topics[0]) for letter in letters] == [
                ("A", "dead"),
                ("B", "dead"),
                ("C", "dead"),
                ("C", "other"),
            ]

    async def test_no_name_of_a_consumer_is_taken_for_more_than_that(
        self, open_log: OpenLog
    ) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("a/1"))
            handler = Handler(**{"a/1": 9})
            for name, dead_letter in (("c/d", "e"), ("c", "d/e")):
                consumer = stream.consumer(name, "a")
                await run_for(1, consumer, handler, retries=0, dead_letter=dead_letter)
            letters = await log.read(topics=["e", "d/e"])
            assert ids(letters) == ["dead/c%2Fd/e/1", "dead/c/d%2Fe/1"]

    @pytest.mark.parametrize("data", ["somebody's", None])
    async def test_an_event_that_is_there_by_its_name_is_not_taken_for_it(
        self, open_log: OpenLog, data: Any
    ) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append([*events("a/1"), event("dead/c/dead/1", "dead", data)])
            consumer, handler = stream.consumer("c", "a"), Handler(**{"a/1": 9})
            await run_for(1, consumer, handler, retries=0, dead_letter="dead")
            _, letter = await log.read(topics="dead")
            assert letter.event().metadata["event"] == "a/1"
            assert (await consumer.lag()).events == 0

    async def test_what_a_handler_does_to_an_event_is_its_own(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            (record,) = await log.append([event("1", "a", {"items": [1, 2]})])
            got: list[Event] = []

            def spoils(event: Event) -> None:
                got.append(Event(event.id, event.type, [*event.data["items"]], {**event.metadata}))
                event.data["items"].pop()
                event.metadata["span"] = object()
                raise LookupError

            consumer = stream.consumer("c", "a")
            await run_for(60, consumer, spoils, retries=2, dead_letter="dead")
            assert [each.data for each in got] == [[1, 2]] * 3
            assert [each.metadata for each in got] == [{"topic": "a"}] * 3
            (letter,) = await log.read(topics="dead")
            assert letter.event().data == {"items": [1, 2]}
            assert "span" not in letter.event().metadata
            async with (
                stream.consumer("other", "a") as other,
                stream.events("a", last=1) as subscriber,
            ):
                assert await anext(other) == await anext(subscriber) == record.event()

    async def test_dead_letters_of_others_that_fail_stay_where_they_are(
        self, open_log: OpenLog, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1", "dead/by-name"))

            async def fail(event: Event) -> None:
                raise LookupError(event.id)

            running = [
                asyncio.create_task(
                    stream.consumer(name).run(fail, retries=0, dead_letter=f"dead.{name}")
                )
                for name in ("a", "b")
            ]
            await asyncio.sleep(60)
            letters = [each.event() for each in await log.read(topics="dead.*")]
            about = sorted((each.metadata["consumer"], each.metadata["event"]) for each in letters)
            assert about == [
                ("a", "1"),
                ("a", "dead/by-name"),
                ("b", "1"),
                ("b", "dead/by-name"),
            ]
            assert "dead letter dead/b/dead.b/1 failed, and stays where it is" in caplog.text
            for name in ("a", "b"):
                assert (await stream.consumer(name).lag()).events == 0
            for each in running:
                each.cancel()
            await asyncio.wait(running)

    async def test_keeps_count_over_restarts(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("a/1"))
            consumer, handler = stream.consumer("c", "a"), Handler(**{"a/1": 99})
            for _ in range(3):
                await run_for(1, consumer, handler, dead_letter="dead", backoff=60.0)
            await run_for(600, consumer, handler, dead_letter="dead", backoff=60.0)
            assert len(handler.got) == 6
            (letter,) = await log.read(topics="dead")
            assert letter.event().metadata["attempts"] == 6

    async def test_a_reset_forgets_it(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("a/1"))
            consumer, handler = stream.consumer("c", "a"), Handler(**{"a/1": 3})
            await run_for(1, consumer, handler, retries=2, backoff=60.0)
            await consumer.reset(EARLIEST)
            await run_for(600, consumer, handler, retries=2, backoff=60.0)
            assert handler.got == ["a/1"] * 4

    async def test_a_gap_goes_to_the_handler_and_is_not_tried_again(
        self, open_log: OpenLog, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with open_log(retention=Retention(count=2)) as log, LogStream(log) as stream:
            await log.append(events("1"))
            await committed(stream, 1)
            await log.append(events("2", "3", "4", "5"))
            await log.trim()
            got: list[Any] = []

            def handler(event: Event) -> None:
                got.extend(names([event]))
                if event.is_control:
                    raise LookupError("a gap")

            await run_for(60, stream.consumer("c"), handler, dead_letter="dead")
            assert got == [{"after": "1", "reason": "trimmed", "missed": 2}, "4", "5"]
            assert await read_all(log) == ["4", "5"]
        assert "consumer c: its handler failed at a gap" in caplog.text

    async def test_commits_every_so_many_if_it_is_told_to(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1", "2", "3", "4", "5"))
            consumer = stream.consumer("c", commit_every=2)
            await run_for(1, consumer, Handler(**{"4": 99}), backoff=60.0)
            # "3" was dealt with, and is committed with the count of attempts at "4".
            assert await handled(stream) == ["4", "5"]
            # "4" is committed as soon as it is done, since it was tried before.
            await run_for(1, consumer, Handler())
            assert await handled(stream) == ["5"]

    async def test_but_what_is_given_up_at_once(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("a/1", "a/2", "a/3"))
            consumer = stream.consumer("c", "a", commit_every=100)
            handler = Handler(**{"a/2": 99})
            running = asyncio.create_task(consumer.run(handler, retries=0, dead_letter="dead"))
            await asyncio.sleep(1)
            assert handler.got == ["a/1", "a/2", "a/3"]
            assert (await consumer.lag()).events == 1
            running.cancel()
            await asyncio.wait([running])

    @pytest.mark.parametrize(("retries", "calls"), [(0, 2), (1, 2), (2, 3), (5, 6)])
    @pytest.mark.parametrize(
        "between",
        ["", "entered and left", "a run that is cancelled", "an enter that is cancelled"],
    )
    async def test_what_kills_is_given_up(
        self, open_log: OpenLog, retries: int, calls: int, between: str
    ) -> None:
        async with Crashes(open_log) as crashes:
            log, stream = crashes.log, crashes.stream
            await log.append(events("a/1", "a/2"))
            options: Any = {"retries": retries, "dead_letter": "dead"}
            for _ in range(calls):
                await crashes.by("a/1", **options)
                if between == "an enter that is cancelled":
                    for turns in range(8):
                        await enter_for(turns, stream.consumer("c", "a"))
                elif between:
                    async with stream.consumer("c", "a") as consumer:
                        if between != "entered and left":
                            await run_for(1, consumer, forever, retries=9)
            handler = Handler()
            await run_for(1, stream.consumer("c", "a"), handler, **options)
            assert crashes.calls == calls
            assert handler.got == ["a/2"]
            (letter,) = await log.read(topics="dead")
            about = letter.event().metadata
            assert about["attempts"] == max(2, calls)
            assert "ended without a word" in about["error"]

    @pytest.mark.parametrize("when", ["before the next", "later"])
    async def test_the_innocent_is_not_given_up_whenever_it_came(
        self, open_log: OpenLog, when: str
    ) -> None:
        async with Crashes(open_log) as crashes:
            log, stream = crashes.log, crashes.stream
            await crashes.by("none")
            if when == "before the next":
                await log.append(events("a/1"))
            handler = Handler(**{"a/1": 1})
            consumer = stream.consumer("c", "a")
            running = asyncio.create_task(
                run_for(60, consumer, handler, retries=1, dead_letter="dead")
            )
            await asyncio.sleep(1)
            if when == "later":
                await log.append(events("a/1"))
            await running
            assert handler.got == ["a/1"] * 2  # it may fail as often as any
            assert len(await log.read(topics="dead")) == 0

    async def test_what_comes_later_is_tried_as_often_as_any(self, open_log: OpenLog) -> None:
        async with Crashes(open_log) as crashes:
            log, stream = crashes.log, crashes.stream
            options: Any = {"retries": 1, "dead_letter": "dead"}
            await crashes.by("none")
            killing = asyncio.create_task(crashes.by("a/1", **options))
            await asyncio.sleep(0.5)
            await log.append(events("a/1"))
            await killing
            await crashes.by("a/1", **options)
            handler = Handler()
            await run_for(1, stream.consumer("c", "a"), handler, **options)
            assert (crashes.calls, handler.got) == (2, [])
            assert len(await log.read(topics="dead")) == 1

    async def test_what_was_handled_after_it_failed_is_not_what_killed(
        self, open_log: OpenLog
    ) -> None:
        async with Crashes(open_log) as crashes:
            log, stream = crashes.log, crashes.stream
            await log.append(events(*(f"a/{number}" for number in range(5))))
            options: Any = {"retries": 2, "dead_letter": "dead", "backoff": 0.0}
            await crashes.by("none", Handler(**{"a/1": 2}), commit_every=100, **options)
            handler = Handler()
            await run_for(1, consumer_of(stream), handler, **options)
            assert handler.got == ["a/2", "a/3", "a/4"]
            assert len(await log.read(topics="dead")) == 0

    @pytest.mark.parametrize("is_async", [False, True])
    @pytest.mark.parametrize(
        "error",
        [
            SystemExit(3),
            GeneratorExit(),
            BaseExceptionGroup("several", [KeyError(), asyncio.CancelledError()]),
        ],
    )
    async def test_what_ends_the_process_is_counted(
        self, open_log: OpenLog, error: BaseException, is_async: bool
    ) -> None:
        got: list[str] = []

        def handler(event: Event) -> None:
            got.append(event.id)
            raise error

        async def async_handler(event: Event) -> None:
            handler(event)

        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("a/1"))
            consumer = stream.consumer("c", "a")
            for _ in range(3):
                with pytest.raises(type(error)):
                    await consumer.run(
                        async_handler if is_async else handler, retries=2, dead_letter="dead"
                    )
            assert (await consumer.lag()).events == 0
            (letter,) = await log.read(topics="dead")
            assert letter.event().metadata["attempts"] == 3
            assert type(error).__name__ in letter.event().metadata["error"]
            assert len(got) == 3

    async def test_what_ends_the_process_does_so_though_it_cannot_be_counted(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with Full(clock=LoopClock()) as log, LogStream(log) as stream:
            await log.append(events("1"))

            def handler(event: Event) -> None:
                log.full = True
                raise SystemExit(3)

            with pytest.raises(SystemExit):
                await stream.consumer("c").run(handler)
        assert "consumer c could not count an attempt" in caplog.text

    async def test_what_interrupts_the_handler_is_not_counted(self, open_log: OpenLog) -> None:
        async def handler(event: Event) -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError as error:
                raise BaseExceptionGroup("cancelled", [error]) from None

        def is_interrupted(event: Event) -> None:
            raise KeyboardInterrupt

        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("a/1"))
            consumer = stream.consumer("c", "a")
            options: Any = {"retries": 0, "dead_letter": "dead"}
            running = asyncio.create_task(consumer.run(handler, **options))
            await asyncio.sleep(1)
            running.cancel()
            with pytest.raises(BaseExceptionGroup):
                await running
            with pytest.raises(KeyboardInterrupt):
                await consumer.run(is_interrupted, **options)
            assert (await consumer.lag()).events == 1

    async def test_one_that_is_left_for_dead_lets_its_handler_end(self) -> None:
        seen: list[Any] = []

        async def handler(event: Event) -> None:
            seen.append(event.id)
            try:
                await asyncio.sleep(60)
            except BaseException as error:
                seen.append(type(error))
                raise

        async with MemoryLog() as log, LogStream(log) as stream:
            await log.append(events("1"))
            async with stream.consumer("c") as consumer:
                running = consumer.run(handler)
                while not seen:
                    running.send(None)
                await asyncio.to_thread(running.close)  # as when its loop has gone
                assert seen == ["1", GeneratorExit]

    async def test_a_gap_may_end_the_process_too(self, open_log: OpenLog) -> None:
        def handler(event: Event) -> None:
            raise SystemExit(3)

        async with open_log() as log, LogStream(log) as stream:
            with pytest.raises(SystemExit):
                await stream.consumer("c", start="never").run(handler)

    async def test_what_no_coroutine_can_raise_is_said_otherwise(self, open_log: OpenLog) -> None:
        def handler(event: Event) -> None:
            next(iter(()))

        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1"))
            with pytest.raises(RuntimeError, match="the handler raised StopIteration") as caught:
                await stream.consumer("c").run(handler, retries=0)
            assert isinstance(caught.value.__cause__, StopIteration)

    async def test_without_dead_letters_it_is_tried_again_and_again(
        self, open_log: OpenLog
    ) -> None:
        clock = LoopClock()
        async with open_log(clock=clock) as log, LogStream(log) as stream:
            await log.append(events("1"))
            hang: list[asyncio.Task[None]] = []
            for _ in range(3):
                consumer = stream.consumer("c")
                hang.append(
                    asyncio.create_task(consumer.run(lambda event: asyncio.sleep(1e9), retries=0))
                )
                await asyncio.sleep(1)
                clock.set_by += 2 * LEASE
            handler = Handler()
            await run_for(1, stream.consumer("c"), handler, retries=0)
            assert handler.got == ["1"]
            for each in hang:
                each.cancel()
            await asyncio.wait(hang)

    async def test_after_a_crash_they_are_committed_one_by_one_to_blame_the_right_one(
        self, open_log: OpenLog
    ) -> None:
        clock = LoopClock()
        async with open_log(clock=clock) as log, LogStream(log) as stream:
            await log.append(events(*(f"a/{number}" for number in range(5))))
            crashes: list[asyncio.Task[None]] = []

            async def dies_at_3(event: Event) -> None:
                if event.id == "a/3":
                    await asyncio.sleep(1e9)

            for _ in range(3):
                consumer = stream.consumer("c", "a", commit_every=10)
                crashes.append(
                    asyncio.create_task(consumer.run(dies_at_3, retries=1, dead_letter="dead"))
                )
                await asyncio.sleep(1)
                clock.set_by += 2 * LEASE
            handler = Handler()
            await run_for(1, consumer_of(stream), handler, retries=1, dead_letter="dead")
            assert ids(await log.read(topics="dead")) == ["dead/c/dead/4"]
            assert handler.got == ["a/4"]
            for each in crashes:
                each.cancel()
            await asyncio.wait(crashes)

    async def test_so_is_a_gap_that_the_handler_understands(self, open_log: OpenLog) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1"))
            handler = Handler()
            await run_for(1, stream.consumer("c", start="never"), handler)
            assert handler.got == [{"after": "never", "reason": "unknown", "missed": None}, "1"]

    async def test_ends_when_the_stream_is_closed_while_it_waits_to_try_again(
        self, open_log: OpenLog
    ) -> None:
        async with open_log() as log:
            stream = LogStream(log)
            await log.append(events("1"))
            handler = Handler(**{"1": 9})
            running = asyncio.create_task(stream.consumer("c").run(handler, backoff=60.0))
            await asyncio.sleep(1)
            await stream.aclose()
            await running
            assert handler.got == ["1"]
            assert asyncio.get_running_loop().time() == pytest.approx(1)

    @pytest.mark.parametrize("options", [{}, {"commit_every": 100}, {"commit_seconds": 60.0}])
    async def test_the_lease_stays_until_the_handler_has_dealt_with_its_event(
        self, open_log: OpenLog, options: Any
    ) -> None:
        async with open_log() as log:
            stream = LogStream(log)
            await log.append(events("1", "2", "3"))
            got: list[str] = []

            async def handler(event: Event) -> None:
                await asyncio.sleep(2)
                got.append(event.id)

            running = asyncio.create_task(stream.consumer("c", **options).run(handler))
            await asyncio.sleep(3)
            closing = asyncio.create_task(stream.aclose())
            await asyncio.sleep(0.5)
            other = LogStream(log)
            with pytest.raises(ConsumerInUse):
                await handled(other)
            await closing
            assert got == ["1", "2"]
            assert await handled(other) == ["3"]
            await running

    async def test_nobody_waits_for_the_handler_where_the_stream_is_not_drained(
        self, open_log: OpenLog
    ) -> None:
        async with open_log() as log:
            stream = LogStream(log)
            await log.append(events("1", "2"))
            running = asyncio.create_task(stream.consumer("c").run(lambda _: asyncio.sleep(30)))
            await asyncio.sleep(1)
            await stream.aclose(drain=False)
            assert asyncio.get_running_loop().time() == pytest.approx(1)
            await asyncio.sleep(20)
            with pytest.raises(ConsumerInUse):
                await handled(LogStream(log))
            await running
            assert await handled(LogStream(log)) == ["2"]

    @pytest.mark.parametrize("options", [{}, {"commit_every": 100}])
    @pytest.mark.parametrize("spawns", [False, True])
    async def test_a_handler_may_close_the_stream(
        self, tmp_path: Path, spawns: bool, options: Any
    ) -> None:
        url = f"sqlite:///{tmp_path}/events.db"
        async with LogStream(url) as stream:
            await stream.log.append(events("1", "2"))
        got: list[str] = []
        for _ in range(2):
            stream = LogStream(url)

            async def handler(event: Event, stream: LogStream = stream) -> None:
                got.append(event.id)
                if spawns:
                    await asyncio.create_task(stream.aclose())
                else:
                    await stream.aclose()

            await stream.consumer("c", **options).run(handler)
            with pytest.raises(StreamClosed):
                await stream.log.append([])
        assert got == ["1", "2"]

    async def test_ends_in_a_block_too_when_the_stream_is_closed(self, open_log: OpenLog) -> None:
        async with open_log() as log:
            stream = LogStream(log)
            async with stream.consumer("c") as consumer:
                running = asyncio.create_task(consumer.run(print))
                await asyncio.sleep(1)
                await stream.aclose()
                await running

    async def test_ends_when_the_log_is_closed_while_it_handles(self, open_log: OpenLog) -> None:
        log = open_log()
        stream = LogStream(log)
        await log.append(events("1"))
        running = asyncio.create_task(stream.consumer("c").run(lambda event: asyncio.sleep(2)))
        await asyncio.sleep(1)
        await log.close()
        await running
        await stream.aclose()

    async def test_a_stream_of_the_handlers_that_is_closed_is_a_failure_like_others(
        self, open_log: OpenLog
    ) -> None:
        async with open_log() as log, LogStream(log) as stream:
            closed = LogStream("memory://")
            await closed.aclose()
            await log.append(events("1"))
            with pytest.raises(StreamClosed):
                await stream.consumer("c").run(closed.publish, retries=1)

    async def test_ends_when_another_takes_the_lease_while_it_waits_to_try_again(
        self, open_log: OpenLog
    ) -> None:
        clock = LoopClock()
        async with open_log(clock=clock) as log, LogStream(log) as stream:
            await log.append(events("1"))
            running = asyncio.create_task(
                stream.consumer("c").run(Handler(**{"1": 9}), backoff=60.0)
            )
            await asyncio.sleep(1)
            clock.set_by += 2 * LEASE
            async with stream.consumer("c"):
                with pytest.raises(ConsumerInUse):
                    await running
            assert asyncio.get_running_loop().time() < LEASE

    async def test_a_reset_meanwhile_gives_up_the_event_that_is_tried(
        self, open_log: OpenLog
    ) -> None:
        async with open_log() as log, LogStream(log) as stream:
            await log.append(events("1", "2"))
            handler, consumer = Handler(**{"1": 99}), stream.consumer("c")
            running = asyncio.create_task(consumer.run(handler, backoff=60.0))
            await asyncio.sleep(1)
            await consumer.reset("1")
            await asyncio.sleep(1)
            assert handler.got == ["1", "2"]
            running.cancel()
            await asyncio.wait([running])

    @pytest.mark.parametrize(
        ("options", "error", "says"),
        [
            ({"handler": 5}, TypeError, "function of one event"),
            ({"handler": gives}, TypeError, "function of one event"),
            ({"handler": partial(gives_async, 1)}, TypeError, "function of one event"),
            ({"handler": GivesAsync()}, TypeError, "function of one event"),
            ({"retries": -1}, ValueError, "0 or more"),
            ({"backoff": -1.0}, ValueError, "0 or more"),
            ({"dead_letter": "a.*"}, TopicError, "pattern"),
        ],
    )
    async def test_what_cannot_be_is_refused_at_once(
        self, options: dict[str, Any], error: type[Exception], says: str
    ) -> None:
        async with LogStream("memory://") as stream:
            with pytest.raises(error, match=says):
                await stream.consumer("c").run(**{"handler": print, **options})


def consumer_of(stream: LogStream) -> Consumer:
    return stream.consumer("c", "a", commit_every=10)


class TestCancelling:
    """Wherever it is done: no task, no reader and no lease is left, and nothing lost."""

    def test_of_one_that_iterates(self, open_log: OpenLog) -> None:
        logs: list[Log] = []
        got: list[Any] = []

        async def scenario() -> None:
            logs.append(log := open_log())
            got.clear()
            await log.append(events("1", "2", "3", "4", "5", "6"))
            async with (
                LogStream(log) as stream,
                stream.consumer("c", commit_seconds=1.0) as consumer,
            ):
                for _ in range(2):
                    got.extend(names([await anext(consumer)]))
                await consumer.commit("1")
                batches = consumer.batches(2, seconds=5.0)
                got.extend(names(await anext(batches)))
                await consumer.reset("3")
                got.extend(names([await anext(consumer)]))
                await asyncio.sleep(2)
                got.extend(names([await anext(consumer)]))
                await consumer.lag()

        assert cancel_at_every_await(scenario, check=lambda: is_free(logs[-1], got)) >= 5

    def test_of_a_reset_leaves_it_in_one_place(self, open_log: OpenLog) -> None:
        async def scenario() -> None:
            async with open_log() as log, LogStream(log) as stream:
                await log.append(events("1", "2", "3", "4"))
                async with stream.consumer("c") as consumer:
                    await take(consumer, 3)
                    await consumer.commit("2")
                    with suppress(asyncio.CancelledError):
                        await consumer.reset(EARLIEST)
                    lag = await consumer.lag()
                    assert (lag.events, await take(consumer, 1)) in ((2, ["4"]), (4, ["1"]))

        assert cancel_at_every_await(scenario) >= 4

    @pytest.mark.parametrize("options", [{}, {"commit_every": 2}, {"commit_seconds": 0.1}])
    def test_of_one_that_runs(self, open_log: OpenLog, options: Any) -> None:
        logs: list[Log] = []
        got: list[Any] = []

        async def handler(event: Event) -> None:
            await asyncio.sleep(0.05)
            if event.id == "a/3":
                raise LookupError
            got.append(event.id)

        async def scenario() -> None:
            logs.append(log := open_log())
            got.clear()
            await log.append(events(*(f"a/{number}" for number in range(1, 7))))
            async with LogStream(log) as stream:
                consumer = stream.consumer("c", "a", **options)
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(60):
                        await consumer.run(handler, retries=1, dead_letter="dead")

        async def check() -> None:
            dead = [record.event() for record in await logs[-1].read(topics="dead")]
            about = [letter.metadata["event"] for letter in dead]
            assert about in ([], ["a/3"])
            await is_free(logs[-1], got + about, "a")

        assert cancel_at_every_await(scenario, check=check) >= 5


async def is_free(log: Log, got: list[Any], topic: str = "*") -> None:
    """Nobody holds the consumer, nobody reads, and what was not got is still to come, in order."""
    async with log, LogStream(log) as stream:
        assert log.statistics().readers == 0
        found = await handled(stream, topic=topic)
        there = await read_all(log, topics=topic)
        committed = there[: len(there) - len(found)]
        assert committed + found == there
        assert set(committed) <= set(got)


class Consuming(Process):
    """Another Python, with a consumer at the file."""

    SETUP = (
        Process.SETUP
        + """
        from codomyrmex.events.streaming import ConsumerInUse
        from codomyrmex.events.streaming.log import LogStream
        stream = LogStream(log, lease=0.3)

        async def when_free(use):
            while True:
                try:
                    return await use()
                except ConsumerInUse as error:
                    await asyncio.sleep(error.seconds)
        """
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


@pytest.fixture
def start(path: Path) -> Iterator[Callable[[str], Consuming]]:
    processes: list[Consuming] = []

    def start(main: str) -> Consuming:
        processes.append(Consuming(path, main))
        return processes[-1]

    yield start
    for process in processes:
        process.end()


@pytest.mark.real_time
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
class TestProcesses:
    async def test_one_has_it_at_a_time(
        self, path: Path, start: Callable[[str], Consuming]
    ) -> None:
        async with SQLiteLog(path) as log, LogStream(log) as stream:
            await log.append(events("1", "2"))
            holder = start(
                """
                async def main():
                    stream = LogStream(log, lease=1.0)
                    async with stream.consumer("c") as consumer:
                        await consumer.commit(await anext(consumer))
                        say("held")
                        await asyncio.sleep(1000)
                """
            )
            assert await holder.line() == "held"
            await asyncio.sleep(1.5)  # longer than a lease that is not renewed
            with pytest.raises(ConsumerInUse):
                await stream.consumer("c").__aenter__()
            holder.signal(signal.SIGKILL)
            await asyncio.to_thread(holder.process.wait)
            async with asyncio.timeout(PATIENCE):
                while True:
                    try:
                        assert await handled(stream) == ["2"]
                        break
                    except ConsumerInUse as error:
                        await asyncio.sleep(error.seconds)

    @pytest.mark.parametrize(
        ("seed", "options"), [(1, ""), (2, ", commit_every=7"), (3, ", commit_seconds=0.02")]
    )
    async def test_killed_at_any_moment_none_is_skipped_and_all_are_in_order(
        self, path: Path, start: Callable[[str], Consuming], seed: int, options: str
    ) -> None:
        chance = random.Random(seed)
        async with SQLiteLog(path, durability="normal") as log:
            wanted = [str(number) for number in range(200)]
            await log.append(events(*wanted))
            got: list[list[str]] = []
            while not got or got[-1][-1:] != wanted[-1:]:
                consuming = start(
                    f"""
                    async def handler(event):
                        await asyncio.sleep(0.001)
                        say(event.id)

                    main = lambda: when_free(
                        lambda: stream.consumer("c", "*"{options}).run(handler)
                    )
                    """
                )
                got.append([])
                first = await consuming.line()
                got[-1].append(first)
                killing = asyncio.get_running_loop().call_later(
                    chance.uniform(0.0, 0.25), consuming.signal, signal.SIGKILL
                )
                while line := await consuming.line():
                    got[-1].append(line)
                    if line == wanted[-1]:
                        break
                killing.cancel()
                consuming.end()
            assert len(got) > 1
            reached = 0
            for each in got:
                begin = int(each[0])
                assert begin <= reached  # none is skipped
                assert each == wanted[begin : begin + len(each)]  # in order
                reached = begin + len(each)
            assert reached == len(wanted)

    @pytest.mark.parametrize("options", ["", ", commit_every=100"])
    async def test_an_event_that_kills_the_process_ends_among_the_dead_letters(
        self, path: Path, start: Callable[[str], Consuming], options: str
    ) -> None:
        async with SQLiteLog(path, durability="normal") as log:
            await log.append(events("a/1", "a/2", "a/poison", "a/3"))
            got: list[list[str]] = []
            while not got or got[-1][-1:] != ["a/3"]:
                consuming = start(
                    f"""
                    async def handler(event):
                        say(event.id)
                        if event.id == "a/poison":
                            os._exit(1)

                    main = lambda: when_free(
                        lambda: stream.consumer("c", "a"{options}).run(
                            handler, retries=2, dead_letter="dead"
                        )
                    )
                    """
                )
                got.append([])
                while line := await consuming.line():
                    got[-1].append(line)
                    if line == "a/3":
                        break
                consuming.end()
                assert len(got) < 8
            if not options:
                assert got == [["a/1", "a/2", "a/poison"], ["a/poison"], ["a/poison"], ["a/3"]]
            (letter,) = await log.read(topics="dead")
            about = letter.event().metadata
            assert (about["event"], about["attempts"], about["from"]) == ("a/poison", 3, "a")
