"""What every log promises, run over each of them. A log takes part by one line in `LOGS`."""

import asyncio
import itertools
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
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
    EncodeError,
    Event,
    EventError,
    Exact,
    IdConflict,
    StreamClosed,
    TooLarge,
    TopicError,
    create_event,
)
from codomyrmex.events.streaming.log import (
    EARLIEST,
    LATEST,
    Batch,
    Gap,
    Location,
    Log,
    LogStatistics,
    MemoryLog,
    Record,
    Retention,
    SQLiteLog,
)
from codomyrmex.events.streaming.log.base import Change, Note, Reader, Superseded
from codomyrmex.events.streaming.testing import VirtualTimeLoop, cancel_at_every_await, run

PATIENCE = 20.0  # seconds of real time for what must happen at once

OpenLog = Callable[..., Log]


class NewLog(SQLiteLog):
    """A log in a new file of its own."""

    directory: ClassVar[Path]
    number: ClassVar = itertools.count()

    def __init__(self, **options: Any) -> None:
        path = self.directory / f"events-{next(self.number)}.db"
        super().__init__(path, durability="normal", **options)


class SharedLog(NewLog):
    """One that is not alone, and to which another appends all that is said to be appended to it.

    It is as with two processes: neither knows of the other but by the file.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.other = SQLiteLog(self.path, durability="normal", **options)

    async def _append(self, drafts: list[Record], guard: Note | None = None) -> list[Record]:
        await self._open()
        return await self.other._append(drafts, guard)

    async def _change(self, change: Change) -> Note | None:
        return await self.other._change(change)

    def statistics(self) -> LogStatistics:
        mine, others = super().statistics(), self.other.statistics()
        return replace(others, readers=mine.readers, trimmed=mine.trimmed + others.trimmed)

    async def close(self) -> None:
        await self.other.close()
        await super().close()


@pytest.fixture(scope="session", autouse=True)
def directory(tmp_path_factory: pytest.TempPathFactory) -> None:
    NewLog.directory = tmp_path_factory.mktemp("logs")


LOGS: dict[str, OpenLog] = {"MemoryLog": MemoryLog, "SQLiteLog": NewLog, "shared": SharedLog}


@pytest.fixture(params=LOGS)
def open_log(request: pytest.FixtureRequest) -> OpenLog:
    return LOGS[request.param]


class Clock:
    """Time of day that stands still unless it is told otherwise, in microseconds."""

    def __init__(self) -> None:
        self.now = 1_700_000_000_000_000

    def __call__(self) -> int:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += int(seconds * 1_000_000)


def event(name: str, topic: str | None = None, data: Any = None) -> Event:
    return Event(id=name, data=data, metadata={} if topic is None else {"topic": topic})


def events(*names: str) -> list[Event]:
    """Events called ``topic/number``, or just by an id, which have no topic."""
    return [event(name, name.partition("/")[0] if "/" in name else None) for name in names]


def ids(records: Iterable[Record]) -> list[str]:
    return [record.id for record in records]


async def read_all(log: Log, after: str = EARLIEST, topics: Any = "*", limit: int = 3) -> list[str]:
    """What is there, read page by page."""
    found: list[str] = []
    while True:
        batch = await log.read(after, topics, limit=limit)
        assert len(batch) <= limit
        found += ids(batch)
        after = batch.cursor
        if batch.is_last:
            return found


async def take(tail: AsyncGenerator[Batch, None], count: int) -> list[Any]:
    """The next ids and gaps of a tail, so many."""
    found: list[Any] = []
    while len(found) < count:
        batch = await anext(tail)
        if batch.gap is not None:
            found.append(batch.gap)
        found += ids(batch)
    assert len(found) == count
    return found


class TestAppending:
    async def test_returns_what_was_stored_in_one_order(self, open_log: OpenLog) -> None:
        clock = Clock()
        async with open_log(clock=clock) as log:
            first = await log.append([create_event({"total": 9}, topic="orders.new", by="ada")])
            clock.pass_by(1.5)
            second = await log.append(events("a/1", "2"))
        record = first[0]
        assert (record.topics, record.type, record.private) == (("orders.new",), "message", False)
        assert (record.body, record.metadata) == (b'{"total":9}', b'{"by":"ada"}')
        assert [each.time for each in second] == [record.time + 1_500_000] * 2
        positions = [each.position for each in first + second]
        assert positions == sorted(set(positions))
        assert second[1].topics == ()

    async def test_of_nothing_stores_nothing(self, open_log: OpenLog) -> None:
        async with open_log() as log:
            assert await log.append([]) == []
            assert log.statistics() == LogStatistics(0, 0, 0, 0, 0, None, None, 0)
            assert await log.read() == Batch([], EARLIEST)

    @given(
        data=st.recursive(
            st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
            max_leaves=5,
        ),
        type_=st.sampled_from(["message", "error", "order.paid", "heartbeat"]),
        metadata=st.dictionaries(
            st.text(max_size=5).filter(lambda name: name not in ("topic", "content_type")),
            st.integers(0, 9),
            max_size=2,
        ),
        topic=st.none() | st.just("orders.new"),
    )
    async def test_gives_the_same_event_again(
        self, data: Any, type_: str, metadata: dict[str, Any], topic: str | None
    ) -> None:
        about = metadata if topic is None else {**metadata, "topic": topic}
        published = Event(type=type_, data=data, metadata=about)
        for kind in LOGS.values():
            async with kind() as log:
                await log.append([published])
                (record,) = await log.read()
            assert record.event() == published
            assert published.metadata == about

    async def test_text_that_is_not_json_stays_what_it_is(self, open_log: OpenLog) -> None:
        published = Event(data='a "line"\nand another', metadata={"content_type": "text/plain"})
        async with open_log() as log:
            (record,) = await log.append([published])
        assert record.body == b'a "line"\nand another'
        assert record.event() == published

    async def test_a_record_may_have_several_topics_and_be_private(self, open_log: OpenLog) -> None:
        one = Record.of(event("1", "ignored"), topics=["b", "a", "b"], private=True)
        async with open_log() as log:
            (record,) = await log.append([one])
            assert (record.topics, record.private) == (("b", "a"), True)
            assert record.event().metadata == {"topic": "b"}
            assert [await read_all(log, topics=topic) for topic in ("a", "b", "ignored")] == [
                ["1"],
                ["1"],
                [],
            ]
            assert await read_all(log, topics=["a", "b", "*"]) == ["1"]

    async def test_metadata_cannot_say_what_only_records_say(self, open_log: OpenLog) -> None:
        sly = create_event(1, topic="a", topics=["b"], private=False, position=7)
        async with open_log() as log:
            (record,) = await log.append([Record.of(sly, private=True)])
            assert (record.topics, record.private, record.position) == (("a",), True, 1)
            assert record.event() == sly

    async def test_the_same_again_is_not_stored_again(self, open_log: OpenLog) -> None:
        clock = Clock()
        async with open_log(clock=clock) as log:
            first = await log.append([event("1", "a", data=[1]), *events("2")])
            clock.pass_by(60)
            # The same event from a client that tries again, and does not say when it happened.
            again = await log.append([*events("3", "3"), event("1", "a", data=[1])])
            assert again == [again[0], again[0], first[0]]
            assert await read_all(log) == ["1", "2", "3"]
            assert (log.statistics().appended, log.statistics().repeated) == (3, 2)

    @pytest.mark.parametrize(
        "other",
        [
            Record.of(event("1", "a", data=[2])),
            Record.of(event("1", "b", data=[1])),
            Record.of(event("1", "a", data=[1]), topics=["a", "b"]),
            Record.of(event("1", "a", data=[1]), private=True),
            Record.of(Event(id="1", type="other", data=[1], metadata={"topic": "a"})),
            Record.of(Event(id="1", data=[1], metadata={"topic": "a", "by": "ada"})),
        ],
    )
    @pytest.mark.parametrize("where", ["before", "in the batch"])
    async def test_anything_else_with_its_id_is_refused_with_all_of_its_batch(
        self, open_log: OpenLog, other: Record, where: str
    ) -> None:
        one = event("1", "a", data=[1])
        async with open_log() as log:
            if where == "before":
                await log.append([one])
            batch: list[Any] = [*events("0"), *([one] if where == "in the batch" else []), other]
            before = log.statistics()
            with pytest.raises(IdConflict, match="another event with the id '1'") as caught:
                await log.append(batch)
            assert caught.value.event_id == "1"
            assert log.statistics() == before
            assert await read_all(log) == (["1"] if where == "before" else [])

    async def test_an_event_of_the_limit_is_taken_and_one_over_it_is_not(
        self, open_log: OpenLog
    ) -> None:
        name = "n" * 10
        async with open_log(max_size=1000) as log:
            most = Event(id=name, data="x" * (1000 - len(name) - len('""')))
            (record,) = await log.append([most])
            assert record.size == 1000
            over = Event(id=name[1:], data="x" * (1000 - len(name) - len('""') + 2))
            with pytest.raises(TooLarge, match="has 1001 bytes; this log takes up to 1000"):
                await log.append([*events("fits"), over])
            assert await read_all(log) == [name]

    @pytest.mark.parametrize(
        ("entry", "error", "says"),
        [
            (Event(data={1, 2}), EncodeError, "set has no JSON form"),
            (Event(data=1, metadata={"by": {1}}), EncodeError, "set has no JSON form"),
            (event("1", "a.*"), TopicError, "not to a pattern"),
            (event("earliest"), EventError, "cursor"),
            (event("latest"), EventError, "cursor"),
            ({"data": 1}, TypeError, "an Event, not dict"),
        ],
    )
    async def test_what_cannot_be_stored_is_refused_with_all_of_its_batch(
        self, open_log: OpenLog, entry: Any, error: type[Exception], says: str
    ) -> None:
        async with open_log() as log:
            with pytest.raises(error, match=says):
                await log.append([*events("before"), entry])
            assert await read_all(log) == []

    async def test_that_was_cancelled_stored_all_or_nothing(self, open_log: OpenLog) -> None:
        async with open_log() as log:
            appending = [
                asyncio.create_task(log.append(events(f"{number}/1", f"{number}/2")))
                for number in range(20)
            ]
            await asyncio.sleep(0)
            for task in appending[::2]:
                task.cancel()
            done = await asyncio.gather(*appending, return_exceptions=True)
            found = await read_all(log)
        for number, result in enumerate(done):
            stored = [name for name in found if name.startswith(f"{number}/")]
            assert stored in ([], [f"{number}/1", f"{number}/2"])
            assert stored or isinstance(result, asyncio.CancelledError)


class TestReading:
    async def test_is_by_topics(self, open_log: OpenLog) -> None:
        async with open_log() as log:
            await log.append(events("a/1", "b.x/1", "none", "a/2", "b.y/1", "b.y.z/1", "c/1"))
            assert await read_all(log) == ["a/1", "b.x/1", "none", "a/2", "b.y/1", "b.y.z/1", "c/1"]
            assert await read_all(log, topics="a") == ["a/1", "a/2"]
            assert await read_all(log, topics="b.*") == ["b.x/1", "b.y/1"]
            assert await read_all(log, topics="b.>") == ["b.x/1", "b.y/1", "b.y.z/1"]
            assert await read_all(log, topics=["c", "b.*", "a"]) == [
                *("a/1", "b.x/1", "a/2", "b.y/1", "c/1")
            ]
            assert await read_all(log, topics=Exact("b.*")) == []
            assert await read_all(log, topics="nobody") == []

    @pytest.mark.parametrize("topics", ["*", "a", "a.>", ["a", "b"], ["*", "a"], "a.*", "*.*"])
    @pytest.mark.parametrize("limit", [1, 2, 7, 5000])
    async def test_goes_on_at_every_cursor(
        self, open_log: OpenLog, topics: Any, limit: int
    ) -> None:
        """Also where much is between: a reader of one topic and the traffic of others."""
        names = [f"{('a', 'b', 'a.b')[number % 3]}/{number}" for number in range(12)]
        few = limit < 1000 and "*" in topics  # where every one of them is read, again and again
        noise = 60 if few else 3000
        names[6:6] = [f"noise/{number}" for number in range(noise)]
        async with open_log() as log:
            await log.append(events(*names))
            expected = await read_all(log, topics=topics, limit=10_000)
            assert len(expected) > 0
            assert await read_all(log, topics=topics, limit=limit) == expected
            for place in (0, 3, 4, 8, noise + 7, noise + 10):
                rest = [name for name in expected if names.index(name) > place]
                assert await read_all(log, names[place], topics, limit) == rest

    async def test_an_empty_batch_says_where_it_got_to(self, open_log: OpenLog) -> None:
        async with open_log() as log:
            await log.append(events("a/1", "b/1"))
            batch = await log.read(topics="nobody")
            assert (batch.records, batch.cursor, batch.gap, batch.is_last) == (
                [],
                "b/1",
                None,
                True,
            )
            assert not batch
            await log.append(events("nobody/1"))
            assert ids(await log.read(batch.cursor, "nobody")) == ["nobody/1"]
            assert ids(await log.read(LATEST)) == []

    @pytest.mark.parametrize("limit", [0, -1])
    async def test_a_limit_below_one_is_refused(self, open_log: OpenLog, limit: int) -> None:
        async with open_log() as log:
            with pytest.raises(ValueError, match="1 or more"):
                await log.read(limit=limit)
            with pytest.raises(ValueError, match="1 or more"):
                await anext(log.tail(limit=limit))

    async def test_what_is_no_topic_is_refused(self, open_log: OpenLog) -> None:
        async with open_log() as log:
            with pytest.raises(TopicError):
                await log.read(topics="")
            with pytest.raises(TopicError):
                await anext(log.tail(topics=[]))
            with pytest.raises(TopicError):
                await log.locate(EARLIEST, topics="")
            assert log.statistics().readers == 0


class TestRetention:
    async def test_by_count(self, open_log: OpenLog) -> None:
        async with open_log(retention=Retention(count=3)) as log:
            for number in range(10):
                await log.append(events(f"a/{number}"))
            await log.trim()
            assert await read_all(log) == ["a/7", "a/8", "a/9"]
            assert await read_all(log, topics="a") == ["a/7", "a/8", "a/9"]
            counts = log.statistics()
            assert (counts.records, counts.trimmed, counts.appended) == (3, 7, 10)
            assert (counts.earliest, counts.latest) == ("a/7", "a/9")
            await log.append(events(*(f"b/{number}" for number in range(50))))  # at once
            await log.trim()
            assert await read_all(log) == ["b/47", "b/48", "b/49"]

    async def test_by_bytes(self, open_log: OpenLog) -> None:
        async with open_log(retention=Retention(bytes=1000)) as log:
            for number in range(10, 30):
                (record,) = await log.append([event(f"{number}", data="x" * 96)])
                assert record.size == 100
            await log.trim()
            assert log.statistics().bytes == 1000
            assert await read_all(log) == [str(number) for number in range(20, 30)]

    async def test_by_age(self, open_log: OpenLog) -> None:
        clock = Clock()
        async with open_log(retention=Retention(age=60), clock=clock) as log:
            await log.append(events("1", "2"))
            clock.pass_by(30)
            await log.append(events("3"))
            clock.pass_by(29.9)
            assert await log.trim() == 0
            clock.pass_by(0.1)
            assert await log.trim() == 2
            assert await read_all(log) == ["3"]

    async def test_by_age_of_old_events_is_by_when_they_came(self, open_log: OpenLog) -> None:
        clock = Clock()
        old = Event.from_dict({"id": "old", "timestamp": "1999-12-31T23:59:59Z"})
        async with open_log(retention=Retention(age=60), clock=clock) as log:
            (record,) = await log.append([old])
            assert record.event() == old
            assert await log.trim() == 0
            assert await read_all(log) == ["old"]

    async def test_a_clock_that_is_set_back_takes_nothing_early_and_disturbs_no_order(
        self, open_log: OpenLog
    ) -> None:
        clock = Clock()
        async with open_log(retention=Retention(age=60, count=100), clock=clock) as log:
            await log.append(events("1"))
            clock.pass_by(-3600)
            await log.append(events("2"))
            assert await log.trim() == 0
            assert await read_all(log) == ["1", "2"]
            clock.pass_by(3600 + 61)
            await log.append(events("3"))
            await log.trim()
            assert await read_all(log) == ["3"]

    async def test_what_was_trimmed_may_be_stored_again(self, open_log: OpenLog) -> None:
        async with open_log(retention=Retention(count=2)) as log:
            await log.append(events("1", "2", "3"))
            await log.trim()
            await log.append([event("1", data="another")])
            await log.trim()
            assert await read_all(log) == ["3", "1"]
            # A reader of the first "1" has not had what came between the two.
            batch = await log.read("1")
            assert (ids(batch), batch.gap) == (["3", "1"], Gap("1", "trimmed", 1))

    @pytest.mark.parametrize("name", ["count", "bytes", "age"])
    @pytest.mark.parametrize("limit", [0, -1])
    def test_a_limit_is_above_zero(self, name: str, limit: int) -> None:
        with pytest.raises(ValueError, match=f"retention by {name} is above 0"):
            Retention(**{name: limit})


class TestClocksThatWereAhead:
    async def test_keep_nothing_for_longer(self, open_log: OpenLog) -> None:
        clock = Clock()
        async with open_log(retention=Retention(age=60), clock=clock) as log:
            await log.append(events("1"))
            clock.pass_by(3600)
            await log.append(events("ahead"))
            clock.pass_by(-3600)
            await log.append(events("2", "3"))
            clock.pass_by(61)
            await log.append(events("4"))
            await log.trim()
            assert await read_all(log) == ["4"]


class TestGaps:
    async def test_what_was_trimmed_is_told_and_counted(self, open_log: OpenLog) -> None:
        async with open_log(retention=Retention(count=3)) as log:
            for number in range(10):
                await log.append(events(str(number)))
            await log.trim()
            batch = await log.read("2", limit=2)
            missed = 4 if log.capabilities.counts_missed else None
            assert (ids(batch), batch.gap) == (["7", "8"], Gap("2", "trimmed", missed))
            assert (await log.read("8")).gap is None
            assert (await log.read("6")).gap is None  # it has gone, but nothing after it has
            assert (await log.read(EARLIEST)).gap is None
            assert await log.locate("2") == Location("trimmed", 3, missed, "7", "9")
            assert await log.locate("8") == Location("found", 9, 0, "7", "9")
            assert await log.locate(LATEST) == Location("found", 10, 0, "7", "9")
            assert await log.locate(EARLIEST) == Location("found", 7, 0, "7", "9")

    async def test_an_unknown_cursor_is_one(self, open_log: OpenLog) -> None:
        async with open_log() as log:
            assert (await log.read("never")).gap == Gap("never", "unknown")
            await log.append(events("1", "2"))
            batch = await log.read("never")
            assert (ids(batch), batch.gap) == (["1", "2"], Gap("never", "unknown"))
            assert await log.locate("never") == Location("unknown", None, None, "1", "2")
            async with aclosing(log.tail("never")) as tail:
                assert await take(tail, 3) == [Gap("never", "unknown"), "1", "2"]

    @pytest.mark.parametrize("topics", ["quiet", "qui*t", "quiet.>", ["quiet", "other"]])
    async def test_a_reader_of_a_quiet_topic_is_not_alarmed_by_the_traffic_of_others(
        self, open_log: OpenLog, topics: Any
    ) -> None:
        if topics == "qui*t":
            topics = ["quiet", "*.nothing"]
        name = "quiet.a/1" if topics == "quiet.>" else "quiet/1"
        async with open_log(retention=Retention(count=3)) as log:
            await log.append(events(name))
            for number in range(20):
                await log.append(events(f"busy.{number}/1"))
            await log.trim()
            batch = await log.read(name, topics)
            assert (ids(batch), batch.gap) == ([], None)
            assert (await log.locate(name, topics)).missed == 0
            assert (await log.locate(name)).missed in (17, None)
            async with aclosing(log.tail(name, topics)) as tail:
                reading = asyncio.create_task(take(tail, 1))
                await asyncio.sleep(1)
                await log.append(events(name.replace("/1", "/2")))
                assert await reading == [name.replace("/1", "/2")]

    async def test_nor_is_who_has_read_what_has_no_topic(self, open_log: OpenLog) -> None:
        async with open_log(retention=Retention(count=1)) as log:
            await log.append(events("none", "busy/1", "noise/1", "busy/2"))
            await log.trim()
            for topics in ("quiet", "quiet.>"):
                batch = await log.read("none", topics)
                assert (ids(batch), batch.gap) == ([], None)
            assert (await log.read("none")).gap == Gap("none", "trimmed", 2)

    @pytest.mark.parametrize("topics", ["a", "a.>", ["a", "b"]])
    async def test_but_by_what_its_own_topic_has_lost(self, open_log: OpenLog, topics: Any) -> None:
        topic = "a.x" if topics == "a.>" else "a"
        async with open_log(retention=Retention(count=2)) as log:
            await log.append(events(f"{topic}/1"))
            for number in range(2, 6):
                await log.append(events(f"{topic}/{number}", f"busy/{number}"))
            await log.trim()
            batch = await log.read(f"{topic}/1", topics)
            assert ids(batch) == [f"{topic}/5"]
            assert batch.gap is not None
            assert batch.gap.reason == "trimmed"
            assert batch.gap.missed in (3, None)

    async def test_one_that_sleeps_for_an_hour_is_told_what_it_missed(
        self, open_log: OpenLog
    ) -> None:
        loop, start = asyncio.get_running_loop(), 1_700_000_000_000_000
        log = open_log(
            retention=Retention(age=600), clock=lambda: start + int(loop.time() * 1_000_000)
        )
        async with log, aclosing(log.tail(EARLIEST, limit=1)) as tail:
            await log.append(events("a/0"))
            assert await take(tail, 1) == ["a/0"]
            for minute in range(1, 61):  # while the reader does something else
                await asyncio.sleep(60)
                await log.append(events(f"a/{minute}"))
                await log.trim()
            assert await take(tail, 3) == [Gap("a/0", "trimmed", 50), "a/51", "a/52"]

    async def test_a_tail_that_retention_passes_is_told_so(self, open_log: OpenLog) -> None:
        async with open_log(retention=Retention(count=5)) as log:
            async with aclosing(log.tail(EARLIEST)) as tail:
                await log.append(events("0"))
                assert await take(tail, 1) == ["0"]
                await asyncio.sleep(3600)
                for number in range(1, 21):
                    await log.append(events(str(number)))
                await log.trim()
                found = await take(tail, 6)
            missed = 15 if log.capabilities.counts_missed else None
            assert found == [Gap("0", "trimmed", missed), "16", "17", "18", "19", "20"]

    @pytest.mark.parametrize("topics", ["*", "a", "a.>"])
    @pytest.mark.parametrize("limit", [1, 4, 1000])
    async def test_a_replay_is_limited_and_the_cut_told(
        self, open_log: OpenLog, topics: Any, limit: int
    ) -> None:
        topic = "a.x" if topics == "a.>" else "a"
        async with open_log() as log:
            await log.append(events(*(f"{topic}/{number}" for number in range(10))))
            async with aclosing(
                log.tail(f"{topic}/1", topics, limit=limit, replay_limit=3)
            ) as tail:
                found = await take(tail, 4)
                assert found[1:] == [f"{topic}/7", f"{topic}/8", f"{topic}/9"]
                assert found[0].after == f"{topic}/1"
                assert found[0].reason == "limit"
                assert found[0].missed in (5, None)
            async with aclosing(
                log.tail(f"{topic}/1", topics, limit=limit, replay_limit=8)
            ) as tail:
                assert await take(tail, 8) == [f"{topic}/{number}" for number in range(2, 10)]

    async def test_a_limit_counts_only_what_was_asked_for(self, open_log: OpenLog) -> None:
        async with open_log() as log:
            await log.append(events("a/1", *(f"b/{number}" for number in range(10)), "a/2"))
            async with aclosing(log.tail(EARLIEST, "a", replay_limit=2)) as tail:
                assert await take(tail, 2) == ["a/1", "a/2"]

    async def test_a_cut_after_a_trim_counts_both(self, open_log: OpenLog) -> None:
        async with open_log(retention=Retention(count=6)) as log:
            for number in range(10):
                await log.append(events(str(number)))
            await log.trim()
            async with aclosing(log.tail("0", replay_limit=2)) as tail:
                found = await take(tail, 3)
            assert found[1:] == ["8", "9"]
            assert found[0].missed in (7, None)


def at(clock: Clock, seconds: float = 0.0) -> datetime:
    return datetime.fromtimestamp(clock.now / 1_000_000, UTC) + timedelta(seconds=seconds)


class TestTimes:
    """From a time to a place."""

    async def test_the_first_event_at_or_after_it_is_next(self, open_log: OpenLog) -> None:
        clock = Clock()
        async with open_log(clock=clock) as log:
            assert await log.cursor_at(at(clock)) == EARLIEST
            for number in range(50):
                await log.append(events(f"{number}/a", f"{number}/b"))
                clock.pass_by(10)
            start = at(clock, -500)
            for number in range(50):
                exactly = start + timedelta(seconds=10 * number)
                for when in (exactly, exactly - timedelta(microseconds=1)):
                    batch = await log.read(await log.cursor_at(when), limit=1)
                    assert (ids(batch), batch.gap) == ([f"{number}/a"], None)
            assert await log.cursor_at(start) == EARLIEST
            elsewhere = (start + timedelta(seconds=10)).astimezone(timezone(timedelta(hours=9)))
            assert await log.cursor_at(elsewhere) == "0/b"
            assert await log.cursor_at(at(clock)) == "49/b"
            await log.append(events("later"))
            assert ids(await log.read("49/b")) == ["later"]

    async def test_what_was_trimmed_is_not_found_by_it(self, open_log: OpenLog) -> None:
        clock = Clock()
        async with open_log(retention=Retention(count=3), clock=clock) as log:
            for number in range(10):
                await log.append(events(str(number)))
                clock.pass_by(1)
            await log.trim()
            assert await log.cursor_at(at(clock, -10)) == EARLIEST
            assert await log.cursor_at(at(clock, -2)) == "7"

    async def test_it_is_found_among_what_notes_keep(self, open_log: OpenLog) -> None:
        clock = Clock()
        async with open_log(retention=Retention(count=2), clock=clock) as log:
            await log._change(Change(Note("run", {}), keep=("run", 0)))
            for number in range(40):
                await log.append(events(f"{'run' if number % 10 == 5 else 'x'}/{number}"))
                clock.pass_by(1)
            await log.trim()
            assert await read_all(log) == ["run/5", "run/15", "run/25", "run/35", "x/38", "x/39"]
            found = [await log.cursor_at(at(clock, seconds - 40)) for seconds in range(41)]
        assert found[:6] == [EARLIEST] * 6
        assert found[6:16] == ["run/5"] * 10
        assert found[26:36] == ["run/25"] * 10
        assert found[36:39] == ["run/35"] * 3
        assert found[39:] == ["x/38", "x/39"]

    async def test_where_the_clock_was_set_back_it_is_a_place_where_it_passes_that_time(
        self, open_log: OpenLog
    ) -> None:
        clock = Clock()
        async with open_log(clock=clock) as log:
            records: list[Record] = []
            for step in (1, 1, 1, 1, -3, 1, 1, 1, 1, 1, -2, 1, 1, 1):
                clock.pass_by(step)
                records += await log.append(events(str(len(records))))
            for record in records:
                when = datetime.fromtimestamp(record.time / 1_000_000, UTC)
                cursor = await log.cursor_at(when)
                index = 0 if cursor == EARLIEST else int(cursor) + 1
                assert records[index].time >= record.time
                assert index == 0 or records[index - 1].time < record.time

    async def test_one_without_a_timezone_is_refused(self, open_log: OpenLog) -> None:
        async with open_log() as log:
            with pytest.raises(ValueError, match="has a timezone"):
                await log.cursor_at(datetime(2026, 1, 1))


class TestTailing:
    async def test_is_history_and_then_what_comes(self, open_log: OpenLog) -> None:
        async with open_log() as log:
            await log.append(events("a/1", "b/1", "a/2"))
            async with aclosing(log.tail("a/1")) as tail, aclosing(log.tail(EARLIEST, "a")) as of_a:
                assert await take(tail, 2) == ["b/1", "a/2"]
                assert await take(of_a, 2) == ["a/1", "a/2"]
                reading = asyncio.create_task(take(tail, 2))
                reading_a = asyncio.create_task(take(of_a, 1))
                await asyncio.sleep(1)
                await log.append(events("b/2", "a/3"))
                assert await reading == ["b/2", "a/3"]
                assert await reading_a == ["a/3"]

    async def test_keeps_nothing_of_what_it_gave(self, open_log: OpenLog) -> None:
        async with open_log() as log, aclosing(log.tail(EARLIEST)) as tail:
            await log.append(events("1"))
            batch = await anext(tail)
            assert sys.getrefcount(batch) <= 2  # ours, and that of the call

    async def test_is_of_what_comes_where_nothing_else_is_said(self, open_log: OpenLog) -> None:
        async with open_log() as log:
            await log.append(events("before"))
            async with aclosing(log.tail()) as tail:
                reading = asyncio.create_task(take(tail, 1))
                await asyncio.sleep(1)
                await log.append(events("after"))
                assert await reading == ["after"]

    @pytest.mark.parametrize(
        ("last", "expected"),
        [(1, ["a/2"]), (2, ["a/1", "a/2"]), (9, ["a/0", "a/1", "a/2"])],
    )
    async def test_may_begin_with_the_last_few(
        self, open_log: OpenLog, last: int, expected: list[str]
    ) -> None:
        async with open_log() as log:
            await log.append(events("a/0", "b/0", "a/1", "b/1", "a/2", "b/2"))
            async with aclosing(log.tail(topics="a", last=last)) as tail:
                assert await take(tail, len(expected)) == expected
            async with aclosing(log.tail(last=last, topics="a.>")) as tail:
                reading = asyncio.create_task(take(tail, 1))
                await asyncio.sleep(1)
                await log.append(events("a.b/1"))
                assert await reading == ["a.b/1"]

    async def test_the_last_none_is_what_comes(self, open_log: OpenLog) -> None:
        async with open_log() as log:
            await log.append(events("1"))
            async with aclosing(log.tail(last=0)) as tail:
                reading = asyncio.create_task(take(tail, 1))
                await asyncio.sleep(1)
                await log.append(events("2"))
                assert await reading == ["2"]
            with pytest.raises(ValueError, match="0 or more"):
                await anext(log.tail(last=-1))

    async def test_ends_at_once_when_the_log_is_closed(self, open_log: OpenLog) -> None:
        log = open_log()
        await log.append(events("1"))
        waiting = [asyncio.create_task(take(log.tail("1"), 1)) for _ in range(3)]
        await asyncio.sleep(1)
        await log.close()
        for task in waiting:
            with pytest.raises(StopAsyncIteration):
                await task
        assert log.statistics().readers == 0

    async def test_begun_and_left_or_never_begun_it_leaves_nothing(self, open_log: OpenLog) -> None:
        async with open_log() as log:
            await log.append(events("1"))
            log.tail()
            begun = log.tail(EARLIEST)
            await anext(begun)
            assert log.statistics().readers == 1
            await begun.aclose()
            assert log.statistics().readers == 0

    async def test_a_thousand_that_are_cancelled_leave_nothing(self, open_log: OpenLog) -> None:
        async with open_log() as log:
            tasks = [asyncio.create_task(take(log.tail(topics=f"a.{n}"), 1)) for n in range(1000)]
            await asyncio.sleep(1)
            assert log.statistics().readers == 1000
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            assert log.statistics().readers == 0
            await log.append(events("a.1/1"))

    def test_cancelled_anywhere_it_leaves_nothing(self, open_log: OpenLog) -> None:
        async def scenario() -> None:
            async with open_log(retention=Retention(count=2)) as log:
                await log.append(events("1", "2", "3"))
                async with aclosing(log.tail("1")) as tail:
                    reading = asyncio.create_task(take(tail, 3))
                    try:
                        await asyncio.sleep(1)
                        await log.append(events("4"))
                        await log.trim()
                        await reading
                    finally:
                        reading.cancel()
                        await asyncio.wait([reading])

        assert cancel_at_every_await(scenario) >= 2

    @pytest.mark.real_time
    @pytest.mark.parametrize("topics", ["*", "even", "e*.>", ["even", "odd"]])
    async def test_at_the_seam_nothing_is_missing_and_nothing_twice(
        self, open_log: OpenLog, topics: Any
    ) -> None:
        """While a thread appends at full speed, readers begin at every place."""
        topics = ["even.>", "odd"] if topics == "e*.>" else topics
        names = [f"{('even', 'odd')[number % 2]}/{number}" for number in range(1400)]
        wanted = {"*": names, "even": names[::2]}.get(topics if isinstance(topics, str) else "")
        if wanted is None:
            wanted = names[1::2] if "even.>" in topics else names
        place = {name: number for number, name in enumerate(names)}
        log = open_log()

        def append() -> None:
            async def all_of_them() -> None:
                for start in range(0, len(names), 7):
                    await log.append(events(*names[start : start + 7]))

            asyncio.run(all_of_them())

        async def read(after: str, expected: list[str]) -> None:
            found: list[str] = []
            async with asyncio.timeout(PATIENCE), aclosing(log.tail(after, topics)) as tail:
                while len(found) < len(expected):
                    batch = await anext(tail)
                    assert batch.gap is None
                    found += ids(batch)
            assert found == expected

        thread = threading.Thread(target=append)
        thread.start()
        readers = [asyncio.create_task(read(EARLIEST, wanted))]
        while thread.is_alive() and len(readers) < 100:
            latest = log.statistics().latest
            if latest is not None:
                rest = [name for name in wanted if place[name] > place[latest]]
                readers.append(asyncio.create_task(read(latest, rest)))
            await asyncio.sleep(0)
        await asyncio.gather(*readers)
        await asyncio.to_thread(thread.join)
        await log.close()

    @pytest.mark.real_time
    async def test_works_in_every_event_loop(self, open_log: OpenLog) -> None:
        async with open_log() as log:

            def there() -> list[Any]:
                async def read() -> list[Any]:
                    async with asyncio.timeout(PATIENCE), aclosing(log.tail(EARLIEST)) as tail:
                        return await take(tail, 3)

                return asyncio.run(read())

            reading = [asyncio.create_task(asyncio.to_thread(there)) for _ in range(3)]
            async with asyncio.timeout(PATIENCE):
                while log.statistics().readers < 3:  # noqa: ASYNC110  (they are other threads)
                    await asyncio.sleep(0)
            await log.append(events("1", "2"))
            await log.append(events("3"))
            assert await asyncio.gather(*reading) == [["1", "2", "3"]] * 3


async def test_a_reader_may_be_closed_twice(open_log: OpenLog) -> None:
    async with open_log() as log:
        reader = Reader(log, "*")
        assert log.statistics().readers == 1
        reader.close()
        reader.close()
        assert log.statistics().readers == 0


class TestNotes:
    """Small named values that logs keep for consumers and runs."""

    async def test_are_changed_only_by_who_knows_them_as_they_are(self, open_log: OpenLog) -> None:
        async with open_log() as log:
            assert await log._note("cursor") == Note("cursor", {}, 0)
            first = await log._change(Change(Note("cursor", {"at": "1"})))
            assert first is not None
            assert await log._note("cursor") == first
            assert await log._change(Change(Note("cursor", {"at": "x"}))) is None
            second = await log._change(Change(Note("cursor", {"at": "ä"}, first.revision)))
            assert second is not None
            assert second.revision not in (0, first.revision)
            assert await log._change(Change(Note("cursor", {"at": "x"}, first.revision))) is None
            assert await log._change(Change(first, gone=True)) is None
            assert (await log._note("cursor")).value == {"at": "ä"}
            assert await log._change(Change(second, gone=True)) is not None
            assert (await log._note("cursor")).revision == 0
            third = await log._change(Change(Note("cursor", {})))
            assert third is not None
            assert third.revision not in (first.revision, second.revision)

    async def test_are_found_by_how_their_names_begin(self, open_log: OpenLog) -> None:
        async with open_log() as log:
            for key in ("run:a", "run:b", "run", "consumer:a", "ruo:a"):
                await log._change(Change(Note(key, {"key": key})))
            assert [note.value["key"] for note in await log._notes("run:")] == ["run:a", "run:b"]

    async def test_end_when_their_time_is_over(self, open_log: OpenLog) -> None:
        clock = Clock()
        async with open_log(clock=clock) as log:
            note = await log._change(Change(Note("lease", {}), expires=clock.now + 15_000_000))
            assert note is not None
            clock.pass_by(14)
            await log.trim()
            assert await log._note("lease") == note
            clock.pass_by(1)
            assert (await log._note("lease")).revision == 0
            assert await log._notes("") == []
            assert await log._change(Change(note)) is None
            again = await log._change(Change(Note("lease", {"by": "another"})))
            assert again is not None
            clock.pass_by(3600)
            await log.trim()
            assert await log._note("lease") == again

    async def test_guard_what_is_appended(self, open_log: OpenLog) -> None:
        async with open_log() as log:
            note = await log._change(Change(Note("lease", {})))
            assert note is not None
            drafts = [Record.of(each) for each in events("1", "2")]
            await log._append(drafts[:1], note)
            await log._change(Change(note))
            with pytest.raises(Superseded):
                await log._append(drafts[1:], note)
            with pytest.raises(Superseded):
                await log._append(drafts[1:], Note("another", {}, 5))
            assert await read_all(log) == ["1"]

    async def test_tell_that_they_were_changed(self, open_log: OpenLog) -> None:
        async with open_log() as log:
            await log.append(events("1"))
            count = log._notes_changed.count
            waiting = asyncio.create_task(log._notes_changed.wait(count))
            await asyncio.sleep(0)
            assert not waiting.done()
            await log._change(Change(Note("note", {})))
            await waiting
            assert (await log._note("note")).revision

    async def test_keep_records_for_as_long_as_they_are_there(self, open_log: OpenLog) -> None:
        clock = Clock()
        async with open_log(retention=Retention(count=2), clock=clock) as log:
            await log.append(events("run/1", "x/1", "run/2"))
            start = (await log.locate("run/1")).position
            assert start is not None
            until = clock.now + 60_000_000
            await log._change(Change(Note("run", {}), expires=until, keep=("run", start)))
            await log.append(events(*(f"x/{number}" for number in range(2, 40)), "run/3"))
            await log.append(events(*(f"x/{number}" for number in range(40, 80))))
            await log.trim()
            assert await read_all(log, topics="run") == ["run/2", "run/3"]
            assert (await log.read("run/2", "run")).gap is None
            assert (await log.read("run/1", "run")).gap is None
            assert await read_all(log) == ["run/2", "run/3", "x/78", "x/79"]
            assert await read_all(log, "run/2") == ["run/3", "x/78", "x/79"]
            assert (await log.read("run/2")).gap == Gap("run/2", "trimmed", 76)
            assert (await log.locate("run/2")).status == "found"
            counts = log.statistics()
            assert (counts.earliest, counts.latest, counts.records) == ("run/2", "x/79", 2)
            # Of single topics a log knows only where the last was that has gone.
            async with aclosing(log.tail("run/2", ["run", "x"], limit=1)) as tail:
                assert await take(tail, 4) == [
                    "run/3",
                    Gap("run/3", "trimmed", None),
                    "x/78",
                    "x/79",
                ]
            clock.pass_by(60)
            await log.trim()
            assert await read_all(log) == ["x/78", "x/79"]
            assert (await log.read("run/2", "run")).gap == Gap("run/2", "trimmed", None)
            assert (await log.read("run/3", "run")).gap is None

    async def test_that_go_under_a_reader_are_told_to_be_missing(self, open_log: OpenLog) -> None:
        async with open_log(retention=Retention(count=1)) as log:
            note = await log._change(Change(Note("run", {}), keep=("run", 0)))
            assert note is not None
            await log.append(events(*(f"run/{number}" for number in range(10)), "x/1", "x/2"))
            await log.trim()
            async with aclosing(log.tail(EARLIEST, limit=3)) as tail:
                assert await take(tail, 3) == ["run/0", "run/1", "run/2"]
                await log._change(Change(note, gone=True))
                await log.trim()
                assert await take(tail, 2) == [Gap("run/2", "trimmed", 8), "x/2"]
            batch = await log.read("run/2", limit=1)
            assert (batch.gap, ids(batch)) == (Gap("run/2", "trimmed", 8), ["x/2"])

    async def test_that_go_under_a_reader_of_the_last_are_told_as_well(
        self, open_log: OpenLog
    ) -> None:
        async with open_log(retention=Retention(count=5)) as log:
            note = await log._change(Change(Note("run", {}), keep=("run", 0)))
            assert note is not None
            for number in range(20):
                await log.append(events(f"run/{number}", f"x/{number}"))
            await log.trim()
            async with (
                aclosing(log.tail(last=18, limit=4, topics="run")) as tail,
                aclosing(log.tail("run/0", limit=4, replay_limit=12)) as limited,
            ):
                assert await take(tail, 4) == [f"run/{number}" for number in range(2, 6)]
                assert await take(limited, 5) == [
                    Gap("run/0", "trimmed", 17 + 10),
                    *(f"run/{number}" for number in range(11, 15)),
                ]
                await log._change(Change(note, gone=True))
                await log.trim()
                assert await take(tail, 3) == [
                    Gap("run/5", "trimmed", 12),
                    "run/18",
                    "run/19",
                ]
                assert await take(limited, 6) == [
                    Gap("run/14", "trimmed", 3),
                    "x/17",
                    "run/18",
                    "x/18",
                    "run/19",
                    "x/19",
                ]

    async def test_one_loss_is_told_once_and_not_before_its_place(self, open_log: OpenLog) -> None:
        async with open_log(retention=Retention(count=3)) as log:
            await log._change(Change(Note("run", {}), keep=("x.run", 0)))
            await log.append(events("q/0"))
            await log.append(
                [Event(id=f"run/{number}", metadata={"topic": "x.run"}) for number in range(8)]
            )
            await log.append([Event(id="lost", metadata={"topic": "x.other"})])
            await log.append(events(*(f"q/{number}" for number in range(1, 6))))
            await log.trim()
            for topics in ("x.*", ["x.run", "x.other"]):
                async with aclosing(log.tail("q/0", topics, limit=4)) as tail:
                    assert await take(tail, 9) == [
                        *(f"run/{number}" for number in range(8)),
                        Gap("run/7", "trimmed", None),
                    ]

    async def test_a_limit_that_takes_nothing_hides_no_gap(self, open_log: OpenLog) -> None:
        async with open_log(retention=Retention(count=5)) as log:
            await log.append(events(*(f"t/{number}" for number in range(31))))
            await log.trim()
            for topics, missed in (("*", 25), ("t", None)):
                async with aclosing(log.tail("t/0", topics, replay_limit=8)) as tail:
                    found = [f"t/{number}" for number in range(26, 31)]
                    assert await take(tail, 6) == [Gap("t/0", "trimmed", missed), *found]

    async def test_keep_what_has_other_topics_too(self, open_log: OpenLog) -> None:
        async with open_log(retention=Retention(count=1)) as log:
            note = await log._change(Change(Note("run", {}), keep=("run", 0)))
            assert note is not None
            await log.append([Record.of(event("1"), topics=["x", "run"]), *events("x/2", "y/3")])
            await log.trim()
            assert await read_all(log) == ["1", "y/3"]
            assert await read_all(log, topics="x") == ["1"]
            assert (await log.read(topics="x", after="1")).gap == Gap("1", "trimmed", None)
            await log._change(Change(note, gone=True))
            await log.trim()
            assert await read_all(log) == ["y/3"]
            # The last of the topic that has gone is the one that was published last.
            assert (await log.locate("x/2", "x")).missed == 0
            assert (await log.read("1", "x")).gap == Gap("1", "trimmed", None)


class TestClosing:
    async def test_ends_everything_and_again_does_nothing(self, open_log: OpenLog) -> None:
        log = open_log()
        await log.append(events("1"))
        await log.close()
        await log.close()
        for call in (
            log.append(events("2")),
            log.read(),
            log.locate("1"),
            log.cursor_at(datetime.now(UTC)),
            log.trim(),
            anext(log.tail()),
        ):
            with pytest.raises(StreamClosed, match="the log has been closed"):
                await call


class LikeTheReference(RuleBasedStateMachine):
    """Every log beside a list, step for step: what is read, and what is said to be missing."""

    TOPICS = ("a", "b", "a.b", None)
    FILTERS = ("*", "a", "b", "a.*", "a.>", ["a", "b"], ["a.*", "b"])

    @initialize(kind=st.sampled_from(sorted(LOGS)), count=st.none() | st.integers(1, 6))
    def begin(self, kind: str, count: int | None) -> None:
        self.loop = VirtualTimeLoop()
        self.count = count
        self.log = LOGS[kind](retention=Retention(count=count))
        self.published: list[tuple[str, str | None]] = []
        self.trimmed: set[int] = set()
        self.keeps: dict[str, tuple[Note, int]] = {}  # by topic: from which on
        self.reader: Reader | None = None

    def selects(self, topics: Any, topic: str | None) -> bool:
        if topics == "*":
            return True
        match topic:
            case None:
                return False
            case "a.b":
                return "a.*" in topics or topics == "a.>"
            case _:
                return topic == topics or topic in (topics if isinstance(topics, list) else ())

    @rule(topics=st.lists(st.sampled_from(TOPICS), max_size=5))
    def append(self, topics: list[str | None]) -> None:
        first = len(self.published)
        fresh = [(str(first + index), topic) for index, topic in enumerate(topics)]
        self.published += fresh
        given_ = [event(name, topic) for name, topic in fresh]
        assert ids(self.loop.run_until_complete(self.log.append(given_))) == [
            name for name, _ in fresh
        ]
        self.trim()

    @rule(topic=st.sampled_from(["a", "b", "a.b"]), back=st.integers(0, 12))
    def keep(self, topic: str, back: int) -> None:
        start = max(0, len(self.published) - back)
        note = self.keeps[topic][0] if topic in self.keeps else Note(topic, {})
        change = Change(note, keep=(topic, start))
        changed = self.loop.run_until_complete(self.log._change(change))
        assert changed is not None
        self.keeps[topic] = changed, start
        self.trim()

    @precondition(lambda self: self.keeps)
    @rule(data=st.data())
    def keep_no_more(self, data: st.DataObject) -> None:
        note, _ = self.keeps.pop(data.draw(st.sampled_from(sorted(self.keeps))))
        assert self.loop.run_until_complete(self.log._change(Change(note, gone=True)))
        self.trim()

    def trim(self) -> None:
        self.loop.run_until_complete(self.log.trim())
        for index, (_, topic) in enumerate(self.published[: self.gone]):
            if topic not in self.keeps or index < self.keeps[topic][1]:
                self.trimmed.add(index)

    @property
    def gone(self) -> int:
        """How many retention does not allow, and only notes keep."""
        return 0 if self.count is None else max(0, len(self.published) - self.count)

    def selected(self, topics: Any, start: int, *, trimmed: bool) -> list[str]:
        return [
            name
            for index, (name, topic) in enumerate(self.published)
            if index >= start and self.selects(topics, topic) and (index in self.trimmed) is trimmed
        ]

    @rule(topics=st.sampled_from(FILTERS), back=st.integers(0, 12), limit=st.integers(1, 4))
    def read(self, topics: Any, back: int, limit: int) -> None:
        seen = max(0, len(self.published) - back)
        cursor = str(seen - 1) if seen else EARLIEST
        batch = self.loop.run_until_complete(self.log.read(cursor, topics, limit=limit))
        wanted = self.selected(topics, seen, trimmed=False)
        assert ids(batch) == wanted[:limit]
        missed = self.selected(topics, seen, trimmed=True)
        if len(batch) == limit:  # of what comes after it, the next one tells
            missed = [name for name in missed if int(name) < int(batch.records[-1].id)]
        if missed and seen:
            assert batch.gap is not None
            assert batch.gap.missed in (len(missed), None)
        elif batch.gap is not None:
            # Where the log cannot know: the cursor is that of another's event, long gone; or where
            # something has gone between what is there.
            first = min(set(range(len(self.published))) - self.trimmed)
            assert batch.gap.reason == "unknown" or self.selected(topics, first, trimmed=True)
        assert batch.is_last == (len(wanted) <= limit) or len(wanted) == limit

    @rule(limit=st.integers(1, 4))
    def follow(self, limit: int) -> None:
        """One that reads on now and then gets everything, or is told how much it does not."""
        if self.reader is None:
            self.reader = Reader(self.log, "*", limit=limit)
            self.loop.run_until_complete(self.reader.begin(EARLIEST))
            self.missed = 0
            self.start = self.reader._position
            self.found: list[str] = []
        self.loop.run_until_complete(self.reader.end_here())
        batch = self.loop.run_until_complete(self.reader.read())
        if batch is None:
            return
        self.found += ids(batch)
        if batch.gap is not None:
            assert batch.gap.missed is not None
            self.missed += batch.gap.missed
        assert self.found == sorted(set(self.found), key=int)
        reached = self.reader._position
        assert len(self.found) + self.missed == reached - self.start

    @rule(topics=st.sampled_from(FILTERS), last=st.integers(1, 4))
    def tail(self, topics: Any, last: int) -> None:
        kept = self.selected(topics, 0, trimmed=False)

        async def begin() -> list[Any]:
            async with aclosing(self.log.tail(topics=topics, last=last)) as tail:
                return await take(tail, min(last, len(kept))) if kept else []

        assert self.loop.run_until_complete(begin()) == kept[-last:]

    @invariant()
    def they_are_alike(self) -> None:
        if hasattr(self, "log"):
            counts = self.log.statistics()
            assert counts.appended == len(self.published)
            assert counts.records == len(self.published) - self.gone
            assert counts.trimmed == len(self.trimmed)

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            if self.reader is not None:
                self.reader.close()
            self.loop.run_until_complete(self.log.close())
            self.loop.close()


def test_every_log_is_what_the_documentation_says() -> None:
    run_state_machine_as_test(LikeTheReference)


def test_closing_runs_without_anything_open() -> None:
    async def scenario() -> None:
        for kind in LOGS.values():
            await kind().close()

    run(scenario())
