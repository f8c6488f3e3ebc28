"""Runs: what an async iterator gives, recorded in a task that does not depend on any reader.

A run is a note and a lease on it. Its events are appended under the lease, so that one which has
been given up for dead can add nothing behind its own end. The end itself is an event, and has an
id that only one event can have: whoever comes second to say how it ended finds that it is said.
"""

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Self, TypeAlias

from ..errors import IdConflict, StreamClosed, StreamingError, UnknownRun, shown
from ..ids import uuid7
from ..models import Event, create_event
from ..streams.runner import is_cancellation
from ..streams.tasks import hold, release
from ..topics import Exact, Selection, check_topic
from ..wakeups import Waiters, wait_until, wake_all
from .base import LATEST, Change, Gap, Log, Note, Reader, Start, as_record, gap_event
from .lease import Held, Lease, LeaseLost, change_to, is_doubtful, seconds_left
from .record import Record

__all__ = ["END", "Run", "RunStatus", "Runs", "Source"]

END: Final = "stream.end"
"""Type of the last event of a run."""

Source: TypeAlias = "AsyncIterable[Any] | Callable[[], AsyncIterable[Any]]"
"""What is recorded: an async iterable of events or JSON values, or what makes one."""

_State: TypeAlias = Literal["running", "completed", "failed", "cancelled", "interrupted"]

_MOST_PENDING: Final = 1000
"""Events that wait to be appended; then the source waits."""

_TURN: Final = 64
"""Events of a source that never waits, after which everybody else gets a turn."""

_PATIENCE: Final = 5.0
"""Seconds for which closing that is cancelled still waits for what it has interrupted."""

_LONGEST: Final = 10 * 365 * 86_400
"""Seconds that a run can be there to be read after its end."""

_FOUND: Final = 86_400.0
"""Seconds for which one whose process was killed can at least be found, whatever its time to live:
that begins when somebody says that it has ended."""

_LONGEST_ERROR: Final = 1000
"""Characters that are told of what a source has raised."""

_MOST_PENDING_BYTES: Final = 16 << 20
"""Bytes of events that wait to be appended; then the source waits."""

_AGAIN: Final = 5.0
"""Seconds after which what a log has failed to do is tried again."""

_TRIES: Final = 10
"""How often it is tried to record an end, in the time that a lease runs."""

_STOP_LASTS: Final = 60
"""Seconds for which it is written that a run is to stop."""

_logger = logging.getLogger("codomyrmex.events.streaming")


