"""`Consumer`: a cursor that a log keeps under a name, and one process at a time moves on.

Whoever consumes says what it has dealt with, by `Consumer.commit`. After a crash it, or whoever
takes its place, goes on from there: every event is got at least once, in order. The cursor is a
note in the log, held by a lease. Retention does not wait for it: what it could not read in time is
told as a gap.
"""

import asyncio
import math
import sys
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from ..errors import ConsumerInUse, StreamClosed, StreamingError, shown
from ..models import Event, Handler
from ..streams.tasks import to_the_end
from ..topics import Selection, TopicFilter
from .attempts import Attempts
from .base import EARLIEST, LATEST, Batch, Gap, Reader, gap_event
from .lease import Held, Lease, LeaseLost, seconds_left
from .record import Record

if TYPE_CHECKING:
    from .stream import LogStream

__all__ = ["Consumer", "Lag"]

_MOST_UNCOMMITTED: Final = 100_000
"""Events that were yielded and can be committed each by itself: the last so many."""


class Lag(NamedTuple):
    """How far a consumer is behind.

    Attributes:
        events: events of its topics that come after what it has committed.
        seconds: how long ago the log took the first of them; 0.0: there is none.
    """

    events: int
    seconds: float


class _Entry(NamedTuple):
    """What is yielded: an event, and its record; None: it tells of a gap."""

    event: Event
    record: Record | None


