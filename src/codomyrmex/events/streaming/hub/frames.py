"""What a log's records look like on the wire: made once each, of what the log holds.

A record's body goes out as it was stored. Only what is rare is decoded: a record whose metadata say
that its body is text, that it is a stream's own word, or when to come back.
"""

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, AnyStr, Final, Generic

from ..codec import json, sse
from ..errors import StreamingError
from ..log import Gap, Record
from ..models import EventType, is_json

__all__ = [
    "Frames",
    "control_frame",
    "data_frame",
    "event_frame",
    "event_json",
    "gap_frame",
    "gap_of",
]

logger = logging.getLogger(__name__)

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_WITHOUT_ID: Final = frozenset((EventType.CONNECT, EventType.DISCONNECT, EventType.HEARTBEAT))
_SPECIAL: Final = (b'"content_type"', b'"control"', b'"retry"')

_MOST: Final = 2000
"""Frames of one kind that are kept for the next reader."""

_MOST_BYTES: Final = 8 << 20
"""Bytes of them."""


def _is_special(record: Record) -> bool:
    """Whether the metadata may say how the frame is to be."""
    metadata = record.metadata
    return bool(metadata) and any(name in metadata for name in _SPECIAL)


def data_frame(record: Record) -> bytes:
    """The frame of Server-Sent Events with the event's type and its data, as `Event.to_sse`.

    Raises:
        StreamingError: there is none.
    """
    if record.type in _WITHOUT_ID or _is_special(record):
        return record.event().to_sse().encode()
    return sse.encode(record.body.decode(), id=record.id, event=record.type).encode()


def event_frame(record: Record) -> bytes:
    """The frame of Server-Sent Events whose data is the whole event.

    It has no event line: an EventSource gives it to `onmessage` whatever the type, which is in the
    event. What a stream says of itself is a `data_frame` here, too.

    Raises:
        StreamingError: there is none.
    """
    if b'"control"' in record.metadata and record.event().is_control:
        return data_frame(record)
    return sse.encode(event_json(record), id=record.id).encode()


def event_json(record: Record) -> str:
    """The whole event as JSON of one line, as `Event.to_json`.

    Raises:
        StreamingError: the record was not made by `Record.of`.
    """
    body = record.body.decode()
    about = record.metadata.decode()[1:-1]
    if '"content_type"' in about and not is_json(record.event().metadata.get("content_type")):
        body = json.encode(body)
    if record.topics:
        about = f'"topic":{json.encode(record.topics[0])}{"," if about else ""}{about}'
    return (
        f'{{"id":{json.encode(record.id)},"type":{json.encode(record.type)},"data":{body},'
        f'"metadata":{{{about}}},"timestamp":"{_iso(record.timestamp)}"}}'
    )


def _iso(microseconds: int) -> str:
    return (_EPOCH + timedelta(0, 0, microseconds)).isoformat()


def control_frame(
    name: str,
    *,
    id: str | None = None,  # noqa: A002 - the field's name
    retry: int | None = None,
    **data: object,
) -> bytes:
    """What the hub says of itself: a frame of type `stream.` and `name`.

    It has no id, as a rule: that would overwrite the reader's place.
    """
    return sse.encode(json.encode(data), id=id, event=f"stream.{name}", retry=retry).encode()


def gap_frame(gap: Gap) -> bytes:
    """The frame that tells of a gap in its place among others."""
    return control_frame("gap", **gap_of(gap))


def gap_of(gap: Gap) -> dict[str, Any]:
    """What is told of a gap, as JSON has it."""
    return {"after": gap.after, "reason": gap.reason, "missed": gap.missed}


class Frames(Generic[AnyStr]):
    """What records look like in one form, made once for all readers.

    Args:
        write: makes it of a record.
        nothing: what there is of a record of which it cannot be made.
    """

    def __init__(self, write: Callable[[Record], AnyStr], nothing: AnyStr) -> None:
        self._write: Callable[[Record], AnyStr] = write
        self._nothing: AnyStr = nothing
        self._made: dict[int, AnyStr] = {}
        self._size = 0

    def of(self, record: Record) -> AnyStr:
        """What a record looks like; nothing if it cannot be written, which is logged.

        One event that cannot be written must not end the stream of everyone who reads it.
        """
        frame = self._made.get(record.position)
        if frame is None:
            try:
                frame = self._write(record)
            except (StreamingError, UnicodeDecodeError):
                logger.exception("event %s cannot be sent and is left out", record.id)
                frame = self._nothing
            self._size += len(frame)
            if self._size > _MOST_BYTES or len(self._made) >= _MOST:
                self._made.clear()
                self._size = len(frame)
            self._made[record.position] = frame
        return frame
