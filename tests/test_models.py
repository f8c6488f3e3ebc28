"""Events, their forms as text, and subscriptions: what a user sees of them."""

import asyncio
import copy
import dataclasses
import datetime as dt
import enum
import gc
import importlib.util
import json
import math
import os
import pickle
import re
import subprocess
import sys
import textwrap
import time
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from types import MappingProxyType, ModuleType
from typing import Any

import httpx
import httpx_sse
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codomyrmex.events.streaming import (
    DecodeError,
    EncodeError,
    Event,
    EventError,
    EventType,
    InMemoryStream,
    StreamingError,
    Subscription,
    TopicError,
    create_event,
    models,
)
from codomyrmex.events.streaming.models import control_event

NOW = datetime(2024, 1, 2, 3, 4, 5, 678901, UTC)
UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


class Kind(enum.StrEnum):
    CREATED = "order.created"
    SHIPPED = "order.shipped"  # nowhere else
    ERROR = "error"


class OldKind(str, enum.Enum):  # noqa: UP042 - as many applications have them
    PACKED = "order.packed"  # nowhere else


@dataclasses.dataclass
class Point:
    x: Any
    y: Any = 0


def by_the_standard(text: str) -> list[tuple[str, str, str]]:
    """What an independent reader of Server-Sent Events makes of a text: event, id, data."""
    response = httpx.Response(
        200, headers={"content-type": "text/event-stream"}, content=text.encode()
    )
    frames = httpx_sse.EventSource(response).iter_sse()
    return [(frame.event, frame.id, frame.data) for frame in frames]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELD = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), min_size=1, max_size=20)
ID = FIELD.filter(lambda text: text.strip(" \t") == text)
TYPE = st.sampled_from(list(EventType)) | FIELD.filter(lambda text: not text.startswith("stream."))
METADATA = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=5).filter(
        lambda key: key not in ("control", "retry", "content_type")
    ),
    JSON,
    max_size=3,
)
# Years that have a UTC, whatever the offset.
ZONES: Any = st.none() | st.timezones() | st.just(UTC)
TIMESTAMP = st.datetimes(
    datetime(2, 1, 1),
    datetime(9998, 1, 1),
    timezones=ZONES,
)
EVENTS = st.builds(Event, ID | st.none(), TYPE, JSON, METADATA | st.none(), TIMESTAMP | st.none())

EACH_VALUE = pytest.mark.parametrize(
    "value",
    [None, True, False, 0, 0.0, "", [], {}, 1, -1.5, "text", "a\nb\r\nc\rd", "\u2028", [None, [0]]],
    ids=repr,
)
EACH_TYPE = pytest.mark.parametrize("name", [*EventType, "order.created", "é", "a: b", " x", "{}"])


class TestEventType:
    def test_the_five_types_have_the_values_that_callers_know(self) -> None:
        assert {member.name: member.value for member in EventType} == {
            "MESSAGE": "message",
            "ERROR": "error",
            "CONNECT": "connect",
            "DISCONNECT": "disconnect",
            "HEARTBEAT": "heartbeat",
        }
        assert all(isinstance(member, str) for member in EventType)


