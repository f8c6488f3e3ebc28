import asyncio
import contextvars
import functools
import gc
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

import pytest
import uvloop

from codomyrmex.events.streaming.testing import DeadlockError, LeakError, VirtualTimeLoop, run

any_loop = pytest.mark.parametrize(
    "loop_factory", [VirtualTimeLoop, asyncio.new_event_loop, uvloop.new_event_loop]
)
LoopFactory = Callable[[], asyncio.AbstractEventLoop]


async def naturals() -> AsyncGenerator[int, None]:
    number = 0
    while True:
        yield number
        number += 1


async def fail(error: Exception) -> None:
    raise error


class TestRun:
    @any_loop
    def test_returns_the_result(self, loop_factory: LoopFactory) -> None:
        assert run(asyncio.sleep(0.01, "result"), loop_factory=loop_factory) == "result"

    def test_is_in_debug_mode_unless_told(self) -> None:
        async def main() -> bool:
            return asyncio.get_running_loop().get_debug()

        assert run(main())
        assert not run(main(), debug=False)

    def test_closes_the_loop_and_ends_its_threads(self) -> None:
        async def main() -> asyncio.AbstractEventLoop:
            await asyncio.to_thread(lambda: None)
            return asyncio.get_running_loop()

        before = threading.active_count()
        assert run(main()).is_closed()
        assert threading.active_count() == before

    def test_waits_for_a_thread_that_nobody_awaits_any_more(self) -> None:
        ended = threading.Event()

        def work() -> None:
            started.set()
            time.sleep(0.1)
            ended.set()

        started = threading.Event()

        async def main() -> None:
            work_done = asyncio.get_running_loop().run_in_executor(None, work)
            await asyncio.to_thread(started.wait)
            work_done.cancel()

        run(main(), loop_factory=functools.partial(VirtualTimeLoop, grace=0.01))
        assert ended.is_set()

    def test_sees_the_callers_context_and_keeps_its_own(self) -> None:
        variable = contextvars.ContextVar("variable", default="")

        async def main() -> str:
            seen = variable.get()
            variable.set("inner")
            return seen

        variable.set("outer")
        assert run(main()) == "outer"
        assert variable.get() == "outer"

    def test_refuses_to_run_inside_a_loop(self) -> None:
        async def main() -> None:
            with pytest.raises(RuntimeError, match="event loop is running"):
                run(asyncio.sleep(1))

        run(main())

    @any_loop
    def test_allows_tidy_work(self, loop_factory: LoopFactory) -> None:
        async def main() -> None:
            task = asyncio.create_task(asyncio.sleep(10))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            asyncio.get_running_loop().call_later(10, print).cancel()
            with pytest.raises(ValueError, match="expected"):
                await asyncio.create_task(fail(ValueError("expected")))
            generator = naturals()
            assert await anext(generator) == 0
            await generator.aclose()
            kept.append(generator)
            async for _ in naturals():
                break

        kept: list[object] = []
        run(main(), loop_factory=loop_factory)


