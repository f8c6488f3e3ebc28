"""`SerialRunner`: one item at a time, in order, on one loop, and no task while there is nothing."""

import asyncio
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest

from codomyrmex.events.streaming import Event, SubscriberQueue, create_event
from codomyrmex.events.streaming.streams.runner import (
    SerialRunner,
    close_unstarted,
    is_async,
    is_cancellation,
)
from tests.streams.handlers import PATIENCE, plainly, thread


class Failures(list[Any]):
    """What `on_failure` was called with."""


def make(
    function: Callable[[Any], Any], queue: SubscriberQueue[Any] | None = None, **options: Any
) -> tuple[SerialRunner[Any], Failures]:
    failures = Failures()
    queue = SubscriberQueue(0, "block") if queue is None else queue
    return SerialRunner(function, queue, "owner", failures.append, **options), failures


def own_tasks() -> int:
    return len(asyncio.all_tasks()) - 1


class TestIsAsync:
    async def function(self, event: Event) -> None: ...

    async def __call__(self, event: Event) -> None: ...

    def test_says_what_gives_a_coroutine(self) -> None:
        assert is_async(self.function)
        assert is_async(self)
        assert is_async(functools.partial(self.function, create_event(1)))
        assert is_async(functools.partial(functools.partial(self)))

    def test_does_not_guess(self) -> None:
        assert not is_async(print)
        assert not is_async(plainly(self.function))
        assert not is_async(functools.partial(print, 1))
        assert not is_async(int)


async def test_a_cancellation_is_one_of_this_task_or_not() -> None:
    assert not is_cancellation(KeyError())
    assert not is_cancellation(asyncio.CancelledError())
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await asyncio.sleep(0)
    assert is_cancellation(caught.value)
    assert not is_cancellation(KeyError())
    task.uncancel()


def test_only_a_coroutine_that_was_never_started_is_closed() -> None:
    async def function() -> None:
        await asyncio.sleep(0)

    async def scenario() -> None:
        started = function()
        started.send(None)
        close_unstarted(started)
        with pytest.raises(StopIteration):
            started.send(None)

    fresh = function()
    close_unstarted(fresh)
    with pytest.raises(RuntimeError, match="cannot reuse"):
        fresh.send(None)
    close_unstarted("anything else")
    asyncio.run(scenario())


class TestItems:
    async def test_are_handled_in_order_and_one_at_a_time(self) -> None:
        got: list[Any] = []

        async def function(item: int) -> None:
            got.append(("begin", item))
            await asyncio.sleep(5 - item)
            got.append(("end", item))

        runner, _ = make(function)
        for item in range(4):
            runner.feed(item)
        await runner.drain()
        assert got == [(what, item) for item in range(4) for what in ("begin", "end")]

    async def test_are_handled_by_a_task_that_is_there_only_as_long_as_they_are(self) -> None:
        runner, _ = make(lambda item: None)
        assert own_tasks() == 0
        runner.feed(1)
        assert own_tasks() == 1
        runner.start()
        assert own_tasks() == 1
        await runner.finish()
        assert own_tasks() == 0
        runner.feed(2)
        assert own_tasks() == 1
        await runner.finish()

    async def test_that_come_as_the_task_ends_are_not_forgotten(self) -> None:
        got: list[int] = []
        runner, _ = make(got.append)
        runner.feed(1)
        loop = asyncio.get_running_loop()
        for turn in range(2, 12):
            loop.call_soon(runner.feed, turn)
            await asyncio.sleep(0)
        await runner.drain()
        assert got == list(range(1, 12))

    async def test_that_come_between_the_last_look_and_the_end_of_the_task_start_another(
        self,
    ) -> None:
        got: list[int] = []

        def function(item: int) -> None:
            got.append(item)
            if item < 3:
                asyncio.get_running_loop().call_soon(runner.feed, item + 1)

        runner, _ = make(function)
        runner.feed(1)
        await asyncio.sleep(1)
        assert got == [1, 2, 3]

    async def test_that_fail_are_told_and_the_rest_is_handled(self) -> None:
        class Odd(BaseException):
            pass

        errors: dict[int, BaseException] = {
            1: KeyError(), 2: asyncio.CancelledError(), 3: Odd(), 4: RecursionError(),
        }  # fmt: skip

        async def function(item: int) -> None:
            if item in errors:
                raise errors[item]

        runner, failures = make(function)
        for item in range(6):
            runner.feed(item)
        await runner.drain()
        assert failures == [1, 2, 3, 4]

    async def test_may_be_fed_by_many_threads(self) -> None:
        got: list[Any] = []
        inside = overlaps = 0

        async def function(item: Any) -> None:
            nonlocal inside, overlaps
            inside += 1
            overlaps += inside != 1
            await asyncio.sleep(0)
            got.append(item)
            inside -= 1

        runner, _ = make(function)

        def work(name: int) -> None:
            for number in range(300):
                runner.feed((name, number))

        await asyncio.gather(*(asyncio.to_thread(work, name) for name in range(4)))
        await runner.drain()
        assert len(got) == 1200
        assert overlaps == 0
        for name in range(4):
            assert [b for a, b in got if a == name] == list(range(300))

    def test_started_by_two_threads_at_once_have_one_task(self) -> None:
        got: list[Any] = []
        inside = 0

        async def function(item: int) -> None:
            nonlocal inside
            inside += 1
            await asyncio.sleep(0.001)
            got.append((item, inside))
            inside -= 1

        class Interrupting(asyncio.SelectorEventLoop):
            """A loop that is asked something at the moment at which another thread starts it."""

            another: Callable[[], None] | None = None

            def is_closed(self) -> bool:
                another, self.another = self.another, None
                if another is not None:
                    with thread(another):
                        pass
                return super().is_closed()

        loop = Interrupting()
        runner, _ = make(function, loop=loop)

        async def main() -> None:
            for item in range(3):
                runner.queue.force(item)
            loop.another = runner.start
            runner.start()
            await runner.drain()
            await runner.finish()

        loop.run_until_complete(main())
        loop.close()
        assert got == [(0, 1), (1, 1), (2, 1)]


