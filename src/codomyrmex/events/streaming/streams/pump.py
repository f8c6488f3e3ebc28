"""Carrying events from an async iterator to a handler, one at a time, in a task of its own."""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from ..models import Event, Subscription
from ..wakeups import Waiters, running_loop, wait_until, wake_all
from .runner import is_cancellation
from .tasks import hold, release

__all__ = ["Pump", "hand_over"]

_logger = logging.getLogger("codomyrmex.events.streaming")

_TURN = 64
"""Events after which everybody else on the event loop gets a turn."""


async def hand_over(subscription: Subscription, event: Event) -> bool:
    """Have a subscription's handler deal with an event, if `should_receive` says so.

    Returns:
        False: handler or filter have raised, which has been logged.
    """
    try:
        if subscription.should_receive(event) and subscription.handler is not None:
            result = subscription.handler(event)
            if result is not None and inspect.isawaitable(result):
                await result
    except (Exception, asyncio.CancelledError) as error:
        if is_cancellation(error):
            raise
        _logger.exception(
            "handler %r of subscription %s failed on %r",
            subscription.handler,
            subscription.id,
            event,
        )
        return False
    return True


def _nothing() -> None:
    """What happens at a failure or at the end, unless somebody wants to know."""


class Pump:
    """A task that hands every event of an iterator to a subscription, until either ends.

    The next event is asked for when the handler has dealt with the last: a slow handler slows
    the iterator. What a handler raises is logged; what the iterator raises is kept in `error`.
    The iterator is closed at the end, if it can be.

    Args:
        subscription: whose handler receives, as far as `should_receive` says so.
        events: where they come from.
        on_failure: is called when handler or filter have raised.
        on_end: is called when it is over, however it ends.
    """

    def __init__(
        self,
        subscription: Subscription,
        events: AsyncIterator[Event],
        *,
        on_failure: Callable[[], object] = _nothing,
        on_end: Callable[[], object] = _nothing,
    ) -> None:
        self.subscription = subscription
        self.error: BaseException | None = None
        self._events = events
        self._on_failure = on_failure
        self._on_end = on_end
        self._begun = False
        self._unwanted = False
        self._handling = False
        self._over = False
        self._waiting_for_end: Waiters = []
        self._task = asyncio.get_running_loop().create_task(
            self._run(), name="codomyrmex-streaming pump"
        )
        hold(self._task)
        self._task.add_done_callback(self._ended)

    async def _run(self) -> None:
        subscription = self.subscription
        self._begun = True
        count = 0
        try:
            if self._unwanted:
                return
            async for event in self._events:
                self._handling = True
                if not await hand_over(subscription, event):
                    self._on_failure()
                self._handling = False
                if not subscription.active:
                    break
                count += 1
                if count % _TURN == 0:  # neither the source nor the handler may ever wait
                    await asyncio.sleep(0)
        except (Exception, asyncio.CancelledError) as error:
            if is_cancellation(error):
                raise
            self.error = error
            _logger.exception("the source of subscription %s failed", subscription.id)
        finally:
            await self._close()

    async def _close(self) -> None:
        close = getattr(self._events, "aclose", None)
        if close is not None:
            try:
                await close()
            except Exception:
                _logger.exception("the source of %r could not be closed", self.subscription)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        release(task)
        self._over = True
        self._on_end()
        wake_all(self._waiting_for_end)

    def cancel(self) -> None:
        """End now. From any thread; a handler that runs is interrupted, unless it asks for this."""
        self._on_its_loop(self._cancel)

    def _cancel(self) -> None:
        if not self._begun:
            self._unwanted = True  # a task that is cancelled now would not even close the iterator
        elif asyncio.current_task() is not self._task:
            self._task.cancel()

    def stop(self) -> None:
        """End as soon as the event that is being handled has been dealt with. From any thread."""
        self.subscription.active = False
        self._on_its_loop(self._stop_waiting)

    def _stop_waiting(self) -> None:
        if not self._handling:
            self._cancel()

    def _on_its_loop(self, function: Callable[[], None]) -> None:
        loop = self._task.get_loop()
        if loop is running_loop():
            function()
        else:
            with suppress(RuntimeError):  # it is closed, and the task is over
                loop.call_soon_threadsafe(function)

    async def finish(self) -> None:
        """Wait until it is over, unless this is called by the handler."""
        while not self._has_finished():
            await wait_until(self._waiting_for_end, self._has_finished)

    def _has_finished(self) -> bool:
        return (
            self._over or self._task is asyncio.current_task() or self._task.get_loop().is_closed()
        )