class RunStatus(NamedTuple):
    """How a run is doing.

    Attributes:
        id: name of the run.
        state: ``running``; ``completed``: its source came to an end; ``failed``: its source
            raised; ``cancelled``: it was stopped; ``interrupted``: its process ended, or hung.
        error: what its source raised, as type and message.
    """

    id: str
    state: _State
    error: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing of it will come any more."""
        return self.state != "running"


class Run:
    """A run, here or in another process. It goes on whatever becomes of this object.

    Iterated over, it gives its events from the first one on, then those that come, and ends with
    ``stream.end``: also once another has begun on its topic.

    Attributes:
        id: name of the run.
        topic: its topic.
        is_new: whether it began with the call that returned this, rather than having been joined.
    """

    def __init__(self, runs: "Runs", topic: str, id_: str, after: int, *, is_new: bool) -> None:
        self._runs = runs
        self._after = after  # the position after which it began
        self.id = id_
        self.topic = topic
        self.is_new = is_new

    def __repr__(self) -> str:
        return f"Run(topic={self.topic!r}, id={self.id!r})"

    async def __aiter__(self) -> AsyncGenerator[Event, None]:
        async with self.events() as events:
            async for event in events:
                yield event

    def events(self, after: str | None = None) -> "RunEvents":
        """Its events, as `LogStream.attach` gives them.

        Args:
            after: begin after the event with this id; None, or one from before: with its first.
        """
        return RunEvents(self._runs, self.topic, after, self)

    async def wait(self) -> RunStatus:
        """Wait until it is over, and return how it ended."""
        return await self._runs.wait(self.topic, self.id)

    async def stop(self) -> bool:
        """`LogStream.stop`, of no other that has begun on its topic."""
        return await self._runs.stop(self.topic, self.id)


class _Found(NamedTuple):
    """What is known of a run.

    Attributes:
        status: how it is doing.
        after: the position after which it began.
        end: the position of its last event; None: it goes on.
    """

    status: RunStatus
    after: int
    end: int | None


class Runs:
    """The runs of a log: those of this process, and what is known of others'.

    Args:
        log: the log.
        lease: seconds after which a run that is not heard of is over.
        readers: those that end when the stream is closed.
        event_of: gives the event of a record; None: it cannot be decoded.
    """

    def __init__(
        self,
        log: Log,
        lease: float,
        readers: set[Reader],
        event_of: Callable[[Record], Event | None],
    ) -> None:
        self.log = log
        self.lease = lease
        self.readers = readers
        self.event_of = event_of
        self.is_closed = False
        self._producers: dict[str, _Producer] = {}
        self._places: dict[asyncio.AbstractEventLoop, _Place] = {}
        self._waiting_for_end: Waiters = []

    def here(self) -> "_Place":
        """The place of the event loop that runs."""
        loop = asyncio.get_running_loop()
        place = self._places.get(loop)
        if place is None:
            for other in tuple(self._places):
                if other.is_closed():
                    self._places.pop(other, None)
            place = self._places[loop] = _Place(loop, self._waiting_for_end)
        return place

    # Beginning.

    async def start(
        self, topic: str, source: Source, *, ttl: float, event_type: str, private: bool, once: bool
    ) -> Run:
        """`LogStream.run`."""
        check_topic(topic)
        if not 0 <= ttl <= _LONGEST:
            raise ValueError(f"ttl is a number of seconds from 0 to {_LONGEST}, not {ttl}")
        if not (hasattr(source, "__aiter__") or callable(source)):
            raise TypeError(
                "a run's source is an async iterable, or a function that returns one, not"
                f" {type(source).__name__}"
            )

        def record_of(item: Any) -> Record:
            event = item if isinstance(item, Event) else create_event(item, event_type)
            record = Record.of(event, topics=[topic], private=private)
            return as_record(record, self.log.max_size)

        try:
            run = await self._begin_or_join(topic, source, record_of, ttl, once)
        except BaseException:
            await _close(source)
            raise
        if not run.is_new:
            await _close(source)
        return run

    async def _begin_or_join(
        self,
        topic: str,
        source: Source,
        record_of: Callable[[Any], Record],
        ttl: float,
        once: bool,
    ) -> Run:
        await self._sweep()
        changed = self.log._notes_changed
        while True:
            count = changed.count
            note, found = await self._look(topic)
            now = self.log._now()
            if found is None or (found.status.is_over and not once):
                wait = 0.0 if is_doubtful(note, now) else seconds_left(note, now)
                if note.value.get("state") != "running":
                    try:
                        return await self._begin(topic, source, record_of, ttl, note)
                    except Held as held:  # somebody else was quicker
                        wait = held.seconds
                # It has said that it is over, and will note it.
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await changed.wait(count)
            elif found.status.is_over or seconds_left(note, now):
                return Run(self, topic, found.status.id, found.after, is_new=False)
            await self._interrupt(topic)

    async def _begin(
        self,
        topic: str,
        source: Source,
        record_of: Callable[[Any], Record],
        ttl: float,
        last: Note,
    ) -> Run:
        """Begin a run after the last, which is over, if there was one."""
        id_ = uuid7()
        over = last.value.get("run")
        if "until" in last.value:  # its events are there for as long as was promised
            await self.log._change(change_to(Note(f"ran:{over}", last.value)))
        after = await self.log._end()

        def begin(before: Mapping[str, Any]) -> dict[str, Any]:
            if before.get("run", over) != over:
                raise Held(last, 0.0)
            return {"run": id_, "state": "running", "after": after, "ttl": ttl}

        lease = await Lease.take(
            self.log,
            _key(topic),
            begin,
            duration=self.lease,
            lasts=max(ttl, _FOUND),
            keep=(topic, after),
        )
        producer = self._producers[topic] = _Producer(self, topic, lease, source, record_of)
        lease.on_loss = producer.give_up
        if self.is_closed:  # meanwhile
            producer.interrupt()
        place = self.here()
        if place.watching is None or place.watching.done():
            place.watching = place.task(self._watch(place), "stops")
        return Run(self, topic, id_, after, is_new=True)

    # What becomes of them.

    async def _look(self, topic: str) -> tuple[Note, _Found | None]:
        """The note of a topic's last run, and how that is doing."""
        note = await self.log._note(_key(topic))
        value = note.value
        if not value:
            return note, None
        found = _Found(
            RunStatus(value["run"], value["state"], value.get("error")),
            value["after"],
            value.get("end"),
        )
        if not found.status.is_over:  # or its end is there, and will be noted in an instant
            with suppress(UnknownRun):
                status, end = await said(self.log, topic, found.status.id)
                found = found._replace(status=status, end=end)
        return note, found

    async def find(self, topic: str, id_: str | None = None, after: int = 0) -> _Found:
        """How a run is doing: the topic's last, or the one of this name, which began there.

        Raises:
            UnknownRun: it is not known, or not any more.
        """
        _, found = await self._look(topic)
        if id_ is not None and (found is None or found.status.id != id_):
            status, end = await said(self.log, topic, id_)
            return _Found(status, after, end)
        if found is None:
            raise UnknownRun(topic)
        return found

    async def status(self, topic: str) -> RunStatus | None:
        """`LogStream.status`."""
        check_topic(topic)
        _, found = await self._look(topic)
        return None if found is None else found.status

    async def wait(self, topic: str, id_: str) -> RunStatus:
        """Wait until a run is over."""
        reader = Reader(self.log, Exact(topic))
        self.readers.add(reader)
        try:
            await reader.begin(LATEST)
            status = (await self.find(topic, id_)).status
            if status.is_over:
                return status
            self._check_open()
            self._guard(topic, id_)
            while (batch := await reader.read()) is not None:
                for record in batch:
                    ended = _said_by(record)
                    if ended is not None and ended.id == id_:
                        return ended
                if batch.gap is not None:  # it may have been among what has gone
                    await self.find(topic, id_)
            raise StreamClosed("the stream or the log has been closed")
        finally:
            self.readers.discard(reader)
            reader.close()

    async def stop(self, topic: str, id_: str | None = None) -> bool:
        """`LogStream.stop`, of the topic's last run or of the one of this name."""
        status = await self.status(topic)
        if status is None or status.is_over or id_ not in (None, status.id):
            return False
        producer = self._producers.get(topic)
        if producer is not None and producer.id == status.id:
            producer.stop()
        else:
            expires = self.log._now() + _STOP_LASTS * 1_000_000
            await self.log._change(Change(Note(f"stop:{status.id}", {}), expires=expires))
        with suppress(UnknownRun):  # it ended meanwhile, and had no time to live after
            await self.wait(topic, status.id)
        return True

    def ended(self, topic: str, producer: "_Producer", *, is_noted: bool) -> None:
        """A run of this process is over."""
        if self._producers.get(topic) is producer:
            del self._producers[topic]
        if not is_noted:  # its readers have relied on it
            self._guard(topic, producer.id)
        place = self.here()
        if place.watching is not None and not self._producers_of(place):
            place.watching.cancel()
            place.watching = None

    def _producers_of(self, place: "_Place") -> "list[_Producer]":
        return [each for each in tuple(self._producers.values()) if each.place is place]

    async def _watch(self, place: "_Place") -> None:
        """Stop those of an event loop of which others say so."""
        changed = self.log._notes_changed
        while True:
            count = changed.count
            try:
                notes = await self.log._notes("stop:")
            except StreamClosed:
                return
            except Exception:
                _logger.exception("what is to be stopped could not be read; it is tried again")
                await asyncio.sleep(_AGAIN)
                continue
            names = {note.key.removeprefix("stop:") for note in notes}
            for producer in self._producers_of(place):
                if producer.id in names:
                    producer.stop()
            await changed.wait(count)

    def _check_open(self) -> None:
        if self.is_closed:
            raise StreamClosed("the stream has been closed; it has no more runs")

    # Those of processes that ended, or hang.

    async def _sweep(self) -> None:
        """Look after those that nobody may be looking after, once."""
        self._check_open()
        place = self.here()
        if not place.is_swept:
            place.is_swept = True
            for note in await self.log._notes("run:"):
                if note.value["state"] == "running":
                    self._guard(note.key.removeprefix("run:"), note.value["run"])

    def _guard(self, topic: str, id_: str) -> None:
        """See to it that a run which is over without having said so is told to be."""
        place, producer = self.here(), self._producers.get(topic)
        if self.is_closed or (
            producer is not None and producer.id == id_ and producer.place is place
        ):
            return
        guard = place.guards.get(topic)
        if guard is None or guard.done():  # or cancelled before it began
            place.guards[topic] = place.task(self._wait_for_its_lease(place, topic), "guard")

    async def _wait_for_its_lease(self, place: "_Place", topic: str) -> None:
        try:
            await self._wait_until_over(topic)
        finally:
            del place.guards[topic]

    async def _wait_until_over(self, topic: str) -> None:
        while True:
            try:
                note = await self.log._note(_key(topic))
                if note.value.get("state") != "running":
                    return
                now = self.log._now()
                if seconds_left(note, now) and not is_doubtful(note, now):
                    await asyncio.sleep(seconds_left(note, now))
                else:
                    await self._interrupt(topic)
            except StreamClosed:
                return
            except Exception:
                _logger.exception("run %s could not be looked after", shown(topic))
                await asyncio.sleep(_AGAIN)

    async def _interrupt(self, topic: str) -> None:
        """Tell that a run was interrupted, unless it is told how it ended, or goes on."""
        note = await self.log._note(_key(topic))

        def still(before: Mapping[str, Any]) -> dict[str, Any]:
            if before.get("run") != note.value.get("run") or before["state"] != "running":
                raise _NotOver
            return dict(before)

        with suppress(Held, LeaseLost, _NotOver):
            if note.value.get("state") == "running":
                ttl, after = note.value["ttl"], note.value["after"]
                lease = await Lease.take(
                    self.log,
                    note.key,
                    still,
                    duration=self.lease,
                    lasts=max(ttl, _FOUND),
                    keep=(topic, after),
                )
                try:
                    await say_end(lease, topic, "interrupted", None)
                    await lease.let_go(lasts=ttl)
                finally:
                    await lease.abandon()

    async def aclose(self) -> None:
        """End the runs of this process, as interrupted, and look after no others."""
        self.is_closed = True
        for producer in tuple(self._producers.values()):
            producer.interrupt()
        for place in tuple(self._places.values()):
            place.look_away()
        try:
            await self._wait_for_tasks()
        except asyncio.CancelledError:
            # They are about to end, unless a source hangs that is being closed.
            with suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE):
                    await self._wait_for_tasks()
            raise

    async def _wait_for_tasks(self) -> None:
        here = self.here()
        while here.tasks:
            await asyncio.wait(tuple(here.tasks))
        if self._are_over():
            return
        # Those of other event loops say how they ended; unless their loop hangs, or ends.
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                while not self._are_over():
                    await wait_until(self._waiting_for_end, self._are_over)

    def _are_over(self) -> bool:
        return not any(place.goes_on for place in tuple(self._places.values()))


