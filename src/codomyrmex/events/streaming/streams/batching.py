"""`BatchingStream`: events in batches, by number and by time."""

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeAlias

from ..errors import NoBatchHandler, StreamClosed
from ..forks import follow_forks
from ..models import Event, Filter, Handler, Subscription, check_event
from ..subscribers import SubscriberQueue
from ..topics import TopicFilter, matches
from ..wakeups import running_loop
from .base import Stream, StreamStatistics, StreamView
from .pump import hand_over
from .runner import SerialRunner, Unfinished, is_cancellation

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
    taken any more. Any thread may add; handlers run on the event loop of `start`.

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
        # One list for ever, which any thread may append to; what goes out is cut off its front.
        self._batch: list[Event] = []
        self._batch_size = batch_size
        self._flush_interval = flush_interval
        self._handlers: list[BatchHandler] = []
        self._running = False
        self._stopped = False
        # Whether `add` has to look closer: stopped, or full and without a handler.
        self._shut = False
        # When the batch goes out at the latest, in the loop's time. The timer may be set for an
        # earlier moment, that of a batch which has gone: then it sets itself anew.
        self._due: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sending = threading.Lock()
        self._runner = self._make_runner()
        self._published = 0
        self._refused = 0
        self._dropped = 0
        self._failed = 0
        self._subscriptions: dict[str, Subscription] = {}  # of `as_stream`
        follow_forks(self)

    def _after_fork(self) -> None:  # pragma: no cover - in the child, where nothing is measured
        self._loop = None
        self._timer = None
        self._sending = threading.Lock()
        self._runner.leave_loop()

    def _make_runner(self) -> "SerialRunner[list[Event] | _Rest]":
        # What handlers raise is caught and logged where they are called.
        return SerialRunner(self._handle, SubscriberQueue(0, "block"), self, lambda _: None)

    def on_batch(self, handler: BatchHandler) -> None:
        """Call `handler` with every batch from now on, after those registered before it.

        It is a function or async function of a list of events, which is its own to change.
        """
        self._handlers.append(handler)
        if self._batch and self._running:
            self._call_soon(self._look_again)

    async def start(self) -> None:
        """Let intervals run. Again does nothing. After `stop`, the stream takes events anew."""
        if self._loop is None or self._loop.is_closed():
            self._move_to(asyncio.get_running_loop())
            with self._sending:  # not where the first batch happens to be filled
                self._runner.move_to(asyncio.get_running_loop())
        self._running = True
        self._stopped = self._shut = False
        if self._runner.has_work:  # a batch that was filled where no loop ran
            self._runner.start()
        self._look_again()

    def _look_again(self) -> None:
        """See to what was collected while there was no handler, or no interval."""
        if self._handlers:
            self._send_out(self._batch_size)
        if self._batch and self._due is None:
            self._begin_interval()
        elif self._timer is None:
            self._set_timer()

    async def stop(self) -> None:
        """Take no more events; flush what there is, once, and wait until it has been handled.

        If this is cancelled, what has not been handled is given up, and counted as dropped.
        """
        await self._stop(drain=True)

    async def _stop(self, *, drain: bool) -> None:
        self._stopped = self._shut = True
        self._running = False
        timer, self._timer = self._timer, None
        if timer is not None:
            if self._loop is running_loop():
                timer.cancel()
            else:
                self._call_soon(timer.cancel)
        runner = self._runner
        drained = False
        try:
            if drain:
                await self._flush()
                drained = True
        finally:
            if not drained:
                self._dropped += sum(map(len, runner.queue.snapshot())) + len(self._batch)
                self._batch.clear()
                self._due = None
                runner.cancel()
                self._runner = self._make_runner()  # the stream may be started again
        if not SerialRunner.runs_for(self):
            await runner.finish()

    async def add(self, event: Event) -> None:
        """Add an event to the batch. If that fills it, wait until it has been handled.

        In a handler it does not wait: the batch goes out after the one being handled.

        Raises:
            StreamClosed: the stream has been stopped.
            NoBatchHandler: the batch is full and there is no handler; the event was not added.
        """
        if self._shut:
            while self._is_full():
                await self._flush()
        batch = self._batch
        batch.append(event)
        self._published += 1
        if len(batch) >= self._batch_size:
            if self._handlers:
                self._send_out(self._batch_size, at_once=True)
                if self._runner.has_work and not SerialRunner.runs_for(self):
                    await self._runner.drain()
            else:
                self._shut = True
        elif self._due is None and self._running:
            self._begin_interval()

    def publish_nowait(self, event: Event) -> bool:
        """`add`, without ever waiting; from any thread, with or without an event loop.

        Returns:
            False: `add` would have had to wait; the event was not taken, and is counted as
            refused.

        Raises:
            StreamClosed: the stream has been stopped.
            NoBatchHandler: the batch is full and there is no handler; the event was not added.
        """
        if self._shut and self._is_full():
            self._send_out(self._batch_size)
        batch = self._batch
        if (
            len(batch) + 1 >= self._batch_size
            and self._runner.has_work
            and not SerialRunner.runs_for(self)
        ):
            self._refused += 1
            return False
        batch.append(event)
        self._published += 1
        if len(batch) >= self._batch_size:
            if self._handlers:
                self._send_out(self._batch_size)
            else:
                self._shut = True
        elif self._due is None and self._running:
            self._begin_interval()
        return True

    def _is_full(self) -> bool:
        """Whether a full batch is in the way that a handler can be given now.

        Raises:
            StreamClosed: the stream has been stopped.
            NoBatchHandler: a full batch is in the way, and there is no handler.
        """
        if self._stopped:
            raise StreamClosed("the stream has been stopped; it takes no more events")
        self._shut = len(self._batch) >= self._batch_size
        if self._shut and not self._handlers:
            raise NoBatchHandler(
                f"a batch of {len(self._batch)} events is full and has no handler; "
                "register one with on_batch()"
            )
        return self._shut

    def _move_to(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer = None

    def _call_soon(self, function: Callable[[], object]) -> None:
        """Have the loop that counts the time call a function. From any thread."""
        if self._loop is not None:  # pragma: no branch - it is only in a forked child
            with suppress(RuntimeError):  # it is closed: nobody counts the time
                self._loop.call_soon_threadsafe(function)

    def _begin_interval(self) -> None:
        """The batch has its first event. In any thread."""
        loop = self._loop
        running = running_loop()
        if loop is None or (loop is not running and loop.is_closed()):
            if running is None:
                return  # the next that is added in a loop begins it
            self._move_to(running)
            loop = running
        self._due = loop.time() + self._flush_interval
        if self._timer is None:
            if loop is running:
                self._set_timer()
            else:
                self._call_soon(self._set_timer)

    def _set_timer(self) -> None:
        if self._timer is None and self._due is not None and self._running:
            assert self._loop is not None
            self._timer = self._loop.call_at(self._due, self._interval_over)

    def _interval_over(self) -> None:
        assert self._loop is not None
        self._timer = None
        if self._due is not None and self._due > self._loop.time():
            self._set_timer()
        elif self._due is not None and self._handlers:
            self._send_out(1)  # without a handler the batch waits for one, or until it is full

    def _send_out(self, least: int, *, at_once: bool = False) -> None:
        """Give the runner what was collected, while that is at least so much. In any thread.

        Args:
            at_once: call the handlers here, if no batch is before this one.
        """
        collected = self._batch
        claimed: list[Event] | None = None
        with self._sending:
            while len(collected) >= least:
                # First of all: whoever adds to the next batch from here on begins its interval.
                self._due = None
                batch = collected[: self._batch_size]
                del collected[: len(batch)]
                if at_once and claimed is None and self._runner.claim():
                    claimed = batch
                else:
                    self._runner.feed(batch)
        if claimed is not None:
            self._runner.handle_now(claimed)
        if collected and self._due is None and self._running:
            self._begin_interval()  # it was added by another thread before that

    async def _flush(self) -> None:
        """Send the batch out as it is, and wait until it has been handled.

        Without a handler it is lost: counted as dropped, and logged.
        """
        if self._handlers:
            self._send_out(1)
        elif self._batch:
            self._dropped += len(self._batch)
            _logger.warning("a batch of %d events is lost: no handler", len(self._batch))
            self._batch.clear()
            self._due = None
        if not SerialRunner.runs_for(self):
            await self._runner.drain()

    def _handle(self, batch: "list[Event] | _Rest") -> "_Rest | None":
        """Give a batch to the handlers. Returns what has to be awaited for that, if anything."""
        if isinstance(batch, _Rest):
            return batch
        return self._call(batch, iter(tuple(self._handlers)))

    def _call(self, batch: list[Event], handlers: Iterator[BatchHandler]) -> "_Rest | None":
        """Call one handler after the other, until one returns what has to be awaited."""
        for handler in handlers:
            try:
                result = handler(batch.copy())
            except (Exception, asyncio.CancelledError):
                self._log_failure(handler, batch)
            else:
                if result is not None and inspect.isawaitable(result):
                    return _Rest(self, batch, handler, result, handlers)
        return None

    def _log_failure(self, handler: BatchHandler, batch: list[Event]) -> None:
        self._failed += 1
        _logger.exception(
            "batch handler %r failed on a batch of %d events; other handlers still get it",
            handler,
            len(batch),
        )

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


class _Rest(Unfinished):
    """What is left to do with a batch: to await what a handler has returned, and call the others.

    It has the batch's length, for it stands in the queue in its place.
    """

    def __init__(
        self,
        stream: BatchingStream,
        batch: list[Event],
        handler: BatchHandler,
        awaitable: Awaitable[Any],
        handlers: Iterator[BatchHandler],
    ) -> None:
        super().__init__(awaitable)
        self._stream = stream
        self._batch = batch
        self._handler = handler
        self._handlers = handlers

    def __len__(self) -> int:
        return len(self._batch)

    async def _finish(self) -> None:
        stream, batch = self._stream, self._batch
        rest: _Rest | None = self
        while rest is not None:
            try:
                await rest.awaitable
            except (Exception, asyncio.CancelledError) as error:
                if is_cancellation(error):
                    stream._dropped += len(batch)
                    raise
                stream._log_failure(rest._handler, batch)
            rest = stream._call(batch, self._handlers)


class _AsStream(StreamView):
    """A `BatchingStream` behind the interface of a stream."""

    def __init__(self, stream: BatchingStream) -> None:
        super().__init__(stream)
        self._stream = stream
        self._subscriptions = stream._subscriptions

    async def publish(self, event: Event) -> None:
        check_event(event)
        await self._stream.add(event)

    def publish_nowait(self, event: Event) -> bool:
        check_event(event)
        return self._stream.publish_nowait(event)

    async def subscribe(
        self, handler: Handler, topic: TopicFilter = "*", filter_fn: Filter | None = None
    ) -> Subscription:
        stream = self._stream
        if stream._stopped:
            raise StreamClosed("the stream has been stopped; it takes no more subscriptions")
        matches(topic, None)  # raises if it is no topic
        subscription = Subscription(topic=topic, handler=handler, filter_fn=filter_fn)

        async def hand_out(batch: list[Event]) -> None:
            for event in batch:
                if not await hand_over(subscription, event):
                    stream._failed += 1

        def forget(subscription_id: str) -> None:
            del self._subscriptions[subscription_id]
            stream._handlers.remove(hand_out)

        self._subscriptions[subscription.id] = subscription
        subscription._release = forget
        stream.on_batch(hand_out)
        return subscription

    async def unsubscribe(self, subscription_id: str) -> bool:
        subscription = self._subscriptions.get(subscription_id)
        if subscription is None:
            return False
        subscription.cancel()
        return True

    async def finish(self, subscription_id: str) -> bool:
        subscription = self._subscriptions.get(subscription_id)
        if subscription is None:
            return False
        await self._stream._flush()  # what was published includes the batch that is not full yet
        subscription.cancel()
        return True

    def statistics(self) -> StreamStatistics:
        return self._stream.statistics()

    async def aclose(self, *, drain: bool = True) -> None:
        try:
            await self._stream._stop(drain=drain)
        finally:
            for subscription in tuple(self._subscriptions.values()):
                subscription.cancel()
