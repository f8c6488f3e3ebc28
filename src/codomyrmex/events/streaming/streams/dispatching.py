"""Delivery to handlers: one order for all, no lock held while a handler runs.

Whoever publishes appends the event and then, if nobody delivers yet, takes the delivery token
and delivers, until nothing is pending. A publish made meanwhile, by a handler or by another
thread, leaves its event to the one who holds the token. So all subscribers see one order, a
handler may publish, subscribe and unsubscribe as it likes, and a slow handler blocks no other
thread's event loop.
"""

import asyncio
import inspect
import logging
import sys
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterator
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any, Protocol

from ..errors import StreamClosed, StreamingError
from ..forks import follow_forks
from ..models import Event, Filter, Handler, Subscription, check_event
from ..subscribers import SubscriberQueue, make_queue
from ..topics import TopicFilter, TopicIndex
from ..wakeups import Waiters, running_loop, wait_until, wake_all
from .base import Stream, StreamStatistics
from .runner import SerialRunner, close_unstarted

__all__ = ["DispatchingStream"]

_logger = logging.getLogger("codomyrmex.events.streaming")

_TURN = 64
"""Events after which whoever delivers hands the token on."""

_HANDLER_QUEUE = 1000
"""Events that may wait for one async handler."""

_MAX_PENDING = 1000
"""Events that may wait for a delivery in another thread before publishers wait."""


class _Answers(Protocol):
    """Whom events of a topic are for, as far as that is known."""

    def __getitem__(self, topic: Any, /) -> tuple[Subscription, ...]: ...


