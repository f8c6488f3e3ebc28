"""Running an async function over queued items: one at a time, in order, on one event loop.

The task exists only while there are items. Nothing idles, so nothing is left over when an event
loop ends, and items that come later start a task on a loop that runs then.
"""

import asyncio
import contextvars
import functools
import inspect
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Generator
from contextlib import suppress
from typing import Any, Generic, TypeVar, cast

from ..subscribers import SubscriberQueue
from ..wakeups import Waiters, running_loop, wait_until, wake_all
from .tasks import hold, release

__all__ = ["SerialRunner", "Unfinished", "close_unstarted", "is_async", "is_cancellation"]

T = TypeVar("T")

_TURN = 64
"""Items after which everybody else on the event loop gets a turn."""


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling this gives a coroutine, as far as can be told without calling it."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  (an instance with async __call__)
    )


def is_cancellation(error: BaseException) -> bool:
    """Whether an error is the cancellation of this very task, and not of what it waited for."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


class Unfinished(Awaitable[None]):
    """What is left to do with an item: to await this, and perhaps more. Itself to be awaited.

    It can stand in a runner's queue in the place of the item.
    """

    def __init__(self, awaitable: Awaitable[Any]) -> None:
        self.awaitable = awaitable

    @abstractmethod
    async def _finish(self) -> None:
        """Await the awaitable, and do the rest."""

    def __await__(self) -> Generator[Any, None, None]:
        return self._finish().__await__()


def close_unstarted(item: object) -> None:
    """Close a coroutine that nobody will await; anything else is left as it is."""
    if isinstance(item, Unfinished):
        item = item.awaitable
    if inspect.iscoroutine(item) and inspect.getcoroutinestate(item) == inspect.CORO_CREATED:
        item.close()


def _cancel(future: "asyncio.Future[Any]") -> None:
    """Cancel a future or task. From any thread."""
    loop = future.get_loop()
    if loop is running_loop():
        future.cancel()
    else:
        with suppress(RuntimeError):  # it is closed, and nothing goes on in it
            loop.call_soon_threadsafe(future.cancel)


# The runner in whose function the code runs now. Tasks that a function starts inherit it.
_current: contextvars.ContextVar["SerialRunner[Any] | None"] = contextvars.ContextVar(
    "codomyrmex_streaming_runner", default=None
)


class SerialRunner(Generic[T]):
    """Calls a function with each item of a queue, and awaits what it returns.

    Args:
        function: is called with an item; an awaitable it returns is awaited.
        queue: where the items come from; `feed` adds one.
        owner: on whose behalf it runs: see `runs_for`.
        on_failure: is called with the item when the function raises, inside the ``except``.
        loop: the event loop to run on; None: the one that runs now. If it is closed when an item
            comes, the runner moves to the loop that the item came from.
        on_end: is called when no further item can come: the runner has been stopped and its
            function has returned, or the queue has ended and all of it has been handled.
        tells_losses: call the function also with the control events of the queue, in the places
            of what was lost.
    """

    __slots__ = (
        "_context",
        "_era",
        "_handled",
        "_handled_too",
        "_idle",
        "_on_end",
        "_on_failure",
        "_scheduled",
        "_take",
        "_task",
        "busy",
        "function",
        "loop",
        "owner",
        "queue",
        "stopped",
    )

    def __init__(
        self,
        function: Callable[[T], Any],
        queue: SubscriberQueue[T],
        owner: object,
        on_failure: Callable[[T], None],
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        on_end: Callable[[], object] | None = None,
        tells_losses: bool = False,
    ) -> None:
        self.function = function
        self.queue = queue
        self.owner = owner
        self.busy = False
        self.stopped = False
        self.loop = running_loop() if loop is None else loop
        self._on_failure = on_failure
        self._on_end = on_end
        self._take = self._take_with_losses if tells_losses else queue.get_nowait
        self._handled = 0
        self._handled_too = 0  # once the item that is being handled has been
        self._era = 0
        self._scheduled = False
        self._task: asyncio.Task[None] | None = None
        self._idle: Waiters = []
        # What the function runs in: the context of now, but not as part of another runner.
        self._context = contextvars.copy_context()
        self._context.run(_current.set, self)

    @staticmethod
    def runs_for(owner: object) -> bool:
        """Whether the code that asks was called, directly or not, by a runner of `owner`."""
        runner = _current.get()
        return runner is not None and runner.owner is owner and runner.busy

    @property
    def runs_here(self) -> bool:
        """Whether the code that asks was called, directly or not, by this runner."""
        return self.busy and _current.get() is self

    @property
    def has_work(self) -> bool:
        """Whether an item is being handled, or waits for it."""
        return self.busy or not self.queue.empty()

    @property
    def has_ended(self) -> bool:
        """Whether it has been stopped, and its function has returned."""
        return self.stopped and self._task is None

    def feed(self, item: T) -> None:
        """Queue an item, as the queue's policy says, to be handled. From any thread."""
        self.queue.feed(item)
        if not self._scheduled or self.loop is None or self.loop.is_closed():
            self.start()

    def move_to(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run on this loop, which runs here, from the next item on, unless another is at work."""
        if not self._scheduled or self.loop is None or self.loop.is_closed():
            self.leave_loop()
            self.loop = loop

    def claim(self) -> bool:
        """Keep the task from starting, so that `handle_now` may handle an item.

        False: it is not on its loop that this is called, or other items come first.
        """
        loop = self.loop
        if (
            self._scheduled
            or self.stopped
            or loop is None
            or loop is not running_loop()
            or not self.queue.empty()
        ):
            return False
        self._scheduled = True
        return True

    def handle_now(self, item: T) -> None:
        """Handle an item, which never stands in the queue, before this returns. After `claim`.

        If the function returns an awaitable, that takes the item's place, at the head of the queue.
        """
        self._handled -= 1  # until it has been: see drain
        self.busy = True
        awaitable = None
        try:
            result = self._context.run(self.function, item)
            if result is not None and inspect.isawaitable(result):
                awaitable = result
        except (Exception, asyncio.CancelledError):
            self._on_failure(item)
        finally:
            if awaitable is None:
                self._one_is_done()
            else:
                self.busy = False
                self.queue.put_back(cast("T", awaitable))
            self._scheduled = False
            self._rest()

    def start(self) -> None:
        """See to it that what is in the queue gets handled. From any thread."""
        loop = self.loop
        if self._scheduled and loop is not None and not loop.is_closed():
            return
        running = running_loop()
        if loop is None or loop.is_closed():
            if running is None:
                return  # it waits in the queue for a publisher, or a drain, that has a loop
            self.leave_loop()
            self.loop = loop = running
        self._scheduled = True
        if loop is running:
            self._begin()
            return
        try:
            loop.call_soon_threadsafe(self._begin)
        except RuntimeError:  # closed just now
            self._scheduled = False
            if running is not None:
                self.start()

    def _begin(self) -> None:
        """Start the task, unless another thread's call has done so. On the runner's loop."""
        if self._task is not None:
            return
        if self.stopped:
            self._scheduled = False
            return
        assert self.loop is not None
        self._task = self.loop.create_task(
            self._run(self._era), name="codomyrmex-streaming handler", context=self._context
        )
        hold(self._task)
        self._task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        release(task)
        self._task = None
        self._scheduled = False
        # Asyncio lets KeyboardInterrupt and SystemExit out of the loop; nothing else comes here.
        # But an interrupted task belongs to a loop that is about to end: its items wait for the
        # next one.
        self._rest(goes_on=not task.cancelled() and task.exception() is None)

    def _rest(self, *, goes_on: bool = True) -> None:
        """Nothing is being handled now. But an item may have come after the last look."""
        over = self.stopped or self.queue.ended
        if not self.stopped and not self.queue.empty():
            over = False
            if goes_on:
                self.start()
        if over and self._on_end is not None:
            self._on_end()
        wake_all(self._idle)

    async def _run(self, era: int) -> None:
        take = self._take
        count = 0
        while not self.stopped:
            try:
                item = take()
            except asyncio.QueueEmpty:
                break
            self.busy = True
            try:
                result = self.function(item)
                if result is not None and inspect.isawaitable(result):
                    await result
            except (KeyboardInterrupt, SystemExit, GeneratorExit):
                raise
            except BaseException as error:
                if is_cancellation(error):
                    raise
                self._on_failure(item)
            finally:
                # Unless this was left for dead, and is now collected.
                if era == self._era:  # pragma: no branch - that is on the way out
                    self._one_is_done()
            count += 1
            # The function may never wait, and bring about new items. After the last, it is the end.
            if count % _TURN == 0 and not self.queue.empty():
                await asyncio.sleep(0)

    def take_more(self, most: int) -> list[T]:
        """More items from the queue, for a function that handles several at a time."""
        items = self.queue.take(most)
        self._handled_too += len(items)
        return items

    def _one_is_done(self) -> None:
        self.busy = False
        self._handled += 1 + self._handled_too
        self._handled_too = 0
        if self._idle:
            wake_all(self._idle)

    def _take_with_losses(self) -> T:
        loss = self.queue.due_loss()
        if loss is None:
            return self.queue.get_nowait()
        self._handled -= 1  # it was never received
        return cast("T", loss)

    def stop(self) -> None:
        """Handle no further item. One that is being handled now is not interrupted."""
        self.stopped = True
        self.queue.end()
        for item in self.queue.snapshot():
            close_unstarted(item)
        self.queue.clear()
        wake_all(self._idle)

    def cancel(self) -> None:
        """`stop`, and interrupt an item that is being handled, unless that asks for this.

        Tasks that wait in the queue are cancelled as well.
        """
        for item in self.queue.snapshot():
            future = item.awaitable if isinstance(item, Unfinished) else item
            if isinstance(future, asyncio.Future):
                _cancel(future)
        self.stop()
        if self._task is not None and not self.runs_here:
            _cancel(self._task)

    def leave_loop(self) -> None:
        """Forget the event loop, which will not run again here: the next item brings one.

        A task that the loop has not ended never will end; the item it was at is lost with it.
        """
        self.loop = None
        self._task = None
        self._scheduled = False
        self._era += 1
        if self.busy:
            self._one_is_done()

    async def drain(self) -> None:
        """Wait until everything that is in the queue now has been handled or dropped."""
        target = self.queue.received

        def drained() -> bool:
            return self.stopped or self._handled + self.queue.evicted >= target

        while not drained():
            self.start()
            await wait_until(self._idle, drained)

    async def finish(self) -> None:
        """Wait until no item is being handled any more, unless by whoever calls this."""
        while not self._has_finished():
            await wait_until(self._idle, self._has_finished)

    def _has_finished(self) -> bool:
        return (
            self._task is None or self.runs_here or self.loop is None or not self.loop.is_running()
        )
