"""`Record`: an event, encoded."""

from typing import Any

import pytest

from codomyrmex.events.streaming import DecodeError, Event, EventError, create_event
from codomyrmex.events.streaming.log import Record


def test_topics_are_several_and_not_the_letters_of_one() -> None:
    topics: Any = "orders"
    with pytest.raises(TypeError, match="a collection of topics, not 'orders'"):
        Record.of(Event(), topics=topics)


def test_none_are_an_answer() -> None:
    assert Record.of(create_event(1, topic="a"), topics=[]).topics == ()


@pytest.mark.parametrize(
    ("metadata", "error"), [(b"[1]", EventError), (b"null", EventError), (b"{", DecodeError)]
)
def test_metadata_that_is_no_object_is_an_error(metadata: bytes, error: type[Exception]) -> None:
    record = Record.of(Event(id="1"))._replace(metadata=metadata)
    with pytest.raises(error):
        record.event()


def test_its_size_is_that_of_all_it_holds() -> None:
    event = Event(id="1234", data="text", metadata={"topic": "ab", "by": 1})
    record = Record.of(event, topics=["ab", "abc"])
    assert record.size == len('"text"') + len('{"by":1}') + len("1234") + len("ababc")
