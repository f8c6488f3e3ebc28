import asyncio
import functools
import itertools
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from codomyrmex.events.streaming.testing import (
    DeadlockError,
    FaultySocket,
    LeakError,
    VirtualTimeLoop,
    cancel_at_every_await,
    run,
)


def now() -> float:
    return asyncio.get_running_loop().time()


class Registry:
    """Something to register with, in ways right and wrong."""

    def __init__(self) -> None:
        self.members: set[object] = set()

    @asynccontextmanager
    async def register_then_protect(self) -> AsyncGenerator[None, None]:
        member = object()
        self.members.add(member)
        await asyncio.sleep(1)  # read the history, say
        try:
            yield
        finally:
            self.members.discard(member)

    @asynccontextmanager
    async def protect_then_register(self) -> AsyncGenerator[None, None]:
        member = object()
        await asyncio.sleep(1)
        self.members.add(member)
        try:
            yield
        finally:
            await asyncio.sleep(1)
            self.members.discard(member)


class TestCancelAtEveryAwait:
    def test_finds_what_is_registered_before_it_is_protected(self) -> None:
        registry = Registry()

        async def scenario() -> None:
            await asyncio.sleep(0)
            async with registry.register_then_protect():
                await asyncio.sleep(1)

        def check() -> None:
            assert not registry.members

        with pytest.raises(AssertionError) as caught:
            cancel_at_every_await(scenario, check=check)
        (note,) = caught.value.__notes__
        assert note.startswith("cancelled at suspension 2, while it waits: ")
        assert "scenario" in note
        assert "sleep" in note

    def test_finds_a_cleanup_that_can_be_cut_short(self) -> None:
        registry = Registry()

        async def scenario() -> None:
            async with registry.protect_then_register():
                await asyncio.sleep(1)

        def check() -> None:
            assert not registry.members

        with pytest.raises(AssertionError) as caught:
            cancel_at_every_await(scenario, check=check)
        assert caught.value.__notes__[0].startswith("cancelled at suspension 3, while it waits")

    def test_passes_what_is_right_and_counts_the_suspensions(self) -> None:
        registry = Registry()
        finished = []

        async def scenario() -> None:
            async with asyncio.timeout(5):
                registry.members.add(1)
                try:
                    await asyncio.sleep(0)
                    await asyncio.sleep(1)
                    await asyncio.create_task(asyncio.sleep(1))
                finally:
                    registry.members.clear()
            finished.append(now())

        def check() -> None:
            assert not registry.members

        assert cancel_at_every_await(scenario, check=check) == 3
        assert finished == [2.0]

    def test_cancels_where_the_scenario_waits(self) -> None:
        cancelled: list[tuple[str, float]] = []

        async def scenario() -> None:
            for name in ("first", "second"):
                try:
                    await asyncio.sleep(5)
                except asyncio.CancelledError:
                    cancelled.append((name, now()))
                    raise

        assert cancel_at_every_await(scenario) == 2
        assert cancelled == [("first", 0.0), ("first", 5.0), ("second", 5.0), ("second", 10.0)]

    def test_what_the_scenario_waits_for_has_begun(self) -> None:
        events = []

        async def work() -> None:
            events.append("begun")
            await asyncio.sleep(1)
            events.append("ended")

        async def scenario() -> None:
            await asyncio.create_task(work())

        assert cancel_at_every_await(scenario) == 1
        assert events == ["begun", "begun", "ended", "begun", "ended"]

    def test_finds_an_item_lost_as_it_arrives(self) -> None:
        class Mailbox:
            def __init__(self) -> None:
                self.items: deque[str] = deque()
                self.waiter: asyncio.Future[str] | None = None

            def put(self, item: str) -> None:
                if self.waiter is not None and not self.waiter.done():
                    self.waiter.set_result(item)  # in nobody's hands if the reader is cancelled
                else:
                    self.items.append(item)

            async def get(self) -> str:
                if not self.items:
                    self.waiter = asyncio.get_running_loop().create_future()
                    return await self.waiter
                return self.items.popleft()

        async def receive_from(box: Mailbox | asyncio.Queue[str]) -> None:
            put = box.put_nowait if isinstance(box, asyncio.Queue) else box.put
            timer = asyncio.get_running_loop().call_later(1, put, "item")
            sent.append("item")
            try:
                received.append(await box.get())
            finally:
                timer.cancel()
                if timer.when() > now():
                    sent.clear()  # cancelled before it was sent

        sent: list[str] = []
        received: list[str] = []
        left: list[str] = []
        boxes: list[Mailbox | asyncio.Queue[str]] = []

        async def careless() -> None:
            boxes.append(Mailbox())
            await receive_from(boxes[-1])

        async def careful() -> None:
            boxes.append(asyncio.Queue())
            await receive_from(boxes[-1])

        async def check() -> None:
            box = boxes.pop()
            try:
                async with asyncio.timeout(1):
                    left.append(await box.get())
            except TimeoutError:
                pass
            assert sent == received + left
            sent.clear()
            received.clear()
            left.clear()

        with pytest.raises(AssertionError) as caught:
            cancel_at_every_await(careless, check=check)
        assert "as its result arrives" in caught.value.__notes__[0]
        sent.clear()
        assert cancel_at_every_await(careful, check=check) == 1

    def test_finds_a_task_left_behind(self) -> None:
        tasks = []

        async def scenario() -> None:
            task = asyncio.create_task(asyncio.sleep(10))
            tasks.append(task)
            await asyncio.sleep(1)
            task.cancel()
            await asyncio.wait([task])

        with pytest.raises(LeakError) as caught:
            cancel_at_every_await(scenario)
        assert caught.value.__notes__[0].startswith("cancelled at suspension 1")

    def test_finds_a_hang(self) -> None:
        async def scenario() -> None:
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                await asyncio.Event().wait()

        impatient = functools.partial(
            run, loop_factory=functools.partial(VirtualTimeLoop, grace=0.01)
        )
        with pytest.raises(DeadlockError, match="'scenario'") as caught:
            cancel_at_every_await(scenario, run=impatient)
        assert caught.value.__notes__[0].startswith("cancelled at suspension 1")

    def test_a_scenario_may_end_well_all_the_same(self) -> None:
        ends = []

        async def scenario() -> None:
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                ends.append("cancelled")
            else:
                ends.append("undisturbed")

        assert cancel_at_every_await(scenario) == 1
        assert ends == ["cancelled", "cancelled", "undisturbed"]

    def test_an_error_that_is_not_a_cancellation_comes_out(self) -> None:
        async def scenario() -> None:
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                raise ValueError("turned into something else") from None

        with pytest.raises(ValueError, match="something else") as caught:
            cancel_at_every_await(scenario)
        assert len(caught.value.__notes__) == 1

    def test_a_scenario_broken_without_any_cancellation_has_no_note(self) -> None:
        async def scenario() -> None:
            await asyncio.sleep(1)
            raise ValueError("always")

        with pytest.raises(ValueError, match="always") as caught:
            cancel_at_every_await(scenario)
        assert not hasattr(caught.value, "__notes__")

    def test_a_scenario_that_cancels_itself_is_broken(self) -> None:
        async def scenario() -> None:
            raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError, match="by itself"):
            cancel_at_every_await(scenario)

    def test_a_scenario_that_never_waits(self) -> None:
        runs = []

        async def scenario() -> None:
            runs.append(1)

        assert cancel_at_every_await(scenario) == 0
        assert runs == [1]

    def test_results_and_errors_reach_the_scenario(self) -> None:
        async def fail() -> None:
            await asyncio.sleep(1)
            raise ValueError("expected")

        async def scenario() -> None:
            with pytest.raises(ValueError, match="expected"):
                await asyncio.create_task(fail())
            assert await asyncio.sleep(1, "result") == "result"

        assert cancel_at_every_await(scenario) == 2

    def test_gives_up_on_an_endless_scenario(self) -> None:
        async def scenario() -> None:
            for second in itertools.count():
                await asyncio.sleep(second)

        with pytest.raises(RuntimeError, match="7 times"):
            cancel_at_every_await(scenario, limit=7)

    def test_a_scenario_at_the_limit_is_not_endless(self) -> None:
        async def scenario() -> None:
            await asyncio.sleep(1)
            await asyncio.sleep(1)

        assert cancel_at_every_await(scenario, limit=2) == 2
        with pytest.raises(RuntimeError, match="1 times"):
            cancel_at_every_await(scenario, limit=1)

    def test_runs_in_real_time_if_asked(self) -> None:
        loops = []

        async def scenario() -> None:
            loops.append(asyncio.get_running_loop())
            await asyncio.sleep(0.001)

        real = functools.partial(run, loop_factory=asyncio.new_event_loop)
        assert cancel_at_every_await(scenario, run=real) == 1
        assert not any(isinstance(loop, VirtualTimeLoop) for loop in loops)


