"""`MemoryLog`: a log in this process's memory."""

import sys
import threading
import time
from collections.abc import Callable
from itertools import islice
from typing import Any, ClassVar, Literal, Self
from urllib.parse import SplitResult

from ..errors import IdConflict, StreamClosed
from ..forks import follow_forks
from ..topics import Selection
from .base import (
    EARLIEST,
    LATEST,
    MAX_SIZE,
    Capabilities,
    Gap,
    Location,
    Log,
    LogStatistics,
    Page,
    Retention,
    retention_of,
)
from .followers import Follower, Followers, notify_all
from .record import Record
from .ring import Ring

__all__ = ["MemoryLog"]

_MOST_REMEMBERED = 10_000
"""Trimmed ids whose positions are remembered, and topics whose last trimmed position is."""

_TRIMMED_AT_ONCE = 1000
"""Records that go because of their age before others get a turn."""

_RETENTION = Retention(count=10_000, bytes=64 << 20)
_NEVER = (0, "")
_NOWHERE = (0, 0)


def _microseconds() -> int:
    return time.time_ns() // 1000


class MemoryLog(Log):
    """A ring of records in memory, which all readers share.

    Retention is applied as events are appended, and by age whenever the log is used as well. Any
    thread and any event loop may use it.

    Args:
        retention: how much is kept; by default 10 000 events or 64 MiB, of any age.
        max_size: bytes that an event may have, by `Record.size`.
        clock: microseconds since 1970.
    """

    capabilities: ClassVar = Capabilities(durable=False, shared=False)

    def __init__(
        self,
        retention: Retention = _RETENTION,
        *,
        max_size: int = MAX_SIZE,
        clock: Callable[[], int] = _microseconds,
    ) -> None:
        self.retention = retention
        self.max_size = max_size
        self._clock = clock
        self._lock = threading.Lock()
        self._ring = Ring()
        self._by_id: dict[str, Record] = {}
        # What has been trimmed: the ids of the last ones, and the last position of each topic.
        self._trimmed_ids: dict[str, int] = {}
        self._last_trimmed: dict[str, tuple[int, str]] = {}
        self._last_trimmed_ids: dict[str, tuple[int, int]] = {}  # and for how many topics
        self._forgotten = 0  # of topics that have been forgotten, the last position trimmed
        self._followers = Followers()
        self._closed = False
        self._appended = 0
        self._repeated = 0
        self._trimmed = 0
        follow_forks(self)

    @classmethod
    def from_url(cls, url: SplitResult, **options: Any) -> Self:
        """The log of a URL ``memory://?count=5000``.

        Raises:
            ValueError: the URL says more than limits of retention.
        """
        if url.netloc or url.path or url.fragment:
            raise ValueError(f"memory:// is followed by nothing but a query: {url.geturl()!r:.100}")
        if url.query:
            options["retention"] = retention_of(url.query)
        return cls(**options)

    def _after_fork(self) -> None:  # pragma: no cover - in the child, where nothing is measured
        self._lock = threading.Lock()

    # Appending.

    async def _append(self, drafts: list[Record]) -> list[Record]:
        with self._lock:
            self._check_open()
            stored, fresh = self._place(drafts)
            records = list(fresh.values())
            self._ring.add(records)
            self._by_id.update(fresh)
            self._appended += len(fresh)
            self._repeated += len(drafts) - len(fresh)
            self._trim_some(2 * len(fresh) + _TRIMMED_AT_ONCE)
            followers = self._followers.of(records)
        notify_all(followers)
        return stored

    def _place(self, drafts: list[Record]) -> tuple[list[Record], dict[str, Record]]:
        """What is to be returned for these, and what of it is to be stored. Changes nothing."""
        now = self._clock()
        position = self._ring.last
        ids = [draft.id for draft in drafts]
        if self._by_id.keys().isdisjoint(ids) and len(set(ids)) == len(ids):
            # All are new, as a rule: that is known in two steps, not one by one.
            stored = Record.placed_all(drafts, position + 1, now)
            return stored, dict(zip(ids, stored, strict=True))
        fresh: dict[str, Record] = {}
        stored = []
        for draft in drafts:
            id_ = draft.id
            known = self._by_id.get(id_) or fresh.get(id_)
            if known is None:
                position += 1
                known = fresh[id_] = draft.placed(position, now)
            elif not known.says_the_same(draft):
                raise IdConflict(id_)
            stored.append(known)
        return stored, fresh

    # Trimming.

    def _trim_some(self, most: int) -> int:
        """Let go what retention does not allow: all above the bounds, of the aged so many.

        The last record stays, whatever the bounds.
        """
        keep = self.retention
        ring = self._ring
        trimmed = ring.excess(keep.count or sys.maxsize, keep.bytes or sys.maxsize)
        if keep.age is not None:
            since = self._clock() - int(keep.age * 1_000_000)
            most = min(most, len(ring) - 1)
            while trimmed < most and ring.at(ring.first + trimmed).time <= since:
                trimmed += 1
        if trimmed:
            self._let_go(ring.drop(trimmed))
            self._trimmed += trimmed
        return trimmed

    def _let_go(self, records: list[Record]) -> None:
        """Remember where records were that have been trimmed."""
        latest: dict[str, Record] = {}  # of each topic, the latest first
        for record in reversed(records):
            for topic in reversed(record.topics):
                if topic not in latest:
                    latest[topic] = record
        by_id, trimmed_ids = self._by_id, self._trimmed_ids
        for record in records:
            id_ = record.id
            del by_id[id_]
            # At the end, so that they stand in the order of their positions.
            trimmed_ids.pop(id_, None)
            trimmed_ids[id_] = record.position
        for id_ in list(islice(trimmed_ids, max(0, len(trimmed_ids) - _MOST_REMEMBERED))):
            del trimmed_ids[id_]
        for topic, record in reversed(latest.items()):
            before = self._last_trimmed.pop(topic, None)
            if before is not None:
                self._forget(before)
            self._last_trimmed[topic] = record.position, record.id
            where, count = self._last_trimmed_ids.get(record.id, _NOWHERE)
            count = count + 1 if where == record.position else 1
            self._last_trimmed_ids[record.id] = record.position, count
        while len(self._last_trimmed) > _MOST_REMEMBERED:
            oldest = next(iter(self._last_trimmed))
            last = self._last_trimmed.pop(oldest)
            self._forgotten = last[0]
            self._forget(last)

    def _forget(self, last: tuple[int, str]) -> None:
        """A topic does not name this as its last any more."""
        position, id_ = last
        found = self._last_trimmed_ids.get(id_)
        if found is None or found[0] != position:
            return  # a later one with the same id
        if found[1] > 1:
            self._last_trimmed_ids[id_] = position, found[1] - 1
        else:
            del self._last_trimmed_ids[id_]

    async def _trim_step(self) -> int:
        with self._lock:
            self._check_open()
            return self._trim_some(_TRIMMED_AT_ONCE)

    # Reading.

    async def _locate(self, cursor: str, selection: Selection) -> Location:
        with self._lock:
            self._check_open()
            position, status = self._find(cursor)
            missed = None if position is None else self._missed(position, selection)
            return Location(status, position, missed, *self._edges())

    async def _begin(self, after: str, selection: Selection) -> tuple[int, Gap | None]:
        with self._lock:
            self._check_open()
            start = self._ring.first - 1
            position, _ = self._find(after)
            if position is None:
                return start, Gap(after, "unknown")
            missed = self._missed(position, selection)
            gap = None if missed == 0 else Gap(after, "trimmed", missed)
            return max(position, start), gap

    def _find(self, cursor: str) -> tuple[int | None, Literal["found", "trimmed", "unknown"]]:
        """Where a cursor is, and whether what it names is still here."""
        if cursor == EARLIEST:
            return self._ring.first - 1, "found"
        if cursor == LATEST:
            return self._ring.last, "found"
        # First among what was trimmed: an id may be there and here, and who was there before has
        # not got what is in between.
        position = self._trimmed_ids.get(cursor)
        if position is None and cursor in self._last_trimmed_ids:
            position = self._last_trimmed_ids[cursor][0]
        if position is not None:
            return position, "trimmed"
        record = self._by_id.get(cursor)
        return (None, "unknown") if record is None else (record.position, "found")

    def _edges(self) -> tuple[str | None, str | None]:
        """The ids of the first and the last record."""
        ring = self._ring
        return (ring.at(ring.first).id, ring.at(ring.last).id) if ring else (None, None)

    def _missed(self, after: int, selection: Selection) -> int | None:
        """How many selected records after a position were trimmed; None: some."""
        last = self._ring.first - 1
        if after >= last:
            return 0
        if selection.every:
            return last - after
        if any(self._last_trimmed.get(topic, _NEVER)[0] > after for topic in selection.exact):
            return None
        if selection.patterns:
            for topic, (position, _) in reversed(self._last_trimmed.items()):
                if position <= after:
                    break
                if selection.matches((topic,)):
                    return None
        return None if after < self._forgotten else 0

    async def _page(self, after: int, selection: Selection, limit: int) -> Page:
        with self._lock:
            self._check_open()
            if self.retention.age is not None:
                self._trim_some(_TRIMMED_AT_ONCE)
            ring = self._ring
            gone = ring.first - 1
            missed = 0 if after >= gone else self._missed(after, selection)
            found, reached = ring.page(max(after, gone), selection, limit)
            # Before the first only where nothing was ever appended: the last is never trimmed.
            cursor = ring.at(reached).id if reached > gone else EARLIEST
            return Page(found, reached, cursor, reached == ring.last, missed)

    async def _before_last(
        self, count: int, after: int, selection: Selection
    ) -> tuple[int, int | None]:
        with self._lock:
            self._check_open()
            return self._ring.before_last(count, max(after, self._ring.first - 1), selection)

    async def _end(self) -> int:
        with self._lock:
            self._check_open()
            return self._ring.last

    def _follow(self, selection: Selection) -> Follower:
        follower = Follower(selection)
        with self._lock:
            self._check_open()
            self._followers.add(follower)
        return follower

    def _unfollow(self, follower: Follower) -> None:
        with self._lock:
            self._followers.discard(follower)

    # The rest.

    def _check_open(self) -> None:
        if self._closed:
            raise StreamClosed("the log has been closed")

    def statistics(self) -> LogStatistics:  # noqa: D102  (as in the base)
        with self._lock:
            earliest, latest = self._edges()
            return LogStatistics(
                appended=self._appended,
                repeated=self._repeated,
                trimmed=self._trimmed,
                records=len(self._ring),
                bytes=self._ring.bytes,
                earliest=earliest,
                latest=latest,
                readers=len(self._followers),
            )

    async def close(self) -> None:  # noqa: D102  (as in the base)
        with self._lock:
            self._closed = True
            followers = tuple(self._followers)
        for follower in followers:
            follower.end()