class _Place:
    """What goes on in one event loop: it ends with that, and nobody elsewhere relies on it.

    Args:
        loop: the event loop, in whose thread this is used.
        waiting_for_end: who is woken when a task has ended.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, waiting_for_end: Waiters) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        self.guards: dict[str, asyncio.Task[None]] = {}
        self.watching: asyncio.Task[None] | None = None
        self.is_swept = False
        self._loop = loop
        self._waiting_for_end = waiting_for_end

    @property
    def goes_on(self) -> bool:
        """Whether any of its tasks may still do something. In any thread."""
        return bool(self.tasks) and self._loop.is_running()

    def task(self, work: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
        """Do something, for as long as the loop runs."""
        task = self._loop.create_task(work, name=f"codomyrmex-streaming run {name}")
        hold(task)
        self.tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[None]") -> None:
        release(task)
        self.tasks.discard(task)
        wake_all(self._waiting_for_end)

    def call(self, function: Callable[[], object]) -> None:
        """Call something in its loop, if that has not ended. From any thread."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)

    def look_away(self) -> None:
        """Look after nothing any more. From any thread."""
        self.call(self._cancel_guards)

    def _cancel_guards(self) -> None:
        for guard in self.guards.values():
            guard.cancel()


class _NotOver(StreamingError):
    """A run goes on, or another one does."""


