"""The event itself: making one, framing it for Server-Sent Events, reading it from a dictionary."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from itertools import cycle, islice, repeat
from typing import Any
from uuid import uuid4

from sse_starlette.event import ServerSentEvent

from benchmarks.harness import Contender, Line, Run, at_least
from codomyrmex.events.streaming import Event

try:
    import msgspec
    import orjson
except ImportError:  # the line that hides them
    msgspec = orjson = None

JSON_ACCELERATORS = ("msgspec", "orjson")

DATA = {"order": 1042, "total": 19.99, "paid": True}


def new_id() -> str:
    return str(uuid4())


def now() -> datetime:
    return datetime.now(UTC)


class PlainType(Enum):
    MESSAGE = "message"
    ERROR = "error"


PLAIN_TYPES = {plain_type.value: plain_type for plain_type in PlainType}


@dataclass(slots=True)
class PlainEvent:
    """What one would write by hand; floors and peers of every family move it about."""

    data: Any = None
    type: Any = PlainType.MESSAGE
    metadata: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=new_id)
    timestamp: datetime = field(default_factory=now)


if msgspec:

    class StructEvent(msgspec.Struct):
        data: Any = None
        type: Any = PlainType.MESSAGE
        metadata: dict[str, Any] = msgspec.field(default_factory=dict)
        id: str = msgspec.field(default_factory=new_id)
        timestamp: datetime = msgspec.field(default_factory=now)


def make_with(event_class: type) -> Contender:
    def make_events(run: Run) -> None:
        event = None
        with run.timed():
            for _ in repeat(None, run.units):
                event = event_class(data=DATA)
        require_complete(event)
        run.delivered = run.units

    return make_events


def make_and_read_with(event_class: type) -> Contender:
    def make_and_read_events(run: Run) -> None:
        event = None
        with run.timed():
            for _ in repeat(None, run.units):
                event = event_class(data=DATA)
                event.id  # noqa: B018 - the read is the work
                event.timestamp  # noqa: B018
        require_complete(event)
        run.delivered = run.units

    return make_and_read_events


def require_complete(event: Any) -> None:
    if event.data != DATA or len(event.id) != len(new_id()) or event.timestamp.tzinfo is None:
        raise ValueError(f"not a whole event: {event!r}")


def frame_with(event_class: type, frame: Callable[[Any], str | bytes]) -> Contender:
    def frame_events(run: Run) -> None:
        moment = now()
        events = [
            event_class(
                id=f"order-{number}",
                type="order.paid",
                data=DATA | {"order": number},
                timestamp=moment,
            )
            for number in range(run.units)
        ]
        with run.timed():
            frames = list(map(frame, events))
        require_payload(frames[-1], events[-1])
        run.delivered = len(set(frames))

    return frame_events


def require_payload(frame: str | bytes, event: Any) -> None:
    text = frame.decode() if isinstance(frame, bytes) else frame
    fields = dict(line.split(": ", 1) for line in text.splitlines() if line)
    if fields["id"] != event.id or json.loads(fields["data"]) != event.data:
        raise ValueError(f"not a frame of the event: {frame!r}")


def f_string_and_json(event: PlainEvent) -> str:
    return f"id: {event.id}\nevent: {event.type}\ndata: {json.dumps(event.data)}\n\n"


def f_string_and_msgspec(event: PlainEvent) -> str:
    return f"id: {event.id}\nevent: {event.type}\ndata: {msgspec_encode(event.data).decode()}\n\n"


def f_string_and_orjson(event: PlainEvent) -> str:
    return f"id: {event.id}\nevent: {event.type}\ndata: {orjson.dumps(event.data).decode()}\n\n"


def sse_starlette_and_json(event: PlainEvent) -> bytes:
    return ServerSentEvent(json.dumps(event.data), event=event.type, id=event.id).encode()


if msgspec:
    msgspec_encode = msgspec.json.Encoder().encode


def read_with(from_dict: Callable[[dict[str, Any]], Any]) -> Contender:
    def read_events(run: Run) -> None:
        mappings = [
            {
                "id": f"order-{number}",
                "type": "message",
                "data": DATA,
                "metadata": {"topic": "orders"},
                "timestamp": now().isoformat(),
            }
            for number in range(1000)
        ]
        event = None
        with run.timed():
            for mapping in islice(cycle(mappings), run.units):
                event = from_dict(mapping)
        if event.metadata != {"topic": "orders"} or event.timestamp.tzinfo is None:
            raise ValueError(f"not a whole event: {event!r}")
        run.delivered = run.units

    return read_events


def by_hand(mapping: dict[str, Any]) -> PlainEvent:
    return PlainEvent(
        mapping["data"],
        PLAIN_TYPES.get(mapping["type"], mapping["type"]),
        dict(mapping["metadata"]),
        mapping["id"],
        datetime.fromisoformat(mapping["timestamp"]),
    )


LINES = [
    Line(
        name="make",
        work="make an event",
        floor=("dataclass with slots, uuid4, now", make_with(PlainEvent)),
        peers={"msgspec Struct": make_with(StructEvent)} if msgspec else {},
        ours=make_with(Event),
        reach=(at_least(2.5, "floor"),),
    ),
    Line(
        name="make-read",
        work="make an event, read its id and time",
        floor=("dataclass with slots, uuid4, now", make_and_read_with(PlainEvent)),
        peers={"msgspec Struct": make_and_read_with(StructEvent)} if msgspec else {},
        ours=make_and_read_with(Event),
    ),
    Line(
        name="sse",
        work="`to_sse`, no extras",
        floor=("f-string and json.dumps", frame_with(PlainEvent, f_string_and_json)),
        peers={"sse-starlette": frame_with(PlainEvent, sse_starlette_and_json)},
        ours=frame_with(Event, Event.to_sse),
        reach=(at_least(1.0, "floor"),),
        units=40_000,
        without=JSON_ACCELERATORS,
    ),
    Line(
        name="sse-fast",
        work="`to_sse`, `fast` extra",
        floor=("f-string and json.dumps", frame_with(PlainEvent, f_string_and_json)),
        peers={
            "sse-starlette": frame_with(PlainEvent, sse_starlette_and_json),
            "f-string and msgspec": frame_with(PlainEvent, f_string_and_msgspec),
            "f-string and orjson": frame_with(PlainEvent, f_string_and_orjson),
        },
        ours=frame_with(Event, Event.to_sse),
        reach=(at_least(4.0, "floor"),),
        units=40_000,
    ),
    Line(
        name="from-dict",
        work="`Event.from_dict`",
        floor=("by hand into slots", read_with(by_hand)),
        ours=read_with(Event.from_dict),
        reach=(at_least(0.75, "floor"),),
    ),
]
