"""`POST /events/{topic}`: an event, or a batch of them, as JSON.

The body is the event's data; with `format=event` in the query it is the event, an object with
`data` and what else matters of `type`, `id`, `timestamp` and `metadata`. With `batch=true` it is an
array of these, and with a content type of newline-delimited JSON it has one on each line. A batch
is stored whole or not at all.
"""

import posixpath
import unicodedata
from collections.abc import Callable, Iterator
from http import HTTPStatus
from itertools import islice
from typing import Any, Final
from urllib.parse import unquote, urljoin, urlsplit

from ..codec import json
from ..errors import DecodeError, EventError, IdConflict, StreamingError, TooLarge
from ..ids import uuid7
from ..log import Log, Record
from ..models import Event, EventType
from .authorize import Visitor
from .core import Core
from .feed import unavailable
from .http import Refusal, Request

__all__ = [
    "MAX_BATCH",
    "OWN_TYPES",
    "RESERVED",
    "check_id",
    "draft_of",
    "has_unseen",
    "is_reserved",
    "publish_body",
    "store",
]

RESERVED: Final = "/.well-known/mercure"
"""The path below which topics are the hub's own, whatever the host."""

MAX_BATCH: Final = 1000
"""Events that are taken at once: what they cost is bounded, however small they are."""

# Their frames carry no id, since they are how a stream speaks of itself: a client that sent them
# could make every reader believe that the stream did.
OWN_TYPES: Final = frozenset(
    {EventType.HEARTBEAT, EventType.CONNECT, EventType.DISCONNECT, "mercure"}
)
# So would these, or they would change when all readers come back.
_OWN_METADATA: Final = frozenset(("control", "retry"))
_FIELDS: Final = frozenset(("data", "type", "id", "timestamp", "metadata"))
_LINES: Final = frozenset(
    f"application/{name}" for name in ("x-ndjson", "ndjson", "jsonl", "jsonlines", "x-jsonlines")
)
_YES: Final = frozenset(("true", "1", ""))


async def publish_body(
    core: Core, request: Request, visitor: Visitor, topic: str, body: bytes
) -> dict[str, Any]:
    """Publish what a request's body holds to `topic`, and return what to answer.

    Raises:
        Refusal: 400 when it cannot be an event, 409 for an id in a batch that another event has,
            413 when it is too large, 429 when the visitor publishes too much, 503 when the log does
            not take it.
    """
    if not body:
        raise _wrong("the body is empty: it is the event's data as JSON, or null")
    values, is_batch = _values_of(request, body)
    if not values:
        raise _wrong("there is no event in the batch")
    if len(values) > MAX_BATCH:
        raise Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"a batch has up to {MAX_BATCH} events",
        )
    form = _form_of(request)
    type_, id_ = request.value("type"), request.value("id")
    if form == "event" and (type_ is not None or id_ is not None):
        raise _wrong("with format=event, type and id are in the event, not in the query")
    if is_batch and id_ is not None:
        raise _wrong("the events of a batch have an id each, not one in the query")
    if form == "event":
        fields = [_fields_of(value) for value in values]
    else:
        given = _given(type=type_, id=id_)
        fields = [{**given, "data": value} for value in values]
    public = request.value("public")
    is_public = core.gate.is_public(topic) if public is None else public.lower() in _YES
    drafts = [draft_of(topic, each, not is_public) for each in fields]
    core.meter.published(core.meter.address_of(request), visitor.subject, len(drafts))
    with core.meter.publishing():
        stored = await store(core.log, drafts)
    if is_batch:
        return {"ids": [record.id for record in stored], "topic": topic}
    return {"id": stored[0].id, "topic": topic}


def _values_of(request: Request, body: bytes) -> tuple[list[Any], bool]:
    """The values in a body, and whether they are a batch."""
    content_type = (request.header(b"content-type") or "").partition(";")[0].strip().lower()
    batch = request.value("batch")
    try:
        if content_type in _LINES:
            return list(islice(_values_of_lines(body), MAX_BATCH + 1)), True
        value = json.decode(body)
    except DecodeError as error:
        raise _wrong(str(error)) from None
    if batch is None or batch.lower() not in _YES:
        return [value], False
    if not isinstance(value, list):
        raise _wrong("with batch=true, the body is an array")
    return value, True


