"""The bounded queue between a stream and one subscriber, and what happens when it is full.

`SubscriberQueue` is an `asyncio.Queue` for whoever holds one: maxsize, put, get, the ``_nowait``
forms and `asyncio.QueueFull` mean what they always mean. Beyond that

- it may be filled from any thread, and belongs to no event loop;
- `offer` never waits: it does what the queue's overflow policy says, and counts what that cost;
- `iterate` reads it, waking once for however much has arrived, until it is ended;
- loss is visible: the reader finds a control event ``stream.lost`` in the place of what it lost,
  outside the queue's bound, and `statistics` counts it.

Policies: ``block`` (whoever fills it waits), ``drop_oldest``, ``drop_newest``, ``latest_by_key``
(a newer item takes the place of the one with the same key), ``disconnect`` (the subscriber is
ended, and told so).

The classes live in files of their own under `queues`.
"""

from collections.abc import AsyncGenerator, Callable, Hashable
from typing import TypeVar

from .models import Event
from .queues.bounded import SubscriberQueue
from .queues.keyed import KeyedQueue, topic_of
from .queues.policies import Overflow, QueueStatistics, check_overflow

__all__ = [
    "HEARTBEAT_INTERVAL",
    "KeyedQueue",
    "Overflow",
    "QueueStatistics",
    "SubscriberQueue",
    "check_overflow",
    "make_queue",
    "prime",
    "topic_of",
]

HEARTBEAT_INTERVAL = 30.0
"""Seconds without an event after which a reader gets a HEARTBEAT, by default."""

T = TypeVar("T")


def prime(generator: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Run an async generator up to its first ``yield``, which must come before any ``await``.

    A generator that was never started does not run its ``finally`` when it is closed or dropped.
    One that has been primed does, so what it was made to release is released in any case.
    """
    try:
        generator.__anext__().__await__().send(None)
    except StopIteration:
        return generator
    raise AssertionError("the generator awaited before its first yield")


def make_queue(
    maxsize: int,
    overflow: str,
    *,
    key: Callable[[Event], Hashable] | None = None,
    name: str = "",
    crowd: set[SubscriberQueue[Event]] | None = None,
) -> SubscriberQueue[Event]:
    """The queue for a policy.

    Raises:
        ValueError: there is no such policy, or it has no use for a key.
    """
    policy = check_overflow(overflow)
    if policy == "latest_by_key":
        return KeyedQueue(maxsize, key=key or topic_of, name=name)
    if key is not None:
        raise ValueError(f"a key is for overflow='latest_by_key', not for {policy!r}")
    return SubscriberQueue(maxsize, policy, name=name, crowd=crowd)
