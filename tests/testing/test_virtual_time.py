import asyncio
import functools
import math
import re
import socket
import threading
import time
from collections.abc import AsyncGenerator, Coroutine, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest

from codomyrmex.events.streaming.testing import DeadlockError, VirtualTimeLoop, run

impatient = functools.partial(VirtualTimeLoop, grace=0.02)


def now() -> float:
    return asyncio.get_running_loop().time()


async def for_ever() -> None:
    await asyncio.Event().wait()


class TestClock:
    def test_starts_at_zero_and_stands_still_while_there_is_work(self) -> None:
        async def main() -> list[float]:
            times = [now()]
            for _ in range(100):
                await asyncio.sleep(0)
            return [*times, now()]

        assert run(main()) == [0.0, 0.0]

    def test_an_hour_takes_no_time_and_is_exactly_an_hour(self) -> None:
        async def main() -> list[float]:
            times = []
            for seconds in (30, 3600, 0.1, 1e-12, 1e6):
                await asyncio.sleep(seconds)
                times.append(now())
            return times

        start = time.monotonic()
        expected, moment = [], 0.0
        for seconds in (30, 3600, 0.1, 1e-12, 1e6):
            moment += seconds
            expected.append(moment)
        assert run(main()) == expected
        assert time.monotonic() - start < 1

    def test_timeouts_and_heartbeats_are_exact(self) -> None:
        async def main() -> tuple[list[float], float]:
            beats = []

            async def beat() -> None:
                while True:
                    await asyncio.sleep(30)
                    beats.append(now())

            with pytest.raises(TimeoutError):
                async with asyncio.timeout(100):
                    await beat()
            return beats, now()

        assert run(main()) == ([30.0, 60.0, 90.0], 100.0)

    def test_a_timer_in_the_past_runs_at_once_and_does_not_turn_the_clock_back(self) -> None:
        async def main() -> float:
            await asyncio.sleep(10)
            ran = asyncio.Event()
            asyncio.get_running_loop().call_at(3, ran.set)
            await ran.wait()
            return now()

        assert run(main()) == 10.0

    def test_works_under_asyncios_own_runner(self) -> None:
        async def main() -> float:
            await asyncio.to_thread(lambda: None)
            await asyncio.sleep(30)
            return now()

        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            assert runner.run(main()) == 30.0


class TestTimers:
    def test_run_in_order_of_their_moments_and_ties_as_they_were_set(self) -> None:
        async def main() -> list[tuple[str, float]]:
            loop = asyncio.get_running_loop()
            ran: list[tuple[str, float]] = []

            def note(name: str) -> None:
                ran.append((name, now()))

            for moment in (2.0, 1.0):
                for name in "abcdefgh":
                    loop.call_at(moment, note, name)
            await asyncio.sleep(2)
            return ran

        assert run(main()) == [(name, moment) for moment in (1.0, 2.0) for name in "abcdefgh"]

    def test_of_moments_a_hair_apart_do_not_run_together(self) -> None:
        async def main() -> list[float]:
            loop = asyncio.get_running_loop()
            times: list[float] = []
            later = math.nextafter(1.0, 2.0)
            loop.call_at(later, lambda: times.append(now()))
            loop.call_at(1.0, lambda: times.append(now()))
            await asyncio.sleep(1.5)
            return times

        assert run(main()) == [1.0, math.nextafter(1.0, 2.0)]

    def test_a_cancelled_one_does_not_run_nor_move_the_clock(self) -> None:
        async def main() -> float:
            asyncio.get_running_loop().call_later(1, pytest.fail, "it was cancelled").cancel()
            await asyncio.sleep(2)
            asyncio.get_running_loop().call_later(1, pytest.fail, "it was cancelled").cancel()
            await asyncio.to_thread(time.sleep, 0.01)
            return now()

        assert run(main()) == 2.0

    def test_one_can_cancel_another_of_the_same_moment(self) -> None:
        async def main() -> None:
            loop = asyncio.get_running_loop()
            timers: list[asyncio.TimerHandle] = []

            def cancel_the_next() -> None:
                timers[0].cancel()

            loop.call_later(1, cancel_the_next)
            timers.append(loop.call_later(1, pytest.fail, "it was cancelled"))
            await asyncio.sleep(2)

        run(main())

    def test_due_ones_run_while_the_loop_is_busy(self) -> None:
        async def main() -> int:
            ran = asyncio.Event()
            asyncio.get_running_loop().call_later(0, ran.set)
            turns = 0
            while not ran.is_set():
                await asyncio.sleep(0)
                turns += 1
            return turns

        assert run(main()) < 5

    def test_many_cancelled_ones_leave_the_others_in_order(self) -> None:
        async def main() -> list[float]:
            loop = asyncio.get_running_loop()
            times: list[float] = []
            for number in range(1000):
                timer = loop.call_at(1000 - number, lambda: times.append(now()))
                if number % 100:
                    timer.cancel()
            await asyncio.sleep(2000)
            return times

        assert run(main()) == [100.0 * n for n in range(1, 11)]

    def test_that_are_set_are_told(self) -> None:
        async def main() -> list[float]:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualTimeLoop)
            timers = [loop.call_later(delay, print) for delay in (3, 1, 2)]
            timers[2].cancel()
            moments = [timer.when() for timer in loop.timers()]
            for timer in timers:
                timer.cancel()
            assert loop.timers() == []
            return moments

        assert run(main()) == [1.0, 3.0]

    def test_tell_where_they_were_set(self) -> None:
        async def main() -> str:
            timer = asyncio.get_running_loop().call_later(1, print)
            text = repr(timer)
            timer.cancel()
            return text

        assert f"created at {__file__}" in run(main())
        assert "created at" not in run(main(), debug=False)

    def test_carry_a_context(self) -> None:
        import contextvars

        variable = contextvars.ContextVar("variable", default="default")

        async def main() -> list[str]:
            seen: list[str] = []
            context = contextvars.copy_context()
            context.run(variable.set, "given")
            loop = asyncio.get_running_loop()
            loop.call_later(1, lambda: seen.append(variable.get()), context=context)
            variable.set("current")
            loop.call_later(2, lambda: seen.append(variable.get()))
            await asyncio.sleep(3)
            return seen

        assert run(main()) == ["given", "current"]

    def test_cannot_be_set_from_another_thread(self) -> None:
        async def main() -> None:
            loop = asyncio.get_running_loop()
            with pytest.raises(RuntimeError, match="thread"):
                await asyncio.to_thread(loop.call_later, 1, print)

        run(main())

    def test_can_be_set_while_the_loop_does_not_run(self) -> None:
        loop = VirtualTimeLoop()
        loop.call_later(5, loop.stop)
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        thread.join()
        assert loop.time() == 5.0
        loop.call_later(5, loop.stop)
        loop.run_forever()
        assert loop.time() == 10.0
        loop.close()

    def test_cannot_be_set_in_a_closed_loop(self) -> None:
        loop = VirtualTimeLoop()
        loop.close()
        with pytest.raises(RuntimeError, match="closed"):
            loop.call_later(1, print)


