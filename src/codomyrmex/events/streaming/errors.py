"""What can go wrong, as one tree: one class for each thing a caller would do about it.

    StreamingError
    ├── EventError (ValueError)             an id, type or field that no event may have
    ├── TopicError (ValueError)             a topic or pattern that cannot be one
    ├── FrameError (ValueError)             a frame that cannot be written or read
    ├── EncodeError (TypeError, ValueError) data that is not JSON; names the event and the path
    ├── DecodeError (ValueError)            text that is not strict JSON
    ├── StreamClosed (RuntimeError)         published to a stream after it was stopped
    ├── PublishTimeout (TimeoutError)       the stream stayed full for as long as one may wait
    ├── UnknownSubscription (LookupError)   no subscription has this id (any more)
    ├── AlreadyConsumed (RuntimeError)      a second reader of one subscription
    ├── NoBatchHandler (RuntimeError)       a full batch with nowhere to go
    ├── IdConflict (ValueError)             a log has another event with this id
    ├── TooLarge (ValueError)               an event is larger than a log takes
    ├── ConsumerInUse (RuntimeError)        another holds the consumer of this name
    ├── UnknownRun (LookupError)            a topic has no run, or none any more
    ├── LogFull (OSError)                   there is no room for a log to grow
    ├── LogUnusable (OSError)               a log's file or engine cannot be used as it is
    └── MissingExtra (ImportError)          an optional dependency is not installed

Each inherits the builtin it is a case of, so that code which knows only builtins catches it
as well. What a handler would otherwise parse out of a message is an attribute.
"""

import reprlib

__all__ = [
    "AlreadyConsumed",
    "ConsumerInUse",
    "DecodeError",
    "EncodeError",
    "EventError",
    "FrameError",
    "IdConflict",
    "LogFull",
    "LogUnusable",
    "MissingExtra",
    "NoBatchHandler",
    "PublishTimeout",
    "StreamClosed",
    "StreamingError",
    "TooLarge",
    "TopicError",
    "UnknownRun",
    "UnknownSubscription",
]


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 100


def shown(value: object) -> str:
    """A value as messages show it: cut short, since it may be of any size."""
    try:
        return _short.repr(value)
    except Exception:  # an int of very many digits, for one
        return f"one of type {type(value).__name__}"


class StreamingError(Exception):
    """Base of every error this library raises."""


class EventError(StreamingError, ValueError):
    """An event cannot have this id, type, metadata or timestamp."""


class TopicError(StreamingError, ValueError):
    """A string cannot be the topic or the pattern it is used as."""


class FrameError(StreamingError, ValueError):
    """A frame cannot be written or read: a forbidden character, or a size over its limit."""


class EncodeError(StreamingError, TypeError, ValueError):
    """Data has no strict JSON form.

    Attributes:
        reason: what is wrong with the value.
        path: where the value is, from the root ``$`` of what was encoded: ``$.user.tags[3]``, or
            ``$.data.user.tags[3]`` when that was the whole event.
        event_id: id of the event that holds the data; None outside an event.
    """

    def __init__(self, reason: str, path: str = "$", event_id: str | None = None) -> None:
        super().__init__(reason, path, event_id)
        self.reason = reason
        self.path = path
        self.event_id = event_id

    def __str__(self) -> str:
        where = f" of event {self.event_id}" if self.event_id is not None else ""
        return f"{self.path}{where}: {self.reason}"


class DecodeError(StreamingError, ValueError):
    """Text is not strict JSON (RFC 8259), or not what was expected in it."""


class StreamClosed(StreamingError, RuntimeError):
    """The stream has been stopped or closed and takes no more events."""


class PublishTimeout(StreamingError, TimeoutError):
    """The stream stayed full for as long as a publisher may wait; the event was not taken."""


class UnknownSubscription(StreamingError, LookupError):
    """No subscription has this id: it never existed, or has been removed.

    Attributes:
        subscription_id: the id that was asked for.
    """

    def __init__(self, subscription_id: str) -> None:
        super().__init__(subscription_id)
        self.subscription_id = subscription_id

    def __str__(self) -> str:
        return f"no subscription has the id {self.subscription_id!r}"


class AlreadyConsumed(StreamingError, RuntimeError):
    """A subscription is being read already; two readers would split its events.

    Attributes:
        subscription_id: the id of the subscription.
    """

    def __init__(self, subscription_id: str) -> None:
        super().__init__(subscription_id)
        self.subscription_id = subscription_id

    def __str__(self) -> str:
        return (
            f"subscription {self.subscription_id!r} has a reader already; subscribe once per reader"
        )


class NoBatchHandler(StreamingError, RuntimeError):
    """A batch is full and no handler was registered to take it; the event was not added."""


class IdConflict(StreamingError, ValueError):
    """A log holds another event with this id: not the same one, published again.

    Attributes:
        event_id: the id.
    """

    def __init__(self, event_id: str) -> None:
        super().__init__(event_id)
        self.event_id = event_id

    def __str__(self) -> str:
        return f"the log holds another event with the id {shown(self.event_id)}"


class TooLarge(StreamingError, ValueError):
    """An event is larger than a log takes.

    Attributes:
        event_id: its id.
        size: how many bytes it has.
        limit: how many it may have.
    """

    def __init__(self, event_id: str, size: int, limit: int) -> None:
        super().__init__(event_id, size, limit)
        self.event_id = event_id
        self.size = size
        self.limit = limit

    def __str__(self) -> str:
        return (
            f"event {shown(self.event_id)} has {self.size} bytes; this log takes up to {self.limit}"
        )


class ConsumerInUse(StreamingError, RuntimeError):
    """Another holds the consumer of this name: here, or in another process.

    Attributes:
        name: the consumer's name.
        seconds: how long the other holds it at least, unless it lets go.
    """

    def __init__(self, name: str, seconds: float) -> None:
        super().__init__(name, seconds)
        self.name = name
        self.seconds = seconds

    def __str__(self) -> str:
        return (
            f"consumer {shown(self.name)} is in use: its lease runs for {self.seconds:.1f} s more,"
            " and is renewed for as long as it is used"
        )


class UnknownRun(StreamingError, LookupError):
    """No run of this topic is known: none began, or it ended longer ago than its time to live.

    Attributes:
        topic: the topic.
    """

    def __init__(self, topic: str) -> None:
        super().__init__(topic)
        self.topic = topic

    def __str__(self) -> str:
        return (
            f"no run of topic {shown(self.topic)} is known: none began, or it ended longer ago than"
            " its time to live"
        )


class LogFull(StreamingError, OSError):
    """There is no room for a log to grow: nothing of what was appended is stored.

    Attributes:
        path: the log's file.
    """

    def __init__(self, path: object) -> None:
        super().__init__(path)
        self.path = str(path)

    def __str__(self) -> str:
        return f"{self.path}: the disk is full; what is stored stays, nothing was added"


class LogUnusable(StreamingError, OSError):
    """A log cannot be used as it is.

    Attributes:
        path: the log's file.
        reason: what is wrong, and what can be done.
    """

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(path, reason)
        self.path = str(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class MissingExtra(StreamingError, ImportError):
    """An optional dependency is not installed.

    Attributes:
        needed_for: what cannot be done without it.
        extra: the extra of this distribution that installs it.
    """

    def __init__(self, needed_for: str, extra: str) -> None:
        super().__init__(needed_for, extra)
        self.needed_for = needed_for
        self.extra = extra

    def __str__(self) -> str:
        return (
            f"{self.needed_for} needs the extra {self.extra!r}: "
            f"pip install 'codomyrmex-streaming[{self.extra}]'"
        )
