"""`SQLiteLog`: files, what survives, and what is said of files that are not as they should be."""

# ruff: noqa: ASYNC240  (nobody waits while a test looks at its file)

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from codomyrmex.events.streaming import (
    Event,
    IdConflict,
    LogFull,
    LogUnusable,
    StreamClosed,
)
from codomyrmex.events.streaming.log import (
    EARLIEST,
    Gap,
    LogStream,
    Record,
    Retention,
    SQLiteLog,
    open_log,
    sqlite,
    sqlite_file,
)
from codomyrmex.events.streaming.log.base import Change, Note
from codomyrmex.events.streaming.log.sqlite_file import SQLiteFile
from codomyrmex.events.streaming.topics import Selection
from tests.conformance.test_logs import Clock, event, events, ids, read_all, take

PATIENCE = 30.0  # seconds of real time for what must happen soon


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


class TestWhatStays:
    async def test_is_there_when_it_is_opened_again(self, path: Path) -> None:
        several = Record.of(event("2", data=[1]), topics=["[b]", "c"], private=True)
        published = Event(id="3", type="order.paid", data={"total": 9}, metadata={"topic": "[x]"})
        async with SQLiteLog(path) as log:
            stored = await log.append([*events("a/1"), several, published, *events("none")])
        async with SQLiteLog(path) as log:
            assert (await log.read()).records == stored
            assert (await log.read("a/1", "c")).records == [stored[1]]
            assert (await log.read(topics="[x]")).records == [stored[2]]
            assert stored[2].event() == published
            again = await log.append([several])
            assert again == [stored[1]]
            (after,) = await log.append(events("a/2"))
            assert after.position == stored[-1].position + 1
            counts = log.statistics()
            assert (counts.records, counts.appended, counts.repeated) == (5, 1, 1)
            assert counts.bytes == sum(record.size for record in [*stored, after])
            assert (counts.earliest, counts.latest) == ("a/1", "a/2")

    async def test_so_is_what_was_trimmed(self, path: Path) -> None:
        async with SQLiteLog(path, Retention(count=2)) as log:
            await log.append(events("quiet/1", *(f"busy/{number}" for number in range(9))))
            await log.trim()
        async with SQLiteLog(path, Retention(count=2)) as log:
            assert (await log.read("quiet/1", "quiet")).gap is None
            assert (await log.read("quiet/1")).gap == Gap("quiet/1", "trimmed", 7)
            assert (await log.read("busy/2", "busy")).gap == Gap("busy/2", "trimmed", None)

    async def test_a_reader_goes_on_where_it_was(self, path: Path) -> None:
        async with LogStream(f"sqlite:///{path}") as stream:
            for each in events("1", "2", "3"):
                await stream.publish(each)
            async with stream.events(after=EARLIEST) as found:
                assert [(await anext(found)).id for _ in range(2)] == ["1", "2"]
        async with (
            LogStream(f"sqlite:///{path}") as stream,
            stream.events(after="2") as found,
        ):
            assert (await anext(found)).id == "3"

    async def test_readers_that_are_up_to_date_ask_no_thread(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with SQLiteLog(path) as log, aclosing(log.tail()) as tail:
            reading = asyncio.create_task(take(tail, 3))
            await asyncio.sleep(1)
            monkeypatch.setattr(log, "_read", None)
            await log.append(events("1", "2"))
            await log.append(events("3"))
            assert await reading == ["1", "2", "3"]

    async def test_the_end_of_it_is_in_memory_and_no_more(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqlite, "_RECENT", 5)
        monkeypatch.setattr(sqlite, "_RECENT_BYTES", 50)
        async with SQLiteLog(path) as log:
            for number in range(20):
                await log.append(events(str(number)))
            assert len(log._ring) == 5
            assert await read_all(log) == [str(number) for number in range(20)]
            await log.append([event("large", data="x" * 100)])
            assert len(log._ring) == 1
            assert await read_all(log, "18") == ["19", "large"]


class TestAppendingTogether:
    async def test_what_waits_is_committed_at_once_and_each_is_told_of_its_own(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commits: list[int] = []
        commit = SQLiteLog._commit

        def count(log: SQLiteLog, jobs: list[Any], file: SQLiteFile) -> None:
            commits.append(len(jobs))
            commit(log, jobs, file)

        monkeypatch.setattr(SQLiteLog, "_commit", count)
        async with SQLiteLog(path) as log:
            await log.append(events("0"))
            await log.trim()  # the thread that writes has nothing to do
            held = threading.Event()
            assert log._writing is not None
            log._writing.submit(held.wait, PATIENCE)
            appending = [
                asyncio.create_task(log.append(events(f"{number}/1", f"{number}/2")))
                for number in range(64)
            ]
            other = asyncio.create_task(log.append([*events("x"), event("0", "another")]))
            same = asyncio.create_task(log.append(events("5/1", "y")))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            held.set()
            assert [ids(await task) for task in appending] == [
                [f"{number}/1", f"{number}/2"] for number in range(64)
            ]
            with pytest.raises(IdConflict):
                await other
            assert ids(await same) == ["5/1", "y"]
            assert len(await read_all(log)) == 1 + 2 * 64 + 1
        assert commits == [1, 66]

    async def test_a_great_many_are_committed_a_few_thousand_at_a_time(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqlite, "_MOST_AT_ONCE", 10)
        async with SQLiteLog(path) as log:
            await asyncio.gather(
                *(log.append(events(f"{number}/1", f"{number}/2")) for number in range(50))
            )
            assert log.statistics().records == 100

    async def test_one_that_was_cancelled_before_is_not_stored(self, path: Path) -> None:
        async with SQLiteLog(path) as log:
            await log.append(events("0"))
            await log.trim()  # the thread that writes has nothing to do
            held = threading.Event()
            assert log._writing is not None
            log._writing.submit(held.wait, PATIENCE)
            appending = [asyncio.create_task(log.append(events(name))) for name in ("1", "2")]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            appending[0].cancel()
            await asyncio.wait(appending[:1])
            held.set()
            await appending[1]
            assert await read_all(log) == ["0", "2"]

    async def test_who_was_called_off_as_it_was_stored_is_told_nothing(self) -> None:
        job = sqlite._Job([], None, asyncio.get_running_loop().create_future())
        job.future.cancel()
        sqlite._resolve_all([(job, [], None)])
        await asyncio.sleep(0)
        assert job.future.cancelled()

    async def test_who_waited_in_a_loop_that_is_closed_is_in_nobodys_way(self, path: Path) -> None:
        async with SQLiteLog(path) as log:
            await log.append(events("0"))
            await log.trim()  # the thread that writes has nothing to do
            held = threading.Event()
            assert log._writing is not None
            log._writing.submit(held.wait, PATIENCE)

            def there() -> None:
                loop = asyncio.new_event_loop()
                appending = loop.create_task(log.append(events("1")))
                loop.run_until_complete(asyncio.sleep(0))
                loop.run_until_complete(asyncio.sleep(0))
                appending.get_coro().close()
                appending._log_destroy_pending = False  # type: ignore[attr-defined]
                loop.close()

            await asyncio.to_thread(there)
            held.set()
            await log.append(events("2"))
            assert await read_all(log) == ["0", "1", "2"]


class TestRetention:
    async def test_is_applied_as_events_are_appended(self, path: Path) -> None:
        async with SQLiteLog(path, Retention(count=10)) as log:
            for number in range(500):
                await log.append(events(f"{number % 7}/{number}"))
            two = Record.of(event("two"), topics=["a", "b"])
            await log.append([two, *events("last")])
            await log.trim()
            counts = log.statistics()
            assert counts.records == 10
            assert counts.bytes == sum(record.size for record in await log.read())
            for number in range(20):
                await log.append(events(f"more/{number}"))
            await log.trim()
        with sqlite3.connect(path) as file:
            assert file.execute("SELECT count(*) FROM records").fetchone() == (10,)
            assert file.execute("SELECT count(*) FROM places").fetchone() == (0,)
        file.close()
        async with SQLiteLog(path) as log:
            found = await log.read()
            assert log.statistics().records == 10
            assert log.statistics().bytes == sum(record.size for record in found)

    async def test_by_age_reads_nothing_while_nothing_is_aged(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Clock()
        async with SQLiteLog(path, Retention(age=60), clock=clock) as log:
            await log.append(events("1"))
            with monkeypatch.context() as patch:
                patch.setattr(SQLiteFile, "page", None)
                clock.pass_by(59)
                await log.append(events("2"))
                assert await log.trim() == 0
            clock.pass_by(1)
            assert await log.trim() == 1
            assert log.statistics().earliest == "2"
        async with SQLiteLog(path, Retention(age=60), clock=clock) as log:
            clock.pass_by(60)
            await log.append(events("3"))
            await log.trim()
            assert log.statistics().earliest == "3"

    async def test_the_ring_has_nothing_that_has_gone(self, path: Path) -> None:
        clock = Clock()
        async with SQLiteLog(path, Retention(age=60), clock=clock) as log:
            await log.append(events("1", "2"))
            async with aclosing(log.tail(EARLIEST)) as tail:
                assert await take(tail, 2) == ["1", "2"]
                clock.pass_by(61)
                await log.append(events("3"))
                await log.trim()
                assert log._ring.first == 3
                assert await take(tail, 1) == ["3"]
                assert (await log.read("1")).gap == Gap("1", "trimmed", 1)

    async def test_the_last_event_stays(self, path: Path) -> None:
        clock = Clock()
        async with SQLiteLog(path, Retention(count=5, bytes=1, age=1), clock=clock) as log:
            await log.append(events("1", "2"))
            clock.pass_by(3600)
            await log.trim()
            assert await read_all(log) == ["2"]

    async def test_trimmed_ids_are_remembered_for_a_while(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqlite_file, "_REMEMBERED", 5)
        async with SQLiteLog(path, Retention(count=1)) as log:
            for number in range(20):
                await log.append(events(str(number)))
            await log.trim()
            assert (await log.locate("14")).status == "trimmed"
            assert (await log.locate("13")).status == "unknown"


class TestOtherThreads:
    @pytest.mark.real_time
    async def test_what_goes_while_a_page_is_read_is_not_missing_in_it(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with SQLiteLog(path, Retention(count=10)) as log:
            await log.append(events("quiet/1"))
            await log.append(events(*(f"busy/{number}" for number in range(20))))
            await log.append(events("quiet/2", "busy/20"))
            await log.trim()
            log._ring.drop(len(log._ring))  # as after a restart
            loop, missed = asyncio.get_running_loop(), SQLiteFile._missed

            def append_meanwhile(file: SQLiteFile, *arguments: Any) -> int | None:
                monkeypatch.undo()
                more = log.append(events(*(f"busy/{number}" for number in range(30, 60))))
                asyncio.run_coroutine_threadsafe(more, loop).result(30)
                asyncio.run_coroutine_threadsafe(log.trim(), loop).result(30)
                return missed(file, *arguments)

            monkeypatch.setattr(SQLiteFile, "_missed", append_meanwhile)
            batch = await log.read("quiet/1", "quiet")
            assert (ids(batch), batch.gap) == (["quiet/2"], None)


class TestManyTopics:
    async def test_more_topics_than_there_are_numbers_for_in_memory(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqlite_file, "_KNOWN_TOPICS", 10)
        async with SQLiteLog(path) as log:
            for number in range(50):
                await log.append(events(f"user.{number}/1", "user.0/" + str(number + 2)))
        async with SQLiteLog(path) as log:
            for number in range(1, 50):
                assert await read_all(log, topics=f"user.{number}") == [f"user.{number}/1"]
            assert len(await read_all(log, topics="user.0")) == 51

    @pytest.mark.parametrize("topics", ["user.*", "*.*", ["user.>", "none"]])
    @pytest.mark.parametrize("limit", [1, 60, 1000])
    async def test_patterns_that_match_very_many(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, topics: Any, limit: int
    ) -> None:
        monkeypatch.setattr(sqlite_file, "_SCANNED_AT_ONCE", 10)
        async with SQLiteLog(path) as log:
            names = [f"user.{number}/1" for number in range(120)]
            await log.append(events("noise/1", *names, *(f"noise/{n}" for n in range(2, 30))))
        async with SQLiteLog(path) as log:
            assert await read_all(log, topics=topics, limit=limit) == names
            async with aclosing(log.tail(topics=topics, last=3)) as tail:
                assert await take(tail, 3) == names[-3:]
            # What is appended meanwhile is not read in the middle of a page.
            position = (await log.locate("user.5/1")).position
            assert position is not None
            page = await log._read(
                lambda file: file.page_of(position, Selection(topics), 1000, position + 3, 0)
            )
            assert ids(page.records) == names[6:9]
            assert page.reached == position + 3

    async def test_of_which_notes_keep_some(self, path: Path) -> None:
        async with SQLiteLog(path, Retention(count=1)) as log:
            note = Note("run", {})
            await log._change(Change(note, keep=("user.7", 0)))
            await log.append(events(*(f"user.{number}/1" for number in range(60)), "last"))
            await log.trim()
            assert await read_all(log, topics="user.*") == ["user.7/1"]
            assert await read_all(log, topics="*.*") == ["user.7/1"]


class TestLargeEvents:
    @pytest.mark.parametrize("topics", ["*", "a", ["a", "b"]])
    async def test_come_in_smaller_pages(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, topics: Any
    ) -> None:
        monkeypatch.setattr(sqlite_file, "_PAGE_BYTES", 10_000)
        names = [f"a/{number}" for number in range(100)]
        async with SQLiteLog(path, Retention(count=1000)) as log:
            await log.append([event(name, "a", "x" * 1000) for name in names])
        async with SQLiteLog(path) as log:
            batch = await log.read(topics=topics, limit=1000)
            assert (len(batch), batch.is_last, batch.cursor) == (16, False, "a/15")
            assert await read_all(log, topics=topics, limit=1000) == names


async def test_damage_that_is_met_while_reading_names_the_file(path: Path) -> None:
    async with SQLiteLog(path) as log:
        await log.append([event(str(number), data="x" * 1000) for number in range(3000)])
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 40 * 4096] = bytes(40 * 4096)
    path.write_bytes(content)
    async with SQLiteLog(path) as log:
        with pytest.raises(LogUnusable, match="it is damaged, or no database") as caught:
            await read_all(log, limit=1000)
        assert caught.value.path == str(path)


class TestFilesThatAreNotAsTheyShouldBe:
    async def refused(self, path: Path, says: str) -> None:
        log = SQLiteLog(path)
        with pytest.raises(LogUnusable, match=says) as caught:
            await log.append(events("1"))
        assert caught.value.path == str(path)
        assert str(caught.value).startswith(f"{path}: ")
        await log.close()

    async def test_no_directory(self, tmp_path: Path) -> None:
        await self.refused(tmp_path / "missing" / "events.db", "no directory .*missing: make it")

    async def test_a_directory(self, tmp_path: Path) -> None:
        await self.refused(tmp_path, "cannot be opened")

    async def test_damaged(self, path: Path) -> None:
        path.write_bytes(b"no database at all" * 100)
        await self.refused(path, "damaged, or no database")

    async def test_damaged_inside(self, path: Path) -> None:
        async with SQLiteLog(path) as log:
            await log.append(events(*(f"a/{number}" for number in range(2000))))
        content = bytearray(path.read_bytes())
        content[4096:] = bytes(len(content) - 4096)
        path.write_bytes(content)
        await self.refused(path, "damaged, or no database")

    async def test_another_programs(self, path: Path) -> None:
        with sqlite3.connect(path) as file:
            file.execute("CREATE TABLE users (name)")
        file.close()
        before = path.read_bytes()
        await self.refused(path, "another program's database: choose another file")
        assert path.read_bytes() == before

    async def test_of_the_first_version(self, path: Path) -> None:
        """It is brought to the present one, with all that is in it."""
        with sqlite3.connect(path) as file:
            file.executescript(sqlite_file._SCHEMA + "PRAGMA user_version = 1;")
            file.execute("INSERT INTO topics (number, name) VALUES (1, 'a')")
            file.executemany(
                "INSERT INTO records VALUES (?, ?, 1, NULL, 'message', 0, x'31', x'', 0, 0, ?)",
                [(position, f"a/{position}", 4 * position) for position in range(3, 6)],
            )
            file.execute("INSERT INTO trimmed VALUES (2, 'a/2')")
        file.close()
        async with SQLiteLog(path, Retention(count=9)) as log:
            await log.append(events("a/6"))
            assert await read_all(log) == ["a/3", "a/4", "a/5", "a/6"]
            assert (await log.locate("a/2")).status == "trimmed"
            assert log.statistics().records == 4
        with sqlite3.connect(path) as file:
            assert file.execute("PRAGMA user_version").fetchone() == (2,)
        file.close()

    async def test_newer(self, path: Path) -> None:
        async with SQLiteLog(path) as log:
            await log.append(events("1"))
        with sqlite3.connect(path) as file:
            file.execute("PRAGMA user_version = 7")
        file.close()
        await self.refused(path, "schema is version 7 and this release knows 2: upgrade")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    async def test_read_only(self, path: Path) -> None:
        async with SQLiteLog(path) as log:
            await log.append(events("1"))
        path.chmod(0o400)
        await self.refused(path, "cannot be written")

    async def test_written_by_nobody(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As a file that may only be read, whoever runs this."""
        async with SQLiteLog(path) as log:
            await log.append(events("1"))
        connect: Any = sqlite3.connect

        def read_only(where: Path, **options: Any) -> Any:
            return connect(f"file:{where}?mode=ro", uri=True, **options)

        monkeypatch.setattr(sqlite3, "connect", read_only)
        await self.refused(path, "cannot be written .*permissions")

    async def test_a_mark_that_cannot_be_made(self, path: Path) -> None:
        Path(f"{path}-lock").mkdir()
        await self.refused(path, "cannot be written")

    async def test_an_error_in_the_middle_leaves_nothing_of_it(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def insert(file: SQLiteFile, statement: str, columns: int, values: Any) -> None:
            if "places" in statement:
                raise LookupError("on purpose")
            really(file, statement, columns, values)

        really = SQLiteFile._insert
        async with SQLiteLog(path) as log:
            await log.append(events("a/1"))
            monkeypatch.setattr(SQLiteFile, "_insert", insert)
            with pytest.raises(LookupError, match="on purpose"):
                await log.append([Record.of(event("b/1"), topics=["b", "c"])])
            monkeypatch.setattr(SQLiteFile, "_insert", really)
            (record,) = await log.append(events("b/2"))
            assert record.position == 2
            assert await read_all(log, topics="b") == ["b/2"]

    async def test_that_fails_later(self, path: Path) -> None:
        async with SQLiteLog(path) as log:
            await log.append(events("1"))
            assert log._file is not None
            log._file._connection.execute("DROP TABLE records")
            with pytest.raises(LogUnusable, match="no such table: records"):
                await log.append(events("a/1"))

    @pytest.mark.parametrize(
        ("url", "says"),
        [
            ("sqlite://events.db", "followed by the name of a file"),
            ("sqlite:///", "followed by the name of a file"),
            ("sqlite:///a.db#there", "followed by the name of a file"),
            ("sqlite:///a.db?mode=ro", "count, bytes and age"),
        ],
    )
    def test_urls_that_say_anything_else(self, url: str, says: str) -> None:
        with pytest.raises(ValueError, match=says):
            open_log(url)

    def test_urls(self) -> None:
        log = open_log("sqlite:////var/lib/my%20events.db?count=5", durability="normal")
        assert isinstance(log, SQLiteLog)
        assert (log.path, log.retention) == (Path("/var/lib/my events.db"), Retention(count=5))
        assert log.durability == "normal"
        log = open_log("sqlite:///events.db")
        assert isinstance(log, SQLiteLog)
        assert log.path == Path("events.db")
        assert log.retention == Retention(bytes=1 << 30, age=7 * 86_400)

    def test_a_durability_that_does_not_exist(self, path: Path) -> None:
        durability: Any = "perhaps"
        with pytest.raises(ValueError, match="'full' or 'normal', not 'perhaps'"):
            SQLiteLog(path, durability=durability)


async def test_a_full_disk_is_said_and_what_is_stored_stays(path: Path) -> None:
    async with SQLiteLog(path) as log:
        await log.append(events("before"))
        assert log._file is not None
        run = log._file._connection.execute
        (pages,) = run("PRAGMA page_count").fetchone()
        run(f"PRAGMA max_page_count = {pages + 10}")
        with pytest.raises(LogFull, match="the disk is full; what is stored stays") as caught:
            await log.append([event(str(number), data="x" * 1000) for number in range(500)])
        assert caught.value.path == str(path)
        assert await read_all(log) == ["before"]
        await log.append(events("small/1"))
        run(f"PRAGMA max_page_count = {pages + 10_000}")
        await log.append([event(str(number), data="x" * 1000) for number in range(500)])
        assert len(await read_all(log, limit=100)) == 502


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory with room for one megabyte."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("this user may mount nothing")
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


class TestASmallDisk:
    async def test_a_full_one_is_said_and_appending_works_again_when_there_is_room(
        self, small_disk: Path
    ) -> None:
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(500_000))
        async with SQLiteLog(small_disk / "events.db") as log:
            stored = 0

            async def fill() -> None:
                nonlocal stored
                while True:
                    await log.append([event(f"{stored}.{n}", data="x" * 1000) for n in range(10)])
                    stored += 1

            with pytest.raises(LogFull, match="the disk is full; what is stored stays"):
                await fill()
            with pytest.raises(LogFull):
                await log.append([event(f"more.{n}", data="x" * 1000) for n in range(100)])
            ballast.unlink()
            await log.append([event(f"{stored}.{n}", data="x" * 1000) for n in range(10)])
            expected = [f"{m}.{n}" for m in range(stored + 1) for n in range(10)]
            assert await read_all(log, limit=100) == expected
        async with SQLiteLog(small_disk / "events.db") as log:
            assert await read_all(log, limit=100) == expected

    @pytest.mark.parametrize("room", [0, 4096, 8192, 20_000])
    async def test_a_log_that_there_is_no_room_to_make_is_said_so_too(
        self, small_disk: Path, room: int
    ) -> None:
        ballast, spare = small_disk / "ballast", small_disk / "spare"
        spare.write_bytes(bytes(room))
        with contextlib.suppress(OSError), ballast.open("wb", 0) as file:
            while file.write(bytes(4096)):
                pass
        spare.unlink()
        async with SQLiteLog(small_disk / "events.db") as log:
            with pytest.raises(LogFull):
                await log.append(events("1"))
            ballast.unlink()
            await log.append(events("2"))
            assert await read_all(log) == ["2"]


class TestClosing:
    async def test_stores_what_was_to_be_appended(self, path: Path) -> None:
        log = SQLiteLog(path)
        await log.append(events("0"))
        appending = [asyncio.create_task(log.append(events(str(n)))) for n in range(1, 9)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await log.close()
        await asyncio.gather(*appending)
        async with SQLiteLog(path) as log:
            assert await read_all(log) == [str(number) for number in range(9)]

    async def test_before_it_was_opened_makes_no_file(self, path: Path) -> None:
        await SQLiteLog(path).close()
        assert not path.exists()

    @pytest.mark.real_time
    async def test_while_threads_read_ends_them(self, path: Path) -> None:
        log = SQLiteLog(path)
        await log.append(events(*(str(number) for number in range(3000))))
        reading = [asyncio.create_task(read_all(log, limit=1)) for _ in range(5)]
        await asyncio.sleep(0.01)
        await asyncio.gather(log.close(), log.close())
        for task in reading:
            with pytest.raises(StreamClosed):
                await task

    async def test_called_off_goes_on(self, path: Path) -> None:
        log = SQLiteLog(path)
        await log.append(events("1"))
        closing = asyncio.create_task(log.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])
        await log.close()
        async with SQLiteLog(path) as log:
            assert await read_all(log) == ["1"]


WRITER = """
import asyncio, sys
from codomyrmex.events.streaming import Event
from codomyrmex.events.streaming.log import Retention, SQLiteLog

async def publish(log, name):
    number = 0
    while True:
        batch = [
            Event(id=f"{name}.{number}.{part}", data="x" * 200, metadata={"topic": name})
            for part in range(number % 3 + 1)
        ]
        await log.append(batch)
        print(f"{name} {number}", flush=True)
        number += 1

async def main():
    async with SQLiteLog(sys.argv[1], Retention(count=10_000_000), durability="normal") as log:
        await asyncio.gather(*(publish(log, name) for name in sys.argv[2:]))

asyncio.run(main())
"""


def kill_in_the_middle(path: Path, round_: int, seconds: float) -> dict[str, int]:
    """Run publishers, kill them, and return the last number each was told is stored."""
    names = [f"{round_}-{name}" for name in "abcd"]
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(path), *names],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    told: dict[str, int] = {}
    killer = threading.Timer(seconds, writer.send_signal, [signal.SIGKILL])
    for line in writer.stdout:
        if not killer.is_alive() and not told:
            killer.start()
        if line.endswith("\n"):
            name, number = line.split()
            told[name] = int(number)
    writer.wait(PATIENCE)
    writer.stdout.close()
    killer.join()
    return told


async def what_is_found(path: Path) -> tuple[dict[str, list[int]], list[int]]:
    """By publisher, the numbers of its batches, each of which is whole; and all positions."""
    found: dict[str, list[int]] = {}
    positions: list[int] = []
    async with SQLiteLog(path) as log:
        cursor = EARLIEST
        parts: dict[tuple[str, int], list[int]] = {}
        while batch := await log.read(cursor, limit=5000):
            cursor = batch.cursor
            for record in batch:
                name, batch_number, part = record.id.rsplit(".", 2)
                parts.setdefault((name, int(batch_number)), []).append(int(part))
                positions.append(record.position)
        for (name, number), there in parts.items():
            assert there == list(range(number % 3 + 1)), "half a batch"
            found.setdefault(name, []).append(number)
    return found, positions


@pytest.mark.real_time
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no such signal")
def test_killed_at_any_moment_it_has_what_was_acknowledged_in_order_and_once(
    path: Path, soak: int
) -> None:
    chance = random.Random(soak)
    acknowledged = 0
    positions: list[int] = []
    for round_ in range(soak):
        told = kill_in_the_middle(path, round_, chance.uniform(0.0, 0.15))
        found, positions = asyncio.run(what_is_found(path))
        assert positions == list(range(1, len(positions) + 1))
        for name, number in told.items():
            assert found[name] == list(range(len(found[name])))
            # At most one batch was stored and could not be acknowledged any more.
            assert len(found[name]) - 1 in (number, number + 1)
            acknowledged += sum(each % 3 + 1 for each in range(number + 1))
    print(f"{soak} kills: {acknowledged} acknowledged events, {len(positions)} found")
    assert len(positions) >= acknowledged > 0


@pytest.fixture
def soak() -> int:
    """How often the writer is killed."""
    return int(os.environ.get("SOAK", "10"))


def test_a_file_that_is_opened_again_and_again_leaves_no_descriptor(path: Path) -> None:
    files = Path("/proc/self/fd")
    if not files.exists():
        pytest.skip("this system does not show open files")
    before = len(list(files.iterdir()))
    for _ in range(5):
        file = SQLiteFile(path)
        file.prepare("full")
        file.close()
        with pytest.raises(LogUnusable):
            SQLiteFile(path.parent)
    assert len(list(files.iterdir())) == before
