"""The event model: what an event is, who is subscribed, and how an event reads as text.

Promises: an id is a time-ordered UUIDv7 unless given; a timestamp is timezone-aware UTC; data is
any JSON value; every textual form is a round trip. An event is never changed by this library
once it exists, and should not be by others: streams share it between all their subscribers.
"""

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from . import topics
from .codec import json, sse
from .errors import DecodeError, EncodeError, EventError, FrameError, shown
from .ids import format_uuid7, new_sequence, uuid7
from .topics import TopicFilter

__all__ = [
    "Event",
    "EventType",
    "Filter",
    "Handler",
    "Subscription",
    "check_event",
    "control_event",
    "create_event",
]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_RESERVED_PREFIX = "stream."

_time_ns = time.time_ns
_encode_json = json.encode
_next_in_sequence = new_sequence()


def _renew_sequence() -> None:
    """Give a forked child numbers of its own: parent and child hold the same sequence."""
    global _next_in_sequence  # noqa: PLW0603
    _next_in_sequence = new_sequence()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_sequence)


class EventType(StrEnum):
    """The types every application knows. An event may also have a name of the application's own."""

    MESSAGE = "message"
    ERROR = "error"
    CONNECT = "connect"
    DISCONNECT = "disconnect"
    HEARTBEAT = "heartbeat"


_MESSAGE = EventType.MESSAGE
_ENUM_TYPES: dict[str, EventType] = {str(member.value): member for member in EventType}

# Frames of these types carry no id: it would overwrite the place a reader has reached.
_TYPES_WITHOUT_ID = frozenset({EventType.CONNECT, EventType.DISCONNECT, EventType.HEARTBEAT})

# Types that were checked before, as `_check_type` returns them. They come from outside: what is
# kept is bounded in number and length.
_known_types: dict[str, str] = dict(_ENUM_TYPES)
_MOST_KNOWN_TYPES = 4096
_LONGEST_KNOWN_TYPE = 256

# The two fields between the id and the data, for known types of frames with an id.
_type_lines: dict[str, str] = {}


def _check_type(name: Any, metadata: Mapping[str, Any] | None = None) -> str:
    """The type itself: an `EventType` where it is one, else a plain str, of whatever enum it was.

    Raises:
        EventError: not a string, empty, a forbidden character, or a name that is reserved and
            not, as the metadata tells, that of a control event.
    """
    try:
        return _known_types[name]
    except (KeyError, TypeError):  # or not even hashable
        pass
    if not isinstance(name, str) or not name:
        raise EventError(
            f"an event's type is a string with at least one character, not {shown(name)}"
        )
    try:
        sse.check_field("event", name)
    except FrameError as error:
        raise EventError(f"an event's type cannot be written: {error}") from error
    plain = str.__str__(name)
    if plain.startswith(_RESERVED_PREFIX):
        if metadata is None or metadata.get("control") is not True:
            raise EventError(
                f"types that start with {_RESERVED_PREFIX!r} are reserved: {shown(plain)}"
            )
    elif len(plain) <= _LONGEST_KNOWN_TYPE and len(_known_types) < _MOST_KNOWN_TYPES:
        _known_types[plain] = plain
    return plain


def _check_id(value: object) -> str:
    """The id itself, if an event can have it.

    Raises:
        EventError: not a string, empty, or a character that would be lost or forge a field.
    """
    if not isinstance(value, str) or not value:
        raise EventError(
            f"an event's id is a string with at least one character, not {shown(value)}"
        )
    try:
        sse.check_field("id", value)
    except FrameError as error:
        raise EventError(f"an event's id cannot be written: {error}") from error
    return value


def _check_timestamp(value: object) -> datetime:
    if not isinstance(value, datetime):
        raise EventError(f"an event's timestamp is a datetime, not {shown(value)}")
    if value.tzinfo is UTC:
        return value
    if value.utcoffset() is None:
        return value.replace(tzinfo=UTC)
    try:
        return value.astimezone(UTC)
    except OverflowError as error:
        raise EventError(
            f"an event's timestamp is a time in UTC too, not {shown(value)}"
        ) from error