class TestEvent:
    def test_it_needs_nothing(self) -> None:
        before = datetime.now(UTC)
        event = Event()
        after = datetime.now(UTC)
        assert UUID7.fullmatch(event.id)
        assert event.type is EventType.MESSAGE
        assert event.data is None
        assert event.metadata == {}
        assert before - timedelta(microseconds=1) <= event.timestamp <= after
        assert event.timestamp.tzinfo is UTC

    def test_its_fields_are_in_the_order_that_callers_know(self) -> None:
        event = Event("1", "order.created", [2], {"topic": "a"}, NOW)
        assert [field.name for field in dataclasses.fields(event)] == [
            "id",
            "type",
            "data",
            "metadata",
            "timestamp",
        ]
        assert (event.id, event.type, event.data) == ("1", "order.created", [2])
        assert (event.metadata, event.timestamp) == ({"topic": "a"}, NOW)
        match event:
            case Event("1", kind, [number]):
                assert (kind, number) == ("order.created", 2)
            case _:
                raise AssertionError

    def test_id_and_timestamp_are_made_once(self) -> None:
        event = Event()
        assert event.id is event.id
        assert event.timestamp is event.timestamp
        for other in (Event(id="x"), Event(timestamp=NOW)):
            assert other.id is other.id
            assert other.timestamp is other.timestamp

    def test_the_timestamp_is_that_of_creation_and_agrees_with_the_id(self) -> None:
        event = Event()
        time.sleep(0.002)
        milliseconds = uuid.UUID(event.id).int >> 80
        assert math.floor(event.timestamp.timestamp() * 1000) == milliseconds
        before = time.time()
        named = Event(id="x")
        after = time.time()
        time.sleep(0.002)
        assert before - 1e-6 <= named.timestamp.timestamp() <= after

    def test_an_id_that_was_not_given_is_of_now_whatever_the_timestamp(self) -> None:
        event = Event(timestamp=NOW)
        assert uuid.UUID(event.id).int >> 80 >= time.time_ns() // 1_000_000 - 1000
        assert event.timestamp == NOW

    def test_it_may_have_a_type_of_the_applications_own(self) -> None:
        assert Event(type="order.created").type == "order.created"
        assert Event(type="error").type is EventType.ERROR
        assert Event(type="x" * 1000).type == "x" * 1000

    @pytest.mark.parametrize("kind", [Kind.SHIPPED, OldKind.PACKED])
    def test_a_type_of_any_enum_is_its_value(self, kind: str) -> None:
        value = f"order.{kind.name.lower()}"  # type: ignore[attr-defined]
        # The enum's member comes first: it must not become what that type is from then on.
        for event in (Event(type=kind), Event(type=value), Event.from_dict({"type": kind})):
            assert type(event.type) is str
            assert event.type == value
            assert type(event.to_dict()["type"]) is str
            assert f"event: {value}\n" in event.to_sse()
            assert repr(event.type) == repr(value)
        assert Event(type=Kind.ERROR).type is EventType.ERROR

    def test_an_event_that_many_share_is_small(self) -> None:
        assert not hasattr(Event(), "__dict__")

    @pytest.mark.parametrize(
        "value", ["", "1\nevent: pwn", "a\r", "\0", "a\0b", " a", "a ", "\ta", "\ud800", 5, b"a"]
    )
    def test_an_id_that_would_forge_or_be_altered_is_refused(self, value: Any) -> None:
        with pytest.raises(EventError, match="event's id"):
            Event(id=value)
        with pytest.raises(EventError, match="event's id"):
            Event.from_dict({"id": value})
        with pytest.raises(EventError, match="event's id"):
            Event.from_dict(Event().to_dict() | {"id": value})
        event = Event()
        with pytest.raises(EventError, match="event's id"):
            event.__setattr__("id", value)
        assert UUID7.fullmatch(event.id)

    @pytest.mark.parametrize(
        "value",
        ["", "a\nid: 1", "a\r", "\0", "\ud800", 5, None, ["message"], {}, b"message"],
        ids=repr,
    )
    def test_a_type_that_would_forge_is_refused(self, value: Any) -> None:
        with pytest.raises(EventError, match="event's type"):
            Event(type=value)
        with pytest.raises(EventError, match="event's type"):
            create_event(1, value)
        if value is not None:  # which stands for the default
            with pytest.raises(EventError, match="event's type"):
                Event.from_dict({"type": value})
            with pytest.raises(EventError, match="event's type"):
                Event.from_dict(Event().to_dict() | {"type": value})

    @pytest.mark.parametrize("value", ["a\nid: 1", "a\r", "\0", "\ud800"])
    def test_a_type_that_is_replaced_by_one_that_forges_is_refused_in_the_frame(
        self, value: str
    ) -> None:
        for metadata in ({}, {"retry": 1}):
            event = Event(id="7", metadata=metadata)
            event.type = value
            with pytest.raises(EventError, match="event '7' cannot be a frame"):
                event.to_sse()

    @pytest.mark.parametrize("name", ["stream.", "stream.lost", "stream.mine"])
    def test_the_types_of_control_events_are_reserved(self, name: str) -> None:
        for metadata in (None, {}, {"control": False}, {"control": 1}):
            with pytest.raises(EventError, match="reserved"):
                Event(type=name, metadata=metadata)
            with pytest.raises(EventError, match="reserved"):
                Event.from_dict({"type": name, "metadata": metadata})
        assert Event(type="stream").type == "stream"
        assert Event(type="streams.a").type == "streams.a"
        assert Event(type=name, metadata={"control": True}).is_control
        with pytest.raises(EventError, match="reserved"):  # also after it has been seen once
            Event(type=name)

    @pytest.mark.parametrize("value", [[], "metadata", 5, [("a", 1)], MappingProxyType({})])
    def test_metadata_is_a_dict(self, value: Any) -> None:
        with pytest.raises(EventError, match="metadata is a dict"):
            Event(metadata=value)

    def test_metadata_is_ones_own(self) -> None:
        first, second = Event(), Event()
        first.metadata["a"] = 1
        assert second.metadata == {}

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            (datetime(2024, 1, 2), datetime(2024, 1, 2, tzinfo=UTC)),
            (NOW, NOW),
            (datetime(2024, 1, 2, 2, tzinfo=timezone(timedelta(hours=2))), None),
            (datetime(2024, 1, 2, tzinfo=timezone.utc), None),  # noqa: UP017
        ],
    )
    def test_a_timestamp_is_in_utc(self, given: datetime, expected: datetime | None) -> None:
        for event in (Event(timestamp=given), Event.from_dict({"timestamp": given})):
            assert event.timestamp.tzinfo is UTC
            assert event.timestamp == (expected or datetime(2024, 1, 2, tzinfo=UTC))
        event = Event()
        event.__setattr__("timestamp", given)
        assert event.timestamp.tzinfo is UTC

    @pytest.fixture
    def in_tokyo(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Local time is not UTC."""
        monkeypatch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
        monkeypatch.undo()
        time.tzset()

    @pytest.mark.skipif(not hasattr(time, "tzset"), reason="local time cannot be set here")
    @pytest.mark.usefixtures("in_tokyo")
    def test_local_time_plays_no_part(self) -> None:
        assert Event(timestamp=datetime(2024, 1, 2)).timestamp.hour == 0
        assert abs(Event().timestamp - datetime.now(UTC)) < timedelta(seconds=10)

    @pytest.mark.skipif(not hasattr(time, "tzset"), reason="local time cannot be set here")
    @pytest.mark.usefixtures("in_tokyo")
    def test_a_timezone_without_an_offset_is_no_timezone(self) -> None:
        class Nowhere(dt.tzinfo):
            def utcoffset(self, when: datetime | None) -> None:
                return None

            def dst(self, when: datetime | None) -> None:
                return None

            def tzname(self, when: datetime | None) -> None:
                return None

        event = Event(timestamp=datetime(2024, 1, 2, tzinfo=Nowhere()))
        assert event.timestamp.isoformat() == "2024-01-02T00:00:00+00:00"

    @pytest.mark.parametrize(
        "value",
        [
            "2024-01-02",  # text is for from_dict
            date(2024, 1, 2),
            1700000000,
            datetime.min.replace(tzinfo=timezone(timedelta(hours=1))),
            datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))),
        ],
    )
    def test_a_timestamp_that_is_not_a_time_is_refused(self, value: Any) -> None:
        with pytest.raises(EventError, match="event's timestamp"):
            Event(timestamp=value)
        event = Event()
        with pytest.raises(EventError, match="event's timestamp"):
            event.__setattr__("timestamp", value)

    def test_events_are_equal_when_all_five_are(self) -> None:
        fields: dict[str, Any] = {
            "id": "1",
            "type": "a",
            "data": {"x": [1]},
            "metadata": {"topic": "t"},
            "timestamp": NOW,
        }
        event = Event(**fields)
        assert event == Event(**fields)
        assert not event != Event(**fields)  # noqa: SIM202
        others: dict[str, Any] = {
            "id": "2",
            "type": "b",
            "data": {"x": [2]},
            "metadata": {},
            "timestamp": NOW + timedelta(microseconds=1),
        }
        for name, other in others.items():
            assert event != Event(**fields | {name: other})
        assert event != "1"
        assert event.__eq__("1") is NotImplemented

    def test_it_can_be_in_a_set(self) -> None:
        event = Event(data={"not": ["hashable"]})
        assert len({event, copy.copy(event), Event()}) == 2
        assert hash(event) == hash(copy.deepcopy(event))

    def test_timestamps_of_all_events_compare(self) -> None:
        assert (
            Event().timestamp
            > Event.from_dict({"timestamp": "2024-01-02T00:00:00+00:00"}).timestamp
        )
        assert Event().timestamp > Event.from_dict({"timestamp": "2024-01-02"}).timestamp

    def test_its_repr_says_all(self) -> None:
        event = Event("1", EventType.ERROR, [1], {"topic": "a"}, NOW)
        assert repr(event) == (
            "Event(id='1', type='error', data=[1], metadata={'topic': 'a'}, "
            "timestamp='2024-01-02T03:04:05.678901+00:00')"
        )
        assert repr(Event(type="mine"))[: len("Event(id='")] == "Event(id='"

    @given(EVENTS)
    def test_pickles_and_copies_are_equal(self, event: Event) -> None:
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.loads(pickle.dumps(event, protocol)) == event
        assert copy.copy(event) == event
        assert copy.deepcopy(event) == event
        assert dataclasses.replace(event) == event

    def test_a_copy_has_metadata_of_its_own_and_a_deep_one_data_too(self) -> None:
        event = Event(data={"a": [1]}, metadata={"tags": ["x"]})
        shallow, deep = copy.copy(event), copy.deepcopy(event)
        assert shallow.data is event.data
        assert shallow.metadata is not event.metadata
        assert deep.data == event.data
        assert deep.data["a"] is not event.data["a"]
        assert deep.metadata["tags"] is not event.metadata["tags"]

    @pytest.mark.parametrize("make", [lambda: control_event("stream.lost", lost=3), Event])
    def test_dataclass_tools_work(self, make: Any) -> None:
        event: Event = make()
        assert dataclasses.is_dataclass(Event)
        changed = dataclasses.replace(event, data=[1])
        assert (changed.id, changed.type, changed.data) == (event.id, event.type, [1])
        assert (changed.metadata, changed.timestamp) == (event.metadata, event.timestamp)
        as_dict = dataclasses.asdict(event)
        assert as_dict == {
            "id": event.id,
            "type": event.type,
            "data": event.data,
            "metadata": event.metadata,
            "timestamp": event.timestamp,
        }
        assert as_dict["metadata"] is not event.metadata
        assert dataclasses.astuple(event)[0] == event.id
        assert pickle.loads(pickle.dumps(event)) == event

    def test_what_is_remembered_of_types_is_bounded(self) -> None:
        def meet(numbers: range, tail: str = "") -> None:
            for number in numbers:
                assert Event.from_dict({"type": f"t{number}{tail}"}).to_sse()

        meet(range(5000))
        before = sys.getallocatedblocks()
        meet(range(5000, 10_000))
        assert sys.getallocatedblocks() - before < 1000
        assert Event(type="after all of them").to_sse()

    def test_long_types_are_not_remembered(self) -> None:
        # In a process of its own, which remembers none yet.
        code = """
            import tracemalloc
            from codomyrmex.events.streaming import Event
            tracemalloc.start()
            for number in range(1000):
                assert Event.from_dict({"type": f"t{number}" + "x" * 10_000}).to_sse()
            assert tracemalloc.get_traced_memory()[0] < 1_000_000
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)

    def test_a_system_without_fork_has_events_too(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(os, "register_at_fork", raising=False)
            module = imported_anew()
        assert module.Event().id < module.Event().id

    def test_what_runs_in_a_forked_child_changes_its_numbers(self) -> None:
        in_the_child: list[Callable[[], None]] = []

        def register_at_fork(*, after_in_child: Callable[[], None]) -> None:
            in_the_child.append(after_in_child)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "register_at_fork", register_at_fork, raising=False)
            module = imported_anew()
        (renew,) = in_the_child

        def number() -> int:
            return uuid.UUID(module.Event().id).int & (1 << 54) - 1

        before = number()
        assert number() == before + 1
        renew()
        assert number() != before + 2


