"""`POST /events/{topic}`: the body is the event's data as JSON."""

from http import HTTPStatus
from typing import Any, Final

from ..codec import json
from ..errors import DecodeError, StreamClosed, StreamingError
from ..models import Event, EventType
from ..stream import SSEStream
from ..topics import check_topic
from .http import Refusal, Request

__all__ = ["publish_body", "publish_value"]

# Their frames carry no id, since they are how a stream speaks of itself: a client that sent them
# could make every reader believe that the stream did.
_OWN_TYPES: Final = frozenset({EventType.HEARTBEAT, EventType.CONNECT, EventType.DISCONNECT})


async def publish_body(stream: SSEStream, request: Request, topic: str, body: bytes) -> Event:
    """Publish what a request's body holds to `topic`; `type` and `id` are in its query.

    Raises:
        Refusal: 400 when it cannot be an event, 503 when the stream is closed.
    """
    if not body:
        raise Refusal(
            HTTPStatus.BAD_REQUEST, "the body is empty: it is the event's data as JSON, or null"
        )
    try:
        data = json.decode(body)
    except DecodeError as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, str(error)) from None
    return await publish_value(
        stream, topic, data, type=request.value("type"), id=request.value("id")
    )


async def publish_value(
    stream: SSEStream,
    topic: str,
    data: Any,
    *,
    type: str | None,  # noqa: A002 - the field's name
    id: str | None,  # noqa: A002 - the field's name
) -> Event:
    """Publish `data` to `topic`; what the client leaves open is the event's default.

    Raises:
        Refusal: 400 when it cannot be an event, 503 when the stream is closed.
    """
    fields: dict[str, Any] = {"data": data, "metadata": {"topic": topic}}
    if type is not None:
        fields["type"] = type
    if id is not None:
        fields["id"] = id
    try:
        check_topic(topic)
        event = Event(**fields)
        if event.type in _OWN_TYPES:
            raise Refusal(
                HTTPStatus.BAD_REQUEST, f"events of the type {type!r} come from the stream itself"
            )
        await stream.publish(event)
    except StreamClosed:
        raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "the stream is closed") from None
    except StreamingError as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, str(error)) from None
    return event
