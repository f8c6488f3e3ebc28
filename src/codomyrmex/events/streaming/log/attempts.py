"""Attempts at an event: counted in the log, repeated after a delay, and given up in the end.

What `Consumer.run` does with each event.
"""

import asyncio
import functools
import inspect
import logging
import random
import secrets
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import quote

from ..codec import json
from ..errors import IdConflict, StreamClosed, StreamingError, shown
from ..models import Event, Handler
from ..streams.runner import is_cancellation
from ..topics import Selection, check_topic
from .base import Reader
from .record import Record

if TYPE_CHECKING:
    from .consumer import Consumer, Entry

__all__ = ["Attempts", "given_up"]

_LONGEST_DELAY: Final = 60.0
"""Seconds between two attempts at most."""

_MOST_DOUBLED: Final = 30
"""How often the delay is doubled at most, whatever it began with."""

_LONGEST_ERROR: Final = 1000
"""Characters of an error that a dead letter tells."""

_PREFIX: Final = "dead/"
"""What the id of a dead letter begins with."""

_DIED: Final = "the process ended without a word, perhaps by this event"

_logger = logging.getLogger("codomyrmex.events.streaming")


class _Tries(NamedTuple):
    """How often an event was tried, as the note of its consumer says it.

    Attributes:
        position: the event's.
        number: attempts that are known to have begun.
        is_suspect: whether there may have been one more, by which the process was killed.
        has_begun: whether the last of them has not ended, as far as is known.
        has_killed: whether that is how the last of them ended: the process did with it.
    """

    position: int
    number: int
    is_suspect: bool
    has_begun: bool
    has_killed: bool

    @classmethod
    def of(cls, said: Mapping[str, Any], record: Record) -> "_Tries | None":
        """What is said of an event; None: nothing is."""
        if not said or said.keys() != set(cls._fields) or said["position"] != record.position:
            return None
        return cls(**said)

    def next(self) -> "_Tries":
        """One more attempt begins."""
        return self._replace(number=self.number + 1, has_begun=True)


