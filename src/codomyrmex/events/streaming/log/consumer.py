"""`Consumer`: a cursor that a log keeps under a name, and one process at a time moves on.

Whoever consumes says what it has dealt with, by `Consumer.commit`. After a crash it, or whoever
takes its place, goes on from there: every event is got at least once, in order. The cursor is a
note in the log, held by a lease. Retention does not wait for it: what it could not read in time is
told as a gap.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn, Self

from ..errors import ConsumerInUse, StreamClosed, StreamingError, shown
from ..models import Event, Handler
from ..streams.tasks import to_the_end
from ..topics import Selection, TopicFilter
from ..wakeups import Waiters, wait_until, wake_all
from .attempts import Attempts, given_up
from .base import EARLIEST, LATEST, Batch, Gap, Reader, Start, gap_event
from .lease import Held, Lease, LeaseLost, seconds_left
from .record import Record
from .turns import Turns

if TYPE_CHECKING:
    from .stream import LogStream

__all__ = ["Consumer", "Lag"]

_MOST_UNCOMMITTED: Final = 100_000
"""Events that were yielded and can be committed each by itself: the last so many."""

_LOOK: Final = 0.5
"""Seconds after which is looked whether another thread's event loop still runs."""

_MOST_GAPS: Final = 1000
"""Gaps that were yielded and are known to have been: the last so many."""


# The consumer whose handler the code runs in. Tasks that a handler starts inherit it.
_handles_for: ContextVar["Consumer | None"] = ContextVar(
    "codomyrmex_streaming_consumer", default=None
)

_logger = logging.getLogger("codomyrmex.events.streaming")


class Lag(NamedTuple):
    """How far a consumer is behind.

    Attributes:
        events: events of its topics that come after what it has committed.
        seconds: how long ago the log took the first of them; 0.0: there is none.
    """

    events: int
    seconds: float


class _Place(NamedTuple):
    """Where a consumer is in the log, as its note says it.

    The position is what counts: the log may have forgotten the id, or have another event by it.

    Attributes:
        cursor: the id of the event it is after, or `EARLIEST`.
        position: the position after which it reads.
        told: the position up to which it has been told what was trimmed.
    """

    cursor: str
    position: int
    told: int


class Entry(NamedTuple):
    """What is yielded: an event, and its record; None: it tells of a gap. And its number."""

    event: Event
    record: Record | None
    number: int


class _Yielded:
    """What was yielded and not committed: numbered, with the place after each; the last so many.

    Attributes:
        last: the number of the last, committed or not.
    """

    def __init__(self) -> None:
        self.last = 0
        self._committed = 0
        self._places: deque[tuple[str, _Place]] = deque()
        self._numbers: dict[str, tuple[int, ...]] = {}  # by id, which may come again

    def __len__(self) -> int:
        """How many were yielded since the last that was committed."""
        return self.last - self._committed

    def add(self, id_: str, place: _Place) -> int:
        """Something is yielded; returns its number."""
        self.last += 1
        self._places.append((id_, place))
        self._numbers[id_] = (*self._numbers.get(id_, ()), self.last)
        if len(self._places) > _MOST_UNCOMMITTED:
            self._forget_first()
        return self.last

    def find(self, id_: str, position: int | None = None) -> int | None:
        """The number of the first with this id, and at this position; None: there is none."""
        for number in self._numbers.get(id_, ()):
            if position is None or self.place(number).position == position:
                return number
        return None

    def has(self, number: int) -> bool:
        """Whether it can be committed."""
        return self.last - len(self._places) < number <= self.last

    def place(self, number: int) -> _Place:
        """The place after one that can be committed."""
        return self._places[number - self.last - 1][1]

    def commit(self, number: int) -> None:
        """Forget this one, and all before."""
        while self.has(number):
            self._forget_first()
        self._committed = number

    def clear(self) -> None:
        """Nothing is left to commit. No number is given twice."""
        self._places.clear()
        self._numbers.clear()
        self._committed = self.last

    def _forget_first(self) -> None:
        id_, _ = self._places.popleft()
        left = self._numbers.pop(id_)[1:]
        if left:
            self._numbers[id_] = left


_NEW: Final[Mapping[str, Any]] = {
    "cursor": None,
    "position": None,
    "told": None,
    "attempts": {},
    "crashed": False,
}
"""What the note of a consumer says that has no place yet.

Of attempts it says those at the event that comes next. `crashed`: somebody has held the lease and
not let go of it, since the last event was committed.
"""