def imported_anew() -> ModuleType:
    spec = importlib.util.find_spec(models.__name__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestWithTopic:
    def test_it_is_the_event_itself_if_it_has_the_topic(self) -> None:
        event = Event(metadata={"topic": "a"})
        assert event.with_topic("a") is event

    def test_it_is_a_copy_with_the_topic_otherwise(self) -> None:
        event = Event(data=[1], metadata={"topic": "a", "x": 1}, type="mine")
        other = event.with_topic("b")
        assert event.metadata == {"topic": "a", "x": 1}
        assert other.metadata == {"topic": "b", "x": 1}
        assert (other.id, other.type, other.timestamp) == (event.id, "mine", event.timestamp)
        assert other.data is event.data
        assert Event().with_topic("c").metadata == {"topic": "c"}


class TestDict:
    def test_the_form_is_the_one_that_callers_know(self) -> None:
        assert Event("1", "mine", [1], {"topic": "a"}, NOW).to_dict() == {
            "id": "1",
            "type": "mine",
            "data": [1],
            "metadata": {"topic": "a"},
            "timestamp": "2024-01-02T03:04:05.678901+00:00",
        }
        assert type(Event().to_dict()["type"]) is str

    @given(EVENTS)
    def test_it_is_a_round_trip(self, event: Event) -> None:
        back = Event.from_dict(event.to_dict())
        assert back == event
        assert type(back.type) is type(event.type)
        assert back.timestamp.tzinfo is UTC

    @EACH_VALUE
    @EACH_TYPE
    def test_it_is_one_for_every_value_and_type(self, value: Any, name: str) -> None:
        event = Event(type=name, data=value)
        back = Event.from_dict(event.to_dict())
        assert back == event
        assert type(back.data) is type(value)

    def test_an_empty_dictionary_gives_a_valid_event(self) -> None:
        first, second = Event.from_dict({}), Event.from_dict({})
        assert UUID7.fullmatch(first.id)
        assert first.id != second.id
        assert (first.type, first.data, first.metadata) == (EventType.MESSAGE, None, {})
        assert first.timestamp.tzinfo is UTC
        assert Event.from_dict(first.to_dict()) == first

    @pytest.mark.parametrize("missing", ["id", "type", "data", "metadata", "timestamp"])
    def test_each_field_has_a_default(self, missing: str) -> None:
        fields = Event("1", "mine", [1], {"topic": "a"}, NOW).to_dict()
        del fields[missing]
        event = Event.from_dict(fields)
        found = event.to_dict()
        default = found.pop(missing)
        assert found == fields
        assert Event.from_dict(fields | {missing: None}).to_dict().keys() == found.keys() | {
            missing
        }
        match missing:
            case "id":
                assert UUID7.fullmatch(default)
            case "timestamp":
                assert datetime.now(UTC) - event.timestamp < timedelta(minutes=1)
            case _:
                assert default == {"type": "message", "data": None, "metadata": {}}[missing]

    def test_nothing_is_shared_but_the_data(self) -> None:
        for fields in (Event(metadata={"a": 1}).to_dict(), {"metadata": {"a": 1}}):
            event = Event.from_dict(fields)
            event.metadata["x"] = 2
            assert fields["metadata"] == {"a": 1}
            event.to_dict()["metadata"]["y"] = 1
            assert event.metadata == {"a": 1, "x": 2}

    @pytest.mark.parametrize("mapping", [MappingProxyType, OrderedDict])
    def test_it_may_be_any_mapping(self, mapping: Any) -> None:
        event = Event("1", "mine", [1], {"a": 1}, NOW)
        fields = event.to_dict()
        assert Event.from_dict(mapping(fields | {"metadata": mapping({"a": 1})})) == event
        assert type(Event.from_dict({"metadata": mapping({})}).metadata) is dict

    def test_what_is_more_is_ignored(self) -> None:
        assert Event.from_dict({"id": "1", "more": 1}).id == "1"

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("2024-01-02T03:04:05.678901+00:00", NOW),
            ("2024-01-02T03:04:05.678901Z", NOW),
            ("2024-01-02T05:04:05.678901+02:00", NOW),
            ("2024-01-02T03:04:05.678901", NOW),
            ("20240102T030405.678901Z", NOW),
            ("2024-01-02", datetime(2024, 1, 2, tzinfo=UTC)),
        ],
    )
    def test_a_timestamp_is_any_form_of_iso_8601(self, text: str, expected: datetime) -> None:
        for fields in ({"timestamp": text}, Event().to_dict() | {"timestamp": text}):
            event = Event.from_dict(fields)
            assert event.timestamp == expected
            assert event.timestamp.tzinfo is UTC

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("timestamp", "yesterday"),
            ("timestamp", ""),
            ("timestamp", "2024-13-01"),
            ("timestamp", "0001-01-01T00:00:00+01:00"),
            ("timestamp", "9999-12-31T23:59:59-01:00"),
            ("timestamp", 1700000000),
            ("timestamp", date(2024, 1, 2)),
            ("metadata", []),
            ("metadata", "a"),
            ("metadata", 5),
        ],
    )
    def test_a_field_that_is_wrong_is_refused(self, field: str, value: Any) -> None:
        for fields in ({field: value}, Event().to_dict() | {field: value}):
            with pytest.raises(EventError, match=f"event's {field}"):
                Event.from_dict(fields)

    @pytest.mark.parametrize("value", [None, [], "", "text", 5, [("id", "1")], b"{}"])
    def test_it_is_read_from_a_mapping_only(self, value: Any) -> None:
        with pytest.raises(EventError, match="mapping"):
            Event.from_dict(value)

    def test_an_id_with_inner_spaces_and_others_is_kept(self) -> None:
        for id_ in ("a b", "\u3000a", "a\u200b", "é", "\xa0", "a\tb"):
            assert Event.from_dict(Event().to_dict() | {"id": id_}).id == id_


