"""`AsyncStream`: a bounded buffer, a dispatcher, and a queue for each consumer."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Hashable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self
from weakref import WeakValueDictionary

from ..errors import AlreadyConsumed, PublishTimeout, StreamClosed, UnknownSubscription
from ..ids import uuid7
from ..models import Event, EventType, Filter, Handler, Subscription
from ..subscribers import HEARTBEAT_INTERVAL, SubscriberQueue, make_queue, prime
from ..topics import TopicFilter, matches
from ..wakeups import Waiters, running_loop, wait_until, wake_all
from .base import Stream, StreamStatistics
from .forks import follow_forks
from .pump import Pump

__all__ = ["AsyncStream"]

_logger = logging.getLogger("codomyrmex.events.streaming")

_PUBLISH_TIMEOUT = 5.0
"""Seconds for which `publish` waits for room, and `stop` for consumers that block."""


def _heartbeat() -> Event:
    return Event(type=EventType.HEARTBEAT)


class AsyncStream:
    """Events from publishers to consumers, through a bounded buffer and a queue for each consumer.

    A dispatcher moves events from the buffer to the consumers' queues. When a queue is full its
    consumer first gets a turn to read; what does not fit then is lost for that consumer alone,
    counted, told by a control event ``stream.lost``, and logged once. With ``overflow="block"``
    the dispatcher waits instead, the buffer fills, and `publish` waits.

    Before `start` events collect in the buffer. After `stop` the consumers get what there is, and
    then their iteration ends. Any thread may publish; the event loop of `start` dispatches.

    Args:
        buffer_size: how many events may wait to be dispatched.
        enable_backpressure: False: any number may; `publish` never waits.
        heartbeat_interval: seconds without an event after which a consumer gets one of type
            HEARTBEAT; None: never.

    >>> async def main():
    ...     async with AsyncStream() as stream:
    ...         consumer = await stream.subscribe()
    ...         await stream.publish(create_event("hello"))
    ...         async for event in stream.consume(consumer):
    ...             print(event.data)
    """

    def __init__(
        self,
        buffer_size: int = 1000,
        enable_backpressure: bool = True,
        *,
        heartbeat_interval: float | None = HEARTBEAT_INTERVAL,
    ) -> None:
        if enable_backpressure and buffer_size < 1:
            raise ValueError(f"buffer_size is a number of events, 1 or more, not {buffer_size}")
        self.heartbeat_interval = heartbeat_interval
        self._buffer: SubscriberQueue[Event] = SubscriberQueue(
            buffer_size if enable_backpressure else 0, "block"
        )
        self._subscribers: dict[str, SubscriberQueue[Event]] = {}
        # Weak, so that a reader whose loop was left by a break is gone at once, and not only when
        # its generator has been closed.
        self._readers: WeakValueDictionary[str, AsyncGenerator[Event, None]] = WeakValueDictionary()
        self._running = False
        self._stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduled = False
        # What was taken out of the buffer and did not fit, by queue. While there is any, nothing
        # more is taken out, so everybody's order stays what it is.
        self._late: dict[SubscriberQueue[Event], list[Event]] = {}
        # The queues that will call the dispatcher when they have room.
        self._awaited: set[SubscriberQueue[Event]] = set()
        self._dispatched: Waiters = deque()
        self._published_before = 0
        self._refused = 0
        self._failed = 0
        self._dropped_before = 0
        follow_forks(self)

    def _after_fork(self) -> None:
        self._loop = None
        self._scheduled = False
        self._awaited.clear()

    async def start(self) -> None:
        """Begin to dispatch, what collected before first. Again does nothing.

        After `stop` it opens the stream anew, for the subscriptions made since then.
        """
        if self._running and self._loop is not None and not self._loop.is_closed():
            return
        if self._stopped:
            self._published_before += self._buffer.received
            self._buffer = SubscriberQueue(self._buffer.maxsize, "block")
        self._move_to(asyncio.get_running_loop())
        self._running = True
        self._stopped = False
        self._schedule()

    async def stop(self, *, timeout: float = _PUBLISH_TIMEOUT) -> None:
        """Take no more events, dispatch those there are, and let the consumers come to their end.

        Publishers that wait get False. Consumers get what is in their queues; then their
        iteration ends. Again does nothing.

        Args:
            timeout: seconds to wait for consumers with the policy ``block``. What they have no
                room for then is lost, and counted.
        """
        if self._stopped:
            return
        self._stopped = True
        self._running = False
        self._buffer.end()
        if self._loop is None or self._loop.is_closed():
            self._move_to(asyncio.get_running_loop())
        try:
            if not self._is_dispatched():
                self._schedule()
                async with asyncio.timeout(timeout):
                    while not self._is_dispatched():
                        await wait_until(self._dispatched, self._is_dispatched)
        except TimeoutError:
            _logger.warning("AsyncStream.stop: consumers did not make room within %g s", timeout)
        finally:
            self._dispatch_the_rest()
            for queue in tuple(self._subscribers.values()):
                queue.end()

    async def publish(self, event: Event) -> bool:
        """Take an event, waiting for room in the buffer for up to 5 seconds.

        Returns:
            Whether it was taken. False: there was no room in time, or the stream is stopped.
        """
        if self._buffer.offer(event):
            if self._running and not self._scheduled:
                self._schedule()
            return True
        return await self._publish_when_room(event)

    async def _publish_when_room(self, event: Event) -> bool:
        buffer = self._buffer
        try:
            async with asyncio.timeout(_PUBLISH_TIMEOUT):
                while not buffer.ended:
                    await buffer.room()
                    if buffer.offer(event):
                        if self._running:
                            self._schedule()
                        return True
                    await asyncio.sleep(0)  # another thread was quicker
        except TimeoutError:
            _logger.warning(
                "AsyncStream.publish: no room for event %s within %g s; it was not taken",
                event.id,
                _PUBLISH_TIMEOUT,
            )
        self._refused += 1
        return False

    def publish_nowait(self, event: Event) -> bool:
        """Take an event if there is room; from any thread, with or without an event loop.

        Returns:
            Whether it was taken.
        """
        if not self._buffer.offer(event):
            self._refused += 1
            return False
        if self._running and not self._scheduled:
            self._schedule()
        return True

    async def subscribe(
        self,
        buffer_size: int = 100,
        *,
        overflow: str = "drop_newest",
        key: Callable[[Event], Hashable] | None = None,
    ) -> str:
        """Queue every event that is dispatched from now on, for `consume`.

        Args:
            buffer_size: how many events the queue holds; 0: any number.
            overflow: what happens when it is full: ``drop_newest``, ``drop_oldest``,
                ``latest_by_key``, ``disconnect``, or ``block``: the dispatcher waits.
            key: for ``latest_by_key``: the key of an event, by default its topic.

        Returns:
            The subscription's id.

        Raises:
            ValueError: `overflow` is not a policy, or `key` is for another one.
        """
        subscription_id = uuid7()
        self._subscribers[subscription_id] = make_queue(
            buffer_size, overflow, key=key, name=subscription_id
        )
        return subscription_id

    async def unsubscribe(self, subscription_id: str) -> bool:
        """End a subscription. Its consumer gets what was published so far, and then its end.

        False: there is no subscription with this id.
        """
        queue = self._subscribers.pop(subscription_id, None)
        if queue is None:
            return False
        if not queue.ended:
            for event in self._late.pop(queue, []) + self._buffer.snapshot():
                queue.force(event)
        self._dropped_before += queue.dropped
        queue.end()
        return True

    def consume(self, subscription_id: str) -> AsyncGenerator[Event, None]:
        """The events of a subscription, until it or the stream ends.

        Between them come HEARTBEAT events, and control events (metadata ``control``) where
        events were lost. Leaving the loop keeps the subscription: it can be consumed again.

        Raises:
            UnknownSubscription: there is no such subscription (any more).
            AlreadyConsumed: it is being consumed already.
        """
        return self._iterate(subscription_id, self.heartbeat_interval)

    def _iterate(self, subscription_id: str, idle: float | None) -> AsyncGenerator[Event, None]:
        queue = self._subscribers.get(subscription_id)
        if queue is None:
            raise UnknownSubscription(subscription_id)
        if queue.reading and subscription_id in self._readers:
            raise AlreadyConsumed(subscription_id)
        reader = prime(
            queue.iterate(
                idle=idle,
                on_idle=_heartbeat,
                on_close=partial(self._forget_if_read_out, subscription_id, queue),
            )
        )
        self._readers[subscription_id] = reader
        return reader

    def _forget_if_read_out(self, subscription_id: str, queue: SubscriberQueue[Event]) -> None:
        if queue.ended and queue.empty() and subscription_id in self._subscribers:
            del self._subscribers[subscription_id]
            self._dropped_before += queue.dropped

    # The dispatcher: not a task but a callback, so that there is nothing to cancel or to leak.

    def _move_to(self, loop: asyncio.AbstractEventLoop) -> None:
        """Dispatch on another loop from now on: what was scheduled on the last may never run."""
        self._loop = loop
        self._scheduled = False
        self._awaited.clear()

    def _schedule(self) -> None:
        """Have the dispatcher run soon, on its loop. From any thread."""
        if self._scheduled:
            return
        loop = self._loop
        running = running_loop()
        if loop is None or loop.is_closed():
            if running is None:
                return  # a later publisher, or stop, will have one
            self._move_to(running)
            loop = running
        self._scheduled = True
        if loop is running:
            loop.call_soon(self._dispatch)
        else:
            try:
                loop.call_soon_threadsafe(self._dispatch)
            except RuntimeError:  # it was closed just now
                self._scheduled = False

    def _dispatch(self) -> None:
        """Move what is in the buffer to the queues."""
        self._scheduled = False
        if self._late and not self._dispatch_late():
            return
        events = self._buffer.take_all()
        if events:
            late = self._late
            # A copy, since a subscription may be cancelled in another thread.
            for queue in tuple(self._subscribers.values()):
                taken = queue.fill(events)
                if taken < len(events):
                    late[queue] = events[taken:]
            if late:
                self._schedule()  # after the consumers that have just been woken
                return
        if self._dispatched:
            wake_all(self._dispatched)

    def _dispatch_late(self) -> bool:
        """Move what did not fit before, now that consumers had a turn. False: not all of it."""
        had_turn = False
        for queue, events in tuple(self._late.items()):
            taken = queue.fill(events)
            del events[:taken]
            if not events:
                self._late.pop(queue, None)
            elif taken:
                had_turn = True
            elif queue.overflow == "block":
                self._await_room(queue)
            else:
                self._late.pop(queue, None)
                for event in events:
                    queue.offer(event)
        if had_turn:
            self._schedule()
        return not self._late

    def _await_room(self, queue: SubscriberQueue[Event]) -> None:
        if queue not in self._awaited:
            self._awaited.add(queue)
            queue.when_room(partial(self._has_room, queue))

    def _has_room(self, queue: SubscriberQueue[Event]) -> None:
        self._awaited.discard(queue)
        self._schedule()

    def _is_dispatched(self) -> bool:
        return self._buffer.empty() and not self._late

    def _dispatch_the_rest(self) -> None:
        """Move what is left at once: what does not fit is lost by its policy."""
        rest = self._buffer.take_all()
        for queue in tuple(self._subscribers.values()):
            events = self._late.pop(queue, []) + rest
            for index, event in enumerate(events):
                if not queue.ended and not queue.offer(event) and queue.overflow == "block":
                    queue.lose(len(events) - index)
                    break
        self._late.clear()

    async def _broadcast(self, event: Event) -> None:
        """Give an event to every consumer at once, past the buffer.

        It is lost for those whose queue is full, by their policy; with ``block`` this waits.
        """
        for queue in tuple(self._subscribers.values()):
            if not queue.offer(event) and queue.overflow == "block":
                with suppress(StreamClosed):  # its subscription has ended
                    await queue.put(event)

    # The rest.

    def as_stream(self) -> Stream:
        """This as a `Stream`: handlers are consumers with the policy ``block``."""
        return _AsStream(self)

    def statistics(self) -> StreamStatistics:
        """Counts since the stream was made, as of now."""
        queues = {key: queue.statistics() for key, queue in tuple(self._subscribers.items())}
        return StreamStatistics(
            published=self._published_before + self._buffer.received,
            refused=self._refused,
            dropped=self._dropped_before + sum(queue.dropped for queue in queues.values()),
            failed=self._failed,
            buffered=self._buffer.qsize() + max(map(len, tuple(self._late.values())), default=0),
            subscribers=len(queues),
            queues=queues,
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
    """An `AsyncStream` behind the interface of a stream."""

    def __init__(self, stream: AsyncStream) -> None:
        self._stream = stream
        self._pumps: dict[str, Pump] = {}

    async def publish(self, event: Event) -> None:
        """Take an event, waiting for room in the buffer for up to 5 seconds.

        Raises:
            PublishTimeout: there was no room in time.
            StreamClosed: the stream is stopped.
        """
        if not await self._stream.publish(event):
            self._check_open()
            raise PublishTimeout(f"no room for event {event.id} within {_PUBLISH_TIMEOUT:g} s")

    def publish_nowait(self, event: Event) -> bool:
        taken = self._stream.publish_nowait(event)
        if not taken:
            self._check_open()
        return taken

    def _check_open(self) -> None:
        if self._stream._stopped:
            raise StreamClosed("the stream has been stopped; it takes no more events")

    async def subscribe(
        self, handler: Handler, topic: TopicFilter = "*", filter_fn: Filter | None = None
    ) -> Subscription:
        self._check_open()
        matches(topic, None)  # raises if it is no topic
        subscription = Subscription(topic=topic, handler=handler, filter_fn=filter_fn)
        subscription_id = await self._stream.subscribe(overflow="block")
        subscription.id = subscription_id
        subscription._runner = self._pumps[subscription_id] = Pump(
            subscription,
            self._stream._iterate(subscription_id, None),
            on_failure=self._handler_failed,
            on_end=partial(self._forget, subscription_id),
        )
        subscription._release = self._forget
        return subscription

    def _handler_failed(self) -> None:
        self._stream._failed += 1

    async def unsubscribe(self, subscription_id: str) -> bool:
        return self._forget(subscription_id)

    async def finish(self, subscription_id: str) -> bool:
        pump = self._pumps.get(subscription_id)
        if pump is None:
            return False
        await self._stream.unsubscribe(subscription_id)  # which lets the pump read on to its end
        await pump.finish()
        return True

    def _forget(self, subscription_id: str) -> bool:
        pump = self._pumps.pop(subscription_id, None)
        if pump is None:
            return False
        pump.subscription._release = None
        pump.stop()
        queue = self._stream._subscribers.pop(subscription_id, None)
        if queue is not None:
            self._stream._late.pop(queue, None)
            self._stream._dropped_before += queue.dropped
            queue.end()
        return True

    def statistics(self) -> StreamStatistics:
        return self._stream.statistics()

    async def aclose(self, *, drain: bool = True) -> None:
        pumps = dict(self._pumps)
        for subscription_id, pump in pumps.items():
            if drain:
                await self._stream.unsubscribe(subscription_id)
            else:
                self._forget(subscription_id)
                pump.cancel()
        try:
            await self._stream.stop()
            for pump in pumps.values():
                await pump.finish()
        finally:
            for pump in pumps.values():
                pump.cancel()