def given_up(said: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is to be said when an attempt was interrupted; None: the same."""
    if not said.get("has_begun"):
        return None
    return {**said, "number": said["number"] - 1, "has_begun": False}


def _interrupts(error: BaseException) -> bool:
    """Whether the event has nothing to do with it: who waits for the handler is interrupted."""
    if isinstance(error, BaseExceptionGroup):
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0
    if isinstance(error, asyncio.CancelledError):
        return is_cancellation(error)
    return isinstance(error, KeyboardInterrupt)


class Attempts:
    """How a consumer's events are handled. The arguments are those of `Consumer.run`.

    Attributes:
        dead_letter: the topic to which goes what was given up.
    """

    def __init__(
        self,
        consumer: "Consumer",
        handler: Handler,
        retries: int,
        dead_letter: str | None,
        backoff: float,
    ) -> None:
        if not callable(handler) or _is_generator(handler):
            raise TypeError(f"handler is a function of one event, not {shown(handler)}")
        if retries < 0 or not backoff >= 0:
            raise ValueError(f"retries and backoff are 0 or more: {retries}, {backoff}")
        if dead_letter is not None and check_topic(dead_letter) in consumer._selection.exact:
            raise ValueError(f"{shown(dead_letter)} is what is consumed; dead letters go elsewhere")
        self.dead_letter = dead_letter
        self._consumer = consumer
        self._handler = handler
        self._retries = retries
        self._backoff = backoff

    async def make(self, entry: "Entry", record: Record, *, is_suspect: bool) -> None:
        """Try until it is handled, or given up.

        That an event is tried for the first time is not written down, which would be a write for
        each event. So nobody knows which one the first crash was by, or whether by any: the one
        that comes next then is a suspect, and is written down each time before it is tried. By a
        crash only that is given up which is known to have been tried.

        Args:
            entry: the event.
            record: its record.
            is_suspect: whether it may be what the last holder of the lease was killed by.

        Raises:
            BaseException: what the handler raised in the last attempt, without a dead-letter topic;
                or what is not for it to deal with, such as `SystemExit`.
        """
        lease, reader = self._consumer._held()
        tries = _Tries.of(lease.state["attempts"], record)
        if tries is None:
            tries = _Tries(record.position, 0, is_suspect, has_begun=False, has_killed=False)
        else:
            tries = tries._replace(has_killed=tries.has_killed or tries.has_begun)
            number = tries.number + tries.is_suspect
            if tries.has_killed and self.dead_letter is not None and number > self._retries:
                await self._bury(entry, record, number, _DIED)
                return
        event: Event | None = entry.event
        is_over = False
        while not is_over:
            tries = tries.next()
            # Another one each time: the handler may have changed what it had.
            again = entry._replace(event=event or record.event())
            event = None
            is_over = await self._attempt(again, record, tries, reader)

    async def _attempt(
        self, entry: "Entry", record: Record, tries: "_Tries", reader: Reader
    ) -> bool:
        """Try once. False: it failed, the delay is over, and it is to be tried again."""
        is_watched = tries.is_suspect or tries.number > 1
        if is_watched:
            await self._write(tries)
        error = await self._try(entry.event)
        if error is None:
            if is_watched:  # otherwise a crash later on would be put down to it
                await self._consumer._commit_yielded(entry.number)
            return True
        if isinstance(error, Exception | asyncio.CancelledError):
            is_over = await self._failed(entry, record, tries, error)
            return is_over or not await self._pause(tries.number, reader)
        try:
            await self._failed(entry, record, tries, error)
        except StreamingError:
            _logger.exception("consumer %s could not count an attempt", self._consumer.name)
        raise error

    async def _failed(
        self, entry: "Entry", record: Record, tries: "_Tries", error: BaseException
    ) -> bool:
        """Count a failure, and give up after the last. False: it is to be tried again."""
        await self._write(tries._replace(has_begun=False, has_killed=False))
        is_last = tries.number > self._retries
        if is_last and self.dead_letter is None:
            if isinstance(error, StopIteration):  # which no coroutine can raise
                raise RuntimeError(f"the handler raised {error!r}") from error
            raise error
        self._log(record, error, tries.number)
        if is_last:
            await self._bury(entry, record, tries.number, _told(error))
        return is_last

    async def tell(self, event: Event) -> None:
        """Have the handler know of a gap."""
        error = await self._try(event)
        if error is None:
            return
        if not isinstance(error, Exception | asyncio.CancelledError):
            raise error
        _logger.error(
            "consumer %s: its handler failed at a gap", self._consumer.name, exc_info=error
        )

    async def _try(self, event: Event) -> BaseException | None:
        """Call the handler; what it raised, unless this task is interrupted."""
        try:
            result = self._handler(event)
            if result is not None and hasattr(result, "__await__"):
                await result
        except BaseException as error:
            if _interrupts(error):
                raise
            return error
        return None

    def _log(self, record: Record, error: BaseException, number: int) -> None:
        _logger.warning(
            "consumer %s: attempt %d of %d at event %s failed",
            self._consumer.name,
            number,
            1 + self._retries,
            record.id,
            exc_info=error,
        )

    async def _write(self, tries: "_Tries") -> None:
        """Write how often it was tried. What came before the event is committed first."""
        await self._consumer._commit_dealt_with()
        async with self._consumer._as_holder() as lease:
            await lease.store(attempts=tries._asdict())
        self._consumer._has_begun = tries.has_begun

    async def _pause(self, number: int, reader: Reader) -> bool:
        """Wait before the next attempt. False: there is none, for the consumer was reset.

        Raises:
            ConsumerInUse: another has taken the lease meanwhile.
            StreamClosed: the stream or the log was closed.
        """
        longest = min(self._backoff * 2 ** min(number - 1, _MOST_DOUBLED), _LONGEST_DELAY)
        with suppress(TimeoutError):
            async with asyncio.timeout(longest * random.uniform(0.5, 1.0)):
                await reader.wait_for_end()
        if self._consumer._held()[1] is not reader:
            return False
        if reader.ended:
            await self._consumer._check_lease()
            raise StreamClosed("the stream or the log has been closed")
        return True

    async def _bury(self, entry: "Entry", record: Record, number: int, error: str) -> None:
        """Append an event to the dead letters, and commit it."""
        consumer = self._consumer
        if _is_letter(record):
            _logger.error(
                "consumer %s: dead letter %s failed, and stays where it is: %s",
                consumer.name,
                record.id,
                error,
            )
        else:
            await self._append(self._letter(record, number, error))
        await consumer._commit_yielded(entry.number)

    def _letter(self, record: Record, number: int, error: str) -> Record:
        """What tells that an event was given up: made of its record, which no handler has seen."""
        assert self.dead_letter is not None
        name = self._consumer.name
        about = {
            **_metadata(record),
            "error": error,
            "attempts": number,
            "consumer": name,
            "event": record.id,
            "from": record.topics[0] if record.topics else None,
        }
        # By the position: an id may come again. Quoted, so that no two of these are alike.
        parts = (quote(name, safe=""), quote(self.dead_letter, safe=""), str(record.position))
        return record._replace(
            id=_PREFIX + "/".join(parts),
            topics=(self.dead_letter,),
            metadata=json.encode(about).encode(),
        )

    async def _append(self, letter: Record) -> None:
        """Append a dead letter, unless it is there: another process died before it could commit."""
        async with self._consumer._as_holder() as lease:
            try:
                await lease.append([letter])
            except IdConflict:
                if not await self._is_there(letter):  # somebody has published another by this name
                    other = f"{letter.id}/{secrets.token_hex(8)}"
                    await lease.append([letter._replace(id=other)])

    async def _is_there(self, letter: Record) -> bool:
        log, every = self._consumer._log, Selection("*")
        where = await log._locate(letter.id, every)
        before = (where.position or 1) - 1
        page = await log._page(before, every, 1, before)
        # They may differ in the error, and in how often it was tried.
        return any(
            found[1:6] == letter[1:6] and _about(found) == _about(letter) for found in page.records
        )


def _is_generator(function: Callable[..., Any]) -> bool:
    """Whether calling this makes a generator, and runs nothing."""
    while isinstance(function, functools.partial):
        function = function.func
    call = getattr(function, "__call__", None)  # noqa: B004  (an instance may have one that is)
    return any(
        inspect.isasyncgenfunction(each) or inspect.isgeneratorfunction(each)
        for each in (function, call)
    )


def _metadata(record: Record) -> dict[str, Any]:
    metadata = json.decode(record.metadata) if record.metadata else {}
    assert isinstance(metadata, dict)
    return metadata


def _about(letter: Record) -> tuple[Any, ...]:
    """The consumer and the event that a dead letter is about."""
    metadata = _metadata(letter)
    return metadata.get("consumer"), metadata.get("event")


def _is_letter(record: Record) -> bool:
    return record.id.startswith(_PREFIX) and None not in _about(record)


def _told(error: BaseException) -> str:
    """An error's type and message, as text that can be stored."""
    text = "".join(traceback.format_exception_only(error)).strip()[:_LONGEST_ERROR]
    return text.encode(errors="replace").decode()
