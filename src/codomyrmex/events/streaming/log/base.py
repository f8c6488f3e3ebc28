"""What every log is: append, read, tail, locate; retention; and gaps that are always told.

A log has one order. Whoever reads it remembers a *cursor*: the id of the last event it has got. A
log knows where that was as long as the event is retained, and for a while after. What a reader
asked for and cannot have any more is a *gap*, and is told as one; what others' topics have lost is
not.
"""

import asyncio
import importlib
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, ClassVar, Final, Literal, NamedTuple, Self
from urllib.parse import parse_qsl, urlsplit

from ..errors import EventError, StreamingError, TooLarge
from ..models import Event, check_event, control_event
from ..topics import Selection, TopicFilter
from .followers import Follower, Signal
from .record import Record, microseconds

__all__ = [
    "EARLIEST",
    "LATEST",
    "Batch",
    "Capabilities",
    "Gap",
    "Location",
    "Log",
    "LogStatistics",
    "Page",
    "Reader",
    "Retention",
    "as_record",
    "gap_event",
    "open_log",
    "retention_of",
]

EARLIEST: Final = "earliest"
"""The cursor before everything that is retained. No event has it for an id."""

LATEST: Final = "latest"
"""The cursor after everything there is now. No event has it for an id."""

_CURSORS: Final = frozenset((EARLIEST, LATEST))

PAGE: Final = 1000
"""Records to a batch, by default."""

REPLAY_LIMIT: Final = 100_000
"""Records that a tail begins with at most, by default."""

