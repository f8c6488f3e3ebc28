"""`GET /events/{topic}/history`: what the log retains, page by page, as JSON."""

from http import HTTPStatus
from typing import Final

from ..codec import json
from ..errors import StreamingError, TopicError
from ..log import EARLIEST
from ..topics import Selection
from .authorize import Visitor
from .core import Core
from .feed import unavailable
from .frames import gap_of
from .http import Refusal, Request
from .subscribe import number_of

__all__ = ["history_of"]

_LIMIT: Final = 100
_MOST: Final = 1000
_MOST_BYTES: Final = 4 << 20


async def history_of(core: Core, request: Request, visitor: Visitor, topic: str) -> bytes:
    """The body of the answer: `{"events": […], "cursor": …, "is_last": …, "gap": …}`.

    Events are as with `format=event`. The cursor is where the next page begins; it is also what
    `GET /events` can go on from. `gap` says what is missing before the first; null: nothing is. In
    the query, `after` is the cursor to begin after, by default the earliest, and `limit` a number
    of events up to 1000, by default 100. There are fewer where they are large.

    Raises:
        Refusal: 400 for a topic or limit that cannot be one, 403 when the visitor may read none of
            it, 503 when the log cannot be read.
    """
    limit = number_of(request, "limit")
    if limit is None:
        limit = _LIMIT
    if not 1 <= limit <= _MOST:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"limit is a number from 1 to {_MOST}")
    try:
        await core.gate.check_readable(visitor, Selection(topic))
        batch = await core.log.read(request.value("after") or EARLIEST, topic, limit=limit)
    except TopicError as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, str(error)) from None
    except StreamingError as error:
        raise unavailable(error) from None
    found: list[str] = []
    size = 0
    cursor, is_last = batch.cursor, batch.is_last
    readable = await core.gate.readable(visitor, batch.records)
    for count, record in enumerate(readable):
        if size > _MOST_BYTES:
            cursor, is_last = readable[count - 1].id, False
            break
        event = core.events.of(record)
        if event:
            found.append(event)
            size += len(event)
    gap = None if batch.gap is None else gap_of(batch.gap)
    rest = json.encode({"cursor": cursor, "is_last": is_last, "gap": gap})
    return f'{{"events":[{",".join(found)}],{rest[1:]}\n'.encode()