class _Producer:
    """A run of this process: one task takes from its source, another appends what that gives.

    What ends a run ends the taking. Then whoever appends has the last word: the end comes when
    everything else has been appended.
    """

    def __init__(
        self,
        runs: Runs,
        topic: str,
        lease: Lease,
        source: Source,
        record_of: Callable[[Any], Record],
    ) -> None:
        self.id: str = lease.state["run"]
        self._runs = runs
        self._topic = topic
        self._lease = lease
        self._source = source
        self._record_of = record_of
        # Given by the source, and not appended yet, or not known to be.
        self._pending: list[Record] = []
        self._pending_bytes = 0
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._ends_as: _State | None = None
        self._failure: BaseException | None = None
        self._is_taking = False
        # Or somebody else cancels its tasks; either way it has its last word, and waits no more.
        self._loop_ends = False
        self.place = runs.here()
        self._taking = self.place.task(self._take(), f"{self.id}: its source")
        self._taking.add_done_callback(lambda _: self._news.set())
        self.place.task(self._run(), self.id)

    # How it ends, other than by itself.

    def stop(self) -> None:
        """End it as cancelled. From any thread."""
        self._end_as("cancelled")

    def interrupt(self) -> None:
        """End it as interrupted. From any thread."""
        self._end_as("interrupted")

    def _end_as(self, state: _State) -> None:
        if self._ends_as is None:
            self._ends_as = state
            self.place.call(self._cancel)

    def give_up(self) -> None:
        """It was given up for dead: end it, and say nothing."""
        self._fail(LeaseLost())

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
        self._cancel()

    def _cancel(self) -> None:
        if self._is_taking:  # before that, it looks; and after that, the source is being closed
            self._taking.cancel()

    # Taking.

    async def _take(self) -> None:
        """Take from the source until it ends, or the run does; then close it."""
        try:
            if self._ends_as is None and self._failure is None:
                await self._take_all(self._opened())
            else:
                await _close(self._source)
            self._ends_as = self._ends_as or "completed"
        except BaseException as error:
            if is_cancellation(error):
                self._ends_as = self._ends_as or "interrupted"
            else:  # also a cancellation that the source itself has met with
                self._failure = self._failure or error

    def _opened(self) -> Any:
        given: Any = self._source
        source: Any = given if hasattr(given, "__aiter__") else given()
        if not hasattr(source, "__aiter__"):
            if inspect.iscoroutine(source):
                source.close()
            raise TypeError(
                f"a run's source returned {type(source).__name__}, which is no async iterable"
            )
        return source

    async def _take_all(self, source: Any) -> None:
        count = 0
        items: Any = source
        self._is_taking = True
        try:
            items = aiter(source)
            async for item in items:
                if self._failure is None:  # otherwise nothing is appended any more
                    self._add(item)
                while (
                    len(self._pending) >= _MOST_PENDING
                    or self._pending_bytes >= _MOST_PENDING_BYTES
                ):
                    self._room.clear()
                    await self._room.wait()
                if self._ends_as is not None or self._failure is not None:
                    break  # it has taken no notice
                count += 1
                if count % _TURN == 0:
                    await asyncio.sleep(0)
        finally:
            self._is_taking = False
            try:
                await _close(items)
            finally:
                if items is not source:
                    await _close(source)

    def _add(self, item: Any) -> None:
        if isinstance(item, Event) and item.type == END and item.is_control:
            return  # another run's, which readers would take for the end of this one
        record = self._record_of(item)
        self._pending.append(record)
        self._pending_bytes += record.size
        self._news.set()

    # Appending, and saying how it ended.

    async def _run(self) -> None:
        while self._pending or not self._taking.done():
            try:
                await self._append()
            except asyncio.CancelledError:
                self._loop_ends = True
                self.interrupt()
                self._cancel()
            except Exception as error:
                # What the source gives from now on must not follow on what is lost.
                self._forget(len(self._pending))
                self._fail(error)
        await self._end()
        if isinstance(self._failure, KeyboardInterrupt | SystemExit):
            raise self._failure

    async def _append(self) -> None:
        """Append what the source has given, or wait until there is something."""
        if not self._pending:
            self._news.clear()
            await self._news.wait()
            return
        # They stay where they are meanwhile: cancelled, this may have appended them or not.
        records = tuple(self._pending)
        await self._lease.append(records)
        self._forget(len(records))

    def _forget(self, count: int) -> None:
        self._pending_bytes -= sum(record.size for record in self._pending[:count])
        del self._pending[:count]
        self._room.set()

    async def _end(self) -> None:
        state, error = self._ends_as or "interrupted", None
        if self._failure is not None and not self._lease.lost:
            state, error = "failed", _text_of(self._failure)
            _logger.error(
                "run %s of %s failed", self.id, shown(self._topic), exc_info=self._failure
            )
        is_noted = False
        try:
            if await self._say_end(state, error):
                await self._lease.let_go(lasts=self._lease.state["ttl"])
                is_noted = True
        except Exception:
            _logger.exception("it could not be noted that run %s has ended", self.id)
        finally:
            await self._lease.abandon()
            self._runs.ended(self._topic, self, is_noted=is_noted or self._loop_ends)

    async def _say_end(self, state: _State, error: str | None) -> bool:
        """Record how it ended. A log that fails is asked again, for as long as a lease runs.

        False: others have to find out.
        """
        patience, pause = self._runs.lease, 0.0
        loop = asyncio.get_running_loop()
        until = loop.time() + patience
        while not self._lease.lost:
            try:
                await asyncio.sleep(pause)
                await say_end(self._lease, self._topic, state, error)
            except LeaseLost:
                break
            except asyncio.CancelledError:
                if self._loop_ends:
                    raise
                self._loop_ends, pause = True, 0.0
            except Exception as failure:
                is_last = self._runs.is_closed or self._loop_ends or loop.time() >= until
                if is_last or isinstance(failure, StreamClosed):
                    _logger.exception("the end of run %s could not be recorded", self.id)
                    return False
                _logger.warning(
                    "the end of run %s could not be recorded; it is tried again", self.id
                )
                pause = min(patience / _TRIES, _AGAIN)
            else:
                return True
        _logger.warning("run %s of %s was given up for dead", self.id, shown(self._topic))
        return False


