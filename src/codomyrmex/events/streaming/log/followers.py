"""Who waits for what is appended to a log, found by topic."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from operator import itemgetter

from ..topics import Selection, TopicIndex
from ..wakeups import Waiters, wait_until, wake_all
from .record import Record

__all__ = ["Follower", "Followers", "Signal", "notify_all"]

_TOPICS = itemgetter(2)  # of a record


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
        notify_all((self,))

    def end(self) -> None:
        """Nothing will come any more. From any thread."""
        self.ended = True
        self.notify()

    async def wait(self) -> None:
        """Wait until `notify` has been called since `news` was last set to False."""
        while not self.news:
            await wait_until(self._waiters, lambda: self.news)


class Signal:
    """Something that may have happened again. Set off from any thread.

    Args:
        awaited: called when somebody begins to wait for it.
    """

    def __init__(self, awaited: Callable[[], object] = lambda: None) -> None:
        self._count = 0
        self._waiters: Waiters = []
        self._awaited = awaited

    @property
    def is_awaited(self) -> bool:
        """Whether anybody waits for it."""
        return bool(self._waiters)

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

        def is_there() -> bool:
            self._awaited()  # asked once this one is among those who wait
            return self._count != count

        while self._count == count:
            await wait_until(self._waiters, is_there)


def notify_all(followers: Iterable[Follower]) -> None:
    """Something was appended, for each of these. From any thread."""
    waiting: Waiters = []
    for follower in followers:
        follower.news = True
        for _ in range(len(follower._waiters)):
            with suppress(IndexError):  # another thread took it
                waiting.append(follower._waiters.pop(0))
    if waiting:
        wake_all(waiting)


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
        together = dict.fromkeys(map(_TOPICS, records))  # of many records, few different ones
        topics = dict.fromkeys(topic for topics in together for topic in (topics or (None,)))
        found: dict[Follower, None] = {}
        for topic in topics:
            found.update(dict.fromkeys(self._index.find(topic)))
            if len(found) == len(self._keys):
                break  # that is everybody
        return list(found)
