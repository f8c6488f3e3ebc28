"""What one subscriber gets of the hub's log, whatever carries it there."""

import asyncio
import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final, NamedTuple, Self

from ..errors import StreamClosed, StreamingError, TopicError
from ..log import LATEST, Batch, Log
from ..log.base import Reader
from .http import Refusal

__all__ = ["MAX_LAST", "Feed", "Wanted", "unavailable"]

logger = logging.getLogger(__name__)

MAX_TOPICS: Final = 100
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

    topics: Sequence[str]
    after: str | None
    last: int | None

    @classmethod
    def checked(cls, topics: Sequence[str], after: str | None, last: int | None) -> Self:
        """What a client asks for, within bounds.

        Raises:
            Refusal: 400 when there is no topic, or too many, or more asked for than there can be.
        """
        if not topics:
            raise Refusal(
                HTTPStatus.BAD_REQUEST,
                "name what to subscribe to: ?topic=orders.*, or ?topic=* for every topic",
            )
        if len(topics) > MAX_TOPICS:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"more than {MAX_TOPICS} topics")
        if after is not None and last is not None:
            raise Refusal(HTTPStatus.BAD_REQUEST, "begin after an event or with the last, not both")
        if last is not None and not 0 <= last <= MAX_LAST:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"last is a number from 0 to {MAX_LAST}")
        return cls(topics, after, last)


class Feed:
    """The events of a log that a client asked for: those there are, then those that come.

    To be closed, whatever happens.

    Args:
        log: what is read.
        wanted: what the client asked for.
        keep_alive: after how many seconds without an event `read` says so.

    Raises:
        Refusal: 400 for a topic that cannot be one, 503 when the log has been closed.
    """

    def __init__(self, log: Log, wanted: Wanted, keep_alive: float) -> None:
        self._log = log
        self._wanted = wanted
        self._keep_alive = keep_alive
        self._is_failing = False
        self._cursor: str | None = None
        try:
            self._reader = Reader(log, wanted.topics, limit=_PAGE)
        except TopicError as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, str(error)) from None
        except StreamClosed:
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "the hub's log is closed") from None

    async def begin(self) -> None:
        """Find the place to begin at.

        Raises:
            Refusal: 503 when the log cannot be read.
        """
        after, last = self._wanted.after, self._wanted.last
        try:
            if last:
                await self._reader.begin(last=last)
            elif after is None or after == LATEST:
                self._cursor = await self._reader.begin_now()
            else:
                await self._reader.begin(after)
        except StreamingError as error:
            raise unavailable(error) from None

    @property
    def cursor(self) -> str | None:
        """The place where it began, where the client does not know it; None: it does.

        A client that is cut off before its first event comes back to this, and misses nothing.
        """
        return self._cursor

    def told(self) -> dict[str, Any]:
        """What the client is told first."""
        wanted = self._wanted
        return {
            "topics": list(wanted.topics),
            "after": self._cursor or wanted.after,
            "earliest": self._log.statistics().earliest,
        }

    async def read(self) -> Batch | None:
        """The next batch, empty after `keep_alive` seconds without one; None: the log was closed.

        Cancelled, it has lost nothing. A log that cannot be read is tried again until it can.
        """
        try:
            async with asyncio.timeout(self._keep_alive):
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
        return batch

    def close(self) -> None:
        """Read no more. Again does nothing."""
        self._reader.close()


def unavailable(error: StreamingError) -> Refusal:
    """The answer to what the log cannot do now. What is wrong with it is nobody's business."""
    if isinstance(error, StreamClosed):
        reason = "the hub's log is closed"
    else:
        logger.error("the log fails: %s", error)
        reason = "the hub's log cannot be used now"
    return Refusal(HTTPStatus.SERVICE_UNAVAILABLE, reason, [(b"retry-after", b"1")])