class RunEvents:
    """The events of a run: what `LogStream.attach` returns."""

    def __init__(self, runs: Runs, topic: str, after: str | None, run: Run | None = None) -> None:
        self._runs = runs
        self._topic = check_topic(topic)
        self._after = after
        self._run = run
        # The run whose end is the end. None: the next end is that of the run in which the cursor is
        self._id: str | None = None
        self._reader: Reader | None = None
        self._waiting: deque[Record | Gap] = deque()
        self._has_gap = False
        self._is_over = False

    async def __aenter__(self) -> Self:
        if self._reader is not None:
            raise RuntimeError("attach() is entered once")
        runs, run, topic = self._runs, self._run, self._topic
        await runs._sweep()
        found = await (runs.find(topic) if run is None else runs.find(topic, run.id, run._after))
        status = found.status
        reader = Reader(runs.log, Exact(topic))
        try:
            start = await self._start(reader, found.after)
            runs._check_open()
            if not status.is_over:
                runs._guard(topic, status.id)
            reader.begin_at(start, self._after)
        except BaseException:
            reader.close()
            raise
        if start.position >= found.after:
            self._id = status.id
        is_past = status.is_over and start.position >= (found.end or 0)
        if is_past or self._after == _end_id(status.id):
            self._id = status.id
            self._waiting.append(Record.of(_end_of(topic, status)))
        self._reader = reader
        runs.readers.add(reader)
        return self

    async def _start(self, reader: Reader, after: int) -> Start:
        """Where to begin to read: at the cursor; or where the run began, which is after that."""
        beginning = Start(after, after, None)
        if self._after is None:
            return beginning
        start = await self._runs.log._begin(self._after, reader.selection)
        if start.gap is not None and start.gap.reason == "unknown":
            return beginning._replace(gap=start.gap)
        if self._run is not None and start.position < after:
            return beginning
        return start

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over = True
        if self._reader is not None:
            self._runs.readers.discard(self._reader)
            self._reader.end()
            self._reader.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """The next event, as soon as there is one. Cancelled, it has lost nothing."""
        if self._reader is None:
            raise RuntimeError("attach() is an async context manager: async with stream.attach(…)")
        while not self._is_over:
            if not self._waiting:
                await self._fill(self._reader)
                continue
            what = self._waiting.popleft()
            event = self._event_of(what)
            if event is not None:
                return event
        raise StopAsyncIteration

    def _event_of(self, what: Record | Gap) -> Event | None:
        if isinstance(what, Gap):
            self._has_gap = True
            return gap_event(what)
        if what.type != END:
            return self._runs.event_of(what)
        ended = _said_by(what)
        if ended is None or self._id not in (None, ended.id):
            return None  # it is not the end of this run
        self._is_over = True
        return what.event()

    async def _fill(self, reader: Reader) -> None:
        """Have something wait to be given, unless this is the end."""
        if self._has_gap:  # the end may be among what has gone
            await self._runs.find(self._topic, self._id)
            self._has_gap = False
        batch = await reader.read()
        if batch is None:
            self._is_over = True
            return
        if batch.gap is not None:
            self._waiting.append(batch.gap)
        self._waiting += batch.records


