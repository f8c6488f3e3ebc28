"""What one subscriber gets of the hub's log, whatever carries it there."""

import asyncio
import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final, NamedTuple, Self

from ..errors import StreamClosed, StreamingError, TopicError
from ..log import EARLIEST, LATEST, Batch
from ..log.base import Reader
from ..topics import Exact, UrlPattern
from .authorize import Visitor
from .core import Core
from .http import Refusal

__all__ = ["MAX_LAST", "Feed", "Wanted", "unavailable"]

logger = logging.getLogger(__name__)

MAX_LAST: Final = 100_000

_PAGE: Final = 100
"""Records that are read at a time: those that a client which does not read holds in memory."""

_RETRY: Final = 1.0
"""Seconds after which a log that could not be read is tried again."""


class Wanted(NamedTuple):
    """What a client asks for.

    Attributes:
        topics: topics and patterns.
        after: the cursor to begin after; None: with what comes from now on, or with the last.
        last: how many of the latest events to begin with; None: none.
    """

    topics: Sequence[str | Exact | UrlPattern]
    after: str | None
    last: int | None

    @classmethod
    def checked(
        cls,
        topics: Sequence[str | Exact | UrlPattern],
        after: str | None,
        last: int | None,
        most: int,
    ) -> Self:
        """What a client asks for, of up to so many topics.

        Raises:
            Refusal: 400 when there is no topic, or too many, or more asked for than there can be.
        """
        if not topics:
            raise Refusal(
                HTTPStatus.BAD_REQUEST,
                "name what to subscribe to: ?topic=orders.*, or ?topic=* for every topic",
            )
        if len(topics) > most:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"more than {most} topics")
        if after is not None and last is not None:
            raise Refusal(HTTPStatus.BAD_REQUEST, "begin after an event or with the last, not both")
        if last is not None and not 0 <= last <= MAX_LAST:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"last is a number from 0 to {MAX_LAST}")
        return cls(topics, after, last)


class Feed:
    """The events of a log that a client asked for: those there are, then those that come.

    To be closed, whatever happens.

    Args:
        core: what is read.
        visitor: for whom it is.
        wanted: what it asked for.

    Raises:
        Refusal: 400 for a topic that cannot be one, 503 when the log has been closed.
    """

    def __init__(self, core: Core, visitor: Visitor, wanted: Wanted) -> None:
        self._log = core.log
        self._gate = core.gate
        self._keep_alive = core.keep_alive
        self._visitor = visitor
        self._refusal: Refusal | None = None
        self._first: Batch | None = None
        self._wanted = wanted
        self._is_failing = False
        self._cursor: str | None = None
        try:
            self._reader = Reader(core.log, wanted.topics, limit=_PAGE)
        except TopicError as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, str(error)) from None
        except StreamClosed:
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "the hub's log is closed") from None

    async def begin(self) -> None:
        """Find the place to begin at.

        Raises:
            Refusal: 403 when the visitor may read none of it, 503 when the log cannot be read.
        """
        after, last = self._wanted.after, self._wanted.last
        await self._gate.check_readable(self._visitor, self._reader.selection)
        try:
            if last:
                await self._reader.begin(last=last)
                self._first = await self._reader.read(wait=False)
                if not self._first:
                    self._cursor = EARLIEST
            elif after is None or after == LATEST:
                await self._reader.begin_now()
                self._cursor = self._reader.cursor
            else:
                await self._reader.begin(after)
        except StreamingError as error:
            raise unavailable(error) from None

    async def renew(self, visitor: Visitor) -> None:
        """Go on for the same visitor with another token."""
        self._visitor = visitor
        await self.recheck()

    async def recheck(self) -> None:
        """End it, if the visitor may not read any more what it asked for."""
        try:
            await self._gate.check_readable(self._visitor, self._reader.selection)
        except Refusal as refusal:
            self.forbid(refusal)

    def forbid(self, refusal: Refusal) -> None:
        """End it: the visitor may not read any more."""
        self._refusal = refusal
        self._reader.end()

    @property
    def refusal(self) -> Refusal | None:
        """Why it has ended, if that is because the visitor may not read any more."""
        return self._refusal

    @property
    def cursor(self) -> str | None:
        """The place where it began, where the client does not know it; None: it does.

        A client that is cut off before its first event comes back to this, and misses nothing.
        """
        return self._cursor

    async def preceding(self) -> str:
        """The id of the event before its first, `EARLIEST` if that is not known any more."""
        after = self._wanted.after
        if after is None or after == LATEST:
            return self._reader.cursor
        found = await self._log.locate(after, self._wanted.topics)
        is_there = found.status != "unknown" and found.missed == 0
        return after if is_there else EARLIEST

    def told(self) -> dict[str, Any]:
        """What the client is told first."""
        wanted = self._wanted
        return {
            "topics": [_shown(topic) for topic in wanted.topics],
            "after": self._cursor or wanted.after,
            "earliest": self._log.statistics().earliest,
        }

    async def read(self) -> Batch | None:
        """The next batch, empty after `keep_alive` seconds without one; None: it has ended.

        Cancelled, it has lost nothing that can be read. A log that cannot be read is tried again
        until it can.
        """
        deadline = asyncio.get_running_loop().time() + self._keep_alive
        while True:
            try:
                batch, self._first = self._first, None
                if not batch:
                    async with asyncio.timeout_at(deadline):
                        batch = await self._reader.read()
            except TimeoutError:
                return Batch([], "")
            except StreamClosed:
                return None
            except StreamingError:
                if not self._is_failing:
                    logger.exception("the log cannot be read; its readers wait")
                self._is_failing = True
                await asyncio.sleep(_RETRY)
                return Batch([], "")
            self._is_failing = False
            if batch is None:
                return None
            if not self._gate.is_open:
                batch.records = await self._gate.readable(self._visitor, batch.records)
            if self._refusal is not None:
                return None
            if batch:
                return batch

    def close(self) -> None:
        """Read no more. Again does nothing."""
        self._reader.close()


def _shown(topic: str | Exact | UrlPattern) -> str:
    if isinstance(topic, str):
        return topic
    return topic.topic if isinstance(topic, Exact) else topic.pattern


def unavailable(error: StreamingError) -> Refusal:
    """The answer to what the log cannot do now. What is wrong with it is nobody's business."""
    if isinstance(error, StreamClosed):
        reason = "the hub's log is closed"
    else:
        logger.error("the log fails: %s", error)
        reason = "the hub's log cannot be used now"
    return Refusal(HTTPStatus.SERVICE_UNAVAILABLE, reason, [(b"retry-after", b"1")])
