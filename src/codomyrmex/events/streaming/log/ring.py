"""`Ring`: consecutive records in memory, found by position and by topic."""

from bisect import bisect_right
from collections.abc import Iterator
from heapq import merge
from itertools import groupby, islice

from ..topics import Selection
from .record import Record

__all__ = ["Ring"]

_SCANNED_AT_ONCE = 1000
"""Records that are looked at one by one rather than found by their topics."""


class Ring:
    """Consecutive records in memory. The oldest go, others come at the end. Not thread-safe.

    Args:
        first: the position of the first record that will come.

    Attributes:
        first: the position of the first record, or of the next one if there is none.
        bytes: the bytes of all, by `Record.size`.
    """

    def __init__(self, first: int = 1) -> None:
        # The records from `_head` on are here; the position of that one is `first`.
        self._records: list[Record] = []
        self._head = 0
        self.first = first
        self.bytes = 0
        self._by_topic: dict[str, _Places] = {}

    def __len__(self) -> int:
        return len(self._records) - self._head

    @property
    def last(self) -> int:
        """The position of the last record, or the one before `first` if there is none."""
        return self.first - 1 + len(self._records) - self._head

    def at(self, position: int) -> Record:
        """The record at a position, which is here."""
        return self._records[self._head + position - self.first]

    def add(self, record: Record) -> None:
        """Put the next record at the end."""
        self._records.append(record)
        self.bytes += record.size
        for topic in record.topics:
            places = self._by_topic.get(topic)
            if places is None:
                places = self._by_topic[topic] = _Places()
            places.append(record.position)

    def drop_first(self) -> Record:
        """Let the first record go, and return it."""
        record = self._records[self._head]
        self._head += 1
        self.first += 1
        self.bytes -= record.size
        for topic in record.topics:
            places = self._by_topic[topic]
            places.drop_first()
            if not places:
                del self._by_topic[topic]
        if self._head > 1024 and self._head * 2 > len(self._records):
            del self._records[: self._head]
            self._head = 0
        return record

    def page(self, after: int, selection: Selection, limit: int) -> tuple[list[Record], int]:
        """Selected records after a position which is here, or just before the first.

        Returns:
            `limit` of them, or all there are; and the position up to which there are no others.
        """
        end = self.last
        if selection.every:
            found = self._between(after, min(after + limit, end))
            return found, after + len(found)
        if end - after <= _SCANNED_AT_ONCE:
            return self._scan(after, end, selection, limit)
        places = self._places(after, selection)
        found = [self.at(position) for position in islice(places, limit)]
        return found, found[-1].position if len(found) == limit else end

    def before_last(self, count: int, after: int, selection: Selection) -> tuple[int, int]:
        """The position after which the last `count` selected records come, but not before `after`.

        Returns:
            That position, and how many selected records are between the two.
        """
        if selection.every:
            start = max(after, self.last - count)
            return start, start - after
        places = list(self._places(after, selection))
        if len(places) <= count:
            return after, 0
        skipped = len(places) - count
        return places[skipped - 1], skipped

    def _between(self, after: int, end: int) -> list[Record]:
        shift = self._head - self.first
        return self._records[after + 1 + shift : end + 1 + shift]

    def _scan(
        self, after: int, end: int, selection: Selection, limit: int
    ) -> tuple[list[Record], int]:
        """A page, found by looking at every record."""
        found: list[Record] = []
        matches: dict[tuple[str, ...], bool] = {}
        for record in self._between(after, end):
            is_selected = matches.get(record.topics)
            if is_selected is None:
                is_selected = matches[record.topics] = selection.matches(record.topics)
            if is_selected:
                found.append(record)
                if len(found) == limit:
                    return found, record.position
        return found, end

    def _places(self, after: int, selection: Selection) -> Iterator[int]:
        """The positions of selected records after one, found by their topics, each once."""
        by_topic = self._by_topic
        topics = dict.fromkeys(topic for topic in selection.exact if topic in by_topic)
        if selection.patterns:
            topics.update(dict.fromkeys(topic for topic in by_topic if selection.matches((topic,))))
        lines = [by_topic[topic].after(after) for topic in topics]
        if len(lines) == 1:
            return lines[0]
        return (position for position, _ in groupby(merge(*lines)))


class _Places:
    """The positions of a topic's records, ascending. The first go, others come at the end."""

    __slots__ = ("_head", "_positions")

    def __init__(self) -> None:
        self._positions: list[int] = []
        self._head = 0

    def __bool__(self) -> bool:
        return len(self._positions) > self._head

    def append(self, position: int) -> None:
        self._positions.append(position)

    def drop_first(self) -> None:
        self._head += 1
        if self._head > 64 and self._head * 2 > len(self._positions):
            del self._positions[: self._head]
            self._head = 0

    def after(self, position: int) -> Iterator[int]:
        """Those after a position. To be used up before anything is changed."""
        start = bisect_right(self._positions, position, lo=self._head)
        return islice(self._positions, start, None)
