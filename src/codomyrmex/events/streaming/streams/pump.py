"""Carrying events from an async iterator to a handler, one at a time, in a task of its own."""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable

from ..models import Event, Subscription
from ..wakeups import running_loop
from .runner import is_cancellation

__all__ = ["Pump"]

_logger = logging.getLogger("codomyrmex.events.streaming")


class Pump:
    """A task that hands every event of an iterator to a subscription, until either ends.

    The next event is asked for when the handler has dealt with the last: a slow handler slows
    the iterator. What a handler raises is logged; what the iterator raises is kept in `error`.

    Args:
        subscription: whose handler receives, as far as `should_receive` says so.
        events: where they come from; it is closed at the end, if it can be.
        on_end: is called when it is over, however it ends.
    """

    def __init__(
        self,
        subscription: Subscription,
        events: AsyncIterator[Event],
        on_end: Callable[[], object] = lambda: None,
    ) -> None:
        self.subscription = subscription
        self.error: Exception | None = None
        self._handling = False
        self._events = events
        self._on_end = on_end
        self._task = asyncio.get_running_loop().create_task(
            self._run(), name="codomyrmex-streaming pump"
        )

    async def _run(self) -> None:
        subscription = self.subscription
        try:
            async for event in self._events:
                self._handling = True
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
                finally:
                    self._handling = False
                if not subscription.active:
                    break
        except Exception as error:
            self.error = error
            _logger.exception("the source of subscription %s failed", subscription.id)
        finally:
            close = getattr(self._events, "aclose", None)
            if close is not None:
                await close()
            self._on_end()

    def cancel(self) -> None:
        """End now. From any thread; a handler that runs is interrupted, unless it asks for this."""
        loop = self._task.get_loop()
        if loop is not running_loop():
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._task.cancel)
        elif self._task is not asyncio.current_task():
            self._task.cancel()

    def stop(self) -> None:
        """End as soon as the event that is being handled has been dealt with."""
        self.subscription.active = False
        if not self._handling:
            self.cancel()

    async def finish(self) -> None:
        """Wait until it is over."""
        if self._task is not asyncio.current_task():
            await asyncio.wait([self._task])
