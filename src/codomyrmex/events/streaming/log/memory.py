"""`MemoryLog`: a log in this process's memory."""

import sys
import threading
import time
from bisect import bisect_left
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
    Change,
    Gap,
    Location,
    Log,
    LogStatistics,
    Note,
    Page,
    Retention,
    Start,
    Superseded,
    retention_of,
)
from .followers import Follower, Followers, Signal, notify_all
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
        self._notes_by_key: dict[str, tuple[Note, Change]] = {}
        self._notes_changed = Signal()
        self._revision = 0
        # Topics whose records stay, after which position; until when at least; and those which
        # are here for no other reason.
        self._keeps: dict[str, int] = {}
        self._kept_until = sys.maxsize
        self._kept: dict[int, Record] = {}
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

    async def _append(self, drafts: list[Record], guard: Note | None = None) -> list[Record]:
        with self._lock:
            self._check_open()
            if guard is not None and self._find_note(guard.key).revision != guard.revision:
                raise Superseded
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

        The last record stays, whatever the bounds, and so does what a note keeps.

        Returns:
            How many have been looked at.
        """
        keep = self.retention
        ring = self._ring
        trimmed = self._trim_kept() if self._kept_until <= self._clock() else 0
        trimmed += (count := ring.excess(keep.count or sys.maxsize, keep.bytes or sys.maxsize))
        if keep.age is not None:
            now = self._clock()
            since = now - int(keep.age * 1_000_000)
            # What comes before an aged one is as old, whatever the clock said when it came.
            for ahead in range(count + 1, min(most, len(ring) - 1) + 1):
                record = ring.at(ring.first + ahead - 1)
                if record.time <= since:
                    count = ahead
                elif record.time <= now:
                    break
        if not count:
            return trimmed
        gone = ring.drop(count)
        if self._keeps:
            self._kept.update((each.position, each) for each in gone if self._is_kept(each))
            gone = [each for each in gone if each.position not in self._kept]
        self._let_go(gone)
        return trimmed + count

    def _is_kept(self, record: Record) -> bool:
        keeps = self._keeps
        return any(keeps.get(topic, sys.maxsize) < record.position for topic in record.topics)

    def _trim_kept(self) -> int:
        """Let go what no note keeps any more, and the notes whose time is over."""
        now = self._clock()
        self._keeps.clear()
        self._kept_until = sys.maxsize
        for key, (_, change) in tuple(self._notes_by_key.items()):
            if change.expires is not None and change.expires <= now:
                del self._notes_by_key[key]
                continue
            if change.expires is not None:
                self._kept_until = min(self._kept_until, change.expires)
            if change.keep is not None:
                topic, after = change.keep
                self._keeps[topic] = min(after, self._keeps.get(topic, after))
        gone = [record for record in self._kept.values() if not self._is_kept(record)]
        for record in gone:
            del self._kept[record.position]
        self._let_go(gone)
        return len(gone)

    def _let_go(self, records: list[Record]) -> None:
        """Remember where records were that have been trimmed."""
        self._trimmed += len(records)
        latest: dict[str, Record] = {}  # of each topic, the latest first
        for record in reversed(records):
            for topic in reversed(record.topics):
                if topic not in latest:
                    latest[topic] = record
        by_id, trimmed_ids = self._by_id, self._trimmed_ids
        for record in records:
            id_ = record.id
            del by_id[id_]
            # At the end, so that the oldest are forgotten first.
            trimmed_ids.pop(id_, None)
            trimmed_ids[id_] = record.position
        for id_ in list(islice(trimmed_ids, max(0, len(trimmed_ids) - _MOST_REMEMBERED))):
            del trimmed_ids[id_]
        for topic, record in reversed(latest.items()):
            before = self._last_trimmed.pop(topic, _NEVER)
            if before[0] > record.position:  # this one was kept for longer
                self._last_trimmed[topic] = before
                continue
            self._forget(before)
            self._last_trimmed[topic] = record.position, record.id
            where, count = self._last_trimmed_ids.get(record.id, _NOWHERE)
            count = count + 1 if where == record.position else 1
            self._last_trimmed_ids[record.id] = record.position, count
        while len(self._last_trimmed) > _MOST_REMEMBERED:
            oldest = next(iter(self._last_trimmed))
            last = self._last_trimmed.pop(oldest)
            self._forgotten = max(self._forgotten, last[0])
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

    async def _trim_step(self) -> bool:
        with self._lock:
            self._check_open()
            return self._trim_some(_TRIMMED_AT_ONCE) > 0

    # Reading.

    async def _locate(self, cursor: str, selection: Selection) -> Location:
        with self._lock:
            self._check_open()
            position, status = self._find(cursor)
            gone = self._ring.first - 1
            missed = None if position is None else self._missed(position, selection, gone)
            return Location(status, position, missed, *self._edges())

    async def _cursor_at(self, time: int) -> str:
        with self._lock:
            self._check_open()
            ring, kept = self._ring, tuple(self._kept.values())

            def at(index: int) -> Record:
                rest = index - len(kept)
                return kept[index] if rest < 0 else ring.at(ring.first + rest)

            index = bisect_left(range(len(kept) + len(ring)), time, key=lambda i: at(i).time)
            return at(index - 1).id if index else EARLIEST

    async def _begin(self, after: str, selection: Selection) -> Start:
        with self._lock:
            self._check_open()
            position, _ = self._find(after)
            gap = Gap(after, "unknown") if position is None else None
            if position is None or after == EARLIEST:
                kept = self._kept_after(0, selection)[:1]
                position = (kept[0].position if kept else self._ring.first) - 1
            return Start(position, position, gap, self._ring.first - 1)

    def _find(self, cursor: str) -> tuple[int | None, Literal["found", "trimmed", "unknown"]]:
        """Where a cursor is, and whether what it names is still here."""
        if cursor == EARLIEST:
            return next(iter(self._kept), self._ring.first) - 1, "found"
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
        if not ring:
            return None, None
        first = next(iter(self._kept.values()), None) or ring.at(ring.first)
        return first.id, ring.at(ring.last).id

    def _missed(self, after: int, selection: Selection, until: int) -> int | None:
        """How many selected records between two positions were trimmed; None: some."""
        if after >= until:
            return 0
        if selection.every:
            return until - after - sum(after < position <= until for position in self._kept)
        # Of a topic only the last one is known: it is told when the reader comes to where that was.
        last = self._last_trimmed
        if any(after < last.get(topic, _NEVER)[0] <= until for topic in selection.exact):
            return None
        if selection.patterns and any(
            after < position <= until and selection.matches((topic,))
            for topic, (position, _) in last.items()
        ):
            return None
        return None if after < self._forgotten <= until else 0

    async def _page(self, after: int, selection: Selection, limit: int, told: int) -> Page:
        with self._lock:
            self._check_open()
            if self.retention.age is not None:
                self._trim_some(_TRIMMED_AT_ONCE)
            ring = self._ring
            gone = ring.first - 1
            kept: list[Record] = []
            missed: int | None = 0
            if after < gone:
                kept = self._kept_after(after, selection)[:limit]
                # Of what comes after this page, the next one tells.
                until = kept[-1].position if len(kept) == limit else gone
                missed = self._missed(max(after, told), selection, until)
                told = max(told, until)
                if len(kept) == limit:
                    return Page(kept, until, kept[-1].id, False, missed, told)
                after = gone
            found, reached = ring.page(after, selection, limit - len(kept))
            # Before the first only where nothing was ever appended: the last is never trimmed.
            cursor = ring.at(reached).id if reached > gone else EARLIEST
            found = kept + found if kept else found
            return Page(found, reached, cursor, reached == ring.last, missed, told)

    def _kept_after(self, after: int, selection: Selection) -> list[Record]:
        """What only notes keep, of what is selected after a position."""
        if after >= self._ring.first - 1 or not self._kept:
            return []
        return [
            record
            for position, record in self._kept.items()
            if position > after and selection.matches(record.topics)
        ]

    async def _before_last(
        self, count: int, after: int, selection: Selection
    ) -> tuple[int, int | None]:
        with self._lock:
            self._check_open()
            kept = self._kept_after(after, selection)
            first = self._ring.first - 1
            start, skipped = self._ring.before_last(count, max(after, first), selection)
            if not kept:
                return start, skipped
            if skipped:
                return start, skipped + len(kept)
            _, there = self._ring.before_last(0, max(after, first), selection)
            left = len(kept) - (count - there)
            return (kept[left - 1].position, left) if left > 0 else (after, 0)

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

    # Notes.

    def _find_note(self, key: str) -> Note:
        found = self._notes_by_key.get(key)
        if found is None:
            return Note(key, {})
        note, change = found
        is_over = change.expires is not None and change.expires <= self._clock()
        return Note(key, {}) if is_over else note

    async def _note(self, key: str) -> Note:
        with self._lock:
            self._check_open()
            return self._find_note(key)

    async def _notes(self, prefix: str) -> list[Note]:
        with self._lock:
            self._check_open()
            keys = sorted(key for key in self._notes_by_key if key.startswith(prefix))
            return [note for note in map(self._find_note, keys) if note.revision]

    async def _change(self, change: Change) -> Note | None:
        key, revision = change.note.key, change.note.revision
        with self._lock:
            self._check_open()
            if self._find_note(key).revision != revision:
                return None
            self._revision += 1
            note = Note(key, change.note.value, self._revision)
            if change.gone:
                self._notes_by_key.pop(key, None)
            else:
                self._notes_by_key[key] = note, change
            self._kept_until = 0  # see again what is kept
        self._notes_changed.set_off()
        return note

    def _now(self) -> int:
        return self._clock()

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
