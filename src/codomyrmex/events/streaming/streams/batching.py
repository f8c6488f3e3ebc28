"""`BatchingStream`: events in batches, by number and by time."""

import asyncio
import inspect
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeAlias

from ..errors import NoBatchHandler, StreamClosed
from ..models import Event, Filter, Handler, Subscription
from ..subscribers import SubscriberQueue
from ..topics import TopicFilter
from ..wakeups import running_loop
from .base import Stream, StreamStatistics
from .memory import InMemoryStream
from .runner import SerialRunner, is_cancellation

__all__ = ["BatchHandler", "BatchingStream"]

_logger = logging.getLogger("codomyrmex.events.streaming")

BatchHandler: TypeAlias = Callable[[list[Event]], Any]
"""What receives batches: a function or an async function of a list of events."""


class BatchingStream:
    """Collects events, and gives them to handlers in batches, in the order they were added.

    A batch goes out when it has `batch_size` events, or `flush_interval` after its first. Batches
    go out one at a time: whoever adds the event that fills one waits until it has been handled.
    What a handler raises is logged; other handlers and later batches are not affected.

    Before `start` a batch that is full goes out, but no interval runs. After `stop` nothing is
    taken any more.

    Args:
        batch_size: events to a batch.
        flush_interval: seconds after the first event of a batch at which it goes out.

    >>> async def main():
    ...     async with BatchingStream(batch_size=500) as stream:
    ...         stream.on_batch(database.insert_many)
    ...         await stream.add(create_event({"clicked": "buy"}))
    """

    def __init__(self, batch_size: int = 100, flush_interval: float = 1.0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is a number of events, 1 or more, not {batch_size}")
        if flush_interval <= 0:
            raise ValueError(f"flush_interval is a number of seconds above 0: {flush_interval}")
        self._batch: list[Event] = []
        self._batch_size = batch_size
        self._flush_interval = flush_interval
        self._handlers: list[BatchHandler] = []
        self._running = False
        self._stopped = False
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._runner: SerialRunner[list[Event]] = SerialRunner(
            self._handle, SubscriberQueue(0, "block"), self, self._log_failure
        )
        self._published = 0
        self._refused = 0
        self._dropped = 0
        self._failed = 0

    def on_batch(self, handler: BatchHandler) -> None:
        """Call `handler` with every batch from now on, after those registered before it.

        It is a function or async function of a list of events, which is its own to change.
        """
        self._handlers.append(handler)

    async def start(self) -> None:
        """Let intervals run. Again does nothing. After `stop`, the stream takes events anew."""
        self._loop = asyncio.get_running_loop()
        self._running = True
        self._stopped = False
        if self._batch and self._timer is None:
            self._timer = self._loop.call_later(self._flush_interval, self._interval_over)

    async def stop(self) -> None:
        """Take no more events; flush what there is, once, and wait until it has been handled."""
        self._stopped = True
        self._running = False
        await self._flush()

    async def add(self, event: Event) -> None:
        """Add an event to the batch. If that fills it, wait until it has been handled.

        In a handler it does not wait: the batch goes out after the one being handled.

        Raises:
            StreamClosed: the stream has been stopped.
            NoBatchHandler: the batch is full and there is no handler; the event was not added.
        """
        batch = self._batch
        size = len(batch) + 1
        if self._stopped or size > self._batch_size:
            self._check_open()
        batch.append(event)
        self._published += 1
        if size >= self._batch_size:
            if self._handlers:
                await self._flush()
        elif size == 1 and self._running:
            self._start_timer()

    def publish_nowait(self, event: Event) -> bool:
        """`add`, without ever waiting; from any thread, with or without an event loop.

        Returns:
            False: `add` would have had to wait; the event was not taken, and is counted as
            refused.

        Raises:
            StreamClosed: the stream has been stopped.
            NoBatchHandler: the batch is full and there is no handler; the event was not added.
        """
        size = len(self._batch) + 1
        if self._stopped or size > self._batch_size:
            self._check_open()
        behind = self._runner.busy or not self._runner.queue.empty()
        if size >= self._batch_size and behind and not SerialRunner.runs_for(self):
            self._refused += 1
            return False
        self._batch.append(event)
        self._published += 1
        if size >= self._batch_size and self._handlers:
            self._send_out()
        elif size == 1 and self._running:
            self._start_timer()
        return True

    def _check_open(self) -> None:
        if self._stopped:
            raise StreamClosed("the stream has been stopped; it takes no more events")
        if not self._handlers:
            raise NoBatchHandler(
                f"a batch of {len(self._batch)} events is full and has no handler; "
                "register one with on_batch()"
            )

    def _start_timer(self) -> None:
        loop = self._loop
        assert loop is not None
        if loop is running_loop():
            self._timer = loop.call_later(self._flush_interval, self._interval_over)
        elif not loop.is_closed():
            loop.call_soon_threadsafe(self._start_timer)

    def _interval_over(self) -> None:
        self._timer = None
        if self._handlers:  # without one the batch waits for its handler, or until it is full
            self._send_out()

    def _send_out(self) -> None:
        """Give the batch to the runner, and begin another."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        batch, self._batch = self._batch, []
        if batch:
            self._runner.feed(batch)

    async def _flush(self) -> None:
        """Send the batch out as it is, and wait until it has been handled.

        Without a handler it is lost: counted as dropped, and logged.
        """
        if self._batch and not self._handlers:
            self._dropped += len(self._batch)
            _logger.warning("a batch of %d events is lost: no handler", len(self._batch))
            self._batch.clear()
        self._send_out()
        if not SerialRunner.runs_for(self):
            await self._runner.drain()

    async def _handle(self, batch: list[Event]) -> None:
        for handler in tuple(self._handlers):
            try:
                result = handler(batch.copy())
                if result is not None and inspect.isawaitable(result):
                    await result
            except (Exception, asyncio.CancelledError) as error:
                if is_cancellation(error):
                    raise
                self._failed += 1
                _logger.exception(
                    "batch handler %r failed on a batch of %d events; other handlers still get it",
                    handler,
                    len(batch),
                )

    def _log_failure(self, batch: list[Event]) -> None:
        """Nothing to do: `_handle` has logged what any handler raised."""

    def as_stream(self) -> Stream:
        """This as a `Stream`: handlers get a batch's events one by one, when the batch goes out."""
        return _AsStream(self)

    def statistics(self) -> StreamStatistics:
        """Counts since the stream was made, as of now."""
        return StreamStatistics(
            published=self._published,
            refused=self._refused,
            dropped=self._dropped,
            failed=self._failed,
            buffered=len(self._batch) + sum(map(len, self._runner.queue.snapshot())),
            subscribers=len(self._handlers),
        )

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()


class _AsStream(Stream):
    """A `BatchingStream` behind the interface of a stream."""

    def __init__(self, stream: BatchingStream) -> None:
        self._stream = stream
        self._events = InMemoryStream(0)
        self._is_handler = False

    async def _hand_out(self, batch: list[Event]) -> None:
        for event in batch:
            await self._events.publish(event)
        await self._events.drain()

    async def publish(self, event: Event) -> None:
        await self._stream.add(event)

    def publish_nowait(self, event: Event) -> bool:
        return self._stream.publish_nowait(event)

    async def subscribe(
        self, handler: Handler, topic: TopicFilter = "*", filter_fn: Filter | None = None
    ) -> Subscription:
        if not self._is_handler:
            self._is_handler = True
            self._stream.on_batch(self._hand_out)
        return await self._events.subscribe(handler, topic, filter_fn)

    async def unsubscribe(self, subscription_id: str) -> bool:
        return await self._events.unsubscribe(subscription_id)

    async def finish(self, subscription_id: str) -> bool:
        return await self._events.finish(subscription_id)

    def statistics(self) -> StreamStatistics:
        return self._stream.statistics()

    async def aclose(self, *, drain: bool = True) -> None:
        if drain:
            await self._stream.stop()
        await self._events.aclose(drain=drain)