def _key(topic: str) -> str:
    return f"run:{topic}"


def _end_id(run: str) -> str:
    return f"{run}.end"


def _end_of(topic: str, status: RunStatus) -> Event:
    data = {"run": status.id, "state": status.state, "error": status.error}
    return Event(_end_id(status.id), END, data, {"control": True, "topic": topic})


def _said_by(record: Record) -> RunStatus | None:
    """How a run ended; None: that is not what the record says."""
    if record.type != END:
        return None
    data = record.event().data
    if not isinstance(data, dict) or data.keys() != {"run", "state", "error"}:
        return None
    return RunStatus(data["run"], data["state"], data["error"])


async def say_end(lease: Lease, topic: str, state: _State, error: str | None) -> None:
    """Record how a run ended, unless it is said already."""
    status = RunStatus(lease.state["run"], state, error)
    try:
        (record,) = await lease.append([Record.of(_end_of(topic, status))])
        end = record.position
    except IdConflict:
        try:  # its process said so, and ended before it could let go
            status, end = await said(lease.log, topic, status.id)
        except UnknownRun:  # somebody has published something else by this name
            event = _end_of(topic, status)
            event = Event(None, END, event.data, event.metadata)
            (record,) = await lease.append([Record.of(event)])
            end = record.position
    lease.state.update(state=status.state, error=status.error, end=end)


async def said(log: Log, topic: str, run: str) -> tuple[RunStatus, int]:
    """How a run ended, as its last event says, and the position of that.

    Raises:
        UnknownRun: there is no such event, or none any more.
    """
    selection = Selection(Exact(topic))
    where = await log._locate(_end_id(run), selection)
    if where.status != "found" or where.position is None:
        raise UnknownRun(topic)
    page = await log._page(where.position - 1, selection, 1, where.position)
    status = _said_by(page.records[0]) if page.records else None
    if status is None or status.id != run:
        raise UnknownRun(topic)
    return status, where.position


def _text_of(error: BaseException) -> str:
    """Type and message of what a source has raised, as text that any log takes."""
    text = type(error).__name__
    with suppress(Exception):  # it cannot say
        text = f"{text}: {error}"
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= _LONGEST_ERROR else f"{text[: _LONGEST_ERROR - 1]}…"


async def _close(source: Source) -> None:
    """Let a source end that nobody takes from any more."""
    close = getattr(source, "aclose", None)
    if close is not None:
        try:
            await close()
        except (Exception, asyncio.CancelledError) as error:
            if is_cancellation(error):
                raise
            _logger.exception("the source of a run could not be closed")