class TestLeaks:
    @any_loop
    def test_a_pending_task(self, loop_factory: LoopFactory) -> None:
        async def stay() -> None:
            await asyncio.Event().wait()

        async def main() -> None:
            tasks.append(asyncio.create_task(stay(), name="left alone"))
            await asyncio.sleep(0)

        tasks: list[asyncio.Task[None]] = []
        with pytest.raises(LeakError, match=r"'left alone'.*stay") as caught:
            run(main(), loop_factory=loop_factory)
        assert len(caught.value.tasks) == 1
        assert caught.value.timers == caught.value.generators == caught.value.errors == []
        assert tasks[0].cancelled()

    def test_a_task_that_was_cancelled_but_not_waited_for(self) -> None:
        async def main() -> None:
            task = asyncio.create_task(asyncio.sleep(10), name="cancelled")
            await asyncio.sleep(0)
            task.cancel()

        with pytest.raises(LeakError, match="'cancelled'"):
            run(main())

    def test_a_task_that_another_one_starts_when_it_is_cancelled(self) -> None:
        async def respawn() -> None:
            try:
                await asyncio.sleep(10)
            finally:
                tasks.append(asyncio.create_task(asyncio.sleep(20), name="child"))

        async def main() -> None:
            tasks.append(asyncio.create_task(respawn(), name="parent"))
            await asyncio.sleep(0)

        tasks: list[asyncio.Task[None]] = []
        with pytest.raises(LeakError, match=r"(?s)'parent'.*'child'"):
            run(main())
        assert all(task.done() for task in tasks)

    def test_a_task_that_ends_only_when_it_likes(self) -> None:
        async def linger() -> None:
            while not free.is_set():
                try:
                    await asyncio.sleep(1)
                except asyncio.CancelledError:
                    continue

        async def main() -> None:
            tasks.append(asyncio.create_task(linger(), name="lingers"))
            asyncio.get_running_loop().call_at(9.5, free.set)
            await asyncio.sleep(0.5)
            free.clear()

        free = threading.Event()
        tasks: list[asyncio.Task[None]] = []
        with pytest.raises(LeakError) as caught:
            run(main())
        (task,) = caught.value.tasks
        assert "'lingers'" in task
        assert "still running" not in task

    def test_a_task_that_refuses_to_end(self, caplog: pytest.LogCaptureFixture) -> None:
        async def refuse() -> None:
            while True:
                try:
                    await asyncio.sleep(1)
                except asyncio.CancelledError:
                    cancellations.append(1)
                except GeneratorExit:
                    return

        async def main() -> None:
            task = asyncio.create_task(refuse(), name="stubborn")
            await asyncio.wait([task], timeout=0.5)

        cancellations: list[int] = []
        with pytest.raises(LeakError, match=r"'stubborn'.*still running after 10 s"):
            run(main())
        assert len(cancellations) == 1
        gc.collect()
        assert "Task was destroyed but it is pending" in caplog.text

    def test_a_timer(self) -> None:
        async def main() -> None:
            asyncio.get_running_loop().call_later(30, ran.append, "ran")

        ran: list[str] = []
        with pytest.raises(LeakError, match=r"TimerHandle when=30.*append.*") as caught:
            run(main())
        assert f"created at {__file__}" in caught.value.timers[0]
        assert not ran

    def test_the_timer_of_a_pending_task_is_the_tasks(self) -> None:
        async def main() -> None:
            tasks.append(asyncio.create_task(asyncio.sleep(30)))
            await asyncio.sleep(0)

        tasks: list[asyncio.Task[None]] = []
        with pytest.raises(LeakError) as caught:
            run(main())
        assert len(caught.value.tasks) == 1
        assert not caught.value.timers

    @any_loop
    def test_an_open_async_generator(self, loop_factory: LoopFactory) -> None:
        async def main() -> None:
            kept.append(naturals())
            await anext(kept[0])

        kept: list[AsyncGenerator[int, None]] = []
        with pytest.raises(LeakError, match=rf"async generator naturals \({__file__}:") as caught:
            run(main(), loop_factory=loop_factory)
        assert len(caught.value.generators) == 1
        with pytest.raises(StopAsyncIteration):
            kept[0].__anext__().send(None)

    @pytest.mark.parametrize("turns", range(4))
    def test_not_a_dropped_generator_even_if_it_takes_time_to_close(self, turns: int) -> None:
        async def outer() -> AsyncGenerator[int, None]:
            try:
                async for number in naturals():
                    yield number
            finally:
                await asyncio.sleep(5)
                closed.append("outer")

        async def main() -> None:
            async for _ in outer():
                break
            for _ in range(turns):
                await asyncio.sleep(0)

        closed: list[str] = []
        run(main())
        assert closed == ["outer"]

    def test_not_a_generator_dropped_while_a_task_is_cancelled(self) -> None:
        async def slow() -> AsyncGenerator[int, None]:
            try:
                yield 1
            finally:
                await asyncio.sleep(5)
                closed.append("slow")

        async def linger() -> None:
            try:
                await asyncio.sleep(10)
            finally:
                async for _ in slow():
                    break

        async def main() -> None:
            tasks.append(asyncio.create_task(linger(), name="lingers"))
            await asyncio.sleep(0)

        tasks: list[asyncio.Task[None]] = []
        closed: list[str] = []
        with pytest.raises(LeakError) as caught:
            run(main())
        assert len(caught.value.tasks) == 1
        assert not caught.value.generators
        assert closed == ["slow"]

    def test_not_a_generator_that_the_loop_was_told_to_close(self) -> None:
        async def main() -> None:
            kept.append(naturals())
            await anext(kept[0])
            await asyncio.get_running_loop().shutdown_asyncgens()

        kept: list[AsyncGenerator[int, None]] = []
        run(main())

    def test_a_dropped_generator_that_never_closes(self, caplog: pytest.LogCaptureFixture) -> None:
        async def stuck() -> AsyncGenerator[int, None]:
            try:
                yield 1
            finally:
                await asyncio.Event().wait()

        async def main() -> None:
            async for _ in stuck():
                break

        with pytest.raises(LeakError, match=r"closing of async generator .*stuck, still running"):
            run(main())
        gc.collect()
        assert "Task was destroyed but it is pending" in caplog.text

    def test_a_generator_dropped_after_the_loop_is_gone_is_let_go(self) -> None:
        async def starts_another_when_closed() -> AsyncGenerator[int, None]:
            try:
                yield 1
            finally:
                kept.append(naturals())
                await anext(kept[1])

        async def main() -> None:
            kept.append(starts_another_when_closed())
            await anext(kept[0])

        kept: list[AsyncGenerator[int, None]] = []
        with pytest.raises(LeakError, match="starts_another_when_closed"):
            run(main())
        kept.clear()

    def test_a_generator_that_refuses_to_close(self) -> None:
        async def refuse() -> AsyncGenerator[int, None]:
            with suppress(GeneratorExit):
                yield 1
            yield 2

        async def main() -> None:
            kept.append(refuse())
            await anext(kept[0])

        kept: list[AsyncGenerator[int, None]] = []
        with pytest.raises(LeakError, match="ignored GeneratorExit") as caught:
            run(main())
        assert len(caught.value.generators) == 1

    @any_loop
    def test_an_exception_that_nobody_retrieved(self, loop_factory: LoopFactory) -> None:
        class Owner:
            # The task, its exception, the traceback and the owner refer to each other in a circle:
            # asyncio would speak up only when the garbage collector comes by.
            def start(self) -> None:
                self.task = asyncio.create_task(self.work(), name="worker")

            async def work(self) -> None:
                raise error

        async def main() -> None:
            Owner().start()
            await asyncio.sleep(0.001)

        error = ValueError("unseen")
        gc.disable()
        try:
            with pytest.raises(LeakError, match=r"'worker'.*never retrieved.*unseen") as caught:
                run(main(), loop_factory=loop_factory)
        finally:
            gc.enable()
        assert caught.value.__cause__ is error

    def test_a_callback_that_fails(self) -> None:
        async def main() -> None:
            asyncio.get_running_loop().call_soon(int, "no number")
            await asyncio.sleep(0)

        with pytest.raises(LeakError, match="no number") as caught:
            run(main())
        assert isinstance(caught.value.__cause__, ValueError)

    def test_several_exceptions_come_as_a_group(self) -> None:
        async def main() -> None:
            loop = asyncio.get_running_loop()
            loop.call_soon(int, "first")
            loop.call_later(1, int, "second")
            await asyncio.sleep(2)

        with pytest.raises(LeakError, match=r"(?s)first.*second") as caught:
            run(main())
        assert isinstance(caught.value.__cause__, ExceptionGroup)
        assert len(caught.value.__cause__.exceptions) == 2

    def test_a_complaint_of_the_loop_without_an_exception(self) -> None:
        async def main() -> None:
            asyncio.get_running_loop().call_exception_handler({"message": "something is odd"})

        with pytest.raises(LeakError, match="something is odd") as caught:
            run(main())
        assert caught.value.errors == ["something is odd"]
        assert caught.value.__cause__ is None