class TestJson:
    @given(EVENTS)
    def test_it_is_a_round_trip(self, event: Event) -> None:
        text = event.to_json()
        assert Event.from_json(text) == event
        assert Event.from_json(text.encode()) == event
        assert "\n" not in text
        assert json.loads(text) == event.to_dict()

    @EACH_VALUE
    @EACH_TYPE
    def test_it_is_one_for_every_value_and_type(self, value: Any, name: str) -> None:
        event = Event(type=name, data=value)
        back = Event.from_json(event.to_json())
        assert back == event
        assert type(back.data) is type(value)

    @pytest.mark.parametrize(
        "text", ["", "{", "NaN", '{"data":NaN}', '{"data":"\\ud800"}', b"\xff"]
    )
    def test_text_that_is_not_json_is_refused(self, text: Any) -> None:
        with pytest.raises(DecodeError):
            Event.from_json(text)

    @pytest.mark.parametrize("text", ["[]", "1", "null", '"a"', "true"])
    def test_json_that_is_not_an_object_is_refused(self, text: str) -> None:
        with pytest.raises(DecodeError, match="an event is a JSON object"):
            Event.from_json(text)

    @pytest.mark.parametrize(
        "text", ['{"id":1}', '{"id":"a\\nb"}', '{"type":[]}', '{"metadata":[]}']
    )
    def test_an_object_that_is_not_an_event_is_refused(self, text: str) -> None:
        with pytest.raises(EventError):
            Event.from_json(text)


