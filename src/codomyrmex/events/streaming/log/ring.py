"""`Ring`: consecutive records in memory, found by position and by topic."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from heapq import merge
from itertools import groupby, islice

from ..topics import Selection
from .record import Record

__all__ = ["Ring"]

_SCANNED_AT_ONCE = 1000
"""Records that are looked at one by one rather than found by their topics."""

_TIDIED_AT_LEAST = 1024
"""Records that have gone before what is left of them is taken out."""


class Ring:
    """Consecutive records in memory. The oldest go, others come at the end. Not thread-safe.

    What goes is only counted. What is left of it is taken out once it is more than what is here,
    so that each record is moved about once.

    Args:
        first: the position of the first record that will come.

    Attributes:
        first: the position of the first record, or of the next one if there is none.
    """

    def __init__(self, first: int = 1) -> None:
        # The records from `_head` on are here; the position of that one is `first`.
        self._records: list[Record] = []
        self._head = 0
        self.first = first
        # For each of these records, the bytes of all there were before the next one; and how many
        # of them have gone.
        self._bytes: list[int] = []
        self._all_bytes = 0
        self._bytes_gone = 0
        # The positions of each topic's records, ascending. The first of them may have gone.
        self._by_topic: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self._records) - self._head

    @property
    def bytes(self) -> int:
        """The bytes of all, by `Record.size`."""
        return self._all_bytes - self._bytes_gone

    @property
    def last(self) -> int:
        """The position of the last record, or the one before `first` if there is none."""
        return self.first - 1 + len(self._records) - self._head

    def at(self, position: int) -> Record:
        """The record at a position, which is here."""
        return self._records[self._head + position - self.first]

    def add(self, records: Sequence[Record]) -> int:
        """Put the next records at the end; returns how many bytes they have."""
        before = all_bytes = self._all_bytes
        by_topic = self._by_topic
        add_bytes = self._bytes.append
        for record in records:
            all_bytes += record.size
            add_bytes(all_bytes)
            for topic in record.topics:
                positions = by_topic.get(topic)
                if positions is None:
                    by_topic[topic] = [record.position]
                else:
                    positions.append(record.position)
        self._records += records
        self._all_bytes = all_bytes
        return all_bytes - before

    def excess(self, most_records: int, most_bytes: int) -> int:
        """How many of the first have to go so that no more are left than this; the last stays."""
        excess = max(0, len(self) - most_records)
        if self.bytes > most_bytes:
            enough = bisect_left(self._bytes, self._all_bytes - most_bytes, lo=self._head)
            excess = max(excess, enough + 1 - self._head)
        return min(excess, len(self) - 1) if excess else 0

    def drop(self, count: int) -> list[Record]:
        """Let the first so many go, and return them."""
        if not count:
            return []
        head = self._head + count
        gone = self._records[self._head : head]
        self._head = head
        self.first += count
        self._bytes_gone = self._bytes[head - 1]
        if head > _TIDIED_AT_LEAST and head * 2 > len(self._records):
            self._tidy()
        return gone

    def _tidy(self) -> None:
        """Take out what is left of the records that have gone."""
        del self._records[: self._head]
        del self._bytes[: self._head]
        self._head = 0
        first = self.first
        for topic, positions in list(self._by_topic.items()):
            if positions[-1] < first:
                del self._by_topic[topic]
            elif positions[0] < first:
                del positions[: bisect_left(positions, first)]

    def page(self, after: int, selection: Selection, limit: int) -> tuple[list[Record], int]:
        """Selected records after a position which is here, or just before the first.

        Returns:
            `limit` of them, or all there are; and the position up to which there are no others.
        """
        if selection.every:
            found = self._between(after, after + limit)
            return found, after + len(found)
        end = self.last
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
        """The positions of selected records after one, found by their topics, each once.

        To be used up before anything is changed.
        """
        by_topic = self._by_topic
        topics = dict.fromkeys(topic for topic in selection.exact if topic in by_topic)
        if not selection.is_exact:
            topics.update(dict.fromkeys(topic for topic in by_topic if selection.matches((topic,))))
        after = max(after, self.first - 1)
        lines: list[Iterator[int]] = []
        for topic in topics:
            positions = by_topic[topic]
            lines.append(islice(positions, bisect_right(positions, after), None))
        if len(lines) == 1:
            return lines[0]
        return (position for position, _ in groupby(merge(*lines)))