MAX_SIZE: Final = 1 << 20
"""Bytes that an event may have, by default."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How much a log keeps. Whatever limit is reached first, the oldest go.

    Attributes:
        count: events; None: any number.
        bytes: bytes, by `Record.size`; None: any number.
        age: seconds since the log took an event; None: any age.

    Raises:
        ValueError: a limit that is not above 0.
    """

    count: int | None = None
    bytes: int | None = None
    age: float | None = None

    def __post_init__(self) -> None:
        for name in ("count", "bytes", "age"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise ValueError(f"retention by {name} is above 0, not {limit}")


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a kind of log can do beyond what all can.

    Attributes:
        durable: it survives the end of the process.
        shared: several processes may append to it and tail it.
        counts_missed: a `Gap` says how many events are missing, where that can be known.
    """

    durable: bool
    shared: bool
    counts_missed: bool = True


@dataclass(frozen=True, slots=True)
class Gap:
    """Something a reader asked for and may read that it does not get.

    Attributes:
        after: the cursor after which it is missing.
        reason: ``trimmed``: retention was quicker; ``unknown``: the log does not know the cursor,
            so something may be missing; ``limit``: there was more to replay than is allowed.
        missed: how many events that is; None: not known.
    """

    after: str
    reason: Literal["trimmed", "unknown", "limit"]
    missed: int | None = None


@dataclass(slots=True)
class Batch:
    """Records in their order, and the place after them.

    Attributes:
        records: the records.
        cursor: where to read on. It may be further than the last record: what comes in between
            was not asked for.
        gap: what is missing before the first record, if anything is.
        is_last: whether this was all there was when it was read.
    """

    records: list[Record]
    cursor: str
    gap: Gap | None = None
    is_last: bool = True

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __bool__(self) -> bool:
        """Whether it says anything: a record, or a gap."""
        return bool(self.records) or self.gap is not None


@dataclass(frozen=True, slots=True)
class Location:
    """Where a cursor is.

    Attributes:
        status: ``found``; ``trimmed``: what it names is not retained any more, but the log knows
            where that was; ``unknown``: it does not.
        position: the position of what it names; None: unknown.
        missed: how many of the events that were asked for have been trimmed after it; None: not
            known, at least one if the cursor is known.
        earliest: id of the first event that is retained, whatever its topics; None: there is none.
        latest: id of the last.
    """

    status: Literal["found", "trimmed", "unknown"]
    position: int | None
    missed: int | None
    earliest: str | None
    latest: str | None


@dataclass(frozen=True, slots=True)
class LogStatistics:
    """Counts since a log was opened, and what it holds, as of one moment.

    Attributes:
        appended: events that were stored.
        repeated: events that were there already, published again.
        trimmed: events that retention took.
        records: events it holds.
        bytes: bytes it holds, by `Record.size`.
        earliest: id of the first event it holds.
        latest: id of the last.
        readers: tails that are open.
    """

    appended: int
    repeated: int
    trimmed: int
    records: int
    bytes: int
    earliest: str | None
    latest: str | None
    readers: int


@dataclass(slots=True)
class Page:
    """What a log gives a reader: the inside of a `Batch`.

    Attributes:
        records: records after the position that was asked for.
        reached: the position up to which nothing else was asked for.
        cursor: the id of what is there, or of something before it.
        is_last: whether there was nothing after `reached`.
        missed: how many of those asked for had been trimmed; None: some, not known how many.
        told: the position up to which `missed` tells that.
    """

    records: list[Record]
    reached: int
    cursor: str
    is_last: bool
    missed: int | None
    told: int


class Start(NamedTuple):
    """Where a reader begins.

    Attributes:
        position: the position after which it reads.
        told: the position up to which `gap` tells what was trimmed.
        gap: what is missing there.
        whole: the position after which everything is there.
    """

    position: int
    told: int
    gap: Gap | None
    whole: int = 0


class Superseded(StreamingError):
    """A note is not any more what it has to be for events to be appended."""


@dataclass(frozen=True, slots=True)
class Note:
    """A small named value that a log keeps beside its records, such as a consumer's cursor.

    Attributes:
        key: its name.
        value: what it says.
        revision: another number after each change; 0: there is no such note yet.
    """

    key: str
    value: dict[str, Any]
    revision: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """What is to become of a note.

    Attributes:
        note: the new value, with the revision that the note is thought to have.
        gone: whether it is to be taken away.
        expires: when it goes by itself, in microseconds since 1970; None: never.
        keep: a topic, and a position after which retention spares its records for as long as the
            note is there.
    """

    note: Note
    gone: bool = False
    expires: int | None = None
    keep: tuple[str, int] | None = None


class Log(ABC):
    """An ordered, replayable, bounded record of events.

    As an async context manager it is closed at the end of the block. Any event loop may use it.

    Attributes:
        capabilities: what this kind of log can do beyond what all can.
        retention: how much it keeps.
        max_size: bytes that an event may have, by `Record.size`.
    """

    capabilities: ClassVar[Capabilities]
    retention: Retention
    max_size: int
    _notes_changed: Signal  # set off when a note may have been changed, by whoever did

    async def append(self, entries: "Iterable[Event | Record]", /) -> list[Record]:
        """Store events at the end; whole or not at all. Returns when they are stored.

        An event that the log holds already, with the same id, topics, type, body and metadata, is
        not stored again.

        Args:
            entries: events, or records made by `Record.of`, which can say more.

        Returns:
            For each entry its record as it is stored, in the order in which they were given.

        Raises:
            IdConflict: the log holds another event with the same id.
            TooLarge: an event has more bytes than the log takes.
            EncodeError: an event has no JSON form.
            EventError: an event's id is one of the names that cursors have.
            TopicError: events cannot be published to one of the topics.
            StreamClosed: the log has been closed.
        """
        return await self._append([as_record(entry, self.max_size) for entry in entries])

    async def locate(self, cursor: str, topics: TopicFilter = "*") -> Location:
        """Find where a cursor is, and what a reader of these topics has missed after it.

        Raises:
            TopicError: `topics` cannot be a topic filter.
            StreamClosed: the log has been closed.
        """
        return await self._locate(cursor, Selection(topics))

    async def cursor_at(self, when: datetime) -> str:
        """The cursor before the first event that the log took at or after a time, by its clock.

        `EARLIEST` if that is the first event there is: what was before it, or has been trimmed,
        is not known. A clock that was set back has taken some events before others that it says
        are older. Then there may be several places where the event before is older than `when` and
        the event after is not, and it is one of them.

        Args:
            when: the time, with its timezone.

        Raises:
            ValueError: `when` has no timezone.
            StreamClosed: the log has been closed.
        """
        if when.utcoffset() is None:
            raise ValueError(f"a time in a log has a timezone; {when!r} has none")
        return await self._cursor_at(microseconds(when))

    async def trim(self) -> int:
        """Apply the retention now, which otherwise happens in the background.

        Returns:
            How many events have gone.

        Raises:
            StreamClosed: the log has been closed.
        """
        before = self.statistics().trimmed
        is_done = False
        while not is_done:
            is_done = not await self._trim_step()
            await asyncio.sleep(0)
        return self.statistics().trimmed - before

    @abstractmethod
    def statistics(self) -> LogStatistics:
        """Counts since the log was opened, as of now."""

    @abstractmethod
    async def close(self) -> None:
        """Finish what is being stored, and end all tails. Again does nothing."""

    # What a kind of log has to do.

    @abstractmethod
    async def _append(self, drafts: list[Record], guard: Note | None = None) -> list[Record]:
        """`append`, of records that have been checked.

        Args:
            drafts: the records.
            guard: a note that has to be there as it is here for them to be stored.

        Raises:
            Superseded: it is not.
        """

    @abstractmethod
    async def _trim_step(self) -> bool:
        """Apply the retention to some records; False: there was nothing to do."""

    @abstractmethod
    async def _locate(self, cursor: str, selection: Selection) -> Location:
        """`locate`."""

    @abstractmethod
    async def _cursor_at(self, time: int) -> str:
        """`cursor_at`, of a time in microseconds since 1970."""

    @abstractmethod
    async def _begin(self, after: str, selection: Selection) -> Start:
        """The place at which to read on after a cursor, and what is missing before that.

        For a cursor that is not known: before the first record there is.
        """

    @abstractmethod
    async def _end(self) -> int:
        """The position of the last record there is or was."""

    @abstractmethod
    async def _page(self, after: int, selection: Selection, limit: int, told: int) -> Page:
        """Selected records after a position: `limit` of them, or all there are.

        What was trimmed up to the position `told` is not told again.
        """

    @abstractmethod
    async def _before_last(
        self, count: int, after: int, selection: Selection
    ) -> tuple[int, int | None]:
        """The position after which, as things stand, come the last `count` selected records.

        Returns:
            That position, not before `after`; and how many selected records there are between
            them, None: not known.
        """

    @abstractmethod
    def _follow(self, selection: Selection) -> Follower:
        """Notify a follower of what is appended, until `_unfollow`."""

    @abstractmethod
    def _unfollow(self, follower: Follower) -> None: ...

    @abstractmethod
    async def _note(self, key: str) -> Note:
        """The note of this name; with revision 0 and an empty value, if there is none."""

    @abstractmethod
    async def _notes(self, prefix: str) -> list[Note]:
        """The notes whose names begin so."""

    @abstractmethod
    async def _change(self, change: Change) -> Note | None:
        """Change a note, unless somebody else has; None: somebody has."""

    @abstractmethod
    def _now(self) -> int:
        """The time of the log's clock, in microseconds since 1970."""

    async def read(
        self, after: str = EARLIEST, topics: TopicFilter = "*", *, limit: int = PAGE
    ) -> Batch:
        """The next records after a cursor; an empty batch at the end.

        Args:
            after: a cursor: an event's id, `EARLIEST` or `LATEST`, or what a batch says.
            topics: which events: a topic, a pattern, or several of them.
            limit: how many at most.

        Raises:
            TopicError: `topics` cannot be a topic filter.
            ValueError: a limit below 1.
            StreamClosed: the log has been closed.
        """
        selection = _checked(topics, limit)
        start = await self._begin(after, selection)
        page = await self._page(start.position, selection, limit, start.told)
        return Batch(page.records, page.cursor, _missing(start.gap, after, page), page.is_last)

    async def tail(
        self,
        after: str = LATEST,
        topics: TopicFilter = "*",
        *,
        last: int | None = None,
        limit: int = PAGE,
        replay_limit: int = REPLAY_LIMIT,
    ) -> AsyncGenerator[Batch, None]:
        """Records after a cursor, and then those that are appended, until the log is closed.

        Without a gap or a duplicate where history ends. It begins when its first batch is asked
        for: that is when `LATEST` is. A batch has at least one record, or tells of a gap: one that
        is passed by retention while it reads is told so.
        As any async generator, it ends for good when a wait for its next batch is cancelled, as
        a timeout does; `LogStream.events` goes on after that.

        Args:
            after: a cursor: an event's id, `EARLIEST` or `LATEST`, or what a batch says.
            topics: which events: a topic, a pattern, or several of them.
            last: begin with so many of the latest events instead of at a cursor.
            limit: records to a batch at most.
            replay_limit: records of history at most; what comes before the last so many is a gap.

        Raises:
            TopicError: `topics` cannot be a topic filter.
            ValueError: a limit below 1, or `last` below 0.
            StreamClosed: the log has been closed.
        """
        reader = Reader(self, topics, limit=limit)
        try:
            await reader.begin(after, last=last, replay_limit=replay_limit)
            while (batch := await reader.read()) is not None:
                # Given away, not kept: a hundred tails that wait would keep a page each.
                given = [batch]
                del batch
                yield given.pop()
        finally:
            reader.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


class Reader:
    """Reads a log on and on: what `Log.tail` gives, with a way to say where to end.

    To be closed, whatever happens.

    Args:
        log: what is read.
        topics: which events.
        limit: records to a batch at most.

    Raises:
        TopicError: `topics` cannot be a topic filter.
        ValueError: a limit below 1.
        StreamClosed: the log has been closed.

    Attributes:
        selection: which records it reads.
    """

    def __init__(self, log: Log, topics: TopicFilter, *, limit: int = PAGE) -> None:
        self._log = log
        self.selection = _checked(topics, limit)
        self._limit = limit
        self._position = self._told = 0
        self._cursor = EARLIEST
        self._gap: Gap | None = None
        # Up to which position so many records are still to come, which may go meanwhile.
        self._there = 0, 0
        self._until: int | None = None
        self._follower = log._follow(self.selection)

    async def begin(
        self, after: str = LATEST, *, last: int | None = None, replay_limit: int = REPLAY_LIMIT
    ) -> None:
        """Find the place to read on from. The arguments are those of `Log.tail`.

        Raises:
            ValueError: `last` is below 0.
        """
        if last is not None and last < 0:
            raise ValueError(f"last is a number of events, 0 or more, not {last}")
        log, selection = self._log, self.selection
        self._there = 0, 0
        if last is not None:
            after = EARLIEST
        position, self._told, gap, whole = await log._begin(after, selection)
        if last is not None:
            position, _ = await log._before_last(last, position, selection)
            # It wants what there is. What went before is not missing, but what goes from now on is.
            self._told = max(position, whole)
            self._there = whole, await self._count(position, whole)
        if await log._end() - position > replay_limit:
            start, skipped = await log._before_last(replay_limit, position, selection)
            if skipped != 0:
                if gap is None and after != EARLIEST:
                    missed = (await log._locate(after, selection)).missed
                    gap = None if missed == 0 else Gap(after, "trimmed", missed)
                gap = _joined(gap, Gap(after, "limit", skipped))
                position = start
                # All that has been trimmed is told already, also what was after the start.
                self._told = max(position, whole)
                self._there = whole, await self._count(position, whole)
        self._position, self._cursor, self._gap = position, after, gap

    async def _count(self, after: int, until: int) -> int:
        """How many records it reads there are between two positions."""
        count = 0
        while after < until:
            page = await self._log._page(after, self.selection, PAGE, until)
            count += sum(record.position <= until for record in page.records)
            after = page.reached
        return count

    async def begin_now(self) -> None:
        """Begin with what comes from now on.

        `cursor` is then the id of the last record there is of those that are read, or `EARLIEST`:
        unlike `LATEST`, it leads to the same place later on.
        """
        log, selection = self._log, self.selection
        end = await log._end()
        position, _ = await log._before_last(1, 0, selection)
        page = await log._page(position, selection, 1, end)
        self._position = self._told = end
        self._cursor = EARLIEST
        # What was appended meanwhile is not the last of then, and is still to be read.
        if page.records and page.records[0].position <= end:
            self._cursor = page.records[0].id

    def begin_at(self, start: Start, cursor: str | None = None) -> None:
        """Begin at a place that is known; a gap after that is told as one after the cursor."""
        self._position, self._told, self._gap, _ = start
        self._cursor = EARLIEST if cursor is None else cursor

    async def read(self, *, wait: bool = True) -> Batch | None:
        """The next batch, as soon as there is one; None: the end has been reached.

        Cancelled, it has lost nothing.

        Args:
            wait: False: an empty batch, if there is nothing now.
        """
        follower = self._follower
        while not follower.ended:
            follower.news = False
            until = self._until
            page = await self._log._page(self._position, self.selection, self._limit, self._told)
            gap = _missing(self._gap, self._cursor, page)
            if self._there[1]:
                gap = self._with_those_gone(gap, page)
            self._gap = None
            self._position, self._cursor, self._told = page.reached, page.cursor, page.told
            records = page.records
            if until is not None and records and records[-1].position > until:
                records = [record for record in records if record.position <= until]
            if records or gap is not None:
                return Batch(records, page.cursor, gap, page.is_last)
            if until is not None and page.reached >= until:
                return None
            if not wait:
                return Batch([], page.cursor)
            await follower.wait()
        return None

    def _with_those_gone(self, gap: Gap | None, page: Page) -> Gap | None:
        """The gap before a page, with what was there as it began and has gone since."""
        until, count = self._there
        count -= sum(record.position <= until for record in page.records)
        if page.reached < until:
            self._there = until, count
            return gap
        self._there = 0, 0
        return _joined(gap, Gap(self._cursor, "trimmed", count)) if count > 0 else gap

    @property
    def cursor(self) -> str:
        """The cursor of the place that it has reached."""
        return self._cursor

    @property
    def ended(self) -> bool:
        """Whether `end` was called, or the log has been closed."""
        return self._follower.ended

    async def wait_for_end(self) -> None:
        """Wait until it has ended. Not while it is read."""
        follower = self._follower
        follower.news = False
        while not follower.ended:
            await follower.wait()
            follower.news = False

    async def end_here(self) -> None:
        """Have `read` come to its end after what the log holds now."""
        self._until = await self._log._end()
        self._follower.notify()

    def end(self) -> None:
        """Have `read` come to its end at once."""
        self._follower.end()

    def close(self) -> None:
        """Forget the place. Again does nothing."""
        self._log._unfollow(self._follower)


def _checked(topics: TopicFilter, limit: int) -> Selection:
    if limit < 1:
        raise ValueError(f"limit is a number of records, 1 or more, not {limit}")
    return Selection(topics)


def _joined(first: Gap | None, second: Gap) -> Gap:
    """Two gaps with nothing between them."""
    if first is None:
        return second
    missed = None if first.missed is None or second.missed is None else first.missed + second.missed
    return Gap(first.after, first.reason, missed)


def _missing(gap: Gap | None, after: str, page: Page) -> Gap | None:
    """The gap before a page, with what the page itself tells."""
    return gap if page.missed == 0 else _joined(gap, Gap(after, "trimmed", page.missed))


def gap_event(gap: Gap) -> Event:
    """The control event that tells of a gap in its place among others."""
    return control_event("stream.gap", after=gap.after, reason=gap.reason, missed=gap.missed)


_LOGS: Final = {"memory": ".memory:MemoryLog", "sqlite": ".sqlite:SQLiteLog"}
"""By scheme of a URL: where the class of a log is."""


def open_log(url: str, **options: Any) -> Log:
    """The log that a URL names: ``memory://`` or ``sqlite:///events.db``.

    Args:
        url: its scheme chooses the kind of log; its query may hold limits of retention:
            ``memory://?count=5000&bytes=1000000&age=3600``.
        options: what that kind of log takes besides, by name.

    Raises:
        ValueError: no kind of log has this scheme, or the URL says what it does not take.
    """
    parts = urlsplit(url)
    where = _LOGS.get(parts.scheme)
    if where is None:
        known = ", ".join(f"{scheme}://" for scheme in sorted(_LOGS))
        raise ValueError(f"a log's URL begins with one of {known}; this is {url!r:.100}")
    module, _, name = where.partition(":")
    kind: Any = getattr(importlib.import_module(module, __package__), name)
    log: Log = kind.from_url(parts, **options)
    return log


def as_record(entry: "Event | Record", max_size: int) -> Record:
    """What is to be appended as a record, checked.

    Raises:
        TooLarge: it has more bytes than that.
        EventError: its id is one of the names that cursors have.
        TypeError: it is neither.
    """
    if not isinstance(entry, Record):
        check_event(entry)
        entry = Record.of(entry)
    if entry.size > max_size:
        raise TooLarge(entry.id, entry.size, max_size)
    if entry.id in _CURSORS:
        raise EventError(f"no event in a log has the id {entry.id!r}: it is a cursor's")
    return entry


def retention_of(query: str) -> Retention:
    """The retention that the query of a URL says.

    Raises:
        ValueError: something else is in it, or a limit is no number above 0.
    """
    limits: dict[str, Any] = {}
    for name, text in parse_qsl(query, keep_blank_values=True, strict_parsing=True):
        if name not in ("count", "bytes", "age") or name in limits:
            raise ValueError(f"a log's URL says count, bytes and age, each once, not {name!r:.100}")
        try:
            limits[name] = float(text) if name == "age" else int(text)
        except ValueError:
            raise ValueError(f"{name} in a log's URL is a number, not {text!r:.100}") from None
    return Retention(**limits)
