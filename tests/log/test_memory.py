"""`MemoryLog`: what it does beyond what every log promises."""

import asyncio
import os
import threading

import pytest

from codomyrmex.events.streaming import Event
from codomyrmex.events.streaming.log import (
    Gap,
    MemoryLog,
    Record,
    Retention,
    memory,
    open_log,
)
from codomyrmex.events.streaming.log.ring import Ring
from tests.conformance.test_logs import Clock, events, ids, read_all
from tests.forks import PATIENCE, in_a_child


class TestRetention:
    async def test_ten_thousand_events_unless_told_otherwise(self) -> None:
        async with MemoryLog() as log:
            await log.append(events(*(str(number) for number in range(10_001))))
            assert log.statistics().records == 10_000
            assert log.statistics().earliest == "1"

    async def test_the_last_event_stays_whatever_the_bounds(self) -> None:
        clock = Clock()
        async with MemoryLog(Retention(bytes=1, age=1), clock=clock) as log:
            await log.append(events("1", "2"))
            clock.pass_by(3600)
            assert await log.trim() == 0
            assert await read_all(log) == ["2"]

    async def test_the_aged_go_a_few_at_a_time_and_who_reads_finds_them_gone(self) -> None:
        clock = Clock()
        async with MemoryLog(Retention(age=60), clock=clock) as log:
            await log.append(events(*(str(number) for number in range(2500))))
            clock.pass_by(61)
            assert len(await log.read(limit=5000)) == 1500
            assert await log.trim() == 1499
            assert log.statistics().trimmed == 2499

    async def test_memory_of_what_has_gone_is_given_back(self) -> None:
        async with MemoryLog(Retention(count=100)) as log:
            for number in range(5000):
                await log.append(events(f"a/{number}"))
            assert len(log._ring._records) < 3000
            assert len(log._ring._by_topic["a"]) < 3000
            assert list(log._by_id) == [f"a/{number}" for number in range(4900, 5000)]
            await log.append(events(*(f"b/{number}" for number in range(1500))))
            assert list(log._ring._by_topic) == ["b"]


