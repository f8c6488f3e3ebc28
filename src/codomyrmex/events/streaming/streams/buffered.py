"""`AsyncStream`: a bounded buffer, a dispatcher, and a queue for each consumer."""

import asyncio
import logging
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Hashable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self
from weakref import WeakValueDictionary

from ..errors import AlreadyConsumed, PublishTimeout, StreamClosed, UnknownSubscription
from ..forks import follow_forks
from ..ids import uuid7
from ..models import Event, EventType, Filter, Handler, Subscription, check_event
from ..queues.bounded import hand_over_to_all
from ..subscribers import HEARTBEAT_INTERVAL, SubscriberQueue, make_queue, prime
from ..topics import TopicFilter, matches
from ..wakeups import Waiters, running_loop, wait_until, wake_all
from .base import Stream, StreamStatistics, StreamView
from .pump import Pump

__all__ = ["AsyncStream"]

_logger = logging.getLogger("codomyrmex.events.streaming")

_PUBLISH_TIMEOUT = 5.0
"""Seconds for which `publish` waits for room, and `stop` for consumers that block."""

_FAREWELL_TIMEOUT = 1.0
"""Seconds for which `stop` then waits for a loop in another thread to do what is left."""


def _heartbeat() -> Event:
    return Event(type=EventType.HEARTBEAT)


