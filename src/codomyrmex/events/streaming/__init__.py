"""Events from where they happen to where they are needed: in one process, to browsers, beyond.

    stream = InMemoryStream()
    await stream.subscribe(print, topic="orders.*")
    await stream.publish(create_event({"total": 9}, topic="orders.new"))

The core needs the standard library only. `testing` is public too, and imported by its own name.
`Hub` is imported when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

from .async_stream import AsyncStream, BatchingStream, WebSocketStream
from .errors import (
    AlreadyConsumed,
    ConsumerInUse,
    DecodeError,
    EncodeError,
    EventError,
    FrameError,
    IdConflict,
    LogFull,
    LogUnusable,
    MissingExtra,
    NoBatchHandler,
    PublishTimeout,
    StreamClosed,
    StreamingError,
    TooLarge,
    TopicError,
    UnknownRun,
    UnknownSubscription,
)
from .models import Event, EventType, Subscription, create_event
from .processors import ProcessorStatistics, Retry, StreamProcessor
from .stream import InMemoryStream, SSEStream, Stream, StreamStatistics, TopicStream, broadcast
from .subscribers import Overflow, QueueStatistics, SubscriberQueue
from .topics import Exact, Pattern

if TYPE_CHECKING:
    from .hub import Hub

__all__ = [
    "AlreadyConsumed",
    "AsyncStream",
    "BatchingStream",
    "ConsumerInUse",
    "DecodeError",
    "EncodeError",
    "Event",
    "EventError",
    "EventType",
    "Exact",
    "FrameError",
    "Hub",
    "IdConflict",
    "InMemoryStream",
    "LogFull",
    "LogUnusable",
    "MissingExtra",
    "NoBatchHandler",
    "Overflow",
    "Pattern",
    "ProcessorStatistics",
    "PublishTimeout",
    "QueueStatistics",
    "Retry",
    "SSEStream",
    "Stream",
    "StreamClosed",
    "StreamProcessor",
    "StreamStatistics",
    "StreamingError",
    "SubscriberQueue",
    "Subscription",
    "TooLarge",
    "TopicError",
    "TopicStream",
    "UnknownRun",
    "UnknownSubscription",
    "WebSocketStream",
    "broadcast",
    "create_event",
]


def __getattr__(name: str) -> Any:
    if name == "Hub":
        from .hub import Hub  # noqa: PLC0415  (who only needs streams does not load it)

        return Hub
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
