"""Who waits for what is appended to a log, found by topic."""

from collections.abc import Iterable, Iterator

from ..topics import Selection, TopicIndex
from ..wakeups import Waiters, wait_until, wake_all
from .record import Record

__all__ = ["Follower", "Followers", "Signal"]


class Follower:
    """A reader that waits for what is appended. Woken from any thread.

    Attributes:
        selection: what it waits for.
        news: whether something may have come since it last looked.
        ended: whether nothing will come any more.
    """

    __slots__ = ("__weakref__", "_waiters", "ended", "news", "selection")

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.news = False
        self.ended = False
        self._waiters: Waiters = []

    def notify(self) -> None:
        """Something was appended. From any thread."""
        self.news = True
        if self._waiters:
            wake_all(self._waiters)

    def end(self) -> None:
        """Nothing will come any more. From any thread."""
        self.ended = True
        self.notify()

    async def wait(self) -> None:
        """Wait until `notify` has been called since `news` was last set to False."""
        while not self.news:
            await wait_until(self._waiters, lambda: self.news)


class Signal:
    """Something that may have happened again. Set off from any thread."""

    __slots__ = ("_count", "_waiters")

    def __init__(self) -> None:
        self._count = 0
        self._waiters: Waiters = []

    @property
    def count(self) -> int:
        """How often it was set off."""
        return self._count

    def set_off(self) -> None:
        """It has happened."""
        self._count += 1
        wake_all(self._waiters)

    async def wait(self, count: int) -> None:
        """Wait until it was set off more often than that."""
        while self._count == count:
            await wait_until(self._waiters, lambda: self._count != count)


class Followers:
    """The followers of a log. A caller holds the log's lock around every method."""

    def __init__(self) -> None:
        self._index: TopicIndex[Follower] = TopicIndex()
        self._keys: dict[Follower, str] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Follower]:
        return iter(tuple(self._keys))

    def add(self, follower: Follower) -> None:
        """Have `of` find a follower, until `discard`."""
        self._serial += 1
        key = self._keys[follower] = str(self._serial)
        self._index.add(key, follower.selection.topics, follower)

    def discard(self, follower: Follower) -> None:
        """Find it no more. Again does nothing."""
        key = self._keys.pop(follower, None)
        if key is not None:
            self._index.discard(key)

    def of(self, records: Iterable[Record]) -> list[Follower]:
        """Who waits for any of these, once each. To be notified without the lock."""
        if not self._keys:
            return []
        topics = dict.fromkeys(topic for each in records for topic in (each.topics or (None,)))
        return list(dict.fromkeys(one for topic in topics for one in self._index.match(topic)))
