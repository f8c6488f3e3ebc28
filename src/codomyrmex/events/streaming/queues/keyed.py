"""`KeyedQueue`: at most one item of each key, the newest."""

import asyncio
import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

from ..errors import StreamClosed
from ..forks import follow_forks
from .bounded import SubscriberQueue

__all__ = ["KeyedQueue", "topic_of"]

_logger = logging.getLogger("codomyrmex.events.streaming")

_NOTHING: Any = object()

T = TypeVar("T")


def topic_of(event: Any) -> Hashable:
    """The topic of an event, or None: the key that ``latest_by_key`` uses unless told otherwise."""
    return cast("Hashable", event.metadata.get("topic"))


class KeyedQueue(SubscriberQueue[T]):
    """A queue with the policy ``latest_by_key``: at most one item of each key, the newest.

    A newer item takes the place in line of the one it replaces, which counts as `replaced`. Only
    when there are as many different keys as the queue may hold is the oldest dropped, and told.

    Args:
        maxsize: how many items, that is keys, it holds; 0 or less: any number.
        key: the key of an item. An item for which it raises, or returns what is not hashable,
            is like no other; that is logged.
        name: whose queue this is, for the log.
    """

    _policies: ClassVar[tuple[str, ...]] = ("latest_by_key",)

    _queue: "_Line[T]"

    def __init__(
        self, maxsize: int = 0, *, key: Callable[[T], Hashable] = topic_of, name: str = ""
    ) -> None:
        super().__init__(maxsize, "latest_by_key", name=name)
        self._make_key = key
        follow_forks(self)

    def _after_fork(self) -> None:  # pragma: no cover - in the child, where nothing is measured
        self._queue.lock = threading.RLock()  # another thread may have held it

    def _init(self, maxsize: int) -> None:
        del maxsize
        self._queue = _Line()

    def put_nowait(self, item: T) -> None:
        """Take an item in.

        Raises:
            asyncio.QueueFull: its key is not there, and there is no room for another.
            StreamClosed: the queue has ended.
        """
        if self.ended:
            raise StreamClosed("the queue of a subscription that has ended takes no more items")
        if not self._enter(item, "refuse it"):
            raise asyncio.QueueFull

    def offer(self, item: T) -> bool:
        """Take an item in, in place of the one with the same key if there is one."""
        return not self.ended and self._enter(item, "drop the oldest")

    def feed(self, item: T) -> None:
        """`offer`: this policy never makes anybody wait."""
        self.offer(item)

    def fill(self, items: "list[T]") -> int:
        """Take in all of these items: the policy makes nobody wait, so there is no use in it."""
        for item in items:
            self.offer(item)
        return len(items)

    def force(self, item: T) -> None:
        """Take an item in although there may be no room, or the queue has ended."""
        self._enter(item, "take it in")

    def put_back(self, item: T) -> None:
        """Put an item that was taken out before all others, unless a newer one has its key."""
        if not self._queue.add_first(self._key(item), item):
            self.replaced += 1
            self._evicted += 1
            self._discard(item)

    def _enter(
        self, item: T, when_full: Literal["drop the oldest", "refuse it", "take it in"]
    ) -> bool:
        key = self._key(item)
        line = self._queue
        with line.lock:
            old = line.replace(key, item)
            if old is _NOTHING:
                if when_full != "take it in" and len(line) >= self._limit:
                    if when_full == "refuse it":
                        return False
                    self._make_room()
                line.add(key, item)
                self._received += 1
            else:
                self.replaced += 1
        if old is not _NOTHING:
            self._discard(old)
        if self._taker is not None or self._readers:
            self._wake_reader()
        return True

    def _key(self, item: T) -> Hashable:
        try:
            key = self._make_key(item)
            hash(key)
        except (Exception, asyncio.CancelledError):
            _logger.exception("key function %r failed on %r", self._make_key, item)
            return object()
        return key


class _Line(Generic[T]):
    """What a deque is to other queues: the items in line, at most one of each key.

    A deque's methods are one step for other threads; here a lock makes them so.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._by_key: dict[Hashable, T] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[T]:
        with self.lock:
            return iter(tuple(self._by_key.values()))

    def replace(self, key: Hashable, item: T) -> T:
        """Put an item in the place of the one that has its key; returns that, if there was one."""
        with self.lock:
            old = self._by_key.get(key, _NOTHING)
            if old is not _NOTHING:
                self._by_key[key] = item
            return cast("T", old)

    def add(self, key: Hashable, item: T) -> None:
        with self.lock:
            self._by_key[key] = item

    def add_first(self, key: Hashable, item: T) -> bool:
        """Put an item before all others. False: there is one with its key."""
        with self.lock:
            if key in self._by_key:
                return False
            self._by_key = {key: item, **self._by_key}
            return True

    def popleft(self) -> T:
        with self.lock:
            for key in self._by_key:
                return self._by_key.pop(key)
        raise IndexError

    def clear(self) -> None:
        with self.lock:
            self._by_key.clear()
