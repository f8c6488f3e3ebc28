"""Running a coroutine to its end and proving that it left nothing behind.

`run` is `asyncio.run` for tests: in virtual time unless told otherwise, and strict about endings.
A coroutine that returns while something of its making goes on has a leak, and gets a `LeakError`
that names each thing it left: a task that is still pending, a timer that is still set, an async
generator that is still open, or an exception that nobody looked at. All of them are cancelled,
closed and waited for first, so that one test's leak is never another test's failure.
"""

import asyncio
import sys
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from .virtual_time import VirtualTimeLoop, describe_frame, describe_task

__all__ = ["LeakError", "Run", "run"]

_T = TypeVar("_T")

_PATIENCE = 10.0  # seconds of the loop's time for what was left behind to end when cancelled
_STUCK = f"still running after {_PATIENCE:g} s"
_GENERATIONS = 3  # tasks left behind, those that these start when cancelled, and theirs


class LeakError(AssertionError):
    """A coroutine returned and left something behind.

    Attributes:
        tasks: each pending task, with its name and where it waits.
        timers: each timer still set.
        generators: each async generator still open, with where it is suspended.
        errors: each exception that nobody retrieved or handled, and complaints of the loop that
            came without one.
    """

    def __init__(
        self,
        tasks: list[str],
        timers: list[str],
        generators: list[str],
        errors: list[str],
    ) -> None:
        super().__init__(tasks, timers, generators, errors)
        self.tasks = tasks
        self.timers = timers
        self.generators = generators
        self.errors = errors

    def __str__(self) -> str:
        found = [*self.tasks, *self.timers, *self.generators, *self.errors]
        return "left behind:" + "".join(f"\n- {line}" for line in found)


class Run(Protocol):
    """What runs a coroutine to its end: `run`, or a function like it."""

    def __call__(self, main: Coroutine[Any, Any, _T], /) -> _T:
        """Run the coroutine and return its result."""
        ...


def run(
    main: Coroutine[Any, Any, _T],
    *,
    debug: bool = True,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = VirtualTimeLoop,
) -> _T:
    """Run a coroutine in a loop of its own, check that it left nothing behind, return its result.

    An async generator that was dropped half-way (a `break` in `async for`) is closed by the loop,
    as asyncio always does, and is not a leak; one that something still refers to is. Timers can
    be checked in virtual time only.

    Args:
        main: what to run. If it raises, that exception comes out and leaks are not reported;
            exceptions that nobody retrieved are added to it as notes.
        debug: asyncio's debug mode.
        loop_factory: makes the loop; `asyncio.new_event_loop` for real time.

    Raises:
        LeakError: it returned, and left something behind.
        DeadlockError: nothing could ever happen again (virtual time only).
        RuntimeError: called where a loop is running.
    """
    if asyncio._get_running_loop() is not None:
        main.close()
        raise RuntimeError("run() cannot be called while an event loop is running in this thread")
    loop = loop_factory()
    try:
        loop.set_debug(debug)
        watch = _Watch(loop)
        task = loop.create_task(watch.until_end_of(main), name="main")
        try:
            result = loop.run_until_complete(task)
        except BaseException as error:
            for line in watch.clean_up().errors:
                error.add_note(f"left behind: {line}")
            raise
        leaks = watch.clean_up()
        if any(leaks.args):
            raise leaks from watch.cause
        return result
    finally:
        loop.close()


class _Watch:
    """What a loop starts, remembered without keeping it alive."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._tasks: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        self._generators: weakref.WeakSet[Any] = weakref.WeakSet()
        self._closing: dict[asyncio.Task[Any], str] = {}
        self._left: dict[asyncio.Task[Any], str] = {}
        self._stuck: set[asyncio.Task[Any]] = set()
        self._timers: list[asyncio.TimerHandle] = []
        self._complaints: list[str] = []
        self._errors: list[BaseException] = []
        loop.set_exception_handler(self._complain)
        loop.set_task_factory(self._make_task)
        loop.call_soon(self._watch_generators)

    @property
    def cause(self) -> BaseException | None:
        """The exception that nobody handled; a group where there are several."""
        if len(self._errors) > 1:
            return BaseExceptionGroup("nobody handled", self._errors)
        return self._errors[0] if self._errors else None

    async def until_end_of(self, main: Coroutine[Any, Any, _T]) -> _T:
        """Run `main`, and see what is there when it ends.

        Not a moment later: in the turn that the loop takes to stop, a task could end that `main`
        did not wait for.
        """
        try:
            return await main
        finally:
            for task in asyncio.all_tasks() - {asyncio.current_task(), *self._closing}:
                self._left[task] = describe_task(task)
            if isinstance(self._loop, VirtualTimeLoop):
                self._timers = self._loop.timers()

    def clean_up(self) -> LeakError:
        """End all that is left, let the loop go, and return what was found."""
        self._loop.set_debug(False)  # Debugging the clean-up would take longer than most tests.
        leaks = self._loop.run_until_complete(self._clean_up())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.set_exception_handler(None)
        return leaks

    async def _clean_up(self) -> LeakError:
        self._watch_generators()
        cancelled: set[asyncio.Task[Any]] = set()
        for _ in range(_GENERATIONS):
            running = asyncio.all_tasks() - {asyncio.current_task(), *self._closing, *cancelled}
            for task in running:
                self._left.setdefault(task, describe_task(task))
                task.cancel()
            cancelled |= running
            await self._wait_for(running)
        generators = [f"{line}, {_STUCK}" for line in self._closing.values()]
        for generator in list(self._generators):
            if generator.ag_frame is not None:
                generators.append(f"async generator {describe_frame(generator.ag_frame)}")
                self._close(generator)
        await self._wait_for(set())
        for task in list(self._tasks):
            # asyncio says this when the task is collected, which may be long after the test.
            if task.done() and task._log_traceback:
                message = f"exception of task {task.get_name()!r} was never retrieved"
                context = {"message": message, "exception": task.exception()}
                self._complain(self._loop, context)
        return LeakError(
            [
                f"{line}, {_STUCK}" if task in self._stuck else line
                for task, line in self._left.items()
            ],
            [repr(timer) for timer in self._timers if not timer.cancelled()],
            generators,
            list(self._complaints),
        )

    async def _wait_for(self, tasks: set[asyncio.Task[Any]]) -> None:
        """Wait for tasks and closing generators to end, for as long as any of them gets there."""
        await asyncio.sleep(0)
        while (
            ending := {task for task in (*tasks, *self._closing) if not task.done()} - self._stuck
        ):
            ended, _ = await asyncio.wait(ending, timeout=_PATIENCE)
            if not ended:
                self._stuck |= ending

    def _complain(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self._complaints.append(context["message"] + (f": {error!r}" if error else ""))
        if error is not None:
            self._errors.append(error)

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any
    ) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, **options)
        self._tasks.add(task)
        return task

    def _watch_generators(self) -> None:
        # In the loop, which has set its own hooks by now and takes them away when it stops.
        first = sys.get_asyncgen_hooks().firstiter
        assert first is not None

        def started(generator: AsyncGenerator[Any, Any]) -> None:
            self._generators.add(generator)
            first(generator)

        sys.set_asyncgen_hooks(started, self._dropped)

    def _dropped(self, generator: AsyncGenerator[Any, Any]) -> None:
        # Called by the garbage collector, in any thread.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._close, generator)

    def _close(self, generator: Any) -> None:
        task = self._loop.create_task(generator.aclose())
        self._closing[task] = f"closing of async generator {generator.__qualname__}"
        task.add_done_callback(self._closing.pop)
