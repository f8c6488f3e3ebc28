"""Faults on purpose: a cancellation at every await, and a socket that stalls, fails or is slow.

`cancel_at_every_await` answers one question about a piece of code: does it stay whole wherever it
is cancelled? `FaultySocket` stands where a WebSocket would, in tests of code that sends to many.
"""

import asyncio
import inspect
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Literal

from .leaks import Run
from .leaks import run as run_in_virtual_time
from .virtual_time import describe_awaits

__all__ = ["FaultySocket", "cancel_at_every_await"]

_Moment = Literal["while it waits", "as its result arrives"]


def cancel_at_every_await(
    factory: Callable[[], Coroutine[Any, Any, object]],
    *,
    check: Callable[[], object] | None = None,
    run: Run = run_in_virtual_time,
    limit: int = 1000,
) -> int:
    """Run a scenario once for every place it can be cancelled at, and cancel it there.

    A place is a suspension: an await that really waits. Each is tried at two moments: while it
    waits, and as the result it waited for arrives, when a careless receiver loses an item. A run
    must end by `CancelledError` or as if nothing had happened, and leave nothing behind.

    Args:
        factory: makes the coroutine of one run. Only the task that runs it is cancelled.
        check: called in the same loop after each run, the last and undisturbed one included, to
            assert what must hold; may be a coroutine function.
        run: runs a coroutine to its end; the default does so in virtual time and checks for leaks.
        limit: the number of suspensions after which the scenario is taken for endless.

    Returns:
        The number of suspensions tried.

    Raises:
        BaseException: whatever a run or the check raised, with a note that tells where the
            cancellation was.
        RuntimeError: the scenario suspended more than `limit` times.
    """
    moments: tuple[_Moment, ...] = ("while it waits", "as its result arrives")
    for number in range(1, limit + 2):
        for moment in moments:
            attempt = _Attempt(number, moment)
            try:
                run(attempt.make(factory, check))
            except BaseException as error:
                if attempt.place:
                    error.add_note(f"cancelled at suspension {number}, {moment}: {attempt.place}")
                raise
            if not attempt.place:
                return number - 1
    raise RuntimeError(f"the scenario suspends more than {limit} times")


class _Attempt:
    """One run of a scenario, cancelled at one suspension if it gets that far."""

    def __init__(self, number: int, moment: _Moment) -> None:
        self._number = number
        self._moment = moment
        self.place = ""

    async def make(
        self,
        factory: Callable[[], Coroutine[Any, Any, object]],
        check: Callable[[], object] | None,
    ) -> None:
        task = asyncio.create_task(self._watch(factory()), name="scenario")
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()
        elif not self.place:
            raise asyncio.CancelledError("the scenario was cancelled by itself")
        if check is not None:
            checked = check()
            if inspect.isawaitable(checked):
                await checked

    async def _watch(self, scenario: Coroutine[Any, Any, object]) -> None:
        # A task runs coroutines only, not the generator that an awaitable can be.
        await self._count_suspensions(scenario)

    @types.coroutine
    def _count_suspensions(
        self, scenario: Coroutine[Any, Any, object]
    ) -> Generator[Any, Any, None]:
        number = 0
        try:
            awaited = scenario.send(None)
            while True:
                number += 1
                if number == self._number:
                    self._cancel(scenario, awaited)
                try:
                    value = yield awaited
                except BaseException as error:
                    awaited = scenario.throw(error)
                else:
                    awaited = scenario.send(value)
        except StopIteration:
            pass

    def _cancel(self, scenario: Coroutine[Any, Any, object], awaited: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.place = describe_awaits(scenario)
        if self._moment == "as its result arrives" and awaited is not None:
            # Called before the task's own callback, which the task adds once it has the future.
            awaited.add_done_callback(lambda _: task.cancel())
        else:
            asyncio.get_running_loop().call_soon(task.cancel)


class FaultySocket:
    """A socket in memory whose `send` can stall, fail, or take its time.

    Attributes:
        sent: the texts whose `send` returned, in order.
        closed: code and reason of the first `close`; None while open.
        delay: seconds that each `send` takes.
    """

    def __init__(self, *, delay: float = 0.0) -> None:
        self.sent: list[str] = []
        self.closed: tuple[int, str] | None = None
        self.delay = delay
        self._error: BaseException | None = None
        self._moving = asyncio.Event()
        self._moving.set()

    async def send(self, text: str) -> None:
        """Record a text, after the delay and any stall, unless cancelled or failed by then."""
        self._raise_error()
        if self.delay:
            await asyncio.sleep(self.delay)
        await self._moving.wait()
        self._raise_error()
        self.sent.append(text)

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close the socket: a `send` that waits, and every later one, raises `ConnectionError`."""
        if self.closed is None:
            self.closed = (code, reason)
            self.fail(ConnectionError(f"the socket is closed ({code})"))

    def stall(self) -> None:
        """Make every `send` wait until `resume`."""
        self._moving.clear()

    def resume(self) -> None:
        """Let the sends that wait, and those to come, go on."""
        self._moving.set()

    def fail(self, error: BaseException) -> None:
        """Make every `send` that waits, and every later one, raise `error`."""
        self._error = error
        self._moving.set()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
