"""Several processes at one log: taking turns, waking one another, and what a killed one leaves."""

# ruff: noqa: ASYNC240  (nobody waits while a test looks at its files)

import asyncio
import contextlib
import errno
import gc
import os
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import textwrap
import time
import weakref
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from codomyrmex.events.streaming import Event, LogFull, LogUnusable
from codomyrmex.events.streaming.log import (
    EARLIEST,
    Gap,
    MemoryLog,
    Retention,
    SQLiteLog,
    peers,
    sqlite,
    sqlite_file,
)
from codomyrmex.events.streaming.log.base import Change, Note
from codomyrmex.events.streaming.log.followers import Followers
from codomyrmex.events.streaming.log.peers import Peers
from codomyrmex.events.streaming.log.sqlite_file import SQLiteFile
from tests.conformance.test_logs import event, events, ids, read_all, take
from tests.forks import in_a_child

PATIENCE = 30.0  # seconds of real time for what must happen soon

pytestmark = [
    pytest.mark.real_time,
    pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


class Process:
    """Another Python, in which `log` is open on the file and a main() is run; it prints lines."""

    SETUP = """
        import asyncio, os, signal, sys, time
        from codomyrmex.events.streaming import Event
        from codomyrmex.events.streaming.log import EARLIEST, SQLiteLog, peers, sqlite
        from codomyrmex.events.streaming.log.base import Change, Note
        log = SQLiteLog(sys.argv[1], durability="normal")
        say = lambda *words: print(*words, flush=True)
        """

    def __init__(self, path: Path, main: str) -> None:
        program = textwrap.dedent(self.SETUP) + textwrap.dedent(main) + "\nasyncio.run(main())\n"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    async def line(self) -> str:
        assert self.process.stdout is not None
        return (await asyncio.to_thread(self.process.stdout.readline)).strip()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start(path: Path) -> Iterator[Any]:
    processes: list[Process] = []

    def start(main: str) -> Process:
        processes.append(Process(path, main))
        return processes[-1]

    yield start
    for process in processes:
        process.end()


@pytest.fixture
def log(path: Path) -> Iterator[SQLiteLog]:
    log = SQLiteLog(path, durability="normal")
    yield log
    asyncio.run(log.close())


def bells(path: Path) -> list[str]:
    return os.listdir(f"{path}-bells")


async def keeps_its_turn(log: SQLiteLog) -> bool:
    await log._write(lambda: None)  # what it was at is over
    return log._peers._has_turn


STAYS = """
async def main():
    await log.append([Event(id=f"{os.getpid()}")])
    await log.trim()  # what the thread that writes was at is over
    say("there")
    await asyncio.sleep(1000)
"""

HOLDS_ITS_TURN = """
class Slow(sqlite.SQLiteFile):
    def insert(self, records, before):
        really = super().insert(records, before)
        if records[0].id == "held":
            say("held")
            time.sleep(1000)
        return really
sqlite.SQLiteFile = Slow

async def main():
    await log.append([Event(id="first")])
    await log.append([Event(id="held")])
"""


class TestWaking:
    async def test_who_waits_in_another_process_is_woken_within_20_ms(
        self, start: Any, log: SQLiteLog
    ) -> None:
        await log.append(events("ready"))
        appender = start(
            """
            async def main():
                for number in range(40):
                    await log.append([Event(id=str(number), data=time.time_ns())])
                    await asyncio.sleep(0.02)
            """
        )
        delays: list[float] = []
        async with aclosing(log.tail()) as tail:
            async for batch in tail:
                delays += [(time.time_ns() - int(record.body)) / 1e6 for record in batch]
                if len(delays) >= 40:
                    break
        assert appender.process.wait(PATIENCE) == 0
        assert statistics.median(delays) < 20, delays

    async def test_what_is_stored_is_read_at_once_whoever_stored_it(
        self, path: Path, log: SQLiteLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whether or not the bell has been heard by then."""
        await log.append(events("1"))
        async with SQLiteLog(path) as other:
            await other._open()
            monkeypatch.setattr(log, "_followers", Followers())  # nobody hears the bell
            for number in range(2, 30):
                await other.append(events(f"a/{number}"))
                assert ids(await log.read(f"a/{number - 1}" if number > 2 else "1")) == [
                    f"a/{number}"
                ]
            assert (await log.locate("latest")).latest == "a/29"
            await other.append(events("30"))
            assert ids(await log.read("a/29", topics="a")) == []
            async with aclosing(log.tail(last=2)) as tail:
                assert await take(tail, 2) == ["a/29", "30"]

    async def test_a_great_many_at_once_are_more_than_are_kept_in_memory(
        self, path: Path, log: SQLiteLog
    ) -> None:
        await log.append(events("0"))
        async with SQLiteLog(path) as other, aclosing(log.tail(limit=50_000)) as tail:
            reading = asyncio.ensure_future(anext(tail))
            await other.append(event(str(number)) for number in range(1, 25_001))
            found = ids(await reading)
            while len(found) < 25_000:
                found += ids(await anext(tail))
            assert found == [str(number) for number in range(1, 25_001)]
            assert log.statistics().records == 25_001

    async def test_retention_of_another_is_seen(self, path: Path, log: SQLiteLog) -> None:
        await log.append(events("1", "2", "3"))
        async with SQLiteLog(path, Retention(count=2)) as other:
            await other.append(events("4"))
            await other.trim()
            await log.append(events("5"))
            assert log.statistics().earliest == "3"
            assert await read_all(log) == ["3", "4", "5"]

    async def test_more_than_is_read_at_once_is_read_nevertheless(
        self, path: Path, log: SQLiteLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqlite_file, "_PAGE_BYTES", 10_000)
        await log.append(events("first"))
        async with SQLiteLog(path) as other, aclosing(log.tail(EARLIEST)) as tail:
            assert await take(tail, 1) == ["first"]
            await other.append([Event(id=f"x{n}", data="x" * 1000) for n in range(40)])
            await log.append(events("own"))
            assert await take(tail, 41) == [*(f"x{n}" for n in range(40)), "own"]
            assert await read_all(log) == ["first", *(f"x{n}" for n in range(40)), "own"]

    async def test_one_that_trims_while_another_catches_up(
        self, path: Path, log: SQLiteLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await log.append(events("first"))
        other = SQLiteLog(path)
        latest = SQLiteFile.latest

        def trim_meanwhile(file: SQLiteFile, after: int, last: int, most: int) -> Any:
            monkeypatch.undo()
            # What goes meanwhile was there when the reader's question was asked.
            with sqlite3.connect(path) as writer:
                writer.execute("DELETE FROM records WHERE position BETWEEN 2 AND 20")
                writer.execute("UPDATE retained SET first = 21")
            writer.close()
            return latest(file, after, last, most)

        async with other, aclosing(log.tail(EARLIEST)) as tail:
            assert await take(tail, 1) == ["first"]
            monkeypatch.setattr(SQLiteFile, "latest", trim_meanwhile)
            await other.append(events(*(f"x/{n}" for n in range(40))))
            found: list[Any] = []
            while not found or found[-1] != "x/39":
                batch = await anext(tail)
                found += [batch.gap] if batch.gap is not None else []
                found += ids(batch)
            assert not isinstance(found[0], Gap) or found.pop(0).missed == 19
            assert found == [f"x/{n}" for n in range(40)][-len(found) :]
            # What this one has in memory is where it seems to be.
            await log.append(events("own"))
            assert await take(tail, 1) == ["own"]
            assert await read_all(log, "x/30") == [*(f"x/{n}" for n in range(31, 40)), "own"]

    async def test_one_killed_between_its_commit_and_its_ring_hides_nothing(
        self, start: Any, log: SQLiteLog
    ) -> None:
        await log.append(events("1"))
        async with aclosing(log.tail()) as tail:
            reading = asyncio.ensure_future(take(tail, 1))
            killed = start(
                """
                def say_last(self, position, bytes_until):
                    os.kill(os.getpid(), signal.SIGKILL)
                peers.Peers.say_last = say_last

                async def main():
                    await log.append([Event(id="2")])
                """
            )
            assert await reading == ["2"]
            assert killed.process.wait(PATIENCE) == -signal.SIGKILL

    async def test_a_note_of_another_process_is_told(self, start: Any, log: SQLiteLog) -> None:
        await log.append(events("1"))
        count = log._notes_changed.count
        start(
            """
            async def main():
                await log._change(Change(Note("note", {"by": "another"})))
            """
        )
        await log._notes_changed.wait(count)
        assert (await log._note("note")).value == {"by": "another"}


class TestTurns:
    async def test_of_several_processes_make_one_order(self, start: Any, log: SQLiteLog) -> None:
        processes = [
            start(
                """
                async def publish(name):
                    for number in range(50):
                        await log.append([
                            Event(id=f"{os.getpid()}.{name}.{number}.{part}") for part in range(3)
                        ])

                async def main():
                    await asyncio.gather(publish("a"), publish("b"))
                    await log.close()
                """
            )
            for _ in range(3)
        ]
        for process in processes:
            assert await asyncio.to_thread(process.process.wait, PATIENCE) == 0
        batch = await log.read(limit=5000)
        assert [record.position for record in batch] == list(range(1, 901))
        by_publisher: dict[str, list[str]] = {}
        for record in batch:
            publisher, number, part = record.id.rsplit(".", 2)
            by_publisher.setdefault(publisher, []).append(f"{number}.{part}")
        assert (
            list(by_publisher.values())
            == [[f"{number}.{part}" for number in range(50) for part in range(3)]] * 6
        )

    async def test_the_one_of_a_killed_process_ends_and_what_it_wrote_is_whole(
        self, start: Any, log: SQLiteLog
    ) -> None:
        await log.append(events("0"))
        holder = start(HOLDS_ITS_TURN)
        assert await holder.line() == "held"
        appending = asyncio.create_task(log.append(events("after")))
        await asyncio.sleep(0.1)
        assert not appending.done()
        holder.signal(signal.SIGKILL)
        await appending
        assert await read_all(log) == ["0", "first", "held", "after"]

    async def test_one_that_hangs_is_named_and_not_waited_for(
        self, path: Path, start: Any, log: SQLiteLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(peers, "_PATIENCE", 0.2)
        await log.append(events("0"))
        holder = start(HOLDS_ITS_TURN)
        assert await holder.line() == "held"
        with pytest.raises(LogUnusable, match=f"process {holder.process.pid} has had its turn"):
            await log.append(events("1"))
        monkeypatch.setattr(peers, "_PATIENCE", PATIENCE)
        holder.signal(signal.SIGKILL)
        await asyncio.to_thread(holder.process.wait)
        await asyncio.sleep(0.1)  # the turn that was waited for in vain comes, and is let go
        async with SQLiteLog(path) as other:
            await other.append(events("2"))
            await log.append(events("3"))
            assert await read_all(other, "held") == ["2", "3"]

    async def test_closing_waits_for_one_that_hangs_a_little_only(
        self, start: Any, log: SQLiteLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(peers, "_LAST_PATIENCE", 0.1)
        await log.append(events("0"))
        holder = start(HOLDS_ITS_TURN)
        assert await holder.line() == "held"
        appending = asyncio.create_task(log.append(events("1")))
        await asyncio.sleep(0.1)
        async with asyncio.timeout(10):
            await log.close()
        with pytest.raises(LogUnusable, match="has had its turn"):
            await appending

    async def test_who_was_alone_and_hangs_is_not_waited_for_either(
        self, path: Path, start: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(peers, "_PATIENCE", 0.2)
        alone = start(STAYS)
        assert await alone.line() == "there"
        alone.signal(signal.SIGSTOP)
        log = SQLiteLog(path)
        with pytest.raises(LogUnusable, match=f"process {alone.process.pid} has had"):
            await log.append(events("1"))
        monkeypatch.setattr(peers, "_PATIENCE", PATIENCE)
        alone.signal(signal.SIGCONT)
        await asyncio.sleep(0.1)
        await log.append(events("2"))
        assert await read_all(log) == [str(alone.process.pid), "2"]
        await log.close()

    async def test_who_is_alone_again_takes_no_turns(self, path: Path, log: SQLiteLog) -> None:
        await log.append(events("1"))
        assert await keeps_its_turn(log)
        async with SQLiteLog(path) as other:
            await other.append(events("2"))
            await log.append(events("3"))
            assert not await keeps_its_turn(log)
        await log.append(events("4"))
        assert await keeps_its_turn(log)
        assert len(bells(path)) == 1

    async def test_so_is_who_outlives_a_killed_one(
        self, path: Path, start: Any, log: SQLiteLog
    ) -> None:
        await log.append(events("1"))
        other = start(STAYS)
        assert await other.line() == "there"
        assert len(bells(path)) == 2
        other.signal(signal.SIGKILL)
        other.process.wait()
        before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as command-line programs do
        try:
            await log.append(events("2"))
            await log.append(events("3"))
        finally:
            signal.signal(signal.SIGPIPE, before)
        assert await keeps_its_turn(log)
        assert len(bells(path)) == 1

    async def test_bells_of_killed_processes_are_taken_down_by_the_next(
        self, path: Path, start: Any
    ) -> None:
        other = start(STAYS)
        await other.line()
        other.signal(signal.SIGKILL)
        other.process.wait()
        assert len(bells(path)) == 1
        async with SQLiteLog(path) as log:
            await log.append(events("1"))
            assert len(bells(path)) == 1
        assert bells(path) == []

    @pytest.mark.parametrize("seed", [1, 2])
    async def test_killed_at_any_moment_they_are_in_nobodys_way(
        self, start: Any, log: SQLiteLog, seed: int
    ) -> None:
        chance = random.Random(seed)
        await log.append(events("0"))
        told: dict[str, int] = {}

        async def hear(process: Process) -> None:
            while line := await process.line():
                if len(line.split()) == 2:  # whole
                    name, number = line.split()
                    told[name] = int(number)

        for _ in range(4):
            some = [
                start(
                    """
                    async def main():
                        for number in range(100000):
                            batch = [Event(id=f"{os.getpid()}.{number}.{n}") for n in range(3)]
                            await log.append(batch)
                            say(os.getpid(), number)
                    """
                )
                for _ in range(2)
            ]
            for process in some:
                assert await process.line()  # it is at work
            hearing = [asyncio.create_task(hear(process)) for process in some]
            for process in some:
                await asyncio.sleep(chance.uniform(0.0, 0.15))
                process.signal(signal.SIGKILL)
                await log.append(events(f"mine.{process.process.pid}"))
            await asyncio.gather(*hearing)
        found: dict[str, list[str]] = {}
        positions: list[int] = []
        cursor = EARLIEST
        while batch := await log.read(cursor, limit=5000):
            cursor = batch.cursor
            for record in batch:
                positions.append(record.position)
                name, _, rest = record.id.partition(".")
                found.setdefault(name, []).append(rest)
        assert positions == list(range(1, len(positions) + 1))
        assert len(found.pop("mine")) == 8
        for name, last in told.items():
            assert len(found[name]) // 3 - 1 in (last, last + 1)
            assert found[name] == [f"{n}.{m}" for n in range(len(found[name]) // 3) for m in "012"]
        assert told


class TestWhatOthersKeep:
    async def test_and_trim_is_read_by_one_who_comes_late(
        self, path: Path, log: SQLiteLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await log.append(events("0"))
        async with (
            SQLiteLog(path, Retention(count=50)) as other,
            aclosing(log.tail(EARLIEST)) as tail,
        ):
            assert await take(tail, 1) == ["0"]
            await other._open()
            with monkeypatch.context() as patch:
                patch.setattr(SQLiteLog, "_heard", lambda self, is_lull: None)
                await other._change(Change(Note("run", {}), keep=("run", 0)))
                for number in range(100):
                    await other.append(events(f"run/{number}", f"x/{number}.1", f"x/{number}.2"))
                await other.trim()
            found = 0
            missed = 0
            while found + missed < 300:
                batch = await anext(tail)
                found += len(batch)
                missed += (batch.gap and batch.gap.missed) or 0
            assert found + missed == 300
            assert len(await read_all(log, topics="run")) == 100

    @pytest.mark.parametrize("age", [0.3, None])
    async def test_nothing_is_given_twice_while_the_file_is_looked_at(
        self, path: Path, age: float | None
    ) -> None:
        async with SQLiteLog(path, Retention(age=age), durability="normal") as log:
            found: list[str] = []
            async with aclosing(log.tail()) as tail:

                async def read() -> None:
                    async for batch in tail:
                        found.extend(ids(batch))
                        if found[-1] == "last":
                            return

                reading = asyncio.create_task(read())
                await asyncio.sleep(0)
                await log.append(events("first"))
                for number in range(300):
                    looking = asyncio.create_task(log._read(log._catch_up))
                    await log.append(events(f"a/{number}", f"b/{number}"))
                    await looking
                    assert log._ring.last == log._last
                await log.append(events("last"))
                await reading
            assert len(found) == len(set(found)) == 602
            if age is None:
                found_now = await log.read(limit=1000)
                assert log.statistics().bytes == sum(each.size for each in found_now)

    async def test_one_who_writes_out_of_turn_is_noticed(self, path: Path, log: SQLiteLog) -> None:
        await log.append(events("1"))
        with sqlite3.connect(path) as file:
            file.execute("UPDATE records SET position = 2")
        file.close()
        with pytest.raises(LogUnusable, match="out of turn"):
            await log.append(events("2"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
class TestForks:
    async def test_a_child_is_told_what_it_cannot_do(self, path: Path, log: SQLiteLog) -> None:
        await log.append(events("1"))

        def child() -> bool:
            async def append() -> bool:
                for mine in (log, SQLiteLog(path)):
                    try:
                        await mine.append(events("2"))
                    except LogUnusable as error:
                        if "was open when this process was forked" not in str(error):
                            return False
                    else:
                        return False
                async with SQLiteLog(path.with_name("another.db")) as another:
                    await another.append(events("3"))
                return True

            asyncio._set_running_loop(None)
            with asyncio.Runner() as runner:
                return runner.run(append())

        assert in_a_child(child)
        await log.append(events("4"))
        assert await read_all(log) == ["1", "4"]

    def test_one_that_was_closed_before_is_open_to_the_child(self, path: Path) -> None:
        log = SQLiteLog(path)

        async def append(log: SQLiteLog, name: str) -> None:
            async with log:
                await log.append(events(name))

        asyncio.run(append(log, "1"))

        def child() -> bool:
            asyncio.run(append(SQLiteLog(path), "2"))
            return True

        assert in_a_child(child)

    async def test_a_file_that_is_gone_hinders_no_other_log(
        self, path: Path, log: SQLiteLog
    ) -> None:
        await log.append(events("1"))
        path.unlink()
        others = [MemoryLog() for _ in range(20)]
        for other in others:
            other._lock.acquire()
        try:
            assert in_a_child(lambda: not any(other._lock.locked() for other in others))
        finally:
            for other in others:
                other._lock.release()

    def test_one_that_was_not_open_yet_is_the_childs_own(self, path: Path) -> None:
        log = SQLiteLog(path)

        def child() -> bool:
            asyncio.run(append("1"))
            return True

        async def append(name: str) -> None:
            await log.append(events(name))
            await log.close()

        assert in_a_child(child)


class TestTheFilesBeside:
    async def test_none_is_open_after_the_log_is_closed(self, path: Path) -> None:
        files = Path("/proc/self/fd")
        if not files.exists():
            pytest.skip("this system does not show open files")
        before = len(list(files.iterdir()))
        for number in range(5):
            async with SQLiteLog(path) as log, SQLiteLog(path) as other:
                await log.append(events(f"{number}/1"))
                await other.append(events(f"{number}/2"))
        assert len(list(files.iterdir())) == before

    async def test_nor_after_a_log_was_forgotten(self, path: Path) -> None:
        log = SQLiteLog(path)
        await log.append(events("1"))
        await log.trim()  # the thread that writes is done
        gone = weakref.ref(log)
        listener = log._peers._listener
        assert listener is not None
        for file in log._all_files:
            file.close()
        del log
        gc.collect()
        assert gone() is None
        await asyncio.to_thread(listener.join, PATIENCE)
        assert bells(path) == []

    async def test_without_fifos_one_process_at_a_time_has_it(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def mkfifo(name: Path) -> None:
            raise PermissionError("not on this file system")

        monkeypatch.setattr(os, "mkfifo", mkfifo)
        monkeypatch.setattr(peers, "_PATIENCE", 0.1)
        async with SQLiteLog(path) as log:
            await log.append(events("1"))
            async with SQLiteLog(path) as other:
                with pytest.raises(LogUnusable, match="in use: process"):
                    await other.append(events("2"))
            await log.append(events("3"))
        async with SQLiteLog(path) as log:
            assert await read_all(log) == ["1", "3"]

    async def test_that_cannot_be_locked_are_named(
        self, path: Path, log: SQLiteLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(self: Peers) -> bool:
            raise OSError(errno.ENOLCK, "no locks available")

        with monkeypatch.context() as patch:
            patch.setattr(Peers, "_lock_at_once", refused)
            with pytest.raises(LogUnusable, match="it cannot be locked"):
                await log.append(events("1"))
        await log.append(events("2"))

    async def test_that_somebody_removes_leave_those_who_are_there(
        self, path: Path, log: SQLiteLog
    ) -> None:
        async with SQLiteLog(path) as other, aclosing(other.tail(EARLIEST)) as tail:
            await log.append(events("1"))
            assert await take(tail, 1) == ["1"]
            shutil.rmtree(f"{path}-bells")
            await log._write(log._peers._look_around)
            await log.append(events("2"))
            assert await take(tail, 1) == ["2"]

    async def test_a_full_disk_is_said(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def mkfifo(name: Path) -> None:
            raise OSError(errno.ENOSPC, "no space left")

        async with SQLiteLog(path) as log:
            with monkeypatch.context() as patch:
                patch.setattr(os, "mkfifo", mkfifo)
                with pytest.raises(LogFull):
                    await log.append(events("1"))
            await log.append(events("2"))
            assert await read_all(log) == ["2"]

    async def test_who_may_not_be_rung_is_there_nevertheless(
        self, path: Path, log: SQLiteLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await log.append(events("1"))
        really = os.open
        (mine,) = bells(path)

        def refused(name: Any, *args: Any) -> int:
            if "-bells/" in str(name) and mine not in str(name) and "/." not in str(name):
                raise PermissionError("another user's")
            return really(name, *args)

        monkeypatch.setattr(os, "open", refused)
        async with SQLiteLog(path) as other, aclosing(other.tail(EARLIEST)) as tail:
            await other.append(events("2"))
            assert await take(tail, 2) == ["1", "2"]
            await log.append(events("3"))
            assert not await keeps_its_turn(log)
            assert await take(tail, 1) == ["3"]  # it looks once a second

    async def test_a_bell_that_is_not_heard_for_long_stops_nobody(
        self, path: Path, start: Any, log: SQLiteLog
    ) -> None:
        await log.append(events("1"))
        deaf = start(STAYS)
        await deaf.line()
        deaf.signal(signal.SIGSTOP)
        other = next(iter(log._peers._others.values()))
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(other, b"!" * 4096)
        await log.append(events("2"))
        deaf.signal(signal.SIGCONT)

    async def test_a_bell_that_has_just_been_taken_down_is_nobodys(
        self, path: Path, log: SQLiteLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "listdir", lambda path: ["1-gone"])
        await log.append(events("1"))
        assert await keeps_its_turn(log)

    async def test_a_lull_without_retention_by_age_takes_nothing(self, path: Path) -> None:
        async with SQLiteLog(path, Retention(count=5)) as log, SQLiteLog(path) as other:
            await log.append(events("1"))
            await other.append(events("2"))
            listening = asyncio.Event()
            loop, heard = asyncio.get_running_loop(), log._heard

            def hear(is_lull: bool) -> None:
                heard(is_lull)
                if is_lull:
                    loop.call_soon_threadsafe(listening.set)

            log._peers._heard = hear
            await listening.wait()
            assert not log._trim_asked

    def test_a_file_that_nobody_has_written_to_leaves_no_trace(self, path: Path) -> None:
        assert sqlite._trace(path) == (0, 0)

    def test_one_that_never_came_leaves_nothing(self, path: Path) -> None:
        Peers(path, lambda is_lull: None).leave()
        assert list(path.parent.iterdir()) == []


async def test_old_events_go_though_nobody_appends(path: Path) -> None:
    async with SQLiteLog(path, Retention(age=0.5)) as log:
        await log.append([event(str(number)) for number in range(2000)])
        gap = None
        while gap is None or gap.missed != 1998:
            await asyncio.sleep(0.05)
            gap = (await log.read("0")).gap


async def test_a_note_is_not_changed_by_two(path: Path, log: SQLiteLog) -> None:
    async with SQLiteLog(path) as other:
        changed = await asyncio.gather(
            *(each._change(Change(Note("lease", {}))) for each in (log, other) * 5)
        )
        assert sum(each is not None for each in changed) == 1