class TestWhatIsRemembered:
    async def test_of_ids_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "_MOST_REMEMBERED", 5)
        async with MemoryLog(Retention(count=1)) as log:
            for number in range(20):
                await log.append(events(str(number)))
            assert (await log.locate("14")).status == "trimmed"
            assert (await log.locate("13")).status == "unknown"
            assert len(log._trimmed_ids) == 5

    async def test_of_topics_is_bounded_and_what_is_forgotten_may_be_missing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(memory, "_MOST_REMEMBERED", 5)
        async with MemoryLog(Retention(count=1)) as log:
            await log.append(events("a/1"))
            for number in range(6):
                await log.append(events(f"b.{number}/1"))
            # The last of "a" has been forgotten, but nobody who reads on from later is alarmed.
            assert (await log.locate("a/1", "a")).status == "unknown"
            assert (await log.read("b.2/1", "a")).gap is None
            assert (await log.read("b.2/1", "nobody")).gap is None
            assert len(log._last_trimmed) == len(log._last_trimmed_ids) == 5
            for number in range(4):
                topics = [f"c.{number}", f"d.{number}", f"e.{number}"]
                await log.append([Record.of(Event(id=f"c/{number}"), topics=topics)])
            assert (await log.read("c/0", "a")).gap == Gap("c/0", "trimmed", None)
            assert (await log.read("c/2", "a")).gap is None

    async def test_the_last_of_several_topics_is_remembered_for_each(self) -> None:
        async with MemoryLog(Retention(count=1)) as log:
            await log.append([Record.of(Event(id="both"), topics=["a", "b"])])
            await log.append(events("a/1", "c/1"))  # the last of "a" is another now
            assert (await log.locate("both", "b")).missed == 0
            assert (await log.locate("both", "a")).missed is None
            await log.append(events("b/1", "c/2"))
            assert set(log._last_trimmed_ids) == {"a/1", "b/1", "c/1"}

    async def test_the_last_of_a_quiet_topic_however_many_others_have_gone(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(memory, "_MOST_REMEMBERED", 5)
        async with MemoryLog(Retention(count=1)) as log:
            await log.append(events("quiet/1", *(f"busy/{number}" for number in range(20))))
            for topics in ("quiet", "quiet.>", ["quiet", "none.>"]):
                assert (await log.locate("quiet/1", topics)).missed in (0, None)
            assert (await log.read("quiet/1", "quiet")).gap is None
            assert (await log.read("quiet/1", ["quiet", "none.*"])).gap is None

    async def test_an_id_that_came_again_under_another_topic_is_remembered_once(self) -> None:
        async with MemoryLog(Retention(count=1)) as log:
            await log.append(events("noise/1"))
            for topic in ("a", "b"):
                await log.append([Record.of(Event(id="same"), topics=[topic])])
                await log.append(events(f"noise/{topic}"))
            assert log._last_trimmed_ids["same"] == (4, 1)
            await log.append(events("a/1", "b/1", "noise/9"))
            assert "same" not in log._last_trimmed_ids

    async def test_an_id_that_came_again_is_not_taken_for_the_one_before(self) -> None:
        async with MemoryLog(Retention(count=1)) as log:
            for name in ("a/1", "b/1", "a/1", "b/2", "a/2", "b/3"):
                await log.append(events(name))
            assert (await log.locate("a/1")).position == 3
            assert set(log._last_trimmed_ids) == {"a/2", "b/2"}


class TestUrl:
    async def test_says_the_retention(self) -> None:
        async with open_log("memory://?count=2&bytes=5000&age=0.5") as log:
            assert isinstance(log, MemoryLog)
            assert log.retention == Retention(count=2, bytes=5000, age=0.5)
        async with open_log("memory://", max_size=7) as log:
            assert (log.retention, log.max_size) == (MemoryLog().retention, 7)

    @pytest.mark.parametrize(
        ("url", "says"),
        [
            ("memory://somewhere", "nothing but a query"),
            ("memory:///path", "nothing but a query"),
            ("memory://?count=2#there", "nothing but a query"),
            ("memory://?size=2", "count, bytes and age, each once, not 'size'"),
            ("memory://?count=2&count=3", "each once, not 'count'"),
            ("memory://?count=two", "count in a log's URL is a number, not 'two'"),
            ("memory://?age=", "age in a log's URL is a number, not ''"),
            ("memory://?count=0", "retention by count is above 0"),
            ("memory://?age=nan", "retention by age is above 0"),
            ("memory://?count", "bad query field"),
            ("nowhere://", "begins with one of memory://, sqlite://; this is 'nowhere://'"),
            ("memory", "begins with one of memory://, sqlite://; this is 'memory'"),
        ],
    )
    def test_that_says_anything_else_is_refused(self, url: str, says: str) -> None:
        with pytest.raises(ValueError, match=says):
            open_log(url)


async def test_only_those_who_wait_for_it_are_woken() -> None:
    async with MemoryLog() as log:
        tails = {topics: log.tail(topics=topics) for topics in ("a", "b", "b.>", "*")}
        waiting = {topics: asyncio.create_task(anext(tail)) for topics, tail in tails.items()}
        await asyncio.sleep(1)
        await log.append(events("b/1", "b/2"))
        await asyncio.sleep(1)
        assert {topics: task.done() for topics, task in waiting.items()} == {
            "a": False,
            "b": True,
            "b.>": False,
            "*": True,
        }
        assert [
            follower.news for follower in log._followers if follower.selection.topics == "a"
        ] == [False]
        for topics, task in waiting.items():
            task.cancel()
            await asyncio.wait([task])
            await tails[topics].aclose()


async def test_far_from_the_end_a_page_costs_what_it_returns() -> None:
    """A reader of one topic does not pay for the others."""

    class Counting(Ring):
        looked_at = 0

        def at(self, position: int) -> Record:
            self.looked_at += 1
            return super().at(position)

    async with MemoryLog(Retention(count=100_000)) as log:
        log._ring = ring = Counting()
        await log.append(events("a/1", *(f"noise/{n}" for n in range(50_000)), "a/2"))
        for topics in ("a", ["a", "b"]):
            ring.looked_at = 0
            assert ids(await log.read(topics=topics)) == ["a/1", "a/2"]
            assert ring.looked_at <= 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_one_made_before_a_fork_works_in_the_child() -> None:
    log = MemoryLog()
    holding, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with log._lock:
            holding.set()
            forked.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait(PATIENCE)

    def append() -> bool:
        asyncio.run(log.append(events("1")))
        return log.statistics().records == 1

    assert in_a_child(append)
    forked.set()
    thread.join()