class _Waiting:
    """A publisher that waits for room.

    Attributes:
        event: what it publishes.
        taken: whether that was taken; None: not decided yet.
        publisher: itself, to be woken then.
    """

    __slots__ = ("event", "publisher", "taken")

    def __init__(self, event: Event) -> None:
        self.event = event
        self.taken: bool | None = None
        self.publisher: Waiters = []

    def is_over(self) -> bool:
        return self.taken is not None

    def end(self, taken: bool) -> None:
        self.taken = taken
        wake_all(self.publisher)


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
        self._open_buffer(buffer_size if enable_backpressure else 0)
        self._subscribers: dict[str, SubscriberQueue[Event]] = {}
        # Weak, so that a reader whose loop was left by a break is gone at once, and not only when
        # its generator has been closed.
        self._readers: WeakValueDictionary[str, AsyncGenerator[Event, None]] = WeakValueDictionary()
        self._running = False
        self._stopped = False
        self._stopping = False
        self._patient = True  # with consumers that block
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduled = False
        # Those that make the dispatcher wait, among the subscribers.
        self._blocking: dict[str, SubscriberQueue[Event]] = {}
        # What was taken out of the buffer and did not fit, by queue. While there is any, nothing
        # more is taken out, so everybody's order stays what it is.
        self._late: dict[SubscriberQueue[Event], list[Event]] = {}
        # When the dispatcher goes on, while others have their turn first.
        self._turn: asyncio.Handle | None = None
        # Publishers that wait for room in the buffer. While there are any, it is full.
        self._line: deque[_Waiting] = deque()
        # The queues that will call the dispatcher when they have room.
        self._awaited: set[SubscriberQueue[Event]] = set()
        self._waiting_for_end: Waiters = []
        self._moved = 0  # events, out of the buffer
        self._refused = 0
        self._failed = 0
        self._dropped_before = 0
        # What runs the handlers of `as_stream`, and those that do so for the last time.
        self._pumps: dict[str, Pump] = {}
        self._leaving: set[Pump] = set()
        follow_forks(self)

    def _open_buffer(self, maxsize: int) -> None:
        """Take events in. What is in the buffer, and how much may be, is where publish sees it."""
        self._buffer: SubscriberQueue[Event] = SubscriberQueue(maxsize, "block")
        self._items: deque[Event] = self._buffer._queue
        self._room = maxsize if maxsize > 0 else sys.maxsize

    def _after_fork(self) -> None:  # pragma: no cover - in the child, where nothing is measured
        self._loop = None
        self._scheduled = False
        self._awaited.clear()
        self._line.clear()  # publishers in the parent
        for queue in self._subscribers.values():
            queue.forget_waiters()

    async def start(self) -> None:
        """Begin to dispatch, what collected before first. Again does nothing.

        After `stop` it opens the stream anew, for the subscriptions made since then.
        """
        if self._running and self._loop is not None and not self._loop.is_closed():
            return
        await self._until_ended()
        if self._stopped:
            self._moved += len(self._items)
            self._open_buffer(self._buffer.maxsize)
        self._move_to(asyncio.get_running_loop())
        self._running = True
        self._stopped = False
        self._schedule()

    async def stop(self, *, timeout: float = _PUBLISH_TIMEOUT) -> None:
        """Take no more events, dispatch those there are, and let the consumers come to their end.

        Publishers that wait get False. Consumers get what is in their queues; then their
        iteration ends. Again does nothing but wait until that is done.

        Args:
            timeout: seconds to wait for consumers with the policy ``block``. What they have no
                room for then is lost, and counted; like everything that does not fit, if this is
                cancelled.
        """
        if self._stopped:
            await self._until_ended()
            return
        self._stopped = self._stopping = True
        self._running = False
        self._patient = True
        self._buffer.end()
        self._room = 0
        while self._line:
            self._line.popleft().end(False)
        if self._loop is None or not self._loop.is_running():
            self._move_to(asyncio.get_running_loop())
        self._schedule()  # it is the dispatcher that ends the consumers, on its loop
        try:
            async with asyncio.timeout(timeout):
                await self._until_ended()
        except TimeoutError:
            _logger.warning("AsyncStream.stop: a consumer made no room within %g s", timeout)
            self._patient = False
            self._schedule()
            with suppress(TimeoutError):  # its loop does not run; if it ever does, it goes on
                async with asyncio.timeout(_FAREWELL_TIMEOUT):
                    await self._until_ended()
        finally:
            if self._stopping:
                self._on_its_loop(self._end_now)

    async def _until_ended(self) -> None:
        while self._stopping:
            await wait_until(self._waiting_for_end, lambda: not self._stopping)

    async def publish(self, event: Event) -> bool:
        """Take an event, waiting for room in the buffer for up to 5 seconds.

        Returns:
            Whether it was taken. False: there was no room in time, or the stream is stopped.
        """
        if self._scheduled and len(self._items) < self._room:  # a burst: the dispatcher comes
            self._items.append(event)
            if not self._scheduled:  # it has come already, in another thread
                self._schedule()
            return True
        return self._take_in(event) or await self._publish_when_room(event)

    def _take_in(self, event: Event) -> bool:
        """Take an event. False: there is no room."""
        if not self._scheduled and self._hand_out(event):
            return True
        if len(self._items) >= self._room:
            return False
        self._items.append(event)
        if self._running and not self._scheduled:
            self._schedule()
        return True

    def _hand_out(self, event: Event) -> bool:
        """Give a lone event to the consumers at once. False: it has to go through the buffer.

        What tells that it is a lone one is that the first consumer waits for it. After the first
        event of a burst it does not, and the others go out together.
        """
        if (
            not self._running
            or self._items
            or self._late
            or self._blocking
            or self._loop is not running_loop()
        ):
            return False
        # A copy, since a subscription may be cancelled in another thread.
        queues = tuple(self._subscribers.values())
        if not queues or not queues[0].awaited:
            return False
        self._moved += 1
        for queue in hand_over_to_all(queues, event, self._loop):
            if not queue.fill([event]):
                self._late[queue] = [event]
        if self._late:
            self._give_turn()
        return True

    async def _publish_when_room(self, event: Event) -> bool:
        """Stand in line, so that nobody who comes later is served before."""
        if self._buffer.ended:
            self._refused += 1
            return False
        waiting = _Waiting(event)
        self._line.append(waiting)
        if self._running:
            self._schedule()  # another thread may have made room just now
        try:
            async with asyncio.timeout(_PUBLISH_TIMEOUT):
                await wait_until(waiting.publisher, waiting.is_over)
        except TimeoutError:
            if self._leave_line(waiting):
                _logger.warning(
                    "AsyncStream.publish: no room for event %s within %g s; it was not taken",
                    event.id,
                    _PUBLISH_TIMEOUT,
                )
                waiting.taken = False
        except BaseException:
            if not self._leave_line(waiting) and waiting.taken:
                self._take_out(event)
            raise
        if waiting.taken is False:
            self._refused += 1
            return False
        return True

    def _leave_line(self, waiting: "_Waiting") -> bool:
        """Wait no more. False: the event has been dealt with."""
        try:
            self._line.remove(waiting)
        except ValueError:
            return False
        return True

    def _take_out(self, event: Event) -> None:
        """Take an event out of the buffer that was let in as its publisher was cancelled.

        On the dispatcher's loop: there a publisher has its turn before the dispatcher goes on.
        """
        items = self._items
        if self._loop is running_loop() and event in items:
            del items[max(at for at, each in enumerate(items) if each is event)]
            self._let_in()

    def _let_in(self) -> None:
        """Take the events of those who stand in line, as far as there is room."""
        line = self._line
        let_in = False
        while line and not self._buffer.full():
            try:
                waiting = line.popleft()
            except IndexError:  # the last has just left it, in another thread
                break
            self._buffer.force(waiting.event)
            waiting.end(True)
            let_in = True
        if let_in:
            self._give_turn()

    def publish_nowait(self, event: Event) -> bool:
        """Take an event if there is room; from any thread, with or without an event loop.

        Returns:
            Whether it was taken.
        """
        if not self._take_in(event):
            self._refused += 1
            return False
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
        queue = make_queue(buffer_size, overflow, key=key, name=subscription_id)
        if queue.overflow == "block":
            self._blocking[subscription_id] = queue
        self._subscribers[subscription_id] = queue
        return subscription_id

    async def unsubscribe(self, subscription_id: str) -> bool:
        """End a subscription. Its consumer gets what was published so far, and then its end.

        False: there is no subscription with this id.
        """
        queue = self._remove(subscription_id)
        if queue is None:
            return False
        if not queue.ended:
            for event in self._late.pop(queue, []) + self._buffer.snapshot():
                queue.force(event)
        queue.end()
        return True

    def _remove(self, subscription_id: str) -> SubscriberQueue[Event] | None:
        queue = self._subscribers.pop(subscription_id, None)
        self._blocking.pop(subscription_id, None)
        if queue is not None:
            self._dropped_before += queue.dropped
        return queue

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
        if self._running and self._loop is not None and self._loop.is_closed():
            self._scheduled = False  # what that loop has not dispatched is for this one
            self._schedule()
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
        if queue.read_out:
            self._remove(subscription_id)

    # The dispatcher: not a task but a callback, so that there is nothing to cancel or to leak.

    def _move_to(self, loop: asyncio.AbstractEventLoop) -> None:
        """Dispatch on another loop from now on: what was scheduled on the last may never run.

        It is the one that runs.
        """
        self._loop = loop
        self._scheduled = False
        self._awaited.clear()
        if self._late or self._turn is not None:
            self._give_turn()

    def _schedule(self) -> None:
        """Have the dispatcher run soon, on its loop. From any thread."""
        if self._scheduled:
            return
        self._scheduled = True
        loop, running = self._loop, running_loop()
        if loop is not None and loop is not running:
            try:
                loop.call_soon_threadsafe(self._dispatch)
            except RuntimeError:  # it is closed
                loop = None
            else:
                return
        if running is None:
            self._scheduled = False  # a later publisher, or stop, will have a loop
            return
        if loop is None:
            self._move_to(running)
            self._scheduled = True
        running.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Move what is in the buffer to the queues, as the loop was asked to."""
        self._scheduled = False
        self._move()

    def _move(self) -> None:
        """Move what is in the buffer to the queues, as far as there is room."""
        if self._turn is not None:
            return  # _go_on comes after those who have theirs
        if not self._patient:
            self._lose_what_blocks()
        buffer = self._buffer
        count = len(self._items)
        narrow = None
        for queue in tuple(self._blocking.values()):
            if queue.free < count and not queue.ended:
                count, narrow = max(queue.free, 0), queue
        pop = self._items.popleft
        events = [pop() for _ in range(count)]  # here alone they are taken out
        self._moved += count
        if self._line:
            self._let_in()
        if events:
            late = self._late
            only = events[0] if len(events) == 1 else None
            # A copy, since a subscription may be cancelled in another thread.
            for queue in tuple(self._subscribers.values()):
                if only is not None and queue.hand_over(only):
                    continue
                taken = queue.fill(events)
                if taken < len(events):
                    late[queue] = events[taken:]
            if late:
                self._give_turn()
        if self._turn is not None:
            return
        if narrow is not None:
            self._await_room(narrow)
        elif not buffer.empty():
            self._schedule()
        elif self._stopping:
            self._end_consumers()

    def _give_turn(self) -> None:
        """Go on after the consumers and publishers that have just been woken.

        Not by `_schedule`: what was asked for before, or in another thread, may run before they
        do. Consumers would seem not to read, and a publisher that has been let in and is
        cancelled now could not take its event back.
        """
        if self._turn is not None:
            self._turn.cancel()
        self._turn = asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        """Move what did not fit before, now that the consumers have had a turn, and then more."""
        self._turn = None
        for queue, events in tuple(self._late.items()):
            taken = queue.fill(events)
            del events[:taken]
            if not taken:  # nobody reads
                for event in events:
                    queue.feed(event)
                events.clear()
            if not events:
                self._late.pop(queue, None)
        if self._late:
            self._give_turn()
        else:
            self._move()

    def _await_room(self, queue: SubscriberQueue[Event]) -> None:
        if queue not in self._awaited:
            self._awaited.add(queue)
            queue.when_room(partial(self._has_room, queue))

    def _has_room(self, queue: SubscriberQueue[Event]) -> None:
        self._awaited.discard(queue)
        self._schedule()

    def _lose_what_blocks(self) -> None:
        """End the consumers that make the dispatcher wait, with what fits into their queues."""
        events = self._buffer.snapshot()
        for queue in tuple(self._blocking.values()):
            taken = queue.fill(events)
            if taken < len(events):
                queue.lose(len(events) - taken)
            queue.end()

    def _end_now(self) -> None:
        """Move what is left, without giving anybody a turn, and end the consumers."""
        if not self._stopping:
            return
        self._lose_what_blocks()
        rest = self._buffer.take_all()
        self._moved += len(rest)
        for queue in tuple(self._subscribers.values()):
            for event in self._late.pop(queue, []) + rest:
                queue.offer(event)
        self._late.clear()
        self._end_consumers()

    def _end_consumers(self) -> None:
        for queue in tuple(self._subscribers.values()):
            queue.end()
        self._stopping = False
        self._patient = True
        wake_all(self._waiting_for_end)

    def _on_its_loop(self, function: Callable[[], None]) -> None:
        """Call a function where the dispatcher runs, at once if that is here."""
        loop = self._loop
        if loop is not None and loop is not running_loop():
            try:
                loop.call_soon_threadsafe(function)
            except RuntimeError:  # it is closed
                pass
            else:
                return
        function()

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
            published=self._moved + len(self._items),
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


class _AsStream(StreamView):
    """An `AsyncStream` behind the interface of a stream."""

    def __init__(self, stream: AsyncStream) -> None:
        super().__init__(stream)
        self._stream = stream
        self._pumps = stream._pumps
        self._leaving = stream._leaving

    async def publish(self, event: Event) -> None:
        """Take an event, waiting for room in the buffer for up to 5 seconds.

        Raises:
            PublishTimeout: there was no room in time.
            StreamClosed: the stream is stopped.
        """
        check_event(event)
        self._check_taken(await self._stream.publish(event), event)

    def _check_taken(self, taken: bool, event: Event) -> None:
        if not taken:
            self._check_open()
            raise PublishTimeout(f"no room for event {event.id} within {_PUBLISH_TIMEOUT:g} s")

    def publish_nowait(self, event: Event) -> bool:
        check_event(event)
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
        pump = Pump(
            subscription,
            self._stream._iterate(subscription_id, None),
            on_failure=self._handler_failed,
            on_end=lambda: self._pump_ended(pump),
        )
        subscription._runner = self._pumps[subscription_id] = pump
        subscription._release = self._forget
        return subscription

    def _pump_ended(self, pump: Pump) -> None:
        self._forget(pump.subscription.id)
        self._leaving.discard(pump)

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
        self._leaving.add(pump)
        pump.stop()
        queue = self._stream._remove(subscription_id)
        if queue is not None:
            self._stream._late.pop(queue, None)
            queue.end()
        return True

    def statistics(self) -> StreamStatistics:
        return self._stream.statistics()

    async def aclose(self, *, drain: bool = True) -> None:
        pumps = {*self._pumps.values(), *self._leaving}
        for subscription_id in tuple(self._pumps):
            if drain:
                await self._stream.unsubscribe(subscription_id)  # they read on to their end
            else:
                self._forget(subscription_id)
        try:
            if not drain:
                for pump in pumps:
                    pump.cancel()
            await self._stream.stop()
            for pump in pumps:
                await pump.finish()
        finally:
            for pump in pumps:
                pump.cancel()
