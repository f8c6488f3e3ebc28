"""`GET /ws`: events as they happen and publishing, over one WebSocket.

One JSON object per message, both ways; its only key says what it is.

    server                                   client
    {"subscribed": {"topics": […]}}          {"publish": {"topic": …, "data": …}}
    {"event": {"id": …, "type": …, …}}         with "type" and "id" if they matter
    {"published": id}, {"error": reason}
    {"gap": …}, {"lost": …}: what the stream tells its subscriber
    {"bye": reason}: the hub closes; come back

Every `publish` is answered, in order, by `published` or `error`; an error ends nothing.
"""

import logging
from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Any

from ..codec import json
from ..errors import DecodeError, StreamingError
from ..models import Event, EventType
from ..stream import SSEStream
from .connection import Connection
from .http import Message, Refusal, Request
from .publish import publish_value
from .subscribe import SubscribeRequest

__all__ = ["EventSocket"]

logger = logging.getLogger(__name__)

# Close codes of RFC 6455's registry that tell a client to come back.
_SERVICE_RESTART = 1012
_PUBLISH_FIELDS = frozenset({"topic", "data", "type", "id"})


class EventSocket:
    """One WebSocket.

    Args:
        request: the handshake.
        stream: what its client reads and publishes to.
        max_message_bytes: the largest message that is taken.

    Raises:
        Refusal: 400 when the request cannot be understood.
    """

    def __init__(self, request: Request, stream: SSEStream, max_message_bytes: int) -> None:
        self.wanted = SubscribeRequest(request)
        self._stream = stream
        self._max_message_bytes = max_message_bytes

    async def send(self, connection: Connection, events: AsyncGenerator[Event, None]) -> None:
        """Accept it, tell what was subscribed to and then every event, until the stream ends."""
        await connection.write({"type": "websocket.accept"})
        wanted = self.wanted
        await connection.write(
            _text(
                subscribed={
                    "topics": wanted.topics,
                    "last_event_id": wanted.last_event_id,
                }
            )
        )
        async for event in events:
            message = self._message(event)
            if message is not None:
                await connection.write(message)

    async def answer_messages(self, connection: Connection) -> None:
        """Do what the client's messages say, one after the other, until it is gone."""
        while (message := await connection.receive()) is not None:
            try:
                event = await self._publish(message)
            except Refusal as refusal:
                await connection.write(_text(error=refusal.reason))
            else:
                await connection.write(_text(published=event.id))

    async def send_end(self, connection: Connection, reason: str) -> None:
        """Close the socket and say why."""
        await connection.say_last(
            _text(bye=reason),
            {"type": "websocket.close", "code": _SERVICE_RESTART, "reason": reason},
        )

    async def _publish(self, message: Message) -> Event:
        fields = _what_to_publish(message.get("text"), self._max_message_bytes)
        return await publish_value(
            self._stream,
            fields["topic"],
            fields["data"],
            type=fields.get("type"),
            id=fields.get("id"),
        )

    def _message(self, event: Event) -> dict[str, object] | None:
        if event.type == EventType.HEARTBEAT:
            return None  # the server's pings keep a WebSocket open
        try:
            if event.is_control:
                return _text(**{str(event.type).removeprefix("stream."): event.data})
            return {"type": "websocket.send", "text": f'{{"event":{event.to_json()}}}'}
        except StreamingError:
            logger.exception("event %s cannot be sent and is left out", event.id)
            return None


def _what_to_publish(text: str | None, max_bytes: int) -> dict[str, Any]:
    """Return the fields of a message `publish`.

    Raises:
        Refusal: the message is another, or none at all.
    """
    if text is None:
        raise _wrong("messages are text: one JSON object each")
    if len(text) > max_bytes or len(text.encode()) > max_bytes:
        raise _wrong(f"the message is larger than {max_bytes} bytes")
    try:
        value = json.decode(text)
    except DecodeError as error:
        raise _wrong(str(error)) from None
    if not isinstance(value, dict) or list(value) != ["publish"]:
        raise _wrong('a message is an object with one key: {"publish": {…}}')
    fields = value["publish"]
    if not isinstance(fields, dict) or not {"topic", "data"} <= fields.keys():
        raise _wrong('publish takes an object: {"topic": …, "data": …}')
    if unknown := fields.keys() - _PUBLISH_FIELDS:
        raise _wrong(f"publish has no {min(unknown)!r:.60}")
    for name in ("topic", "type", "id"):
        if not isinstance(fields.get(name, ""), str):
            raise _wrong(f"{name} is a string")
    return fields


def _wrong(reason: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, reason)


def _text(**value: object) -> dict[str, object]:
    return {"type": "websocket.send", "text": json.encode(value)}