class TestFaultySocket:
    async def test_records_what_is_sent(self) -> None:
        sock = FaultySocket()
        await sock.send("one")
        await sock.send("two")
        assert sock.sent == ["one", "two"]
        assert sock.closed is None

    async def test_takes_its_time(self) -> None:
        sock = FaultySocket(delay=2)
        await sock.send("one")
        assert now() == 2.0
        sock.delay = 0.5
        await sock.send("two")
        assert now() == 2.5

    async def test_stalls_until_it_is_resumed(self) -> None:
        sock = FaultySocket()
        sock.stall()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60):
                await sock.send("lost")
        asyncio.get_running_loop().call_later(10, sock.resume)
        await asyncio.gather(sock.send("one"), sock.send("two"))
        assert now() == 70.0
        await sock.send("three")
        assert sock.sent == ["one", "two", "three"]

    async def test_fails_now_and_later(self) -> None:
        sock = FaultySocket()
        await sock.send("one")
        sock.fail(BrokenPipeError("gone"))
        for _ in range(2):
            with pytest.raises(BrokenPipeError, match="gone"):
                await sock.send("two")
        assert sock.sent == ["one"]

    async def test_fails_a_send_that_waits(self) -> None:
        sock = FaultySocket()
        sock.stall()
        asyncio.get_running_loop().call_later(10, sock.fail, BrokenPipeError("gone"))
        with pytest.raises(BrokenPipeError, match="gone"):
            await sock.send("one")
        assert now() == 10.0

    async def test_that_failed_does_not_stall(self) -> None:
        sock = FaultySocket()
        sock.fail(BrokenPipeError("gone"))
        sock.stall()
        with pytest.raises(BrokenPipeError, match="gone"):
            await sock.send("one")

    async def test_remembers_how_it_was_closed_first(self) -> None:
        sock = FaultySocket()
        await sock.close()
        assert sock.closed == (1000, "")
        sock = FaultySocket()
        await sock.close(1008, "too slow")
        await sock.close(1001, "again")
        assert sock.closed == (1008, "too slow")

    async def test_closing_ends_the_sends(self) -> None:
        sock = FaultySocket()
        sock.stall()
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(3)).add_done_callback(
                lambda _: group.create_task(sock.close(1001))
            )
            with pytest.raises(ConnectionError, match="1001"):
                await sock.send("one")
        with pytest.raises(ConnectionError, match="1001"):
            await sock.send("two")
        assert sock.sent == []

    def test_can_be_made_outside_a_loop(self) -> None:
        sock = FaultySocket(delay=1)
        run(sock.send("one"))
        assert sock.sent == ["one"]