class DispatchingStream(Stream):
    """Base of the streams with handlers. A subclass says what delivering to a subscription is.

    Args:
        buffer_size: how many of the latest events are kept.
    """

    def __init__(self, buffer_size: int) -> None:
        if buffer_size < 0:
            raise ValueError(f"buffer_size is a number of events, 0 or more, not {buffer_size}")
        self._lock = threading.Lock()
        self._index: TopicIndex[Subscription] = TopicIndex()
        self._answers: _Answers = self._index.answers
        self._subscriptions: dict[str, Subscription] = {}
        self._queues: dict[str, SubscriberQueue[Event]] = {}
        self._runners: dict[str, SerialRunner[Event]] = {}
        self._event_buffer: deque[Event] = deque(maxlen=buffer_size)
        self._pending: deque[tuple[Event, tuple[Subscription, ...]]] = deque()
        # The delivery token is here while nobody delivers.
        self._token: list[None] = [None]
        # Whom an event is for that was pending and is being delivered.
        self._delivering: tuple[Subscription, ...] | None = None
        self._closed = False
        # Subscribers with the policy "block" that are behind: publishers wait for them.
        self._crowd: set[SubscriberQueue[Event]] = set()
        self._settled: Waiters = []
        # The event loops in which somebody waits for deliveries.
        self._waiting: list[asyncio.AbstractEventLoop] = []
        # Handlers that run although their subscription has ended.
        self._leaving: set[SerialRunner[Event]] = set()
        # Subscriptions that have ended but are still in the index.
        self._forgotten: deque[str] = deque()
        self._owner: object = object()  # not itself: that would be for the garbage collector
        self._published = 0
        self._refused = 0
        self._failed = 0
        self._dropped_before = 0
        follow_forks(self)

    # Publishing.

    async def publish(self, event: Event) -> None:
        """Append the event and deliver it, after all that were published before it.

        Sync handlers have run when this returns, unless it was called from a handler or while
        another thread delivers: then the event is queued for delivery. It waits while an async
        handler with the policy ``block`` that this event's topic reaches is behind, but never when
        called from a handler of this stream.

        Raises:
            TopicError: the topic in the event's metadata cannot be one.
            StreamClosed: the stream has been closed.
        """
        if self._crowd or self._pending:
            await self._wait_for_room(event)
        self._append(event)

    def publish_nowait(self, event: Event) -> bool:
        """`publish`, without ever waiting; from any thread, with or without an event loop.

        Returns:
            False: `publish` would have had to wait; the event was not taken, and is counted as
            refused.

        Raises:
            TopicError: the topic in the event's metadata cannot be one.
            StreamClosed: the stream has been closed.
        """
        if (self._crowd or len(self._pending) >= _MAX_PENDING) and self._obstacle(
            event
        ) is not None:
            self._refused += 1
            return False
        self._append(event)
        return True

    def publish_soon(self, event: Event) -> Awaitable[None] | None:
        """`publish`, done by the time this returns if it would not have to wait.

        Returns:
            None, or what has to be awaited for the event to be published.
        """
        if self._crowd or self._pending:
            return self.publish(event)
        self._append(event)
        return None

    def _route(self, event: Event) -> tuple[Subscription, ...]:
        """Whom an event is for. The lock is held."""
        self._tidy()
        return self._index.match(event.metadata.get("topic"))

    def _append(self, event: Event) -> None:
        """Put an event into the one order, and deliver it if nobody else does.

        Every publisher's path. The token is taken and given back by single operations on a list,
        which are atomic and take half the time of a lock's; without contention there is no other.
        It is taken by a statement and not by a call, after which a signal could be handled: so a
        KeyboardInterrupt comes before that or inside the ``try``, and the token is never lost.
        """
        try:
            del self._token[0]
        except IndexError:
            self._append_pending(event)
            return
        try:
            try:
                metadata = event.metadata
                targets: tuple[Subscription, ...] | None
                try:
                    targets = self._answers[metadata.get("topic") if metadata else None]
                except (KeyError, TypeError):  # not hashable: not a topic, and _route says so
                    targets = None
                if targets is None:
                    with self._lock:
                        self._check_open()
                        targets = self._route(event)
                if self._pending:
                    with self._lock:
                        self._check_open()
                        # Whom it is for now: others came before it since it was looked up, and who
                        # got those must get this too.
                        self._pending.append((event, self._route(event)))
                        self._published += 1
                else:
                    self._event_buffer.append(event)
                    self._published += 1
                    for subscription in targets:
                        try:
                            result = subscription._deliver(event)
                            if result is not None and inspect.isawaitable(result):
                                self._returned_awaitable(subscription, result)
                        except (Exception, asyncio.CancelledError):
                            self._log_failure(subscription, event)
            finally:
                # After KeyboardInterrupt and SystemExit too: the next publisher delivers the rest.
                self._token.append(None)
                if self._settled:
                    wake_all(self._settled)
        except Exception:  # it is refused; but others may have left theirs to this thread meanwhile
            if self._pending:
                self._deliver_pending()
            check_event(event)
            raise
        # Whoever appended before the token was back has left the event to this thread.
        if self._pending:
            self._deliver_pending()

    def _append_pending(self, event: Event) -> None:
        """Leave an event to the one who delivers, or deliver all that is pending."""
        with self._lock:
            self._check_open()
            self._pending.append((event, self._route(event)))
            self._published += 1
        if self._token:
            self._deliver_pending()

    def _check_open(self) -> None:
        if self._closed:
            raise StreamClosed("the stream has been closed; it takes no more events")

    def _deliver_pending(self) -> None:
        """Deliver what is pending, unless somebody else does, for a turn."""
        while True:
            for _ in range(_TURN):
                if not self._deliver_next():
                    return
            if self._hand_on():
                return

    def _deliver_next(self) -> bool:
        """Take the token and deliver one event. False: it is taken, or nothing is pending."""
        while self._pending:
            try:
                del self._token[0]  # not by a call: see _append
            except IndexError:
                return False
            try:
                with self._lock:
                    if not self._pending:  # pragma: no cover - a race in the instant before
                        continue  # and look again: an event may come before the token is back
                    event, targets = self._pending.popleft()
                    self._event_buffer.append(event)
                    self._delivering = targets
                for subscription in targets:
                    try:
                        result = subscription._deliver(event)
                        if result is not None and inspect.isawaitable(result):
                            self._returned_awaitable(subscription, result)
                    except (Exception, asyncio.CancelledError):
                        self._log_failure(subscription, event)
            finally:
                self._delivering = None
                self._token.append(None)
                if self._settled:
                    wake_all(self._settled)
            return True
        return False

    def _hand_on(self) -> bool:
        """Let an event loop deliver what is pending. False: there is none; the holder goes on."""
        loop = running_loop()
        if loop is not None:
            loop.call_soon(self._deliver_pending)
            return True
        handling = [runner.loop for runner in tuple(self._runners.values())]
        for loop in dict.fromkeys((*self._waiting, *handling)):
            if loop is not None and loop.is_running():
                with suppress(RuntimeError):  # it was closed just now
                    loop.call_soon_threadsafe(self._deliver_pending)
                    return True
        return False

    def _is_called_by_handler(self) -> bool:
        """Whether the caller is, directly or not, a handler of this stream.

        A sync handler is found by the delivery beneath it on the stack, which costs nothing until
        somebody asks: a thread without an event loop may run one inside a handler.
        """
        owner = self._owner
        return SerialRunner.runs_for(owner) or any(
            stream._owner is owner for stream in _streams_beneath()
        )

    def _returned_awaitable(self, subscription: Subscription, awaitable: Any) -> None:
        """A handler that looked synchronous returned an awaitable: from now on it is queued."""
        home: DispatchingStream = subscription._home
        with home._lock:
            runner: SerialRunner[Any] | None = subscription._runner
            if runner is None:
                runner = home._queue_handler(subscription, _HANDLER_QUEUE, "block", None)
                home._deliver_by(subscription, runner.feed)
        runner.feed(awaitable)
        if subscription.id not in home._subscriptions:
            home._let_finish(subscription, awaitable)

    def _let_finish(self, subscription: Subscription, awaitable: Any) -> None:
        """A handler ended its own subscription and then returned an awaitable: its last."""
        runner: SerialRunner[Any] = subscription._runner
        if self._runners.pop(subscription.id, None) is None:  # somebody else ended it
            close_unstarted(awaitable)
            return
        self._queues.pop(subscription.id, None)
        self._leaving.add(runner)
        runner.queue.end()

    def _deliver_by(self, subscription: Subscription, receive: Handler) -> None:
        """Set what delivering to a subscription is."""
        subscription._deliver_by(receive)

    def _queue_handler(
        self,
        subscription: Subscription,
        maxsize: int,
        overflow: str,
        key: Callable[[Event], Hashable] | None,
    ) -> SerialRunner[Event]:
        """What calls a subscription's handler in a task, from a queue of its own."""

        def call(item: Any) -> Any:
            if isinstance(item, Event):
                handler = subscription.handler
                return None if handler is None else handler(item)
            return item  # an awaitable that the handler has returned

        queue = make_queue(maxsize, overflow, key=key, name=subscription.id, crowd=self._crowd)
        runner = SerialRunner(
            call,
            queue,
            self._owner,
            partial(self._log_failure, subscription),
            loop=subscription._loop,
            on_end=partial(self._runner_ended, subscription),
            tells_losses=queue.overflow != "block",
        )
        subscription._runner = runner
        self._runners[subscription.id] = runner
        self._queues.setdefault(subscription.id, queue)
        return runner

    def _runner_ended(self, subscription: Subscription) -> None:
        """A handler has returned, and will not be called again."""
        self._leaving.discard(subscription._runner)
        self._forget(subscription.id)

    def _log_failure(self, subscription: Subscription, event: object) -> None:
        with self._lock:
            self._failed += 1
        _logger.exception(
            "handler %r of subscription %s failed on %r; other subscribers are not affected",
            subscription.handler,
            subscription.id,
            event,
        )

    # Room.

    def _behind(self, event: Event) -> SubscriberQueue[Event] | None:
        """The first queue that `publish` has to wait for, if there is one."""
        with self._lock:
            targets = self._route(event)
        for subscription in targets:
            home: DispatchingStream = subscription._home
            runner: SerialRunner[Event] | None = subscription._runner
            if runner is not None and runner.queue.crowded:
                runner.start()
                return runner.queue
            queue = home._queues.get(subscription.id)
            if queue is not None and queue.crowded:
                return queue
        return None

    def _obstacle(self, event: Event) -> Callable[[], Awaitable[None]] | None:
        """What waits until there is room, if `publish` has to."""
        if len(self._pending) >= _MAX_PENDING:
            self._deliver_pending()
        wait: Callable[[], Awaitable[None]] | None = None
        if len(self._pending) >= _MAX_PENDING:
            wait = self._wait_for_deliveries
        elif (queue := self._behind(event)) is not None:
            wait = queue.room
        if wait is None or self._closed or self._is_called_by_handler():
            return None
        return wait

    async def _wait_for_room(self, event: Event) -> None:
        while self._crowd or len(self._pending) >= _MAX_PENDING:
            wait = self._obstacle(event)
            if wait is None:
                return
            await wait()

    async def _wait_for_deliveries(self) -> None:
        await self._wait_until(lambda: len(self._pending) < _MAX_PENDING)

    async def _wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait until this is so, which is looked at after each delivery."""
        loop = asyncio.get_running_loop()
        self._waiting.append(loop)
        try:
            while not ready():
                self._deliver_pending()  # whoever was at it may have been interrupted
                await wait_until(self._settled, ready)
        finally:
            self._waiting.remove(loop)

    async def drain(self) -> None:
        """Wait until everything published so far has been handled, by async handlers too.

        Raises:
            StreamingError: called from a handler of this stream, which would wait for itself.
        """
        if self._is_called_by_handler():
            raise StreamingError("drain() in a handler of the same stream would wait for itself")
        await self._settle()
        for runner in tuple(self._runners.values()):
            await runner.drain()

    async def _settle(self) -> None:
        """Wait until everything published so far has been delivered, to queues where there are."""
        target = self._published
        await self._wait_until(lambda: self._has_settled(target))

    def _has_settled(self, target: int) -> bool:
        with self._lock:
            waiting = len(self._pending) + (not self._token)
            return self._published - waiting >= target

    # Subscribing.

    @abstractmethod
    def _attach(self, subscription: Subscription, **options: Any) -> None:
        """Set what delivering to a new subscription is."""

    def _subscribe(
        self,
        handler: Handler | None,
        topic: TopicFilter,
        filter_fn: Filter | None,
        **options: Any,
    ) -> Subscription:
        subscription = Subscription(topic=topic, handler=handler, filter_fn=filter_fn)
        subscription._home = self
        subscription._loop = running_loop()
        with self._lock:
            self._tidy()
            if self._closed:
                raise StreamClosed("the stream has been closed; it takes no more subscriptions")
            self._index.add(subscription.id, topic, subscription)
            try:
                self._attach(subscription, **options)
            except BaseException:
                self._index.discard(subscription.id)
                raise
            self._subscriptions[subscription.id] = subscription
            subscription._release = self._forget
        return subscription

    async def unsubscribe(self, subscription_id: str) -> bool:
        """End a subscription: once this returns, its handler is not called again.

        A call that runs now is not interrupted. False: there is no subscription with this id.
        """
        return self._forget(subscription_id)

    async def finish(self, subscription_id: str) -> bool:
        """End a subscription once its handler has dealt with all that was published before.

        False: there is none with this id.
        """
        subscription = self._subscriptions.get(subscription_id)
        if subscription is None:
            return False
        if not self._is_called_by_handler():
            await self._settle()
            if subscription._runner is not None:
                await subscription._runner.drain()
        return self._forget(subscription_id)

    def _forget(self, subscription_id: str) -> bool:
        """End a subscription. From any thread, and waiting for no lock.

        For this may be called by a finalizer, which the garbage collector runs wherever it likes:
        also in a thread that holds the lock.
        """
        subscription = self._subscriptions.pop(subscription_id, None)
        if subscription is None:
            return False
        subscription._release = None
        subscription.active = False
        queue = self._queues.pop(subscription_id, None)
        runner = self._runners.pop(subscription_id, None)
        if queue is not None:
            self._dropped_before += queue.dropped
            queue.end()
        if runner is not None:
            self._leaving.add(runner)
            runner.stop()
            if runner.has_ended:
                self._leaving.discard(runner)
        self._forgotten.append(subscription_id)
        if self._lock.acquire(blocking=False):
            try:
                self._tidy()
            finally:
                self._lock.release()
        return True

    def _tidy(self) -> None:
        """Take out of the index what has been forgotten. The lock is held."""
        while self._forgotten:
            self._index.discard(self._forgotten.popleft())

    # The rest.

    def get_recent_events(self, count: int = 10) -> list[Event]:
        """The latest events, oldest first: at most `count`, and at most what the buffer holds."""
        if count <= 0:
            return []
        with self._lock:
            pending = [event for event, _ in tuple(self._pending)]
            recent = [*self._event_buffer, *pending][-self._buffer_size :]
            return recent[-count:] if self._buffer_size else []

    @property
    def _buffer_size(self) -> int:
        """How many of the latest events are kept; a new value counts at once."""
        return self._event_buffer.maxlen or 0

    @_buffer_size.setter
    def _buffer_size(self, size: int) -> None:
        with self._lock:
            self._event_buffer = deque(self._event_buffer, maxlen=size)

    def statistics(self) -> StreamStatistics:
        """Counts since the stream was made, as of now."""
        with self._lock:
            queues = {key: queue.statistics() for key, queue in tuple(self._queues.items())}
            return StreamStatistics(
                published=self._published,
                refused=self._refused,
                dropped=self._dropped_before + sum(queue.dropped for queue in queues.values()),
                failed=self._failed,
                buffered=min(len(self._event_buffer) + len(self._pending), self._buffer_size),
                subscribers=len(self._subscriptions),
                queues=queues,
            )

    async def aclose(self, *, drain: bool = True) -> None:
        """End the stream: deliver what was published, then end all subscriptions.

        Afterwards publishing and subscribing raise `StreamClosed`. The latest events can still be
        read.

        Called by a handler of this stream, it cannot wait for that one, and gives up the rest.

        Args:
            drain: False: what is not delivered yet is given up, handlers that run are cancelled.
        """
        self._shut()
        try:
            if drain and not self._is_called_by_handler():
                await self._wind_down()
        finally:
            ending = self._end()
        for runner in ending:
            await runner.finish()

    def _shut(self) -> None:
        """Take no more events."""
        with self._lock:
            self._closed = True
            self._answers = {}  # so that every publisher looks closer

    async def _wind_down(self) -> None:
        """Wait until all has been handled, and handlers that were unsubscribed have returned."""
        await self.drain()
        for runner in tuple(self._leaving):
            await runner.finish()

    def _end(self) -> tuple[SerialRunner[Event], ...]:
        """End all subscriptions, and interrupt the handlers that still run, which it returns."""
        for runner in (*self._runners.values(), *self._leaving):
            runner.cancel()
        for subscription_id in tuple(self._subscriptions):
            self._forget(subscription_id)
        with self._lock:
            self._pending.clear()
        wake_all(self._settled)
        return tuple(self._leaving)

    def _after_fork(self) -> None:  # pragma: no cover - runs in forked children only
        """What other threads were at in the parent does not go on in this child."""
        self._lock = threading.Lock()
        if self not in _streams_beneath():
            self._delivering = None
            self._token = [None]
        self._waiting.clear()
        for subscription in self._subscriptions.values():
            subscription._loop = None
        for queue in self._queues.values():
            queue.forget_waiters()
        for runner in (*self._runners.values(), *self._leaving):
            runner.queue.forget_waiters()
            runner.leave_loop()


def _streams_beneath() -> Iterator[DispatchingStream]:
    """The streams that deliver in this thread now, and whose handlers have led here."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code in _DELIVERING:
            yield frame.f_locals["self"]
        frame = frame.f_back


_DELIVERING = frozenset(
    {DispatchingStream._append.__code__, DispatchingStream._deliver_next.__code__}
)
