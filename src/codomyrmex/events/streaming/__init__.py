"""Events from where they happen to where they are needed: in one process, to browsers, beyond.

    stream = InMemoryStream()
    await stream.subscribe(print, topic="orders.*")
    await stream.publish(create_event({"total": 9}, topic="orders.new"))

The core needs the standard library only. `testing` is public too, and imported by its own name.
Logs and the hub are loaded when they are first asked for.
"""

from importlib import import_module
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
    from .hub import Hub, everyone
    from .log import (
        EARLIEST,
        LATEST,
        Batch,
        Capabilities,
        Consumer,
        Gap,
        Lag,
        Location,
        Log,
        LogStatistics,
        LogStream,
        MemoryLog,
        Record,
        Retention,
        Run,
        RunStatus,
        SQLiteLog,
        open_log,
    )

__all__ = [
    "EARLIEST",
    "LATEST",
    "AlreadyConsumed",
    "AsyncStream",
    "Batch",
    "BatchingStream",
    "Capabilities",
    "Consumer",
    "ConsumerInUse",
    "DecodeError",
    "EncodeError",
    "Event",
    "EventError",
    "EventType",
    "Exact",
    "FrameError",
    "Gap",
    "Hub",
    "IdConflict",
    "InMemoryStream",
    "Lag",
    "Location",
    "Log",
    "LogFull",
    "LogStatistics",
    "LogStream",
    "LogUnusable",
    "MemoryLog",
    "MissingExtra",
    "NoBatchHandler",
    "Overflow",
    "Pattern",
    "ProcessorStatistics",
    "PublishTimeout",
    "QueueStatistics",
    "Record",
    "Retention",
    "Retry",
    "Run",
    "RunStatus",
    "SQLiteLog",
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
    "everyone",
    "open_log",
]


def __getattr__(name: str) -> Any:
    # Who only needs streams in memory does not load the rest.
    if name in __all__:
        for room in (".log", ".hub"):
            module = import_module(room, __name__)
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