class TestThreads:
    def test_the_clock_waits_for_the_executor(self) -> None:
        async def main() -> tuple[float, list[str]]:
            order = []

            async def work() -> None:
                await asyncio.to_thread(time.sleep, 0.1)
                order.append(f"worked at {now():g}")

            async def wait() -> None:
                await asyncio.sleep(0.001)
                order.append(f"slept until {now():g}")

            await asyncio.gather(wait(), work())
            return now(), order

        assert run(main()) == (0.001, ["worked at 0", "slept until 0.001"])

    def test_the_clock_waits_for_work_whose_asker_was_cancelled(self) -> None:
        async def main() -> None:
            ended = threading.Event()

            def work() -> None:
                started.set()
                time.sleep(0.1)
                ended.set()

            started = threading.Event()
            task = asyncio.create_task(asyncio.to_thread(work))
            await asyncio.to_thread(started.wait)
            task.cancel()
            await asyncio.sleep(1)
            assert ended.is_set()
            with pytest.raises(asyncio.CancelledError):
                await task

        run(main())

    def test_the_clock_waits_for_work_in_an_executor_of_ones_own(self) -> None:
        async def main() -> float:
            loop = asyncio.get_running_loop()
            with ThreadPoolExecutor(1) as executor:
                work = loop.run_in_executor(executor, time.sleep, 0.1)
                async with asyncio.timeout(0.01):
                    await work
            return now()

        assert run(main()) == 0.0

    def test_a_default_executor_can_be_set(self) -> None:
        async def main() -> str:
            loop = asyncio.get_running_loop()
            loop.set_default_executor(ThreadPoolExecutor(1, thread_name_prefix="mine"))
            return await asyncio.to_thread(lambda: threading.current_thread().name)

        assert run(main()).startswith("mine")

    def test_an_error_in_a_thread_arrives(self) -> None:
        async def main() -> None:
            with pytest.raises(ZeroDivisionError):
                await asyncio.to_thread(lambda: 1 / 0)

        run(main())

    def test_work_may_end_after_the_loop_is_closed(self, caplog: pytest.LogCaptureFixture) -> None:
        def work() -> None:
            started.set()
            released.wait()

        async def main() -> None:
            future = asyncio.get_running_loop().run_in_executor(executor, work)
            await asyncio.to_thread(started.wait)
            future.cancel()

        started, released = threading.Event(), threading.Event()
        with ThreadPoolExecutor(1) as executor:
            run(main())
            released.set()
        assert not caplog.records

    def test_work_given_to_the_default_executor_directly_is_waited_for(self) -> None:
        async def main() -> None:
            executor = ThreadPoolExecutor(1)
            asyncio.get_running_loop().set_default_executor(executor)
            work.append(executor.submit(time.sleep, 0.2))

        work: list[Future[None]] = []
        run(main(), loop_factory=impatient)
        assert work[0].done()

    def test_another_thread_can_wake_the_loop(self) -> None:
        async def main() -> str:
            loop = asyncio.get_running_loop()
            woken: asyncio.Future[str] = loop.create_future()

            def call() -> None:
                time.sleep(0.1)
                loop.call_soon_threadsafe(woken.set_result, "woken")

            thread = threading.Thread(target=call)
            thread.start()
            result = await woken
            thread.join()
            return result

        assert run(main()) == "woken"