RICH: list[tuple[Any, Any]] = [
    (NOW, "2024-01-02T03:04:05.678901+00:00"),
    (date(2024, 1, 2), "2024-01-02"),
    (dt.time(3, 4), "03:04:00"),
    (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    (Kind.CREATED, "order.created"),
    (Point(1, NOW), {"x": 1, "y": "2024-01-02T03:04:05.678901+00:00"}),
    (Decimal("1.10"), "1.10"),
    ((1, 2), [1, 2]),
]
CYCLE: list[Any] = []
CYCLE.append(CYCLE)
DEEP: Any = 0
for _ in range(100_000):
    DEEP = [DEEP]
BAD: list[tuple[Any, str]] = [
    (b"bytes", "bytes has no JSON form"),
    ({1}, "set has no JSON form"),
    (object(), "object has no JSON form"),
    (float("nan"), "nan has no JSON form"),
    (float("inf"), "inf has no JSON form"),
    ("\ud800", "not valid Unicode"),
    (Decimal("NaN"), "has no JSON form"),
    (1j, "complex has no JSON form"),
]


class TestData:
    @pytest.mark.parametrize(("value", "expected"), RICH)
    def test_what_is_not_json_but_has_a_form_is_written_anywhere(
        self, value: Any, expected: Any
    ) -> None:
        for data, form in (
            (value, expected),
            ({"a": [1, {"b": value}]}, {"a": [1, {"b": expected}]}),
            (Point([value]), {"x": [expected], "y": 0}),
        ):
            event = Event(data=data, metadata={"m": [value]})
            back = Event.from_json(event.to_json())
            assert back.data == form
            assert back.metadata == {"m": [expected]}
            assert Event.from_sse(event.to_sse()).data == form

    def test_an_event_in_an_event_is_an_object(self) -> None:
        inner = Event("1", "mine", [1], {}, NOW)
        assert Event.from_sse(Event(data=inner).to_sse()).data == inner.to_dict()

    @pytest.mark.parametrize(("value", "says"), BAD)
    def test_what_has_none_is_a_type_error_that_names_event_and_path(
        self, value: Any, says: str
    ) -> None:
        event = Event(id="event-7", data={"user": {"tags": [1, value]}})
        for write, path in (
            (event.to_sse, "$.user.tags[1]"),
            (event.to_json, "$.data.user.tags[1]"),
        ):
            with pytest.raises(TypeError, match=says) as refusal:
                write()
            assert isinstance(refusal.value, EncodeError)
            assert refusal.value.event_id == "event-7"
            assert refusal.value.path == path
            assert f"{path} of event event-7: " in str(refusal.value)

    @pytest.mark.parametrize(("value", "says"), BAD)
    def test_metadata_is_written_by_the_same_rules(self, value: Any, says: str) -> None:
        event = Event(metadata={"a": value})
        with pytest.raises(EncodeError, match=says) as refusal:
            event.to_json()
        assert (refusal.value.path, refusal.value.event_id) == ("$.metadata.a", event.id)
        assert event.to_sse()  # a frame has no metadata

    @pytest.mark.parametrize("value", [CYCLE, DEEP], ids=["cycle", "deep"])
    @pytest.mark.parametrize("metadata", [{}, {"retry": 5}])
    def test_what_contains_itself_or_is_too_deep_is_refused(
        self, value: Any, metadata: Any
    ) -> None:
        event = Event(data=value, metadata=metadata)
        for write in (event.to_sse, event.to_json):
            with pytest.raises(EncodeError, match="nested too deep, or contains itself") as refusal:
                write()
            assert refusal.value.event_id == event.id

    def test_it_is_looked_at_when_it_is_written_and_not_before(self) -> None:
        event = Event(data=object())
        assert event.to_dict()["data"] is event.data


class TestSse:
    def test_a_frame_has_id_type_and_data_and_ends_with_a_blank_line(self) -> None:
        event = Event("1", EventType.ERROR, {"a": [1, "x"]}, {"topic": "t"}, NOW)
        assert event.to_sse() == 'id: 1\nevent: error\ndata: {"a":[1,"x"]}\n\n'
        assert Event(id="1").to_sse() == "id: 1\nevent: message\ndata: null\n\n"
        assert Event(id="1", type="mine").to_sse() == "id: 1\nevent: mine\ndata: null\n\n"

    def test_it_is_the_same_however_often_and_in_whatever_order_it_is_written(self) -> None:
        event = Event(type="never seen before")
        assert event.to_sse() == event.to_sse()
        assert Event(id=event.id, type=event.type).to_sse() == event.to_sse()

    def test_joined_frames_are_read_one_by_one(self) -> None:
        events = [Event(id=str(number), data=number) for number in range(3)]
        text = "".join(event.to_sse() for event in events)
        assert by_the_standard(text) == [("message", str(n), str(n)) for n in range(3)]

    @EACH_VALUE
    @EACH_TYPE
    def test_every_value_and_type_comes_back(self, value: Any, name: str) -> None:
        event = Event(type=name, data=value)
        back = Event.from_sse(event.to_sse())
        assert back.data == value
        assert type(back.data) is type(value)
        assert back.type == event.type
        assert back.metadata == {}
        if event.type in (EventType.CONNECT, EventType.DISCONNECT, EventType.HEARTBEAT):
            assert UUID7.fullmatch(back.id)
        else:
            assert back.id == event.id

    @given(EVENTS)
    def test_whatever_it_holds_it_is_one_frame_for_any_reader(self, event: Event) -> None:
        text = event.to_sse()
        back = Event.from_sse(text)
        assert (back.type, back.data) == (event.type, event.data)
        [(kind, id_, data)] = by_the_standard(text)
        assert json.loads(data) == event.data
        # httpx-sse strips what the standard does not.
        assert (kind.strip(), id_.strip()) in [
            (event.type.strip(), event.id.strip()),
            (event.type.strip(), ""),
        ]

    @pytest.mark.parametrize("kind", [EventType.CONNECT, EventType.DISCONNECT, EventType.HEARTBEAT])
    def test_a_frame_that_is_no_event_of_the_application_has_no_id(self, kind: EventType) -> None:
        assert Event(id="1", type=kind).to_sse() == f"event: {kind}\ndata: null\n\n"
        assert Event(id="1", type=str(kind.value)).to_sse() == f"event: {kind}\ndata: null\n\n"
        event = Event(id="1")
        event.type = kind.value
        assert "id:" not in event.to_sse()
        assert "id:" not in Event(type=kind, metadata={"retry": 5}).to_sse()

    def test_a_control_frame_has_none(self) -> None:
        event = control_event("stream.lost", lost=3)
        assert event.to_sse() == 'event: stream.lost\ndata: {"lost":3}\n\n'
        error = Event(type=EventType.ERROR, metadata={"control": True})
        assert error.to_sse() == "event: error\ndata: null\n\n"
        assert error.to_sse() == error.to_sse()
        assert Event(id="1", type=EventType.ERROR).to_sse().startswith("id: 1\n")

    def test_a_control_event_comes_back_as_one(self) -> None:
        event = control_event("stream.gap", after="7")
        back = Event.from_sse(event.to_sse())
        assert back.is_control
        assert (back.type, back.data) == ("stream.gap", {"after": "7"})
        assert Event.from_json(event.to_json()) == event

    @pytest.mark.parametrize("retry", [0, 1, 3000, 2**53 - 1])
    def test_retry_is_a_line_of_its_own(self, retry: int) -> None:
        event = Event(id="1", data=[1], metadata={"retry": retry})
        assert event.to_sse() == f"id: 1\nevent: message\nretry: {retry}\ndata: [1]\n\n"
        assert Event.from_sse(event.to_sse()).metadata == {"retry": retry}

    @pytest.mark.parametrize("retry", [-1, "5", 1.5, True, 2**53, "1\nid: 2"])
    def test_a_retry_that_is_none_is_refused(self, retry: Any) -> None:
        with pytest.raises(EventError, match="cannot be a frame"):
            Event(metadata={"retry": retry}).to_sse()

    @pytest.mark.parametrize(
        "content_type", ["text/plain", "text/html; charset=utf-8", "TEXT/PLAIN", "image/svg+xml"]
    )
    def test_text_is_sent_as_it_is(self, content_type: str) -> None:
        data = '<p id="a">\n  b: c\n</p>\n'
        event = Event(id="1", data=data, metadata={"content_type": content_type})
        assert event.to_sse() == (
            'id: 1\nevent: message\ndata: <p id="a">\ndata:   b: c\ndata: </p>\ndata: \n\n'
        )
        back = Event.from_sse(event.to_sse(), content_type=content_type)
        assert back.data == data
        assert back.metadata == {"content_type": content_type}

    def test_text_cannot_forge_a_field_or_a_frame(self) -> None:
        event = Event(
            id="1", data="a\n\nid: 2\rdata: b\r\n\r\n", metadata={"content_type": "text/plain"}
        )
        [(_, id_, data)] = by_the_standard(event.to_sse())
        assert (id_, data) == ("1", "a\n\nid: 2\ndata: b\n\n")

    @pytest.mark.parametrize("text", ["", "null", "12", '{"a":1}', '"quoted"', " x", "{"])
    def test_text_that_looks_like_json_stays_text(self, text: str) -> None:
        event = Event(data=text, metadata={"content_type": "text/plain"})
        assert Event.from_sse(event.to_sse(), content_type="text/plain").data == text

    @pytest.mark.parametrize("data", [None, 5, {}, [], b"a"])
    def test_text_is_a_str(self, data: Any) -> None:
        event = Event(data=data, metadata={"content_type": "text/plain"})
        with pytest.raises(EncodeError, match="data of type text/plain is a str") as refusal:
            event.to_sse()
        assert refusal.value.event_id == event.id

    def test_text_is_valid_unicode(self) -> None:
        event = Event(data="\ud800", metadata={"content_type": "text/plain"})
        with pytest.raises(EncodeError, match="not valid Unicode") as refusal:
            event.to_sse()
        assert refusal.value.event_id == event.id

    @pytest.mark.parametrize(
        "content_type",
        [
            None,
            "",
            "application/json",
            "Application/JSON; charset=utf-8",
            "application/ld+json",
            " text/json ",
        ],
    )
    def test_json_of_any_name_is_json(self, content_type: str | None) -> None:
        event = Event(id="1", data="text", metadata={"content_type": content_type})
        assert event.to_sse() == 'id: 1\nevent: message\ndata: "text"\n\n'
        assert Event.from_sse(event.to_sse(), content_type=content_type).data == "text"

    def test_what_is_not_json_is_text_unless_it_was_said_to_be(self) -> None:
        back = Event.from_sse("data: hello\n\n")
        assert (back.data, back.metadata) == ("hello", {"content_type": "text/plain"})
        with pytest.raises(DecodeError):
            Event.from_sse("data: hello\n\n", content_type="application/json")

    def test_a_frame_of_others_is_read(self) -> None:
        event = Event.from_sse("\ufeff: comment\r\nid:7\rdata:1\r\ndata: 2\nunknown\n\n")
        assert (event.id, event.type) == ("7", EventType.MESSAGE)
        assert event.data == "1\n2"
        assert datetime.now(UTC) - event.timestamp < timedelta(minutes=1)

    @pytest.mark.parametrize(
        "text", ["", "data: 1\n", ": comment\n\n", "data: 1\n\ndata: 2\n\n", "id: 1\n\n"]
    )
    def test_it_is_read_from_exactly_one_frame(self, text: str) -> None:
        with pytest.raises(DecodeError, match="one frame was expected"):
            Event.from_sse(text)

    def test_text_that_is_not_unicode_is_refused(self) -> None:
        with pytest.raises(DecodeError, match="not valid Unicode"):
            Event.from_sse("data: \ud800\n\n")

    def test_an_id_that_an_event_cannot_have_is_refused(self) -> None:
        with pytest.raises(EventError, match="event's id"):
            Event.from_sse("id: a \ndata: 1\n\n")

    @pytest.mark.parametrize("metadata", [{}, {"content_type": "text/plain"}])
    def test_a_frame_of_any_size_comes_back(self, metadata: dict[str, Any]) -> None:
        data = "x" * 3_000_000 + "\n" * 1000
        event = Event(data=data, metadata=metadata)
        back = Event.from_sse(event.to_sse(), content_type=metadata.get("content_type"))
        assert back.data == data


class TestControlEvents:
    def test_one_is_marked_and_has_its_data(self) -> None:
        event = control_event("stream.lost", lost=3, overflow="drop_oldest")
        assert event.is_control
        assert event.type == "stream.lost"
        assert event.data == {"lost": 3, "overflow": "drop_oldest"}
        assert event.metadata == {"control": True}

    def test_others_are_not(self) -> None:
        assert not Event().is_control
        assert not Event(metadata={"control": "yes"}).is_control


class TestCreateEvent:
    def test_data_comes_first_and_keywords_are_metadata(self) -> None:
        event = create_event({"total": 9}, topic="orders.new", retry=5)
        assert event.data == {"total": 9}
        assert event.type is EventType.MESSAGE
        assert event.metadata == {"topic": "orders.new", "retry": 5}

    def test_the_type_comes_second(self) -> None:
        assert create_event(1, EventType.ERROR).type is EventType.ERROR
        assert create_event(1, "mine").type == "mine"
        assert create_event(1, event_type="mine").type == "mine"
        assert create_event(1, event_type="mine").metadata == {}

    def test_all_can_be_given_by_name(self) -> None:
        event = create_event(data=None, event_type="mine", a=1)
        assert (event.data, event.type, event.metadata) == (None, "mine", {"a": 1})
        assert create_event(data=5).data == 5

    def test_metadata_may_be_called_like_an_argument(self) -> None:
        event = create_event(1, data=2, id=3, type=4, metadata=5, timestamp=6, self=7)
        assert event.data == 1
        assert event.metadata == {
            "data": 2,
            "id": 3,
            "type": 4,
            "metadata": 5,
            "timestamp": 6,
            "self": 7,
        }
        assert create_event(1, "mine", event_type=2).metadata == {"event_type": 2}

    def test_there_is_no_event_without_data(self) -> None:
        with pytest.raises(TypeError, match="needs data"):
            create_event()
        with pytest.raises(TypeError, match="needs data"):
            create_event(topic="a")


class TestSubscription:
    def test_it_is_a_dataclass_with_the_fields_that_callers_know(self) -> None:
        before = datetime.now(UTC)
        subscription = Subscription()
        assert [field.name for field in dataclasses.fields(subscription)] == [
            "id",
            "topic",
            "handler",
            "filter_fn",
            "active",
            "created_at",
        ]
        assert UUID7.fullmatch(subscription.id)
        assert subscription.id != Subscription().id
        assert subscription.topic == "*"
        assert subscription.handler is None
        assert subscription.filter_fn is None
        assert subscription.active is True
        assert before <= subscription.created_at <= datetime.now(UTC)
        assert subscription.created_at.tzinfo is UTC

    def test_it_can_be_made_with_all_of_them(self) -> None:
        subscription = Subscription("s", "a", print, bool, False, NOW)
        assert subscription.id == "s"
        assert dataclasses.replace(subscription, active=True).active
        assert repr(subscription) == (
            f"Subscription(id='s', topic='a', active=False, created_at={NOW!r})"
        )

    def test_it_is_only_itself(self) -> None:
        assert Subscription(id="s") != Subscription(id="s")
        assert len({Subscription(id="s"), Subscription(id="s")}) == 2

    @pytest.mark.parametrize(
        ("topic", "of_event", "expected"),
        [
            ("*", None, True),
            ("*", "a", True),
            ("a", "a", True),
            ("a", "b", False),
            ("a", None, False),
            ("a.*", "a.b", True),
            ("a.*", "a", False),
            ("a.>", "a.b.c", True),
            (["a", "b"], "b", True),
            ("a", 5, False),
        ],
    )
    def test_it_receives_what_its_topic_says(
        self, topic: Any, of_event: Any, expected: bool
    ) -> None:
        event = Event(metadata={} if of_event is None else {"topic": of_event})
        assert Subscription(topic=topic).should_receive(event) is expected

    def test_it_receives_what_its_filter_says(self) -> None:
        subscription = Subscription(topic="a", filter_fn=lambda event: event.data)
        yes, no = (Event(data=data, metadata={"topic": "a"}) for data in ("x", ""))
        assert subscription.should_receive(yes) is True
        assert subscription.should_receive(no) is False
        assert subscription.should_receive(Event(data="x")) is False  # another topic

    def test_an_inactive_one_receives_nothing_and_asks_nobody(self) -> None:
        asked: list[Event] = []

        def ask(event: Event) -> bool:
            asked.append(event)
            return True

        subscription = Subscription(active=False, filter_fn=ask)
        assert subscription.should_receive(Event()) is False
        assert not asked

    def test_what_the_filter_raises_is_raised(self) -> None:
        subscription = Subscription(filter_fn=lambda event: event.data / 0)
        with pytest.raises(ZeroDivisionError):
            subscription.should_receive(Event(data=1))

    def test_a_topic_that_cannot_be_is_refused_when_asked(self) -> None:
        with pytest.raises(TopicError):
            Subscription(topic="").should_receive(Event())

    def test_cancel_deactivates_it(self) -> None:
        subscription = Subscription()
        subscription.cancel()
        assert not subscription.active
        assert not subscription.should_receive(Event())
        subscription.cancel()

    async def test_cancel_frees_it_at_the_stream(self) -> None:
        stream = InMemoryStream()
        subscriptions = [await stream.subscribe(print) for _ in range(100)]
        assert stream.statistics().subscribers == 100
        for subscription in subscriptions:
            subscription.cancel()
            subscription.cancel()
        assert stream.statistics().subscribers == 0

    async def test_leaving_its_context_cancels_it(self) -> None:
        stream = InMemoryStream()
        got: list[Any] = []
        async with await stream.subscribe(lambda event: got.append(event.data)) as subscription:
            assert subscription.active
            await stream.publish(Event(data=1))
        await stream.publish(Event(data=2))
        assert got == [1]
        assert not subscription.active
        assert stream.statistics().subscribers == 0
        with pytest.raises(KeyError):
            async with await stream.subscribe(print) as subscription:
                raise KeyError
        assert not subscription.active

    async def test_what_is_changed_later_counts_from_then_on(self) -> None:
        stream = InMemoryStream()
        first: list[Any] = []
        second: list[Any] = []
        subscription = await stream.subscribe(lambda event: first.append(event.data))

        async def publish(data: Any) -> None:
            await stream.publish(Event(data=data))

        await publish(1)
        subscription.active = False
        await publish(2)
        subscription.active = True
        await publish(3)
        subscription.filter_fn = lambda event: event.data != 4
        await publish(4)
        await publish(5)
        subscription.handler = lambda event: second.append(event.data)
        await publish(4)
        await publish(6)
        subscription.filter_fn = None
        await publish(4)
        subscription.handler = None
        await publish(7)
        assert first == [1, 3, 5]
        assert second == [6, 4]
        await stream.aclose()

    async def test_the_same_goes_for_one_with_an_async_handler(self) -> None:
        stream = InMemoryStream()
        got: list[Any] = []

        async def handle(event: Event) -> None:
            got.append(event.data)

        subscription = await stream.subscribe(handle)
        for data in range(1, 4):
            subscription.active = data != 2
            await stream.publish(Event(data=data))
        subscription.filter_fn = lambda event: event.data != 4
        for data in range(4, 6):
            await stream.publish(Event(data=data))
        await stream.drain()
        assert got == [1, 3, 5]
        await stream.aclose()

    async def test_those_that_come_and_go_leave_nothing(self) -> None:
        stream = InMemoryStream()

        async def come_and_go(times: int) -> None:
            for number in range(times):
                subscription = await stream.subscribe(print, topic=f"user.{number % 10}")
                subscription.cancel()

        asyncio.get_running_loop().set_debug(False)
        await come_and_go(1000)
        gc.collect()
        before = sys.getallocatedblocks()
        await come_and_go(5000)
        gc.collect()
        assert sys.getallocatedblocks() - before < 1000

    def test_one_that_nobody_holds_is_gone(self) -> None:
        subscription = Subscription(handler=print)
        reference = weakref.ref(subscription)
        del subscription
        assert reference() is None


def test_all_errors_of_events_are_the_librarys_and_values() -> None:
    for wrong in (
        lambda: Event(id=""),
        lambda: Event(type=""),
        lambda: Event.from_json("x"),
        lambda: Event.from_sse(""),
        lambda: Event(data={1}).to_json(),
    ):
        with pytest.raises(StreamingError) as refusal:
            wrong()
        assert isinstance(refusal.value, ValueError)


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda value: Event(id=value), EventError),
        (lambda value: Event(type=value), EventError),
        (lambda value: Event(metadata=value), EventError),
        (lambda value: Event(timestamp=value), EventError),
        (lambda value: Event.from_dict({"id": value}), EventError),
        (lambda value: Event.from_dict({"timestamp": value}), EventError),
        (lambda value: Event.from_dict({"metadata": value}), EventError),
        (Event.from_dict, EventError),
        (lambda value: Subscription(topic=value).should_receive(Event()), TopicError),
        (lambda value: Subscription(handler=value), TypeError),
        (lambda value: Subscription(filter_fn=value), TypeError),
    ],
)
@pytest.mark.parametrize(
    "value",
    [10**5000, Unprintable(), [list(range(9))] * 10_000, 1.5],
    ids=["huge", "unprintable", "long", "number"],
)
def test_messages_show_any_value_and_little_of_a_large_one(
    make: Callable[[Any], object], error: type[Exception], value: object
) -> None:
    with pytest.raises(error) as raised:
        make(value)
    assert type(raised.value) is error
    assert len(str(raised.value)) < 700
    if value == 1.5:
        assert str(raised.value).endswith("1.5")


def test_messages_show_the_beginning_and_the_end_of_a_long_text() -> None:
    with pytest.raises(EventError, match=r"reserved: 'stream\.x+\.\.\.x+'$"):
        Event(type="stream." + "x" * 100_000)
    with pytest.raises(EncodeError, match=r"not valid Unicode: 'x+\.\.\.x+\\ud800'$"):
        Event(data="x" * 100_000 + "\ud800").to_sse()


def test_a_handler_that_cannot_be_called_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"^handler is a function of one event, not 'orders\.\*'$"):
        asyncio.run(InMemoryStream().subscribe("orders.*"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^filter_fn is a function of one event, not 7$"):
        asyncio.run(InMemoryStream().subscribe(print, filter_fn=7))  # type: ignore[arg-type]
