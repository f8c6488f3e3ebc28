"""`GET /events/{topic}/history`: what the log retains, page by page, as JSON."""

from http import HTTPStatus
from typing import Final

from ..codec import json
from ..errors import StreamingError, TopicError
from ..log import EARLIEST, Log
from .feed import unavailable
from .frames import Frames, gap_of
from .http import Refusal, Request
from .subscribe import number_of

__all__ = ["history_of"]

_LIMIT: Final = 100
_MOST: Final = 1000
_MOST_BYTES: Final = 4 << 20


async def history_of(log: Log, request: Request, topic: str, events: Frames[str]) -> bytes:
    """The body of the answer: `{"events": […], "cursor": …, "is_last": …, "gap": …}`.

    Events are as with `format=event`. The cursor is where the next page begins; it is also what
    `GET /events` can go on from. `gap` says what is missing before the first; null: nothing is. In
    the query, `after` is the cursor to begin after, by default the earliest, and `limit` a number
    of events up to 1000, by default 100. There are fewer where they are large.

    Args:
        events: makes whole events of records.

    Raises:
        Refusal: 400 for a topic or limit that cannot be one, 503 when the log cannot be read.
    """
    limit = number_of(request, "limit")
    if limit is None:
        limit = _LIMIT
    if not 1 <= limit <= _MOST:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"limit is a number from 1 to {_MOST}")
    try:
        batch = await log.read(request.value("after") or EARLIEST, topic, limit=limit)
    except TopicError as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, str(error)) from None
    except StreamingError as error:
        raise unavailable(error) from None
    found: list[str] = []
    size = 0
    cursor, is_last = batch.cursor, batch.is_last
    for count, record in enumerate(batch):
        if size > _MOST_BYTES:
            cursor, is_last = batch.records[count - 1].id, False
            break
        event = events.of(record)
        if event:
            found.append(event)
            size += len(event)
    gap = None if batch.gap is None else gap_of(batch.gap)
    rest = json.encode({"cursor": cursor, "is_last": is_last, "gap": gap})
    return f'{{"events":[{",".join(found)}],{rest[1:]}\n'.encode()