class TestSockets:
    def test_are_polled_before_the_clock_jumps(self) -> None:
        async def main() -> tuple[bytes, float]:
            loop = asyncio.get_running_loop()
            here, there = socket.socketpair()
            with here, there:
                here.setblocking(False)
                receiving = asyncio.create_task(loop.sock_recv(here, 10))
                await asyncio.sleep(0)
                there.send(b"hello")
                async with asyncio.timeout(1):
                    return await receiving, now()

        assert run(main()) == (b"hello", 0.0)

    def test_are_waited_for_when_no_timer_is_set(self) -> None:
        async def main() -> bytes:
            loop = asyncio.get_running_loop()
            here, there = socket.socketpair()
            with here, there:
                here.setblocking(False)
                thread = threading.Timer(0.1, there.send, [b"late"])
                thread.start()
                received = await loop.sock_recv(here, 10)
                thread.join()
                return received

        assert run(main(), loop_factory=impatient) == b"late"

    def test_do_not_hold_the_clock(self) -> None:
        async def main() -> float:
            loop = asyncio.get_running_loop()
            here, there = socket.socketpair()
            with here, there:
                here.setblocking(False)
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(3600):
                        await loop.sock_recv(here, 10)
            return now()

        assert run(main()) == 3600.0


class TestDeadlock:
    def test_names_the_tasks_and_where_they_wait(self) -> None:
        async def main() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(for_ever(), name="the culprit")

        with pytest.raises(DeadlockError) as caught:
            run(main(), loop_factory=impatient)
        message = str(caught.value)
        assert "the culprit" in message
        assert "for_ever" in message
        assert "Event.wait" in message
        assert __file__ in message
        assert len(caught.value.tasks) == 2
        assert caught.value.grace == 0.02

    def test_a_timer_set_for_infinity_does_not_count(self) -> None:
        with pytest.raises(DeadlockError, match="sleep"):
            run(asyncio.sleep(math.inf), loop_factory=impatient)

    def test_is_not_declared_while_another_thread_may_call(self) -> None:
        async def main() -> None:
            woken = asyncio.Event()
            loop = asyncio.get_running_loop()
            thread = threading.Timer(0.2, loop.call_soon_threadsafe, [woken.set])
            thread.start()
            await woken.wait()
            thread.join()

        run(main(), loop_factory=functools.partial(VirtualTimeLoop, grace=5))

    def test_of_a_loop_without_tasks(self) -> None:
        loop = impatient()
        with pytest.raises(DeadlockError, match="no task"):
            loop.run_forever()
        loop.close()

    def test_follows_the_awaits_through_generators(self) -> None:
        async def naturals() -> AsyncGenerator[int, None]:
            try:
                yield 0
            except GeneratorExit:
                await for_ever()
            await for_ever()

        @asynccontextmanager
        async def context() -> AsyncGenerator[None, None]:
            async for _ in naturals():
                continue
            yield

        async def iterate() -> None:
            async with context():
                pytest.fail("it never gets there")

        async def main() -> None:
            generator = naturals()
            await anext(generator)
            task = asyncio.create_task(iterate(), name="iterating")
            await asyncio.create_task(generator.aclose(), name="closing")
            await task

        with pytest.raises(DeadlockError) as caught:
            run(main(), loop_factory=impatient)
        message = str(caught.value)
        assert re.search("'closing': .*naturals .*for_ever .*Event.wait", message)
        assert re.search(
            "'iterating': .*iterate .*context .*naturals .*for_ever .*Event.wait", message
        )

    def test_describes_a_coroutine_it_cannot_look_into(self) -> None:
        class Opaque(Coroutine[Any, Any, None]):
            def __init__(self) -> None:
                self.awaited = asyncio.get_running_loop().create_future().__await__()

            def __await__(self) -> Generator[Any, Any, None]:
                return self.awaited

            def send(self, value: object, /) -> Any:
                return next(self.awaited)

            def throw(self, *args: Any) -> Any:
                return self.awaited.throw(*args)

            def close(self) -> None:
                self.awaited.close()

        async def main() -> None:
            await asyncio.create_task(Opaque(), name="opaque")

        with pytest.raises(DeadlockError, match=r"'opaque': <.*Opaque object"):
            run(main(), loop_factory=impatient)
