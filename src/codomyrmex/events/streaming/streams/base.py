"""What every stream is: publish, subscribe, unsubscribe; and the numbers it shows."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from ..models import Event, Filter, Handler, Subscription
from ..subscribers import QueueStatistics
from ..topics import TopicFilter

__all__ = ["Stream", "StreamStatistics", "StreamView"]


@dataclass(frozen=True, slots=True)
class StreamStatistics:
    """Counts since a stream was made, as of one moment.

    Attributes:
        published: events the stream has taken.
        refused: events it did not take because it was full; the publisher was told.
        dropped: deliveries lost to an overflow policy, all subscribers together; events that
            reached three subscribers but not a fourth count once.
        failed: deliveries that ended in an exception of a handler, filter or socket; logged.
        buffered: events the stream holds now, for replay or on their way.
        subscribers: subscriptions (or clients, or handlers) it has now.
        queues: by subscription id, what has passed through each queue there is now.
    """

    published: int
    refused: int = 0
    dropped: int = 0
    failed: int = 0
    buffered: int = 0
    subscribers: int = 0
    queues: dict[str, QueueStatistics] = field(default_factory=dict)


class Stream(ABC):
    """Something events are published to and subscribed at.

    As an async context manager a stream is closed at the end of the block: what was published is
    delivered, and no task, subscription or timer is left. When the block ends in an exception,
    what is not delivered yet is given up.
    """

    @abstractmethod
    async def publish(self, event: Event) -> None:
        """Take an event, waiting for room where the stream is bounded.

        Raises:
            StreamClosed: the stream has been closed.
        """

    @abstractmethod
    async def subscribe(
        self, handler: Handler, topic: TopicFilter = "*", filter_fn: Filter | None = None
    ) -> Subscription:
        """Call `handler` with every event that is published from now on and matches.

        Args:
            handler: a function or async function of one event. What it raises is logged.
            topic: a topic, a pattern (``orders.*``, ``orders.>``), or several of them.
            filter_fn: is asked for each event whether it is wanted.

        Raises:
            TopicError: `topic` is not a topic or pattern.
            StreamClosed: the stream has been closed.
        """

    @abstractmethod
    async def unsubscribe(self, subscription_id: str) -> bool:
        """End a subscription. False: there is none with this id."""

    async def finish(self, subscription_id: str) -> bool:
        """End a subscription once its handler has dealt with all that was published before.

        False: there is none with this id.
        """
        return await self.unsubscribe(subscription_id)

    def publish_nowait(self, event: Event) -> bool:
        """Take an event without waiting, from any thread, with or without an event loop.

        Returns:
            False: `publish` would have had to wait; the event was not taken, and is counted as
            refused.

        Raises:
            StreamClosed: the stream has been closed.
            NotImplementedError: this kind of stream has no such way.
        """
        raise NotImplementedError(f"{type(self).__name__} has no publish_nowait")

    def statistics(self) -> StreamStatistics:
        """Counts since the stream was made, as of now.

        Raises:
            NotImplementedError: this kind of stream does not count.
        """
        raise NotImplementedError(f"{type(self).__name__} does not count")

    async def aclose(self, *, drain: bool = True) -> None:
        """End the stream: deliver what was published, then end all subscriptions.

        Args:
            drain: False: what is not delivered yet is given up.
        """
        return

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose(drain=kind is None)


class StreamView(Stream):
    """Something that has other methods, behind the interface of a stream. Holds nothing itself.

    Args:
        viewed: what publishes and delivers.
    """

    def __init__(self, viewed: object) -> None:
        self.viewed = viewed
