"""An event loop whose clock jumps: an hour of `asyncio.sleep` takes no time and is exactly an hour.

`VirtualTimeLoop` is an ordinary asyncio loop in all but its clock. `time()` starts at 0.0 and
stands still while there is anything to run; when there is nothing, it jumps to the next timer. What
it promises:

- a timer runs when `time()` is exactly the moment it was set for, never a rounding error later;
- timers run in the order of their moments, and those of one moment in the order they were set;
- the clock waits for work given to an executor (`asyncio.to_thread`, `run_in_executor`), however
  long that takes in the world outside, also when whoever asked for the work was cancelled;
- when nothing in this thread can ever run again, it says so (`DeadlockError`) instead of hanging.

Four things it cannot help. Code must take its time from `loop.time()`: `time.monotonic()` goes on
as ever. A coroutine that polls (`while ...: await asyncio.sleep(0)`) is always ready, so the clock
never moves. A thread started by hand does not hold the clock; wait for it with `asyncio.to_thread`,
or set no timers meanwhile. And the network does not hold it either: sockets are polled before every
jump, and waited for once no timer is left, but a timeout set on a peer expires as soon as the peer
pauses. Test real sockets in real time.
"""

import asyncio
import gc
import heapq
import itertools
import math
import selectors
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType
from typing import Any, TypeVar, TypeVarTuple, Unpack

__all__ = [
    "DeadlockError",
    "VirtualTimeLoop",
    "describe_awaits",
    "describe_frame",
    "describe_task",
]

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

_FEWEST_TO_PRUNE = 64


class DeadlockError(RuntimeError):
    """Nothing in the loop can run again: no callback, no timer, no executor work, no socket.

    `tasks` describes each task that is waiting, and where.
    """

    def __init__(self, grace: float, tasks: list[str]) -> None:
        super().__init__(grace, tasks)
        self.grace = grace
        self.tasks = tasks

    def __str__(self) -> str:
        waiting = "\n".join(f"- {task}" for task in self.tasks) or "- no task"
        return (
            "nothing is ready, no timer is set, and no other thread called in "
            f"for {self.grace:g} s; waiting for ever:\n{waiting}"
        )


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop in virtual time; see the module's documentation.

    Args:
        grace: seconds of real time to wait for a call from another thread before a
            `DeadlockError`, when nothing else can happen.
    """

    def __init__(self, *, grace: float = 1.0) -> None:
        self._now = 0.0
        self._grace = grace
        # A heap. The count breaks ties, and keeps handles (which have no total order) uncompared.
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._count = itertools.count()
        self._prune_at = _FEWEST_TO_PRUNE
        self._thread: int | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._work: set[object] = set()
        # The one place where a loop waits is its selector.
        super().__init__(_VirtualSelector(self._patience, self._starved))

    def time(self) -> float:
        """Return the virtual time, in seconds since the loop was made."""
        return self._now

    def timers(self) -> list[asyncio.TimerHandle]:
        """Return the timers that are set and not cancelled, the next one first."""
        return [handle for _, _, handle in sorted(self._timers) if not handle.cancelled()]

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Set a timer for the virtual time `when`; one set for `math.inf` never runs."""
        if self.is_closed():
            raise RuntimeError("Event loop is closed")
        if self._thread not in (None, threading.get_ident()):
            raise RuntimeError("a timer was set from a thread that is not the event loop's")
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        if made_at := getattr(handle, "_source_traceback", None):
            del made_at[-1]  # This frame, as asyncio's own method does.
        if len(self._timers) >= self._prune_at:
            # A heap gives up its cancelled timers only at the top; long timeouts would pile up.
            self._timers = [timer for timer in self._timers if not timer[2].cancelled()]
            heapq.heapify(self._timers)
            self._prune_at = max(_FEWEST_TO_PRUNE, 2 * len(self._timers))
        heapq.heappush(self._timers, (when, next(self._count), handle))
        return handle

    def run_forever(self) -> None:
        """Run until `stop()` is called."""
        self._thread = threading.get_ident()
        try:
            super().run_forever()
        finally:
            self._thread = None

    def set_default_executor(  # type: ignore[override]
        self, executor: ThreadPoolExecutor
    ) -> None:
        """Set the executor for `run_in_executor(None, ...)` and `asyncio.to_thread`."""
        super().set_default_executor(executor)
        self._threads = executor

    def run_in_executor(
        self,
        executor: Executor | None,
        func: Callable[[Unpack[_Ts]], _T],
        *args: *_Ts,
    ) -> asyncio.Future[_T]:
        """Run `func` in an executor; the clock stands still until it has returned."""
        if executor is None:
            if self._threads is None:
                self.set_default_executor(ThreadPoolExecutor(thread_name_prefix="virtual_time"))
            executor = self._threads
            assert executor is not None
        work = executor.submit(func, *args)
        self._work.add(work)
        future = asyncio.wrap_future(work, loop=self)
        # After wrap_future's own callback: once this one runs, the result is in the loop.
        work.add_done_callback(self._work_ended)
        return future

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Wait for the default executor's threads to end, however long that takes."""
        self._work.add(self)
        try:
            await super().shutdown_default_executor()
        finally:
            self._work.discard(self)

    def _work_ended(self, work: Future[Any]) -> None:
        # In the worker's thread, perhaps after the loop was closed.
        with suppress(RuntimeError):
            self.call_soon_threadsafe(self._work.discard, work)

    def _patience(self, busy: bool, descriptors: int) -> float | None:
        """Move the clock if nothing else can happen; return real seconds to wait (None: any)."""
        if self._release() or busy:
            return 0
        if self._work:
            return None
        if self._timers and (next_time := self._timers[0][0]) < math.inf:
            self._now = next_time
            self._release()
            return 0
        # One descriptor is the loop's own, to be woken by.
        return None if descriptors > 1 else self._grace

    def _release(self) -> bool:
        """Hand the timers that are due to the loop; tell whether there were any."""
        timers, any_due = self._timers, False
        while timers and (timers[0][0] <= self._now or timers[0][2].cancelled()):
            handle = heapq.heappop(timers)[2]
            if not handle.cancelled():
                self.call_soon(_run_timer, handle)
                any_due = True
        return any_due

    def _starved(self) -> None:
        raise DeadlockError(self._grace, [describe_task(task) for task in asyncio.all_tasks(self)])


