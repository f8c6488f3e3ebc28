"""`Record`: an event as a log keeps it."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from ..codec import json
from ..errors import EncodeError, EventError
from ..models import Event, is_json
from ..topics import Exact, check_topic, topic_of

__all__ = ["Record", "microseconds"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_NO_METADATA = b""


def microseconds(when: datetime) -> int:
    """A time with a timezone in microseconds since 1970."""
    return (when - _EPOCH) // _MICROSECOND


class Record(NamedTuple):
    """An event as a log keeps it: encoded, and decoded only when somebody asks.

    Attributes:
        position: its place in the log's one order, from 1; 0: it is in no log.
        id: name of the event; also the cursor of who has read so far.
        topics: all topics it was published to, the first of which is the event's own; none: only
            who asks for every event gets it.
        type: the event's type.
        private: whether only who is authorized for one of its topics may read it.
        body: the data, as it goes out: JSON, or text where the metadata's ``content_type`` says so.
        metadata: the metadata as a JSON object, without ``topic``; empty where there is none.
        timestamp: when the event happened, in microseconds since 1970, UTC.
        time: when the log took it, by the log's clock, in microseconds since 1970, UTC; 0: it is in
            no log.
    """

    position: int
    id: str
    topics: tuple[str, ...]
    type: str
    private: bool
    body: bytes
    metadata: bytes
    timestamp: int
    time: int

    @classmethod
    def of(
        cls, event: Event, *, topics: Iterable[str | Exact] | None = None, private: bool = False
    ) -> "Record":
        """The record of an event, which is in no log yet.

        Args:
            event: the event; its data and metadata are encoded here.
            topics: all topics it is for, as `Exact` where one looks like a pattern; None: the one
                in its metadata, if there is one.
            private: whether only who is authorized may read it. This never comes from the
                metadata, which a client may have written.

        Raises:
            EncodeError: data or metadata have no JSON form; names the event and the path.
            TopicError: events cannot be published to one of the topics.
        """
        metadata = event.metadata
        if topics is None:
            topic = metadata.get("topic")
            all_topics: tuple[str, ...] = () if topic is None else (check_topic(topic),)
        else:
            if isinstance(topics, str):
                raise TypeError(f"topics is a collection of topics, not {topics!r}")
            all_topics = tuple(dict.fromkeys(topic_of(topic) for topic in topics))
        try:
            text = event._text(metadata.get("content_type"))
            if metadata and (len(metadata) > 1 or "topic" not in metadata):
                rest = {name: value for name, value in metadata.items() if name != "topic"}
                about = json.encode(rest).encode()
            else:
                about = _NO_METADATA
        except EncodeError as error:
            raise EncodeError(error.reason, error.path, event.id) from error
        return cls(
            0,
            event.id,
            all_topics,
            str(event.type),
            private,
            text.encode(),
            about,
            microseconds(event.timestamp),
            0,
        )

    @property
    def size(self) -> int:
        """For how many bytes it counts: those of body and metadata, and the length of the names."""
        # Taken apart at once, which is twice as fast: every event is asked several times.
        _, id_, topics, _, _, body, metadata, _, _ = self
        return len(body) + len(metadata) + len(id_) + len("".join(topics))

    def placed(self, position: int, time: int) -> "Record":
        """This record in a log."""
        # Not by `Record(...)`, which takes twice as long.
        _, id_, topics, type_, private, body, metadata, timestamp, _ = self
        values = (position, id_, topics, type_, private, body, metadata, timestamp, time)
        return tuple.__new__(Record, values)

    @classmethod
    def placed_all(cls, drafts: "Iterable[Record]", first: int, time: int) -> "list[Record]":
        """These records in a log, one after the other from a position on."""
        new = tuple.__new__
        return [
            new(cls, (position, id_, topics, type_, private, body, metadata, timestamp, time))
            for position, (_, id_, topics, type_, private, body, metadata, timestamp, _) in (
                enumerate(drafts, first)
            )
        ]

    def says_the_same(self, other: "Record") -> bool:
        """Whether both are the same event, published again: all but the times is alike."""
        return self[1:7] == other[1:7]

    def event(self) -> Event:
        """The event, decoded.

        Raises:
            DecodeError: the body is not what it should be: it was not written by `of`.
        """
        metadata: dict[str, Any] = {}
        if self.metadata:
            about = json.decode(self.metadata)
            if not isinstance(about, dict):
                raise EventError(f"the metadata of record {self.id!r} is not an object")
            metadata = about
        if self.topics:
            metadata["topic"] = self.topics[0]
        return Event(
            id=self.id,
            type=self.type,
            data=json.decode(self.body)
            if is_json(metadata.get("content_type"))
            else self.body.decode(),
            metadata=metadata,
            timestamp=_EPOCH + timedelta(0, 0, self.timestamp),
        )
