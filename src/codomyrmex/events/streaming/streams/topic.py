"""`TopicStream`: a stream of its own for each topic, and patterns across them."""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from types import TracebackType
from typing import Any, Self
from weakref import WeakValueDictionary

from ..errors import StreamClosed
from ..forks import follow_forks
from ..models import Event, Filter, Handler, Subscription, check_event
from ..subscribers import QueueStatistics
from ..topics import TopicFilter, check_topic, is_pattern
from .base import Stream, StreamStatistics, StreamView
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
        # Topics that were let go while somebody holds on to them: to be taken up again.
        self._held: WeakValueDictionary[str, _Branch] = WeakValueDictionary()
        self._shared = _Shared(self)
        self._sweep_due = 0.0
        # What the topics that were let go have counted.
        self._gone: Counter[str] = Counter()
        self._closed = False
        follow_forks(self)

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
                single topic is made, if need be.
            handler: a function or async function of one event. What it raises is logged.
            filter_fn: is asked for each event whether it is wanted.
            overflow: as in `InMemoryStream.subscribe`, like what follows it.

        Raises:
            TopicError: `topic` is not a topic or pattern.
            ValueError: `overflow` is not a policy, or `key` is for another one.
            StreamClosed: the stream has been closed.
        """
        subscription = await self._shared.subscribe(
            handler, topic, filter_fn, overflow=overflow, buffer_size=buffer_size, key=key
        )
        if isinstance(topic, str) and not is_pattern(topic):
            self._branch(topic)
        return subscription

    async def unsubscribe(self, subscription_id: str) -> bool:
        """End a subscription. False: `subscribe` has made none with this id, or it has ended."""
        return await self._shared.unsubscribe(subscription_id)

    def as_stream(self) -> Stream:
        """This as a `Stream`: an event's topic is the one in its metadata, and must be there."""
        return _AsStream(self)

    async def drain(self) -> None:
        """Wait until everything published so far has been handled, by async handlers too.

        Raises:
            StreamingError: called from a handler of this stream, which would wait for itself.
        """
        for stream in self._streams():
            await stream.drain()

    async def _finish(self, subscription_id: str) -> bool:
        if not self._is_called_by_handler():
            for stream in self._streams():
                await stream._settle()
        return await self._shared.finish(subscription_id)

    def _streams(self) -> "list[InMemoryStream]":
        """The topics, and then what their handlers share."""
        with self._lock:
            return [*self._topics.values(), self._shared]

    def _is_called_by_handler(self) -> bool:
        return self._shared._is_called_by_handler()

    def statistics(self) -> StreamStatistics:
        """Counts of all topics together, those that were let go included."""
        with self._lock:
            counts = self._gone.copy()
            streams = [self._shared, *self._topics.values()]
        queues: dict[str, QueueStatistics] = {}
        buffered = subscribers = 0
        for stream in streams:
            statistics = stream.statistics()
            counts.update(_counts(statistics))
            queues.update(statistics.queues)
            buffered += statistics.buffered
            subscribers += statistics.subscribers
        return StreamStatistics(
            **{name: counts[name] for name in _COUNTS},
            buffered=buffered,
            subscribers=subscribers,
            queues=queues,
        )

    async def aclose(self, *, drain: bool = True) -> None:
        """End the stream: deliver what was published, then end all subscriptions.

        Called by a handler of this stream, it cannot wait for that one, and gives up the rest.

        Args:
            drain: False: what is not delivered yet is given up, handlers that run are cancelled.
        """
        with self._lock:
            self._closed = True
        streams = self._streams()
        for stream in streams:
            stream._shut()
        try:
            if drain and not self._is_called_by_handler():
                for stream in streams:
                    await stream._wind_down()
        finally:
            ending = [runner for stream in streams for runner in stream._end()]
        for runner in ending:
            await runner.finish()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose(drain=kind is None)

    def _branch(self, name: str) -> "_Branch":
        """The stream of a topic, of which there is one at a time."""
        branch = self._topics.get(name)
        if branch is not None:
            return branch
        check_topic(name)
        with self._lock:
            branch = self._topics.get(name)
            if branch is None:
                if self._closed:
                    raise StreamClosed("the stream has been closed; it has no more topics")
                branch = self._held.pop(name, None)
                if branch is None:
                    branch = _Branch(self, name)
                else:
                    self._gone.subtract(branch.counted)
                self._topics[name] = branch
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
                branch.looked_at = now
                # Whoever uses a topic does so first and then looks whether it is still here: so it
                # goes first, and then is looked at.
                del self._topics[name]
                if branch.is_idle(since):
                    self._let_go(branch)
                else:
                    self._topics[name] = branch

    def _let_go(self, branch: "_Branch") -> None:
        """Keep of a topic what it has counted, and find it again if somebody holds on to it."""
        branch.counted = _counts(branch.statistics())
        self._gone.update(branch.counted)
        self._held[branch.name] = branch

    def _dismiss(self, branch: "_Branch") -> None:
        """Forget a topic that was closed."""
        with self._lock:
            if self._topics.get(branch.name) is branch:
                del self._topics[branch.name]
                self._gone.update(_counts(branch.statistics()))
            elif self._held.get(branch.name) is branch:
                del self._held[branch.name]

    def _after_fork(self) -> None:  # pragma: no cover - runs in forked children only
        self._lock = threading.Lock()