class TestErrors:
    @any_loop
    def test_an_exception_of_the_main_coroutine_wins(self, loop_factory: LoopFactory) -> None:
        async def main() -> None:
            tasks.append(asyncio.create_task(asyncio.sleep(10)))
            await asyncio.sleep(0)
            raise ZeroDivisionError

        tasks: list[asyncio.Task[None]] = []
        with pytest.raises(ZeroDivisionError) as caught:
            run(main(), loop_factory=loop_factory)
        assert tasks[0].cancelled()
        assert not hasattr(caught.value, "__notes__")

    def test_exceptions_in_the_background_are_noted_on_it(self) -> None:
        async def main() -> None:
            task = asyncio.create_task(fail(ValueError("the reason")))
            await asyncio.sleep(0)
            assert task.cancelled()

        with pytest.raises(AssertionError) as caught:
            run(main())
        assert "the reason" in caught.value.__notes__[0]

    def test_cancelling_oneself_comes_out(self) -> None:
        async def main() -> None:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(1)

        with pytest.raises(asyncio.CancelledError):
            run(main())

    def test_exit_comes_out(self) -> None:
        async def main() -> None:
            raise SystemExit(3)

        with pytest.raises(SystemExit) as caught:
            run(main())
        assert not hasattr(caught.value, "__notes__")

    def test_a_deadlock_still_unwinds_the_tasks(self) -> None:
        async def main() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(5)
                unwound.append(True)

        unwound: list[bool] = []
        with pytest.raises(DeadlockError):
            run(main(), loop_factory=functools.partial(VirtualTimeLoop, grace=0.01))
        assert unwound