def _run_timer(handle: asyncio.TimerHandle) -> None:
    # Another timer of the same moment may have cancelled this one.
    if not handle.cancelled():
        handle._run()


class _VirtualSelector(selectors.DefaultSelector):
    """A selector that asks how long it may really wait."""

    def __init__(
        self, patience: Callable[[bool, int], float | None], starved: Callable[[], None]
    ) -> None:
        super().__init__()
        self._patience = patience
        self._starved = starved

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # The loop's own timers are never used, so it asks for 0 (something is ready) or None.
        events = super().select(0)
        patience = self._patience(timeout == 0 or bool(events), len(self.get_map()))
        if patience == 0:
            return events
        events = super().select(patience)
        if not events and patience is not None:
            self._starved()
        return events


def describe_task(task: asyncio.Task[Any]) -> str:
    """Return a task's name and the chain of awaits it is suspended at, outermost first."""
    return f"task {task.get_name()!r}: {describe_awaits(task.get_coro())}"


def describe_awaits(awaitable: object) -> str:
    """Return where a suspended coroutine waits, through the coroutines that it awaits."""
    steps, awaited = [], awaitable
    while awaited is not None:
        frame, awaited = _suspension(awaited)
        if frame is not None:
            steps.append(describe_frame(frame))
    return " -> ".join(steps) or repr(awaitable)


def _suspension(awaitable: object) -> tuple[FrameType | None, object]:
    """Return the frame of something awaited, and what that awaits in turn."""
    match awaitable:
        case CoroutineType():
            return awaitable.cr_frame, awaitable.cr_await
        case GeneratorType():
            return awaitable.gi_frame, awaitable.gi_yieldfrom
        case AsyncGeneratorType():
            return awaitable.ag_frame, awaitable.ag_await
    # What anext() and aclose() return tells nobody but the collector which generator it drives.
    inside = (each for each in gc.get_referents(awaitable) if isinstance(each, AsyncGeneratorType))
    return None, next(inside, None)


def describe_frame(frame: FrameType) -> str:
    """Return a frame's function, file and line."""
    return f"{frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})"