class TestAtOnce:
    """Items that are handled where they come, when nothing is before them."""

    async def test_one_is_handled_without_a_task_in_the_runners_context(self) -> None:
        got: list[tuple[Any, bool]] = []
        runner, failures = make(lambda item: got.append((item, SerialRunner.runs_for("owner"))))
        assert runner.claim()
        runner.handle_now(1)
        assert (got, failures, own_tasks()) == ([(1, True)], [], 0)
        assert not SerialRunner.runs_for("owner")
        assert not runner.has_work
        await runner.drain()

    async def test_what_comes_meanwhile_comes_after_it(self) -> None:
        got: list[str] = []

        def function(item: str) -> None:
            if item == "first":
                runner.feed("meanwhile")
                assert not runner.claim()
                assert runner.has_work
            got.append(item)

        runner, _ = make(function)
        assert runner.claim()
        runner.feed("after")
        assert not runner.claim()
        runner.handle_now("first")
        assert got == ["first"]
        await runner.drain()
        assert got == ["first", "after", "meanwhile"]

    async def test_what_is_to_be_awaited_is_awaited_before_what_came_meanwhile(self) -> None:
        got: list[str] = []

        async def function(item: str) -> None:
            await asyncio.sleep(1)
            got.append(item)

        def call(item: Any) -> Any:
            return function(item) if isinstance(item, str) else item

        runner, _ = make(call)
        assert runner.claim()
        runner.feed("second")
        runner.handle_now("first")
        draining = asyncio.create_task(runner.drain())
        await asyncio.sleep(1.5)
        assert got == ["first"]
        assert not draining.done()
        await draining
        assert got == ["first", "second"]

    async def test_one_that_fails_is_told_and_the_next_handled(self) -> None:
        got: list[int] = []

        def function(item: int) -> None:
            got.append(1 // item)

        runner, failures = make(function)
        for item in (0, 1):
            assert runner.claim()
            runner.handle_now(item)
        assert (got, failures) == ([1], [0])

    async def test_a_runner_that_its_function_stops_has_ended_when_it_returns(self) -> None:
        ended: list[bool] = []
        runner: SerialRunner[Any]
        runner, _ = make(lambda _: runner.stop(), on_end=lambda: ended.append(runner.has_ended))
        assert runner.claim()
        runner.handle_now(1)
        assert ended == [True]
        assert not runner.claim()

    async def test_not_away_from_the_loop(self) -> None:
        runner, _ = make(print)
        assert not await asyncio.to_thread(runner.claim)
        runner.leave_loop()
        assert not runner.claim()


class TestLoops:
    def test_without_one_items_wait(self) -> None:
        got: list[int] = []
        runner, _ = make(got.append)
        assert runner.loop is None
        runner.feed(1)
        asyncio.run(runner.drain())
        assert got == [1]

    def test_it_moves_when_its_own_is_closed(self) -> None:
        loops: list[Any] = []
        runner, _ = make(lambda item: loops.append(asyncio.get_running_loop()))

        async def feed() -> None:
            runner.feed(1)
            await runner.drain()

        asyncio.run(feed())
        asyncio.run(feed())
        assert len(set(loops)) == 2

    def test_it_does_not_move_while_its_own_only_rests(self) -> None:
        got: list[Any] = []
        loop = asyncio.new_event_loop()
        runner, _ = make(lambda item: got.append(asyncio.get_running_loop() is loop), loop=loop)

        async def feed() -> None:
            runner.feed(1)
            await asyncio.sleep(0)

        asyncio.run(feed())
        assert got == []
        loop.run_until_complete(runner.drain())
        assert got == [True]
        loop.close()

    def test_one_that_closes_at_this_moment_is_left(self) -> None:
        got: list[Any] = []

        class Closing(asyncio.SelectorEventLoop):
            said = 0

            def is_closed(self) -> bool:
                self.said += 1
                return self.said > 2 and super().is_closed()

        loop = Closing()
        loop.close()
        loop.said = 0
        runner, _ = make(got.append, loop=loop)

        async def feed() -> None:
            runner.feed(1)
            await runner.drain()

        asyncio.run(feed())
        assert got == [1]

    def test_one_that_closes_at_this_moment_and_no_other_leaves_items_waiting(self) -> None:
        got: list[Any] = []

        class Closing(asyncio.SelectorEventLoop):
            said = 0

            def is_closed(self) -> bool:
                self.said += 1
                return self.said > 2 and super().is_closed()

        loop = Closing()
        loop.close()
        loop.said = 0
        runner, _ = make(got.append, loop=loop)
        runner.feed(1)
        assert got == []
        asyncio.run(runner.drain())
        assert got == [1]


class TestStopping:
    async def test_forgets_what_waits_and_does_not_interrupt(self) -> None:
        got: list[Any] = []

        async def function(item: int) -> None:
            await asyncio.sleep(1)
            got.append(item)

        ended: list[str] = []
        runner, _ = make(function, on_end=lambda: ended.append("ended"))
        for item in range(3):
            runner.feed(item)
        await asyncio.sleep(0.5)
        runner.stop()
        assert not runner.has_ended
        assert ended == []
        await runner.drain()
        runner.feed(3)
        await runner.finish()
        assert runner.has_ended
        assert ended == ["ended"]
        assert got == [0]
        runner.feed(4)
        runner.start()
        assert own_tasks() == 0
        assert runner.queue.empty()

    async def test_closes_coroutines_that_wait(self) -> None:
        async def function() -> None: ...

        runner, _ = make(lambda item: item)
        waiting = [function(), function()]
        for each in waiting:
            runner.feed(each)
        runner.stop()
        for each in waiting:
            with pytest.raises(RuntimeError, match="cannot reuse"):
                each.send(None)
        await runner.finish()

    async def test_before_the_task_began_begins_none(self) -> None:
        runner, _ = make(lambda item: None)
        await asyncio.to_thread(runner.feed, 1)  # which cannot begin it itself
        runner.stop()
        await asyncio.sleep(0)
        assert own_tasks() == 0

    async def test_a_task_that_has_not_begun_counts_as_ended(self) -> None:
        ended: list[str] = []
        runner, _ = make(lambda item: None, on_end=lambda: ended.append("ended"))
        runner.feed(1)
        runner.cancel()
        await runner.finish()
        assert ended == ["ended"]
        assert own_tasks() == 0

    async def test_cancelling_interrupts(self) -> None:
        got: list[Any] = []

        async def function(item: int) -> None:
            try:
                await asyncio.sleep(100)
            finally:
                got.append(asyncio.get_running_loop().time())

        runner, failures = make(function)
        runner.feed(0)
        runner.feed(1)
        await asyncio.sleep(1)
        runner.cancel()
        await runner.finish()
        assert got == [1]
        assert failures == []
        runner.cancel()  # again does nothing

    @pytest.mark.real_time
    async def test_cancelling_interrupts_on_the_loop_of_another_thread(self) -> None:
        started = threading.Event()

        async def function(item: int) -> None:
            started.set()
            await asyncio.sleep(100)

        runner, _ = make(function, loop=None)

        async def there() -> None:
            runner.loop = asyncio.get_running_loop()
            runner.feed(1)
            await runner.finish()

        with thread(lambda: asyncio.run(there())):
            assert await asyncio.to_thread(started.wait, PATIENCE)
            runner.cancel()
            async with asyncio.timeout(PATIENCE):
                await runner.finish()

    def test_cancelling_when_the_loop_is_closed_does_nothing(self) -> None:
        async def function(item: int) -> None:
            await asyncio.get_running_loop().create_future()

        loop = asyncio.new_event_loop()
        runner, _ = make(function, loop=loop)

        async def feed() -> None:
            runner.feed(1)
            await asyncio.sleep(0)

        loop.run_until_complete(feed())
        pending = asyncio.all_tasks(loop)
        runner.leave_loop()  # so that it does not know of the loop's end
        for task in pending:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        loop.close()
        runner.cancel()
        assert runner.has_ended

    async def test_the_function_itself_may_cancel_and_finish(self) -> None:
        got: list[Any] = []

        async def function(item: int) -> None:
            assert runner.runs_here
            runner.cancel()
            await runner.finish()
            await asyncio.sleep(1)
            got.append(item)

        runner, _ = make(function)
        runner.feed(1)
        await asyncio.sleep(5)
        assert got == [1]
        assert not runner.runs_here

    async def test_items_that_an_interruption_left_wait_for_the_next(self) -> None:
        got: list[Any] = []

        async def function(item: int) -> None:
            if item == 1:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                await asyncio.sleep(0)
            got.append(item)

        runner, failures = make(function)
        for item in range(3):
            runner.feed(item)
        await asyncio.sleep(1)
        assert got == [0]
        runner.feed(3)
        await runner.drain()
        assert got == [0, 2, 3]
        assert failures == []

    async def test_a_queue_that_ends_ends_it_when_all_is_handled(self) -> None:
        got: list[Any] = []
        runner, _ = make(got.append, on_end=lambda: got.append("end"))
        runner.feed(1)
        runner.feed(2)
        runner.queue.end()
        await runner.finish()
        assert got == [1, 2, "end"]


class TestWhoAsks:
    async def test_is_known_in_the_function_and_in_what_it_starts(self) -> None:
        got: list[bool] = []

        async def child() -> None:
            got.append(SerialRunner.runs_for("owner"))

        async def function(item: Any) -> None:
            got.append(SerialRunner.runs_for("owner"))
            got.append(SerialRunner.runs_for("another"))
            await asyncio.create_task(child())

        runner, _ = make(function)
        assert not SerialRunner.runs_for("owner")
        runner.feed(1)
        await runner.drain()
        assert got == [True, False, True]
        assert not SerialRunner.runs_for("owner")

    async def test_is_not_inherited_by_a_runner_that_a_function_makes(self) -> None:
        got: list[bool] = []
        made: list[SerialRunner[Any]] = []

        async def inner(item: Any) -> None:
            got.append(SerialRunner.runs_for("owner"))

        async def function(item: Any) -> None:
            runner = SerialRunner(inner, SubscriberQueue(), "another", lambda item: None)
            made.append(runner)
            runner.feed(item)
            await runner.drain()

        runner, _ = make(function)
        runner.feed(1)
        await runner.drain()
        assert got == [False]


async def test_losses_are_told_in_their_places_and_not_counted_as_items() -> None:
    got: list[Any] = []
    queue: SubscriberQueue[Any] = SubscriberQueue(2, "drop_oldest")
    runner, _ = make(got.append, queue, tells_losses=True)
    for item in range(5):
        runner.feed(create_event(item))
    await runner.drain()
    await runner.finish()
    assert [event.data for event in got] == [{"lost": 3, "overflow": "drop_oldest"}, 3, 4]
    runner.feed(create_event(5))
    await runner.drain()
    assert got[-1].data == 5
