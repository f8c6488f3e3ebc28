"""`SSEStream`: events to readers, each with a queue of its own, as events or as SSE text."""

from collections.abc import AsyncGenerator, Callable, Hashable, Iterable, Iterator
from functools import partial
from typing import Any

from ..errors import AlreadyConsumed, UnknownSubscription
from ..models import Event, EventType, Filter, Handler, Subscription, check_event, control_event
from ..subscribers import HEARTBEAT_INTERVAL, SubscriberQueue, make_queue, prime
from ..topics import TopicFilter, matches
from .dispatching import DispatchingStream
from .runner import is_async

__all__ = ["SSEStream"]


def _heartbeat() -> Event:
    return Event(type=EventType.HEARTBEAT)


class SSEStream(DispatchingStream):
    """Events to readers, each through a bounded queue, as events or as text of an SSE response.

    A reader that is slower than the stream loses by its overflow policy, ``drop_oldest`` unless
    told otherwise, and is told: a control event ``stream.lost`` stands where events are missing.
    A reader that comes back with the last id it has seen gets what the buffer holds after it.
    Any thread may publish.

    Args:
        buffer_size: how many events a reader's queue and the replay buffer hold, each.
        heartbeat_interval: seconds without an event after which a reader gets one of type
            HEARTBEAT; None: never.

    >>> async def response(stream, last_event_id=None):
    ...     subscription = await stream.subscribe(topic="orders.*")
    ...     async for text in stream.sse_generator(subscription.id, last_event_id):
    ...         yield text
    """

    def __init__(
        self, buffer_size: int = 100, *, heartbeat_interval: float | None = HEARTBEAT_INTERVAL
    ) -> None:
        if buffer_size < 1:
            raise ValueError(f"buffer_size is a number of events, 1 or more, not {buffer_size}")
        super().__init__(buffer_size)
        self.heartbeat_interval = heartbeat_interval

    def _append(self, event: Event) -> None:
        check_event(event)
        # Written once, for every reader, and here, where the publisher is told if it cannot be.
        event._frame = event.to_sse()
        # Always by way of what is pending: a replay relies on the lock for what has been delivered.
        self._append_pending(event)

    async def subscribe(
        self,
        handler: Handler | None = None,
        topic: TopicFilter = "*",
        filter_fn: Filter | None = None,
        *,
        overflow: str = "drop_oldest",
        key: Callable[[Event], Hashable] | None = None,
    ) -> Subscription:
        """Queue every event that is published from now on and matches, for `events`.

        Args:
            handler: is called with each event as well, as by `InMemoryStream`. An async one is
                behind, and with it `publish`, when `buffer_size` events wait for it.
            topic: a topic, a pattern (``orders.*``, ``orders.>``), or several of them.
            filter_fn: is asked for each event whether it is wanted.
            overflow: what happens when the queue is full: ``drop_oldest``, ``drop_newest``,
                ``latest_by_key``, ``disconnect``, or ``block``: `publish` waits for the reader.
            key: for ``latest_by_key``: the key of an event, by default its topic.

        Raises:
            TopicError: `topic` is not a topic or pattern.
            ValueError: `overflow` is not a policy, or `key` is for another one.
            StreamClosed: the stream has been closed.
        """
        return self._subscribe(handler, topic, filter_fn, overflow=overflow, key=key)

    def _attach(
        self,
        subscription: Subscription,
        *,
        overflow: str = "drop_oldest",
        key: Callable[[Event], Hashable] | None = None,
        **options: Any,
    ) -> None:
        queue = make_queue(
            self._buffer_size, overflow, key=key, name=subscription.id, crowd=self._crowd
        )
        self._queues[subscription.id] = queue
        handler = subscription.handler
        if handler is not None and is_async(handler):
            runner = self._queue_handler(subscription, self._buffer_size, "block", None)
            self._deliver_by(subscription, runner.feed)
        else:
            self._deliver_by(subscription, None)

    def _deliver_by(self, subscription: Subscription, receive: Handler | None) -> None:
        queue = self._queues[subscription.id]
        if subscription.handler is None:
            subscription._deliver_by(queue.feed)
            return
        # A subscription may be there for its handler alone. So while nobody reads the queue, what
        # leaves it is not a loss.
        keeps_latest = queue.overflow == "drop_oldest"

        def deliver(event: Event) -> Any:
            if keeps_latest and not queue.reading and queue.full():
                queue.take(1)  # or none, if one who begins to read has been quicker
            queue.feed(event)
            handler = receive or subscription.handler
            return None if handler is None else handler(event)

        subscription._deliver_by(deliver)

    def events(
        self, subscription_id: str, last_event_id: str | None = None
    ) -> AsyncGenerator[Event, None]:
        """The events of a subscription, from its queue, until it or the stream ends.

        Between them come HEARTBEAT events, and control events (metadata ``control``) where
        events were lost or could not be replayed. Closing the generator, even one that was never
        started, ends the subscription.

        Args:
            subscription_id: from `subscribe`.
            last_event_id: replay first what the buffer holds after the event with this id. When
                it does not hold that event, a control event ``stream.gap`` comes first and the
                replay begins with the earliest event there is. ``earliest``: all that the buffer
                holds. None or empty: no replay.

        Raises:
            UnknownSubscription: there is no such subscription (any more).
            AlreadyConsumed: it is being read already.
        """
        with self._lock:
            subscription = self._subscriptions.get(subscription_id)
            queue = self._queues.get(subscription_id)
            if subscription is None or queue is None:
                raise UnknownSubscription(subscription_id)
            if queue.reading:
                raise AlreadyConsumed(subscription_id)
            first: Iterable[Event] = ()
            if last_event_id:
                first = self._replay(subscription, queue, last_event_id)
            elif unread := queue.received - queue.evicted - queue.qsize():
                first = (control_event("stream.lost", lost=unread, overflow=queue.overflow),)
            return prime(
                queue.iterate(
                    first=first,
                    idle=self.heartbeat_interval,
                    on_idle=_heartbeat,
                    on_close=partial(self._forget, subscription_id),
                )
            )

    def sse_generator(
        self, subscription_id: str, last_event_id: str | None = None
    ) -> AsyncGenerator[str, None]:
        """`events` as text: each event as one frame of Server-Sent Events, as `Event.to_sse`.

        Frames of heartbeats and control events carry no id.

        Raises:
            UnknownSubscription: there is no such subscription (any more).
            AlreadyConsumed: it is being read already.
        """
        return prime(_frames(self.events(subscription_id, last_event_id)))

    def _replay(
        self, subscription: Subscription, queue: SubscriberQueue[Event], last_event_id: str
    ) -> Iterator[Event]:
        """What a reader that has seen `last_event_id` is owed, in place of what is in its queue.

        The lock is held; what this returns is looked at without it, since it asks the filter.
        """
        # What is still to be delivered to this subscription comes through its queue. A delivery
        # may go on meanwhile, so it is looked up before the queue is emptied.
        coming = {id(event) for event, targets in self._pending if subscription in targets}
        if subscription in (self._delivering or ()) and self._event_buffer:
            coming.add(id(self._event_buffer[-1]))
        kept = [*self._event_buffer, *(event for event, _ in self._pending)][-self._buffer_size :]
        queued = queue.take_all()
        coming.difference_update(map(id, queued))
        for index, event in enumerate(kept):
            # The first of several with one id: the reader may have seen no more than that.
            if event.id == last_event_id:
                owed = kept[index + 1 :]
                break
        else:
            # Not here: trimmed, or never was. The queue may reach further back than the buffer.
            in_buffer = set(map(id, kept))
            owed = [event for event in queued if id(event) not in in_buffer] + kept
            if last_event_id != "earliest":
                owed.insert(0, control_event("stream.gap", after=last_event_id))
        return (
            event
            for event in owed
            if id(event) not in coming and (event.is_control or self._wants(subscription, event))
        )

    def _wants(self, subscription: Subscription, event: Event) -> bool:
        try:
            # Not should_receive: a reader whose subscription has ended gets the rest of its replay.
            if not matches(subscription.topic, event.metadata.get("topic")):
                return False
            return subscription.filter_fn is None or bool(subscription.filter_fn(event))
        except Exception:
            self._log_failure(subscription, event)
            return False


async def _frames(events: AsyncGenerator[Event, None]) -> AsyncGenerator[str, None]:
    try:
        yield ""  # for prime
        async for event in events:
            yield getattr(event, "_frame", None) or event.to_sse()
    finally:
        await events.aclose()