class _Shared(InMemoryStream):
    """The subscriptions that the topics share. Nothing is published here."""

    def __init__(self, root: TopicStream) -> None:
        super().__init__(0)
        self._owner = root

    def match(self, topic: str) -> tuple[Subscription, ...]:
        with self._lock:
            return self._index.match(topic)


class _Targets:
    """Whom the events of a topic are for, known for as long as nobody comes or goes.

    An object of its own, so that a topic that is let go is gone at once: it does not hold itself.
    """

    __slots__ = ("_find_shared", "_known", "_shared", "_sharing", "_topic")

    def __init__(self, shared: _Shared, topic: str) -> None:
        self._shared = shared
        self._topic = topic
        self._find_shared = shared._index.answers.get
        self._sharing: tuple[Subscription, ...] | None = None
        self._known: tuple[Subscription, ...] | None = None

    def __getitem__(self, _: object) -> tuple[Subscription, ...]:
        known = self._known
        if known is None or self._find_shared(self._topic) is not self._sharing:
            raise KeyError(self._topic)
        return known

    def update(self, own: tuple[Subscription, ...]) -> tuple[Subscription, ...]:
        """Whom events are for, where these are the topic's own subscribers."""
        self._sharing = self._shared.match(self._topic)
        self._known = own + self._sharing
        return self._known

    def forget(self) -> None:
        self._known = None


class _Branch(InMemoryStream):
    """One topic: its own subscribers, then those that topics share.

    Attributes:
        name: the topic.
        last_event: when an event was last published, by the stream's clock.
        looked_at: when somebody last looked whether it is idle.
        counted: what it had counted when it was let go.
    """

    def __init__(self, root: TopicStream, name: str) -> None:
        super().__init__()
        self.name = name
        self.last_event = 0.0
        self.looked_at = 0.0
        self.counted: dict[str, int] = {}
        self._root = root
        self._owner = root
        self._crowd = root._shared._crowd
        self._targets = _Targets(root._shared, name)
        self._answers = self._targets

    def is_idle(self, since: float) -> bool:
        """Whether it has no subscribers of its own, and its last event is older than that."""
        if self.last_event > since or self._subscriptions:
            return False
        return not self._root._shared._index.has_exact(self.name)

    async def publish(self, event: Event) -> None:
        await super().publish(self._as_its_own(event))

    def publish_nowait(self, event: Event) -> bool:
        return super().publish_nowait(self._as_its_own(event))

    def publish_soon(self, event: Event) -> Awaitable[None] | None:
        return super().publish_soon(self._as_its_own(event))

    def _as_its_own(self, event: Event) -> Event:
        check_event(event)
        return event.with_topic(self.name)

    def _append(self, event: Event) -> None:
        root = self._root
        self.last_event = now = root._clock()
        if root._topics.get(self.name) is not self:
            self._return()
        if now >= root._sweep_due:
            root._sweep()
        super()._append(event)

    def _return(self) -> None:
        """Be among the topics again. One that was closed is not, and another takes its place."""
        if not self._closed:
            self._root._branch(self.name)

    def _route(self, event: Event) -> tuple[Subscription, ...]:
        self._tidy()
        return self._targets.update(self._index.match(self.name))

    def _tidy(self) -> None:
        """Called whenever the index has changed or is about to. The lock is held."""
        super()._tidy()
        self._targets.forget()

    def _subscribe(self, *args: Any, **options: Any) -> Subscription:
        subscription = super()._subscribe(*args, **options)
        self._return()
        return subscription

    async def aclose(self, *, drain: bool = True) -> None:
        """`InMemoryStream.aclose`, of this topic. Who uses the topic later has it made anew."""
        try:
            await super().aclose(drain=drain)
        finally:
            self._root._dismiss(self)


class _AsStream(StreamView):
    """A `TopicStream` behind the interface of a stream."""

    def __init__(self, topics: TopicStream) -> None:
        super().__init__(topics)
        self._topics = topics

    async def publish(self, event: Event) -> None:
        check_event(event)
        await self._topics.publish(check_topic(event.metadata.get("topic")), event)

    def publish_nowait(self, event: Event) -> bool:
        check_event(event)
        return self._topics.publish_nowait(check_topic(event.metadata.get("topic")), event)

    async def subscribe(
        self, handler: Handler, topic: TopicFilter = "*", filter_fn: Filter | None = None
    ) -> Subscription:
        return await self._topics.subscribe(topic, handler, filter_fn)

    async def unsubscribe(self, subscription_id: str) -> bool:
        return await self._topics.unsubscribe(subscription_id)

    async def finish(self, subscription_id: str) -> bool:
        return await self._topics._finish(subscription_id)

    def statistics(self) -> StreamStatistics:
        return self._topics.statistics()

    async def aclose(self, *, drain: bool = True) -> None:
        await self._topics.aclose(drain=drain)


_COUNTS = ("published", "refused", "dropped", "failed")


def _counts(statistics: StreamStatistics) -> dict[str, int]:
    """What goes on counting when a topic is let go."""
    return {name: getattr(statistics, name) for name in _COUNTS}
