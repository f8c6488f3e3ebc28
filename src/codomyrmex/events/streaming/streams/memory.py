"""`InMemoryStream`: events to handlers in this process."""

from collections.abc import Callable, Hashable
from typing import Any

from ..models import Event, Filter, Handler, Subscription
from ..topics import TopicFilter
from .dispatching import DispatchingStream
from .runner import is_async

__all__ = ["InMemoryStream"]


class InMemoryStream(DispatchingStream):
    """Events to handlers in this process, in one order that is the same for all of them.

    Sync handlers run inside `publish`; async ones in a task of their own, each through a queue of
    1000 events, on the loop that subscribed (or, when that is closed, on the publisher's). Both
    may publish to the stream themselves. Any thread may use it.

    Args:
        buffer_size: how many of the latest events `get_recent_events` can return.

    >>> async def main():
    ...     async with InMemoryStream() as stream:
    ...         await stream.subscribe(print, topic="orders.*")
    ...         await stream.publish(create_event({"total": 9}, topic="orders.new"))
    """

    def __init__(self, buffer_size: int = 1000) -> None:
        super().__init__(buffer_size)

    async def subscribe(
        self,
        handler: Handler,
        topic: TopicFilter = "*",
        filter_fn: Filter | None = None,
        *,
        overflow: str | None = None,
        buffer_size: int = 1000,
        key: Callable[[Event], Hashable] | None = None,
    ) -> Subscription:
        """Call `handler` with every event that is published from now on and matches.

        Args:
            handler: a function or async function of one event. What it raises is logged.
            topic: a topic, a pattern (``orders.*``, ``orders.>``), or several of them.
            filter_fn: is asked for each event whether it is wanted.
            overflow: what happens when `buffer_size` events wait for the handler: ``block``
                (the default: `publish` waits), ``drop_oldest``, ``drop_newest``,
                ``latest_by_key`` or ``disconnect``. Given one, a sync handler is queued as well.
            buffer_size: how many events may wait for a queued handler; 0: any number.
            key: for ``latest_by_key``: the key of an event, by default its topic.

        Raises:
            TopicError: `topic` is not a topic or pattern.
            ValueError: `overflow` is not a policy, or `key` is for another one.
            StreamClosed: the stream has been closed.
        """
        return self._subscribe(
            handler, topic, filter_fn, overflow=overflow, buffer_size=buffer_size, key=key
        )

    def _attach(
        self,
        subscription: Subscription,
        *,
        overflow: str | None = None,
        buffer_size: int = 1000,
        key: Callable[[Event], Hashable] | None = None,
        **options: Any,
    ) -> None:
        handler = subscription.handler
        if handler is not None and (overflow is not None or key is not None or is_async(handler)):
            policy = "block" if overflow is None else overflow
            runner = self._queue_handler(subscription, buffer_size, policy, key)
            self._deliver_by(subscription, runner.feed)
