"""`Lease`: one holder at a time, for as long as it renews what it has."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from codomyrmex.events.streaming.errors import LogFull
from codomyrmex.events.streaming.log import Log, MemoryLog, Record, Retention, SQLiteLog
from codomyrmex.events.streaming.log.base import Change, Note
from codomyrmex.events.streaming.log.lease import Held, Lease, LeaseLost, seconds_left
from codomyrmex.events.streaming.testing import cancel_at_every_await, run
from tests.conformance.test_logs import event, events, read_all

DURATION = 15.0


class LoopClock:
    """The time of the loop that runs, as a time of day that can be set."""

    def __init__(self) -> None:
        self.set_by = 0.0
        self._loop = asyncio.get_running_loop()

    def __call__(self) -> int:
        seconds = self._loop.time() + self.set_by
        return 1_700_000_000_000_000 + int(seconds * 1_000_000)


def count_up(state: Mapping[str, Any]) -> dict[str, Any]:
    return {"number": state.get("number", 0) + 1}


async def take(log: Log, **options: Any) -> Lease:
    return await Lease.take(log, "lease", count_up, **options)


def drafts(*names: str) -> list[Record]:
    return [Record.of(each) for each in events(*names)]


class TestHolding:
    @pytest.mark.parametrize("set_by", [2 * DURATION, -1000.0])
    async def test_is_certain_for_as_long_as_no_clock_says_it_may_be_over(
        self, set_by: float
    ) -> None:
        clock = LoopClock()

        class Full(MemoryLog):
            full = False

            async def _change(self, change: Change) -> Note | None:
                if self.full:
                    raise LogFull("somewhere")
                return await super()._change(change)

        async with Full(clock=clock) as log:
            lease = await take(log)
            await asyncio.sleep(10 * DURATION)
            assert lease.is_certain
            log.full = True
            await asyncio.sleep(DURATION / 2)
            assert lease.is_certain
            clock.set_by += set_by
            assert lease.is_certain == (set_by < 0)
            await asyncio.sleep(DURATION)
            assert not lease.is_certain
            log.full = False
            await lease.store()
            assert lease.is_certain
            await lease.let_go()
            assert not lease.is_certain

    async def test_nobody_else_takes_it_for_as_long_as_it_is_renewed(self) -> None:
        async with MemoryLog(clock=LoopClock()) as log:
            lease = await take(log)
            assert (lease.state, lease.was_held) == ({"number": 1}, False)
            for _ in range(40):
                await asyncio.sleep(DURATION / 4)
                with pytest.raises(Held) as caught:
                    await take(log)
                assert DURATION / 2 < caught.value.seconds <= DURATION
                assert caught.value.note.value["number"] == 1
            await lease.let_go()

    async def test_the_next_goes_on_with_the_state(self) -> None:
        async with MemoryLog(clock=LoopClock()) as log:
            lease = await take(log)
            await lease.store(seen="x")
            assert lease.state == {"number": 1, "seen": "x"}
            await lease.let_go()
            await lease.let_go()
            found: list[Mapping[str, Any]] = []

            def remember(state: Mapping[str, Any]) -> dict[str, Any]:
                found.append(state)
                return {"n": 0}

            again = await Lease.take(log, "lease", remember)
            assert (found, again.was_held) == ([{"number": 1, "seen": "x"}], False)
            await again.let_go()
            assert (await log._note("lease")).value == {"n": 0}

    async def test_one_that_was_let_go_writes_and_appends_nothing(self) -> None:
        async with MemoryLog(clock=LoopClock()) as log:
            lease = await take(log)
            await lease.let_go()
            with pytest.raises(LeaseLost):
                await lease.store(seen="x")
            with pytest.raises(LeaseLost):
                await lease.append(drafts("1"))
            assert (await log._note("lease")).value == {"number": 1}
            assert not lease.lost

    async def test_it_may_take_its_note_along_or_leave_it_for_a_while(self) -> None:
        async with MemoryLog(clock=LoopClock()) as log:
            await (await take(log)).let_go(gone=True)
            assert (await log._note("lease")).revision == 0
            await (await take(log)).let_go(lasts=60.0)
            await asyncio.sleep(59)
            assert (await log._note("lease")).value["number"] == 1
            await asyncio.sleep(1)
            assert (await log._note("lease")).revision == 0

    async def test_the_note_of_a_killed_holder_stays_for_as_long_as_it_said(self) -> None:
        log = MemoryLog(Retention(count=1), clock=LoopClock())
        lease = await take(log, lasts=60.0, keep=("kept", 0))
        await log.append(events("kept/1", "x/1", "x/2"))
        await asyncio.sleep(3601)
        await kill(lease)  # it was renewed a second ago
        await asyncio.sleep(DURATION + 58)
        await log.trim()
        assert await read_all(log, topics="kept") == ["kept/1"]
        await asyncio.sleep(1)
        await log.trim()
        assert await read_all(log, topics="kept") == []


async def kill(lease: Lease) -> None:
    """Have it be as if its process had been killed."""
    assert lease._renewing is not None
    lease._renewing.cancel()
    await asyncio.wait([lease._renewing])


class TestLosing:
    async def test_who_was_killed_holds_it_until_it_is_over(self) -> None:
        async with MemoryLog(clock=LoopClock()) as log:
            await kill(await take(log))
            await asyncio.sleep(DURATION - 0.001)
            with pytest.raises(Held):
                await take(log)
            await asyncio.sleep(0.001)
            lease = await take(log)
            assert (lease.state, lease.was_held) == ({"number": 2}, True)
            await lease.let_go()

    async def test_how_long_that_is_was_for_its_holder_to_say(self) -> None:
        async with MemoryLog(clock=LoopClock()) as log:
            lease = await take(log, duration=60.0)
            with pytest.raises(Held):
                await take(log, duration=1.0)
            await lease.let_go()

    async def test_who_was_slow_finds_out_and_can_write_and_append_no_more(self) -> None:
        losses: list[str] = []
        async with MemoryLog(clock=LoopClock()) as log:
            slow = [await take(log)]
            await kill(slow[0])
            await asyncio.sleep(DURATION)
            slow.append(await take(log))
            await kill(slow[1])
            await asyncio.sleep(DURATION)
            lease = await take(log)
            for each in slow:
                each.on_loss = lambda: losses.append("lost")
            with pytest.raises(LeaseLost):
                await slow[0].append(drafts("1"))
            with pytest.raises(LeaseLost):
                await slow[1].store(number=9)
            for each in slow:
                with pytest.raises(LeaseLost):
                    await each.store(number=9)
                await each.let_go()
            assert losses == ["lost", "lost"]
            assert lease.state == {"number": 3}
            assert await read_all(log) == []
            await lease.append(drafts("2"))
            await lease.let_go()

    async def test_it_is_found_out_by_renewing_too(self) -> None:
        lost = asyncio.Event()
        async with MemoryLog(clock=LoopClock()) as log:
            lease = await take(log)
            lease.on_loss = lost.set
            await log._change(Change(Note("lease", {}, (await log._note("lease")).revision)))
            await asyncio.sleep(DURATION / 2)
            assert lost.is_set()
            assert lease.lost
            await lease.let_go()
            assert (await log._note("lease")).value == {}

    async def test_a_clock_that_is_set_back_makes_nobody_wait_for_longer(self) -> None:
        clock = LoopClock()
        async with MemoryLog(clock=clock) as log:
            await kill(await take(log))
            clock.set_by = -3600.0
            assert (await take_and_leave(log)).was_held

    async def test_one_set_back_a_little_takes_it_from_nobody(self) -> None:
        clock = LoopClock()
        async with MemoryLog(clock=clock) as log:
            lease = await take(log)
            clock.set_by = -1.0
            with pytest.raises(Held):
                await take(log)
            await lease.let_go()

    async def test_its_end_is_that_of_the_log(self, caplog: pytest.LogCaptureFixture) -> None:
        log = MemoryLog(clock=LoopClock())
        await take(log)
        await log.close()
        await asyncio.sleep(DURATION)
        assert not caplog.records


async def take_and_leave(log: Log) -> Lease:
    lease = await take(log)
    await lease.let_go()
    return lease


class TestAppending:
    async def test_goes_on_though_the_lease_is_renewed_meanwhile(self) -> None:
        """Its note is another one then: what an append was guarded by is superseded."""

        class Log(MemoryLog):
            async def _append(
                self, drafts: list[Record], guard: Note | None = None
            ) -> list[Record]:
                await asyncio.sleep(1)
                return await super()._append(drafts, guard)

        async with Log(clock=LoopClock()) as log:
            lease = await take(log)
            await asyncio.gather(*(lease.append([each]) for each in drafts(*map(str, range(60)))))
            assert await read_all(log) == [str(number) for number in range(60)]
            await lease.let_go()

    async def test_and_though_a_renewal_said_that_it_had_failed(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Log(MemoryLog):
            fails = False

            async def _change(self, change: Change) -> Note | None:
                changed = await super()._change(change)
                if self.fails:
                    raise LogFull("somewhere")
                return changed

        async with Log(clock=LoopClock()) as log:
            lease = await take(log)
            log.fails = True
            await asyncio.sleep(DURATION / 2)
            assert "the lease lease could not be renewed" in caplog.text
            log.fails = False
            await lease.append(drafts("1"))
            log.fails = True
            with pytest.raises(LogFull):
                await lease.store(number=7)
            assert lease.state == {"number": 1}
            log.fails = False
            await lease.store(seen="x")
            assert lease.state == {"number": 1, "seen": "x"}
            await lease.let_go()
            assert seconds_left(await log._note("lease"), log._now()) == 0


class TestCancelling:
    """Wherever it is done, nobody is left with the lease, and no task."""

    @pytest.mark.parametrize("kind", ["memory", "file"])
    def test_leaves_nothing(self, kind: str, tmp_path: Path) -> None:
        number = iter(range(1000))
        log: Log

        def new() -> Log:
            nonlocal log
            log = MemoryLog() if kind == "memory" else SQLiteLog(tmp_path / f"{next(number)}.db")
            return log

        async def scenario() -> None:
            log = new()
            lease = await take(log)
            try:
                await lease.store(stored=True)
                await lease.append(drafts("1"))
            finally:
                await lease.let_go()

        async def check() -> None:
            assert seconds_left(await log._note("lease"), log._now()) == 0
            await log.close()

        assert cancel_at_every_await(scenario, check=check) >= 3

    def test_what_was_written_is_known(self, tmp_path: Path) -> None:
        """Also where the answer never came: what is said to be stored is."""
        number = iter(range(1000))

        async def scenario() -> None:
            async with SQLiteLog(tmp_path / f"{next(number)}.db") as log:
                lease = await take(log)
                try:
                    with suppress(asyncio.CancelledError):
                        await lease.store(stored=True)
                    stored = (await log._note("lease")).value.get("stored")
                    assert lease.state.get("stored") == stored
                    await lease.store(more=True)
                    assert (await log._note("lease")).value.get("stored") == stored
                finally:
                    await lease.let_go()

        assert cancel_at_every_await(scenario) >= 4

    async def test_again_and_again_does_not_stop_what_was_begun(self) -> None:
        class Log(MemoryLog):
            seconds = 0.0

            async def _change(self, change: Change) -> Note | None:
                await asyncio.sleep(self.seconds)
                return await super()._change(change)

        async with Log(clock=LoopClock()) as log:
            lease = await take(log)
            log.seconds = 3.0
            leaving = asyncio.create_task(lease.let_go())
            for _ in range(2):
                await asyncio.sleep(1)
                leaving.cancel()
            await asyncio.wait([leaving])
            assert leaving.cancelled()
            assert seconds_left(await log._note("lease"), log._now()) == 0

    async def test_of_who_takes_it_leaves_the_note_as_it_was(self) -> None:
        class Log(MemoryLog):
            seconds = 0.0

            async def _change(self, change: Change) -> Note | None:
                changed = await super()._change(change)
                await asyncio.sleep(self.seconds)
                return changed

        log = Log(Retention(count=1), clock=LoopClock())

        async def take_and_be_cancelled() -> None:
            log.seconds = 1.0
            taking = asyncio.create_task(take(log))
            await asyncio.sleep(0.5)
            taking.cancel()
            await asyncio.wait([taking])
            assert taking.cancelled()
            log.seconds = 0.0

        lease = await take(log, lasts=60.0, keep=("kept", 0))
        await log.append(events("kept/1", "x/1", "x/2"))
        await kill(lease)
        await asyncio.sleep(DURATION)
        await take_and_be_cancelled()
        lease = await take(log, lasts=60.0, keep=("kept", 0))
        assert lease.was_held
        await lease.let_go(lasts=60.0)
        await take_and_be_cancelled()
        await asyncio.sleep(57)
        await log.trim()
        assert await read_all(log, topics="kept") == ["kept/1"]
        assert (await log._note("lease")).value["number"] == 2
        await asyncio.sleep(1)
        await log.trim()
        assert await read_all(log, topics="kept") == []
        assert (await log._note("lease")).revision == 0

    async def test_of_all_tasks_leaves_it_to_end_by_itself(self) -> None:
        """As a loop does that ends."""

        class Log(MemoryLog):
            async def _change(self, change: Change) -> Note | None:
                await asyncio.sleep(1)
                return await super()._change(change)

        async with Log(clock=LoopClock()) as log:
            taking = asyncio.create_task(take(log))
            await asyncio.sleep(0.5)
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.wait([taking])
            assert taking.cancelled()
            assert (await log._note("lease")).revision == 0

    async def test_an_error_gives_way_to_it(self) -> None:
        class Log(MemoryLog):
            async def _change(self, change: Change) -> Note | None:
                await asyncio.sleep(1)
                raise LogFull("somewhere")

        async with Log(clock=LoopClock()) as log:
            taking = asyncio.create_task(take(log))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            taking.cancel()
            await asyncio.wait([taking])
            assert taking.cancelled()


class TestTwoProcesses:
    """As two logs at one file, neither of which knows of the other but by it."""

    async def test_only_one_of_many_takes_it(self, tmp_path: Path) -> None:
        path = tmp_path / "events.db"
        async with SQLiteLog(path) as one, SQLiteLog(path) as other:
            results = await asyncio.gather(
                *(take(each) for each in (one, other) * 5), return_exceptions=True
            )
            taken = [each for each in results if isinstance(each, Lease)]
            assert len(taken) == 1
            assert sum(isinstance(each, Held) for each in results) == 9
            await taken[0].let_go()

    async def test_who_has_lost_it_appends_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "events.db"
        async with (
            SQLiteLog(path, clock=LoopClock()) as one,
            SQLiteLog(path, clock=LoopClock()) as other,
        ):
            slow = await take(one)
            await kill(slow)
            await asyncio.sleep(DURATION)
            lease = await take(other)
            with pytest.raises(LeaseLost):
                await slow.append(drafts("slow"))
            await lease.append(drafts("1"))
            await slow.let_go()
            with pytest.raises(Held):
                await take(one)
            await lease.let_go()
            assert await read_all(one) == ["1"]


def test_one_that_is_taken_for_a_moment_is_free_at_once() -> None:
    async def scenario() -> None:
        async with MemoryLog(clock=LoopClock()) as log:
            for number in range(3):
                assert (await take_and_leave(log)).state == {"number": number + 1}
            await log.append([event("1")])

    run(scenario())
