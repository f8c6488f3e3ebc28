"""`GET /events`: events as they happen, as Server-Sent Events.

The head of the answer goes out at once, with a first frame: `stream.connect`, which tells what was
subscribed to and sets the reader's reconnection time. An idle stream is kept open by comments.
When the hub closes, the last frame is `stream.disconnect`. Frames that the hub makes have no id,
so that they never overwrite the reader's cursor.
"""

import logging
import random
from collections.abc import AsyncGenerator, Callable
from http import HTTPMethod, HTTPStatus
from typing import Final

from ..codec import json, sse
from ..errors import StreamClosed, StreamingError
from ..models import Event, EventType
from ..stream import SSEStream
from .connection import Connection
from .http import NO_STORE, Refusal, Request

__all__ = ["EventStream", "SubscribeRequest", "subscribe"]

logger = logging.getLogger(__name__)

MAX_TOPICS: Final = 100
_KEEP_ALIVE: Final = sse.comment()


class SubscribeRequest:
    """What a client asked for: `topic` (several), `last_event_id`; not yet subscribed.

    Raises:
        Refusal: 400 when there is no topic or there are too many.
    """

    def __init__(self, request: Request) -> None:
        self.topics = request.values("topic")
        if not self.topics:
            raise Refusal(
                HTTPStatus.BAD_REQUEST,
                "name what to subscribe to: ?topic=orders.*, or ?topic=* for every topic",
            )
        if len(self.topics) > MAX_TOPICS:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"more than {MAX_TOPICS} topics")
        # EventSource repeats its URL when it reconnects: what it adds as a header is newer.
        last_event_id = request.header(b"last-event-id")
        if last_event_id is not None:
            # Browsers send UTF-8; an ASGI header is bytes, read as Latin-1 until here.
            last_event_id = last_event_id.encode("latin-1").decode("utf-8", "replace")
        self.last_event_id = last_event_id or request.value("last_event_id") or None


async def subscribe(stream: SSEStream, wanted: SubscribeRequest) -> AsyncGenerator[Event, None]:
    """Subscribe, and return the events; closing them ends the subscription.

    Raises:
        Refusal: 400 for a topic that cannot be one, 503 when the stream is closed.
    """
    try:
        subscribed = await stream.subscribe(topic=wanted.topics)
    except StreamClosed:
        raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "the stream is closed") from None
    except StreamingError as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, str(error)) from None
    return stream.events(subscribed.id, wanted.last_event_id)


def _event_frame(event: Event) -> str:
    # No event line: EventSource gives it to `onmessage` whatever the type, which is in the event.
    return sse.encode(event.to_json(), id=event.id)


_FORMATS: Final[dict[str, Callable[[Event], str]]] = {
    "data": Event.to_sse,
    "event": _event_frame,
}


class EventStream:
    """One answer to `GET /events`.

    Args:
        request: the request; `format` in its query is `data` (the default: the event's data, under
            its type) or `event` (the whole event, so that a reader of a pattern knows the topic).
        reconnect_seconds: lower and upper bound of the reconnection time told to the reader.

    Raises:
        Refusal: 400 when the request cannot be understood.
    """

    def __init__(self, request: Request, reconnect_seconds: tuple[float, float]) -> None:
        name = request.value("format") or "data"
        if name not in _FORMATS:
            raise Refusal(
                HTTPStatus.BAD_REQUEST, f"format is one of {', '.join(_FORMATS)}, not {name!r:.60}"
            )
        self._frame = _FORMATS[name]
        self._request = request
        self.wanted = SubscribeRequest(request)
        self._reconnect_seconds = reconnect_seconds

    async def send(self, connection: Connection, events: AsyncGenerator[Event, None]) -> None:
        """Send the head, the first frame and then every event, until the stream ends.

        To HEAD, the head is all of it.
        """
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
        await connection.write(_body(self._connect_frame()))
        async for event in events:
            text = self._text(event)
            if text:
                await connection.write(_body(text))

    async def send_end(self, connection: Connection, reason: str) -> None:
        """End the answer and say why."""
        frame = sse.encode(
            json.encode({"reason": reason}), event="stream.disconnect", retry=self._retry()
        )
        await connection.say_last(_body(frame), {"type": "http.response.body", "body": b""})

    def _text(self, event: Event) -> str:
        if event.type == EventType.HEARTBEAT:
            return _KEEP_ALIVE
        try:
            return event.to_sse() if event.is_control else self._frame(event)
        except StreamingError:
            # One event that cannot be written must not end the stream of everyone who reads it.
            logger.exception("event %s cannot be sent and is left out", event.id)
            return ""

    def _connect_frame(self) -> str:
        wanted = self.wanted
        told = {"topics": wanted.topics, "last_event_id": wanted.last_event_id}
        return sse.encode(json.encode(told), event="stream.connect", retry=self._retry())

    def _retry(self) -> int:
        """A reconnection time in milliseconds: spread, so that readers do not come back at once."""
        return round(1000 * random.uniform(*self._reconnect_seconds))


def _body(text: str) -> dict[str, object]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": True}
