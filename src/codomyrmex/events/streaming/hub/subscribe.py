"""`GET /events`: events as they happen, as Server-Sent Events.

The head of the answer goes out at once, with a first frame: `stream.connect`, which tells what was
subscribed to and from where on, and sets the reader's reconnection time. An idle stream is kept
open by comments. When the hub closes, the last frame is `stream.disconnect`.
"""

import random
from http import HTTPMethod, HTTPStatus
from typing import Final

from ..codec import sse
from .connection import Connection
from .core import Core
from .feed import Feed, Wanted
from .frames import control_frame, gap_frame
from .http import NO_STORE, Refusal, Request

__all__ = ["EventStream", "number_of", "wanted_by"]

_KEEP_ALIVE: Final = sse.comment().encode()

_WRITE_BYTES: Final = 64 * 1024
"""Bytes after which frames that wait together are written, rather than joined by more."""


def wanted_by(request: Request) -> Wanted:
    """What a request asks for: `topic` (several) and `after`, `last` or `last_event_id`.

    Raises:
        Refusal: 400 when there is no topic, there are too many, or one of them cannot be one.
    """
    # EventSource repeats its URL when it reconnects: what it adds as a header is newer.
    after = request.header(b"last-event-id")
    if after is not None:
        # Browsers send UTF-8; an ASGI header is bytes, read as Latin-1 until here.
        after = after.encode("latin-1").decode("utf-8", "replace")
    returned = after or request.value("last_event_id") or None
    last = number_of(request, "last")
    if returned:  # one that has been here before has had the last
        return Wanted.checked(request.values("topic"), returned, None)
    return Wanted.checked(request.values("topic"), request.value("after") or None, last)


def number_of(request: Request, name: str) -> int | None:
    """The number in the query under this name; None: it is not there.

    Raises:
        Refusal: 400 when it is not a number, or not one of up to nine digits.
    """
    text = request.value(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"{name} is a number, not {text!r:.60}")
    return int(text)


class EventStream:
    """One answer to `GET /events`.

    Args:
        request: the request; `format` in its query is `data` (the default: the event's data, under
            its type) or `event` (the whole event, so that a reader of a pattern knows the topic).
        core: what is sent.

    Raises:
        Refusal: 400 when the request cannot be understood.
    """

    def __init__(self, request: Request, core: Core) -> None:
        frames = core.frames
        name = request.value("format") or "data"
        if name not in frames:
            raise Refusal(
                HTTPStatus.BAD_REQUEST, f"format is one of {', '.join(frames)}, not {name!r:.60}"
            )
        self._frames = frames[name]
        self._request = request
        self.wanted = wanted_by(request)
        self._reconnect_seconds = core.reconnect_seconds

    async def send(self, connection: Connection, feed: Feed) -> None:
        """Send the head, the first frame and then every event, until the log is closed.

        To HEAD, the head is all of it.

        Raises:
            Refusal: before the head: 503 when the log cannot be read.
        """
        await feed.begin()
        await connection.write(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    NO_STORE,
                    (b"x-accel-buffering", b"no"),
                    *self._request.answer_headers,
                ],
            }
        )
        if self._request.method == HTTPMethod.HEAD:
            await connection.write({"type": "http.response.body", "body": b""})
            return
        await connection.write(_body(self._connect_frame(feed)))
        while (batch := await feed.read()) is not None:
            if not batch:
                await connection.write(_body(_KEEP_ALIVE))
                continue
            waiting = [] if batch.gap is None else [gap_frame(batch.gap)]
            size = 0
            for record in batch:
                frame = self._frames.of(record)
                waiting.append(frame)
                size += len(frame)
                if size >= _WRITE_BYTES:
                    await connection.write(_body(b"".join(waiting)))
                    waiting.clear()
                    size = 0
            if waiting:
                await connection.write(_body(b"".join(waiting)))

    async def send_end(self, connection: Connection) -> None:
        """End the answer and say why."""
        frame = control_frame("disconnect", retry=self._retry(), reason=connection.reason)
        await connection.say_last(_body(frame), {"type": "http.response.body", "body": b""})

    def _connect_frame(self, feed: Feed) -> bytes:
        # The one frame of the hub's own that has an id, and only if the client has none yet: that
        # of the event before its first. An EventSource that is cut off before it gets any would
        # come back without an id, and never learn of what was published meanwhile.
        return control_frame("connect", id=feed.cursor, retry=self._retry(), **feed.told())

    def _retry(self) -> int:
        """A reconnection time in milliseconds: spread, so that readers do not come back at once."""
        return round(1000 * random.uniform(*self._reconnect_seconds))


def _body(frames: bytes) -> dict[str, object]:
    return {"type": "http.response.body", "body": frames, "more_body": True}