class Consumer:
    """A durable cursor: who uses it under this name goes on where the last one has committed.

    Entered, it holds a lease, which is renewed until the block is left; nobody else enters one of
    the same name meanwhile, here or in another process. It is read by one task at a time, as an
    async iterator of events, which ends when the stream or the log is closed. What is missing is
    told by a control event ``stream.gap`` in its place.

    By itself nothing is committed. With `commit_every` or `commit_seconds`, an event is dealt with
    when the next one is asked for, and what is dealt with is committed every so often, and at the
    end of a block that ends without an exception.

    Args:
        stream: the stream whose log it reads.
        name: what its cursor is kept under: printable characters, at least one.
        topic: a topic, a pattern, or several of them. Not kept: it may be another next time.
        start: where to begin under a name that is new: after the event with this id, at `EARLIEST`
            or at `LATEST`. Kept once it is entered.
        commit_every: events after which what is dealt with is committed.
        commit_seconds: seconds after which it is.

    Raises:
        TopicError: `topic` is not a topic or pattern.
        ValueError: a name or number that cannot be.
    """

    def __init__(
        self,
        stream: "LogStream",
        name: str,
        topic: TopicFilter = "*",
        *,
        start: str = EARLIEST,
        commit_every: int | None = None,
        commit_seconds: float | None = None,
    ) -> None:
        if not name or not name.isprintable():
            raise ValueError(f"a consumer's name is printable characters, not {shown(name)}")
        if commit_every is not None and commit_every < 1:
            raise ValueError(f"commit_every is a number of events, 1 or more, not {commit_every}")
        if commit_seconds is not None and not commit_seconds > 0:
            raise ValueError(f"commit_seconds is above 0, not {commit_seconds}")
        self.name = name
        self._key = f"consumer:{name}"
        self._stream = stream
        self._log = stream.log
        self._selection = Selection(topic)
        self._start = start
        self._commit_every = commit_every
        self._commit_seconds = commit_seconds
        self._commits_itself = commit_every is not None or commit_seconds is not None
        self._lease: Lease | None = None
        self._reader: Reader | None = None
        self._turn = asyncio.Lock()  # of who commits
        # What was read and not yielded yet; of what was yielded and not committed by id the cursor
        # after it; the cursor after the last that was taken from the first of these.
        self._waiting: deque[Record | Gap] = deque()
        self._yielded: OrderedDict[str, str] = OrderedDict()
        self._reached = EARLIEST
        # The last that is dealt with, and when it is to be committed.
        self._dealt_with: str | None = None
        self._due = math.inf
        # Whether the next event may be what the last holder was killed by.
        self._blames = False

    # Holding.

    async def __aenter__(self) -> Self:
        """Take the lease, and find the place.

        Raises:
            ConsumerInUse: another holds it.
            StreamClosed: the stream or the log has been closed.
            RuntimeError: this one is entered already.
        """
        if self._lease is not None:
            raise RuntimeError(f"consumer {shown(self.name)} is entered already")
        self._stream._check_open()
        self._lease = lease = await self._take()
        self._blames = lease.was_held
        self._stream._consumers.add(self)
        try:
            cursor = lease.state["cursor"]
            self._begin(await self._read_from(cursor), cursor)
            self._stream._check_open()
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with suppress(StreamClosed):  # then they come again
                    await self._commit_dealt_with()
        finally:
            await self._leave()

    async def _leave(self) -> None:
        lease, reader = self._lease, self._reader
        assert lease is not None
        self._lease = self._reader = None
        self._stream._consumers.discard(self)
        if reader is not None:
            reader.close()
        with suppress(StreamClosed):
            await lease.let_go()

    async def _take(self) -> Lease:
        start = await self._place(self._start)
        try:
            lease = await Lease.take(
                self._log,
                self._key,
                lambda state: {"cursor": start, "attempts": {}, **state},
                duration=self._stream.lease,
            )
        except Held as held:
            raise ConsumerInUse(self.name, held.seconds) from None
        lease.on_loss = self._end_reading
        return lease

    async def _end(self) -> None:
        """The stream is closed: yield no more, and let others go on."""
        assert self._lease is not None
        self._end_reading()
        with suppress(StreamingError):  # then it ends by itself
            await self._lease.let_go()

    def _end_reading(self) -> None:
        if self._reader is not None:
            self._reader.end()

    def _held(self) -> tuple[Lease, Reader]:
        if self._lease is None or self._reader is None:
            raise RuntimeError(
                f"consumer {shown(self.name)} is an async context manager: async with consumer"
            )
        return self._lease, self._reader

    async def _check_lease(self) -> None:
        lease, _ = self._held()
        if lease.lost:
            note = await self._log._note(self._key)
            raise ConsumerInUse(self.name, seconds_left(note, self._log._now()))

    @asynccontextmanager
    async def _as_holder(self) -> AsyncIterator[Lease]:
        """The lease, whose loss is told as callers know it."""
        lease, _ = self._held()
        try:
            yield lease
        except LeaseLost:
            await self._check_lease()
            raise StreamClosed("the stream has been closed") from None

    # Places.

    async def _place(self, to: "str | datetime") -> str:
        """The cursor for a place that is said in another way; one that stays where it is."""
        if isinstance(to, datetime):
            return await self._log.cursor_at(to)
        if to != LATEST:
            return to
        # The last of its own events, if there is one: a log remembers that for longer than others'.
        begin = await self._log._begin(EARLIEST, self._selection)
        before, _ = await self._log._before_last(1, begin.position, self._selection)
        return (await self._log._page(before, self._selection, 1, begin.told)).cursor

    async def _read_from(self, cursor: str) -> Reader:
        reader = Reader(self._log, self._selection.topics)
        try:
            await reader.begin(cursor, replay_limit=sys.maxsize)
        except BaseException:
            reader.close()
            raise
        return reader

    def _begin(self, reader: Reader, cursor: str) -> None:
        """Go on with this reader from this place, at which nothing is left to commit."""
        self._reader = reader
        self._reached = cursor
        self._waiting.clear()
        self._yielded.clear()
        self._dealt_with = None
        self._due = math.inf

    async def reset(self, to: "str | datetime") -> None:
        """Go on from another place: it is committed, and attempts are forgotten.

        Entered or not; whoever is not takes the lease for as long as that takes.

        Args:
            to: a cursor, `EARLIEST` or `LATEST`; or a time with its timezone: the next event is the
                first that the log took at or after it. See `Log.cursor_at`.

        Raises:
            ConsumerInUse: another holds it.
            ValueError: a time without timezone.
            StreamClosed: the stream or the log has been closed.
        """
        cursor = await self._place(to)
        if self._lease is not None:
            await to_the_end(self._reset(cursor))
            return
        lease = await self._take()
        try:
            await lease.store(cursor=cursor, attempts={})
        finally:
            await lease.let_go()

    async def _reset(self, cursor: str) -> None:
        async with self._turn, self._as_holder() as lease:
            reader = await self._read_from(cursor)
            try:
                await lease.store(cursor=cursor, attempts={})
            except BaseException:
                reader.close()
                raise
            _, before = self._held()
            self._begin(reader, cursor)
            self._blames = False
            before.end()  # whoever waits there goes on here
            before.close()

    async def lag(self) -> Lag:
        """How far it is behind what the log holds. Entered or not, by whomever.

        Raises:
            StreamClosed: the log has been closed.
        """
        log, selection = self._log, self._selection
        note = await log._note(self._key)
        cursor = note.value.get("cursor") or await self._place(self._start)
        begin = await log._begin(cursor, selection)
        _, events = await log._before_last(0, begin.position, selection)
        if not events:
            return Lag(0, 0.0)
        now = log._now()
        first = (await log._page(begin.position, selection, 1, begin.told)).records
        return Lag(events, max(0, now - first[0].time) / 1_000_000 if first else 0.0)

    # Committing.

    async def commit(self, event: "Event | Record | str") -> None:
        """Have it known that everything up to and including an event has been dealt with.

        Args:
            event: an event that was yielded, its record or its id. One that was committed already
                does nothing; a ``stream.gap`` stands for what comes before it.

        Raises:
            ValueError: it was not yielded; or 100 000 others were since.
            ConsumerInUse: another has taken the lease.
            StreamClosed: the stream or the log has been closed.
        """
        await self._check_lease()
        id_ = event if isinstance(event, str) else event.id
        if await self._commit_yielded(id_):
            return
        is_gap = isinstance(event, Event) and event.is_control
        if not is_gap and not await self._is_committed(id_):
            raise ValueError(
                f"consumer {shown(self.name)} has not yielded the event {shown(id_)}, or too many"
                " others since: it commits what was yielded and not committed"
            )

    async def _commit(self, id_: str) -> None:
        """Commit something that was yielded. In a turn."""
        cursor = self._yielded[id_]
        async with self._as_holder() as lease:
            if cursor != lease.state["cursor"]:
                await lease.store(cursor=cursor, attempts={})
        while id_ in self._yielded:
            self._yielded.popitem(last=False)
        self._due = math.inf

    async def _is_committed(self, id_: str) -> bool:
        lease, _ = self._held()
        cursor = lease.state["cursor"]
        if id_ == cursor:
            return True
        asked, committed = await self._log.locate(id_), await self._log.locate(cursor)
        if asked.position is None or committed.position is None:
            return False
        return asked.position <= committed.position

    async def _commit_yielded(self, id_: str | None) -> bool:
        """Commit what was yielded; False: it was not, or is committed."""
        async with self._turn:
            if id_ is None or id_ not in self._yielded:
                return False
            await self._commit(id_)
            return True

    async def _commit_dealt_with(self) -> None:
        await self._commit_yielded(self._dealt_with)
        self._due = math.inf

    async def _deal(self) -> None:
        """Take what was yielded as dealt with, and commit that if it is time."""
        if not self._commits_itself or not self._yielded:
            return
        self._dealt_with = next(reversed(self._yielded))
        if self._commit_seconds is not None and self._due == math.inf:
            self._due = asyncio.get_running_loop().time() + self._commit_seconds
        if self._commit_every is not None and len(self._yielded) >= self._commit_every:
            await self._commit_dealt_with()
        await self._commit_if_due()

    async def _commit_if_due(self) -> None:
        if self._due <= asyncio.get_running_loop().time():
            await self._commit_dealt_with()

    # Reading.

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """The next event, as soon as there is one.

        Raises:
            ConsumerInUse: another has taken the lease.
            RuntimeError: the consumer is not entered.
        """
        entries = await self._next(1, 0.0)
        self._blames = False
        if not entries:
            raise StopAsyncIteration
        return entries[0].event

    def batches(self, limit: int = 100, *, seconds: float = 0.0) -> "_Batches":
        """The same events as an async iterator of lists of them, none of which is empty.

        Args:
            limit: events to a list at most.
            seconds: how long to wait for a list to be full, once it has an event; by default it has
                what is there.

        Raises:
            ValueError: a limit below 1, or less than 0 seconds.
        """
        if limit < 1 or seconds < 0:
            raise ValueError(f"limit is 1 or more and seconds 0 or more: {limit}, {seconds}")
        return _Batches(self, limit, seconds)

    async def _next(self, limit: int, seconds: float) -> list[_Entry]:
        """Deal with what was yielded, and yield more; none: the stream or the log is closed."""
        await self._check_lease()
        found: list[_Entry] = []
        try:
            await self._deal()
            while not found and await self._fill(limit, seconds):
                while self._waiting and len(found) < limit:
                    found += self._taken(self._waiting.popleft())
        except StreamClosed:
            return []
        await self._check_lease()
        return found

    def _taken(self, what: "Record | Gap") -> list[_Entry]:
        """Something that is about to be yielded; none: it cannot be decoded."""
        if isinstance(what, Gap):
            entry = _Entry(gap_event(what), None)
        else:
            self._reached = what.id
            event = self._stream._event_of(what)
            if event is None:
                return []
            entry = _Entry(event, what)
        self._yielded[entry.event.id] = self._reached
        if len(self._yielded) > _MOST_UNCOMMITTED:
            self._yielded.popitem(last=False)
        return [entry]

    async def _fill(self, limit: int, seconds: float) -> bool:
        """Have something wait to be yielded, up to `limit`; False: it is the end."""
        if not self._waiting and not await self._read(math.inf):
            return False
        until = asyncio.get_running_loop().time() + seconds
        while len(self._waiting) < limit and await self._read(until):
            pass
        return not self._held()[1].ended

    async def _read(self, until: float) -> bool:
        """Read more, and wait for it until this time of the loop. False: there is nothing."""
        batch: Batch | None = None
        reader: Reader | None = None
        while batch is None or reader is not self._reader:  # something was due, or it was reset
            _, reader = self._held()
            if reader.ended:
                return False
            await self._commit_if_due()
            batch = await self._read_by(until, reader)
        if batch.gap is not None:
            self._waiting.append(batch.gap)
        self._waiting += batch.records
        return bool(batch)

    async def _read_by(self, until: float, reader: Reader) -> Batch | None:
        """A batch, empty if there is nothing by then; None: something is due, or it is the end."""
        if until <= asyncio.get_running_loop().time():
            return await reader.read(wait=False)
        first = min(until, self._due)
        try:
            async with asyncio.timeout_at(None if first == math.inf else first):
                return await reader.read()
        except TimeoutError:
            return None

    # Handling.

    async def run(
        self,
        handler: Handler,
        *,
        retries: int = 5,
        dead_letter: str | None = None,
        backoff: float = 0.5,
    ) -> None:
        """Call `handler` with each event, and commit it, until the stream or the log is closed.

        Entered already or not. An event on which the handler raises is tried again after a delay,
        while later ones wait. How often it was tried is kept in the log, so that an event which
        kills the process is counted too: it is the first one after a crash. Where events are not
        committed one by one (`commit_every`, `commit_seconds`), those that were there when it
        begins after a crash are, so that the right one is blamed.

        What fails for the last time is appended to `dead_letter` as it is, with metadata about it:
        ``error``; ``attempts``, how often it was tried; ``consumer``, the name; ``event``, its id;
        ``from``, its topic. That has an id made of the name and the event's, so that it is there
        once whatever happens; then the event is committed. Events of the topic `dead_letter` are
        passed over.

        A ``stream.gap`` goes to the handler too. If it raises then, that is logged.

        Args:
            handler: a function or async function of one event. One that is not async keeps the
                event loop from renewing the lease while it runs.
            retries: attempts after the first.
            dead_letter: a topic of the same log; None: what the handler raises in the last attempt
                ends this, and the event comes again.
            backoff: seconds before the second attempt, twice as many before the next, and so on, 60
                at most; each is shortened by a random part of up to half.

        Raises:
            ConsumerInUse: another holds the lease, or has taken it.
            TypeError: the handler cannot be called.
            TopicError: events cannot be published to `dead_letter`.
            ValueError: retries or a backoff below 0; or `dead_letter` is what is consumed.
        """
        attempts = Attempts(self, handler, retries, dead_letter, backoff)
        if self._lease is not None:
            await self._run(attempts)
            return
        async with self:
            await self._run(attempts)

    async def _run(self, attempts: Attempts) -> None:
        one_by_one_until: float = 0 if self._commits_itself else math.inf
        try:
            if self._blames and self._commits_itself:
                one_by_one_until = await self._log._end()
            while entries := await self._next(1, 0.0):
                event, record = entries[0]
                if record is None:
                    await attempts.tell(event)
                elif attempts.dead_letter not in record.topics:
                    blames, self._blames = self._blames, False
                    await attempts.make(event, record, blames=blames)
                if record is None or record.position <= one_by_one_until:
                    await self._commit_yielded(event.id)
        except StreamClosed:
            if not self._held()[1].ended:
                raise


class _Batches:
    """The lists of `Consumer.batches`."""

    def __init__(self, consumer: Consumer, limit: int, seconds: float) -> None:
        self._consumer = consumer
        self._limit = limit
        self._seconds = seconds

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Event]:
        entries = await self._consumer._next(self._limit, self._seconds)
        self._consumer._blames = False
        if not entries:
            raise StopAsyncIteration
        return [entry.event for entry in entries]