def _values_of_lines(body: bytes) -> Iterator[Any]:
    for number, line in enumerate(body.splitlines(), 1):
        if line and not line.isspace():
            try:
                yield json.decode(line)
            except DecodeError as error:
                raise DecodeError(f"line {number}: {error}") from None


def _form_of(request: Request) -> str:
    form = request.value("format") or "data"
    if form not in ("data", "event"):
        raise _wrong(f"format is one of data, event, not {form!r:.60}")
    return form


def _fields_of(value: Any) -> dict[str, Any]:
    """The fields of an event that a client sends as an object."""
    if not isinstance(value, dict) or "data" not in value:
        raise _wrong('an event is an object: {"data": …}')
    if unknown := value.keys() - _FIELDS:
        raise _wrong(f"an event has no {min(unknown)!r:.60}")
    return value


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def draft_of(topic: str, fields: dict[str, Any], is_private: bool) -> Record:
    """The record of an event that a client sends; what it leaves open is the event's default.

    Raises:
        Refusal: 400 when it cannot be an event.
    """
    metadata = fields.get("metadata")
    if metadata is None or isinstance(metadata, dict):
        metadata = metadata or {}
        if own := metadata.keys() & _OWN_METADATA:
            raise _wrong(f"metadata {min(own)!r} comes from the stream itself")
        metadata = {**metadata, "topic": topic}
    try:
        event = Event.from_dict({**fields, "metadata": metadata})
        check_id(event.id)
        if event.type in OWN_TYPES:
            raise _wrong(f"events of the type {str(event.type)!r} come from the stream itself")
        draft = Record.of(event, private=is_private)
    except StreamingError as error:
        raise _wrong(str(error)) from None
    if is_reserved(topic):
        raise _wrong(f"{topic!r:.200} is the hub's own")
    return draft


def check_id(id_: str) -> None:
    """Refuse an id that a reader could not send back in a header, or that is a cursor's name.

    Raises:
        Refusal: 400.
    """
    if id_.startswith("#") or (not id_.isprintable() and has_unseen(id_)):
        raise _wrong("an id has no control characters, and does not begin with #")


def has_unseen(text: str) -> bool:
    """Whether there are characters in it that are not seen: control (Cc) or format (Cf) ones."""
    return any(unicodedata.category(character) in ("Cc", "Cf") for character in text)


def is_reserved(topic: str, base: str = f"http://localhost{RESERVED}") -> bool:
    """Whether a topic, resolved against the hub's URL, is at the hub's path or below, on any host.

    However it is written: with dot segments, percent-encoded, with backslashes, which URL parsers
    take for slashes.
    """
    try:
        path = urlsplit(urljoin(base, topic.strip().replace("\\", "/"))).path
    except ValueError:
        return False
    for _ in range(3):  # encoded again and again
        path = unquote(path).replace("\\", "/")
    path = posixpath.normpath("/" + path.lstrip("/"))
    own = (RESERVED, urlsplit(base).path)
    return any(path == each or path.startswith(each + "/") for each in own)


async def store(
    log: Log, drafts: list[Record], renamed: Callable[[str], object] | None = None
) -> list[Record]:
    """Append what a client sends, whole or not at all.

    An event whose id another event has is stored under an id of its own: whoever publishes over
    HTTP may be one of many that do not know of each other.

    Args:
        renamed: is called with that id before.

    Raises:
        Refusal: 409 when such an id is in a batch, 413 when an event is too large, 503 when the
            log does not take them.
    """
    try:
        try:
            return await log.append(drafts)
        except IdConflict as conflict:
            if len(drafts) > 1:
                raise Refusal(
                    HTTPStatus.CONFLICT, f"{conflict}; nothing of the batch was stored"
                ) from None
            id_ = uuid7()
            if renamed is not None:
                renamed(id_)
            return await log.append([drafts[0]._replace(id=id_)])
    except TooLarge as error:
        raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, str(error)) from None
    except EventError as error:
        raise _wrong(str(error)) from None
    except StreamingError as error:
        raise unavailable(error) from None


def _wrong(reason: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, reason)
