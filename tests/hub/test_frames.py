"""What goes out of stored bytes is what the decoded event would be written as."""

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codomyrmex.events.streaming.codec import sse
from codomyrmex.events.streaming.errors import StreamingError
from codomyrmex.events.streaming.hub.frames import Frames, data_frame, event_frame, event_json
from codomyrmex.events.streaming.log import Record
from codomyrmex.events.streaming.models import Event, EventType, control_event

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(
    lambda name: name.strip(" \t") == name and not name.startswith("stream.")
)
TIMES = st.datetimes(datetime(1970, 1, 2), datetime(9000, 1, 1), timezones=st.just(UTC))


@st.composite
def events(draw: st.DrawFn) -> Event:
    metadata = draw(st.dictionaries(TEXT, VALUES, max_size=2))
    for name in ("topic", "content_type", "retry", "control"):
        metadata.pop(name, None)
    data = draw(VALUES)
    if draw(st.booleans()):
        metadata["topic"] = draw(st.sampled_from(["a", "a.b", "ä/ö"]))
    if draw(st.booleans()):
        metadata["content_type"] = draw(st.sampled_from(["application/json", "text/plain"]))
        if metadata["content_type"] == "text/plain":
            data = draw(TEXT)
    if draw(st.booleans()):
        metadata["retry"] = draw(st.integers(0, 10_000))
    type_ = draw(NAMES | st.sampled_from(list(EventType)))
    return Event(draw(NAMES), type_, data, metadata, draw(TIMES))


@given(events())
def test_a_record_goes_out_as_its_event_would(event: Event) -> None:
    record = Record.of(event)
    assert data_frame(record).decode() == event.to_sse()
    assert json.loads(event_json(record)) == event.to_dict()
    [frame] = sse.Decoder().feed(event_frame(record))
    assert frame.event == "message"
    assert frame.id == event.id
    assert Event.from_json(frame.data) == event


def test_what_a_stream_says_of_itself_has_no_id_in_either_form() -> None:
    event = control_event("stream.end", state="completed")
    record = Record.of(event, topics=["answers.42"])
    assert event_frame(record) == data_frame(record) == event.to_sse().encode()
    assert b"id:" not in data_frame(record)


def record_at(position: int, body: bytes = b"1") -> Record:
    return Record.of(Event(id=f"n{position}"))._replace(position=position, body=body)


def test_each_is_made_once() -> None:
    made: list[str] = []

    def write(record: Record) -> str:
        made.append(record.id)
        return record.id

    frames = Frames(write, "")
    for _ in range(3):
        assert frames.of(record_at(1)) == "n1"
        assert frames.of(record_at(2)) == "n2"
    assert made == ["n1", "n2"]


@pytest.mark.parametrize(("count", "size"), [(10_000, 10), (100, 1 << 20)])
def test_what_is_kept_is_bounded(count: int, size: int) -> None:
    frames = Frames(lambda record: record.body, b"")
    for position in range(count):
        frames.of(record_at(position, b"x" * size))
    assert len(frames._made) <= 2000
    assert sum(map(len, frames._made.values())) <= 8 << 20


def test_what_cannot_be_written_is_nothing_and_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(record: Record) -> str:
        raise StreamingError("no")

    frames = Frames(fail, "")
    assert [frames.of(record_at(1)) for _ in range(3)] == ["", "", ""]
    [message] = [record.message for record in caplog.records]
    assert message == "event n1 cannot be sent and is left out"