@dataclass(init=False, eq=False, repr=False)
class Event:
    """One event.

    Attributes:
        id: name of this event, the same wherever it goes; a time-ordered UUIDv7 by default. Not
            empty, no CR, LF or NUL, no space or tab at either end.
        type: an `EventType`, or the application's own name for what happened: not empty, no CR,
            LF or NUL; names that start with ``stream.`` are reserved for control events.
        data: any JSON value, or what `codec.json` can write as one.
        metadata: about the event. ``topic`` routes it; ``content_type`` other than JSON sends
            text as it is; ``retry`` is the reconnection time of its frame in milliseconds.
        timestamp: when it happened: timezone-aware, UTC. A naive datetime is taken as UTC.

    Raises:
        EventError: an id, type, metadata or timestamp that an event cannot have.

    Two events are equal when all five are; an event's hash is its id's.
    """

    # An id and a timestamp that nobody gave are two integers until somebody asks for them, which
    # for most events nobody does: formatting them takes three times as long as all the rest.
    # They are properties; a __getattr__ that fills empty slots would slow down every attribute.
    __slots__ = ("_frame", "_id", "_nanoseconds", "_timestamp", "data", "metadata", "type")

    id: str
    type: str
    data: Any
    metadata: dict[str, Any]
    timestamp: datetime
    if TYPE_CHECKING:
        _frame: str  # as SSE text, for streams that have written it already
        _id: str | int  # or a number from the sequence
        _nanoseconds: int
        _timestamp: datetime | None

    def __init__(
        self,
        id: str | None = None,  # noqa: A002
        type: str = _MESSAGE,  # noqa: A002
        data: Any = None,
        metadata: dict[str, Any] | None = None,
        timestamp: datetime | None = None,
    ) -> None:
        if id is None:
            self._id = _next_in_sequence()
            self._nanoseconds = _time_ns()
        else:
            self._id = _check_id(id)
            if timestamp is None:
                self._nanoseconds = _time_ns()
        self._timestamp = None if timestamp is None else _check_timestamp(timestamp)
        self.type = type if type is _MESSAGE else _check_type(type, metadata)
        self.data = data
        if metadata is None:
            self.metadata = {}
        elif isinstance(metadata, dict):
            self.metadata = metadata
        else:
            raise EventError(f"an event's metadata is a dict, not {shown(metadata)}")

    def __repr__(self) -> str:
        return (
            f"Event(id={self.id!r}, type={str(self.type)!r}, data={self.data!r}, "
            f"metadata={self.metadata!r}, timestamp={self.timestamp.isoformat()!r})"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Event):
            return NotImplemented
        return (
            self.id == other.id
            and self.type == other.type
            and self.data == other.data
            and self.metadata == other.metadata
            and self.timestamp == other.timestamp
        )

    def __hash__(self) -> int:
        return hash(self.id)

    def __reduce__(self) -> tuple[Callable[..., "Event"], tuple[Any, ...]]:
        return _restore, (self.id, str(self.type), self.data, self.metadata, self.timestamp)

    def with_topic(self, topic: str) -> "Event":
        """This event under a topic: itself if it has that topic, otherwise a copy that has.

        The copy shares the data and has metadata of its own.
        """
        metadata = self.metadata
        if metadata.get("topic") == topic:
            return self
        copy = _new_event(Event)
        copy._id = self.id  # once made, so that both have the same
        copy._timestamp = self.timestamp
        copy.type = self.type
        copy.data = self.data
        copy.metadata = {**metadata, "topic": topic}
        return copy

    def to_dict(self) -> dict[str, Any]:
        """The event as a dictionary of id, type, data, metadata, timestamp (ISO 8601).

        The metadata is a copy; the data is not.
        """
        return {
            "id": self.id,
            "type": str(self.type),
            "data": self.data,
            "metadata": self.metadata.copy(),
            "timestamp": self.timestamp.isoformat(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Event":
        """The event of a dictionary such as `to_dict` returns; what is missing gets its default.

        The metadata is copied; the data is not. A timestamp may be a datetime or ISO 8601 text.

        Raises:
            EventError: `data` is not a mapping, or a field is not what an event can have.
        """
        try:
            # The dictionary of an event, whole and as it should be, costs no call but these.
            id_ = data["id"]
            metadata = data["metadata"]
            event = _new_event(Event)
            event.type = _known_types[data["type"]]
            event.data = data["data"]
            timestamp = datetime.fromisoformat(data["timestamp"])
        except (LookupError, TypeError, ValueError):
            return _read_event(data)
        if (
            timestamp.tzinfo is UTC
            and type(metadata) is dict
            and type(id_) is str
            and id_.isprintable()
            and id_.strip() is id_ != ""
        ):
            event._id = id_
            event._timestamp = timestamp
            event.metadata = metadata.copy()
            return event
        return _read_event(data)

    def to_json(self) -> str:
        """The whole event as compact JSON of one line: `to_dict`, encoded.

        Raises:
            EncodeError: data or metadata have no JSON form; names the event and the path.
        """
        try:
            return json.encode(self.to_dict())
        except EncodeError as error:
            raise EncodeError(error.reason, error.path, self.id) from error

    @classmethod
    def from_json(cls, text: str | bytes) -> "Event":
        """The event of a JSON text such as `to_json` returns.

        Raises:
            DecodeError: not JSON, or not an object.
            EventError: a field is not what an event can have.
        """
        value = json.decode(text)
        if not isinstance(value, dict):
            raise DecodeError(f"an event is a JSON object, not {type(value).__name__}")
        return cls.from_dict(value)

    def to_sse(self) -> str:
        """The event as one frame of Server-Sent Events (WHATWG HTML, section 9.2).

        It has the id, the type, the data as JSON of one line, and ends with a blank line. Frames
        of type CONNECT, DISCONNECT and HEARTBEAT and of control events have no ``id`` line.
        Metadata ``content_type`` other than JSON writes a str as it is, one ``data`` line for
        each of its lines; metadata ``retry`` adds a ``retry`` line.

        Raises:
            EncodeError: the data has no JSON form; names the event and the path.
            EventError: id, type or retry were replaced by what a frame cannot carry.
        """
        metadata = self.metadata
        if metadata and (
            "content_type" in metadata or "retry" in metadata or "control" in metadata
        ):
            return self._special_frame()
        id_ = self._id
        if type(id_) is not str:
            id_ = self.id
        try:
            text = _encode_json(self.data)
        except EncodeError as error:
            raise EncodeError(error.reason, error.path, self.id) from error
        line = _type_lines.get(self.type)
        if line is None:
            return self._frame_of(text, None)
        return f"id: {id_}\n{line}{text}\n\n"

    def _special_frame(self) -> str:
        metadata = self.metadata
        try:
            text = self._text(metadata.get("content_type"))
        except EncodeError as error:
            raise EncodeError(error.reason, error.path, self.id) from error
        return self._frame_of(text, metadata.get("retry"))

    def _text(self, content_type: object) -> str:
        """The data as its content type says: JSON, or the text that it is."""
        data = self.data
        if is_json(content_type):
            return json.encode(data)
        if not isinstance(data, str):
            raise EncodeError(f"data of type {content_type} is a str, not {type(data).__name__}")
        try:
            data.encode()
        except UnicodeEncodeError:
            raise EncodeError(f"not valid Unicode: {shown(data)}") from None
        return data

    def _frame_of(self, text: str, retry: Any) -> str:
        type_ = str(self.type)
        has_id = type_ not in _TYPES_WITHOUT_ID and not self.is_control
        try:
            frame = sse.encode(text, event=type_, id=self.id if has_id else None, retry=retry)
        except FrameError as error:
            raise EventError(f"event {self.id!r} cannot be a frame: {error}") from error
        if has_id and type_ in _known_types:
            _type_lines[type_] = f"event: {type_}\ndata: "
        return frame

    @classmethod
    def from_sse(cls, text: str, *, content_type: str | None = None) -> "Event":
        """The event of one frame such as `to_sse` returns.

        A frame has no metadata and no timestamp: the event gets what it had on the wire, and the
        time at which it was read.

        Args:
            text: one frame, its blank line at the end included.
            content_type: what the data is; None: JSON, and what is not JSON is text, with
                ``content_type`` ``text/plain`` in the metadata.

        Raises:
            DecodeError: not exactly one frame, or data that is not JSON although it was said to be.
            EventError: an id or type that an event cannot have.
        """
        try:
            encoded = text.encode()
        except UnicodeEncodeError as error:
            raise DecodeError(f"not a frame: not valid Unicode: {error}") from error
        # It is all here already, so there is nothing to limit.
        frames = sse.Decoder(max_event=len(encoded) + 1).feed(encoded)
        if len(frames) != 1:
            raise DecodeError(f"one frame was expected, found {len(frames)}")
        frame = frames[0]
        metadata: dict[str, Any] = {}
        if frame.retry is not None:
            metadata["retry"] = frame.retry
        if frame.event.startswith(_RESERVED_PREFIX):
            metadata["control"] = True
        data: Any = frame.data
        if is_json(content_type):
            try:
                data = json.decode(frame.data)
            except DecodeError:
                if content_type:
                    raise
                metadata["content_type"] = "text/plain"
        else:
            metadata["content_type"] = content_type
        return cls.from_dict(
            {"id": frame.id or None, "type": frame.event, "data": data, "metadata": metadata}
        )

    @property
    def is_control(self) -> bool:
        """Whether a stream made this event to tell its reader something (metadata ``control``)."""
        return self.metadata.get("control") is True


def _get_id(event: Event) -> str:
    id_ = event._id
    if isinstance(id_, int):
        event._id = id_ = format_uuid7(event._nanoseconds, id_)
    return id_


def _set_id(event: Event, value: str) -> None:
    event._id = _check_id(value)


def _get_timestamp(event: Event) -> datetime:
    timestamp = event._timestamp
    if timestamp is None:
        microseconds = event._nanoseconds // 1000
        event._timestamp = timestamp = _EPOCH + timedelta(microseconds=microseconds)
    return timestamp


def _set_timestamp(event: Event, value: datetime) -> None:
    event._timestamp = _check_timestamp(value)


# Set here, since a property in the body of a dataclass would be taken for a field's default.
Event.id = property(_get_id, _set_id)  # type: ignore[assignment]
Event.timestamp = property(_get_timestamp, _set_timestamp)  # type: ignore[assignment]

_new_event: Callable[[type[Event]], Event] = Event.__new__


def is_json(content_type: object) -> bool:
    """Whether a content type says JSON (WHATWG MIME Sniffing, section 4.6), as none at all does."""
    if not content_type:
        return True
    kind = str(content_type).partition(";")[0].strip().lower()
    return kind in ("application/json", "text/json") or kind.endswith("+json")


def _restore(id: str, type: str, data: Any, metadata: dict[str, Any], timestamp: datetime) -> Event:  # noqa: A002
    """The event that was pickled or copied."""
    return Event.from_dict(
        {"id": id, "type": type, "data": data, "metadata": metadata, "timestamp": timestamp}
    )


def _read_event(data: object) -> Event:
    """The event of a mapping, with all that may be missing, other than usual, or wrong.

    Raises:
        EventError: it is wrong.
    """
    if not isinstance(data, Mapping):
        raise EventError(f"an event is read from a mapping, not from {shown(data)}")
    id_, timestamp, metadata = data.get("id"), data.get("timestamp"), data.get("metadata")
    if metadata is not None and not isinstance(metadata, Mapping):
        raise EventError(f"an event's metadata is a mapping, not {shown(metadata)}")
    type_ = data.get("type")
    return Event(
        id_,
        _MESSAGE if type_ is None else type_,
        data.get("data"),
        {} if metadata is None else dict(metadata),
        None if timestamp is None else _read_timestamp(timestamp),
    )


def _read_timestamp(value: object) -> datetime:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError as error:
            raise EventError(f"an event's timestamp is ISO 8601, not {shown(value)}") from error
    return _check_timestamp(value)


def control_event(name: str, **data: Any) -> Event:
    """An event by which a stream tells its reader something: ``stream.lost``, ``stream.gap``…

    It has metadata ``{"control": True}`` and never counts against a queue's bound.
    """
    return Event(None, name, data, {"control": True})


_MISSING: Any = object()


def check_event(value: object) -> None:
    """Refuse what is published without being an event.

    Raises:
        TypeError: it is none; how to make one.
    """
    if not isinstance(value, Event):
        raise TypeError(
            f"streams take an Event, not {type(value).__name__}: create_event(data) makes one"
        )


def create_event(
    data: Any = _MISSING, event_type: str = EventType.MESSAGE, /, **metadata: Any
) -> Event:
    """A new event with this data and type; every further keyword becomes metadata.

    `data` and `event_type` may be given by name too. Metadata may even be called ``data``, where
    the argument itself is given by position.

    Raises:
        EventError: a type that an event cannot have.
        TypeError: no data.
    """
    if data is _MISSING:
        try:
            data = metadata.pop("data")
        except KeyError:
            raise TypeError("create_event() needs data") from None
        event_type = metadata.pop("event_type", event_type)
    elif event_type is EventType.MESSAGE:
        event_type = metadata.pop("event_type", event_type)
    return Event(None, event_type, data, metadata)


Handler: TypeAlias = Callable[[Event], Any]
"""What receives events: a function or an async function of one event."""

Filter: TypeAlias = Callable[[Event], bool]
"""What chooses events: a function of one event that returns whether it is wanted."""


def _deliver_nowhere(event: Event) -> None:
    """What a subscription without a handler does with an event."""


def _filtered(filter_fn: Filter, receive: Handler) -> Handler:
    def receive_if_wanted(event: Event) -> Any:
        return receive(event) if filter_fn(event) else None

    return receive_if_wanted


_DECIDE_DELIVERY = frozenset({"handler", "filter_fn", "active"})


class _Delivery:
    """What the stream that made a subscription keeps of it: where, how, and until when.

    In slots, like all of a subscription: an event on its way to one of ten thousand finds
    everything in one place in memory.
    """

    __slots__ = ("_deliver", "_home", "_loop", "_receive", "_release", "_runner")

    _home: Any
    _runner: Any
    _loop: asyncio.AbstractEventLoop | None
    _receive: Handler | None
    _release: Callable[[str], object] | None
    _deliver: Handler


@dataclass(eq=False, slots=True, weakref_slot=True)
class Subscription(_Delivery):
    """Topics, an optional filter, and what receives the events.

    Attributes:
        id: name of this subscription at its stream.
        topic: a topic, a pattern, or several of them; ``*`` is every event.
        handler: is called with each event, if there is one.
        filter_fn: an event is received only if this returns true for it.
        active: an inactive subscription receives nothing.
        created_at: when it was made, UTC.

    Raises:
        TypeError: the handler or the filter cannot be called.

    As an async context manager it is cancelled at the end of the block.
    """

    id: str = field(default_factory=uuid7)
    topic: TopicFilter = "*"
    handler: Handler | None = field(default=None, repr=False)
    filter_fn: Filter | None = field(default=None, repr=False)
    active: bool = True
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __post_init__(self) -> None:
        # Found here, where it was given, and not in the log when the first event comes.
        for function, what in ((self.handler, "handler"), (self.filter_fn, "filter_fn")):
            if function is not None and not callable(function):
                raise TypeError(f"{what} is a function of one event, not {shown(function)}")
        self._home = None
        self._runner = None
        self._loop = None
        self._receive = None
        self._release = None
        self._deliver = _deliver_nowhere
        self._compose()

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name in _DECIDE_DELIVERY and hasattr(self, "_deliver"):
            self._compose()

    def _deliver_by(self, receive: Handler) -> None:
        """Have the stream call this, in place of the handler, with what is to be received."""
        self._receive = receive
        self._compose()

    def _compose(self) -> None:
        """Make of handler, filter and activity the one function that delivery calls.

        Streams call it for each event, and the attributes change hardly ever.
        """
        receive = self._receive or self.handler
        if receive is None or not self.active:
            receive = _deliver_nowhere
        elif self.filter_fn is not None:
            receive = _filtered(self.filter_fn, receive)
        self._deliver = receive

    def should_receive(self, event: Event) -> bool:
        """Whether an event is for this subscription: it is active, topic and filter say yes.

        Raises:
            Exception: whatever `filter_fn` raises; streams catch and log that.
        """
        if not self.active:
            return False
        if self.topic != "*" and not topics.matches(self.topic, event.metadata.get("topic")):
            return False
        return self.filter_fn is None or bool(self.filter_fn(event))

    def cancel(self) -> None:
        """Stop receiving, and be forgotten by the stream. From any thread; again does nothing."""
        self.active = False
        release, self._release = self._release, None
        if release is not None:
            release(self.id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()
