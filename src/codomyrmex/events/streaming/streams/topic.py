"""`TopicStream`: a stream of its own for each topic, and patterns across them."""

import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from types import TracebackType
from typing import Any, Self

from ..errors import StreamClosed
from ..models import Event, Filter, Handler, Subscription
from ..topics import TopicFilter, check_topic, is_pattern
from .base import Stream, StreamStatistics
from .memory import InMemoryStream

__all__ = ["TopicStream"]

_SWEPT_AT_ONCE = 8
"""Topics looked at in one sweep: more than one, so that idle ones go faster than new ones come."""


class TopicStream:
    """A stream of its own for each topic, made on first use, and patterns across them.

    Order and failures are each topic's own. An event is given its topic as it is published; the
    caller's event is not changed. A topic without subscribers of its own whose last event is
    older than `idle_ttl` is let go, with the events kept for it. Any thread may use it.

    Args:
        idle_ttl: seconds after its last event for which a topic without subscribers is kept.
        clock: tells the time in seconds; monotonic.

    >>> async def main():
    ...     topics = TopicStream()
    ...     await topics.subscribe("orders.*", print)
    ...     await topics.publish("orders.new", create_event({"total": 9}))
    """

    def __init__(
        self, idle_ttl: float = 600.0, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if idle_ttl <= 0:
            raise ValueError(f"idle_ttl is a number of seconds above 0, not {idle_ttl}")
        self.idle_ttl = idle_ttl
        self._clock = clock
        self._lock = threading.Lock()
        # In the order in which they were last looked at: the longest idle ones are at the front.
        self._topics: OrderedDict[str, _Branch] = OrderedDict()
        self._shared = _Shared(self)
        self._sweep_due = 0.0
        self._gone = StreamStatistics(published=0)
        self._closed = False

    def topic(self, name: str) -> InMemoryStream:
        """The stream of one topic, made if need be.

        Raises:
            TopicError: `name` is not a topic, or is a pattern.
            StreamClosed: the stream has been closed.
        """
        return self._branch(name)

    def list_topics(self) -> list[str]:
        """The topics there are now, sorted."""
        self._sweep(everything=True)
        with self._lock:
            return sorted(self._topics)

    async def publish(self, topic: str, event: Event) -> None:
        """Publish to a topic, as `InMemoryStream.publish`.

        Raises:
            TopicError: `topic` is not a topic, or is a pattern.
            StreamClosed: the stream has been closed.
        """
        await self._branch(topic).publish(event)

    def publish_nowait(self, topic: str, event: Event) -> bool:
        """Publish to a topic without waiting, as `InMemoryStream.publish_nowait`.

        Raises:
            TopicError: `topic` is not a topic, or is a pattern.
            StreamClosed: the stream has been closed.
        """
        return self._branch(topic).publish_nowait(event)

    async def subscribe(
        self,
        topic: TopicFilter,
        handler: Handler,
        filter_fn: Filter | None = None,
        *,
        overflow: str | None = None,
        buffer_size: int = 1000,
        key: Callable[[Event], Hashable] | None = None,
    ) -> Subscription:
        """Call `handler` with every event published from now on to what `topic` matches.

        Args:
            topic: a topic, a pattern (``orders.*``, ``orders.>``, ``*``), or several of them. A
                topic that is named exactly is made, if need be.
            handler: a function or async function of one event. What it raises is logged.
            filter_fn: is asked for each event whether it is wanted.
            overflow: as in `InMemoryStream.subscribe`, like what follows it.

        Raises:
            TopicError: `topic` is not a topic or pattern.
            ValueError: `overflow` is not a policy, or `key` is for another one.
            StreamClosed: the stream has been closed.
        """
        if isinstance(topic, str) and not is_pattern(topic):
            self._branch(topic)
        return await self._shared.subscribe(
            handler, topic, filter_fn, overflow=overflow, buffer_size=buffer_size, key=key
        )

    async def unsubscribe(self, subscription_id: str) -> bool:
        """End a subscription. False: `subscribe` has made none with this id, or it has ended."""
        return await self._shared.unsubscribe(subscription_id)

    def as_stream(self) -> Stream:
        """This as a `Stream`: an event's topic is the one in its metadata, and must be there."""
        return _AsStream(self)

    async def drain(self) -> None:
        """Wait until everything published so far has been handled, by async handlers too."""
        for branch in tuple(self._topics.values()):
            await branch.drain()
        await self._shared.drain()

    def statistics(self) -> StreamStatistics:
        """Counts of all topics together, those that were let go included."""
        with self._lock:
            branches = tuple(self._topics.values())
            total = self._gone
        for branch in (self._shared, *branches):
            total = _sum(total, branch.statistics())
        return total

    async def aclose(self, *, drain: bool = True) -> None:
        """End the stream: deliver what was published, then end all subscriptions.

        Args:
            drain: False: what is not delivered yet is given up.
        """
        with self._lock:
            self._closed = True
            branches = tuple(self._topics.values())
        for branch in (*branches, self._shared):
            await branch.aclose(drain=drain)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose(drain=kind is None)

    def _branch(self, name: str, instead: "_Branch | None" = None) -> "_Branch":
        """The stream of a topic, of which there is one at a time; `instead`, if there is none."""
        branch = self._topics.get(name)
        if branch is not None:
            return branch
        check_topic(name)
        with self._lock:
            branch = self._topics.get(name)
            if branch is None:
                if self._closed:
                    raise StreamClosed("the stream has been closed; it has no more topics")
                branch = self._topics[name] = instead or _Branch(self, name)
                branch.last_event = branch.looked_at = self._clock()
        self._sweep()
        return branch

    def _sweep(self, *, everything: bool = False) -> None:
        """Let topics go that are idle: some, so that no publisher waits for a million of them."""
        now = self._clock()
        since = now - self.idle_ttl
        with self._lock:
            for _ in range(len(self._topics) if everything else _SWEPT_AT_ONCE):
                name, branch = next(iter(self._topics.items()), ("", None))
                if branch is None or branch.looked_at > since:
                    self._sweep_due = now + self.idle_ttl / 8
                    return
                if branch.last_event > since or branch.is_subscribed():
                    branch.looked_at = now
                    self._topics.move_to_end(name)
                else:
                    del self._topics[name]
                    self._gone = _sum(self._gone, branch.statistics())


class _Shared(InMemoryStream):
    """The subscriptions that the topics share. Nothing is published here."""

    def __init__(self, root: TopicStream) -> None:
        super().__init__(0)
        self._owner = root

    def has_subscribers(self, topic: str) -> bool:
        return self._index.has_exact(topic)

    def known(self, topic: str) -> tuple[Subscription, ...] | None:
        return self._index.answers.get(topic)

    def match(self, topic: str) -> tuple[Subscription, ...]:
        with self._lock:
            return self._index.match(topic)


class _Branch(InMemoryStream):
    """One topic: its own subscribers, then those that topics share."""

    def __init__(self, root: TopicStream, name: str) -> None:
        super().__init__()
        self.name = name
        self.last_event = 0.0
        self.looked_at = 0.0
        self._root = root
        self._owner = root
        self._crowd = root._shared._crowd
        self._sharing: tuple[Subscription, ...] | None = None

    def is_subscribed(self) -> bool:
        return bool(self._subscriptions) or self._root._shared.has_subscribers(self.name)

    async def publish(self, event: Event) -> None:
        await super().publish(event.with_topic(self.name))

    def publish_nowait(self, event: Event) -> bool:
        return super().publish_nowait(event.with_topic(self.name))

    def publish_soon(self, event: Event) -> Awaitable[None] | None:
        return super().publish_soon(event.with_topic(self.name))

    def _append(self, event: Event) -> None:
        root = self._root
        live = root._branch(self.name, self)
        if live is not self:  # this one was let go, and the topic has been made again since
            live._append(event)
            return
        self.last_event = now = root._clock()
        if now >= root._sweep_due:
            root._sweep()
        self._look_up_sharing()
        super()._append(event)

    def _look_up_sharing(self) -> None:
        """Forget whom events are for when those who share the topics have changed."""
        known = self._root._shared.known(self.name)
        if known is None or known is not self._sharing:
            self._sharing = self._root._shared.match(self.name)
            self._index.answers.clear()

    def _route(self, event: Event) -> tuple[Subscription, ...]:
        found = self._index.answers.get(self.name)
        if found is None:
            found = self._index.match(self.name) + (self._sharing or ())
            self._index.answers[self.name] = found
        return found

    def _subscribe(self, *args: Any, **options: Any) -> Subscription:
        live = self._root._branch(self.name, self)
        return (
            super()._subscribe(*args, **options)
            if live is self
            else live._subscribe(*args, **options)
        )


class _AsStream(Stream):
    """A `TopicStream` behind the interface of a stream."""

    def __init__(self, topics: TopicStream) -> None:
        self._topics = topics

    async def publish(self, event: Event) -> None:
        await self._topics.publish(check_topic(event.metadata.get("topic")), event)

    def publish_nowait(self, event: Event) -> bool:
        return self._topics.publish_nowait(check_topic(event.metadata.get("topic")), event)

    async def subscribe(
        self, handler: Handler, topic: TopicFilter = "*", filter_fn: Filter | None = None
    ) -> Subscription:
        return await self._topics.subscribe(topic, handler, filter_fn)

    async def unsubscribe(self, subscription_id: str) -> bool:
        return await self._topics.unsubscribe(subscription_id)

    async def finish(self, subscription_id: str) -> bool:
        return await self._topics._shared.finish(subscription_id)

    def statistics(self) -> StreamStatistics:
        return self._topics.statistics()

    async def aclose(self, *, drain: bool = True) -> None:
        await self._topics.aclose(drain=drain)


def _sum(one: StreamStatistics, other: StreamStatistics) -> StreamStatistics:
    return StreamStatistics(
        published=one.published + other.published,
        refused=one.refused + other.refused,
        dropped=one.dropped + other.dropped,
        failed=one.failed + other.failed,
        buffered=one.buffered + other.buffered,
        subscribers=one.subscribers + other.subscribers,
        queues={**one.queues, **other.queues},
    )