def _said(cursor: str, start: Start) -> dict[str, Any]:
    """What a note says of a place; no position, if what is missing there is not known."""
    if start.gap is not None:
        return {"cursor": cursor, "position": None, "told": None}
    return _Place(cursor, start.position, start.told)._asdict()


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
        self._loop: asyncio.AbstractEventLoop
        self._turn: asyncio.Lock  # of who commits
        self._turns = Turns()
        self._is_handling = False
        self._has_begun = False  # an attempt that is written down, here and not by who was killed
        self._waiting_for_end: Waiters = []
        # What was read and not yielded yet, each with the position up to which gaps are told; what
        # was yielded; the place after the last that was taken from the first of these.
        self._waiting: deque[tuple[Record | Gap, int]] = deque()
        self._yielded = _Yielded()
        self._gaps: deque[str] = deque(maxlen=_MOST_GAPS)
        self._reached = _Place(EARLIEST, 0, 0)
        # The last that is dealt with, and when it is to be committed.
        self._dealt_with = 0
        self._due = math.inf
        # The position of the last event that may be what the last holder was killed by.
        self._suspect_until = 0

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
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()
        self._stream._consumers.add(self)
        try:
            self._suspect_until = await self._log._end() if lease.state["crashed"] else 0
            cursor, start = await self._find(lease.state)
            self._begin(self._read_from(cursor, start), cursor, start)
            if lease.state["position"] is None:
                async with self._as_holder():
                    await lease.store(**_said(cursor, start))
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
        self._yielded.clear()
        if reader is not None:
            reader.close()
        try:
            await self._let_go(lease)
        finally:
            self._has_begun = False
            await self._stream._consumer_left(self)
            wake_all(self._waiting_for_end)

    async def _let_go(self, lease: Lease) -> None:
        """Let others take the lease. Where that fails it ends by itself, and hides no error."""
        await to_the_end(self._let_go_now(lease))

    async def _let_go_now(self, lease: Lease) -> None:
        try:
            attempts = given_up(lease.state["attempts"])
            if attempts is not None and self._has_begun:
                await lease.store(attempts=attempts)
        except StreamingError:  # then it counts
            pass
        finally:
            try:
                await lease.let_go()
            except StreamClosed:
                pass
            except Exception:
                _logger.exception("consumer %s: its lease could not be let go", self.name)

    async def _take(self) -> Lease:
        try:
            lease = await Lease.take(
                self._log,
                self._key,
                lambda state: {**_NEW, **state},
                duration=self._stream.lease,
            )
        except Held as held:
            raise ConsumerInUse(self.name, held.seconds) from None
        lease.state["crashed"] |= lease.was_held
        lease.on_loss = self._end_reading
        return lease

    async def _end(self, *, waits: bool) -> bool:
        """The stream is closed: commit what is dealt with, and let others go on.

        Args:
            waits: whether to wait for a handler that runs.

        Returns:
            False: its own handler asks for this; it ends when that has returned.
        """
        loop = self._loop
        if loop is asyncio.get_running_loop():
            return await self._end_here(waits)
        if not loop.is_running():  # nothing goes on there, and the lease ends by itself
            return True
        ending = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._end_here(waits), loop))
        while loop.is_running() and not ending.done():
            await asyncio.wait([ending], timeout=_LOOK)
        return not ending.done() or ending.cancelled() or ending.result()

    async def _end_here(self, waits: bool) -> bool:
        self._end_reading()
        if _handles_for.get() is self:
            return False
        while waits and self._is_handling:
            await wait_until(self._waiting_for_end, lambda: not self._is_handling)
        lease = self._lease
        if lease is None:
            while self in self._stream._consumers:
                await wait_until(self._waiting_for_end, lambda: self not in self._stream._consumers)
        elif not self._is_handling:  # otherwise its block lets go
            try:
                await self._commit_dealt_with()
            except StreamingError:
                _logger.exception("consumer %s could not commit as it ended", self.name)
            await self._let_go(lease)
        return True

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
        """See that no other has taken the lease. If this one hung for as long, the log knows."""
        lease, _ = self._held()
        if not lease.is_certain:
            async with self._as_holder():
                await lease.store()

    async def _tell_loss(self, lease: Lease) -> NoReturn:
        if not lease.lost:
            raise StreamClosed("the stream has been closed") from None
        note = await self._log._note(self._key)
        raise ConsumerInUse(self.name, seconds_left(note, self._log._now())) from None

    @asynccontextmanager
    async def _as_holder(self) -> AsyncIterator[Lease]:
        """The lease, whose loss is told as callers know it."""
        lease, _ = self._held()
        try:
            yield lease
        except LeaseLost:
            await self._tell_loss(lease)

    # Places.

    async def _place(self, to: "str | datetime") -> tuple[str, Start]:
        """The cursor for a place that is said in another way, and where to begin there."""
        if isinstance(to, datetime):
            to = await self._log.cursor_at(to)
        if to == LATEST:
            where = await self._log.locate(LATEST)
            assert where.position is not None
            return where.latest or EARLIEST, Start(where.position, where.position, None)
        return to, await self._log._begin(to, self._selection)

    async def _find(self, state: Mapping[str, Any]) -> tuple[str, Start]:
        """The place that a note says."""
        cursor, position = state.get("cursor"), state.get("position")
        if position is not None:
            return state["cursor"], Start(position, state["told"], None)
        # It is new; or what it names was not known when it was written, and may not be now.
        return await self._place(cursor or self._start)

    def _read_from(self, cursor: str, start: Start) -> Reader:
        reader = Reader(self._log, self._selection.topics)
        reader.begin_at(start, cursor)
        return reader

    def _begin(self, reader: Reader, cursor: str, start: Start) -> None:
        """Go on with this reader from this place, at which nothing is left to commit."""
        self._reader = reader
        self._has_begun = False
        self._reached = _Place(cursor, start.position, start.told)
        self._waiting.clear()
        self._yielded.clear()
        self._dealt_with = 0
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
        self._stream._check_open()
        cursor, start = await self._place(to)
        if self._lease is not None:
            await to_the_end(self._reset(cursor, start))
            return
        lease = await self._take()
        try:
            await lease.store(**_said(cursor, start), attempts={}, crashed=False)
        finally:
            await self._let_go(lease)

    async def _reset(self, cursor: str, start: Start) -> None:
        async with self._turn, self._as_holder() as lease:
            reader = self._read_from(cursor, start)
            try:
                await lease.store(**_said(cursor, start), attempts={}, crashed=False)
            except BaseException:
                reader.close()
                raise
            _, before = self._held()
            self._begin(reader, cursor, start)
            if before.ended:  # the stream has been closed meanwhile, or the lease lost
                reader.end()
            before.end()  # whoever waits there goes on here
            before.close()

    async def lag(self) -> Lag:
        """How far it is behind what the log holds. Entered or not, by whomever.

        Raises:
            StreamClosed: the log has been closed.
        """
        log, selection = self._log, self._selection
        note = await log._note(self._key)
        _, begin = await self._find(note.value)
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
                does nothing. A ``stream.gap`` that is committed is told no more.

        Raises:
            ValueError: it was not yielded; or 100 000 others were since.
            ConsumerInUse: another has taken the lease.
            StreamClosed: the stream or the log has been closed.
        """
        await self._check_lease()
        id_ = event if isinstance(event, str) else event.id
        position = event.position if isinstance(event, Record) else None
        number = self._yielded.find(id_, position)
        if number is not None:
            await self._commit_yielded(number)
        elif id_ not in self._gaps and not await self._is_committed(id_, position):
            raise ValueError(
                f"consumer {shown(self.name)} has not yielded the event {shown(id_)}, or too many"
                " others since: it commits what was yielded and not committed"
            )

    async def _commit_yielded(self, number: int) -> None:
        """Commit something that was yielded, unless that is done."""
        async with self._turn:
            if not self._yielded.has(number):
                return
            place = self._yielded.place(number)
            async with self._as_holder() as lease:
                said = lease.state
                if place.position != said["position"]:
                    await lease.store(**place._asdict(), attempts={}, crashed=False)
                elif place.told != said["told"]:  # a gap: what comes next is what came next before
                    await lease.store(told=place.told)
            self._yielded.commit(number)
            if self._dealt_with <= number:
                self._due = math.inf

    async def _is_committed(self, id_: str, position: int | None) -> bool:
        if id_ in (EARLIEST, LATEST):
            return False
        lease, _ = self._held()
        if position is None and id_ == lease.state["cursor"]:
            return True
        asked = position or (await self._log.locate(id_)).position
        committed = lease.state["position"]
        return asked is not None and committed is not None and asked <= committed

    async def _commit_dealt_with(self) -> None:
        await self._commit_yielded(self._dealt_with)

    def _take_as_dealt_with(self) -> None:
        """Take what was yielded as dealt with, if that is to be committed by itself."""
        if self._commits_itself and self._yielded:
            self._dealt_with = self._yielded.last
            if self._commit_seconds is not None and self._due == math.inf:
                self._due = asyncio.get_running_loop().time() + self._commit_seconds

    async def _commit_if_many(self) -> None:
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

    async def _next(self, limit: int, seconds: float) -> list[Entry]:
        """Deal with what was yielded, and yield more; none: the stream or the log is closed."""
        self._held()
        self._take_as_dealt_with()
        found: list[Entry] = []
        try:
            if self._turns.are_due:
                await self._turns.give()
            await self._commit_if_many()
            goes_on = True
            while goes_on and not found:
                goes_on = await self._fill(limit, seconds)
                # It may have waited for long. What follows does not wait: nothing gets lost.
                await self._check_lease()
                while goes_on and self._waiting and len(found) < limit:
                    found += self._taken(*self._waiting.popleft())
        except StreamClosed:
            return []
        return found

    def _taken(self, what: "Record | Gap", told: int) -> list[Entry]:
        """Something that is about to be yielded; none: it cannot be decoded."""
        record: Record | None = None
        if isinstance(what, Gap):
            event = gap_event(what)
            self._gaps.append(event.id)
            self._reached = self._reached._replace(told=told)
        else:
            record = what
            self._reached = _Place(record.id, record.position, told)
            # Its own: what it does to an event, and tries again, is nobody else's.
            decoded = self._stream._decode(record)
            if decoded is None:
                return []
            event = decoded
        return [Entry(event, record, self._yielded.add(event.id, self._reached))]

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
        while True:
            _, reader = self._held()
            if reader.ended:
                return False
            await self._commit_if_due()
            batch = await self._read_by(until, reader)
            if batch is not None and reader is self._reader:
                break  # otherwise something was due, or it was reset
        told = reader._told
        if batch.gap is not None:
            self._waiting.append((batch.gap, told))
        self._waiting += [(record, told) for record in batch.records]
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
        kills the process is given up too. It is suspected when it is the first one after a crash;
        then each attempt is written down before it begins. So one that was never tried is not given
        up, and with `retries=0` one that kills may do so twice. Where events are not committed one
        by one (`commit_every`, `commit_seconds`), those that were there after a crash are, so that
        the right one is blamed. What is not an `Exception`, such as `SystemExit`, is counted, and
        ends this.

        What fails for the last time is appended to `dead_letter` as it is, with metadata about it:
        ``error``; ``attempts``, how often it was tried; ``consumer``, the name; ``event``, its id;
        ``from``, its topic. That has an id made of the name, the topic and the event's position, so
        that it is there once whatever happens; then the event is committed. Events of the topic
        `dead_letter` are passed over. A dead letter of another topic that fails stays where it is:
        that is logged, and it is committed.

        The event is the handler's: what it changes in it, no other attempt, no other reader and no
        dead letter will see.

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
        token = _handles_for.set(self)
        try:
            while entries := await self._next(1, 0.0):
                await self._handle(entries[0], attempts)
        except StreamClosed:
            if not self._held()[1].ended:
                raise
        finally:
            with suppress(ValueError):  # it was left for dead, and is now collected
                _handles_for.reset(token)

    async def _handle(self, entry: Entry, attempts: Attempts) -> None:
        """Have an event dealt with. Until it is, the lease stays, though the stream be closed."""
        record = entry.record
        self._is_handling = True
        try:
            if record is None:
                await attempts.tell(entry.event)
            elif attempts.dead_letter not in record.topics:
                await attempts.make(entry, record, is_suspect=self._is_suspect(record))
            if not self._commits_itself or record is None or record.position <= self._suspect_until:
                await self._commit_yielded(entry.number)
        finally:
            self._is_handling = False
            wake_all(self._waiting_for_end)

    def _is_suspect(self, record: Record) -> bool:
        """Whether it may be what the last holder was killed by: it comes first, and was there."""
        lease, _ = self._held()
        return lease.state["crashed"] and record.position <= self._suspect_until


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
        if not entries:
            raise StopAsyncIteration
        return [entry.event for entry in entries]
